// Vectors of one instruction set, on the compiler's vector extension: each file that includes this
// is compiled once per set, with CPU_CAPABILITY naming it.
#pragma once

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of _mm512_undefined, in GCC 12
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "cpu/types.h"

#if !defined(CPU_CAPABILITY)
#error "cpu/simd.h belongs to CPU_SIMD_SOURCES, which are compiled once per instruction set"
#endif

namespace moe::CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AVX512_BF16) || defined(CPU_CAPABILITY_AMX)
#define MOE_AVX512_BF16 1
#endif

#if defined(CPU_CAPABILITY_AVX512) || defined(MOE_AVX512_BF16)
#define MOE_AVX512 1
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(CPU_CAPABILITY_AVX2)
#define MOE_AVX2 1
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 32;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

#define MOE_INLINE inline __attribute__((always_inline))

template <typename A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};

template <typename A>
using Vec = typename VectorOf<A>::type;

template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

typedef int32_t VecI32 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfVecU16 __attribute__((vector_size(kVectorBytes / 2)));

template <typename To, typename From>
MOE_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// The value is computed here, into a register. Left alone, compilers load it with each instruction
// that takes it, which waits for loads, or add in another order, for which registers do not
// suffice.
template <typename V>
MOE_INLINE void keep_in_register([[maybe_unused]] V& v) {
#if defined(MOE_AVX2)
  asm("" : "+x"(v));
#elif defined(MOE_AVX512)
  asm("" : "+v"(v));
#endif
}

// Into the second-level cache: what is read next would often have left the first again.
MOE_INLINE void prefetch_line(const void* p) { __builtin_prefetch(p, 0, 2); }

template <typename V, typename A>
MOE_INLINE V load_raw(const A* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <typename A>
MOE_INLINE Vec<A> broadcast(A a) {
  return a - Vec<A>{};
}

// One expression, so that it becomes one instruction where there is one.
template <typename V>
MOE_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}

// ---------------------------------------------------------------------------- one element
MOE_INLINE float to_float(float a) { return a; }
MOE_INLINE double to_float(double a) { return a; }
MOE_INLINE float to_float(bf16 a) { return bit_cast<float>(static_cast<uint32_t>(a.bits) << 16); }

