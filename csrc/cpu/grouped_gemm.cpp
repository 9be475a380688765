// Products of row groups with their expert's matrix, and the gradients of that product.
//
// R rows, E experts, Kd contracted size, N columns.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "common/parallel.h"
#include "cpu/grouped.h"
#include "cpu/large_buffers.h"
#include "cpu/order.h"

namespace moe {

at::Tensor empty_weight_grad(int64_t experts, int64_t inner, int64_t columns, bool transposed,
                             const at::TensorOptions& options) {
  return transposed ? empty_large({experts, columns, inner}, options).mT()
                    : empty_large({experts, inner, columns}, options);
}

namespace {

template <typename F>
void for_rows(char* to, int64_t rows, int64_t bytes, int64_t stride, F f) {
  if (bytes == stride) return f(to, rows * bytes);
  for (int64_t r = 0; r < rows; ++r) f(to + r * stride, bytes);
}

}  // namespace

template <typename T>
void weight_grad(const at::Tensor& out, bool accumulate, const std::vector<const T*>& a,
                 const std::vector<const T*>& grad, const int32_t* offsets) {
  if (out.numel() == 0) return;
  // The rows of what is stored come from the first factor.
  const bool transposed = out.stride(2) != 1 && out.size(2) > 1;
  const std::vector<const T*>& first = transposed ? grad : a;
  const std::vector<const T*>& second = transposed ? a : grad;
  const int64_t rows = out.size(transposed ? 2 : 1), columns = out.size(transposed ? 1 : 2);
  const int64_t stride = out.stride(transposed ? 2 : 1);
  const bool narrow = out.scalar_type() == scalar_type<T>() && !accumulate;
  const int64_t element = out.element_size();
  char* base = mutable_data<char>(out);

  // A unit owns whole rows: two threads that first touch one page both pay for filling it.
  constexpr int64_t kRows = 1536, kCacheBytes = 16 << 20;
  const bool stream = out.numel() * element > kCacheBytes;
  Costs costs;
  for (int64_t e = 0; e < out.size(0); ++e) costs.add(offsets[e + 1] - offsets[e]);
  const int64_t step = columns_per_unit(rows, costs, at::get_num_threads(), kRows, 32);
  const int64_t parts = (rows + step - 1) / step;
  const auto& functions = kernels<WeightGradKernels<T>>();
  parallel_units(out.size(0) * parts, [&](int64_t unit, int) {
    const int64_t e = unit / parts, m = offsets[e + 1] - offsets[e];
    const Range i_range{unit % parts * step, std::min((unit % parts + 1) * step, rows)};
    char* to = base + (e * out.stride(0) + i_range.begin * stride) * element;
    if (m == 0) {
      if (accumulate) return;
      return for_rows(to, i_range.size(), columns * element, stride * element,
                      [&](char* row, int64_t bytes) {
                        if (stream) return functions.stream_zeros(row, bytes);
                        std::memset(row, 0, bytes);
                      });
    }
    const OutputOf<T> output{narrow ? reinterpret_cast<T*>(to) : nullptr,
                             narrow ? nullptr : reinterpret_cast<acc_t<T>*>(to), stride, accumulate,
                             stream};
    functions.weight_grad(first.data() + offsets[e], second.data() + offsets[e], m, i_range,
                          Range{0, columns}, output);
  });
}

template <typename T>
void bias_grad(const at::Tensor& out, const std::vector<const T*>& rows, const acc_t<T>* scales,
               const int32_t* offsets) {
  using A = acc_t<T>;
  constexpr int64_t kColumns = 256;
  const int64_t columns = out.size(1);
  Costs costs;
  for (int64_t e = 0; e < out.size(0); ++e) costs.add(offsets[e + 1] - offsets[e]);
  const int64_t step = columns_per_unit(columns, costs, at::get_num_threads(), kColumns, 32);
  const int64_t parts = (columns + step - 1) / step;
  const auto& functions = kernels<RowKernels<T>>();
  parallel_units(out.size(0) * parts, [&](int64_t unit, int) {
    const int64_t e = unit / parts, c = unit % parts * step, n = std::min(step, columns - c);
    // In double: these sums have no other terms to hide their rounding in.
    double sums[kColumns] = {};
    for (int64_t r = offsets[e]; r < offsets[e + 1]; ++r) {
      functions.add_precisely(sums, rows[r] + c, scales ? scales[r] : A(1), n);
    }
    A rounded[kColumns];
    std::copy_n(sums, n, rounded);
    functions.narrow(mutable_data<T>(out) + e * columns + c, rounded, n);
  });
}

#define MOE_INSTANTIATE(T)                                                                     \
  template void weight_grad<T>(const at::Tensor&, bool, const std::vector<const T*>&,          \
                               const std::vector<const T*>&, const int32_t*);                  \
  template void bias_grad<T>(const at::Tensor&, const std::vector<const T*>&, const acc_t<T>*, \
                             const int32_t*);
MOE_INSTANTIATE(bf16)
MOE_INSTANTIATE(fp16)
MOE_INSTANTIATE(float)
MOE_INSTANTIATE(double)
#undef MOE_INSTANTIATE

namespace {

template <typename T>
std::vector<const T*> row_pointers(const at::Tensor& rows) {
  std::vector<const T*> pointers(rows.size(0));
  for (int64_t r = 0; r < rows.size(0); ++r) pointers[r] = data<T>(rows) + r * rows.stride(0);
  return pointers;
}

template <typename T>
void multiply_groups(const at::Tensor& a, const Weights& b, const int32_t* offsets,
                     const at::Tensor& bias, const at::Tensor& out) {
  using A = acc_t<T>;
  const int64_t columns = b.columns(), inner = b.inner();
  const auto& gemm = kernels<GemmKernels<T>>();
  const std::vector<RowBlock> blocks = row_blocks(offsets, b.experts(), gemm.rows_together);
  const int64_t step = columns_per_unit(columns, blocks, at::get_num_threads(), 32);
  const int64_t parts = (columns + step - 1) / step;
  const bool narrow = out.scalar_type() == scalar_type<T>();
  PackedRows<T> packed_rows(b.k_contiguous(), inner);
  const auto& rows = kernels<RowKernels<T>>();
  parallel_units(blocks.size() * parts, [&](int64_t unit, int thread) {
    const RowBlock& block = blocks[unit / parts];
    const T* first = data<T>(a) + block.begin * a.stride(0);
    const void* packed = packed_rows.get(thread, unit / parts, block.count,
                                         [&](int64_t i) { return first + i * a.stride(0); });
    const int64_t begin = unit % parts * step, end = std::min(begin + step, columns);
    const int64_t together = columns_together<T>(b, block.count, step);
    for (int64_t c = begin; c < end; c += together) {
      const int64_t n = std::min(together, end - c), stride = sums_stride(n);
      A* tile = static_cast<A*>(thread_scratch(Scratch::kTile, block.count * stride * sizeof(A)));
      gemm.multiply(packed, block.count, inner, b.of<T>(block.expert), Range{c, c + n}, tile,
                    stride, false, nullptr);
      for (int64_t i = 0; i < block.count; ++i) {
        A* sums = tile + i * stride;
        if (bias.defined()) {
          rows.add_scaled(sums, data<T>(bias) + block.expert * columns + c, A(1), n);
        }
        const int64_t at = (block.begin + i) * columns + c;
        if (narrow) {
          rows.narrow(mutable_data<T>(out) + at, sums, n);
        } else {
          std::copy_n(sums, n, mutable_data<A>(out) + at);
        }
      }
    }
  });
  const int64_t used = offsets[b.experts()];
  if (out.size(0) > used) out.narrow(0, used, out.size(0) - used).zero_();
}

at::Tensor grouped_gemm(const at::Tensor& a_RK, const at::Tensor& b_EKN,
                        const at::Tensor& offsets_E1, const std::optional<at::Tensor>& bias_EN,
                        std::optional<at::ScalarType> out_dtype) {
  check_offsets("grouped_gemm", offsets_E1, a_RK.size(0), "a.shape[0]");
  const at::Tensor a = with_unit_stride(a_RK), offsets = offsets_E1.contiguous();
  const at::Tensor bias = bias_EN ? bias_EN->contiguous() : at::Tensor();
  const Weights b(b_EKN);
  const at::ScalarType dtype = a.scalar_type(), wanted = out_dtype.value_or(dtype);
  const at::ScalarType written = wanted == dtype ? dtype : accumulate_dtype(dtype);
  const at::Tensor out = at::empty({a.size(0), b.columns()}, a.options().dtype(written));
  dispatch_float(dtype, "grouped_gemm", [&]<typename T>() {
    multiply_groups<T>(a, b, data<int32_t>(offsets), bias, out);
  });
  return out.to(wanted);
}

void add_weight_grad(const at::Tensor& out, bool accumulate, const at::Tensor& a_RK,
                     const at::Tensor& grad_RN, const at::Tensor& offsets_E1) {
  const at::Tensor a = with_unit_stride(a_RK), grad = with_unit_stride(grad_RN.to(a.scalar_type()));
  const at::Tensor offsets = offsets_E1.contiguous();
  dispatch_float(a.scalar_type(), "grouped_gemm_wgrad", [&]<typename T>() {
    weight_grad<T>(out, accumulate, row_pointers<T>(a), row_pointers<T>(grad),
                   data<int32_t>(offsets));
  });
}

at::Tensor grouped_gemm_wgrad(const at::Tensor& a_RK, const at::Tensor& grad_RN,
                              const at::Tensor& offsets_E1, at::ScalarType out_dtype,
                              bool transposed) {
  check_offsets("grouped_gemm_wgrad", offsets_E1, a_RK.size(0), "a.shape[0]");
  const at::ScalarType dtype = a_RK.scalar_type();
  const at::ScalarType written = out_dtype == dtype ? dtype : accumulate_dtype(dtype);
  const at::Tensor out = empty_weight_grad(offsets_E1.size(0) - 1, a_RK.size(1), grad_RN.size(1),
                                           transposed, a_RK.options().dtype(written));
  add_weight_grad(out, false, a_RK, grad_RN, offsets_E1);
  return out.to(out_dtype);
}

void grouped_gemm_wgrad_(const at::Tensor& out_EKN, const at::Tensor& a_RK,
                         const at::Tensor& grad_RN, const at::Tensor& offsets_E1) {
  check_offsets("grouped_gemm_wgrad", offsets_E1, a_RK.size(0), "a.shape[0]");
  const at::ScalarType sums = accumulate_dtype(a_RK.scalar_type());
  const bool unit_stride = out_EKN.stride(2) == 1 || out_EKN.stride(1) == 1;
  if (out_EKN.scalar_type() == sums && unit_stride) {
    return add_weight_grad(out_EKN, true, a_RK, grad_RN, offsets_E1);
  }
  out_EKN.add_(grouped_gemm_wgrad(a_RK, grad_RN, offsets_E1, sums, false));
}

at::Tensor grouped_gemm_dbias(const at::Tensor& grad_RN, const at::Tensor& offsets_E1,
                              at::ScalarType out_dtype) {
  check_offsets("grouped_gemm_dbias", offsets_E1, grad_RN.size(0), "grad.shape[0]");
  const at::Tensor grad = with_unit_stride(grad_RN), offsets = offsets_E1.contiguous();
  const at::Tensor out = at::empty({offsets.size(0) - 1, grad.size(1)}, grad.options());
  dispatch_float(grad.scalar_type(), "grouped_gemm_dbias", [&]<typename T>() {
    bias_grad<T>(out, row_pointers<T>(grad), nullptr, data<int32_t>(offsets));
  });
  return out.to(out_dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("grouped_gemm", grouped_gemm);
  m.impl("grouped_gemm_wgrad", grouped_gemm_wgrad);
  m.impl("grouped_gemm_wgrad_", grouped_gemm_wgrad_);
  m.impl("grouped_gemm_dbias", grouped_gemm_dbias);
}

}  // namespace moe
