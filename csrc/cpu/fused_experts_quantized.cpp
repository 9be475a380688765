// The experts of an MoE layer with quantised weights, forward.
//
// T tokens, K experts a token, R rows that belong to an expert, H hidden size, I intermediate size,
// E experts, W = 2 * I columns for gated activations, else I.
//
// The weights are multiplied as they are stored, in two passes over units of columns; where experts
// have few rows (decode), each is read once and that is what takes the time. For double, which is
// there to compare with, they are written out, and the rest is that of fused_experts.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>

#include "common/parallel.h"
#include "cpu/fused_experts.h"
#include "cpu/quantized_experts.h"

namespace moe {

namespace {

constexpr const char* kOp = "fused_experts_quantized";

// Matrices of all experts.
struct QuantizedWeights {
  at::Tensor codes, scales;  // contiguous
  Format format;
  int64_t inner, columns;

  int64_t experts() const { return codes.size(0); }
  int64_t groups() const { return codes.size(2); }

  QuantizedMatrix of(int64_t expert) const {
    return {data<uint8_t>(codes) + expert * codes.stride(0),
            data<char>(scales) + expert * scales.stride(0) * scales.element_size(), format,
            groups()};
  }
};

QuantizedWeights quantized(const char* name, const at::Tensor& codes, const at::Tensor& scales,
                           Format format, int64_t experts, int64_t inner, int64_t columns) {
  const CodeShapes shapes = code_shapes(format, experts, inner, columns);
  const at::IntArrayRef codes_shape = shapes.codes, scales_shape = shapes.scales;
  TORCH_CHECK_VALUE(codes.sizes() == codes_shape && codes.scalar_type() == at::kByte, kOp, ": ",
                    name, " must be uint8 ", codes_shape, "; got ", codes.scalar_type(), " ",
                    codes.sizes());
  const at::ScalarType dtype = has_group_scales(format) ? at::kBFloat16 : at::kFloat;
  TORCH_CHECK_VALUE(scales.sizes() == scales_shape && scales.scalar_type() == dtype, kOp, ": ",
                    name, "_scales must be ", dtype, " ", scales_shape, "; got ",
                    scales.scalar_type(), " ", scales.sizes());
  return {codes.contiguous(), scales.contiguous(), format, inner, columns};
}

double code_value(Format format, uint8_t byte, bool high) {
  constexpr double kE2m1[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  const int nibble = high ? byte >> 4 : byte & 15;
  switch (format) {
    case Format::kInt8:
      return byte - 128;
    case Format::kFp8:  // no subnormal numbers
      return (byte & 0x80 ? -1 : 1) *
             (byte & 0x7f ? std::ldexp(8 + (byte & 7), (byte >> 3 & 15) - 10) : 0.0);
    case Format::kInt4:
      return nibble - 8;
    default:
      return nibble & 8 ? -kE2m1[nibble & 7] : kE2m1[nibble];
  }
}

// [E, Kd, N] in double.
at::Tensor written_out(const QuantizedWeights& b) {
  const at::Tensor out = at::empty({b.experts(), b.inner, b.columns}, at::kDouble);
  const bool grouped = has_group_scales(b.format);
  parallel_units(b.experts() * b.inner, [&](int64_t unit, int) {
    const int64_t e = unit / b.inner, k = unit % b.inner, group = k / kGroupSize;
    const int64_t i = k % kGroupSize, step = grouped ? i / 8 : i / 4;
    const QuantizedMatrix matrix = b.of(e);
    for (int64_t n = 0; n < b.columns; ++n) {
      const int64_t tile = n / kTileColumns, column = n % kTileColumns;
      const uint8_t* codes = matrix.codes + (tile * b.groups() + group) * matrix.group_bytes();
      const uint8_t byte = codes[(step * kTileColumns + column) * 4 + i % 4];
      float scale;
      if (grouped) {
        const bf16* scales = static_cast<const bf16*>(matrix.scales);
        const bf16 rounded = scales[(tile * b.groups() + group) * kTileColumns + column];
        const uint32_t bits = static_cast<uint32_t>(rounded.bits) << 16;
        std::memcpy(&scale, &bits, sizeof(scale));
      } else {
        scale = static_cast<const float*>(matrix.scales)[n];
      }
      mutable_data<double>(out)[unit * b.columns + n] =
          code_value(b.format, byte, i % 8 >= 4) * scale;
    }
  });
  return out;
}

// The first tile of columns that begin at `column`, of an expert's matrix.
const uint8_t* first_tile(const QuantizedWeights& b, int64_t expert, int64_t column) {
  return b.of(expert).tile(column / kTileColumns);
}

// Rows of one matrix, packed for products with quantised ones.
template <typename T>
class PackedForQuantized {
 public:
  PackedForQuantized(Format format, int64_t rows, int64_t k)
      : format_(format),
        size_(
            kernels<QuantizedKernels<T>>().packed_size(format, (k + kGroupSize - 1) / kGroupSize)),
        memory_(rows * size_) {}

  void store(int64_t row, const float* values, Range part) {
    kernels<QuantizedKernels<T>>().pack(format_, memory_.data() + row * size_, values,
                                        part.begin / kGroupSize, part.size());
  }

  const void* get(int64_t row) const { return memory_.data() + row * size_; }

 private:
  Format format_;
  int64_t size_;
  LocalArray<char> memory_;
};

// out + its result = the rows' products with columns `wanted` of an expert's matrix, which begin
// inside of a tile.
template <typename T>
const float* multiply_columns(const QuantizedWeights& b, int64_t expert, const void* const* rows,
                              int64_t m, Range wanted, const uint8_t* next, float* out,
                              int64_t stride) {
  const Range tiles{wanted.begin / kTileColumns, (wanted.end + kTileColumns - 1) / kTileColumns};
  kernels<QuantizedKernels<T>>().multiply(b.of(expert), rows, m, tiles, next, out, stride);
  return out + wanted.begin % kTileColumns;
}

// Floats from one row of products of `columns` columns to the next, wherever those begin.
int64_t products_stride(int64_t columns) { return round_up(columns, kTileColumns) + kTileColumns; }

// y[t] = sum over k, in order, of weights[t, k] * (row[slot_to_row[t, k]] @ b[e] + bias[e]).
template <typename T>
struct CombineQuantized {
  std::span<const RowBlock> blocks;
  const PackedForQuantized<T>& rows;
  const QuantizedWeights& b;   // [E, k, H]
  const T* bias;               // [E, H] or null
  const int32_t* slot_to_row;  // [T, K]
  const float* topk_weights;   // [T, K]
  int64_t tokens, top_k, used;

  int64_t hidden() const { return b.columns; }

  void run(T* y) const;  // [T, H]

  // In units of `step` columns of all rows, each with products of its own: nobody waits.
  void run_apart(T* y, int64_t step) const;

  // `span` columns at a time, whose products threads share.
  void run_together(T* y, int64_t span) const;

  // Columns of a block's products; next is read ahead.
  void multiply(const RowBlock& block, Range columns, const uint8_t* next, float* out,
                int64_t stride) const;

  // The columns of y of some tokens, from products of all rows.
  void sum(Range some, Range columns, const float* products, int64_t stride, T* y) const;
};

template <typename T>
void CombineQuantized<T>::run(T* y) const {
  // As many columns as leave the products of all rows in the cache: fewer pieces are read faster.
  constexpr int64_t kProducts = 1 << 15, kLeast = 128;
  constexpr int64_t kMostProducts = 1 << 24;  // of all threads
  Costs all;
  all.add(used);
  const int64_t threads = at::get_num_threads(), rows_used = std::max<int64_t>(used, 1);
  const int64_t most = std::max(kProducts / rows_used, kLeast);
  const int64_t step = columns_per_unit(hidden(), all, threads, most, 32);
  const int64_t parts = (hidden() + step - 1) / step;
  if (std::min(parts, threads) * used * products_stride(step) <= kMostProducts) {
    return run_apart(y, step);
  }
  run_together(y, std::max<int64_t>(kMostProducts / rows_used / 32 * 32, 256));
}

template <typename T>
void CombineQuantized<T>::run_apart(T* y, int64_t step) const {
  const int64_t threads = at::get_num_threads(), parts = (hidden() + step - 1) / step;
  const int64_t stride = products_stride(step);
  const LocalArray<float> buffer(std::min(parts, threads) * used * stride);
  parallel_units(parts, [&](int64_t unit, int thread) {
    const Range columns{unit * step, std::min((unit + 1) * step, hidden())};
    float* products = buffer.data() + thread * used * stride;
    for (size_t i = 0; i < blocks.size(); ++i) {
      const uint8_t* next =
          i + 1 < blocks.size()
              ? first_tile(b, blocks[i + 1].expert, columns.begin)
              : first_tile(b, blocks[0].expert, std::min((unit + threads) * step, hidden() - 1));
      multiply(blocks[i], columns, next, products + blocks[i].begin * stride, stride);
    }
    sum(Range{0, tokens}, columns, products, stride, y);
  });
}

template <typename T>
void CombineQuantized<T>::run_together(T* y, int64_t span) const {
  const int64_t threads = at::get_num_threads();
  const int64_t stride = products_stride(std::min(span, hidden()));
  const LocalArray<float> buffer(used * stride);
  float* products = buffer.data();
  for (int64_t begin = 0; begin < hidden(); begin += span) {
    const Range columns{begin, std::min(begin + span, hidden())};
    const int64_t step = columns_per_unit(columns.size(), blocks, threads, 32);
    const int64_t parts = (columns.size() + step - 1) / step, units = blocks.size() * parts;
    const auto first = [&](int64_t unit) { return begin + unit % parts * step; };
    parallel_units(units, [&](int64_t unit, int) {
      const RowBlock& block = blocks[unit / parts];
      const Range part{first(unit), std::min(first(unit) + step, columns.end)};
      const int64_t later = std::min(unit + threads, units - 1);  // most likely this thread's
      multiply(block, part, first_tile(b, blocks[later / parts].expert, first(later)),
               products + block.begin * stride + (part.begin - begin), stride);
    });
    parallel_rows(tokens, top_k * columns.size() * sizeof(float), [&](int64_t t, int64_t end) {
      sum(Range{t, end}, columns, products, stride, y);
    });
  }
}

template <typename T>
void CombineQuantized<T>::multiply(const RowBlock& block, Range columns, const uint8_t* next,
                                   float* out, int64_t stride) const {
  const void* packed[kRowsPerBlock];
  for (int64_t i = 0; i < block.count; ++i) packed[i] = rows.get(block.begin + i);
  multiply_columns<T>(b, block.expert, packed, block.count, columns, next, out, stride);
  for (int64_t i = 0; bias && i < block.count; ++i) {
    kernels<RowKernels<T>>().add_scaled(
        out + i * stride, bias + block.expert * hidden() + columns.begin, 1, columns.size());
  }
}

template <typename T>
void CombineQuantized<T>::sum(Range some, Range columns, const float* products, int64_t stride,
                              T* y) const {
  const auto& functions = kernels<RowKernels<T>>();
  const LocalArray<const float*> mine(top_k);
  const LocalArray<float> scales(top_k);
  for (int64_t t = some.begin; t < some.end; ++t) {
    int64_t count = 0;
    for (int64_t s = t * top_k; s < (t + 1) * top_k; ++s) {
      if (slot_to_row[s] >= used) continue;
      mine[count] = products + slot_to_row[s] * stride;
      scales[count++] = topk_weights[s];
    }
    functions.weighted_sum_wide(y + t * hidden() + columns.begin, mine.data(), scales.data(), count,
                                columns.size());
  }
}

struct QuantizedLayer {
  QuantizedWeights gate_up, down;
  at::Tensor gate_up_bias, down_bias;  // contiguous, or undefined
  ActivationOptions activation;
  bool interleaved;
};

template <typename T>
void run_quantized(const QuantizedLayer& layer, const at::Tensor& x, const OrderView& order,
                   const float* topk_weights, T* y) {
  const QuantizedWeights &gate_up = layer.gate_up, &down = layer.down;
  const RowBlocks blocks(order, kRowsPerBlock);
  const int64_t tokens = order.tokens, hidden = x.size(1), inner = down.inner;
  const int64_t top_k = order.top_k, used = order.used();
  const bool gated = layer.activation.gated(), pairs = gated && layer.interleaved;
  const T *gate_up_bias = data_or_null<T>(layer.gate_up_bias),
          *down_bias = data_or_null<T>(layer.down_bias);
  const auto& functions = kernels<RowKernels<T>>();

  PackedForQuantized<T> packed_x(gate_up.format, tokens, hidden);
  parallel_rows(tokens, hidden * 16, [&](int64_t begin, int64_t end) {
    float* row = static_cast<float*>(thread_scratch(Scratch::kRows, hidden * sizeof(float)));
    for (int64_t t = begin; t < end; ++t) {
      functions.widen(row, data<T>(x) + t * x.stride(0), hidden);
      packed_x.store(t, row, Range{0, hidden});
    }
  });

  PackedForQuantized<T> activated(down.format, used, inner);
  // Units begin at multiples of a group, so that each packs whole ones.
  const int64_t threads = at::get_num_threads();
  const int64_t step = columns_per_unit(inner, blocks, threads, kGroupSize);
  const int64_t parts = (inner + step - 1) / step, units = blocks.size() * parts;
  parallel_units(units, [&](int64_t unit, int) {
    const RowBlock& block = blocks[unit / parts];
    const int64_t later = std::min(unit + threads, units - 1);  // most likely this thread's
    const uint8_t* next =
        first_tile(gate_up, blocks[later / parts].expert, later % parts * step * (pairs ? 2 : 1));
    const Range range{unit % parts * step, std::min((unit % parts + 1) * step, inner)};
    const int64_t n = range.size(), piece = products_stride(pairs ? 2 * n : n);
    const int64_t stride = gated && !pairs ? 2 * piece : piece;
    const void* rows[kRowsPerBlock];
    for (int64_t i = 0; i < block.count; ++i) {
      rows[i] = packed_x.get(order.row_to_slot[block.begin + i] / top_k);
    }
    float* sums =
        static_cast<float*>(thread_scratch(Scratch::kTile, block.count * stride * sizeof(float)));
    float* values = static_cast<float*>(thread_scratch(Scratch::kNarrowTile, n * sizeof(float)));
    const auto half = [&](Range columns, const uint8_t* after, float* out) {
      float* first = const_cast<float*>(multiply_columns<T>(
          gate_up, block.expert, rows, block.count, columns, after, out, stride));
      for (int64_t i = 0; gate_up_bias && i < block.count; ++i) {
        const T* bias = gate_up_bias + block.expert * gate_up.columns + columns.begin;
        functions.add_scaled(first + i * stride, bias, 1, columns.size());
      }
      return first;
    };
    const Range second{inner + range.begin, inner + range.end};
    const bool halves_apart = gated && !pairs;
    const float* gate =
        half(pairs ? Range{2 * range.begin, 2 * range.end} : range,
             halves_apart ? first_tile(gate_up, block.expert, second.begin) : next, sums);
    const float* up = pairs ? gate + 1 : gate;
    if (halves_apart) up = half(second, next, sums + piece);
    for (int64_t i = 0; i < block.count; ++i) {
      const HalvesOf<const float> halves{gate + i * stride, up + i * stride, pairs};
      kernels<ActivationKernels<float>>().activation(layer.activation, values, halves, 1, n);
      activated.store(block.begin + i, values, range);
    }
  });

  CombineQuantized<T>{blocks,       activated, down,  down_bias, order.slot_to_row,
                      topk_weights, tokens,    top_k, used}
      .run(y);
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
      quantized("gate_up", gate_up_codes, gate_up_scales, parse_format(kOp, gate_up_format),
                experts, hidden, options.gated() ? 2 * inner : inner);
  const QuantizedWeights down = quantized("down", down_codes, down_scales,
                                          parse_format(kOp, down_format), experts, inner, hidden);
  const at::Tensor first_bias = contiguous_or_undefined(gate_up_bias),
                   second_bias = contiguous_or_undefined(down_bias);
  const at::Tensor x = with_unit_stride(x_TH);
  const at::Tensor y = at::empty(x.sizes(), x.options());
  // Before anything is written: an id that is out of range raises.
  const LocalOrder all(kOp, topk_ids, experts);
  dispatch_float(x.scalar_type(), kOp, [&]<typename T>() {
    using A = acc_t<T>;
    const auto in_parts = [&](const auto& run) {
      run_in_parts<T>(kOp, x, all.view(), topk_ids, topk_weights, y, run);
    };
    if constexpr (std::is_same_v<T, double>) {
      const Layer layer{Weights(written_out(gate_up)),
                        Weights(written_out(down)),
                        first_bias,
                        second_bias,
                        options,
                        interleaved};
      in_parts([&](const at::Tensor& part, const OrderView& order, const A* weights, T* out) {
        run_layer<T>(layer, part, order, weights, out, nullptr);
      });
    } else {
      const QuantizedLayer layer{gate_up, down, first_bias, second_bias, options, interleaved};
      in_parts([&](const at::Tensor& part, const OrderView& order, const A* weights, T* out) {
        run_quantized<T>(layer, part, order, weights, out);
      });
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("fused_experts_quantized", fused_experts_quantized);
}

}  // namespace moe
