// The kernels of the transport `cuda_ipc`. Without torch's headers: compiled in seconds.
#include "cuda/launch.h"
#include "cuda/pull.h"
#include "cuda/stage.h"
#include "cuda/sum.h"

namespace moe::ep::device {
namespace {

__global__ void __launch_bounds__(kThreads, 1)
    stage_kernel(const __grid_constant__ StageArgs args) {
  __shared__ StageShared shared;
  stage(Lane::here(), shared, args);
}

__global__ void __launch_bounds__(kWaitThreads) wait_kernel(const __grid_constant__ Link link) {
  __shared__ uint32_t yes;
  meet(Lane::here(), link, yes);
}

__global__ void __launch_bounds__(kThreads, 1) pull_kernel(const __grid_constant__ PullArgs args) {
  __shared__ PullShared shared;
  pull(Lane::here(), shared, args);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) sum_kernel(const __grid_constant__ SumArgs args) {
  __shared__ SumShared shared;
  sum<T>(Lane::here(), shared, args);
}

// Enough blocks for so many rows, each of one warp; no more than run at a time.
int blocks_for(int64_t rows, int multiprocessors) {
  const int64_t needed = (rows + kThreads / kWarp - 1) / (kThreads / kWarp);
  return static_cast<int>(needed < 1 ? 1 : needed > multiprocessors ? multiprocessors : needed);
}

template <typename Args>
int start(void (*kernel)(Args), const Args& args, int64_t blocks, void* stream,
          int threads = kThreads) {
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

int wait(const Link& link, void* stream) {
  return start(wait_kernel, link, 1, stream, kWaitThreads);
}

}  // namespace

int launch(const StageArgs& args, int multiprocessors, void* stream) {
  const int lists = args.ids ? args.link.ranks : 0;
  const int64_t rows = args.own_stays ? args.capacity : args.rows;
  return start(stage_kernel, args, lists + blocks_for(rows, multiprocessors), stream);
}

int launch(const PullArgs& args, int multiprocessors, void* stream) {
  if (const int status = wait(args.link, stream)) return status;
  return start(pull_kernel, args, blocks_for(args.capacity, multiprocessors), stream);
}

int launch(const SumArgs& args, int multiprocessors, void* stream) {
  if (const int status = wait(args.link, stream)) return status;
  const int blocks = blocks_for(args.tokens, multiprocessors);
  switch (args.value) {
    case Value::kBf16:
      return start(sum_kernel<Bf16>, args, blocks, stream);
    case Value::kFp16:
      return start(sum_kernel<Fp16>, args, blocks, stream);
    case Value::kFp32:
      return start(sum_kernel<Fp32>, args, blocks, stream);
    case Value::kFp64:
      return start(sum_kernel<Fp64>, args, blocks, stream);
  }
  return cudaErrorInvalidValue;
}

int preload() {
  const void* const kernels[] = {reinterpret_cast<const void*>(stage_kernel),
                                 reinterpret_cast<const void*>(wait_kernel),
                                 reinterpret_cast<const void*>(pull_kernel),
                                 reinterpret_cast<const void*>(sum_kernel<Bf16>),
                                 reinterpret_cast<const void*>(sum_kernel<Fp16>),
                                 reinterpret_cast<const void*>(sum_kernel<Fp32>),
                                 reinterpret_cast<const void*>(sum_kernel<Fp64>)};
  cudaFuncAttributes attributes;
  for (const void* kernel : kernels) {
    if (const int status = cudaFuncGetAttributes(&attributes, kernel)) return status;
  }
  return cudaSuccess;
}

}  // namespace moe::ep::device
