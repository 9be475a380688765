// Where things are in staged memory: the same on all ranks that make the same call.
#pragma once

#include <cstdint>

#include "cuda/protocol.h"

namespace moe::ep::device {

constexpr int64_t kAlignment = 128;

constexpr int64_t aligned(int64_t bytes, int64_t to = kAlignment) {
  return (bytes + to - 1) / to * to;
}

// One after another, behind the head.
class Region {
 public:
  // `rows` of so many bytes each.
  Section add(int64_t rows, int64_t bytes) {
    Section section{nullptr, 0, bytes, end_, aligned(bytes, 16)};
    end_ += aligned(rows * section.staged_stride);
    return section;
  }
  int64_t bytes() const { return end_; }

 private:
  int64_t end_ = aligned(sizeof(Head));
};

// Of a dispatch, or, of x alone, of combine_backward.
struct TokenRegion {
  TokenRegion(int ranks, int64_t max_tokens, int64_t x_bytes, int64_t top_k, int64_t weight_bytes,
              int64_t extra_bytes)
      : lists(region.add(max_tokens * ranks, sizeof(Entry)).staged) {
    // The lists are dense, and lie in rows of one entry for their size alone.
    homes = region.add(max_tokens, top_k * static_cast<int64_t>(sizeof(int32_t)));
    weights = region.add(max_tokens, top_k * weight_bytes);
    extra = region.add(max_tokens, extra_bytes);
    x = region.add(max_tokens, x_bytes);
  }

  Region region;
  int64_t lists;
  Section homes, weights, extra, x;
};

// Of what the experts return.
struct ResultRegion {
  ResultRegion(int64_t capacity, int64_t row_bytes, int64_t entries_bytes)
      : rows(region.add(capacity, row_bytes)), entries(region.add(capacity, entries_bytes)) {}

  Region region;
  Section rows, entries;
};

}  // namespace moe::ep::device
