// What the GPUs of a machine know of each other, and the arguments of the kernels. Plain data: host
// and device read it alike.
//
// T tokens, K experts a token, P ranks, U rows received. Every call of all ranks has a number, its
// epoch. In it a rank leaves what it has in its own staging memory, of which there are two, for
// even and odd epochs, posts the epoch to every rank, waits until all have posted to it, and pulls
// what is for it. A rank posts e + 1 after it has pulled in e, and stages e + 2 after all have
// posted e + 1: nobody reads any more what it overwrites.
#pragma once

#include <cstdint>

namespace moe::ep::device {

constexpr int kMaxRanks = 32;
// Of a header; those of dispatch/header.h, in whose kRowsField and kSlotsField are the capacities.
constexpr int kHeaderWords = 16, kMaxTokensWord = 15;
constexpr int kMaxSections = 3;

// Written by one rank in the memory of another.
struct alignas(128) Post {
  uint64_t epoch;   // of its last call that is staged
  uint64_t failed;  // not 0: it has given up, because of rank `failed - 1`
};

// Of a rank, for itself.
struct alignas(128) State {
  uint64_t epoch;      // of the last call that ended
  uint64_t bad_slot;   // of the call that is staged: not 0 if slot `bad_slot - 1` has no valid id
  uint64_t overflows;  // calls that brought more to some rank than it has room for
  uint32_t staged, pulled;  // blocks that are through
  uint32_t failed;          // not 0: no call after this does anything
  uint32_t ready;           // of the call that is staged: all ranks have staged it, and agree
};

// In memory that all ranks map: where they post to this one.
struct Control {
  Post posts[kMaxRanks];
  State state;
};

enum class Fault : uint64_t {
  kNone,
  kLate,         // a peer has not posted in time
  kPeerFailed,   // a peer has given up
  kGone,         // a peer will not post: the host knows why
  kMismatch,     // a peer makes another call
  kRefused,      // a peer has found an error in its arguments
  kInvalidSlot,  // an id of this rank is no expert
  kHandle,       // a plan of this rank is not one of its dispatcher
};

// In memory of the host, written by the device.
struct Report {
  uint64_t fault;  // a Fault, written last; the first stays
  int64_t peer, culprit, phase, slot;
  uint64_t epoch;
  int64_t mine[kHeaderWords], theirs[kHeaderWords];
  uint64_t overflows;  // so many calls; the most that any of them brought to a rank:
  int64_t needed_rows, needed_slots;
  int64_t capacity, slot_capacity;  // of the last of them
  uint64_t ended;                   // the epoch of the last call that ended
};

// In memory of the host, written by it.
struct Orders {
  uint64_t gone;  // bit p: rank p will post no more
};

struct Counts {
  int64_t rows, slots;
};

// At the head of what a rank has staged. The rows and slots are those for each rank.
struct alignas(128) Head {
  int64_t words[kHeaderWords];
  Counts counts[kMaxRanks];
};

// A token for some rank: its number, and the slots for that rank up to it and with it.
struct Entry {
  int32_t token, slots;
};

// Numbers of a dispatch, [plan_words] int64 on the device: rows sent to each rank and received from
// each, where this rank's rows begin at each, the number of the dispatch, a tag, and
// the token of each received row, or -1.
struct PlanView {
  int ranks;

  constexpr int64_t sent(int rank) const { return rank; }
  constexpr int64_t received(int rank) const { return ranks + rank; }
  constexpr int64_t begin_at(int rank) const { return 2 * ranks + rank; }
  constexpr int64_t dispatch() const { return 3 * ranks; }
  constexpr int64_t tag() const { return 3 * ranks + 1; }
  constexpr int64_t tokens() const { return 3 * ranks + 2; }
  constexpr int64_t words(int64_t capacity) const { return tokens() + capacity; }
};

// How a rank reaches the others.
struct Link {
  int rank, ranks;
  int phase;
  uint64_t timeout;  // nanoseconds
  Control* controls[kMaxRanks];
  char* staging[kMaxRanks];
  int64_t parity_bytes;
  Report* report;
  const Orders* orders;
};

// Rows to or from staged memory, where they are at `staged` in each parity, 16 bytes aligned.
struct Section {
  char* rows;
  int64_t stride, bytes;  // of a row
  int64_t staged, staged_stride;
};

// Where experts are, as Placement knows it; the arrays are on the device.
struct Homes {
  int32_t experts, per_rank, most_copies;  // per_rank 0: by the arrays
  const int32_t *begin, *rank, *local, *preferred;
};

// Leaves rows for the ranks: of tokens, with lists of whom they are for where there are `ids`; or,
// with `own_stays`, the rows received in a dispatch, but for those that came from this rank.
struct StageArgs {
  Link link;
  int64_t header[kHeaderWords];
  int64_t rows;         // of tokens
  const int64_t* plan;  // of an earlier dispatch, or null
  int64_t tag;
  bool own_stays;
  int64_t capacity;
  int sections;
  Section section[kMaxSections];
  const void* ids;  // or null
  int id_bytes, top_k;
  Homes homes;
  int32_t* slot_rows;
  int64_t max_tokens, lists, staged_homes, homes_stride;
};

// Fetches the rows that are for this rank, in the order of ranks and tokens. `plan` is written, or,
// without lists (combine_backward), read.
struct PullArgs {
  Link link;
  int64_t* plan;
  int64_t tag, capacity, slot_capacity, max_tokens;
  bool by_plan;
  int sections;
  Section section[kMaxSections];
  int64_t lists, staged_homes, homes_stride;  // of a dispatch
  int top_k;
  int weight_bytes;
  int64_t staged_weights, weights_stride;
  int32_t* ids;
  char* weights;
};

enum class Value : int { kBf16, kFp16, kFp32, kFp64 };

// Adds the rows of each token, and picks its slots' entries of rows of weights. Sections: the rows
// to add, then those of weights; `rows` is null for what there is not.
struct SumArgs {
  Link link;
  const int64_t* plan;
  int64_t tokens, capacity, max_tokens;
  int top_k;
  const int32_t* slot_rows;
  Value value;
  int width;  // elements of a row
  Section addend, entry;
  char* sums;
  int64_t sums_stride;
  int entry_bytes;  // of one
  char* entries;    // [T, K]
};

}  // namespace moe::ep::device
