// Register tiles of matrix products, the innermost loops of everything that multiplies.
//
// T is what the matrices hold, U what is multiplied, in groups of G consecutive values of the
// contracted index: pairs of bf16 where the processor has such an instruction, else single floats
// or doubles.
#pragma once

#include <utility>

#include "cpu/simd.h"

#if defined(__clang__)
#define MOE_UNROLL _Pragma("unroll")
#else
#define MOE_UNROLL _Pragma("GCC unroll 16")
#endif

namespace moe::CPU_CAPABILITY {

template <typename T>
struct Compute {
  using U = acc_t<T>;
  static constexpr int G = 1;
};

#if defined(MOE_AVX512_BF16)
template <>
struct Compute<bf16> {
  using U = bf16;
  static constexpr int G = 2;
};
#endif

template <typename T>
using operand_t = typename Compute<T>::U;

// Whether many rows are multiplied in tile registers (cpu/amx_tiles.h). Those hold 16 groups of k:
// groups come in multiples of so many then, zeros after the last one.
template <typename T>
constexpr bool kTileRegisters = false;
#if defined(CPU_CAPABILITY_AMX)
template <>
constexpr bool kTileRegisters<bf16> = true;
#endif
template <typename T>
constexpr int kWholeGroups = kTileRegisters<T> ? 16 : 1;

// Whether T can be multiplied as it lies in memory.
template <typename T>
constexpr bool kNative = std::is_same_v<T, operand_t<T>>;

// Vectors that a load of a row of a matrix gives for dot products. bf16 that is multiplied as
// floats is loaded in pairs, which take a shift to be their even and a mask to be their odd
// elements: less than to widen each half.
template <typename T>
constexpr int kHalves = std::is_same_v<T, bf16> && !kNative<T> ? 2 : 1;
template <typename T>
constexpr int kDotStep = kLanes<acc_t<T>> * Compute<T>::G * kHalves<T>;

// ------------------------------------------------------------------------------ rearrangements
template <bool upper, typename V, size_t... i>
MOE_INLINE V interleave_half(V a, V b, std::index_sequence<i...>) {
  constexpr int n = sizeof...(i), first = upper ? n / 2 : 0;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (first + i / 2 + i % 2 * n)...);
#else
  using E = std::remove_reference_t<decltype(a[0])>;
  using Index = std::conditional_t<sizeof(E) == 8, int64_t,
                                   std::conditional_t<sizeof(E) == 4, int32_t, int16_t>>;
  typedef Index Mask __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Mask{static_cast<Index>(first + i / 2 + i % 2 * n)...});
#endif
}

// a[0] b[0] a[1] b[1] ...: the lower and the upper half of it.
template <typename V>
MOE_INLINE void interleave(V a, V b, V& lower, V& upper) {
  constexpr auto lanes = std::make_index_sequence<sizeof(V) / sizeof(a[0])>();
  lower = interleave_half<false>(a, b, lanes);
  upper = interleave_half<true>(a, b, lanes);
}

