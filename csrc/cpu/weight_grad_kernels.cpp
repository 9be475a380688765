// Gradients of weights: rows of two factors multiplied and summed over the rows.
//
// out[i, j] = sum over m of a[m][i] * b[m][j].
#include "cpu/kernels.h"
#include "cpu/panels.h"
#include "cpu/tiles.h"

namespace moe::CPU_CAPABILITY {

namespace {

constexpr int64_t kBlockGroups = 256;  // of rows that are packed at a time

// One row of sums to where it belongs.
template <typename T>
void emit(const OutputOf<T>& out, int64_t row, const acc_t<T>* sums, int64_t n) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  A* wide = out.narrow ? nullptr : out.wide + row * out.stride;
  T* narrow = out.narrow ? out.narrow + row * out.stride : nullptr;
  for (int64_t c = 0; c < n; c += L) {
    const int64_t lanes = min(n - c, L);
    Vec<A> value = load_some(sums + c, lanes);
    if (narrow) {
      store_some(narrow + c, value, lanes);
    } else {
      if (out.accumulate) value += load_some(wide + c, lanes);
      store_some(wide + c, value, lanes);
    }
  }
}

// Whether vectors of all rows are.
template <typename T>
bool aligned(const T* out, int64_t stride) {
  constexpr int64_t bytes = kLanes<acc_t<T>> * sizeof(T);
  return reinterpret_cast<uintptr_t>(out) % bytes == 0 && stride * sizeof(T) % bytes == 0;
}

template <typename T>
void weight_grad(const T* const* a, const T* const* b, int64_t m, Range i_range, Range j_range,
                 const OutputOf<T>& out) {
  using U = operand_t<T>;
  using A = acc_t<T>;
  constexpr int L = kLanes<A>, G = Compute<T>::G;
  constexpr int64_t kPanel = kPanelVectors * L;
  const int64_t groups = ceil_div(m, G), block_groups = max(min(groups, kBlockGroups), 1);
  const int64_t blocks = max(ceil_div(groups, block_groups), 1);
  const int64_t rows = i_range.size(), columns = j_range.size();
  const int64_t a_columns = ceil_div(rows, L) * L, b_columns = ceil_div(columns, L) * L;
  // Sums are kept aside where whole vectors would not fit, or where the result cannot hold them.
  const bool aside = columns != b_columns || (out.narrow && blocks > 1);
  const int64_t sums_size = aside ? rows * b_columns : 0;
  A* sums = static_cast<A*>(thread_scratch(
      Scratch::kKernel,
      sums_size * sizeof(A) + (a_columns + b_columns) * block_groups * G * sizeof(U)));
  U* a_panels = reinterpret_cast<U*>(sums + sums_size);
  U* b_panels = a_panels + a_columns * block_groups * G;

  OuterTile<T> tile;
  A* wide = aside ? sums : out.wide;
  T* narrow = aside ? nullptr : out.narrow;
  tile.out_stride = aside ? b_columns : out.stride;
  tile.narrow_stride = out.stride;
  tile.stream = narrow && out.stream && aligned(narrow, out.stride);
  for (int64_t block = 0; block < blocks; ++block) {
    const Range part{block * block_groups * G, min((block + 1) * block_groups * G, m)};
    tile.groups = ceil_div(part.size(), G);
    tile.accumulate = block > 0 || (!aside && out.accumulate);
    pack_panels<T>(a_panels, [&](int64_t r) { return a[r]; }, m, part, i_range);
    pack_panels<T>(b_panels, [&](int64_t r) { return b[r]; }, m, part, j_range);
    for (int64_t p = 0; p < columns; p += kPanel) {
      const int64_t vectors = ceil_div(min(kPanel, columns - p), L);
      tile.columns = b_panels + p * tile.groups * G;
      tile.column_step = vectors * L * G;
      tile.prefetch = reinterpret_cast<const char*>(tile.columns);
      tile.prefetch_step = 0;
      for (int64_t q = 0; q < rows; q += kPanel) {
        const int64_t height = min(kPanel, rows - q);
        const U* panel = a_panels + q * tile.groups * G;
        tile.row_step = ceil_div(height, L) * L * G;
        for_row_tiles(height, [&](int64_t r, int64_t count) {
          for (int64_t i = 0; i < count; ++i) tile.rows[i] = panel + (r + i) * G;
          tile.out = wide ? wide + (q + r) * tile.out_stride + p : nullptr;
          tile.narrow = narrow ? narrow + (q + r) * tile.narrow_stride + p : nullptr;
          panel_tile<T>(count, vectors)(tile);
        });
      }
    }
  }
  for (int64_t i = 0; aside && i < rows; ++i) emit(out, i, sums + i * b_columns, columns);
  if (tile.stream) finish_streams();
}

void stream_zeros(void* out, int64_t bytes) {
  constexpr int64_t kLine = 64;
  char* to = static_cast<char*>(out);
  const int64_t head = min(-reinterpret_cast<intptr_t>(to) & (kLine - 1), bytes);
  std::memset(to, 0, head);
  int64_t at = head;
  for (; at + kLine <= bytes; at += kLine) {
    MOE_UNROLL
    for (int64_t i = 0; i < kLine; i += kVectorBytes) {
      stream(reinterpret_cast<float*>(to + at + i), Vec<float>{});
    }
  }
  std::memset(to + at, 0, bytes - at);
  finish_streams();
}

template <typename T>
void fill_weight_grad(WeightGradKernels<T>& kernels) {
  kernels.weight_grad = weight_grad<T>;
  kernels.stream_zeros = stream_zeros;
}

}  // namespace

// clang-format off
template <> void fill(WeightGradKernels<bf16>& kernels) { fill_weight_grad(kernels); }
template <> void fill(WeightGradKernels<fp16>& kernels) { fill_weight_grad(kernels); }
template <> void fill(WeightGradKernels<float>& kernels) { fill_weight_grad(kernels); }
template <> void fill(WeightGradKernels<double>& kernels) { fill_weight_grad(kernels); }
// clang-format on

}  // namespace moe::CPU_CAPABILITY
