// Gradients of weights: rows of two factors multiplied and summed over the rows.
//
// out[i, j] = sum over m of a[m][i] * b[m][j].
#include "cpu/amx_tiles.h"
#include "cpu/kernels.h"
#include "cpu/panels.h"
#include "cpu/tiles.h"

namespace moe::CPU_CAPABILITY {

namespace {

constexpr int64_t kBlockGroups = 256;  // of rows that are packed at a time

// Some sums of one row, from a column on, to where they belong; `stream_whole` needs
// aligned vectors.
template <typename T>
void emit(const OutputOf<T>& out, int64_t row, int64_t column, const acc_t<T>* sums, int64_t n,
          bool accumulate, bool stream_whole) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  const int64_t at = row * out.stride + column;
  A* wide = out.narrow ? nullptr : out.wide + at;
  T* narrow = out.narrow ? out.narrow + at : nullptr;
  for (int64_t c = 0; c < n; c += L) {
    const int64_t lanes = min(n - c, L);
    const bool whole = lanes == L;
    Vec<A> value = whole ? load(sums + c) : load_some(sums + c, lanes);
    if (!narrow) {
      if (accumulate) value += whole ? load(wide + c) : load_some(wide + c, lanes);
      whole ? store(wide + c, value) : store_some(wide + c, value, lanes);
    } else if (!whole) {
      store_some(narrow + c, value, lanes);
    } else if (stream_whole) {
      stream(narrow + c, value);
    } else {
      store(narrow + c, value);
    }
  }
}

// A part of the result.
template <typename T>
void block_of(const T* const* a, const T* const* b, int64_t m, Range i_range, Range j_range,
              const OutputOf<T>& out) {
  using U = operand_t<T>;
  using A = acc_t<T>;
  constexpr int L = kLanes<A>, G = Compute<T>::G;
  constexpr int64_t kPanel = kPanelVectors * L;
  const int64_t groups = ceil_div(m, G), block_groups = max(min(groups, kBlockGroups), 1);
  const int64_t blocks = max(ceil_div(groups, block_groups), 1);
  const int64_t rows = i_range.size(), columns = j_range.size();
  const int64_t a_columns = ceil_div(rows, L) * L, b_columns = ceil_div(columns, L) * L;
  // Sums are kept aside where whole vectors would not fit, or where the result cannot hold them.
  const bool aside = columns != b_columns || (out.narrow && blocks > 1);
  const int64_t sums_size = aside ? rows * b_columns : 0;
  A* sums = static_cast<A*>(thread_scratch(
      Scratch::kKernel,
      sums_size * sizeof(A) + (a_columns + b_columns) * block_groups * G * sizeof(U)));
  U* a_panels = reinterpret_cast<U*>(sums + sums_size);
  U* b_panels = a_panels + a_columns * block_groups * G;

  OuterTile<T> tile;
  A* wide = aside ? sums : out.wide;
  T* narrow = aside ? nullptr : out.narrow;
  tile.out_stride = aside ? b_columns : out.stride;
  tile.narrow_stride = out.stride;
  // Parts of lines would be written to memory one after the other.
  constexpr bool kWholeLines = kPanel * sizeof(T) >= 64;
  tile.stream = kWholeLines && narrow && out.stream && aligned<kLanes<A>>(narrow, out.stride);
  for (int64_t block = 0; block < blocks; ++block) {
    const Range part{block * block_groups * G, min((block + 1) * block_groups * G, m)};
    tile.groups = ceil_div(part.size(), G);
    tile.accumulate = block > 0 || (!aside && out.accumulate);
    pack_panels<T>(a_panels, [&](int64_t r) { return a[r]; }, m, part, i_range);
    pack_panels<T>(b_panels, [&](int64_t r) { return b[r]; }, m, part, j_range);
    for (int64_t p = 0; p < columns; p += kPanel) {
      const int64_t vectors = ceil_div(min(kPanel, columns - p), L);
      tile.columns = b_panels + p * tile.groups * G;
      tile.column_step = vectors * L * G;
      tile.prefetch = reinterpret_cast<const char*>(tile.columns);
      tile.prefetch_step = 0;
      for (int64_t q = 0; q < rows; q += kPanel) {
        const int64_t height = min(kPanel, rows - q);
        const U* panel = a_panels + q * tile.groups * G;
        tile.row_step = ceil_div(height, L) * L * G;
        for_row_tiles(height, [&](int64_t r, int64_t count) {
          for (int64_t i = 0; i < count; ++i) tile.rows[i] = panel + (r + i) * G;
          tile.out = wide ? wide + (q + r) * tile.out_stride + p : nullptr;
          tile.narrow = narrow ? narrow + (q + r) * tile.narrow_stride + p : nullptr;
          panel_tile<T>(count, vectors)(tile);
        });
      }
    }
  }
  for (int64_t i = 0; aside && i < rows; ++i) {
    emit(out, i, 0, sums + i * b_columns, columns, out.accumulate, false);
  }
  if (tile.stream) finish_streams();
}

// ------------------------------------------------------------------------ few rows to sum over
// Writing the result takes the time then. It is written in long pieces of one or two of its rows;
// what elements of b are multiplied with stays in registers meanwhile.
constexpr int kPieceRows = 2, kPieceGroups = 12;  // at most

// Two rows while that leaves registers for sums. First passes are the largest.
constexpr int rows_of_piece(int groups, bool first) { return first && groups <= 6 ? 2 : 1; }

template <typename T>
struct Piece {
  const operand_t<T>* a[kPieceRows];  // the first group of what belongs to each row
  const operand_t<T>* b;              // [groups, b_step], vectors of groups
  int64_t a_step, b_step;
  int64_t columns;
  acc_t<T>* sums[kPieceRows];  // of the groups before
  acc_t<T>* out[kPieceRows];
};

template <typename T, int groups, bool first, bool past_caches>
void sum_piece(const Piece<T>& piece) {
  using Group = Groups<T>;
  using A = acc_t<T>;
  constexpr int L = kLanes<A>, G = Group::G, rows = rows_of_piece(groups, first);
  typename Group::V a[rows][groups];
  A *before[rows], *out[rows];
  MOE_UNROLL
  for (int r = 0; r < rows; ++r) {
    before[r] = piece.sums[r];
    out[r] = piece.out[r];
    MOE_UNROLL
    for (int g = 0; g < groups; ++g) a[r][g] = Group::spread(piece.a[r] + g * piece.a_step);
  }
  const operand_t<T>* b = piece.b;
  const int64_t step = piece.b_step, columns = piece.columns;
  for (int64_t c = 0; c < columns; c += L) {
    Vec<A> sums[rows];
    MOE_UNROLL
    for (int r = 0; r < rows; ++r) sums[r] = first ? Vec<A>{} : load(before[r] + c);
    MOE_UNROLL
    for (int g = 0; g < groups; ++g) {
      const typename Group::V vector = Group::load(b + g * step + c * G);
      MOE_UNROLL
      for (int r = 0; r < rows; ++r) {
        sums[r] = Group::multiply_add(a[r][g], vector, sums[r]);
      }
    }
    MOE_UNROLL
    for (int r = 0; r < rows; ++r) {
      past_caches ? stream(out[r] + c, sums[r]) : store(out[r] + c, sums[r]);
    }
  }
}

template <typename T, bool first, bool past_caches, size_t... g>
MOE_INLINE auto piece_function(int64_t groups, std::index_sequence<g...>) {
  static constexpr void (*table[])(const Piece<T>&) = {sum_piece<T, g + 1, first, past_caches>...};
  return table[groups - 1];
}

// In pairs: of kDotStep columns the even ones, then the odd ones, which makes rounding cheap.
template <typename T>
constexpr bool kPaired = kHalves<T> == 2;

inline void pack_paired(float* out, const bf16* row, int64_t columns) {
  constexpr int L = kLanes<float>;
  for (int64_t c = 0; c < columns; c += 2 * L) {
    Vec<float> even, odd;
    load_pairs(row + c, even, odd);
    store(out + c, even);
    store(out + c + L, odd);
  }
}

// Rounds sums of products of bf16 numbers. Their NaN are those of the factors, or the processor's:
// adding to the lower half makes no other numbers of them.
inline void stream_paired(bf16* out, const float* sums, int64_t columns) {
  constexpr int L = kLanes<float>;
  const auto rounded = [](Vec<float> sum) __attribute__((always_inline)) {
    const VecU32 bits = bit_cast<VecU32>(sum);
    return bits + 0x7fff + ((bits >> 16) & 1);
  };
  for (int64_t c = 0; c < columns; c += 2 * L) {
    const VecU32 even = rounded(load(sums + c)), odd = rounded(load(sums + c + L));
    stream(reinterpret_cast<float*>(out + c),
           bit_cast<Vec<float>>((even >> 16) | upper_halves(odd)));
  }
}

template <typename T>
void sum_few_rows(const T* const* a, const T* const* b, int64_t m, Range i_range, Range j_range,
                  const OutputOf<T>& out) {
  using U = operand_t<T>;
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<A>, G = Compute<T>::G;
  constexpr bool kUnrounded = std::is_same_v<T, A>;
  constexpr int64_t kPieceBytes = 16 << 10;  // of b, in a first-level cache
  constexpr auto all = std::make_index_sequence<kPieceGroups>();
  const int64_t groups = ceil_div(m, G), rows = i_range.size();
  const int64_t passes = ceil_div(groups, kPieceGroups), per_pass = ceil_div(groups, passes);
  const int64_t together = rows_of_piece(per_pass, true);
  const int64_t most = kPieceBytes / (groups * G * static_cast<int64_t>(sizeof(U))) / 64 * 64;
  const int64_t widest = min(ceil_div(j_range.size(), 2 * L) * 2 * L, most);
  Piece<T> piece;
  piece.a_step = ceil_div(rows, L) * L * G;
  piece.b_step = widest * G;
  A* const sums = static_cast<A*>(thread_scratch(
      Scratch::kKernel,
      kPieceRows * widest * sizeof(A) + groups * (piece.a_step + piece.b_step) * sizeof(U)));
  U* const a_groups = reinterpret_cast<U*>(sums + kPieceRows * widest);
  U* const b_groups = a_groups + groups * piece.a_step;
  const bool past_caches = out.narrow && out.stream && aligned<L>(out.narrow, out.stride);
  const bool in_pairs = kPaired<T> && past_caches && aligned<2 * L>(out.narrow, out.stride);
  const auto pack = [&](U* to, int64_t step, const T* const* from, Range columns, bool paired) {
    for (int64_t g = 0; g < groups; ++g) {
      const T* const row = from[g * G] + columns.begin;
      if constexpr (kPaired<T>) {
        if (paired) {
          pack_paired(to + g * step, row, columns.size());
          continue;
        }
      }
      const T* const next = g * G + 1 < m ? from[g * G + 1] + columns.begin : nullptr;
      pack_group<T>(to + g * step, row, next, columns.size());
    }
  };

  pack(a_groups, piece.a_step, a, i_range, false);
  for (int64_t j = 0; j < j_range.size(); j += widest) {
    piece.columns = min(widest, j_range.size() - j);
    const bool direct = kUnrounded && past_caches && piece.columns % L == 0;
    const bool paired = in_pairs && piece.columns % (2 * L) == 0;
    pack(b_groups, piece.b_step, b, Range{j_range.begin + j, j_range.begin + j + piece.columns},
         paired);
    for (int64_t i = 0; i < rows; i += together) {
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t begin = pass * per_pass, end = min(begin + per_pass, groups);
        const bool streamed = direct && pass + 1 == passes;
        piece.b = b_groups + begin * piece.b_step;
        for (int64_t r = 0; r < together; ++r) {
          const int64_t row = min(i + r, rows - 1);  // past the last one that is repeated
          piece.a[r] = a_groups + begin * piece.a_step + row * G;
          piece.sums[r] = piece.out[r] = sums + r * widest;
          if constexpr (kUnrounded) {
            if (streamed) piece.out[r] = out.narrow + row * out.stride + j;
          }
        }
        const auto run = streamed
                             ? (pass == 0 ? piece_function<T, true, kUnrounded>(end - begin, all)
                                          : piece_function<T, false, kUnrounded>(end - begin, all))
                             : (pass == 0 ? piece_function<T, true, false>(end - begin, all)
                                          : piece_function<T, false, false>(end - begin, all));
        run(piece);
      }
      for (int64_t r = 0; !direct && r < min(together, rows - i); ++r) {
        const A* const row = sums + r * widest;
        if constexpr (kPaired<T>) {
          if (paired) {
            stream_paired(out.narrow + (i + r) * out.stride + j, row, piece.columns);
            continue;
          }
        }
        emit(out, i + r, j, row, piece.columns, out.accumulate, past_caches);
      }
    }
  }
  if (past_caches) finish_streams();
}

