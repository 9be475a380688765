// The second half of dispatch and of combine_backward: a rank fetches the rows that are for it.
#pragma once

#include "cuda/rows.h"
#include "cuda/stage.h"
#include "cuda/waiting.h"

namespace moe::ep::device {

struct PullShared {
  int64_t rows[kMaxRanks + 1], slots[kMaxRanks + 1];  // before each rank's, and of all
  int64_t most_rows[kMaxRanks], most_slots[kMaxRanks];
  uint32_t last;
};

// Fills the sums of what the ranks have for this one; zero if `empty`.
MOE_DEVICE void count(const Lane& lane, PullShared& shared, const PullArgs& args, uint64_t epoch,
                      bool empty) {
  const Link& link = args.link;
  const PlanView view{link.ranks};
  for (int p = lane.thread; p < link.ranks; p += lane.threads) {
    int64_t rows = 0, slots = 0;
    if (!empty && args.by_plan) {
      rows = load_word(args.plan + view.received(p));
    } else if (!empty) {
      const Counts& counts = head_of(link, p, epoch).counts[link.rank];
      rows = load_word(&counts.rows), slots = load_word(&counts.slots);
    }
    shared.rows[p + 1] = rows, shared.slots[p + 1] = slots;
  }
  lane.sync();
  if (lane.thread == 0) {
    shared.rows[0] = shared.slots[0] = 0;
    for (int p = 0; p < link.ranks; ++p) {
      shared.rows[p + 1] += shared.rows[p], shared.slots[p + 1] += shared.slots[p];
    }
  }
  lane.sync();
}

// A word of the host's memory that one thread writes.
MOE_DEVICE void raise_to(int64_t& word, int64_t value) {
  auto* const bits = reinterpret_cast<uint64_t*>(&word);
  if (static_cast<int64_t>(acquire(bits)) < value) release(bits, static_cast<uint64_t>(value));
}

// Writes the plan but for the tokens, and tells the host of a rank that has not room for all. Every
// rank finds the same.
MOE_DEVICE void write_plan(const Lane& lane, PullShared& shared, const PullArgs& args,
                           uint64_t epoch, bool empty) {
  const Link& link = args.link;
  const PlanView view{link.ranks};
  for (int p = lane.thread; p < link.ranks; p += lane.threads) {
    int64_t rows = 0, slots = 0, before = 0, sent = 0;
    for (int source = 0; !empty && source < link.ranks; ++source) {
      const Counts& counts = head_of(link, source, epoch).counts[p];
      if (source == link.rank) before = rows, sent = load_word(&counts.rows);
      rows += load_word(&counts.rows), slots += load_word(&counts.slots);
    }
    args.plan[view.sent(p)] = sent;
    args.plan[view.received(p)] = shared.rows[p + 1] - shared.rows[p];
    args.plan[view.begin_at(p)] = before;
    shared.most_rows[p] = rows, shared.most_slots[p] = slots;
  }
  lane.sync();
  if (lane.thread != 0) return;
  args.plan[view.dispatch()] = static_cast<int64_t>(epoch);
  args.plan[view.tag()] = args.tag;
  int64_t rows = 0, slots = 0;
  for (int p = 0; p < link.ranks; ++p) {
    if (shared.most_rows[p] > rows) rows = shared.most_rows[p];
    if (shared.most_slots[p] > slots) slots = shared.most_slots[p];
  }
  if (rows <= args.capacity && slots <= args.slot_capacity) return;
  Report& report = *link.report;
  raise_to(report.needed_rows, rows);
  raise_to(report.needed_slots, slots);
  report.capacity = args.capacity, report.slot_capacity = args.slot_capacity;
  release(&report.overflows, ++state_of(link).overflows);
}

// The ids and weights of a row, where they are of this rank.
MOE_DEVICE void pull_routing(const Lane& lane, const PullArgs& args, const char* staged,
                             int64_t row, int32_t token, bool dropped) {
  const auto* const homes =
      reinterpret_cast<const int32_t*>(staged + args.staged_homes + token * args.homes_stride);
  const char* const weights = staged + args.staged_weights + token * args.weights_stride;
  for (int k = place_in_group(lane); k < args.top_k; k += lane.group_size()) {
    const int32_t home = load(homes + k);
    const bool mine = !dropped && home != kNoHome && home >> kLocalBits == args.link.rank;
    const int64_t slot = row * args.top_k + k;
    args.ids[slot] = mine ? home & kLocalMask : -1;
    if (args.weight_bytes == 2) {
      const uint16_t weight = load(reinterpret_cast<const uint16_t*>(weights) + k);
      reinterpret_cast<uint16_t*>(args.weights)[slot] = mine ? weight : 0;
    } else if (args.weight_bytes == 4) {
      const uint32_t weight = load(reinterpret_cast<const uint32_t*>(weights) + k);
      reinterpret_cast<uint32_t*>(args.weights)[slot] = mine ? weight : 0;
    } else {
      const auto weight = load(reinterpret_cast<const unsigned long long*>(weights) + k);
      reinterpret_cast<unsigned long long*>(args.weights)[slot] = mine ? weight : 0;
    }
  }
}

// Rows beyond those received hold zeros and no experts: whatever is computed of them comes to
// nothing.
MOE_DEVICE void fill_spare(const Lane& lane, const PullArgs& args, int64_t row) {
  for (int s = 0; s < args.sections; ++s) {
    const Section& section = args.section[s];
    zero_row(lane, section.rows + row * section.stride, section.bytes);
  }
  if (args.by_plan) return;
  for (int k = place_in_group(lane); k < args.top_k; k += lane.group_size()) {
    args.ids[row * args.top_k + k] = -1;
  }
  const int64_t bytes = static_cast<int64_t>(args.top_k) * args.weight_bytes;
  zero_row(lane, args.weights + row * bytes, bytes);
  if (place_in_group(lane) == 0) args.plan[PlanView{args.link.ranks}.tokens() + row] = -1;
}

MOE_DEVICE void pull(const Lane& lane, PullShared& shared, const PullArgs& args) {
  const Link& link = args.link;
  const PlanView view{link.ranks};
  const uint64_t epoch = state_of(link).epoch + 1;
  const bool empty = !state_of(link).ready || !args.plan;
  count(lane, shared, args, epoch, empty);
  if (!args.by_plan && lane.block == 0) write_plan(lane, shared, args, epoch, empty);
  const int64_t total = shared.rows[link.ranks];
  const int groups = groups_of_block(lane);
  const int64_t step = static_cast<int64_t>(lane.blocks) * groups;
  int source = 0;
  for (int64_t row = static_cast<int64_t>(lane.block) * groups + group_of_block(lane);
       row < args.capacity; row += step) {
    if (row >= total) {
      fill_spare(lane, args, row);
      continue;
    }
    while (row >= shared.rows[source + 1]) ++source;
    const char* const staged = staged_by(link, source, epoch);
    int32_t token;
    if (args.by_plan) {
      token = static_cast<int32_t>(load_word(args.plan + view.tokens() + row));
    } else {
      const auto* const entry = reinterpret_cast<const Entry*>(staged + args.lists) +
                                link.rank * args.max_tokens + row - shared.rows[source];
      token = load(&entry->token);
      const bool dropped = shared.slots[source] + load(&entry->slots) > args.slot_capacity;
      pull_routing(lane, args, staged, row, token, dropped);
      if (place_in_group(lane) == 0) args.plan[view.tokens() + row] = token;
    }
    for (int s = 0; s < args.sections; ++s) {
      const Section& section = args.section[s];
      copy_row(lane, section.rows + row * section.stride,
               staged + section.staged + token * section.staged_stride, section.bytes);
    }
  }
  leave(lane, link, epoch, shared.last);
}

}  // namespace moe::ep::device
