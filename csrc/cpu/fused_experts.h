// What the forward and the backward of fused_experts share.
//
// T tokens, K experts a token, R rows that belong to an expert, H hidden size, I intermediate size,
// E experts, W = 2 * I columns for gated activations, else I.
#pragma once

#include <optional>
#include <span>

#include "cpu/expert_activation.h"
#include "cpu/grouped.h"
#include "cpu/order.h"

namespace moe {

// Those of an order, for the time of one call.
class RowBlocks : public LocalArray<RowBlock> {
 public:
  RowBlocks(const OrderView& order, int64_t most)
      : LocalArray(count_row_blocks(order.offsets, order.experts, most)) {
    make_row_blocks(order.offsets, order.experts, most, data());
  }
};

// Packed rows of every block, [block][count, k], filled piece by piece.
template <typename T>
class PackedBlocks {
 public:
  PackedBlocks(std::span<const RowBlock> blocks, bool k_contiguous, int64_t k);

  // Stores elements `part` of the block's rows, from a multiple of kPackedTogether on: row i of it
  // lies at first + i * stride.
  void store(int64_t block, const T* first, int64_t stride, Range part);

  const void* get(int64_t block) const { return address(block); }

 private:
  char* address(int64_t block) const { return memory_.data() + begins_[block]; }
  int64_t lay_out() const;  // sets begins_; bytes of all blocks

  std::span<const RowBlock> blocks_;
  bool k_contiguous_;
  int64_t k_;
  LocalArray<int64_t> begins_;
  LocalArray<char> memory_;
};

// y[t] = sum over k, in order, of weights[t, k] * (row[slot_to_row[t, k]] @ b[e] + bias[e]), the
// last step of both directions. Rows past `used` add nothing; without weights they are ones.
template <typename T>
struct Combine {
  using A = acc_t<T>;

  std::span<const RowBlock> blocks;
  const PackedBlocks<T>& rows;
  const Weights& b;            // [E, k, H]
  const T* bias;               // [E, H] or null
  const int32_t* slot_to_row;  // [T, K]
  const A* topk_weights;       // [T, K] or null
  int64_t tokens, top_k, used;

  void run(T* y) const;  // [T, H]

  // Some columns of the products of all rows, [used, stride]; and those of y.
  void multiply(Range columns, A* products, int64_t stride) const;
  void sum(Range columns, const A* products, int64_t stride, T* y) const;
};

// The layer without x and routing.
struct Layer {
  Weights gate_up, down;
  at::Tensor gate_up_bias, down_bias;  // contiguous, or undefined
  ActivationOptions activation;
  bool interleaved;

  int64_t inner() const { return down.inner(); }
  int64_t width() const { return gate_up.columns(); }
};

template <typename T>
const T* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? data<T>(tensor) : nullptr;
}

inline at::Tensor contiguous_or_undefined(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->contiguous() : at::Tensor();
}

// Routing weights [T, K] as sums of T have them: where they lie, or copied.
template <typename A>
class RoutingWeights {
 public:
  explicit RoutingWeights(const at::Tensor& topk_weights);

  const A* data() const { return data_; }

 private:
  static bool is_as_wanted(const at::Tensor& weights) {
    return weights.scalar_type() == scalar_type<A>() && weights.is_contiguous();
  }

  LocalArray<A> copy_;
  const A* data_;
};

// y [T, H], and h [R, W] unless it is null.
template <typename T>
void run_layer(const Layer& layer, const at::Tensor& x, const OrderView& order,
               const acc_t<T>* topk_weights, T* y, T* h);

// run(x, order, topk_weights, y) where nothing is kept for backward: of so many tokens together
// that their rows do not fill memory.
template <typename T, typename Run>
void run_in_parts(const char* op, const at::Tensor& x, const OrderView& whole,
                  const at::Tensor& topk_ids, const at::Tensor& topk_weights, const at::Tensor& y,
                  const Run& run) {
  const int64_t slots = std::max<int64_t>(32768, 256 * whole.experts);
  const int64_t step = std::max<int64_t>(slots / std::max<int64_t>(whole.top_k, 1), 1);
  const RoutingWeights<acc_t<T>> weights(topk_weights);
  T* const out = mutable_data<T>(y);
  if (whole.tokens <= step) return run(x, whole, weights.data(), out);
  for (int64_t t = 0; t < whole.tokens; t += step) {
    const int64_t n = std::min(step, whole.tokens - t);
    const LocalOrder order(op, topk_ids.narrow(0, t, n), whole.experts);
    run(x.narrow(0, t, n), order.view(), weights.data() + t * whole.top_k, out + t * y.size(1));
  }
}

}  // namespace moe
