// Products of bf16 at the level AMX against sums in double, over sizes that fill no tile and memory
// that ends where it must not be read further, which a sanitizer sees. Compiled with the emulation
// of the instructions it runs on any processor with AVX-512 BF16, without it on one with AMX.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "cpu/amx.h"
#include "cpu/kernels.h"

namespace moe {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::mt19937 engine(7);

float widen(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

bf16 random_bf16() {
  const float value = std::normal_distribution<float>()(engine);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return {static_cast<uint16_t>(bits >> 16)};
}

// Rows that are all of their own memory.
struct Rows {
  std::vector<std::unique_ptr<bf16[]>> rows;
  std::vector<const bf16*> pointers;

  Rows(int64_t count, int64_t n) {
    for (int64_t i = 0; i < count; ++i) {
      rows.push_back(std::make_unique<bf16[]>(n));
      for (int64_t c = 0; c < n; ++c) rows.back()[c] = random_bf16();
      pointers.push_back(rows.back().get());
    }
  }

  double at(int64_t i, int64_t c) const { return widen(rows[i][c]); }
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};

std::unique_ptr<void, Free> aligned(int64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, bytes) != 0) std::abort();
  return std::unique_ptr<void, Free>(memory);
}

// Bits of NaN: whatever a product does not write itself shows in it.
void poison(void* memory, int64_t bytes) { std::memset(memory, 0xff, bytes); }

void poison_scratch() {
  constexpr int64_t kBytes = 1 << 20;
  poison(thread_scratch(Scratch::kKernel, kBytes), kBytes);
}

int64_t checked = 0;

void expect(float found, double sum, double magnitudes, double rounding, const char* what,
            int64_t m, int64_t k, int64_t n) {
  ++checked;
  const double allowed = 2e-6 * magnitudes + rounding * std::abs(sum);
  if (std::abs(found - sum) <= allowed) return;
  std::printf("%s of %ld rows, %ld, %ld columns: %g, not %g\n", what, m, k, n, found, sum);
  std::exit(1);
}

void check_multiply(const GemmKernels<bf16>& gemm, int64_t m, int64_t k, int64_t n,
                    bool k_contiguous) {
  const Rows a(m, k);
  // Lines of the matrix with one element more, of which the last line has none.
  const int64_t lines = k_contiguous ? n : k, length = k_contiguous ? k : n, stride = length + 1;
  const int64_t first = 2;  // columns before those that are wanted
  const int64_t size = k_contiguous ? (first + n) * stride - 1 : k * (n + first + 1) - 1;
  const int64_t between = k_contiguous ? stride : n + first + 1;
  std::vector<bf16> b(std::max<int64_t>(size, 1), bf16{0x7fc0});
  const auto element = [&](int64_t i, int64_t c) -> bf16& {
    return k_contiguous ? b[(first + c) * between + i] : b[i * between + first + c];
  };
  for (int64_t line = 0; line < lines; ++line) {
    for (int64_t i = 0; i < length; ++i) {
      (k_contiguous ? element(i, line) : element(line, i)) = random_bf16();
    }
  }
  const MatrixOf<bf16> matrix{b.data(), k_contiguous ? 1 : between, k_contiguous ? between : 1,
                              k_contiguous};
  const int64_t bytes = gemm.packed_size(k_contiguous, m, k);
  const auto packed = aligned(bytes);
  poison(packed.get(), bytes);
  poison_scratch();
  const int64_t middle = k / 3 / 2 * 2;
  std::vector<const bf16*> rest;
  for (const bf16* row : a.pointers) rest.push_back(row + middle);
  gemm.pack(k_contiguous, packed.get(), rest.data(), m, k, Range{middle, k});
  gemm.pack(k_contiguous, packed.get(), a.pointers.data(), m, k, Range{0, middle});
  const int64_t out_stride = (n + 15) / 16 * 16 + 16;
  std::vector<float> out(m * out_stride - 16, kNaN);
  gemm.multiply(packed.get(), m, k, matrix, Range{first, first + n}, out.data(), out_stride);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t c = 0; c < n; ++c) {
      double sum = 0, magnitudes = 0;
      for (int64_t l = 0; l < k; ++l) {
        const double product = a.at(i, l) * widen(element(l, c));
        sum += product;
        magnitudes += std::abs(product);
      }
      expect(out[i * out_stride + c], sum, magnitudes, 0, k_contiguous ? "[n, k]" : "[k, n]", m, k,
             n);
    }
    for (int64_t c = out_stride - 16; i + 1 < m && c < out_stride; ++c) {
      if (!std::isnan(out[i * out_stride + c])) expect(0, 1, 0, 0, "past the columns", m, k, n);
    }
  }
}

