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
  // Read once: what is written could be a part of the tile, for all that compilers know.
  A* const out = tile.out;
  T* const narrow = tile.narrow;
  const int64_t out_stride = tile.out_stride, narrow_stride = tile.narrow_stride;
  if (tile.accumulate) {
    MOE_UNROLL
    for (int r = 0; r < rows; ++r) {
      MOE_UNROLL
      for (int v = 0; v < vectors; ++v) sums[r][v] += load(out + r * out_stride + v * L);
    }
  }
  if (tile.stream) {
    MOE_UNROLL
    for (int r = 0; r < rows; ++r) {
      MOE_UNROLL
      for (int v = 0; v < vectors; ++v) stream(narrow + r * narrow_stride + v * L, sums[r][v]);
    }
  } else if (narrow) {
    MOE_UNROLL
    for (int r = 0; r < rows; ++r) {
      MOE_UNROLL
      for (int v = 0; v < vectors; ++v) store(narrow + r * narrow_stride + v * L, sums[r][v]);
    }
  } else {
    MOE_UNROLL
    for (int r = 0; r < rows; ++r) {
      MOE_UNROLL
      for (int v = 0; v < vectors; ++v) store(out + r * out_stride + v * L, sums[r][v]);
    }
  }
}

}  // namespace moe::CPU_CAPABILITY
