// Rows times a matrix.
//
// m rows of k elements, n columns. Where a column of the matrix is contiguous (k_contiguous:
// weights stored [n, k]) it is spread from where it lies, and vectors hold many packed rows; few
// rows are instead multiplied with it element by element. Where a row of it is contiguous, a block
// of the matrix is packed into vectors of columns, and rows are spread.
#include <limits>

#include "cpu/amx_products.h"
#include "cpu/dot_tiles.h"
#include "cpu/kernels.h"
#include "cpu/panels.h"
#include "cpu/row_packing.h"
#include "cpu/spread_tiles.h"
#include "cpu/tiles.h"

namespace moe::CPU_CAPABILITY {

namespace {

// --------------------------------------------------------------------------------- tile tables
template <typename T>
using OuterFunction = void (*)(const OuterTile<T>&);

// Fills the registers: the tile for so many vectors of columns.
template <typename T, size_t... vectors>
MOE_INLINE OuterFunction<T> full_tile(int64_t count, std::index_sequence<vectors...>) {
  static constexpr OuterFunction<T> table[] = {
      outer_tile<T, OuterTile<T>::rows_for(vectors + 1), vectors + 1>...};
  return table[count - 1];
}

// As many rows over a vector less.
template <typename T, size_t... vectors>
MOE_INLINE OuterFunction<T> narrower_tile(int64_t count, std::index_sequence<vectors...>) {
  static constexpr OuterFunction<T> table[] = {
      outer_tile<T, OuterTile<T>::rows_for(vectors + 1), vectors + (vectors == 0)>...};
  return table[count - 1];
}

template <typename T>
using DotFunction = void (*)(const DotTile<T>&);

template <typename T, size_t... b>
MOE_INLINE DotFunction<T> dot_function(int64_t count, std::index_sequence<b...>) {
  static constexpr DotFunction<T> table[] = {dot_tile<T, b + 1>...};
  return table[count - 1];
}

// ------------------------------------------------------------------ matrices stored [n, k]
constexpr int64_t kColumns = 48;  // whose sums lie together until they are transposed

// Sums of so many columns and vectors of rows. There are whole tiles, which past the last column
// hold results that are never read.
template <typename T>
constexpr int64_t result_size(int64_t vectors) {
  static_assert(kColumns % kLanes<acc_t<T>> == 0);
  const int64_t tile_columns = OuterTile<T>::rows_for(vectors);
  return ceil_div(kColumns, tile_columns) * tile_columns * vectors * kLanes<acc_t<T>>;
}

// Columns [begin, end) of b, as they lie in memory, for packed vectors of rows; transposed on the
// way to out.
template <typename T>
void multiply_vectors(const operand_t<T>* packed, int64_t rows, int64_t vectors, int64_t k,
                      const MatrixOf<T>& b, Range columns, acc_t<T>* out, int64_t out_stride,
                      bool stream, const T* /*next*/) {
  using U = operand_t<T>;
  using A = acc_t<T>;
  using Tile = OuterTile<T>;
  constexpr int L = kLanes<A>, G = Compute<T>::G;
  const int64_t width = vectors * L, tile_columns = Tile::rows_for(vectors);
  const int64_t groups = group_count<T>(k);
  // So much of k at a time that its part of the packed rows stays in the cache and sums are short.
  const int64_t parts =
      ceil_div(groups, min(kMaxGroups, kCacheBytes / static_cast<int64_t>(width * G * sizeof(U))));
  const int64_t part_groups = ceil_div(groups, parts);
  A* result =
      static_cast<A*>(thread_scratch(Scratch::kKernel, result_size<T>(vectors) * sizeof(A)));
  const auto run = full_tile<T>(vectors, std::make_index_sequence<Tile::kMaxVectors>());

  for (int64_t c = columns.begin; c < columns.end; c += kColumns) {
    const int64_t count = min(kColumns, columns.end - c);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t g = part * part_groups;
      Tile tile;
      tile.row_step = G;
      tile.columns = packed + g * width * G;
      tile.column_step = width * G;
      tile.groups = min(part_groups, groups - g);
      tile.out_stride = width;
      tile.accumulate = part > 0;
      tile.narrow = nullptr;
      for (int64_t t = 0; t < count; t += tile_columns) {
        // Past the last column the last one is repeated; those results are never read.
        const auto column = [&](int64_t i) {
          return b.data + (c + min(t + i, count - 1)) * b.stride_n + g * G;
        };
        for (int64_t i = 0; i < tile_columns; ++i) tile.rows[i] = column(i);
        tile.out = result + t * width;
        tile.prefetch = reinterpret_cast<const char*>(column(0) + tile_columns * b.stride_n);
        tile.prefetch_step = tile_columns * G * sizeof(T);
        run(tile);
      }
    }
    store_transposed<A>(result, width, count, rows, out + (c - columns.begin), out_stride, stream);
  }
}

// The same where columns cannot be multiplied as they lie in memory: a tile's are made into what
// can, part by part, for all blocks of packed rows.
template <typename T>
void multiply_staged(const operand_t<T>* packed, const Blocks<T>& blocks, int64_t m, int64_t k,
                     const MatrixOf<T>& b, Range columns, acc_t<T>* out, int64_t out_stride,
                     bool stream) {
  using U = operand_t<T>;
  using A = acc_t<T>;
  using Tile = OuterTile<T>;
  constexpr int L = kLanes<A>, G = Compute<T>::G;
  const int64_t groups = group_count<T>(k), parts = ceil_div(groups, kMaxGroups);
  const int64_t part_groups = ceil_div(groups, parts);
  const int64_t widest = ceil_div(blocks.vectors, blocks.count);
  const int64_t tile_columns = Tile::rows_for(widest), result_step = result_size<T>(widest);
  A* results = static_cast<A*>(thread_scratch(
      Scratch::kKernel,
      blocks.count * result_step * sizeof(A) + tile_columns * part_groups * G * sizeof(U)));
  U* stage = reinterpret_cast<U*>(results + blocks.count * result_step);
  const auto all = std::make_index_sequence<Tile::kMaxVectors>();
  const auto run_widest = full_tile<T>(widest, all), run_narrower = narrower_tile<T>(widest, all);

  Tile tile;
  tile.row_step = G;
  tile.narrow = nullptr;
  for (int64_t i = 0; i < tile_columns; ++i) tile.rows[i] = stage + i * part_groups * G;
  for (int64_t c = columns.begin; c < columns.end; c += kColumns) {
    const int64_t count = min(kColumns, columns.end - c);
    for (int64_t t = 0; t < count; t += tile_columns) {
      const int64_t own = min(tile_columns, count - t);
      const char* next = reinterpret_cast<const char*>(b.data + (c + t + own) * b.stride_n);
      tile.prefetch_step = own * b.stride_n * sizeof(T) / groups;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t g = part * part_groups;
        tile.groups = min(part_groups, groups - g);
        tile.accumulate = part > 0;
        tile.prefetch = next + g * tile.prefetch_step;
        // Results of what was there before, past the last column, are never read.
        for (int64_t i = 0; i < own; ++i) {
          pack_row<T>(stage + i * part_groups * G, b.data + (c + t + i) * b.stride_n + g * G,
                      min(tile.groups * G, k - g * G), tile.groups * G);
        }
        for (int64_t block = 0; block < blocks.count; ++block) {
          const int64_t first = blocks.first(block), vectors = blocks.first(block + 1) - first;
          const int64_t width = vectors * L;
          tile.columns = packed + (first * L * groups + g * width) * G;
          tile.column_step = width * G;
          tile.out_stride = width;
          tile.out = results + block * result_step + t * width;
          vectors == widest ? run_widest(tile) : run_narrower(tile);
        }
      }
    }
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int64_t first = blocks.first(block) * L, end = blocks.first(block + 1) * L;
      store_transposed<A>(results + block * result_step, end - first, count, min(end, m) - first,
                          out + first * out_stride + (c - columns.begin), out_stride, stream);
    }
  }
}

