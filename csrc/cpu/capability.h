// The instruction set that the CPU kernels use.
#pragma once

#include <string>
#include <vector>

namespace moe {

// Names of what this processor and this build have, weakest first: "default", "avx2", "avx512",
// "avx512_bf16", "amx".
std::vector<std::string> cpu_capabilities();

// The one in use: the strongest, or what MOE_KERNELS_CPU_CAPABILITY named when it was first asked
// for.
std::string cpu_capability();

// Uses another one from now on, for tests. Throws ValueError if this processor lacks it.
void set_cpu_capability(const std::string& name);

}  // namespace moe
