// The last step of both directions of fused_experts: rows times matrices, summed by token.
//
// So many columns of y at a time that their products do not fill memory: all of them where rows are
// few, for matrices are read fastest in whole rows. Every matrix is read once whatever the routing.
#include "common/parallel.h"
#include "cpu/fused_experts.h"

namespace moe {

template <typename T>
PackedBlocks<T>::PackedBlocks(std::span<const RowBlock> blocks, bool k_contiguous, int64_t k)
    : blocks_(blocks),
      k_contiguous_(k_contiguous),
      k_(k),
      begins_(blocks.size()),
      memory_(lay_out()) {}

template <typename T>
int64_t PackedBlocks<T>::lay_out() const {
  constexpr int64_t kLine = 64;
  const auto& gemm = kernels<GemmKernels<T>>();
  int64_t size = 0;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    begins_[i] = size;
    size += round_up(gemm.packed_size(k_contiguous_, blocks_[i].count, k_), kLine);
  }
  return size;
}

template <typename T>
void PackedBlocks<T>::store(int64_t block, const T* first, int64_t stride, Range part) {
  const int64_t count = blocks_[block].count;
  const T* rows[kMostRows];
  for (int64_t i = 0; i < count; ++i) rows[i] = first + i * stride;
  kernels<GemmKernels<T>>().pack(k_contiguous_, address(block), rows, count, k_, part);
}

template <typename T>
void Combine<T>::run(T* y) const {
  constexpr int64_t kProducts = 1 << 24;  // at a time
  const int64_t hidden = b.columns(), most = kProducts / std::max<int64_t>(used, 1);
  const int64_t span = std::min(hidden, std::max<int64_t>(most / 32 * 32, 256));
  const int64_t stride = sums_stride(span);
  const LocalArray<A> products(used * stride);
  for (int64_t begin = 0; begin < hidden; begin += span) {
    const Range columns{begin, std::min(begin + span, hidden)};
    multiply(columns, products.data(), stride);
    sum(columns, products.data(), stride, y);
  }
}

template <typename T>
void Combine<T>::multiply(Range columns, A* products, int64_t stride) const {
  constexpr int64_t kCacheBytes = 16 << 20;
  const int64_t hidden = b.columns(), k = b.inner();
  const int64_t step = columns_per_unit(columns.size(), blocks, at::get_num_threads(), 32);
  const int64_t parts = (columns.size() + step - 1) / step;
  const bool stream = used * stride * static_cast<int64_t>(sizeof(A)) > kCacheBytes;
  const auto& gemm = kernels<GemmKernels<T>>();
  const auto& functions = kernels<RowKernels<T>>();
  parallel_units(blocks.size() * parts, [&](int64_t unit, int) {
    const RowBlock& block = blocks[unit / parts];
    const int64_t first = columns.begin + unit % parts * step;
    const Range part{first, std::min(first + step, columns.end)};
    A* out = products + block.begin * stride + (first - columns.begin);
    gemm.multiply(rows.get(unit / parts), block.count, k, b.of<T>(block.expert), part, out, stride,
                  stream, nullptr);
    for (int64_t r = 0; bias && r < block.count; ++r) {
      functions.add_scaled(out + r * stride, bias + block.expert * hidden + first, A(1),
                           part.size());
    }
  });
}

template <typename T>
void Combine<T>::sum(Range columns, const A* products, int64_t stride, T* y) const {
  const int64_t hidden = b.columns(), n = columns.size();
  const auto& functions = kernels<RowKernels<T>>();
  parallel_rows(tokens, top_k * n * sizeof(A), [&](int64_t begin, int64_t end) {
    const LocalArray<const A*> mine(top_k);
    const LocalArray<A> scales(top_k);
    for (int64_t t = begin; t < end; ++t) {
      int64_t count = 0;
      for (int64_t s = t * top_k; s < (t + 1) * top_k; ++s) {
        if (slot_to_row[s] >= used) continue;
        mine[count] = products + slot_to_row[s] * stride;
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