enum class To { kWide, kSums, kNarrow, kStreamed };

void check_weight_grad(const WeightGradKernels<bf16>& kernels, int64_t m, int64_t i_count,
                       int64_t j_count, To to) {
  constexpr int64_t kFirst = 3;
  const Rows a(m, kFirst + i_count), b(m, kFirst + j_count);
  const int64_t stride = to == To::kStreamed ? (j_count + 15) / 16 * 16 : j_count + 1;
  const bool narrow = to == To::kNarrow || to == To::kStreamed;
  const auto memory = aligned(i_count * stride * (narrow ? 2 : 4));
  auto* wide = static_cast<float*>(memory.get());
  auto* half = static_cast<bf16*>(memory.get());
  for (int64_t i = 0; i < i_count * stride; ++i) {
    narrow ? void(half[i] = {0x7fc0}) : void(wide[i] = to == To::kSums ? 0.5f : kNaN);
  }
  poison_scratch();
  kernels.weight_grad(
      a.pointers.data(), b.pointers.data(), m, Range{kFirst, kFirst + i_count},
      Range{kFirst, kFirst + j_count},
      OutputOf<bf16>{narrow ? half : nullptr, wide, stride, to == To::kSums, to == To::kStreamed});
  for (int64_t i = 0; i < i_count; ++i) {
    for (int64_t j = 0; j < j_count; ++j) {
      double sum = to == To::kSums ? 0.5 : 0, magnitudes = sum;
      for (int64_t l = 0; l < m; ++l) {
        const double product = a.at(l, kFirst + i) * b.at(l, kFirst + j);
        sum += product;
        magnitudes += std::abs(product);
      }
      const float found = narrow ? widen(half[i * stride + j]) : wide[i * stride + j];
      expect(found, sum, magnitudes, narrow ? 0x1p-8 : 0, "the gradient", m, i_count, j_count);
    }
  }
}

int run() {
  if (!amx_permitted()) {
    std::puts("this processor has no AMX; compile with -DMOE_AMX_EMULATED");
    return 2;
  }
  GemmKernels<bf16> gemm;
  WeightGradKernels<bf16> weight_grad;
  AMX::fill(gemm);
  AMX::fill(weight_grad);
  for (int64_t m : {1, 8, 9, 16, 17, 25, 32, 33, 48, 97}) {
    for (int64_t k : {0, 1, 2, 31, 32, 33, 95, 257}) {
      for (int64_t n : {1, 15, 16, 17, 32, 33, 65, 96}) {
        if (m * k * n > 500'000) continue;
        for (bool k_contiguous : {false, true}) check_multiply(gemm, m, k, n, k_contiguous);
      }
    }
  }
  for (bool k_contiguous : {false, true}) check_multiply(gemm, 192, 1056, 33, k_contiguous);
  check_multiply(gemm, 40, 70, 900, false);
  check_multiply(gemm, 40, 2500, 70, true);
  for (To to : {To::kWide, To::kSums, To::kNarrow, To::kStreamed}) {
    for (int64_t m : {1, 2, 31, 32, 33, 100}) {
      for (int64_t i_count : {1, 16, 31, 33, 64}) {
        for (int64_t j_count : {1, 17, 32, 63, 64, 65, 150}) {
          if (m * i_count * j_count > 200'000) continue;
          check_weight_grad(weight_grad, m, i_count, j_count, to);
        }
      }
    }
    check_weight_grad(weight_grad, 512, 33, 70, to);
    check_weight_grad(weight_grad, 1100, 49, 33, to);
  }
  std::printf("%ld sums are right (AMX %s)\n", checked, amx_emulated() ? "emulated" : "itself");
  return 0;
}

}  // namespace
}  // namespace moe

int main() { return moe::run(); }
