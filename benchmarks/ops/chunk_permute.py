"""Chunks of rows in another order, as after an exchange: R rows, H hidden, P sources, E experts.

The P * E chunks come by source, then expert, and leave by expert, then source.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from benchmarks.ops._order import INPUT_SETS
from benchmarks.ops._shapes import ALL_LAYERS, CPU_TOKENS, TRAINING_TOKENS
from benchmarks.registry import Case, Cost, Op, Shape, Truth
from benchmarks.routing import make_topk_ids

RANKS = 8  # that a model's experts are spread over


def _shapes(name: str, tokens: tuple[int, ...]) -> list[Shape]:
    hidden, _, experts, top_k = ALL_LAYERS[name]
    local = experts // RANKS
    return [Shape({"R": t * top_k, "H": hidden, "P": RANKS, "E": local}) for t in tokens]


def _make_case(
    shape: Shape, dtype: torch.dtype, device: torch.device, routing: str, seed: int
) -> Case:
    R, H, P, E = (shape[letter] for letter in "RHPE")
    generator = torch.Generator().manual_seed(seed)
    on_device = torch.Generator(device).manual_seed(seed)
    order = torch.arange(P * E).view(P, E).T.reshape(-1).to(device)
    inputs = []
    for _ in range(INPUT_SETS):
        expert = make_topk_ids(R, E, 1, routing, generator).flatten()
        source = torch.randint(0, P, (R,), generator=generator)
        sizes = torch.bincount(source * E + expert, minlength=P * E)
        x, grad = torch.empty(2, R, H, dtype=dtype, device=device).normal_(generator=on_device)
        inputs.append(
            {
                "rows": x.clone().requires_grad_(),
                "sizes": sizes.to(device),
                "order": order,
                "grad": grad,
            }
        )
    return Case(shape, dtype, device, inputs, differentiable=("rows",))


def _cost(case: Case) -> Mapping[str, Cost]:
    """Each way [R, H] is read and written."""
    moved = 2.0 * case.shape["R"] * case.shape["H"] * case.dtype.itemsize
    return {"forward": Cost(0.0, moved), "backward": Cost(0.0, moved)}


def _truth(case: Case, index: int, gradients: bool) -> Mapping[str, Truth]:
    """By the rows' chunks, each numbered within."""
    inputs, device = case.inputs[index], case.device
    sizes, order = inputs["sizes"], inputs["order"]
    chunk = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=device)
    source = place[chunk].argsort(stable=True)  # of each row of the result
    some = torch.arange(0, len(source), max(1, len(source) // 64), device=device)
    found = {"out": Truth(some, inputs["rows"].detach()[source[some]].double())}
    if gradients:
        found["rows"] = Truth(source[some], inputs["grad"][some].double())
    return found


chunk_permute = Op(
    name="chunk_permute",
    outputs=("out",),
    shape_sets={
        "cpu": _shapes("qwen3-30b-a3b", CPU_TOKENS),
        **{n: _shapes(n, TRAINING_TOKENS) for n in ALL_LAYERS},
    },
    defaults={"cpu": ("cpu",), "cuda": ("qwen3-30b-a3b", "deepseek-v3")},
    make_case=_make_case,
    cost=_cost,
    truth=_truth,
)
