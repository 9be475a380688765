// How a rank of the transport `cuda_ipc` goes: its memory is read by kernels of others, of which
// their hosts know no more than that they were launched.
//
// A rank that goes first lets what it has launched come to its end, and says then how many calls it
// has taken part in. Each other rank answers when nothing that it has launched, up to there, reads
// that memory any more, and nothing can be launched that would. The answer comes from its thread
// that watches, whatever the program does meanwhile.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <thread>
#include <utility>

#include "dispatch/cuda_ipc/peer_memory.h"

namespace moe::ep::ipc {
namespace {

using device::Fault;

constexpr auto kSlice = std::chrono::milliseconds(20);  // between looks at the peers
constexpr auto kUnmapping = std::chrono::seconds(1);    // for the others to unmap our memory

uint64_t read(const uint64_t& word) {
  return std::atomic_ref(const_cast<uint64_t&>(word)).load(std::memory_order_acquire);
}

shm::Clock::duration patience(double seconds) {
  return std::chrono::duration_cast<shm::Clock::duration>(
      std::chrono::duration<double>(std::clamp(seconds, 0.0, 1e9)));
}

// f(), over and over, until it is true or too late; whether it is true.
template <typename F>
bool wait_until(shm::Clock::time_point deadline, const F& f) {
  while (!f()) {
    if (shm::Clock::now() >= deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

}  // namespace

PeerMemory::~PeerMemory() { close(); }

void PeerMemory::check_open(const char* phase) const {
  if (!closed_) return;
  communicator_->check_usable(phase);
  throw shm::Error(std::string(phase) + ": group '" + group() + "' is about to be left");
}

// Of this rank, on its device. One with an error carries out nothing.
bool PeerMemory::has_nothing_running() {
  try {
    return device_->is_idle();
  } catch (const shm::Error&) {
    return true;
  }
}

// Whether nothing runs, or is still to be launched, of what this rank has begun, nor of the first
// `calls` calls. Who begins another after that finds the rank gone before anything is launched.
bool PeerMemory::is_over(uint64_t calls) {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock || settle_) return false;
  try {
    if (!device_->is_idle()) return false;
  } catch (const shm::Error&) {
    return true;  // a device with an error carries out nothing
  }
  // Graphs are launched without this class; that they do nothing after a fault, it knows.
  return read(report_->ended) >= calls || read(report_->fault) != 0 || broken_off_;
}

// A rank that is gone ends the waiting for it alone: those that others still bring may come.
void PeerMemory::watch() {
  uint64_t let_go = 0;
  std::unique_lock lock(watch_->mutex);
  while (!watch_->wakes.wait_for(lock, kSlice, [&] { return watch_->ends; })) {
    const bool impatient = watch_->patience_ends && shm::Clock::now() > *watch_->patience_ends;
    uint64_t gone = impatient || !communicator_->failure().empty() ? ~uint64_t{0} : 0;
    for (int p = 0; p < communicator_->size(); ++p) {
      const uint64_t bit = uint64_t{1} << p;
      if (!communicator_->trouble_with(p).empty()) gone |= bit;
      const auto calls = communicator_->goes_after(p);
      if (!calls || let_go & bit || !is_over(*calls)) continue;
      let_go |= bit;
      communicator_->let_go_of(bit);
    }
    if (gone) std::atomic_ref(orders_->gone).store(gone, std::memory_order_release);
  }
}

void PeerMemory::leave(bool exits, double at_most, bool last) {
  // A fork of the rank is not the rank, and what was never joined does not end it.
  if (!communicator_->is_owner()) return static_cast<void>(watch_.release());
  if (!watch_) return;
  const auto begin = shm::Clock::now();
  const auto deadline = begin + patience(std::min(timeout_, at_most));
  std::function<void()> open;  // a call that is open keeps this
  bool leaves = false;
  const auto closed = [&] {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    // Another thread may wait for the others in the midst of a call.
    if (!lock || (!last && !closed_ && !has_nothing_running())) return false;
    leaves = !std::exchange(closed_, true);
    if (leaves) open.swap(settle_);
    return true;
  };
  if (!wait_until(deadline, closed) || !leaves) return;
  parts_by_ = last ? deadline : begin + patience(timeout_);
  const auto tell = [&](const auto& what) {
    {
      const std::lock_guard lock(watch_->mutex);
      what();
    }
    watch_->wakes.notify_all();
  };
  // What was launched is carried out yet, if the others come so far; watch() ends it if not.
  tell([&] { watch_->patience_ends = parts_by_; });
  uint64_t calls = 0;
  bool idle = true;
  try {
    device_->synchronize();
    calls = read(report_->ended);
    // Those after it brought nothing, to nobody it may be.
    if (read(report_->fault)) calls = std::min(calls, report_->epoch - 1);
  } catch (const std::exception&) {
    idle = false;  // of no use any more, and the driver may be gone
  }
  tell([&] { watch_->ends = true; });
  watch_->thread.join();
  try {
    retired_.push_back(std::move(control_));
    retired_.push_back(std::move(staging_));
    for (const Staging& memory : retired_) {
      if (idle) close_all(memory.peers);
    }
    for (const auto& table : tables_) {
      if (idle) device_->free(table->on_device);
    }
  } catch (const std::exception&) {
    idle = false;
  }
  if (!idle) retired_.clear();
  communicator_->close(exits);
  communicator_->announce_going(calls);
  communicator_->let_go_of(shm::Communicator::kEverybody);
}

// Memory that another rank may still have mapped stays until this process ends.
void PeerMemory::part(double at_most, bool last) {
  if (!parts_by_) return;
  const auto deadline = std::min(*parts_by_, shm::Clock::now() + patience(at_most));
  const bool alone =
      wait_until(deadline, [&] { return communicator_->all_let_go(/*unmapped=*/false); });
  if (alone || last) parts_by_.reset();
  if (!alone) return;
  const auto unmapped = [&] { return communicator_->all_let_go(/*unmapped=*/true); };
  if (!wait_until(shm::Clock::now() + kUnmapping, unmapped)) return;
  try {
    for (const Staging& memory : retired_) {
      if (memory.own) device_->free(memory.own);
    }
  } catch (const std::exception&) {
    // The driver may be gone by then.
  }
}

}  // namespace moe::ep::ipc
