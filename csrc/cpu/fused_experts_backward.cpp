// The experts of an MoE layer, backward.
//
// T tokens, K experts a token, R rows that belong to an expert, H hidden size, I intermediate size,
// E experts, W = 2 * I columns for gated activations, else I.
//
// With dO the gradient of a token's result, s a slot's weight and A = activation(h):
//     dA = dO @ down^T (unweighted), ds = <dA, A> + <dO, down_bias>, dh = s * dA * activation'(h),
//     d down = (s A)^T dO, d gate_up = x^T dh, dx = sum over a token's slots of dh @ gate_up^T.
// The products of the down projection are not needed again.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "common/parallel.h"
#include "cpu/fused_experts.h"
#include "cpu/large_buffers.h"
#include "cpu/order.h"

namespace moe {

namespace {

// Which gradients are owed, in the order of the op's results.
struct Needs {
  bool x, gate_up, down, weights, gate_up_bias, down_bias;

  bool activations() const { return x || gate_up || weights || gate_up_bias; }
};

// What the rows of one call are made of.
template <typename T>
struct Rows {
  std::vector<const T*> x, grad;  // of each row's token
  std::vector<acc_t<T>> scales;   // s of each row

  Rows(const Order& order, const at::Tensor& x_TH, const at::Tensor& grad_TH,
       const at::Tensor& topk_weights)
      : x(order.used), grad(order.used), scales(order.used) {
    for (int64_t r = 0; r < order.used; ++r) {
      const int64_t slot = order.row_to_slot()[r], token = slot / order.top_k;
      x[r] = data<T>(x_TH) + token * x_TH.stride(0);
      grad[r] = data<T>(grad_TH) + token * grad_TH.stride(0);
      scales[r] = data<acc_t<T>>(topk_weights)[slot];
    }
  }
};

template <typename T>
class Backward {
 public:
  using A = acc_t<T>;

  Backward(const Order& order, const at::Tensor& x, const at::Tensor& grad, const at::Tensor& h,
           const at::Tensor& topk_weights, int64_t inner, ActivationOptions activation,
           bool interleaved)
      : order_(order),
        rows_(order, x, grad, topk_weights),
        blocks_(
            row_blocks(order.offsets(), order.experts, kernels<GemmKernels<T>>().rows_together)),
        h_(h),
        hidden_(x.size(1)),
        inner_(inner),
        width_(h.size(1)),
        activation_(activation),
        interleaved_(interleaved) {}

  // dh [rows, W], in the place of h if it has no `rows`, and ds, and s * A [activation_rows, I]
  // where it is needed.
  void through_activation(const Weights& down_transposed, std::optional<int64_t> rows,
                          std::optional<int64_t> activation_rows) {
    grad_h_ = rows ? empty_large({*rows, width_}, h_.options()) : h_;
    const bool keep_activations = activation_rows.has_value();
    if (keep_activations) activations_ = empty_large({*activation_rows, inner_}, h_.options());
    // Partial sums of ds are over this many columns, whatever the number of threads.
    constexpr int64_t kSummed = 128;
    products_.resize((inner_ + kSummed - 1) / kSummed * order_.used);
    const int64_t step = columns_per_unit(inner_, blocks_, at::get_num_threads(), kSummed);
    const int64_t parts = (inner_ + step - 1) / step;
    T* scaled = keep_activations ? mutable_data<T>(activations_) : nullptr;
    PackedRows<T> packed_rows(down_transposed.k_contiguous(), hidden_);
    const auto& gemm = kernels<GemmKernels<T>>();
    const auto& functions = kernels<ActivationKernels<T>>();
    parallel_units(blocks_.size() * parts, [&](int64_t unit, int thread) {
      const RowBlock& block = blocks_[unit / parts];
      const void* packed = packed_rows.get(thread, unit / parts, block.count,
                                           [&](int64_t i) { return rows_.grad[block.begin + i]; });
      const int64_t first = unit % parts * step, last = std::min(first + step, inner_);
      const int64_t some = columns_together<T>(down_transposed, block.count, step);
      const int64_t together = round_up(some, kSummed);
      for (int64_t begin = first; begin < last; begin += together) {
        const int64_t n = std::min(together, last - begin), stride = sums_stride(n);
        A* tile = static_cast<A*>(thread_scratch(Scratch::kTile, block.count * stride * sizeof(A)));
        gemm.multiply(packed, block.count, hidden_, down_transposed.of<T>(block.expert),
                      Range{begin, begin + n}, tile, stride, false, nullptr);
        for (int64_t i = 0; i < block.count; ++i) {
          const int64_t r = block.begin + i;
          for (int64_t c = begin; c < begin + n; c += kSummed) {
            products_[c / kSummed * order_.used + r] = functions.activation_backward_wide(
                activation_, tile + i * stride + (c - begin), columns(data<T>(h_) + r * width_, c),
                rows_.scales[r], columns(mutable_data<T>(grad_h_) + r * width_, c),
                scaled ? scaled + r * inner_ + c : nullptr, std::min(kSummed, begin + n - c));
          }
        }
      }
    });
  }

