// How rows are packed for products with matrices.
//
// m rows of k elements. For a matrix whose columns are contiguous (k_contiguous) vectors hold many
// rows; few rows, and all rows for a matrix [k, n], stay rows; but many for tile registers are
// tiles.
#pragma once

#include "cpu/amx_tiles.h"
#include "cpu/panels.h"
#include "cpu/tiles.h"

namespace moe::CPU_CAPABILITY {

template <typename T>
constexpr int kStep = kLanes<acc_t<T>> * Compute<T>::G;  // elements of k in a vector

// Rows of a matrix [k, n] that a few packed rows are multiplied with at a time. More are fewer
// passes over sums, fewer are read faster: up to so many packed rows that is what takes the time.
constexpr int kRowsTogether = kRegisters == 32 ? 16 : 8, kRowsReadFast = 8;
constexpr int64_t kVeryFewRows = 8;

// Up to so many rows, packing a matrix [k, n] takes longer than it saves.
template <typename T>
constexpr int64_t kFewRows = kTileRegisters<T> ? 8 : 24;

// Elements of a packed row, with the zeros that follow: whole vectors and groups of kRowsTogether.
template <typename T>
MOE_INLINE int64_t filled(int64_t k) {
  constexpr int64_t multiple = max(kDotStep<T>, kRowsTogether);
  return ceil_div(k, multiple) * multiple;
}

// From one packed row to the next: 9 lines more than a multiple of 16, so that the same part of
// eight rows is spread over a way of a first-level cache, which has 64 lines.
template <typename T>
MOE_INLINE int64_t padded(int64_t k) {
  constexpr int64_t kLine = 64 / sizeof(operand_t<T>);
  const int64_t lines = ceil_div(filled<T>(k), kLine);
  return (lines + (16 + 9 - lines % 16) % 16) * kLine;
}

// More rows than this, beside whole vectors, fill enough of one. In tile registers any do.
template <typename T>
constexpr int least_of_vector(bool beside) {
  constexpr int L = kLanes<acc_t<T>>;
  if (kTileRegisters<T>) return beside ? 0 : 4;
  return beside ? 12 * L / 16 : (Compute<T>::G > 1 ? 15 : 13) * L / 16;
}

// How m rows are packed for a k-contiguous matrix: blocks of vectors, each [groups, vectors, lanes,
// G], or [groups / 16, vectors, 16, lanes, G] for tile registers; then rows that would fill too
// little of a vector, each padded.
template <typename T>
struct Blocks {
  static constexpr int64_t kMost = kTileRegisters<T> ? kMostRows / 16 : OuterTile<T>::kMaxVectors;
  int64_t vectors, rest, count;

  explicit Blocks(int64_t m) {
    constexpr int64_t L = kLanes<acc_t<T>>;
    // With few registers a block of the most vectors alone is fast, and a dozen other rows are as
    // fast as dot products.
    constexpr int64_t together = kRegisters < 32 && !kTileRegisters<T> ? kMost : 1;
    vectors = m / (together * L) * together;
    rest = m % (together * L);
    if (rest > (together > 1 ? 3 * together * L / 4 : least_of_vector<T>(vectors > 0))) {
      vectors += together;
      rest = 0;
    }
    count = ceil_div(vectors, kMost);
  }

