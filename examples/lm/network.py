"""The model on all ranks: what a rank does for a forward pass, and for a backward one.

B sequences, S tokens each, V values of a byte.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional

from lm.cluster import Cluster
from lm.data import VOCABULARY
from lm.model import LanguageModel, shard, share_sequences
from lm.settings import Settings
from lm.stage import Stage, positions_of
from moe_parallel.context_parallel import shard_sequence, unshard_sequence
from moe_parallel.fsdp_mixin import install_pipeline_backward

IGNORED = -100  # a target that is not counted


def sum_of_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """In nats, of the targets [B, S]."""
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


class Network:
    """A model, sharded over the ranks of ``cluster``; every rank must make the same calls.

    Attributes:
        module: what this rank has of it: the model, or its stage of the pipeline.
    """

    def __init__(self, model: LanguageModel, settings: Settings, cluster: Cluster) -> None:
        self.settings, self.cluster = settings, cluster
        self._cp, self._pp = cluster.world_mesh["cp"], cluster.world_mesh["pp"]
        if self._cp.size() > 1:
            share_sequences(model)
        self.module: Any = model
        if cluster.stages > 1:
            self.module = Stage(model, cluster.stage, cluster.stages, self._cp)
        shard(self.module, cluster)
        self._schedule = None
        if cluster.stages > 1:
            self._schedule = self._make_schedule()
            install_pipeline_backward(self._schedule)

    def _make_schedule(self) -> Schedule1F1B:
        """A part of the batch goes through the pipeline in as many pieces as it has stages."""
        settings, cluster = self.settings, self.cluster
        pieces = cluster.data_ranks * cluster.parallelism.accumulate * cluster.stages
        shape = (settings.batch // pieces, settings.length // self._cp.size())
        hidden = torch.empty(*shape, settings.hidden, device=cluster.device, requires_grad=True)
        ids = torch.empty(shape, dtype=torch.int64, device=cluster.device)
        logits = torch.empty(*shape, VOCABULARY, device=cluster.device, requires_grad=True)
        stage = PipelineStage(
            self.module,
            cluster.stage,
            cluster.stages,
            cluster.device,
            input_args=ids if cluster.stage == 0 else hidden,
            output_args=logits if cluster.is_last_stage else hidden,
            group=self._pp.get_group(),
        )
        return Schedule1F1B(stage, cluster.stages, loss_fn=sum_of_losses, scale_grads=False)

    def part(self, whole: Tensor) -> Tensor:
        """What this rank has of sequences [B, S]."""
        return whole if self._cp.size() == 1 else shard_sequence(whole, self._cp)

    def forward_backward(self, sequences: Tensor, tokens: int) -> Tensor:
        """Add to the gradients those of ``sequences`` [B, S + 1], of a batch of ``tokens``.

        Returns:
            Sum of the losses that this rank has seen; zero on all stages but the last.
        """
        inputs, targets = self.part(sequences[:, :-1]), self.part(sequences[:, 1:])
        if self._schedule is None:
            loss = sum_of_losses(self._logits(inputs), targets)
            # FSDP averages over the ranks; times their number it is the mean over all tokens.
            (loss / tokens * self.cluster.sharing).backward()
            return loss.detach()
        losses: list[Tensor] = []
        # torch 2.11 compares strides too with what the stage was told to expect
        arguments = (inputs.contiguous(),) if self.cluster.stage == 0 else ()
        self._schedule.step(*arguments, target=targets, losses=losses, return_outputs=False)
        return torch.zeros((), device=inputs.device) + sum(loss.detach() for loss in losses)

    def _logits(self, inputs: Tensor) -> Tensor:
        positions = positions_of(inputs.shape[1], self._cp, inputs.device)
        found: Tensor = self.module(
            input_ids=inputs, position_ids=positions, use_cache=False
        ).logits
        return found

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor | None:
        """Of this rank's part of ids [B, S] (see :meth:`part`); None before the last stage."""
        x = self.part(inputs)
        if self._schedule is None:
            return self._logits(x)
        group, stage = self._pp.get_group(), self.cluster.stage
        if stage > 0:
            x = torch.empty(*x.shape, self.settings.hidden, device=x.device)
            dist.recv(x, group=group, group_src=stage - 1)
        y: Tensor = self.module(x)
        if self.cluster.is_last_stage:
            return y
        dist.send(y.contiguous(), group=group, group_dst=stage + 1)
        return None

    @torch.no_grad()
    def next_logits(self, tokens: Tensor) -> Tensor:
        """[V] of what follows ``tokens`` [1, S], on every rank."""
        known, cp = tokens.shape[1], self._cp.size()
        padding = -known % (2 * cp) if cp > 1 else 0
        found = self.logits(functional.pad(tokens, (0, padding)))
        if found is not None and cp > 1:
            found = unshard_sequence(found, self._cp)
        last = torch.empty(VOCABULARY, device=tokens.device)
        if found is not None:
            last = found[0, known - 1].float().contiguous()
        if self.cluster.stages > 1:
            dist.broadcast(last, group=self._pp.get_group(), group_src=self.cluster.stages - 1)
        return last


def token_losses(model: nn.Module, sequences: Tensor) -> Tensor:
    """[B, S] nats of each next byte of ``sequences`` [B, S + 1], by a model that is not sharded."""
    logits = model(input_ids=sequences[:, :-1], use_cache=False).logits
    targets = sequences[:, 1:]
    losses = functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
    )
    return losses.view(targets.shape)
