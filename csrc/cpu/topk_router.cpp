// Scores, selection, routing weights and load of a router, a token at a time.
//
// T tokens, K experts a token, E experts, G groups of E / G experts. Meanings:
// moe_kernels.topk_router.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/dtypes.h"
#include "common/parallel.h"
#include "cpu/kernel_table.h"
#include "cpu/local_array.h"

namespace moe {

namespace {

constexpr double kEpsilon = 1e-20;  // added to the sums that weights and scores are divided by

ScoreFunc parse_score_func(std::string_view name) {
  if (name == "softmax") return ScoreFunc::kSoftmax;
  if (name == "sigmoid") return ScoreFunc::kSigmoid;
  TORCH_CHECK_VALUE(name == "sqrtsoftplus",
                    "topk_router: score_func must be softmax, sigmoid or sqrtsoftplus; got ", name);
  return ScoreFunc::kSqrtSoftplus;
}

template <typename A>
A sum(const A* values, int64_t n) {
  A total = 0;
  for (int64_t i = 0; i < n; ++i) total += values[i];
  return total;
}

// Through values / (sum of the first n + epsilon), in place on grad.
template <typename A>
void normalize_backward(A* grad, const A* values, int64_t n, int64_t all) {
  A product = 0;
  for (int64_t i = 0; i < all; ++i) product += grad[i] * values[i];
  const A total = sum(values, n) + A(kEpsilon);
  for (int64_t i = 0; i < n; ++i) grad[i] = (grad[i] - product / total) / total;
  for (int64_t i = n; i < all; ++i) grad[i] /= total;
}

// Softmax over the first n logits, in place; the others on the same scale.
template <typename A>
void softmax_over_first(const ScoreKernels<A>& functions, A* values, int64_t n, int64_t all) {
  if (n < all) {
    const A top = *std::max_element(values, values + n);
    A total = 0;
    for (int64_t i = 0; i < n; ++i) total += std::exp(values[i] - top);
    for (int64_t i = n; i < all; ++i) values[i] = std::exp(values[i] - top) / total;
  }
  functions.scores(ScoreFunc::kSoftmax, values, values, n);
}

struct Groups {
  int64_t count, kept;
  bool top2;
  double fill;
};

// Chooses experts for one token after another, with its scratch space.
template <typename A>
class Selector {
 public:
  Selector(const ScoreKernels<A>& functions, int64_t experts, int64_t top_k, Groups groups)
      : functions_(functions),
        experts_(experts),
        top_k_(top_k),
        groups_(groups),
        group_ids_(groups.count),
        group_scores_(groups.count),
        keys_(experts + kMostLanes) {}

  // Leaves the ids of the K largest of choice [E] in ids. Overwrites the choices of groups that
  // lose.
  void select(A* choice, int32_t* ids) {
    if (groups_.count > 1) drop_groups(choice);
    take_best(ids, top_k_, choice, experts_);
  }

 private:
  void take_best(int32_t* ids, int64_t k, const A* values, int64_t n) const {
    functions_.largest(ids, k, values, n, keys_.data());
  }

  void drop_groups(A* choice) {
    const int64_t size = experts_ / groups_.count, taken = groups_.top2 && size > 1 ? 2 : 1;
    for (int64_t g = 0; g < groups_.count; ++g) {
      const A* member = choice + g * size;
      int32_t best[2];
      take_best(best, taken, member, size);
      group_scores_[g] = member[best[0]] + (taken == 2 ? member[best[1]] : A(0));
    }
    take_best(group_ids_.data(), groups_.count, group_scores_.data(), groups_.count);
    for (int64_t i = groups_.kept; i < groups_.count; ++i) {
      std::fill_n(choice + group_ids_[i] * size, size, static_cast<A>(groups_.fill));
    }
  }

