#include "dispatch/notices.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <thread>
#include <utility>
#include <vector>

namespace moe::ep {
namespace {

// In the place of a number: what a rank has found out is said there.
constexpr int64_t kBroken = -1;

constexpr std::chrono::minutes kLong{10};

std::string text_at(c10d::Store& store, const std::string& key) {
  if (!store.check({key})) return {};
  const std::vector<uint8_t> bytes = store.get(key);
  return {bytes.begin(), bytes.end()};
}

void say(c10d::Store& store, const std::string& key, const std::string& text) {
  store.set(key, std::vector<uint8_t>(text.begin(), text.end()));
}

std::string by_rank(const std::string& key, int64_t rank) {
  return key + "/" + std::to_string(rank);
}

}  // namespace

std::string Notices::key(int64_t number) const {
  return "moe_kernels/refused/" + std::to_string(dispatch_) + "." + std::to_string(number);
}

void Notices::dispatched(int64_t dispatch) {
  const std::lock_guard lock(mutex_);
  dispatch_ = dispatch, begun_ = over_ = settled_ = 0;
  refused_.clear();
}

Notices::Place Notices::begin() {
  const std::lock_guard lock(mutex_);
  settled_ = 0;
  return {dispatch_, ++begun_};
}

void Notices::end(Place place) {
  const std::lock_guard lock(mutex_);
  if (place.dispatch != dispatch_) return;  // nothing is said of it any more
  over_ = std::max(over_, place.number);
  refused_.erase(refused_.begin(), refused_.upper_bound(over_));
}

bool Notices::may_concern() const {
  const std::lock_guard lock(mutex_);
  return begun_ > over_;
}

// With a store that is gone, or none, the others wait for the timeout.
void Notices::refuse(c10d::ProcessGroup& group) {
  std::string place;
  int64_t times = 0;
  {
    const std::lock_guard lock(mutex_);
    place = key(begun_ + 1);
    times = ++refused_[begun_ + 1];
  }
  store.tell(group, [place, times, rank = group.getRank()](c10d::Store& store) {
    say(store, by_rank(place, rank), std::to_string(times));
    say(store, place, "somebody");
    return true;
  });
}

void Notices::break_off(c10d::ProcessGroup& group, const std::string& text) {
  failure_.set(text);
  std::string place;
  {
    const std::lock_guard lock(mutex_);
    place = key(kBroken);
  }
  store.tell(group, [place, text](c10d::Store& store) {
    say(store, place, text);
    return true;
  });
}

bool Notices::all_refused(c10d::ProcessGroup& group) {
  std::string place;
  int64_t times = 0;
  {
    const std::lock_guard lock(mutex_);
    place = key(begun_ + 1);
    times = refused_.at(begun_ + 1);
  }
  const auto all = store.ask(group, [place, times, size = group.getSize()](c10d::Store& store) {
    try {
      for (int64_t rank = 0; rank < size; ++rank) {
        if (std::atoll(text_at(store, by_rank(place, rank)).c_str()) < times) return false;
      }
    } catch (const std::exception&) {
      // As without a store: nobody can say that it is otherwise.
    }
    return true;
  });
  return all.value_or(!GroupStore::has(group));
}

void Notices::settle(c10d::ProcessGroup& group, const char* phase,
                     std::chrono::milliseconds limit) {
  int64_t times = 0;
  {
    const std::lock_guard lock(mutex_);
    const auto found = refused_.find(begun_ + 1);
    if (found == refused_.end() || found->second == settled_) return;
    times = found->second;
  }
  if (limit.count() == 0) limit = kLong;
  for (const auto begin = std::chrono::steady_clock::now(); !all_refused(group);) {
    look(group, phase);
    TORCH_CHECK_WITH(DistBackendError, std::chrono::steady_clock::now() - begin < limit, phase,
                     ": this rank has refused an exchange for an error in its arguments, and the "
                     "other ranks of group '",
                     group.getGroupName(),
                     "' have neither refused it nor begun it within the timeout. Every rank must "
                     "make the same calls in the same order.");
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  const std::lock_guard lock(mutex_);
  settled_ = times;
}

// What ranks have said of this one's exchanges; empty for nothing. What the store does not tell,
// the timeout will.
std::string Notices::found(c10d::ProcessGroup& group) {
  struct Begun {
    std::string place;
    int64_t refused;  // by this rank, so often
  };
  std::vector<Begun> begun;
  std::string broken;
  {
    const std::lock_guard lock(mutex_);
    broken = key(kBroken);
    for (int64_t number = over_ + 1; number <= begun_; ++number) {
      const auto mine = refused_.find(number);
      begun.push_back({key(number), mine == refused_.end() ? 0 : mine->second});
    }
  }
  const auto said =
      store.ask(group,
                [begun, broken, size = group.getSize(),
                 name = group.getGroupName()](c10d::Store& store) -> std::string {
                  if (std::string text = text_at(store, broken); !text.empty()) return text;
                  for (const auto& [place, refused] : begun) {
                    if (!store.check({place})) continue;
                    for (int64_t rank = 0; rank < size; ++rank) {
                      if (std::atoll(text_at(store, by_rank(place, rank)).c_str()) <= refused)
                        continue;
                      std::string text = "rank " + std::to_string(rank) + " of group '" + name +
                                         "' found an error in its own arguments, for an exchange "
                                         "that other ranks have begun "
                                         "and cannot end; its message says which";
                      say(store, broken, text);
                      return text;
                    }
                  }
                  return {};
                });
  return said.value_or("");
}

void Notices::look(c10d::ProcessGroup& group, const char* phase) {
  std::string text = found(group);
  if (text.empty()) return;
  text = std::string(phase) + ": " + text;
  failure_.set(text);
  TORCH_CHECK(false, text);
}

}  // namespace moe::ep
