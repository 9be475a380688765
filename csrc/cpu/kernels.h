// What is compiled once per instruction set, as tables of functions, and how a table is chosen.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace moe {

// Rows of the gate and the up half, or of the one half there is: element i is at gate[i * step] and
// up[i * step], with step 2 and up = gate + 1 where the halves are interleaved.
template <typename T>
struct HalvesOf {
  T* gate;
  T* up;  // unused without a gate
  bool interleaved;
};

// Functions over rows of T with sums in acc_t<T>.
template <typename T>
struct RowKernels {
  using A = acc_t<T>;

  // out[i] = sum over r, in order, of weights[r] * rows[r][i]; ones without weights.
  void (*weighted_sum)(T* out, const T* const* rows, const A* weights, int64_t count, int64_t n);
  // The same over rows of sums.
  void (*weighted_sum_wide)(T* out, const A* const* rows, const A* weights, int64_t count,
                            int64_t n);
  A (*dot)(const T* a, const T* b, int64_t n);
  void (*scale)(T* out, const T* in, A factor, int64_t n);
  // sums[i] += factor * row[i]
  void (*add_scaled)(A* sums, const T* row, A factor, int64_t n);
  void (*widen)(A* out, const T* in, int64_t n);
  void (*narrow)(T* out, const A* in, int64_t n);

  // out = activation(h) * weight, over n elements of I.
  void (*activation)(const ActivationOptions& options, T* out, HalvesOf<const T> h, A weight,
                     int64_t n);
  void (*activation_wide)(const ActivationOptions& options, T* out, HalvesOf<const A> h, A weight,
                          int64_t n);
  // Writes grad_h = weight * grad * activation'(h), and weight * activation(h) to scaled unless it
  // is null. Returns <grad, activation(h)>.
  A (*activation_backward)(const ActivationOptions& options, const T* grad, HalvesOf<const T> h,
                           A weight, HalvesOf<T> grad_h, T* scaled, int64_t n);
  A (*activation_backward_wide)(const ActivationOptions& options, const A* grad,
                                HalvesOf<const T> h, A weight, HalvesOf<T> grad_h, T* scaled,
                                int64_t n);
};

enum class ScoreFunc { kSoftmax, kSigmoid, kSqrtSoftplus };

// Functions over the scores of one token, in A = float or double.
template <typename A>
struct ScoreKernels {
  // out = softmax, sigmoid or sqrt(softplus) of in; they may be the same.
  void (*scores)(ScoreFunc func, A* out, const A* in, int64_t n);
  // grad_logits += the gradient through it.
  void (*scores_backward)(ScoreFunc func, A* grad_logits, const A* grad, const A* scores,
                          const A* logits, int64_t n);
};

struct KernelTable {
  RowKernels<bf16> rows_bf16;
  RowKernels<fp16> rows_fp16;
  RowKernels<float> rows_float;
  RowKernels<double> rows_double;
  ScoreKernels<float> scores_float;
  ScoreKernels<double> scores_double;
};

// The table of the instruction set in use.
const KernelTable& kernel_table();

template <typename T>
const RowKernels<T>& row_kernels() {
  const KernelTable& table = kernel_table();
  if constexpr (std::is_same_v<T, bf16>) return table.rows_bf16;
  if constexpr (std::is_same_v<T, fp16>) return table.rows_fp16;
  if constexpr (std::is_same_v<T, float>) return table.rows_float;
  if constexpr (std::is_same_v<T, double>) return table.rows_double;
}

template <typename A>
const ScoreKernels<A>& score_kernels() {
  if constexpr (std::is_same_v<A, float>) return kernel_table().scores_float;
  if constexpr (std::is_same_v<A, double>) return kernel_table().scores_double;
}

// One entry for each file of CPU_SIMD_SOURCES, in the namespace of its instruction set.
#define MOE_DECLARE_KERNELS(CAPABILITY)          \
  namespace CAPABILITY {                         \
  template <typename T>                          \
  void fill_rows(RowKernels<T>& kernels);        \
  template <typename T>                          \
  void fill_activations(RowKernels<T>& kernels); \
  template <typename A>                          \
  void fill_scores(ScoreKernels<A>& kernels);    \
  }

MOE_DECLARE_KERNELS(DEFAULT)
#if defined(__x86_64__)
MOE_DECLARE_KERNELS(AVX2)
MOE_DECLARE_KERNELS(AVX512)
MOE_DECLARE_KERNELS(AVX512_BF16)
#endif

}  // namespace moe
