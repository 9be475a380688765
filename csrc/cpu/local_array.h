// Arrays for the time of one call, in memory that its thread keeps for the next one.
#pragma once

#include <span>
#include <type_traits>

#include "common/dtypes.h"
#include "cpu/large_buffers.h"
#include "cpu/scratch.h"

namespace moe {

// Uninitialised elements, aligned to 64 bytes: of the calling thread's stack, or a tensor where
// they do not fit or PyTorch has to poison them. A local variable, or a member of one: the last one
// made is the first one gone, in the thread that made it, whatever is thrown or called meanwhile.
// Others may use the elements until then.
template <typename T>
class LocalArray {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  explicit LocalArray(int64_t size)
      : place_(poisons_memory() ? kMostScratch + 1 : size * static_cast<int64_t>(sizeof(T))),
        size_(size) {
    if (!place_.memory) tensor_ = allocate(size);
    data_ = static_cast<T*>(place_.memory ? place_.memory : tensor_.mutable_data_ptr());
  }

  T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) const { return data_[i]; }
  T* begin() const { return data_; }
  T* end() const { return data_ + size_; }

 private:
  // A part of its own: it is given back where allocating throws.
  struct Place {
    explicit Place(int64_t bytes) : bytes(bytes), memory(take_scratch(bytes)) {}
    ~Place() { give_scratch_back(memory, bytes); }
    Place(const Place&) = delete;
    Place& operator=(const Place&) = delete;

    int64_t bytes;
    void* memory;
  };

  static at::Tensor allocate(int64_t size) {
    if constexpr (std::is_floating_point_v<T>) {
      return empty_large({size}, at::dtype(scalar_type<T>()));
    } else {
      return empty_large({size * static_cast<int64_t>(sizeof(T))}, at::kByte);
    }
  }

  Place place_;
  at::Tensor tensor_;
  T* data_;
  int64_t size_;
};

}  // namespace moe
