"""The training loop: one global batch a step, whatever the number of ranks."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lm.checkpoint import Progress
from lm.cluster import Cluster
from lm.data import Text
from lm.model import ExpertLoad, finish_gradients, parameter_groups
from lm.network import Network
from lm.settings import Settings
from moe_parallel.training import (
    MoEAuxLossAutoScaler,
    prepare_for_final_backward,
    prepare_for_grad_accumulation,
)


class StopOnSignal:
    """Within it Ctrl-C, or a SIGTERM, asks for an end after the current step.

    Attributes:
        signal: the first one that came, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number


@dataclass
class Speed:
    """Seconds of each step of this run, and how many bytes a step has."""

    tokens: int
    seconds: list[float] = field(default_factory=list)

    def tokens_per_second(self) -> float:
        """Of the median step; the first two warm up."""
        kept = sorted(self.seconds[2:] or self.seconds)
        return self.tokens / kept[len(kept) // 2] if kept else 0.0


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW in one call per mesh. The experts are a group of their own."""
    groups = [{"params": params} for params in parameter_groups(model)]
    return torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
        fused=True,
    )


def train(
    network: Network,
    optimizer: torch.optim.Optimizer,
    text: Text,
    settings: Settings,
    cluster: Cluster,
    progress: Progress,
    *,
    steps: int,
    seconds: float,
    stop: StopOnSignal,
    after_step: Callable[[Progress, Speed], None],
) -> Speed:
    """Take up to ``steps`` steps in up to ``seconds``; ``progress`` is kept up to date.

    All ranks stop after the same step: the wish to stop travels with the loss.
    """
    starts = text.starts(settings.length)
    tokens = settings.batch * settings.length
    speed = Speed(tokens)
    load = ExpertLoad(network.module, settings, cluster)
    _balance_every_token_alike(tokens, cluster)
    begin = time.perf_counter()
    for _ in range(steps):
        step_begin = time.perf_counter()
        everything = text.batch(
            starts, settings.batch, settings.length, settings.seed, progress.step
        )
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate(progress.step)

        load.total.zero_()
        losses = _forward_backward(network, everything, cluster)
        norm = finish_gradients(network.module, cluster, settings.clip, tokens)
        optimizer.step()
        optimizer.zero_grad()

        late = time.perf_counter() - begin > seconds
        told, wants_stop = _over_all_ranks(losses, load.total, late or stop.signal, cluster)
        speed.seconds.append(time.perf_counter() - step_begin)
        _record(progress, told[0] / tokens, norm, told[1:].view(settings.layers, -1))
        after_step(progress, speed)
        if wants_stop:
            break
    return speed


def _forward_backward(network: Network, batch: Tensor, cluster: Cluster) -> Tensor:
    """Gradients of a batch [B, S + 1], in parts; the sum of the losses that this rank has seen."""
    pipelined = cluster.stages > 1
    tokens = batch.shape[0] * (batch.shape[1] - 1)
    total = torch.zeros((), dtype=torch.float64, device=cluster.device)
    parts = batch.tensor_split(cluster.parallelism.accumulate)
    for index, part in enumerate(parts):
        if index == len(parts) - 1:
            prepare_for_final_backward([network.module], pipelined)
        elif index == 0:
            prepare_for_grad_accumulation([network.module], pipelined)
        own = part.tensor_split(cluster.data_ranks)[cluster.data_rank].to(cluster.device)
        total += network.forward_backward(own, tokens)
    return total


def _balance_every_token_alike(tokens: int, cluster: Cluster) -> None:
    """Make the balancing loss the mean over the parts of the batch that ranks compute alone.

    It is scaled as the loss is: in a pipeline by the number of tokens, else by the ranks that FSDP
    averages over; and context parallel ranks each add their share of one part's.
    """
    parts = cluster.data_ranks * cluster.parallelism.accumulate * cluster.stages
    scale = tokens if cluster.stages > 1 else cluster.sharing
    MoEAuxLossAutoScaler.main_loss_backward_scale = scale / parts


def _over_all_ranks(
    losses: Tensor, load: Tensor, stop: int | bool, cluster: Cluster
) -> tuple[Tensor, bool]:
    """Sum of the losses and load of each expert over the ranks, and whether any wants to stop."""
    own = torch.cat(
        [
            torch.tensor([float(bool(stop))], dtype=torch.float64, device=cluster.device),
            losses.reshape(1),
            load.flatten(),
        ]
    )
    total = cluster.sum(own).cpu()
    return total[1:], bool(total[0])


def _record(progress: Progress, loss: Tensor, norm: float, load: Tensor) -> None:
    """``load`` [layers, experts] of one step."""
    progress.step += 1
    progress.losses.append(float(loss))
    progress.norms.append(norm)
    progress.balances.append(float((load.amax(1) / load.mean(1)).mean()))
    before = torch.tensor(progress.load) if progress.load else torch.zeros_like(load)
    progress.load = (before + load).long().tolist()
