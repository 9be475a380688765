#pragma once

#include <sstream>
#include <stdexcept>

namespace c10 {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
  const char* what_without_backtrace() const { return what(); }
};

template <typename... Parts>
void check(bool right, const Parts&... parts) {
  if (right) return;
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

}  // namespace c10

#define TORCH_CHECK(right, ...) ::c10::check(right, __VA_ARGS__)
#define TORCH_CHECK_WITH(type, right, ...) ::c10::check(right, __VA_ARGS__)
