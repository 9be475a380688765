#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <cstring>

#include "cuda/launch.h"
#include "dispatch/cuda_ipc/device.h"
#include "dispatch/shared_memory/system.h"

namespace moe::ep::ipc {
namespace {

static_assert(sizeof(cudaIpcMemHandle_t) == sizeof(Device::Handle));

// What CUDA shares, it shares in pieces of this size: a smaller one could bring other memory along.
constexpr size_t kSharedPiece = size_t{1} << 21;

void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  throw shm::Error("cuda_ipc: " + what + ": " + cudaGetErrorString(status));
}

class CudaDevice : public Device {
 public:
  explicit CudaDevice(int index) : index_(static_cast<c10::DeviceIndex>(index)) {
    const c10::cuda::CUDAGuard guard(index_);
    check(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, index_),
          "cudaDeviceGetAttribute");
    for (Mark* mark : {&eager_, &captured_}) {
      check(cudaEventCreateWithFlags(&mark->event, cudaEventDisableTiming), "cudaEventCreate");
    }
    check(static_cast<cudaError_t>(device::preload()), "loading the kernels");
  }
  ~CudaDevice() override {
    for (const Mark* mark : {&eager_, &captured_}) cudaEventDestroy(mark->event);
  }

  int index() const override { return index_; }

