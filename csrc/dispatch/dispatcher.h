// A dispatcher as the ops know it: by its name, for an object among their arguments would hide the
// gradients from torch.compile.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "dispatch/agreement.h"
#include "dispatch/cuda_ipc/peer_memory.h"
#include "dispatch/errors.h"
#include "dispatch/layout.h"
#include "dispatch/shared_memory/communicator.h"

namespace moe::ep {

// Gradients [T, H] of x and [T, K] of the weights, each empty where it is not needed.
using TokenGradients = std::tuple<at::Tensor, at::Tensor>;

// S rows sent and U received.
struct Arrived {
  at::Tensor x, ids, weights, slot_rows, plan, num_slots;
  at::Tensor extra;  // empty where there was none
};

// What a rank brings to a dispatch.
struct Tokens {
  at::Tensor x, ids, weights;
  std::optional<at::Tensor> extra;  // [T, ...] of any dtype: travels with x, without gradient
};

// What a transport has begun: calling it, once, ends it.
template <typename Result>
using Ending = std::function<Result()>;

// Calls that have begun, by their tickets.
template <typename Result>
class Begun {
 public:
  using Beginning = std::function<Ending<Result>()>;

  // A ticket serves once, unless it is known how to begin `again`.
  int64_t keep(Ending<Result> ending, Beginning again) {
    const std::lock_guard lock(mutex_);
    calls_.emplace(++last_, Call{std::move(ending), std::move(again)});
    return last_;
  }
  // Empty for a ticket that was used.
  Ending<Result> take(int64_t ticket) {
    Beginning again;
    {
      const std::lock_guard lock(mutex_);
      const auto found = calls_.find(ticket);
      if (found == calls_.end()) return {};
      if (auto ending = std::exchange(found->second.ending, nullptr)) return ending;
      again = found->second.again;
    }
    return again ? again() : Ending<Result>();
  }
  void forget(int64_t ticket) {
    typename Calls::node_type call;  // goes after the lock
    const std::lock_guard lock(mutex_);
    call = calls_.extract(ticket);
  }

 private:
  struct Call {
    Ending<Result> ending;
    Beginning again;
  };
  using Calls = std::unordered_map<int64_t, Call>;

  std::mutex mutex_;
  Calls calls_;
  int64_t last_ = 0;
};

// Of a dispatcher whose ranks' GPUs reach each other's memory.
struct OnGpus {
  std::shared_ptr<ipc::PeerMemory> memory;  // null where they do not
  // T of any rank, rows that a rank has room for, and slots in them; 0 slots: as many as there can
  // be.
  int64_t max_tokens = 0, capacity = 0, slot_capacity = 0;
  bool alone = false;  // tensors of other devices are an error
  device::Homes homes{};
  std::shared_ptr<ipc::Table> table;  // that `homes` is in, if it is in one

  int64_t slots(int64_t top_k) const {
    return slot_capacity > 0 ? slot_capacity : capacity * top_k;
  }
  int64_t plan_words(int64_t ranks) const {
    return device::PlanView{static_cast<int>(ranks)}.words(capacity);
  }
  bool carries(const at::Tensor& tensor) const;
  // Waits until the GPU is done, and raises what it has reported.
  void check() const;
};
// Where `placement` has the experts, for the device.
OnGpus make_on_gpus(std::shared_ptr<ipc::PeerMemory> memory, const Placement& placement,
                    int64_t max_tokens, int64_t capacity, int64_t slot_capacity, bool alone);

// All that a transport knows of one.
struct Dispatcher {
  std::string name, group;
  int64_t number;  // in its group, the same on all ranks
  int64_t rank, ranks;
  double timeout;  // seconds that bound each exchange; for c10d 0 leaves it to the group
  Placement placement;
  // Carries tensors of the CPU; null for c10d's all-to-all, which carries all others.
  std::shared_ptr<shm::Communicator> shared_memory;
  OnGpus on_gpus;

  Begun<Arrived> dispatches;
  Begun<at::Tensor> combines, combine_backwards;
  Begun<TokenGradients> dispatch_backwards;
  FirstError failure;  // of c10d's exchanges; shared memory has its own, of the group
  int64_t process;     // of the rank: a fork of it is not the rank

