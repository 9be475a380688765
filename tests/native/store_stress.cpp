// What the ranks of a group say of their failures by its store, with random delays, by a store that
// is slow, raises, or answers nobody for a while: for the thread sanitizer and the address
// sanitizer. The ranks are threads of one process, and torch's store is a stand-in.
//
//   store_stress [ranks] [rounds] [seed]
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <utility>
#include <vector>

#include "dispatch/causes.h"
#include "dispatch/meeting.h"
#include "dispatch/notices.h"

namespace {

using namespace moe::ep;
using Bytes = std::vector<uint8_t>;
using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

void check(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "store_stress: %s\n", what);
  std::abort();
}

// What the process that keeps a store has.
class Server {
 public:
  // Until it goes on: who asks waits.
  void stop(bool stopped) {
    const std::lock_guard lock(mutex_);
    stopped_ = stopped;
    goes_on_.notify_all();
  }
  template <typename F>
  auto with(const F& f) {
    std::unique_lock lock(mutex_);
    goes_on_.wait(lock, [&] { return !stopped_; });
    ++requests;
    return f(values_);
  }

  std::atomic<int64_t> requests = 0;

 private:
  std::mutex mutex_;
  std::condition_variable goes_on_;
  bool stopped_ = false;
  std::map<std::string, Bytes> values_;
};

// A rank's connection to it, which one thread uses at a time.
class Client : public c10d::Store {
 public:
  Client(std::shared_ptr<Server> server, unsigned seed) : server_(std::move(server)), draw_(seed) {}

  template <typename F>
  auto ask(const F& f) {
    const std::lock_guard lock(mutex_);
    if (const int slow = slow_ms) std::this_thread::sleep_for(milliseconds(draw_() % slow));
    if (raises) throw std::runtime_error("the store is gone");
    return server_->with(f);
  }

  void set(const std::string& key, const Bytes& value) override {
    ask([&](auto& values) { return values[key] = value; });
  }
  Bytes get(const std::string& key) override {
    return ask([&](auto& values) { return values.at(key); });
  }
  bool check(const std::vector<std::string>& keys) override {
    return ask([&](auto& values) {
      return std::all_of(keys.begin(), keys.end(),
                         [&](auto& key) { return values.count(key) > 0; });
    });
  }
  void wait(const std::vector<std::string>& keys, const milliseconds& timeout) override {
    for (const auto end = Clock::now() + timeout; !check(keys);) {
      if (Clock::now() > end) throw std::runtime_error("the time is over");
      std::this_thread::sleep_for(milliseconds(1));
    }
  }
  int64_t add(const std::string& key, int64_t value) override {
    return ask([&](auto& values) {
      Bytes& bytes = values[key];
      if (!bytes.empty()) value += std::stoll(std::string(bytes.begin(), bytes.end()));
      const std::string text = std::to_string(value);
      bytes.assign(text.begin(), text.end());
      return value;
    });
  }
  Bytes compareSet(const std::string& key, const Bytes& expected, const Bytes& desired) override {
    return ask([&](auto& values) {
      Bytes& value = values[key];
      if (value == expected) value = desired;
      return value;
    });
  }

  // From now on.
  std::atomic<int> slow_ms = 0;
  std::atomic<bool> raises = false;

 private:
  std::shared_ptr<Server> server_;
  std::mutex mutex_;
  std::mt19937 draw_;
};

struct Rank {
  Rank(int rank, int size, const std::shared_ptr<Server>& server, unsigned seed)
      : store(std::make_shared<Client>(server, seed + rank)), group(rank, size, store) {}

  std::shared_ptr<Client> store;
  c10d::ProcessGroup group;
  Notices notices;
};

std::vector<std::unique_ptr<Rank>> make_ranks(int size, const std::shared_ptr<Server>& server,
                                              unsigned seed) {
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int rank = 0; rank < size; ++rank) {
    ranks.push_back(std::make_unique<Rank>(rank, size, server, seed));
  }
  return ranks;
}

// On a thread for each rank.
template <typename F>
void on_all(int size, const F& f) {
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) threads.emplace_back([&f, rank] { f(rank); });
  for (std::thread& thread : threads) thread.join();
}

