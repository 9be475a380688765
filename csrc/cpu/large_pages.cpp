#include "cpu/large_pages.h"

#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace moe {

#if defined(__linux__)

namespace {

constexpr uintptr_t kLargePage = 2 << 20;

// The whole large pages within [begin, begin + bytes).
std::pair<uintptr_t, uintptr_t> large_pages(const void* begin, size_t bytes) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin), end = first + bytes;
  return {(first + kLargePage - 1) / kLargePage * kLargePage, end / kLargePage * kLargePage};
}

}  // namespace

int64_t use_large_pages(const at::Tensor& tensor) {
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, since Linux 6.1; older headers lack it
  const at::Storage& storage = tensor.storage();
  const auto [begin, end] = large_pages(storage.data(), storage.nbytes());
  int64_t bytes = 0;
  for (uintptr_t page = begin; page < end; page += kLargePage) {
    if (madvise(reinterpret_cast<void*>(page), kLargePage, kCollapse) == 0) bytes += kLargePage;
  }
  return bytes;
}

#else

int64_t use_large_pages(const at::Tensor&) { return 0; }

#endif

}  // namespace moe
