// The last step of both directions of fused_experts: rows times matrices, summed by token.
//
// A unit of work is a block of columns of y over all tokens: it multiplies every row with those
// columns of its expert's matrix and sums what it got. So no thread waits for another, every matrix
// is read once whatever the routing, and only a few columns of the products exist at a time.
#include <ATen/ops/empty.h>

#include "common/parallel.h"
#include "cpu/fused_experts.h"
#include "cpu/large_pages.h"

namespace moe {

template <typename T>
PackedBlocks<T>::PackedBlocks(const std::vector<RowBlock>& blocks, bool k_contiguous, int64_t k)
    : blocks_(blocks), k_contiguous_(k_contiguous), k_(k) {
  constexpr int64_t kLine = 64;
  int64_t size = 0;
  for (const RowBlock& block : blocks) {
    begins_.push_back(size);
    size += round_up(kernels<GemmKernels<T>>().packed_size(k_contiguous, block.count, k), kLine);
  }
  memory_ = empty_large({size}, at::kChar);
}

template <typename T>
void PackedBlocks<T>::store(int64_t block, const T* first, int64_t stride, Range part) {
  const int64_t count = blocks_[block].count;
  const T* rows[kRowsPerBlock];
  for (int64_t i = 0; i < count; ++i) rows[i] = first + i * stride;
  kernels<GemmKernels<T>>().pack(k_contiguous_, address(block), rows, count, k_, part);
}

template <typename T>
void Combine<T>::run(T* y) const {
  using A = acc_t<T>;
  const int64_t hidden = b.columns(), k = b.inner();
  const int64_t step = columns_per_unit(hidden, 1, b.k_contiguous() ? 96 : 256, 32);
  const int64_t threads = at::get_num_threads();
  const at::Tensor buffer = empty_large({threads, used, step}, at::dtype(scalar_type<A>()));
  const auto& gemm = kernels<GemmKernels<T>>();
  const auto& functions = kernels<RowKernels<T>>();
  parallel_units((hidden + step - 1) / step, [&](int64_t unit, int thread) {
    const Range columns{unit * step, std::min((unit + 1) * step, hidden)};
    const int64_t n = columns.size();
    A* products = mutable_data<A>(buffer) + thread * used * step;
    for (size_t i = 0; i < blocks.size(); ++i) {
      const RowBlock& block = blocks[i];
      A* out = products + block.begin * step;
      gemm.multiply(rows.get(i), block.count, k, b.of<T>(block.expert), columns, out, step);
      for (int64_t r = 0; bias && r < block.count; ++r) {
        functions.add_scaled(out + r * step, bias + block.expert * hidden + columns.begin, A(1), n);
      }
    }
    std::vector<const A*> mine(top_k);
    std::vector<A> scales(top_k);
    for (int64_t t = 0; t < tokens; ++t) {
      int64_t count = 0;
      for (int64_t s = t * top_k; s < (t + 1) * top_k; ++s) {
        if (slot_to_row[s] >= used) continue;
        mine[count] = products + slot_to_row[s] * step;
        scales[count++] = topk_weights ? topk_weights[s] : A(1);
      }
      functions.weighted_sum_wide(y + t * hidden + columns.begin, mine.data(), scales.data(), count,
                                  n);
    }
  });
}

template class PackedBlocks<bf16>;
template class PackedBlocks<fp16>;
template class PackedBlocks<float>;
template class PackedBlocks<double>;
template struct Combine<bf16>;
template struct Combine<fp16>;
template struct Combine<float>;
template struct Combine<double>;

}  // namespace moe
