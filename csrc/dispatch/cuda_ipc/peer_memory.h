// The memory by which the GPUs of one machine exchange rows, and what becomes of its faults.
//
// Each rank has control words, made once, and staging memory, which grows when a call needs more.
// The host waits for others when they are made and when they grow, and never in a call.
#pragma once

#include <condition_variable>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "dispatch/agreement.h"
#include "dispatch/cuda_ipc/device.h"
#include "dispatch/shared_memory/communicator.h"

namespace moe::ep::ipc {

// Numbers that calls read, in the device's memory.
struct Table {
  std::vector<int32_t> numbers;
  char* on_device;
  bool captured = false;  // by a graph
};

class PeerMemory {
 public:
  // All ranks of the communicator together, within `timeout` seconds.
  PeerMemory(std::shared_ptr<shm::Communicator> communicator, std::unique_ptr<Device> device,
             bool emulated, double timeout);
  ~PeerMemory();
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;

  // Why it cannot be used, on any rank; empty if it can.
  const std::string& obstacle() const { return obstacle_; }
  bool emulated() const { return emulated_; }
  Device& device() { return *device_; }
  const std::string& group() const { return communicator_->group(); }
  int rank() const { return communicator_->rank(); }

  // What a call needs that stages so many bytes, the same on all ranks; kRefused for a call that
  // stages nothing. `timeout` in seconds; `table`: what the call reads, or null.
  // Throws Unmatched where the call needs more memory than there is, but not on every rank.
  static constexpr int64_t kRefused = -1;
  struct Unmatched {};
  device::Link link(Phase phase, int64_t parity_bytes, double timeout, Table* table = nullptr);

  // One table for equal numbers. Who lets go of it frees nothing: that may be while a graph is
  // captured, when CUDA frees no memory, and while kernels run. The next who needs a table does;
  // what graphs use stays. Not while a graph is captured.
  std::shared_ptr<Table> table(const std::vector<int32_t>& numbers);
  // How many there are.
  int64_t tables() const { return static_cast<int64_t>(tables_.size()); }

  // Raises what the device has reported, before `phase` begins, and refuses what follows: a
  // shm::Error, or c10's error of arguments. Calls that brought too much are a RuntimeError, once.
  // With `peers` also if a rank is gone.
  void check(const char* phase, bool peers);

  // Whether the error that was raised last is one that all ranks have raised, once.
  bool take_agreed() { return std::exchange(agreed_, false); }

  // One call is launched at a time.
  std::mutex& mutex() { return mutex_; }
  // Called before the next call begins: it ends one that was left open meanwhile.
  void set_settle(std::function<void()> settle) { settle_ = std::move(settle); }
  void settle();
  // With the mutex: raises once this rank has gone, when the memory of others is not there any
  // more.
  void check_open(const char* phase) const;

  // Why there can be no further calls, for the others too. With the mutex if a call is
  // `broken_off`: it may lack its last kernels, and will not get them.
  void fail(const std::string& reason, bool broken_off = false) {
    communicator_->fail(reason);
    broken_off_ = broken_off_ || broken_off;
  }
  // The group is gone, or this process ends: a goodbye in two steps, each within the timeout of the
  // calls, or `at_most` seconds, so that those of several groups wait together. leave() ends what
  // was launched, and lets go of the others' memory; part() waits until they have of this rank's.
  // Both may be called twice, at first not for the `last` time: what is not over by then goes on.
  void leave(bool exits, double at_most, bool last);
  void part(double at_most, bool last);
  void close() {
    constexpr double kForever = std::numeric_limits<double>::infinity();
    leave(/*exits=*/false, kForever, /*last=*/true);
    part(kForever, /*last=*/true);
  }
  // Bytes of staging memory.
  int64_t reserved() const { return 2 * parity_bytes_; }

 private:
  struct Staging {
    char* own;
    std::vector<char*> peers;
  };

  std::vector<char*> open_all(shm::Communicator::Call& call, shm::Stage stage,
                              const Device::Handle& handle, char* own);
  char* open(int peer, const Device::Handle& handle);
  void close_all(const std::vector<char*>& peers);
  void grow(Phase phase, int64_t parity_bytes, double timeout);
  void check_unmatched();
  bool is_over(uint64_t calls);
  bool has_nothing_running();
  void watch();
  [[noreturn]] void raise_fault(device::Fault fault);

  const std::shared_ptr<shm::Communicator> communicator_;
  const std::unique_ptr<Device> device_;
  const bool emulated_;
  double timeout_;  // of the last call

  Staging control_{}, staging_{};
  std::vector<Staging> retired_;  // which captured graphs use
  std::vector<std::shared_ptr<Table>> tables_;
  int64_t parity_bytes_ = 0;
  bool captured_ = false;
  device::Report *report_ = nullptr, *report_on_device_ = nullptr;
  device::Orders *orders_ = nullptr, *orders_on_device_ = nullptr;
  uint64_t overflows_raised_ = 0;
  bool agreed_ = false;
  bool closed_ = false, broken_off_ = false;  // with the mutex
  std::optional<shm::Clock::time_point> parts_by_;

  std::mutex mutex_;
  std::function<void()> settle_;

  // On the heap, where a fork leaves it: its thread is not there to let go of it.
  struct Watch {
    std::mutex mutex;
    std::condition_variable wakes;
    bool ends = false;
    std::optional<shm::Clock::time_point> patience_ends;
    std::thread thread;
  };
  std::unique_ptr<Watch> watch_;
  std::string obstacle_;
};

}  // namespace moe::ep::ipc
