// Many calls of many ranks, with random sizes and delays, on the memory that they share: for the
// thread sanitizer and the address sanitizer. The ranks are threads of one process, and see each
// other's memory at the same addresses (mapping.cpp is replaced by what follows), for a sanitizer
// knows nothing of what another process, or another address, does.
//
//   dispatch_stress [ranks] [calls] [seed]
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "dispatch/copy.h"
#include "dispatch/shared_memory/communicator.h"

namespace moe::ep::shm {
namespace {

// Memory by the file that stands for it; it stays until the end.
std::mutex files_mutex;
std::map<ino_t, char*> files;
std::vector<std::unique_ptr<char[]>> memory;

ino_t inode(const Fd& fd) {
  struct stat status;
  if (::fstat(fd.get(), &status) < 0) fail_with_errno("fstat");
  return status.st_ino;
}

}  // namespace

Mapping Mapping::create(size_t bytes, Fd* fd) {
  fd->reset(::memfd_create("stress", MFD_CLOEXEC));
  const std::lock_guard lock(files_mutex);
  char* const data = memory.emplace_back(new char[bytes]()).get();
  files[inode(*fd)] = data;
  return Mapping(data, bytes);
}

Mapping Mapping::of(const Fd& fd, size_t bytes) {
  const std::lock_guard lock(files_mutex);
  return Mapping(files.at(inode(fd)), bytes);
}

// Writes, so that whoever reads or writes meanwhile is found.
bool Mapping::release(const Fd&) {
  std::memset(data_, 0xab, size_);
  return true;
}

void Mapping::restore(const Fd&) { std::memset(data_, 0, size_); }

Mapping::Mapping(Mapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

Mapping::~Mapping() = default;

}  // namespace moe::ep::shm

namespace {

using namespace moe::ep;
using shm::Communicator;
using shm::Message;
using shm::Place;
using shm::Stage;
using Call = Communicator::Call;

std::vector<std::string> addresses;

// What is sent from one rank to another in a call, so that the receiver can tell.
char content(int from, int to, int call, size_t i) {
  return static_cast<char>(from * 31 + to * 17 + call * 7 + static_cast<int>(i * 13));
}

void check(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "dispatch_stress: %s\n", what);
  std::abort();
}

class Rank {
 public:
  Rank(int rank, int ranks, unsigned seed, std::shared_ptr<Communicator> communicator)
      : rank_(rank), ranks_(ranks), communicator_(std::move(communicator)), draw_(seed + rank) {}

  // What all ranks draw alike decides the kind of a call; sizes and delays are each rank's own.
  void run(int calls, unsigned seed) {
    std::mt19937 shared(seed);
    for (int call = 0; call < calls; ++call) {
      pause();
      switch (shared() % 4) {
        case 0:
          push(call, shared() % 2 == 0);
          break;
        case 1:
          give_up_alike();
          break;
        default:
          pull(call);
      }
      // Blocks are dropped in another order than they were made in.
      if (!kept_.empty() && draw_() % 2) kept_.erase(kept_.begin() + draw_() % kept_.size());
      if (kept_.size() > 20) kept_.clear();
      if (draw_() % 8 == 0) communicator_->trim();
    }
  }

 private:
  void pause() {
    if (draw_() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(draw_() % 200));
  }

  size_t random_bytes() {
    const unsigned kind = draw_() % 10;
    return kind == 0 ? 0 : kind == 1 ? draw_() % 300000 : draw_() % 2000;
  }

  Message exchange(Call& call, int peer, Stage stage) { return call.receive(peer, stage); }

