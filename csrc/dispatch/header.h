// What ranks tell each other of a call, as a line of numbers. Plain C++, for devices too.
#pragma once

#include <cstdint>

namespace moe::ep {

// The columns of a header.
enum Field : int64_t {
  kMagicField,
  kPhaseField,
  kRefusedField,
  kDispatcherField,
  kDispatchField,
  kExpertsField,
  kPlacementField,
  kHiddenField,
  kTopKField,
  kXDtypeField,
  kWeightDtypeField,
  kExtraDtypeField,
  kExtraBytesField,
  kTermFields,  // the above are equal on all ranks; what follows is for the receiver
  kRowsField = kTermFields,
  kSlotsField,
  kFields,
};

// Words of a line by which ranks of all builds begin, of which the first tells builds apart: it is
// never changed, for some backends answer lines of unequal length by corrupting memory.
constexpr int64_t kLineWords = 32;

// In kRefusedField: an error in the arguments of the rank; found by the host, or by the device: a
// slot without a valid id, a handle that another dispatcher made.
constexpr int64_t kRefusedByHost = 1, kRefusedForSlot = 2, kRefusedForHandle = 3;

}  // namespace moe::ep
