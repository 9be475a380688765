// moe_kernels::dispatch and combine, and their backwards. The schemas are in
// moe_parallel/dispatch/ops.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "dispatch/dispatcher.h"
#include "dispatch/rows.h"

namespace moe::ep {
namespace {

using at::Tensor;

const Transport& transport_of(const Dispatcher& dispatcher, const Tensor& tensor) {
  const OnGpus& gpus = dispatcher.on_gpus;
  // What it does not carry it refuses, so that the other ranks learn of it.
  if (gpus.memory && (gpus.alone || gpus.carries(tensor))) return cuda_ipc_transport;
  return dispatcher.shared_memory && is_native(tensor) ? shared_memory_transport
                                                       : process_group_transport;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs outputs_of(Arrived arrived) {
  return {arrived.x,    arrived.ids,       arrived.weights, arrived.slot_rows,
          arrived.plan, arrived.num_slots, arrived.extra};
}

// A ticket travels as a tensor: it is what orders the end of a call after its beginning in a graph.
// With the last of it goes what nobody can ask for any more.
template <typename Result>
Tensor write_ticket(const std::shared_ptr<Dispatcher>& dispatcher,
                    Begun<Result> Dispatcher::* begun, Ending<Result> ending) {
  auto number = std::make_unique<int64_t>((*dispatcher.*begun).keep(std::move(ending)));
  const auto forget = [weak = std::weak_ptr(dispatcher), begun](void* data) {
    const std::unique_ptr<int64_t> ticket(static_cast<int64_t*>(data));
    if (const auto owner = weak.lock()) (*owner.*begun).take(*ticket);
  };
  return at::from_blob(number.release(), {}, forget, at::kLong);
}

template <typename Result>
Result end_of(Begun<Result>& begun, const char* op, const Tensor& ticket) {
  const auto ending = begun.take(ticket.item<int64_t>());
  TORCH_CHECK(ending, op, ": this call has ended already; wait for it once");
  return ending();
}

Outputs dispatch(const Tensor& x, const Tensor& ids, const Tensor& weights,
                 const std::optional<Tensor>& extra, std::string name) {
  const auto dispatcher = find_dispatcher(name);
  return outputs_of(transport_of(*dispatcher, x).dispatch(dispatcher, {x, ids, weights, extra})());
}

Tensor dispatch_start(const Tensor& x, const Tensor& ids, const Tensor& weights,
                      const std::optional<Tensor>& extra, std::string name) {
  const auto dispatcher = find_dispatcher(name);
  return write_ticket(dispatcher, &Dispatcher::dispatches,
                      transport_of(*dispatcher, x).dispatch(dispatcher, {x, ids, weights, extra}));
}

Outputs dispatch_finish(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&,
                        const Tensor& ticket, std::string name) {
  return outputs_of(end_of(find_dispatcher(name)->dispatches, "dispatch", ticket));
}

Tensor combine(const Tensor& y, const Tensor& slot_rows, const Tensor& plan, std::string name) {
  const auto dispatcher = find_dispatcher(name);
  return transport_of(*dispatcher, slot_rows).combine(dispatcher, y, slot_rows, plan)();
}

Tensor combine_start(const Tensor& y, const Tensor& slot_rows, const Tensor& plan,
                     std::string name) {
  const auto dispatcher = find_dispatcher(name);
  return write_ticket(dispatcher, &Dispatcher::combines,
                      transport_of(*dispatcher, slot_rows).combine(dispatcher, y, slot_rows, plan));
}

Tensor combine_finish(const Tensor&, const Tensor&, const Tensor&, const Tensor& ticket,
                      std::string name) {
  return end_of(find_dispatcher(name)->combines, "combine", ticket);
}

Tensor combine_backward(const Tensor& grad, const Tensor& slot_rows, const Tensor& plan,
                        int64_t num_received, std::string name) {
  const auto dispatcher = find_dispatcher(name);
  return transport_of(*dispatcher, grad)
      .combine_backward(dispatcher, grad, slot_rows, plan, num_received);
}

std::tuple<Tensor, Tensor> dispatch_backward(const std::optional<Tensor>& grad_x,
                                             const std::optional<Tensor>& grad_weights,
                                             const Tensor& slot_rows, const Tensor& plan,
                                             std::string name) {
  const auto dispatcher = find_dispatcher(name);
  return transport_of(*dispatcher, slot_rows)
      .dispatch_backward(dispatcher, grad_x, grad_weights, slot_rows, plan);
}

void implement(torch::Library& m) {
  m.impl("dispatch", dispatch);
  m.impl("dispatch_start", dispatch_start);
  m.impl("dispatch_finish", dispatch_finish);
  m.impl("dispatch_backward", dispatch_backward);
  m.impl("combine", combine);
  m.impl("combine_start", combine_start);
  m.impl("combine_finish", combine_finish);
  m.impl("combine_backward", combine_backward);
}

TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) { implement(m); }

TORCH_LIBRARY_IMPL(moe_kernels, CUDA, m) { implement(m); }

}  // namespace
}  // namespace moe::ep