// The same for a few padded rows.
template <typename T>
void multiply_few(const operand_t<T>* packed, int64_t rows, int64_t k, const MatrixOf<T>& b,
                  Range columns, acc_t<T>* out, int64_t out_stride) {
  using Tile = DotTile<T>;
  const int64_t row_size = padded<T>(k), passes = ceil_div(rows, Tile::kMaxB);
  // All passes over a few columns before the next: one reads them from memory, the others from the
  // cache, and each fetches its share of the columns that follow.
  const int64_t step = passes > 1 ? kLanes<acc_t<T>> : columns.size();
  const int64_t ahead = max(min(kCacheBytes / static_cast<int64_t>(k * sizeof(T)), 16), 2);
  Tile tile;
  tile.a_stride = b.stride_n;
  tile.b_stride = row_size;
  tile.k = k;
  tile.out_stride = out_stride;
  for (int64_t c = columns.begin; c < columns.end; c += step) {
    tile.a = b.data + c * b.stride_n;
    tile.a_count = min(step, columns.end - c);
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t first = rows * pass / passes, count = rows * (pass + 1) / passes - first;
      for (int64_t i = 0; i < 4; ++i) tile.ahead[i] = i % passes == pass ? ahead * b.stride_n : 0;
      tile.b = packed + first * row_size;
      tile.out = out + first * out_stride + (c - columns.begin);
      dot_function<T>(count, std::make_index_sequence<Tile::kMaxB>())(tile);
    }
  }
}

