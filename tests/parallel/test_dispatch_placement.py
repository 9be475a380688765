"""Experts wherever a placement puts them, against an all-to-all of Python lists.

T tokens, H hidden size, K experts a token, E experts, P ranks.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_parallel.dispatch import AllToAllDispatcher, Dispatched
from tests.parallel.ranks import run_ranks
from tests.parallel.test_dispatch import WAYS, Case, dispatcher_of, make_case, raised

Owners = list[list[int]]

FLOAT8 = torch.float8_e4m3fn
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def home(owners: Owners, expert: int, token: int, rank: int) -> int:
    """Where a token of ``rank`` finds an expert."""
    mine = owners[expert]
    return rank if rank in mine else mine[token % len(mine)]


def homes(case: Case, token: int, rank: int, owners: Owners) -> list[int]:
    """Where each slot of a token of ``rank`` goes; -1 for one without an expert."""
    row = case.ids[token].tolist()
    return [home(owners, e, token, rank) if 0 <= e < len(owners) else -1 for e in row]


def expected(
    cases: list[Case], extras: list[Tensor], rank: int, owners: Owners
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``rank`` receives: rows, its numbers of their experts, their weights, the extra rows."""
    numbers = {e: n for n, e in enumerate(e for e, mine in enumerate(owners) if rank in mine)}
    first = cases[0]
    xs, ids, weights, extra = [], [], [], []
    for source, case in enumerate(cases):
        for token in range(len(case.x)):
            where = homes(case, token, source, owners)
            if rank not in where:
                continue
            row = zip(case.ids[token].tolist(), case.weights[token].tolist(), where, strict=True)
            slots = [(numbers[e], w) if at == rank else (-1, 0.0) for e, w, at in row]
            xs.append(case.x[token])
            ids.append([n for n, _ in slots])
            weights.append([w for _, w in slots])
            extra.append(extras[source][token])
    top_k = first.ids.shape[1]
    return (
        torch.stack(xs) if xs else first.x[:0],
        torch.tensor(ids, dtype=torch.int32).view(-1, top_k),
        torch.tensor(weights, dtype=first.weights.dtype).view(-1, top_k),
        torch.stack(extra) if extra else extras[0][:0],
    )


def combined(case: Case, values: Tensor, rank: int, owners: Owners) -> Tensor:
    """Of each token: a row of ``values`` times the scale of each rank's experts, rounded there,
    added in the order of the ranks in float32."""
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    out = torch.zeros(values.shape, dtype=wide)
    for token in range(len(values)):
        where = homes(case, token, rank, owners)
        for peer in sorted(set(where) - {-1}):
            mine = torch.tensor([at == peer for at in where])
            factors = torch.where(mine, case.ids[token] + 1, 0)
            scale = (factors * case.weights[token].double()).sum().to(values.dtype)
            out[token] += (values[token] * scale).to(wide)
    return out.to(values.dtype)


def draw_placement(draw: random.Random, experts: int, ranks: int, copies: bool) -> Owners:
    most = ranks if copies else 1
    return [sorted(draw.sample(range(ranks), draw.randint(1, most))) for _ in range(experts)]


def draw_cases(draw: random.Random, seed: int, ranks: int, experts: int) -> list[Case]:
    """Of all ranks: any sizes, dtypes and skew. Weights are eighths, whose sums are exact."""
    skew = draw.choice(["even", "one_expert", "dropped", "repeated"])
    settings: dict[str, Any] = {
        "hidden": draw.choice([1, 5, 64, 257]),
        "top_k": draw.randint(1, 12 if skew == "repeated" else min(experts, 8)),
        "experts": experts,
        "skew": skew,
        "ids_dtype": draw.choice([torch.int32, torch.int64]),
        "strided": draw.random() < 0.3,
        "dtype": draw.choice(DTYPES),
    }
    weight_dtype = draw.choice(DTYPES)
    tokens = [draw.choice([0, 1, 3, 33]) for _ in range(ranks)]
    cases = [make_case(seed, r, tokens[r], **settings) for r in range(ranks)]
    return [Case(c.x, c.ids, ((c.weights * 8).round() / 8).to(weight_dtype)) for c in cases]


def apply(tokens: Dispatched, dispatcher: AllToAllDispatcher) -> Tensor:
    """Expert e multiplies by e + 1, wherever it is."""
    factors = torch.tensor([*(e + 1.0 for e in dispatcher.local_experts), 0.0]).double()
    scale = (factors[tokens.topk_ids.long()] * tokens.topk_weights.double()).sum(1, keepdim=True)
    return tokens.x * scale.to(tokens.x.dtype)


