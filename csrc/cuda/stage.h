// The first half of a call: a rank leaves what it has in its staging memory, then posts the epoch.
//
// The first P blocks make the lists of tokens for each rank, the others copy rows; where there are
// no more blocks than that, all do both. The last to be through posts.
#pragma once

#include "cuda/rows.h"
#include "cuda/waiting.h"

namespace moe::ep::device {

struct StageShared {
  uint64_t sums[kThreads];
  uint32_t last;
};

// A slot's expert: its rank and its number there in 24 bits, -1 for none.
constexpr int kLocalBits = 24;
constexpr int32_t kLocalMask = (1 << kLocalBits) - 1;
constexpr int32_t kNoHome = -1;

MOE_DEVICE int64_t id_of(const StageArgs& args, int64_t slot) {
  if (args.id_bytes == 4) return load(static_cast<const int32_t*>(args.ids) + slot);
  return load(static_cast<const long long*>(args.ids) + slot);
}

// As Placement::home.
MOE_DEVICE int32_t home_of(const StageArgs& args, int64_t slot, int32_t token) {
  const int64_t id = id_of(args, slot);
  const Homes& homes = args.homes;
  if (id < 0 || id >= homes.experts) return kNoHome;
  const auto expert = static_cast<int32_t>(id);
  if (homes.per_rank > 0) {
    const int32_t rank = expert / homes.per_rank;
    return (rank << kLocalBits) | (expert - rank * homes.per_rank);
  }
  int32_t home = homes.begin[expert];
  if (homes.most_copies > 1) {
    const int32_t preferred = homes.preferred[expert];
    home += preferred >= 0 ? preferred : token % (homes.begin[expert + 1] - home);
  }
  return (homes.rank[home] << kLocalBits) | homes.local[home];
}

// The lists of one rank, by one block: threads have consecutive tokens.
MOE_DEVICE void list_tokens(const Lane& lane, StageShared& shared, const StageArgs& args,
                            char* staged, int rank) {
  const int top_k = args.top_k;
  const auto tokens = static_cast<int32_t>(args.rows);
  const int32_t each = (tokens + lane.threads - 1) / lane.threads;
  const int32_t begin = each * lane.thread < tokens ? each * lane.thread : tokens;
  const int32_t end = begin + each < tokens ? begin + each : tokens;
  // Rows in the upper half, slots in the lower: they are fewer than 2^31.
  uint64_t own = 0;
  for (int32_t t = begin; t < end; ++t) {
    uint32_t slots = 0;
    for (int k = 0; k < top_k; ++k) {
      const int32_t home = home_of(args, static_cast<int64_t>(t) * top_k + k, t);
      slots += home != kNoHome && home >> kLocalBits == rank;
    }
    own += slots ? (uint64_t{1} << 32) + slots : 0;
  }
  shared.sums[lane.thread] = own;
  lane.sync();
  for (int step = 1; step < lane.threads; step *= 2) {
    const uint64_t before = lane.thread >= step ? shared.sums[lane.thread - step] : 0;
    lane.sync();
    shared.sums[lane.thread] += before;
    lane.sync();
  }
  const uint64_t through = shared.sums[lane.thread];
  auto row = static_cast<int32_t>((through - own) >> 32);
  auto slots = static_cast<int32_t>(through - own);
  auto* const entries = reinterpret_cast<Entry*>(staged + args.lists) + rank * args.max_tokens;
  for (int32_t t = begin; t < end; ++t) {
    const int32_t before = slots;
    for (int k = 0; k < top_k; ++k) {
      const int64_t slot = static_cast<int64_t>(t) * top_k + k;
      const int32_t home = home_of(args, slot, t);
      const bool mine = home != kNoHome && home >> kLocalBits == rank;
      if (!mine && !(rank == 0 && home == kNoHome)) continue;
      reinterpret_cast<int32_t*>(staged + args.staged_homes + t * args.homes_stride)[k] = home;
      args.slot_rows[slot] = mine ? static_cast<int32_t>(rank * args.max_tokens) + row : -1;
      slots += mine;
      if (mine) continue;
      const int64_t id = id_of(args, slot);
      if (id < -1 || id > args.homes.experts) {
        release(&state_of(args.link).bad_slot, static_cast<uint64_t>(slot) + 1);
      }
    }
    if (slots > before) entries[row++] = {t, slots};
  }
  if (lane.thread == lane.threads - 1) {
    Head& head = *reinterpret_cast<Head*>(staged);
    head.counts[rank].rows = static_cast<int64_t>(through >> 32);
    head.counts[rank].slots = static_cast<int64_t>(through & 0xffffffff);
  }
  lane.sync();
}

// The rows [begin, end) of those received that are this rank's own.
struct OwnRows {
  int64_t begin, end, total;
};
MOE_DEVICE OwnRows own_rows(const StageArgs& args) {
  const PlanView view{args.link.ranks};
  OwnRows own{0, 0, 0};
  for (int p = 0; p < args.link.ranks; ++p) {
    const int64_t rows = load_word(args.plan + view.received(p));
    if (p == args.link.rank) own.begin = own.total, own.end = own.total + rows;
    own.total += rows;
  }
  if (own.total > args.capacity) own.total = args.capacity;
  return own;
}

MOE_DEVICE void stage(const Lane& lane, StageShared& shared, const StageArgs& args) {
  const Link& link = args.link;
  State& state = state_of(link);
  if (state.failed) return;
  const uint64_t epoch = state.epoch + 1;
  char* const staged = staged_by(link, link.rank, epoch);
  int first = 0;
  if (args.ids) {
    if (lane.blocks > link.ranks) first = link.ranks;
    for (int rank = lane.block; rank < link.ranks; rank += lane.blocks) {
      list_tokens(lane, shared, args, staged, rank);
    }
  }
  if (lane.block >= first) {
    OwnRows skip{0, 0, args.rows};
    if (args.own_stays) skip = own_rows(args);
    const int groups = groups_of_block(lane);
    const int64_t step = static_cast<int64_t>(lane.blocks - first) * groups;
    for (int64_t row = (lane.block - first) * groups + group_of_block(lane); row < skip.total;
         row += step) {
      if (row >= skip.begin && row < skip.end) continue;
      for (int s = 0; s < args.sections; ++s) {
        const Section& section = args.section[s];
        copy_row(lane, staged + section.staged + row * section.staged_stride,
                 section.rows + row * section.stride, section.bytes);
      }
    }
  }
  if (!is_last(lane, &state.staged, shared.last)) return;
  Head& head = *reinterpret_cast<Head*>(staged);
  for (int i = lane.thread; i < kHeaderWords; i += lane.threads) {
    int64_t word = args.header[i];
    if (i == kDispatchField) {
      word = args.plan ? args.plan[PlanView{link.ranks}.dispatch()] : static_cast<int64_t>(epoch);
    }
    if (i == kRefusedField && word == 0) {
      if (args.ids && acquire(&state.bad_slot)) word = kRefusedForSlot;
      if (args.plan && args.plan[PlanView{link.ranks}.tag()] != args.tag) word = kRefusedForHandle;
    }
    head.words[i] = word;
  }
  lane.sync();
  for (int p = lane.thread; p < link.ranks; p += lane.threads) {
    release(&link.controls[p]->posts[link.rank].epoch, epoch);
  }
}

}  // namespace moe::ep::device