// --------------------------------------------------------------------- matrices stored [k, n]
// Rows of a matrix, columns of each, that tiles fetch ahead: each a line of so many rows.
template <typename T>
struct Ahead {
  static constexpr int64_t kLine = 64 / sizeof(T);

  const MatrixOf<T>& b;
  Range rows, columns;
  int64_t done = 0;  // lines of rows

  // Of every row.
  int64_t lines() const { return ceil_div(columns.size(), kLine); }

  // Where the next line is, or null past the last one.
  const T* next(int64_t row_count) {
    const int64_t row = lines() > 0 ? rows.begin + done / lines() * row_count : rows.end;
    if (row >= rows.end) return nullptr;
    return b.data + row * b.stride_k + columns.begin + done++ % lines() * kLine;
  }

  void fetch(OuterTile<T>& tile) {
    const T* line = next(tile.groups);
    tile.prefetch =
        line ? reinterpret_cast<const char*>(line) : reinterpret_cast<const char*>(tile.columns);
    tile.prefetch_step = line ? b.stride_k * sizeof(T) : 0;
  }
};

template <typename T>
void multiply_spread_rows(const operand_t<T>* packed, int64_t m, int64_t k, const MatrixOf<T>& b,
                          Range columns, acc_t<T>* out, int64_t out_stride) {
  using U = operand_t<T>;
  using A = acc_t<T>;
  using Tile = OuterTile<T>;
  constexpr int L = kLanes<A>, G = Compute<T>::G;
  constexpr int64_t kPanel = kPanelVectors * L, kBlockGroups = 256 / G;
  const int64_t groups = group_count<T>(k), row_size = padded<T>(k);
  const int64_t block_groups = min(groups, kBlockGroups);
  const int64_t block_columns =
      max(kPanel, kCacheBytes / (block_groups * G * sizeof(U)) / kPanel * kPanel);
  const int64_t widest = min(block_columns, ceil_div(columns.size(), kPanel) * kPanel);
  U* panels =
      static_cast<U*>(thread_scratch(Scratch::kKernel, widest * block_groups * G * sizeof(U)));

  Tile tile;
  tile.row_step = G;
  tile.narrow = nullptr;
  tile.out_stride = out_stride;
  for (int64_t c = columns.begin; c < columns.end; c += block_columns) {
    const int64_t block_end = min(c + block_columns, columns.end);
    for (int64_t g = 0; g < groups; g += block_groups) {
      tile.groups = min(block_groups, groups - g);
      tile.accumulate = g > 0;
      const auto row = [&](int64_t i) { return b.data + i * b.stride_k; };
      const Range part{g * G, min((g + tile.groups) * G, k)};
      pack_panels<T>(panels, row, k, part, Range{c, block_end});
      const int64_t after = part.end < k ? part.end : 0, next = part.end < k ? c : block_end;
      Ahead<T> ahead{b, Range{after, min(after + block_groups * G, k)},
                     Range{next, min(next + block_columns, columns.end)}};
      for (int64_t p = c; p < block_end; p += kPanel) {
        const int64_t vectors = ceil_div(min(kPanel, block_end - p), L);
        tile.columns = panels + (p - c) * tile.groups * G;
        tile.column_step = vectors * L * G;
        tile.out = out + (p - columns.begin);
        A* const to = tile.out;
        for_row_tiles(m, [&](int64_t r, int64_t count) {
          for (int64_t i = 0; i < count; ++i) tile.rows[i] = packed + (r + i) * row_size + g * G;
          ahead.fetch(tile);
          tile.out = to + r * out_stride;
          panel_tile<T>(count, vectors)(tile);
        });
      }
    }
  }
}

