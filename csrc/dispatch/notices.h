// What the ranks of a group say of exchanges that they refuse, by the group's store: of those that
// begin without headers, since reading them would make the host wait for a device. Who has waited
// for a moment looks there.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "dispatch/errors.h"
#include "dispatch/group_store.h"
#include "dispatch/processes.h"

namespace moe::ep {

// Of a group. From any thread.
class Notices {
 public:
  // Between looks.
  static constexpr std::chrono::milliseconds kMoment{100};

  // The ranks have agreed on a dispatch: what came before it is over. Its number tells the notices
  // that follow from all others.
  void dispatched(int64_t dispatch);
  // An exchange without headers: its number since a dispatch, the same on all ranks.
  struct Place {
    int64_t dispatch = -1, number = 0;
  };
  Place begin();
  // It is over, and so are those before it.
  void end(Place place);

  // This rank does not take part in the next exchange, for an error in its arguments.
  void refuse(c10d::ProcessGroup& group);
  // This rank cannot begin an exchange that the others have agreed on with it.
  void break_off(c10d::ProcessGroup& group, const std::string& text);
  // Before an exchange: waits until all ranks have refused what this one has, or raises, since what
  // it began would meet what the others have begun in that place. `limit` of 0: for long.
  void settle(c10d::ProcessGroup& group, const char* phase, std::chrono::milliseconds limit);
  // Whether another rank may have said something of what this one waits for.
  bool may_concern() const;
  // Raises if another rank has refused an exchange that this one has begun, has found such a rank,
  // or has broken one off: after that all dispatchers of the group are of no use.
  void look(c10d::ProcessGroup& group, const char* phase);

  Processes processes;
  GroupStore store;

  // Why there can be no further exchanges; empty while there can.
  std::string failure() const { return failure_.get(); }

 private:
  bool all_refused(c10d::ProcessGroup& group);
  std::string key(int64_t number) const;
  std::string found(c10d::ProcessGroup& group);

  mutable std::mutex mutex_;
  int64_t dispatch_ = -1, begun_ = 0, over_ = 0;
  std::map<int64_t, int64_t> refused_;  // how often this rank has refused the exchange of a number
  int64_t settled_ = 0;                 // so often all ranks have refused the next
  FirstError failure_;
};

// Those of a group in this process.
std::shared_ptr<Notices> notices_of(const c10::intrusive_ptr<c10d::ProcessGroup>& group);

}  // namespace moe::ep
