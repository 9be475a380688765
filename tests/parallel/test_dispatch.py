"""The exchange of tokens, against what a single process knows the ranks should get.

T tokens, H hidden size, K experts a token, E experts, P ranks.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from moe_kernels import _C
from moe_parallel.dispatch import AllToAllDispatcher, Dispatched, ops
from moe_parallel.torch_internals import store_of
from tests.conftest import HAS_GPU
from tests.parallel.ranks import run_ranks


@dataclass(frozen=True)
class Case:
    """What one rank brings to a dispatch."""

    x: Tensor
    ids: Tensor
    weights: Tensor


def make_case(
    seed: int,
    rank: int,
    tokens: int,
    hidden: int,
    top_k: int,
    experts: int,
    *,
    dtype: torch.dtype = torch.float64,
    weight_dtype: torch.dtype = torch.float64,
    ids_dtype: torch.dtype = torch.int64,
    skew: str = "even",
    strided: bool = False,
) -> Case:
    """The case of any rank, computed alike everywhere."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    shape = (hidden, tokens) if strided else (tokens, hidden)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if skew == "repeated":  # an expert may be there more than once, and K be larger than E
        ids = torch.randint(experts, (tokens, top_k), generator=generator)
    else:
        ids = torch.rand(tokens, experts, generator=generator).topk(top_k, dim=1).indices
    if skew == "one_expert":
        ids.fill_(experts - 1)
    elif skew == "dropped":
        drop = torch.rand(ids.shape, generator=generator)
        ids[drop < 0.4] = -1
        ids[drop > 0.8] = experts
    weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64).to(weight_dtype)
    return Case(x.T if strided else x, ids.to(ids_dtype), weights)


