// What the tests of the kernels of one level share: numbers, memory of exactly the size asked for,
// whose end a sanitizer sees, and comparisons.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "cpu/kernels.h"

namespace moe::test {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline std::mt19937 engine(7);

inline int64_t random_below(int64_t bound) { return engine() % bound; }

inline double widen(float value) { return value; }
inline double widen(double value) { return value; }

inline double widen(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

inline double widen(fp16 value) {
  const int exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  double size = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  if (exponent == 31) size = mantissa ? kNaN : std::numeric_limits<double>::infinity();
  return value.bits & 0x8000 ? -size : size;
}

// A normal number of magnitude 2^-10 to 4 that every type holds, on every machine the same.
template <typename T>
T random_number() {
  const int sign = static_cast<int>(random_below(2)), exponent = -static_cast<int>(random_below(9));
  const int mantissa = static_cast<int>(random_below(128));  // seven bits after the first
  if constexpr (std::is_same_v<T, bf16>) {
    return {static_cast<uint16_t>(sign << 15 | (exponent + 127) << 7 | mantissa)};
  } else if constexpr (std::is_same_v<T, fp16>) {
    return {static_cast<uint16_t>(sign << 15 | (exponent + 15) << 10 | mantissa << 3)};
  } else {
    return static_cast<T>(std::ldexp((sign ? -1.0 : 1.0) * (128 + mantissa), exponent - 7));
  }
}

template <typename T>
T nan_of() {
  if constexpr (std::is_same_v<T, bf16>) return {0x7fc0};
  if constexpr (std::is_same_v<T, fp16>) return {0x7e00};
  if constexpr (sizeof(T) > 2) return kNaN;
}

// Half a unit in the last place of 1.
template <typename T>
constexpr double kHalfUnit = std::is_same_v<T, bf16>    ? 0x1p-8
                             : std::is_same_v<T, fp16>  ? 0x1p-11
                             : std::is_same_v<T, float> ? 0x1p-24
                                                        : 0x1p-53;

// What a number may change by when it is rounded to T, if it is normal or not.
template <typename T>
double rounding(double value) {
  return kHalfUnit<T> * std::abs(value) + (std::is_same_v<T, fp16> ? 0x1p-25 : 0);
}

// Of a sum of products with magnitudes that add up to one.
template <typename T>
constexpr double kOfSums = std::is_same_v<T, double> ? 1e-14 : 2e-6;

template <typename T>
std::vector<T> random_numbers(int64_t count) {
  std::vector<T> values(count);
  for (T& value : values) value = random_number<T>();
  values.shrink_to_fit();
  return values;
}

// Rows that are all of their own memory.
template <typename T>
struct Rows {
  std::vector<std::unique_ptr<T[]>> rows;
  std::vector<const T*> pointers;

  Rows(int64_t count, int64_t n) {
    for (int64_t i = 0; i < count; ++i) {
      rows.push_back(std::make_unique<T[]>(n));
      for (int64_t c = 0; c < n; ++c) rows.back()[c] = random_number<T>();
      pointers.push_back(rows.back().get());
    }
  }

  double at(int64_t i, int64_t c) const { return widen(rows[i][c]); }
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};

inline std::unique_ptr<void, Free> aligned(int64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, bytes) != 0) std::abort();
  return std::unique_ptr<void, Free>(memory);
}

// Bits of NaN: whatever a kernel does not write itself shows in it.
inline void poison(void* memory, int64_t bytes) { std::memset(memory, 0xff, bytes); }

inline void poison_scratch() {
  constexpr int64_t kBytes = 1 << 20;
  poison(thread_scratch(Scratch::kKernel, kBytes), kBytes);
}

inline int64_t checked = 0;

inline void expect(double found, double wanted, double allowed, const char* what, int64_t a,
                   int64_t b, int64_t c) {
  ++checked;
  if (std::abs(found - wanted) <= allowed || found == wanted) return;
  if (std::isnan(found) && std::isnan(wanted)) return;
  std::printf("%s (%ld, %ld, %ld): %.9g, not %.9g\n", what, static_cast<long>(a),
              static_cast<long>(b), static_cast<long>(c), found, wanted);
  std::exit(1);
}

// tests/native/level_products.cpp and level_functions.cpp
void check_products();
void check_functions();

}  // namespace moe::test
