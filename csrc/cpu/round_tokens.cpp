// Every expert's tokens rounded to a multiple of the tile of a grouped GEMM.
//
// T tokens, C columns of which the first K were chosen, R = T * C slots, E experts. Meanings:
// moe_kernels.round_tokens.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "cpu/order.h"

namespace moe {

namespace {

enum class Mode { kNearest, kUp, kDown };

Mode parse_mode(std::string_view name) {
  if (name == "nearest") return Mode::kNearest;
  if (name == "up") return Mode::kUp;
  TORCH_CHECK_VALUE(name == "down", "round_tokens: mode must be nearest, up or down; got ", name);
  return Mode::kDown;
}

int64_t rounded_count(int64_t chosen, int64_t available, int64_t tile, Mode mode) {
  const int64_t rest = chosen % tile, missing = (tile - rest) % tile;
  if (mode == Mode::kUp) return chosen + std::min(missing, available);
  const bool grows = mode == Mode::kNearest && 2 * rest >= tile && missing <= available;
  return grows ? chosen + missing : chosen - rest;
}

template <typename A>
struct Ranked {
  A weight;
  int32_t slot;

  // Heavier first, NaN before all, the lower slot on a tie.
  bool operator<(const Ranked& other) const {
    const bool nan = weight != weight, other_nan = other.weight != other.weight;
    if (nan || other_nan) return nan == other_nan ? slot < other.slot : nan;
    return weight == other.weight ? slot < other.slot : weight > other.weight;
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> round_tokens(
    const at::Tensor& topk_weights, const at::Tensor& topk_ids,
    const std::optional<at::Tensor>& token_mask, int64_t num_experts, int64_t top_k, int64_t tile,
    std::string_view mode_name) {
  const Mode mode = parse_mode(mode_name);
  TORCH_CHECK_VALUE(tile >= 1, "round_tokens: tile must be at least 1; got ", tile);
  TORCH_CHECK_VALUE(topk_weights.sizes() == topk_ids.sizes(),
                    "round_tokens: topk_ids must be shaped as topk_weights");
  const Sorted order = sort_slots("round_tokens", topk_ids, num_experts);
  const at::Tensor weights = topk_weights.contiguous();
  const at::Tensor wide = weights.to(accumulate_dtype(weights.scalar_type()));
  const at::Tensor mask = token_mask ? token_mask->contiguous() : at::Tensor();
  const at::Tensor out_weights = at::zeros(weights.sizes(), weights.options());
  const at::Tensor out_ids = at::full(weights.sizes(), -1, weights.options().dtype(at::kInt));
  const at::Tensor load = at::empty({num_experts}, out_ids.options());
  const int64_t columns = topk_ids.size(1);
  const int32_t* row_to_slot = data<int32_t>(order.row_to_slot_R);
  const int32_t* offsets = data<int32_t>(order.offsets_E1);

  dispatch_float(weights.scalar_type(), "round_tokens", [&]<typename T>() {
    using A = acc_t<T>;
    const T* weight = data<T>(weights);
    parallel_units(num_experts, [&](int64_t expert, int) {
      std::vector<Ranked<A>> chosen, candidates;
      for (int32_t row = offsets[expert]; row < offsets[expert + 1]; ++row) {
        const int32_t slot = row_to_slot[row];
        if (mask.defined() && !data<bool>(mask)[slot / columns]) continue;
        auto& kind = slot % columns < top_k ? chosen : candidates;
        kind.push_back({data<A>(wide)[slot], slot});
      }
      const int64_t count = rounded_count(chosen.size(), candidates.size(), tile, mode);
      const auto keep = [&](std::vector<Ranked<A>>& slots, int64_t number) {
        if (number < static_cast<int64_t>(slots.size())) {
          std::nth_element(slots.begin(), slots.begin() + number, slots.end());
        }
        for (int64_t i = 0; i < number; ++i) {
          const int32_t slot = slots[i].slot;
          mutable_data<int32_t>(out_ids)[slot] = static_cast<int32_t>(expert);
          mutable_data<T>(out_weights)[slot] = weight[slot];
        }
      };
      const int64_t from_chosen = std::min<int64_t>(count, chosen.size());
      keep(chosen, from_chosen);
      keep(candidates, count - from_chosen);
      mutable_data<int32_t>(load)[expert] = static_cast<int32_t>(count);
    });
  });
  return {out_weights, out_ids, load};
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) { m.impl("round_tokens", round_tokens); }

}  // namespace moe
