// How the ranks of a group hear of each other: by its store.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace moe::ep {

struct Met {
  std::vector<std::string> values;  // by rank
  std::vector<int64_t> missing;     // ranks that did not come in time; then there are no values
  std::string problem;              // of the store; then there are none either
};

// What each rank says under a key, which it gives once. Waits for the others for `seconds`, and for
// a store that does not answer `more` seconds beyond that. `meanwhile` is called now and then, and
// may throw. No thread of Python waits: one that wakes while the interpreter ends ends the process.
Met meet(const std::string& group, const std::string& key, const std::string& value, double seconds,
         double more, const std::function<void()>& meanwhile);

}  // namespace moe::ep
