"""The package's MoE layer on ranks, by transport: with its shared experts computed while tokens
travel, as the layer does it, and in turn, after they did.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.ops.moe_overlap import build_layer
from benchmarks.providers.dispatch import LIMITED
from benchmarks.registry import (
    Builder,
    Case,
    Implementation,
    Inputs,
    Output,
    Provider,
    Unsupported,
)
from moe_parallel.dispatch import TRANSPORTS, Dispatched, TokenDispatcher

OVERLAP, IN_TURN = "_overlap", "_in_turn"  # after the transport's name


class InTurn:
    """A dispatcher whose exchanges do not begin and end apart: a layer's experts cannot overlap."""

    def __init__(self, dispatcher: TokenDispatcher) -> None:
        self._dispatcher = dispatcher

    def dispatch(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Dispatched:
        return self._dispatcher.dispatch(x, topk_ids, topk_weights)

    def combine(self, y: Tensor, handle: Any) -> Tensor:
        return self._dispatcher.combine(y, handle)


def _on_all_ranks(case: Case, holds: bool) -> bool:
    """Whether it holds on every rank; so that all give up, and none waits for another."""
    flag = torch.tensor([holds], dtype=torch.int32, device=case.device)
    dist.all_reduce(flag, dist.ReduceOp.MIN, group=case.group)
    return bool(flag)


def _moe(transport: str, overlaps: bool) -> Builder:
    def build(case: Case) -> Implementation:
        inputs = case.inputs[0]
        try:
            layer = build_layer(case, transport)
            with torch.inference_mode():  # of no tokens: whether it takes such tensors at all
                layer(inputs["x"][:0])
        except (ValueError, TypeError, ImportError, NotImplementedError) as error:
            raise Unsupported(str(error).split("\n")[0]) from error
        apart = layer.experts.token_dispatcher
        joined = InTurn(apart)

        def run(inputs: Inputs) -> Output:
            layer.zero_grad()
            y: Tensor = layer(inputs["x"])
            if overlaps and "checked" in inputs:
                layer.experts.token_dispatcher = joined
                with torch.no_grad():
                    same = torch.equal(y, layer(inputs["x"]))
                layer.experts.token_dispatcher = apart
                if not _on_all_ranks(case, same):
                    raise RuntimeError("y has not the bits that the layer yields in turn")
            return y

        if not overlaps:
            layer.experts.token_dispatcher = joined
        if layer.experts.overlaps != overlaps:
            raise RuntimeError(
                f"the layer must {'' if overlaps else 'not '}overlap by {transport}, and does"
                f"{' not' if overlaps else ''}"
            )
        return Implementation(run)

    return build


def _providers(way: str) -> tuple[Provider, ...]:
    return tuple(
        Provider(
            f"{name}{way}", {"moe_overlap": _moe(name, way == OVERLAP)}, **LIMITED.get(name, {})
        )
        for name in TRANSPORTS
    )


overlapping, in_turn = _providers(OVERLAP), _providers(IN_TURN)
