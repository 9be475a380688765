// Activations of expert layers.
//
// R rows, I intermediate size, W = 2 * I columns for gated kinds, else I.
#include "cpu/expert_activation.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/parallel.h"
#include "cpu/kernel_table.h"

namespace moe {

Activation parse_activation(const char* op, std::string_view name) {
  constexpr std::pair<std::string_view, Activation> kinds[] = {
      {"swiglu", Activation::kSwiglu}, {"geglu", Activation::kGeglu},
      {"reglu", Activation::kReglu},   {"swigluoai", Activation::kSwigluOai},
      {"relu2", Activation::kRelu2},   {"silu", Activation::kSilu},
      {"gelu", Activation::kGelu},
  };
  for (const auto& [known, kind] : kinds) {
    if (known == name) return kind;
  }
  TORCH_CHECK_VALUE(false, op, ": unknown activation \"", name, "\"");
}

namespace {

at::Tensor row_weights_as(const std::optional<at::Tensor>& weights, const at::Tensor& h) {
  if (!weights) return {};
  return weights->to(accumulate_dtype(h.scalar_type())).contiguous();
}

at::Tensor expert_activation(const at::Tensor& h_RW, std::string_view kind,
                             const std::optional<at::Tensor>& row_weights_R, bool interleaved,
                             double alpha, double limit) {
  const ActivationOptions options{parse_activation("expert_activation", kind), alpha, limit};
  const at::Tensor h = with_unit_stride(h_RW);
  const int64_t rows = h.size(0), inner = options.gated() ? h.size(1) / 2 : h.size(1);
  const at::Tensor weights = row_weights_as(row_weights_R, h);
  const at::Tensor out = at::empty({rows, inner}, h.options());
  dispatch_float(h.scalar_type(), "expert_activation", [&]<typename T>() {
    using A = acc_t<T>;
    const A* weight = weights.defined() ? data<A>(weights) : nullptr;
    const T* from = data<T>(h);
    T* to = mutable_data<T>(out);
    const auto& functions = kernels<ActivationKernels<T>>();
    parallel_rows(rows, 4 * inner * sizeof(T), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        functions.activation(options, to + r * inner,
                             halves(from + r * h.stride(0), inner, interleaved),
                             weight ? weight[r] : A(1), inner);
      }
    });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> expert_activation_backward(
    const at::Tensor& grad_RI, const at::Tensor& h_RW, std::string_view kind,
    const std::optional<at::Tensor>& row_weights_R, bool interleaved, double alpha, double limit) {
  const ActivationOptions options{parse_activation("expert_activation", kind), alpha, limit};
  const at::Tensor h = with_unit_stride(h_RW);
  const at::Tensor grad = with_unit_stride(grad_RI.to(h.scalar_type()));
  const int64_t rows = h.size(0), width = h.size(1), inner = options.gated() ? width / 2 : width;
  const at::Tensor weights = row_weights_as(row_weights_R, h);
  const at::Tensor grad_h = at::empty(h.sizes(), h.options());
  at::Tensor grad_weights = at::empty({0}, h.options());
  dispatch_float(h.scalar_type(), "expert_activation_backward", [&]<typename T>() {
    using A = acc_t<T>;
    const A* weight = weights.defined() ? data<A>(weights) : nullptr;
    const at::Tensor sums = weight ? at::empty({rows}, weights.options()) : at::Tensor();
    A* products = weight ? mutable_data<A>(sums) : nullptr;
    const T* from = data<T>(h);
    const T* g = data<T>(grad);
    T* to = mutable_data<T>(grad_h);
    const auto& functions = kernels<ActivationKernels<T>>();
    parallel_rows(rows, 8 * inner * sizeof(T), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const A product = functions.activation_backward(
            options, g + r * grad.stride(0), halves(from + r * h.stride(0), inner, interleaved),
            weight ? weight[r] : A(1), halves(to + r * width, inner, interleaved), nullptr, inner);
        if (products) products[r] = product;
      }
    });
    if (weight) grad_weights = sums.to(row_weights_R->scalar_type());
  });
  return {grad_h, grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("expert_activation", expert_activation);
  m.impl("expert_activation_backward", expert_activation_backward);
}

}  // namespace moe
