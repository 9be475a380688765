// The ranks of one machine, joined by memory that they share.
//
// A rank that dies, stops, leaves, fails or does not come is an Error on every rank that waits for
// it, which names it; what it had written stays readable. After an Error of an exchange a
// communicator refuses further calls: nobody knows any more what the others have seen.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <semaphore>
#include <string>
#include <vector>

#include "dispatch/shared_memory/control.h"
#include "dispatch/shared_memory/heap.h"
#include "dispatch/shared_memory/system.h"

namespace moe::ep::shm {

class Communicator {
 public:
  // `group` names the ranks in messages.
  Communicator(int rank, int size, std::string group);
  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  const std::string& group() const { return group_; }

  // Where the peers find this rank, until connect() returns.
  const std::string& address() const { return address_; }
  // Joins the ranks at `addresses`, in their order, within `timeout` seconds; all of them call it.
  void connect(const std::vector<std::string>& addresses, double timeout);
  // The group is gone, or this process ends: who waits for this rank learns it, and there are no
  // further calls.
  void close(bool exits = false);

  Heap& heap() { return *heap_; }
  // Why there can be no further calls; empty while there can.
  std::string failure() const;
  // Raises if a call cannot begin, or end: the reason, or that this process is a fork of the rank.
  void check_usable(const char* phase) const;
  // Ends the use of the communicator, by all ranks; the first reason stays. A fork of the rank ends
  // nothing. `cause`: what the others are told instead, of a reason that is another rank's failure:
  // else each would add a link to a chain, whose end does not fit.
  void fail(const std::string& reason, const std::string& cause = {});
  // What is said of a rank, and whether its process "is running", "is stopped" or "has exited".
  std::string name_of(int peer) const;
  std::string describe(int peer) const;
  // That a rank has gone, failed or left, in words; empty if it is there. From any thread.
  std::string trouble_with(int peer) const;
  // What a rank has told the others when it failed; empty if it has not.
  std::string failure_of(int peer) const;

  // A goodbye between ranks that read each other's memory without a call of the host, as GPUs do;
  // at most 64. A rank that goes says so, having closed, and waits until the others let go of it.
  // `calls`: those that it has taken part in.
  void announce_going(uint64_t calls);
  // What a rank that goes has said; nothing of others.
  std::optional<uint64_t> goes_after(int peer) const;
  // Nothing of this rank reads memory of these ranks, as bits, any more. kEverybody: nor has it any
  // mapped.
  static constexpr uint64_t kEverybody = ~uint64_t{0};
  void let_go_of(uint64_t ranks);
  // Whether every other rank has exited or let go of this one; with `unmapped`, of everybody.
  bool all_let_go(bool unmapped) const;

  // False in a fork of the rank.
  bool is_owner() const;
  // Called now and then by a thread that waits, and may throw.
  void set_interrupt(std::function<void()> interrupt) { interrupt_ = std::move(interrupt); }

  // Gives receiving memory without rows back to the system; returns the bytes. Of this rank alone:
  // the others need not know.
  int64_t trim();

  // Called before the next call begins: it ends one that was left open meanwhile. It is kept, with
  // what it keeps, until then, or until close().
  void set_settle(std::function<void()> settle);

  // One call of all ranks, in the order that they share. One exists at a time, others wait for it.
  // It may end in another thread than it began in.
  class Call {
   public:
    // `timeout` in seconds bounds each receive().
    Call(std::shared_ptr<Communicator> communicator, const char* phase, double timeout);
    ~Call();  // unless finish() was called, the communicator has failed
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

    void send(int peer, Stage stage, const Message& message);
    // `meanwhile` is called now and then while it waits, and may throw.
    const Message& receive(int peer, Stage stage, const std::function<void()>& meanwhile = {});
    // Raises if what has begun cannot end, as check_usable().
    void check_usable() const { communicator_->check_usable(phase_); }
    // The memory of `bytes` at a place that `peer` has named.
    char* at(int peer, Place place, int64_t bytes);
    // Memory that peers read in this call: it is kept until all of them have entered the next one.
    void publish(std::shared_ptr<Heap::Block> block);
    // Every header of this call was received: the peers are done with the calls before.
    void release_published();
    // The ranks agree on how this call ended, be it an error.
    void finish() { finished_ = true; }
    // Tells the peers why it will not end, unless it has.
    void abandon(const std::string& reason);

   private:
    std::shared_ptr<Communicator> communicator_;
    const char* phase_;
    double timeout_;
    uint64_t number_;
    bool finished_ = false;
  };

 private:
  struct PeerLink {
    Fd socket, watch;
    pid_t pid = -1;
    Mapping control_memory;
    std::vector<Mapping> segments;
    Control* control = nullptr;
  };

  Control& own_control() const { return *reinterpret_cast<Control*>(control_memory_.data()); }
  void settle();
  void welcome(PeerLink& link, const Fd& control_fd);
  void greet(Fd socket, int expected_rank, Deadline deadline);
  void ring(int peer);
  std::string reason_of(const PeerLink& link) const;
  [[noreturn]] void fail_and_throw(const std::string& reason);
  const Message& wait_for(int peer, Stage stage, uint64_t call, const char* phase, double timeout,
                          const std::function<void()>& meanwhile);
  bool arrived(int peer, Stage stage, uint64_t call) const;
  void check_peers(Stage stage, uint64_t call, const char* phase, Deadline deadline,
                   double timeout);

  const int rank_, size_;
  const std::string group_;
  const pid_t process_;
  std::string address_;
  Fd listener_, control_fd_;
  Mapping control_memory_;
  std::vector<PeerLink> peers_;
  std::shared_ptr<Heap> heap_;
  std::vector<std::shared_ptr<Heap::Block>> published_, published_before_;
  std::function<void()> interrupt_;
  std::chrono::microseconds spin_;

  std::binary_semaphore turn_{1};
  std::mutex settle_mutex_;
  std::function<void()> settle_;
  uint64_t calls_ = 0;
  mutable std::mutex failure_mutex_;
  std::string failure_;
};

}  // namespace moe::ep::shm
