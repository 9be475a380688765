// Copies of rows by the threads of a group.
#pragma once

#include "cuda/lane.h"

namespace moe::ep::device {

MOE_DEVICE uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// `bytes` in units, from unit `first` on.
template <typename Unit>
MOE_DEVICE void copy_units(const Lane& lane, char* to, const char* from, int bytes, int first = 0) {
  for (int i = first + place_in_group(lane); i < bytes / static_cast<int>(sizeof(Unit));
       i += lane.group_size()) {
    reinterpret_cast<Unit*>(to)[i] = load(reinterpret_cast<const Unit*>(from) + i);
  }
}

MOE_DEVICE void copy_chunks(const Lane& lane, char* to, const char* from, int bytes) {
  const int chunks = bytes / 16, step = lane.group_size();
  auto* const out = reinterpret_cast<Chunk*>(to);
  const auto* const in = reinterpret_cast<const Chunk*>(from);
  int i = place_in_group(lane);
  // Loads before stores: the memory may be that of another GPU, far away.
  for (; i + 3 * step < chunks; i += 4 * step) {
    const Chunk a = load(in + i), b = load(in + i + step);
    const Chunk c = load(in + i + 2 * step), d = load(in + i + 3 * step);
    out[i] = a, out[i + step] = b, out[i + 2 * step] = c, out[i + 3 * step] = d;
  }
  for (; i < chunks; i += step) out[i] = load(in + i);
}

// In the largest units that both places admit.
MOE_DEVICE void copy_row(const Lane& lane, char* to, const char* from, int64_t bytes) {
  const uintptr_t both = address(to) | address(from);
  const int size = static_cast<int>(bytes);
  if (both % 16 == 0) {
    copy_chunks(lane, to, from, size);
    copy_units<uint8_t>(lane, to, from, size, size / 16 * 16);
  } else if ((both | static_cast<uintptr_t>(size)) % 4 == 0) {
    copy_units<uint32_t>(lane, to, from, size);
  } else if ((both | static_cast<uintptr_t>(size)) % 2 == 0) {
    copy_units<uint16_t>(lane, to, from, size);
  } else {
    copy_units<uint8_t>(lane, to, from, size);
  }
}

MOE_DEVICE void zero_row(const Lane& lane, char* to, int64_t bytes) {
  int at = 0;
  const int size = static_cast<int>(bytes), step = lane.group_size();
  if (address(to) % 16 == 0) {
    const int units = size / 16;
    for (int i = place_in_group(lane); i < units; i += step) {
      reinterpret_cast<Chunk*>(to)[i] = Chunk{0, 0, 0, 0};
    }
    at = units * 16;
  }
  for (at += place_in_group(lane); at < size; at += step) to[at] = 0;
}

}  // namespace moe::ep::device
