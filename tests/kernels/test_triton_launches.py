"""How many kernels a layer launches, and which: what small batches pay for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from moe_kernels.triton._launch import TRITON_VERSION
from moe_kernels.triton.fused_experts import (
    fused_experts,
    fused_experts_backward,
    fused_experts_backward_,
)
from moe_kernels.triton.fused_experts_fp8 import (
    fused_experts_fp8,
    fused_experts_fp8_backward,
)
from moe_kernels.triton.round_tokens import round_tokens
from moe_kernels.triton.topk_router import topk_router, topk_router_backward
from tests.conftest import HAS_GPU

pytestmark = pytest.mark.skipif(HAS_GPU, reason="counts launches of interpreted kernels")
E, K, H, INNER = 128, 8, 2048, 768
SORT_ONCE = ["_sort_one_block_kernel"]
SORT = ["_count_kernel", "_scatter_kernel"]
# of rows, where a product of gathered rows cannot be pipelined
GATHER = [] if TRITON_VERSION >= (3, 7) else ["_permute_kernel"]
EXPERTS = [*GATHER, "_up_kernel", "_grouped_gemm_kernel", "_unpermute_kernel"]


def launches(function: Any, *args: Any) -> tuple[list[str], Any]:
    """The kernels that a launcher launches, none of which runs, and its result."""
    from triton.runtime.interpreter import InterpretedFunction

    names: list[str] = []

    def note(self: Any, *args: Any, **kwargs: Any) -> None:
        names.append(self.fn.__name__)

    with mock.patch.object(InterpretedFunction, "run", note):
        result = function(*args)
    return names, result


def experts(tokens: int, save: bool) -> tuple[Any, ...]:
    meta = {"device": "meta"}
    return (
        torch.empty(tokens, H, dtype=torch.bfloat16, **meta),
        torch.empty(E, H, 2 * INNER, dtype=torch.bfloat16, **meta),
        torch.empty(E, INNER, H, dtype=torch.bfloat16, **meta),
        torch.empty(tokens, K, dtype=torch.int32, **meta),
        torch.empty(tokens, K, **meta),
        *(None, None, "swiglu", False, 1.702, float("inf"), tokens * K, save, None, None),
    )


@pytest.mark.parametrize(("tokens", "sort"), [(1, SORT_ONCE), (64, SORT_ONCE), (4096, SORT)])
def test_forward(tokens: int, sort: list[str]) -> None:
    """The tile map comes with the sort."""
    assert launches(fused_experts, *experts(tokens, False))[0] == [*sort, *EXPERTS]
    # also in training: what saves h clears the rows of no expert
    assert launches(fused_experts, *experts(tokens, True))[0] == [*sort, *EXPERTS]


@pytest.mark.parametrize("backward", [fused_experts_backward, fused_experts_backward_])
def test_backward(backward: Callable[..., Any]) -> None:
    x, gate_up, down, _, weights, *options = experts(4096, True)
    y, h, *order = fused_experts_outputs = launches(fused_experts, *experts(4096, True))[1]
    assert len(fused_experts_outputs) == 5
    names, _ = launches(
        backward,
        *(y, x, gate_up, down, weights, h, *order, *options[:6], [True] * 4 + [False] * 2),
    )
    assert names == [
        "_prepare_kernel",
        *GATHER,
        "_down_backward_kernel",
        "_wgrad_kernel",
        "_sum_partials_kernel",
        *GATHER,
        "_wgrad_kernel",
        "_grouped_gemm_kernel",
        "_unpermute_kernel",
    ]


def test_float8() -> None:
    """Gathering and rounding are one launch; the product rounds its activation, and clears h."""
    arguments = (*experts(4096, True), None, None)
    names, (y, h, *order) = launches(fused_experts_fp8, *arguments)
    assert names == [
        "_quantize_weights_kernel",
        *SORT,
        "_permute_quantize_kernel",
        "_scaled_up_kernel",
        "_quantize_weights_kernel",
        "_scaled_grouped_gemm_kernel",
        "_unpermute_kernel",
    ]
    assert launches(fused_experts_fp8, *experts(4096, False), None, None)[0] == names
    x, gate_up, down, _, weights, *options = arguments
    needs = [True] * 4 + [False] * 2
    saved = (y, x, gate_up, down, weights, h, *order, *options[:6])
    names, _ = launches(fused_experts_fp8_backward, *saved, needs)
    assert names == [
        "_quantize_weights_kernel",
        "_prepare_kernel",
        "_permute_quantize_kernel",
        "_scaled_grouped_gemm_kernel",
        "_activate_quantize_backward_kernel",
        "_sum_partials_kernel",
        *GATHER,
        "_wgrad_kernel",
        *GATHER,
        "_wgrad_kernel",
        "_quantize_weights_kernel",
        "_scaled_grouped_gemm_kernel",
        "_unpermute_kernel",
    ]


def test_large_layers_launch_a_product_and_a_sum_a_chunk() -> None:
    names = launches(fused_experts, *experts(2**17, False))[0]
    assert names == [*SORT, *EXPERTS]  # 2048 columns are one chunk
    wide = list(experts(2**17, False))
    wide[0] = torch.empty(2**17, 2 * H, dtype=torch.bfloat16, device="meta")
    wide[1] = torch.empty(E, 2 * H, 2 * INNER, dtype=torch.bfloat16, device="meta")
    wide[2] = torch.empty(E, INNER, 2 * H, dtype=torch.bfloat16, device="meta")
    assert launches(fused_experts, *wide)[0] == [*SORT, *EXPERTS, *EXPERTS[-2:]]


def test_router_adds_to_the_counters_of_chosen_experts_alone() -> None:
    """Many programs add to the same few counters."""
    from triton.runtime.interpreter import InterpreterBuilder

    adds: list[int] = []
    inner = InterpreterBuilder.create_atomic_rmw

    def note(self: Any, operation: Any, pointers: Any, values: Any, mask: Any, *rest: Any) -> Any:
        adds.append(int(mask.data.sum()))
        return inner(self, operation, pointers, values, mask, *rest)

    tokens, experts, top_k, at_once = 40, 64, 2, 512 // 64
    logits = torch.randn(tokens, experts)
    options = ("softmax", True, True, None, 1, 1, "max", 0.0, 1.0, None, None, False)
    with mock.patch.object(InterpreterBuilder, "create_atomic_rmw", note):
        _, ids, _, load = topk_router(logits, top_k, *options)
    assert adds == [len(chosen.unique()) for chosen in ids.split(at_once)]
    assert torch.equal(load, ids.flatten().bincount(minlength=experts).int())


def test_router_and_token_rounding() -> None:
    options = ("softmax", True, True, None, 1, 1, "max", 0.0, 1.0, None, None, False)
    logits = torch.empty(4096, E, device="meta")
    names, (weights, ids, *_) = launches(topk_router, logits, K, *options, K)
    assert names == ["_topk_router_kernel"]
    names, _ = launches(
        topk_router_backward, weights, None, logits, ids, "softmax", True, True, 1.0, K
    )
    assert names == ["_topk_router_backward_kernel"]
    assert launches(round_tokens, weights, ids, None, E, K, 128, "nearest")[0] == [
        *SORT,
        "_round_tokens_kernel",
    ]


@pytest.mark.parametrize("training", [True, False])
def test_float8_projects_up_by_warps_with_roles_where_h_is_kept(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a product does not go through the activation, and its result is then read again."""
    from moe_kernels.triton import fused_experts_fp8 as module

    asked = []

    def is_made_for(cut: Any, b: torch.Tensor, a: torch.Tensor, out: torch.Tensor) -> bool:
        asked.append((b.shape, a.shape, out.shape))
        return True

    monkeypatch.setattr(module, "has_hopper_scaled", is_made_for)
    names, _ = launches(fused_experts_fp8, *experts(4096, training), None, None)
    apart = ["_scaled_grouped_gemm_kernel", "_activate_quantize_kernel", "_zero_tail_kernel"]
    assert names[4 : 5 + 2 * training] == (apart if training else ["_scaled_up_kernel"])
    rows = 4096 * K
    assert asked == [((E, H, 2 * INNER), (rows, H), (rows, 2 * INNER))] * training


