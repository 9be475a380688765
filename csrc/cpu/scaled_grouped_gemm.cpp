// Products of float8 row groups with their expert's float8 matrix, both scaled by blocks.
//
// R rows, E experts, Kd contracted size, N columns; blocks of 128 along Kd and N.
//
// A block of Kd is multiplied as bfloat16, which holds float8 exactly, and its sums are scaled and
// added in float32; for float64 results all of it is float64.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <utility>

#include "common/parallel.h"
#include "cpu/float8.h"
#include "cpu/grouped.h"
#include "cpu/order.h"

namespace moe {

namespace {

constexpr int64_t kBlock = 128, kMostColumns = 256;

// The rows of a block of rows, each block of Kd packed apart, by threads as they come to them.
template <typename T>
class PackedBlocks {
 public:
  PackedBlocks(bool k_contiguous, int64_t k)
      : k_contiguous_(k_contiguous), k_(k), last_(at::get_num_threads(), -1) {}

  // row(i) is where row i of the block lies. Block i of Kd is at i * size.
  template <typename Row>
  const char* get(int thread, int64_t block, int64_t count, Row row, int64_t& size) {
    const auto& functions = kernels<GemmKernels<T>>();
    size = round_up(functions.packed_size(k_contiguous_, count, kBlock), 64);
    const int64_t blocks = (k_ + kBlock - 1) / kBlock;
    char* packed = static_cast<char*>(thread_scratch(Scratch::kRows, blocks * size));
    if (std::exchange(last_[thread], block) == block) return packed;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = b * kBlock, k = std::min(kBlock, k_ - first);
      const T* rows[kRowsPerBlock];
      for (int64_t i = 0; i < count; ++i) rows[i] = row(i) + first;
      functions.pack(k_contiguous_, packed + b * size, rows, count, k, Range{0, k});
    }
    return packed;
  }