#if defined(CPU_CAPABILITY_AMX)
// The same in tile registers, which want columns of the first factor as rows.
void block_in_tiles(const bf16* const* a, const bf16* const* b, int64_t m, Range i_range,
                    Range j_range, const OutputOf<bf16>& out) {
  constexpr int64_t L = kTileRows, G = 2, kPanel = kPanelVectors * L;
  const int64_t groups = max(group_count<bf16>(m), L), block_groups = min(groups, kBlockGroups);
  const int64_t rows = i_range.size(), columns = j_range.size();
  const int64_t a_columns = ceil_div(rows, L) * L, b_columns = ceil_div(columns, L) * L;
  const bool aside = out.narrow && groups > block_groups;  // bf16 cannot hold parts of sums
  const int64_t sums_size = aside ? rows * b_columns : 0;
  float* sums = static_cast<float*>(thread_scratch(
      Scratch::kKernel,
      sums_size * sizeof(float) + (a_columns + b_columns) * block_groups * G * sizeof(bf16)));
  bf16* a_tiles = reinterpret_cast<bf16*>(sums + sums_size);
  bf16* b_panels = a_tiles + a_columns * block_groups * G;
  constexpr int64_t kWritten = 128;  // columns: memory takes long pieces of rows faster
  alignas(64) float some[kTileColumns * kWritten];

  const TileRegisters<bf16> registers;
  const bool stream = out.narrow && out.stream && aligned<kTileRows>(out.narrow, out.stride);
  TileProduct product;
  product.a_stride = kTileK;
  product.a_step = kTileRows * kTileK;
  product.b_next = kTileK;
  for (int64_t g = 0; g < groups; g += block_groups) {
    const Range part{g * G, min((g + block_groups) * G, m)};
    product.steps = ceil_div(part.size(), kTileK);
    product.a_next = product.steps * product.a_step;
    pack_transposed(a_tiles, [&](int64_t r) { return a[r]; }, m, part, i_range);
    pack_panels<bf16>(b_panels, [&](int64_t r) { return b[r]; }, m, part, j_range);
    for (int64_t p = 0; p < columns; p += kWritten) {
      const int64_t width = min(columns - p, kWritten);
      for (int64_t q = 0; q < rows; q += kTileColumns) {
        const int64_t count = min(rows - q, kTileColumns);
        product.a = a_tiles + q / L * product.a_next;
        product.accumulate = aside && g > 0;
        product.out_stride = aside ? b_columns : kWritten;
        for (int64_t c = 0; c < width; c += kTileColumns) {
          const int64_t panel = (p + c) / kPanel * kPanel;
          const int64_t stored = min(b_columns - panel, kPanel);  // columns of this panel
          const int64_t tiles = ceil_div(min(width - c, kTileColumns), L);
          product.b = b_panels + (panel * product.steps * L + (p + c - panel)) * G;
          product.b_stride = stored * G * sizeof(bf16);
          product.b_step = L * stored * G;
          product.out = (aside ? sums + q * b_columns + p : some) + c;
          aside ? product.run_rows(count, tiles) : product.run(ceil_div(count, L), tiles);
        }
        for (int64_t i = 0; !aside && i < count; ++i) {
          emit(out, q + i, p, some + i * kWritten, width, out.accumulate || g > 0, stream);
        }
      }
    }
  }
  for (int64_t i = 0; aside && i < rows; ++i) {
    emit(out, i, 0, sums + i * b_columns, columns, false, stream);
  }
  if (stream) finish_streams();
}
#endif

