// T tokens, K experts a token, H hidden size, I intermediate size, E experts, W = 2 * I columns for
// gated activations, else I.
#include <algorithm>
#include <tuple>

#include "cpu/expert_activation.h"
#include "direct/arguments.h"

namespace moe::direct {

namespace {

using FusedExperts = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
    const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, std::string_view, bool,
    double, double, c10::SymInt, bool, const std::optional<at::Tensor>&,
    const std::optional<at::Tensor>&, bool);

// gate_up [E, H, W] and down [E, I, H] in x's dtype.
bool are_weights(const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& down,
                 bool gated) {
  if (gate_up.dim() != 3 || down.dim() != 3) return false;
  const int64_t width = gate_up.size(2), inner = gated ? width / 2 : width;
  return gate_up.scalar_type() == x.scalar_type() && down.scalar_type() == x.scalar_type() &&
         gate_up.size(1) == x.size(1) && (!gated || width % 2 == 0) &&
         down.size(0) == gate_up.size(0) && down.size(1) == inner && down.size(2) == x.size(1);
}

}  // namespace

PyObject* fused_experts(PyObject*, PyObject* const* values, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    Arguments in(values, count);
    const at::Tensor x = in.tensor(), gate_up = in.tensor(), down = in.tensor(),
                     topk_ids = in.tensor(), topk_weights = in.tensor();
    const std::optional<at::Tensor> gate_up_bias = in.optional_tensor(),
                                    down_bias = in.optional_tensor();
    const std::string_view activation = in.text();
    const bool interleaved = in.flag();
    const double alpha = in.number(), limit = in.number();
    const std::optional<int64_t> bound = in.optional_integer();
    if (!in.usual() || !is_routing(x, topk_ids, topk_weights)) Py_RETURN_NONE;
    const bool gated = is_gated(parse_activation("fused_experts", activation));
    if (!are_weights(x, gate_up, down, gated) ||
        !is_bias(gate_up_bias, x, gate_up.size(0), gate_up.size(2)) ||
        !is_bias(down_bias, x, gate_up.size(0), x.size(1)) || bound.value_or(0) < 0) {
      Py_RETURN_NONE;
    }
    const int64_t slots = topk_ids.numel(), num_rows = std::min(bound.value_or(slots), slots);
    static const auto op = find_op<FusedExperts>("moe_kernels::fused_experts");
    return THPVariable_Wrap(run([&] {
      return std::get<0>(op.call(x, gate_up, down, topk_ids, topk_weights, gate_up_bias, down_bias,
                                 activation, interleaved, alpha, limit, num_rows, false,
                                 std::nullopt, std::nullopt, /*owns_h=*/false));
    }));
  });
}

}  // namespace moe::direct
