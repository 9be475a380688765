"""The experts of one layer with weights of B bits: T tokens, H hidden, I intermediate, E experts, K
a token.

The truth is the layer with the weights as they were before: an error is that of the format, and no
result is void for it. The floor reads the needed experts' B bits (of 4, with a scale of 16 bits for
each 32 weights) once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from benchmarks.ops._shapes import DECODE_TOKENS, LAYERS
from benchmarks.ops.fused_experts import fused_experts
from benchmarks.registry import FORWARD_ONLY, Case, Cost, Op, Shape

BITS = (8, 4)
CPU_DECODE_TOKENS = (1, 4, 16)


def _make_case(
    shape: Shape, dtype: torch.dtype, device: torch.device, routing: str, seed: int
) -> Case:
    if shape["B"] not in BITS:
        raise ValueError(f"shape must have B of {' or '.join(map(str, BITS))}; got {shape['B']}")
    return replace(fused_experts.make_case(shape, dtype, device, routing, seed), differentiable=())


def _cost(case: Case) -> Mapping[str, Cost]:
    forward = fused_experts.cost(case)["forward"]
    T, H, B = (case.shape[letter] for letter in "THB")
    rows = 2.0 * T * H * case.dtype.itemsize
    bits = B + 16 / 32 if B == 4 else B
    weights = (forward.bytes - rows) / case.dtype.itemsize
    return {"forward": Cost(forward.flops, weights * bits / 8 + rows)}


def _set(name: str, tokens: tuple[int, ...]) -> list[Shape]:
    letters = "THIEKB"
    return [
        Shape(dict(zip(letters, (t, *LAYERS[name], bits), strict=True)))
        for bits in BITS
        for t in tokens
    ]


fused_experts_quantized = Op(
    name="fused_experts_quantized",
    outputs=("y",),
    shape_sets={
        "cpu": _set("qwen3-30b-a3b", CPU_DECODE_TOKENS),
        **{f"{name}-decode": _set(name, DECODE_TOKENS) for name in LAYERS},
    },
    defaults={"cpu": ("cpu",), "cuda": ("qwen3-30b-a3b-decode",)},
    make_case=_make_case,
    cost=_cost,
    truth=fused_experts.truth,
    dtypes={"cpu": ("bf16",), "cuda": ("bf16",)},
    directions=FORWARD_ONLY,
    bound=0.3,  # the error of 4 bits is 0.14 to 0.2, and no fault of an implementation
)
