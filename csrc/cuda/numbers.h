// Elements of rows, and what they are added in.
#pragma once

#include "cuda/lane.h"

namespace moe::ep::device {

struct Bf16 {
  using Bits = uint16_t;
  using Sum = float;

  static MOE_DEVICE Sum widen(Bits bits) {
    return bits_to<float>(static_cast<uint32_t>(bits) << 16);
  }
  // To the nearest, ties to even.
  static MOE_DEVICE Bits narrow(Sum value) {
    const auto bits = bits_to<uint32_t>(value);
    if (value != value) return static_cast<Bits>((bits >> 16) | 0x40);
    return static_cast<Bits>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};

struct Fp16 {
  using Bits = uint16_t;
  using Sum = float;

#if defined(__CUDACC__)
  static MOE_DEVICE Sum widen(Bits bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  }
  static MOE_DEVICE Bits narrow(Sum value) {
    Bits bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
  }
#else
  static Sum widen(Bits bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, rest = bits & 0x7fff;
    if (rest >= 0x7c00) return bits_to<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest >= 0x400) return bits_to<float>(sign | ((rest << 13) + 0x38000000));
    const float small = static_cast<float>(rest) * 0x1p-24f;
    return sign ? -small : small;
  }
  static Bits narrow(Sum value) {
    const auto all = bits_to<uint32_t>(value);
    const uint32_t sign = all >> 16 & 0x8000, bits = all & 0x7fffffff;
    if (bits > 0x7f800000) return static_cast<Bits>(sign | 0x7e00);
    if (bits >= 0x477ff000) return static_cast<Bits>(sign | 0x7c00);  // 65520 and above
    if (bits < 0x38800000) {                                          // below 2^-14
      // The sum's last bit is worth 2^-24, that of the smallest numbers.
      const auto sum = bits_to<uint32_t>(bits_to<float>(bits) + 0.5f);
      return static_cast<Bits>(sign | (sum - 0x3f000000));
    }
    return static_cast<Bits>(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13));
  }
#endif
};

struct Fp32 {
  using Bits = uint32_t;
  using Sum = float;

  static MOE_DEVICE Sum widen(Bits bits) { return bits_to<float>(bits); }
  static MOE_DEVICE Bits narrow(Sum value) { return bits_to<Bits>(value); }
};

struct Fp64 {
  using Bits = unsigned long long;
  using Sum = double;

  static MOE_DEVICE Sum widen(Bits bits) { return bits_to<double>(bits); }
  static MOE_DEVICE Bits narrow(Sum value) { return bits_to<Bits>(value); }
};

}  // namespace moe::ep::device
