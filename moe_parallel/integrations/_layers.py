"""The MoE layer that takes the place of a transformers block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers.utils import output_capturing

from moe_parallel.config import BackendConfig, MoEConfig
from moe_parallel.gate import Gate
from moe_parallel.integrations._families import Family
from moe_parallel.layers import MoE


def _collected() -> list[Tensor] | None:
    """Where ``output_router_logits=True`` has logits gathered; None where nobody asked for them."""
    found = output_capturing._active_collector.get()
    return None if found is None else found.get("router_logits")


@torch.compiler.assume_constant_result
def _are_collected() -> bool:
    return _collected() is not None


def _compiles_a_part() -> bool:
    """Whether a part of a model is compiled, which cannot ask during a call: it asks once.

    Of a whole model the question is compiled with the answer.
    """
    with_answer = getattr(output_capturing._active_collector, "compiling", True)
    return torch.compiler.is_dynamo_compiling() and not with_answer


class _ObservedGate(Gate):
    """A gate that gives its logits to ``output_router_logits=True``, as the model's router did."""

    def logits(self, x: Tensor) -> Tensor:
        logits = super().logits(x)
        if _compiles_a_part() and not _are_collected():
            return logits
        collected = _collected()
        if collected is not None:
            collected.append(logits)
        return logits


class TransformersMoE(MoE):
    """A :class:`moe_parallel.MoE` that keeps to what its decoder layer expects of the block.

    Attributes:
        family: of the block that it replaces.
        stored_transposed: the block keeps its experts' matrices with the last two dimensions
            swapped.
    """

    def __init__(
        self,
        config: MoEConfig,
        backend: BackendConfig,
        family: Family,
        stored_transposed: bool,
    ) -> None:
        super().__init__(config, backend)
        self.gate = _ObservedGate(config, gate_precision=backend.gate_precision)
        self.family = family
        self.stored_transposed = stored_transposed

    def forward(
        self,
        x: Tensor,
        padding_mask: Tensor | None = None,
        cp_mesh: DeviceMesh | None = None,
    ) -> Any:
        """``[..., H]`` of ``x [..., H]``, in a tuple where the block returned one."""
        y = super().forward(x, padding_mask, cp_mesh)
        return (y, None) if self.family.returns_scores else y
