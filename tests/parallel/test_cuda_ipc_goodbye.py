"""How ranks whose GPUs read each other's memory part: none goes while another reads what it left.
Their device code is run by CPU processes here, in which whoever reads memory that was freed dies.

T tokens, H hidden size, K experts a token, E experts, P ranks.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import multiprocessing.util
import os
import select
import signal
import sys
import time
from contextlib import suppress
from typing import Any

import pytest
import torch.distributed as dist

from moe_parallel.dispatch import AllToAllDispatcher
from moe_parallel.torch_internals import store_of
from tests.parallel.emulated_gpus import assert_equal, cuda_ipc
from tests.parallel.ranks import run_ranks
from tests.parallel.test_cuda_ipc_faults import small_case_of
from tests.parallel.test_dispatch import dispatcher_of, raised
from tests.parallel.test_shared_memory import arguments, small_case

# What a process does at its end, of a program or of multiprocessing.
EXITS = {"program": atexit._run_exitfuncs, "child": multiprocessing.util._exit_function}


def _goes(rank: int, ranks: int, how: str) -> tuple[str, str]:
    """Rank 1 has what it wanted and goes, before rank 0 has read its part."""
    group = dist.new_group([0, 1])
    cuda_ipc(4)
    store, case = store_of(dist.group.WORLD), small_case_of(rank)
    dispatcher = AllToAllDispatcher(
        group, 4, transport="cuda_ipc", max_tokens=64, timeout=50 if how != "late" else 1
    )
    expected = dispatcher_of("process_group", 4).dispatch(*arguments(case))
    dispatcher.dispatch(*arguments(case))
    pending = dispatcher.dispatch_async(*arguments(case))
    if rank == 1:
        assert_equal(pending.wait(), expected, ranks)
        store.set("goes", "")
        if how == "destroys":
            del dispatcher, pending
            dist.destroy_process_group(group)
            del group
            gc.collect()
        elif how == "child fails":
            with suppress(SystemExit):
                try:
                    sys.exit(1)
                finally:
                    EXITS["child"]()
        else:
            if how == "program fails":
                sys.last_value = ValueError()  # as the interpreter does, which then ends
            EXITS.get(how, EXITS["program"])()
        store.set("has gone", "")
        return "", ""
    store.get("goes")
    impatient = how == "late" or "fails" in how
    if impatient:  # for longer than rank 1 waits
        store.wait(["has gone"])
    time.sleep(1.3 if how == "destroys" else 0.2)
    assert store.check(["has gone"]) == impatient
    assert_equal(pending.wait(), expected, ranks)
    store.wait(["has gone"])
    return raised(dispatcher.dispatch, *arguments(case))


@pytest.mark.parametrize("how", ["program", "child", "destroys"])
def test_a_rank_goes_when_the_others_have_read_what_it_left(how: str) -> None:
    kind, message = run_ranks(2, _goes, how)[0]
    assert kind == "DistBackendError"
    assert "rank 1 (process" in message
    what = "has destroyed the group" if how == "destroys" else "is about to exit"
    assert what in message or "has exited" in message


@pytest.mark.parametrize("how", ["late", "program fails", "child fails"])
def test_a_rank_that_goes_does_not_wait_for_ever(how: str) -> None:
    """Only for the timeout; after an error for a second."""
    kind, message = run_ranks(2, _goes, how, timeout=40)[0]
    assert kind == "DistBackendError"
    assert "rank 1 (process" in message


def _begun_alone(rank: int, ranks: int) -> tuple[str, str]:
    """Rank 0 has begun a call that rank 1, which goes, does not make: its end writes there yet."""
    dispatcher, case = cuda_ipc(4, timeout=50), small_case_of(rank)
    store = store_of(dist.group.WORLD)
    dispatcher.dispatch(*arguments(case))
    if rank == 1:
        store.wait(["begun"])
        EXITS["program"]()
        store.set("has gone", "")
        store.wait(["over"])
        return "", ""
    pending = dispatcher.dispatch_async(*arguments(case))
    store.set("begun", "")
    time.sleep(1.3)
    assert not store.check(["has gone"])
    pending.wait()
    store.wait(["has gone"])
    store.set("over", "")
    return raised(dispatcher.check)


def test_a_rank_that_goes_waits_for_a_call_that_it_does_not_make() -> None:
    kind, message = run_ranks(2, _begun_alone)[0]
    assert kind == "DistBackendError"
    assert "rank 1 (process" in message
    assert "is about to exit" in message


def _program(rank: int, ranks: int, status: int) -> None:
    """Rank 1 ends as programs do, while rank 0 has a call open that reads what it left."""
    multiprocessing.parent_process = lambda: None  # type: ignore[assignment]
    store, case = store_of(dist.group.WORLD), small_case_of(rank)
    atexit.register(store.set, "first step", "")  # after what is registered after it
    dispatcher = cuda_ipc(4, timeout=50)
    expected = dispatcher_of("process_group", 4).dispatch(*arguments(case))
    dispatcher.dispatch(*arguments(case))
    pending = dispatcher.dispatch_async(*arguments(case))
    if rank == 1:
        pending.wait()
        store.set("process", str(os.getpid()))
        ctypes.pythonapi.Py_Exit(status)  # the end of sys.exit
    watch = os.pidfd_open(int(store.get("process")))
    if status == 0:
        store.get("first step")
        time.sleep(0.2)
        assert not select.select([watch], [], [], 0)[0], "it has gone"
    else:
        assert select.select([watch], [], [], 30)[0], "it waits on"
    assert_equal(pending.wait(), expected, ranks)
    assert select.select([watch], [], [], 30)[0], "it waits on"


@pytest.mark.parametrize("status", [0, 3])
def test_a_program_that_fails_does_not_wait_for_the_others(status: int) -> None:
    """For longer than a moment; Python's own functions for the end do not know the status."""
    with pytest.raises(
        AssertionError, match=f"1 of 2 ranks failed\n--- rank 1: died with exit code {status}"
    ):
        run_ranks(2, _program, status, timeout=45)


