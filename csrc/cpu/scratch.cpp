// Memory that a thread keeps between calls.
#include "cpu/scratch.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/kernels.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace moe {

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kGap = 64;  // between pieces of a stack
#else
constexpr int64_t kGap = 0;
#endif

// Lets the address sanitizer, where it is built in, refuse what lies past the bytes asked for.
void admit([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes,
           [[maybe_unused]] int64_t size) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
  ASAN_POISON_MEMORY_REGION(static_cast<char*>(memory) + bytes, size - bytes);
#endif
}

struct Piece {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory;
  int64_t size = 0;

  // Other memory of at least so many bytes, and none if there is no such memory.
  void renew(int64_t bytes) noexcept {
    constexpr int64_t kPage = 4096;
    admit(memory.get(), size, size);
    size = 0;
    memory.reset();
    const int64_t pages = (bytes + kPage - 1) / kPage * kPage;
    memory.reset(std::aligned_alloc(kPage, pages));
    if (memory) size = pages;
  }
};

// Its memory is renewed where nobody uses it: it grows to what was in use at once, and shrinks to
// that where it was less than half of it for a while.
class Stack {
 public:
  void* take(int64_t bytes) noexcept {
    if (in_use_++ == 0) fit();
    const int64_t size = padded(bytes);
    if (size > kMostScratch) return nullptr;
    if (size > piece_.size - used_) {
      outside_ += size;
      most_ = std::max(most_, used_ + outside_);
      return nullptr;
    }
    char* const memory = static_cast<char*>(piece_.memory.get()) + used_;
    used_ += size;
    most_ = std::max(most_, used_ + outside_);
    admit(memory, bytes, size);
    return memory;
  }

  void give_back(void* memory, int64_t bytes) noexcept {
    --in_use_;
    const int64_t size = padded(bytes);
    if (memory) {
      admit(memory, 0, size);
      used_ -= size;
    } else if (size <= kMostScratch) {
      outside_ -= size;
    }
  }

 private:
  static int64_t padded(int64_t bytes) {
    constexpr int64_t kLine = 64;
    return (bytes + kLine - 1) / kLine * kLine + kGap;
  }

  void fit() noexcept {
    constexpr int64_t kLeast = 16 << 10;
    constexpr int kAWhile = 256;
    const int64_t wanted = std::clamp(most_, kLeast, kMostScratch);
    const bool counted = ++times_ == kAWhile;
    if (wanted > piece_.size || (counted && wanted < piece_.size / 2)) {
      piece_.renew(wanted);
      admit(piece_.memory.get(), 0, piece_.size);
    }
    if (counted) most_ = times_ = 0;
  }

  Piece piece_;
  int64_t in_use_ = 0;              // how many pieces
  int64_t used_ = 0, outside_ = 0;  // bytes of those inside, and of those that did not fit
  int64_t most_ = 0;                // of both together
  int times_ = 0;                   // that it was taken from when nobody used it
};

Stack& stack() {
  thread_local Stack mine;
  return mine;
}

}  // namespace

void* thread_scratch(Scratch use, int64_t bytes) {
  thread_local Piece pieces[static_cast<int>(Scratch::kCount)];
  Piece& piece = pieces[static_cast<int>(use)];
  if (bytes > piece.size) {
    piece.renew(bytes);
    if (!piece.memory) throw std::bad_alloc();
  }
  admit(piece.memory.get(), bytes, piece.size);
  return piece.memory.get();
}

void* take_scratch(int64_t bytes) noexcept { return stack().take(bytes); }

void give_scratch_back(void* memory, int64_t bytes) noexcept { stack().give_back(memory, bytes); }

}  // namespace moe
