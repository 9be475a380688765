// One expert of a layer with the AVX2 kernels, for counting their instructions: forward on a few
// rows, and the products of backward. It checks nothing; tests/kernels does.
//
//     expert_instructions <dtype> <layout> <rows>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace moe {
namespace {

constexpr int64_t kHidden = 256, kInner = 192;

template <typename T>
T from_float(float value) {
  if constexpr (std::is_same_v<T, bf16>) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return {static_cast<uint16_t>(bits >> 16)};
  } else {
    return value;
  }
}

template <typename T>
std::vector<T> numbers(int64_t count) {
  std::vector<T> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = from_float<T>(float(i % 251 - 125) / 125);
  return values;
}

template <typename T>
std::vector<const T*> rows_of(const std::vector<T>& values, int64_t rows, int64_t stride) {
  std::vector<const T*> pointers;
  for (int64_t i = 0; i < rows; ++i) pointers.push_back(values.data() + i * stride);
  return pointers;
}

template <typename T>
struct Expert {
  GemmKernels<T> gemm;
  RowKernels<T> row;
  ActivationKernels<T> activation;
  WeightGradKernels<T> wgrad;
  bool k_contiguous;
  int64_t rows;
  std::vector<T> x, gate_up, down;
  std::vector<acc_t<T>> wide;
  std::vector<T> a, y, grad;
  std::vector<char> packed;

  Expert(bool columns, int64_t count) : k_contiguous(columns), rows(count) {
    AVX2::fill(gemm);
    AVX2::fill(row);
    AVX2::fill(activation);
    AVX2::fill(wgrad);
    x = numbers<T>(rows * kHidden);
    gate_up = numbers<T>(kHidden * 2 * kInner);
    down = numbers<T>(kInner * kHidden);
    wide.resize(rows * 2 * kInner);
    a = numbers<T>(rows * kInner);
    y = numbers<T>(rows * kHidden);
    grad.resize(kInner * kHidden);
    packed.resize(gemm.packed_size(k_contiguous, rows, kHidden) + 64);
  }

  void* aligned() {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(packed.data()) + 63) / 64 * 64);
  }

  void multiply(const std::vector<T>& input, const std::vector<T>& weight, int64_t k, int64_t n) {
    const auto from = rows_of(input, rows, k);
    gemm.pack(k_contiguous, aligned(), from.data(), rows, k, {0, k});
    const MatrixOf<T> matrix{weight.data(), k_contiguous ? 1 : n, k_contiguous ? k : 1,
                             k_contiguous};
    gemm.multiply(aligned(), rows, k, matrix, {0, n}, wide.data(), n, false, nullptr);
  }

  void run() {
    multiply(x, gate_up, kHidden, 2 * kInner);
    const ActivationOptions options{Activation::kSwiglu, 0, 0};
    for (int64_t i = 0; i < rows; ++i) {
      const acc_t<T>* h = wide.data() + i * 2 * kInner;
      activation.activation_wide(options, a.data() + i * kInner, {h, h + kInner, false}, 1, kInner);
    }
    multiply(a, down, kInner, kHidden);
    for (int64_t i = 0; i < rows; ++i) {
      row.narrow(y.data() + i * kHidden, wide.data() + i * kHidden, kHidden);
    }
    const auto first = rows_of(a, rows, kInner), second = rows_of(y, rows, kHidden);
    wgrad.weight_grad(first.data(), second.data(), rows, {0, kInner}, {0, kHidden},
                      {grad.data(), nullptr, kHidden, false});
  }
};

}  // namespace

// What callgrind counts.
template <typename T>
__attribute__((noinline)) void counted(Expert<T>& expert) {
  expert.run();
}

template <typename T>
void count(bool k_contiguous, int64_t rows) {
  Expert<T> expert(k_contiguous, rows);
  expert.run();  // the memory that kernels keep is there from now on
  counted(expert);
}

}  // namespace moe

int main(int count, char** arguments) {
  if (count != 4) return 2;
  const bool columns = std::string(arguments[2]) == "columns";
  const int64_t rows = std::atoi(arguments[3]);
  if (std::string(arguments[1]) == "bf16") {
    moe::count<moe::bf16>(columns, rows);
  } else {
    moe::count<float>(columns, rows);
  }
}
