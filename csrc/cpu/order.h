// The order of slots by expert, as sort_by_expert gives it.
//
// T tokens, K experts a token, R = T * K slots, E experts.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/dtypes.h"
#include "cpu/local_array.h"

namespace moe {

struct Order {
  // Checks every entry, so that what follows can index without checks.
  Order(const char* op, const at::Tensor& row_to_slot, const at::Tensor& slot_to_row,
        const at::Tensor& offsets);

  const int32_t* row_to_slot() const { return data<int32_t>(row_to_slot_R); }
  const int32_t* slot_to_row() const { return data<int32_t>(slot_to_row_TK); }
  const int32_t* offsets() const { return data<int32_t>(offsets_E1); }

  int64_t tokens, top_k, slots, experts;
  int64_t used;  // rows that belong to an expert: offsets[E]
  at::Tensor row_to_slot_R, slot_to_row_TK, offsets_E1;  // contiguous
};

// Raises ValueError unless offsets rise from 0 to at most rows.
void check_offsets(const char* op, const at::Tensor& offsets, int64_t rows, const char* rows_name);

// An order wherever it lies.
struct OrderView {
  int64_t tokens, top_k, experts;
  const int32_t *row_to_slot, *slot_to_row, *offsets;

  int64_t used() const { return offsets[experts]; }
};

struct Sorted {
  at::Tensor row_to_slot_R, slot_to_row_TK, offsets_E1;

  OrderView view() const {
    return {slot_to_row_TK.size(0),       slot_to_row_TK.size(1),        offsets_E1.size(0) - 1,
            data<int32_t>(row_to_slot_R), data<int32_t>(slot_to_row_TK), data<int32_t>(offsets_E1)};
  }
};

// Raises IndexError, naming op, for an id outside [-1, num_experts].
Sorted sort_slots(const char* op, const at::Tensor& topk_ids, int64_t num_experts);

// The same for the time of one call.
class LocalOrder {
 public:
  LocalOrder(const char* op, const at::Tensor& topk_ids, int64_t num_experts);

  OrderView view() const {
    const int32_t* const row_to_slot = memory_.data();
    const int64_t slots = tokens_ * top_k_;
    return {tokens_, top_k_, experts_, row_to_slot, row_to_slot + slots, row_to_slot + 2 * slots};
  }

 private:
  int64_t tokens_, top_k_, experts_;
  LocalArray<int32_t> memory_;
};

}  // namespace moe
