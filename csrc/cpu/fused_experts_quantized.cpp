// The experts of an MoE layer with quantised weights, forward.
//
// T tokens, K experts a token, R rows that belong to an expert, H hidden size, I intermediate size,
// E experts, W = 2 * I columns for gated activations, else I.
//
// Few rows an expert: the weights are multiplied as they are stored, each read once, in two passes
// over units of columns. Many: a unit's columns are written out in x's dtype, and the rest is that
// of fused_experts.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/parallel.h"
#include "cpu/fused_experts.h"
#include "cpu/large_pages.h"

namespace moe {

namespace {

constexpr const char* kOp = "fused_experts_quantized";

// With more rows an expert, on average, writing the weights out costs less than it saves.
constexpr int64_t kFewRows = 16;

Format parse_format(std::string_view name) {
  if (name == "int8") return Format::kInt8;
  if (name == "fp8") return Format::kFp8;
  if (name == "int4") return Format::kInt4;
  if (name == "mxfp4") return Format::kMxfp4;
  TORCH_CHECK_VALUE(false, kOp, ": format must be one of int8, fp8, int4, mxfp4; got \"", name,
                    "\"");
}

QuantizedWeights quantized(const char* name, const at::Tensor& codes, const at::Tensor& scales,
                           Format format, int64_t experts, int64_t inner, int64_t columns) {
  const int64_t tiles = (columns + kTileColumns - 1) / kTileColumns;
  const int64_t groups = (inner + kGroupSize - 1) / kGroupSize;
  const bool grouped = has_group_scales(format);
  const std::vector<int64_t> codes_shape{experts, tiles, groups, grouped ? 4 : 8, kTileColumns, 4};
  const std::vector<int64_t> scales_shape{experts, tiles, grouped ? groups : 1, kTileColumns};
  TORCH_CHECK_VALUE(codes.sizes() == codes_shape && codes.scalar_type() == at::kByte, kOp, ": ",
                    name, " must be uint8 ", at::IntArrayRef(codes_shape), "; got ",
                    codes.scalar_type(), " ", codes.sizes());
  const at::ScalarType dtype = grouped ? at::kBFloat16 : at::kFloat;
  TORCH_CHECK_VALUE(scales.sizes() == scales_shape && scales.scalar_type() == dtype, kOp, ": ",
                    name, "_scales must be ", dtype, " ", at::IntArrayRef(scales_shape), "; got ",
                    scales.scalar_type(), " ", scales.sizes());
  return {codes.contiguous(), scales.contiguous(), format, inner, columns};
}

// Rows of one matrix, packed for products with quantised ones.
template <typename T>
class PackedFewRows {
 public:
  PackedFewRows(Format format, int64_t rows, int64_t k)
      : format_(format),
        size_(
            kernels<QuantizedKernels<T>>().packed_size(format, (k + kGroupSize - 1) / kGroupSize)),
        memory_(at::empty({rows * size_}, at::kByte)) {}

  void store(int64_t row, const float* values, Range part) {
    kernels<QuantizedKernels<T>>().pack(format_, mutable_data<char>(memory_) + row * size_, values,
                                        part.begin / kGroupSize, part.size());
  }

  const void* get(int64_t row) const { return data<char>(memory_) + row * size_; }

