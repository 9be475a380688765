"""Copies that move as many bytes as the op must: half of them read, half written."""

from __future__ import annotations

import torch

from benchmarks.ops import OPS
from benchmarks.registry import (
    Builder,
    Case,
    Implementation,
    Inputs,
    Op,
    Output,
    Provider,
    Unsupported,
)

CHUNK = 256 << 20  # bytes; more than any cache holds, less than would crowd the memory


def _copy(op: Op) -> Builder:
    def build(case: Case) -> Implementation:
        cost = op.cost(case)
        halves = {way: max(1, int(cost[way].bytes / 2)) for way in cost}
        if not any(cost[way].bytes for way in cost):
            raise Unsupported("there is nothing to copy")
        size = min(CHUNK, max(halves.values()))
        source = torch.zeros(size, dtype=torch.uint8, device=case.device)
        target = torch.zeros_like(source)

        def copy(total: int) -> None:
            for start in range(0, total, size):
                part = min(size, total - start)
                target[:part].copy_(source[:part])

        def run(inputs: Inputs) -> Output:
            copy(halves["forward"])
            return target

        def backward(outputs: Output, inputs: Inputs) -> None:
            copy(halves["backward"])

        return Implementation(run, backward)

    return build


copy_limit = Provider("copy_limit", {op.name: _copy(op) for op in OPS.values()}, limit=True)
