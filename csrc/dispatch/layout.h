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
#include <span>
#include <vector>

#include "dispatch/copy.h"

namespace moe::ep {

// What a rank is sent.
struct Counts {
  int64_t rows = 0;   // tokens with an expert there
  int64_t slots = 0;  // (token, expert) pairs there
};

// Where the experts are: each on one rank, or copies of it on several, of which a token takes one.
class Placement {
 public:
  // Equal numbers of consecutive experts on each rank.
  Placement(int64_t experts, int64_t ranks) : Placement(in_order(experts, ranks), ranks, 0) {
    experts_per_rank_ = experts / ranks;
  }

  // owners[e]: the ranks that have expert e, ascending. Tokens of `own` prefer that rank, and take
  // turns elsewhere.
  Placement(const std::vector<std::vector<int32_t>>& owners, int64_t ranks, int64_t own) {
    std::vector<int32_t> count(ranks, 0);
    for (const auto& mine : owners) {
      const auto here = std::find(mine.begin(), mine.end(), static_cast<int32_t>(own));
      preferred_.push_back(here == mine.end() ? -1 : static_cast<int32_t>(here - mine.begin()));
      begin_.push_back(static_cast<int32_t>(homes_.size()));
      for (const int32_t rank : mine) homes_.push_back({rank, count[rank]++});
      most_copies_ = std::max(most_copies_, static_cast<int64_t>(mine.size()));
    }
    begin_.push_back(static_cast<int32_t>(homes_.size()));
  }

  // A rank, and the number of an expert among its.
  struct Home {
    int32_t rank, local;
  };

  int64_t experts() const { return static_cast<int64_t>(preferred_.size()); }
  int64_t most_copies() const { return most_copies_; }
  // Of the first kind; 0 for others.
  int64_t experts_per_rank() const { return experts_per_rank_; }
  // Of an expert's copies.
  std::span<const Home> homes(int64_t expert) const {
    return {homes_.data() + begin_[expert], homes_.data() + begin_[expert + 1]};
  }
  // That of homes() which tokens of this rank use; -1 where they take turns.
  int32_t preferred(int64_t expert) const { return preferred_[expert]; }

  Home home(int64_t expert, int64_t token) const {
    const int32_t begin = begin_[expert];
    if (most_copies_ == 1) return homes_[begin];
    const int32_t turn = static_cast<int32_t>(token % (begin_[expert + 1] - begin));
    return homes_[begin + (preferred_[expert] < 0 ? turn : preferred_[expert])];
  }

  // Equal for equal placements, whichever rank's; positive.
  int64_t digest() const {
    uint64_t hash = 0xcbf29ce484222325;
    const auto mix = [&](int32_t value) {
      hash = (hash ^ static_cast<uint32_t>(value)) * 0x100000001b3;
    };
    for (const int32_t begin : begin_) mix(begin);
    for (const Home& home : homes_) mix(home.rank);
    return static_cast<int64_t>(hash >> 1);
  }

 private:
  static std::vector<std::vector<int32_t>> in_order(int64_t experts, int64_t ranks) {
    std::vector<std::vector<int32_t>> owners;
    for (int64_t e = 0; e < experts; ++e) {
      owners.push_back({static_cast<int32_t>(e / (experts / ranks))});
    }
    return owners;
  }

  std::vector<int32_t> begin_;  // [E + 1], in homes_
  std::vector<Home> homes_;
  std::vector<int32_t> preferred_;  // [E]
  int64_t most_copies_ = 0, experts_per_rank_ = 0;
};

// [P + 1]: the first row of each rank, and the number of rows.
inline std::vector<int64_t> first_rows(std::span<const int64_t> rows_by_rank) {
  std::vector<int64_t> first{0};
  for (const int64_t rows : rows_by_rank) first.push_back(first.back() + rows);
  return first;
}

// Fills slot_rows and counts [P]. Returns the first slot whose id is outside [-1, E], or -1.
template <typename Id>
int64_t make_layout(const Id* ids, int64_t tokens, int64_t top_k, const Placement& placement,
                    std::vector<Counts>& counts, int32_t* slot_rows) {
  const int64_t experts = placement.experts();
  std::vector<int64_t> last_token(counts.size(), -1);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t slot = t * top_k; slot < (t + 1) * top_k; ++slot) {
      const int64_t id = ids[slot];
      slot_rows[slot] = -1;
      if (id == -1 || id == experts) continue;
      if (id < 0 || id > experts) return slot;
      const int32_t rank = placement.home(id, t).rank;
      counts[rank].rows += last_token[rank] != t;
      counts[rank].slots += 1;
      last_token[rank] = t;
      slot_rows[slot] = static_cast<int32_t>(counts[rank].rows - 1);
    }
  }
  // Until here rows are numbered within their rank.
  std::vector<int32_t> first(counts.size(), 0);
  for (size_t rank = 1; rank < counts.size(); ++rank) {
    first[rank] = first[rank - 1] + static_cast<int32_t>(counts[rank - 1].rows);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t slot = t * top_k; slot < (t + 1) * top_k; ++slot) {
      if (slot_rows[slot] >= 0) slot_rows[slot] += first[placement.home(ids[slot], t).rank];
    }
  }
  return -1;
}

// A row, and the rank it is exchanged with.
struct RankRow {
  int32_t rank, row;
};

// The distinct rows of a token, ascending. One object serves many tokens, in turn.
class TokenRows {
 public:
  // `first` [P + 1] is that of first_rows, and must outlive this.
  TokenRows(int64_t top_k, std::span<const int64_t> first) : first_(first), rows_(top_k) {}

