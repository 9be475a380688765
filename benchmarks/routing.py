"""How tokens choose experts in a benchmark."""

from __future__ import annotations

import torch
from torch import Tensor

ROUTINGS = ("uniform", "balanced", "zipf", "one")


def check_top_k(top_k: int, experts: int) -> None:
    """Raise ValueError unless a token can have so many experts."""
    if top_k > experts:
        raise ValueError(f"K must be at most E = {experts}; got {top_k}")


def make_topk_ids(
    tokens: int, experts: int, top_k: int, routing: str, generator: torch.Generator
) -> Tensor:
    """Distinct experts for every token.

    Args:
        tokens, experts, top_k: T, E, K.
        routing: "uniform": K experts at random; "balanced": every expert gets the same number of
            slots, to within one; "zipf": expert popularity falls as 1 / rank; "one": every token
            goes to the same K experts.
        generator: CPU generator.

    Returns:
        [T, K] int64, on the CPU.
    """
    check_top_k(top_k, experts)
    if routing == "one":
        return torch.arange(top_k).expand(tokens, top_k).contiguous()
    if routing == "balanced":
        order = torch.randperm(experts, generator=generator)
        start = torch.randperm(tokens, generator=generator)[:, None] * top_k
        return order[(start + torch.arange(top_k)) % experts]
    noise = torch.rand(tokens, experts, generator=generator)
    if routing == "uniform":
        return noise.topk(top_k, dim=1).indices
    if routing == "zipf":
        # the K largest of log p + Gumbel noise are a sample without replacement from p
        rank = torch.randperm(experts, generator=generator) + 1
        gumbel = -torch.log(-torch.log(noise.clamp(1e-7, 1 - 1e-7)))
        return (gumbel - rank.log()).topk(top_k, dim=1).indices
    raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}; got {routing!r}")