def _fuzz(rank: int, ranks: int, seeds: list[int], way: str, copies: bool) -> None:
    for seed in seeds:
        draw = random.Random(seed)
        experts = draw.choice([1, 3, ranks, 2 * ranks + 1, 40])
        owners = draw_placement(draw, experts, ranks, copies)
        cases = draw_cases(draw, seed, ranks, experts)
        extras = [draw_extra(draw, seed, len(case.x)) for case in cases]
        apart = draw.random() < 0.5
        entries = [ranks_of[0] if len(ranks_of) == 1 else ranks_of for ranks_of in owners]
        dispatcher = dispatcher_of(way, experts, placement=entries)
        mine, trained = cases[rank], not copies and seed % 4 != 0
        x, weights = (t.clone().requires_grad_(trained) for t in (mine.x, mine.weights))
        if not copies and not trained:  # float8 rows, which have no gradient
            cases = [Case(c.x.to(FLOAT8), c.ids, c.weights) for c in cases]
            x = x.to(FLOAT8)
        arguments: dict[str, Any] = {"extra": extras[rank]}
        if apart:
            got = dispatcher.dispatch_async(x, mine.ids, weights, **arguments).wait()
        else:
            got = dispatcher.dispatch(x, mine.ids, weights, **arguments)
        truth = expected(cases, extras, rank, owners)
        for name, value in zip(("x", "topk_ids", "topk_weights", "extra"), truth, strict=True):
            ours = getattr(got, name)
            assert ours.dtype == value.dtype, (seed, name)
            assert ours.shape == value.shape, (seed, name)
            if ours.dtype == FLOAT8 and len(ours):
                ours, value = ours.view(torch.uint8), value.contiguous().view(torch.uint8)
            assert len(ours) == 0 or torch.equal(ours, value), (seed, name)
        assert got.num_rows == int((truth[1] >= 0).sum()), (seed, "num_rows")
        if x.dtype == FLOAT8:
            got = replace(got, x=got.x.to(mine.x.dtype))
            mine = Case(x.to(mine.x.dtype), mine.ids, mine.weights)
        rows = apply(got, dispatcher)
        if apart:
            y = dispatcher.combine_async(rows, got.handle).wait()
        else:
            y = dispatcher.combine(rows, got.handle)
        assert torch.equal(y, combined(mine, mine.x, rank, owners)), (seed, "y")
        if trained:
            grad = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
            y.backward(grad)
            assert torch.equal(x.grad, combined(mine, grad, rank, owners)), (seed, "dx")
            valid = (mine.ids >= 0) & (mine.ids < experts)
            factors = torch.where(valid, mine.ids + 1, 0)
            # By the expert's own backward, in x's dtype.
            products = grad.double() * mine.x.double()
            assert weights.grad is not None
            error = (weights.grad.double() - factors * products.sum(1, keepdim=True)).abs()
            unit = sum(torch.finfo(t.dtype).eps for t in (mine.x, weights))
            assert (error <= 4 * unit * factors * products.abs().sum(1, keepdim=True)).all(), seed


def draw_extra(draw: random.Random, seed: int, tokens: int) -> Tensor:
    """Rows that travel along: of the same dtype and width on all ranks."""
    kind = seed % 3
    numbers = [draw.randint(-99, 99) for _ in range(3 * tokens)]
    rows = torch.tensor(numbers, dtype=torch.int64).view(tokens, 3)
    return (rows.short(), rows[:, 0], rows.float())[kind]


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
    for placement in (torch.tensor([0, 1, 1]), np.array([0, 1, 1]), [[0], torch.tensor([1]), 1]):
        dispatcher = AllToAllDispatcher(group, 3, placement=placement)
        assert dispatcher.local_experts == ((0,), (1, 2))[rank]
    return [
        raised(lambda: AllToAllDispatcher(group, 3, placement=[0, 1])),
        raised(lambda: AllToAllDispatcher(group, 3, placement=[0, 1, 2])),
        raised(lambda: AllToAllDispatcher(group, 3, placement=[0, [], 1])),
        raised(lambda: AllToAllDispatcher(group, 3, placement=[0, [1, 1], 1])),
        raised(copied.dispatch, x, case.ids, case.weights),
        raised(differing.dispatch, case.x, case.ids, case.weights),
        raised(lambda: AllToAllDispatcher(group, 3, placement=3)),
        raised(lambda: AllToAllDispatcher(group, 3, placement=[0, 1.5, 1])),
        raised(lambda: AllToAllDispatcher(group, 3, placement=[0, 1, ["x"]])),
    ]


def test_a_placement_that_cannot_be_is_refused() -> None:
    parts = [
        "placement must have an entry for each of the 3 experts; got 2",
        "placement must give expert 2 one or more different ranks in [0, 2); got 2",
        "placement must give expert 1 one or more different ranks in [0, 2); got []",
        "placement must give expert 1 one or more different ranks in [0, 2); got [1, 1]",
        "dispatch: copies of experts are for inference, but x or topk_weights requires",
        "must agree on the placement of the experts; rank",
        "placement must be a sequence with an entry for each of the 3 experts; got 3",
        "placement must give expert 1 a rank, or several; got 1.5",
        "placement must give expert 2 a rank, or several; got ['x']",
    ]
    for results in run_ranks(2, _errors):
        for i, ((kind, message), part) in enumerate(zip(results, parts, strict=True)):
            assert kind == ("ValueError" if i < 6 else "TypeError")
            assert part in message
