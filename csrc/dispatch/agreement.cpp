#include "dispatch/agreement.h"

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <tuple>

#include "dispatch/processes.h"

namespace moe::ep {
namespace {

// Of a build: another where what a line holds is another.
constexpr int64_t kMagic =
    0x4d6f45413345 + (int64_t{kFields} << 48) + (int64_t{std::tuple_size_v<Process>} << 56);

// Numbers dispatches, so that ranks can tell handles apart. A Lamport clock: a rank proposes its
// next tick, the headers carry every proposal to every rank, the largest is the number, and all
// clocks go past it. So the ranks of a group agree without a further exchange, no group sees a
// number twice, and a call that failed on some ranks leaves nothing behind to set right.
std::atomic<int64_t> next_dispatch{0};

void advance_past(int64_t dispatch) {
  int64_t next = next_dispatch.load();
  while (next <= dispatch && !next_dispatch.compare_exchange_weak(next, dispatch + 1)) {
  }
}

const char* name_of(int64_t field) {
  switch (field) {
    case kPhaseField:
      return "the phase";
    case kDispatcherField:
      return "the dispatcher";
    case kDispatchField:
      return "the dispatch whose handle they use";
    case kExpertsField:
      return "num_experts";
    case kPlacementField:
      return "the placement of the experts";
    case kHiddenField:
      return "H (the columns of x)";
    case kTopKField:
      return "K (the columns of topk_ids)";
    case kXDtypeField:
      return "x's dtype";
    case kExtraDtypeField:
      return "extra's dtype";
    case kExtraBytesField:
      return "the bytes of extra for a token";
    default:
      return "topk_weights' dtype";
  }
}

std::string value_of(int64_t field, int64_t value) {
  if (value < 0) return "none";
  if (field == kPhaseField && value <= static_cast<int64_t>(Phase::kCombineBackward)) {
    return to_string(static_cast<Phase>(value));
  }
  if (field == kDispatchField) return "dispatch " + std::to_string(value);
  if (field == kDispatcherField) return "dispatcher " + std::to_string(value);
  if (field == kPlacementField) return "placement " + std::to_string(value);
  const bool is_dtype =
      field == kXDtypeField || field == kWeightDtypeField || field == kExtraDtypeField;
  if (is_dtype && value < static_cast<int64_t>(c10::ScalarType::NumOptions)) {
    return c10::toString(static_cast<c10::ScalarType>(value));
  }
  return std::to_string(value);
}

}  // namespace

const char* to_string(Phase phase) {
  switch (phase) {
    case Phase::kDispatch:
      return "dispatch";
    case Phase::kCombine:
      return "combine";
    case Phase::kDispatchBackward:
      return "dispatch_backward";
    case Phase::kCombineBackward:
      return "combine_backward";
  }
  return "unknown";
}

Header make_header(Phase phase, const Terms& terms, bool refused) {
  Header header{};
  header[kMagicField] = kMagic;
  header[kPhaseField] = static_cast<int64_t>(phase);
  header[kRefusedField] = refused;
  header[kDispatcherField] = terms.dispatcher;
  header[kDispatchField] = phase == Phase::kDispatch ? next_dispatch++ : terms.dispatch;
  header[kExpertsField] = terms.experts;
  header[kPlacementField] = terms.placement;
  header[kHiddenField] = terms.hidden;
  header[kTopKField] = terms.top_k;
  header[kXDtypeField] = terms.x_dtype;
  header[kWeightDtypeField] = terms.weight_dtype;
  header[kExtraDtypeField] = terms.extra_dtype;
  header[kExtraBytesField] = terms.extra_bytes;
  return header;
}

Tally agree(Phase phase, const std::string& group, int64_t rank, const std::vector<Header>& mine,
            const std::vector<Header>& theirs) {
  const char* const op = to_string(phase);
  for (size_t peer = 0; peer < theirs.size(); ++peer) {
    const bool ours = theirs[peer][kMagicField] == kMagic;
    TORCH_CHECK(static_cast<int64_t>(peer) == rank || !ours || !theirs[peer][kRefusedField], op,
                ": rank ", peer, " of group '", group,
                "' found an error in its own arguments, so no rank has exchanged anything; its "
                "message says which");
    TORCH_CHECK_VALUE(ours, op, ": rank ", peer, " of group '", group,
                      "' speaks another protocol. Use one version of moe_kernels on all ranks.");
    for (int64_t field = 0; field < kTermFields; ++field) {
      const int64_t here = mine[peer][field], there = theirs[peer][field];
      const bool may_differ =
          field == kRefusedField || (field == kDispatchField && phase == Phase::kDispatch);
      TORCH_CHECK_VALUE(may_differ || here == there, op, ": the ranks of group '", group,
                        "' must agree on ", name_of(field), "; rank ", rank, " has ",
                        value_of(field, here), " and rank ", peer, " has ", value_of(field, there),
                        ". Make the same calls in the same order on every rank.");
    }
  }
  Tally tally;
  tally.refused = mine[0][kRefusedField] != 0;
  for (size_t peer = 0; peer < theirs.size(); ++peer) {
    tally.dispatch = std::max(tally.dispatch, theirs[peer][kDispatchField]);
    tally.sent.push_back(mine[peer][kRowsField]);
    tally.received.push_back(theirs[peer][kRowsField]);
    tally.slots_received += theirs[peer][kSlotsField];
  }
  advance_past(tally.dispatch);
  return tally;
}

}  // namespace moe::ep
