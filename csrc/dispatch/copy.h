// Copies of rows. Plain C++.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <cstdint>
#include <cstring>

namespace moe::ep {

// Exchanges of this many bytes pass the caches by: the reader would find little of them there, and
// writing through a cache reads the memory first.
constexpr int64_t kStreamBytes = int64_t{4} << 20;

inline void copy_row(void* to, const void* from, int64_t bytes) {
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

// Past the caches; order_streams() must follow before others are told.
inline void stream_row(void* to, const void* from, int64_t bytes) {
#if defined(__SSE2__)
  constexpr int64_t kStep = 64;
  auto* out = static_cast<char*>(to);
  const auto* in = static_cast<const char*>(from);
  if (reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    for (; bytes >= kStep; bytes -= kStep, out += kStep, in += kStep) {
      __m128i part[4];
      for (int i = 0; i < 4; ++i) {
        part[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in) + i);
      }
      for (int i = 0; i < 4; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(out) + i, part[i]);
    }
  }
  std::memcpy(out, in, static_cast<size_t>(bytes));
#else
  copy_row(to, from, bytes);
#endif
}

// By the thread that streamed.
inline void order_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace moe::ep
