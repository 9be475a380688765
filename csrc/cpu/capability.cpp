#include "cpu/capability.h"

#include <c10/util/Exception.h>

#include <atomic>
#include <cstdlib>

#include "cpu/amx.h"
#include "cpu/kernel_table.h"

namespace moe {

namespace {

struct Level {
  const char* name;
  KernelTable table;
};

#define MOE_FILL(CAPABILITY)                                                 \
  [](KernelTable& table) {                                                   \
    std::apply([](auto&... part) { (CAPABILITY::fill(part), ...); }, table); \
  }

// Those of this processor, weakest first.
std::vector<Level> make_levels() {
  std::vector<Level> levels;
  // What fills a table is compiled for its instructions, too: processors without them stop there.
  const auto add = [&](const char* name, bool supported, auto fill) {
    if (!supported) return;
    levels.push_back({name, {}});
    fill(levels.back().table);
  };
  add("default", true, MOE_FILL(DEFAULT));
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  add("avx2", avx2, MOE_FILL(AVX2));
  add("avx512", avx512, MOE_FILL(AVX512));
  // Every processor with the one has the other.
  const bool avx512_bf16 =
      avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  add("avx512_bf16", avx512_bf16, MOE_FILL(AVX512_BF16));
  // The same but for products of bf16.
  add("amx", avx512_bf16 && amx_permitted(), [](KernelTable& table) {
    MOE_FILL(AVX512_BF16)(table);
    AMX::fill(std::get<GemmKernels<bf16>>(table));
    AMX::fill(std::get<WeightGradKernels<bf16>>(table));
  });
#endif
  return levels;
}

const std::vector<Level>& levels() {
  static const std::vector<Level> all = make_levels();
  return all;
}

const Level& find(const std::string& name, const char* source) {
  std::string known;
  for (const Level& level : levels()) {
    if (level.name == name) return level;
    known += known.empty() ? level.name : std::string(", ") + level.name;
  }
  TORCH_CHECK_VALUE(false, source, " must be one of ", known, " on this processor; got \"", name,
                    "\"");
}

const Level& initial_level() {
  if (const char* name = std::getenv("MOE_KERNELS_CPU_CAPABILITY")) {
    return find(name, "MOE_KERNELS_CPU_CAPABILITY");
  }
  return levels().back();
}

std::atomic<const Level*>& current() {
  static std::atomic<const Level*> level{&initial_level()};
  return level;
}

}  // namespace

const KernelTable& kernel_table() { return current().load(std::memory_order_relaxed)->table; }

std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> names;
  for (const Level& level : levels()) names.emplace_back(level.name);
  return names;
}

std::string cpu_capability() { return current().load()->name; }

void set_cpu_capability(const std::string& name) {
  current().store(&find(name, "set_cpu_capability: name"));
}

}  // namespace moe
