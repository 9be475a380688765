// Dot products of a few packed rows with rows of a matrix.
#pragma once

#include "cpu/tiles.h"

namespace moe::CPU_CAPABILITY {

// Lane i of the result is the sum of the lanes of v[i], each in the same order.
template <typename A>
MOE_INLINE Vec<A> sum_each(Vec<A> (&v)[kLanes<A>]) {
  MOE_UNROLL
  for (int n = kLanes<A> / 2; n > 0; n /= 2) {
    MOE_UNROLL
    for (int i = 0; i < n; ++i) {
      Vec<A> lower, upper;
      interleave(v[i], v[i + n], lower, upper);
      v[i] = lower + upper;
    }
  }
  return v[0];
}

// Rows of a matrix times a few packed rows, both along the contracted index. The matrix is read in
// the order of its memory: for so few rows that is what takes the time.
template <typename T>
struct DotTile {
  using A = acc_t<T>;
  using U = operand_t<T>;

  static constexpr int kMaxB = kRegisters == 32 ? 8 : 4;

  const T* a;
  int64_t a_stride, a_count;
  const U* b;  // zeros after k, up to a whole number of kDotStep; of each, half after half
  int64_t b_stride;
  int64_t k;
  int64_t ahead[4];  // elements from what rows of the matrix read to what they fetch
  A* out;            // [b, a]
  int64_t out_stride;
};

// Bytes of each packed row that a pass over the matrix meets: those of kMaxB rows are half a
// first-level cache. More of them, read again for every few rows of the matrix, would take longer
// than the matrix does from memory.
constexpr int64_t kPartBytes = 2048;

// Rows of the matrix that meet each packed value that is loaded. Where few packed rows wait for the
// matrix, they come from parts of it that lie far apart: memory gives a few long streams faster
// than one, and faster than what is fetched ahead.
template <typename T, int nb>
constexpr int streams() {
  constexpr bool wide = kLanes<acc_t<T>> >= 4;
  if (kRegisters == 32) {
    if (nb > 2 || !(kNative<T> || kHalves<T> == 2)) return 1;  // what is loaded takes longer
    return wide ? 4 : 2;
  }
  if (nb <= 2) return wide ? 4 : 2;
  return nb <= 4 ? 2 : 1;
}
template <typename T, int nb>
constexpr int kStreams = streams<T, nb>();

// Of more packed rows, neighbours: rows of a power of two fall on the same lines of the cache, so
// few of them; four only with six packed rows, where 24 sums leave registers for what is loaded.
template <int nb>
constexpr int neighbours() {
  if (kRegisters == 32) return nb <= 3 ? 1 : (nb == 6 ? 4 : 2);
  return nb == 1 ? 1 : 3;
}
template <int nb>
constexpr int kNeighbours = neighbours<nb>();

// So much of the contracted index is summed before it is added to the sums.
template <typename T, int nb>
int64_t dot_part(int64_t k) {
  constexpr int64_t kPart = kPartBytes / sizeof(operand_t<T>);
  return kNeighbours<nb> == 1 ? k : (nb <= 4 ? 2 * kPart : kPart);
}

// Adds products of `rows` rows of the matrix, so far apart, with all packed rows, elements
// [begin, end) of each and spread over lanes, to sums[j][at + i * step_at].
template <typename T, int nb, int rows, bool fetch>
MOE_INLINE void dot_rows(const DotTile<T>& tile, const T* a, int64_t apart, int64_t begin,
                         int64_t end, Vec<acc_t<T>> (&sums)[nb][kLanes<acc_t<T>>], int64_t at,
                         int64_t step_at) {
  using Group = Groups<T>;
  using A = acc_t<T>;
  constexpr int step = kDotStep<T>, halves = kHalves<T>;
  // What takes more instructions to load needs more sums on their way, of a row that is alone with
  // every packed value. Elsewhere as many for a row that is left over as for neighbours, or its
  // terms would have another order.
  constexpr bool alone = kStreams<T, nb> == 1 && kNeighbours<nb> == 1;
  constexpr int unroll = !alone || kNative<T> ? 1 : (nb == 1 ? 4 : (nb <= 3 ? 2 : 1));
  constexpr int64_t kAhead = 8192 / sizeof(T);  // two pages: the first of a page takes longest
  const operand_t<T>* b = tile.b;
  const int64_t b_stride = tile.b_stride, whole = end / step * step;
  Vec<A> partial[unroll][rows][nb] = {};
  const auto add = [&]<int half>(const T* const* from, int64_t k,
                                 int u) __attribute__((always_inline)) {
    typename Group::V av[rows];
    MOE_UNROLL
    for (int i = 0; i < rows; ++i) av[i] = Group::template load_half<half>(from[i]);
    MOE_UNROLL
    for (int j = 0; j < nb; ++j) {
      typename Group::V bv = Group::load(b + j * b_stride + k + half * (step / halves));
      if (rows > 1 && kRegisters < 32) keep_in_register(bv);
      MOE_UNROLL
      for (int i = 0; i < rows; ++i) {
        partial[u][i][j] = Group::multiply_add(av[i], bv, partial[u][i][j]);
      }
    }
  };
  const auto add_step = [&](const T* const* from, int64_t k, int u) __attribute__((always_inline)) {
    add.template operator()<0>(from, k, u);
    if constexpr (halves == 2) add.template operator()<1>(from, k, u);
  };
  const auto add_whole = [&](int64_t k, int u, bool line) __attribute__((always_inline)) {
    const T* from[rows];
    MOE_UNROLL
    for (int i = 0; i < rows; ++i) {
      from[i] = a + i * apart + k;
      if (fetch && line) prefetch_line(from[i] + (rows > 1 ? tile.ahead[i] : kAhead));
    }
    add_step(from, k, u);
  };
  // Once for each line of memory.
  constexpr int line_steps = step * sizeof(T) < 64 ? 64 / (step * sizeof(T)) : 1;
  constexpr int together = unroll > line_steps ? unroll : line_steps;
  int64_t k = begin;
  for (; k + together * step <= whole; k += together * step) {
    MOE_UNROLL
    for (int u = 0; u < together; ++u) add_whole(k + u * step, u % unroll, u % line_steps == 0);
  }
  for (; k < whole; k += step) add_whole(k, 0, true);
  if (whole < end) {
    T rest[rows][step] = {};
    const T* from[rows];
    MOE_UNROLL
    for (int i = 0; i < rows; ++i) {
      std::memcpy(rest[i], a + i * apart + whole, (end - whole) * sizeof(T));
      from[i] = rest[i];
    }
    add_step(from, whole, 0);
  }
  MOE_UNROLL
  for (int i = 0; i < rows; ++i) {
    MOE_UNROLL
    for (int j = 0; j < nb; ++j) {
      Vec<A> sum = partial[0][i][j];
      MOE_UNROLL
      for (int u = 1; u < unroll; ++u) sum += partial[u][i][j];
      sums[j][at + i * step_at] += sum;
    }
  }
}

// With the instructions of vectors: what compilers make of an initializer takes longer to start.
template <typename V, size_t count, size_t lanes>
MOE_INLINE void set_zero(V (&v)[count][lanes]) {
  MOE_UNROLL
  for (size_t i = 0; i < count; ++i) {
    MOE_UNROLL
    for (size_t j = 0; j < lanes; ++j) v[i][j] = V{};
  }
}

// The first rows of the matrix, as many as kStreams parts of equal length hold; returns their
// number.
template <typename T, int nb>
int64_t dot_streams(const DotTile<T>& tile) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>, streams = kStreams<T, nb>, together = L / streams;
  const int64_t length = tile.a_count / streams, part = dot_part<T, nb>(tile.k);
  if (length < L) return 0;  // too short to be streams
  for (int64_t first = 0; first < length; first += together) {
    const int64_t count = length - first < together ? length - first : together;
    const T* a = tile.a + first * tile.a_stride;
    Vec<A> all[nb][L];
    set_zero(all);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t begin = 0; begin < tile.k; begin += part) {
        const int64_t end = tile.k - begin < part ? tile.k : begin + part;
        dot_rows<T, nb, streams, false>(tile, a + i * tile.a_stride, length * tile.a_stride, begin,
                                        end, all, i, together);
      }
    }
    MOE_UNROLL
    for (int j = 0; j < nb; ++j) {
      A sums[L];
      store(sums, sum_each<A>(all[j]));
      A* out = tile.out + j * tile.out_stride + first;
      for (int i = 0; i < streams; ++i) {
        std::memcpy(out + i * length, sums + i * together, count * sizeof(A));
      }
    }
  }
  return streams * length;
}

