"""The first cause of a failure is what every rank says, however late it looks; not that another
rank, which has failed of it, is gone with what it had.

T tokens, H hidden size, K experts a token, E experts, P ranks.
"""

from __future__ import annotations

import gc
import os
import resource
import select
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_kernels import _C
from moe_parallel.dispatch import AllToAllDispatcher, joining, ops
from moe_parallel.dispatch.joining import EMULATE_GPUS
from moe_parallel.torch_internals import store_of
from tests.parallel.emulated_gpus import cuda_ipc
from tests.parallel.ranks import run_ranks
from tests.parallel.test_dispatch import dispatcher_of, make_case, raised, round_trip
from tests.parallel.test_shared_memory import arguments, processes, small_case


def _one_after_another(rank: int, ranks: int) -> None:
    """Each rank calls when the one after it has failed; the last has died."""
    dispatcher = cuda_ipc(12)
    pids, store = processes(), store_of(dist.group.WORLD)
    case = small_case(rank)
    dispatcher.dispatch(*arguments(case))
    dist.barrier()
    if rank == ranks - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    select.select([os.pidfd_open(pids[-1])], [], [])
    store.wait([f"{rank + 1} has given up"] if rank < ranks - 2 else [])
    kind, message = raised(dispatcher.dispatch, *arguments(case))
    store.set(f"{rank} has given up", "")
    assert kind == "DistBackendError"
    assert f"rank {ranks - 1} (process {pids[-1]}) of group '0' has exited" in message
    assert message.count("has failed") == (rank < ranks - 2), message
    store.wait([f"{r} has given up" for r in range(ranks - 1)])


def test_no_chain_of_consequences_is_told() -> None:
    """Of which the end, the cause, would not fit where ranks leave their reasons."""
    with pytest.raises(AssertionError, match="1 of 4 ranks failed\n--- rank 3: died"):
        run_ranks(4, _one_after_another)


def _destroys(rank: int, ranks: int, way: str) -> tuple[str, str]:
    """Rank 1 destroys the group, and has exited when rank 0 calls."""
    os.environ[EMULATE_GPUS] = "1"
    watch, group = os.pidfd_open(processes()[1]), dist.new_group([0, 1])
    dispatcher = AllToAllDispatcher(group, 12, transport=way, max_tokens=16)
    case = small_case(rank)
    dispatcher.dispatch(*arguments(case))
    if rank == 1:
        dist.destroy_process_group(group)
        return "", ""
    select.select([watch], [], [])
    return raised(dispatcher.dispatch, *arguments(case))


@pytest.mark.parametrize("way", ["shared_memory", "cuda_ipc"])
def test_what_a_rank_did_before_it_exited_is_told(way: str) -> None:
    kind, message = run_ranks(2, _destroys, way, stay=False)[0]
    assert kind == "DistBackendError"
    assert "rank 1 (process" in message
    assert "has destroyed the group" in message


