// The stack of memory that a thread keeps between calls (cpu/scratch.h): what it gives, and what it
// keeps.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/scratch.h"

namespace moe {
namespace {

int64_t checked = 0;

void require(bool holds, const char* what, int64_t found = 0) {
  ++checked;
  if (holds) return;
  std::printf("%s: %ld\n", what, static_cast<long>(found));
  std::exit(1);
}

struct Piece {
  int64_t bytes;
  void* memory;

  explicit Piece(int64_t size) : bytes(size), memory(take_scratch(size)) {}
  ~Piece() { give_scratch_back(memory, bytes); }
  Piece(const Piece&) = delete;
};

bool fits(int64_t bytes) { return Piece(bytes).memory != nullptr; }

// The stack of a thread of its own, which is new.
template <typename F>
void in_a_thread(const F& f) {
  std::thread(f).join();
}

// Pieces lie beside each other, whatever their sizes, and come again in the next call.
void check_pieces() {
  std::vector<void*> before;
  for (int call = 0; call < 3; ++call) {
    std::vector<void*> found;
    const auto take = [&](const auto& self, int64_t depth) -> void {
      if (depth == 12) return;
      const int64_t bytes = 1 + depth * depth * 7;
      const Piece piece(bytes);
      require(piece.memory, "a piece that fits, of depth", depth);
      require(reinterpret_cast<uintptr_t>(piece.memory) % 64 == 0, "the alignment");
      std::memset(piece.memory, static_cast<int>(depth), bytes);
      found.push_back(piece.memory);
      self(self, depth + 1);
      const char* const values = static_cast<const char*>(piece.memory);
      for (int64_t i = 0; i < bytes; ++i) require(values[i] == depth, "another's byte", i);
    };
    take(take, 0);
    require(before.empty() || found == before, "other memory in call", call);
    before = found;
  }
}

// What did not fit does so in the next call, with all that was in use beside it; not in this one.
void check_growth() {
  const int64_t large = 3 << 20;
  {
    const Piece small(100);
    require(small.memory, "a small piece");
    const Piece first(large), second(large);
    require(!first.memory && !second.memory, "a piece that cannot fit");
    require(!fits(large), "a piece before those are given back");
    require(fits(100), "a small piece beside them");
  }
  for (int call = 0; call < 2; ++call) {
    const Piece small(100), first(large), second(large), third(large);
    require(small.memory && first.memory && second.memory && third.memory, "a piece", call);
    require(fits(0), "nothing");
  }
}

constexpr int64_t kMost = kMostScratch - 64;  // of one piece, where a sanitizer leaves gaps too

// No more than the limit is kept, and no more than about twice what calls use.
void check_limits() {
  for (int call = 0; call < 3; ++call) require(!fits(kMostScratch + 1), "too large a piece");
  for (int call = 0; call < 2; ++call) {
    const Piece half(kMost / 2), other(kMost / 2 - (1 << 15)), more(1 << 16);
    require(!more.memory, "a piece past the limit");
    require(call == 0 || (half.memory && other.memory), "pieces below the limit");
  }
  for (int call = 0; call < 200; ++call) require(fits(5 << 20), "a piece after a large call");
  require(fits(kMost), "a large piece soon after the last one");
  for (int call = 0; call < 600; ++call) require(fits(5 << 20), "a piece while it shrinks");
  require(!fits(kMost), "what calls no longer use");
  require(fits(kMost), "what a call did not get");
}

// A thread's stack is its own.
void check_threads() {
  const Piece mine(1000);
  in_a_thread([&] {
    const Piece its(1000);
    require(mine.memory && its.memory && mine.memory != its.memory, "the same memory");
  });
}

int run() {
  in_a_thread(check_pieces);
  in_a_thread(check_growth);
  in_a_thread(check_limits);
  in_a_thread(check_threads);
  std::printf("%ld properties hold\n", static_cast<long>(checked));
  return 0;
}

}  // namespace
}  // namespace moe

int main() { return moe::run(); }
