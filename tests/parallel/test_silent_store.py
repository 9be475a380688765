"""A group's store that does not answer: nobody waits for it, and `process_group` names who is
missing all the same.

T tokens, H hidden size, K experts a token, E experts, P ranks.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from moe_parallel.torch_internals import store_of
from tests.parallel.ranks import end_group, fork_context, run_ranks
from tests.parallel.test_dispatch import dispatcher_of
from tests.parallel.test_shared_memory import arguments, small_case, timed

HOST = "127.0.0.1"


def _group_by(port: int, rank: int, ranks: int) -> None:
    """A group in the place of the one that there is, by the store of another process."""
    end_group(rank, ranks)
    store = dist.TCPStore(HOST, port, is_master=False, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)


def _keep_store(ports: Any) -> None:
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    ports.put(store.port)
    signal.pause()


def _with_keeper(ranks: int, function: Callable[..., Any], *args: Any) -> None:
    """Run ``function(rank, ranks, port, keeper, *args)``: where a process keeps a store, as that
    which starts the ranks may."""
    with _keeper() as (port, keeper):
        run_ranks(ranks, function, port, keeper, *args)


@contextmanager
def _keeper() -> Iterator[tuple[int, int]]:
    """A process that keeps a store: the port, and the process."""
    context = fork_context()
    ports = context.Queue()
    keeper = context.Process(target=_keep_store, args=(ports,))
    keeper.start()
    try:
        yield ports.get(timeout=60), keeper.pid or 0
    finally:
        keeper.kill()
        keeper.join()


def _keeper_stopped(rank: int, ranks: int, port: int, keeper: int, how: str) -> None:
    """Then rank 1 dies, or is late."""
    _group_by(port, rank, ranks)
    dispatcher = dispatcher_of("process_group", 12, timeout=1.0)
    case = small_case(rank)
    dispatcher.dispatch(*arguments(case))
    dist.barrier()
    if rank == 1:
        os.kill(keeper, signal.SIGSTOP)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3)
    kind, message, seconds = timed(dispatcher.dispatch, *arguments(case))
    assert kind == "DistBackendError"
    if how == "killed":
        assert " in group '0': rank 1 (process " in message
        assert "has exited. The backend says: " in message
        assert seconds < 1.0
    else:
        assert " in group '0': a rank has died, stopped, or not made this call, perhaps" in message
        assert "which keeps the group's store, often rank 0: it does not answer: every" in message
        assert seconds < 2.5


def test_a_dead_rank_is_named_where_the_store_is_silent() -> None:
    with pytest.raises(AssertionError, match="1 of 3 ranks failed\n--- rank 1: died"):
        _with_keeper(3, _keeper_stopped, "killed")


def test_a_late_rank_is_an_error_at_the_timeout_where_the_store_is_silent() -> None:
    _with_keeper(3, _keeper_stopped, "late")


def _meets(rank: int, ranks: int, port: int, keeper: int, how: str) -> None:
    """The keeper is stopped, or has died, when the ranks make their first dispatcher."""
    _group_by(port, rank, ranks)
    dist.barrier()
    if rank == 0:
        watch = os.pidfd_open(keeper)
        os.kill(keeper, signal.SIGSTOP if how == "stopped" else signal.SIGKILL)
        if how == "killed":
            select.select([watch], [], [])
    dist.barrier()
    kind, message, seconds = timed(lambda: dispatcher_of("shared_memory", 12, timeout=1.0))
    assert kind == "DistBackendError", message
    assert f"AllToAllDispatcher: rank {rank} of group '0' cannot meet the others: the" in message
    assert "group's store does not answer (" in message
    assert "has died or is stopped; it must run for as long as the ranks do." in message
    assert seconds < (4.0 if how == "stopped" else 1.0)


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_ranks_that_meet_do_not_wait_for_a_silent_store(how: str) -> None:
    _with_keeper(2, _meets, how)


_ENDS = """
import os, signal, sys, time
from datetime import timedelta
import torch.distributed as dist
from moe_parallel.dispatch import AllToAllDispatcher

port, keeper = map(int, sys.argv[1:])
store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
os.kill(keeper, signal.SIGSTOP)
try:
    AllToAllDispatcher(dist.group.WORLD, 2, timeout=0.2)
except dist.DistBackendError as error:
    print(error)


class WhileTheInterpreterEnds:
    def __del__(self, kill=os.kill, how=signal.SIGKILL, sleep=time.sleep):
        kill(keeper, how)
        sleep(0.5)


last = WhileTheInterpreterEnds()
"""


def test_a_store_that_ends_with_the_interpreter_does_not_abort_it() -> None:
    """The question that it has not answered wakes when the lock of the interpreter is gone."""
    with _keeper() as (port, keeper):
        command = [sys.executable, "-c", _ENDS, str(port), str(keeper)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "the group's store does not answer" in result.stdout, result.stderr
    assert result.returncode == 0, result.stderr


def _interrupted(rank: int, ranks: int) -> None:
    """A wait for the others ends by Ctrl-C."""
    if rank == 1:
        store_of(dist.group.WORLD).wait(["interrupted"])
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        dispatcher_of("shared_memory", 12, timeout=5.0)
    store_of(dist.group.WORLD).set("interrupted", "")


def test_ctrl_c_ends_the_wait_for_the_others() -> None:
    run_ranks(2, _interrupted, timeout=30)


def _store_in_use(rank: int, ranks: int, port: int, keeper: int) -> None:
    """A thread of rank 0 waits for what rank 1 says after a dispatch that rank 0 begins first."""
    _group_by(port, rank, ranks)
    dispatcher = dispatcher_of("process_group", 12, timeout=5.0)
    case, store = small_case(rank), store_of(dist.group.WORLD)
    dispatcher.dispatch(*arguments(case))
    dist.barrier()
    waits = threading.Thread(target=store.wait, args=(["rank 1 is done"],))
    if rank == 0:
        waits.start()
    else:
        time.sleep(0.5)
    kind, message, _ = timed(dispatcher.dispatch, *arguments(case))
    assert kind == "nothing", message
    if rank == 1:
        store.set("rank 1 is done", "")
    else:
        waits.join()
    dist.barrier()


def test_a_thread_that_waits_in_the_store_holds_up_no_exchange() -> None:
    _with_keeper(2, _store_in_use)
