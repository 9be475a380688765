// One rank of the emulation: its memory, its calls, and what they must give.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>

#include "cuda/pull.h"
#include "cuda/stage.h"
#include "cuda/sum.h"
#include "cuda_ipc_world.h"

namespace emulation {

class Rank {
 public:
  Rank(World& world, int rank, unsigned seed, const std::vector<std::vector<int32_t>>& owners)
      : world_(world),
        s_(world.settings),
        rank_(rank),
        seed_(seed),
        draw_(seed * 31 + static_cast<unsigned>(rank)) {
    for (int p = 0; p < s_.ranks; ++p) placements_.emplace_back(owners, s_.ranks, p);
    homes_ = std::make_unique<DeviceHomes>(placements_[rank], false);
    plain_ = owners_are_plain(owners);
    if (plain_) homes_->homes.per_rank = s_.experts / s_.ranks;
  }

  // Every rank draws the kind of a call alike.
  void run(int calls) {
    std::mt19937 alike(seed_);
    struct Dispatched {
      int call;
      Got got;
    };
    std::vector<Dispatched> open;
    for (int call = 0; call < calls; ++call) {
      if (draw_() % 4 == 0) {
        std::this_thread::sleep_for(std::chrono::microseconds(draw_() % 300));
      }
      const unsigned kind = alike() % 4;
      if (kind == 0 || open.empty()) {
        Got got = dispatch(bring(s_, seed_, call, rank_));
        compare(call, got);
        open.push_back({call, std::move(got)});
        if (open.size() > 4) open.erase(open.begin() + alike() % 4);
        continue;
      }
      const Dispatched& which = open[alike() % open.size()];
      if (kind == 1) combine_backward(which.call, which.got, call);
      if (kind == 2) combine(which.call, which.got, call, false);
      if (kind == 3) combine(which.call, which.got, call, true);
    }
  }

  Got dispatch(Brought brought, int64_t refused = 0, int64_t hidden_word = 0) {
    StageArgs stage_args = dispatch_stage(brought);
    stage_args.header[kRefusedField] = refused;
    stage_args.header[kHiddenField] = hidden_word ? hidden_word : s_.hidden;
    Got got;
    got.slot_rows.assign(static_cast<size_t>(brought.tokens * s_.top_k), -99);
    stage_args.slot_rows = got.slot_rows.data();
    start(stage_args);
    const TokenRegion region = token_region();
    PullArgs args{};
    args.link = world_.link(rank_, Phase::kDispatch);
    got.x.assign(static_cast<size_t>(s_.capacity * s_.hidden), 0x7fc0);
    got.ids.assign(static_cast<size_t>(s_.capacity * s_.top_k), -99);
    got.weights.assign(static_cast<size_t>(s_.capacity * s_.top_k * s_.weight_bytes), 0x55);
    got.extra.assign(static_cast<size_t>(s_.capacity * s_.extra_bytes), 0x55);
    got.plan.assign(static_cast<size_t>(PlanView{s_.ranks}.words(s_.capacity)), -99);
    args.plan = got.plan.data();
    args.tag = kTag, args.capacity = s_.capacity, args.slot_capacity = s_.slot_capacity;
    args.max_tokens = s_.max_tokens, args.by_plan = false;
    args.sections = 2;
    args.section[0] = with_rows(region.x, bytes_of(got.x), s_.hidden * 2);
    args.section[1] = with_rows(region.extra, got.extra.data(), s_.extra_bytes);
    args.lists = region.lists, args.staged_homes = region.homes.staged;
    args.homes_stride = region.homes.staged_stride;
    args.top_k = s_.top_k, args.weight_bytes = s_.weight_bytes;
    args.staged_weights = region.weights.staged;
    args.weights_stride = region.weights.staged_stride;
    args.ids = got.ids.data(), args.weights = got.weights.data();
    start(args);
    return got;
  }

  // A dispatch that is as it should be.
  void right(int call) { compare(call, dispatch(bring(s_, seed_, call, rank_))); }

  // Stages a dispatch and goes no further.
  void only_stage(Brought brought) {
    StageArgs args = dispatch_stage(brought);
    std::vector<int32_t> slot_rows(static_cast<size_t>(brought.tokens * s_.top_k));
    args.slot_rows = slot_rows.data();
    start(args);
  }

 private:
  static Section with_rows(Section section, char* rows, int64_t stride) {
    section.rows = rows, section.stride = stride;
    return section;
  }

  TokenRegion token_region() const {
    return TokenRegion(s_.ranks, s_.max_tokens, s_.hidden * 2, s_.top_k, s_.weight_bytes,
                       s_.extra_bytes);
  }
  ResultRegion result_region() const {
    return ResultRegion(s_.capacity, s_.hidden * 2, s_.top_k * s_.weight_bytes);
  }

