#include "dispatch/shared_memory/heap.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace moe::ep::shm {
namespace {

constexpr int64_t kAlignment = 512;
constexpr int64_t kPage = 1 << 21;
// The heap grows by its own size, so that it rarely has to, up to this much.
constexpr int64_t kMaxStep = 1 << 26;

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

}  // namespace

std::shared_ptr<Heap::Block> Heap::allocate(int64_t bytes) {
  const int64_t size = round_up(std::max<int64_t>(bytes, 1), kAlignment);
  const std::lock_guard lock(mutex_);
  // The smallest part that is large enough: large ones stay whole for large blocks. What was
  // released is for when there is no other.
  Segment* best = nullptr;
  std::map<int64_t, int64_t>::iterator part;
  const auto better = [&](const Segment& segment, int64_t bytes) {
    if (!best) return true;
    if (segment.released != best->released) return best->released;
    return bytes < part->second;
  };
  for (Segment& segment : segments_) {
    for (auto it = segment.free.begin(); it != segment.free.end(); ++it) {
      if (it->second >= size && better(segment, it->second)) best = &segment, part = it;
    }
  }
  if (!best) {
    best = &grow(size);
    part = best->free.begin();
  }
  if (best->released) {
    best->memory.restore(best->fd);
    best->released = false;
  }
  const int64_t offset = part->first, left = part->second - size;
  best->free.erase(part);
  if (left > 0) best->free.emplace(offset + size, left);
  best->used.emplace(offset, size);
  const Place place{std::distance(segments_.data(), best), offset};
  return std::make_shared<Block>(shared_from_this(), place, best->memory.data() + offset);
}

Heap::Segment& Heap::grow(int64_t bytes) {
  const int64_t size = round_up(std::max(bytes, std::min(held(), kMaxStep)), kPage);
  Fd fd;
  Mapping memory = Mapping::create(static_cast<size_t>(size), &fd);
  if (announce_) announce_(static_cast<int64_t>(segments_.size()), static_cast<size_t>(size), fd);
  Segment segment{std::move(memory), std::move(fd), /*released=*/false, {{0, size}}, {}};
  segments_.push_back(std::move(segment));
  return segments_.back();
}

void Heap::free(Place place) {
  const std::lock_guard lock(mutex_);
  Segment& segment = segments_[place.segment];
  const auto used = segment.used.find(place.offset);
  auto [part, unused] = segment.free.emplace(used->first, used->second);
  segment.used.erase(used);
  if (const auto next = std::next(part);
      next != segment.free.end() && part->first + part->second == next->first) {
    part->second += next->second;
    segment.free.erase(next);
  }
  if (part == segment.free.begin()) return;
  if (const auto before = std::prev(part); before->first + before->second == part->first) {
    before->second += part->second;
    segment.free.erase(part);
  }
}

int64_t Heap::held() const {
  int64_t total = 0;
  for (const Segment& segment : segments_) {
    if (!segment.released) total += static_cast<int64_t>(segment.memory.size());
  }
  return total;
}

int64_t Heap::reserved() const {
  const std::lock_guard lock(mutex_);
  return held();
}

int64_t Heap::trim() {
  const std::lock_guard lock(mutex_);
  int64_t total = 0;
  for (Segment& segment : segments_) {
    if (segment.released || !segment.used.empty()) continue;
    segment.released = segment.memory.release(segment.fd);
    if (segment.released) total += static_cast<int64_t>(segment.memory.size());
  }
  return total;
}

void Heap::retire() {
  const std::lock_guard lock(mutex_);
  announce_ = nullptr;
}

}  // namespace moe::ep::shm
