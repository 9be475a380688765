#include "cpu/large_buffers.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <new>

namespace moe {

namespace {

constexpr int64_t kLarge = 16 << 20;  // what malloc asks the system for, and gives back, each time

}  // namespace

bool poisons_memory() {
  const auto& context = at::globalContext();
  return context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
}

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)

namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kLargePage = 2 << 20;
constexpr std::chrono::seconds kKept{60};

struct Buffer {
  void* data;
  size_t bytes;
  Clock::time_point freed;
};

// `bytes` of fresh memory, aligned to large pages and on such pages if the system has them.
void* map(size_t bytes) {
  void* const raw = ::mmap(nullptr, bytes + kLargePage, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  const uintptr_t first = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t begin = (first + kLargePage - 1) / kLargePage * kLargePage;
  if (begin > first) ::munmap(raw, begin - first);
  ::munmap(reinterpret_cast<void*>(begin + bytes), first + kLargePage - begin);
  ::madvise(reinterpret_cast<void*>(begin), bytes, MADV_HUGEPAGE);  // only advice
  return reinterpret_cast<void*>(begin);
}

bool keeps_buffers() {
  static const bool keeps = [] {
    const char* const value = std::getenv("MOE_KERNELS_KEEP_BUFFERS");
    return !value || std::strcmp(value, "0") != 0;
  }();
  return keeps;
}

class LargeBuffers : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t wanted) override {
    const size_t bytes = (wanted + kLargePage - 1) / kLargePage * kLargePage;
    Buffer* const buffer = new Buffer(take(bytes));
    return {buffer->data, buffer, &LargeBuffers::release, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  // A child of fork() has only the thread that called it: nobody would unlock there what another
  // one held.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

  int64_t free_kept() {
    const std::lock_guard lock(mutex_);
    const size_t bytes = kept_bytes_;
    drop_while([] { return true; });
    return static_cast<int64_t>(bytes);
  }

 private:
  // The smallest kept buffer that is large enough and wastes no more than a quarter, or a new one.
  Buffer take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it) {
      const bool fits = it->bytes >= bytes && it->bytes <= bytes + bytes / 4;
      if (fits && (best == kept_.end() || it->bytes < best->bytes)) best = it;
    }
    Buffer buffer{nullptr, bytes, {}};
    if (best != kept_.end()) {
      buffer = *best;
      kept_bytes_ -= buffer.bytes;
      kept_.erase(best);
    }
    used_bytes_ += buffer.bytes;
    most_used_ = std::max(most_used_, used_bytes_);
    trim();
    if (!buffer.data) {
      try {
        buffer.data = map_after_all(bytes);
      } catch (...) {
        used_bytes_ -= bytes;
        throw;
      }
    }
    return buffer;
  }

  // Fresh memory; where the system has none, what is kept goes first.
  void* map_after_all(size_t bytes) {
    try {
      return map(bytes);
    } catch (const std::bad_alloc&) {
      if (kept_.empty()) throw;
    }
    drop_while([] { return true; });
    return map(bytes);
  }

  static void release(void* context);

  void keep(Buffer buffer) {
    const std::lock_guard lock(mutex_);
    used_bytes_ -= buffer.bytes;
    if (!keeps_buffers()) {
      ::munmap(buffer.data, buffer.bytes);
      return;
    }
    buffer.freed = Clock::now();
    kept_bytes_ += buffer.bytes;
    kept_.push_back(buffer);
    trim();
  }

  void trim() {
    const auto now = Clock::now();
    drop_while([&] {
      return used_bytes_ + kept_bytes_ > most_used_ + most_used_ / 2 ||
             now - kept_.front().freed > kKept;
    });
  }

  template <typename Condition>
  void drop_while(const Condition& condition) {
    while (!kept_.empty() && condition()) {
      ::munmap(kept_.front().data, kept_.front().bytes);
      kept_bytes_ -= kept_.front().bytes;
      kept_.pop_front();
    }
  }

  std::mutex mutex_;
  std::list<Buffer> kept_;  // the longest freed first
  size_t kept_bytes_ = 0, used_bytes_ = 0, most_used_ = 0;
};

LargeBuffers& large_buffers() {
  // Never destroyed: tensors may outlive everything else.
  static LargeBuffers* const buffers = [] {
    const auto unlock = [] { large_buffers().unlock(); };
    ::pthread_atfork([] { large_buffers().lock(); }, unlock, unlock);
    return new LargeBuffers;
  }();
  return *buffers;
}

void LargeBuffers::release(void* context) {
  Buffer* const buffer = static_cast<Buffer*>(context);
  large_buffers().keep(*buffer);
  delete buffer;
}

}  // namespace

at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const auto dtype = c10::typeMetaToScalarType(options.dtype());
  const int64_t bytes = c10::multiply_integers(sizes) * c10::elementSize(dtype);
  if (bytes < kLarge || poisons_memory()) return at::empty(sizes, options);
  return at::detail::empty_generic(sizes, &large_buffers(),
                                   c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, std::nullopt);
}

int64_t free_kept_buffers() { return large_buffers().free_kept(); }

#else

at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::empty(sizes, options);
}

int64_t free_kept_buffers() { return 0; }

#endif

}  // namespace moe