// The whole result, so much of it at a time that what is packed stays in a second-level cache.
// Packing is little beside products, but in tile registers.
template <typename T>
void weight_grad(const T* const* a, const T* const* b, int64_t m, Range i_range, Range j_range,
                 const OutputOf<T>& out) {
  // Tiles of more registers are larger, as are the pieces that they write.
  constexpr int64_t kFew = kRegisters < 32 ? 20 : 0;
  if (m > 0 && m <= kFew) return sum_few_rows(a, b, m, i_range, j_range, out);
#if defined(CPU_CAPABILITY_AMX)
  constexpr auto run = block_in_tiles;
  const int64_t parts = m > 256 ? 2 : 1, rows = 1536 / parts, columns = 2048 / parts;
#else
  constexpr auto run = block_of<T>;
  constexpr int64_t rows = 384, columns = 512;
#endif
  for (int64_t i = i_range.begin; i < i_range.end; i += rows) {
    for (int64_t j = j_range.begin; j < j_range.end; j += columns) {
      const int64_t at = (i - i_range.begin) * out.stride + (j - j_range.begin);
      OutputOf<T> part = out;
      part.narrow = out.narrow ? out.narrow + at : nullptr;
      part.wide = out.narrow ? nullptr : out.wide + at;
      run(a, b, m, Range{i, min(i + rows, i_range.end)}, Range{j, min(j + columns, j_range.end)},
          part);
    }
  }
}

