// Memory on large pages: of 2 MiB instead of 4 KiB, where the system has them.
#pragma once

#include <ATen/core/Tensor.h>

namespace moe {

// An uninitialised tensor, on large pages where it is large: first touching memory page by page
// costs as much as computing a gradient.
at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options);

// Moves the memory of a tensor to large pages, at the same address. Returns how many of its bytes
// are on such pages now: 0 where the system cannot do it.
int64_t use_large_pages(const at::Tensor& tensor);

}  // namespace moe
