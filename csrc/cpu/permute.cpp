// Rows copied to the rows of their experts.
//
// T tokens, K experts a token, R = T * K slots, H hidden size.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>

#include "common/parallel.h"
#include "cpu/order.h"

namespace moe {

namespace {

at::Tensor permute(const at::Tensor& x_TH, const at::Tensor& row_to_slot,
                   const at::Tensor& slot_to_row, const at::Tensor& offsets, int64_t num_rows) {
  const Order order("permute", row_to_slot, slot_to_row, offsets);
  TORCH_CHECK_VALUE(x_TH.size(0) == order.tokens,
                    "permute: x must be [T, H] with T = ", order.tokens,
                    " (order.slot_to_row); got ", x_TH.sizes());
  TORCH_CHECK_VALUE(num_rows >= 0, "permute: num_rows must be at least 0; got ", num_rows);
  const at::Tensor x = with_unit_stride(x_TH);
  const int64_t bytes = x.size(1) * x.element_size(), stride = x.stride(0) * x.element_size();
  const at::Tensor out = at::empty({num_rows, x.size(1)}, x.options());
  if (out.numel() == 0) return out;
  const char* from = data<char>(x);
  char* to = mutable_data<char>(out);
  const int32_t* slots = order.row_to_slot();
  parallel_rows(num_rows, 2 * bytes, [&](int64_t begin, int64_t end) {
    const int64_t copied = std::min(end, order.used);
    for (int64_t r = begin; r < copied; ++r) {
      std::memcpy(to + r * bytes, from + slots[r] / order.top_k * stride, bytes);
    }
    const int64_t zeroed = std::max(begin, copied);
    if (zeroed < end) std::memset(to + zeroed * bytes, 0, (end - zeroed) * bytes);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) { m.impl("permute", permute); }

}  // namespace moe