#if defined(MOE_AVX512)
// transpose() of 16 x 16, in half the time: shuffles within 16 bytes need no tables of lanes.
MOE_INLINE void transpose_floats(Vec<float> (&v)[16]) {
  __m512 pairs[16], quads[16], halves[16];
  MOE_UNROLL
  for (int i = 0; i < 8; ++i) {
    const __m512 a = bit_cast<__m512>(v[2 * i]), b = bit_cast<__m512>(v[2 * i + 1]);
    pairs[2 * i] = _mm512_unpacklo_ps(a, b);
    pairs[2 * i + 1] = _mm512_unpackhi_ps(a, b);
  }
  MOE_UNROLL
  for (int i = 0; i < 8; ++i) {  // rows 4 * (i / 2) to + 3
    const int first = i / 2 * 4 + i % 2;
    const __m512d a = _mm512_castps_pd(pairs[first]), b = _mm512_castps_pd(pairs[first + 2]);
    quads[i / 2 * 4 + i % 2 * 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
    quads[i / 2 * 4 + i % 2 * 2 + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
  MOE_UNROLL
  for (int i = 0; i < 8; ++i) {  // rows 8 * (i / 4) to + 7
    const __m512 a = quads[i / 4 * 8 + i % 4], b = quads[i / 4 * 8 + i % 4 + 4];
    halves[i / 4 * 8 + i % 4] = _mm512_shuffle_f32x4(a, b, 0x88);
    halves[i / 4 * 8 + i % 4 + 4] = _mm512_shuffle_f32x4(a, b, 0xdd);
  }
  MOE_UNROLL
  for (int i = 0; i < 8; ++i) {
    const int to = i % 4 + i / 4 * 4;
    v[to] = bit_cast<Vec<float>>(_mm512_shuffle_f32x4(halves[i], halves[i + 8], 0x88));
    v[to + 8] = bit_cast<Vec<float>>(_mm512_shuffle_f32x4(halves[i], halves[i + 8], 0xdd));
  }
}
#endif

// v[i][j] becomes v[j][i]: each pass moves the highest bit of a row's number into the lane's.
template <typename A>
MOE_INLINE void transpose(Vec<A> (&v)[kLanes<A>]) {
  constexpr int L = kLanes<A>;
#if defined(MOE_AVX512)
  if constexpr (L == 16) return transpose_floats(v);
#endif
  MOE_UNROLL
  for (int bit = 1; bit < L; bit *= 2) {
    Vec<A> next[L];
    MOE_UNROLL
    for (int i = 0; i < L / 2; ++i) {
      interleave(v[i], v[i + L / 2], next[2 * i], next[2 * i + 1]);
    }
    MOE_UNROLL
    for (int i = 0; i < L; ++i) v[i] = next[i];
  }
}

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

// One vector of groups: kLanes sums of G products each.
template <typename T>
struct Groups {
  using U = operand_t<T>;
  using A = acc_t<T>;
  static constexpr int G = Compute<T>::G;

  using V = Vec<A>;  // for pairs, their bits

  static MOE_INLINE V load(const U* p) { return load_raw<V>(p); }

  // From elements as they lie in memory.
  static MOE_INLINE V load_wide(const T* p) {
    if constexpr (kNative<T>) {
      return load_raw<V>(p);
    } else {
      return CPU_CAPABILITY::load(p);
    }
  }

  // Of kDotStep elements as they lie in memory, the half that dot products take together.
  template <int half>
  static MOE_INLINE V load_half(const T* p) {
    if constexpr (kHalves<T> == 1) {
      return load_wide(p);
    } else {
      const VecU32 pairs = load_raw<VecU32>(p);
      return bit_cast<V>(half == 0 ? pairs << 16 : upper_halves(pairs));
    }
  }

  // From vectors of two rows along the columns to the pairs of the lower and the upper columns.
  static MOE_INLINE void pair(V& first, V& second) {
    typedef uint16_t Wide __attribute__((vector_size(kVectorBytes)));
    Wide lower, upper;
    interleave(bit_cast<Wide>(first), bit_cast<Wide>(second), lower, upper);
    first = bit_cast<V>(lower);
    second = bit_cast<V>(upper);
  }

  // The group at p in every lane.
  static MOE_INLINE V spread(const U* p) {
#if defined(MOE_AVX512_BF16)
    if constexpr (G == 2) {
      int32_t pair;
      std::memcpy(&pair, p, sizeof(pair));
      return bit_cast<V>(_mm512_set1_epi32(pair));
    } else
#endif
    {
      return broadcast(static_cast<A>(*p));
    }
  }

  static MOE_INLINE Vec<A> multiply_add(V a, V b, Vec<A> sum) {
#if defined(MOE_AVX512_BF16)
    if constexpr (G == 2) {
      return bit_cast<V>(
          _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
    } else
#endif
    {
      return fma(a, b, sum);
    }
  }
};

// ------------------------------------------------------------------------------- outer products
// Rows whose groups are spread, times vectors of columns.
template <typename T>
struct OuterTile {
  using U = operand_t<T>;
  using A = acc_t<T>;

  static constexpr int kMaxRows = 12;
  // How many vectors of columns there may be, and how many rows then fill the registers.
  static constexpr int kMaxVectors = kRegisters == 32 ? 6 : 2;
  static constexpr int rows_for(int vectors) {
    constexpr int wide[] = {0, 8, 8, 8, 6, 5, 4};
    constexpr int narrow[] = {0, 8, 6};
    return kRegisters == 32 ? wide[vectors] : narrow[vectors];
  }

  const U* rows[kMaxRows];
  int64_t row_step;  // from a group of a row to its next one
  const U* columns;  // vectors of groups
  int64_t column_step;
  int64_t groups;
  A* out;  // [rows, vectors * kLanes]
  int64_t out_stride;
  bool accumulate;  // add to out: sums of sums, which round less than one long sum
  T* narrow;        // if not null: written instead of out, in T
  int64_t narrow_stride;
  bool stream = false;   // narrow, past the caches: whole vectors are aligned
  const char* prefetch;  // read ahead from here, so many bytes a group
  int64_t prefetch_step;
};

// Sums of whole vectors, rounded to where the tile's results belong. Out of line, or the constants
// that rounding takes would be made for each vector.
template <typename T>
__attribute__((noinline)) void store_narrow(const OuterTile<T>& tile, const acc_t<T>* sums,
                                            int rows, int vectors) {
  constexpr int L = kLanes<acc_t<T>>;
  for (int r = 0; r < rows; ++r) {
    T* narrow = tile.narrow + r * tile.narrow_stride;
    for (int v = 0; v < vectors; ++v, sums += L) {
      store(narrow + v * L, load(sums));
    }
  }
}

template <typename T, int rows, int vectors>
void outer_tile(const OuterTile<T>& tile) {
  using Group = Groups<T>;
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  Vec<A> sums[rows][vectors];
  const operand_t<T>* row[rows];
  MOE_UNROLL
  for (int r = 0; r < rows; ++r) {
    row[r] = tile.rows[r];
    MOE_UNROLL
    for (int v = 0; v < vectors; ++v) {
      sums[r][v] = Vec<A>{};
    }
  }
  const operand_t<T>* column = tile.columns;
  const char* prefetch = tile.prefetch;
  const int64_t groups = tile.groups, row_step = tile.row_step, column_step = tile.column_step;
  const int64_t prefetch_step = tile.prefetch_step;
  for (int64_t g = 0, at = 0; g < groups; ++g, at += row_step) {
    typename Group::V b[vectors];
    MOE_UNROLL
    for (int v = 0; v < vectors; ++v) b[v] = Group::load(column + v * L * Group::G);
    column += column_step;
    prefetch_line(prefetch);
    prefetch += prefetch_step;
    MOE_UNROLL
    for (int r = 0; r < rows; ++r) {
      const typename Group::V a = Group::spread(row[r] + at);
      MOE_UNROLL
      for (int v = 0; v < vectors; ++v) sums[r][v] = Group::multiply_add(a, b[v], sums[r][v]);
    }
  }
  if (kRegisters < 32 && !kNative<T> && tile.narrow && !tile.stream && !tile.accumulate) {
    // To round takes registers for constants, of which sums leave none.
    A wide[rows][vectors * L];
    MOE_UNROLL
    for (int r = 0; r < rows; ++r) {
      MOE_UNROLL
      for (int v = 0; v < vectors; ++v) store(wide[r] + v * L, sums[r][v]);
    }
    return store_narrow<T>(tile, wide[0], rows, vectors);
  }
  MOE_UNROLL
  for (int r = 0; r < rows; ++r) {
    MOE_UNROLL
    for (int v = 0; v < vectors; ++v) {
      if (tile.accumulate) sums[r][v] += load(tile.out + r * tile.out_stride + v * L);
      if (tile.stream) {
        stream(tile.narrow + r * tile.narrow_stride + v * L, sums[r][v]);
      } else if (tile.narrow) {
        store(tile.narrow + r * tile.narrow_stride + v * L, sums[r][v]);
      } else {
        store(tile.out + r * tile.out_stride + v * L, sums[r][v]);
      }
    }
  }
}

// --------------------------------------------------------------------------------- dot products
// A loaded vector that several instructions take is loaded once, not with each of them: those would
// wait for loads.
template <typename V>
MOE_INLINE void keep_in_register([[maybe_unused]] V& v) {
#if defined(MOE_AVX2)
  asm("" : "+x"(v));
#endif
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
// than one, and faster than what is fetched ahead. Of more packed rows, neighbours: rows of a power
// of two fall on the same lines of the cache, so four only where two would make loads the limit.
template <typename T, int nb>
constexpr int kStreams = kRegisters < 32 ? (nb > 4                           ? 1
                                            : nb > 2 || kLanes<acc_t<T>> < 4 ? 2
                                                                             : 4)
                         : nb > 2 || !(kNative<T> || kHalves<T> == 2) ? 1
                         : kLanes<acc_t<T>> < 4                       ? 2
                                                                      : 4;
template <int nb>
constexpr int kNeighbours = kRegisters < 32 ? (nb <= 2 ? 1 : 3)
                                            : (nb <= 3   ? 1
                                               : nb == 6 ? 4
                                                         : 2);

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
  // What takes more instructions to load needs more sums on their way. As many for a row that is
  // left over as for neighbours, or its terms would have another order.
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
      if (rows > 1) keep_in_register(bv);
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
