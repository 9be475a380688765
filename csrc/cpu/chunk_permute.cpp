// Contiguous chunks of rows in another order.
//
// C chunks, R rows, H hidden size.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <vector>

#include "common/dtypes.h"
#include "common/parallel.h"

namespace moe {

namespace {

at::Tensor chunk_permute(const at::Tensor& rows_RH, const at::Tensor& sizes_C,
                         const at::Tensor& order_C) {
  const at::Tensor rows = with_unit_stride(rows_RH);
  const at::Tensor sizes = sizes_C.to(at::kLong).contiguous();
  const at::Tensor order = order_C.to(at::kLong).contiguous();
  const int64_t chunks = sizes.numel(), total = rows.size(0);
  const int64_t* size = data<int64_t>(sizes);
  const int64_t* chunk = data<int64_t>(order);
  TORCH_CHECK_VALUE(order.numel() == chunks, "chunk_permute: order must be [", chunks,
                    "] as sizes; got ", order.sizes());
  std::vector<int64_t> start(chunks + 1, 0);
  bool fits = true;
  for (int64_t c = 0; c < chunks; ++c) {
    fits = fits && size[c] >= 0 && size[c] <= total - start[c];
    start[c + 1] = start[c] + size[c];
    if (!fits) break;
  }
  TORCH_CHECK_VALUE(
      fits, "chunk_permute: sizes must be non-negative and sum to at most rows.shape[0] = ", total,
      "; got ", c10::ArrayRef<int64_t>(size, chunks));
  // Row `place[i]` of the result is the first of the chunk that comes i-th.
  std::vector<int64_t> place(chunks + 1, 0);
  std::vector<bool> seen(chunks, false);
  for (int64_t i = 0; i < chunks; ++i) {
    const bool fresh = chunk[i] >= 0 && chunk[i] < chunks && !seen[chunk[i]];
    TORCH_CHECK_VALUE(fresh, "chunk_permute: order must be a permutation of 0..", chunks - 1,
                      "; got ", c10::ArrayRef<int64_t>(chunk, chunks));
    seen[chunk[i]] = true;
    place[i + 1] = place[i] + size[chunk[i]];
  }

  const int64_t bytes = rows.size(1) * rows.element_size();
  const int64_t stride = rows.stride(0) * rows.element_size();
  const at::Tensor out = at::empty(rows.sizes(), rows.options());
  if (out.numel() == 0) return out;
  const char* from = data<char>(rows);
  char* to = mutable_data<char>(out);
  parallel_rows(total, 2 * bytes, [&](int64_t begin, int64_t end) {
    int64_t i = std::upper_bound(place.begin(), place.end(), begin) - place.begin() - 1;
    for (int64_t r = begin; r < end; ++r) {
      while (i < chunks && r >= place[i + 1]) ++i;
      if (i == chunks) {
        std::memset(to + r * bytes, 0, (end - r) * bytes);
        return;
      }
      std::memcpy(to + r * bytes, from + (start[chunk[i]] + r - place[i]) * stride, bytes);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) { m.impl("chunk_permute", chunk_permute); }

}  // namespace moe
