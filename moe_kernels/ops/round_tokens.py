"""Every expert's tokens rounded to a multiple of the tile of a grouped GEMM.

T tokens, K experts a token, C columns: the K chosen and C - K candidates, E experts.
"""

from __future__ import annotations

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
    check_num_experts,
    check_rows,
    check_tensor,
    shape,
)
from moe_kernels.ops._library import call_op, define, register_autograd
from moe_kernels.reference.round_tokens import MODES
from moe_kernels.reference.round_tokens import round_tokens as round_tokens_reference


class RoundedTokens(NamedTuple):
    """What :func:`round_tokens` returns.

    Attributes:
        topk_weights: [T, C], those given, 0 where a slot is not used.
        topk_ids: [T, C] int32, those given, -1 where a slot is not used.
        load: [E] int32, how many tokens each expert got.
    """

    topk_weights: Tensor
    topk_ids: Tensor
    load: Tensor


def _fake(
    topk_weights: Tensor,
    topk_ids: Tensor,
    token_mask: Tensor | None,
    num_experts: int,
    top_k: int,
    tile: int,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        topk_weights.new_empty(topk_weights.shape),
        topk_ids.new_empty(topk_ids.shape, dtype=torch.int32),
        topk_ids.new_empty(num_experts, dtype=torch.int32),
    )


_op = define(
    "round_tokens(Tensor topk_weights, Tensor topk_ids, Tensor? token_mask, int num_experts,"
    " int top_k, int tile, str mode) -> (Tensor, Tensor, Tensor)",
    reference=round_tokens_reference,
    fake=_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, ids, load = output
    ctx.mark_non_differentiable(ids, load)
    ctx.save_for_backward(ids)


def _backward(
    ctx: Any, grad: Tensor, grad_ids: Tensor | None, grad_load: Tensor | None
) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    return torch.where(ids >= 0, grad, 0), *(None,) * 6


register_autograd("round_tokens", _backward, _setup_context)


def _check_tile(op: str, tile: Any) -> None:
    check_count(op, "tile", tile)
    if not 1 <= tile < 2**30:
        raise ValueError(f"{op}: tile must be in [1, 2**30); got {tile}")


def rounded_rows(tokens: int, top_k: int, num_experts: int, *, tile: int, mode: str) -> int:
    """The most slots that :func:`round_tokens` leaves in use, of T tokens with K choices.

    A bound for ``num_rows`` of :func:`fused_experts`, known on the host: rounding down adds
    nothing, to the nearest at most tile / 2 tokens an expert, up at most tile - 1.

    Args:
        tokens: T.
        top_k: K.
        num_experts: E.
        tile, mode: as of :func:`round_tokens`.

    Returns:
        ``T * K + min(E, T * K) * most``, with the most tokens that an expert may be given.

    Raises:
        TypeError: a number that is no integer.
        ValueError: another mode, or a number or tile that cannot be.
    """
    op = "rounded_rows"
    check_choice(op, "mode", mode, MODES)
    for name, value in (("tokens", tokens), ("top_k", top_k), ("num_experts", num_experts)):
        check_count(op, name, value)
    _check_tile(op, tile)
    chosen = tokens * top_k
    most = {"down": 0, "nearest": tile // 2, "up": tile - 1}[mode]
    return chosen + min(num_experts, chosen) * most


def round_tokens(
    topk_weights: Tensor,
    topk_ids: Tensor,
    num_experts: int,
    *,
    top_k: int,
    tile: int = 128,
    mode: str = "nearest",
    token_mask: Tensor | None = None,
) -> RoundedTokens:
    """Round the number of each expert's tokens to a multiple of ``tile``.

    A grouped GEMM computes whole tiles of rows, so a tile that an expert fills in part is wasted in
    part: with many experts and few tokens each, a large share. Token rounding (SonicMoE,
    arXiv:2512.14080) drops the expert's tokens of lowest weight, or adds the best tokens that did
    not choose it, less than a tile of either. It changes what the layer computes, and which experts
    a token gets depends on the other tokens of the batch: it is meant for training, with at least
    about two tiles an expert on average. Here a token gains only from its candidates, the experts
    next best to it, of which there are C - K; so no token has more than C experts, the result has a
    static shape, and it is what :func:`fused_experts` takes, with :func:`rounded_rows` for its
    ``num_rows``.

    An expert ranks the slots that name it: chosen before candidates, then by weight, the lower slot
    on a tie. With ``rest = count % tile`` of its ``count`` chosen slots, it drops the last ``rest``
    (mode "down"), adds its ``tile - rest`` best candidates (mode "up"), or does what changes less
    (mode "nearest", half a tile up). Where candidates are too few, "nearest" rounds down, so that
    like "down" it always gives multiples; "up" never drops, adds what there is, and the expert's
    count is no multiple then. An expert with less than half a tile gets nothing by "nearest".

    Weights that remain are not changed or renormalised. Differentiable in topk_weights: an unused
    slot's gradient is 0. Deterministic; no host synchronisation on CUDA. Under Expert Parallelism
    each rank rounds its own tokens: sums of multiples are multiples.

    Args:
        topk_weights: [T, C], any float dtype.
        topk_ids: [T, C], int32 or int64, in [0, E), the chosen in the first ``top_k`` columns: as
            :func:`topk_router` gives them with ``candidates``. -1 and E mean "no expert here".
        num_experts: E.
        top_k: K, at most C. With C = K nothing can be added.
        tile: rows of the GEMM's tile, at least 1.
        mode: "nearest", "up" or "down".
        token_mask: [T] bool; False tokens get no expert and count for none.

    Returns:
        ``(topk_weights [T, C], topk_ids [T, C] int32, load [E] int32)``.

    Raises:
        IndexError: an id outside [-1, E] (always on CPU; on CUDA with ``MOE_KERNELS_CHECK=1``,
            without it such a slot is dropped).
        ValueError: an option or shape that does not fit.
        TypeError: wrong dtypes.
    """
    op = "round_tokens"
    check_tensor(op, "topk_weights", topk_weights, 2, "[T, C]")
    check_dtype(op, "topk_weights", topk_weights, FLOAT_DTYPES)
    check_tensor(op, "topk_ids", topk_ids, 2, "[T, C]")
    check_dtype(op, "topk_ids", topk_ids, INDEX_DTYPES)
    check_device(op, "topk_weights", topk_weights, "topk_ids", topk_ids)
    if topk_ids.shape != topk_weights.shape:
        raise ValueError(
            f"{op}: topk_ids must be {shape(topk_weights)} as topk_weights; got {shape(topk_ids)}"
        )
    check_rows(op, topk_ids.shape[0] * topk_ids.shape[1])
    check_num_experts(op, num_experts)
    check_count(op, "top_k", top_k)
    _check_tile(op, tile)
    check_choice(op, "mode", mode, MODES)
    if top_k > topk_ids.shape[1]:
        raise ValueError(
            f"{op}: top_k must be at most topk_ids.shape[1] = {topk_ids.shape[1]}; got {top_k}"
        )
    if token_mask is not None:
        check_tensor(op, "token_mask", token_mask, 1, "[T]")
        check_dtype(op, "token_mask", token_mask, (torch.bool,))
        check_device(op, "topk_weights", topk_weights, "token_mask", token_mask)
        if token_mask.shape[0] != topk_ids.shape[0]:
            raise ValueError(
                f"{op}: token_mask must be [T] = [{topk_ids.shape[0]}]; got {shape(token_mask)}"
            )
    arguments = (topk_weights, topk_ids, token_mask, num_experts, top_k, tile, mode)
    return RoundedTokens(*call_op(_op, *arguments))
