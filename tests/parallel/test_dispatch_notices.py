"""One rank refuses its own arguments where calls begin without headers, as those of GPUs do.

T tokens, H hidden size, K experts a token, E experts, P ranks.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from moe_kernels import _C
from moe_parallel.dispatch import AllToAllDispatcher, Handle, ops
from tests.parallel.ranks import run_ranks
from tests.parallel.test_dispatch import dispatcher_of, make_case, raised, round_trip

REFUSED = ("rows", "dtype", "nothing", "handle", "async", "combine_backward", "dispatch_backward")


TOLD = (
    "rank 1 of group '.*' found an error in its own arguments, for an exchange that other "
    "ranks have begun and cannot end; its message says which"
)


def _refusing(
    dispatcher: AllToAllDispatcher, tokens: Any, x: torch.Tensor, what: str, odd: bool
) -> Callable[[], Any]:
    """A call that is wrong on a rank that is odd."""
    y, (slot_rows, plan) = tokens.x, tokens.handle
    bad = plan + 1 if odd else plan
    calls: dict[str, Callable[[], Any]] = {
        "rows": lambda: dispatcher.combine(y[odd:], tokens.handle),
        "dtype": lambda: dispatcher.combine(y.long() if odd else y, tokens.handle),
        "nothing": lambda: dispatcher.combine(None if odd else y, tokens.handle),  # type: ignore[arg-type]
        "handle": lambda: dispatcher.combine(y, Handle(slot_rows, bad)),
        "async": lambda: dispatcher.combine_async(y[odd:], tokens.handle).wait(),
        "combine_backward": lambda: ops._combine_backward_op(
            x, slot_rows, bad, len(y), dispatcher._name
        ),
        "dispatch_backward": lambda: ops._dispatch_backward_op(
            y, None, slot_rows, bad, dispatcher._name
        ),
    }
    return calls[what]


def _one_refuses(rank: int, ranks: int) -> dict[str, list[tuple[str, str]]]:
    """In a group of its own each, which is of no use after that."""
    _C.set_dispatch_native(False)
    case = make_case(1, rank, 9, 6, 2, 6)
    arguments = (case.x, case.ids, case.weights)
    results = {}
    for what in REFUSED:
        group = dist.new_group(range(ranks))
        first, second = (
            AllToAllDispatcher(group, 6, transport="process_group", timeout=20) for _ in range(2)
        )
        tokens = first.dispatch(*arguments)
        first.combine(tokens.x, tokens.handle)
        results[what] = [
            raised(_refusing(first, tokens, case.x, what, rank == 1)),
            raised(second.dispatch, *arguments),
        ]
    round_trip(dispatcher_of("aten", 6), case, rank)  # another group is as good as before
    return results


def test_one_rank_that_refuses_leaves_nobody_waiting() -> None:
    good, bad, third = run_ranks(3, _one_refuses)
    for what in REFUSED:
        phase = what if "backward" in what else "combine"
        for (kind, message), (later, cause) in (good[what], third[what]):
            assert kind == "RuntimeError", message
            assert re.fullmatch(f"{phase}: {TOLD}", message), message
            assert later == "DistBackendError"
            assert cause.startswith("dispatch: this dispatcher of group")
            assert cause.endswith(message)
        (kind, message), (later, cause) = bad[what]
        assert kind == ("TypeError" if what in ("dtype", "nothing") else "ValueError"), message
        assert later == "RuntimeError", cause
        assert re.fullmatch(f"dispatch: {TOLD}", cause), cause


def _ends_after_a_dispatch(rank: int, ranks: int) -> tuple[str, str]:
    """What began before a dispatch and ends after it says nothing of what begins after it."""
    dispatcher = dispatcher_of("aten", 6, timeout=20)
    case = make_case(1, rank, 9, 6, 2, 6)
    tokens = dispatcher.dispatch(case.x, case.ids, case.weights)
    pending = [dispatcher.combine_async(tokens.x, tokens.handle) for _ in range(2)]
    later = dispatcher.dispatch(case.x, case.ids, case.weights)
    for call in pending:
        call.wait()
    return raised(_refusing(dispatcher, later, case.x, "rows", rank == 1))


def test_a_call_that_ends_after_a_dispatch_hides_no_refusal() -> None:
    (kind, message), own = run_ranks(2, _ends_after_a_dispatch)
    assert own[0] == "ValueError"
    assert kind == "RuntimeError"
    assert re.fullmatch(f"combine: {TOLD}", message), message


def _all_refuse(rank: int, ranks: int) -> None:
    """Alike, and as often: no rank has begun what another has not."""
    dispatcher = dispatcher_of("aten", 4, timeout=20)
    case = make_case(1, rank, 9, 6, 2, 4)
    for _ in range(2):
        tokens = dispatcher.dispatch(case.x, case.ids, case.weights)
        for what in ("rows", "handle", "dtype"):
            kind, _ = raised(_refusing(dispatcher, tokens, case.x, what, True))
            assert kind in ("ValueError", "TypeError")
        if rank == 1:
            time.sleep(0.3)  # so that the other looks for notices
        y = dispatcher.combine(tokens.x, tokens.handle)
        assert torch.isfinite(y).all()
    round_trip(dispatcher, case, rank)


def test_what_all_ranks_refuse_does_no_harm() -> None:
    run_ranks(2, _all_refuse)
