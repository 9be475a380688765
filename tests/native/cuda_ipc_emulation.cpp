// The device code of the transport `cuda_ipc` without a GPU: every rank is a thread that starts the
// kernels' functions on a grid of threads, whose blocks and groups have barriers as on a device.
// With random sizes, delays, skew, overflow and dead ranks, against a plain all-to-all, in many
// epochs. For the thread sanitizer and the address and undefined behaviour sanitizers.
//
//   cuda_ipc_emulation [calls] [seed]
#include <algorithm>
#include <functional>

#include "cuda_ipc_rank.h"

namespace {

using namespace emulation;

Settings draw_settings(std::mt19937& draw) {
  Settings s{};
  s.ranks = 1 + static_cast<int>(draw() % 5);
  s.experts = s.ranks * (1 + static_cast<int>(draw() % 4));
  s.top_k = 1 + static_cast<int>(draw() % static_cast<unsigned>(std::min(s.experts, 6)));
  const int64_t tokens[] = {1, 5, 23, 40};
  s.max_tokens = tokens[draw() % 4];
  const int64_t hidden[] = {1, 3, 8, 72, 77, 330};
  s.hidden = hidden[draw() % 6];
  const int64_t extra[] = {0, 1, 6, 20};
  s.extra_bytes = extra[draw() % 4];
  s.weight_bytes = 2 << draw() % 3;
  s.id_bytes = draw() % 2 ? 4 : 8;
  // Of all there can be, or so little that it overflows.
  s.capacity =
      draw() % 2 ? s.ranks * s.max_tokens : 1 + static_cast<int64_t>(draw()) % s.max_tokens;
  s.slot_capacity = s.capacity * s.top_k;
  if (draw() % 3 == 0) s.slot_capacity = 1 + s.slot_capacity / 4;
  return s;
}

std::vector<std::vector<int32_t>> draw_owners(std::mt19937& draw, const Settings& s) {
  const unsigned kind = draw() % 3;
  std::vector<std::vector<int32_t>> owners;
  for (int e = 0; e < s.experts; ++e) {
    std::vector<int32_t> mine{kind == 0
                                  ? e / (s.experts / s.ranks)
                                  : static_cast<int32_t>(draw() % static_cast<unsigned>(s.ranks))};
    for (int p = 0; kind == 2 && p < s.ranks; ++p) {
      if (p != mine[0] && draw() % 3 == 0) mine.push_back(p);
    }
    std::sort(mine.begin(), mine.end());
    owners.push_back(mine);
  }
  return owners;
}

void on_all(int ranks, const std::function<void(int)>& f) {
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) threads.emplace_back(f, rank);
  for (std::thread& thread : threads) thread.join();
}

void many_calls(int calls, unsigned seed) {
  std::mt19937 draw(seed);
  const Settings settings = draw_settings(draw);
  const auto owners = draw_owners(draw, settings);
  World world(settings);
  on_all(settings.ranks, [&](int rank) { Rank(world, rank, seed, owners).run(calls); });
  for (const Control& control : world.controls) {
    check(control.state.epoch == static_cast<uint64_t>(calls), "every call is an epoch");
  }
  for (const Report& report : world.reports) {
    check(report.ended == static_cast<uint64_t>(calls), "the host learns which call ended last");
  }
}

// Two calls that are right, then one that is not on the last rank.
enum class Wrong { kDead, kGone, kDeadAfterStaging, kMismatch, kRefused, kAllRefuse, kInvalidId };

