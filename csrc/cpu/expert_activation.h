#pragma once

#include <string_view>

#include "cpu/kernels.h"

namespace moe {

Activation parse_activation(const char* op, std::string_view name);

// The halves of a row of W columns, I of them in the first.
template <typename T>
HalvesOf<T> halves(T* row, int64_t inner, bool interleaved) {
  return {row, interleaved ? row + 1 : row + inner, interleaved};
}

}  // namespace moe