  // The number of the first vector of block i.
  int64_t first(int64_t i) const { return vectors * i / count; }
};

// Whether so many rows are packed as tiles for a matrix [k, n], two beside each other, or the last
// one alone: [tiles / 2, k / 32, 2, 16, 32].
template <typename T>
bool in_tiles(int64_t m) {
  return kTileRegisters<T> && m > kFewRows<T>;
}

template <typename T>
int64_t packed_size(bool k_contiguous, int64_t m, int64_t k) {
  using U = operand_t<T>;
  if (!k_contiguous && in_tiles<T>(m)) {
    return ceil_div(m, 16) * 16 * ceil_div(k, 32) * 32 * sizeof(U);
  }
  if (!k_contiguous) return m * padded<T>(k) * sizeof(U);
  const Blocks<T> blocks(m);
  const int64_t block = group_count<T>(k) * kStep<T>;
  return (blocks.vectors * block + blocks.rest * padded<T>(k)) * sizeof(U);
}

// n elements and zeros up to `whole` of them.
template <typename T>
void pack_row(operand_t<T>* out, const T* row, int64_t n, int64_t whole) {
  if constexpr (kNative<T>) {
    if (n > 0) std::memcpy(out, row, n * sizeof(T));  // row is null where tensors are empty
  } else {
    for (int64_t i = 0; i < n; i += kLanes<float>) {
      const int64_t lanes = min(n - i, kLanes<float>);
      if (lanes == kLanes<float>) {
        store(out + i, load(row + i));
      } else {
        store_some(out + i, load_some(row + i, lanes), lanes);
      }
    }
  }
  std::memset(out + n, 0, (whole - n) * sizeof(operand_t<T>));
}

// The same for dot products.
template <typename T>
void pack_dot_row(operand_t<T>* out, const T* row, int64_t n, int64_t whole) {
  if constexpr (kHalves<T> == 1) {
    pack_row<T>(out, row, n, whole);
  } else {
    constexpr int64_t step = kDotStep<T>;
    for (int64_t i = 0; i < whole; i += step) {
      T rest[step] = {};
      const T* from = row + i;
      if (n - i < step) {
        if (n > i) std::memcpy(rest, from, (n - i) * sizeof(T));
        from = rest;
      }
      Vec<acc_t<T>> even, odd;
      load_pairs(from, even, odd);
      store(out + i, even);
      store(out + i + step / 2, odd);
    }
  }
}

// A vector of so many rows, elements [0, n) of each: groups [0, groups) of it, zeros past n. From a
// group to the next one in out, and from kLanes of them to the next.
template <typename T>
void pack_vector(operand_t<T>* out, int64_t group_step, int64_t lanes_step, const T* const* rows,
                 int64_t count, int64_t n, int64_t groups) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>, G = Compute<T>::G;
  for (int64_t k = 0; k < groups * G; k += L * G) {
    Vec<A> lanes[L];
    MOE_UNROLL
    for (int i = 0; i < L; ++i) {
      if (i >= count) {
        lanes[i] = Vec<A>{};
      } else if (k + L * G <= n) {
        lanes[i] = Groups<T>::load_wide(rows[i] + k);
      } else {
        T rest[L * G] = {};
        if (k < n) std::memcpy(rest, rows[i] + k, (n - k) * sizeof(T));
        lanes[i] = Groups<T>::load_wide(rest);
      }
    }
    transpose<A>(lanes);
    const int64_t stored = min(L, groups - k / G);
    operand_t<T>* to = out + k / (L * G) * lanes_step;
    if (stored == L) {
      MOE_UNROLL
      for (int g = 0; g < L; ++g) std::memcpy(to + g * group_step, &lanes[g], sizeof(lanes[g]));
    } else {
      for (int64_t g = 0; g < stored; ++g)
        std::memcpy(to + g * group_step, &lanes[g], sizeof(lanes[g]));
    }
  }
}

#if defined(CPU_CAPABILITY_AMX)
// Elements `part` of rows of k, as tiles.
inline void pack_tiles(bf16* out, const bf16* const* rows, int64_t m, int64_t k, Range part) {
  constexpr int64_t kTile = kTileRows * kTileK;
  for (int64_t i = 0; i < m; ++i) {
    const int64_t first = i / kTileColumns * 2, tiles = min(ceil_div(m, kTileRows) - first, 2);
    bf16* pair = out + first * kTileRows * ceil_div(k, kTileK) * kTileK;
    bf16* row = pair + i % kTileColumns / kTileRows * kTile + i % kTileRows * kTileK;
    stage_row(row + part.begin * tiles * kTileRows, rows[i], part.size(), tiles * kTile);
  }
}
#endif

template <typename T>
void pack(bool k_contiguous, void* packed, const T* const* rows, int64_t m, int64_t k, Range part) {
  using U = operand_t<T>;
  constexpr int64_t L = kLanes<acc_t<T>>, G = Compute<T>::G;
  U* out = static_cast<U*>(packed);
  const int64_t n = part.size(), row_size = padded<T>(k);
#if defined(CPU_CAPABILITY_AMX)
  if (!k_contiguous && in_tiles<T>(m)) return pack_tiles(out, rows, m, k, part);
#endif
  // The last part also writes the zeros.
  const int64_t whole = part.end == k ? filled<T>(k) - part.begin : n;
  const Blocks<T> blocks(k_contiguous ? m : 0);
  const int64_t groups = group_count<T>(k);
  const int64_t part_groups = part.end == k ? groups - part.begin / G : ceil_div(n, G);
  for (int64_t i = 0; i < blocks.count; ++i) {
    const int64_t first = blocks.first(i), vectors = blocks.first(i + 1) - first;
    U* block = out + first * groups * L * G + part.begin / G * vectors * L * G;
    const int64_t row_step = vectors * L * G;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t row = (first + v) * L, count = min(m - row, L);
      if constexpr (kTileRegisters<T>) {
        pack_vector<T>(block + v * L * L * G, L * G, L * row_step, rows + row, count, n,
                       part_groups);
      } else {
        pack_vector<T>(block + v * L * G, row_step, L * row_step, rows + row, count, n,
                       part_groups);
      }
    }
  }
  const int64_t done = min(blocks.vectors * L, m);
  out += blocks.vectors * groups * L * G + part.begin;
  const auto pack_one = k_contiguous ? pack_dot_row<T> : pack_row<T>;
  for (int64_t i = done; i < m; ++i) pack_one(out + (i - done) * row_size, rows[i], n, whole);
}

}  // namespace moe::CPU_CAPABILITY
