// The kernels, as the host starts them. A stream is a cudaStream_t; the result is a cudaError_t.
#pragma once

#include "cuda/protocol.h"

namespace moe::ep::device {

int launch(const StageArgs& args, int multiprocessors, void* stream);
// These wait for the other ranks first, by a kernel of one small block.
int launch(const PullArgs& args, int multiprocessors, void* stream);
int launch(const SumArgs& args, int multiprocessors, void* stream);

// Loads the kernels of the current device. CUDA would load each when it is first launched, and may
// wait for all that runs to do so: for a kernel that waits for a rank which is in the same
// position.
int preload();

}  // namespace moe::ep::device