def without_files(spare: int) -> tuple[int, int]:
    """From now on this process can open so many files more. Returns the limit that it had."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + spare, limit[1]))
    return limit


def _no_files(rank: int, ranks: int) -> tuple[str, str]:
    """Rank 0 needs memory for what comes, and rank 1 cannot open it."""
    dispatcher = dispatcher_of("shared_memory", 2)
    round_trip(dispatcher, make_case(1, rank, 9, 6, 2, 2), rank)
    x, weights = torch.randn(3000, 512), torch.ones(3000, 1)
    limit = without_files(0) if rank == 1 else resource.getrlimit(resource.RLIMIT_NOFILE)
    result = raised(dispatcher.dispatch, x, torch.zeros(3000, 1, dtype=torch.int64), weights)
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    return result


def test_memory_that_cannot_be_opened_says_why() -> None:
    (kind, message), own = run_ranks(2, _no_files)
    assert kind == own[0] == "DistBackendError"
    assert "rank 1 (process" in message
    for text in (message, own[1]):
        assert "this process has as many files open as it may have" in text


def _stop_when_files_open(more: int, over: threading.Event) -> None:
    """Stop this process as soon as it has so many more."""
    before = len(os.listdir("/proc/self/fd"))
    while not over.is_set():
        if len(os.listdir("/proc/self/fd")) >= before + more:
            os.kill(os.getpid(), signal.SIGSTOP)
            return


def _cannot_open(rank: int, ranks: int) -> tuple[str, str]:
    """Rank 2 makes memory and cannot open the others', fails and exits; rank 1, which has opened
    that of rank 0, is stopped until then."""
    dispatcher = cuda_ipc(12, timeout=100)
    round_trip(dispatcher, small_case(rank), rank)
    pids, store, over = processes(), store_of(dist.group.WORLD), threading.Event()
    case = make_case(1, rank, 9, 60000, 2, 12)
    if rank == 0:
        watch = os.pidfd_open(pids[2])

        def wake() -> None:
            select.select([watch], [], [])
            while not over.wait(0.01):
                os.kill(pids[1], signal.SIGCONT)

        threading.Thread(target=wake, daemon=True).start()
    if rank == 1:
        threading.Thread(target=_stop_when_files_open, args=(2, over), daemon=True).start()
    if rank == 2:
        without_files(1)
    result = raised(dispatcher.dispatch, *arguments(case))
    if rank == 1:
        store.set("goes on", "")
    if rank == 0:
        store.wait(["goes on"])
    over.set()
    return result


def test_a_rank_that_cannot_open_memory_is_why_others_do_not_find_its_own() -> None:
    for rank, (kind, message) in enumerate(run_ranks(3, _cannot_open, timeout=40, stay=False)):
        assert kind == "DistBackendError", message
        assert "Too many open files" in message
        assert rank == 2 or "rank 2 (process" in message


class _Joining:
    """The extension, in a process that does something before it joins the others."""

    def __init__(self, before: Callable[[], None]) -> None:
        self.before = before

    def __getattr__(self, name: str) -> Any:
        return getattr(_C, name)

    def SharedMemory(self, *arguments: Any) -> Any:
        memory, before = _C.SharedMemory(*arguments), self.before

        class Late:
            address = memory.address

            def connect(self, *arguments: Any) -> None:
                before()
                memory.connect(*arguments)

        return Late()


def _dies_joining(rank: int, ranks: int) -> None:
    """Rank 2 dies when it should join; rank 1 comes when rank 0 has missed it, and closed its
    door."""
    pids, store = processes(), store_of(dist.group.WORLD)
    if rank > 0:
        late: list[Callable[[], None]] = [
            lambda: store.wait(["0 has given up"]),
            lambda: os.kill(os.getpid(), signal.SIGKILL),
        ]
        joining.extension = lambda: _Joining(late[rank - 1])
    kind, message = raised(lambda: dispatcher_of("shared_memory", 12, timeout=100))
    gc.collect()
    store.set(f"{rank} has given up", "")
    assert kind == "DistBackendError", message
    assert f"rank 2 (process {pids[2]}) of group '0' has exited" in message
    store.wait(["0 has given up", "1 has given up"])


def test_a_rank_that_dies_while_the_ranks_join_is_named_at_once() -> None:
    with pytest.raises(AssertionError, match="1 of 3 ranks failed\n--- rank 2: died"):
        run_ranks(3, _dies_joining, timeout=30)


def _out_of_memory(rank: int, ranks: int, phase: str) -> list[tuple[str, str]]:
    """Rank 1 cannot pack what the ranks have agreed to exchange; rank 0 has little to do."""
    dispatcher = dispatcher_of("process_group", 2, timeout=60)
    number = 8000 if rank == 1 else 1
    rows = torch.zeros(1, 2000).expand(number, 2000)
    ids, weights = torch.ones(number, 1, dtype=torch.int64), torch.ones(number, 1)
    small = (torch.zeros(number, 1), ids, weights)
    tokens = dispatcher.dispatch(*small)
    wide = rows[:1].expand(len(tokens.x), 2000)
    handle, name = tokens.handle, dispatcher._name
    calls: dict[str, Callable[[], Any]] = {
        "dispatch": lambda: dispatcher.dispatch(rows, ids, weights),
        "dispatch_async": lambda: dispatcher.dispatch_async(rows, ids, weights).wait(),
        "combine": lambda: dispatcher.combine(wide, handle),
        "combine_backward": lambda: ops._combine_backward_op(rows, *handle, len(tokens.x), name),
        "dispatch_backward": lambda: ops._dispatch_backward_op(wide, None, *handle, name),
    }
    limit = resource.getrlimit(resource.RLIMIT_AS)
    if rank == 1:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limited = pages * resource.getpagesize() + (16 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limited, limit[1]))
    result = raised(calls[phase])
    resource.setrlimit(resource.RLIMIT_AS, limit)
    again = dispatcher_of("process_group", 2)
    return [result, raised(dispatcher.dispatch, *small), raised(again.dispatch, *small)]


@pytest.mark.parametrize(
    "phase", ["dispatch", "dispatch_async", "combine", "combine_backward", "dispatch_backward"]
)
def test_a_rank_that_runs_out_of_memory_exchanges_nothing_more(phase: str) -> None:
    """What it sent after that would meet what the other has begun, of another size."""
    told = "rank 1 of group '0' could not begin what the ranks had agreed on"
    for rank, ((kind, message), *later) in enumerate(
        run_ranks(2, _out_of_memory, phase, timeout=30)
    ):
        assert kind == "RuntimeError", message
        assert "can't allocate memory" in message
        assert rank == 1 or told in message
        for again, cause in later:
            assert again == "DistBackendError"
            assert "is of no use after an error" in cause
            assert told in cause
            assert "can't allocate memory" in cause


def _late(rank: int, ranks: int) -> None:
    dispatcher = dispatcher_of("process_group", 12)
    if rank == 1:
        time.sleep(0.35)
    round_trip(dispatcher, small_case(rank), rank)


def test_who_looks_for_causes_waits_on() -> None:
    """Longer than between two looks."""
    run_ranks(2, _late)
