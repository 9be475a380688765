#include "dispatch/shared_memory/communicator.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <utility>

namespace moe::ep::shm {
namespace {

constexpr uint64_t kMagic = 0x4d6f4553484d3031;
constexpr auto kSlice = std::chrono::milliseconds(20);  // between looks at the peers

// What ranks tell each other first, with the descriptor of their control memory.
struct Hello {
  uint64_t magic = kMagic;
  int64_t rank = -1, size = -1, control_bytes = -1;
};

// What announces a segment of a heap, with its descriptor.
struct SegmentNotice {
  int64_t segment = -1, bytes = -1;
};

std::string random_name() {
  std::random_device device;
  char name[80];
  std::snprintf(name, sizeof(name), "moe_kernels.%d.%08x%08x%08x%08x", static_cast<int>(::getpid()),
                device(), device(), device(), device());
  return name;
}

// That made such a name.
pid_t process_of(const std::string& name) {
  int process = -1;
  std::sscanf(name.c_str(), "moe_kernels.%d.", &process);
  return process;
}

std::string seconds_text(double seconds) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", seconds);
  return text;
}

Deadline deadline_in(double seconds) {
  // So that no timeout overflows the clock.
  const double bounded = std::clamp(seconds, 0.0, 1e9);
  return Clock::now() +
         std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(bounded));
}

const char* name_of(Stage stage) {
  switch (stage) {
    case Stage::kHeader:
      return "header";
    case Stage::kGrant:
      return "memory";
    case Stage::kDone:
      return "rows";
  }
  return "message";
}

// Of a rank that has gone, what it did first; empty if it is there.
const char* what_of(State state, bool exited) {
  if (state == State::kClosed) return " has destroyed the group";
  if (exited) return " has exited";
  return state == State::kExits ? " is about to exit" : "";
}

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

Communicator::Communicator(int rank, int size, std::string group)
    : rank_(rank),
      size_(size),
      group_(std::move(group)),
      process_(::getpid()),
      address_(random_name()),
      peers_(size) {
  watch_process(process_);  // what peers will do: where it is forbidden they had better know now
  control_memory_ = Mapping::create(Control::bytes(size), &control_fd_);
  listener_ = listen_at(address_, size);
  heap_ = std::make_shared<Heap>([this](int64_t segment, size_t bytes, const Fd& fd) {
    const SegmentNotice notice{segment, static_cast<int64_t>(bytes)};
    // Whoever is gone is found, and named, where it is waited for.
    for (const PeerLink& link : peers_) {
      if (link.socket.valid()) send_message(link.socket, &notice, sizeof(notice), fd.get());
    }
  });
  // Where threads share processors, a thread that spins keeps the one it waits for from running.
  spin_ = std::chrono::microseconds(size > usable_processors() ? 0 : 100);
}

Communicator::~Communicator() {
  heap_->retire();
  close();
}

void Communicator::close(bool exits) {
  if (::getpid() != process_) return;  // a fork of the rank is not the rank
  {
    const std::lock_guard lock(failure_mutex_);
    if (failure_.empty()) {
      failure_ = exits ? "this process ends" : "group '" + group_ + "' has been destroyed";
    }
  }
  uint32_t open = static_cast<uint32_t>(State::kOpen);
  const auto closed = static_cast<uint32_t>(exits ? State::kExits : State::kClosed);
  own_control().state.compare_exchange_strong(open, closed);
  for (int peer = 0; peer < size_; ++peer) ring(peer);
  // A call that is open keeps this; whoever waits for it learns of the end.
  set_settle(nullptr);
}

std::string Communicator::name_of(int peer) const {
  std::string name = "rank " + std::to_string(peer);
  if (peers_[peer].pid >= 0) name += " (process " + std::to_string(peers_[peer].pid) + ")";
  return name + " of group '" + group_ + "'";
}

std::string Communicator::describe(int peer) const {
  return describe_process(peers_[peer].pid, peers_[peer].watch);
}

std::string Communicator::reason_of(const PeerLink& link) const {
  char reason[kReasonBytes];
  std::memcpy(reason, link.control->reason, kReasonBytes);
  reason[kReasonBytes - 1] = 0;
  return reason;
}

std::string Communicator::failure_of(int peer) const {
  const PeerLink& link = peers_[peer];
  if (peer == rank_) return "";
  const auto state = static_cast<State>(link.control->state.load(std::memory_order_acquire));
  return state == State::kFailed ? reason_of(link) : "";
}

