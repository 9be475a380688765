"""Routed batches for the ops that move rows: T tokens, H hidden, E experts, K a token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.ops._shapes import ALL_LAYERS, CPU_TOKENS, TRAINING_TOKENS
from benchmarks.registry import Inputs, Shape, Truth
from benchmarks.routing import make_topk_ids
from moe_kernels import ExpertOrder, reference

INPUT_SETS = 4


def _shapes(name: str, tokens: tuple[int, ...]) -> list[Shape]:
    hidden, _, experts, top_k = ALL_LAYERS[name]
    return [Shape({"T": t, "H": hidden, "E": experts, "K": top_k}) for t in tokens]


def row_sets() -> dict[str, list[Shape]]:
    """Shapes of routed batches by set name."""
    cpu = {"cpu": _shapes("qwen3-30b-a3b", CPU_TOKENS)}
    return cpu | {name: _shapes(name, TRAINING_TOKENS) for name in ALL_LAYERS}


def slot_sets() -> dict[str, list[Shape]]:
    """The same for ops on slots alone, whose rows have no width."""
    return {
        name: [Shape({letter: shape[letter] for letter in "TEK"}) for shape in shapes]
        for name, shapes in row_sets().items()
    }


def whole_truth(
    names: Sequence[str], values: Iterable[Tensor], device: torch.device
) -> Mapping[str, Truth]:
    """All rows of each of an op's outputs."""
    return {
        name: Truth(torch.arange(len(value), device=device), value.double())
        for name, value in zip(names, values, strict=True)
    }


ROW_DEFAULTS = {"cpu": ("cpu",), "cuda": ("qwen3-30b-a3b", "deepseek-v3")}


def make_orders(shape: Shape, device: torch.device, routing: str, seed: int) -> list[Inputs]:
    """For each input set the fields of an expert order."""
    T, E, K = (shape[letter] for letter in "TEK")
    generator = torch.Generator().manual_seed(seed)
    orders: list[Inputs] = []
    for _ in range(INPUT_SETS):
        ids = make_topk_ids(T, E, K, routing, generator)
        fields = (value.to(device) for value in reference.sort_by_expert(ids, E))
        orders.append({**ExpertOrder(*fields)._asdict(), "topk_ids": ids.to(device)})
    return orders


def order_of(inputs: Inputs) -> ExpertOrder:
    return ExpertOrder(*(inputs[name] for name in ExpertOrder._fields))
