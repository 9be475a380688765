// Groups of 32 codes and of a row's values: the integers that they become, and products of those.
#pragma once

#include <cmath>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/tiles.h"

namespace moe::CPU_CAPABILITY {

typedef uint8_t VecU8 __attribute__((vector_size(kVectorBytes)));
typedef int16_t VecI16 __attribute__((vector_size(kVectorBytes)));

// ---------------------------------------------------------------------------------------- codes
// Bytes of codes, and how they become unsigned bytes of value + kOffset, up to kMost.
template <Format format>
struct Codes;

template <>
struct Codes<Format::kInt8> {
  static constexpr int kOffset = 128, kPerByte = 1;

  static MOE_INLINE void unpack(VecU8 codes, VecU8 (&values)[kPerByte]) { values[0] = codes; }
};

MOE_INLINE void split_nibbles(VecU8 codes, VecU8 (&values)[2]) {
  const VecU32 bits = bit_cast<VecU32>(codes);
  values[0] = bit_cast<VecU8>(bits & 0x0f0f0f0fu);
  values[1] = bit_cast<VecU8>((bits >> 4) & 0x0f0f0f0fu);
}

template <>
struct Codes<Format::kInt4> {
  static constexpr int kOffset = 8, kMost = 15, kPerByte = 2;

  static MOE_INLINE void unpack(VecU8 codes, VecU8 (&values)[kPerByte]) {
    split_nibbles(codes, values);
  }
};

// e2m1, twice the value: 0, 1, 2, 3, 4, 6, 8, 12, then the same negative.
template <>
struct Codes<Format::kMxfp4> {
  static constexpr int kOffset = 12, kMost = 24, kPerByte = 2;

  static MOE_INLINE void unpack(VecU8 codes, VecU8 (&values)[kPerByte]) {
    split_nibbles(codes, values);
    alignas(16) static constexpr uint8_t kTable[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                                       12, 11, 10, 9,  8,  6,  4,  0};
    for (VecU8& value : values) {
#if defined(MOE_AVX512)
      const __m512i table = _mm512_broadcast_i32x4(load_raw<__m128i>(kTable));
      value = bit_cast<VecU8>(_mm512_shuffle_epi8(table, bit_cast<__m512i>(value)));
#elif defined(MOE_AVX2)
      const __m256i table = _mm256_broadcastsi128_si256(load_raw<__m128i>(kTable));
      value = bit_cast<VecU8>(_mm256_shuffle_epi8(table, bit_cast<__m256i>(value)));
#else
      uint8_t bytes[kVectorBytes];
      std::memcpy(bytes, &value, sizeof(bytes));
      for (uint8_t& byte : bytes) byte = kTable[byte];
      value = load_raw<VecU8>(bytes);
#endif
    }
  }
};

// -------------------------------------------------------------------------------- integer rows
// What an instruction multiplies and adds in a lane of 32 bits.
enum class Products {
  kFourBytes,  // with as many of a row, to 32 bits
  kTwoBytes,  // twice, to sums of 16 bits, which hold the products of some fours of codes of 4 bits
  kTwoShorts,  // to 32 bits: bytes are widened first
};

template <Format format>
constexpr Products kProducts =
#if defined(CPU_CAPABILITY_AVX512_BF16)
    Products::kFourBytes;
#elif defined(MOE_AVX512) || defined(MOE_AVX2)
    format == Format::kInt8 ? Products::kTwoShorts : Products::kTwoBytes;
#else
    Products::kTwoShorts;
#endif

// The integers of a row's group in planes, whose weighted sum they are. `wide` is of 24 bits
// instead of 16.
template <Products products, bool wide>
struct RowGroup {
  using Element = std::conditional_t<products == Products::kTwoShorts, int16_t, int8_t>;

  static constexpr int kPlanes = (wide ? 2 : 1) + (sizeof(Element) == 1);
  static constexpr int kPlaneBits = sizeof(Element) == 1 ? 8 : (wide ? 12 : 16);
  // Fits the planes: with the carry of those below, the last has at most 127 in bytes.
  static constexpr float kLargest = wide ? 127 * 65536 : 127 * 256;
  static_assert(kPlanes * kPlaneBits >= (wide ? 24 : 16));