// The same for a few rows, which read the matrix as fast as memory gives it: several of its rows at
// a time, never packed, on sums that stay in the cache. With 16 registers it is spread_tiles.h that
// does this, where sums stay in registers for as long; with 32 that is not measured. Where bf16 is
// loaded in pairs, sums of a step's columns are those of even ones, then those of odd ones, until
// the last rows are added.
template <typename T, int kRows>
void multiply_few_spread_rows(const operand_t<T>* packed, int64_t m, int64_t k,
                              const MatrixOf<T>& b, Range columns, acc_t<T>* out,
                              int64_t out_stride) {
  using Group = Groups<T>;
  using A = acc_t<T>;
  constexpr int L = kLanes<A>, G = Group::G;
  // of a step no more columns than may be overwritten past the last one
  constexpr int halves = 2 * L <= kOutputColumns ? kHalves<T> : 1;
  constexpr int parts = G * halves, step = L * parts;
  constexpr int kGroups = kRows / G;
  constexpr int64_t kAhead = 2 * kRows;
  const int64_t row_size = padded<T>(k);
  for (int64_t row = 0; row < k; row += kRows) {
    const T* rows = b.data + row * b.stride_k + columns.begin;
    const int64_t count = min(kRows, k - row);
    const int64_t ahead = min(kAhead, k - row - count) * b.stride_k;
    const bool last = row + kRows >= k;
    for (int64_t c = 0; c < columns.size(); c += step) {
      const int64_t n = min(columns.size() - c, step);
      typename Group::V vectors[kRows][halves];
      const auto load_row = [&](int64_t i, const T* p) __attribute__((always_inline)) {
        if constexpr (halves == 2) {
          vectors[i][0] = Group::template load_half<0>(p);
          vectors[i][1] = Group::template load_half<1>(p);
        } else {
          vectors[i][0] = Group::load_wide(p);
        }
      };
      if (count == kRows && n == step) {
        MOE_UNROLL
        for (int i = 0; i < kRows; ++i) {
          const T* p = rows + i * b.stride_k + c;
          prefetch_line(p + ahead);
          load_row(i, p);
        }
      } else {
        for (int64_t i = 0; i < kRows; ++i) {
          T some[step] = {};
          if (i < count) std::memcpy(some, rows + i * b.stride_k + c, n * sizeof(T));
          load_row(i, some);
        }
      }
      MOE_UNROLL
      for (int g = 0; g < kGroups && G == 2; ++g) {
        Group::pair(vectors[2 * g][0], vectors[2 * g + 1][0]);
      }
      for (int64_t r = 0; r < m; ++r) {
        const operand_t<T>* x = packed + r * row_size + row;
        A* to = out + r * out_stride + c;
        Vec<A> sums[parts];
        MOE_UNROLL
        for (int part = 0; part < parts; ++part) {
          sums[part] = Vec<A>{};
        }
        MOE_UNROLL
        for (int g = 0; g < kGroups; ++g) {
          const typename Group::V spread = Group::spread(x + g * G);
          MOE_UNROLL
          for (int part = 0; part < parts; ++part) {
            const auto& v = halves == 2 ? vectors[g][part] : vectors[g * G + part][0];
            sums[part] = Group::multiply_add(spread, v, sums[part]);
          }
        }
        MOE_UNROLL
        for (int part = 0; part < parts; ++part) {
          if (halves == 1 && n <= part * L) continue;
          if (row > 0) sums[part] += load(to + part * L);
        }
        if constexpr (halves == 2) {
          if (last) {
            Vec<A> lower, upper;
            interleave(sums[0], sums[1], lower, upper);
            sums[0] = lower;
            sums[1] = upper;
          }
        }
        MOE_UNROLL
        for (int part = 0; part < parts; ++part) {
          if (halves == 1 && n <= part * L) continue;
          store(to + part * L, sums[part]);
        }
      }
    }
  }
}

