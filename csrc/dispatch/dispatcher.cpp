#include "dispatch/dispatcher.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <numeric>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <unordered_map>
#include <utility>

#include "dispatch/notices.h"

namespace moe::ep {
namespace {

using at::Tensor;

// The dispatchers of a group. Another group that has the name counts from 0, as on a rank that did
// not know the first.
struct Count {
  c10::weak_intrusive_ptr<c10d::ProcessGroup> group;
  int64_t before;  // groups of this name
  int64_t begun = 0, agreed = 0;
};

// Of the process, as c10d's registry of groups is: ops get names.
struct Registry {
  std::mutex mutex;
  std::unordered_map<std::string, std::weak_ptr<Dispatcher>> dispatchers;
  std::unordered_map<std::string, Count> counts;
  std::unordered_map<std::string, std::pair<c10::weak_intrusive_ptr<c10d::ProcessGroup>, Joined>>
      joined;
  std::unordered_map<
      std::string, std::pair<c10::weak_intrusive_ptr<c10d::ProcessGroup>, std::shared_ptr<Notices>>>
      notices;

  static Registry& get() {
    static auto* const registry = new Registry;  // for ever: tensors may outlive static objects
    return *registry;
  }
  // With the lock.
  Count& count(const std::string& name, const c10::intrusive_ptr<c10d::ProcessGroup>& group) {
    const auto found = counts.find(name);
    if (found != counts.end() && found->second.group.lock() == group) return found->second;
    const int64_t before = found == counts.end() ? 0 : found->second.before + 1;
    const c10::weak_intrusive_ptr<c10d::ProcessGroup> weak(group);
    return counts.insert_or_assign(name, Count{weak, before}).first->second;
  }
};

int64_t tag_of(const Dispatcher& dispatcher, const int64_t* numbers) {
  auto tag = static_cast<uint64_t>(dispatcher.group_tag());
  for (int64_t i = 0; i < 2 * dispatcher.ranks + 1; ++i) {
    tag = (tag ^ static_cast<uint64_t>(numbers[i])) * 0x100000001b3;
    tag ^= tag >> 29;
  }
  return static_cast<int64_t>(tag);
}

}  // namespace

int64_t begin_dispatcher(const std::string& group) {
  Registry& registry = Registry::get();
  const auto process_group = c10d::resolve_process_group(group);
  notices_of(process_group);  // which are of this process, and tell forks of it from now on
  const std::lock_guard lock(registry.mutex);
  return registry.count(group, process_group).begun++;
}

int64_t begun_dispatchers(const std::string& group) {
  Registry& registry = Registry::get();
  const auto process_group = c10d::resolve_process_group(group);
  const std::lock_guard lock(registry.mutex);
  return registry.count(group, process_group).begun;
}

void agree_on_dispatchers(const std::string& group, int64_t begun) {
  Registry& registry = Registry::get();
  const auto process_group = c10d::resolve_process_group(group);
  const std::lock_guard lock(registry.mutex);
  Count& count = registry.count(group, process_group);
  count.begun = std::max(count.begun, begun);
  count.agreed = count.begun;
}

std::shared_ptr<Dispatcher> make_dispatcher(const std::string& group, int64_t number, int64_t rank,
                                            int64_t ranks, Placement placement, double timeout,
                                            std::shared_ptr<shm::Communicator> shared_memory,
                                            OnGpus on_gpus) {
  Registry& registry = Registry::get();
  const auto process_group = c10d::resolve_process_group(group);
  const std::lock_guard lock(registry.mutex);
  const Count& count = registry.count(group, process_group);
  number = std::max(number, count.agreed - 1);
  std::string name = group + "/" + std::to_string(number);
  if (count.before > 0) name.append(".").append(std::to_string(count.before));
  const auto forget = [](Dispatcher* dispatcher) {
    Registry& registry = Registry::get();
    {
      const std::lock_guard lock(registry.mutex);
      registry.dispatchers.erase(dispatcher->name);
    }
    delete dispatcher;
  };
  std::shared_ptr<Dispatcher> dispatcher(new Dispatcher{.name = name,
                                                        .group = group,
                                                        .number = number,
                                                        .rank = rank,
                                                        .ranks = ranks,
                                                        .timeout = timeout,
                                                        .placement = std::move(placement),
                                                        .shared_memory = std::move(shared_memory),
                                                        .on_gpus = std::move(on_gpus),
                                                        .dispatches = {},
                                                        .combines = {},
                                                        .combine_backwards = {},
                                                        .dispatch_backwards = {},
                                                        .failure = {},
                                                        .process = ::getpid()},
                                         forget);
  registry.dispatchers[name] = dispatcher;
  return dispatcher;
}

std::shared_ptr<Dispatcher> find_dispatcher(const std::string& name) {
  Registry& registry = Registry::get();
  const std::lock_guard lock(registry.mutex);
  const auto found = registry.dispatchers.find(name);
  auto dispatcher = found == registry.dispatchers.end() ? nullptr : found->second.lock();
  TORCH_CHECK(dispatcher, "dispatcher '", name,
              "' is gone: keep it as long as its handles and gradients are in use");
  return dispatcher;
}

void remember_joined(const std::string& group, Joined joined) {
  Registry& registry = Registry::get();
  const auto process_group = c10d::resolve_process_group(group);
  decltype(registry.joined)::node_type before;  // goes after the lock: dispatchers may go with it
  const std::lock_guard lock(registry.mutex);
  before = registry.joined.extract(group);
  registry.joined.emplace(
      group,
      std::pair(c10::weak_intrusive_ptr<c10d::ProcessGroup>(process_group), std::move(joined)));
}

void remember_peer_memory(const std::string& group, std::shared_ptr<ipc::PeerMemory> memory,
                          std::string reason) {
  Registry& registry = Registry::get();
  const std::lock_guard lock(registry.mutex);
  Joined& joined = registry.joined.at(group).second;
  joined.peer_memory = std::move(memory);
  joined.peer_reason = std::move(reason);
}

std::shared_ptr<Notices> notices_of(const c10::intrusive_ptr<c10d::ProcessGroup>& group) {
  Registry& registry = Registry::get();
  const std::lock_guard lock(registry.mutex);
  const auto found = registry.notices.find(group->getGroupName());
  // A group may have the name of an earlier one.
  if (found != registry.notices.end() && found->second.first.lock() == group) {
    return found->second.second;
  }
  std::erase_if(registry.notices, [](const auto& entry) { return entry.second.first.expired(); });
  auto notices = std::make_shared<Notices>();
  registry.notices.insert_or_assign(
      group->getGroupName(),
      std::pair(c10::weak_intrusive_ptr<c10d::ProcessGroup>(group), notices));
  return notices;
}

std::optional<Joined> recall_joined(const std::string& group) {
  Registry& registry = Registry::get();
  const auto process_group = c10d::resolve_process_group(group);
  const std::lock_guard lock(registry.mutex);
  const auto found = registry.joined.find(group);
  // A group may have the name of an earlier one.
  if (found == registry.joined.end() || found->second.first.lock() != process_group) return {};
  return found->second.second;
}

void forget_joined(const std::string& group) {
  Registry& registry = Registry::get();
  std::optional<Joined> joined;
  {
    const std::lock_guard lock(registry.mutex);
    const auto found = registry.joined.find(group);
    // Unless it is that of a later group with the name.
    if (found == registry.joined.end() || found->second.first.lock()) return;
    joined = std::move(found->second.second);
    registry.joined.erase(found);
  }
  if (joined->peer_memory) joined->peer_memory->close();
  if (joined->shared_memory) joined->shared_memory->close();
}

void leave_groups(double at_most, bool last) {
  Registry& registry = Registry::get();
  std::vector<std::shared_ptr<ipc::PeerMemory>> memories;
  {
    const std::lock_guard lock(registry.mutex);
    for (const auto& [_, joined] : registry.joined) {
      if (joined.second.peer_memory) memories.push_back(joined.second.peer_memory);
    }
  }
  for (const auto& memory : memories) memory->leave(/*exits=*/true, at_most, last);
  for (const auto& memory : memories) memory->part(at_most, last);
}

bool leave_groups_at_exit() {
#if defined(__GLIBC__)
  const auto leave = [](int status, void*) {
    leave_groups(status == 0 ? std::numeric_limits<double>::infinity() : 0.0, /*last=*/true);
  };
  static const bool known = ::on_exit(leave, nullptr) == 0;
  return known;
#else
  return false;
#endif
}

Plan Plan::read(Phase phase, const Dispatcher& dispatcher, const Tensor& plan) {
  const int64_t ranks = dispatcher.ranks;
  const bool right = plan.is_cpu() && plan.scalar_type() == at::kLong && plan.is_contiguous() &&
                     plan.dim() == 1 && plan.size(0) == 2 * ranks + 2;
  const int64_t* const begin = right ? plan.const_data_ptr<int64_t>() : nullptr;
  TORCH_CHECK_VALUE(right && begin[2 * ranks + 1] == tag_of(dispatcher, begin), to_string(phase),
                    ": the handle must be that of a dispatch in group '", dispatcher.group,
                    "'; use the dispatcher that made it, and the handle as it made it");
  return {{begin, begin + ranks}, {begin + ranks, begin + 2 * ranks}, begin[2 * ranks]};
}

Tensor Plan::write(const Dispatcher& dispatcher) const {
  const Tensor plan = at::empty({2 * dispatcher.ranks + 2}, at::kLong);
  auto* out = plan.mutable_data_ptr<int64_t>();
  out = std::copy(sent.begin(), sent.end(), out);
  out = std::copy(received.begin(), received.end(), out);
  out[0] = dispatch;
  out[1] = tag_of(dispatcher, plan.const_data_ptr<int64_t>());
  return plan;
}

void check_floating(Phase phase, const char* name, const Tensor& tensor) {
  const at::ScalarType dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
      to_string(phase), ": ", name, " must be one of bfloat16, float16, float32, float64; got ",
      dtype);
}