 private:
  bool k_contiguous_;
  int64_t k_;
  std::vector<int64_t> last_;
};

// Block `block` of Kd and columns `range` of an expert's matrix, widened, in the order of b.
template <typename T>
MatrixOf<T> widen_matrix(const Weights& b, int64_t expert, int64_t block, Range range) {
  const int64_t first = block * kBlock, k = std::min(kBlock, b.inner() - first);
  const MatrixOf<uint8_t> bytes = b.of<uint8_t>(expert);
  const uint8_t* from = bytes.data + first * bytes.stride_k + range.begin * bytes.stride_n;
  T* to = static_cast<T*>(thread_scratch(Scratch::kPanel, kBlock * kMostColumns * sizeof(T)));
  if (b.k_contiguous()) {
    widen_float8(to, from, range.size(), k, bytes.stride_n);
    return {to, 1, k, true};
  }
  widen_float8(to, from, k, range.size(), bytes.stride_k);
  return {to, range.size(), 1, false};
}

// Products in T, sums and scales in A, results in O.
template <typename T, typename O>
void multiply_groups(const at::Tensor& a, const Weights& b, const at::Tensor& scales_a,
                     const at::Tensor& scales_b, const int32_t* offsets, const at::Tensor& bias,
                     const at::Tensor& out) {
  using A = acc_t<O>;
  const int64_t columns = b.columns(), blocks_k = (b.inner() + kBlock - 1) / kBlock;
  const std::vector<RowBlock> blocks = row_blocks(offsets, b.experts(), kRowsPerBlock);
  Costs costs;
  for (const RowBlock& block : blocks) costs.add(block.count);
  const int64_t step = columns_per_unit(columns, costs, at::get_num_threads(), kMostColumns, 32);
  const int64_t parts = (columns + step - 1) / step;
  PackedBlocks<T> packed_rows(b.k_contiguous(), b.inner());
  const auto& gemm = kernels<GemmKernels<T>>();
  const auto& sum_rows = kernels<RowKernels<A>>();
  const auto& out_rows = kernels<RowKernels<O>>();
  parallel_units(blocks.size() * parts, [&](int64_t unit, int thread) {
    const RowBlock& block = blocks[unit / parts];
    const Range range{unit % parts * step, std::min((unit % parts + 1) * step, columns)};
    const int64_t n = range.size(), stride = round_up(n, kOutputColumns);
    const T* first = data<T>(a) + block.begin * a.stride(0);
    int64_t size = 0;
    const char* packed = packed_rows.get(
        thread, unit / parts, block.count, [&](int64_t i) { return first + i * a.stride(0); },
        size);
    const int64_t bytes = block.count * stride * sizeof(A);
    A* total = static_cast<A*>(thread_scratch(Scratch::kTile, bytes));
    A* tile = static_cast<A*>(thread_scratch(Scratch::kPart, bytes));
    std::fill_n(total, block.count * stride, A(0));
    for (int64_t kb = 0; kb < blocks_k; ++kb) {
      const int64_t k = std::min(kBlock, b.inner() - kb * kBlock);
      const MatrixOf<T> matrix = widen_matrix<T>(b, block.expert, kb, range);
      gemm.multiply(packed + kb * size, block.count, k, matrix, Range{0, n}, tile, stride, false,
                    nullptr);
      const A* factors = data<A>(scales_b) + (block.expert * blocks_k + kb) * scales_b.size(2);
      for (int64_t i = 0; i < block.count; ++i) {
        const A factor = data<A>(scales_a)[(block.begin + i) * blocks_k + kb];
        for (int64_t j = range.begin; j < range.end;) {  // columns of one scale
          const int64_t end = std::min((j / kBlock + 1) * kBlock, range.end);
          const int64_t at = i * stride + j - range.begin;
          sum_rows.add_scaled(total + at, tile + at, factor * factors[j / kBlock], end - j);
          j = end;
        }
      }
    }
    for (int64_t i = 0; i < block.count; ++i) {
      A* sums = total + i * stride;
      if (bias.defined()) {
        sum_rows.add_scaled(sums, data<A>(bias) + block.expert * columns + range.begin, A(1), n);
      }
      out_rows.narrow(mutable_data<O>(out) + (block.begin + i) * columns + range.begin, sums, n);
    }
  });
  const int64_t used = offsets[b.experts()];
  if (out.size(0) > used) out.narrow(0, used, out.size(0) - used).zero_();
}

at::Tensor scaled_grouped_gemm(const at::Tensor& a_RK, const at::Tensor& b_EKN,
                               const at::Tensor& scales_a, const at::Tensor& scales_b,
                               const at::Tensor& offsets_E1,
                               const std::optional<at::Tensor>& bias_EN, at::ScalarType out_dtype) {
  check_offsets("scaled_grouped_gemm", offsets_E1, a_RK.size(0), "a.shape[0]");
  const at::Tensor offsets = offsets_E1.contiguous();
  const at::ScalarType sums = accumulate_dtype(out_dtype);
  const auto wide = [&](const at::Tensor& tensor) { return tensor.to(sums).contiguous(); };
  const at::Tensor bias = bias_EN ? wide(*bias_EN) : at::Tensor();
  const at::Tensor out = at::empty({a_RK.size(0), b_EKN.size(2)}, a_RK.options().dtype(out_dtype));
  const Weights b(b_EKN);
  dispatch_float(out_dtype, "scaled_grouped_gemm", [&]<typename O>() {
    using T = std::conditional_t<std::is_same_v<O, double>, double, bf16>;
    const at::Tensor a = a_RK.to(scalar_type<T>()).contiguous();
    multiply_groups<T, O>(a, b, wide(scales_a), wide(scales_b), data<int32_t>(offsets), bias, out);
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fp8_grouped_gemm(
    const at::Tensor& a_RK, const at::Tensor& b_EKN, const at::Tensor& offsets_E1,
    const std::optional<at::Tensor>& bias_EN, std::optional<at::ScalarType> out_dtype,
    bool power_of_two, bool /*save_float8*/) {
  check_offsets("fp8_grouped_gemm", offsets_E1, a_RK.size(0), "a.shape[0]");
  const Quantized a = quantize_rows(a_RK, kBlock, power_of_two);
  const Quantized b = quantize_weights(b_EKN, kBlock, power_of_two, true);
  const at::Tensor out = scaled_grouped_gemm(a.values, b.values, a.scales, b.scales, offsets_E1,
                                             bias_EN, out_dtype.value_or(a_RK.scalar_type()));
  return {out, a.values, a.scales};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("scaled_grouped_gemm", scaled_grouped_gemm);
  m.impl("fp8_grouped_gemm", fp8_grouped_gemm);
}

}  // namespace moe
