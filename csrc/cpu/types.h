// Element types of the CPU kernels. Plain C++: included where intrinsics of any level are compiled.
#pragma once

#include <cstdint>
#include <type_traits>

namespace moe {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

// What products of T are summed in.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Rows that are packed and multiplied together: most often at most so many, and ever.
constexpr int64_t kRowsPerBlock = 192, kMostRows = 384;

enum class Activation { kSwiglu, kGeglu, kReglu, kSwigluOai, kRelu2, kSilu, kGelu };

constexpr bool is_gated(Activation kind) { return kind <= Activation::kSwigluOai; }

struct ActivationOptions {
  Activation kind;
  double alpha;
  double limit;  // infinite for no clamp

  bool gated() const { return is_gated(kind); }
};

}  // namespace moe