  const ScoreKernels<A>& functions_;
  int64_t experts_, top_k_;
  Groups groups_;
  LocalArray<int32_t> group_ids_;
  LocalArray<A> group_scores_, keys_;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> topk_router(
    const at::Tensor& logits_TE, int64_t top_k, std::string_view score_func,
    bool softmax_before_topk, bool renormalize, const std::optional<at::Tensor>& correction_bias,
    int64_t num_groups, int64_t topk_groups, std::string_view group_score, double group_fill,
    double route_scale, const std::optional<at::Tensor>& token_mask,
    const std::optional<at::Tensor>& given_ids, bool return_scores, int64_t candidates) {
  const ScoreFunc func = parse_score_func(score_func);
  const bool after_topk = func == ScoreFunc::kSoftmax && !softmax_before_topk;
  const int64_t tokens = logits_TE.size(0), experts = logits_TE.size(1);
  TORCH_CHECK_VALUE(top_k >= 0 && top_k <= experts,
                    "topk_router: top_k must be in [0, E = ", experts, "]; got ", top_k);
  TORCH_CHECK_VALUE(candidates >= 0 && candidates <= experts - top_k,
                    "topk_router: candidates must be in [0, E - top_k = ", experts - top_k,
                    "]; got ", candidates);
  const int64_t columns = top_k + candidates;
  TORCH_CHECK_VALUE(num_groups >= 1 && experts % num_groups == 0,
                    "topk_router: num_groups must be at least 1 and divide E = ", experts, "; got ",
                    num_groups);
  TORCH_CHECK_VALUE(topk_groups >= 1 && topk_groups <= num_groups,
                    "topk_router: topk_groups must be in [1, num_groups = ", num_groups, "]; got ",
                    topk_groups);
  const at::ScalarType wide = accumulate_dtype(logits_TE.scalar_type());
  const auto options = logits_TE.options();
  const at::Tensor logits = with_unit_stride(logits_TE);
  const at::Tensor given = given_ids ? given_ids->to(at::kLong).contiguous() : at::Tensor();
  const at::Tensor bias = correction_bias ? correction_bias->to(wide).contiguous() : at::Tensor();
  const at::Tensor mask = token_mask ? token_mask->contiguous() : at::Tensor();
  if (given.defined()) {
    const int64_t* id = data<int64_t>(given);
    for (int64_t i = 0; i < given.numel(); ++i) {
      TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < experts,
                        "topk_router: given_ids must be in [0, E = ", experts, "); got ", id[i]);
    }
  }
  const at::Tensor weights = at::empty({tokens, columns}, options.dtype(wide));
  const at::Tensor ids = at::empty({tokens, columns}, options.dtype(at::kInt));
  const at::Tensor scores = at::empty({return_scores ? tokens : 0, experts}, options.dtype(wide));
  const at::Tensor load = at::zeros({experts}, options.dtype(at::kInt));
  const Groups groups{num_groups, topk_groups, group_score == "top2", group_fill};

