// Products of the level that CPU_CAPABILITY names against sums in double, over sizes that fill no
// tile and memory that ends where it must not be read further, which a sanitizer sees. The level
// AMX runs on any processor with AVX-512 BF16 where it is compiled with the emulation of its
// instructions.
#include <algorithm>

#include "cpu/amx.h"
#include "tests/native/level_kernels.h"

namespace moe::test {
namespace {

// apart: from one column to the next, if k_contiguous and not 0.
template <typename T>
void check_multiply(const GemmKernels<T>& gemm, int64_t m, int64_t k, int64_t n, bool k_contiguous,
                    int64_t apart = 0) {
  const Rows<T> a(m, k);
  // Lines of the matrix with one element more, of which the last line has none.
  const int64_t lines = k_contiguous ? n : k, length = k_contiguous ? k : n;
  const int64_t stride = apart ? apart : length + 1;
  const int64_t first = 2;  // columns before those that are wanted
  const int64_t size = k_contiguous ? (first + n - 1) * stride + k : k * (n + first + 1) - 1;
  const int64_t between = k_contiguous ? stride : n + first + 1;
  std::vector<T> b(std::max<int64_t>(size, 1), nan_of<T>());
  const auto element = [&](int64_t i, int64_t c) -> T& {
    return k_contiguous ? b[(first + c) * between + i] : b[i * between + first + c];
  };
  for (int64_t line = 0; line < lines; ++line) {
    for (int64_t i = 0; i < length; ++i) {
      (k_contiguous ? element(i, line) : element(line, i)) = random_number<T>();
    }
  }
  const MatrixOf<T> matrix{b.data(), k_contiguous ? 1 : between, k_contiguous ? between : 1,
                           k_contiguous};
  const int64_t bytes = gemm.packed_size(k_contiguous, m, k);
  const auto packed = aligned(bytes);
  poison(packed.get(), bytes);
  poison_scratch();
  const int64_t middle = k / 3 / kPackedTogether * kPackedTogether;
  std::vector<const T*> rest;
  for (const T* row : a.pointers) rest.push_back(row + middle);
  gemm.pack(k_contiguous, packed.get(), rest.data(), m, k, Range{middle, k});
  gemm.pack(k_contiguous, packed.get(), a.pointers.data(), m, k, Range{0, middle});
  const int64_t out_stride = (n + 15) / 16 * 16 + 16;
  std::vector<acc_t<T>> out(m * out_stride - 16, kNaN);
  gemm.multiply(packed.get(), m, k, matrix, Range{first, first + n}, out.data(), out_stride,
                k % 2 == 0, k % 3 == 0 ? b.data() : nullptr);
  // The same bits wherever threads divide the columns.
  const int64_t some = n / 3;
  std::vector<acc_t<T>> part(m * out_stride - 16, kNaN);
  gemm.multiply(packed.get(), m, k, matrix, Range{first + some, first + n}, part.data(), out_stride,
                false, nullptr);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t c = some; c < n; ++c) {
      expect(part[i * out_stride + c - some], out[i * out_stride + c], 0, "a part", m, k, n);
    }
  }
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t c = 0; c < n; ++c) {
      double sum = 0, magnitudes = 0;
      for (int64_t l = 0; l < k; ++l) {
        const double product = a.at(i, l) * widen(element(l, c));
        sum += product;
        magnitudes += std::abs(product);
      }
      expect(out[i * out_stride + c], sum, kOfSums<T> * magnitudes,
             k_contiguous ? "[n, k]" : "[k, n]", m, k, n);
    }
    for (int64_t c = out_stride - 16; i + 1 < m && c < out_stride; ++c) {
      expect(out[i * out_stride + c], kNaN, 0, "past the columns", m, k, n);
    }
  }
}

enum class To { kWide, kSums, kNarrow, kStreamed };

template <typename T>
void check_weight_grad(const WeightGradKernels<T>& kernels, int64_t m, int64_t i_count,
                       int64_t j_count, To to) {
  constexpr int64_t kFirst = 3;
  const Rows<T> a(m, kFirst + i_count), b(m, kFirst + j_count);
  // Aligned to whole vectors of T, and for odd m not to more.
  const int64_t multiple = m % 2 ? 8 : 16;
  const int64_t stride =
      to == To::kStreamed ? (j_count + multiple - 1) / multiple * multiple : j_count + 1;
  const bool narrow = to == To::kNarrow || to == To::kStreamed;
  const auto memory = aligned(i_count * stride * (narrow ? sizeof(T) : sizeof(acc_t<T>)));
  auto* wide = static_cast<acc_t<T>*>(memory.get());
  auto* half = static_cast<T*>(memory.get());
  for (int64_t i = 0; i < i_count * stride; ++i) {
    narrow ? void(half[i] = nan_of<T>()) : void(wide[i] = to == To::kSums ? 0.5f : kNaN);
  }
  poison_scratch();
  kernels.weight_grad(
      a.pointers.data(), b.pointers.data(), m, Range{kFirst, kFirst + i_count},
      Range{kFirst, kFirst + j_count},
      OutputOf<T>{narrow ? half : nullptr, wide, stride, to == To::kSums, to == To::kStreamed});
  for (int64_t i = 0; i < i_count; ++i) {
    for (int64_t j = 0; j < j_count; ++j) {
      double sum = to == To::kSums ? 0.5 : 0, magnitudes = sum;
      for (int64_t l = 0; l < m; ++l) {
        const double product = a.at(l, kFirst + i) * b.at(l, kFirst + j);
        sum += product;
        magnitudes += std::abs(product);
      }
      const double found = narrow ? widen(half[i * stride + j]) : wide[i * stride + j];
      expect(found, sum, kOfSums<T> * magnitudes + (narrow ? rounding<T>(sum) : 0), "the gradient",
             m, i_count, j_count);
    }
  }
}