  bool owners_are_plain(const std::vector<std::vector<int32_t>>& owners) const {
    if (s_.experts % s_.ranks) return false;
    for (int e = 0; e < s_.experts; ++e) {
      if (owners[e] != std::vector<int32_t>{e / (s_.experts / s_.ranks)}) return false;
    }
    return true;
  }

  template <typename Args>
  Args with_header(Args args, Phase phase) const {
    args.header[kMagicField] = 5;
    args.header[kPhaseField] = static_cast<int64_t>(phase);
    args.header[kHiddenField] = s_.hidden;
    return args;
  }

  StageArgs dispatch_stage(Brought& brought) {
    const TokenRegion region = token_region();
    StageArgs args{};
    args = with_header(args, Phase::kDispatch);
    args.link = world_.link(rank_, Phase::kDispatch);
    args.rows = brought.tokens;
    args.tag = kTag, args.capacity = s_.capacity, args.sections = 3;
    args.section[0] = with_rows(region.x, bytes_of(brought.x), s_.hidden * 2);
    args.section[1] = with_rows(region.weights, brought.weights.data(), s_.top_k * s_.weight_bytes);
    args.section[2] = with_rows(region.extra, brought.extra.data(), s_.extra_bytes);
    args.id_bytes = s_.id_bytes, args.top_k = s_.top_k;
    static const int64_t none = 0;
    args.ids = s_.id_bytes == 8 ? static_cast<const void*>(brought.ids.data())
                                : static_cast<const void*>(brought.narrow_ids.data());
    if (brought.tokens == 0) args.ids = &none;
    args.homes = homes_->homes;
    args.max_tokens = s_.max_tokens, args.lists = region.lists;
    args.staged_homes = region.homes.staged, args.homes_stride = region.homes.staged_stride;
    return args;
  }

  Grid grid() {
    Grid grid;
    grid.blocks = 1 + static_cast<int>(draw_() % 3) * (1 + static_cast<int>(draw_() % 2));
    grid.group = 1 + static_cast<int>(draw_() % 2);
    grid.threads = grid.group * (1 + static_cast<int>(draw_() % 2));
    return grid;
  }

  void start(const StageArgs& args) {
    run_grid<StageShared>(
        grid(), draw_, [&](const Lane& lane, StageShared& shared) { stage(lane, shared, args); });
  }
  void wait(const Link& link) {
    Grid one = grid();
    one.blocks = 1;
    run_grid<uint32_t>(one, draw_, [&](const Lane& lane, uint32_t& yes) { meet(lane, link, yes); });
  }
  void start(const PullArgs& args) {
    wait(args.link);
    run_grid<PullShared>(grid(), draw_,
                         [&](const Lane& lane, PullShared& shared) { pull(lane, shared, args); });
  }
  void start(const SumArgs& args) {
    wait(args.link);
    run_grid<SumShared>(
        grid(), draw_, [&](const Lane& lane, SumShared& shared) { sum<Bf16>(lane, shared, args); });
  }

  // A row that some rank gets in a dispatch: whose it is, and which slots are the receiver's.
  struct Row {
    int source;
    int64_t token;
    bool dropped;                // of the slots there was no room for
    std::vector<int32_t> local;  // [K]
  };
  // Those of `receiver`, with the ones beyond its capacity.
  std::vector<Row> rows_of(int call, int receiver) {
    std::vector<Row> rows;
    int64_t slots = 0;
    for (int source = 0; source < s_.ranks; ++source) {
      const Brought brought = bring(s_, seed_, call, source);
      for (int64_t t = 0; t < brought.tokens; ++t) {
        Row row{source, t, false, {}};
        int64_t own = 0;
        for (int k = 0; k < s_.top_k; ++k) {
          const int64_t id = brought.ids[static_cast<size_t>(t * s_.top_k + k)];
          int32_t local = -1;
          if (id >= 0 && id < s_.experts) {
            const auto home = placements_[source].home(id, t);
            if (home.rank == receiver) local = home.local, ++own;
          }
          row.local.push_back(local);
        }
        if (own == 0) continue;
        slots += own;
        row.dropped = slots > s_.slot_capacity;
        rows.push_back(row);
      }
    }
    return rows;
  }

