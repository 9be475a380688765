#pragma once

#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace c10d {

// Of the rank that a thread is.
inline thread_local std::shared_ptr<ProcessGroup> group_of_thread;

inline std::shared_ptr<ProcessGroup> resolve_process_group(const std::string&) {
  return group_of_thread;
}

}  // namespace c10d