std::string Communicator::trouble_with(int peer) const {
  const PeerLink& link = peers_[peer];
  if (peer == rank_) return "";
  const bool exited = has_exited(link.watch);
  const auto state = static_cast<State>(link.control->state.load(std::memory_order_acquire));
  if (state == State::kFailed) return name_of(peer) + " has failed: " + reason_of(link);
  const std::string what = what_of(state, exited);
  return what.empty() ? "" : name_of(peer) + what;
}

void Communicator::announce_going(uint64_t calls) { own_control().goes_after.store(calls + 1); }

std::optional<uint64_t> Communicator::goes_after(int peer) const {
  if (peer == rank_) return {};
  const uint64_t said = peers_[peer].control->goes_after.load();
  return said == 0 ? std::nullopt : std::optional(said - 1);
}

void Communicator::let_go_of(uint64_t ranks) { own_control().let_go.fetch_or(ranks); }

bool Communicator::all_let_go(bool unmapped) const {
  for (int peer = 0; peer < size_; ++peer) {
    const PeerLink& link = peers_[peer];
    if (peer == rank_ || has_exited(link.watch)) continue;
    const uint64_t let_go = link.control->let_go.load();
    if (unmapped ? let_go != kEverybody : !(let_go >> rank_ & 1)) return false;
  }
  return true;
}

bool Communicator::is_owner() const { return ::getpid() == process_; }

void Communicator::welcome(PeerLink& link, const Fd& control_fd) {
  link.control_memory = Mapping::of(control_fd, Control::bytes(size_));
  link.control = reinterpret_cast<Control*>(link.control_memory.data());
  link.pid = peer_of(link.socket).pid;
  link.watch = watch_process(link.pid);
}

// Exchanges hellos over a new connection, to a rank that is known or not (-1) yet.
void Communicator::greet(Fd socket, int expected_rank, Deadline deadline) {
  const std::string who =
      expected_rank < 0 ? "a rank of group '" + group_ + "'" : name_of(expected_rank);
  if (peer_of(socket).uid != ::geteuid()) {
    throw Error("shared_memory: a process of another user has connected in the place of " + who);
  }
  const Hello mine{kMagic, rank_, size_, static_cast<int64_t>(Control::bytes(size_))};
  if (!send_message(socket, &mine, sizeof(mine), control_fd_.get())) {
    throw Error("shared_memory: " + who + " has closed the connection");
  }
  Hello theirs;
  Fd control_fd;
  if (!receive_message(socket, &theirs, sizeof(theirs), &control_fd, deadline)) {
    throw Error("shared_memory: " + who + " has connected and said nothing within the timeout");
  }
  const bool known = theirs.magic == kMagic && theirs.size == size_ &&
                     theirs.control_bytes == mine.control_bytes && theirs.rank >= 0 &&
                     theirs.rank < size_ && theirs.rank != rank_ && control_fd.valid() &&
                     (expected_rank < 0 || theirs.rank == expected_rank) &&
                     !peers_[theirs.rank].socket.valid();
  if (!known) {
    throw Error("shared_memory: " + who +
                " speaks another protocol. Use one version of moe_kernels on all ranks.");
  }
  PeerLink& link = peers_[theirs.rank];
  link.socket = std::move(socket);
  welcome(link, control_fd);
}

void Communicator::connect(const std::vector<std::string>& addresses, double timeout) {
  if (static_cast<int>(addresses.size()) != size_) {
    throw Error("shared_memory: connect needs an address of each of the " + std::to_string(size_) +
                " ranks; got " + std::to_string(addresses.size()));
  }
  const Deadline deadline = deadline_in(timeout);
  const auto check_there = [&](int peer) {
    const pid_t process = process_of(addresses[peer]);
    if (peer == rank_ || !is_gone(process)) return;
    throw Error("shared_memory: rank " + std::to_string(peer) + " (process " +
                std::to_string(process) + ") of group '" + group_ + "' has exited while rank " +
                std::to_string(rank_) + " joined the others");
  };
  for (int peer = 0; peer < rank_; ++peer) {
    try {
      greet(connect_to(addresses[peer]), peer, deadline);
    } catch (const Error& error) {
      // A rank that others have missed may be why this one closed its door.
      for (int other = 0; other < size_; ++other) check_there(other);
      throw Error("shared_memory: rank " + std::to_string(rank_) + " could not join " +
                  name_of(peer) + ", which may have exited: " + error.what());
    }
  }
  for (int missing = size_ - 1 - rank_; missing > 0; --missing) {
    Fd socket;
    do {
      socket = accept_from(listener_, std::min(deadline, Clock::now() + kSlice));
      for (int peer = rank_ + 1; !socket.valid() && peer < size_; ++peer) {
        if (!peers_[peer].socket.valid()) check_there(peer);
      }
      if (interrupt_) interrupt_();
    } while (!socket.valid() && Clock::now() < deadline);
    if (!socket.valid()) {
      std::string names;
      for (int peer = rank_ + 1; peer < size_; ++peer) {
        if (!peers_[peer].socket.valid())
          names += (names.empty() ? "" : ", ") + std::to_string(peer);
      }
      throw Error("shared_memory: rank " + std::to_string(rank_) + " of group '" + group_ +
                  "' has waited " + seconds_text(timeout) + " s for these ranks to join: " + names);
    }
    greet(std::move(socket), -1, deadline);
  }
  listener_.reset(-1);
  control_fd_.reset(-1);
}