void check_dispatch(const Tokens& tokens) {
  const auto& [x, ids, weights, extra] = tokens;
  TORCH_CHECK_VALUE(x.dim() == 2, "dispatch: x must be [T, H]; got ", x.sizes());
  TORCH_CHECK_TYPE(at::isFloatingType(x.scalar_type()) || at::isFloat8Type(x.scalar_type()),
                   "dispatch: x must be floating point; got ", x.scalar_type(),
                   ". Integers travel as extra.");
  if (extra) {
    TORCH_CHECK_VALUE(extra->dim() > 0 && extra->size(0) == x.size(0),
                      "dispatch: extra must be [T, ...] with T = ", x.size(0),
                      " (x.shape[0]); got ", extra->sizes());
    TORCH_CHECK_VALUE(extra->device() == x.device(), "dispatch: extra must be on x's device ",
                      x.device(), "; got ", extra->device());
  }
  TORCH_CHECK_VALUE(ids.dim() == 2 && ids.size(0) == x.size(0) && ids.size(1) > 0,
                    "dispatch: topk_ids must be [T, K] with T = ", x.size(0),
                    " (x.shape[0]) and K at least 1; got ", ids.sizes());
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kInt || ids.scalar_type() == at::kLong,
                   "dispatch: topk_ids must be int32 or int64; got ", ids.scalar_type());
  TORCH_CHECK_VALUE(weights.sizes() == ids.sizes(), "dispatch: topk_weights must be ", ids.sizes(),
                    " as topk_ids; got ", weights.sizes());
  check_floating(Phase::kDispatch, "topk_weights", weights);
  TORCH_CHECK_VALUE(ids.device() == x.device() && weights.device() == x.device(),
                    "dispatch: topk_ids and topk_weights must be on x's device ", x.device(),
                    "; got ", ids.device(), " and ", weights.device());
  TORCH_CHECK_VALUE(ids.numel() <= std::numeric_limits<int32_t>::max(),
                    "dispatch: T * K must be below 2**31; got ", ids.numel());
}

