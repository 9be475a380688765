// What the ranks of a communicator say to each other: words in memory that all of them map.
//
// Every call has a number, the same on all ranks, and up to three stages. In each, every rank
// leaves a message for every other. A rank enters call n + 1 only after it has read a message of
// call n from everybody, so nobody is more than one call ahead, and two mailboxes in turn are
// enough.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace moe::ep::shm {

enum class Stage : int { kHeader, kGrant, kDone };
constexpr int kStages = 3;
constexpr int kParities = 2;

constexpr int kWords = 23;
struct Message {
  int64_t words[kWords] = {};
};

struct alignas(64) Mailbox {
  std::atomic<uint64_t> call;  // the number of the call the message is of; written last
  Message message;
};

enum class State : uint32_t { kOpen, kClosed, kFailed, kExits };

constexpr size_t kReasonBytes = 1024;

// At the head of each rank's control memory; mailboxes [stage][parity][sender] follow.
struct Control {
  alignas(64) std::atomic<uint32_t> bell;  // rung for the owner
  std::atomic<uint32_t> sleepers;          // threads of the owner that wait for it
  alignas(64) std::atomic<uint32_t> state;
  std::atomic<uint64_t> call;  // the last one the owner has entered
  char reason[kReasonBytes];   // of kFailed; written before
  // Of ranks whose GPUs read each other's memory: 0, or 1 + the calls that the owner, which goes,
  // has taken part in; and bit p: nothing of the owner reads memory of rank p any more.
  std::atomic<uint64_t> goes_after;
  std::atomic<uint64_t> let_go;
  alignas(64) Mailbox mailboxes[1];

  static size_t bytes(int ranks) {
    return sizeof(Control) + sizeof(Mailbox) * kStages * kParities * static_cast<size_t>(ranks);
  }
  Mailbox& mailbox(Stage stage, uint64_t call_number, int sender, int ranks) {
    const int row = static_cast<int>(stage) * kParities + static_cast<int>(call_number % kParities);
    return mailboxes[row * ranks + sender];
  }
};

static_assert(std::atomic<uint64_t>::is_always_lock_free && sizeof(Mailbox) == 192);

}  // namespace moe::ep::shm
