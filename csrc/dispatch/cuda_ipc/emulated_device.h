// A device without a GPU: the same device code runs in the calling thread, with memory of the host.
#pragma once

#include <cstdint>
#include <memory>

#include "dispatch/cuda_ipc/device.h"

namespace moe::ep::ipc {

class EmulatedDevice : public Device {
 public:
  // As if a graph were captured: launched kernels run all the same, and what CUDA does not allow
  // then is an error, and counted.
  virtual void capture(bool capturing) = 0;
  virtual int64_t forbidden() const = 0;
};

std::unique_ptr<EmulatedDevice> make_emulated_device();

}  // namespace moe::ep::ipc
