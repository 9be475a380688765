// moe_kernels::dispatch and combine, and their backwards. The schemas are in
// moe_parallel/dispatch/ops.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "dispatch/dispatcher.h"
#include "dispatch/rows.h"

namespace moe::ep {
namespace {

using at::Tensor;

const Transport& transport_of(const Dispatcher& dispatcher, const Tensor& tensor) {
  return dispatcher.shared_memory && is_native(tensor) ? shared_memory_transport
                                                       : process_group_transport;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dispatch(const Tensor& x,
                                                                    const Tensor& topk_ids,
                                                                    const Tensor& topk_weights,
                                                                    std::string name) {
  const auto dispatcher = find_dispatcher(name);
  Arrived arrived = transport_of(*dispatcher, x).dispatch(*dispatcher, x, topk_ids, topk_weights);
  return {arrived.x,         arrived.ids,  arrived.weights,
          arrived.slot_rows, arrived.plan, arrived.num_slots};
}

Tensor combine(const Tensor& y, const Tensor& slot_rows, const Tensor& plan, std::string name) {
  const auto dispatcher = find_dispatcher(name);
  return transport_of(*dispatcher, y).combine(*dispatcher, y, slot_rows, plan);
}

Tensor combine_backward(const Tensor& grad, const Tensor& slot_rows, const Tensor& plan,
                        int64_t num_received, std::string name) {
  const auto dispatcher = find_dispatcher(name);
  return transport_of(*dispatcher, grad)
      .combine_backward(*dispatcher, grad, slot_rows, plan, num_received);
}

std::tuple<Tensor, Tensor> dispatch_backward(const std::optional<Tensor>& grad_x,
                                             const std::optional<Tensor>& grad_weights,
                                             const Tensor& slot_rows, const Tensor& plan,
                                             std::string name) {
  const auto dispatcher = find_dispatcher(name);
  return transport_of(*dispatcher, slot_rows)
      .dispatch_backward(*dispatcher, grad_x, grad_weights, slot_rows, plan);
}

TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("dispatch", dispatch);
  m.impl("dispatch_backward", dispatch_backward);
  m.impl("combine", combine);
  m.impl("combine_backward", combine_backward);
}

TORCH_LIBRARY_IMPL(moe_kernels, CUDA, m) {
  m.impl("dispatch", dispatch);
  m.impl("dispatch_backward", dispatch_backward);
  m.impl("combine", combine);
  m.impl("combine_backward", combine_backward);
}

}  // namespace
}  // namespace moe::ep
