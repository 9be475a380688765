// Slots grouped by expert: a stable counting sort.
//
// T tokens, K experts a token, R = T * K slots, E experts.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "common/parallel.h"
#include "cpu/order.h"

namespace moe {

namespace {

constexpr int64_t kSlotsPerPart = 1 << 15;

void check_below(const char* op, const char* name, const at::Tensor& values, int64_t bound) {
  const int32_t* const value = data<int32_t>(values);
  const int64_t count = values.numel();
  const uint32_t limit = static_cast<uint32_t>(bound);
  uint32_t failures = 0;
  for (int64_t i = 0; i < count; ++i) failures |= static_cast<uint32_t>(value[i]) >= limit;
  if (failures == 0) return;
  const auto wrong = [&](int32_t v) { return static_cast<uint32_t>(v) >= limit; };
  TORCH_CHECK_INDEX(false, op, ": order.", name, " must be in [0, T * K = ", bound, "); got ",
                    *std::find_if(value, value + count, wrong));
}

// Sorts the slots into the outputs. Parts of the slots are counted and then placed in parallel;
// where a part places its slots follows from the counts of the parts before it, whatever their
// number.
template <typename Id>
void sort(const char* op, const Id* ids, int64_t slots, int64_t experts, int32_t* row_to_slot,
          int32_t* slot_to_row, int32_t* offsets) {
  const int64_t parts =
      std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), slots / kSlotsPerPart));
  const int64_t bins = experts + 1;
  const LocalArray<int32_t> places(parts * bins);
  const LocalArray<int64_t> first_bad(parts);
  std::fill(places.begin(), places.end(), 0);
  std::fill(first_bad.begin(), first_bad.end(), slots);
  const auto part_begin = [&](int64_t part) { return slots * part / parts; };
  const auto bin_of = [&](Id id) { return id < 0 ? experts : static_cast<int64_t>(id); };

  parallel_units(parts, [&](int64_t part, int) {
    int32_t* counts = places.data() + part * bins;
    for (int64_t s = part_begin(part); s < part_begin(part + 1); ++s) {
      if (ids[s] < -1 || ids[s] > experts) {
        first_bad[part] = s;
        return;
      }
      ++counts[bin_of(ids[s])];
    }
  });
  for (const int64_t bad : first_bad) {
    TORCH_CHECK_INDEX(bad == slots, op, ": topk_ids must be in [-1, ", experts, "] (-1 and ",
                      experts, " mean dropped); got ", ids[bad]);
  }

  int32_t row = 0;
  for (int64_t bin = 0; bin < bins; ++bin) {
    offsets[bin] = row;
    for (int64_t part = 0; part < parts; ++part) {
      row += std::exchange(places[part * bins + bin], row);
    }
  }
  parallel_units(parts, [&](int64_t part, int) {
    int32_t* next = places.data() + part * bins;
    for (int64_t s = part_begin(part); s < part_begin(part + 1); ++s) {
      const int32_t r = next[bin_of(ids[s])]++;
      row_to_slot[r] = static_cast<int32_t>(s);
      slot_to_row[s] = r;
    }
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> sort_by_expert(const at::Tensor& topk_ids,
                                                              int64_t num_experts) {
  Sorted sorted = sort_slots("sort_by_expert", topk_ids, num_experts);
  return {sorted.row_to_slot_R, sorted.slot_to_row_TK, sorted.offsets_E1};
}

}  // namespace

Order::Order(const char* op, const at::Tensor& row_to_slot, const at::Tensor& slot_to_row,
             const at::Tensor& offsets)
    : tokens(slot_to_row.size(0)),
      top_k(slot_to_row.size(1)),
      slots(tokens * top_k),
      experts(offsets.size(0) - 1),
      row_to_slot_R(row_to_slot.contiguous()),
      slot_to_row_TK(slot_to_row.contiguous()),
      offsets_E1(offsets.contiguous()) {
  check_offsets(op, offsets_E1, slots, "T * K");
  used = this->offsets()[experts];
  TORCH_CHECK_VALUE(row_to_slot.numel() == slots, op,
                    ": order.row_to_slot must have T * K = ", slots, " rows; got ",
                    row_to_slot.numel());
  check_below(op, "row_to_slot", row_to_slot_R, slots);
  check_below(op, "slot_to_row", slot_to_row_TK, slots);
}

void check_offsets(const char* op, const at::Tensor& offsets, int64_t rows, const char* rows_name) {
  const at::Tensor ends = offsets.contiguous();
  const int32_t* end = data<int32_t>(ends);
  const int64_t count = ends.numel();
  bool good = count > 0 && end[0] == 0 && end[count - 1] <= rows;
  for (int64_t i = 1; i < count; ++i) good &= end[i - 1] <= end[i];
  TORCH_CHECK_VALUE(good, op, ": offsets must rise from 0 to at most ", rows_name, " = ", rows,
                    "; got ", c10::ArrayRef<int32_t>(end, count));
}

Sorted sort_slots(const char* op, const at::Tensor& topk_ids, int64_t num_experts) {
  const at::Tensor ids = topk_ids.contiguous();
  const auto options = ids.options().dtype(at::kInt);
  Sorted out{at::empty({ids.numel()}, options), at::empty(ids.sizes(), options),
             at::empty({num_experts + 1}, options)};
  dispatch_index(ids.scalar_type(), op, [&]<typename Id>() {
    sort(op, data<Id>(ids), ids.numel(), num_experts, mutable_data<int32_t>(out.row_to_slot_R),
         mutable_data<int32_t>(out.slot_to_row_TK), mutable_data<int32_t>(out.offsets_E1));
  });
  return out;
}

LocalOrder::LocalOrder(const char* op, const at::Tensor& topk_ids, int64_t num_experts)
    : tokens_(topk_ids.size(0)),
      top_k_(topk_ids.size(1)),
      experts_(num_experts),
      memory_(2 * topk_ids.numel() + num_experts + 1) {
  const at::Tensor ids = topk_ids.contiguous();
  const int64_t slots = ids.numel();
  int32_t* const row_to_slot = memory_.data();
  dispatch_index(ids.scalar_type(), op, [&]<typename Id>() {
    sort(op, data<Id>(ids), slots, num_experts, row_to_slot, row_to_slot + slots,
         row_to_slot + 2 * slots);
  });
}

TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) { m.impl("sort_by_expert", sort_by_expert); }

}  // namespace moe
