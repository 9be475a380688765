// The experts of an MoE layer, forward.
//
// T tokens, K experts a token, R rows that belong to an expert, H hidden size, I intermediate size,
// E experts, W = 2 * I columns for gated activations, else I.
//
// First the rows of x, gathered as they are packed, times gate_up, in units of a row block and some
// columns of I; the activation is applied to a unit's sums while they are in the cache. Then
// Combine.
#include "cpu/fused_experts.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/parallel.h"
#include "cpu/order.h"

namespace moe {

namespace {

constexpr const char* kExperts = "fused_experts";

float number(bf16 value) { return c10::BFloat16(value.bits, c10::BFloat16::from_bits()); }
float number(fp16 value) { return c10::Half(value.bits, c10::Half::from_bits()); }
float number(float value) { return value; }
double number(double value) { return value; }

// The activations of all rows, packed for the second product; h [R, W] is kept if not null.
template <typename T>
void project_up(const Layer& layer, const at::Tensor& x, const OrderView& order,
                std::span<const RowBlock> blocks, PackedBlocks<T>& out, T* h) {
  using A = acc_t<T>;
  const int64_t inner = layer.inner(), width = layer.width(), hidden = x.size(1);
  const bool gated = layer.activation.gated(), pairs = gated && layer.interleaved;
  const int64_t step = columns_per_unit(inner, blocks, at::get_num_threads(), kPackedTogether);
  const int64_t parts = (inner + step - 1) / step;
  const T* bias = data_or_null<T>(layer.gate_up_bias);
  PackedRows<T> packed_rows(layer.gate_up.k_contiguous(), hidden);
  const auto& gemm = kernels<GemmKernels<T>>();
  const auto& rows = kernels<RowKernels<T>>();
  const auto& activations = kernels<ActivationKernels<T>>();

  // Columns `range` of the activations of a block, from its rows, which are packed.
  const auto project = [&](int64_t number, const void* packed, Range range) {
    const RowBlock& block = blocks[number];
    const MatrixOf<T> matrix = layer.gate_up.of<T>(block.expert);
    const int64_t n = range.size();
    // Its columns of h: one piece, or one of the gate and one of the up half.
    // Halves that follow each other are read faster as one.
    const int64_t piece_stride = round_up(pairs ? 2 * n : n, kOutputColumns);
    const bool whole = gated && (pairs || (n == inner && n == piece_stride));
    const Range pieces[]{whole ? Range{2 * range.begin, 2 * range.end} : range,
                         {inner + range.begin, inner + range.end}};
    const int count = gated && !whole ? 2 : 1;
    const int64_t stride = sums_stride(gated && !pairs ? 2 * piece_stride : piece_stride);
    A* tile = static_cast<A*>(thread_scratch(Scratch::kTile, block.count * stride * sizeof(A)));
    T* activated =
        static_cast<T*>(thread_scratch(Scratch::kNarrowTile, block.count * n * sizeof(T)));
    for (int p = 0; p < count; ++p) {
      const Range& columns = pieces[p];
      A* sums = tile + p * piece_stride;
      // Between the halves, and back to the gate for what follows.
      const int64_t after = p + 1 < count ? pieces[1].begin : pieces[0].end;
      const bool ends = p + 1 == count && range.end == inner;
      gemm.multiply(packed, block.count, hidden, matrix, columns, sums, stride, false,
                    ends ? nullptr : matrix.data + after * matrix.stride_n);
      for (int64_t i = 0; i < block.count; ++i) {
        A* row = sums + i * stride;
        if (bias) {
          rows.add_scaled(row, bias + block.expert * width + columns.begin, A(1), columns.size());
        }
        if (h) rows.narrow(h + (block.begin + i) * width + columns.begin, row, columns.size());
      }
    }
    for (int64_t i = 0; i < block.count; ++i) {
      const A* row = tile + i * stride;
      const HalvesOf<const A> halves{row, pairs ? row + 1 : row + piece_stride, pairs};
      activations.activation_wide(layer.activation, activated + i * n, halves, A(1), n);
    }
    out.store(number, activated, n, range);
  };
  parallel_units(blocks.size() * parts, [&](int64_t unit, int thread) {
    const RowBlock& block = blocks[unit / parts];
    const void* packed = packed_rows.get(thread, unit / parts, block.count, [&](int64_t i) {
      return data<T>(x) + order.row_to_slot[block.begin + i] / order.top_k * x.stride(0);
    });
    const int64_t begin = unit % parts * step, end = std::min(begin + step, inner);
    const int64_t together = columns_together<T>(layer.gate_up, block.count, step);
    for (int64_t c = begin; c < end; c += together) {
      project(unit / parts, packed, Range{c, std::min(c + together, end)});
    }
  });
}

}  // namespace

template <typename A>
RoutingWeights<A>::RoutingWeights(const at::Tensor& topk_weights)
    : copy_(is_as_wanted(topk_weights) ? 0 : topk_weights.numel()), data_(copy_.data()) {
  if (is_as_wanted(topk_weights)) {
    data_ = moe::data<A>(topk_weights);
    return;
  }
  const int64_t tokens = topk_weights.size(0), top_k = topk_weights.size(1);
  dispatch_float(topk_weights.scalar_type(), "topk_weights", [&]<typename T>() {
    const T* const weights = moe::data<T>(topk_weights);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t k = 0; k < top_k; ++k) {
        copy_[t * top_k + k] = static_cast<A>(
            number(weights[t * topk_weights.stride(0) + k * topk_weights.stride(1)]));
      }
    }
  });
}

