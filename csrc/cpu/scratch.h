// A stack of memory that each thread keeps from one call to the next.
//
// Plain C++. cpu/local_array.h makes variables of it.
#pragma once

#include <cstdint>

namespace moe {

// What one thread keeps at most. Larger pieces are cpu/large_buffers.h's.
constexpr int64_t kMostScratch = 16 << 20;

// `bytes` of the calling thread's stack, aligned to 64 bytes, or null where they do not fit: then
// the stack is larger next time. Whatever the result, the thread gives it back, the last one first.
void* take_scratch(int64_t bytes) noexcept;
void give_scratch_back(void* memory, int64_t bytes) noexcept;

}  // namespace moe
