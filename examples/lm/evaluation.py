"""What the trained model is worth: held-out loss, a sample, and the speed of its experts."""

from __future__ import annotations

import statistics
import time

import torch

import moe_kernels.integrations.transformers
from lm.cluster import Cluster
from lm.data import Text
from lm.model import make_model
from lm.network import IGNORED, Network, sum_of_losses, token_losses
from lm.settings import Settings

IMPLEMENTATIONS = ("moe_kernels", "eager", "grouped_mm")


@torch.no_grad()
def heldout_loss(network: Network, text: Text, settings: Settings, cluster: Cluster) -> float:
    """Nats per byte of the held-out text."""
    network.module.eval()
    windows, wanted = text.heldout_windows(settings.length)
    # The same number of calls on every rank: a call is a collective.
    per_call = max(1, settings.batch // cluster.data_ranks)
    total = torch.zeros(2, dtype=torch.float64, device=cluster.device)
    for start in range(0, len(windows), per_call * cluster.data_ranks):
        index = torch.arange(per_call) + start + cluster.data_rank * per_call
        exists = index < len(windows)
        index = torch.where(exists, index, 0)
        own = windows[index].to(cluster.device)
        logits = network.logits(own[:, :-1])
        if logits is None:
            continue
        counted = network.part((wanted[index] & exists[:, None]).to(cluster.device))
        targets = network.part(own[:, 1:])
        total[0] += sum_of_losses(logits, targets.where(counted, IGNORED)).double()
        total[1] += counted.sum()
    network.module.train()
    nats, count = cluster.sum(total).tolist()
    return nats / count


@torch.no_grad()
def sample(network: Network, settings: Settings, cluster: Cluster, prompt: str, size: int) -> str:
    """Continue ``prompt`` by ``size`` bytes. Every rank takes part and gets the same."""
    network.module.eval()
    tokens = torch.tensor([list(prompt.encode())], device=cluster.device)
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(size):
        share = (network.next_logits(tokens[:, -settings.length :]).cpu() / 0.7).softmax(-1)
        chosen = torch.multinomial(share, 1, generator=generator).to(cluster.device)
        tokens = torch.cat([tokens, chosen[None]], dim=1)
    network.module.train()
    return bytes(tokens[0].tolist()).decode(errors="replace")


def compare_experts(
    text: Text, settings: Settings, cluster: Cluster, seconds: float
) -> dict[str, float]:
    """Bytes per second of a training step with different experts, all else equal.

    The same transformers model, batch and optimizer; only the experts implementation changes, from
    step to step in turn. Every rank trains a model of its own on its part of the batch, at the same
    time as the others. Returns the median step's speed by implementation.
    """
    moe_kernels.integrations.transformers.register()
    model = make_model(settings).to(cluster.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    starts = text.starts(settings.length)
    times: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    deadline = time.perf_counter() + seconds
    for turn in range(1_000_000):
        batch = text.batch(starts, settings.batch, settings.length, settings.seed, turn)
        own = batch.tensor_split(cluster.data_ranks)[cluster.data_rank].to(cluster.device)
        for place in range(len(IMPLEMENTATIONS)):
            name = IMPLEMENTATIONS[(turn + place) % len(IMPLEMENTATIONS)]
            model.set_experts_implementation(name)
            cluster.barrier()
            begin = _now(cluster.device)
            token_losses(model, own).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            times[name].append(_now(cluster.device) - begin)
        late = torch.tensor([float(time.perf_counter() > deadline)], device=cluster.device)
        if turn >= 3 and bool(cluster.sum(late)):
            break
    tokens = settings.batch * settings.length
    found = {}
    for name, taken in times.items():
        # the first turn warms up; the slowest rank counts
        mine = torch.tensor(statistics.median(taken[1:]), device=cluster.device)
        found[name] = tokens / float(cluster.max(mine))
    return found


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