void stream_zeros(void* out, int64_t bytes) {
  constexpr int64_t kLine = 64;
  char* to = static_cast<char*>(out);
  const int64_t head = min(-reinterpret_cast<intptr_t>(to) & (kLine - 1), bytes);
  std::memset(to, 0, head);
  int64_t at = head;
  for (; at + kLine <= bytes; at += kLine) {
    MOE_UNROLL
    for (int64_t i = 0; i < kLine; i += kVectorBytes) {
      stream(reinterpret_cast<float*>(to + at + i), Vec<float>{});
    }
  }
  std::memset(to + at, 0, bytes - at);
  finish_streams();
}

template <typename T>
void fill_weight_grad(WeightGradKernels<T>& kernels) {
  kernels.weight_grad = weight_grad<T>;
  kernels.stream_zeros = stream_zeros;
}

}  // namespace

// clang-format off
template <> void fill(WeightGradKernels<bf16>& kernels) { fill_weight_grad(kernels); }
#if !defined(CPU_CAPABILITY_AMX)
template <> void fill(WeightGradKernels<fp16>& kernels) { fill_weight_grad(kernels); }
template <> void fill(WeightGradKernels<float>& kernels) { fill_weight_grad(kernels); }
template <> void fill(WeightGradKernels<double>& kernels) { fill_weight_grad(kernels); }
#endif
// clang-format on

}  // namespace moe::CPU_CAPABILITY