  // dh of an earlier call.
  void take_grad_h(const at::Tensor& grad_h) { grad_h_ = grad_h.contiguous(); }

  const at::Tensor& grad_h() const { return grad_h_; }
  const at::Tensor& activations() const { return activations_; }

  // s * A [rows, I] alone.
  void recompute_activations(int64_t rows) {
    activations_ = empty_large({rows, inner_}, h_.options());
    const auto& functions = kernels<ActivationKernels<T>>();
    parallel_rows(order_.used, 4 * inner_ * sizeof(T), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        functions.activation(activation_, mutable_data<T>(activations_) + r * inner_,
                             columns(data<T>(h_) + r * width_, 0), rows_.scales[r], inner_);
      }
    });
  }

  at::Tensor grad_x(const Weights& gate_up_transposed, const at::Tensor& x) const {
    PackedBlocks<T> packed(blocks_, gate_up_transposed.k_contiguous(), width_);
    parallel_units(blocks_.size(), [&](int64_t i, int) {
      packed.store(i, data<T>(grad_h_) + blocks_[i].begin * width_, width_, Range{0, width_});
    });
    const at::Tensor out = at::empty({x.size(0), hidden_}, x.options());
    Combine<T>{blocks_, packed,        gate_up_transposed, nullptr,    order_.slot_to_row(),
               nullptr, order_.tokens, order_.top_k,       order_.used}
        .run(mutable_data<T>(out));
    return out;
  }

  at::Tensor grad_weights(const at::Tensor& down_bias, const at::Tensor& like) const {
    const at::Tensor sums = at::empty(like.sizes(), at::dtype(scalar_type<A>()));
    const int64_t parts = order_.used ? products_.size() / order_.used : 0;
    const auto& functions = kernels<RowKernels<T>>();
    parallel_rows(order_.slots, (down_bias.defined() ? hidden_ * sizeof(T) : 1) + 64,
                  [&](int64_t begin, int64_t end) {
                    for (int64_t r = begin; r < end; ++r) {
                      A sum = 0;
                      for (int64_t p = 0; r < order_.used && p < parts; ++p) {
                        sum += products_[p * order_.used + r];
                      }
                      if (r < order_.used && down_bias.defined()) {
                        const T* bias = data<T>(down_bias) + expert_of(r) * hidden_;
                        sum += functions.dot(rows_.grad[r], bias, hidden_);
                      }
                      mutable_data<A>(sums)[order_.row_to_slot()[r]] = sum;
                    }
                  });
    return sums.to(like.scalar_type());
  }

  at::Tensor grad_gate_up(const at::Tensor& gate_up) const {
    return weight_grad_like(gate_up, rows_.x, pointers(grad_h_));
  }

  at::Tensor grad_down(const at::Tensor& down) const {
    return weight_grad_like(down, pointers(activations_), rows_.grad);
  }

  at::Tensor grad_gate_up_bias(const at::Tensor& bias) const {
    const at::Tensor out = at::empty(bias.sizes(), bias.options());
    bias_grad<T>(out, pointers(grad_h_), nullptr, order_.offsets());
    return out;
  }

  at::Tensor grad_down_bias(const at::Tensor& bias) const {
    const at::Tensor out = at::empty(bias.sizes(), bias.options());
    bias_grad<T>(out, rows_.grad, rows_.scales.data(), order_.offsets());
    return out;
  }

 private:
  // The halves of a row of W columns, from column `begin` of I on.
  template <typename E>
  HalvesOf<E> columns(E* row, int64_t begin) const {
    const bool pairs = activation_.gated() && interleaved_;
    E* gate = row + (pairs ? 2 * begin : begin);
    return {gate, pairs ? gate + 1 : gate + inner_, pairs};
  }

  int64_t expert_of(int64_t row) const {
    const int32_t* offsets = order_.offsets();
    return std::upper_bound(offsets, offsets + order_.experts + 1, row) - offsets - 1;
  }

  std::vector<const T*> pointers(const at::Tensor& rows) const {
    std::vector<const T*> out(order_.used);
    for (int64_t r = 0; r < order_.used; ++r) out[r] = data<T>(rows) + r * rows.size(1);
    return out;
  }