template class RoutingWeights<float>;
template class RoutingWeights<double>;

template <typename T>
void run_layer(const Layer& layer, const at::Tensor& x, const OrderView& order,
               const acc_t<T>* topk_weights, T* y, T* h) {
  const RowBlocks blocks(order, kernels<GemmKernels<T>>().rows_together);
  PackedBlocks<T> activated(blocks, layer.down.k_contiguous(), layer.inner());
  project_up<T>(layer, x, order, blocks, activated, h);
  const Combine<T> combine{blocks,
                           activated,
                           layer.down,
                           data_or_null<T>(layer.down_bias),
                           order.slot_to_row,
                           topk_weights,
                           order.tokens,
                           order.top_k,
                           order.used()};
  combine.run(y);
}

#define MOE_INSTANTIATE(T)                                                                       \
  template void run_layer<T>(const Layer&, const at::Tensor&, const OrderView&, const acc_t<T>*, \
                             T*, T*);
MOE_INSTANTIATE(bf16)
MOE_INSTANTIATE(fp16)
MOE_INSTANTIATE(float)
MOE_INSTANTIATE(double)
#undef MOE_INSTANTIATE

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> fused_experts(
    const at::Tensor& x_TH, const at::Tensor& gate_up, const at::Tensor& down,
    const at::Tensor& topk_ids, const at::Tensor& topk_weights,
    const std::optional<at::Tensor>& gate_up_bias, const std::optional<at::Tensor>& down_bias,
    std::string_view activation, bool interleaved, double alpha, double limit, int64_t num_rows,
    bool save_for_backward, const std::optional<at::Tensor>& /*gate_up_main_grad*/,
    const std::optional<at::Tensor>& /*down_main_grad*/, bool /*owns_h*/) {
  const Layer layer{Weights(gate_up),
                    Weights(down),
                    contiguous_or_undefined(gate_up_bias),
                    contiguous_or_undefined(down_bias),
                    {parse_activation(kExperts, activation), alpha, limit},
                    interleaved};
  const at::Tensor x = with_unit_stride(x_TH);
  const int64_t experts = gate_up.size(0);
  const auto rows = x.options(), index = topk_ids.options().dtype(at::kInt);
  const auto check_rows = [&](const OrderView& order) {
    TORCH_CHECK_VALUE(order.used() <= num_rows, kExperts,
                      ": num_rows must be at least the number of ids in [0, E) = ", order.used(),
                      "; got ", num_rows);
  };
  if (!save_for_backward) {
    const LocalOrder order(kExperts, topk_ids, experts);
    check_rows(order.view());
    const at::Tensor y = at::empty({x.size(0), x.size(1)}, rows);
    dispatch_float(x.scalar_type(), kExperts, [&]<typename T>() {
      run_in_parts<T>(kExperts, x, order.view(), topk_ids, topk_weights, y,
                      [&](const at::Tensor& part, const OrderView& some, const acc_t<T>* weights,
                          T* out) { run_layer<T>(layer, part, some, weights, out, nullptr); });
    });
    return {y, at::empty({0, layer.width()}, rows), at::empty({0}, index),
            at::empty({0, topk_ids.size(1)}, index), at::empty({0}, index)};
  }
  const Sorted order = sort_slots(kExperts, topk_ids, experts);
  check_rows(order.view());
  const int64_t used = order.view().used();
  const at::Tensor y = at::empty({x.size(0), x.size(1)}, rows);
  const at::Tensor h = empty_large({num_rows, layer.width()}, rows);
  if (used < num_rows) h.narrow(0, used, num_rows - used).zero_();
  dispatch_float(x.scalar_type(), kExperts, [&]<typename T>() {
    const RoutingWeights<acc_t<T>> weights(topk_weights);
    run_layer(layer, x, order.view(), weights.data(), mutable_data<T>(y), mutable_data<T>(h));
  });
  return {y, h, order.row_to_slot_R, order.slot_to_row_TK, order.offsets_E1};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) { m.impl("fused_experts", fused_experts); }

}  // namespace moe
