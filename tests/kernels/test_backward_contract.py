"""The backward of fused_experts: in halves, of a part of its inputs, and what it keeps for it."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import moe_kernels
from tests.conftest import Implementation
from tests.kernels.test_fused_experts import make_case
from tests.kernels.test_op_contract import leaves_of


def test_split_backward_equals_one(impl: Implementation) -> None:
    inputs, upstream = make_case("dropped", torch.bfloat16, bias=True)
    leaves = leaves_of(inputs, impl)
    names = [name for name, value in leaves.items() if value.requires_grad]
    y = moe_kernels.fused_experts(**leaves)
    up = upstream.to(impl.device)
    whole = dict(
        zip(
            names,
            torch.autograd.grad(y, [leaves[n] for n in names], up, retain_graph=True),
            strict=True,
        )
    )
    pairs = (["x", "topk_weights"], ["gate_up", "down"], ["gate_up_bias", "down_bias"])
    for part in (*pairs, *([name] for name in names)):
        grads = torch.autograd.grad(y, [leaves[n] for n in part], up, retain_graph=True)
        for name, grad in zip(part, grads, strict=True):
            assert torch.equal(grad, whole[name]), name


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_the_halves_of_a_split_backward_cost_as_much_as_one(
    impl: Implementation, activation: str
) -> None:
    """The second takes the gradient of h from the first, if it is of the same upstream.

    That of down may differ in the last bit: the activations then come from h alone.
    """
    inputs, upstream = make_case("dropped", torch.float32, activation=activation, bias=True)
    leaves = leaves_of(inputs, impl)
    halves = (["x", "topk_weights"], ["gate_up", "down", "gate_up_bias", "down_bias"])
    y = moe_kernels.fused_experts(**leaves, activation=activation)

    def run(names: list[str], up: Tensor) -> tuple[dict[str, Tensor], int]:
        with FlopCounterMode(display=False) as counter:
            grads = torch.autograd.grad(y, [leaves[n] for n in names], up, retain_graph=True)
        return dict(zip(names, grads, strict=True)), counter.get_total_flops()

    ups = [upstream.to(impl.device), torch.randn_like(upstream).to(impl.device)]
    whole, cost = zip(*(run([*halves[0], *halves[1]], up) for up in ups), strict=True)
    second_cost = run(halves[1], ups[0])[1]
    for first, later in ((0, 0), (0, 1), (1, 1)):
        inputs_grads, inputs_cost = run(halves[0], ups[first])
        weights_grads, weights_cost = run(halves[1], ups[later])
        for grads, expected in ((inputs_grads, whole[first]), (weights_grads, whole[later])):
            for name, grad in grads.items():
                torch.testing.assert_close(grad, expected[name], msg=name)
        if first == later:
            assert inputs_cost + weights_cost == cost[0]
        else:
            assert weights_cost == second_cost
    run(halves[0], ups[0])
    ups[0].mul_(2)
    for name, grad in run(halves[1], ups[0])[0].items():
        torch.testing.assert_close(grad, 2 * whole[0][name], msg=name)


def test_backward_does_only_the_work_owed(impl: Implementation) -> None:
    inputs, upstream = make_case("plain", torch.float32)
    leaves = leaves_of(inputs, impl)
    y = moe_kernels.fused_experts(**leaves)
    product = 2 * 37 * 3 * 40 * 24  # flops of the down projection
    for names, expected in ((["x"], 3), (["down"], 1), (["gate_up", "down"], 4)):
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(
                y, [leaves[n] for n in names], upstream.to(impl.device), retain_graph=True
            )
        assert counter.get_total_flops() == expected * product, names


@pytest.mark.parametrize("frozen", ["x", "gate_up", "down", "topk_weights"])
def test_frozen_inputs_get_no_gradient(impl: Implementation, frozen: str) -> None:
    inputs, _ = make_case("plain", torch.float32)
    leaves = leaves_of(inputs, impl)
    leaves[frozen] = leaves[frozen].detach()
    moe_kernels.fused_experts(**leaves).sum().backward()
    for name in ("x", "gate_up", "down", "topk_weights"):
        assert (leaves[name].grad is None) == (name == frozen)


def test_saves_what_is_documented_and_nothing_without_gradients(impl: Implementation) -> None:
    inputs, _ = make_case("plain", torch.bfloat16)
    leaves = leaves_of(inputs, impl)
    tokens, top_k, hidden, inner, experts = 37, 3, 40, 24, 8
    rows = tokens * top_k
    saved: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:  # all of what is kept, also where it is seen in part
        saved[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        moe_kernels.fused_experts(**leaves)
    weights = {leaves[name].untyped_storage().data_ptr() for name in ("gate_up", "down")}
    activations = sum(size for pointer, size in saved.items() if pointer not in weights)
    limit = 2 * tokens * hidden + 4 * rows * inner + 12 * rows + 4 * (experts + 1)
    assert activations <= limit

    saved.clear()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        y = moe_kernels.fused_experts(**leaves)
    assert not saved
    with torch.inference_mode():
        assert torch.equal(moe_kernels.fused_experts(**leaves), y)


def test_saved_tensors_survive_backward(impl: Implementation) -> None:
    inputs, upstream = make_case("dropped", torch.bfloat16, bias=True)
    leaves = leaves_of(inputs, impl)
    names = [name for name, value in leaves.items() if value.requires_grad]
    y = moe_kernels.fused_experts(**leaves)
    runs = [
        torch.autograd.grad(
            y, [leaves[n] for n in names], upstream.to(impl.device), retain_graph=True
        )
        for _ in range(2)
    ]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