// Threads of a rank ask at once, of a store that is slow, raises and is silent in turns: each gets
// its own answer or none, nobody waits for long, and what was told is there in the end.
void questions(int threads, unsigned seed) {
  const auto server = std::make_shared<Server>();
  auto rank = std::make_unique<Rank>(0, 1, server, seed);
  const std::weak_ptr<Client> store = rank->store;
  std::atomic<int> answers = 0, told = 0;
  std::atomic<bool> over = false;
  std::thread weather([&] {
    std::mt19937 draw(seed);
    while (!over) {
      server->stop(draw() % 8 == 0);
      rank->store->raises = draw() % 8 == 0;
      rank->store->slow_ms = draw() % 8 == 0 ? 600 : 2;
      std::this_thread::sleep_for(milliseconds(draw() % 50));
    }
    server->stop(false);
  });
  on_all(threads, [&](int thread) {
    std::mt19937 draw(seed + thread);
    const auto end = Clock::now() + milliseconds(2000);
    for (int round = 0; Clock::now() < end; ++round) {
      const int64_t number = 100'000 * thread + round;
      const std::string key = std::to_string(number);
      const auto begin = Clock::now();
      if (draw() % 64 == 0) {
        ++told;
        rank->notices.store.tell(rank->group, [key, &told](c10d::Store& store) {
          while (true) {  // of this store's errors none may be the last word
            try {
              store.set(key, {1});
              break;
            } catch (const std::runtime_error&) {
              std::this_thread::yield();
            }
          }
          --told;
          return true;
        });
      } else {
        const auto answer = rank->notices.store.ask(rank->group, [key, number](c10d::Store& store) {
          store.add(key, 1);
          return number;
        });
        if (answer) ++answers;
        check(!answer || *answer == number, "an answer is that to another question");
      }
      check(Clock::now() - begin < milliseconds(401) * (threads + 2) + milliseconds(500),
            "a question has waited for the store");
      std::this_thread::sleep_for(milliseconds(draw() % 5));
    }
  });
  over = true;
  weather.join();
  check(answers > 0, "no question was answered");
  rank->store->raises = false;
  rank->store->slow_ms = 0;
  for (int moment = 0; told > 0; ++moment) {
    check(moment < 20000, "what was told was never said");
    std::this_thread::sleep_for(milliseconds(1));
  }
  rank.reset();
  for (int moment = 0; !store.expired(); ++moment) {
    check(moment < 20000, "the store is kept for ever");
    std::this_thread::sleep_for(milliseconds(1));
  }
}

// Who has an answer may drop the store for good: nothing else holds it.
void ends_with_the_answer() {
  for (int round = 0; round < 200; ++round) {
    Rank rank(0, 1, std::make_shared<Server>(), 1);
    check(rank.notices.store.ask(rank.group, [](c10d::Store& store) { return store.check({}); })
              .has_value(),
          "a store that answers at once was not heard");
    check(rank.store.use_count() == 2, "the store is held beyond the answer");
  }
}

// Some ranks are late, the others fail one after another: all name those that are late.
void late_ranks(int size, unsigned seed, bool silent) {
  std::mt19937 draw(seed);
  const auto server = std::make_shared<Server>();
  const auto ranks = make_ranks(size, server, seed);
  std::vector<bool> late(size);
  for (int rank = 0; rank < size; ++rank) late[rank] = draw() % 3 == 0;
  std::string names;
  for (int rank = 0; rank < size; ++rank) {
    if (late[rank]) names += (names.empty() ? "" : ", ") + std::to_string(rank);
  }
  if (silent) server->stop(true);
  std::vector<std::string> causes(size), second_causes(size);
  const auto start = Clock::now();
  on_all(size, [&](int rank) {
    if (late[rank]) return;
    std::mt19937 mine(seed + rank);
    Rank& self = *ranks[rank];
    self.store->slow_ms = 3;
    // Two calls of a rank fail at once.
    const auto fail = [&] { return find_cause(self.notices, self.group, "dispatch", 7); };
    std::this_thread::sleep_for(milliseconds(mine() % 150));
    const auto begin = Clock::now();
    std::string other;
    std::thread second([&] { other = fail(); });
    causes[rank] = fail();
    second.join();
    second_causes[rank] = other;
    check(Clock::now() - begin < milliseconds(4000), "a cause was sought for long");
  });
  server->stop(false);
  // Half a second is too short for those that hardly run: then a rank may well be named that is not
  // late, or the store be thought to be silent.
  if (Clock::now() - start > milliseconds(950) && !silent) return;
  for (int rank = 0; rank < size; ++rank) {
    if (late[rank]) continue;
    const std::string& cause = causes[rank];
    check(cause == second_causes[rank], (cause + "\n" + second_causes[rank]).c_str());
    if (silent) {
      check(cause.find("it does not answer") != std::string::npos, cause.c_str());
    } else if (names.empty()) {
      check(cause.find("all ranks have failed") == 0, cause.c_str());
    } else {
      check(cause.find("ranks [" + names + "] have died") == 0, cause.c_str());
    }
  }
}

