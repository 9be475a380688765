// moe_kernels::dispatch and combine, and their backwards. The schemas are in
// moe_parallel/dispatch/ops.py.
//
// T tokens, H hidden size, K experts a token, E experts, P ranks; S rows sent and U received, in
// dispatch; combine goes the other way. plan [2 P + 2] int64 on the CPU: the rows of the dispatch
// sent to each rank, those received from each, its number, and the tag of its group.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <exception>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>

#include "dispatch/process_group.h"
#include "dispatch/rows.h"

namespace moe::ep {
namespace {

using at::Tensor;

int64_t dtype_number(const Tensor& tensor) { return static_cast<int64_t>(tensor.scalar_type()); }

int64_t sum(const std::vector<int64_t>& values) {
  return std::accumulate(values.begin(), values.end(), int64_t{0});
}

void check_floating(const char* op, const char* name, const Tensor& tensor) {
  const at::ScalarType dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
      op, ": ", name, " must be one of bfloat16, float16, float32, float64; got ", dtype);
}

void check_dispatch(const Tensor& x, const Tensor& ids, const Tensor& weights, int64_t experts,
                    int64_t ranks) {
  TORCH_CHECK_VALUE(x.dim() == 2, "dispatch: x must be [T, H]; got ", x.sizes());
  check_floating("dispatch", "x", x);
  TORCH_CHECK_VALUE(ids.dim() == 2 && ids.size(0) == x.size(0) && ids.size(1) > 0,
                    "dispatch: topk_ids must be [T, K] with T = ", x.size(0),
                    " (x.shape[0]) and K at least 1; got ", ids.sizes());
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kInt || ids.scalar_type() == at::kLong,
                   "dispatch: topk_ids must be int32 or int64; got ", ids.scalar_type());
  TORCH_CHECK_VALUE(weights.sizes() == ids.sizes(), "dispatch: topk_weights must be ", ids.sizes(),
                    " as topk_ids; got ", weights.sizes());
  check_floating("dispatch", "topk_weights", weights);
  TORCH_CHECK_VALUE(ids.device() == x.device() && weights.device() == x.device(),
                    "dispatch: topk_ids and topk_weights must be on x's device ", x.device(),
                    "; got ", ids.device(), " and ", weights.device());
  TORCH_CHECK_VALUE(ids.numel() <= std::numeric_limits<int32_t>::max(),
                    "dispatch: T * K must be below 2**31; got ", ids.numel());
  TORCH_CHECK_VALUE(experts > 0 && experts % ranks == 0,
                    "dispatch: num_experts must be a positive multiple of the group's size ", ranks,
                    "; got ", experts);
}

// The rows of a dispatch, by rank, and its number.
struct Plan {
  std::vector<int64_t> sent, received;
  int64_t dispatch = -1;

  explicit Plan(const Exchange& exchange) : sent(exchange.size()), received(exchange.size()) {}

  void read(const Exchange& exchange, const Tensor& plan) {
    const int64_t ranks = exchange.size();
    TORCH_CHECK_VALUE(plan.is_cpu() && plan.scalar_type() == at::kLong && plan.is_contiguous() &&
                          plan.dim() == 1 && plan.size(0) == 2 * ranks + 2 &&
                          plan.const_data_ptr<int64_t>()[2 * ranks + 1] == exchange.group_tag(),
                      to_string(exchange.phase()),
                      ": the handle must be that of a dispatch in group '", exchange.group_name(),
                      "'; use the dispatcher that made it");
    const int64_t* const begin = plan.const_data_ptr<int64_t>();
    sent.assign(begin, begin + ranks);
    received.assign(begin + ranks, begin + 2 * ranks);
    dispatch = begin[2 * ranks];
  }

  Tensor write(const Exchange& exchange) const {
    return at::cat({at::tensor(sent, at::kLong), at::tensor(received, at::kLong),
                    at::tensor({dispatch, exchange.group_tag()}, at::kLong)});
  }
};