@pytest.mark.parametrize("training", [True, False])
def test_float8_projects_up_and_activates_by_warps_with_roles(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one launch, if that is asked for and can be; rows of h of no expert are another's."""
    from moe_kernels.triton import _hopper_scaled_up
    from moe_kernels.triton import fused_experts_fp8 as module

    asked, made = [], []

    def is_made_for(act: Any, x: Any, w: Any, h: Any, inner: int, cut: Any) -> bool:
        asked.append((x.shape, w.shape, h.shape, inner))
        return True

    def project_up(x: Any, w: Any, bias: Any, h: Any, a: Any, *others: Any) -> None:
        made.append((x[0].shape, w[0].shape, h.shape, a[0].shape, a[1].shape))

    monkeypatch.setattr(module, "activates_in_roles", is_made_for)
    monkeypatch.setattr(_hopper_scaled_up, "project_up", project_up)
    names, _ = launches(fused_experts_fp8, *experts(4096, training), None, None)
    clears = ["_zero_tail_kernel"] * training
    assert names[4:] == [
        *clears,
        "_quantize_weights_kernel",
        "_scaled_grouped_gemm_kernel",
        "_unpermute_kernel",
    ]
    rows = 4096 * K
    shapes = (rows, H), (E, H, 2 * INNER), (rows * training, 2 * INNER)
    assert asked == [(*shapes, INNER)]
    assert made == [(*shapes, (rows, INNER), (rows, -(-INNER // 128)))]
