#include "cpu/amx.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moe {

#if defined(MOE_AMX_EMULATED)
bool amx_permitted() { return true; }
bool amx_emulated() { return true; }
#else
bool amx_permitted() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kFeatures = 7, kBf16 = 1u << 22, kTile = 1u << 24;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(kFeatures, 0, &a, &b, &c, &d)) return false;
  if (!(d & kBf16) || !(d & kTile)) return false;
  // Linux saves registers this large only for a process that has asked: arch_prctl(2).
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool amx_emulated() { return false; }
#endif

}  // namespace moe
