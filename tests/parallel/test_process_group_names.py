"""Which rank is missing, where the backend does not say it: `process_group` on gloo.

T tokens, H hidden size, K experts a token, E experts, P ranks.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_parallel.torch_internals import store_of
from tests.parallel.ranks import end_group, fork_context, run_ranks
from tests.parallel.test_dispatch import dispatcher_of, raised
from tests.parallel.test_shared_memory import arguments, processes, small_case, timed

PR_SET_PTRACER, PTRACE_ATTACH, PTRACE_DETACH, WALL = 0x59616D61, 16, 17, 0x40000000


def _missing(rank: int, ranks: int, how: str, phase: str) -> None:
    """Rank 1 goes missing before ``phase``."""
    dispatcher = dispatcher_of("process_group", 12, timeout=1.5)
    pids, store = processes(), store_of(dist.group.WORLD)
    case = small_case(rank)
    x = case.x.clone().requires_grad_()
    tokens = dispatcher.dispatch(x, case.ids, case.weights)
    y = dispatcher.combine(tokens.x * 2, tokens.handle)
    calls = {
        "dispatch": lambda: dispatcher.dispatch(*arguments(case)),
        "combine": lambda: dispatcher.combine(tokens.x, tokens.handle),
        "combine_backward": lambda: y.sum().backward(),
    }
    dist.barrier()
    if rank == 1:
        if how == "exited":
            os._exit(0)
        if how != "late":
            os.kill(os.getpid(), signal.SIGSTOP if how == "stopped" else signal.SIGKILL)
        store.wait(["0 has given up", "2 has given up"])
        kind, message = raised(calls[phase])
        assert kind == "DistBackendError"
        if how == "late":  # as the others have said
            assert ": ranks [1] have died, stopped, or not made this call: every rank" in message
        return
    kind, message, seconds = timed(calls[phase])
    store.set(f"{rank} has given up", "")
    store.wait(["0 has given up", "2 has given up"])
    if how == "stopped" and rank == 0:
        os.kill(pids[1], signal.SIGCONT)
    assert kind == "DistBackendError", message
    assert message.startswith(f"{phase}: the exchange of token counts failed on rank {rank} of 3")
    if how == "late":
        named = "ranks [1] have died, stopped, or not made this call: every rank of the group"
    else:
        trouble = "is stopped" if how == "stopped" else "has exited"
        named = f"rank 1 (process {pids[1]}) {trouble}. The backend says: "
    assert f" in group '0': {named}" in message
    assert seconds < (1.0 if how in ("killed", "exited") else 3.0)
    again_kind, again = raised(dispatcher.dispatch, *arguments(case))
    assert again_kind == "DistBackendError"
    assert message in again


@pytest.mark.parametrize("phase", ["dispatch", "combine", "combine_backward"])
@pytest.mark.parametrize("how", ["killed", "exited"])
def test_a_dead_rank_is_named(how: str, phase: str) -> None:
    with pytest.raises(AssertionError, match="1 of 3 ranks failed\n--- rank 1: died"):
        run_ranks(3, _missing, how, phase)


@pytest.mark.parametrize("how", ["stopped", "late"])
def test_a_stuck_rank_is_named(how: str) -> None:
    run_ranks(3, _missing, how, "combine")


def _one_after_another(rank: int, ranks: int) -> None:
    """Rank 1 has died, rank 2 has failed of it and left, and rank 0 calls after that."""
    dispatcher = dispatcher_of("process_group", 12, timeout=5.0)
    pids, case = processes(), small_case(rank)
    dispatcher.dispatch(*arguments(case))
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 0:
        select.select([os.pidfd_open(pids[2])], [], [])
    kind, message = raised(dispatcher.dispatch, *arguments(case))
    assert kind == "DistBackendError"
    assert f"rank 1 (process {pids[1]}) has exited. The backend says: " in message, message
    if rank == 2:
        os._exit(0)


def test_the_first_that_died_is_named() -> None:
    with pytest.raises(AssertionError, match="2 of 3 ranks failed") as caught:
        run_ranks(3, _one_after_another)
    assert str(caught.value).count(": died with exit code") == 2


def _who_gave_up_has_left(rank: int, ranks: int) -> None:
    """Rank 1 is late, rank 0 has given up and left, and rank 2 has begun after rank 0."""
    dispatcher = dispatcher_of("process_group", 12, timeout=1.0)
    pids, case, store = processes(), small_case(rank), store_of(dist.group.WORLD)
    dispatcher.dispatch(*arguments(case))
    dist.barrier()
    if rank == 1:
        store.wait(["2 has given up"])
        return
    if rank == 2:
        select.select([os.pidfd_open(pids[0])], [], [])
    kind, message = raised(dispatcher.dispatch, *arguments(case))
    assert kind == "DistBackendError"
    assert " in group '0': ranks [1, 2] have died, stopped, or not made this call" in message
    if rank == 0:
        os._exit(0)
    store.set("2 has given up", "")


def test_who_gave_up_and_left_is_not_the_cause() -> None:
    with pytest.raises(AssertionError, match="1 of 3 ranks failed\n--- rank 0: died"):
        run_ranks(3, _who_gave_up_has_left)


def _one_knew_an_earlier_group(rank: int, ranks: int, store: str) -> None:
    """Rank 0 has had a group of the same name; rank 2 is late."""
    end_group(rank, ranks)
    if rank == 0:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        dispatcher_of("process_group", 12)
        dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    dispatcher, case = dispatcher_of("process_group", 12, timeout=1.0), small_case(rank)
    dispatcher.dispatch(*arguments(case))
    if rank == 2:
        store_of(dist.group.WORLD).wait(["0 has given up", "1 has given up"])
        return
    kind, message = raised(dispatcher.dispatch, *arguments(case))
    store_of(dist.group.WORLD).set(f"{rank} has given up", "")
    assert kind == "DistBackendError"
    assert " in group '0': ranks [2] have died, stopped, or not made this call" in message


def test_a_late_rank_is_named_where_ranks_differ_in_what_they_had_before(tmp_path: Path) -> None:
    run_ranks(3, _one_knew_an_earlier_group, str(tmp_path / "store"))


def _too_short(rank: int, ranks: int) -> str:
    """Every rank makes the call, and none has the time for it."""
    dispatcher = dispatcher_of("process_group", 12, timeout=0.001)
    generator = torch.Generator().manual_seed(rank)
    x = torch.rand(5_000, 1024, generator=generator)
    ids = torch.randint(12, (5_000, 2), generator=generator)
    store = store_of(dist.group.WORLD)
    weights = torch.ones(5_000, 2)
    dist.barrier()
    kind, message = raised(dispatcher.dispatch, x, ids, weights)
    store.set(f"{rank} has given up", "")
    store.wait([f"{other} has given up" for other in range(ranks)])
    assert kind == "DistBackendError"
    return message


def test_a_timeout_that_is_too_short_for_all_blames_nobody() -> None:
    """In one of three tries: a rank that does not run for half a second is named, rightly."""
    found: list[str] = []
    for _ in range(3):
        found = run_ranks(2, _too_short)
        if all(" in group '0': all ranks have failed, and none is known" in said for said in found):
            break
    for message in found:
        assert (
            " in group '0': all ranks have failed, and none is known to be missing: the" in message
        )
        assert "timeout must be enough for the exchange, and for the last rank to begin" in message


def _in_a_debugger(rank: int, ranks: int) -> None:
    """Rank 0 is the debugger of rank 1; where the system allows none, it stops it by a signal."""
    dispatcher, case = dispatcher_of("process_group", 12, timeout=1.0), small_case(rank)
    pids, store = processes(), store_of(dist.group.WORLD)
    dispatcher.dispatch(*arguments(case))
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)  # where not every process may
    dist.barrier()
    if rank == 1:
        store.wait(["rank 0 has given up"])
        return
    held = libc.ptrace(PTRACE_ATTACH, pids[1], None, None) == 0
    if held:
        os.waitpid(pids[1], WALL)
    else:
        os.kill(pids[1], signal.SIGSTOP)
    kind, message = raised(dispatcher.dispatch, *arguments(case))
    if held:
        libc.ptrace(PTRACE_DETACH, pids[1], None, None)
    else:
        os.kill(pids[1], signal.SIGCONT)
    store.set("rank 0 has given up", "")
    assert kind == "DistBackendError"
    assert f" in group '0': rank 1 (process {pids[1]}) is stopped. The backend says: " in message


def test_a_rank_that_a_debugger_holds_is_stopped() -> None:
    run_ranks(2, _in_a_debugger)


def _keeper_of_the_store(how: str, port: int, rank: int, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    dispatcher = dispatcher_of("process_group", 12, timeout=1.0)
    case = small_case(rank)
    dispatcher.dispatch(*arguments(case))
    dist.barrier()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP if how == "stopped" else signal.SIGKILL)
    results.put(timed(dispatcher.dispatch, *arguments(case)))
    results.close()
    results.join_thread()
    os._exit(0)


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_who_keeps_the_store_is_named(how: str) -> None:
    """Nobody waits for what the store does not answer."""
    context = fork_context()
    results = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        context.Process(target=_keeper_of_the_store, args=(how, port, rank, results))
        for rank in range(3)
    ]
    for process in ranks:
        process.start()
    try:
        for _ in range(2):
            kind, message, seconds = results.get(timeout=60)
            assert kind == "DistBackendError"
            trouble = "is stopped" if how == "stopped" else "has exited"
            assert f" in group '0': rank 0 (process {ranks[0].pid}) {trouble}" in message
            assert seconds < 2.5
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _before_they_met(rank: int, ranks: int) -> None:
    dispatcher = dispatcher_of("process_group", 12, timeout=5.0)
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    kind, message, seconds = timed(lambda: dispatcher.dispatch(*arguments(small_case(rank))))
    assert kind == "DistBackendError"
    assert " in group '0': ranks [1] have died, stopped, or not made this call" in message
    assert seconds < 2.0


def test_before_the_first_exchange_its_number_alone_is_known() -> None:
    with pytest.raises(AssertionError, match="1 of 2 ranks failed\n--- rank 1: died"):
        run_ranks(2, _before_they_met)