def expected_tokens(
    cases: list[Case], rank: int, experts_per_rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``rank`` receives, by loops over the cases of all ranks."""
    xs, ids, weights = [], [], []
    for case in cases:
        for x, token_ids, token_weights in zip(case.x, case.ids, case.weights, strict=True):
            low = rank * experts_per_rank
            mine = (token_ids >= low) & (token_ids < low + experts_per_rank)
            if mine.any():
                xs.append(x)
                ids.append(torch.where(mine, token_ids - low, -1).to(torch.int32))
                weights.append(torch.where(mine, token_weights, 0))
    first = cases[0]
    top_k = first.ids.shape[1]
    return (
        torch.stack(xs) if xs else first.x.new_empty(0, first.x.shape[1]),
        torch.stack(ids) if ids else first.ids.new_empty(0, top_k, dtype=torch.int32),
        torch.stack(weights) if weights else first.weights.new_empty(0, top_k),
    )


def apply_experts(tokens: Dispatched, first_expert: int) -> Tensor:
    """An expert is a factor here: expert e multiplies by e + 1."""
    factor = torch.where(tokens.topk_ids >= 0, tokens.topk_ids + first_expert + 1, 0)
    return tokens.x * (factor * tokens.topk_weights).sum(1, keepdim=True).to(tokens.x.dtype)


def round_trip(
    dispatcher: AllToAllDispatcher, case: Case, rank: int
) -> tuple[Dispatched, Tensor, Tensor, Tensor]:
    """What arrived, the combined result, and the gradients of x and of the weights."""
    x, weights = case.x.clone().requires_grad_(), case.weights.clone().requires_grad_()
    tokens = dispatcher.dispatch(x, case.ids, weights)
    first_expert = rank * dispatcher.num_experts // dispatcher.num_ranks
    y = dispatcher.combine(apply_experts(tokens, first_expert), tokens.handle)
    y.backward(torch.ones_like(y) * (rank + 1), retain_graph=True)
    dx, dweights = x.grad, weights.grad
    x.grad = weights.grad = None
    y.backward(torch.ones_like(y) * (rank + 1))
    assert x.grad is not None
    assert weights.grad is not None
    assert dx is not None
    assert dweights is not None
    assert torch.equal(x.grad, dx), "the second backward differs"
    assert torch.equal(weights.grad, dweights), "the second backward differs"
    return tokens, y.detach(), dx, dweights


# "aten" is process_group by the steps meant for GPUs.
WAYS = ("process_group", "shared_memory", "aten")


def dispatcher_of(way: str, experts: int, **options: Any) -> AllToAllDispatcher:
    """A dispatcher among all ranks."""
    _C.set_dispatch_native(way != "aten")
    transport = "process_group" if way == "aten" else way
    return AllToAllDispatcher(dist.group.WORLD, experts, transport=transport, **options)


def _random_cases(rank: int, ranks: int, seeds: list[int], way: str) -> None:
    for seed in seeds:
        draw = random.Random(seed)
        tokens = [draw.choice([0, 1, 2, 17, 40]) for _ in range(ranks)]
        experts = ranks * draw.choice([1, 2, 5])
        settings = {
            "hidden": draw.choice([1, 3, 64, 300]),
            "top_k": draw.randint(1, min(experts, 9)),
            "experts": experts,
            "skew": draw.choice(["even", "even", "one_expert", "dropped"]),
            "ids_dtype": draw.choice([torch.int32, torch.int64]),
            "strided": draw.random() < 0.3,
        }
        cases = [make_case(seed, r, tokens[r], **settings) for r in range(ranks)]
        mine = cases[rank]
        dispatcher = dispatcher_of(way, experts)
        got, y, dx, dweights = round_trip(dispatcher, mine, rank)

        x, ids, weights = expected_tokens(cases, rank, experts // ranks)
        assert torch.equal(got.x, x), (seed, "x")
        assert torch.equal(got.topk_ids, ids), (seed, "ids")
        assert torch.equal(got.topk_weights, weights), (seed, "weights")
        assert got.num_rows == int((ids >= 0).sum()), (seed, "num_rows")

        valid = (mine.ids >= 0) & (mine.ids < experts)
        factor = torch.where(valid, mine.ids + 1, 0)
        scale = (factor * mine.weights).sum(1, keepdim=True)
        assert_close(y, mine.x * scale)
        assert_close(dx, (rank + 1) * scale.expand_as(mine.x))
        assert_close(dweights, (rank + 1) * factor * mine.x.sum(1, keepdim=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_exchange_is_the_definition(ranks: int, way: str) -> None:
    """Bit for bit on the way there; sums within rounding on the way back; any sizes and skew."""
    run_ranks(ranks, _random_cases, list(range(12)), way)


def _narrow_dtypes(rank: int, ranks: int, way: str) -> None:
    for dtype, weight_dtype in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
    ):
        case = make_case(3, rank, 50, 70, 3, 8, dtype=dtype, weight_dtype=weight_dtype)
        dispatcher = dispatcher_of(way, 8)
        tokens, y, dx, dweights = round_trip(dispatcher, case, rank)
        assert tokens.topk_weights.dtype == dweights.dtype == weight_dtype
        assert y.dtype == dx.dtype == dtype
        # A row for each rank, computed and rounded there; then float32 in the order of the ranks.
        total = torch.zeros(50, 70)
        for peer in range(ranks):
            mine = case.ids // (8 // ranks) == peer
            factor = torch.where(mine, case.ids + 1, 0)
            scale = (factor * torch.where(mine, case.weights, 0)).sum(1, keepdim=True).to(dtype)
            row = (case.x * scale).float()
            total = torch.where(mine.any(1, keepdim=True), total + row, total)
        assert torch.equal(y, total.to(dtype)), dtype
        for _ in range(3):
            again = round_trip(dispatcher, case, rank)
            assert all(torch.equal(a, b) for a, b in zip(again[1:], (y, dx, dweights), strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_rows_are_added_in_float32_in_rank_order_and_repeat_bit_for_bit(way: str) -> None:
    run_ranks(4, _narrow_dtypes, way)


def _payloads(rank: int, ranks: int, way: str) -> None:
    """float8 tokens with their scales, and rows of numbers."""
    dispatcher = dispatcher_of(way, 6)
    for seed, skew in enumerate(("even", "dropped", "one_expert")):
        cases = [make_case(seed, r, 8 + r, 32, 3, 6, skew=skew) for r in range(ranks)]
        float8 = [case.x.float().to(torch.float8_e4m3fn) for case in cases]

        def expected(rows: list[Tensor], cases: list[Case] = cases) -> tuple[Tensor, Tensor]:
            flat = [row.reshape(len(row), row[:1].numel() or 0) for row in rows]
            sent = [Case(x, c.ids, c.weights) for x, c in zip(flat, cases, strict=True)]
            return expected_tokens(sent, rank, 6 // ranks)[:2]

        for extras in (
            [case.x[:, :4].float() for case in cases],
            [torch.randint(9, (len(case.x), 2, 3)).short() for case in cases],
            [torch.full((len(case.x),), r) for r, case in enumerate(cases)],
            [torch.empty(len(case.x), 0) for case in cases],
            [case.x.to(torch.complex64).T.contiguous().T for case in cases],
        ):
            dist.broadcast_object_list(extras)  # the random ones
            mine = cases[rank]
            arguments = (float8[rank], mine.ids, mine.weights)
            x, ids = expected([row.view(torch.uint8) for row in float8])
            extra, _ = expected(extras)
            for tokens in (
                dispatcher.dispatch(*arguments, extra=extras[rank]),
                dispatcher.dispatch_async(*arguments, extra=extras[rank]).wait(),
            ):
                assert tokens.x.dtype == torch.float8_e4m3fn
                assert torch.equal(tokens.x.view(torch.uint8), x)
                assert torch.equal(tokens.topk_ids, ids)
                assert tokens.extra is not None
                assert tokens.extra.dtype == extras[rank].dtype
                assert torch.equal(tokens.extra, extra.view(len(x), *extras[rank].shape[1:]))
            assert dispatcher.dispatch(*arguments).extra is None
    x = torch.ones(1, 2).to(torch.float8_e4m3fn).requires_grad_()
    assert raised(dispatcher.dispatch, x, ids, ids)[0] == "ValueError"


def _one_element(rank: int, ranks: int, way: str) -> None:
    """A dimension of one element may have any stride, and be contiguous."""
    dispatcher = dispatcher_of(way, 2)
    x = (torch.arange(7.0) + rank)[None, ::7]
    extra = torch.arange(9).view(3, 3)[:1, 1]
    assert x.stride(-1) == 7
    assert extra.stride(-1) == 3
    tokens = dispatcher.dispatch(x, torch.tensor([[1 - rank]]), torch.ones(1, 1), extra=extra)
    assert tokens.extra is not None
    assert tokens.extra.tolist() == [1]
    rows = (torch.arange(7.0) + tokens.x.item())[None, ::7]
    assert rows.stride(-1) == 7
    assert dispatcher.combine(rows, tokens.handle).item() == rank


@pytest.mark.parametrize("way", WAYS)
def test_one_element_may_have_any_stride(way: str) -> None:
    run_ranks(2, _one_element, way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_rows_travel_with_the_tokens(ranks: int, way: str) -> None:
    run_ranks(ranks, _payloads, way)


def exchange_on_gpu(rank: int, ranks: int, transport: str = "auto") -> None:
    """All ranks on one device: as between CPUs, and with the same errors."""
    for seed, skew in enumerate(("even", "one_expert", "dropped")):
        case = make_case(seed, rank, 30 + rank, 40, 3, 8, dtype=torch.bfloat16, skew=skew)
        dispatcher = AllToAllDispatcher(dist.group.WORLD, 8, transport=transport)
        tokens, *results = round_trip(dispatcher, case, rank)
        there = Case(case.x.cuda(), case.ids.cuda(), case.weights.cuda())
        gpu_tokens, *gpu_results = round_trip(dispatcher, there, rank)
        assert gpu_tokens.num_rows == tokens.num_rows
        for name in ("x", "topk_ids", "topk_weights"):
            assert torch.equal(getattr(gpu_tokens, name).cpu(), getattr(tokens, name)), name
        for gpu_result, result in zip(gpu_results, results, strict=True):
            assert_close(gpu_result.cpu(), result)
        wrong = Case(there.x, there.ids.clone().fill_(9), there.weights)
        last = rank == ranks - 1
        kind, message = raised(dispatcher.dispatch, *vars(wrong if last else there).values())
        assert kind == ("IndexError" if last else "RuntimeError"), message


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_exchange_of_cuda_tensors(ranks: int) -> None:
    """Which gloo carries through the host."""
    run_ranks(ranks, exchange_on_gpu)


def _sub_groups_and_handles_in_flight(rank: int, ranks: int) -> None:
    members = [rank % 2, rank % 2 + 2]
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    dispatcher = AllToAllDispatcher(groups[rank % 2], 6)
    cases = [[make_case(s, r, 5 + r, 4, 2, 6) for r in range(4)] for s in range(3)]
    sent = [dispatcher.dispatch(c[rank].x, c[rank].ids, c[rank].weights) for c in cases]
    for seed in (1, 2, 0):
        mine, tokens = cases[seed][rank], sent[seed]
        expected = expected_tokens([cases[seed][r] for r in members], members.index(rank), 3)
        assert torch.equal(tokens.x, expected[0])
        y = dispatcher.combine(apply_experts(tokens, 3 * members.index(rank)), tokens.handle)
        assert_close(y, mine.x * ((mine.ids + 1) * mine.weights).sum(1, keepdim=True))


def test_sub_groups_with_several_handles_in_flight() -> None:
    run_ranks(4, _sub_groups_and_handles_in_flight)


def _dropped(rank: int, ranks: int, way: str) -> None:
    case = make_case(5, rank, 6, 4, 2, 4)
    x = case.x.clone().requires_grad_()
    dispatcher = dispatcher_of(way, 4)
    tokens = dispatcher.dispatch(x, case.ids, case.weights)
    y = dispatcher.combine(apply_experts(tokens, 2 * rank), tokens.handle)
    name = dispatcher._name
    del dispatcher, tokens
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert_close(dx, ((case.ids + 1) * case.weights).sum(1, keepdim=True).expand_as(dx))
    del y
    with pytest.raises(RuntimeError, match=f"dispatcher '{name}' is gone"):
        ops.dispatch(x, case.ids, case.weights, None, name)


@pytest.mark.parametrize("way", WAYS[:2])
def test_backward_outlives_the_dispatcher(way: str) -> None:
    run_ranks(2, _dropped, way)


def _frozen_inputs(rank: int, ranks: int) -> None:
    """Only what needs a gradient travels in backward; what the loss does not use is zero."""
    case = make_case(5, rank, 6, 4, 2, 4)
    dispatcher = AllToAllDispatcher(dist.group.WORLD, 4)
    x, weights = case.x.clone().requires_grad_(), case.weights.clone().requires_grad_()
    tokens = dispatcher.dispatch(x, case.ids, case.weights)
    (dx,) = torch.autograd.grad(tokens.x.sum(), x)
    assert_close(
        dx,
        torch.stack([(case.ids // 2).eq(r).any(1) for r in range(2)], 1)
        .sum(1, True)
        .double()
        .expand_as(dx),
    )
    tokens = dispatcher.dispatch(case.x, case.ids, weights)
    (dweights,) = torch.autograd.grad(tokens.topk_weights.square().sum(), weights)
    assert_close(dweights, 2 * case.weights)
    tokens = dispatcher.dispatch(x, case.ids, weights)
    used = tokens.x if rank == 0 else tokens.topk_weights
    used.sum().backward()
    assert x.grad is not None
    assert weights.grad is not None
    assert_close(x.grad, (case.ids // 2).eq(0).any(1, keepdim=True).double().expand_as(x))
    assert_close(weights.grad, (case.ids // 2).eq(1).double())


def test_backward_carries_what_is_needed() -> None:
    run_ranks(2, _frozen_inputs)


def raised(function: Callable[..., Any], *args: Any) -> tuple[str, str]:
    """The type and the message of what ``function`` raises."""
    try:
        function(*args)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def _missing_rank(rank: int, ranks: int, how: str) -> tuple[str, str, float]:
    dispatcher = dispatcher_of("process_group", 3, timeout=1.0)
    case = make_case(1, rank, 9, 6, 2, 3)
    tokens = dispatcher.dispatch(case.x, case.ids, case.weights)
    store = store_of(dist.group.WORLD)
    begin = time.monotonic()
    if rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exited":
            os._exit(0)
        store.wait(["0 has given up", "2 has given up"])
    kind, message = raised(dispatcher.combine, tokens.x, tokens.handle)
    assert kind == "DistBackendError" or rank == 1, message
    seconds = time.monotonic() - begin
    store.set(f"{rank} has given up", "")
    if rank != 1:  # the first error is what counts from now on
        again_kind, again = raised(dispatcher.dispatch, case.x, case.ids, case.weights)
        assert again_kind == "DistBackendError"
        assert again.startswith(
            "dispatch: this dispatcher of group '0' is of no use after an error"
        )
        assert again.endswith(message)
    return kind, message, seconds


def test_a_stuck_rank_is_an_error_after_the_timeout() -> None:
    results = run_ranks(3, _missing_rank, "stuck")
    for rank in (0, 2):
        _, message, seconds = results[rank]
        assert f"combine: the exchange of token counts failed on rank {rank} of 3" in message
        assert seconds < 2.5
    assert max(results[0][2], results[2][2]) > 0.9  # gloo ends the waiting of who comes later


@pytest.mark.parametrize("how", ["killed", "exited"])
def test_a_dead_rank_is_an_error(how: str) -> None:
    with pytest.raises(AssertionError, match="1 of 3 ranks failed\n--- rank 1: died"):
        run_ranks(3, _missing_rank, how)


def _threads_run_on(rank: int, ranks: int, way: str) -> None:
    """Rank 1 comes once a thread of rank 0, which waits for it, has run 20 times."""
    dispatcher, store = dispatcher_of(way, 2), store_of(dist.group.WORLD)

    def tick() -> None:
        for _ in range(20):
            time.sleep(0.005)
        store.set("has run", "")

    if rank == 0:
        threading.Thread(target=tick).start()
    else:
        store.wait(["has run"])
    dispatcher.dispatch(torch.randn(2, 3), torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1))


@pytest.mark.parametrize("way", WAYS[:2])
def test_waiting_leaves_the_interpreter_free(way: str) -> None:
    run_ranks(2, _threads_run_on, way, timeout=20)
