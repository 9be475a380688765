#include "dispatch/processes.h"

#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <fstream>
#include <functional>
#include <sstream>
#include <utility>

namespace moe::ep {
namespace {

struct Status {
  char state = '?';
  int64_t start = -1;  // clock ticks since the machine started
};

// What /proc tells of a process; as above where it tells nothing.
Status status_of(int64_t process) {
  std::ifstream file("/proc/" + std::to_string(process) + "/stat");
  std::string line;
  std::getline(file, line);
  Status status;
  // "number (name) state ...": the name may hold anything. The 22nd field is the start.
  const size_t end = line.rfind(')');
  if (end == std::string::npos) return status;
  std::istringstream fields(line.substr(end + 1));
  fields >> status.state;
  std::string skipped;
  for (int field = 4; field < 22; ++field) fields >> skipped;
  if (!(fields >> status.start)) status.start = -1;
  return status;
}

int64_t this_host() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string host;
  std::getline(file, host);
  char space[PATH_MAX];
  const ssize_t length = ::readlink("/proc/self/ns/pid", space, sizeof(space));
  if (host.empty() || length < 0) return -1;
  host.append(space, static_cast<size_t>(length));
  return static_cast<int64_t>(std::hash<std::string>{}(host) >> 1);
}

// "has exited", "is stopped", or empty. A process that /proc hides is asked for by a signal of no
// effect.
const char* trouble_of(const Process& process) {
  const auto [number, host, start] = process;
  const Status status = status_of(number);
  if (status.start < 0) {
    const bool gone = ::kill(static_cast<pid_t>(number), 0) < 0 && errno == ESRCH;
    return gone ? "has exited" : "";
  }
  if (status.start != start || status.state == 'Z' || status.state == 'X') return "has exited";
  return status.state == 'T' || status.state == 't' ? "is stopped" : "";
}

}  // namespace

Processes::Processes() : own_{::getpid(), this_host(), status_of(::getpid()).start} {}

void Processes::learn(std::vector<Process> ranks) {
  const std::lock_guard lock(mutex_);
  if (ranks_.empty()) ranks_ = std::move(ranks);
}

std::string Processes::missing() const {
  const std::lock_guard lock(mutex_);
  std::string text;
  for (size_t rank = 0; rank < ranks_.size(); ++rank) {
    const auto [number, host, start] = ranks_[rank];
    if (host < 0 || host != own_[1] || start < 0 || number == own_[0]) continue;
    const std::string trouble = trouble_of(ranks_[rank]);
    if (trouble.empty()) continue;
    if (!text.empty()) text += ", ";
    text += "rank " + std::to_string(rank) + " (process " + std::to_string(number) + ") " + trouble;
  }
  return text;
}

std::string Processes::tag() const {
  const std::lock_guard lock(mutex_);
  uint64_t hash = 0xcbf29ce484222325;
  for (const Process& process : ranks_) {
    for (const int64_t field : process)
      hash = (hash ^ static_cast<uint64_t>(field)) * 0x100000001b3;
  }
  return std::to_string(hash);
}

}  // namespace moe::ep