  at::Tensor weight_grad_like(const at::Tensor& weight, const std::vector<const T*>& a,
                              const std::vector<const T*>& grad) const {
    const bool transposed = weight.stride(1) == 1 && weight.stride(2) != 1;
    const at::Tensor out = empty_weight_grad(weight.size(0), weight.size(1), weight.size(2),
                                             transposed, weight.options());
    weight_grad<T>(out, false, a, grad, order_.offsets());
    return out;
  }

  const Order& order_;
  Rows<T> rows_;
  std::vector<RowBlock> blocks_;
  at::Tensor h_;
  int64_t hidden_, inner_, width_;
  ActivationOptions activation_;
  bool interleaved_;
  at::Tensor grad_h_, activations_;  // [R, W] and [R, I], by rows
  std::vector<A> products_;          // [parts, R]: parts of <dA, A>
};

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                             at::Tensor, at::Tensor>;

// What becomes of the gradient of h.
enum class GradH { kDropped, kYielded, kOverwrites };

Gradients gradients(const char* op, const at::Tensor& grad_TH, const at::Tensor& x_TH,
                    const at::Tensor& gate_up, const at::Tensor& down,
                    const at::Tensor& topk_weights, const at::Tensor& h_RW,
                    const at::Tensor& row_to_slot, const at::Tensor& slot_to_row,
                    const at::Tensor& offsets, const std::optional<at::Tensor>& gate_up_bias,
                    const std::optional<at::Tensor>& down_bias, std::string_view activation,
                    bool interleaved, double alpha, double limit, std::array<bool, 6> wanted,
                    const std::optional<at::Tensor>& known_grad_h, GradH fate,
                    bool keep_weighted_a) {
  const Needs needs{wanted[0],
                    wanted[1],
                    wanted[2],
                    wanted[3],
                    wanted[4] && gate_up_bias.has_value(),
                    wanted[5] && down_bias.has_value()};
  const Order order(op, row_to_slot, slot_to_row, offsets);
  TORCH_CHECK_VALUE(order.used <= h_RW.size(0), op,
                    ": h must have at least offsets[E] = ", order.used, " rows; got ",
                    h_RW.sizes());
  TORCH_CHECK_VALUE(!known_grad_h || (known_grad_h->sizes() == h_RW.sizes() &&
                                      known_grad_h->scalar_type() == h_RW.scalar_type()),
                    op, ": grad_h must be as h, ", h_RW.sizes(), "; got ",
                    known_grad_h ? known_grad_h->sizes() : h_RW.sizes());
  TORCH_CHECK_VALUE(!known_grad_h || !needs.weights, op,
                    ": the gradient of topk_weights cannot be computed from grad_h");
  TORCH_CHECK_VALUE(fate != GradH::kOverwrites || h_RW.is_contiguous(), op,
                    ": h, which is overwritten, must be contiguous; got strides ", h_RW.strides());
  const at::Tensor x = with_unit_stride(x_TH), h = h_RW.contiguous();
  const at::Tensor grad = with_unit_stride(grad_TH.to(x.scalar_type()));
  const at::Tensor weights = topk_weights.to(accumulate_dtype(x.scalar_type())).contiguous();
  const at::Tensor bias = down_bias ? down_bias->contiguous() : at::Tensor();
  const ActivationOptions options{parse_activation(op, activation), alpha, limit};
  at::Tensor dx, dgate_up, ddown, dweights, dbias1, dbias2, grad_h, weighted_a;

  dispatch_float(x.scalar_type(), op, [&]<typename T>() {
    Backward<T> backward(order, x, grad, h, weights, down.size(1), options, interleaved);
    if (known_grad_h) backward.take_grad_h(*known_grad_h);
    std::optional<int64_t> activation_rows;
    if (needs.down || keep_weighted_a) activation_rows = keep_weighted_a ? h.size(0) : order.used;
    if (!known_grad_h && (needs.activations() || fate != GradH::kDropped)) {
      std::optional<int64_t> rows = order.used;
      if (fate == GradH::kYielded) rows = h.size(0);
      if (fate == GradH::kOverwrites) rows = {};
      backward.through_activation(Weights(down.mT()), rows, activation_rows);
    } else if (activation_rows) {
      backward.recompute_activations(*activation_rows);
    }
    // An output of the op, which must be no input of it.
    if (fate == GradH::kYielded) {
      grad_h = known_grad_h ? known_grad_h->clone() : backward.grad_h();
    }
    if (keep_weighted_a) weighted_a = backward.activations();
    if (needs.weights) dweights = backward.grad_weights(bias, topk_weights);
    if (needs.x) dx = backward.grad_x(Weights(gate_up.mT()), x);
    if (needs.gate_up) dgate_up = backward.grad_gate_up(gate_up);
    if (needs.down) ddown = backward.grad_down(down);
    if (needs.gate_up_bias) dbias1 = backward.grad_gate_up_bias(*gate_up_bias);
    if (needs.down_bias) dbias2 = backward.grad_down_bias(*down_bias);
  });
  const auto or_empty = [&](const at::Tensor& result) {
    return result.defined() ? result : at::empty({0}, x.options());
  };
  return {or_empty(dx),     or_empty(dgate_up), or_empty(ddown),  or_empty(dweights),
          or_empty(dbias1), or_empty(dbias2),   or_empty(grad_h), or_empty(weighted_a)};
}

