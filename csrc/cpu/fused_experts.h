// What the forward and the backward of fused_experts share.
//
// T tokens, K experts a token, R rows that belong to an expert, H hidden size, I intermediate size,
// E experts, W = 2 * I columns for gated activations, else I.
#pragma once

#include <vector>

#include "cpu/expert_activation.h"
#include "cpu/grouped.h"

namespace moe {

// Packed rows of every block, [block][count, k], filled piece by piece.
template <typename T>
class PackedBlocks {
 public:
  PackedBlocks(const std::vector<RowBlock>& blocks, bool k_contiguous, int64_t k);

  // Stores elements `part` (an even begin) of the block's rows: row i of it lies at
  // first + i * stride.
  void store(int64_t block, const T* first, int64_t stride, Range part);

  const void* get(int64_t block) const { return address(block); }

 private:
  char* address(int64_t block) const { return mutable_data<char>(memory_) + begins_[block]; }

  const std::vector<RowBlock>& blocks_;
  bool k_contiguous_;
  int64_t k_;
  std::vector<int64_t> begins_;
  at::Tensor memory_;
};

// y[t] = sum over k, in order, of weights[t, k] * (row[slot_to_row[t, k]] @ b[e] + bias[e]), the
// last step of both directions. Rows past `used` add nothing; without weights they are ones.
template <typename T>
struct Combine {
  const std::vector<RowBlock>& blocks;
  const PackedBlocks<T>& rows;
  const Weights& b;              // [E, k, H]
  const T* bias;                 // [E, H] or null
  const int32_t* slot_to_row;    // [T, K]
  const acc_t<T>* topk_weights;  // [T, K] or null
  int64_t tokens, top_k, used;

  void run(T* y) const;  // [T, H]
};

}  // namespace moe
