// Large buffers of a training step, kept for the next one.
//
// A step makes gradients and activations of many megabytes and frees them. The system takes freed
// memory back, and fills it with zeros page by page when it is asked for again, which takes as long
// as computing what goes there. So freed buffers are kept, as GPU allocators keep theirs: with
// those in use never more bytes than were in use at once, and none for longer than a minute past
// its last use, as far as there are further calls.
#pragma once

#include <ATen/core/Tensor.h>

namespace moe {

// An uninitialised tensor. A large one is on large pages, and reuses a buffer where one fits.
at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options);

// Whether who uses PyTorch asks for poisoned memory: PyTorch gives it, and nothing kept may do.
bool poisons_memory();

// Gives kept buffers back to the system. Returns how many bytes they had.
int64_t free_kept_buffers();

}  // namespace moe
