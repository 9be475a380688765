// Rows times a matrix in the tile registers of cpu/amx_tiles.h, for cpu/gemm_kernels.cpp.
#pragma once

#include "cpu/amx_tiles.h"
#include "cpu/kernels.h"
#include "cpu/panels.h"
#include "cpu/row_packing.h"

#if defined(CPU_CAPABILITY_AMX)

namespace moe::CPU_CAPABILITY {

namespace {

constexpr int64_t kHeldBytes = 1200 << 10;  // what a second-level cache keeps of what passes by

// Packed vectors of rows times columns of a matrix [n, k]: 16 columns are a tile times 16 rows.
// Transposed on the way to out.
void multiply_vectors_in_tiles(const bf16* packed, int64_t rows, int64_t vectors, int64_t k,
                               const MatrixOf<bf16>& b, Range columns, float* out,
                               int64_t out_stride, bool stream, const bf16* after) {
  constexpr int64_t L = kTileRows, G = 2, kTile = kTileRows * kTileK;
  // So much of k of 32 columns stays in a first-level cache while all rows meet it, unless columns
  // are so far apart that their lines fall on each other. Then they are read again anyway, and the
  // longest sums are best: each begins and ends with idle multipliers.
  constexpr int64_t kPart = 256, kSum = 2 * kMaxGroups * G, kAliased = 4096;
  const bool aliased = b.stride_n * sizeof(bf16) % kAliased == 0;
  // Packed rows that are more than a second-level cache holds are met in parts of k, each by so
  // many columns.
  constexpr int64_t kColumns = 512;
  const int64_t width = vectors * L, padded_k = group_count<bf16>(k) * G;
  const int64_t row_bytes = width * sizeof(bf16);
  const bool fit = row_bytes * padded_k <= kHeldBytes;
  const int64_t kept_k = fit ? padded_k : max(kHeldBytes / 3 / row_bytes / kPart, 1) * kPart;
  const int64_t group = fit ? kTileColumns : kColumns;
  const int64_t part_k = min(kept_k, aliased ? kSum : kPart);
  float* result = static_cast<float*>(thread_scratch(
      Scratch::kKernel, group * width * sizeof(float) + kTileColumns * part_k * sizeof(bf16)));
  bf16* stage = reinterpret_cast<bf16*>(result + group * width);

  const TileRegisters<bf16> registers;
  TileProduct product;
  product.b_stride = kTileK * sizeof(bf16);
  product.b_step = vectors * kTile;
  product.b_next = kTile;
  product.out_stride = width;
  product.columns_pass_by = true;
  // 32 columns, or the last ones, of [begin, end) of k.
  const auto multiply = [&](int64_t c, int64_t begin, int64_t end, const bf16* next, float* to) {
    const int64_t count = min(kTileColumns, columns.end - c), tiles = ceil_div(count, L);
    const int64_t n = end - begin;
    const bf16* first = b.data + c * b.stride_n + begin;
    product.steps = ceil_div(n, kTileK);
    product.accumulate = begin > 0;
    if (count != tiles * L || n != product.steps * kTileK) {
      for (int64_t i = 0; i < count; ++i) {
        stage_row(stage + i / L * product.steps * kTile + i % L * kTileK, first + i * b.stride_n,
                  n);
      }
      product.a = stage;
      product.a_stride = kTileK;
      product.a_step = kTile;
      product.a_next = product.steps * kTile;
    } else {
      product.set_a(first, b.stride_n);
    }
    for (int64_t v = 0; v < vectors; v += 2) {
      // All share what is read ahead.
      product.prefetch_from(next, b.stride_n, kTileK, v / 2, ceil_div(vectors, 2));
      product.b = packed + begin * width + v * kTile;
      product.out = to + v * L;
      product.run(tiles, min(vectors - v, 2));
    }
  };
  for (int64_t g = columns.begin; g < columns.end; g += group) {
    const int64_t group_end = min(g + group, columns.end);
    for (int64_t kept = 0; kept < k; kept += kept_k) {
      const int64_t kept_end = min(kept + kept_k, k);
      for (int64_t c = g; c < group_end; c += kTileColumns) {
        for (int64_t begin = kept; begin < kept_end; begin += part_k) {
          const int64_t end = min(begin + part_k, kept_end);
          // The next part of these columns, the first of the next ones, or theirs of the next k.
          const bool ends = c + kTileColumns >= group_end, more = kept_end < k;
          const bf16* next = b.data + c * b.stride_n + end;
          if (end == kept_end) {
            const int64_t next_c = ends && more ? g : c + kTileColumns;
            next = b.data + next_c * b.stride_n + (ends ? (more ? kept_end : 0) : kept);
            if (after && group_end == columns.end && ends && !more) next = after;
          }
          multiply(c, begin, end, next, result + (c - g) * width);
        }
      }
    }
    for (int64_t c = g; c < group_end; c += kTileColumns) {
      store_transposed<float>(result + (c - g) * width, width, min(kTileColumns, group_end - c),
                              rows, out + (c - columns.begin), out_stride, stream);
    }
  }
}

// Columns up to a multiple of two tiles.
constexpr int64_t padded_columns(int64_t n) {
  return (n + kTileColumns - 1) / kTileColumns * kTileColumns;
}

// Packed rows as factors: those of tiles [first, first + 2), or of the last one, from `begin` of k.
inline void set_packed_tiles(TileProduct& product, const bf16* packed, int64_t m, int64_t k,
                             int64_t first, int64_t begin) {
  const int64_t together = min(ceil_div(m, kTileRows) - first, 2);
  product.a = packed + first * kTileRows * ceil_div(k, kTileK) * kTileK;
  product.a += begin * together * kTileRows;
  product.a_stride = kTileK;
  product.a_next = kTileRows * kTileK;
  product.a_step = together * product.a_next;
}

// Rows times a matrix [k, n], which memory gives fastest in whole rows, 32 of them beside each
// other, and while nothing else waits for it: lines on their way take the fill buffers that tiles
// are loaded through. A few tiles of rows meet 32 of k of all columns as they come. For more rows
// that would be too many passes over sums: 256 of k of as many columns as a second-level cache
// holds beside their sums are packed, then meet all rows; or less of k, if all columns fit then.
void multiply_spread_rows_in_tiles(const bf16* packed, int64_t m, int64_t k,
                                   const MatrixOf<bf16>& b, Range columns, float* out,
                                   int64_t out_stride) {
  constexpr int64_t kPanel = 2 * kTileRows * kTileK, kAhead = 128, kFewTiles = 3;
  const int64_t row_tiles = ceil_div(m, kTileRows), all = padded_columns(columns.size());
  const bool few = row_tiles <= kFewTiles;
  const int64_t row_bytes = row_tiles * kTileRows * sizeof(float);
  const auto fitting = [&](int64_t part) {
    return padded_columns(kHeldBytes / (part * static_cast<int64_t>(sizeof(bf16)) + row_bytes));
  };
  int64_t part_k = 256;
  while (part_k > 64 && fitting(part_k) < all) part_k /= 2;
  if (fitting(part_k) < all) part_k = 256;
  if (few) part_k = kTileK;
  const int64_t widest = few ? all : min(fitting(part_k), all);
  const int64_t together = few ? kTileColumns : widest;
  // Sums of the last rows, if they do not fill two tiles.
  const int64_t rest = m % kTileColumns, whole = m - rest, sums_stride = widest + kTileRows;
  const int64_t sums_size = rest == 0 ? 0 : kTileColumns * sums_stride;
  float* sums = static_cast<float*>(thread_scratch(
      Scratch::kKernel, sums_size * sizeof(float) + part_k * together * sizeof(bf16)));
  bf16* panels = reinterpret_cast<bf16*>(sums + sums_size);

  const TileRegisters<bf16> registers;
  TileProduct product;
  product.b_stride = kTileK * sizeof(bf16);
  product.b_step = kPanel;
  product.b_next = kTileRows * kTileK;
  // All rows times columns from c on, packed from `begin` of k on.
  const auto multiply = [&](int64_t c, int64_t column_tiles, int64_t begin, float* rest_sums) {
    for (int64_t r = 0; r < row_tiles; r += 2) {
      const bool last = r * kTileRows >= whole;
      set_packed_tiles(product, packed, m, k, r, begin);
      product.out_stride = last ? sums_stride : out_stride;
      product.out = last ? rest_sums : out + r * kTileRows * out_stride + (c - columns.begin);
      product.run(min(row_tiles - r, 2), column_tiles);
    }
  };
  for (int64_t c = columns.begin; c < columns.end; c += widest) {
    const Range block{c, min(c + widest, columns.end)};
    for (int64_t begin = 0; begin < k; begin += part_k) {
      const int64_t end = min(begin + part_k, k);
      product.steps = ceil_div(end - begin, kTileK);
      product.accumulate = begin > 0;
      for (int64_t g = c; g < block.end; g += together) {
        const int64_t group_end = min(g + together, block.end);
        for (int64_t i = begin; i < end; i += kTileK) {
          bf16* panel = panels + (i - begin) / kTileK * kPanel;
          for (int64_t p = g; p < group_end; p += kTileColumns, panel += product.steps * kPanel) {
            // Past the last column that is where the next rows begin.
            const int64_t past = p + kAhead - block.end;
            const int64_t ahead = past < 0 ? kAhead : kTileK * b.stride_k + past - (p - c);
            pack_pairs(panel, b.data + i * b.stride_k + p, b.stride_k, min(end - i, kTileK),
                       min(group_end - p, kTileColumns), few ? ahead : 0);
          }
        }
        product.b = panels;
        for (int64_t p = g; p < group_end; p += kTileColumns) {
          multiply(p, ceil_div(min(group_end - p, kTileColumns), kTileRows), begin, sums + (p - c));
          product.b += product.steps * kPanel;
        }
      }
    }
    for (int64_t i = 0; i < rest; ++i) {
      std::memcpy(out + (whole + i) * out_stride + (c - columns.begin), sums + i * sums_stride,
                  block.size() * sizeof(float));
    }
  }
}

}  // namespace

}  // namespace moe::CPU_CAPABILITY

#endif
