// The second half of combine and of dispatch_backward: a rank adds the rows of its tokens, in the
// order of the ranks that hold them.
#pragma once

#include "cuda/numbers.h"
#include "cuda/pull.h"
#include "cuda/rows.h"
#include "cuda/waiting.h"

namespace moe::ep::device {

struct SumShared {
  const char* addends[kThreads];  // of each group, kMaxRanks or as many as it has threads
  int64_t begin_at[kMaxRanks];
  uint32_t last;
};

// The place of a row of the exchange, in this rank's own memory or in what another has staged; null
// if there was no room for it.
MOE_DEVICE const char* row_at(const SumShared& shared, const SumArgs& args, const Section& section,
                              uint64_t epoch, int32_t row) {
  const auto most = static_cast<int32_t>(args.max_tokens);
  const int rank = row / most;
  const int64_t at = shared.begin_at[rank] + row % most;
  if (at >= args.capacity) return nullptr;
  if (rank == args.link.rank) return section.rows + at * section.stride;
  return staged_by(args.link, rank, epoch) + section.staged + at * section.staged_stride;
}

// The distinct rows of a token, ascending, which is in the order of their ranks.
MOE_DEVICE int find_addends(const Lane& lane, SumShared& shared, const SumArgs& args,
                            uint64_t epoch, int64_t token, const char** addends) {
  const int32_t* const rows = args.slot_rows + token * args.top_k;
  int count = 0;
  int32_t last = -1;
  while (count < kMaxRanks) {
    int32_t next = INT32_MAX;
    for (int k = 0; k < args.top_k; ++k) {
      const int32_t row = rows[k];
      if (row > last && row < next) next = row;
    }
    if (next == INT32_MAX) break;
    last = next;
    const char* const addend = row_at(shared, args, args.addend, epoch, next);
    if (!addend) continue;
    if (place_in_group(lane) == 0) addends[count] = addend;
    ++count;
  }
  lane.sync_group();
  return count;
}

template <typename T>
struct Pack {
  static constexpr int kSize = 16 / sizeof(typename T::Bits);
  typename T::Bits values[kSize];
};

template <typename T>
MOE_DEVICE void add_rows(const Lane& lane, const SumArgs& args, const char* const* addends,
                         int count, char* out) {
  using Bits = typename T::Bits;
  using Sum = typename T::Sum;
  constexpr int kSize = Pack<T>::kSize;
  uintptr_t places = address(out);
  for (int i = 0; i < count; ++i) places |= address(addends[i]);
  const int packs = places % 16 == 0 ? args.width / kSize : 0, step = lane.group_size();
  for (int at = place_in_group(lane); at < packs; at += step) {
    Sum sums[kSize];
    MOE_UNROLL()
    for (int j = 0; j < kSize; ++j) sums[j] = 0;
    MOE_UNROLL(2)
    for (int i = 0; i < count; ++i) {
      const auto pack = bits_to<Pack<T>>(load(reinterpret_cast<const Chunk*>(addends[i]) + at));
      MOE_UNROLL()
      for (int j = 0; j < kSize; ++j) sums[j] += T::widen(pack.values[j]);
    }
    Pack<T> pack;
    MOE_UNROLL()
    for (int j = 0; j < kSize; ++j) pack.values[j] = T::narrow(sums[j]);
    reinterpret_cast<Chunk*>(out)[at] = bits_to<Chunk>(pack);
  }
  for (int at = packs * kSize + place_in_group(lane); at < args.width; at += step) {
    Sum sum = 0;
    for (int i = 0; i < count; ++i) {
      sum += T::widen(load(reinterpret_cast<const Bits*>(addends[i]) + at));
    }
    reinterpret_cast<Bits*>(out)[at] = T::narrow(sum);
  }
}

template <typename T>
MOE_DEVICE void sum_tokens(const Lane& lane, SumShared& shared, const SumArgs& args, uint64_t epoch,
                           bool empty) {
  const int groups = groups_of_block(lane), group = group_of_block(lane);
  const char** const addends = shared.addends + group * (kThreads / groups);
  const int64_t step = static_cast<int64_t>(lane.blocks) * groups;
  const int64_t bytes = static_cast<int64_t>(args.width) * sizeof(typename T::Bits);
  for (int64_t t = static_cast<int64_t>(lane.block) * groups + group; t < args.tokens; t += step) {
    char* const out = args.sums + t * args.sums_stride;
    const int count = empty ? 0 : find_addends(lane, shared, args, epoch, t, addends);
    if (count == 0) {
      zero_row(lane, out, bytes);
    } else if (count == 1) {
      copy_row(lane, out, addends[0], bytes);
    } else {
      add_rows<T>(lane, args, addends, count, out);
    }
    lane.sync_group();
  }
}

// For each slot its entry of its row.
MOE_DEVICE void pick_entries(const Lane& lane, SumShared& shared, const SumArgs& args,
                             uint64_t epoch, bool empty) {
  const int64_t slots = args.tokens * args.top_k;
  const int64_t step = static_cast<int64_t>(lane.blocks) * lane.threads;
  for (int64_t slot = static_cast<int64_t>(lane.block) * lane.threads + lane.thread; slot < slots;
       slot += step) {
    const int32_t row = empty ? -1 : args.slot_rows[slot];
    const char* from = row < 0 ? nullptr : row_at(shared, args, args.entry, epoch, row);
    const auto k = static_cast<int>(slot % args.top_k);
    if (args.entry_bytes == 2) {
      const auto* const entries = reinterpret_cast<const uint16_t*>(from);
      reinterpret_cast<uint16_t*>(args.entries)[slot] = from ? load(entries + k) : 0;
    } else if (args.entry_bytes == 4) {
      const auto* const entries = reinterpret_cast<const uint32_t*>(from);
      reinterpret_cast<uint32_t*>(args.entries)[slot] = from ? load(entries + k) : 0;
    } else {
      const auto* const entries = reinterpret_cast<const unsigned long long*>(from);
      reinterpret_cast<unsigned long long*>(args.entries)[slot] = from ? load(entries + k) : 0;
    }
  }
}

template <typename T>
MOE_DEVICE void sum(const Lane& lane, SumShared& shared, const SumArgs& args) {
  const Link& link = args.link;
  const uint64_t epoch = state_of(link).epoch + 1;
  const bool empty = !state_of(link).ready;
  if (!empty) {
    const PlanView view{link.ranks};
    for (int p = lane.thread; p < link.ranks; p += lane.threads) {
      shared.begin_at[p] = load_word(args.plan + view.begin_at(p));
    }
  }
  lane.sync();
  if (args.addend.rows) sum_tokens<T>(lane, shared, args, epoch, empty);
  if (args.entry.rows) pick_entries(lane, shared, args, epoch, empty);
  leave(lane, link, epoch, shared.last);
}

}  // namespace moe::ep::device
