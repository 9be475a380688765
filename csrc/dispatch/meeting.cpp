#include "dispatch/meeting.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "dispatch/group_store.h"

namespace moe::ep {
namespace {

// So that no timeout overflows the clock.
std::chrono::milliseconds milliseconds_of(double seconds) {
  return std::chrono::milliseconds(std::llround(std::clamp(seconds, 0.0, 1e9) * 1000));
}

Met meet_in(c10d::Store& store, const std::vector<std::string>& keys, int64_t own,
            const std::string& value, std::chrono::milliseconds limit) {
  Met met;
  try {
    store.set(keys[own], std::vector<uint8_t>(value.begin(), value.end()));
    try {
      store.wait(keys, limit);
    } catch (const std::exception&) {
      for (size_t rank = 0; rank < keys.size(); ++rank) {
        if (!store.check({keys[rank]})) met.missing.push_back(static_cast<int64_t>(rank));
      }
      if (!met.missing.empty()) return met;
    }
    for (const std::string& key : keys) {
      const std::vector<uint8_t> said = store.get(key);
      met.values.emplace_back(said.begin(), said.end());
    }
  } catch (const std::exception& error) {
    const auto* const known = dynamic_cast<const c10::Error*>(&error);
    return {{}, {}, known ? known->what_without_backtrace() : error.what()};
  }
  return met;
}

}  // namespace

Met meet(const std::string& group, const std::string& key, const std::string& value, double seconds,
         double more, const std::function<void()>& meanwhile) {
  const auto process_group = c10d::resolve_process_group(group);
  std::vector<std::string> keys;
  for (int64_t rank = 0; rank < process_group->getSize(); ++rank) {
    keys.push_back("moe_kernels/" + key + "/" + std::to_string(rank));
  }
  // Others are asked meanwhile, so this has one of its own.
  GroupStore store;
  const GroupStore::Patience patience{milliseconds_of(seconds + more), meanwhile};
  auto met = store.ask(
      *process_group,
      [keys, own = process_group->getRank(), value, limit = milliseconds_of(seconds)](
          c10d::Store& asked) { return meet_in(asked, keys, own, value, limit); },
      patience);
  if (met) return std::move(*met);
  return {{}, {}, "no answer within the timeout"};
}

}  // namespace moe::ep
