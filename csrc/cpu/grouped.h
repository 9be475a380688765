// Groups of rows and the matrices of their experts.
//
// R rows, E experts, Kd contracted size, N columns.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "common/dtypes.h"
#include "cpu/division.h"
#include "cpu/kernel_table.h"
#include "cpu/local_array.h"

namespace moe {

// One matrix for each expert: [E, Kd, N], with the strides it came with if it can be multiplied so.
class Weights {
 public:
  explicit Weights(const at::Tensor& weights) : weights_(weights) {
    k_contiguous_ = weights.size(1) <= 1 || weights.stride(1) == 1;
    const bool n_contiguous = weights.size(2) <= 1 || weights.stride(2) == 1;
    if (n_contiguous && (weights.size(1) <= 1 || weights.stride(2) == 1)) k_contiguous_ = false;
    if (!k_contiguous_ && !n_contiguous) weights_ = weights.contiguous();
  }

  int64_t experts() const { return weights_.size(0); }
  int64_t inner() const { return weights_.size(1); }
  int64_t columns() const { return weights_.size(2); }
  bool k_contiguous() const { return k_contiguous_; }

  template <typename T>
  MatrixOf<T> of(int64_t expert) const {
    return {data<T>(weights_) + expert * weights_.stride(0), weights_.stride(1), weights_.stride(2),
            k_contiguous_};
  }

 private:
  at::Tensor weights_;
  bool k_contiguous_;
};

// So many of `all` columns of b are multiplied with a block of rows before their sums are used.
template <typename T>
int64_t columns_together(const Weights& b, int64_t rows, int64_t all) {
  constexpr int64_t kFewRows = 32;
  if (!b.k_contiguous() || rows <= kFewRows) return all;
  return std::min(kernels<GemmKernels<T>>().columns_together, all);
}

// From a row of n sums to the next one: rows of a power of two would share the lines of a cache.
inline int64_t sums_stride(int64_t n) { return round_up(n, kOutputColumns) + kOutputColumns; }

// Packed rows of the blocks that a thread works on: packed anew when it comes to another block.
template <typename T>
class PackedRows {
 public:
  PackedRows(bool k_contiguous, int64_t k)
      : k_contiguous_(k_contiguous), k_(k), last_(at::get_num_threads()) {
    std::fill(last_.begin(), last_.end(), -1);
  }

  // row(i) is where row i of the block lies.
  template <typename Row>
  const void* get(int thread, int64_t block, int64_t count, Row row) {
    const auto& functions = kernels<GemmKernels<T>>();
    void* packed = thread_scratch(Scratch::kRows, functions.packed_size(k_contiguous_, count, k_));
    if (std::exchange(last_[thread], block) != block) {
      const T* rows[kMostRows];
      for (int64_t i = 0; i < count; ++i) rows[i] = row(i);
      functions.pack(k_contiguous_, packed, rows, count, k_, Range{0, k_});
    }
    return packed;
  }

 private:
  bool k_contiguous_;
  int64_t k_;
  LocalArray<int64_t> last_;
};

// out[e] = (or +=, if accumulate) a[rows of e]^T grad[rows of e], for rows given by pointers to
// their first elements. out is [E, Kd, N] in T or in acc_t<T>, with unit stride in one of the last
// two dimensions.
template <typename T>
void weight_grad(const at::Tensor& out, bool accumulate, const std::vector<const T*>& a,
                 const std::vector<const T*>& grad, const int32_t* offsets);

// The sum of each expert's rows: [E, N] in T, where scales (if not null) weigh the rows.
template <typename T>
void bias_grad(const at::Tensor& out, const std::vector<const T*>& rows, const acc_t<T>* scales,
               const int32_t* offsets);

// An uninitialised gradient of a weight: stored as the weight is, which lets autograd take it over.
at::Tensor empty_weight_grad(int64_t experts, int64_t inner, int64_t columns, bool transposed,
                             const at::TensorOptions& options);

}  // namespace moe
