// For tests on processors without AMX: its instructions on bf16 as functions, in place of the
// intrinsics of the same names. Follows Intel's Software Developer's Manual, volume 2, at
// LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TDPBF16PS and TILERELEASE. What would be a fault
// there ends the process here, and so does what the manual allows and no kernel should do: loading
// a configuration over another one, which somebody has not released.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

namespace moe::amx_emulation {

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

// The state of a thread.
struct Registers {
  Config config = {};
  alignas(64) uint8_t tiles[8][16][64] = {};
};

inline Registers& registers() {
  static thread_local Registers state;
  return state;
}

inline void require(bool holds, const char* instruction, const char* rule) {
  if (holds) return;
  std::fprintf(stderr, "emulated AMX: %s: %s\n", instruction, rule);
  std::abort();
}

inline void load_config(const void* from) {
  constexpr const char* kName = "ldtilecfg";
  Registers& state = registers();
  require(state.config.palette == 0, kName, "the last configuration was not released");
  Config config;
  std::memcpy(&config, from, sizeof(config));
  require(config.palette == 1, kName, "the palette must be 1");
  for (uint8_t byte : config.reserved) require(byte == 0, kName, "reserved bytes must be 0");
  for (int i = 0; i < 16; ++i) {
    const int rows = config.rows[i], bytes = config.row_bytes[i];
    require(i < 8 ? rows <= 16 && bytes <= 64 : rows == 0 && bytes == 0, kName,
            "there are 8 tiles of up to 16 rows of 64 bytes");
    require((rows == 0) == (bytes == 0), kName, "a tile has both rows and bytes, or neither");
  }
  state = {};
  state.config = config;
}

inline void release() { registers() = {}; }

inline Registers& configured(int tile, const char* instruction) {
  Registers& state = registers();
  require(state.config.palette == 1, instruction, "no configuration is loaded");
  require(tile >= 0 && tile < 8 && state.config.rows[tile] > 0, instruction,
          "the tile is not configured");
  return state;
}

inline void zero(int tile) {
  std::memset(configured(tile, "tilezero").tiles[tile], 0, sizeof(Registers::tiles[tile]));
}

inline void load(int tile, const void* base, int64_t stride) {
  Registers& state = configured(tile, "tileloadd");
  zero(tile);
  for (int r = 0; r < state.config.rows[tile]; ++r) {
    std::memcpy(state.tiles[tile][r], static_cast<const char*>(base) + r * stride,
                state.config.row_bytes[tile]);
  }
}

inline void store(int tile, void* base, int64_t stride) {
  const Registers& state = configured(tile, "tilestored");
  for (int r = 0; r < state.config.rows[tile]; ++r) {
    std::memcpy(static_cast<char*>(base) + r * stride, state.tiles[tile][r],
                state.config.row_bytes[tile]);
  }
}

// A row of sums: the products of the even and of the odd values of k are each summed in order, from
// zero and fused; the two sums are added, and then to what was there. It runs with MXCSR as below.
__attribute__((noinline)) inline void multiply_row(uint8_t* sums, const uint8_t* row,
                                                   const uint8_t (*columns)[64], int groups) {
  __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
  for (int k = 0; k < groups; ++k) {
    uint32_t pair;
    std::memcpy(&pair, row + 4 * k, sizeof(pair));
    const __m512i pairs = _mm512_loadu_si512(columns[k]);
    const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
    even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int32_t>(pair << 16))),
                           _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), even);
    odd = _mm512_fmadd_ps(
        _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int32_t>(pair & 0xffff0000u))),
        _mm512_castsi512_ps(_mm512_and_si512(pairs, high)), odd);
  }
  _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), _mm512_add_ps(even, odd)));
}

inline void multiply(int sums, int rows, int columns) {
  constexpr const char* kName = "tdpbf16ps";
  Registers& state = configured(sums, kName);
  configured(rows, kName);
  configured(columns, kName);
  const Config& config = state.config;
  require(sums != rows && sums != columns && rows != columns, kName, "three tiles are needed");
  require(config.row_bytes[sums] % 4 == 0 && config.row_bytes[rows] % 4 == 0 &&
              config.row_bytes[columns] % 4 == 0,
          kName, "rows must be whole pairs");
  require(config.rows[sums] == config.rows[rows] &&
              config.row_bytes[rows] / 4 == config.rows[columns] &&
              config.row_bytes[sums] == config.row_bytes[columns],
          kName, "the sizes do not fit");
  // To nearest, denormals read and written as zeros, no exceptions, whatever MXCSR says.
  const unsigned control = _mm_getcsr();
  _mm_setcsr(0x1f80 | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
  for (int r = 0; r < config.rows[sums]; ++r) {
    asm volatile("" ::: "memory");
    multiply_row(state.tiles[sums][r], state.tiles[rows][r], state.tiles[columns],
                 config.rows[columns]);
    asm volatile("" ::: "memory");
    std::memset(state.tiles[sums][r] + config.row_bytes[sums], 0, 64 - config.row_bytes[sums]);
  }
  _mm_setcsr(control);
}

}  // namespace moe::amx_emulation

#define _tile_loadconfig(from) moe::amx_emulation::load_config(from)
#define _tile_release() moe::amx_emulation::release()
#define _tile_zero(tile) moe::amx_emulation::zero(tile)
#define _tile_loadd(tile, base, stride) moe::amx_emulation::load(tile, base, stride)
#define _tile_stream_loadd(tile, base, stride) moe::amx_emulation::load(tile, base, stride)
#define _tile_stored(tile, base, stride) moe::amx_emulation::store(tile, base, stride)
#define _tile_dpbf16ps(sums, rows, columns) moe::amx_emulation::multiply(sums, rows, columns)
