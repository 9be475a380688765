// Rows times a matrix in the tile registers of cpu/amx_tiles.h, for cpu/gemm_kernels.cpp.
#pragma once

#include "cpu/amx_tiles.h"
#include "cpu/kernels.h"
#include "cpu/panels.h"
#include "cpu/row_packing.h"

#if defined(CPU_CAPABILITY_AMX)

namespace moe::CPU_CAPABILITY {

namespace {

// Packed vectors of rows times columns of a matrix [n, k]: 16 columns are a tile times 16 rows.
// Transposed on the way to out.
void multiply_vectors_in_tiles(const bf16* packed, int64_t rows, int64_t vectors, int64_t k,
                               const MatrixOf<bf16>& b, Range columns, float* out,
                               int64_t out_stride, bool stream) {
  constexpr int64_t L = kTileRows, G = 2, kTile = kTileRows * kTileK;
  // From so many vectors on it pays to copy some of k of the columns to where they stay in a
  // first-level cache. Columns are a power of two apart as a rule: where they lie they cannot.
  constexpr int64_t kManyVectors = 6, kStaged = 256;
  constexpr int64_t kSum = 2 * kMaxGroups * G;  // each pass begins and ends with idle multipliers
  // Packed rows that are more than a second-level cache holds are met in parts of k, each by so
  // many columns.
  constexpr int64_t kPackedBytes = 1200 << 10, kColumns = 512;
  const int64_t width = vectors * L, padded_k = group_count<bf16>(k) * G;
  const int64_t row_bytes = width * sizeof(bf16);
  const bool fit = row_bytes * padded_k <= kPackedBytes;
  const int64_t kept_k = fit ? padded_k : max(kPackedBytes / 3 / row_bytes / kStaged, 1) * kStaged;
  const int64_t group = fit ? kTileColumns : kColumns;
  const bool many = vectors >= kManyVectors;
  const int64_t part_k = min(kept_k, many ? kStaged : kSum);
  float* result = static_cast<float*>(thread_scratch(
      Scratch::kKernel, group * width * sizeof(float) + kTileColumns * part_k * sizeof(bf16)));
  bf16* stage = reinterpret_cast<bf16*>(result + group * width);

  const TileRegisters<bf16> registers;
  TileProduct product;
  product.b_stride = kTileK * sizeof(bf16);
  product.b_step = vectors * kTile;
  product.b_next = kTile;
  product.out_stride = width;
  // 32 columns, or the last ones, of [begin, end) of k.
  const auto multiply = [&](int64_t c, int64_t begin, int64_t end, const bf16* next, float* to) {
    const int64_t count = min(kTileColumns, columns.end - c), tiles = ceil_div(count, L);
    const int64_t n = end - begin;
    const bf16* first = b.data + c * b.stride_n + begin;
    product.steps = ceil_div(n, kTileK);
    product.accumulate = begin > 0;
    if (many || count != tiles * L || n != product.steps * kTileK) {
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

// Rows of a matrix [k, n], columns of each, that products fetch ahead: each a few lines of some
// rows, one after the other of each, as the processor foresees it.
struct AheadInTiles {
  static constexpr int64_t kLine = 64 / sizeof(bf16);

  const MatrixOf<bf16>& b;
  Range rows, columns;
  int64_t lines, rows_together = 0, lines_together = 0, done = 0;

  AheadInTiles(const MatrixOf<bf16>& b, Range rows, Range columns)
      : b(b), rows(rows), columns(columns), lines(ceil_div(columns.size(), kLine)) {}

  void fetch_all() const {
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      for (int64_t c = columns.begin; c < columns.end; c += kLine) {
        prefetch_line(b.data + i * b.stride_k + c);
      }
    }
  }

  // Among so many products.
  void share(TileProduct& product, int64_t products) {
    lines_together = product.steps;
    const int64_t parts = ceil_div(lines, lines_together) * rows.size();
    product.prefetch_lines = ceil_div(parts, products * kMultiplications);
    product.prefetch_stride = b.stride_k * sizeof(bf16);
    product.prefetch_step = kLine * sizeof(bf16);
    rows_together = product.prefetch_lines * kMultiplications;
  }

  // Where the next product begins, or null if all are fetched.
  const char* next() {
    if (lines == 0 || rows_together == 0) return nullptr;
    const int64_t parts = ceil_div(lines, lines_together), i = done++;
    const int64_t row = rows.begin + i / parts * rows_together;
    if (row >= rows.end) return nullptr;
    const bf16* first = b.data + row * b.stride_k + columns.begin;
    return reinterpret_cast<const char*>(first + i % parts * lines_together * kLine);
  }
};

// Rows times a matrix [k, n]: 32 columns of some of k are packed to where they stay in a
// first-level cache, and meet all rows. What follows of the matrix is fetched meanwhile, more
// columns of each of its rows: memory gives 32 of them too slowly.
void multiply_spread_rows_in_tiles(const bf16* packed, int64_t m, int64_t k,
                                   const MatrixOf<bf16>& b, Range columns, float* out,
                                   int64_t out_stride) {
  constexpr int64_t kTile = kTileRows * kTileK;
  // Few rows wait for memory, which gives whole rows of a matrix fastest; of more, passes over sums
  // are what takes the time.
  const int64_t part_k = m <= 160 ? 64 : 256;
  const int64_t widest = kCacheBytes / (part_k * sizeof(bf16)) / kTileColumns * kTileColumns;
  const int64_t row_size = padded<bf16>(k), row_tiles = ceil_div(m, kTileColumns);
  bf16* panel =
      static_cast<bf16*>(thread_scratch(Scratch::kKernel, kTileColumns * part_k * sizeof(bf16)));

  const TileRegisters<bf16> registers;
  TileProduct product;
  product.b = panel;
  product.b_stride = kTileK * sizeof(bf16);
  product.b_step = kTile;
  product.out_stride = out_stride;
  for (int64_t c = columns.begin; c < columns.end; c += widest) {
    const Range block{c, min(c + widest, columns.end)};
    for (int64_t begin = 0; begin < k; begin += part_k) {
      const Range part{begin, min(begin + part_k, k)};
      product.steps = ceil_div(part.size(), kTileK);
      product.b_next = product.steps * kTile;
      product.accumulate = begin > 0;
      if (begin == 0 && c == columns.begin) AheadInTiles(b, part, block).fetch_all();
      const Range next_block{block.end, min(block.end + widest, columns.end)};
      AheadInTiles ahead = part.end < k
                               ? AheadInTiles(b, {part.end, min(part.end + part_k, k)}, block)
                               : AheadInTiles(b, {0, min(part_k, k)}, next_block);
      ahead.share(product, ceil_div(block.size(), kTileColumns) * row_tiles);
      for (int64_t p = c; p < block.end; p += kTileColumns) {
        const int64_t n = min(block.end - p, kTileColumns);
        pack_pairs(panel, b.data + begin * b.stride_k + p, b.stride_k, part.size(), n);
        for (int64_t r = 0; r < m; r += kTileColumns) {
          product.set_a(packed + r * row_size + begin, row_size);
          product.prefetch = ahead.next();
          product.out = out + r * out_stride + (p - columns.begin);
          product.run_rows(min(m - r, kTileColumns), ceil_div(n, kTileRows));
        }
      }
    }
  }
}

}  // namespace

}  // namespace moe::CPU_CAPABILITY

#endif
