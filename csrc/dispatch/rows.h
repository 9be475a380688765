// The steps of an exchange that move rows, on tensors: the loops of layout.h on the CPU, ATen's
// functions elsewhere. Letters as in layout.h; H hidden size.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "dispatch/layout.h"

namespace moe::ep {

// Whether a tensor is served by the loops.
bool is_native(const at::Tensor& tensor);
// For tests: false serves CPU tensors as those of a GPU are.
void set_native(bool native);

// A tensor of the host on the device of `like`, which reads the host's memory by itself: the host
// does not wait for what was launched before.
at::Tensor beside(const at::Tensor& like, const at::Tensor& tensor);

struct Layout {
  at::Tensor slot_rows;  // [T, K] int32
  at::Tensor counts;     // [P, 2] int64 on the device of the ids: rows and slots for each rank
  at::Tensor bad;        // [] int64, there too: 1 if an id is outside [-1, E]; raised on the CPU
};

// ids [T, K] int32 or int64. IndexError for an id outside [-1, E] on the CPU.
Layout make_layout(const at::Tensor& ids, const Placement& placement, int64_t ranks);

// [S, H] of x [T, H], any strides. `first` [P + 1] is that of first_rows.
at::Tensor pack_rows(const at::Tensor& x, const at::Tensor& slot_rows,
                     const std::vector<int64_t>& first);
// The same, on the CPU, into memory that the ranks have given.
void push_rows(const at::Tensor& x, const at::Tensor& slot_rows, const RowParts<char>& out);

// [S, bytes] uint8 of ids and weights [T, K], each row for the rank it goes to: the weights, then
// the ids, each padded to a multiple of 8 bytes.
at::Tensor pack_routing(const at::Tensor& ids, const at::Tensor& weights,
                        const at::Tensor& slot_rows, const std::vector<int64_t>& first,
                        const Placement& placement);
// The same, on the CPU, into [rows, K] of weights and [rows, K] int32 of ids.
void push_routing(const at::Tensor& ids, const at::Tensor& weights, const at::Tensor& slot_rows,
                  const Placement& placement, const RowParts<char>& out_weights,
                  const RowParts<char>& out_ids);

// An empty tensor for `num_rows` rows of pack_routing, and its ids and weights.
at::Tensor empty_routing(const at::Tensor& weights, int64_t num_rows);
std::tuple<at::Tensor, at::Tensor> unpack_routing(const at::Tensor& routing, int64_t top_k,
                                                  at::ScalarType weight_dtype);

// [T, H]: the sum of each token's rows [S, H] in the order of their ranks, in float32 (float64 for
// float64), rounded once.
at::Tensor sum_rows(const at::Tensor& rows, const at::Tensor& slot_rows,
                    const std::vector<int64_t>& first);
at::Tensor sum_rows(const RowParts<const char>& rows, const at::Tensor& slot_rows, int64_t hidden,
                    at::ScalarType dtype);

// [T, K]: for each slot its entry of rows [S, K], zero for slots without an expert.
at::Tensor gather_slots(const at::Tensor& rows, const at::Tensor& slot_rows,
                        const std::vector<int64_t>& first);
at::Tensor gather_slots(const RowParts<const char>& rows, const at::Tensor& slot_rows,
                        at::ScalarType dtype);

// How the rows of pack_routing are laid out.
struct RoutingBytes {
  int64_t top_k, weight_bytes;

  static int64_t padded(int64_t bytes) { return (bytes + 7) / 8 * 8; }
  int64_t ids_at() const { return padded(top_k * weight_bytes); }
  int64_t total() const { return ids_at() + padded(top_k * static_cast<int64_t>(sizeof(int32_t))); }
};

namespace by_aten {

Layout make_layout(const at::Tensor& ids, const Placement& placement, int64_t ranks);
at::Tensor pack_rows(const at::Tensor& x, const at::Tensor& slot_rows, int64_t num_rows);
at::Tensor pack_routing(const at::Tensor& ids, const at::Tensor& weights,
                        const at::Tensor& slot_rows, int64_t num_rows, const Placement& placement);
at::Tensor sum_rows(const at::Tensor& rows, const at::Tensor& slot_rows, int64_t ranks);
at::Tensor gather_slots(const at::Tensor& rows, const at::Tensor& slot_rows);

}  // namespace by_aten

}  // namespace moe::ep
