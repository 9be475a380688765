"""Expert scores, selection, routing weights and load in one op.

T tokens, K experts a token, E experts, G groups of E / G experts.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_kernels.ops._checks import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    check_choice,
    check_count,
    check_device,
    check_dtype,
    check_flag,
    check_number,
    check_tensor,
    shape,
    without_infinity,
)
from moe_kernels.ops._library import (
    call_op,
    define,
    direct_call,
    refuse_double_backward,
    register_autograd,
)
from moe_kernels.ops._repeated import Repeated
from moe_kernels.reference.topk_router import GROUP_SCORES, SCORE_FUNCS
from moe_kernels.reference.topk_router import (
    topk_router as topk_router_reference,
)
from moe_kernels.reference.topk_router import (
    topk_router_backward as topk_router_backward_reference,
)


class RouterOutput(NamedTuple):
    """What :func:`topk_router` returns.

    Attributes:
        topk_weights: [T, K] float32, routing weights; [T, K + candidates] if asked for.
        topk_ids: as topk_weights, int32, chosen experts, best first.
        scores: [T, E] float32, every expert's score, for auxiliary losses; [0, E] if not asked for.
        load: [E] int32, how many (token, choice) pairs of unmasked tokens each expert got.
    """

    topk_weights: Tensor
    topk_ids: Tensor
    scores: Tensor
    load: Tensor


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake(
    logits: Tensor,
    top_k: int,
    score_func: str,
    softmax_before_topk: bool,
    renormalize: bool,
    correction_bias: Tensor | None,
    num_groups: int,
    topk_groups: int,
    group_score: str,
    group_fill: float,
    route_scale: float,
    token_mask: Tensor | None,
    given_ids: Tensor | None,
    return_scores: bool,
    candidates: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    wide, top_k = _wide(logits.dtype), top_k + candidates
    return (
        logits.new_empty(tokens, top_k, dtype=wide),
        logits.new_empty(tokens, top_k, dtype=torch.int32),
        logits.new_empty(tokens if return_scores else 0, experts, dtype=wide),
        logits.new_empty(experts, dtype=torch.int32),
    )


def _backward_fake(grad_weights: Any, grad_scores: Any, logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


_op = define(
    "topk_router(Tensor logits, int top_k, str score_func, bool softmax_before_topk,"
    " bool renormalize, Tensor? correction_bias, int num_groups, int topk_groups, str group_score,"
    " float group_fill, float route_scale, Tensor? token_mask, Tensor? given_ids,"
    " bool return_scores, int candidates=0) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=topk_router_reference,
    fake=_fake,
)
_direct, _repeated = direct_call("topk_router"), Repeated(_op)
_backward_op = define(
    "topk_router_backward(Tensor? grad_weights, Tensor? grad_scores, Tensor logits,"
    " Tensor topk_ids, str score_func, bool softmax_before_topk, bool renormalize,"
    " float route_scale, int candidates=0) -> Tensor",
    reference=topk_router_backward_reference,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, topk_ids, _, load = output
    ctx.mark_non_differentiable(topk_ids, load)
    ctx.set_materialize_grads(False)
    ctx.options = (*inputs[2:5], inputs[10], inputs[14])
    ctx.return_scores = inputs[13]
    ctx.save_for_backward(inputs[0], topk_ids)


def _backward(
    ctx: Any,
    grad_weights: Tensor | None,
    grad_ids: Tensor | None,
    grad_scores: Tensor | None,
    grad_load: Tensor | None,
) -> tuple[Tensor | None, ...]:
    logits, topk_ids = ctx.saved_tensors
    grad_scores = grad_scores if ctx.return_scores else None
    if grad_weights is None and grad_scores is None:
        return (None,) * 15
    grad = call_op(_backward_op, grad_weights, grad_scores, logits, topk_ids, *ctx.options)
    return grad, *(None,) * 14


register_autograd("topk_router", _backward, _setup_context)
refuse_double_backward("topk_router_backward")


def _check_groups(
    experts: int, top_k: int, num_groups: int, topk_groups: int, group_fill: float
) -> None:
    op = "topk_router"
    check_count(op, "num_groups", num_groups)
    check_count(op, "topk_groups", topk_groups)
    if num_groups < 1 or experts % num_groups:
        raise ValueError(
            f"{op}: num_groups must be at least 1 and divide E = {experts}; got {num_groups}"
        )
    if not 1 <= topk_groups <= num_groups:
        raise ValueError(
            f"{op}: topk_groups must be in [1, num_groups = {num_groups}]; got {topk_groups}"
        )
    check_number(op, "group_fill", group_fill)
    if not (group_fill == 0 or group_fill == -math.inf):
        raise ValueError(f"{op}: group_fill must be 0 or -inf; got {group_fill}")
    if num_groups > 1 and top_k > topk_groups * (experts // num_groups):
        raise ValueError(
            f"{op}: top_k must be at most the experts of the chosen groups, "
            f"{topk_groups} * {experts // num_groups}, candidates included; got {top_k}"
        )


def _check(
    logits: Tensor,
    top_k: int,
    score_func: str,
    correction_bias: Tensor | None,
    num_groups: int,
    topk_groups: int,
    group_score: str,
    group_fill: float,
    route_scale: float,
    token_mask: Tensor | None,
    given_ids: Tensor | None,
    candidates: int,
) -> None:
    op = "topk_router"
    check_tensor(op, "logits", logits, 2, "[T, E]")
    check_dtype(op, "logits", logits, FLOAT_DTYPES)
    experts = logits.shape[1]
    check_choice(op, "score_func", score_func, SCORE_FUNCS)
    check_choice(op, "group_score", group_score, GROUP_SCORES)
    check_count(op, "top_k", top_k)
    if not 1 <= top_k <= experts:
        raise ValueError(f"{op}: top_k must be in [1, E = {experts}]; got {top_k}")
    check_count(op, "candidates", candidates)
    columns = top_k + candidates
    if columns > experts:
        raise ValueError(
            f"{op}: candidates must be at most E - top_k = {experts - top_k}; got {candidates}"
        )
    _check_groups(experts, columns, num_groups, topk_groups, group_fill)
    check_number(op, "route_scale", route_scale)
    if not abs(route_scale) < math.inf:
        raise ValueError(f"{op}: route_scale must be finite; got {route_scale}")
    if correction_bias is not None:
        check_tensor(op, "correction_bias", correction_bias, 1, "[E]")
        check_dtype(op, "correction_bias", correction_bias, FLOAT_DTYPES)
        check_device(op, "logits", logits, "correction_bias", correction_bias)
        if correction_bias.shape[0] != experts:
            raise ValueError(
                f"{op}: correction_bias must be [E] = [{experts}]; got {shape(correction_bias)}"
            )
    if token_mask is not None:
        check_tensor(op, "token_mask", token_mask, 1, "[T]")
        check_dtype(op, "token_mask", token_mask, (torch.bool,))
        check_device(op, "logits", logits, "token_mask", token_mask)
        if token_mask.shape[0] != logits.shape[0]:
            raise ValueError(
                f"{op}: token_mask must be [T] = [{logits.shape[0]}]; got {shape(token_mask)}"
            )
    if given_ids is not None:
        check_tensor(op, "given_ids", given_ids, 2, "[T, K]")
        check_dtype(op, "given_ids", given_ids, INDEX_DTYPES)
        check_device(op, "logits", logits, "given_ids", given_ids)
        if given_ids.shape[0] != logits.shape[0] or given_ids.shape[1] != columns:
            raise ValueError(
                f"{op}: given_ids must be [T, K] = {[logits.shape[0], columns]}; "
                f"got {shape(given_ids)}"
            )


def topk_router(
    logits: Tensor,
    top_k: int,
    *,
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
    return_scores: bool = False,
    candidates: int = 0,
) -> RouterOutput:
    """Choose K experts a token and weigh them; differentiable in the logits.

    ``s = score_func(logits)`` in float32; the experts are the K best of ``s + correction_bias``
    (of the raw logits for a softmax after top-k), the lower id on a tie; weights are the unbiased
    ``s`` of the chosen (or the softmax over the chosen logits), renormalised if asked for, times
    ``route_scale``. Covers the routers of Switch and Mixtral (softmax), DeepSeek-V3 (sigmoid,
    groups and correction bias, arXiv:2412.19437 section 2.1.2, arXiv:2408.15664), gpt-oss (softmax
    after top-k) and sqrt(softplus).

    Args:
        logits: [T, E], any float dtype.
        top_k: K, in [1, E].
        score_func: "softmax", "sigmoid" or "sqrtsoftplus".
        softmax_before_topk: for softmax: over all experts, or else over the K chosen logits.
        renormalize: divide weights, and the returned scores, by their row sum + 1e-20.
        correction_bias: [E], steers the selection alone and gets no gradient.
        num_groups, topk_groups: with G > 1 groups of consecutive experts, only the best
            ``topk_groups`` groups compete.
        group_score: a group's score: "max", or "top2" for the sum of its two best.
        group_fill: what losing groups' scores become, 0 or -inf. With 0 they still win against
            negative scores, as some published routers have it.
        route_scale: multiplies the weights.
        token_mask: [T] bool; False tokens are left out of ``load``.
        given_ids: [T, K] (or [T, K + candidates]), int32 or int64 in [0, E): use this selection
            instead (routing replay).
        return_scores: also return every expert's score, differentiable, for auxiliary losses.
        candidates: also return as many next best experts, in columns from K on, for
            :func:`round_tokens`. Their weights are on the scale of the K chosen (softmax over the
            chosen and renormalisation keep the denominators of the K, so that the first K columns
            do not change), and they are left out of ``load``.

    Returns:
        ``(topk_weights [T, K] f32, topk_ids [T, K] i32, scores [T, E] f32, load [E] i32)``, with
        float64 in place of float32 for float64 logits.

    Raises:
        ValueError: an option or shape that does not fit.
        IndexError: given_ids outside [0, E) (always on CPU; on CUDA with ``MOE_KERNELS_CHECK=1``).
        TypeError: wrong dtypes.
    """
    arguments = (
        logits,
        top_k,
        score_func,
        softmax_before_topk,
        renormalize,
        correction_bias,
        num_groups,
        topk_groups,
        group_score,
        without_infinity(group_fill),
        route_scale,
        token_mask,
        given_ids,
        return_scores,
        candidates,
    )
    found = None
    if not torch.compiler.is_compiling():
        found = _direct(*arguments) or _repeated(*arguments)
    if found is None:
        _check(
            logits,
            top_k,
            score_func,
            correction_bias,
            num_groups,
            topk_groups,
            group_score,
            group_fill,
            route_scale,
            token_mask,
            given_ids,
            candidates,
        )
        for name, flag in (
            ("softmax_before_topk", softmax_before_topk),
            ("renormalize", renormalize),
            ("return_scores", return_scores),
        ):
            check_flag("topk_router", name, flag)
        found = call_op(_op, *arguments)
        if not torch.compiler.is_compiling():
            _repeated.confirm(*arguments)
    return RouterOutput(*found)