  void compare(int call, const Got& got) {
    const auto rows = rows_of(call, rank_);
    const auto kept = std::min<size_t>(rows.size(), static_cast<size_t>(s_.capacity));
    std::vector<Brought> brought;
    for (int p = 0; p < s_.ranks; ++p) brought.push_back(bring(s_, seed_, call, p));
    const size_t hidden = static_cast<size_t>(s_.hidden), top_k = static_cast<size_t>(s_.top_k);
    const size_t weight = static_cast<size_t>(s_.weight_bytes);
    const size_t extra = static_cast<size_t>(s_.extra_bytes);
    const auto tokens = static_cast<size_t>(PlanView{s_.ranks}.tokens());
    for (size_t u = 0; u < static_cast<size_t>(s_.capacity); ++u) {
      const bool spare = u >= kept;
      const Row* const row = spare ? nullptr : &rows[u];
      const size_t t = spare ? 0 : static_cast<size_t>(row->token);
      const Brought* const from = spare ? nullptr : &brought[row->source];
      for (size_t h = 0; h < hidden; ++h) {
        check(got.x[u * hidden + h] == (spare ? 0 : from->x[t * hidden + h]), "x of a dispatch");
      }
      for (size_t i = 0; i < extra; ++i) {
        check(got.extra[u * extra + i] == (spare ? 0 : from->extra[t * extra + i]), "extra rows");
      }
      for (size_t k = 0; k < top_k; ++k) {
        const int32_t local = spare || row->dropped ? -1 : row->local[k];
        check(got.ids[u * top_k + k] == local, "ids of a dispatch");
        for (size_t i = 0; i < weight; ++i) {
          const char expected = local < 0 ? 0 : from->weights[(t * top_k + k) * weight + i];
          check(got.weights[(u * top_k + k) * weight + i] == expected, "weights of a dispatch");
        }
      }
      check(got.plan[tokens + u] == (spare ? -1 : row->token), "tokens of a plan");
    }
    // What it needed most, of all ranks and calls.
    int64_t most_rows = 0, most_slots = 0;
    for (int p = 0; p < s_.ranks; ++p) {
      const auto theirs = rows_of(call, p);
      int64_t slots = 0;
      for (const Row& row : theirs) {
        slots +=
            std::count_if(row.local.begin(), row.local.end(), [](int32_t l) { return l >= 0; });
      }
      most_rows = std::max(most_rows, static_cast<int64_t>(theirs.size()));
      most_slots = std::max(most_slots, slots);
    }
    if (most_rows > s_.capacity || most_slots > s_.slot_capacity) {
      ++overflows_;
      needed_rows_ = std::max(needed_rows_, most_rows);
      needed_slots_ = std::max(needed_slots_, most_slots);
    }
    const Report& report = world_.reports[rank_];
    check(report.fault == 0, "a fault where there is none");
    check(report.overflows == overflows_, "overflows are counted");
    check(report.needed_rows == needed_rows_ && report.needed_slots == needed_slots_,
          "the capacity that is needed is told");
  }

  // Rows of small integers, which tell who computed them in which call.
  static int value_of(int call, int rank, int64_t row, int64_t at) {
    return static_cast<int>((call * 5 + rank * 3 + row * 7 + at) % 9) - 4;
  }

