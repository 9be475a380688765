// What device code needs of the machine: under nvcc, and in plain C++20, in which the same
// functions run without a GPU, every thread of theirs a thread of the host or all of them one.
//
// A Lane is a thread of a grid: block of blocks, thread of threads in it, and member of a group of
// threads that work on one row together (a warp). sync() and sync_group() order what they wrote.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MOE_DEVICE __device__ __forceinline__
#define MOE_PRAGMA(text) _Pragma(#text)
#define MOE_UNROLL(count) MOE_PRAGMA(unroll count)
#else
#define MOE_DEVICE inline
#define MOE_UNROLL(count)
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstring>
#include <thread>
#endif

namespace moe::ep::device {

constexpr int kThreads = 512;  // the most a block has
constexpr int kWaitThreads = 128;
constexpr int kWarp = 32;

#if defined(__CUDACC__)
inline namespace on_gpu {

using Chunk = uint4;

struct Lane {
  int block, blocks, thread, threads;

  static MOE_DEVICE Lane here() {
    return {static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x),
            static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
  }
  static MOE_DEVICE int group_size() { return kWarp; }
  MOE_DEVICE void sync() const { __syncthreads(); }
  MOE_DEVICE void sync_group() const { __syncwarp(); }
};

// Past the L1 cache: of memory that another GPU has written.
template <typename T>
MOE_DEVICE T load(const T* from) {
  return __ldcg(from);
}

// Of all GPUs and the host.
MOE_DEVICE uint64_t acquire(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.acquire.sys.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}
MOE_DEVICE void release(uint64_t* word, uint64_t value) {
  asm volatile("st.release.sys.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}
// Of this GPU.
MOE_DEVICE uint32_t peek(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
MOE_DEVICE void poke(uint32_t* word, uint32_t value) {
  asm volatile("st.relaxed.gpu.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}
// Whether nobody has before.
MOE_DEVICE bool claim(uint32_t* word) { return atomicCAS(word, 0u, 1u) == 0; }
// How often this was called before; what each caller wrote is there for those that follow.
MOE_DEVICE uint32_t arrive(uint32_t* count) {
  __threadfence_system();
  const uint32_t before = atomicAdd(count, 1u);
  __threadfence_system();
  return before;
}
MOE_DEVICE uint64_t nanoseconds() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}
MOE_DEVICE void pause() { __nanosleep(20); }

template <typename To, typename From>
MOE_DEVICE To bits_to(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace on_gpu
#else
inline namespace on_host {

struct alignas(16) Chunk {
  uint32_t x, y, z, w;
};

struct Lane {
  int block = 0, blocks = 1, thread = 0, threads = 1;
  int group = 1;                            // threads of one
  std::barrier<>* block_barrier = nullptr;  // of blocks, and groups, of several threads
  std::barrier<>* group_barrier = nullptr;

  int group_size() const { return group; }
  void sync() const {
    if (block_barrier) block_barrier->arrive_and_wait();
  }
  void sync_group() const {
    if (group_barrier) group_barrier->arrive_and_wait();
  }
};

template <typename T>
T load(const T* from) {
  return *from;
}
template <typename T>
std::atomic_ref<T> shared(const T* word) {
  return std::atomic_ref<T>(*const_cast<T*>(word));
}
inline uint64_t acquire(const uint64_t* word) {
  return shared(word).load(std::memory_order_acquire);
}
inline void release(uint64_t* word, uint64_t value) {
  shared(word).store(value, std::memory_order_release);
}
inline uint32_t peek(const uint32_t* word) { return shared(word).load(std::memory_order_relaxed); }
inline void poke(uint32_t* word, uint32_t value) {
  shared(word).store(value, std::memory_order_relaxed);
}
inline bool claim(uint32_t* word) {
  return shared(word).exchange(1, std::memory_order_relaxed) == 0;
}
inline uint32_t arrive(uint32_t* count) {
  return shared(count).fetch_add(1, std::memory_order_acq_rel);
}
inline uint64_t nanoseconds() {
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                   std::chrono::steady_clock::now().time_since_epoch())
                                   .count());
}
inline void pause() { std::this_thread::yield(); }

template <typename To, typename From>
To bits_to(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace on_host
#endif

// The group of a lane, among those of the grid and of its block, and its place in it.
MOE_DEVICE int groups_of_block(const Lane& lane) { return lane.threads / lane.group_size(); }
MOE_DEVICE int group_of_block(const Lane& lane) { return lane.thread / lane.group_size(); }
MOE_DEVICE int place_in_group(const Lane& lane) { return lane.thread % lane.group_size(); }

}  // namespace moe::ep::device
