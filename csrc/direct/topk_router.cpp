// T tokens, K experts a token, E experts, G groups of E / G experts.
#include <cmath>
#include <tuple>

#include "direct/arguments.h"

namespace moe::direct {

namespace {

using TopkRouter = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor&, int64_t, std::string_view, bool, bool, const std::optional<at::Tensor>&,
    int64_t, int64_t, std::string_view, double, double, const std::optional<at::Tensor>&,
    const std::optional<at::Tensor>&, bool, int64_t);

bool are_groups(int64_t experts, int64_t columns, int64_t num_groups, int64_t topk_groups,
                double group_fill) {
  return num_groups >= 1 && experts % num_groups == 0 && topk_groups >= 1 &&
         topk_groups <= num_groups && (group_fill == 0 || group_fill == -INFINITY) &&
         (num_groups == 1 || columns <= topk_groups * (experts / num_groups));
}

bool is_vector(const at::Tensor& tensor, int64_t size) {
  return tensor.dim() == 1 && tensor.size(0) == size;
}

}  // namespace

PyObject* topk_router(PyObject*, PyObject* const* values, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    Arguments in(values, count);
    const at::Tensor logits = in.tensor();
    const int64_t top_k = in.integer();
    const std::string_view score_func = in.text();
    const bool softmax_before_topk = in.flag(), renormalize = in.flag();
    const std::optional<at::Tensor> correction_bias = in.optional_tensor();
    const int64_t num_groups = in.integer(), topk_groups = in.integer();
    const std::string_view group_score = in.text();
    const double group_fill = in.number(), route_scale = in.number();
    const std::optional<at::Tensor> token_mask = in.optional_tensor(),
                                    given_ids = in.optional_tensor();
    const bool return_scores = in.flag();
    const int64_t candidates = in.integer();
    if (!in.usual() || logits.dim() != 2 || !is_float(logits)) Py_RETURN_NONE;
    const int64_t tokens = logits.size(0), experts = logits.size(1);
    const bool known_names =
        (score_func == "softmax" || score_func == "sigmoid" || score_func == "sqrtsoftplus") &&
        (group_score == "max" || group_score == "top2");
    if (!known_names || top_k < 1 || candidates < 0 || top_k > experts ||
        candidates > experts - top_k ||
        !are_groups(experts, top_k + candidates, num_groups, topk_groups, group_fill) ||
        !std::isfinite(route_scale)) {
      Py_RETURN_NONE;
    }
    const bool fit =
        (!correction_bias ||
         (is_vector(*correction_bias, experts) && is_float(*correction_bias))) &&
        (!token_mask ||
         (is_vector(*token_mask, tokens) && token_mask->scalar_type() == at::kBool)) &&
        (!given_ids || (given_ids->dim() == 2 && is_index(*given_ids) &&
                        given_ids->size(0) == tokens && given_ids->size(1) == top_k + candidates));
    if (!fit) Py_RETURN_NONE;
    static const auto op = find_op<TopkRouter>("moe_kernels::topk_router");
    auto [weights, ids, scores, load] = run([&] {
      return op.call(logits, top_k, score_func, softmax_before_topk, renormalize, correction_bias,
                     num_groups, topk_groups, group_score, group_fill, route_scale, token_mask,
                     given_ids, return_scores, candidates);
    });
    pybind11::tuple out(4);
    PyTuple_SET_ITEM(out.ptr(), 0, THPVariable_Wrap(std::move(weights)));
    PyTuple_SET_ITEM(out.ptr(), 1, THPVariable_Wrap(std::move(ids)));
    PyTuple_SET_ITEM(out.ptr(), 2, THPVariable_Wrap(std::move(scores)));
    PyTuple_SET_ITEM(out.ptr(), 3, THPVariable_Wrap(std::move(load)));
    return out.release().ptr();
  });
}

}  // namespace moe::direct