std::string Communicator::failure() const {
  const std::lock_guard lock(failure_mutex_);
  return failure_;
}

void Communicator::fail(const std::string& reason, const std::string& cause) {
  if (!is_owner()) return;
  {
    const std::lock_guard lock(failure_mutex_);
    if (!failure_.empty()) return;
    failure_ = reason;
  }
  Control& control = own_control();
  std::snprintf(control.reason, kReasonBytes, "%s", (cause.empty() ? reason : cause).c_str());
  control.state.store(static_cast<uint32_t>(State::kFailed), std::memory_order_release);
  for (int peer = 0; peer < size_; ++peer) ring(peer);
}

void Communicator::fail_and_throw(const std::string& reason) {
  fail(reason);
  throw Error(reason);
}

void Communicator::check_usable(const char* phase) const {
  const std::string op(phase);
  if (::getpid() != process_) {
    throw Error(op + ": this process is a fork of rank " + std::to_string(rank_) + " of group '" +
                group_ + "', which alone can use its dispatchers. Make a process group here.");
  }
  const std::string cause = failure();
  if (!cause.empty()) {
    throw Error(
        op + ": the dispatchers of group '" + group_ +
        "' are of no use after an error; start the ranks again. The first error was: " + cause);
  }
}

void Communicator::ring(int peer) {
  Control* const control = peers_[peer].control;
  if (!control) return;
  control->bell.fetch_add(1);
  if (control->sleepers.load() > 0) futex_wake_all(&control->bell);
}

bool Communicator::arrived(int peer, Stage stage, uint64_t call) const {
  return own_control().mailbox(stage, call, peer, size_).call.load(std::memory_order_acquire) ==
         call;
}

const Message& Communicator::wait_for(int peer, Stage stage, uint64_t call, const char* phase,
                                      double timeout, const std::function<void()>& meanwhile) {
  Control& mine = own_control();
  const Message& message = mine.mailbox(stage, call, peer, size_).message;
  if (arrived(peer, stage, call)) return message;
  const Deadline begin = Clock::now();
  for (int round = 0; spin_.count() > 0; ++round) {
    pause();
    if (arrived(peer, stage, call)) return message;
    if (round % 64 == 63 && Clock::now() - begin > spin_) break;
  }
  const Deadline deadline = deadline_in(timeout);
  while (true) {
    // Whoever rings after this look finds a sleeper, or has changed the bell by then.
    mine.sleepers.fetch_add(1);
    const uint32_t bell = mine.bell.load();
    const bool there = arrived(peer, stage, call);
    if (!there) futex_wait(&mine.bell, bell, kSlice);
    mine.sleepers.fetch_sub(1);
    if (there || arrived(peer, stage, call)) return message;
    check_peers(stage, call, phase, deadline, timeout);
    if (interrupt_) interrupt_();
    if (meanwhile) meanwhile();
  }
}

// Throws if a rank whose message is missing will not send it.
void Communicator::check_peers(Stage stage, uint64_t call, const char* phase, Deadline deadline,
                               double timeout) {
  const std::string op(phase);
  const bool late = Clock::now() >= deadline;
  std::string missing;
  for (int peer = 0; peer < size_; ++peer) {
    PeerLink& link = peers_[peer];
    if (peer == rank_ || arrived(peer, stage, call)) continue;
    // In the reverse of the order in which these come about.
    const bool exited = has_exited(link.watch);
    const auto state = static_cast<State>(link.control->state.load(std::memory_order_acquire));
    if (arrived(peer, stage, call)) continue;  // the last thing it did
    const std::string where = " while rank " + std::to_string(rank_) + " waited for its " +
                              shm::name_of(stage) + " in " + op;
    if (state == State::kFailed) {
      fail_and_throw(op + ": " + name_of(peer) + " has failed" + where + ": " + reason_of(link));
    }
    const std::string what = what_of(state, exited);
    if (!what.empty()) fail_and_throw(op + ": " + name_of(peer) + what + where);
    if (!late) continue;
    const uint64_t entered = link.control->call.load(std::memory_order_acquire);
    missing += (missing.empty() ? "" : "; ") + name_of(peer) + " " +
               describe_process(link.pid, link.watch) +
               (entered < call ? ", has made " + std::to_string(entered) +
                                     " calls of the dispatchers and not this one, the next"
                               : ", has made this call and not got so far");
  }
  if (late && !missing.empty()) {
    fail_and_throw(op + ": rank " + std::to_string(rank_) + " has waited the timeout of " +
                   seconds_text(timeout) + " s for the " + shm::name_of(stage) + " of others. " +
                   missing + ". Every rank must make the same calls in the same order.");
  }
}

