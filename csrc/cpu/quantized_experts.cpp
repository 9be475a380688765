// Expert weights in 8 or 4 bits: made from weights, or from the mxfp4 of a checkpoint.
//
// E experts, Kd contracted size, N columns, G groups of 32 along Kd. Where codes and scales lie:
// moe_kernels.reference.quantized_experts.
#include "cpu/quantized_experts.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <tuple>

#include "common/dtypes.h"
#include "common/parallel.h"
#include "cpu/kernel_table.h"

namespace moe {

std::optional<Format> find_format(std::string_view name) {
  if (name == "int8") return Format::kInt8;
  if (name == "fp8") return Format::kFp8;
  if (name == "int4") return Format::kInt4;
  if (name == "mxfp4") return Format::kMxfp4;
  return std::nullopt;
}

Format parse_format(const char* op, std::string_view name) {
  const std::optional<Format> format = find_format(name);
  TORCH_CHECK_VALUE(format, op, ": format must be one of int8, fp8, int4, mxfp4; got \"", name,
                    "\"");
  return *format;
}

CodeShapes code_shapes(Format format, int64_t experts, int64_t inner, int64_t columns) {
  const bool grouped = has_group_scales(format);
  const int64_t tiles = (columns + kTileColumns - 1) / kTileColumns;
  const int64_t groups = (inner + kGroupSize - 1) / kGroupSize;
  return {{experts, tiles, groups, grouped ? 4 : 8, kTileColumns, 4},
          {experts, tiles, grouped ? groups : 1, kTileColumns}};
}

namespace {

using Pair = std::tuple<at::Tensor, at::Tensor>;

Pair empty_codes(Format format, int64_t experts, int64_t inner, int64_t columns) {
  const CodeShapes shapes = code_shapes(format, experts, inner, columns);
  return {at::empty(shapes.codes, at::kByte),
          at::empty(shapes.scales, has_group_scales(format) ? at::kBFloat16 : at::kFloat)};
}

void lower(std::atomic<int64_t>& least, int64_t value) {
  int64_t found = least.load();
  while (value < found && !least.compare_exchange_weak(found, value)) {
  }
}

Pair quantize_experts(const at::Tensor& weight_EKN, std::string_view format_name) {
  constexpr const char* kOp = "quantize_experts";
  const Format format = parse_format(kOp, format_name);
  const int64_t experts = weight_EKN.size(0), k = weight_EKN.size(1), n = weight_EKN.size(2);
  const auto [codes, scales] = empty_codes(format, experts, k, n);
  const int64_t tiles = codes.size(1), scale_bytes = scales.element_size();
  const int64_t step = kTilesPerUnit, parts = (tiles + step - 1) / step;
  std::atomic<int64_t> first_bad{experts};
  dispatch_float(weight_EKN.scalar_type(), kOp, [&]<typename T>() {
    parallel_units(experts * parts, [&](int64_t unit, int) {
      const int64_t e = unit / parts, tile = unit % parts * step;
      const StridedMatrix<T> matrix{data<T>(weight_EKN) + e * weight_EKN.stride(0),
                                    weight_EKN.stride(1), weight_EKN.stride(2), k, n};
      const bool finite = kernels<QuantizingKernels<T>>().quantize(
          format, matrix, {tile, std::min(tile + step, tiles)},
          mutable_data<uint8_t>(codes) + e * codes.stride(0) + tile * codes.stride(1),
          mutable_data<char>(scales) +
              (e * scales.stride(0) + tile * scales.stride(1)) * scale_bytes);
      if (!finite) lower(first_bad, e);
    });
  });
  TORCH_CHECK_VALUE(first_bad == experts, kOp, ": weight must be finite in float32; expert ",
                    first_bad.load(), " is not");
  return {codes, scales};
}

// Two codes a byte in order, (0, 1) (2, 3) (4, 5) (6, 7), as (0, 4) (1, 5) (2, 6) (3, 7).
void pair_with_fourth_next(uint8_t* out, const uint8_t* in) {
  for (int i = 0; i < 2; ++i) {
    out[2 * i] = (in[i] & 15) | in[i + 2] << 4;
    out[2 * i + 1] = in[i] >> 4 | (in[i + 2] & 0xf0);
  }
}

// The bits of bfloat16 of two to the value less 127: a subnormal number if that is 0.
uint16_t power_of_two(uint8_t e8m0) { return e8m0 == 0 ? 0x40 : e8m0 << 7; }

Pair experts_from_mxfp4(const at::Tensor& blocks_ENG16, const at::Tensor& scales_ENG) {
  const at::Tensor blocks = blocks_ENG16.contiguous(), exponents = scales_ENG.contiguous();
  const int64_t experts = blocks.size(0), columns = blocks.size(1), groups = blocks.size(2);
  TORCH_CHECK_VALUE(blocks.dim() == 4 && blocks.size(3) == kGroupSize / 2 &&
                        exponents.sizes() == blocks.sizes().slice(0, 3),
                    "experts_from_mxfp4: blocks must be [E, N, G, 16] and scales [E, N, G]; got ",
                    blocks.sizes(), " and ", exponents.sizes());
  const auto [codes, scales] = empty_codes(Format::kMxfp4, experts, groups * kGroupSize, columns);
  const int64_t tiles = codes.size(1), group_bytes = codes.stride(2);
  parallel_units(experts * tiles, [&](int64_t unit, int) {
    const int64_t e = unit / tiles, first = unit % tiles * kTileColumns;
    uint8_t* const tile = mutable_data<uint8_t>(codes) + unit * codes.stride(1);
    uint16_t* const powers = mutable_data<uint16_t>(scales) + unit * scales.stride(1);
    for (int64_t c = 0; c < kTileColumns; ++c) {
      const bool exists = first + c < columns;
      const int64_t column = e * columns + first + c;
      const uint8_t* const from = data<uint8_t>(blocks) + column * blocks.stride(1);
      const uint8_t* const exponent = data<uint8_t>(exponents) + column * groups;
      for (int64_t g = 0; g < groups; ++g) {
        powers[g * kTileColumns + c] = exists ? power_of_two(exponent[g]) : 0;
        for (int64_t i = 0; i < kGroupSize / 8; ++i) {
          uint8_t* const out = tile + g * group_bytes + (i * kTileColumns + c) * 4;
          if (exists) {
            pair_with_fourth_next(out, from + g * kGroupSize / 2 + 4 * i);
          } else {
            std::memset(out, 0, 4);
          }
        }
      }
    }
  });
  return {codes, scales};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("quantize_experts", quantize_experts);
  m.impl("experts_from_mxfp4", experts_from_mxfp4);
}

}  // namespace moe
