// The processes of a group's ranks: where a backend notices that a rank is missing and does not say
// which, they do.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <vector>

namespace moe::ep {

// Its number, what tells its machine and its namespace from others, and when it began: numbers are
// used again. As ranks tell it each other.
using Process = std::array<int64_t, 3>;

// Of a group. From any thread.
class Processes {
 public:
  Processes();

  // The one that this is.
  const Process& own() const { return own_; }
  // Those of all ranks, when these first hear of each other.
  void learn(std::vector<Process> ranks);
  // Which ranks of this machine have exited or are stopped; empty for none.
  std::string missing() const;
  // Whether one is stopped, which may be the one that answers for the store: it is not asked then.
  bool stopped() const { return missing().find("is stopped") != std::string::npos; }

  // This rank gives up `call`, which is the same on all ranks. The others that have not said so;
  // nothing if the group's store does not tell.
  std::optional<std::vector<int64_t>> give_up(c10d::ProcessGroup& group,
                                              const std::string& call) const;
  // What the first rank that failed said of it; empty if none has.
  std::string first_cause(c10d::ProcessGroup& group) const;
  // Says it, if this is the first. Returns what the first said.
  std::string say_cause(c10d::ProcessGroup& group, const std::string& cause) const;

 private:
  const Process own_;
  mutable std::mutex mutex_;
  std::vector<Process> ranks_;
};

}  // namespace moe::ep
