// Memory that a thread keeps between calls.
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/kernels.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace moe {

namespace {

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
};

}  // namespace

void* thread_scratch(Scratch use, int64_t bytes) {
  thread_local Piece pieces[static_cast<int>(Scratch::kCount)];
  Piece& piece = pieces[static_cast<int>(use)];
  if (bytes > piece.size) {
    constexpr int64_t kPage = 4096;
    admit(piece.memory.get(), piece.size, piece.size);
    piece.size = 0;
    piece.memory.reset();
    const int64_t size = (bytes + kPage - 1) / kPage * kPage;
    piece.memory.reset(std::aligned_alloc(kPage, size));
    if (!piece.memory) throw std::bad_alloc();
    piece.size = size;
  }
  admit(piece.memory.get(), bytes, piece.size);
  return piece.memory.get();
}

}  // namespace moe
