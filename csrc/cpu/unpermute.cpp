// Each token's rows, weighted and summed.
//
// T tokens, K experts a token, R = T * K slots, H hidden size.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "common/parallel.h"
#include "cpu/kernel_table.h"
#include "cpu/order.h"

namespace moe {

namespace {

at::Tensor as_sums(const at::Tensor& tensor, const at::Tensor& rows) {
  return tensor.to(accumulate_dtype(rows.scalar_type())).contiguous();
}

at::Tensor unpermute(const at::Tensor& rows_RH, const at::Tensor& row_to_slot,
                     const at::Tensor& slot_to_row, const at::Tensor& offsets,
                     const std::optional<at::Tensor>& weights_TK) {
  const Order order("unpermute", row_to_slot, slot_to_row, offsets);
  const at::Tensor rows = with_unit_stride(rows_RH);
  const int64_t hidden = rows.size(1), stride = rows.stride(0);
  const int64_t used = std::min(order.used, rows.size(0));
  const at::Tensor weights = weights_TK ? as_sums(*weights_TK, rows) : at::Tensor();
  const at::Tensor out = at::empty({order.tokens, hidden}, rows.options());
  dispatch_float(rows.scalar_type(), "unpermute", [&]<typename T>() {
    using A = acc_t<T>;
    const T* from = data<T>(rows);
    T* to = mutable_data<T>(out);
    const A* weight = weights.defined() ? data<A>(weights) : nullptr;
    const auto& functions = kernels<RowKernels<T>>();
    const int64_t bytes = (order.top_k + 1) * hidden * sizeof(T);
    parallel_rows(order.tokens, bytes, [&](int64_t begin, int64_t end) {
      std::vector<const T*> mine(order.top_k);
      std::vector<A> scales(order.top_k);
      for (int64_t t = begin; t < end; ++t) {
        int64_t count = 0;
        for (int64_t s = t * order.top_k; s < (t + 1) * order.top_k; ++s) {
          const int64_t r = order.slot_to_row()[s];
          if (r >= used) continue;
          mine[count] = from + r * stride;
          scales[count++] = weight ? weight[s] : A(1);
        }
        functions.weighted_sum(to + t * hidden, mine.data(), scales.data(), count, hidden);
      }
    });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> unpermute_backward(
    const at::Tensor& grad_TH, const at::Tensor& rows_RH, const at::Tensor& row_to_slot,
    const at::Tensor& slot_to_row, const at::Tensor& offsets, const at::Tensor& weights_TK,
    std::array<bool, 2> needs) {
  const Order order("unpermute_backward", row_to_slot, slot_to_row, offsets);
  const at::Tensor rows = with_unit_stride(rows_RH);
  const at::Tensor grad = with_unit_stride(grad_TH.to(rows.scalar_type()));
  const int64_t num_rows = rows.size(0), hidden = rows.size(1);
  const int64_t used = std::min(order.used, num_rows);
  const at::Tensor weights = as_sums(weights_TK, rows);
  at::Tensor grad_rows = at::empty({0}, grad_TH.options());
  at::Tensor grad_weights = at::empty({0}, grad_TH.options());
  dispatch_float(rows.scalar_type(), "unpermute_backward", [&]<typename T>() {
    using A = acc_t<T>;
    const T* g = data<T>(grad);
    const A* weight = data<A>(weights);
    const auto& functions = kernels<RowKernels<T>>();
    const int64_t stride = grad.stride(0), bytes = 2 * hidden * sizeof(T);
    if (needs[0]) {
      grad_rows = at::empty({num_rows, hidden}, rows.options());
      T* to = mutable_data<T>(grad_rows);
      parallel_rows(num_rows, bytes, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          if (r >= used) {
            std::fill_n(to + r * hidden, hidden, T{});
            continue;
          }
          const int64_t slot = order.row_to_slot()[r];
          functions.scale(to + r * hidden, g + slot / order.top_k * stride, weight[slot], hidden);
        }
      });
    }
    if (needs[1]) {
      const at::Tensor sums = at::empty(weights.sizes(), weights.options());
      A* to = mutable_data<A>(sums);
      const T* from = data<T>(rows);
      parallel_rows(order.slots, bytes, [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) {
          const int64_t r = order.slot_to_row()[s];
          const T* row = from + r * rows.stride(0);
          to[s] = r < used ? functions.dot(row, g + s / order.top_k * stride, hidden) : A(0);
        }
      });
      grad_weights = sums.to(weights_TK.scalar_type());
    }
  });
  return {grad_rows, grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("unpermute", unpermute);
  m.impl("unpermute_backward", unpermute_backward);
}

}  // namespace moe
