// Of a process group, what the store of its ranks needs.
#pragma once

#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <utility>

namespace c10 {

template <typename T>
using intrusive_ptr = std::shared_ptr<T>;

}  // namespace c10

namespace c10d {

class ProcessGroup {
 public:
  enum class BackendType { GLOO, MPI };

  ProcessGroup(int rank, int size, std::shared_ptr<Store> store)
      : rank_(rank), size_(size), store_(std::move(store)) {}

  int getRank() const { return rank_; }
  int getSize() const { return size_; }
  std::string getGroupName() const { return "stress"; }
  BackendType getBackendType() const { return BackendType::GLOO; }
  std::shared_ptr<Store> getStore() const { return store_; }

 private:
  int rank_, size_;
  std::shared_ptr<Store> store_;
};

}  // namespace c10d
