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

// A ticket travels as a tensor: it is what orders the end of a call after its beginning in a graph,
// and of floating point, so that in backward it can be the gradient of the forward one. With the
// last of it goes what nobody can ask for any more.
template <typename Result>
Tensor write_ticket(const std::shared_ptr<Dispatcher>& dispatcher,
                    Begun<Result> Dispatcher::* begun, Ending<Result> ending,
                    typename Begun<Result>::Beginning again = {}) {
  const int64_t number = (*dispatcher.*begun).keep(std::move(ending), std::move(again));
  auto ticket = std::make_unique<double>(static_cast<double>(number));
  const auto forget = [weak = std::weak_ptr(dispatcher), begun, number](void* data) {
    delete static_cast<double*>(data);
    if (const auto owner = weak.lock()) (*owner.*begun).forget(number);
  };
  return at::from_blob(ticket.release(), {}, forget, at::kDouble);
}

template <typename Result>
Result end_of(Begun<Result>& begun, const char* op, const Tensor& ticket) {
  const auto ending = begun.take(static_cast<int64_t>(ticket.item<double>()));
  TORCH_CHECK(ending, op, ": this call has ended already; wait for it once");
  return ending();
}

// What has begun: the ticket, and a tensor without elements on the device of the call, on whose
// queue and stream autograd then ends the backward of it.
using Beginning = std::tuple<Tensor, Tensor>;

Beginning beginning(const Tensor& ticket, const Tensor& of) {
  return {ticket, at::empty({0}, of.options().dtype(at::kDouble))};
}

Outputs dispatch(const Tensor& x, const Tensor& ids, const Tensor& weights,
                 const std::optional<Tensor>& extra, std::string name) {
  const auto dispatcher = find_dispatcher(name);
  return outputs_of(transport_of(*dispatcher, x).dispatch(dispatcher, {x, ids, weights, extra})());
}

Beginning dispatch_start(const Tensor& x, const Tensor& ids, const Tensor& weights,
                         const std::optional<Tensor>& extra, std::string name) {
  const auto dispatcher = find_dispatcher(name);
  auto ending = transport_of(*dispatcher, x).dispatch(dispatcher, {x, ids, weights, extra});
  return beginning(write_ticket(dispatcher, &Dispatcher::dispatches, std::move(ending)), x);
}

Outputs dispatch_finish(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&,
                        const Tensor& ticket, const Tensor&, bool, bool, std::string name) {
  return outputs_of(end_of(find_dispatcher(name)->dispatches, "dispatch", ticket));
}

Tensor combine(const Tensor& y, const Tensor& slot_rows, const Tensor& plan, std::string name) {
  const auto dispatcher = find_dispatcher(name);
  return transport_of(*dispatcher, slot_rows).combine(dispatcher, y, slot_rows, plan)();
}

Beginning combine_start(const Tensor& y, const Tensor& slot_rows, const Tensor& plan,
                        std::string name) {
  const auto dispatcher = find_dispatcher(name);
  auto ending = transport_of(*dispatcher, slot_rows).combine(dispatcher, y, slot_rows, plan);
  return beginning(write_ticket(dispatcher, &Dispatcher::combines, std::move(ending)), y);
}

Tensor combine_finish(const Tensor&, const Tensor&, const Tensor&, const Tensor& ticket,
                      const Tensor&, std::string name) {
  return end_of(find_dispatcher(name)->combines, "combine", ticket);
}

Ending<Tensor> begin_combine_backward(const std::shared_ptr<Dispatcher>& dispatcher,
                                      const Tensor& grad, const Tensor& slot_rows,
                                      const Tensor& plan, int64_t num_received) {
  return transport_of(*dispatcher, grad)
      .combine_backward(dispatcher, grad, slot_rows, plan, num_received);
}

Tensor combine_backward(const Tensor& grad, const Tensor& slot_rows, const Tensor& plan,
                        int64_t num_received, std::string name) {
  return begin_combine_backward(find_dispatcher(name), grad, slot_rows, plan, num_received)();
}

Tensor combine_backward_start(const Tensor& grad, const Tensor& slot_rows, const Tensor& plan,
                              int64_t num_received, std::string name) {
  const auto dispatcher = find_dispatcher(name);
  return write_ticket(dispatcher, &Dispatcher::combine_backwards,
                      begin_combine_backward(dispatcher, grad, slot_rows, plan, num_received));
}

Tensor combine_backward_finish(const Tensor& ticket, const Tensor&, int64_t, int64_t,
                               at::ScalarType, std::string name) {
  return end_of(find_dispatcher(name)->combine_backwards, "combine_backward", ticket);
}

Ending<TokenGradients> begin_dispatch_backward(const std::shared_ptr<Dispatcher>& dispatcher,
                                               const std::optional<Tensor>& grad_x,
                                               const std::optional<Tensor>& grad_weights,
                                               const Tensor& slot_rows, const Tensor& plan) {
  return transport_of(*dispatcher, slot_rows)
      .dispatch_backward(dispatcher, grad_x, grad_weights, slot_rows, plan);
}

TokenGradients dispatch_backward(const std::optional<Tensor>& grad_x,
                                 const std::optional<Tensor>& grad_weights, const Tensor& slot_rows,
                                 const Tensor& plan, std::string name) {
  return begin_dispatch_backward(find_dispatcher(name), grad_x, grad_weights, slot_rows, plan)();
}

Tensor dispatch_backward_start(const std::optional<Tensor>& grad_x,
                               const std::optional<Tensor>& grad_weights, const Tensor& slot_rows,
                               const Tensor& plan, std::string name) {
  // Whoever computes gradients of inputs first, and of weights later, keeps the gradient of the
  // forward ticket for the second time, as pipelines do. It also keeps the gradients that travel
  // from autograd, which would make a present of them to a leaf if nobody else had them.
  const auto dispatcher = find_dispatcher(name);
  const auto begin = [=] {
    return begin_dispatch_backward(dispatcher, grad_x, grad_weights, slot_rows, plan);
  };
  return write_ticket<TokenGradients>(dispatcher, &Dispatcher::dispatch_backwards, begin(), begin);
}

TokenGradients dispatch_backward_finish(const Tensor& ticket, const Tensor&, at::IntArrayRef,
                                        at::ScalarType, at::IntArrayRef, at::ScalarType,
                                        std::string name) {
  return end_of(find_dispatcher(name)->dispatch_backwards, "dispatch_backward", ticket);
}

void implement(torch::Library& m) {
  m.impl("dispatch", dispatch);
  m.impl("dispatch_start", dispatch_start);
  m.impl("dispatch_finish", dispatch_finish);
  m.impl("dispatch_backward", dispatch_backward);
  m.impl("dispatch_backward_start", dispatch_backward_start);
  m.impl("dispatch_backward_finish", dispatch_backward_finish);
  m.impl("combine", combine);
  m.impl("combine_start", combine_start);
  m.impl("combine_finish", combine_finish);
  m.impl("combine_backward", combine_backward);
  m.impl("combine_backward_start", combine_backward_start);
  m.impl("combine_backward_finish", combine_backward_finish);
}

TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) { implement(m); }

TORCH_LIBRARY_IMPL(moe_kernels, CUDA, m) { implement(m); }

}  // namespace
}  // namespace moe::ep