  void combine(int dispatched, const Got& got, int call, bool with_entries) {
    const ResultRegion region = result_region();
    const size_t hidden = static_cast<size_t>(s_.hidden), top_k = static_cast<size_t>(s_.top_k);
    const size_t weight = static_cast<size_t>(s_.weight_bytes);
    const Brought mine = bring(s_, seed_, dispatched, rank_);
    std::vector<uint16_t> y(static_cast<size_t>(s_.capacity) * hidden);
    std::vector<char> entries(static_cast<size_t>(s_.capacity) * top_k * weight);
    for (size_t u = 0; u < static_cast<size_t>(s_.capacity); ++u) {
      for (size_t h = 0; h < hidden; ++h) {
        y[u * hidden + h] =
            bf16_of(value_of(call, rank_, static_cast<int64_t>(u), static_cast<int64_t>(h)));
      }
      for (size_t i = 0; i < top_k * weight; ++i) {
        entries[u * top_k * weight + i] = static_cast<char>(
            value_of(call, rank_, static_cast<int64_t>(u), static_cast<int64_t>(i)));
      }
    }
    const Phase phase = with_entries ? Phase::kDispatchBackward : Phase::kCombine;
    StageArgs stage_args{};
    stage_args = with_header(stage_args, phase);
    stage_args.link = world_.link(rank_, phase);
    stage_args.plan = got.plan.data(), stage_args.tag = kTag;
    stage_args.own_stays = true, stage_args.capacity = s_.capacity;
    stage_args.sections = with_entries ? 2 : 1;
    stage_args.section[0] = with_rows(region.rows, bytes_of(y), s_.hidden * 2);
    stage_args.section[1] =
        with_rows(region.entries, entries.data(), static_cast<int64_t>(top_k * weight));
    start(stage_args);

    std::vector<uint16_t> out(static_cast<size_t>(mine.tokens) * hidden, 0x7fc0);
    std::vector<char> out_entries(static_cast<size_t>(mine.tokens) * top_k * weight, 0x55);
    SumArgs args{};
    args.link = world_.link(rank_, phase);
    args.plan = got.plan.data(), args.tokens = mine.tokens, args.capacity = s_.capacity;
    args.max_tokens = s_.max_tokens, args.top_k = s_.top_k;
    args.slot_rows = got.slot_rows.data(), args.value = Value::kBf16;
    args.width = static_cast<int>(s_.hidden);
    args.addend = stage_args.section[0];
    if (with_entries) args.entry = stage_args.section[1];
    args.sums = bytes_of(out), args.sums_stride = s_.hidden * 2;
    args.entry_bytes = s_.weight_bytes, args.entries = out_entries.data();
    start(args);

    std::vector<float> sums(out.size(), 0);
    std::vector<char> expected(out_entries.size(), 0);
    for (int p = 0; p < s_.ranks; ++p) {
      const auto rows = rows_of(dispatched, p);
      for (size_t u = 0; u < std::min<size_t>(rows.size(), static_cast<size_t>(s_.capacity)); ++u) {
        if (rows[u].source != rank_) continue;
        const auto t = static_cast<size_t>(rows[u].token);
        for (size_t h = 0; h < hidden; ++h) {
          sums[t * hidden + h] += static_cast<float>(
              value_of(call, p, static_cast<int64_t>(u), static_cast<int64_t>(h)));
        }
        for (size_t k = 0; k < top_k; ++k) {
          if (rows[u].local[k] < 0) continue;
          for (size_t i = 0; i < weight; ++i) {
            expected[(t * top_k + k) * weight + i] = static_cast<char>(
                value_of(call, p, static_cast<int64_t>(u), static_cast<int64_t>(k * weight + i)));
          }
        }
      }
    }
    for (size_t i = 0; i < out.size(); ++i) {
      check(Bf16::widen(out[i]) == sums[i], "sums of a combine");
    }
    check(!with_entries || out_entries == expected, "entries of slots");
  }

  void combine_backward(int dispatched, Got got, int call) {
    const TokenRegion region(s_.ranks, s_.max_tokens, s_.hidden * 2, 0, 0, 0);
    const size_t hidden = static_cast<size_t>(s_.hidden);
    const auto value = [&](int source, int64_t token, size_t h) {
      return bf16_of(value_of(call, source, token, static_cast<int64_t>(h)));
    };
    const Brought mine = bring(s_, seed_, dispatched, rank_);
    std::vector<uint16_t> grad(static_cast<size_t>(mine.tokens) * hidden);
    for (size_t i = 0; i < grad.size(); ++i) {
      grad[i] = value(rank_, static_cast<int64_t>(i / hidden), i % hidden);
    }
    StageArgs stage_args{};
    stage_args = with_header(stage_args, Phase::kCombineBackward);
    stage_args.link = world_.link(rank_, Phase::kCombineBackward);
    stage_args.plan = got.plan.data(), stage_args.tag = kTag, stage_args.rows = mine.tokens;
    stage_args.capacity = s_.capacity, stage_args.sections = 1;
    stage_args.section[0] = with_rows(region.x, bytes_of(grad), s_.hidden * 2);
    start(stage_args);
    std::vector<uint16_t> out(static_cast<size_t>(s_.capacity) * hidden, 0x7fc0);
    PullArgs args{};
    args.link = world_.link(rank_, Phase::kCombineBackward);
    args.plan = got.plan.data(), args.by_plan = true, args.capacity = s_.capacity;
    args.max_tokens = s_.max_tokens, args.sections = 1;
    args.section[0] = with_rows(region.x, bytes_of(out), s_.hidden * 2);
    start(args);
    const auto rows = rows_of(dispatched, rank_);
    for (size_t i = 0; i < out.size(); ++i) {
      const size_t u = i / hidden;
      const bool spare = u >= rows.size();
      check(out[i] == (spare ? 0 : value(rows[u].source, rows[u].token, i % hidden)),
            "gradients of results");
    }
  }

  World& world_;
  const Settings& s_;
  const int rank_;
  const unsigned seed_;
  std::mt19937 draw_;
  std::vector<Placement> placements_;
  std::unique_ptr<DeviceHomes> homes_;
  bool plain_ = false;
  uint64_t overflows_ = 0;
  int64_t needed_rows_ = 0, needed_slots_ = 0;
};

}  // namespace emulation
