// What the transport asks of Linux: memory that processes share, sockets that carry it, waiting,
// and news of other processes. Plain C++: nothing in this folder knows of tensors or groups.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace moe::ep::shm {

using Clock = std::chrono::steady_clock;
using Deadline = Clock::time_point;

// What failed, and the system's reason.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

[[noreturn]] void fail_with_errno(const std::string& what);

// A file descriptor, closed with the object.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(other.release()) {}
  Fd& operator=(Fd&& other) noexcept {
    reset(other.release());
    return *this;
  }
  ~Fd() { reset(-1); }

  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  int release();
  void reset(int fd);

 private:
  int fd_ = -1;
};

// Memory without a name: it is gone with the last process that maps it, however that ends.
class Mapping {
 public:
  Mapping() = default;
  // `bytes` of zeros, there for sure: to run out of memory is an Error here, not a signal later.
  static Mapping create(size_t bytes, Fd* fd);
  // The memory of another process; Error if it has fewer bytes.
  static Mapping of(const Fd& fd, size_t bytes);
  // Gives the memory back to the system, for all who map it, and takes as much again: zeros, there
  // for sure. In between nobody may touch it. False where the system does not.
  bool release(const Fd& fd);
  void restore(const Fd& fd);
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping();

  char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  Mapping(char* data, size_t size) : data_(data), size_(size) {}
  char* data_ = nullptr;
  size_t size_ = 0;
};

// Sockets of this machine in the abstract namespace, which leave no file behind. Messages keep
// their boundaries.
Fd listen_at(const std::string& name, int backlog);
Fd connect_to(const std::string& name);
Fd accept_from(const Fd& listener, Deadline deadline);

// A message, with a descriptor if `fd` is valid. False where the other end is closed.
bool send_message(const Fd& socket, const void* data, size_t bytes, int fd = -1);
// False at the deadline. Error where the other end is closed or the size is another.
bool receive_message(const Fd& socket, void* data, size_t bytes, Fd* fd, Deadline deadline);

// The process at the other end of a socket.
struct Peer {
  pid_t pid;
  uid_t uid;
};
Peer peer_of(const Fd& socket);

Fd watch_process(pid_t pid);
bool has_exited(const Fd& watch);
// The same of a process that nobody watches, as far as can be told.
bool is_gone(pid_t pid);
// "is stopped", "has exited" or "is running", as far as the system tells.
std::string describe_process(pid_t pid, const Fd& watch);

// Sleeps while *word is `expected`, until woken or for `limit`.
void futex_wait(const std::atomic<uint32_t>* word, uint32_t expected,
                std::chrono::microseconds limit);
void futex_wake_all(const std::atomic<uint32_t>* word);

// Processors that this process may use.
int usable_processors();

}  // namespace moe::ep::shm