  // As dispatch: sizes, grants, rows, done.
  void push(int number, bool stream) {
    Call call(communicator_, "push", 60);
    std::vector<size_t> sent(ranks_), received(ranks_);
    for (int peer = 0; peer < ranks_; ++peer) {
      sent[peer] = random_bytes();
      Message message;
      message.words[0] = static_cast<int64_t>(sent[peer]);
      call.send(peer, Stage::kHeader, message);
    }
    size_t total = 0;
    std::vector<size_t> begin;
    for (int peer = 0; peer < ranks_; ++peer) {
      received[peer] = static_cast<size_t>(exchange(call, peer, Stage::kHeader).words[0]);
      begin.push_back(total);
      total += received[peer];
    }
    call.release_published();
    auto block = communicator_->heap().allocate(static_cast<int64_t>(total));
    for (int peer = 0; peer < ranks_; ++peer) {
      Message grant;
      grant.words[0] = block->place().segment;
      grant.words[1] = block->place().offset + static_cast<int64_t>(begin[peer]);
      call.send(peer, Stage::kGrant, grant);
    }
    for (int peer = 0; peer < ranks_; ++peer) {
      const Message grant = exchange(call, peer, Stage::kGrant);
      if (sent[peer] == 0) continue;
      char* const to = peer == rank_ ? block->data() + begin[peer]
                                     : call.at(peer, {grant.words[0], grant.words[1]},
                                               static_cast<int64_t>(sent[peer]));
      std::vector<char> row(sent[peer]);
      for (size_t i = 0; i < row.size(); ++i) row[i] = content(rank_, peer, number, i);
      (stream ? stream_row : copy_row)(to, row.data(), static_cast<int64_t>(row.size()));
    }
    if (stream) order_streams();
    for (int peer = 0; peer < ranks_; ++peer) call.send(peer, Stage::kDone, {});
    for (int peer = 0; peer < ranks_; ++peer) call.receive(peer, Stage::kDone);
    for (int peer = 0; peer < ranks_; ++peer) {
      for (size_t i = 0; i < received[peer]; ++i) {
        check(block->data()[begin[peer] + i] == content(peer, rank_, number, i), "pushed rows");
      }
    }
    kept_.push_back(std::move(block));
    call.finish();
  }

  // As combine: others read what is published, until they enter the next call.
  void pull(int number) {
    Call call(communicator_, "pull", 60);
    std::vector<size_t> sizes(ranks_);
    size_t total = 0;
    for (size_t& size : sizes) total += size = random_bytes();
    auto block = communicator_->heap().allocate(static_cast<int64_t>(total));
    size_t at = 0;
    for (int peer = 0; peer < ranks_; ++peer) {
      for (size_t i = 0; i < sizes[peer]; ++i) {
        block->data()[at + i] = content(rank_, peer, number, i);
      }
      Message message;
      message.words[0] = static_cast<int64_t>(sizes[peer]);
      message.words[1] = block->place().segment;
      message.words[2] = block->place().offset + static_cast<int64_t>(at);
      call.send(peer, Stage::kHeader, message);
      at += sizes[peer];
    }
    call.publish(std::move(block));
    std::vector<Message> messages;
    for (int peer = 0; peer < ranks_; ++peer) {
      messages.push_back(exchange(call, peer, Stage::kHeader));
    }
    call.release_published();
    pause();
    for (int peer = 0; peer < ranks_; ++peer) {
      const auto* const words = messages[peer].words;
      if (peer == rank_ || words[0] == 0) continue;
      const char* const rows = call.at(peer, {words[1], words[2]}, words[0]);
      for (int64_t i = 0; i < words[0]; ++i) {
        check(rows[i] == content(peer, rank_, number, static_cast<size_t>(i)), "published rows");
      }
    }
    call.finish();
  }

  // As arguments that do not fit: headers alone.
  void give_up_alike() {
    Call call(communicator_, "refused", 60);
    for (int peer = 0; peer < ranks_; ++peer) call.send(peer, Stage::kHeader, {});
    for (int peer = 0; peer < ranks_; ++peer) call.receive(peer, Stage::kHeader);
    call.release_published();
    call.finish();
  }

  const int rank_, ranks_;
  std::shared_ptr<Communicator> communicator_;
  std::mt19937 draw_;
  std::vector<std::shared_ptr<shm::Heap::Block>> kept_;
};

}  // namespace

int main(int argc, char** argv) {
  const int ranks = argc > 1 ? std::atoi(argv[1]) : 8;
  const int calls = argc > 2 ? std::atoi(argv[2]) : 500;
  const unsigned seed = argc > 3 ? static_cast<unsigned>(std::atoi(argv[3])) : 1;
  addresses.resize(ranks);
  std::barrier everybody(ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      auto communicator = std::make_shared<Communicator>(rank, ranks, "stress");
      addresses[rank] = communicator->address();
      everybody.arrive_and_wait();
      communicator->connect(addresses, 60);
      Rank(rank, ranks, seed, communicator).run(calls, seed);
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::printf("dispatch_stress: %d ranks, %d calls, seed %u: right\n", ranks, calls, seed);
}
