"""Expert scores, selection, routing weights and load.

T tokens, K experts a token, E experts, G groups of E / G experts.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from moe_kernels.reference._accumulate import accumulate_dtype

SCORE_FUNCS = ("softmax", "sigmoid", "sqrtsoftplus")
GROUP_SCORES = ("max", "top2")
EPSILON = 1e-20  # added to the sums that weights and scores are divided by


def _all_scores(logits: Tensor, score_func: str) -> Tensor:
    if score_func == "softmax":
        return logits.softmax(-1)
    if score_func == "sigmoid":
        return logits.sigmoid()
    return functional.softplus(logits).sqrt()


def _softmax_over_first(x: Tensor, count: int) -> Tensor:
    """Softmax over the first ``count`` columns; the others on the same scale."""
    if count == x.shape[1]:
        return x.softmax(-1)
    e = (x - x[:, :count].amax(-1, keepdim=True).detach()).exp()
    return e / e[:, :count].sum(-1, keepdim=True)


def select_experts(
    choice: Tensor, top_k: int, num_groups: int, topk_groups: int, group_score: str, fill: float
) -> Tensor:
    """``[T, K]`` int64: the K largest of ``choice [T, E]``, best first, the lower id on a tie.

    With ``num_groups > 1`` only the ``topk_groups`` best groups compete; the others' scores are
    replaced by ``fill`` (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
    """
    if num_groups > 1:
        grouped = choice.unflatten(-1, (num_groups, -1))
        if group_score == "max":
            per_group = grouped.amax(-1)
        else:
            per_group = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        best = per_group.sort(dim=-1, descending=True, stable=True).indices[:, :topk_groups]
        wins = torch.zeros_like(per_group, dtype=torch.bool).scatter(-1, best, True)
        fill = fill if fill == 0 else -math.inf  # exported graphs have the least double for it
        choice = torch.where(wins[..., None], grouped, fill).flatten(-2)
    return choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def topk_router(
    logits: Tensor,
    top_k: int,
    score_func: str = "softmax",
    softmax_before_topk: bool = True,
    renormalize: bool = False,
    correction_bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
    group_fill: float = -math.inf,
    route_scale: float = 1.0,
    token_mask: Tensor | None = None,
    given_ids: Tensor | None = None,
    return_scores: bool = True,
    candidates: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``topk_weights [T, K]``, ``topk_ids [T, K]`` i32, ``scores [T, E]``, ``load [E]`` i32.

    With ``candidates`` more columns, which denominators and load leave out. Weights and scores are
    float32 (float64 for float64 logits). See :func:`moe_kernels.topk_router` for each argument.
    """
    wide = logits.to(accumulate_dtype(logits.dtype))
    scores = _all_scores(wide, score_func)
    after_topk = score_func == "softmax" and not softmax_before_topk
    if given_ids is not None:
        ids = given_ids.to(torch.int64)
        out_of_range = (ids < 0) | (ids >= logits.shape[1])
        if bool(out_of_range.any()):
            raise IndexError(
                f"topk_router: given_ids must be in [0, {logits.shape[1]}); "
                f"got {int(ids[out_of_range][0])}"
            )
    else:
        choice = wide if after_topk else scores
        if correction_bias is not None:
            choice = choice + correction_bias.to(choice.dtype)
        ids = select_experts(
            choice.detach(), top_k + candidates, num_groups, topk_groups, group_score, group_fill
        )
    weights = (wide if after_topk else scores).gather(-1, ids)
    if after_topk:
        weights = _softmax_over_first(weights, top_k)
    if renormalize:
        weights = weights / (weights[:, :top_k].sum(-1, keepdim=True) + EPSILON)
        scores = scores / (scores.sum(-1, keepdim=True) + EPSILON)
    counted = ids[:, :top_k] if token_mask is None else ids[token_mask, :top_k]
    load = torch.bincount(counted.reshape(-1), minlength=logits.shape[1])
    if not return_scores:
        scores = scores.new_empty(0, logits.shape[1])
    return weights * route_scale, ids.to(torch.int32), scores, load.to(torch.int32)


def _normalize_backward(grad: Tensor, value: Tensor, count: int) -> Tensor:
    """Through ``value / (value[:, :count].sum(-1) + EPSILON)``."""
    total = value[:, :count].sum(-1, keepdim=True) + EPSILON
    inner = (grad * value).sum(-1, keepdim=True) / total
    return (grad - inner * _is_first(value, count)) / total


def _is_first(value: Tensor, count: int) -> Tensor:
    """``[1, columns]``: whether a column is one of the first ``count``."""
    return torch.arange(value.shape[1], device=value.device)[None, :] < count


def topk_router_backward(
    grad_weights: Tensor | None,
    grad_scores: Tensor | None,
    logits: Tensor,
    topk_ids: Tensor,
    score_func: str,
    softmax_before_topk: bool,
    renormalize: bool,
    route_scale: float,
    candidates: int = 0,
) -> Tensor:
    """Gradient to the logits; the selection itself has none."""
    wide = logits.to(accumulate_dtype(logits.dtype))
    ids, experts, top_k = topk_ids.to(torch.int64), wide.shape[1], topk_ids.shape[1] - candidates
    raw = _all_scores(wide, score_func)
    after_topk = score_func == "softmax" and not softmax_before_topk
    grad_raw = torch.zeros_like(wide)
    grad_logits = torch.zeros_like(wide)
    if grad_scores is not None:
        wide_grad = grad_scores.to(wide.dtype)
        grad_raw += _normalize_backward(wide_grad, raw, experts) if renormalize else wide_grad
    if grad_weights is not None:
        grad = grad_weights.to(wide.dtype) * route_scale
        value = (wide if after_topk else raw).gather(-1, ids)
        value = _softmax_over_first(value, top_k) if after_topk else value
        grad = _normalize_backward(grad, value, top_k) if renormalize else grad
        if after_topk:
            inner = (grad * value).sum(-1, keepdim=True)
            grad = value * (grad - inner * _is_first(value, top_k))
            grad_logits.scatter_add_(-1, ids, grad)
        else:
            grad_raw.scatter_add_(-1, ids, grad)
    if score_func == "softmax":
        grad_logits += raw * (grad_raw - (grad_raw * raw).sum(-1, keepdim=True))
    elif score_func == "sigmoid":
        grad_logits += grad_raw * raw * (1 - raw)
    else:
        slope = wide.sigmoid() / (2 * raw)
        grad_logits += grad_raw * torch.where(raw == 0, 0, slope)  # both vanish far below zero
    return grad_logits.to(logits.dtype)
