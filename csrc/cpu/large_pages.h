// Memory on large pages: of 2 MiB instead of 4 KiB, where the system has them.
#pragma once

#include <ATen/core/Tensor.h>

namespace moe {

// Moves the memory of a tensor to large pages, at the same address. Returns how many of its bytes
// are on such pages now: 0 where the system cannot do it.
int64_t use_large_pages(const at::Tensor& tensor);

}  // namespace moe