template <typename T>
void multiply(const void* packed_rows, int64_t m, int64_t k, const MatrixOf<T>& b, Range columns,
              acc_t<T>* out, int64_t out_stride, bool stream, const T* next) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<A>;
  const auto* packed = static_cast<const operand_t<T>*>(packed_rows);
  if (k == 0) {
    for (int64_t i = 0; i < m; ++i)
      std::memset(out + i * out_stride, 0, columns.size() * sizeof(A));
    return;
  }
#if defined(CPU_CAPABILITY_AMX)
  constexpr auto run_spread = multiply_spread_rows_in_tiles;
#else
  constexpr auto run_spread = multiply_spread_rows<T>;
#endif
  if (!b.k_contiguous) {
    if (m > kFewRows<T>) return run_spread(packed, m, k, b, columns, out, out_stride);
    if constexpr (kRegisters < 32) {
      return multiply_spread_tiles<T>(packed, m, k, b, columns, out, out_stride);
    } else {
      const auto of_rows = m <= kVeryFewRows ? multiply_few_spread_rows<T, kRowsReadFast>
                                             : multiply_few_spread_rows<T, kRowsTogether>;
      return of_rows(packed, m, k, b, columns, out, out_stride);
    }
  }
  const Blocks<T> blocks(m);
  const int64_t vector_size = group_count<T>(k) * kStep<T>, done = min(blocks.vectors * L, m);
  // So many columns at a time that they stay in the cache while all rows meet them.
  constexpr int64_t kTogether = kTileRegisters<T> ? 32 : 48;
  int64_t step =
      max(kTogether, kCacheBytes / static_cast<int64_t>(k * sizeof(T)) / kTogether * kTogether);
  if (kTileRegisters<T> && blocks.count == 1 && done == m) step = max(columns.size(), 1);
  const bool staged = !kTileRegisters<T> && !(kNative<T> && k % Compute<T>::G == 0);
  const bool past_caches = stream && aligned<L>(out, out_stride) && columns.size() % L == 0;
  for (int64_t c = columns.begin; c < columns.end; c += step) {
    const Range part{c, min(c + step, columns.end)};
    A* to = out + (c - columns.begin);
    if (staged && blocks.count > 0) {
      multiply_staged<T>(packed, blocks, done, k, b, part, to, out_stride, past_caches);
    }
    if constexpr (kNative<T>) {
#if defined(CPU_CAPABILITY_AMX)
      constexpr auto run = multiply_vectors_in_tiles;
#else
      constexpr auto run = multiply_vectors<T>;
#endif
      for (int64_t i = 0; !staged && i < blocks.count; ++i) {
        const int64_t first = blocks.first(i), end = blocks.first(i + 1);
        const bool last = c + step >= columns.end && i + 1 == blocks.count;
        run(packed + first * vector_size, min(end * L, m) - first * L, end - first, k, b, part,
            to + first * L * out_stride, out_stride, past_caches, last ? next : nullptr);
      }
    }
    multiply_few<T>(packed + blocks.vectors * vector_size, m - done, k, b, part,
                    to + done * out_stride, out_stride);
  }
  if (past_caches) finish_streams();
}

template <typename T>
void fill_gemm(GemmKernels<T>& kernels) {
  kernels.rows_together = kTileRegisters<T> ? kMostRows : kRowsPerBlock;
  kernels.columns_together = kTileRegisters<T> ? 256 : std::numeric_limits<int64_t>::max();
  kernels.packed_size = packed_size<T>;
  kernels.pack = pack<T>;
  kernels.multiply = multiply<T>;
}

}  // namespace

// clang-format off
template <> void fill(GemmKernels<bf16>& kernels) { fill_gemm(kernels); }
#if !defined(CPU_CAPABILITY_AMX)
template <> void fill(GemmKernels<fp16>& kernels) { fill_gemm(kernels); }
template <> void fill(GemmKernels<float>& kernels) { fill_gemm(kernels); }
template <> void fill(GemmKernels<double>& kernels) { fill_gemm(kernels); }
#endif
// clang-format on

}  // namespace moe::CPU_CAPABILITY
