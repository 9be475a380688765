// A call whose beginning and end are apart.
#pragma once

#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "dispatch/shared_memory/communicator.h"

namespace moe::ep::shm {

// A call that has begun. It ends when its result is asked for, or when another call of the ranks
// begins, whichever comes first: so ranks that begin and end alike exchange alike.
template <typename Result>
class InFlight {
 public:
  InFlight(std::shared_ptr<Communicator::Call> call, std::function<Result()> rest)
      : call_(std::move(call)), rest_(std::move(rest)) {}

  void complete() {
    const std::lock_guard lock(mutex_);
    if (!call_) return;
    try {
      result_ = rest_();
      call_->finish();
    } catch (...) {
      error_ = std::current_exception();
    }
    rest_ = nullptr;
    call_ = nullptr;
  }

  Result take() {
    complete();
    if (error_) std::rethrow_exception(error_);
    return std::move(*result_);
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<Communicator::Call> call_;
  std::function<Result()> rest_;
  std::optional<Result> result_;
  std::exception_ptr error_;
};

}  // namespace moe::ep::shm