  int64_t experts() const { return placement.experts(); }
  // A number for the group, the same within this process.
  int64_t group_tag() const { return static_cast<int64_t>(std::hash<std::string>{}(group)); }
};

// The number in its group of a dispatcher that is to be made. Ranks make those of a group in the
// same order, so they get the same numbers, be it that some rank fails to make one.
int64_t begin_dispatcher(const std::string& group);
// Those that were begun. Where the ranks meet they agree on the most of any, as by one that was
// alone in a try before: with that the dispatcher goes on which was begun last.
int64_t begun_dispatchers(const std::string& group);
void agree_on_dispatchers(const std::string& group, int64_t begun);
// The dispatchers of this process, by name; they live as long as somebody else holds them.
std::shared_ptr<Dispatcher> make_dispatcher(const std::string& group, int64_t number, int64_t rank,
                                            int64_t ranks, Placement placement, double timeout,
                                            std::shared_ptr<shm::Communicator> shared_memory,
                                            OnGpus on_gpus);
std::shared_ptr<Dispatcher> find_dispatcher(const std::string& name);

// How the ranks of a group are joined, for its first dispatcher and those that follow: they find
// the same on every rank, whenever Python drops one. Kept until the group is gone, or forgotten.
struct Joined {
  std::shared_ptr<shm::Communicator> shared_memory;  // or null
  std::string reason;                                // of either
  // Of their GPUs; the reason is empty until somebody asked for it.
  std::shared_ptr<ipc::PeerMemory> peer_memory = nullptr;
  std::string peer_reason = {};
};
void remember_joined(const std::string& group, Joined joined);
void remember_peer_memory(const std::string& group, std::shared_ptr<ipc::PeerMemory> memory,
                          std::string reason);
std::optional<Joined> recall_joined(const std::string& group);
void forget_joined(const std::string& group);
// This process ends: waits, within the timeouts or `at_most` seconds, until the others are done
// with its GPU's memory. If that is not the `last` call, it ends nothing that is not over by then.
void leave_groups(double at_most, bool last);
// When this process calls exit(), for the last time: within the timeouts, or at once if its status
// says that it has failed, which Python's own functions for the end are not told. False where
// systems do not tell it.
bool leave_groups_at_exit();

// The rows of a dispatch, by rank, and its number. As a tensor: plan [2 P + 2] int64 on the CPU,
// rows sent to each rank, those received from each, the number, and a tag that tells them and their
// group from others: sizes that were changed would read and write what is not theirs.
struct Plan {
  std::vector<int64_t> sent, received;
  int64_t dispatch = -1;

  // ValueError unless it is one of the dispatcher's group, as write() made it.
  static Plan read(Phase phase, const Dispatcher& dispatcher, const at::Tensor& plan);
  at::Tensor write(const Dispatcher& dispatcher) const;
};

using DispatcherRef = std::shared_ptr<const Dispatcher>;

// The phases over one kind of transport; every rank calls alike. What has begun keeps what it
// needs.
struct Transport {
  Ending<Arrived> (*dispatch)(const DispatcherRef&, const Tokens& tokens);
  Ending<at::Tensor> (*combine)(const DispatcherRef&, const at::Tensor& y,
                                const at::Tensor& slot_rows, const at::Tensor& plan);
  Ending<at::Tensor> (*combine_backward)(const DispatcherRef&, const at::Tensor& grad,
                                         const at::Tensor& slot_rows, const at::Tensor& plan,
                                         int64_t num_received);
  Ending<TokenGradients> (*dispatch_backward)(const DispatcherRef&,
                                              const std::optional<at::Tensor>& grad_x,
                                              const std::optional<at::Tensor>& grad_weights,
                                              const at::Tensor& slot_rows, const at::Tensor& plan);
};

extern const Transport process_group_transport;
extern const Transport shared_memory_transport;
extern const Transport cuda_ipc_transport;

// Arguments of the ops, for the transports: raise before anything is exchanged.
void check_dispatch(const Tokens& tokens);
// What the ranks must agree on in it.
Terms terms_of(const Dispatcher& dispatcher, const Tokens& tokens);
// The rows of `extra` as bytes [T, bytes], and [U, bytes] as the rows they are.
at::Tensor as_bytes(const at::Tensor& extra);
at::Tensor from_bytes(const at::Tensor& bytes, const at::Tensor& extra);
void check_rows(Phase phase, const char* name, const at::Tensor& rows, int64_t num_rows);
// Of a handle: every row is one of the plan's, so that nothing beyond them is read. CPU alone.
void check_slot_rows(Phase phase, const at::Tensor& slot_rows, const Plan& plan);
void check_floating(Phase phase, const char* name, const at::Tensor& tensor);

Terms terms_of(const Dispatcher& dispatcher);
int64_t dtype_number(const at::Tensor& tensor);
int64_t sum(const std::vector<int64_t>& values);

}  // namespace moe::ep