template <typename T>
void check_products_of() {
  GemmKernels<T> gemm;
  WeightGradKernels<T> weight_grad;
  CPU_CAPABILITY::fill(gemm);
  CPU_CAPABILITY::fill(weight_grad);
  for (int64_t m : {1, 2, 8, 9, 16, 18, 25, 32, 33, 48, 97}) {
    for (int64_t k : {0, 1, 2, 31, 32, 33, 95, 257}) {
      for (int64_t n : {1, 15, 16, 17, 32, 33, 67, 96}) {
        if (m * k * n > 500'000) continue;
        for (bool k_contiguous : {false, true}) check_multiply(gemm, m, k, n, k_contiguous);
      }
    }
  }
  for (bool k_contiguous : {false, true}) {
    check_multiply(gemm, 192, 1056, 33, k_contiguous);
    check_multiply(gemm, kMostRows, 520, 33, k_contiguous);
    for (int64_t m : {3, 4, 5, 7, 11, 104}) {
      for (int64_t k : {97, 2081}) check_multiply(gemm, m, k, 35, k_contiguous);
    }
  }
  // More columns than meet a few rows at a time.
  for (int64_t m : {1, 7}) check_multiply(gemm, m, 20, 2100, false);
  if constexpr (std::is_same_v<T, bf16>) {
    // More packed rows than a cache holds, and more columns than their sums.
    check_multiply(gemm, 190, 3301, 530, true);
    check_multiply(gemm, kMostRows, 1700, 40, true);
    check_multiply(gemm, kMostRows + 1, 99, 40, true);
    // Columns whose lines fall on each other in a cache.
    for (int64_t k : {33, 600, 2048}) check_multiply(gemm, 97, k, 67, true, 2048);
    check_multiply(gemm, 20, 4100, 40, true, 6144);
    check_multiply(gemm, 380, 2100, 40, true, 4096);
    // All columns with 256, 128 and 64 of k, and some of them.
    for (int64_t n : {801, 1700, 3000, 3300}) check_multiply(gemm, 60, 300, n, false);
    check_multiply(gemm, 170, 300, 801, false);
  }
  check_multiply(gemm, 40, 70, 900, false);
  check_multiply(gemm, 40, 2500, 70, true);
  for (To to : {To::kWide, To::kSums, To::kNarrow, To::kStreamed}) {
    for (int64_t m : {1, 2, 5, 6, 7, 12, 13, 20, 21, 31, 32, 33, 100}) {
      for (int64_t i_count : {1, 16, 31, 33, 64}) {
        for (int64_t j_count : {1, 17, 32, 63, 64, 65, 150}) {
          if (m * i_count * j_count > 200'000) continue;
          check_weight_grad(weight_grad, m, i_count, j_count, to);
        }
      }
    }
    check_weight_grad(weight_grad, 512, 33, 70, to);
    check_weight_grad(weight_grad, 1100, 49, 33, to);
    // More than is packed at a time.
    check_weight_grad(weight_grad, 3, 1540, 2060, to);
    check_weight_grad(weight_grad, 257, 770, 9, to);
    check_weight_grad(weight_grad, 257, 9, 1030, to);
  }
  for (int64_t bytes : {0, 1, 63, 64, 65, 200}) {
    for (int64_t first : {0, 1, 63}) {
      const auto memory = aligned(first + bytes);
      poison(memory.get(), first + bytes);
      weight_grad.stream_zeros(static_cast<char*>(memory.get()) + first, bytes);
      for (int64_t i = 0; i < first + bytes; ++i) {
        const double found = static_cast<unsigned char*>(memory.get())[i];
        expect(found, i < first ? 0xff : 0, 0, "zeros", first, bytes, i);
      }
    }
  }
}

}  // namespace

void check_products() {
  check_products_of<bf16>();
#if !defined(CPU_CAPABILITY_AMX)
  check_products_of<fp16>();
  check_products_of<float>();
  check_products_of<double>();
#endif
}

}  // namespace moe::test

int main() {
#if defined(CPU_CAPABILITY_AMX)
  if (!moe::amx_permitted()) {
    std::puts("this processor has no AMX; compile with -DMOE_AMX_EMULATED");
    return 2;
  }
  moe::test::check_products();
  std::printf("AMX %s: ", moe::amx_emulated() ? "emulated" : "itself");
#else
  moe::test::check_products();
  moe::test::check_functions();
#endif
  std::printf("%ld results are right\n", static_cast<long>(moe::test::checked));
}