def _at_the_end(rank: int, ranks: int, before: str) -> None:
    """All go, whatever has happened; nobody waits for who has died, failed, or goes too."""
    dispatcher = cuda_ipc(12, timeout=100)
    store, case = store_of(dist.group.WORLD), small_case(rank)
    dispatcher.dispatch(*arguments(case))
    pending: Any = None
    if before == "open calls":
        pending = dispatcher.dispatch_async(*arguments(case))
        dist.barrier()
    if before == "a rank that dies":
        pending = dispatcher.dispatch_async(*arguments(case))
        if rank == 0:
            store.get("goes")
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        pending.wait()
        store.set("goes", "")
    if before == "an error":
        columns = 1 if rank == 1 else 2
        raised(dispatcher.dispatch, case.x, case.ids[:, :columns], case.weights[:, :columns])
    if before == "an error of one":
        raised(dispatcher.dispatch, case.x, case.ids[rank % 2 :], case.weights)
    # With the program go the ops, which are to be asked yet.
    EXITS["child" if before == "open calls" else "program"]()
    if before == "open calls":
        kind, message = raised(pending.wait)
        assert kind == "DistBackendError", message
        assert "this process ends" in message, message


@pytest.mark.parametrize("before", ["nothing", "open calls", "an error", "an error of one"])
def test_ranks_that_go_together_do_not_wait(before: str) -> None:
    run_ranks(3, _at_the_end, before, timeout=40)


def test_nobody_waits_for_a_rank_that_dies() -> None:
    with pytest.raises(AssertionError, match="1 of 3 ranks failed\n--- rank 0: died"):
        run_ranks(3, _at_the_end, "a rank that dies", timeout=40)


def _dropped_group(rank: int, ranks: int) -> tuple[str, str]:
    """A call that is open when its group is destroyed cannot be ended: the memory is gone."""
    cuda_ipc(4)
    group = dist.new_group([0, 1])
    dispatcher = AllToAllDispatcher(group, 4, transport="cuda_ipc", max_tokens=64)
    case = small_case_of(rank)
    dispatcher.dispatch(*arguments(case))
    pending = dispatcher.dispatch_async(*arguments(case))
    dist.destroy_process_group(group)
    del group
    gc.collect()
    return raised(pending.wait)


def test_a_call_does_not_outlive_its_group() -> None:
    for kind, message in run_ranks(2, _dropped_group):
        assert kind == "DistBackendError", message
        assert "has been destroyed" in message
