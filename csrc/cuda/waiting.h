// How the ranks wait for each other on the device, and what becomes of those that cannot.
#pragma once

#include "cuda/lane.h"
#include "cuda/protocol.h"
#include "dispatch/header.h"

namespace moe::ep::device {

MOE_DEVICE State& state_of(const Link& link) { return link.controls[link.rank]->state; }
MOE_DEVICE char* staged_by(const Link& link, int rank, uint64_t epoch) {
  return link.staging[rank] + static_cast<int64_t>(epoch % 2) * link.parity_bytes;
}
MOE_DEVICE Head& head_of(const Link& link, int rank, uint64_t epoch) {
  return *reinterpret_cast<Head*>(staged_by(link, rank, epoch));
}

MOE_DEVICE int64_t load_word(const int64_t* from) {
  return load(reinterpret_cast<const long long*>(from));
}

// Ends the use of the ranks' memory; the first to come says why, to the host and to the others.
MOE_DEVICE void give_up(const Link& link, uint64_t epoch, Fault fault, int peer, int64_t culprit,
                        int64_t slot = -1) {
  if (!claim(&state_of(link).failed)) return;
  Report& report = *link.report;
  report.peer = peer, report.culprit = culprit, report.phase = link.phase;
  report.slot = slot, report.epoch = epoch;
  if (fault == Fault::kMismatch) {
    for (int i = 0; i < kHeaderWords; ++i) {
      report.mine[i] = load_word(&head_of(link, link.rank, epoch).words[i]);
      report.theirs[i] = load_word(&head_of(link, peer, epoch).words[i]);
    }
  }
  release(&report.fault, static_cast<uint64_t>(fault));
  for (int p = 0; p < link.ranks; ++p) {
    release(&link.controls[p]->posts[link.rank].failed, static_cast<uint64_t>(culprit) + 1);
  }
}

// Whether what `peer` has staged in this epoch is there.
MOE_DEVICE bool wait_for(const Link& link, uint64_t epoch, int peer, uint64_t begin) {
  const Post& post = link.controls[link.rank]->posts[peer];
  for (uint32_t round = 1;; ++round) {
    if (acquire(&post.epoch) >= epoch) return true;
    if (const uint64_t failed = acquire(&post.failed)) {
      // Unless that is what it did after it had staged.
      if (acquire(&post.epoch) >= epoch) return true;
      give_up(link, epoch, Fault::kPeerFailed, peer, static_cast<int64_t>(failed) - 1);
      return false;
    }
    if (round % 64 == 0) {
      if (peek(&state_of(link).failed)) return false;
      if (acquire(&link.orders->gone) >> peer & 1) {
        if (acquire(&post.epoch) >= epoch) return true;
        give_up(link, epoch, Fault::kGone, peer, peer);
        return false;
      }
      // The clock is that of the whole GPU, and may have been set back.
      if (static_cast<int64_t>(nanoseconds() - begin) > static_cast<int64_t>(link.timeout)) {
        give_up(link, epoch, Fault::kLate, peer, peer);
        return false;
      }
    }
    pause();
  }
}

// Whether `peer` says the same of its call as this rank, in one word of the header.
MOE_DEVICE bool agree_with(const Link& link, uint64_t epoch, int peer, int word) {
  const Head &mine = head_of(link, link.rank, epoch), &theirs = head_of(link, peer, epoch);
  const int64_t there = load_word(&theirs.words[word]), here = load_word(&mine.words[word]);
  const int64_t refused = load_word(&mine.words[kRefusedField]);
  if (peer == link.rank) {
    // What this rank has found while staging, and has told the others in its header.
    if (word != kRefusedField || refused == 0 || refused == kRefusedByHost) return true;
    const auto slot = static_cast<int64_t>(acquire(&state_of(link).bad_slot)) - 1;
    const Fault fault = refused == kRefusedForSlot ? Fault::kInvalidSlot : Fault::kHandle;
    give_up(link, epoch, fault, peer, peer, slot);
    return false;
  }
  // A rank that has refused its own arguments raises that, whatever the others do.
  if (refused != 0 || (word != kRefusedField ? there == here : there == 0)) return true;
  const bool by_peer = load_word(&theirs.words[kRefusedField]) != 0;
  give_up(link, epoch, by_peer ? Fault::kRefused : Fault::kMismatch, peer, peer);
  return false;
}

// Waits until all ranks have staged, and finds out whether they agree, so that this call can pull.
// By one block, and before the kernel that pulls: nothing else on a device waits for another. A
// kernel that fills a GPU while it waits would keep out what another rank needs to come so far, as
// the collectives of other streams, and for ever. `yes` is in memory that the threads share.
MOE_DEVICE void meet(const Lane& lane, const Link& link, uint32_t& yes) {
  State& state = state_of(link);
  const uint64_t epoch = state.epoch + 1;
  if (lane.thread == 0) poke(&yes, peek(&state.failed) == 0);
  lane.sync();
  const uint64_t begin = nanoseconds();
  for (int p = lane.thread; p < link.ranks && peek(&yes); p += lane.threads) {
    if (!wait_for(link, epoch, p, begin)) poke(&yes, 0);
  }
  lane.sync();
  const bool all_there = peek(&yes) != 0;
  for (int i = lane.thread; all_there && i < link.ranks * kHeaderWords; i += lane.threads) {
    if (!agree_with(link, epoch, i / kHeaderWords, i % kHeaderWords)) poke(&yes, 0);
  }
  lane.sync();
  if (lane.thread == 0) state.ready = peek(&yes);
}

// Whether this block is the last of its grid to come here, and what the others wrote is there.
// `last` is in memory that its threads share.
MOE_DEVICE bool is_last(const Lane& lane, uint32_t* count, uint32_t& last) {
  lane.sync();
  if (lane.thread == 0) {
    const bool mine = arrive(count) == static_cast<uint32_t>(lane.blocks) - 1;
    if (mine) poke(count, 0);
    poke(&last, mine);
  }
  lane.sync();
  return peek(&last) != 0;
}

// The last thing in a call: nothing of it reads another rank's memory after that, as the host
// learns.
MOE_DEVICE void leave(const Lane& lane, const Link& link, uint64_t epoch, uint32_t& last) {
  State& state = state_of(link);
  if (!is_last(lane, &state.pulled, last) || lane.thread != 0) return;
  state.epoch = epoch;
  release(&link.report->ended, epoch);
}

}  // namespace moe::ep::device
