// Why an exchange has failed, where a backend notices it and does not say for which rank.
#pragma once

#include <cstdint>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "dispatch/notices.h"

namespace moe::ep {

// The ranks for which an exchange of the dispatcher of that number has failed, as far as that is
// known: a clause. Raises what Notices::look does.
std::string find_cause(Notices& notices, c10d::ProcessGroup& group, const char* phase,
                       int64_t dispatcher);

}  // namespace moe::ep
