#pragma once

#include <sstream>
#include <string>

namespace c10 {

template <typename Values>
std::string Join(const std::string& between, const Values& values) {
  std::ostringstream text;
  const char* separator = "";
  for (const auto& value : values) {
    text << separator << value;
    separator = between.c_str();
  }
  return text.str();
}

}  // namespace c10