MOE_INLINE float to_float(fp16 a) {
#if defined(__F16C__)
  return _cvtsh_ss(a.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(a.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(a.bits & 0x7fff) << 13;
  // Scaling by 2^112 rebiases the exponent, and makes subnormal numbers normal.
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t bits =
      magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bit_cast<uint32_t>(scaled);
  return bit_cast<float>(bits | sign);
#endif
}

template <typename T>
MOE_INLINE T from_float(acc_t<T> a) {
  if constexpr (std::is_same_v<T, bf16>) {
    const uint32_t bits = bit_cast<uint32_t>(a);
    if (a != a) return bf16{static_cast<uint16_t>(0x7fc0 | (bits >> 16 & 0x8000))};
    return bf16{static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else if constexpr (std::is_same_v<T, fp16>) {
#if defined(__F16C__)
    return fp16{static_cast<uint16_t>(_cvtss_sh(a, _MM_FROUND_TO_NEAREST_INT))};
#else
    const uint32_t bits = bit_cast<uint32_t>(a);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return fp16{static_cast<uint16_t>(sign | 0x7e00)};
    if (magnitude >= 0x477ff000) return fp16{static_cast<uint16_t>(sign | 0x7c00)};
    if (magnitude < 0x38800000) {  // subnormal: let the adder round
      const float shifted = bit_cast<float>(magnitude) + 0.5f;
      return fp16{static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000))};
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000;
    return fp16{static_cast<uint16_t>(sign | rounded >> 13)};
#endif
  } else {
    return a;
  }
}

// ------------------------------------------------------------------- kLanes<acc_t<T>> elements
template <typename T>
MOE_INLINE Vec<acc_t<T>> load(const T* p) {
  if constexpr (std::is_same_v<T, bf16>) {
#if defined(MOE_AVX512)
    const __m512i wide = _mm512_cvtepu16_epi32(load_raw<__m256i>(p));
    return bit_cast<Vec<float>>(_mm512_slli_epi32(wide, 16));
#elif defined(MOE_AVX2)
    const __m256i wide = _mm256_cvtepu16_epi32(load_raw<__m128i>(p));
    return bit_cast<Vec<float>>(_mm256_slli_epi32(wide, 16));
#else
    return bit_cast<Vec<float>>(__builtin_convertvector(load_raw<HalfVecU16>(p), VecU32) << 16);
#endif
  } else if constexpr (std::is_same_v<T, fp16>) {
#if defined(MOE_AVX512)
    return bit_cast<Vec<float>>(_mm512_cvtph_ps(load_raw<__m256i>(p)));
#elif defined(MOE_AVX2)
    return bit_cast<Vec<float>>(_mm256_cvtph_ps(load_raw<__m128i>(p)));
#else
    Vec<float> v;
    for (int i = 0; i < kLanes<float>; ++i) v[i] = to_float(p[i]);
    return v;
#endif
  } else {
    return load_raw<Vec<T>>(p);
  }
}

template <typename T>
MOE_INLINE void store(T* p, Vec<acc_t<T>> v) {
  if constexpr (std::is_same_v<T, bf16>) {
#if defined(MOE_AVX512_BF16)
    const __m256bh half = _mm512_cvtneps_pbh(bit_cast<__m512>(v));
    std::memcpy(p, &half, sizeof(half));
    return;
#endif
    const VecU32 bits = bit_cast<VecU32>(v);
    const VecU32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const VecU32 nan = 0x7fc0 | (bits >> 16 & 0x8000);
    const VecU32 chosen = v == v ? rounded : nan;
#if defined(MOE_AVX512)
    const __m256i narrow = _mm512_cvtepi32_epi16(bit_cast<__m512i>(chosen));
#elif defined(MOE_AVX2)
    const __m256i wide = bit_cast<__m256i>(chosen), halves = _mm256_packus_epi32(wide, wide);
    const __m128i narrow = _mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0xd8));
#else
    const HalfVecU16 narrow = __builtin_convertvector(chosen, HalfVecU16);
#endif
    std::memcpy(p, &narrow, sizeof(narrow));
  } else if constexpr (std::is_same_v<T, fp16>) {
#if defined(MOE_AVX512)
    const __m256i half = _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &half, sizeof(half));
#elif defined(MOE_AVX2)
    const __m128i half = _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &half, sizeof(half));
#else
    for (int i = 0; i < kLanes<float>; ++i) p[i] = from_float<fp16>(v[i]);
#endif
  } else {
    std::memcpy(p, &v, sizeof(v));
  }
}

// Past the caches, which then need not read what is overwritten; p is aligned to what is written.
// finish_streams() before another thread reads it.
template <typename T>
MOE_INLINE void stream(T* p, Vec<acc_t<T>> v) {
  T narrow[kLanes<acc_t<T>>];
  store(narrow, v);
#if defined(__x86_64__)
  if constexpr (sizeof(narrow) == 16)
    return _mm_stream_si128((__m128i*)p, load_raw<__m128i>(narrow));
#endif
#if defined(MOE_AVX2) || defined(MOE_AVX512)
  if constexpr (sizeof(narrow) == 32) {
    return _mm256_stream_si256((__m256i*)p, load_raw<__m256i>(narrow));
  }
#endif
#if defined(MOE_AVX512)
  if constexpr (sizeof(narrow) == 64) {
    return _mm512_stream_si512((__m512i*)p, load_raw<__m512i>(narrow));
  }
#endif
  std::memcpy(p, narrow, sizeof(narrow));
}

MOE_INLINE void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The first n < kLanes elements, zeros after them.
template <typename T>
MOE_INLINE Vec<acc_t<T>> load_some(const T* p, int64_t n) {
  T full[kLanes<acc_t<T>>] = {};
  std::memcpy(full, p, n * sizeof(T));
  return load(full);
}

