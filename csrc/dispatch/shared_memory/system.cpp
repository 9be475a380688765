#include "dispatch/shared_memory/system.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstddef>
#include <cstring>
#include <fstream>
#include <utility>

namespace moe::ep::shm {
namespace {

std::pair<sockaddr_un, socklen_t> address_of(const std::string& name) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (name.size() + 1 > sizeof(address.sun_path)) throw Error("a socket's name is too long");
  std::memcpy(address.sun_path + 1, name.data(), name.size());  // sun_path[0] = 0: abstract
  return {address, static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size())};
}

Fd make_socket() {
  Fd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (!fd.valid()) fail_with_errno("socket");
  return fd;
}

int milliseconds_until(Deadline deadline) {
  const auto left =
      std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
  return static_cast<int>(std::clamp<int64_t>(left + 1, 0, INT_MAX));
}

// Whether there is something to read before the deadline.
bool wait_readable(const Fd& fd, Deadline deadline) {
  while (true) {
    pollfd entry{fd.get(), POLLIN, 0};
    const int ready = ::poll(&entry, 1, milliseconds_until(deadline));
    if (ready > 0) return true;
    if (ready < 0 && errno != EINTR) fail_with_errno("poll");
    if (Clock::now() >= deadline) return false;
  }
}

}  // namespace

void fail_with_errno(const std::string& what) {
  const int error = errno;
  throw Error(what + ": " + std::strerror(error));
}

int Fd::release() { return std::exchange(fd_, -1); }

void Fd::reset(int fd) {
  if (fd_ >= 0) ::close(fd_);
  fd_ = fd;
}

Fd listen_at(const std::string& name, int backlog) {
  Fd fd = make_socket();
  const auto [address, length] = address_of(name);
  if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), length) < 0) {
    fail_with_errno("bind");
  }
  if (::listen(fd.get(), backlog) < 0) fail_with_errno("listen");
  return fd;
}

Fd connect_to(const std::string& name) {
  Fd fd = make_socket();
  const auto [address, length] = address_of(name);
  int result;
  do result = ::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), length);
  while (result < 0 && errno == EINTR);
  if (result < 0) fail_with_errno("connect");
  return fd;
}

Fd accept_from(const Fd& listener, Deadline deadline) {
  while (wait_readable(listener, deadline)) {
    Fd fd(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (fd.valid()) return fd;
    if (errno != EINTR && errno != ECONNABORTED) fail_with_errno("accept");
  }
  return Fd();
}

bool send_message(const Fd& socket, const void* data, size_t bytes, int fd) {
  iovec part{const_cast<void*>(data), bytes};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  if (fd >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr* const header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &fd, sizeof(int));
  }
  // Without blocking: what is sent is little and rare, so a full socket is one that nobody reads.
  ssize_t sent;
  do sent = ::sendmsg(socket.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  while (sent < 0 && errno == EINTR);
  if (sent < 0 && (errno == EPIPE || errno == ECONNRESET)) return false;
  if (sent < 0) fail_with_errno("sendmsg");
  return true;
}

bool receive_message(const Fd& socket, void* data, size_t bytes, Fd* fd, Deadline deadline) {
  if (!wait_readable(socket, deadline)) return false;
  iovec part{data, bytes};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  // The other end may have closed with something unread: that is said once, and before what it had
  // sent, which is there all the same.
  ssize_t received;
  bool reset = false;
  do received = ::recvmsg(socket.get(), &message, MSG_CMSG_CLOEXEC);
  while (received < 0 && (errno == EINTR || (errno == ECONNRESET && !std::exchange(reset, true))));
  if (received < 0) fail_with_errno("recvmsg");
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    int received_fd;
    std::memcpy(&received_fd, CMSG_DATA(header), sizeof(int));
    fd->reset(received_fd);
  }
  // The kernel drops a descriptor for which there is no room here.
  if (message.msg_flags & MSG_CTRUNC) {
    throw Error("this process has as many files open as it may have; see ulimit -n");
  }
  if (received == 0) throw Error("the other end is closed");
  if (static_cast<size_t>(received) != bytes) throw Error("a message of another size");
  return true;
}

Peer peer_of(const Fd& socket) {
  ucred credentials{};
  socklen_t length = sizeof(credentials);
  if (::getsockopt(socket.get(), SOL_SOCKET, SO_PEERCRED, &credentials, &length) < 0) {
    fail_with_errno("SO_PEERCRED");
  }
  return {credentials.pid, credentials.uid};
}

Fd watch_process(pid_t pid) {
  Fd fd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
  if (!fd.valid()) fail_with_errno("pidfd_open of process " + std::to_string(pid));
  return fd;
}

bool has_exited(const Fd& watch) {
  pollfd entry{watch.get(), POLLIN, 0};
  return ::poll(&entry, 1, 0) > 0;
}

bool is_gone(pid_t pid) {
  const Fd watch(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
  return watch.valid() ? has_exited(watch) : errno == ESRCH;
}

std::string describe_process(pid_t pid, const Fd& watch) {
  if (has_exited(watch)) return "has exited";
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string line;
  std::getline(file, line);
  // "pid (name) state": the name may hold anything.
  const size_t end = line.rfind(')');
  const char state = end == std::string::npos || end + 2 >= line.size() ? '?' : line[end + 2];
  if (state == 'T' || state == 't') return "is stopped";
  return state == 'Z' || state == 'X' ? "has exited" : "is running";
}

void futex_wait(const std::atomic<uint32_t>* word, uint32_t expected,
                std::chrono::microseconds limit) {
  const auto count = limit.count();
  const timespec time{static_cast<time_t>(count / 1000000),
                      static_cast<long>(count % 1000000 * 1000)};
  ::syscall(SYS_futex, word, FUTEX_WAIT, expected, &time, nullptr, 0);
}

void futex_wake_all(const std::atomic<uint32_t>* word) {
  ::syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

int usable_processors() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (::sched_getaffinity(0, sizeof(set), &set) < 0) return 1;
  return std::max(CPU_COUNT(&set), 1);
}

}  // namespace moe::ep::shm