// Ranks begin exchanges without headers or refuse them, all alike, or all but one.
void refusals(int size, int rounds, unsigned seed) {
  const auto server = std::make_shared<Server>();
  const auto ranks = make_ranks(size, server, seed);
  std::barrier everybody(size);
  on_all(size, [&](int rank) {
    std::mt19937 shared(seed), mine(seed + rank);
    Rank& self = *ranks[rank];
    self.store->slow_ms = 2;
    for (int round = 0; round < rounds; ++round) {
      self.notices.dispatched(round);
      for (int call = shared() % 3; call >= 0; --call) {
        const bool refuse = shared() % 2 == 0;
        self.notices.settle(self.group, "combine", milliseconds(20000));
        if (refuse) {
          self.notices.refuse(self.group);
          continue;
        }
        const Notices::Place place = self.notices.begin();
        std::this_thread::sleep_for(milliseconds(mine() % 3));
        self.notices.look(self.group, "combine");
        if (mine() % 2 == 0) self.notices.end(place);
      }
      everybody.arrive_and_wait();
    }
    self.notices.dispatched(rounds);
    everybody.arrive_and_wait();
    const int odd = static_cast<int>(shared() % size);
    if (rank == odd) {
      self.notices.refuse(self.group);
      return;
    }
    self.notices.begin();
    std::string told;
    for (int moment = 0; told.empty(); ++moment) {
      check(moment < 20000, "a refusal was not told");
      try {
        self.notices.look(self.group, "combine");
      } catch (const c10::Error& error) {
        told = error.what();
      }
      std::this_thread::sleep_for(milliseconds(1));
    }
    check(told.find("combine: rank " + std::to_string(odd) + " of") == 0, told.c_str());
    check(self.notices.failure() == told, "what was told is not kept");
  });
}

// Ranks meet, but for one that is late in some of their tries, or interrupted, or by a store that
// answers none.
void meetings(int size, unsigned seed) {
  const auto server = std::make_shared<Server>();
  std::barrier everybody(size);
  on_all(size, [&](int rank) {
    std::mt19937 shared(seed);
    auto store = std::make_shared<Client>(server, seed + rank);
    store->slow_ms = 2;
    c10d::group_of_thread = std::make_shared<c10d::ProcessGroup>(rank, size, store);
    enum { kAll, kLate, kInterrupted, kSilent, kKinds };
    for (int kind = 0; kind < kKinds; ++kind) {
      const std::string key = std::to_string(kind);
      const bool odd = static_cast<int>(shared() % size) == rank;
      everybody.arrive_and_wait();
      if (kind == kSilent && rank == 0) server->stop(true);
      everybody.arrive_and_wait();
      const double seconds = kind == kAll ? 30 : 0.5;
      const auto begin = Clock::now();
      Met met;
      if (kind != kLate || !odd) {
        try {
          met = meet("stress", key, std::to_string(rank), seconds, 0.5, [&] {
            if (kind == kInterrupted && odd) throw std::runtime_error("interrupted");
          });
        } catch (const std::runtime_error&) {
          check(kind == kInterrupted && odd, "a meeting that nobody has interrupted");
        }
      }
      check(kind == kAll || Clock::now() - begin < milliseconds(3000), "a meeting has no end");
      everybody.arrive_and_wait();
      if (kind == kSilent) {
        check(met.problem == "no answer within the timeout", "a silent store is no problem");
        server->stop(false);
      } else if (kind == kLate && !odd) {
        check(met.missing.size() == 1 && met.values.empty(), "who is late is not named");
      } else if (kind == kAll) {
        check(met.missing.empty() && static_cast<int>(met.values.size()) == size &&
                  met.values[size - 1] == std::to_string(size - 1),
              "the ranks have not met");
      }
    }
    c10d::group_of_thread = nullptr;
  });
}

// How often many ranks that fail together ask, each for half a second.
void requests(int size) {
  const auto server = std::make_shared<Server>();
  const auto ranks = make_ranks(size, server, 1);
  Rank& self = *ranks[0];
  const std::string cause = find_cause(self.notices, self.group, "dispatch", 7);
  check(cause.find("ranks [1, 2, 3, ") == 0, cause.c_str());
  const int64_t rounds = 500 / 20 + 1, asked = server->requests;
  check(asked <= rounds * (4 + size / 32), "the store is asked too often");
}

}  // namespace

int main(int argc, char** argv) {
  const int ranks = argc > 1 ? std::atoi(argv[1]) : 8;
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 3;
  const unsigned seed = argc > 3 ? static_cast<unsigned>(std::atoi(argv[3])) : 1;
  ends_with_the_answer();
  requests(1024);
  for (int round = 0; round < rounds; ++round) {
    const unsigned draw = 100 * seed + round;
    questions(ranks, draw);
    late_ranks(ranks, draw, /*silent=*/false);
    refusals(ranks, 20, draw);
    meetings(ranks, draw);
  }
  late_ranks(ranks, seed, /*silent=*/true);
  // A question that is open when the process ends.
  const auto server = std::make_shared<Server>();
  Rank rank(0, 1, server, seed);
  server->stop(true);
  rank.notices.store.ask(rank.group, [](c10d::Store& store) { return store.check({}); });
  std::printf("store_stress: %d ranks, %d rounds, seed %u: right\n", ranks, rounds, seed);
}
