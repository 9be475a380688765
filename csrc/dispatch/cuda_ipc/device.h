// What the transport `cuda_ipc` asks of a GPU; and a stand-in that needs none.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "cuda/protocol.h"

namespace moe::ep::ipc {

// Errors are shm::Error.
class Device {
 public:
  // By which another process finds memory.
  struct Handle {
    char bytes[64] = {};
  };

  virtual ~Device() = default;

  // Its number for tensors; -1 for those of the CPU.
  virtual int index() const = 0;

  // Memory of zeros, which other processes can map where there is a handle; and that of another.
  virtual char* allocate(size_t bytes, Handle* handle) = 0;
  virtual void free(char* memory) = 0;
  virtual char* open(const Handle& handle) = 0;
  virtual void close(char* memory) = 0;
  // Memory of zeros of the host that the device reads and writes at `on_device`; kept for ever.
  virtual char* allocate_host(size_t bytes, char** on_device) = 0;
  // Waits until it is done.
  virtual void upload(char* to, const void* from, size_t bytes) = 0;
  // After what was launched, if synchronize() was called since.
  virtual void download(void* to, const char* from, size_t bytes) = 0;
  virtual void synchronize() = 0;
  // Whether the current stream is captured in a graph.
  virtual bool is_capturing() = 0;

  // What is launched on the current stream after follow() comes after what was launched, on another
  // it may be, before mark().
  virtual void follow() = 0;
  virtual void mark() = 0;
  // Whether what was launched before mark() is over; of graphs nothing is known. From any thread,
  // if nobody launches meanwhile.
  virtual bool is_idle() = 0;
  virtual void launch(const device::StageArgs& args) = 0;
  virtual void launch(const device::PullArgs& args) = 0;
  virtual void launch(const device::SumArgs& args) = 0;
};

// The device of CUDA's number. Error where this build has no CUDA, or there is no such device.
std::unique_ptr<Device> make_cuda_device(int index);

// How other processes know a GPU.
std::string bus_id_of_cuda_device(int index);
// Why device `index` cannot reach those of other processes; empty if it can.
std::string cuda_peer_obstacle(int index, const std::vector<std::string>& bus_ids);

}  // namespace moe::ep::ipc
