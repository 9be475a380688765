"""fused_experts adding the gradients of its weights to buffers that the caller keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import moe_kernels
from moe_kernels import reference
from tests.conftest import Implementation
from tests.kernels.accuracy import assert_accurate, gradients, torch_experts
from tests.kernels.routing import SHAPES
from tests.kernels.test_fused_experts import make_case

WEIGHTS = ("gate_up", "down")


def leaves_of(inputs: dict[str, Tensor], impl: Implementation) -> dict[str, Tensor]:
    return {
        name: value.to(impl.device).requires_grad_(value.is_floating_point())
        for name, value in inputs.items()
    }


def zeros_for(leaves: dict[str, Tensor], *, transposed: bool = False) -> tuple[Tensor, Tensor]:
    def buffer(weight: Tensor) -> Tensor:
        like = weight.detach().mT if transposed else weight.detach()
        zeros = torch.zeros(like.shape, device=like.device)
        return zeros.mT if transposed else zeros

    return buffer(leaves["gate_up"]), buffer(leaves["down"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("routing", SHAPES)
def test_gradients_are_added(impl: Implementation, routing: str, dtype: torch.dtype) -> None:
    inputs, upstream = make_case(routing, dtype, bias=True)
    leaves, up = leaves_of(inputs, impl), upstream.to(impl.device)
    main_grads = zeros_for(leaves, transposed=routing == "dropped")
    y = moe_kernels.fused_experts(**leaves, main_grads=main_grads)
    y.backward(up)

    once = gradients(moe_kernels.fused_experts, {n: v.detach() for n, v in leaves.items()}, up)
    assert torch.equal(y, once["out"])
    assert leaves["gate_up"].grad is leaves["down"].grad is None
    for name in ("x", "topk_weights", "gate_up_bias", "down_bias"):
        assert torch.equal(leaves[name].grad, once[name]), name  # type: ignore[arg-type]
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    truth = gradients(reference.fused_experts, wide, upstream)
    yardstick = gradients(
        lambda **kw: torch_experts(**kw, alpha=1.702, limit=float("inf")), inputs, upstream
    )
    for name, buffer in zip(WEIGHTS, main_grads, strict=True):
        assert_accurate(name, buffer, truth[name], yardstick[name].float())


def test_autograd_knows_that_they_were_added_to(impl: Implementation) -> None:
    inputs, upstream = make_case("plain", torch.float32)
    leaves = leaves_of(inputs, impl)
    main_grads = zeros_for(leaves)
    norms = [(buffer * leaves[n]).sum() for n, buffer in zip(WEIGHTS, main_grads, strict=True)]
    y = moe_kernels.fused_experts(**leaves, main_grads=main_grads)
    y.backward(upstream.to(impl.device))
    for norm in norms:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            norm.backward()


def test_several_gradients_at_once_are_refused(impl: Implementation) -> None:
    inputs, upstream = make_case("plain", torch.float32)
    leaves = leaves_of(inputs, impl)
    main_grads = zeros_for(leaves)
    y = moe_kernels.fused_experts(**leaves, main_grads=main_grads)
    wanted = [leaves["x"], leaves["gate_up"]]
    many = torch.stack([upstream, 2 * upstream]).to(impl.device)
    with pytest.raises(NotImplementedError, match=r"several gradients at once .* to main_grads"):
        torch.autograd.grad(y, wanted, many, is_grads_batched=True, allow_unused=True)
    assert not any(buffer.any() for buffer in main_grads)


@pytest.mark.parametrize("dynamic", [None, True])
def test_plain_tensors_compile_whole(dynamic: bool | None) -> None:
    inputs, _ = make_case("plain", torch.float32)
    leaves = {name: value.clone() for name, value in inputs.items()}
    leaves["x"].requires_grad_()
    for name in WEIGHTS:
        leaves[name].requires_grad_()
    compiled, plain = zeros_for(leaves), zeros_for(leaves)

    def layer(main_grads: Any, **leaves: Tensor) -> Tensor:
        return moe_kernels.fused_experts(**leaves, main_grads=main_grads)

    run = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    run(compiled, **leaves).sum().backward()
    layer(plain, **leaves).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(compiled, plain, strict=True))
    overlapping = tuple(b[:1].expand(b.shape) for b in zeros_for(leaves))
    with pytest.raises(Exception, match="memory of its own for each element"):
        run(overlapping, **leaves)


def test_micro_batches_accumulate_without_rounding(impl: Implementation) -> None:
    """The sum of many gradients in float32, where sums in bf16 would lose most of a small one."""
    inputs, upstream = make_case("plain", torch.bfloat16)
    leaves, up = leaves_of(inputs, impl), upstream.to(impl.device)
    first, many = zeros_for(leaves), zeros_for(leaves)
    moe_kernels.fused_experts(**leaves, main_grads=first).backward(up)
    for buffer in many:
        buffer.fill_(1000)
    for _ in range(3):
        moe_kernels.fused_experts(**leaves, main_grads=many).backward(up)
    for one, buffer in zip(first, many, strict=True):
        torch.testing.assert_close(buffer - 1000, 3 * one, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("given", WEIGHTS)
def test_one_buffer_of_two(impl: Implementation, given: str) -> None:
    inputs, upstream = make_case("plain", torch.float32)
    leaves, up = leaves_of(inputs, impl), upstream.to(impl.device)
    once = gradients(moe_kernels.fused_experts, {n: v.detach() for n, v in leaves.items()}, up)
    buffers = dict(zip(WEIGHTS, zeros_for(leaves), strict=True))
    main_grads = tuple(buffers[name] if name == given else None for name in WEIGHTS)
    moe_kernels.fused_experts(**leaves, main_grads=main_grads).backward(up)
    for name in WEIGHTS:
        grad = leaves[name].grad
        if name == given:
            assert grad is None
            torch.testing.assert_close(buffers[name], once[name])
        else:
            assert torch.equal(grad, once[name])  # type: ignore[arg-type]
            assert buffers[name].count_nonzero() == 0


def test_frozen_weights_leave_their_buffers_alone(impl: Implementation) -> None:
    inputs, upstream = make_case("plain", torch.float32)
    leaves = leaves_of(inputs, impl)
    leaves["down"].requires_grad_(False)
    main_grads = zeros_for(leaves)
    moe_kernels.fused_experts(**leaves, main_grads=main_grads).backward(upstream.to(impl.device))
    assert main_grads[0].count_nonzero() > 0
    assert main_grads[1].count_nonzero() == 0


def test_a_split_backward_adds_once_and_costs_no_more(impl: Implementation) -> None:
    """The inputs' half adds nothing; the weights' half takes the gradient of h from it."""
    inputs, upstream = make_case("dropped", torch.float32, bias=True)
    leaves, up = leaves_of(inputs, impl), upstream.to(impl.device)
    whole, parts = zeros_for(leaves), zeros_for(leaves)
    with FlopCounterMode(display=False) as counter:
        y = moe_kernels.fused_experts(**leaves, main_grads=whole)
        y.backward(up)
    cost = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        y = moe_kernels.fused_experts(**leaves, main_grads=parts)
        torch.autograd.grad(y, (leaves["x"], leaves["topk_weights"]), up, retain_graph=True)
        assert all(buffer.count_nonzero() == 0 for buffer in parts)
        torch.autograd.backward(y, up, inputs=[leaves["gate_up"], leaves["down"]])
    assert counter.get_total_flops() == cost
    for part, buffer in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, buffer)


def test_under_activation_checkpointing_and_compile(impl: Implementation) -> None:
    inputs, upstream = make_case("plain", torch.float32)
    leaves, up = leaves_of(inputs, impl), upstream.to(impl.device)
    expected = zeros_for(leaves)
    moe_kernels.fused_experts(**leaves, main_grads=expected).backward(up)

    def layer(x: Tensor, main_grads: tuple[Tensor, Tensor]) -> Tensor:
        return moe_kernels.fused_experts(**{**leaves, "x": x}, main_grads=main_grads)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for run in (lambda *given: checkpoint(layer, *given, use_reentrant=False), compiled):
        found = zeros_for(leaves)
        run(leaves["x"], found).backward(up)
        for buffer, right in zip(found, expected, strict=True):
            assert torch.equal(buffer, right)
        assert leaves["gate_up"].grad is None


def test_wrong_buffers_are_refused(impl: Implementation) -> None:
    inputs, _ = make_case("plain", torch.bfloat16)
    leaves = leaves_of(inputs, impl)
    right = zeros_for(leaves)

    def refused(kind: type[Exception], match: str, up: Tensor) -> None:
        with pytest.raises(kind, match=match):
            moe_kernels.fused_experts(**leaves, main_grads=(up, right[1]))

    refused(TypeError, "main_grads: that of gate_up", right[0].bfloat16())
    refused(ValueError, r"must be \[8, 40, 48\] as the weight", right[0][:, :-1])
    refused(ValueError, "memory of its own", right[0][:1].expand(8, 40, 48))
    overlapping = torch.zeros(40 + 8 + 48, device=impl.device).as_strided((8, 40, 48), (1, 1, 1))
    refused(ValueError, "memory of its own", overlapping)
    refused(ValueError, "without requires_grad", right[0].clone().requires_grad_())
    for wrong in (right[:1], (*right, None), right[0], 5):
        with pytest.raises(
            TypeError, match=r"main_grads must be a pair, .*; got [a-zA-Z ]+[0-9]?$"
        ):
            moe_kernels.fused_experts(**leaves, main_grads=wrong)


def test_buffers_may_lie_in_larger_ones(impl: Implementation) -> None:
    """As parts of one flat buffer, or with columns between that belong to others."""
    inputs, upstream = make_case("plain", torch.float32)
    leaves, up = leaves_of(inputs, impl), upstream.to(impl.device)
    right = zeros_for(leaves)
    moe_kernels.fused_experts(**leaves, main_grads=right).backward(up)
    flat = torch.zeros(sum(buffer.numel() for buffer in right), device=impl.device)
    parts = [
        part.view(buffer.shape)
        for part, buffer in zip(flat.split([b.numel() for b in right]), right, strict=True)
    ]
    spaced = [torch.zeros(b.shape[0], 2, *b.shape[1:], device=impl.device)[:, 1] for b in right]
    wide = [torch.zeros(*b.shape[:2], 2 * b.shape[2], device=impl.device)[..., ::2] for b in right]
    for buffers in (parts, spaced, wide):
        moe_kernels.fused_experts(**leaves, main_grads=buffers).backward(up)
        for buffer, expected in zip(buffers, right, strict=True):
            torch.testing.assert_close(buffer, expected)
    last = wide[0]._base
    assert last is not None
    assert last[..., 1::2].count_nonzero() == 0