template <typename T>
MOE_INLINE void store_some(T* p, Vec<acc_t<T>> v, int64_t n) {
  T full[kLanes<acc_t<T>>];
  store(full, v);
  std::memcpy(p, full, n * sizeof(T));
}

template <typename A>
MOE_INLINE A sum_lanes(Vec<A> v) {
  // By halves, so that the order does not depend on how the compiler vectorizes it.
  A lanes[kLanes<A>];
  std::memcpy(lanes, &v, sizeof(v));
  for (int half = kLanes<A> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// f(f(a, b), f(c, d)) ... over the lanes of a vector; in any order, as for the largest.
template <typename I, int bytes = kVectorBytes, typename V, typename F>
MOE_INLINE I fold_lanes(V v, F f) {
  if constexpr (bytes > 16) {
    typedef I Half __attribute__((vector_size(bytes / 2)));
    Half halves[2];
    std::memcpy(halves, &v, bytes);
    return fold_lanes<I, bytes / 2>(f(halves[0], halves[1]), f);
  } else {
    I folded = v[0];
    for (int i = 1; i < bytes / static_cast<int>(sizeof(I)); ++i) folded = f(folded, I(v[i]));
    return folded;
  }
}

// ---------------------------------------------------------------------- pairs and their parts
#if defined(MOE_AVX2)
alignas(kVectorBytes) constexpr uint32_t kUpperHalves[kLanes<uint32_t>] = {
    0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000};
#endif

// The upper 16 bits of each lane in their place. Where registers are few the mask stays in memory:
// compilers would rather move sums there.
MOE_INLINE VecU32 upper_halves(VecU32 pairs) {
#if defined(MOE_AVX2)
  asm("vpand %1, %0, %0" : "+x"(pairs) : "m"(kUpperHalves));
  return pairs;
#else
  return pairs & 0xffff0000u;
#endif
}

// p[0], p[2], ... and p[1], p[3], ... of 2 * kLanes elements.
template <typename T>
MOE_INLINE void load_pairs(const T* p, Vec<acc_t<T>>& even, Vec<acc_t<T>>& odd) {
  using A = acc_t<T>;
  if constexpr (std::is_same_v<T, bf16>) {
    const VecU32 pairs = load_raw<VecU32>(p);
    even = bit_cast<Vec<float>>(pairs << 16);
    odd = bit_cast<Vec<float>>(upper_halves(pairs));
    return;
  }
  const Vec<A> low = load(p), high = load(p + kLanes<A>);
#if defined(MOE_AVX512)
  if constexpr (sizeof(A) == 4) {
    const __m512i index =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512 a = bit_cast<__m512>(low), b = bit_cast<__m512>(high);
    even = bit_cast<Vec<A>>(_mm512_permutex2var_ps(a, index, b));
    odd = bit_cast<Vec<A>>(_mm512_permutex2var_ps(a, index + _mm512_set1_epi32(1), b));
    return;
  }
#endif
  A both[2 * kLanes<A>];
  store(both, low);
  store(both + kLanes<A>, high);
  for (int i = 0; i < kLanes<A>; ++i) {
    even[i] = both[2 * i];
    odd[i] = both[2 * i + 1];
  }
}

template <typename T>
MOE_INLINE void store_pairs(T* p, Vec<acc_t<T>> even, Vec<acc_t<T>> odd) {
  using A = acc_t<T>;
#if defined(MOE_AVX512)
  if constexpr (sizeof(A) == 4) {
    const __m512i index = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512 a = bit_cast<__m512>(even), b = bit_cast<__m512>(odd);
    store(p, bit_cast<Vec<A>>(_mm512_permutex2var_ps(a, index, b)));
    store(p + kLanes<A>,
          bit_cast<Vec<A>>(_mm512_permutex2var_ps(a, index + _mm512_set1_epi32(8), b)));
    return;
  }
#endif
  A both[2 * kLanes<A>];
  for (int i = 0; i < kLanes<A>; ++i) {
    both[2 * i] = even[i];
    both[2 * i + 1] = odd[i];
  }
  store(p, load(both));
  store(p + kLanes<A>, load(both + kLanes<A>));
}

// ------------------------------------------------------------------------------------- functions
template <typename A, typename F>
MOE_INLINE Vec<A> map_lanes(Vec<A> v, F f) {
  for (int i = 0; i < kLanes<A>; ++i) v[i] = f(v[i]);
  return v;
}

template <typename A>
MOE_INLINE Vec<A> max(Vec<A> a, Vec<A> b) {
  return a > b ? a : b;
}

template <typename A>
MOE_INLINE Vec<A> min(Vec<A> a, Vec<A> b) {
  return a < b ? a : b;
}

// e^x = 2^n * e^r with |r| <= ln(2) / 2 and a Taylor polynomial of degree 7 for e^r: below 1.5
// units in the last place. Keeps NaN.
MOE_INLINE Vec<float> exp(Vec<float> x) {
  const Vec<float> clamped = x < -87.5f ? broadcast(-87.5f) : (x > 88.8f ? broadcast(88.8f) : x);
  const Vec<float> shifter = broadcast(0x1.8p23f);  // adding it rounds to an integer
  const Vec<float> sum = fma(clamped, broadcast(1.44269504088896341f), shifter);
  const Vec<float> n = sum - shifter;
  Vec<float> r = fma(n, broadcast(-0x1.62e4p-1f), clamped);  // ln(2) in two parts
  r = fma(n, broadcast(-0x1.7f7d1cp-20f), r);
  Vec<float> p = broadcast(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    p = fma(p, r, broadcast(c));
  }
  // 2^n in two factors: n may be 128, where the result is still finite.
  const VecI32 exponent = bit_cast<VecI32>(sum) - bit_cast<VecI32>(shifter);
  const VecI32 half = exponent >> 1;
  p *= bit_cast<Vec<float>>((half + 127) << 23);
  p *= bit_cast<Vec<float>>((exponent - half + 127) << 23);
  return x < -87.5f ? broadcast(0.0f) : (x > 88.8f ? broadcast(INFINITY) : p);
}

MOE_INLINE Vec<double> exp(Vec<double> x) {
  return map_lanes<double>(x, [](double a) { return std::exp(a); });
}

template <typename A>
MOE_INLINE Vec<A> sigmoid(Vec<A> x) {
  return A(1) / (A(1) + exp(-x));
}

// The normal distribution function, erfc(-x / sqrt(2)) / 2. erfc(z) = t P(t) exp(-z^2) with
// t = 1 / (1 + 0.3275911 z), the form of Abramowitz and Stegun, Handbook of Mathematical Functions,
// 7.1.26, with P refitted to a relative error of 6e-8.
MOE_INLINE Vec<float> normal_cdf(Vec<float> x) {
  const Vec<float> z = (x < 0.0f ? -x : x) * 0.70710678118654752f;
  const Vec<float> t = 1.0f / fma(broadcast(0.3275911f), z, broadcast(1.0f));
  Vec<float> p = broadcast(-0.144512340426445f);
  for (const float c :
       {0.5111925005912781f, -0.43180030584335327f, 0.47816896438598633f, 0.011476334184408188f,
        0.21042737364768982f, 0.17993703484535217f, 0.18511034548282623f}) {
    p = fma(p, t, broadcast(c));
  }
  const Vec<float> tail = 0.5f * p * t * exp(-z * z);
  return x < 0.0f ? tail : 1.0f - tail;
}

MOE_INLINE Vec<double> normal_cdf(Vec<double> x) {
  return map_lanes<double>(x, [](double a) { return 0.5 * std::erfc(-a * std::sqrt(0.5)); });
}

}  // namespace moe::CPU_CAPABILITY
