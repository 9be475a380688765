"""Tokens to the ranks of their experts and back: T tokens a rank, H hidden size, E experts, K a
token, P ranks, U tokens received.

What is timed is dispatch and combine, with experts that take no time. What is checked is the sum
that experts of known factors yield: y[t] = sum_k weights[t, k] * factors[ids[t, k]] * x[t].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.ops._shapes import LAYERS
from benchmarks.registry import Case, Cost, Implementation, Inputs, Op, Output, Shape, Truth
from benchmarks.routing import make_topk_ids

TOKENS = (1, 16, 256, 4096)
CHECKED = 64  # tokens compared with float64


def _shapes(layer: str, tokens: Sequence[int]) -> list[Shape]:
    hidden, _, experts, top_k = LAYERS[layer]
    return [Shape({"T": t, "H": hidden, "E": experts, "K": top_k}) for t in tokens]


def owners(topk_ids: Tensor, shape: Shape) -> Tensor:
    """The rank of each slot's expert."""
    return topk_ids // (shape["E"] // shape["P"])


def _make_case(
    shape: Shape, dtype: torch.dtype, device: torch.device, routing: str, seed: int
) -> Case:
    """What this rank brings. Experts are chosen for all ranks at once: a popular one is so to all.

    ``rows`` and ``slots`` [P, P] count what rank i has for rank j: tokens, and choices of experts.
    """
    T, H, E, K, P = (shape[letter] for letter in "THEKP")
    rank = dist.get_rank() if P > 1 else 0
    generator = torch.Generator().manual_seed(seed)
    on_device = torch.Generator(device).manual_seed(1000 * seed + rank)
    inputs: list[Inputs] = []
    for _ in range(8 if T <= 64 else 2):
        ids = make_topk_ids(P * T, E, K, routing, generator).view(P, T, K)
        chosen = torch.nn.functional.one_hot(owners(ids, shape), P).sum(2)  # [P, T, P]
        weights = torch.rand(P, T, K, generator=generator)[rank] + 0.1
        x, grad = (
            torch.empty(T, H, dtype=dtype, device=device).normal_(generator=on_device)
            for _ in range(2)
        )
        inputs.append(
            {
                "x": x.requires_grad_(),
                "topk_ids": ids[rank].to(device),
                "topk_weights": (weights / weights.sum(1, keepdim=True))
                .to(device, dtype)
                .requires_grad_(),
                "grad": grad,
                "rows": (chosen > 0).sum(1),
                "slots": chosen.sum(1),
            }
        )
    factors = 0.5 + torch.arange(E, device=device) / E
    return Case(
        shape,
        dtype,
        device,
        inputs,
        differentiable=("x", "topk_weights"),
        check={"factors": factors},
    )


def _per_rank(case: Case, name: str) -> tuple[float, float]:
    """What a rank has for all ranks, and for others than itself, on average."""
    counts = [inputs[name] for inputs in case.inputs]
    share = case.shape["P"] * len(counts)
    everything = sum(float(c.sum()) for c in counts)
    own = sum(float(c.trace()) for c in counts)
    return everything / share, (everything - own) / share


def _cost(case: Case) -> Mapping[str, Cost]:
    """Bytes read and written by copying each sent row twice, and by adding the rows of a token.

    A rank's rows for itself count as sent, but need no copy on the way back. A call on one token is
    a matter of latency and has no such floor.
    """
    row = float(case.shape["H"] * case.dtype.itemsize)
    sent, travelling = _per_rank(case, "rows")
    copies, addition = 2 * (sent + travelling), sent + case.shape["T"]
    moved = (copies + addition) * row if case.shape["T"] > 1 else 0.0
    return {"forward": Cost(0.0, moved), "backward": Cost(0.0, moved)}


def _details(case: Case) -> Mapping[str, Any]:
    """Rows of a forward pass, and the bytes that leave a rank in it: there and back.

    ``once_per_rank`` counts ids and weights, ``per_expert_copy`` the counts of each expert.
    """
    H, E, K, P = (case.shape[letter] for letter in "HEKP")
    size = case.dtype.itemsize
    sent, travelling = _per_rank(case, "rows")
    _, copies = _per_rank(case, "slots")
    return {
        "rows_sent": sent,
        "rows_to_others": travelling,
        "copies_to_others": copies,
        "wire_bytes": {
            "once_per_rank": travelling * (2 * H * size + K * (4 + size)),
            "per_expert_copy": copies * 2 * H * size + 8 * E * (P - 1) / P,
        },
    }


def _truth(case: Case, index: int, gradients: bool) -> Mapping[str, Truth]:
    inputs, T = case.inputs[index], case.shape["T"]
    some = torch.arange(0, T, max(1, T // CHECKED), device=case.device)
    x, weights = (inputs[name].detach()[some].double() for name in ("x", "topk_weights"))
    factors = case.check["factors"].double()[inputs["topk_ids"][some]]
    scale = (weights * factors).sum(1, keepdim=True)
    found = {"y": Truth(some, scale * x)}
    if gradients:
        grad = inputs["grad"][some].double()
        found["x"] = Truth(some, scale * grad)
        found["topk_weights"] = Truth(some, factors * (x * grad).sum(1, keepdim=True))
    return found


def weighted(
    rows: Tensor, ids: Tensor, weights: Tensor, factors: Tensor, *, first: int = 0
) -> Tensor:
    """What experts do that only multiply by their factor, rounded as they would.

    Args:
        rows: [U, H].
        ids: [U, K], less ``first``; -1 for no expert.
        weights: [U, K].
        factors: [E].
    """
    mine = ids >= 0
    chosen = factors[torch.where(mine, ids + first, 0)] * mine
    scale = (weights.float() * chosen).sum(1, keepdim=True)
    return (rows.float() * scale).to(rows.dtype)


def _yardstick(case: Case) -> Implementation:
    """One process: each expert's row in the dtype, weighted and added in float32."""

    def run(inputs: Inputs) -> Output:
        x, ids = inputs["x"], inputs["topk_ids"]
        ones = torch.ones(len(x), 1, device=x.device)
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for slot in range(case.shape["K"]):
            rows = weighted(x, ids[:, slot, None], ones, inputs["factors"])
            y = y + inputs["topk_weights"][:, slot, None].float() * rows.float()
        return y.to(x.dtype)

    return Implementation(run)


dispatch = Op(
    name="dispatch",
    outputs=("y",),
    shape_sets={
        "cpu": _shapes("qwen3-30b-a3b", TOKENS),
        **{name: _shapes(name, TOKENS) for name in LAYERS},
    },
    defaults={"cpu": ("cpu",), "cuda": ("qwen3-30b-a3b", "deepseek-v3")},
    dtypes={"cpu": ("bf16",), "cuda": ("bf16",)},
    make_case=_make_case,
    cost=_cost,
    truth=_truth,
    routings=lambda shape: ("balanced", "zipf") if shape["T"] >= 4096 else ("balanced",),
    yardstick=_yardstick,
    on_ranks=True,
    details=_details,
)
