// A dispatcher as the ops know it: by its name, for an object among their arguments would hide the
// gradients from torch.compile.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "dispatch/agreement.h"
#include "dispatch/layout.h"
#include "dispatch/shared_memory/communicator.h"

namespace moe::ep {

// All that a transport knows of one.
struct Dispatcher {
  std::string name, group;
  int64_t number;  // in its group, the same on all ranks
  int64_t rank, ranks;
  double timeout;  // seconds that bound each exchange; for c10d 0 leaves it to the group
  Placement placement;
  // Carries tensors of the CPU; null for c10d's all-to-all, which carries all others.
  std::shared_ptr<shm::Communicator> shared_memory;

  int64_t experts() const { return placement.experts(); }
  // A number for the group, the same within this process.
  int64_t group_tag() const { return static_cast<int64_t>(std::hash<std::string>{}(group)); }
};

// The dispatchers of this process, by name; they live as long as somebody else holds them. Ranks
// make those of a group in the same order: so they get the same numbers.
std::shared_ptr<Dispatcher> make_dispatcher(const std::string& group, int64_t rank, int64_t ranks,
                                            Placement placement, double timeout,
                                            std::shared_ptr<shm::Communicator> shared_memory);
std::shared_ptr<Dispatcher> find_dispatcher(const std::string& name);

// How the ranks of a group are joined, for its first dispatcher and those that follow: they find
// the same on every rank, whenever Python drops one. Kept until the group is gone, or forgotten.
struct Joined {
  std::shared_ptr<shm::Communicator> shared_memory;  // or null
  std::string reason;                                // of either
};
void remember_joined(const std::string& group, Joined joined);
std::optional<Joined> recall_joined(const std::string& group);
void forget_joined(const std::string& group);

// The rows of a dispatch, by rank, and its number. As a tensor: plan [2 P + 2] int64 on the CPU,
// rows sent to each rank, those received from each, the number, and the tag of the group.
struct Plan {
  std::vector<int64_t> sent, received;
  int64_t dispatch = -1;

  // ValueError unless it is one of the dispatcher's group.
  static Plan read(Phase phase, const Dispatcher& dispatcher, const at::Tensor& plan);
  at::Tensor write(const Dispatcher& dispatcher) const;
};

// S rows sent and U received.
struct Arrived {
  at::Tensor x, ids, weights, slot_rows, plan, num_slots;
};

// The phases over one kind of transport. Tensors are checked; every rank calls alike.
struct Transport {
  Arrived (*dispatch)(const Dispatcher&, const at::Tensor& x, const at::Tensor& ids,
                      const at::Tensor& weights);
  at::Tensor (*combine)(const Dispatcher&, const at::Tensor& y, const at::Tensor& slot_rows,
                        const at::Tensor& plan);
  at::Tensor (*combine_backward)(const Dispatcher&, const at::Tensor& grad,
                                 const at::Tensor& slot_rows, const at::Tensor& plan,
                                 int64_t num_received);
  std::tuple<at::Tensor, at::Tensor> (*dispatch_backward)(
      const Dispatcher&, const std::optional<at::Tensor>& grad_x,
      const std::optional<at::Tensor>& grad_weights, const at::Tensor& slot_rows,
      const at::Tensor& plan);
};

extern const Transport process_group_transport;
extern const Transport shared_memory_transport;

// Arguments of the ops, for the transports: raise before anything is exchanged.
void check_dispatch(const at::Tensor& x, const at::Tensor& ids, const at::Tensor& weights);
void check_rows(Phase phase, const char* name, const at::Tensor& rows, int64_t num_rows);
void check_floating(Phase phase, const char* name, const at::Tensor& tensor);

Terms terms_of(const Dispatcher& dispatcher);
int64_t dtype_number(const at::Tensor& tensor);
int64_t sum(const std::vector<int64_t>& values);

}  // namespace moe::ep
