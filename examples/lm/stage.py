"""One stage of a pipeline: consecutive layers of the model, under their names in the whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lm.model import LanguageModel
from moe_parallel.context_parallel import sequence_positions
from moe_parallel.fsdp_mixin import MoEFSDPSyncMixin


def positions_of(length: int, cp_mesh: DeviceMesh, device: torch.device) -> Tensor:
    """[1, length] of this rank's tokens in their sequences."""
    if cp_mesh.size() == 1:
        return torch.arange(length, device=device)[None]
    return sequence_positions(length * cp_mesh.size(), cp_mesh, device=device)[None]


class _Layers(nn.Module):
    """What a stage has of the inner model."""

    def __init__(self, inner: Any, stage: int, stages: int, cp_mesh: DeviceMesh) -> None:
        super().__init__()
        count = len(inner.layers)
        own = range(stage * count // stages, (stage + 1) * count // stages)
        self.embed_tokens = inner.embed_tokens if stage == 0 else None
        self.layers = nn.ModuleDict({str(number): inner.layers[number] for number in own})
        self.norm = inner.norm if stage == stages - 1 else None
        self.rotary_emb = inner.rotary_emb
        self.moe_config = inner.moe_config
        self.cp_mesh = cp_mesh

    def forward(self, x: Tensor) -> Tensor:
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        rotary = self.rotary_emb(x, position_ids=positions_of(x.shape[1], self.cp_mesh, x.device))
        for layer in self.layers.values():
            x = layer(x, attention_mask=None, position_embeddings=rotary)
        return x if self.norm is None else self.norm(x)


class Stage(nn.Module, MoEFSDPSyncMixin):
    """From ids [B, S] (the first stage) or the stage before it, to logits (the last) or the next.

    Shares the modules of ``model``; of its other layers nothing is kept.
    """

    def __init__(self, model: LanguageModel, stage: int, stages: int, cp_mesh: DeviceMesh) -> None:
        super().__init__()
        self.backend = model.backend
        self.config = model.config
        self.model = _Layers(model.model, stage, stages, cp_mesh)
        self.lm_head = model.lm_head if stage == stages - 1 else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.model(x)
        return x if self.lm_head is None else self.lm_head(x)
