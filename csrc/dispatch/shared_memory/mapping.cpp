#include <fcntl.h>
#include <sys/mman.h>

#include <cerrno>
#include <string>
#include <utility>

#include "dispatch/shared_memory/system.h"

namespace moe::ep::shm {

Mapping Mapping::create(size_t bytes, Fd* fd) {
  fd->reset(::memfd_create("moe_kernels", MFD_CLOEXEC));
  if (!fd->valid()) fail_with_errno("memfd_create");
  // Allocates the pages: a file that is only long raises SIGBUS when memory runs out.
  int result;
  do result = ::fallocate(fd->get(), 0, 0, static_cast<off_t>(bytes));
  while (result < 0 && errno == EINTR);
  if (result < 0) fail_with_errno("fallocate of " + std::to_string(bytes) + " bytes");
  return of(*fd, bytes);
}

Mapping Mapping::of(const Fd& fd, size_t bytes) {
  void* const data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (data == MAP_FAILED) fail_with_errno("mmap of " + std::to_string(bytes) + " bytes");
#ifdef MADV_POPULATE_WRITE
  ::madvise(data, bytes, MADV_POPULATE_WRITE);  // or at first touch, at a fraction of the speed
#endif
  return Mapping(static_cast<char*>(data), bytes);
}

Mapping::Mapping(Mapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

Mapping::~Mapping() {
  if (data_) ::munmap(data_, size_);
}

}  // namespace moe::ep::shm
