// T tokens, K experts a token, H hidden size, I intermediate size, E experts, W = 2 * I columns for
// gated activations, else I.
#include <algorithm>
#include <array>

#include "cpu/expert_activation.h"
#include "cpu/quantized_experts.h"
#include "direct/arguments.h"

namespace moe::direct {

namespace {

using FusedExpertsQuantized = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                         const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                         const at::Tensor&, const std::optional<at::Tensor>&,
                                         const std::optional<at::Tensor>&, std::string_view,
                                         std::string_view, c10::SymInt, std::string_view, bool,
                                         double, double);

// A QuantizedExperts of Python.
struct Quantized {
  explicit Quantized(Arguments& in)
      : codes(in.tensor()), scales(in.tensor()), format(in.text()), sizes{} {
    for (int64_t& size : sizes) size = in.integer();
  }

  // Whether calculating with its sizes, which are what somebody wrote, cannot overflow.
  bool has_sizes() const {
    constexpr int64_t kMost = int64_t{1} << 48;
    return std::all_of(sizes.begin(), sizes.end(),
                       [](int64_t size) { return size >= 0 && size < kMost; });
  }

  // Whether its parts fit each other, and it is [experts, inner, columns].
  bool is(int64_t experts, int64_t inner, int64_t columns) const {
    const std::optional<Format> known = find_format(format);
    if (!known || sizes != std::array{experts, inner, columns}) return false;
    const CodeShapes shapes = code_shapes(*known, experts, inner, columns);
    const at::ScalarType dtype = has_group_scales(*known) ? at::kBFloat16 : at::kFloat;
    return codes.scalar_type() == at::kByte && scales.scalar_type() == dtype &&
           codes.sizes() == at::IntArrayRef(shapes.codes) &&
           scales.sizes() == at::IntArrayRef(shapes.scales);
  }

  at::Tensor codes, scales;
  std::string_view format;
  std::array<int64_t, 3> sizes;  // E, contracted size, columns
};

}  // namespace

PyObject* fused_experts_quantized(PyObject*, PyObject* const* values, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    Arguments in(values, count);
    const at::Tensor x = in.tensor();
    const Quantized gate_up(in), down(in);
    const at::Tensor topk_ids = in.tensor(), topk_weights = in.tensor();
    const std::optional<at::Tensor> gate_up_bias = in.optional_tensor(),
                                    down_bias = in.optional_tensor();
    const std::string_view activation = in.text();
    const bool interleaved = in.flag();
    const double alpha = in.number(), limit = in.number();
    if (!in.usual() || !is_routing(x, topk_ids, topk_weights) || !gate_up.has_sizes() ||
        !down.has_sizes()) {
      Py_RETURN_NONE;
    }
    const bool gated = is_gated(parse_activation("fused_experts_quantized", activation));
    const int64_t experts = gate_up.sizes[0], hidden = x.size(1), inner = down.sizes[1];
    const int64_t width = gated ? 2 * inner : inner;
    if (!gate_up.is(experts, hidden, width) || !down.is(experts, inner, hidden) ||
        !is_bias(gate_up_bias, x, experts, width) || !is_bias(down_bias, x, experts, hidden)) {
      Py_RETURN_NONE;
    }
    static const auto op = find_op<FusedExpertsQuantized>("moe_kernels::fused_experts_quantized");
    return THPVariable_Wrap(run([&] {
      return op.call(x, gate_up.codes, gate_up.scales, down.codes, down.scales, topk_ids,
                     topk_weights, gate_up_bias, down_bias, gate_up.format, down.format, inner,
                     activation, interleaved, alpha, limit);
    }));
  });
}

}  // namespace moe::direct
