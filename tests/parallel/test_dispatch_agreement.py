"""Calls that the ranks do not make alike: an error on every rank, and no exchange.

T tokens, H hidden size, K experts a token, E experts, P ranks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from moe_parallel.dispatch import AllToAllDispatcher, Dispatched, Handle
from tests.parallel.ranks import run_ranks
from tests.parallel.test_dispatch import (
    WAYS,
    apply_experts,
    dispatcher_of,
    make_case,
    raised,
    round_trip,
)


def _mismatch(rank: int, ranks: int, what: str, way: str) -> tuple[tuple[str, str], bool]:
    odd = rank == 1
    dispatcher = dispatcher_of(way, 12 if what == "experts" and odd else 6)
    other = dispatcher_of(way, 6)
    settings: dict[str, Any] = {"hidden": 6, "top_k": 2, "dtype": torch.float32}
    if odd:
        settings |= {
            "hidden": {"hidden": 7},
            "top_k": {"top_k": 3},
            "dtype": {"dtype": torch.bfloat16},
            "weight_dtype": {"weight_dtype": torch.float32},
        }.get(what, {})
    case = make_case(1, rank, 9, experts=6, **settings)
    arguments = (case.x, case.ids, case.weights)
    if what == "dispatcher" and odd:
        result = raised(other.dispatch, *arguments)
    elif what in EXTRAS:
        extra = EXTRAS[what][odd]
        result = raised(partial(dispatcher.dispatch, *arguments, extra=extra))
    elif what in ("phase", "rows"):
        first = dispatcher.dispatch(*arguments)
        if what == "rows":
            result = raised(dispatcher.combine, first.x[odd:], first.handle)
        elif odd:
            result = raised(dispatcher.combine, first.x, first.handle)
        else:
            result = raised(dispatcher.dispatch, *arguments)
    else:
        result = raised(dispatcher.dispatch, *arguments)
    # The group is as good as before.
    case = make_case(2, rank, 9, 6, 2, 6)
    y = round_trip(other, case, rank)[1]
    return result, torch.allclose(y, case.x * ((case.ids + 1) * case.weights).sum(1, keepdim=True))


# Of an even rank and of an odd one.
EXTRAS: dict[str, tuple[Tensor, Tensor | None]] = {
    "extra_dtype": (torch.zeros(9, 2), torch.zeros(9, 2, dtype=torch.int32)),
    "extra_bytes": (torch.zeros(9, 2), torch.zeros(9, 3)),
    "no_extra": (torch.zeros(9, 2), None),
}
MISMATCHES = [
    ("extra_dtype", "extra's dtype", ("Float", "Int")),
    ("extra_bytes", "the bytes of extra for a token", ("8", "12")),
    ("no_extra", "extra's dtype", ("Float", "none")),
    ("hidden", "H (the columns of x)", ("6", "7")),
    ("top_k", "K (the columns of topk_ids)", ("2", "3")),
    ("dtype", "x's dtype", ("Float", "BFloat16")),
    ("weight_dtype", "topk_weights' dtype", ("Double", "Float")),
    ("experts", "num_experts", ("6", "12")),
    ("phase", "the phase", ("dispatch", "combine")),
    ("dispatcher", "the dispatcher", ("dispatcher 0", "dispatcher 1")),
]


@pytest.mark.parametrize(
    ("way", "what", "named", "values"),
    # by the steps meant for GPUs, combine has no headers
    [(way, *row) for way in WAYS for row in MISMATCHES if (way, row[0]) != ("aten", "phase")],
)
def test_calls_that_do_not_match_are_an_error_on_every_rank(
    way: str, what: str, named: str, values: tuple[str, str]
) -> None:
    for rank, ((kind, message), healthy) in enumerate(run_ranks(3, _mismatch, what, way)):
        assert kind == "ValueError", message
        mine, other = values if rank != 1 else values[::-1]
        assert f"must agree on {named}; rank {rank} has {mine} and rank" in message
        assert f"has {other}." in message
        assert healthy


def _another_build(rank: int, ranks: int) -> None:
    """Rank 1 says that its lines are of a kind of their own; their length is that of all builds."""
    lines = torch.full((ranks, 32), 5)
    if rank == 1:
        dist.all_to_all_single(torch.empty_like(lines), lines)
        return
    case = make_case(1, rank, 9, 6, 2, 6)
    kind, message = raised(
        dispatcher_of("process_group", 6, timeout=5).dispatch, case.x, case.ids, case.weights
    )
    assert kind == "ValueError", message
    assert message == (
        "dispatch: rank 1 of group '0' speaks another protocol. Use one version of moe_kernels on "
        "all ranks."
    )


def test_ranks_of_different_builds_are_told() -> None:
    run_ranks(2, _another_build, timeout=20)


def _number(tokens: Dispatched) -> int:
    return int(tokens.handle.plan[-2])


def _swapped(rank: int, ranks: int, way: str) -> list[tuple[str, str, tuple[int, int]]]:
    """Two dispatches of the same tokens; rank 1 goes on with the other one, in each phase."""
    dispatcher = dispatcher_of(way, 6)
    case = make_case(1, rank, 9, 6, 2, 6)
    results = []
    for phase in ("combine", "combine_backward", "dispatch_backward"):
        x = case.x.clone().requires_grad_()
        sent = [dispatcher.dispatch(x, case.ids, case.weights) for _ in range(2)]
        assert torch.equal(sent[0].handle.plan[:-2], sent[1].handle.plan[:-2])
        numbers = (_number(sent[0]), _number(sent[1]))
        first, second = sent if rank != 1 else sent[::-1]
        if phase == "combine":
            result = raised(dispatcher.combine, first.x, first.handle)
        elif phase == "dispatch_backward":
            result = raised(torch.autograd.grad, first.x.sum(), x)
        else:
            y = [dispatcher.combine(tokens.x, tokens.handle) for tokens in sent]
            result = raised(torch.autograd.grad, y[rank == 1].sum(), x)
        # Nothing has been exchanged: the same in the same order still goes through.
        y = dispatcher.combine(second.x if rank == 1 else first.x, sent[0].handle)
        torch.autograd.grad(y.sum(), x)
        results.append((*result, numbers))
    return results


@pytest.mark.parametrize("way", WAYS[:2])
def test_handles_of_different_dispatches_are_an_error_on_every_rank(way: str) -> None:
    """Whatever their sizes: equal ones would mix tokens silently."""
    for rank, results in enumerate(run_ranks(3, _swapped, way)):
        for phase, (kind, message, (low, high)) in zip(
            ("combine", "combine_backward", "dispatch_backward"), results, strict=True
        ):
            assert kind == "ValueError", message
            assert message.startswith(f"{phase}: the ranks of group '0' must agree on the dispatch")
            mine, other = (low, high) if rank != 1 else (high, low)
            assert f"rank {rank} has dispatch {mine} and rank" in message
            assert f"has dispatch {other}." in message


def _legal(rank: int, ranks: int, way: str) -> None:
    """Any order that the ranks share: in flight, in backward, recomputed."""
    dispatcher = dispatcher_of(way, 6)
    cases = [make_case(seed, rank, 7 + rank, 5, 2, 6) for seed in range(3)]
    xs = [case.x.clone().requires_grad_() for case in cases]

    def layer(x: Tensor, seed: int) -> Tensor:
        tokens = dispatcher.dispatch(x, cases[seed].ids, cases[seed].weights)
        return dispatcher.combine(apply_experts(tokens, 3 * rank), tokens.handle)

    scales = [((case.ids + 1) * case.weights).sum(1, keepdim=True) for case in cases]
    ys = [layer(x, seed) for seed, x in enumerate(xs)]
    for seed in (1, 0, 2, 1):
        (dx,) = torch.autograd.grad(ys[seed].sum(), xs[seed], retain_graph=True)
        assert_close(dx, scales[seed].expand_as(dx))
    ys = [checkpoint(layer, x, seed, use_reentrant=False) for seed, x in enumerate(xs)]
    for seed in (2, 0, 1):
        (dx,) = torch.autograd.grad(ys[seed].sum(), xs[seed])
        assert_close(dx, scales[seed].expand_as(dx))
    (dx,) = torch.autograd.grad(layer(layer(xs[0], 0), 0).sum(), xs[0])
    assert_close(dx, (scales[0] ** 2).expand_as(dx))


@pytest.mark.parametrize("way", WAYS)
def test_any_order_that_the_ranks_share_is_legal(way: str) -> None:
    run_ranks(2, _legal, way)


def _numbers(rank: int, ranks: int, way: str) -> list[int]:
    """Ranks that have made other numbers of dispatches elsewhere, or failed ones, still agree."""
    alone = [dist.new_group([r]) for r in range(ranks)][rank]
    everybody = dispatcher_of(way, 6)
    case = make_case(1, rank, 9, 6, 2, 6)
    arguments = (case.x, case.ids, case.weights)
    numbers = []
    for _ in range(2):
        for _ in range(3 * rank):
            numbers.append(_number(AllToAllDispatcher(alone, 6).dispatch(*arguments)))
        numbers.append(_number(everybody.dispatch(*arguments)))
        assert raised(everybody.dispatch, case.x[rank:], *arguments[1:])[0] != "nothing"
    assert numbers == sorted(set(numbers))
    return [numbers[3 * rank], numbers[-1]]


@pytest.mark.parametrize("way", WAYS[:2])
def test_ranks_agree_on_the_numbers_of_dispatches(way: str) -> None:
    first, *others = run_ranks(3, _numbers, way)
    assert all(numbers == first for numbers in others)


def _no_handle(rank: int, ranks: int, way: str) -> list[tuple[str, str]]:
    dispatcher = dispatcher_of(way, 6)
    case = make_case(1, rank, 9, 6, 2, 6)
    tokens = dispatcher.dispatch(case.x, case.ids, case.weights)
    slot_rows, plan = tokens.handle
    twin = AllToAllDispatcher(dist.new_group([0, 1]), 6)
    of_twin = twin.dispatch(case.x, case.ids, case.weights).handle
    handles = [
        of_twin,
        Handle(slot_rows, plan[:-1]),
        Handle(slot_rows, plan.float()),
        Handle(slot_rows + 1000, plan),
        Handle(slot_rows.long(), plan),
        Handle(slot_rows, plan + torch.eye(plan.numel(), dtype=torch.int64)[0]),
    ]
    return [
        raised(dispatcher.combine, tokens.x, handle if rank == 1 else tokens.handle)
        for handle in handles
    ]


@pytest.mark.parametrize("way", WAYS[:2])
def test_what_is_no_handle_of_the_group_leaves_nobody_waiting(way: str) -> None:
    good, bad = run_ranks(2, _no_handle, way)
    assert [kind for kind, _ in bad] == ["ValueError"] * 6
    assert [kind for kind, _ in good] == ["RuntimeError"] * 6
    for _, message in bad[3:5]:
        assert message.startswith("combine: the handle's slot_rows are not those of its plan;")
    for _, message in bad[:3] + bad[5:]:
        assert message.startswith("combine: the handle must be that of a dispatch in group '0';")


def _wrong_arguments(rank: int, ranks: int, way: str) -> list[tuple[str, str]]:
    dispatcher = dispatcher_of(way, 4)
    x, ids, weights = torch.randn(3, 5), torch.zeros(3, 2, dtype=torch.int64), torch.rand(3, 2)
    bad_ids = ids.clone()
    bad_ids[2, 1] = 5
    wrong = [
        (x, bad_ids, weights),
        (x[0], ids, weights),
        (x, ids[:2], weights),
        (x, ids, weights[:, :1]),
        (x.int(), ids, weights),
        (x, ids.float(), weights),
    ]
    refused = [
        raised(partial(dispatcher.dispatch, x, ids, weights, extra=extra))
        for extra in (x.double() if rank == 1 else x, x[:, rank:], x[rank:])
    ]
    assert [kind for kind, _ in refused[:2]] == ["ValueError"] * 2
    assert "must agree on extra's dtype" in refused[0][1]
    assert "must agree on the bytes of extra for a token" in refused[1][1]
    assert refused[2][0] == ("ValueError" if rank == 1 else "RuntimeError")
    assert rank == 0 or "extra must be [T, ...] with T = 3" in refused[2][1]
    return [
        raised(dispatcher.dispatch, *(arguments if rank == 1 else (x, ids, weights)))
        for arguments in wrong
    ]


@pytest.mark.parametrize("way", WAYS[:2])
def test_one_rank_with_wrong_arguments_leaves_nobody_waiting(way: str) -> None:
    good, bad = run_ranks(2, _wrong_arguments, way)
    assert all(kind == "RuntimeError" for kind, _ in good)
    assert all("rank 1 of group '0' found an error in its own arguments" in m for _, m in good)
    assert [kind for kind, _ in bad] == [
        "IndexError",
        "ValueError",
        "ValueError",
        "ValueError",
        "TypeError",
        "TypeError",
    ]
    for (_, message), part in zip(
        bad,
        [
            "topk_ids must be in [-1, E] with E = 4; got 5 at [2, 1]",
            "x must be [T, H]; got [5]",
            "topk_ids must be [T, K] with T = 3",
            "topk_weights must be [3, 2] as topk_ids; got [3, 1]",
            "x must be floating point; got Int. Integers travel as extra.",
            "topk_ids must be int32 or int64; got Float",
        ],
        strict=True,
    ):
        assert message.startswith("dispatch: ")
        assert part in message


def _no_expert(rank: int, ranks: int, way: str) -> list[tuple[str, str]]:
    dispatcher = dispatcher_of(way, 4)
    case = make_case(1, rank, 3, 5, 2, 4)
    results = []
    for number in (-2, 5, -(2**31), 2**32 + 1):
        ids = case.ids.clone()
        ids[2, 1] = number if rank == 1 else -1
        results.append(raised(dispatcher.dispatch, case.x, ids, case.weights))
    round_trip(dispatcher, case, rank)
    return results


@pytest.mark.parametrize("way", WAYS)
def test_an_id_that_is_no_expert_on_one_rank_leaves_nobody_waiting(way: str) -> None:
    good, bad = run_ranks(2, _no_expert, way)
    assert len(bad) == 4
    for (kind, message), (bad_kind, bad_message) in zip(good, bad, strict=True):
        assert (kind, bad_kind) == ("RuntimeError", "IndexError"), (message, bad_message)
        assert "rank 1 of group '0' found an error in its own arguments" in message
        assert bad_message.startswith("dispatch: topk_ids must be in [-1, E] with E = 4")


def _one_differentiates(rank: int, ranks: int, way: str) -> list[tuple[str, str]]:
    copied = dispatcher_of(way, 3, placement=[[0, 1], 0, 1])
    case = make_case(1, rank, 9, 6, 2, 3)
    x = case.x.clone().requires_grad_(rank == 1)
    float8 = case.x.float().to(torch.float8_e4m3fn).requires_grad_(rank == 1)
    results = [
        raised(copied.dispatch, x, case.ids, case.weights),
        raised(lambda: copied.dispatch_async(x, case.ids, case.weights).wait()),
        raised(copied.dispatch, float8, case.ids, case.weights),
    ]
    copied.dispatch(case.x, case.ids, case.weights)
    return results


@pytest.mark.parametrize("way", WAYS)
def test_what_one_rank_alone_cannot_differentiate_leaves_nobody_waiting(way: str) -> None:
    good, bad = run_ranks(2, _one_differentiates, way)
    for (kind, message), (bad_kind, bad_message) in zip(good, bad, strict=True):
        assert kind == "RuntimeError", message
        assert "rank 1 of group '0' found an error in its own arguments" in message
        assert bad_kind == "ValueError"
        assert "copies of experts are for inference" in bad_message or "has no grad" in bad_message


def without_kernel(x: Tensor, name: str) -> Any:
    """A tensor, or none, for which the ops have no kernel."""
    if name == "jagged":
        return torch.nested.nested_tensor([x], layout=torch.jagged)
    return {
        "sparse": x.to_sparse,
        "mkldnn": x.float().to_mkldnn,
        "meta": lambda: x.to("meta"),
        "none": lambda: None,
    }[name]()


def _no_kernel(rank: int, ranks: int, way: str) -> list[tuple[str, str]]:
    dispatcher = dispatcher_of(way, 6)
    x, ids, weights = torch.randn(3, 5), torch.zeros(3, 2, dtype=torch.int64), torch.rand(3, 2)
    results = []
    for name in ("sparse", "mkldnn", "meta", "none", "jagged"):
        odd = without_kernel(x, name) if rank == 1 else x
        results.append(raised(dispatcher.dispatch, odd, ids, weights))
    for name in ("sparse", "meta", "none"):
        odd = without_kernel(ids, name) if rank == 1 else ids
        results.append(raised(lambda odd=odd: dispatcher.dispatch_async(x, odd, weights).wait()))
        odd = without_kernel(weights, name) if rank == 1 else weights
        results.append(raised(dispatcher.dispatch, x, ids, odd))
    extra = without_kernel(x, "sparse") if rank == 1 else x
    results.append(raised(partial(dispatcher.dispatch, x, ids, weights, extra=extra)))
    if way == "aten":
        return results
    tokens = dispatcher.dispatch(x, ids, weights)
    for name in ("sparse", "mkldnn", "meta", "none"):
        y = without_kernel(tokens.x, name) if rank == 1 else tokens.x
        results.append(raised(dispatcher.combine, y, tokens.handle))
    slot_rows, plan = tokens.handle
    for handle in (None, (slot_rows.to_sparse(), plan), (slot_rows, plan.to("meta")), (plan,)):
        chosen: Any = handle if rank == 1 else tokens.handle
        results.append(
            raised(lambda chosen=chosen: dispatcher.combine_async(tokens.x, chosen).wait())
        )
    with forward_ad.dual_level():
        y = forward_ad.make_dual(tokens.x, tokens.x) if rank == 1 else tokens.x
        results.append(raised(dispatcher.combine, y, tokens.handle))
    assert torch.equal(dispatcher.combine(tokens.x, tokens.handle), x)
    return results


@pytest.mark.parametrize("way", WAYS)
def test_what_has_no_kernel_on_one_rank_leaves_nobody_waiting(way: str) -> None:
    good, bad, third = run_ranks(3, _no_kernel, way)
    assert len(good) == (12 if way == "aten" else 21)
    for result in zip(good, third, bad, strict=True):
        (kind, message), _, (bad_kind, bad_message) = result
        assert kind == result[1][0] == "RuntimeError", result
        assert "rank 1 of group '0' found an error in its own arguments" in message
        assert bad_kind in ("TypeError", "ValueError", "NotImplementedError"), bad_message
        assert bad_message.startswith("combine" if "combine" in message else "dispatch")
    assert "x must be dense, of layout torch.strided; got torch.sparse_coo" in bad[0][1]
    assert "x must be on a CPU or CUDA device; got meta" in bad[2][1]
    assert "x must be a tensor; got NoneType" in bad[3][1]


def _sparse_gradient(rank: int, ranks: int, way: str) -> None:
    """On one rank alone: of no other value."""
    dispatcher = dispatcher_of(way, 4)
    case = make_case(1, rank, 9, 6, 2, 4)
    x = case.x.clone().requires_grad_()
    tokens = dispatcher.dispatch(x, case.ids, case.weights)
    y = dispatcher.combine(tokens.x, tokens.handle)
    for out in (y, tokens.x):
        grad = torch.ones_like(out)
        (expected,) = torch.autograd.grad(out, x, grad, retain_graph=True)
        sent = grad.to_sparse() if rank == 1 else grad
        (dx,) = torch.autograd.grad(out, x, sent, retain_graph=True)
        assert torch.equal(dx, expected)


@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_may_be_sparse_on_one_rank(way: str) -> None:
    run_ranks(2, _sparse_gradient, way)


@pytest.mark.parametrize("way", WAYS[:2])
def test_a_result_of_the_wrong_size_is_refused_where_it_is(way: str) -> None:
    (good, _), (bad, _) = run_ranks(2, _mismatch, "rows", way)
    assert good[0] == "RuntimeError"
    assert bad[0] == "ValueError"
    assert "y must have the" in bad[1]
