// The kernels, as the host starts them. A stream is a cudaStream_t; the result is a cudaError_t.
#pragma once

#include "cuda/protocol.h"

namespace moe::ep::device {

int launch(const StageArgs& args, int multiprocessors, void* stream);
int launch(const PullArgs& args, int multiprocessors, void* stream);
int launch(const SumArgs& args, int multiprocessors, void* stream);

}  // namespace moe::ep::device
