#include "dispatch/process_group.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/version.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <sstream>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <utility>

namespace moe::ep {
namespace {

using at::Tensor;

constexpr int64_t kMagic = 0x4d6f45413242;

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

// The columns of a header.
enum Field : int64_t {
  kMagicField,
  kPhaseField,
  kRefusedField,
  kDispatchField,
  kExpertsField,
  kHiddenField,
  kTopKField,
  kXDtypeField,
  kWeightDtypeField,
  kTermFields,  // the above are equal on all ranks; what follows is for the receiver
  kRowsField = kTermFields,
  kSlotsField,
  kFields,
};

const char* name_of(int64_t field) {
  switch (field) {
    case kMagicField:
      return "the version of its headers";
    case kPhaseField:
      return "the phase";
    case kDispatchField:
      return "the dispatch whose handle they use";
    case kExpertsField:
      return "num_experts";
    case kHiddenField:
      return "H (the columns of x)";
    case kTopKField:
      return "K (the columns of topk_ids)";
    case kXDtypeField:
      return "x's dtype";
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
  const bool is_dtype = field == kXDtypeField || field == kWeightDtypeField;
  if (is_dtype && value < static_cast<int64_t>(at::ScalarType::NumOptions)) {
    return c10::toString(static_cast<at::ScalarType>(value));
  }
  return std::to_string(value);
}

// Without the stack of c10's errors, which Python shows for the error that is raised.
std::string reason(const std::exception& error) {
  const auto* const known = dynamic_cast<const c10::Error*>(&error);
  return known ? known->what_without_backtrace() : error.what();
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

Exchange::Exchange(Phase phase, const std::string& group, double timeout)
    : phase_(phase),
      group_name_(group),
      group_(c10d::resolve_process_group(group)),
      timeout_(static_cast<int64_t>(std::ceil(timeout * 1000))),
      rank_(group_->getRank()),
      size_(group_->getSize()) {}

void Exchange::fail(const char* what, const std::string& reason) const {
  std::ostringstream text;
  text << to_string(phase_) << ": the exchange of " << what << " failed on rank " << rank_ << " of "
       << size_ << " in group '" << group_name_ << "'. A rank has died, is stuck, or has not made "
       << "this call: every rank of the group must make the same calls in the same order. The "
       << "backend says: " << reason;
  TORCH_CHECK_WITH(DistBackendError, false, text.str());
}

Exchange::Pending Exchange::start(const char* what, const Tensor& output, const Tensor& input,
                                  std::vector<int64_t> received, std::vector<int64_t> sent) const {
  Pending pending;
  pending.exchange = this;
  pending.what = what;
  pending.output = output.view(at::kByte);
  pending.input = input.view(at::kByte);
  c10d::AllToAllOptions options;
  if (timeout_.count() > 0) options.timeout = timeout_;
  try {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13
    pending.work =
        group_->all_to_all_single(pending.output, pending.input, received, sent, options);
#else
    pending.work = group_->alltoall_base(pending.output, pending.input, received, sent, options);
#endif
  } catch (const std::exception& error) {
    fail(what, reason(error));
  }
  return pending;
}

void Exchange::Pending::wait() {
  // Where work runs on a stream, waiting with a time limit would block the host: there the watchdog
  // of the backend applies the limit given to the call.
  const bool limited = output.is_cpu() && exchange->timeout_.count() > 0;
  try {
    TORCH_CHECK(limited ? work->wait(exchange->timeout_) : work->wait(), "the work was aborted");
  } catch (const std::exception& error) {
    exchange->fail(what, reason(error));
  }
}

Exchange::Headers Exchange::send_headers(const Terms& terms, const Tensor& counts,
                                         const Tensor& refused) const {
  const int64_t dispatch = phase_ == Phase::kDispatch ? next_dispatch++ : terms.dispatch;
  const std::vector<int64_t> fields = {kMagic,
                                       static_cast<int64_t>(phase_),
                                       /*refused=*/0,
                                       dispatch,
                                       terms.experts,
                                       terms.hidden,
                                       terms.top_k,
                                       terms.x_dtype,
                                       terms.weight_dtype,
                                       /*rows=*/0,
                                       /*slots=*/0};
  Headers headers;
  headers.mine = at::tensor(fields, at::kLong).to(counts.device()).repeat({size_, 1});
  headers.mine.select(1, kRefusedField).copy_(refused);
  headers.mine.narrow(1, kRowsField, 2).copy_(counts);
  headers.theirs = at::empty_like(headers.mine);
  const std::vector<int64_t> one(size_, 1);
  headers.pending = start("token counts", headers.theirs, headers.mine, one, one);
  return headers;
}

Exchange::Tally Exchange::read_headers(Headers headers) const {
  headers.pending.wait();
  const Tensor both = at::stack({headers.mine, headers.theirs}).cpu();
  const auto table = both.accessor<int64_t, 3>();
  const auto mine = table[0], theirs = table[1];
  const char* const op = to_string(phase_);
  for (int64_t peer = 0; peer < size_; ++peer) {
    const bool ours = theirs[peer][kMagicField] == kMagic;
    TORCH_CHECK(peer == rank_ || !ours || !theirs[peer][kRefusedField], op, ": rank ", peer,
                " of group '", group_name_,
                "' found an error in its own arguments, so no rank has exchanged anything; its "
                "message says which");
    for (int64_t field = 0; field < kTermFields; ++field) {
      const int64_t here = mine[peer][field], there = theirs[peer][field];
      const bool may_differ =
          field == kRefusedField || (field == kDispatchField && phase_ == Phase::kDispatch);
      TORCH_CHECK_VALUE(may_differ || here == there, op, ": the ranks of group '", group_name_,
                        "' must agree on ", name_of(field), "; rank ", rank_, " has ",
                        value_of(field, here), " and rank ", peer, " has ", value_of(field, there),
                        ". Make the same calls in the same order on every rank.");
    }
  }
  Tally tally{{}, {}, 0, -1, mine[0][kRefusedField] != 0};
  for (int64_t peer = 0; peer < size_; ++peer) {
    tally.dispatch = std::max(tally.dispatch, theirs[peer][kDispatchField]);
    tally.sent.push_back(mine[peer][kRowsField]);
    tally.received.push_back(theirs[peer][kRowsField]);
    tally.slots_received += theirs[peer][kSlotsField];
  }
  advance_past(tally.dispatch);
  return tally;
}

}  // namespace moe::ep
