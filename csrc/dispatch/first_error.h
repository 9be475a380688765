// The first of several errors.
#pragma once

#include <mutex>
#include <string>

namespace moe::ep {

// From any thread.
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

}  // namespace moe::ep
