"""Groups that end under a dispatcher, and processes that have it and are not the rank.

T tokens, H hidden size, K experts a token, E experts, P ranks.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from moe_kernels import _C
from moe_parallel.dispatch import AllToAllDispatcher
from moe_parallel.torch_internals import store_of
from tests.parallel.ranks import run_ranks
from tests.parallel.test_dispatch import dispatcher_of, raised, round_trip
from tests.parallel.test_shared_memory import arguments, small_case, timed

WAYS = ("shared_memory", "process_group")


def _destroyed(rank: int, ranks: int) -> tuple[str, str]:
    dispatcher = dispatcher_of("shared_memory", 12)
    tokens = dispatcher.dispatch(*arguments(small_case(rank)))
    store = store_of(dist.group.WORLD)
    if rank == 1:
        dist.destroy_process_group()
        result = raised(dispatcher.combine, tokens.x, tokens.handle)
        store.get("over")
        return result
    kind, message, seconds = timed(dispatcher.combine, tokens.x, tokens.handle)
    store.set("over", "")
    assert seconds < 1
    return kind, message


def test_a_destroyed_group_ends_the_calls_in_flight() -> None:
    kept, destroyed = run_ranks(2, _destroyed)
    assert kept[0] == destroyed[0] == "DistBackendError"
    assert "rank 1 (process" in kept[1]
    assert "has destroyed the group while rank 0 waited for its header in combine" in kept[1]
    assert "group '0' has been destroyed" in destroyed[1]


def _destroyed_in_flight(rank: int, ranks: int, way: str) -> tuple[str, str]:
    """Rank 1 destroys the group between the beginning of a call and its end, and begins another."""
    dispatcher = dispatcher_of(way, 12)
    case = small_case(rank)
    store = store_of(dist.group.WORLD)
    dispatcher.dispatch(*arguments(case))
    pending = dispatcher.dispatch_async(*arguments(case))
    if rank == 1:
        dist.destroy_process_group()
    result = raised(pending.wait)
    if rank == 1:
        again = raised(dispatcher.dispatch, *arguments(case))
        assert again[0] == "DistBackendError"
        assert "group '0' has been destroyed" in again[1]
        store.get("over")
    store.set("over", "")
    return result


@pytest.mark.parametrize("way", WAYS)
def test_a_group_destroyed_under_a_call_ends_it(way: str) -> None:
    kept, destroyed = run_ranks(2, _destroyed_in_flight, way)
    if way == "process_group":  # what c10d has begun it may carry out
        assert kept[0] in ("nothing", "DistBackendError")
        assert destroyed[0] in ("nothing", "DistBackendError")
        return
    assert kept[0] == destroyed[0] == "DistBackendError"
    assert "rank 1 (process" in kept[1]
    assert "has destroyed the group while rank 0 waited" in kept[1]
    assert "group '0' has been destroyed" in destroyed[1]


def _logged(rank: int, ranks: int) -> list[str]:
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.levelname} {record.getMessage()}")

    log = logging.getLogger("moe_parallel")
    log.addHandler(Lines())
    log.setLevel(logging.INFO)
    for _ in range(3):
        AllToAllDispatcher(dist.group.WORLD, 12)
    AllToAllDispatcher(dist.new_group([0, 1]), 12)
    return lines


def test_the_choice_is_logged_once_for_a_group() -> None:
    for first, second in run_ranks(2, _logged):
        assert first.startswith("INFO dispatch in group '0': shared_memory, for all 2 ranks are")
        assert second.startswith("INFO dispatch in group '")
        assert "group '0'" not in second


def _raised_in_a_fork(function: Callable[..., Any], *args: Any) -> str:
    """What ``function`` raises there, as "type/message"."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, "/".join(raised(function, *args)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return os.read(read, 4096).decode()


def _forked(rank: int, ranks: int, way: str) -> str:
    dispatcher = dispatcher_of(way, 12)
    case = small_case(rank)
    tokens = dispatcher.dispatch(*arguments(case))
    message = ""
    if rank == 0:
        message = _raised_in_a_fork(dispatcher.combine, tokens.x, tokens.handle)
    dispatcher.combine(tokens.x, tokens.handle)
    round_trip(dispatcher, case, rank)
    return message


@pytest.mark.parametrize("way", WAYS)
def test_a_fork_of_a_rank_is_refused_and_harms_nobody(way: str) -> None:
    message = run_ranks(2, _forked, way)[0]
    assert message.startswith("DistBackendError/combine: this process is a fork of rank 0 of group")


