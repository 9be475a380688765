"""Backward formulas against finite differences, in float64 on the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import moe_kernels
from moe_kernels.reference import ACTIVATIONS, is_gated


def _leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


IDS = torch.tensor([[0, 2], [-1, 1], [2, 0], [3, 4], [1, -1]], dtype=torch.int32)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused_experts(activation: str, interleaved: bool) -> None:
    gated = is_gated(activation)
    width = 6 if gated else 3
    limit = 0.8 if activation in ("swiglu", "swigluoai") else None

    def run(x: Tensor, w1: Tensor, w2: Tensor, w: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        return moe_kernels.fused_experts(
            x,
            w1.mT,
            w2,
            IDS,
            w,
            activation=activation,
            gate_up_bias=b1,
            down_bias=b2,
            interleaved=interleaved and gated,
            limit=limit,
        )

    inputs = (_leaf(5, 4), _leaf(4, width, 4), _leaf(4, 3, 4), _leaf(5, 2))
    assert gradcheck(run, (*inputs, _leaf(4, width), _leaf(4, 4)))


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softmax_before_topk": False},
        {"score_func": "sigmoid", "route_scale": 2.5},
        {"score_func": "sqrtsoftplus"},
    ],
    ids=["softmax", "softmax_after", "sigmoid", "sqrtsoftplus"],
)
def test_topk_router(options: dict[str, Any], renormalize: bool) -> None:
    # logits far enough apart that a step of the check does not change the selection
    logits = (torch.randperm(4 * 6).view(4, 6).double() / 6 - 2).requires_grad_()

    def run(logits: Tensor) -> tuple[Tensor, Tensor]:
        out = moe_kernels.topk_router(
            logits, 3, renormalize=renormalize, return_scores=True, **options
        )
        return out.topk_weights, out.scores

    assert gradcheck(run, (logits,))


def test_permutations_and_grouped_gemm() -> None:
    order = moe_kernels.sort_by_expert(IDS, 4)

    def run(x: Tensor, b: Tensor, bias: Tensor, w: Tensor) -> Tensor:
        rows = moe_kernels.permute(x, order)
        out = moe_kernels.grouped_gemm(rows, b, order.offsets, bias=bias)
        return moe_kernels.unpermute(out, order, w)

    assert gradcheck(run, (_leaf(5, 3), _leaf(4, 3, 2), _leaf(4, 2), _leaf(5, 2)))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_expert_activation(kind: str) -> None:
    def run(h: Tensor, w: Tensor) -> Tensor:
        return moe_kernels.expert_activation(h, kind, row_weights=w)

    assert gradcheck(run, (_leaf(5, 6), _leaf(5)))