  float scale;
  int32_t starts[kPlanes];              // -kOffset times the sum of a plane
  Element planes[kPlanes][kGroupSize];  // k in the order that GroupSum wants
};

template <Format format, bool wide>
using RowGroupOf = RowGroup<kProducts<format>, wide>;

template <typename T>
MOE_INLINE int32_t four_bytes(const T* p) {
  int32_t bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bits;
}

// The sums of products of bytes, four in each lane, with integers of a row, four at a time.
template <Format format, Products products = kProducts<format>>
struct GroupSum;

template <Format format>
struct GroupSum<format, Products::kTwoShorts> {
  using V = VecI32;

  static MOE_INLINE void add(V& sum, VecU8 bytes, const int16_t* four) {
    // Elements 0 and 2 are side by side, then 1 and 3: pairs of 16 bits need no shuffle.
    const VecU32 lanes = bit_cast<VecU32>(bytes);
#if defined(__SSE2__)
    const VecU32 halves[2] = {lanes & 0x00ff00ffu, (lanes >> 8) & 0x00ff00ffu};
    MOE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const VecI32 pair = VecI32{} + four_bytes(four + 2 * i);
#if defined(MOE_AVX512)
      sum += bit_cast<VecI32>(
          _mm512_madd_epi16(bit_cast<__m512i>(halves[i]), bit_cast<__m512i>(pair)));
#elif defined(MOE_AVX2)
      sum += bit_cast<VecI32>(
          _mm256_madd_epi16(bit_cast<__m256i>(halves[i]), bit_cast<__m256i>(pair)));
#else
      sum +=
          bit_cast<VecI32>(_mm_madd_epi16(bit_cast<__m128i>(halves[i]), bit_cast<__m128i>(pair)));
#endif
    }
#else
    for (int i = 0; i < 4; ++i) {
      const int32_t value = four[i % 2 * 2 + i / 2];
      sum += bit_cast<VecI32>((lanes >> (8 * i)) & 0xffu) * value;
    }
#endif
  }
};

#if defined(CPU_CAPABILITY_AVX512_BF16)
template <Format format>
struct GroupSum<format, Products::kFourBytes> {
  using V = VecI32;

  static MOE_INLINE void add(V& sum, VecU8 bytes, const int8_t* four) {
    sum = bit_cast<VecI32>(_mm512_dpbusd_epi32(bit_cast<__m512i>(sum), bit_cast<__m512i>(bytes),
                                               _mm512_set1_epi32(four_bytes(four))));
  }
};
#elif defined(MOE_AVX512) || defined(MOE_AVX2)
template <Format format>
struct GroupSum<format, Products::kTwoBytes> {
  using V = VecI16;

  // Each adds two products of a byte up to kMost with one from -128 on.
  static constexpr int kFits = 32767 / (2 * 128 * Codes<format>::kMost);

  static MOE_INLINE void add(V& sum, VecU8 bytes, const int8_t* four) {
    const VecI32 row = VecI32{} + four_bytes(four);
#if defined(MOE_AVX512)
    sum += bit_cast<VecI16>(_mm512_maddubs_epi16(bit_cast<__m512i>(bytes), bit_cast<__m512i>(row)));
#else
    sum += bit_cast<VecI16>(_mm256_maddubs_epi16(bit_cast<__m256i>(bytes), bit_cast<__m256i>(row)));
#endif
  }

  static MOE_INLINE VecI32 total(V sum) {
#if defined(MOE_AVX512)
    return bit_cast<VecI32>(_mm512_madd_epi16(bit_cast<__m512i>(sum), _mm512_set1_epi16(1)));
#else
    return bit_cast<VecI32>(_mm256_madd_epi16(bit_cast<__m256i>(sum), _mm256_set1_epi16(1)));
#endif
  }
};
#endif

