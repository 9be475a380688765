// How work is divided into units (cpu/division.h), for few and many threads and routings of every
// kind: each row of each expert meets each column once, and threads that take units in order as
// they become free are done about as soon as if all of them had worked all the time.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "cpu/division.h"

namespace moe {
namespace {

int64_t checked = 0;

struct Case {
  std::string name;
  int64_t threads, columns;

  void require(bool holds, const char* what, double found, double wanted) const {
    ++checked;
    if (holds) return;
    std::printf("%s, %ld columns, %ld threads: %s is %g, not %g\n", name.c_str(), columns, threads,
                what, found, wanted);
    std::exit(1);
  }
};

// When the last of so many threads is done, where each takes the next unit as it becomes free.
double finish(const std::vector<double>& units, int64_t threads) {
  std::vector<double> busy(threads, 0);
  for (double unit : units) *std::min_element(busy.begin(), busy.end()) += unit;
  return *std::max_element(busy.begin(), busy.end());
}

// A unit may be a third of a thread's work, and no less than `least` columns of the largest block.
void check_balance(const Case& of, const std::vector<int64_t>& rows, int64_t step, int64_t least) {
  std::vector<double> units;
  double total = 0, largest = 0;
  for (int64_t count : rows) {
    const double cost = count + Costs::kOfMatrix;
    int64_t covered = 0;
    for (int64_t begin = 0; begin < of.columns; begin += step) {
      const int64_t n = std::min(step, of.columns - begin);
      covered += n;
      units.push_back(cost * n);
      total += cost * n;
    }
    of.require(covered == of.columns, "the number of columns", covered, of.columns);
    largest = std::max(largest, cost);
  }
  const double allowed = total / of.threads * 4 / 3 + largest * least;
  const double found = finish(units, of.threads);
  of.require(found <= allowed, "the time of all threads", found, allowed);
}

void check(const std::string& name, const std::vector<int64_t>& counts, int64_t most_rows) {
  std::vector<int32_t> offsets{0};
  for (int64_t count : counts) offsets.push_back(offsets.back() + static_cast<int32_t>(count));
  const int64_t experts = counts.size();
  const std::vector<RowBlock> blocks = row_blocks(offsets.data(), experts, most_rows);

  // Blocks are the rows of all experts, in order.
  const Case no_columns{name, 0, 0};
  int64_t row = 0;
  std::vector<int64_t> rows;
  for (const RowBlock& block : blocks) {
    no_columns.require(block.begin == row, "where a block begins", block.begin, row);
    no_columns.require(block.count > 0 && block.count <= most_rows, "the size of a block",
                       block.count, most_rows);
    no_columns.require(
        block.begin >= offsets[block.expert] && row + block.count <= offsets[block.expert + 1],
        "the expert of a block", block.expert, -1);
    row += block.count;
    rows.push_back(block.count);
  }
  no_columns.require(row == offsets.back(), "the number of rows", row, offsets.back());

  Costs of_experts;
  for (int64_t count : counts) of_experts.add(count);
  for (int64_t threads : {1, 2, 3, 7, 64, 192}) {
    for (int64_t columns : {0, 1, 33, 768, 2048, 2880, 14336}) {
      const Case of{name, threads, columns};
      for (int64_t least : {32, 128}) {
        const int64_t step = columns_per_unit(columns, blocks, threads, least);
        of.require(step >= least && step % least == 0, "the columns of a unit", step, least);
        check_balance(of, rows, step, least);
      }
      constexpr int64_t kLeast = 32;
      for (int64_t most : {256, 384}) {  // as gradients of biases and of weights
        const int64_t step = columns_per_unit(columns, of_experts, threads, most, kLeast);
        of.require(step >= kLeast && step <= most && step % kLeast == 0, "the columns of a unit",
                   step, most);
        check_balance(of, counts, step, kLeast);
      }
    }
  }
}

void check_all(int64_t most_rows) {
  check("no row", {0, 0, 0}, most_rows);
  for (int64_t rows : {1, 8, 32, 191, 192, 193, 385, 1024, 100'000}) {
    const std::string number = std::to_string(rows);
    check("one expert with " + number + " rows", {rows}, most_rows);
    for (int64_t last : {0, 511}) {
      std::vector<int64_t> counts(512, 0);
      counts[last] = rows;
      check("one of 512 experts with " + number + " rows", counts, most_rows);
    }
    for (int64_t others : {1, 5, 6, 7, 20, 100}) {
      std::vector<int64_t> counts(1 + others, 1);
      counts.back() = rows;
      check(number + " rows and " + std::to_string(others) + " experts with one", counts,
            most_rows);
    }
  }
  std::vector<int64_t> even(128, 8), falling;
  for (int64_t e = 0; e < 128; ++e) falling.push_back(4096 / (e + 1));
  check("even", even, most_rows);
  check("falling", falling, most_rows);
  std::reverse(falling.begin(), falling.end());
  check("rising", falling, most_rows);
}

int run() {
  for (int64_t most_rows : {int64_t{128}, kRowsPerBlock, kMostRows}) check_all(most_rows);
  std::printf("%ld properties hold\n", checked);
  return 0;
}

}  // namespace
}  // namespace moe

int main() { return moe::run(); }
