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
#include "cpu/large_buffers.h"
#include "cpu/order.h"

namespace moe {

namespace {

// The activations of all rows, packed for the second product; h [R, W] is kept if not null.
template <typename T>
void project_up(const Layer& layer, const at::Tensor& x, const Sorted& order, int64_t top_k,
                const std::vector<RowBlock>& blocks, PackedBlocks<T>& out, T* h) {
  using A = acc_t<T>;
  const int64_t inner = layer.inner(), width = layer.width(), hidden = x.size(1);
  const bool gated = layer.activation.gated(), pairs = gated && layer.interleaved;
  const int64_t step = columns_per_unit(inner, blocks, at::get_num_threads(), kPackedTogether);
  const int64_t parts = (inner + step - 1) / step;
  const int32_t* row_to_slot = data<int32_t>(order.row_to_slot_R);
  const T* bias = data_or_null<T>(layer.gate_up_bias);
  PackedRows<T> packed_rows(layer.gate_up.k_contiguous(), hidden);
  const auto& gemm = kernels<GemmKernels<T>>();
  const auto& rows = kernels<RowKernels<T>>();
  const auto& activations = kernels<ActivationKernels<T>>();

  parallel_units(blocks.size() * parts, [&](int64_t unit, int thread) {
    const RowBlock& block = blocks[unit / parts];
    const Range range{unit % parts * step, std::min((unit % parts + 1) * step, inner)};
    const int64_t n = range.size();
    const void* packed = packed_rows.get(thread, unit / parts, block.count, [&](int64_t i) {
      return data<T>(x) + row_to_slot[block.begin + i] / top_k * x.stride(0);
    });
    // The unit's columns of h: one piece, or one of the gate and one of the up half.
    // Halves that follow each other are read faster as one.
    const int64_t piece_stride = round_up(pairs ? 2 * n : n, kOutputColumns);
    const bool whole = gated && (pairs || (n == inner && n == piece_stride));
    std::vector<Range> pieces{whole ? Range{2 * range.begin, 2 * range.end} : range};
    if (gated && !whole) pieces.push_back({inner + range.begin, inner + range.end});
    const int64_t stride = sums_stride(gated && !pairs ? 2 * piece_stride : piece_stride);
    A* tile = static_cast<A*>(thread_scratch(Scratch::kTile, block.count * stride * sizeof(A)));
    T* activated =
        static_cast<T*>(thread_scratch(Scratch::kNarrowTile, block.count * n * sizeof(T)));
    for (size_t p = 0; p < pieces.size(); ++p) {
      const Range& columns = pieces[p];
      A* sums = tile + p * piece_stride;
      gemm.multiply(packed, block.count, hidden, layer.gate_up.of<T>(block.expert), columns, sums,
                    stride, false);
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
    out.store(unit / parts, activated, n, range);
  });
}

}  // namespace

template <typename T>
void run_layer(const Layer& layer, const at::Tensor& x, const Sorted& order,
               const at::Tensor& topk_weights, const at::Tensor& y, const at::Tensor& h) {
  const int64_t tokens = order.slot_to_row_TK.size(0), top_k = order.slot_to_row_TK.size(1);
  const int64_t experts = layer.gate_up.experts();
  const int32_t* offsets = data<int32_t>(order.offsets_E1);
  const std::vector<RowBlock> blocks = row_blocks(offsets, experts);
  PackedBlocks<T> activated(blocks, layer.down.k_contiguous(), layer.inner());
  project_up<T>(layer, x, order, top_k, blocks, activated,
                h.defined() ? mutable_data<T>(h) : nullptr);
  const Combine<T> combine{blocks,
                           activated,
                           layer.down,
                           data_or_null<T>(layer.down_bias),
                           data<int32_t>(order.slot_to_row_TK),
                           data<acc_t<T>>(topk_weights),
                           tokens,
                           top_k,
                           offsets[experts]};
  combine.run(mutable_data<T>(y));
}

#define MOE_INSTANTIATE(T)                                                                      \
  template void run_layer<T>(const Layer&, const at::Tensor&, const Sorted&, const at::Tensor&, \
                             const at::Tensor&, const at::Tensor&);
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
    const std::optional<at::Tensor>& /*down_main_grad*/) {
  constexpr const char* kOp = "fused_experts";
  const Layer layer{Weights(gate_up),
                    Weights(down),
                    contiguous_or_undefined(gate_up_bias),
                    contiguous_or_undefined(down_bias),
                    {parse_activation(kOp, activation), alpha, limit},
                    interleaved};
  const at::Tensor x = with_unit_stride(x_TH);
  const at::Tensor weights = topk_weights.to(accumulate_dtype(x.scalar_type())).contiguous();
  const int64_t tokens = x.size(0), top_k = topk_ids.size(1), experts = gate_up.size(0);
  Sorted order = sort_slots(kOp, topk_ids, experts);
  const int64_t used = data<int32_t>(order.offsets_E1)[experts];
  TORCH_CHECK_VALUE(used <= num_rows, kOp,
                    ": num_rows must be at least the number of ids in [0, E) = ", used, "; got ",
                    num_rows);

  const auto rows = x.options(), index = order.offsets_E1.options();
  const at::Tensor y = at::empty({tokens, x.size(1)}, rows);
  const at::Tensor h = empty_large({save_for_backward ? num_rows : 0, layer.width()}, rows);
  if (save_for_backward && used < num_rows) h.narrow(0, used, num_rows - used).zero_();
  dispatch_float(x.scalar_type(), kOp, [&]<typename T>() {
    if (save_for_backward) return run_layer<T>(layer, x, order, weights, y, h);
    const int64_t step = tokens_at_a_time(experts, top_k);
    if (tokens <= step) return run_layer<T>(layer, x, order, weights, y, {});
    for (int64_t t = 0; t < tokens; t += step) {
      const int64_t n = std::min(step, tokens - t);
      run_layer<T>(layer, x.narrow(0, t, n), sort_slots(kOp, topk_ids.narrow(0, t, n), experts),
                   weights.narrow(0, t, n), y.narrow(0, t, n), {});
    }
  });
  if (!save_for_backward) {
    order = {at::empty({0}, index), at::empty({0, top_k}, index), at::empty({0}, index)};
  }
  return {y, h, order.row_to_slot_R, order.slot_to_row_TK, order.offsets_E1};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) { m.impl("fused_experts", fused_experts); }

}  // namespace moe