Gradients fused_experts_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& down,
    const at::Tensor& topk_weights, const at::Tensor& h, const at::Tensor& row_to_slot,
    const at::Tensor& slot_to_row, const at::Tensor& offsets,
    const std::optional<at::Tensor>& gate_up_bias, const std::optional<at::Tensor>& down_bias,
    std::string_view activation, bool interleaved, double alpha, double limit,
    std::array<bool, 6> wanted, const std::optional<at::Tensor>& known_grad_h, bool keep_grad_h,
    bool keep_weighted_a) {
  return gradients("fused_experts_backward", grad, x, gate_up, down, topk_weights, h, row_to_slot,
                   slot_to_row, offsets, gate_up_bias, down_bias, activation, interleaved, alpha,
                   limit, wanted, known_grad_h, keep_grad_h ? GradH::kYielded : GradH::kDropped,
                   keep_weighted_a);
}

// The same, which leaves the gradient of h in h.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
fused_experts_backward_(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& gate_up,
                        const at::Tensor& down, const at::Tensor& topk_weights, at::Tensor& h,
                        const at::Tensor& row_to_slot, const at::Tensor& slot_to_row,
                        const at::Tensor& offsets, const std::optional<at::Tensor>& gate_up_bias,
                        const std::optional<at::Tensor>& down_bias, std::string_view activation,
                        bool interleaved, double alpha, double limit, std::array<bool, 6> wanted,
                        bool keep_weighted_a) {
  const auto [dx, dgate_up, ddown, dweights, dbias1, dbias2, grad_h, weighted_a] =
      gradients("fused_experts_backward_", grad, x, gate_up, down, topk_weights, h, row_to_slot,
                slot_to_row, offsets, gate_up_bias, down_bias, activation, interleaved, alpha,
                limit, wanted, std::nullopt, GradH::kOverwrites, keep_weighted_a);
  return {dx, dgate_up, ddown, dweights, dbias1, dbias2, weighted_a};
}

// out[e] += a[rows of e]^T grad[rows of e]; of one of them, row r is that of the slot's token.
void fused_experts_wgrad_(const at::Tensor& out_EMN, const at::Tensor& a_in,
                          const at::Tensor& grad_in, const at::Tensor& row_to_slot,
                          const at::Tensor& slot_to_row_TK, const at::Tensor& offsets_E1,
                          bool gather_a) {
  const at::Tensor a = with_unit_stride(a_in), grad = with_unit_stride(grad_in.to(a.scalar_type()));
  const at::Tensor slots = row_to_slot.contiguous(), offsets = offsets_E1.contiguous();
  const at::Tensor &by_token = gather_a ? a : grad, &by_row = gather_a ? grad : a;
  const int64_t used = data<int32_t>(offsets)[offsets.size(0) - 1];
  TORCH_CHECK_VALUE(used <= by_row.size(0) && used <= slots.size(0),
                    "fused_experts_wgrad_: there must be at least offsets[E] = ", used,
                    " rows and slots; got ", by_row.size(0), " and ", slots.size(0));
  const at::ScalarType wide = accumulate_dtype(a.scalar_type());
  const bool direct =
      out_EMN.scalar_type() == wide && (out_EMN.stride(1) == 1 || out_EMN.stride(2) == 1);
  const at::Tensor out = direct ? out_EMN : at::zeros(out_EMN.sizes(), a.options().dtype(wide));
  dispatch_float(a.scalar_type(), "fused_experts_wgrad_", [&]<typename T>() {
    std::vector<const T*> tokens(used), rows(used);
    for (int64_t r = 0; r < used; ++r) {
      const int64_t token = data<int32_t>(slots)[r] / slot_to_row_TK.size(1);
      tokens[r] = data<T>(by_token) + token * by_token.stride(0);
      rows[r] = data<T>(by_row) + r * by_row.stride(0);
    }
    weight_grad<T>(out, true, gather_a ? tokens : rows, gather_a ? rows : tokens,
                   data<int32_t>(offsets));
  });
  if (!direct) out_EMN.add_(out);
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("fused_experts_backward", fused_experts_backward);
  m.impl("fused_experts_backward_", fused_experts_backward_);
  m.impl("fused_experts_wgrad_", fused_experts_wgrad_);
}

}  // namespace moe