void faults(Wrong wrong, unsigned seed) {
  std::mt19937 draw(seed);
  Settings s = draw_settings(draw);
  s.ranks = 2 + static_cast<int>(seed % 3);
  s.experts = 2 * s.ranks, s.top_k = 2, s.max_tokens = 9;
  s.capacity = s.ranks * s.max_tokens, s.slot_capacity = s.capacity * s.top_k;
  if (wrong == Wrong::kDead) s.timeout = 1'000'000'000;
  std::vector<std::vector<int32_t>> owners;
  for (int e = 0; e < s.experts; ++e) owners.push_back({e / 2});
  World world(s);
  const int last = s.ranks - 1;
  std::barrier everybody(s.ranks);
  on_all(s.ranks, [&](int r) {
    Rank rank(world, r, seed, owners);
    rank.run(2);
    everybody.arrive_and_wait();
    Brought brought = bring(s, seed, 100, r);
    Report& report = world.reports[r];
    const auto fault = [&] { return static_cast<Fault>(acquire(&report.fault)); };
    if (r == last && wrong == Wrong::kDead) return;
    if (r == last && wrong == Wrong::kGone) {
      for (int p = 0; p < last; ++p) release(&world.orders[p].gone, uint64_t{1} << last);
      return;
    }
    if (r == last && wrong == Wrong::kDeadAfterStaging) return rank.only_stage(brought);
    if (wrong == Wrong::kDeadAfterStaging) {
      rank.right(100);  // what it left is good
      release(&world.orders[r].gone, uint64_t{1} << last);
    }
    int64_t refused = 0, hidden = 0;
    if (wrong == Wrong::kAllRefuse || (wrong == Wrong::kRefused && r == last)) {
      refused = kRefusedByHost;
    }
    if (wrong == Wrong::kMismatch && r == last) hidden = s.hidden + 1;
    if (wrong == Wrong::kInvalidId && r == last) {
      brought = bring(s, 1, 1, r);
      brought.tokens = 1, brought.x.assign(static_cast<size_t>(s.hidden), 0);
      brought.ids = {0, -2}, brought.narrow_ids = {0, -2};
      brought.weights.assign(static_cast<size_t>(2 * s.weight_bytes), 1);
      brought.extra.assign(static_cast<size_t>(s.extra_bytes), 1);
    }
    const Got got = rank.dispatch(brought, refused, hidden);
    const bool nothing =
        std::all_of(got.ids.begin(), got.ids.end(), [](int32_t id) { return id == -1; }) &&
        std::all_of(got.x.begin(), got.x.end(), [](uint16_t v) { return v == 0; });
    switch (wrong) {
      case Wrong::kDead:
      case Wrong::kGone:
        check(nothing, "without a rank there is nothing");
        check(fault() == Fault::kPeerFailed ||
                  fault() == (wrong == Wrong::kDead ? Fault::kLate : Fault::kGone),
              "a dead rank is a fault");
        check(report.epoch == 3, "the epoch of a fault");
        check(wrong == Wrong::kGone || report.culprit == last, "the rank that is dead is told");
        break;
      case Wrong::kDeadAfterStaging:
        check(fault() == Fault::kGone || fault() == Fault::kPeerFailed, "it is missing now");
        break;
      case Wrong::kMismatch:
        check(fault() == Fault::kMismatch, "calls that differ are a fault");
        check(report.mine[kHiddenField] != report.theirs[kHiddenField], "both values are told");
        check(nothing, "calls that differ bring nothing");
        break;
      case Wrong::kRefused:
        check(fault() == (r == last ? Fault::kNone : Fault::kRefused), "a refusal is told");
        check(r == last || (report.culprit == last && nothing), "a refusal brings nothing");
        break;
      case Wrong::kAllRefuse:
        check(fault() == Fault::kNone, "what all refuse is no fault");
        return rank.right(103);
      case Wrong::kInvalidId:
        check(r == last ? fault() == Fault::kInvalidSlot : fault() == Fault::kRefused,
              "an invalid id is a fault");
        check(r != last || report.slot == 1, "the slot of an invalid id");
        check(nothing, "an invalid id brings nothing");
        break;
    }
    // Nothing waits any more.
    const auto begin = std::chrono::steady_clock::now();
    const Got after = rank.dispatch(bring(s, seed, 102, r));
    const bool spare =
        std::all_of(after.ids.begin(), after.ids.end(), [](int32_t id) { return id == -1; });
    check(spare, "after a fault there is nothing");
    check(acquire(&report.ended) >= 3, "calls end after a fault too");
    check(std::chrono::steady_clock::now() - begin < std::chrono::seconds(20), "or a wait");
  });
}

// To half precision and back, by the functions for the host, which no test on a GPU would run.
void halves() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    if ((half & 0x7c00) == 0x7c00 && (half & 0x3ff)) {
      check((Fp16::narrow(Fp16::widen(half)) & 0x7e00) == 0x7e00, "no number stays none");
      continue;
    }
    check(Fp16::narrow(Fp16::widen(half)) == half, "halves are exact");
    if ((half & 0x7c00) == 0x7c00) continue;
    // Between it and the next: to the nearer, in the middle to the even one.
    const auto next = static_cast<uint16_t>(half + 1);
    const bool to_infinity = (next & 0x7fff) == 0x7c00;
    const float low = Fp16::widen(half);
    const float high = to_infinity ? (half & 0x8000 ? -65536.0f : 65536.0f) : Fp16::widen(next);
    const float middle = (low + high) / 2;
    check(Fp16::narrow(middle) == (half % 2 ? next : half), "ties go to even");
    check(Fp16::narrow(std::nextafter(middle, low)) == half, "below the middle");
    check(Fp16::narrow(std::nextafter(middle, high)) == next, "above the middle");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::atoi(argv[1]) : 40;
  const unsigned seed = argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 1;
  halves();
  for (unsigned world = 0; world < 6; ++world) many_calls(calls, 100 * seed + world);
  for (unsigned trial = 0; trial < 3; ++trial) {
    for (const Wrong wrong :
         {Wrong::kDead, Wrong::kGone, Wrong::kDeadAfterStaging, Wrong::kMismatch, Wrong::kRefused,
          Wrong::kAllRefuse, Wrong::kInvalidId}) {
      faults(wrong, 10 * seed + trial);
    }
  }
  std::printf("cuda_ipc_emulation: %d calls, seed %u: right\n", calls, seed);
}
