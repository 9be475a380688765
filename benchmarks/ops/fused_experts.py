"""The experts of one layer: T tokens, H hidden, I intermediate, E experts, K a token, R = T * K.

Weights are in checkpoint layout: gate_up [E, 2I, H] and down [E, H, I], with swiglu between. The
variant "swigluoai" is gpt-oss: gate_up [E, H, 2I], gate and up interleaved, down [E, I, H], with
biases, and that activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops._shapes import OAI, layer_sets
from benchmarks.registry import Case, Cost, Inputs, Op, Shape, Truth
from benchmarks.routing import make_topk_ids
from moe_kernels import reference

# Rotating inputs: few tokens touch few experts, and the next call must not find them in a cache.
MAX_INPUT_SETS = 8
BIASES = ("gate_up_bias", "down_bias")


def is_oai(case: Case) -> bool:
    return case.shape.variant == OAI


def matrices(case: Case, of: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """gate_up [E, H, 2I] and down [E, I, H], views of the weights (or of ``of``)."""
    of = case.weights if of is None else of
    gate_up, down = of["gate_up"], of["down"]
    return (gate_up, down) if is_oai(case) else (gate_up.mT, down.mT)


def options(case: Case, of: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """What else the layer is told, as ``moe_kernels.fused_experts`` names it."""
    of = case.weights if of is None else of
    if not is_oai(case):
        return {}
    return {"activation": OAI, "interleaved": True, **{name: of[name] for name in BIASES}}


def check_variant(shape: Shape) -> None:
    if shape.variant not in ("", OAI):
        raise ValueError(f"fused_experts: variant must be {OAI}; got {shape.variant!r}")


def _make_case(
    shape: Shape, dtype: torch.dtype, device: torch.device, routing: str, seed: int
) -> Case:
    T, H, I, E, K = (shape[letter] for letter in "THIEK")  # noqa: E741
    check_variant(shape)
    generator = torch.Generator().manual_seed(seed)
    on_device = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        values = torch.empty(size, dtype=dtype, device=device)
        return values.normal_(std=scale, generator=on_device)

    # unit-scale everywhere: outputs of each product have the variance of its input
    oai = shape.variant == OAI
    gate_up, down = (E, H, 2 * I) if oai else (E, 2 * I, H), (E, I, H) if oai else (E, H, I)
    weights = {
        "gate_up": normal(*gate_up, scale=H**-0.5),
        "down": normal(*down, scale=I**-0.5),
    }
    if oai:
        weights |= {"gate_up_bias": normal(E, 2 * I), "down_bias": normal(E, H)}
    inputs: list[Inputs] = []
    for _ in range(MAX_INPUT_SETS if T <= 64 else 2):
        ids = make_topk_ids(T, E, K, routing, generator)
        chosen = torch.rand(T, K, generator=generator) + 0.1
        inputs.append(
            {
                "x": normal(T, H),
                "topk_ids": ids.to(device),
                "topk_weights": (chosen / chosen.sum(1, keepdim=True)).to(device, dtype),
                "grad": normal(T, H),
            }
        )
    differentiable = ("x", "topk_weights", *weights)
    case = Case(shape, dtype, device, inputs, weights, differentiable)
    for index in range(len(inputs)):
        for leaf in case.leaves(index).values():
            leaf.requires_grad_()
    return case


def _cost(case: Case) -> Mapping[str, Cost]:
    """Two products forward, twice that backward; every needed expert read once each way.

    Bytes forward: weights of the experts that have tokens, x, y. Backward: the same weights
    and x, the two gradients of size [T, H] and the dense weight gradients of all experts.
    """
    T, H, I, E, K = (case.shape[letter] for letter in "THIEK")  # noqa: E741
    size = case.dtype.itemsize
    hit = sum(float(i["topk_ids"].unique().numel()) for i in case.inputs) / len(case.inputs)
    flops, expert = 6.0 * T * K * H * I, 3.0 * H * I * size
    forward = Cost(flops, hit * expert + 2.0 * T * H * size)
    backward = Cost(2 * flops, (hit + E) * expert + 3.0 * T * H * size)
    return {"forward": forward, "backward": backward}


def _truth(case: Case, index: int, gradients: bool) -> Mapping[str, Truth]:
    T, K = case.shape["T"], case.shape["K"]
    inputs, device = case.inputs[index], case.device
    rows = _spread(T, max(1, min(4, 32 // K)), device)
    experts = inputs["topk_ids"][rows].unique()
    y, of = _definition(case, inputs, rows, experts, gradients)
    found = {"y": Truth(rows, y.detach())}
    if gradients:
        wanted = [of["x"], of["topk_weights"]]
        dx, dweights = torch.autograd.grad(y, wanted, inputs["grad"][rows].double())
        found |= {"x": Truth(rows, dx), "topk_weights": Truth(rows, dweights)}
        busy = inputs["topk_ids"].flatten()[_spread(T * K, 2, device)].unique()
        tokens = torch.isin(inputs["topk_ids"], busy).any(1).nonzero().flatten()
        y, of = _definition(case, inputs, tokens, busy, True)
        wanted = [of[name] for name in case.weights]
        grads = torch.autograd.grad(y, wanted, inputs["grad"][tokens].double())
        slots = int(torch.isin(inputs["topk_ids"], busy).sum())
        for name, grad in zip(case.weights, grads, strict=True):
            # of few tokens: a sum of few outer products, whose factors have the errors
            independent = min(grad.numel(), slots * sum(grad.shape[1:]))
            found[name] = Truth(busy, grad, independent)
    return found


def _spread(size: int, count: int, device: torch.device) -> Tensor:
    """Up to ``count`` different indices below ``size``, the first and the last among them."""
    return torch.linspace(0, size - 1, min(size, count), device=device).round().long().unique()


def _definition(
    case: Case, inputs: Inputs, tokens: Tensor, experts: Tensor, gradients: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The layer in float64 on some tokens, with only some experts; other experts add nothing."""
    ids = inputs["topk_ids"][tokens]
    matches = ids[:, :, None] == experts
    local = torch.where(matches.any(2), matches.int().argmax(2), -1)
    of = {name: inputs[name].detach()[tokens].double() for name in ("x", "topk_weights")}
    of |= {name: value.detach()[experts].double() for name, value in case.weights.items()}
    with torch.set_grad_enabled(gradients):
        for value in of.values():
            value.requires_grad_(gradients)
        y = reference.fused_experts(
            of["x"], *matrices(case, of), local, of["topk_weights"], **options(case, of)
        )
    return y, of


fused_experts = Op(
    name="fused_experts",
    outputs=("y",),
    shape_sets=layer_sets(),
    defaults={"cpu": ("cpu",), "cuda": ("qwen3-30b-a3b", "qwen3-30b-a3b-decode")},
    variants=("", OAI),
    make_case=_make_case,
    cost=_cost,
    truth=_truth,
)
