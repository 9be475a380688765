// What the dispatch uses of torch's store, without torch: for sanitizers, which know nothing of
// what was compiled without them.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

namespace c10d {

class Store {
 public:
  virtual ~Store() = default;
  virtual void set(const std::string& key, const std::vector<uint8_t>& value) = 0;
  virtual std::vector<uint8_t> get(const std::string& key) = 0;
  virtual bool check(const std::vector<std::string>& keys) = 0;
  virtual void wait(const std::vector<std::string>& keys,
                    const std::chrono::milliseconds& timeout) = 0;
  virtual int64_t add(const std::string& key, int64_t value) = 0;
  virtual std::vector<uint8_t> compareSet(const std::string& key,
                                          const std::vector<uint8_t>& expected,
                                          const std::vector<uint8_t>& desired) = 0;
};

}  // namespace c10d
