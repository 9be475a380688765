// float8 values with a float32 scale for each block: of a row, or of a matrix.
//
// T tokens, K experts a token, R rows, E experts, Kd contracted size, N columns; blocks of `block`
// along Kd and N.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>

#include "common/parallel.h"
#include "cpu/float8.h"
#include "cpu/grouped.h"
#include "cpu/order.h"

namespace moe {

namespace {

constexpr int64_t kMostBlock = 128;

void check_arguments(const char* op, at::ScalarType dtype, int64_t block) {
  TORCH_CHECK_TYPE(dtype == at::kFloat8_e4m3fn, op, ": dtype must be float8_e4m3fn; got ", dtype);
  TORCH_CHECK_VALUE(block > 0 && block <= kMostBlock, op, ": block must be 32, 64 or 128; got ",
                    block);
}

// The largest magnitude of n numbers; NaN if one of them is not finite.
template <typename A>
A largest_magnitude(const A* values, int64_t n) {
  A largest = 0, odd = 0;
  for (int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, std::abs(values[i]));
    odd += values[i] - values[i];  // 0, or NaN
  }
  return largest + odd;
}

// The scale of a block with that largest magnitude: the next power of two up, if asked for.
template <typename A>
float block_scale(A largest, bool power_of_two) {
  constexpr float kSmallest = std::numeric_limits<float>::min();
  constexpr uint32_t kExponent = 0x7F800000, kMantissa = 0x007FFFFF;
  if (largest == 0) return 0;
  float scale = static_cast<float>(largest / A(448));
  if (!std::isfinite(scale)) return std::numeric_limits<float>::quiet_NaN();
  scale = std::max(scale, kSmallest);
  if (power_of_two) {
    uint32_t bits;
    std::memcpy(&bits, &scale, sizeof(bits));
    bits = (bits + kMantissa) & kExponent;
    std::memcpy(&scale, &bits, sizeof(bits));
  }
  return std::isfinite(scale) ? scale : std::numeric_limits<float>::quiet_NaN();
}

template <typename A>
A reciprocal(float scale) {
  return scale == 0 ? A(0) : A(1) / static_cast<A>(scale);
}

template <typename A>
void encode(float8* out, const A* values, A factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = float8(static_cast<float>(values[i] * factor));
}

// row(r) is row r of x, or null for zeros. Scales are stored by columns.
template <typename T, typename Row>
Quantized quantize(int64_t rows, int64_t columns, int64_t block, bool power_of_two,
                   const at::TensorOptions& options, Row row) {
  using A = acc_t<T>;
  const int64_t blocks = (columns + block - 1) / block;
  const at::Tensor values = at::empty({rows, columns}, options.dtype(at::kFloat8_e4m3fn));
  const at::Tensor scales = at::empty({blocks, rows}, options.dtype(at::kFloat));
  float8* out = mutable_data<float8>(values);
  float* out_scales = mutable_data<float>(scales);
  const auto& functions = kernels<RowKernels<T>>();
  parallel_rows(rows, columns * (sizeof(T) + 1), [&](int64_t begin, int64_t end) {
    A wide[kMostBlock];
    for (int64_t r = begin; r < end; ++r) {
      const T* from = row(r);
      for (int64_t c = 0; c < columns; c += block) {
        const int64_t n = std::min(block, columns - c);
        if (from) {
          functions.widen(wide, from + c, n);
        } else {
          std::fill_n(wide, n, A(0));
        }
        const float scale = block_scale(largest_magnitude(wide, n), power_of_two);
        out_scales[c / block * rows + r] = scale;
        encode(out + r * columns + c, wide, reciprocal<A>(scale), n);
      }
    }
  });
  return {values, scales.t()};
}

// w [E, P, Q], with unit stride along Q.
template <typename T>
Quantized quantize_matrices(const at::Tensor& w, int64_t block, bool power_of_two) {
  using A = acc_t<T>;
  const int64_t rows = w.size(1), columns = w.size(2);
  const int64_t high = (rows + block - 1) / block, wide = (columns + block - 1) / block;
  const at::Tensor values = at::empty(w.sizes(), w.options().dtype(at::kFloat8_e4m3fn));
  const at::Tensor scales = at::empty({w.size(0), high, wide}, w.options().dtype(at::kFloat));
  float8* out = mutable_data<float8>(values);
  float* out_scales = mutable_data<float>(scales);
  const auto& functions = kernels<RowKernels<T>>();
  parallel_units(w.size(0) * high, [&](int64_t unit, int) {
    const int64_t e = unit / high, first = unit % high * block;
    const int64_t m = std::min(block, rows - first);
    const T* from = data<T>(w) + e * w.stride(0) + first * w.stride(1);
    A* tile = static_cast<A*>(thread_scratch(Scratch::kTile, m * kMostBlock * sizeof(A)));
    for (int64_t c = 0; c < columns; c += block) {
      const int64_t n = std::min(block, columns - c);
      for (int64_t i = 0; i < m; ++i) functions.widen(tile + i * n, from + i * w.stride(1) + c, n);
      const float scale = block_scale(largest_magnitude(tile, m * n), power_of_two);
      out_scales[unit * wide + c / block] = scale;
      for (int64_t i = 0; i < m; ++i) {
        encode(out + (e * rows + first + i) * columns + c, tile + i * n, reciprocal<A>(scale), n);
      }
    }
  });
  return {values, scales};
}

// A copy with the strides of its sizes, those of one included.
at::Tensor dense(const at::Tensor& tensor) {
  return at::empty(tensor.sizes(), tensor.options()).copy_(tensor);
}

}  // namespace

