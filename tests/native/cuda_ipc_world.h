// Ranks of the transport `cuda_ipc` as threads of one process: their memory, their grids, and what
// they bring to a call.
#pragma once

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "cuda/lane.h"
#include "cuda/numbers.h"
#include "cuda/protocol.h"
#include "cuda/regions.h"
#include "dispatch/agreement.h"
#include "dispatch/layout.h"

namespace emulation {

using namespace moe::ep;
using namespace moe::ep::device;

inline void check(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "cuda_ipc_emulation: %s\n", what);
  std::abort();
}

// A grid of threads of the host.
struct Grid {
  int blocks = 1, threads = 1, group = 1;
};

// f(lane, shared) by each thread. Blocks come in random order, and some of them late.
template <typename Shared, typename F>
void run_grid(const Grid& grid, std::mt19937& draw, const F& f) {
  std::vector<int> order(grid.blocks);
  for (int b = 0; b < grid.blocks; ++b) order[b] = b;
  std::shuffle(order.begin(), order.end(), draw);
  const bool one_by_one = grid.threads == 1 && draw() % 2 == 0;
  std::vector<std::thread> running;
  std::vector<std::unique_ptr<Shared>> shared;
  std::vector<std::unique_ptr<std::barrier<>>> barriers;
  for (const int block : order) {
    // Not initialised on a device: the sanitizers see what is read before it is written.
    shared.push_back(std::unique_ptr<Shared>(new Shared));
    std::memset(static_cast<void*>(shared.back().get()), 0xab, sizeof(Shared));
    barriers.push_back(std::make_unique<std::barrier<>>(grid.threads));
    std::barrier<>* const of_block = barriers.back().get();
    std::barrier<>* of_group = nullptr;
    const unsigned delay = draw() % 8 == 0 ? draw() % 300 : 0;
    for (int thread = 0; thread < grid.threads; ++thread) {
      if (thread % grid.group == 0) {
        barriers.push_back(std::make_unique<std::barrier<>>(grid.group));
        of_group = barriers.back().get();
      }
      Lane lane;
      lane.block = block, lane.blocks = grid.blocks;
      lane.thread = thread, lane.threads = grid.threads, lane.group = grid.group;
      lane.block_barrier = of_block, lane.group_barrier = of_group;
      const auto body = [&f, lane, delay, memory = shared.back().get()] {
        if (delay) std::this_thread::sleep_for(std::chrono::microseconds(delay));
        f(lane, *memory);
      };
      if (one_by_one) {
        body();
      } else {
        running.emplace_back(body);
      }
    }
  }
  for (std::thread& thread : running) thread.join();
}

// What the ranks of a world agree on, and their memory.
struct Settings {
  int ranks, top_k, experts;
  int64_t max_tokens, capacity, slot_capacity;
  int64_t hidden;  // elements of 2 bytes
  int64_t extra_bytes;
  int weight_bytes, id_bytes;
  uint64_t timeout = 60'000'000'000;
};

constexpr int64_t kTag = 77;

class World {
 public:
  explicit World(const Settings& settings)
      : settings(settings),
        controls(settings.ranks),
        reports(settings.ranks),
        orders(settings.ranks) {
    const TokenRegion tokens(settings.ranks, settings.max_tokens, settings.hidden * 2,
                             settings.top_k, settings.weight_bytes, settings.extra_bytes);
    const ResultRegion results(settings.capacity, settings.hidden * 2,
                               settings.top_k * settings.weight_bytes);
    parity_bytes = std::max(tokens.region.bytes(), results.region.bytes());
    for (int p = 0; p < settings.ranks; ++p) {
      // Of its exact size, so that the address sanitizer guards its end.
      staging.emplace_back(new (std::align_val_t{128}) char[2 * parity_bytes]);
      std::memset(staging.back().get(), 0x77, 2 * parity_bytes);
    }
  }

