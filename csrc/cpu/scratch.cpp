// Memory that a thread keeps between calls.
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/kernels.h"

namespace moe {

namespace {

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
    piece.size = 0;
    piece.memory.reset();
    const int64_t size = (bytes + kPage - 1) / kPage * kPage;
    piece.memory.reset(std::aligned_alloc(kPage, size));
    if (!piece.memory) throw std::bad_alloc();
    piece.size = size;
  }
  return piece.memory.get();
}

}  // namespace moe
