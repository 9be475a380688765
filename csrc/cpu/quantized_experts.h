// Expert weights in 8 or 4 bits. Where codes and scales lie:
// moe_kernels.reference.quantized_experts.
#pragma once

#include <array>
#include <optional>
#include <string_view>

#include "cpu/kernels.h"

namespace moe {

std::optional<Format> find_format(std::string_view name);

// Raises ValueError, naming op, for an unknown one.
Format parse_format(const char* op, std::string_view name);

struct CodeShapes {
  std::array<int64_t, 6> codes;
  std::array<int64_t, 4> scales;
};

CodeShapes code_shapes(Format format, int64_t experts, int64_t inner, int64_t columns);

}  // namespace moe
