// Panels: blocks of columns in vectors of groups, [columns / panel, groups, panel, G], packed from
// rows that are contiguous along the columns. Shared by products with matrices stored [k, n] and by
// gradients of weights, where rows of both factors are summed over.
#pragma once

#include "cpu/kernels.h"
#include "cpu/tiles.h"

namespace moe::CPU_CAPABILITY {

MOE_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MOE_INLINE constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
MOE_INLINE constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

template <typename T>
MOE_INLINE int64_t group_count(int64_t k) {
  return ceil_div(k, Compute<T>::G * kWholeGroups<T>) * kWholeGroups<T>;
}

// Whether each `lanes` elements of all rows are.
template <int64_t lanes, typename T>
bool aligned(const T* out, int64_t stride) {
  constexpr int64_t bytes = lanes * sizeof(T);
  return reinterpret_cast<uintptr_t>(out) % bytes == 0 && stride * sizeof(T) % bytes == 0;
}

constexpr int64_t kMaxGroups = 512;         // in one sum: longer ones round more
constexpr int64_t kCacheBytes = 384 << 10;  // of a second-level cache, for what is read repeatedly

constexpr int kPanelVectors = kRegisters == 32 ? 4 : 2;
constexpr int kPanelRows = 6;  // rows of a tile over a whole panel

// Vectors [0, vectors) of one group of columns: row and, where G = 2, the next row, or null past
// the last one.
template <typename T>
MOE_INLINE void pack_group(operand_t<T>* out, const T* row, [[maybe_unused]] const T* next,
                           int64_t columns) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  if constexpr (Compute<T>::G == 1) {
    for (int64_t c = 0; c < columns; c += L) {
      const int64_t n = columns - c;
      store(out + c, n >= L ? load(row + c) : load_some(row + c, n));
    }
  } else {
    for (int64_t c = 0; c < columns; c += 2 * L) {
      const int64_t n = min(columns - c, 2 * L);
      typename Groups<T>::V lower{}, upper{};
      if (n == 2 * L) {  // a size known here, or it would be a call of memcpy
        std::memcpy(&lower, row + c, sizeof(lower));
        if (next) std::memcpy(&upper, next + c, sizeof(upper));
      } else {
        std::memcpy(&lower, row + c, n * sizeof(T));
        if (next) std::memcpy(&upper, next + c, n * sizeof(T));
      }
      Groups<T>::pair(lower, upper);
      std::memcpy(out + 2 * c, &lower, sizeof(lower));
      if (n > L) std::memcpy(out + 2 * (c + L), &upper, sizeof(upper));
    }
  }
}

// Packs rows [part.begin, part.end) of `row(i)`, i < limit, and columns of each. A panel that is
// not full has fewer vectors.
template <typename T, typename Row>
MOE_INLINE void pack_panels(operand_t<T>* out, Row row, int64_t limit, Range part, Range columns) {
  constexpr int L = kLanes<acc_t<T>>, G = Compute<T>::G;
  constexpr int64_t kPanel = kPanelVectors * L;
  constexpr int64_t kAhead = 16;  // rows
  const int64_t groups = group_count<T>(part.size());
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t r = part.begin + g * G;
    const bool past = kTileRegisters<T> && r >= part.end;
    const T* first = past ? nullptr : row(r) + columns.begin;
    const T* second = G == 2 && r + 1 < part.end ? row(r + 1) + columns.begin : nullptr;
    // Rows are far apart in memory: the processor does not foresee where the next ones are.
    for (int64_t i = r + kAhead; i < min(r + kAhead + G, limit); ++i) {
      const char* next = reinterpret_cast<const char*>(row(i) + columns.begin);
      const int64_t bytes = columns.size() * sizeof(T);
      for (int64_t at = 0; at < bytes; at += 64) prefetch_line(next + at);
    }
    for (int64_t c = 0; c < columns.size(); c += kPanel) {
      const int64_t width = min(kPanel, columns.size() - c), stored = ceil_div(width, L) * L;
      operand_t<T>* to = out + (c * groups + g * stored) * G;
      if (past) {
        std::memset(to, 0, stored * G * sizeof(*to));
      } else {
        pack_group<T>(to, first + c, second ? second + c : nullptr, width);
      }
    }
  }
}

template <typename T, size_t... i>
MOE_INLINE auto panel_tile(int64_t rows, int64_t vectors, std::index_sequence<i...>) {
  static constexpr void (*table[])(const OuterTile<T>&) = {
      outer_tile<T, i / kPanelVectors + 1, i % kPanelVectors + 1>...};
  return table[(rows - 1) * kPanelVectors + vectors - 1];
}

// The tile of 1 to kPanelRows rows over 1 to kPanelVectors vectors.
template <typename T>
MOE_INLINE auto panel_tile(int64_t rows, int64_t vectors) {
  return panel_tile<T>(rows, vectors, std::make_index_sequence<kPanelRows * kPanelVectors>());
}

// f(first, count) over m rows in tiles as even as possible.
template <typename F>
MOE_INLINE void for_row_tiles(int64_t m, F f) {
  const int64_t tiles = ceil_div(m, kPanelRows);
  for (int64_t i = 0; i < tiles; ++i) f(m * i / tiles, m * (i + 1) / tiles - m * i / tiles);
}

// Sums [count, width], whole vectors of both, to out [rows, count].
template <typename A>
MOE_INLINE void store_transposed(const A* sums, int64_t width, int64_t count, int64_t rows, A* out,
                                 int64_t out_stride, bool past_caches) {
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < count; i += L) {
    for (int64_t r = 0; r < rows; r += L) {
      Vec<A> lanes[L];
      MOE_UNROLL
      for (int j = 0; j < L; ++j) lanes[j] = load(sums + (i + j) * width + r);
      transpose<A>(lanes);
      A* to = out + r * out_stride + i;
      const int64_t row_count = min(rows - r, L);
      for (int64_t j = 0; j < row_count; ++j) {
        past_caches ? stream(to + j * out_stride, lanes[j]) : store(to + j * out_stride, lanes[j]);
      }
    }
  }
}

}  // namespace moe::CPU_CAPABILITY