// The weighted sum of the planes' sums.
template <typename Group, bool wide>
MOE_INLINE Vec<float> join(const VecI32 (&sums)[Group::kPlanes]) {
  constexpr int planes = Group::kPlanes, bits = Group::kPlaneBits;
  const auto number = [](VecI32 v) { return __builtin_convertvector(v, Vec<float>); };
  if constexpr (planes == 1) {
    return number(sums[0]);
  } else if constexpr (!wide) {
    return number((sums[1] << bits) + sums[0]);
  } else if constexpr (planes == 2) {
    return fma(number(sums[1]), broadcast(float(1 << bits)), number(sums[0]));
  } else {
    return fma(number((sums[2] << bits) + sums[1]), broadcast(float(1 << bits)), number(sums[0]));
  }
}

// To the nearest integers, ties to even.
MOE_INLINE VecI32 rounded(Vec<float> v) {
#if defined(MOE_AVX512)
  return bit_cast<VecI32>(_mm512_cvtps_epi32(bit_cast<__m512>(v)));
#elif defined(MOE_AVX2)
  return bit_cast<VecI32>(_mm256_cvtps_epi32(bit_cast<__m256>(v)));
#elif defined(__SSE2__)
  return bit_cast<VecI32>(_mm_cvtps_epi32(bit_cast<__m128>(v)));
#else
  VecI32 integers;
  for (int i = 0; i < kLanes<float>; ++i) integers[i] = static_cast<int32_t>(std::lrint(v[i]));
  return integers;
#endif
}

template <Products products, bool wide>
void pack_group(RowGroup<products, wide>& group, const float* row, int64_t n, int32_t offset) {
  using Group = RowGroup<products, wide>;
  constexpr int L = kLanes<float>;
  float values[kGroupSize] = {};
  std::memcpy(values, row, n * sizeof(float));
  Vec<float> maxima{}, zeros{};
  for (int64_t k = 0; k < kGroupSize; k += L) {
    const Vec<float> v = load(values + k);
    maxima = max<float>(maxima, v < 0.0f ? -v : v);
    zeros += v * 0.0f;  // NaN for infinities too
  }
  float largest = 0;
  for (int i = 0; i < L; ++i) largest = maxima[i] > largest ? maxima[i] : largest;
  const float finite = sum_lanes<float>(zeros);
  // Of smaller ones the scale, or the inverse, would not be a normal number: they count as zeros.
  const bool some = largest > 1e-30f && finite == 0;
  const float inverse = some ? Group::kLargest / largest : 0;
  group.scale = some ? largest / Group::kLargest : finite;
  int32_t rest[kGroupSize] = {};
  for (int64_t k = 0; some && k < kGroupSize; k += L) {
    const VecI32 integers = rounded(load(values + k) * inverse);
    std::memcpy(rest + k, &integers, sizeof(integers));
  }
  for (int p = 0; p < Group::kPlanes; ++p) {
    constexpr int kUnused = 32 - Group::kPlaneBits;
    const bool last = p + 1 == Group::kPlanes;
    typename Group::Element plane[kGroupSize];
    int32_t sum = 0;
    for (int64_t k = 0; k < kGroupSize; ++k) {
      // The lowest bits as a signed number; what is left is a multiple of the next plane's unit.
      const int32_t low =
          last ? rest[k]
               : static_cast<int32_t>(static_cast<uint32_t>(rest[k]) << kUnused) >> kUnused;
      rest[k] = (rest[k] - low) >> Group::kPlaneBits;
      plane[k] = static_cast<typename Group::Element>(low);
      sum += low;
    }
    group.starts[p] = -offset * sum;
    if constexpr (sizeof(plane[0]) == 1) {
      std::memcpy(group.planes[p], plane, sizeof(plane));
    } else {
      for (int64_t k = 0; k < kGroupSize; ++k) {
        group.planes[p][(k & ~3) | (k & 1) << 1 | (k & 2) >> 1] = plane[k];
      }
    }
  }
}

}  // namespace moe::CPU_CAPABILITY