Quantized quantize_rows(const at::Tensor& x_RK, int64_t block, bool power_of_two) {
  const at::Tensor x = with_unit_stride(x_RK);
  return dispatch_float(x.scalar_type(), "quantize_rows", [&]<typename T>() {
    return quantize<T>(x.size(0), x.size(1), block, power_of_two, x.options(),
                       [&](int64_t r) { return data<T>(x) + r * x.stride(0); });
  });
}

Quantized quantize_weights(const at::Tensor& w_EKN, int64_t block, bool power_of_two,
                           bool transposed) {
  // Read as stored; a block's largest magnitude does not depend on it.
  const Weights weights(w_EKN);
  const bool k_contiguous = weights.k_contiguous();
  const at::Tensor w = with_unit_stride(k_contiguous ? w_EKN.mT() : w_EKN);
  Quantized found = dispatch_float(w.scalar_type(), "quantize_weights", [&]<typename T>() {
    return quantize_matrices<T>(w, block, power_of_two);
  });
  if (k_contiguous) found = {found.values.mT(), dense(found.scales.mT())};
  if (k_contiguous != transposed) {
    found.values = transposed ? dense(found.values.mT()).mT() : dense(found.values);
  }
  return found;
}

namespace {

using Pair = std::tuple<at::Tensor, at::Tensor>;

Pair quantize_rows_op(const at::Tensor& x_RK, at::ScalarType dtype, int64_t block,
                      bool power_of_two) {
  check_arguments("quantize_rows", dtype, block);
  const auto [values, scales] = quantize_rows(x_RK, block, power_of_two);
  return {values, scales};
}

Pair quantize_weights_op(const at::Tensor& w_EKN, at::ScalarType dtype, int64_t block,
                         bool power_of_two, bool transposed) {
  check_arguments("quantize_weights", dtype, block);
  const auto [values, scales] = quantize_weights(w_EKN, block, power_of_two, transposed);
  return {values, scales};
}

Pair permute_quantize(const at::Tensor& x_TH, const at::Tensor& row_to_slot,
                      const at::Tensor& slot_to_row, const at::Tensor& offsets, int64_t num_rows,
                      at::ScalarType dtype, int64_t block, bool power_of_two) {
  check_arguments("permute_quantize", dtype, block);
  const Order order("permute_quantize", row_to_slot, slot_to_row, offsets);
  TORCH_CHECK_VALUE(x_TH.size(0) == order.tokens,
                    "permute_quantize: x must be [T, H] with T = ", order.tokens,
                    " (order.slot_to_row); got ", x_TH.sizes());
  TORCH_CHECK_VALUE(num_rows >= 0, "permute_quantize: num_rows must be at least 0; got ", num_rows);
  const at::Tensor x = with_unit_stride(x_TH);
  const int32_t* slots = order.row_to_slot();
  const auto [values, scales] =
      dispatch_float(x.scalar_type(), "permute_quantize", [&]<typename T>() {
        return quantize<T>(num_rows, x.size(1), block, power_of_two, x.options(),
                           [&](int64_t r) -> const T* {
                             if (r >= order.used) return nullptr;
                             return data<T>(x) + slots[r] / order.top_k * x.stride(0);
                           });
      });
  return {values, scales};
}

at::Tensor dequantize_rows(const at::Tensor& values_RK, const at::Tensor& scales_RB,
                           at::ScalarType dtype, int64_t block) {
  check_arguments("dequantize_rows", values_RK.scalar_type(), block);
  const at::Tensor values = with_unit_stride(values_RK);
  const at::Tensor scales = scales_RB.to(accumulate_dtype(dtype));
  const int64_t columns = values.size(1);
  const at::Tensor out = at::empty(values.sizes(), values.options().dtype(dtype));
  dispatch_float(dtype, "dequantize_rows", [&]<typename T>() {
    using A = acc_t<T>;
    const auto& functions = kernels<RowKernels<T>>();
    parallel_rows(values.size(0), columns * (sizeof(T) + 1), [&](int64_t begin, int64_t end) {
      A wide[kMostBlock];
      for (int64_t r = begin; r < end; ++r) {
        const uint8_t* from = data<uint8_t>(values) + r * values.stride(0);
        const A* factors = data<A>(scales) + r * scales.stride(0);
        for (int64_t c = 0; c < columns; c += block) {
          const int64_t n = std::min(block, columns - c);
          const A factor = factors[c / block * scales.stride(1)];
          widen_float8(wide, from + c, 1, n, n);
          for (int64_t i = 0; i < n; ++i) wide[i] *= factor;
          functions.narrow(mutable_data<T>(out) + r * columns + c, wide, n);
        }
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("quantize_rows", quantize_rows_op);
  m.impl("quantize_weights", quantize_weights_op);
  m.impl("permute_quantize", permute_quantize);
  m.impl("dequantize_rows", dequantize_rows);
}

}  // namespace moe
