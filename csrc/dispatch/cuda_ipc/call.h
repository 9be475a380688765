// A call of the transport `cuda_ipc`: how it begins and ends, and what becomes of its errors.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/util/Exception.h>

#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>

#include "dispatch/dispatcher.h"

namespace moe::ep::ipc {

// f(), whose errors end the use of the ranks' memory, unless all ranks have raised alike: the
// others wait for what will not come. `launches`: kernels of a call, which may then lack those that
// end it.
template <typename F>
auto guarded(PeerMemory& memory, const F& f, bool launches = false) {
  try {
    return f();
  } catch (const shm::Error& error) {
    memory.fail(error.what(), launches);
    TORCH_CHECK_WITH(DistBackendError, false, error.what());
  } catch (const std::exception& error) {
    const auto* const known = dynamic_cast<const c10::Error*>(&error);
    if (!memory.take_agreed()) {
      memory.fail(known ? known->what_without_backtrace() : error.what(), launches);
    }
    throw;
  }
}
template <typename F>
auto launching(PeerMemory& memory, const F& f) {
  return guarded(memory, f, /*launches=*/true);
}

// The stream that a call begins on, where there are streams.
std::optional<c10::Stream> stream_of(const at::Tensor& tensor);
// What was made on another stream is used, and freed, on this one.
void record_stream(const at::Tensor& tensor, c10::Stream stream);
void record_stream(const Arrived& arrived, c10::Stream stream);
void record_stream(const std::tuple<at::Tensor, at::Tensor>& tensors, c10::Stream stream);

// A call that has begun: its other kernels are launched when its result is asked for, or when
// another call begins, whichever comes first; on the stream of the first.
template <typename Result>
class InFlight {
 public:
  InFlight(Phase phase, std::shared_ptr<PeerMemory> memory, std::optional<c10::Stream> stream,
           Ending<Result> rest)
      : phase_(phase),
        memory_(std::move(memory)),
        stream_(stream),
        rest_(std::move(rest)),
        captured_(memory_->device().is_capturing()) {}
  ~InFlight() {
    if (rest_) memory_->fail("a call was begun and never ended");
  }
  InFlight(const InFlight&) = delete;
  InFlight& operator=(const InFlight&) = delete;

  // With the memory's mutex.
  void complete() {
    if (!rest_) return;
    try {
      const c10::OptionalStreamGuard guard(stream_);
      result_ = launching(*memory_, [&] {
        memory_->check_open(to_string(phase_));
        TORCH_CHECK(memory_->device().is_capturing() == captured_, "a call that begins while a ",
                    "graph is captured must end then, and no other; wait for it on the same side");
        Result result = rest_();
        memory_->device().mark();
        return result;
      });
    } catch (...) {
      error_ = std::current_exception();
    }
    rest_ = nullptr;
    memory_->set_settle(nullptr);  // it is this call's: one is open at a time
  }

  Result take() {
    const std::lock_guard lock(memory_->mutex());
    complete();
    if (error_) std::rethrow_exception(error_);
    Result result = std::move(*result_);
    if (stream_) {
      const c10::impl::VirtualGuardImpl streams(stream_->device_type());
      const c10::Stream here = streams.getStream(stream_->device());
      if (here != *stream_) {
        c10::Event event(stream_->device_type());
        event.record(*stream_);
        event.block(here);
        record_stream(result, here);
      }
    }
    return result;
  }

 private:
  Phase phase_;
  std::shared_ptr<PeerMemory> memory_;
  std::optional<c10::Stream> stream_;
  Ending<Result> rest_;
  bool captured_;
  std::optional<Result> result_;
  std::exception_ptr error_;
};

// A call of all ranks of which the arguments are right on this one.
class Call {
 public:
  Call(Phase phase, const DispatcherRef& dispatcher, Terms terms)
      : phase_(phase), owner_(dispatcher), terms_(terms) {}

  const OnGpus& on_gpus() const { return owner_->on_gpus; }
  PeerMemory& memory() const { return *owner_->on_gpus.memory; }

  device::Link link(int64_t bytes) const;
  // For a kernel that stages so many bytes.
  device::StageArgs stage(int64_t bytes, bool refused = false) const;
  // Equal for the plans of one dispatcher, on this rank.
  int64_t tag() const { return owner_->group_tag() ^ (owner_->number << 1); }
  // Says to the other ranks that this one has an error in its arguments.
  void refuse() const { say_nothing_else(stage(PeerMemory::kRefused, true)); }

 private:
  // A call of a header alone.
  void say_nothing_else(const device::StageArgs& header) const;

  Phase phase_;
  DispatcherRef owner_;
  Terms terms_;
};

void check_device(Phase phase, const OnGpus& gpus, const at::Tensor& tensor);

// Begins a call: check() raises for wrong arguments, first(call) launches one kernel and returns
// what launches the others.
template <typename Result, typename Check, typename First>
Ending<Result> begin(Phase phase, const DispatcherRef& dispatcher, const at::Tensor& tensor,
                     const Check& check, const First& first) {
  const std::shared_ptr<PeerMemory> memory = dispatcher->on_gpus.memory;
  const std::lock_guard lock(memory->mutex());
  memory->settle();
  guarded(*memory, [&] {
    memory->check(to_string(phase), /*peers=*/true);
    memory->device().follow();
  });
  Terms terms = terms_of(*dispatcher);
  try {
    check_device(phase, dispatcher->on_gpus, tensor);
    check(terms);
  } catch (...) {
    const auto refusal = std::current_exception();
    try {
      launching(*memory, [&] { Call(phase, dispatcher, terms_of(*dispatcher)).refuse(); });
    } catch (const c10::Error&) {
      // The ranks that did not refuse have said so, or the memory is of no use.
    }
    std::rethrow_exception(refusal);
  }
  const Call call(phase, dispatcher, terms);
  Ending<Result> rest = launching(*memory, [&] {
    Ending<Result> ending = first(call);
    memory->device().mark();
    return ending;
  });
  const auto in_flight =
      std::make_shared<InFlight<Result>>(phase, memory, stream_of(tensor), std::move(rest));
  // Whether or not somebody still waits for it: the others do.
  memory->set_settle([in_flight] { in_flight->complete(); });
  return [in_flight] { return in_flight->take(); };
}

}  // namespace moe::ep::ipc
