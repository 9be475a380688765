// How products of row groups with their experts' matrices are divided into units of work.
//
// A unit is a block of rows times some columns of the matrix; threads take units in order as they
// become free. Results do not depend on the division.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cpu/types.h"

namespace moe {

// Consecutive rows of one expert that are packed and multiplied together.
struct RowBlock {
  int64_t expert, begin, count;
};

// The rows of each expert in blocks as even as possible, of `most` at most; none for an expert
// without rows. Into memory for count_row_blocks of them, or in memory of their own.
int64_t count_row_blocks(const int32_t* offsets, int64_t experts, int64_t most);
void make_row_blocks(const int32_t* offsets, int64_t experts, int64_t most, RowBlock* blocks);
std::vector<RowBlock> row_blocks(const int32_t* offsets, int64_t experts, int64_t most);

// What the rows that meet one matrix cost, for all matrices. In rows: reading or writing a matrix
// takes about as long as multiplying it with kOfMatrix of them.
struct Costs {
  static constexpr int64_t kOfMatrix = 16;

  int64_t count = 0, largest = 0, total = 0;

  void add(int64_t rows);
};

// Columns of a unit, a multiple of `least`: at most `most`, and less where a thread would wait long
// for the last unit, be it that there are few of them or that most rows are in one of them.
int64_t columns_per_unit(int64_t columns, const Costs& costs, int64_t threads, int64_t most,
                         int64_t least);

// The same for products: whole rows of a matrix, which is how memory gives it fastest, if the sums
// of a block still fit a cache.
int64_t columns_per_unit(int64_t columns, std::span<const RowBlock> blocks, int64_t threads,
                         int64_t least);

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace moe
