// Work over ATen's threads.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <cstdint>

namespace moe {

// Below this many bytes of traffic a second thread costs more than it brings.
constexpr int64_t kParallelBytes = 1 << 16;

// f(begin, end) over rows of so many bytes.
template <typename F>
void parallel_rows(int64_t rows, int64_t bytes_per_row, const F& f) {
  const int64_t grain = std::max<int64_t>(kParallelBytes / std::max<int64_t>(bytes_per_row, 1), 1);
  at::parallel_for(0, rows, grain, f);
}

// f(unit, thread) for each unit, in order of their numbers as threads become free. What a unit
// computes must not depend on the thread.
template <typename F>
void parallel_units(int64_t units, const F& f) {
  if (units == 0) return;
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(units, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const int thread = at::get_thread_num();
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;)
      f(unit, thread);
  });
}

}  // namespace moe