  // Not by the caching allocator: its memory is part of larger blocks, or has no handle of this
  // kind.
  char* allocate(size_t bytes, Handle* handle) override {
    const c10::cuda::CUDAGuard guard(index_);
    if (handle) bytes = (bytes + kSharedPiece - 1) / kSharedPiece * kSharedPiece;
    void* memory = nullptr;
    cudaError_t status = cudaMalloc(&memory, bytes);
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      c10::cuda::CUDACachingAllocator::emptyCache();
      status = cudaMalloc(&memory, bytes);
    }
    check(status, "cudaMalloc of " + std::to_string(bytes) + " bytes");
    check(cudaMemset(memory, 0, bytes), "cudaMemset");
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    if (!handle) return static_cast<char*>(memory);
    cudaIpcMemHandle_t name;
    check(cudaIpcGetMemHandle(&name, memory), "cudaIpcGetMemHandle");
    std::memcpy(handle->bytes, &name, sizeof(name));
    return static_cast<char*>(memory);
  }

  void free(char* memory) override {
    const c10::cuda::CUDAGuard guard(index_);
    check(cudaFree(memory), "cudaFree");
  }

  char* open(const Handle& handle) override {
    const c10::cuda::CUDAGuard guard(index_);
    cudaIpcMemHandle_t name;
    std::memcpy(&name, handle.bytes, sizeof(name));
    void* memory = nullptr;
    check(cudaIpcOpenMemHandle(&memory, name, cudaIpcMemLazyEnablePeerAccess),
          "cudaIpcOpenMemHandle");
    return static_cast<char*>(memory);
  }

  void close(char* memory) override {
    const c10::cuda::CUDAGuard guard(index_);
    check(cudaIpcCloseMemHandle(memory), "cudaIpcCloseMemHandle");
  }

  char* allocate_host(size_t bytes, char** on_device) override {
    const c10::cuda::CUDAGuard guard(index_);
    void *memory = nullptr, *mapped = nullptr;
    check(cudaHostAlloc(&memory, bytes, cudaHostAllocMapped | cudaHostAllocPortable),
          "cudaHostAlloc");
    std::memset(memory, 0, bytes);
    check(cudaHostGetDevicePointer(&mapped, memory, 0), "cudaHostGetDevicePointer");
    *on_device = static_cast<char*>(mapped);
    return static_cast<char*>(memory);
  }

  void upload(char* to, const void* from, size_t bytes) override {
    const c10::cuda::CUDAGuard guard(index_);
    check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }

  void download(void* to, const char* from, size_t bytes) override {
    const c10::cuda::CUDAGuard guard(index_);
    check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
  }

  void synchronize() override {
    const c10::cuda::CUDAGuard guard(index_);
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }

  // The default stream has no number of its own: it is that of the current device.
  bool is_capturing() override {
    const c10::cuda::CUDAGuard guard(index_);
    return place().capture != 0;
  }

  // Streams that are captured in different graphs, or in none, have no order that could be made
  // here.
  void follow() override {
    const c10::cuda::CUDAGuard guard(index_);
    const Place here = place();
    const Mark& last = here.capture ? captured_ : eager_;
    const bool elsewhere = here.stream != last.place.stream && here.capture == last.place.capture;
    if (!last.set || !elsewhere) return;
    check(cudaStreamWaitEvent(here.stream, last.event, 0), "cudaStreamWaitEvent");
  }

  void mark() override {
    const c10::cuda::CUDAGuard guard(index_);
    const Place here = place();
    Mark& last = here.capture ? captured_ : eager_;
    last.place = here, last.set = true;
    check(cudaEventRecord(last.event, here.stream), "cudaEventRecord");
  }

  // In a thread of the host that waits for nothing: while another captures a graph, CUDA would take
  // the question for a part of that.
  bool is_idle() override {
    const c10::cuda::CUDAGuard guard(index_);
    auto mode = cudaStreamCaptureModeRelaxed;
    check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
    const cudaError_t status = eager_.set ? cudaEventQuery(eager_.event) : cudaSuccess;
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (status == cudaErrorNotReady) return cudaGetLastError(), false;
    check(status, "cudaEventQuery");
    return true;
  }

  void launch(const device::StageArgs& args) override { start(args, "stage"); }
  void launch(const device::PullArgs& args) override { start(args, "pull"); }
  void launch(const device::SumArgs& args) override { start(args, "sum"); }

 private:
  struct Place {
    cudaStream_t stream = nullptr;
    unsigned long long capture = 0;  // the number of the graph, or 0
  };
  // Where the last call was launched. An event that is captured tells nothing of what is not, so
  // there is one for each.
  struct Mark {
    cudaEvent_t event = nullptr;
    Place place;
    bool set = false;
  };

  Place place() const {
    Place place{c10::cuda::getCurrentCUDAStream(index_).stream(), 0};
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long capture = 0;
    check(cudaStreamGetCaptureInfo(place.stream, &status, &capture), "cudaStreamGetCaptureInfo");
    if (status == cudaStreamCaptureStatusActive) place.capture = capture;
    return place;
  }

  template <typename Args>
  void start(const Args& args, const char* name) {
    const c10::cuda::CUDAGuard guard(index_);
    const int status = device::launch(args, multiprocessors_, place().stream);
    check(static_cast<cudaError_t>(status), std::string("the kernel ") + name);
  }

  const c10::DeviceIndex index_;
  int multiprocessors_ = 0;
  Mark eager_, captured_;
};

}  // namespace

std::unique_ptr<Device> make_cuda_device(int index) { return std::make_unique<CudaDevice>(index); }

std::string bus_id_of_cuda_device(int index) {
  char name[32] = {};
  check(cudaDeviceGetPCIBusId(name, sizeof(name), index), "cudaDeviceGetPCIBusId");
  return name;
}

std::string cuda_peer_obstacle(int index, const std::vector<std::string>& bus_ids) {
  for (size_t rank = 0; rank < bus_ids.size(); ++rank) {
    const std::string whose =
        "the GPU of rank " + std::to_string(rank) + " (" + bus_ids[rank] + ")";
    int peer = -1, access = 0;
    if (cudaDeviceGetByPCIBusId(&peer, bus_ids[rank].c_str()) != cudaSuccess) {
      cudaGetLastError();
      return whose + " is not visible here; set CUDA_VISIBLE_DEVICES alike on all ranks";
    }
    if (peer == index) continue;
    check(cudaDeviceCanAccessPeer(&access, index, peer), "cudaDeviceCanAccessPeer");
    if (!access) return "there is no peer access to " + whose;
  }
  return "";
}

}  // namespace moe::ep::ipc
