#include "dispatch/group_store.h"

#include <algorithm>
#include <exception>
#include <system_error>
#include <thread>

namespace moe::ep {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kSlice = std::chrono::milliseconds(100);

// c10d raises for a group that has none, and gives one of MPI a placeholder that raises.
c10::intrusive_ptr<c10d::Store> store_of(c10d::ProcessGroup& group) {
  if (group.getBackendType() == c10d::ProcessGroup::BackendType::MPI) return {};
  try {
    return group.getStore();
  } catch (const std::exception&) {
    return {};
  }
}

}  // namespace

bool GroupStore::has(c10d::ProcessGroup& group) { return static_cast<bool>(store_of(group)); }

bool GroupStore::run(c10d::ProcessGroup& group, std::function<void(c10d::Store&)> question,
                     bool in_any_case, const Patience& patience) {
  auto store = store_of(group);
  if (!store) return false;
  const std::lock_guard lock(mutex_);
  const bool silent =
      open_.valid() && open_.wait_for(std::chrono::seconds(0)) != std::future_status::ready;
  if (silent && !in_any_case) return false;
  std::promise<bool> promise;
  std::future<bool> answer = promise.get_future();
  try {
    std::thread([store = std::move(store), question = std::move(question),
                 promise = std::move(promise)]() mutable {
      bool answered = true;
      try {
        question(*store);
      } catch (const std::exception&) {
        answered = false;
      }
      store.reset();  // who has the answer may drop the store, and open another in its place
      promise.set_value(answered);
    }).detach();
  } catch (const std::system_error&) {
    return false;  // this process may have no more threads
  }
  if (silent) return false;
  open_ = std::move(answer);
  const auto deadline = Clock::now() + patience.limit;
  while (open_.wait_until(std::min(deadline, Clock::now() + kSlice)) != std::future_status::ready) {
    if (Clock::now() >= deadline) return false;
    if (patience.meanwhile) patience.meanwhile();
  }
  return open_.get();
}

}  // namespace moe::ep
