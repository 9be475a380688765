// float8_e4m3fn: sign, 4 bits of exponent (bias 7), 3 of mantissa; exponent 0 is subnormal, the
// largest magnitude 448, and all ones NaN. There are no infinities.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Float8_e4m3fn.h>

#include <array>
#include <cstring>

#include "common/dtypes.h"

namespace moe {

using float8 = c10::Float8_e4m3fn;

// Every value as the bits of a type that holds it exactly.
template <typename T>
std::array<T, 256> float8_table() {
  std::array<T, 256> table;
  for (int code = 0; code < 256; ++code) {
    const float value = float8(static_cast<uint8_t>(code), float8::from_bits());
    if constexpr (std::is_same_v<T, bf16>) {
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      table[code] = {static_cast<uint16_t>(bits >> 16)};
    } else {
      table[code] = value;
    }
  }
  return table;
}

// [outer, inner] values of unit stride along inner; out likewise, dense.
template <typename T>
void widen_float8(T* out, const uint8_t* values, int64_t outer, int64_t inner, int64_t stride) {
  static const std::array<T, 256> table = float8_table<T>();
  for (int64_t i = 0; i < outer; ++i) {
    for (int64_t j = 0; j < inner; ++j) out[i * inner + j] = table[values[i * stride + j]];
  }
}

struct Quantized {
  at::Tensor values, scales;
};

Quantized quantize_rows(const at::Tensor& x_RK, int64_t block, bool power_of_two);
Quantized quantize_weights(const at::Tensor& w_EKN, int64_t block, bool power_of_two,
                           bool transposed);

}  // namespace moe
