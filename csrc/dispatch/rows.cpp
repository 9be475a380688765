// The steps of an exchange by the loops of layout.h, over the threads of ATen.
#include "dispatch/rows.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <atomic>

#include "common/dtypes.h"
#include "common/parallel.h"
#include "cpu/kernel_table.h"
#include "cpu/large_buffers.h"
#include "dispatch/copy.h"

namespace moe::ep {
namespace {

using at::Tensor;

std::atomic<bool> native_on_cpu{true};

const char* bytes(const Tensor& tensor) {
  return static_cast<const char*>(tensor.const_data_ptr());
}

char* mutable_bytes(const Tensor& tensor) { return static_cast<char*>(tensor.mutable_data_ptr()); }

const int32_t* slots_of(const Tensor& slot_rows) { return slot_rows.const_data_ptr<int32_t>(); }

template <typename Parts>
void copy_rows(const Tensor& x, const Tensor& slot_rows, const Parts& out, bool stream) {
  const Tensor source = with_unit_stride(x);
  const int64_t size = x.element_size(), row_bytes = x.size(1) * size;
  parallel_rows(x.size(0), row_bytes, [&](int64_t begin, int64_t end) {
    pack_rows(bytes(source), source.stride(0) * size, slots_of(slot_rows), slot_rows.size(1), begin,
              end, row_bytes, out, stream ? stream_row : copy_row);
    if (stream) order_streams();
  });
}

// f.template operator()<Weight>() with an integer of so many bytes.
template <typename F>
void dispatch_weight_bytes(int64_t bytes, const F& f) {
  if (bytes == 2) return f.template operator()<uint16_t>();
  if (bytes == 4) return f.template operator()<uint32_t>();
  f.template operator()<uint64_t>();
}

void copy_routing(const Tensor& ids, const Tensor& weights, const Tensor& slot_rows,
                  const Placement& placement, const RowParts<char>& out_weights,
                  int64_t weights_row_bytes, const RowParts<char>& out_ids, int64_t ids_row_bytes) {
  const Tensor dense_ids = ids.contiguous(), dense_weights = weights.contiguous();
  dispatch_index(ids.scalar_type(), "dispatch", [&]<typename Id>() {
    dispatch_weight_bytes(weights.element_size(), [&]<typename Weight>() {
      parallel_rows(ids.size(0), weights_row_bytes, [&](int64_t begin, int64_t end) {
        pack_routing(dense_ids.const_data_ptr<Id>(), placement,
                     static_cast<const Weight*>(dense_weights.const_data_ptr()),
                     slots_of(slot_rows), ids.size(1), begin, end, out_weights, weights_row_bytes,
                     out_ids, ids_row_bytes);
      });
    });
  });
}

template <typename T>
void add_rows(T* out, const T* const* rows, int64_t count, int64_t n) {
  kernels<RowKernels<T>>().weighted_sum(out, rows, nullptr, count, n);
}

RowParts<const char> parts_of(const Tensor& rows, const std::vector<int64_t>& first) {
  return RowParts<const char>::in_one_piece(bytes(rows), rows.size(1) * rows.element_size(), first);
}

}  // namespace

bool is_native(const Tensor& tensor) {
  return tensor.is_cpu() && native_on_cpu.load(std::memory_order_relaxed);
}

void set_native(bool native) { native_on_cpu.store(native, std::memory_order_relaxed); }

Tensor beside(const Tensor& like, const Tensor& tensor) {
  if (like.is_cpu()) return tensor;
  return tensor.pin_memory().to(like.device(), /*non_blocking=*/true);
}

Layout make_layout(const Tensor& ids, const Placement& placement, int64_t ranks) {
  if (!is_native(ids)) return by_aten::make_layout(ids, placement, ranks);
  const Tensor dense = ids.contiguous();
  const int64_t tokens = ids.size(0), top_k = ids.size(1);
  const Tensor slot_rows = at::empty({tokens, top_k}, ids.options().dtype(at::kInt));
  std::vector<Counts> counts(ranks);
  const int64_t bad = dispatch_index(ids.scalar_type(), "dispatch", [&]<typename Id>() {
    return make_layout(dense.const_data_ptr<Id>(), tokens, top_k, placement, counts,
                       slot_rows.mutable_data_ptr<int32_t>());
  });
  TORCH_CHECK_INDEX(bad < 0, "dispatch: topk_ids must be in [-1, E] with E = ", placement.experts(),
                    "; got ", dense.view(-1)[bad].item<int64_t>(), " at [", bad / top_k, ", ",
                    bad % top_k, "]");
  const auto longs = ids.options().dtype(at::kLong);
  const Tensor table = at::empty({ranks, 2}, longs);
  std::memcpy(table.mutable_data_ptr<int64_t>(), counts.data(), sizeof(Counts) * counts.size());
  return {slot_rows, table, at::zeros({}, longs)};
}

Tensor pack_rows(const Tensor& x, const Tensor& slot_rows, const std::vector<int64_t>& first) {
  if (!is_native(x)) return by_aten::pack_rows(x, slot_rows, first.back());
  const Tensor rows = at::empty({first.back(), x.size(1)}, x.options());
  const auto out =
      RowParts<char>::in_one_piece(mutable_bytes(rows), x.size(1) * x.element_size(), first);
  copy_rows(x, slot_rows, out, /*stream=*/false);
  return rows;
}

void push_rows(const Tensor& x, const Tensor& slot_rows, const RowParts<char>& out) {
  const int64_t total = out.first.back() * x.size(1) * x.element_size();
  copy_rows(x, slot_rows, out, total >= kStreamBytes);
}

Tensor empty_routing(const Tensor& weights, int64_t num_rows) {
  const RoutingBytes layout{weights.size(1), static_cast<int64_t>(weights.element_size())};
  return at::empty({num_rows, layout.total()}, weights.options().dtype(at::kByte));
}

Tensor pack_routing(const Tensor& ids, const Tensor& weights, const Tensor& slot_rows,
                    const std::vector<int64_t>& first, const Placement& placement) {
  if (!is_native(ids)) {
    return by_aten::pack_routing(ids, weights, slot_rows, first.back(), placement);
  }
  const Tensor out = empty_routing(weights, first.back()).zero_();
  const RoutingBytes layout{weights.size(1), static_cast<int64_t>(weights.element_size())};
  char* const data = mutable_bytes(out);
  copy_routing(ids, weights, slot_rows, placement,
               RowParts<char>::in_one_piece(data, layout.total(), first), layout.total(),
               RowParts<char>::in_one_piece(data + layout.ids_at(), layout.total(), first),
               layout.total());
  return out;
}

void push_routing(const Tensor& ids, const Tensor& weights, const Tensor& slot_rows,
                  const Placement& placement, const RowParts<char>& out_weights,
                  const RowParts<char>& out_ids) {
  copy_routing(ids, weights, slot_rows, placement, out_weights,
               weights.size(1) * static_cast<int64_t>(weights.element_size()), out_ids,
               weights.size(1) * static_cast<int64_t>(sizeof(int32_t)));
}

std::tuple<Tensor, Tensor> unpack_routing(const Tensor& routing, int64_t top_k,
                                          at::ScalarType weight_dtype) {
  const int64_t size = static_cast<int64_t>(c10::elementSize(weight_dtype));
  const RoutingBytes layout{top_k, size};
  return {routing.narrow(1, layout.ids_at(), top_k * 4).view(at::kInt),
          routing.narrow(1, 0, top_k * size).view(weight_dtype)};
}

Tensor sum_rows(const Tensor& rows, const Tensor& slot_rows, const std::vector<int64_t>& first) {
  if (!is_native(rows)) {
    return by_aten::sum_rows(rows, slot_rows, static_cast<int64_t>(first.size() - 1));
  }
  return sum_rows(parts_of(rows, first), slot_rows, rows.size(1), rows.scalar_type());
}

Tensor sum_rows(const RowParts<const char>& rows, const Tensor& slot_rows, int64_t hidden,
                at::ScalarType dtype) {
  const int64_t tokens = slot_rows.size(0), top_k = slot_rows.size(1);
  const Tensor out = empty_large({tokens, hidden}, slot_rows.options().dtype(dtype));
  const bool stream = static_cast<int64_t>(out.nbytes()) >= kStreamBytes;
  dispatch_float(dtype, "combine", [&]<typename T>() {
    parallel_rows(tokens, hidden * sizeof(T), [&](int64_t begin, int64_t end) {
      sum_rows<T>(rows, slots_of(slot_rows), top_k, begin, end, hidden, mutable_data<T>(out),
                  add_rows<T>, stream ? stream_row : nullptr);
      if (stream) order_streams();
    });
  });
  return out;
}

Tensor gather_slots(const Tensor& rows, const Tensor& slot_rows,
                    const std::vector<int64_t>& first) {
  if (!is_native(rows)) return by_aten::gather_slots(rows, slot_rows);
  return gather_slots(parts_of(rows, first), slot_rows, rows.scalar_type());
}

Tensor gather_slots(const RowParts<const char>& rows, const Tensor& slot_rows,
                    at::ScalarType dtype) {
  const Tensor out = at::empty(slot_rows.sizes(), slot_rows.options().dtype(dtype));
  gather_slots(rows, static_cast<int64_t>(c10::elementSize(dtype)), slots_of(slot_rows),
               slot_rows.size(1), slot_rows.size(0), mutable_bytes(out));
  return out;
}

}  // namespace moe::ep