void check_rows(Phase phase, const char* name, const Tensor& rows, int64_t num_rows) {
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(0) == num_rows, to_string(phase), ": ", name,
                    " must have the ", num_rows, " rows of its dispatch; got ", rows.sizes());
}

void check_slot_rows(Phase phase, const Tensor& slot_rows, const Plan& plan) {
  bool fits = slot_rows.is_cpu() && slot_rows.dim() == 2 && slot_rows.scalar_type() == at::kInt &&
              slot_rows.is_contiguous();
  if (fits && slot_rows.numel() > 0) {
    const auto* const rows = slot_rows.const_data_ptr<int32_t>();
    fits = *std::max_element(rows, rows + slot_rows.numel()) < sum(plan.sent);
  }
  TORCH_CHECK_VALUE(fits, to_string(phase), ": the handle's slot_rows are not those of its plan; ",
                    "use a handle as dispatch made it");
}

Terms terms_of(const Dispatcher& dispatcher) {
  return {.dispatcher = dispatcher.number,
          .experts = dispatcher.experts(),
          .placement = dispatcher.placement.digest()};
}

Terms terms_of(const Dispatcher& dispatcher, const Tokens& tokens) {
  Terms terms = terms_of(dispatcher);
  terms.hidden = tokens.x.size(1), terms.x_dtype = dtype_number(tokens.x);
  terms.top_k = tokens.ids.size(1), terms.weight_dtype = dtype_number(tokens.weights);
  if (tokens.extra) {
    terms.extra_dtype = dtype_number(*tokens.extra);
    terms.extra_bytes = tokens.extra->element_size();
    for (const int64_t size : tokens.extra->sizes().slice(1)) terms.extra_bytes *= size;
  }
  return terms;
}

Tensor as_bytes(const Tensor& extra) {
  const int64_t tokens = extra.size(0);
  int64_t bytes = extra.element_size();
  for (const int64_t size : extra.sizes().slice(1)) bytes *= size;
  // Zero bytes cannot be viewed as such.
  if (tokens == 0 || bytes == 0)
    return at::empty({tokens, bytes}, extra.options().dtype(at::kByte));
  // A dimension of one element has any stride in what is contiguous, but not in a view of bytes.
  const int64_t elements = bytes / extra.element_size();
  return extra.contiguous().as_strided({tokens, elements}, {elements, 1}).view(at::kByte);
}

Tensor from_bytes(const Tensor& bytes, const Tensor& extra) {
  std::vector<int64_t> sizes = extra.sizes().vec();
  sizes[0] = bytes.size(0);
  if (bytes.numel() == 0) return at::empty(sizes, extra.options());
  return bytes.view(extra.scalar_type()).view(sizes);
}

int64_t dtype_number(const Tensor& tensor) { return static_cast<int64_t>(tensor.scalar_type()); }

int64_t sum(const std::vector<int64_t>& values) {
  return std::accumulate(values.begin(), values.end(), int64_t{0});
}

}  // namespace moe::ep