// Headers of the phases whose sizes the dispatch has settled: ranks that name the same dispatch
// of their group have its plan. `check` reads the plan and raises for wrong arguments. On CUDA
// there are no headers: reading them would make the host wait for the device.
template <typename Check>
void agree(const Exchange& exchange, Terms terms, bool with_headers, const Plan& plan,
           const Check& check) {
  if (!with_headers) return check();
  std::exception_ptr refusal;
  try {
    check();
  } catch (...) {
    refusal = std::current_exception();
  }
  terms.dispatch = plan.dispatch;
  const Tensor refused = at::tensor(static_cast<int64_t>(refusal != nullptr), at::kLong);
  auto headers = exchange.send_headers(terms, at::zeros({exchange.size(), 2}, at::kLong), refused);
  if (refusal) {
    headers.pending.wait();
    std::rethrow_exception(refusal);
  }
  exchange.read_headers(std::move(headers));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dispatch(
    const Tensor& x, const Tensor& topk_ids, const Tensor& topk_weights, int64_t num_experts,
    std::string group, double timeout) {
  const Exchange exchange(Phase::kDispatch, group, timeout);
  const int64_t ranks = exchange.size();

  std::exception_ptr refusal;
  Layout layout;
  try {
    check_dispatch(x, topk_ids, topk_weights, num_experts, ranks);
    layout = make_layout(topk_ids, num_experts, ranks);
  } catch (...) {
    refusal = std::current_exception();
    layout.counts = at::zeros({ranks, 2}, x.options().dtype(at::kLong));
    layout.bad = at::ones({}, layout.counts.options());
  }
  Terms terms = {.experts = num_experts};
  if (!refusal) {
    terms.hidden = x.size(1), terms.x_dtype = dtype_number(x);
    terms.top_k = topk_ids.size(1), terms.weight_dtype = dtype_number(topk_weights);
  }
  auto headers = exchange.send_headers(terms, layout.counts, layout.bad);
  if (refusal) {
    headers.pending.wait();
    std::rethrow_exception(refusal);
  }
  Tensor rows, routing;
  const auto pack = [&](int64_t num_rows) {
    rows = pack_rows(x, layout.slot_rows, num_rows);
    routing = pack_routing(topk_ids, topk_weights, layout.slot_rows, num_rows, num_experts / ranks);
  };
  // On the CPU while the headers travel. On CUDA the sizes come with them: reading them is the one
  // time that the host waits for the device.
  if (is_native(x)) pack(layout.counts.select(1, 0).sum().item<int64_t>());
  const auto tally = exchange.read_headers(std::move(headers));
  TORCH_CHECK_INDEX(!tally.refused, "dispatch: topk_ids must be in [-1, E] with E = ", num_experts);
  if (!is_native(x)) pack(sum(tally.sent));

  Plan plan(exchange);
  plan.sent = tally.sent, plan.received = tally.received, plan.dispatch = tally.dispatch;
  const int64_t num_received = sum(tally.received);
  const Tensor out = at::empty({num_received, x.size(1)}, x.options());
  const Tensor out_routing = empty_routing(topk_weights, num_received);
  auto tokens = exchange.start("tokens", out, rows, tally.received, tally.sent);
  exchange.start("routing weights", out_routing, routing, tally.received, tally.sent).wait();
  const auto [ids, weights] =
      unpack_routing(out_routing, topk_ids.size(1), topk_weights.scalar_type());
  const Tensor out_ids = ids.contiguous(), out_weights = weights.contiguous();
  tokens.wait();
  return {out,
          out_ids,
          out_weights,
          layout.slot_rows,
          plan.write(exchange),
          at::empty({tally.slots_received, 0}, x.options().dtype(at::kByte))};
}

// A row for each received one goes back to where it came from.
struct Returning {
  Tensor rows;  // [S, ...]
  Exchange::Pending pending;

  Returning(const Exchange& exchange, const Plan& plan, const char* what, const Tensor& values)
      : rows(at::empty({sum(plan.sent), values.size(1)}, values.options())),
        pending(exchange.start(what, rows, values.contiguous(), plan.sent, plan.received)) {}
};

void check_rows(const char* op, const char* name, const Tensor& rows, int64_t num_rows) {
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(0) == num_rows, op, ": ", name, " must have the ",
                    num_rows, " rows of its dispatch; got ", rows.sizes());
}

Tensor combine(const Tensor& y, const Tensor& slot_rows, const Tensor& plan_numbers,
               std::string group, double timeout) {
  const Exchange exchange(Phase::kCombine, group, timeout);
  Plan plan(exchange);
  Terms terms;
  if (y.dim() == 2) terms.hidden = y.size(1), terms.x_dtype = dtype_number(y);
  agree(exchange, terms, is_native(y), plan, [&] {
    plan.read(exchange, plan_numbers);
    check_rows("combine", "y", y, sum(plan.received));
    check_floating("combine", "y", y);
  });
  Returning returning(exchange, plan, "results", y);
  returning.pending.wait();
  return sum_rows(returning.rows, slot_rows, exchange.size());
}

Tensor combine_backward(const Tensor& grad, const Tensor& slot_rows, const Tensor& plan_numbers,
                        int64_t num_received, std::string group, double timeout) {
  const Exchange exchange(Phase::kCombineBackward, group, timeout);
  Plan plan(exchange);
  const Terms terms = {.hidden = grad.size(1), .x_dtype = dtype_number(grad)};
  agree(exchange, terms, is_native(grad), plan, [&] { plan.read(exchange, plan_numbers); });
  const Tensor rows = pack_rows(grad, slot_rows, sum(plan.sent));
  const Tensor out = at::empty({num_received, grad.size(1)}, grad.options());
  exchange.start("result gradients", out, rows, plan.received, plan.sent).wait();
  return out;
}

std::tuple<Tensor, Tensor> dispatch_backward(const std::optional<Tensor>& grad_x,
                                             const std::optional<Tensor>& grad_weights,
                                             const Tensor& slot_rows, const Tensor& plan_numbers,
                                             std::string group, double timeout) {
  const Exchange exchange(Phase::kDispatchBackward, group, timeout);
  Plan plan(exchange);
  Terms terms;
  if (grad_x) terms.hidden = grad_x->size(1), terms.x_dtype = dtype_number(*grad_x);
  if (grad_weights)
    terms.top_k = grad_weights->size(1), terms.weight_dtype = dtype_number(*grad_weights);
  agree(exchange, terms, is_native(slot_rows), plan, [&] { plan.read(exchange, plan_numbers); });
  std::optional<Returning> rows, slots;
  if (grad_x) rows.emplace(exchange, plan, "token gradients", *grad_x);
  if (grad_weights) slots.emplace(exchange, plan, "routing weight gradients", *grad_weights);
  Tensor out_weights = at::empty({0}, slot_rows.options()), out_x = at::empty_like(out_weights);
  if (slots) {
    slots->pending.wait();
    out_weights = gather_slots(slots->rows, slot_rows);
  }
  if (rows) {
    rows->pending.wait();
    out_x = sum_rows(rows->rows, slot_rows, exchange.size());
  }
  return {out_x, out_weights};
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