  dispatch_float(logits.scalar_type(), "topk_router", [&]<typename T>() {
    using A = acc_t<T>;
    const auto& rows = kernels<RowKernels<T>>();
    const auto& functions = kernels<ScoreKernels<A>>();
    const A scale = static_cast<A>(route_scale);
    parallel_rows(tokens, 4 * experts * sizeof(A), [&](int64_t begin, int64_t end) {
      Selector<A> selector(functions, experts, columns, groups);
      const LocalArray<A> raw(experts), score(experts), choice(experts);
      for (int64_t t = begin; t < end; ++t) {
        rows.widen(raw.data(), data<T>(logits) + t * logits.stride(0), experts);
        if (!after_topk || return_scores) {
          functions.scores(func, score.data(), raw.data(), experts);
        }
        int32_t* id = mutable_data<int32_t>(ids) + t * columns;
        if (given.defined()) {
          std::copy_n(data<int64_t>(given) + t * columns, columns, id);
        } else {
          std::copy_n((after_topk ? raw : score).data(), experts, choice.data());
          for (int64_t e = 0; bias.defined() && e < experts; ++e) choice[e] += data<A>(bias)[e];
          selector.select(choice.data(), id);
        }
        A* weight = mutable_data<A>(weights) + t * columns;
        for (int64_t k = 0; k < columns; ++k) weight[k] = after_topk ? raw[id[k]] : score[id[k]];
        if (after_topk) softmax_over_first(functions, weight, top_k, columns);
        const A total = renormalize ? sum(weight, top_k) + A(kEpsilon) : A(1);
        for (int64_t k = 0; k < columns; ++k) weight[k] = weight[k] / total * scale;
        if (return_scores) {
          A* out = mutable_data<A>(scores) + t * experts;
          const A row_total = renormalize ? sum<A>(score.data(), experts) + A(kEpsilon) : A(1);
          for (int64_t e = 0; e < experts; ++e) out[e] = score[e] / row_total;
        }
      }
    });
  });
  int32_t* count = mutable_data<int32_t>(load);
  for (int64_t t = 0; t < tokens; ++t) {
    if (mask.defined() && !data<bool>(mask)[t]) continue;
    for (int64_t k = 0; k < top_k; ++k) ++count[data<int32_t>(ids)[t * columns + k]];
  }
  return {weights, ids, scores, load};
}

at::Tensor topk_router_backward(const std::optional<at::Tensor>& grad_weights,
                                const std::optional<at::Tensor>& grad_scores,
                                const at::Tensor& logits_TE, const at::Tensor& topk_ids,
                                std::string_view score_func, bool softmax_before_topk,
                                bool renormalize, double route_scale, int64_t candidates) {
  const ScoreFunc func = parse_score_func(score_func);
  const bool after_topk = func == ScoreFunc::kSoftmax && !softmax_before_topk;
  const int64_t tokens = logits_TE.size(0), experts = logits_TE.size(1);
  const int64_t columns = topk_ids.size(1), top_k = columns - candidates;
  TORCH_CHECK_VALUE(candidates >= 0 && top_k >= 0,
                    "topk_router_backward: candidates must be in [0, topk_ids.shape[1] = ", columns,
                    "]; got ", candidates);
  const at::ScalarType wide = accumulate_dtype(logits_TE.scalar_type());
  const at::Tensor logits = with_unit_stride(logits_TE);
  const at::Tensor ids = topk_ids.to(at::kInt).contiguous();
  const at::Tensor dweights = grad_weights ? grad_weights->to(wide).contiguous() : at::Tensor();
  const at::Tensor dscores = grad_scores ? grad_scores->to(wide).contiguous() : at::Tensor();
  for (int64_t i = 0; i < ids.numel(); ++i) {
    const int32_t id = data<int32_t>(ids)[i];
    TORCH_CHECK_INDEX(id >= 0 && id < experts,
                      "topk_router_backward: topk_ids must be in [0, E = ", experts, "); got ", id);
  }
  const at::Tensor out = at::empty({tokens, experts}, logits.options());
  dispatch_float(logits.scalar_type(), "topk_router_backward", [&]<typename T>() {
    using A = acc_t<T>;
    const auto& rows = kernels<RowKernels<T>>();
    const auto& functions = kernels<ScoreKernels<A>>();
    const A scale = static_cast<A>(route_scale);
    parallel_rows(tokens, 16 * experts * sizeof(A), [&](int64_t begin, int64_t end) {
      std::vector<A> raw(experts), score(experts), grad_score(experts), grad(experts);
      std::vector<A> value(columns), grad_value(columns);
      for (int64_t t = begin; t < end; ++t) {
        rows.widen(raw.data(), data<T>(logits) + t * logits.stride(0), experts);
        functions.scores(func, score.data(), raw.data(), experts);
        std::fill(grad.begin(), grad.end(), A(0));
        std::fill(grad_score.begin(), grad_score.end(), A(0));
        if (dscores.defined()) {
          std::copy_n(data<A>(dscores) + t * experts, experts, grad_score.data());
          if (renormalize) {
            normalize_backward(grad_score.data(), score.data(), experts, experts);
          }
        }
        if (dweights.defined()) {
          const int32_t* id = data<int32_t>(ids) + t * columns;
          for (int64_t k = 0; k < columns; ++k) {
            value[k] = after_topk ? raw[id[k]] : score[id[k]];
            grad_value[k] = data<A>(dweights)[t * columns + k] * scale;
          }
          if (after_topk) softmax_over_first(functions, value.data(), top_k, columns);
          if (renormalize) normalize_backward(grad_value.data(), value.data(), top_k, columns);
          if (after_topk) {
            std::vector<A> grad_chosen(columns, A(0));
            functions.scores_backward(ScoreFunc::kSoftmax, grad_chosen.data(), grad_value.data(),
                                      value.data(), value.data(), top_k);
            A product = 0;  // of the candidates, which are no part of the denominator
            for (int64_t k = top_k; k < columns; ++k) {
              grad_chosen[k] = grad_value[k] * value[k];
              product += grad_chosen[k];
            }
            for (int64_t k = 0; candidates > 0 && k < top_k; ++k) {
              grad_chosen[k] -= value[k] * product;
            }
            grad_value.swap(grad_chosen);
          }
          std::vector<A>& target = after_topk ? grad : grad_score;
          for (int64_t k = 0; k < columns; ++k) target[id[k]] += grad_value[k];
        }
        functions.scores_backward(func, grad.data(), grad_score.data(), score.data(), raw.data(),
                                  experts);
        rows.narrow(mutable_data<T>(out) + t * experts, grad.data(), experts);
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("topk_router", topk_router);
  m.impl("topk_router_backward", topk_router_backward);
}

}  // namespace moe
