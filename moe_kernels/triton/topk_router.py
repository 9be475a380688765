"""Expert scores, selection, routing weights and load.

T tokens, K experts a token, E experts in G groups of S. A tile holds BLOCK_T tokens by GP * SP
lanes, G and S padded to powers of two, so that a group's experts are neighbours: ``g * SP + s``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton._launch import (
    ceil_div,
    checks_values,
    float_type,
    next_power_of_2,
    on_device_of,
)
from moe_kernels.triton._math import (
    divide,
    exp,
    sigmoid,
    softplus,
    sort_key,
    sort_value,
    square_root,
)
from moe_kernels.triton._replay import launch
from moe_kernels.triton.sort_by_expert import check_ids

ALONE = 1024  # up to as many lanes are one program's
TILE = 512  # else lanes of a program, whose one warp finds the largest of a row without barriers
EPSILON = tl.constexpr(1e-20)  # added to the sums that weights and scores are divided by
NO_EXPERT = tl.constexpr(2**31 - 1)


@triton.jit
def _scores(x, valid, SCORE: tl.constexpr):
    """Every expert's score; 0 in lanes without an expert."""
    if SCORE == "softmax":
        top = tl.max(tl.where(valid, x, float("-inf")), 1)
        e = tl.where(valid, exp(x - top[:, None]), 0.0)
        raw = divide(e, tl.broadcast_to(tl.sum(e, 1)[:, None], e.shape))
    elif SCORE == "sigmoid":
        raw = sigmoid(x)
    else:
        tl.static_assert(SCORE == "sqrtsoftplus")
        raw = square_root(softplus(x))
    return tl.where(valid, raw, 0.0)


@triton.jit
def _unused_key(key):
    return (tl.zeros_like(key) + 1) << (key.dtype.primitive_bitwidth - 1)


@triton.jit
def _pick(key, lane):
    """The least lane among the largest keys, and the keys without it."""
    best = tl.max(key, 1)
    chosen = tl.min(tl.where(key == best[:, None], lane, NO_EXPERT), 1)
    return chosen, tl.where(lane == chosen[:, None], _unused_key(key), key)


