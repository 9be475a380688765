#include "dispatch/rows.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <limits>

#include "dispatch/layout.h"

namespace moe::ep {
namespace {

using at::Tensor;

char* bytes(const Tensor& tensor) { return static_cast<char*>(tensor.data_ptr()); }

// Tokens for one thread: enough that copying them outweighs starting it.
int64_t grain(int64_t row_bytes) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, row_bytes));
}

Routing routing_of(const Tensor& weights) {
  return {weights.size(1), static_cast<int64_t>(weights.element_size())};
}

// Row numbers of slots as an index: those without a row become `spare`.
Tensor index_of(const Tensor& slot_rows, int64_t spare) {
  return slot_rows.to(at::kLong).masked_fill(slot_rows.lt(0), spare);
}

// [S]: the token of each row. Slots that share a row write the same number.
Tensor token_of_row(const Tensor& slot_rows, int64_t num_rows) {
  const int64_t tokens = slot_rows.size(0), top_k = slot_rows.size(1);
  const Tensor token = at::arange(tokens, slot_rows.options().dtype(at::kLong))
                           .unsqueeze(1)
                           .expand({tokens, top_k})
                           .reshape(-1);
  return at::zeros({num_rows + 1}, token.options())
      .scatter_(0, index_of(slot_rows, num_rows).reshape(-1), token)
      .narrow(0, 0, num_rows);
}

Layout layout_by_aten(const Tensor& ids, int64_t experts, int64_t ranks) {
  const int64_t tokens = ids.size(0);
  const Tensor wide = ids.to(at::kLong);
  const Tensor valid = wide.ge(0).logical_and_(wide.lt(experts));
  // Slots without an expert go to a rank that does not exist.
  const Tensor owner = wide.floor_divide(experts / ranks).masked_fill(valid.logical_not(), ranks);
  const Tensor goes = at::zeros({tokens, ranks + 1}, ids.options().dtype(at::kBool))
                          .scatter_(1, owner, true)
                          .narrow(1, 0, ranks)
                          .t()
                          .contiguous();  // [P, T]
  const Tensor row = goes.flatten().cumsum(0, at::kLong).sub_(1);
  const Tensor token = at::arange(tokens, wide.options()).unsqueeze(1);
  const Tensor pair = owner.mul(tokens).add_(token).masked_fill_(valid.logical_not(), 0);
  const Tensor slot_rows =
      tokens == 0 ? at::empty_like(wide) : row.take(pair).masked_fill_(valid.logical_not(), -1);
  const Tensor slots = at::zeros({ranks + 1}, wide.options())
                           .scatter_add_(0, owner.flatten(), at::ones_like(owner).flatten())
                           .narrow(0, 0, ranks);
  const Tensor bad = wide.lt(-1).logical_or_(wide.gt(experts)).any().to(at::kLong);
  return {slot_rows.to(at::kInt), at::stack({goes.sum(1, false, at::kLong), slots}, 1), bad};
}

}  // namespace

Layout make_layout(const Tensor& ids, int64_t experts, int64_t ranks) {
  if (!ids.is_cpu()) return layout_by_aten(ids, experts, ranks);
  const Tensor dense = ids.contiguous();
  const int64_t tokens = ids.size(0), top_k = ids.size(1);
  const Tensor slot_rows = at::empty({tokens, top_k}, ids.options().dtype(at::kInt));
  std::vector<Counts> counts(ranks);
  const auto run = [&](const auto* values) {
    return make_layout(values, tokens, top_k, experts, counts,
                       slot_rows.mutable_data_ptr<int32_t>());
  };
  const int64_t bad = ids.scalar_type() == at::kInt ? run(dense.const_data_ptr<int32_t>())
                                                    : run(dense.const_data_ptr<int64_t>());
  TORCH_CHECK_INDEX(bad < 0, "dispatch: topk_ids must be in [-1, E] with E = ", experts, "; got ",
                    dense.view(-1)[bad].item<int64_t>(), " at [", bad / top_k, ", ", bad % top_k,
                    "]");
  const auto longs = ids.options().dtype(at::kLong);
  const Tensor table = at::empty({ranks, 2}, longs);
  std::memcpy(table.mutable_data_ptr<int64_t>(), counts.data(), sizeof(Counts) * counts.size());
  return {slot_rows, table, at::zeros({}, longs)};
}

Tensor pack_rows(const Tensor& x, const Tensor& slot_rows, int64_t num_rows) {
  if (!x.is_cpu()) return x.index_select(0, token_of_row(slot_rows, num_rows));
  const Tensor source = x.stride(1) == 1 ? x : x.contiguous();
  const Tensor rows = at::empty({num_rows, x.size(1)}, x.options());
  const int64_t size = x.element_size(), row_bytes = x.size(1) * size, top_k = slot_rows.size(1);
  at::parallel_for(0, x.size(0), grain(row_bytes), [&](int64_t begin, int64_t end) {
    pack_rows(bytes(source), source.stride(0) * size, slot_rows.const_data_ptr<int32_t>(), top_k,
              begin, end, row_bytes, bytes(rows));
  });
  return rows;
}

