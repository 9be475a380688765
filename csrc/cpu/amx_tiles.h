// The tile registers of Intel's AMX, in which many rows are multiplied at the level of that name.
//
// A register holds 16 rows of 64 bytes. Of the first factor that is 16 rows and 32 of k; of the
// second one it is 16 groups of k, each a vector of 16 columns; of the result 16 x 16 sums.
#pragma once

#include "cpu/panels.h"
#include "cpu/tiles.h"

#if defined(CPU_CAPABILITY_AMX) && defined(MOE_AMX_EMULATED)
#include "cpu/amx_emulation.h"
#endif

namespace moe::CPU_CAPABILITY {

// What holds the registers while products of T need them.
template <typename T>
struct TileRegisters {
  TileRegisters() {}
};

#if defined(CPU_CAPABILITY_AMX)

constexpr int64_t kTileRows = 16, kTileK = 32;
constexpr int64_t kTileColumns = 2 * kTileRows;  // rows, or columns, of a product of 2 x 2 tiles
constexpr int64_t kMultiplications = 4;          // of two tiles, for each 32 of k

// What ldtilecfg reads: eight registers of 16 rows of 64 bytes.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

// They are released at the end, also by an exception: code of others that runs on this thread,
// which configures them for itself, never finds them configured by us.
template <>
struct TileRegisters<bf16> {
  TileRegisters() {
    alignas(64) static constexpr TileConfig kConfig;
    _tile_loadconfig(&kConfig);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// One or two tiles of rows times one or two of columns: sums [rows, columns] over 32 * steps of k.
// Of 2 x 2 tiles each register is used twice, and loading one takes half as long as a product.
struct TileProduct {
  const bf16* a;                     // the first tile of rows
  int64_t a_stride, a_step, a_next;  // to its next row, to the next 32 of k, to the second tile
  const bf16* b;                     // vectors of groups
  int64_t b_stride;                  // to the next group, in bytes
  int64_t b_step, b_next;            // to the next 16 groups, to the second tile
  int64_t steps;
  float* out;
  int64_t out_stride;
  bool accumulate;  // add to out
  // Whether the columns pass by while the rows are to stay in a first-level cache: they are loaded
  // with the hint that they are not needed there again (TILELOADDT1).
  bool columns_pass_by = false;
  // If not null: so many lines are read ahead at each multiplication of two tiles, if there are
  // four a step. A burst of them would hold up the loads of tiles.
  const char* prefetch = nullptr;
  int64_t prefetch_lines = 0, prefetch_stride = 0, prefetch_step = 0;

  // Rows of a matrix that are contiguous along k.
  void set_a(const bf16* rows, int64_t stride) {
    a = rows;
    a_stride = stride;
    a_step = kTileK;
    a_next = kTileRows * stride;
  }

  // Lines of rows at p, `stride` apart; those of the next step are `step` further on. `all`
  // products, of which this is number i, fetch 32 together.
  void prefetch_from(const bf16* p, int64_t stride, int64_t step, int64_t i, int64_t all) {
    const int64_t lines = ceil_div(kTileColumns, kMultiplications * all);
    const int64_t first = kMultiplications * lines * i;
    prefetch = first < kTileColumns ? reinterpret_cast<const char*>(p + first * stride) : nullptr;
    prefetch_lines = lines;
    prefetch_stride = stride * sizeof(bf16);
    prefetch_step = step * sizeof(bf16);
  }

  // So many tiles of rows and of columns.
  void run(int64_t rows, int64_t columns) const {
    columns_pass_by ? run_tiles<true>(rows, columns) : run_tiles<false>(rows, columns);
  }

  // The same for so many rows, which may end within a tile.
  void run_rows(int64_t count, int64_t columns) const {
    const int64_t tiles = ceil_div(count, kTileRows), bytes = columns * kTileRows * sizeof(float);
    if (count == tiles * kTileRows) return run(tiles, columns);
    alignas(64) float sums[kTileColumns * kTileColumns];
    if (accumulate) {
      for (int64_t i = 0; i < count; ++i) {
        std::memcpy(sums + i * kTileColumns, out + i * out_stride, bytes);
      }
    }
    TileProduct whole = *this;
    whole.out = sums;
    whole.out_stride = kTileColumns;
    whole.run(tiles, columns);
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(out + i * out_stride, sums + i * kTileColumns, bytes);
    }
  }

 private:
  template <bool stream>
  void run_tiles(int64_t rows, int64_t columns) const {
    if (rows == 1) return columns == 1 ? run_tiles<stream, 1, 1>() : run_tiles<stream, 1, 2>();
    return columns == 1 ? run_tiles<stream, 2, 1>() : run_tiles<stream, 2, 2>();
  }

  // Not inlined, for it needs all registers.
  template <bool stream, int rows, int columns>
  __attribute__((noinline)) void run_tiles() const {
    const bf16 *a0 = a, *a1 = a + a_next, *b0 = b, *b1 = b + b_next;
    const int64_t a_bytes = a_stride * sizeof(bf16), out_bytes = out_stride * sizeof(float);
    const int64_t b_bytes = b_stride, a_step = this->a_step, b_step = this->b_step;
    float *top = out, *below = out + kTileRows * out_stride;
    // Compilers do not know that tiles are loaded from what was written before.
    asm volatile("" ::: "memory");
    if (accumulate) {
      _tile_loadd(0, top, out_bytes);
      if constexpr (columns == 2) _tile_loadd(1, top + kTileRows, out_bytes);
      if constexpr (rows == 2) _tile_loadd(2, below, out_bytes);
      if constexpr (rows == 2 && columns == 2) _tile_loadd(3, below + kTileRows, out_bytes);
    } else {
      _tile_zero(0);
      if constexpr (columns == 2) _tile_zero(1);
      if constexpr (rows == 2) _tile_zero(2);
      if constexpr (rows == 2 && columns == 2) _tile_zero(3);
    }
    const char* ahead = prefetch;
    const int64_t lines = prefetch ? prefetch_lines * kMultiplications / (rows * columns) : 0;
    const int64_t line_stride = prefetch_stride, ahead_step = prefetch_step;
    for (int64_t s = steps; s > 0; --s) {
      const char* line = ahead;
      const auto fetch = [&]() __attribute__((always_inline)) {
        for (int64_t i = 0; i < lines; ++i, line += line_stride) prefetch_line(line);
      };
      if constexpr (stream) {
        _tile_stream_loadd(6, b0, b_bytes);
      } else {
        _tile_loadd(6, b0, b_bytes);
      }
      _tile_loadd(4, a0, a_bytes);
      _tile_dpbf16ps(0, 4, 6);
      fetch();
      if constexpr (columns == 2) {
        if constexpr (stream) {
          _tile_stream_loadd(7, b1, b_bytes);
        } else {
          _tile_loadd(7, b1, b_bytes);
        }
        _tile_dpbf16ps(1, 4, 7);
        fetch();
      }
      if constexpr (rows == 2) {
        _tile_loadd(5, a1, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        fetch();
      }
      if constexpr (rows == 2 && columns == 2) {
        _tile_dpbf16ps(3, 5, 7);
        fetch();
      }
      a0 += a_step;
      a1 += a_step;
      b0 += b_step;
      b1 += b_step;
      ahead += ahead_step;
    }
    _tile_stored(0, top, out_bytes);
    if constexpr (columns == 2) _tile_stored(1, top + kTileRows, out_bytes);
    if constexpr (rows == 2) _tile_stored(2, below, out_bytes);
    if constexpr (rows == 2 && columns == 2) _tile_stored(3, below + kTileRows, out_bytes);
  }
};

// n elements as rows of tiles, one every `step` elements; zeros up to whole ones.
MOE_INLINE void stage_row(bf16* out, const bf16* row, int64_t n,
                          int64_t step = kTileRows * kTileK) {
  int64_t k = 0;
  for (; k + kTileK <= n; k += kTileK, out += step) std::memcpy(out, row + k, 64);
  if (k == n) return;
  std::memcpy(out, row + k, (n - k) * sizeof(bf16));
  std::memset(out + (n - k), 0, (kTileK - (n - k)) * sizeof(bf16));
}

// n <= 32 columns of k <= 32 rows, pairs of which are interleaved: [2, 16, 16, 2], zeros past the
// last row and column. Of each row, what lies `ahead` elements further on is fetched, if not 0.
MOE_INLINE void pack_pairs(bf16* out, const bf16* rows, int64_t stride, int64_t k, int64_t n,
                           int64_t ahead) {
  using V = Groups<bf16>::V;
  const bool whole = k == kTileK && n == kTileColumns;
  const auto mask = static_cast<__mmask32>((uint64_t{1} << n) - 1);
  const auto some = [&](int64_t i, const bf16* row) {
    return i < k ? bit_cast<V>(_mm512_maskz_loadu_epi16(mask, row)) : V{};
  };
  for (int64_t i = 0; i < kTileK; i += 2, rows += 2 * stride, out += kTileK) {
    if (ahead != 0) {
      prefetch_line(rows + ahead);
      prefetch_line(rows + stride + ahead);
    }
    V lower = whole ? load_raw<V>(rows) : some(i, rows);
    V upper = whole ? load_raw<V>(rows + stride) : some(i + 1, rows + stride);
    Groups<bf16>::pair(lower, upper);
    std::memcpy(out, &lower, sizeof(lower));
    std::memcpy(out + kTileRows * kTileK, &upper, sizeof(upper));
  }
}

// Columns of rows [part.begin, part.end) of `row(i)`, i < limit, as rows of tiles:
// [columns / 16, steps, 16, 32], zeros past the last row and column.
template <typename Row>
void pack_transposed(bf16* out, Row row, int64_t limit, Range part, Range columns) {
  const int64_t steps = ceil_div(part.size(), kTileK);
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t first = part.begin + s * kTileK;
    for (int64_t i = first + kTileK; i < min(first + 2 * kTileK, limit); ++i) {
      const bf16* next = row(i) + columns.begin;
      for (int64_t c = 0; c < columns.size(); c += kTileK) prefetch_line(next + c);
    }
    for (int64_t c = 0; c < columns.size(); c += kTileRows) {
      const int64_t width = min(columns.size() - c, kTileRows);
      const auto mask = static_cast<__mmask16>((1u << width) - 1);
      const auto values = [&](int64_t i) {
        if (i >= part.end) return _mm512_setzero_si512();
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row(i) + columns.begin + c));
      };
      Vec<float> groups[kTileRows];
      for (int64_t g = 0; g < kTileRows; ++g) {
        const __m512i second = _mm512_slli_epi32(values(first + 2 * g + 1), 16);
        groups[g] = bit_cast<Vec<float>>(_mm512_or_si512(values(first + 2 * g), second));
      }
      transpose<float>(groups);
      bf16* tile = out + (c / kTileRows * steps + s) * kTileRows * kTileK;
      std::memcpy(tile, groups, sizeof(groups));
    }
  }
}

#endif

}  // namespace moe::CPU_CAPABILITY