@triton.jit
def _mask_groups(
    choice, valid, topk_groups,
    TOP2: tl.constexpr, FILL_ZERO: tl.constexpr,
    BLOCK_T: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """Scores with those of the losing groups replaced."""
    # as keys, since the largest of floats would not be the NaN among them
    key = sort_key(tl.where(valid, choice, float("-inf")))
    grouped = tl.reshape(key, (BLOCK_T, GP, SP))
    best = tl.max(grouped, 2)
    score = sort_value(best, choice.dtype)
    present = tl.max(tl.reshape(valid.to(tl.int32), (BLOCK_T, GP, SP)), 2) > 0
    if TOP2:
        lane = tl.broadcast_to(tl.arange(0, SP)[None, None, :], grouped.shape)
        first = tl.min(tl.where(grouped == best[:, :, None], lane, SP), 2)
        rest = tl.where(lane == first[:, :, None], _unused_key(grouped), grouped)
        score += sort_value(tl.max(rest, 2), choice.dtype)
    group = tl.broadcast_to(tl.arange(0, GP)[None, :], score.shape)
    key = sort_key(score)
    key = tl.where(present, key, _unused_key(key))
    wins = tl.zeros(score.shape, tl.int32)
    for _ in range(topk_groups):
        chosen, key = _pick(key, group)
        wins = tl.where(group == chosen[:, None], 1, wins)
    wins = tl.broadcast_to(wins[:, :, None], (BLOCK_T, GP, SP))
    wins = tl.reshape(wins, (BLOCK_T, GP * SP)) > 0
    return tl.where(wins, choice, 0.0 if FILL_ZERO else float("-inf"))


@triton.jit
def _softmax_of_chosen(x, k, chosen, K):
    """Softmax over the first ``chosen`` of K columns; the others on the same scale."""
    top = tl.max(tl.where(k < chosen, x, float("-inf")), 1)
    e = tl.where(k < K, exp(x - top[:, None]), 0.0)
    total = tl.sum(tl.where(k < chosen, e, 0.0), 1)
    return divide(e, tl.broadcast_to(total[:, None], e.shape))


@triton.jit(do_not_specialize=["T"])
def _topk_router_kernel(
    logits, bias, token_mask, given_ids, topk_weights, topk_ids, scores, load,
    T, E, S, K, candidates, topk_groups, route_scale, stride_t, stride_e, stride_b, stride_m,
    SCORE: tl.constexpr, AFTER_TOPK: tl.constexpr, RENORMALIZE: tl.constexpr,
    BIASED: tl.constexpr, MASKED: tl.constexpr, GIVEN: tl.constexpr, GROUPED: tl.constexpr,
    TOP2: tl.constexpr, FILL_ZERO: tl.constexpr, RETURN_SCORES: tl.constexpr, ALONE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    lane = tl.arange(0, GP * SP)
    if GROUPED:
        column = (lane // SP) * S + lane % SP
        present = (lane % SP < S) & (column < E)
    else:  # as the compiler sees: neighbours, which it loads together
        column = lane
        present = lane < E
    valid = (token < T)[:, None] & present[None, :]
    x = tl.load(
        logits + token[:, None] * stride_t + column[None, :].to(tl.int64) * stride_e,
        mask=valid,
        other=0.0,
    ).to(WIDE)
    real = tl.broadcast_to(present[None, :], x.shape)
    expert = tl.broadcast_to(tl.where(present, column, NO_EXPERT)[None, :], x.shape)
    raw = _scores(x, real, SCORE)
    value = x if AFTER_TOPK else raw  # what the chosen are weighed by

    choice = value
    if BIASED:
        shift = tl.load(bias + column * stride_b, mask=present, other=0.0)
        choice += shift.to(WIDE)[None, :]
    if GROUPED:
        choice = _mask_groups(choice, real, topk_groups, TOP2, FILL_ZERO, BLOCK_T, GP, SP)
    key = sort_key(choice)
    key = tl.where(real, key, _unused_key(key))

    k = tl.broadcast_to(tl.arange(0, KP)[None, :], (BLOCK_T, KP))
    top_k = K - candidates  # columns that count
    weights = tl.zeros((BLOCK_T, KP), WIDE)
    ids = tl.zeros((BLOCK_T, KP), tl.int32)
    hits = tl.zeros((BLOCK_T, GP * SP), tl.int32)
    for i in range(K):
        if GIVEN:
            chosen = tl.load(given_ids + token * K + i, mask=token < T, other=-1).to(tl.int32)
        else:
            chosen, key = _pick(key, expert)
        hit = expert == chosen[:, None]
        hits += (hit & (i < top_k)).to(tl.int32)
        weight = tl.sum(tl.where(hit, value, 0.0), 1)
        weights = tl.where(k == i, weight[:, None], weights)
        ids = tl.where(k == i, chosen[:, None], ids)

    if AFTER_TOPK:
        weights = _softmax_of_chosen(weights, k, top_k, K)
    if RENORMALIZE:
        total = tl.sum(tl.where(k < top_k, weights, 0.0), 1)[:, None] + EPSILON
        weights = divide(weights, tl.broadcast_to(total, weights.shape))
    cell = token[:, None] * K + k
    stored = (token < T)[:, None] & (k < K)
    tl.store(topk_weights + cell, weights * route_scale, mask=stored)
    tl.store(topk_ids + cell, ids, mask=stored)
    if RETURN_SCORES:
        if RENORMALIZE:
            total = tl.sum(raw, 1)[:, None] + EPSILON
            raw = divide(raw, tl.broadcast_to(total, raw.shape))
        tl.store(scores + token[:, None] * E + column[None, :], raw, mask=valid)
    counted = token < T
    if MASKED:
        counted &= tl.load(token_mask + token * stride_m, mask=token < T, other=0) != 0
    count = tl.sum(tl.where(counted[:, None], hits, 0), 0)
    if ALONE:
        tl.store(load + column, count, mask=present)
    else:
        # Integers: the sum does not depend on the order of programs. Few experts are among the
        # chosen of a program's few tokens; the others' counters are left alone.
        tl.atomic_add(load + column, count, mask=present & (count > 0), sem="relaxed")


@triton.jit
def _normalize_backward(grad, value, summed):
    """Through ``value / (sum of the summed values + EPSILON)``."""
    total = tl.sum(tl.where(summed, value, 0.0), 1)[:, None] + EPSILON
    inner = tl.sum(grad * value, 1)[:, None]
    total = tl.broadcast_to(total, grad.shape)
    share = divide(tl.broadcast_to(inner, grad.shape), total)
    return divide(grad - tl.where(summed, share, 0.0), total)


@triton.jit(do_not_specialize=["T"])
def _topk_router_backward_kernel(
    grad_weights, grad_scores, logits, topk_ids, grad_logits, T, E, K, candidates, route_scale,
    stride_t, stride_e, stride_wt, stride_wk, stride_st, stride_se,
    SCORE: tl.constexpr, AFTER_TOPK: tl.constexpr, RENORMALIZE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, HAS_SCORES: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.broadcast_to(tl.arange(0, EP)[None, :], (BLOCK_T, EP))
    present = expert < E
    valid = (token < T)[:, None] & present
    wide_expert = expert.to(tl.int64)
    x = tl.load(
        logits + token[:, None] * stride_t + wide_expert * stride_e, mask=valid, other=0.0
    ).to(WIDE)
    raw = _scores(x, present, SCORE)
    grad_raw = tl.zeros((BLOCK_T, EP), WIDE)
    direct = tl.zeros((BLOCK_T, EP), WIDE)  # past the score function
    if HAS_SCORES:
        grad_raw = tl.load(
            grad_scores + token[:, None] * stride_st + wide_expert * stride_se,
            mask=valid,
            other=0.0,
        ).to(WIDE)
        if RENORMALIZE:
            grad_raw = _normalize_backward(grad_raw, raw, present)
    if HAS_WEIGHTS:
        k = tl.broadcast_to(tl.arange(0, KP)[None, :], (BLOCK_T, KP))
        inside = (token < T)[:, None] & (k < K)
        grad = tl.load(
            grad_weights + token[:, None] * stride_wt + k.to(tl.int64) * stride_wk,
            mask=inside,
            other=0.0,
        ).to(WIDE)
        grad *= route_scale
        first = k < K - candidates
        value = tl.zeros((BLOCK_T, KP), WIDE)
        for i in range(K):
            chosen = tl.load(topk_ids + token * K + i, mask=token < T, other=-1)
            here = tl.where(expert == chosen[:, None], x if AFTER_TOPK else raw, 0.0)
            value = tl.where(k == i, tl.sum(here, 1)[:, None], value)
        if AFTER_TOPK:
            value = _softmax_of_chosen(value, k, K - candidates, K)
        if RENORMALIZE:
            grad = _normalize_backward(grad, value, first)
        if AFTER_TOPK:
            inner = tl.sum(grad * value, 1)[:, None]
            grad = value * (grad - tl.where(first, inner, 0.0))
        for i in range(K):
            chosen = tl.load(topk_ids + token * K + i, mask=token < T, other=-1)
            share = tl.sum(tl.where(k == i, grad, 0.0), 1)
            share = tl.where(expert == chosen[:, None], share[:, None], 0.0)
            if AFTER_TOPK:
                direct += share
            else:
                grad_raw += share
    if SCORE == "softmax":
        grad_x = raw * (grad_raw - tl.sum(grad_raw * raw, 1)[:, None])
    elif SCORE == "sigmoid":
        grad_x = grad_raw * raw * (1.0 - raw)
    else:
        slope = divide(sigmoid(x), tl.where(raw > 0.0, 2.0 * raw, 1.0))
        grad_x = grad_raw * tl.where(raw == 0.0, 0.0, slope)  # both vanish far below zero
    tl.store(
        grad_logits + token[:, None] * E + expert,
        (grad_x + direct).to(grad_logits.dtype.element_ty),
        mask=valid,
    )


def _warps(lanes: int) -> int:
    """So many that each has a tile's lanes; 8 at most."""
    return min(max(lanes // TILE, 1), 8)


def topk_router(
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
    (T, E), columns = logits.shape, top_k + candidates
    if given_ids is not None and checks_values():
        check_ids("topk_router", "given_ids", given_ids, 0, E - 1, "")
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    topk_weights = logits.new_empty(T, columns, dtype=wide)
    topk_ids = logits.new_empty(T, columns, dtype=torch.int32)
    scores = logits.new_empty(T if return_scores else 0, E, dtype=wide)
    group_size = E // num_groups
    gp, sp = next_power_of_2(num_groups), next_power_of_2(group_size)
    lanes = gp * sp
    alone = 0 < T <= max(ALONE // lanes, 1)  # one program counts all the load: no zeros to add to
    block_t = max((ALONE if alone else TILE) // lanes, 1)
    load = (logits.new_empty if alone else logits.new_zeros)(E, dtype=torch.int32)
    if T == 0:
        return topk_weights, topk_ids, scores, load
    with on_device_of(logits):
        launch(
            _topk_router_kernel, (ceil_div(T, block_t),),
            logits, correction_bias, token_mask,
            None if given_ids is None else given_ids.contiguous(),
            topk_weights, topk_ids, scores, load,
            T, E, group_size, columns, candidates, topk_groups, route_scale, *logits.stride(),
            0 if correction_bias is None else correction_bias.stride(0),
            0 if token_mask is None else token_mask.stride(0),
            SCORE=score_func, AFTER_TOPK=score_func == "softmax" and not softmax_before_topk,
            RENORMALIZE=renormalize, BIASED=correction_bias is not None,
            MASKED=token_mask is not None, GIVEN=given_ids is not None, GROUPED=num_groups > 1,
            TOP2=group_score == "top2" and group_size > 1, FILL_ZERO=group_fill == 0.0,
            RETURN_SCORES=return_scores, ALONE=alone, WIDE=float_type(logits),
            BLOCK_T=block_t, GP=gp, SP=sp, KP=next_power_of_2(columns),
            num_warps=4 if alone else _warps(block_t * lanes),
        )  # fmt: skip
    return topk_weights, topk_ids, scores, load


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
    (T, E), K = logits.shape, topk_ids.shape[1]
    grad_logits = logits.new_empty(T, E)
    if T == 0:
        return grad_logits
    ep = next_power_of_2(E)
    # in float64 a lane takes twice the registers
    block_t = max(TILE * 4 // (max(logits.element_size(), 4) * ep), 1)
    with on_device_of(logits):
        launch(
            _topk_router_backward_kernel, (ceil_div(T, block_t),),
            grad_weights, grad_scores, logits, topk_ids.contiguous(), grad_logits,
            T, E, K, candidates, route_scale, *logits.stride(),
            *((0, 0) if grad_weights is None else grad_weights.stride()),
            *((0, 0) if grad_scores is None else grad_scores.stride()),
            SCORE=score_func, AFTER_TOPK=score_func == "softmax" and not softmax_before_topk,
            RENORMALIZE=renormalize, HAS_WEIGHTS=grad_weights is not None,
            HAS_SCORES=grad_scores is not None, WIDE=float_type(logits),
            BLOCK_T=block_t, EP=ep, KP=next_power_of_2(K), num_warps=_warps(block_t * ep),
        )  # fmt: skip
    return grad_logits
