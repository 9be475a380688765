"""Experts wherever a placement puts them, against an all-to-all of Python lists.

T tokens, H hidden size, K experts a token, E experts, P ranks.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from moe_parallel.dispatch import AllToAllDispatcher, Dispatched
from tests.parallel.ranks import run_ranks
from tests.parallel.test_dispatch import WAYS, Case, dispatcher_of, make_case, raised

Owners = list[list[int]]


def home(owners: Owners, expert: int, token: int, rank: int) -> int:
    """Where a token of ``rank`` finds an expert."""
    mine = owners[expert]
    return rank if rank in mine else mine[token % len(mine)]


def expected(cases: list[Case], rank: int, owners: Owners) -> tuple[Tensor, Tensor, Tensor]:
    """What ``rank`` receives: rows, its numbers of their experts, their weights."""
    numbers = {e: n for n, e in enumerate(e for e, mine in enumerate(owners) if rank in mine)}
    first = cases[0]
    rows: list[tuple[Tensor, list[int], list[float]]] = []
    for source, case in enumerate(cases):
        for token, row in enumerate(case.ids.tolist()):
            here = [0 <= e < len(owners) and home(owners, e, token, source) == rank for e in row]
            if any(here):
                ids = [numbers[e] if mine else -1 for e, mine in zip(row, here, strict=True)]
                weights = case.weights[token].tolist()
                weights = [w if mine else 0.0 for w, mine in zip(weights, here, strict=True)]
                rows.append((case.x[token], ids, weights))
    top_k = first.ids.shape[1]
    if not rows:
        return first.x[:0], torch.empty(0, top_k, dtype=torch.int32), first.weights[:0]
    return (
        torch.stack([row[0] for row in rows]),
        torch.tensor([row[1] for row in rows], dtype=torch.int32),
        torch.tensor([row[2] for row in rows], dtype=first.weights.dtype),
    )


def draw_placement(draw: random.Random, experts: int, ranks: int, copies: bool) -> Owners:
    most = ranks if copies else 1
    return [sorted(draw.sample(range(ranks), draw.randint(1, most))) for _ in range(experts)]


def apply(tokens: Dispatched, dispatcher: AllToAllDispatcher) -> Tensor:
    """Expert e multiplies by e + 1, wherever it is."""
    factors = torch.tensor([*(e + 1.0 for e in dispatcher.local_experts), 0.0]).double()
    scale = (factors[tokens.topk_ids.long()] * tokens.topk_weights).sum(1, keepdim=True)
    return tokens.x * scale.to(tokens.x.dtype)


def _fuzz(rank: int, ranks: int, seeds: list[int], way: str, copies: bool) -> None:
    for seed in seeds:
        draw = random.Random(seed)
        experts = draw.choice([1, 3, ranks, 2 * ranks + 1, 40])
        owners = draw_placement(draw, experts, ranks, copies)
        settings: dict[str, Any] = {
            "hidden": draw.choice([1, 5, 64, 257]),
            "top_k": draw.randint(1, min(experts, 8)),
            "experts": experts,
            "skew": draw.choice(["even", "one_expert", "dropped"]),
            "ids_dtype": draw.choice([torch.int32, torch.int64]),
            "strided": draw.random() < 0.3,
        }
        tokens = [draw.choice([0, 1, 3, 33]) for _ in range(ranks)]
        cases = [make_case(seed, r, tokens[r], **settings) for r in range(ranks)]
        mine = cases[rank]
        entries = [ranks_of[0] if len(ranks_of) == 1 else ranks_of for ranks_of in owners]
        dispatcher = dispatcher_of(way, experts, placement=entries)
        x, weights = (t.clone().requires_grad_(not copies) for t in (mine.x, mine.weights))
        got = dispatcher.dispatch(x, mine.ids, weights)
        for name, truth in zip(
            ("x", "topk_ids", "topk_weights"), expected(cases, rank, owners), strict=True
        ):
            assert torch.equal(getattr(got, name), truth), (seed, name)
        y = dispatcher.combine(apply(got, dispatcher), got.handle)
        valid = (mine.ids >= 0) & (mine.ids < experts)
        factor = torch.where(valid, mine.ids + 1, 0)
        scale = (factor * mine.weights).sum(1, keepdim=True)
        assert_close(y, mine.x * scale)
        if not copies:
            y.sum().backward()
            assert_close(x.grad, scale.expand_as(x))
            assert_close(weights.grad, factor * mine.x.sum(1, keepdim=True))


@pytest.mark.parametrize("copies", [False, True], ids=["one owner", "copies"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_placement_is_the_definition(ranks: int, way: str, copies: bool) -> None:
    run_ranks(ranks, _fuzz, list(range(12)), way, copies)


@pytest.mark.slow
@pytest.mark.parametrize("copies", [False, True], ids=["one owner", "copies"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_any_placement_at_length(ranks: int, way: str, copies: bool) -> None:
    run_ranks(ranks, _fuzz, list(range(100, 200)), way, copies, timeout=300)


def _errors(rank: int, ranks: int) -> list[tuple[str, str]]:
    group = dist.group.WORLD
    case = make_case(1, rank, 5, 6, 2, 3)
    copied = AllToAllDispatcher(group, 3, placement=[[0, 1], 0, 1])
    assert copied.local_experts == ((0, 1), (0, 2))[rank]
    differing = AllToAllDispatcher(group, 3, placement=[0, rank, 1])
    x = case.x.clone().requires_grad_()
    return [
        raised(lambda: AllToAllDispatcher(group, 3, placement=[0, 1])),
        raised(lambda: AllToAllDispatcher(group, 3, placement=[0, 1, 2])),
        raised(lambda: AllToAllDispatcher(group, 3, placement=[0, [], 1])),
        raised(lambda: AllToAllDispatcher(group, 3, placement=[0, [1, 1], 1])),
        raised(copied.dispatch, x, case.ids, case.weights),
        raised(differing.dispatch, case.x, case.ids, case.weights),
    ]


def test_a_placement_that_cannot_be_is_refused() -> None:
    parts = [
        "placement must have an entry for each of the 3 experts; got 2",
        "placement must give expert 2 one or more different ranks in [0, 2); got 2",
        "placement must give expert 1 one or more different ranks in [0, 2); got []",
        "placement must give expert 1 one or more different ranks in [0, 2); got [1, 1]",
        "dispatch: copies of experts are for inference, but x or topk_weights requires",
        "must agree on the placement of the experts; rank",
    ]
    for results in run_ranks(2, _errors):
        for (kind, message), part in zip(results, parts, strict=True):
            assert kind == "ValueError"
            assert part in message
