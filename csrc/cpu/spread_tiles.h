// A few packed rows, spread, times rows of a matrix that are contiguous along its columns, [k, n].
#pragma once

#include "cpu/kernels.h"
#include "cpu/row_packing.h"
#include "cpu/tiles.h"

namespace moe::CPU_CAPABILITY {

// The matrix is never packed: kRowsTogether of its rows at a time meet the packed rows, whose sums
// of a step's columns stay in registers meanwhile. Where bf16 is loaded in pairs, sums of a step
// are those of even columns, then those of odd ones, until the last rows are added.
template <typename T>
struct SpreadTile {
  using A = acc_t<T>;
  using Group = Groups<T>;

  static constexpr int L = kLanes<A>;
  // two vectors, but no more columns than may be overwritten past the last one
  static constexpr int vectors = 2 * L <= kOutputColumns ? 2 : 1, step = vectors * L;
  static constexpr bool in_pairs = vectors == 2 && kHalves<T> == 2;
  static constexpr int kMaxRows = 6;  // whose sums leave registers for what is loaded

  const operand_t<T>* packed;
  int64_t packed_stride;
  const T* b;  // zeros are taken for rows past the last one
  int64_t b_stride, b_count;
  int64_t columns;
  int64_t ahead;  // elements from what is read to what is fetched; 0 to fetch nothing
  A* out;
  int64_t out_stride;
  bool first, last;  // rows of the matrix

  static MOE_INLINE void load_step(typename Group::V (&v)[vectors], const T* p) {
    if constexpr (in_pairs) {
      v[0] = Group::template load_half<0>(p);
      v[1] = Group::template load_half<1>(p);
    } else {
      MOE_UNROLL
      for (int i = 0; i < vectors; ++i) v[i] = Group::load_wide(p + i * L);
    }
  }
};

// Adds the products of kRowsTogether rows of b, so far apart, to a step's sums.
template <typename T, int m, bool fetch>
MOE_INLINE void spread_step(const SpreadTile<T>& tile, const operand_t<T>* const (&packed)[m],
                            const T* b, int64_t b_stride, acc_t<T>* out) {
  using Tile = SpreadTile<T>;
  using Group = Groups<T>;
  using A = acc_t<T>;
  constexpr int L = Tile::L, vectors = Tile::vectors;
  const int64_t out_stride = tile.out_stride;
  Vec<A> sums[m][vectors];
  MOE_UNROLL
  for (int r = 0; r < m; ++r) {
    MOE_UNROLL
    for (int v = 0; v < vectors; ++v) sums[r][v] = Vec<A>{};
  }
  MOE_UNROLL
  for (int i = 0; i < kRowsTogether; ++i) {
    const T* row = b + i * b_stride;
    if (fetch) prefetch_line(row + tile.ahead);
    typename Group::V columns[vectors];
    Tile::load_step(columns, row);
    MOE_UNROLL
    for (int r = 0; r < m; ++r) {
      const typename Group::V spread = Group::spread(packed[r] + i);
      MOE_UNROLL
      for (int v = 0; v < vectors; ++v) {
        sums[r][v] = Group::multiply_add(spread, columns[v], sums[r][v]);
      }
    }
  }
  if (!tile.first) {
    MOE_UNROLL
    for (int r = 0; r < m; ++r) {
      MOE_UNROLL
      for (int v = 0; v < vectors; ++v) sums[r][v] += load(out + r * out_stride + v * L);
    }
  }
  if constexpr (Tile::in_pairs) {
    if (tile.last) {
      MOE_UNROLL
      for (int r = 0; r < m; ++r) {
        const Vec<A> even = sums[r][0], odd = sums[r][1];
        interleave(even, odd, sums[r][0], sums[r][1]);
      }
    }
  }
  MOE_UNROLL
  for (int r = 0; r < m; ++r) {
    MOE_UNROLL
    for (int v = 0; v < vectors; ++v) store(out + r * out_stride + v * L, sums[r][v]);
  }
}

template <typename T, int m>
void spread_tile(const SpreadTile<T>& tile) {
  constexpr int step = SpreadTile<T>::step;
  const operand_t<T>* packed[m];
  MOE_UNROLL
  for (int r = 0; r < m; ++r) packed[r] = tile.packed + r * tile.packed_stride;
  int64_t c = 0;
  if (tile.b_count == kRowsTogether) {
    const int64_t whole = tile.columns / step * step;
    for (; c < whole && tile.ahead > 0; c += step) {
      spread_step<T, m, true>(tile, packed, tile.b + c, tile.b_stride, tile.out + c);
    }
    for (; c < whole; c += step) {
      spread_step<T, m, false>(tile, packed, tile.b + c, tile.b_stride, tile.out + c);
    }
  }
  for (; c < tile.columns; c += step) {
    T some[kRowsTogether][step] = {};
    const int64_t left = tile.columns - c, n = left < step ? left : step;
    for (int64_t i = 0; i < tile.b_count; ++i) {
      std::memcpy(some[i], tile.b + i * tile.b_stride + c, n * sizeof(T));
    }
    spread_step<T, m, false>(tile, packed, some[0], step, tile.out + c);
  }
}

template <typename T, size_t... m>
MOE_INLINE auto spread_function(int64_t count, std::index_sequence<m...>) {
  static constexpr void (*table[])(const SpreadTile<T>&) = {spread_tile<T, m + 1>...};
  return table[count - 1];
}

template <typename T>
void multiply_spread_tiles(const operand_t<T>* packed, int64_t m, int64_t k, const MatrixOf<T>& b,
                           Range columns, acc_t<T>* out, int64_t out_stride) {
  using Tile = SpreadTile<T>;
  constexpr int64_t kRows = kRowsTogether;
  constexpr int64_t kAhead = kRows * sizeof(T);  // rows: the wider, the faster they are read
  // kRows rows of them are half a first-level cache.
  constexpr int64_t kColumnsTogether = (16 << 10) / kRows / static_cast<int64_t>(sizeof(T));
  const int64_t tiles = ceil_div(m, Tile::kMaxRows);
  Tile tile;
  tile.packed_stride = padded<T>(k);
  tile.b_stride = b.stride_k;
  tile.out_stride = out_stride;
  for (int64_t row = 0; row < k; row += kRows) {
    tile.b_count = min(kRows, k - row);
    tile.first = row == 0;
    tile.last = row + kRows >= k;
    const int64_t ahead = min(kAhead, k - row - tile.b_count) * b.stride_k;
    for (int64_t c = 0; c < columns.size(); c += kColumnsTogether) {
      tile.b = b.data + row * b.stride_k + columns.begin + c;
      tile.columns = min(kColumnsTogether, columns.size() - c);
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t first = m * i / tiles, count = m * (i + 1) / tiles - first;
        tile.packed = packed + first * tile.packed_stride + row;
        tile.out = out + first * out_stride + c;
        tile.ahead = i == 0 ? ahead : 0;
        spread_function<T>(count, std::make_index_sequence<Tile::kMaxRows>())(tile);
      }
    }
  }
}

}  // namespace moe::CPU_CAPABILITY