  Link link(int rank, Phase phase) {
    Link link{};
    link.rank = rank, link.ranks = settings.ranks;
    link.phase = static_cast<int>(phase), link.timeout = settings.timeout;
    for (int p = 0; p < settings.ranks; ++p) {
      link.controls[p] = &controls[p];
      link.staging[p] = staging[p].get();
    }
    link.parity_bytes = parity_bytes;
    link.report = &reports[rank], link.orders = &orders[rank];
    return link;
  }

  const Settings settings;
  int64_t parity_bytes;
  std::vector<Control> controls;
  std::vector<Report> reports;
  std::vector<Orders> orders;

 private:
  struct Free {
    void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t{128}); }
  };
  std::vector<std::unique_ptr<char[], Free>> staging;
};

// What one rank brings to a call; any rank can draw it alike.
struct Brought {
  std::vector<uint16_t> x;  // [T, H], small integers in bf16, which add up exactly
  std::vector<int64_t> ids;
  std::vector<int32_t> narrow_ids;
  std::vector<char> weights, extra;
  int64_t tokens;
};

inline uint16_t bf16_of(int value) { return Bf16::narrow(static_cast<float>(value)); }

inline Brought bring(const Settings& s, unsigned seed, int call, int rank) {
  std::mt19937 draw(seed * 7919u + static_cast<unsigned>(call) * 131u +
                    static_cast<unsigned>(rank));
  Brought b;
  const unsigned kind = draw() % 6;
  b.tokens = kind == 0   ? 0
             : kind == 1 ? s.max_tokens
                         : static_cast<int64_t>(draw() % (s.max_tokens + 1));
  const unsigned skew = draw() % 4;
  for (int64_t i = 0; i < b.tokens * s.hidden; ++i) {
    b.x.push_back(bf16_of(static_cast<int>(draw() % 15) - 7));
  }
  for (int64_t i = 0; i < b.tokens * s.top_k; ++i) {
    int64_t id = static_cast<int64_t>(draw() % static_cast<unsigned>(s.experts));
    if (skew == 1) id = s.experts - 1;
    if (skew == 2 && draw() % 3 == 0) id = draw() % 2 ? -1 : s.experts;
    if (skew == 3) id = id % 2;
    b.ids.push_back(id);
    b.narrow_ids.push_back(static_cast<int32_t>(id));
  }
  for (int64_t i = 0; i < b.tokens * s.top_k * s.weight_bytes; ++i) {
    b.weights.push_back(static_cast<char>(1 + draw() % 100));
  }
  for (int64_t i = 0; i < b.tokens * s.extra_bytes; ++i) {
    b.extra.push_back(static_cast<char>(draw()));
  }
  return b;
}

// What a dispatch gives a rank. The rows have guards behind them.
struct Got {
  std::vector<uint16_t> x;
  std::vector<int32_t> ids, slot_rows;
  std::vector<char> weights, extra;
  std::vector<int64_t> plan;
};

template <typename T>
char* bytes_of(std::vector<T>& values) {
  return reinterpret_cast<char*>(values.data());
}

// The placement as the device has it.
struct DeviceHomes {
  std::vector<int32_t> begin{0}, rank, local, preferred;
  Homes homes{};

  DeviceHomes(const Placement& placement, bool plain) {
    homes.experts = static_cast<int32_t>(placement.experts());
    homes.most_copies = static_cast<int32_t>(placement.most_copies());
    homes.per_rank = plain ? static_cast<int32_t>(placement.experts_per_rank()) : 0;
    for (int64_t e = 0; e < placement.experts(); ++e) {
      for (const Placement::Home home : placement.homes(e)) {
        rank.push_back(home.rank), local.push_back(home.local);
      }
      begin.push_back(static_cast<int32_t>(rank.size()));
      preferred.push_back(placement.preferred(e));
    }
    homes.begin = begin.data(), homes.rank = rank.data();
    homes.local = local.data(), homes.preferred = preferred.data();
  }
};

}  // namespace emulation