int64_t Communicator::trim() {
  check_usable("trim");
  return heap_->trim();
}

void Communicator::set_settle(std::function<void()> settle) {
  // What was there goes after the lock: it may be all that keeps tensors, and dispatchers.
  const std::lock_guard lock(settle_mutex_);
  settle_.swap(settle);
}

void Communicator::settle() {
  std::function<void()> open;
  {
    const std::lock_guard lock(settle_mutex_);
    open.swap(settle_);
  }
  if (open) open();
}

Communicator::Call::Call(std::shared_ptr<Communicator> communicator, const char* phase,
                         double timeout)
    : communicator_(std::move(communicator)), phase_(phase), timeout_(timeout) {
  communicator_->check_usable(phase);
  communicator_->settle();
  // Another thread may leave its call open after that: it is settled too.
  while (!communicator_->turn_.try_acquire_for(kSlice)) communicator_->settle();
  try {
    communicator_->check_usable(phase);
  } catch (...) {
    communicator_->turn_.release();
    throw;
  }
  number_ = ++communicator_->calls_;
  communicator_->own_control().call.store(number_, std::memory_order_release);
  auto& before = communicator_->published_before_;
  auto& published = communicator_->published_;
  before.insert(before.end(), published.begin(), published.end());
  published.clear();
}

Communicator::Call::~Call() {
  abandon("it gave up in " + std::string(phase_));
  communicator_->turn_.release();
}

void Communicator::Call::abandon(const std::string& reason) {
  if (finished_) return;
  communicator_->fail(reason);
  finished_ = true;
}

void Communicator::Call::send(int peer, Stage stage, const Message& message) {
  Communicator& c = *communicator_;
  Control* const control = peer == c.rank_ ? &c.own_control() : c.peers_[peer].control;
  Mailbox& box = control->mailbox(stage, number_, c.rank_, c.size_);
  box.message = message;
  box.call.store(number_, std::memory_order_release);
  c.ring(peer);
}

const Message& Communicator::Call::receive(int peer, Stage stage,
                                           const std::function<void()>& meanwhile) {
  return communicator_->wait_for(peer, stage, number_, phase_, timeout_, meanwhile);
}

char* Communicator::Call::at(int peer, Place place, int64_t bytes) {
  Communicator& c = *communicator_;
  PeerLink& link = c.peers_[peer];
  const auto who = [&] { return std::string(phase_) + ": " + c.name_of(peer); };
  try {
    while (place.segment >= static_cast<int64_t>(link.segments.size())) {
      // It was announced before the place was named.
      SegmentNotice notice;
      Fd fd;
      if (!receive_message(link.socket, &notice, sizeof(notice), &fd, deadline_in(timeout_)) ||
          notice.segment != static_cast<int64_t>(link.segments.size()) || !fd.valid()) {
        throw Error("it has not announced it");
      }
      link.segments.push_back(Mapping::of(fd, static_cast<size_t>(notice.bytes)));
    }
  } catch (const Error& error) {
    c.fail_and_throw(who() + " has named memory that cannot be had: " + error.what());
  }
  const auto size =
      place.segment < 0 ? int64_t{-1} : static_cast<int64_t>(link.segments[place.segment].size());
  if (place.offset < 0 || bytes < 0 || bytes > size - place.offset) {
    c.fail_and_throw(who() + " has named " + std::to_string(bytes) +
                     " bytes that are not in its memory");
  }
  return link.segments[place.segment].data() + place.offset;
}

void Communicator::Call::publish(std::shared_ptr<Heap::Block> block) {
  communicator_->published_.push_back(std::move(block));
}

void Communicator::Call::release_published() { communicator_->published_before_.clear(); }

}  // namespace moe::ep::shm
