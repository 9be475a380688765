#include "dispatch/causes.h"

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <thread>
#include <vector>

namespace moe::ep {
namespace {

constexpr std::chrono::milliseconds kForNames{500};
constexpr int64_t kRanksInWord = 60;

// In the store: what is said of the processes of these ranks.
std::string key_of(const Notices& notices, const char* what) {
  return "moe_kernels/processes/" + notices.processes.tag() + "/" + what;
}

// This rank gives up the dispatcher. The others that have not said so; nothing if the store does
// not tell. The ranks have a bit each: when many fail together, they ask one store.
std::optional<std::vector<int64_t>> give_up(Notices& notices, c10d::ProcessGroup& group,
                                            int64_t dispatcher) {
  const std::string key = key_of(notices, "given_up/") + std::to_string(dispatcher);
  return notices.store.ask(
      group, [key, own = group.getRank(), size = group.getSize()](c10d::Store& store) {
        const bool first = store.add(key + "/" + std::to_string(own), 1) == 1;
        std::vector<int64_t> silent;
        for (int64_t begin = 0; begin < size; begin += kRanksInWord) {
          const int64_t end = std::min<int64_t>(begin + kRanksInWord, size);
          const bool mine = first && begin <= own && own < end;
          const int64_t said = store.add(key + "/from/" + std::to_string(begin),
                                         mine ? int64_t{1} << (own - begin) : 0);
          for (int64_t rank = begin; rank < end; ++rank) {
            if ((said >> (rank - begin) & 1) == 0) silent.push_back(rank);
          }
        }
        return silent;
      });
}

// What the first rank that failed said of it; empty if none has.
std::string first_cause(Notices& notices, c10d::ProcessGroup& group) {
  const auto said =
      notices.store.ask(group, [key = key_of(notices, "cause")](c10d::Store& store) -> std::string {
        if (!store.check({key})) return {};
        const std::vector<uint8_t> text = store.get(key);
        return {text.begin(), text.end()};
      });
  return said.value_or("");
}

// Says it, if this is the first. Returns what the first said.
std::string say_cause(Notices& notices, c10d::ProcessGroup& group, const std::string& cause) {
  const auto said = notices.store.tell(
      group, [key = key_of(notices, "cause"), cause](c10d::Store& store) -> std::string {
        const std::vector<uint8_t> nothing, mine(cause.begin(), cause.end());
        const std::vector<uint8_t> text = store.compareSet(key, nothing, mine);
        return {text.begin(), text.end()};
      });
  return said.value_or("").empty() ? cause : *said;
}

}  // namespace

// A process that ends closes its connections a little before it is gone, one of another machine is
// named by its neighbours, and who waits for a rank gives up when others do: they have a moment.
// Who fails later, perhaps since others have gone for it, says what the first said.
std::string find_cause(Notices& notices, c10d::ProcessGroup& group, const char* phase,
                       int64_t dispatcher) {
  using Clock = std::chrono::steady_clock;
  for (const auto end = Clock::now() + kForNames;;) {
    notices.look(group, phase);  // a rank that has gone may have said why
    if (const std::string first = first_cause(notices, group); !first.empty()) return first;
    const auto silent = give_up(notices, group, dispatcher);
    const bool all = silent && silent->empty();
    std::string found = notices.processes.missing();
    if (found.empty() && all) {
      return "all ranks have failed, and none is known to be missing: the timeout must be enough "
             "for the exchange, and for the last rank to begin it";
    }
    if (found.empty() && Clock::now() >= end) {
      found = silent ? "ranks [" + c10::Join(", ", *silent) + "] have" : "a rank has";
      found += " died, stopped, or not made this call";
      if (!silent && GroupStore::has(group)) {
        found += ", perhaps that which keeps the group's store, often rank 0: it does not answer";
      }
      found += ": every rank of the group must make the same calls in the same order";
      if (!silent) return found;
    }
    if (!found.empty()) return say_cause(notices, group, found);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
}

}  // namespace moe::ep
