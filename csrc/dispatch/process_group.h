// The transport `process_group`: all-to-all through c10d, on any of its backends.
#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

namespace moe::ep {

enum class Phase : int64_t { kDispatch, kCombine, kDispatchBackward, kCombineBackward };

const char* to_string(Phase phase);

// What the ranks of a group must agree on in a call; -1 where the phase has no such thing.
struct Terms {
  int64_t dispatch = -1;  // the number of the dispatch that the handle is of
  int64_t experts = -1, hidden = -1, top_k = -1;
  int64_t x_dtype = -1, weight_dtype = -1;  // at::ScalarType
};

// One call of an op on the group named `group`. `timeout` in seconds bounds each exchange; 0 leaves
// it to the group.
class Exchange {
 public:
  Exchange(Phase phase, const std::string& group, double timeout);

  Phase phase() const { return phase_; }
  const std::string& group_name() const { return group_name_; }
  // A number for the name, the same within this process.
  int64_t group_tag() const { return static_cast<int64_t>(std::hash<std::string>{}(group_name_)); }
  int64_t rank() const { return rank_; }
  int64_t size() const { return size_; }

  // An exchange under way. It keeps its tensors; the group does too, should it be dropped.
  class Pending {
   public:
    // Blocks the CPU, or the current CUDA stream. DistBackendError where the exchange fails.
    void wait();

   private:
    friend class Exchange;
    const Exchange* exchange;
    const char* what;
    c10::intrusive_ptr<c10d::Work> work;
    at::Tensor input, output;
  };

  // Fills `output` with the rows that the ranks send, `received` of them, and sends `input`'s.
  // Both are contiguous and may hold any dtype: bytes travel.
  Pending start(const char* what, const at::Tensor& output, const at::Tensor& input,
                std::vector<int64_t> received, std::vector<int64_t> sent) const;

  // Every call starts with headers, so that calls that do not match are an error on all ranks and
  // never an exchange of unequal sizes, which some backends answer by corrupting memory. A rank
  // that finds an error in its own arguments says so to the others, instead of leaving them to
  // wait.
  struct Headers {
    at::Tensor mine, theirs;
    Pending pending;
  };
  // counts [P, 2] int64: rows and slots for each rank. refused: int64 scalar, 1 for such an error.
  Headers send_headers(const Terms& terms, const at::Tensor& counts,
                       const at::Tensor& refused) const;

  struct Tally {
    std::vector<int64_t> sent, received;  // rows for and from each rank
    int64_t slots_received;
    int64_t dispatch;  // the number of this dispatch, the same on all ranks
    bool refused;      // by this rank
  };
  // Waits for the headers, copies them to the host at once, and raises unless all ranks agree.
  Tally read_headers(Headers headers) const;

 private:
  [[noreturn]] void fail(const char* what, const std::string& reason) const;

  Phase phase_;
  std::string group_name_;
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  std::chrono::milliseconds timeout_;
  int64_t rank_, size_;
};

}  // namespace moe::ep
