"""Rows and matrices that lie more than 2**31 elements apart in a CPU's memory.

Memory that nothing touches costs nothing: the tensors here are views of far more than they use.
"""

import torch
from torch import Tensor

import moe_kernels

APART = 2**30 + 48


def far(value: Tensor) -> Tensor:
    """The same rows, or matrices, APART elements from one to the next."""
    inner = value[0].contiguous()
    memory = torch.empty(APART * (len(value) - 1) + inner.numel(), dtype=value.dtype)
    return memory.as_strided(value.shape, (APART, *inner.stride())).copy_(value)


def test_offsets_are_of_64_bits() -> None:
    experts, hidden, inner = 4, 40, 24
    x = torch.randn(4, hidden).bfloat16()
    gate_up = torch.randn(experts, hidden, 2 * inner).bfloat16()
    down = torch.randn(experts, inner, hidden).bfloat16()
    ids, weights = torch.tensor([[3], [2], [1], [0]]), torch.rand(4, 1)

    def results(x: Tensor, gate_up: Tensor, down: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = moe_kernels.fused_experts(leaf, gate_up, down, ids, weights)
        order = moe_kernels.sort_by_expert(ids, experts)
        rows = moe_kernels.permute(x, order)
        return [
            y,
            *torch.autograd.grad(y.float().sum(), leaf),
            rows,
            moe_kernels.unpermute(x, order, weights),
            moe_kernels.grouped_gemm(x, gate_up, order.offsets),
            moe_kernels.grouped_gemm_wgrad(x, rows, order.offsets),
            moe_kernels.expert_activation(x, "swiglu"),
            moe_kernels.topk_router(x, 2).topk_weights,
            moe_kernels.quantize_experts(gate_up, "int8").codes,
        ]

    expected = results(x, gate_up, down)
    for case in ((far(x), gate_up, down), (x, far(gate_up), down), (x, gate_up, far(down))):
        found = results(*case)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