 private:
  Format format_;
  int64_t size_;
  at::Tensor memory_;
};

// out + its result = the rows' products with columns `wanted` of an expert's matrix, which begin
// inside of a tile.
template <typename T>
const float* multiply_columns(const QuantizedWeights& b, int64_t expert, const void* const* rows,
                              int64_t m, Range wanted, float* out, int64_t stride) {
  const Range tiles{wanted.begin / kTileColumns, (wanted.end + kTileColumns - 1) / kTileColumns};
  kernels<QuantizedKernels<T>>().multiply(b.of(expert), rows, m, tiles, out, stride);
  return out + wanted.begin % kTileColumns;
}

// Floats from one row of products of `columns` columns to the next, wherever those begin.
int64_t products_stride(int64_t columns) { return round_up(columns, kTileColumns) + kTileColumns; }

template <typename T>
void decode(const QuantizedWeights& gate_up, const QuantizedWeights& down, const Layer& layer,
            const at::Tensor& x, const Sorted& order, const std::vector<RowBlock>& blocks,
            const at::Tensor& topk_weights, const at::Tensor& y) {
  const int64_t tokens = x.size(0), hidden = x.size(1), inner = down.inner;
  const int64_t top_k = order.slot_to_row_TK.size(1);
  const int64_t used = data<int32_t>(order.offsets_E1)[gate_up.experts()];
  const int32_t* row_to_slot = data<int32_t>(order.row_to_slot_R);
  const int32_t* slot_to_row = data<int32_t>(order.slot_to_row_TK);
  const bool gated = layer.activation.gated(), pairs = gated && layer.interleaved;
  const T *gate_up_bias = data_or_null<T>(layer.gate_up_bias),
          *down_bias = data_or_null<T>(layer.down_bias);
  const auto& functions = kernels<RowKernels<T>>();

  PackedFewRows<T> packed_x(gate_up.format, tokens, hidden);
  parallel_rows(tokens, hidden * 16, [&](int64_t begin, int64_t end) {
    float* row = static_cast<float*>(thread_scratch(Scratch::kRows, hidden * sizeof(float)));
    for (int64_t t = begin; t < end; ++t) {
      functions.widen(row, data<T>(x) + t * x.stride(0), hidden);
      packed_x.store(t, row, Range{0, hidden});
    }
  });

  PackedFewRows<T> activated(down.format, used, inner);
  // Units begin at multiples of a group, so that each packs whole ones.
  const int64_t step = columns_per_unit(inner, blocks.size(), 128, kGroupSize);
  const int64_t parts = (inner + step - 1) / step;
  parallel_units(blocks.size() * parts, [&](int64_t unit, int) {
    const RowBlock& block = blocks[unit / parts];
    const Range range{unit % parts * step, std::min((unit % parts + 1) * step, inner)};
    const int64_t n = range.size(), piece = products_stride(pairs ? 2 * n : n);
    const int64_t stride = gated && !pairs ? 2 * piece : piece;
    const void* rows[kRowsPerBlock];
    for (int64_t i = 0; i < block.count; ++i) {
      rows[i] = packed_x.get(row_to_slot[block.begin + i] / top_k);
    }
    float* sums =
        static_cast<float*>(thread_scratch(Scratch::kTile, block.count * stride * sizeof(float)));
    float* values = static_cast<float*>(thread_scratch(Scratch::kNarrowTile, n * sizeof(float)));
    const auto half = [&](Range columns, float* out) {
      float* first = const_cast<float*>(
          multiply_columns<T>(gate_up, block.expert, rows, block.count, columns, out, stride));
      for (int64_t i = 0; gate_up_bias && i < block.count; ++i) {
        const T* bias = gate_up_bias + block.expert * gate_up.columns + columns.begin;
        functions.add_scaled(first + i * stride, bias, 1, columns.size());
      }
      return first;
    };
    const float* gate = half(pairs ? Range{2 * range.begin, 2 * range.end} : range, sums);
    const float* up = pairs ? gate + 1 : gate;
    if (gated && !pairs) up = half(Range{inner + range.begin, inner + range.end}, sums + piece);
    for (int64_t i = 0; i < block.count; ++i) {
      const HalvesOf<const float> halves{gate + i * stride, up + i * stride, pairs};
      kernels<ActivationKernels<float>>().activation(layer.activation, values, halves, 1, n);
      activated.store(block.begin + i, values, range);
    }
  });

  const int64_t columns_step = columns_per_unit(hidden, 1, 128, 32);
  const int64_t stride = products_stride(columns_step);
  const at::Tensor buffer = empty_large({at::get_num_threads(), used, stride}, at::kFloat);
  const float* weights = data<float>(topk_weights);
  parallel_units((hidden + columns_step - 1) / columns_step, [&](int64_t unit, int thread) {
    const Range columns{unit * columns_step, std::min((unit + 1) * columns_step, hidden)};
    const int64_t n = columns.size();
    float* products = mutable_data<float>(buffer) + thread * used * stride;
    for (const RowBlock& block : blocks) {
      const void* rows[kRowsPerBlock];
      for (int64_t i = 0; i < block.count; ++i) rows[i] = activated.get(block.begin + i);
      float* out = products + block.begin * stride;
      multiply_columns<T>(down, block.expert, rows, block.count, columns, out, stride);
      for (int64_t i = 0; down_bias && i < block.count; ++i) {
        const T* bias = down_bias + block.expert * hidden + columns.begin;
        functions.add_scaled(out + i * stride, bias, 1, n);
      }
    }
    std::vector<const float*> mine(top_k);
    std::vector<float> scales(top_k);
    for (int64_t t = 0; t < tokens; ++t) {
      int64_t count = 0;
      for (int64_t s = t * top_k; s < (t + 1) * top_k; ++s) {
        if (slot_to_row[s] >= used) continue;
        mine[count] = products + slot_to_row[s] * stride;
        scales[count++] = weights[s];
      }
      functions.weighted_sum_wide(mutable_data<T>(y) + t * hidden + columns.begin, mine.data(),
                                  scales.data(), count, n);
    }
  });
}

at::Tensor fused_experts_quantized(const at::Tensor& x_TH, const at::Tensor& gate_up_codes,
                                   const at::Tensor& gate_up_scales, const at::Tensor& down_codes,
                                   const at::Tensor& down_scales, const at::Tensor& topk_ids,
                                   const at::Tensor& topk_weights,
                                   const std::optional<at::Tensor>& gate_up_bias,
                                   const std::optional<at::Tensor>& down_bias,
                                   std::string_view gate_up_format, std::string_view down_format,
                                   int64_t inner, std::string_view activation, bool interleaved,
                                   double alpha, double limit) {
  const ActivationOptions options{parse_activation(kOp, activation), alpha, limit};
  const int64_t experts = gate_up_codes.size(0), hidden = x_TH.size(1);
  const QuantizedWeights gate_up =
      quantized("gate_up", gate_up_codes, gate_up_scales, parse_format(gate_up_format), experts,
                hidden, options.gated() ? 2 * inner : inner);
  const QuantizedWeights down =
      quantized("down", down_codes, down_scales, parse_format(down_format), experts, inner, hidden);
  const Layer layer{Weights(gate_up),
                    Weights(down),
                    contiguous_or_undefined(gate_up_bias),
                    contiguous_or_undefined(down_bias),
                    options,
                    interleaved};
  const at::Tensor x = with_unit_stride(x_TH);
  const at::Tensor weights = topk_weights.to(accumulate_dtype(x.scalar_type())).contiguous();
  const Sorted order = sort_slots(kOp, topk_ids, experts);
  const std::vector<RowBlock> blocks = row_blocks(data<int32_t>(order.offsets_E1), experts);
  const int64_t used = data<int32_t>(order.offsets_E1)[experts];
  int64_t hit = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    hit += i == 0 || blocks[i].expert != blocks[i - 1].expert;
  }
  const at::Tensor y = at::empty(x.sizes(), x.options());
  dispatch_float(x.scalar_type(), kOp, [&]<typename T>() {
    if constexpr (!std::is_same_v<T, double>) {
      if (used <= kFewRows * hit) {
        return decode<T>(gate_up, down, layer, x, order, blocks, weights, y);
      }
    }
    run_layer_in_parts<T>(kOp, layer, x, topk_ids, order, weights, y);
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("fused_experts_quantized", fused_experts_quantized);
}

}  // namespace moe
