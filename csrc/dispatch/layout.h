// Which rows of the exchange a token becomes. Plain C++: nothing here knows of tensors or groups.
//
// T tokens, K experts a token, E experts, P ranks, S rows sent: one for each pair of a token and a
// rank that owns one of its experts, ordered by rank, then by token. slot_rows [T, K] holds the row
// of each slot, -1 for a slot without an expert: a token's rows are the distinct entries of its
// line, and in ascending order they are in the order of their ranks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace moe::ep {

// What a rank is sent.
struct Counts {
  int64_t rows = 0;   // tokens with an expert there
  int64_t slots = 0;  // (token, expert) pairs there
};

// Fills slot_rows and counts [P]. Returns the first slot whose id is outside [-1, E], or -1.
template <typename Id>
int64_t make_layout(const Id* ids, int64_t tokens, int64_t top_k, int64_t experts,
                    std::vector<Counts>& counts, int32_t* slot_rows) {
  const int64_t ranks = static_cast<int64_t>(counts.size());
  const int64_t experts_per_rank = experts / ranks;
  std::vector<int64_t> last_token(ranks, -1);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t slot = t * top_k; slot < (t + 1) * top_k; ++slot) {
      const int64_t id = ids[slot];
      slot_rows[slot] = -1;
      if (id == -1 || id == experts) continue;
      if (id < 0 || id > experts) return slot;
      const int64_t rank = id / experts_per_rank;
      counts[rank].rows += last_token[rank] != t;
      counts[rank].slots += 1;
      last_token[rank] = t;
      slot_rows[slot] = static_cast<int32_t>(counts[rank].rows - 1);
    }
  }
  // Until here rows are numbered within their rank.
  std::vector<int32_t> first(ranks, 0);
  for (int64_t rank = 1; rank < ranks; ++rank) {
    first[rank] = first[rank - 1] + static_cast<int32_t>(counts[rank - 1].rows);
  }
  for (int64_t slot = 0; slot < tokens * top_k; ++slot) {
    if (slot_rows[slot] >= 0) slot_rows[slot] += first[ids[slot] / experts_per_rank];
  }
  return -1;
}

// The distinct rows of a token, ascending. One object serves many tokens, in turn.
class TokenRows {
 public:
  explicit TokenRows(int64_t top_k) : rows_(top_k) {}

  const TokenRows& of(const int32_t* slot_rows) {
    std::copy_n(slot_rows, rows_.size(), rows_.begin());
    std::sort(rows_.begin(), rows_.end());
    end_ = std::unique(rows_.begin(), rows_.end());
    begin_ = std::find_if(rows_.begin(), end_, [](int32_t row) { return row >= 0; });
    return *this;
  }

  std::vector<int32_t>::const_iterator begin() const { return begin_; }
  std::vector<int32_t>::const_iterator end() const { return end_; }

 private:
  std::vector<int32_t> rows_;
  std::vector<int32_t>::iterator begin_, end_;
};

// rows[row] = x[t] for each of the rows of tokens [begin, end).
inline void pack_rows(const char* x, int64_t x_stride, const int32_t* slot_rows, int64_t top_k,
                      int64_t begin, int64_t end, int64_t row_bytes, char* rows) {
  TokenRows token_rows(top_k);
  for (int64_t t = begin; t < end; ++t) {
    for (const int64_t row : token_rows.of(slot_rows + t * top_k)) {
      std::memcpy(rows + row * row_bytes, x + t * x_stride, row_bytes);
    }
  }
}

// What travels beside a row: K weights, then K ids of the receiver's experts; 0 and -1 in slots
// that are another rank's. Each part is padded to a multiple of 8 bytes.
struct Routing {
  int64_t top_k, weight_bytes;

  static int64_t padded(int64_t bytes) { return (bytes + 7) / 8 * 8; }
  int64_t ids_at() const { return padded(top_k * weight_bytes); }
  int64_t bytes() const { return ids_at() + padded(top_k * static_cast<int64_t>(sizeof(int32_t))); }
};

template <typename Id>
void pack_routing(Routing layout, const Id* ids, int64_t experts_per_rank, const char* weights,
                  const int32_t* slot_rows, int64_t begin, int64_t end, char* routing) {
  const int64_t top_k = layout.top_k, weight_bytes = layout.weight_bytes;
  TokenRows token_rows(top_k);
  for (int64_t t = begin; t < end; ++t) {
    for (const int32_t row : token_rows.of(slot_rows + t * top_k)) {
      char* const out = routing + row * layout.bytes();
      std::memset(out, 0, layout.bytes());
      for (int64_t k = 0; k < top_k; ++k) {
        const int64_t slot = t * top_k + k;
        int32_t id = -1;
        if (slot_rows[slot] == row) {
          id = static_cast<int32_t>(ids[slot] % experts_per_rank);
          std::memcpy(out + k * weight_bytes, weights + slot * weight_bytes, weight_bytes);
        }
        std::memcpy(out + layout.ids_at() + k * sizeof(id), &id, sizeof(id));
      }
    }
  }
}

// out[t] = the sum of the rows of tokens [begin, end), added in Sum in the order of their ranks.
template <typename Value, typename Sum>
void sum_rows(const Value* rows, const int32_t* slot_rows, int64_t top_k, int64_t begin,
              int64_t end, int64_t hidden, Value* out) {
  constexpr int64_t kBlock = 256;
  Sum sums[kBlock];
  TokenRows token_rows(top_k);
  for (int64_t t = begin; t < end; ++t) {
    const TokenRows& mine = token_rows.of(slot_rows + t * top_k);
    Value* const target = out + t * hidden;
    if (mine.end() - mine.begin() == 1) {
      std::memcpy(target, rows + *mine.begin() * hidden, hidden * sizeof(Value));
      continue;
    }
    for (int64_t from = 0; from < hidden; from += kBlock) {
      const int64_t width = std::min(kBlock, hidden - from);
      std::fill_n(sums, width, Sum(0));
      for (const int64_t row : mine) {
        const Value* const source = rows + row * hidden + from;
        for (int64_t i = 0; i < width; ++i) sums[i] += static_cast<Sum>(source[i]);
      }
      for (int64_t i = 0; i < width; ++i) target[from + i] = static_cast<Value>(sums[i]);
    }
  }
}

// out[t, k] = rows[slot_rows[t, k], k], zero for slots without an expert.
inline void gather_slots(const char* rows, int64_t value_bytes, const int32_t* slot_rows,
                         int64_t top_k, int64_t tokens, char* out) {
  for (int64_t slot = 0; slot < tokens * top_k; ++slot) {
    char* const target = out + slot * value_bytes;
    if (slot_rows[slot] < 0) {
      std::memset(target, 0, value_bytes);
    } else {
      const int64_t source = slot_rows[slot] * top_k + slot % top_k;
      std::memcpy(target, rows + source * value_bytes, value_bytes);
    }
  }
}

}  // namespace moe::ep
