// What the ranks tell each other at the start of every call, whatever carries it.
//
// Calls that do not match are an error on all ranks and never an exchange of unequal sizes, which
// some backends answer by corrupting memory. A rank that finds an error in its own arguments says
// so to the others, instead of leaving them to wait.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "dispatch/header.h"

namespace moe::ep {

enum class Phase : int64_t { kDispatch, kCombine, kDispatchBackward, kCombineBackward };

const char* to_string(Phase phase);

// What the ranks of a group must agree on in a call; -1 where the phase has no such thing.
struct Terms {
  int64_t dispatcher = -1;  // its number in the group
  int64_t dispatch = -1;    // the number of the dispatch that the handle is of
  int64_t experts = -1, placement = -1, hidden = -1, top_k = -1;
  int64_t x_dtype = -1, weight_dtype = -1, extra_dtype = -1;  // at::ScalarType
  int64_t extra_bytes = -1;                                   // a token
};

using Header = std::array<int64_t, kFields>;

// Without rows and slots. A dispatch gets a number that no other has.
Header make_header(Phase phase, const Terms& terms, bool refused);

struct Tally {
  std::vector<int64_t> sent, received;  // rows for and from each rank
  int64_t slots_received = 0;
  int64_t dispatch = -1;  // the number of this dispatch, the same on all ranks
  bool refused = false;   // by this rank
};

// Raises unless all ranks agree. Headers [P] for, and from, each rank.
Tally agree(Phase phase, const std::string& group, int64_t rank, const std::vector<Header>& mine,
            const std::vector<Header>& theirs);

}  // namespace moe::ep
