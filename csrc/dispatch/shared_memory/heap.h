// The memory in which a rank receives: segments that its peers map too, cut into blocks.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "dispatch/shared_memory/system.h"

namespace moe::ep::shm {

// Where a block is, as peers find it.
struct Place {
  int64_t segment = -1, offset = 0;
};

class Heap : public std::enable_shared_from_this<Heap> {
 public:
  // Tells the peers of a new segment, before any place in it is named.
  using Announce = std::function<void(int64_t segment, size_t bytes, const Fd& fd)>;

  explicit Heap(Announce announce) : announce_(std::move(announce)) {}

  // Memory of this rank. It is free again, and the heap may go, when the last owner of it is gone;
  // whichever thread that happens in.
  class Block {
   public:
    Block(std::shared_ptr<Heap> heap, Place place, char* data)
        : heap_(std::move(heap)), place_(place), data_(data) {}
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
    ~Block() { heap_->free(place_); }

    Place place() const { return place_; }
    char* data() const { return data_; }

   private:
    std::shared_ptr<Heap> heap_;
    Place place_;
    char* data_;
  };

  // At least one byte, aligned to 512. Error where the system has no more memory.
  std::shared_ptr<Block> allocate(int64_t bytes);

  // Bytes of the segments; they stay for what comes, until trim().
  int64_t reserved() const;
  // Gives segments without blocks back to the system. Peers map them as before, for they touch
  // blocks alone; they are filled again when they are needed. Returns the bytes.
  int64_t trim();
  // Forget how to announce: from now on the heap holds the blocks that are left, no more.
  void retire();

 private:
  struct Segment {
    Mapping memory;
    Fd fd;
    bool released;
    std::map<int64_t, int64_t> free;  // offset to size of what is free, never two in a row
    std::map<int64_t, int64_t> used;
  };

  void free(Place place);
  int64_t held() const;  // with the lock
  Segment& grow(int64_t bytes);

  Announce announce_;
  mutable std::mutex mutex_;
  std::vector<Segment> segments_;
};

}  // namespace moe::ep::shm
