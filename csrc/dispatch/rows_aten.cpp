// The steps of an exchange by ATen's functions, for devices without loops of their own. No step
// makes the host wait for the device.
#include <ATen/ATen.h>

#include <algorithm>
#include <limits>

#include "dispatch/layout.h"
#include "dispatch/rows.h"

namespace moe::ep::by_aten {
namespace {

using at::Tensor;

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

// [T, K, 2]: the rank of each slot's expert, and its number there; anything where `invalid`.
Tensor homes_of(const Tensor& ids, const Tensor& invalid, const Placement& placement) {
  const int64_t experts = placement.experts(), copies = placement.most_copies();
  const Tensor expert = ids.to(at::kLong).masked_fill(invalid, 0);
  if (const int64_t each = placement.experts_per_rank(); each > 0) {
    return at::stack({expert.floor_divide(each), expert.remainder(each)}, 2);
  }
  // Expert by copy; of one that has a preferred copy, every column is that.
  const Tensor table = at::empty({experts, copies, 2}, at::kLong);
  const Tensor counts = at::empty({experts}, at::kLong);
  for (int64_t e = 0; e < experts; ++e) {
    const auto homes = placement.homes(e);
    counts.mutable_data_ptr<int64_t>()[e] = static_cast<int64_t>(homes.size());
    for (int64_t c = 0; c < copies; ++c) {
      const auto choice = placement.preferred(e) < 0 ? c % static_cast<int64_t>(homes.size())
                                                     : int64_t{placement.preferred(e)};
      int64_t* const entry = table.mutable_data_ptr<int64_t>() + (e * copies + c) * 2;
      entry[0] = homes[choice].rank;
      entry[1] = homes[choice].local;
    }
  }
  const Tensor token = at::arange(ids.size(0), expert.options()).unsqueeze(1);
  const Tensor copy = token.remainder(beside(ids, counts).take(expert));
  return beside(ids, table)
      .view({experts * copies, 2})
      .index_select(0, expert.mul(copies).add_(copy).flatten())
      .view({ids.size(0), ids.size(1), 2});
}

}  // namespace

Layout make_layout(const Tensor& ids, const Placement& placement, int64_t ranks) {
  const int64_t tokens = ids.size(0), experts = placement.experts();
  const Tensor wide = ids.to(at::kLong);
  const Tensor invalid = wide.lt(0).logical_or_(wide.ge(experts));
  // Slots without an expert go to a rank that does not exist.
  const Tensor owner =
      homes_of(ids, invalid, placement).select(2, 0).masked_fill(invalid, ranks).contiguous();
  const Tensor goes = at::zeros({tokens, ranks + 1}, ids.options().dtype(at::kBool))
                          .scatter_(1, owner, true)
                          .narrow(1, 0, ranks)
                          .t()
                          .contiguous();  // [P, T]
  const Tensor row =
      at::cat({goes.flatten().cumsum(0, at::kLong).sub_(1), at::full({1}, -1, wide.options())});
  const Tensor token = at::arange(tokens, wide.options()).unsqueeze(1);
  const Tensor pair = owner.mul(tokens).add_(token).masked_fill_(invalid, ranks * tokens);
  const Tensor slots = at::zeros({ranks + 1}, wide.options())
                           .scatter_add_(0, owner.flatten(), at::ones_like(owner).flatten())
                           .narrow(0, 0, ranks);
  return {row.take(pair).to(at::kInt), at::stack({goes.sum(1, false, at::kLong), slots}, 1),
          wide.lt(-1).logical_or_(wide.gt(experts)).any().to(at::kLong)};
}

Tensor pack_rows(const Tensor& x, const Tensor& slot_rows, int64_t num_rows) {
  if (at::isFloat8Type(x.scalar_type())) {  // which not every device can index
    const Tensor bytes = x.contiguous().view(at::kByte);
    return pack_rows(bytes, slot_rows, num_rows).view(x.scalar_type());
  }
  return x.index_select(0, token_of_row(slot_rows, num_rows));
}

Tensor pack_routing(const Tensor& ids, const Tensor& weights, const Tensor& slot_rows,
                    int64_t num_rows, const Placement& placement) {
  const Tensor out = empty_routing(weights, num_rows).zero_();
  const Tensor token = token_of_row(slot_rows, num_rows);
  const Tensor row = at::arange(num_rows, token.options()).unsqueeze(1);
  const Tensor elsewhere = slot_rows.index_select(0, token).ne(row);
  const auto [out_ids, out_weights] = unpack_routing(out, ids.size(1), weights.scalar_type());
  const Tensor local = homes_of(ids, slot_rows.lt(0), placement).select(2, 1);
  out_ids.copy_(local.index_select(0, token).masked_fill_(elsewhere, -1));
  out_weights.copy_(weights.index_select(0, token).masked_fill_(elsewhere, 0));
  return out;
}

Tensor sum_rows(const Tensor& rows, const Tensor& slot_rows, int64_t ranks) {
  const int64_t tokens = slot_rows.size(0), top_k = slot_rows.size(1);
  const at::ScalarType wide = rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Tensor sums = at::zeros({tokens, rows.size(1)}, rows.options().dtype(wide));
  Tensor first, alone;
  if (rows.size(0) > 0) {
    constexpr int32_t kNone = std::numeric_limits<int32_t>::max();
    Tensor order = std::get<0>(slot_rows.sort(1));
    Tensor repeated = order.lt(0);
    repeated.narrow(1, 1, top_k - 1)
        .logical_or_(order.narrow(1, 1, top_k - 1).eq(order.narrow(1, 0, top_k - 1)));
    // Sorted again, what is not a distinct row comes last.
    order = std::get<0>(order.masked_fill(repeated, kNone).sort(1));
    for (int64_t k = 0; k < std::min(top_k, ranks); ++k) {
      const Tensor row = order.select(1, k), none = row.eq(kNone);
      const Tensor values = rows.index_select(0, row.masked_fill(none, 0));
      if (k == 0) first = values, alone = none.logical_not();
      if (k == 1) alone.logical_and_(none);
      sums.add_(values.to(wide).masked_fill(none.unsqueeze(1), 0));
    }
  }
  const Tensor rounded = sums.to(rows.scalar_type());
  // A row that is alone is copied, as elsewhere: a sum would lose the sign of its zeros.
  return first.defined() ? at::where(alone.unsqueeze(1), first, rounded) : rounded;
}

Tensor gather_slots(const Tensor& rows, const Tensor& slot_rows) {
  const Tensor padded = at::cat({rows, at::zeros({1, rows.size(1)}, rows.options())});
  return padded.gather(0, index_of(slot_rows, rows.size(0)));
}

}  // namespace moe::ep::by_aten
