// The processes of a group's ranks: where a backend notices that a rank is missing and does not say
// which, they do.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <string>
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
  // Tells them, as far as they are known, from others.
  std::string tag() const;

 private:
  const Process own_;
  mutable std::mutex mutex_;
  std::vector<Process> ranks_;
};

}  // namespace moe::ep
