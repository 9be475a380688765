// The steps of an exchange by the loops of layout.h, over the threads of ATen.
#include "dispatch/rows.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <type_traits>

#include "common/dtypes.h"
#include "common/parallel.h"
#include "dispatch/layout.h"

namespace moe::ep {
namespace {

using at::Tensor;

std::atomic<bool> native_on_cpu{true};

char* bytes(const Tensor& tensor) { return static_cast<char*>(tensor.data_ptr()); }

}  // namespace

bool is_native(const Tensor& tensor) {
  return tensor.is_cpu() && native_on_cpu.load(std::memory_order_relaxed);
}

void set_native(bool native) { native_on_cpu.store(native, std::memory_order_relaxed); }

Layout make_layout(const Tensor& ids, int64_t experts, int64_t ranks) {
  if (!is_native(ids)) return by_aten::make_layout(ids, experts, ranks);
  const Tensor dense = ids.contiguous();
  const int64_t tokens = ids.size(0), top_k = ids.size(1);
  const Tensor slot_rows = at::empty({tokens, top_k}, ids.options().dtype(at::kInt));
  std::vector<Counts> counts(ranks);
  const int64_t bad = dispatch_index(ids.scalar_type(), "dispatch", [&]<typename Id>() {
    return make_layout(dense.const_data_ptr<Id>(), tokens, top_k, experts, counts,
                       slot_rows.mutable_data_ptr<int32_t>());
  });
  TORCH_CHECK_INDEX(bad < 0, "dispatch: topk_ids must be in [-1, E] with E = ", experts, "; got ",
                    dense.view(-1)[bad].item<int64_t>(), " at [", bad / top_k, ", ", bad % top_k,
                    "]");
  const auto longs = ids.options().dtype(at::kLong);
  const Tensor table = at::empty({ranks, 2}, longs);
  std::memcpy(table.mutable_data_ptr<int64_t>(), counts.data(), sizeof(Counts) * counts.size());
  return {slot_rows, table, at::zeros({}, longs)};
}

Tensor pack_rows(const Tensor& x, const Tensor& slot_rows, int64_t num_rows) {
  if (!is_native(x)) return by_aten::pack_rows(x, slot_rows, num_rows);
  const Tensor source = x.stride(1) == 1 ? x : x.contiguous();
  const Tensor rows = at::empty({num_rows, x.size(1)}, x.options());
  const int64_t size = x.element_size(), row_bytes = x.size(1) * size, top_k = slot_rows.size(1);
  parallel_rows(x.size(0), row_bytes, [&](int64_t begin, int64_t end) {
    pack_rows(bytes(source), source.stride(0) * size, slot_rows.const_data_ptr<int32_t>(), top_k,
              begin, end, row_bytes, bytes(rows));
  });
  return rows;
}

Tensor empty_routing(const Tensor& weights, int64_t num_rows) {
  const Routing layout{weights.size(1), static_cast<int64_t>(weights.element_size())};
  return at::empty({num_rows, layout.bytes()}, weights.options().dtype(at::kByte));
}

Tensor pack_routing(const Tensor& ids, const Tensor& weights, const Tensor& slot_rows,
                    int64_t num_rows, int64_t experts_per_rank) {
  if (!is_native(ids)) {
    return by_aten::pack_routing(ids, weights, slot_rows, num_rows, experts_per_rank);
  }
  const Tensor dense_ids = ids.contiguous(), dense_weights = weights.contiguous();
  const Tensor out = empty_routing(weights, num_rows);
  const Routing layout{weights.size(1), static_cast<int64_t>(weights.element_size())};
  dispatch_index(ids.scalar_type(), "dispatch", [&]<typename Id>() {
    parallel_rows(ids.size(0), layout.bytes(), [&](int64_t begin, int64_t end) {
      pack_routing(layout, dense_ids.const_data_ptr<Id>(), experts_per_rank, bytes(dense_weights),
                   slot_rows.const_data_ptr<int32_t>(), begin, end, bytes(out));
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> unpack_routing(const Tensor& routing, int64_t top_k,
                                          at::ScalarType weight_dtype) {
  const int64_t size = static_cast<int64_t>(c10::elementSize(weight_dtype));
  const Routing layout{top_k, size};
  return {routing.narrow(1, layout.ids_at(), top_k * 4).view(at::kInt),
          routing.narrow(1, 0, top_k * size).view(weight_dtype)};
}

Tensor sum_rows(const Tensor& rows, const Tensor& slot_rows, int64_t ranks) {
  if (!is_native(rows)) return by_aten::sum_rows(rows, slot_rows, ranks);
  const int64_t tokens = slot_rows.size(0), top_k = slot_rows.size(1), hidden = rows.size(1);
  const Tensor out = at::empty({tokens, hidden}, rows.options());
  const int32_t* const slots = slot_rows.const_data_ptr<int32_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows.scalar_type(), "combine", [&] {
    using Sum = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const auto* const from = rows.const_data_ptr<scalar_t>();
    auto* const to = out.mutable_data_ptr<scalar_t>();
    parallel_rows(tokens, hidden * sizeof(scalar_t), [&](int64_t begin, int64_t end) {
      sum_rows<scalar_t, Sum>(from, slots, top_k, begin, end, hidden, to);
    });
  });
  return out;
}

Tensor gather_slots(const Tensor& rows, const Tensor& slot_rows) {
  if (!is_native(rows)) return by_aten::gather_slots(rows, slot_rows);
  const Tensor out = at::empty(slot_rows.sizes(), rows.options());
  gather_slots(bytes(rows), rows.element_size(), slot_rows.const_data_ptr<int32_t>(),
               slot_rows.size(1), slot_rows.size(0), bytes(out));
  return out;
}

}  // namespace moe::ep
