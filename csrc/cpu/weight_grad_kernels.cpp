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
