#include "cpu/division.h"

#include <algorithm>

namespace moe {

int64_t count_row_blocks(const int32_t* offsets, int64_t experts, int64_t most) {
  int64_t count = 0;
  for (int64_t e = 0; e < experts; ++e) count += (offsets[e + 1] - offsets[e] + most - 1) / most;
  return count;
}

void make_row_blocks(const int32_t* offsets, int64_t experts, int64_t most, RowBlock* blocks) {
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t rows = offsets[e + 1] - offsets[e], parts = (rows + most - 1) / most;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t begin = rows * i / parts, end = rows * (i + 1) / parts;
      *blocks++ = {e, offsets[e] + begin, end - begin};
    }
  }
}

std::vector<RowBlock> row_blocks(const int32_t* offsets, int64_t experts, int64_t most) {
  std::vector<RowBlock> blocks(count_row_blocks(offsets, experts, most));
  make_row_blocks(offsets, experts, most, blocks.data());
  return blocks;
}

void Costs::add(int64_t rows) {
  const int64_t cost = rows + kOfMatrix;
  ++count;
  largest = std::max(largest, cost);
  total += cost;
}

int64_t columns_per_unit(int64_t columns, const Costs& costs, int64_t threads, int64_t most,
                         int64_t least) {
  constexpr int64_t kShare = 3;  // no unit is more than this part of what each thread does
  const int64_t blocks = std::max<int64_t>(costs.count, 1);
  const int64_t total = std::max<int64_t>(costs.total, 1);
  int64_t parts = std::max({(columns + most - 1) / most,
                            (kShare * threads * costs.largest + total - 1) / total, int64_t{1}});
  // Large units are read fastest; but no thread should wait long for the last one.
  while (blocks * parts < 8 * threads && blocks * parts % threads != 0) ++parts;
  return std::max(round_up((columns + parts - 1) / parts, least), least);
}

int64_t columns_per_unit(int64_t columns, std::span<const RowBlock> blocks, int64_t threads,
                         int64_t least) {
  constexpr int64_t kSums = 1 << 18, kMost = 256;
  Costs costs;
  for (const RowBlock& block : blocks) costs.add(block.count);
  const int64_t rows = std::max<int64_t>(costs.largest - Costs::kOfMatrix, 1);
  return columns_per_unit(columns, costs, threads, std::max(kSums / rows, kMost), least);
}

}  // namespace moe