  std::span<const RankRow> of(const int32_t* slot_rows) {
    // They are few: insertion into what is sorted beats sorting.
    size_t count = 0;
    for (size_t k = 0; k < rows_.size(); ++k) {
      const int32_t row = slot_rows[k];
      if (row < 0) continue;
      size_t at = count;
      while (at > 0 && rows_[at - 1].row > row) --at;
      if (at > 0 && rows_[at - 1].row == row) continue;
      for (size_t i = count++; i > at; --i) rows_[i] = rows_[i - 1];
      rows_[at].row = row;
    }
    int32_t rank = 0;
    for (size_t i = 0; i < count; ++i) {
      while (first_[rank + 1] <= rows_[i].row) ++rank;
      rows_[i].rank = rank;
    }
    return {rows_.data(), count};
  }

 private:
  std::span<const int64_t> first_;
  std::vector<RankRow> rows_;
};

// Rows in several pieces of memory: those exchanged with rank p are at parts[p], one after another.
template <typename Byte>
struct RowParts {
  std::vector<Byte*> parts;    // [P]
  std::vector<int64_t> first;  // [P + 1], of first_rows

  // All of them in one piece.
  static RowParts in_one_piece(Byte* rows, int64_t row_bytes, std::vector<int64_t> first) {
    RowParts result;
    for (size_t p = 0; p + 1 < first.size(); ++p) {
      result.parts.push_back(rows + first[p] * row_bytes);
    }
    result.first = std::move(first);
    return result;
  }
  Byte* at(RankRow row, int64_t row_bytes) const {
    return parts[row.rank] + (row.row - first[row.rank]) * row_bytes;
  }
};

// Copies x[t], of tokens [begin, end), to each of their rows.
inline void pack_rows(const char* x, int64_t x_stride, const int32_t* slot_rows, int64_t top_k,
                      int64_t begin, int64_t end, int64_t row_bytes, const RowParts<char>& out,
                      void (*copy)(void* to, const void* from, int64_t bytes)) {
  TokenRows token_rows(top_k, out.first);
  for (int64_t t = begin; t < end; ++t) {
    for (const RankRow row : token_rows.of(slot_rows + t * top_k)) {
      copy(out.at(row, row_bytes), x + t * x_stride, row_bytes);
    }
  }
}

// What travels beside a row: K weights, and K ids of the receiver's experts; 0 and -1 in slots that
// are another rank's. The rows of each have their own size, and may lie in one piece or in two. A
// Weight is an integer of the size of one.
template <typename Id, typename Weight>
void pack_routing(const Id* ids, const Placement& placement, const Weight* weights,
                  const int32_t* slot_rows, int64_t top_k, int64_t begin, int64_t end,
                  const RowParts<char>& out_weights, int64_t weights_row_bytes,
                  const RowParts<char>& out_ids, int64_t ids_row_bytes) {
  TokenRows token_rows(top_k, out_ids.first);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first_slot = t * top_k;
    for (const RankRow row : token_rows.of(slot_rows + first_slot)) {
      char* const to_weights = out_weights.at(row, weights_row_bytes);
      char* const to_ids = out_ids.at(row, ids_row_bytes);
      for (int64_t k = 0; k < top_k; ++k) {
        int32_t id = -1;
        Weight weight = 0;
        if (slot_rows[first_slot + k] == row.row) {
          id = placement.home(ids[first_slot + k], t).local;
          weight = weights[first_slot + k];
        }
        std::memcpy(to_weights + k * sizeof(weight), &weight, sizeof(weight));
        std::memcpy(to_ids + k * sizeof(id), &id, sizeof(id));
      }
    }
  }
}

// out[t] = the sum of the rows of tokens [begin, end), in the order of their ranks. `add` adds
// `count` rows of n elements; with `copy`, what is summed goes to `out` by it, from memory that
// stays in a cache.
template <typename Value>
void sum_rows(const RowParts<const char>& rows, const int32_t* slot_rows, int64_t top_k,
              int64_t begin, int64_t end, int64_t n, Value* out,
              void (*add)(Value* out, const Value* const* rows, int64_t count, int64_t n),
              void (*copy)(void* to, const void* from, int64_t bytes)) {
  const int64_t row_bytes = n * static_cast<int64_t>(sizeof(Value));
  TokenRows token_rows(top_k, rows.first);
  std::vector<const Value*> addends(top_k);
  std::vector<Value> sum(copy ? n : 0);
  for (int64_t t = begin; t < end; ++t) {
    int64_t count = 0;
    for (const RankRow row : token_rows.of(slot_rows + t * top_k)) {
      addends[count++] = reinterpret_cast<const Value*>(rows.at(row, row_bytes));
    }
    Value* const target = out + t * n;
    if (count == 1) {
      (copy ? copy : copy_row)(target, addends[0], row_bytes);
    } else if (copy) {
      add(sum.data(), addends.data(), count, n);
      copy(target, sum.data(), row_bytes);
    } else {
      add(target, addends.data(), count, n);
    }
  }
}

// out[t, k] = rows[slot_rows[t, k], k], zero for slots without an expert.
inline void gather_slots(const RowParts<const char>& rows, int64_t value_bytes,
                         const int32_t* slot_rows, int64_t top_k, int64_t tokens, char* out) {
  for (int64_t slot = 0; slot < tokens * top_k; ++slot) {
    char* const target = out + slot * value_bytes;
    const int32_t row = slot_rows[slot];
    if (row < 0) {
      std::memset(target, 0, value_bytes);
      continue;
    }
    const auto after = std::upper_bound(rows.first.begin() + 1, rows.first.end(), int64_t{row});
    const auto rank = static_cast<int32_t>(after - rows.first.begin()) - 1;
    const char* const source = rows.at({rank, row}, top_k * value_bytes);
    std::memcpy(target, source + slot % top_k * value_bytes, value_bytes);
  }
}

}  // namespace moe::ep
