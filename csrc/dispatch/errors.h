// Errors that are kept for later.
#pragma once

#include <exception>
#include <mutex>
#include <string>

namespace moe::ep {

// The first of several, from any thread.
class FirstError {
 public:
  void set(const std::string& error) const {
    const std::lock_guard lock(mutex_);
    if (text_.empty()) text_ = error;
  }
  std::string get() const {
    const std::lock_guard lock(mutex_);
    return text_;
  }

 private:
  mutable std::mutex mutex_;
  mutable std::string text_;
};

// What f raises, or null.
template <typename F>
std::exception_ptr caught(const F& f) {
  try {
    f();
  } catch (...) {
    return std::current_exception();
  }
  return nullptr;
}

}  // namespace moe::ep
