// Whether tile registers can be used (cpu/amx_tiles.h).
#pragma once

namespace moe {

// Whether the processor has Intel's AMX for bf16 and the system lets this process use it. Asks the
// system, which decides for the whole process.
bool amx_permitted();

// Whether this build emulates its instructions, for tests.
bool amx_emulated();

}  // namespace moe