Tensor empty_routing(const Tensor& weights, int64_t num_rows) {
  return at::empty({num_rows, routing_of(weights).bytes()}, weights.options().dtype(at::kByte));
}

Tensor pack_routing(const Tensor& ids, const Tensor& weights, const Tensor& slot_rows,
                    int64_t num_rows, int64_t experts_per_rank) {
  const Tensor out = empty_routing(weights, num_rows);
  if (!ids.is_cpu()) {
    const Tensor token = token_of_row(slot_rows, num_rows);
    const Tensor row = at::arange(num_rows, token.options()).unsqueeze(1);
    const Tensor elsewhere = slot_rows.index_select(0, token).ne(row);
    auto [out_ids, out_weights] = unpack_routing(out, ids.size(1), weights.scalar_type());
    out_ids.copy_(
        ids.index_select(0, token).remainder(experts_per_rank).masked_fill_(elsewhere, -1));
    out_weights.copy_(weights.index_select(0, token).masked_fill_(elsewhere, 0));
    return out;
  }
  const Tensor dense_ids = ids.contiguous(), dense_weights = weights.contiguous();
  const Routing layout = routing_of(weights);
  const auto run = [&](const auto* values) {
    at::parallel_for(0, ids.size(0), grain(layout.bytes()), [&](int64_t begin, int64_t end) {
      pack_routing(layout, values, experts_per_rank, bytes(dense_weights),
                   slot_rows.const_data_ptr<int32_t>(), begin, end, bytes(out));
    });
  };
  if (ids.scalar_type() == at::kInt) {
    run(dense_ids.const_data_ptr<int32_t>());
  } else {
    run(dense_ids.const_data_ptr<int64_t>());
  }
  return out;
}

std::tuple<Tensor, Tensor> unpack_routing(const Tensor& routing, int64_t top_k,
                                          at::ScalarType weight_dtype) {
  const int64_t size = c10::elementSize(weight_dtype);
  const Routing layout{top_k, size};
  return {routing.narrow(1, layout.ids_at(), top_k * 4).view(at::kInt),
          routing.narrow(1, 0, top_k * size).view(weight_dtype)};
}

Tensor sum_rows(const Tensor& rows, const Tensor& slot_rows, int64_t ranks) {
  const int64_t tokens = slot_rows.size(0), top_k = slot_rows.size(1), hidden = rows.size(1);
  if (rows.is_cpu()) {
    const Tensor out = at::empty({tokens, hidden}, rows.options());
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows.scalar_type(), "combine", [&] {
      using Sum = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
      at::parallel_for(0, tokens, grain(hidden * sizeof(scalar_t)),
                       [&](int64_t begin, int64_t end) {
                         sum_rows<scalar_t, Sum>(rows.const_data_ptr<scalar_t>(),
                                                 slot_rows.const_data_ptr<int32_t>(), top_k, begin,
                                                 end, hidden, out.mutable_data_ptr<scalar_t>());
                       });
    });
    return out;
  }
  const at::ScalarType wide = rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Tensor sums = at::zeros({tokens, hidden}, rows.options().dtype(wide));
  if (rows.size(0) > 0 && tokens > 0) {
    constexpr int32_t kNone = std::numeric_limits<int32_t>::max();
    // Sorting twice moves repeated rows behind the distinct ones.
    Tensor order = std::get<0>(slot_rows.sort(1));
    Tensor repeated = order.lt(0);
    repeated.narrow(1, 1, top_k - 1)
        .logical_or_(order.narrow(1, 1, top_k - 1).eq(order.narrow(1, 0, top_k - 1)));
    order = std::get<0>(order.masked_fill(repeated, kNone).sort(1));
    for (int64_t k = 0; k < std::min(top_k, ranks); ++k) {
      const Tensor row = order.select(1, k), none = row.eq(kNone);
      const Tensor values = rows.index_select(0, row.masked_fill(none, 0)).to(wide);
      sums.add_(values.masked_fill_(none.unsqueeze(1), 0));
    }
  }
  return sums.to(rows.scalar_type());
}

Tensor gather_slots(const Tensor& rows, const Tensor& slot_rows) {
  const int64_t tokens = slot_rows.size(0), top_k = slot_rows.size(1);
  if (!rows.is_cpu()) {
    const Tensor padded = at::cat({rows, at::zeros({1, top_k}, rows.options())});
    return padded.gather(0, index_of(slot_rows, rows.size(0)));
  }
  const Tensor out = at::empty({tokens, top_k}, rows.options());
  gather_slots(bytes(rows), rows.element_size(), slot_rows.const_data_ptr<int32_t>(), top_k, tokens,
               bytes(out));
  return out;
}

}  // namespace moe::ep
