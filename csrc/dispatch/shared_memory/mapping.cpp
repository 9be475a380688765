#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <utility>

#include "dispatch/shared_memory/system.h"

namespace moe::ep::shm {
namespace {

// Allocates the pages: a file that is only long raises SIGBUS when memory runs out. In pieces, for
// a signal undoes what the system has done of one: with a timer that rings often enough, the whole
// would never be done.
void allocate_pages(const Fd& fd, size_t bytes) {
  size_t piece = size_t{1} << 22;
  for (size_t at = 0; at < bytes;) {
    const size_t part = std::min(piece, bytes - at);
    if (::fallocate(fd.get(), 0, static_cast<off_t>(at), static_cast<off_t>(part)) == 0) {
      at += part;
    } else if (errno == EINTR) {
      piece = std::max(piece / 2, size_t{1} << 16);
    } else {
      fail_with_errno("fallocate of " + std::to_string(bytes) + " bytes");
    }
  }
}

void touch_pages([[maybe_unused]] char* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_POPULATE_WRITE
  ::madvise(data, bytes, MADV_POPULATE_WRITE);  // or at first touch, at a fraction of the speed
#endif
}

}  // namespace

Mapping Mapping::create(size_t bytes, Fd* fd) {
  fd->reset(::memfd_create("moe_kernels", MFD_CLOEXEC));
  if (!fd->valid()) fail_with_errno("memfd_create");
  allocate_pages(*fd, bytes);
  return of(*fd, bytes);
}

Mapping Mapping::of(const Fd& fd, size_t bytes) {
  struct stat status{};
  if (::fstat(fd.get(), &status) < 0) fail_with_errno("fstat");
  if (status.st_size < 0 || static_cast<size_t>(status.st_size) < bytes) {
    throw Error("memory of " + std::to_string(status.st_size) + " bytes that was said to have " +
                std::to_string(bytes));
  }
  void* const data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (data == MAP_FAILED) fail_with_errno("mmap of " + std::to_string(bytes) + " bytes");
  touch_pages(static_cast<char*>(data), bytes);
  return Mapping(static_cast<char*>(data), bytes);
}

bool Mapping::release(const Fd& fd) {
  return ::fallocate(fd.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                     static_cast<off_t>(size_)) == 0;
}

void Mapping::restore(const Fd& fd) {
  try {
    allocate_pages(fd, size_);
  } catch (const Error&) {
    release(fd);
    throw;
  }
  touch_pages(data_, size_);
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