def _forked_anew(rank: int, ranks: int, way: str, met: bool) -> str:
    """The child makes a dispatcher of its own on the group of its parent, which may have one that
    has exchanged nothing yet."""
    dispatcher, case = dispatcher_of(way, 12, timeout=20), small_case(rank)
    if met:
        round_trip(dispatcher, case, rank)
    message = ""
    if rank == 0:
        message = _raised_in_a_fork(
            lambda: dispatcher_of(way, 12, timeout=1).dispatch(*arguments(case))
        )
    round_trip(dispatcher, case, rank)
    return message


@pytest.mark.parametrize("met", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_fork_makes_no_dispatcher_on_the_group(way: str, met: bool) -> None:
    message = run_ranks(2, _forked_anew, way, met)[0]
    assert message.startswith("DistBackendError/")
    assert "this process is a fork of rank 0" in message


def _forked_in_flight(rank: int, ranks: int, way: str) -> list[str]:
    """The child has the call that its parent has begun, and can neither end nor drop it."""
    dispatcher = dispatcher_of(way, 12, timeout=20)
    case = small_case(rank)
    messages = []
    for what in ("wait", "dispatch", "drop", "trim", "close")[: 3 if way == "process_group" else 5]:
        pending = dispatcher.dispatch_async(*arguments(case))
        if rank == 0:
            read, write = os.pipe()
            if os.fork() == 0:
                calls: dict[str, Callable[[], Any]] = {
                    "wait": pending.wait,
                    "dispatch": lambda: dispatcher.dispatch(*arguments(case)),
                    "trim": dispatcher.trim,
                    "close": lambda: _C.recall_joined("0")[0].close(),
                }
                text = "/".join(raised(calls.get(what, lambda: None)))
                del pending, dispatcher, calls
                gc.collect()
                os.write(write, text.encode())
                os._exit(0)
            os.wait()
            messages.append(os.read(read, 4096).decode())
        tokens = pending.wait()
        dispatcher.combine(tokens.x, tokens.handle)
    round_trip(dispatcher, case, rank)
    return messages


@pytest.mark.parametrize("way", WAYS)
def test_a_fork_cannot_end_what_the_rank_has_begun(way: str) -> None:
    wait, dispatch, drop, *more = run_ranks(2, _forked_in_flight, way)[0]
    assert drop == "nothing/"
    trim, close = more[:1], more[1:]
    assert len(trim) == (way == "shared_memory")
    assert close == ["nothing/"] * len(trim)
    for op, message in (("dispatch", wait), ("dispatch", dispatch), *(("trim", t) for t in trim)):
        assert message.startswith(f"DistBackendError/{op}: this process is a fork of rank 0 of")


def _fails_on_one(rank: int, ranks: int, way: str) -> None:
    """Rank 1 cannot make some dispatchers that the others make, or tries when nobody else does."""
    wrong: list[dict[str, Any]] = [
        {"placement": [0]},
        {"timeout": -1},
        {"transport": "carrier_pigeon"},
        {"max_tokens": 0},
    ]
    case = small_case(rank)
    if way == "shared_memory":  # the ranks have not met yet
        for options in wrong[:rank]:
            assert raised(lambda o=options: dispatcher_of(way, 12, **o))[0] == "ValueError"
        round_trip(dispatcher_of(way, 12), case, rank)
    for options in wrong:
        given = {"transport": way, **(options if rank == 1 else {})}
        kind, _ = raised(lambda o=given: AllToAllDispatcher(dist.group.WORLD, 12, **o))
        assert kind == ("ValueError" if rank == 1 else "nothing")
        round_trip(dispatcher_of(way, 12), case, rank)


@pytest.mark.parametrize("way", WAYS)
def test_a_dispatcher_that_fails_on_one_rank_leaves_the_next_alike(way: str) -> None:
    run_ranks(3, _fails_on_one, way)


def _group_again(rank: int, ranks: int) -> None:
    """A later rank may know nothing of the first group: so nobody counts what was made there."""
    case = small_case(rank)
    everything = [dispatcher_of("process_group", 12) for _ in range(3)]
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=rank, world_size=ranks)
    assert _C.begun_dispatchers("0") == 0
    for number, way in enumerate(WAYS):
        everything.append(dispatcher_of(way, 12))
        round_trip(everything[-1], case, rank)
        assert _C.begun_dispatchers("0") == number + 1
    assert len({dispatcher._name for dispatcher in everything}) == len(everything)


def test_a_group_of_the_same_name_counts_anew() -> None:
    run_ranks(1, _group_again)