// Results do not depend on which rows are streams: each sum has the same terms in the same order.
template <typename T, int nb>
void dot_tile(const DotTile<T>& tile) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>, at_once = kNeighbours<nb>;
  const int64_t stride = tile.a_stride, part = dot_part<T, nb>(tile.k);
  const int64_t done = kStreams<T, nb> > 1 ? dot_streams<T, nb>(tile) : 0;
  for (int64_t first = done; first < tile.a_count; first += L) {
    const int64_t count = tile.a_count - first < L ? tile.a_count - first : L;
    const T* a = tile.a + first * stride;
    Vec<A> all[nb][L];
    set_zero(all);
    for (int64_t begin = 0; begin < tile.k; begin += part) {
      const int64_t end = tile.k - begin < part ? tile.k : begin + part;
      int64_t i = 0;
      for (; i + at_once <= count; i += at_once) {
        dot_rows<T, nb, at_once, true>(tile, a + i * stride, stride, begin, end, all, i, 1);
      }
      if constexpr (at_once == 3) {  // or a vector's last two would be single ones
        for (; i + 2 <= count; i += 2) {
          dot_rows<T, nb, 2, true>(tile, a + i * stride, stride, begin, end, all, i, 1);
        }
      }
      for (; i < count; ++i)
        dot_rows<T, nb, 1, true>(tile, a + i * stride, 0, begin, end, all, i, 1);
    }
    MOE_UNROLL
    for (int j = 0; j < nb; ++j) {
      store_some(tile.out + j * tile.out_stride + first, sum_each<A>(all[j]), count);
    }
  }
}

}  // namespace moe::CPU_CAPABILITY
