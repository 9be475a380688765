"""What becomes of missing ranks and wrong calls between GPUs of one machine, whose device code CPU
processes run here.

T tokens, H hidden size, K experts a token, E experts, P ranks.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_kernels import _C
from moe_parallel.dispatch import AllToAllDispatcher, joining
from moe_parallel.dispatch.joining import EMULATE_GPUS
from moe_parallel.torch_internals import store_of
from tests.parallel.emulated_gpus import cuda_ipc, received
from tests.parallel.ranks import run_ranks
from tests.parallel.test_dispatch import Case, make_case, raised, round_trip
from tests.parallel.test_dispatch_agreement import without_kernel
from tests.parallel.test_shared_memory import arguments, processes, small_case


def _missing(rank: int, ranks: int, how: str, phase: str) -> tuple[str, ...]:
    """Rank 1 goes missing before ``phase``; the others say who, and do not recover."""
    dispatcher = cuda_ipc(12, timeout=1.0)
    pids, store = processes(), store_of(dist.group.WORLD)
    case = small_case(rank)
    x = case.x.clone().requires_grad_()
    call: Callable[[], Any] = lambda: dispatcher.dispatch(x, case.ids, case.weights)  # noqa: E731
    dispatcher.dispatch(*arguments(case))  # so that there is memory
    if phase != "dispatch":
        tokens = call()
        y = dispatcher.combine(tokens.x * 2, tokens.handle) if "backward" in phase else None
        call = lambda: dispatcher.combine(tokens.x, tokens.handle)  # noqa: E731
        if y is not None:
            call = y.sum().backward
    dist.barrier()
    if rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exited":
            os._exit(0)
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "late":
            store.wait(["0 has given up", "2 has given up"])
        raised(call)
        return raised(dispatcher.dispatch, *arguments(case))
    begin = time.monotonic()
    early, message = raised(call)  # the device gives up; backward makes two calls, of which
    assert early == "nothing" or (phase == "backward" or how in ("killed", "exited")), message
    seconds = time.monotonic() - begin
    kind, message = raised(dispatcher.check) if early == "nothing" else (early, message)
    store.set(f"{rank} has given up", "")
    if how == "stopped" and rank == 0:
        store.wait(["2 has given up"])
        os.kill(pids[1], signal.SIGCONT)
    assert kind == "DistBackendError", message
    assert f"rank 1 (process {pids[1]}) of group '0'" in message
    if how in ("killed", "exited"):
        assert seconds < 1.0
    else:
        # Who comes later is told by the other, before it has waited as long.
        assert seconds > 0.9 or f"rank {rank} has waited the timeout" not in message
        assert seconds < 2.4
        assert (
            "has waited the timeout of 1 s" in message
            or "has failed" in message
            or ("has given up" in message)
        )
    # The first error is what counts from now on, for every dispatcher of the group.
    for other in (dispatcher, cuda_ipc(12)):
        again_kind, again = raised(other.dispatch, *arguments(case))
        assert again_kind == "DistBackendError"
        assert "are of no use after an error" in again
        assert f"rank 1 (process {pids[1]})" in again
        assert again.count("are of no use") == 1
    return kind, message


@pytest.mark.parametrize("phase", ["dispatch", "combine", "backward"])
@pytest.mark.parametrize("how", ["killed", "exited"])
def test_a_dead_rank_is_an_error_at_once_that_names_it(how: str, phase: str) -> None:
    with pytest.raises(AssertionError, match="1 of 3 ranks failed\n--- rank 1: died"):
        run_ranks(3, _missing, how, phase)


@pytest.mark.parametrize("how", ["stopped", "late"])
def test_a_stuck_rank_is_an_error_at_the_timeout_that_names_it(how: str) -> None:
    results = run_ranks(3, _missing, how, "combine")
    messages = [results[0][1], results[2][1]]
    assert any("waited the timeout of 1 s for the rows of rank 1" in m for m in messages), messages
    if how == "stopped":
        assert any("is stopped" in message for message in messages)


def _mismatch(rank: int, ranks: int, what: str) -> tuple[str, str, str, str]:
    dispatcher = cuda_ipc(12)
    big = make_case(1, rank, 9, 64, 4, 12, dtype=torch.float32, weight_dtype=torch.float32)
    tokens = dispatcher.dispatch(*arguments(big))  # so that no call needs more memory
    other = make_case(1, rank, 9, 64, 4, 12, dtype=torch.float32, weight_dtype=torch.float32)
    x, ids, weights = arguments(other)
    extra = None
    call = lambda: dispatcher.dispatch(x, ids, weights, extra=extra)  # noqa: E731
    if rank == 1:
        if what == "H":
            x = x[:, :60]
        if what == "K":
            ids, weights = ids[:, :3], weights[:, :3]
        if what == "x's dtype":
            x = x.half()
        if what == "topk_weights' dtype":
            weights = weights.half()
        if what == "the phase":
            call = lambda: dispatcher.combine(tokens.x, tokens.handle)  # noqa: E731
        if what == "extra's dtype":
            extra = torch.zeros(9)
    if what == "the dispatcher":
        both = dispatcher, cuda_ipc(12)
        call = lambda: both[rank % 2].dispatch(x, ids, weights)  # noqa: E731
    if what == "num_experts":
        theirs = cuda_ipc(12 if rank == 1 else 24)
        call = lambda: theirs.dispatch(x, ids, weights)  # noqa: E731
    if what == "max_tokens":
        limited = cuda_ipc(12, 64 - rank)
        call = lambda: limited.dispatch(x, ids, weights)  # noqa: E731
    if what == "the dispatch":
        second = dispatcher.dispatch(*arguments(big))
        chosen = second if rank == 1 else tokens
        call = lambda: dispatcher.combine(tokens.x, chosen.handle)  # noqa: E731
    result = call()
    rows = result if isinstance(result, torch.Tensor) else result.x
    assert not rows.any(), "a call that does not match brings nothing"
    return *raised(dispatcher.check), *raised(dispatcher.dispatch, *arguments(big))


@pytest.mark.parametrize(
    "what",
    [
        *("H", "K", "x's dtype", "topk_weights' dtype", "the phase", "extra's dtype"),
        *("the dispatcher", "num_experts", "max_tokens", "the dispatch"),
    ],
)
def test_calls_that_do_not_match_are_an_error_with_both_values(what: str) -> None:
    for kind, message, later, again in run_ranks(3, _mismatch, what):
        assert kind in ("ValueError", "DistBackendError")
        assert f"must agree on {what}" in message or "given up" in message, message
        assert later == "DistBackendError"
        assert "are of no use after an error" in again
        assert "must agree on" in again or "given up" in again


def _other_size(rank: int, ranks: int) -> list[tuple[str, str]]:
    """Before there is memory, and without harm."""
    dispatcher = cuda_ipc(4)
    case = make_case(1, rank, 9, 20000 + 10000 * rank, 2, 4)
    errors = [raised(dispatcher.dispatch, *arguments(case))]
    round_trip(dispatcher, small_case_of(rank), rank)
    return errors


def small_case_of(rank: int) -> Case:
    return make_case(1, rank, 9, 6, 2, 4)


def test_ranks_that_need_other_memory_say_so() -> None:
    for ((kind, message),) in run_ranks(2, _other_size):
        assert kind == "ValueError"
        assert "bytes of staging memory" in message
        assert "must agree on H, K, the dtypes, max_tokens and capacity" in message


def _wrong_arguments(rank: int, ranks: int, who: str, before: bool) -> list[tuple[str, str]]:
    dispatcher = cuda_ipc(12)
    case = small_case(rank)
    if before:
        round_trip(dispatcher, case, rank)
    wrong = who == "all" or rank == 1
    if wrong:
        found = [raised(dispatcher.dispatch, case.x, case.ids[:, 0], case.weights)]
        if who == "all":
            found.append(raised(lambda: dispatcher.dispatch(*arguments(many(rank)))))
            round_trip(dispatcher, case, rank)
        return found
    early = raised(dispatcher.dispatch, *arguments(case))
    return [early if early[0] != "nothing" else raised(dispatcher.check)]


def many(rank: int) -> Case:
    return make_case(1, rank, 65, 6, 2, 12)


@pytest.mark.parametrize("before", [True, False])
def test_an_error_in_the_arguments_of_all_ranks_does_no_harm(before: bool) -> None:
    for (kind, message), (second, more) in run_ranks(2, _wrong_arguments, "all", before):
        assert kind == second == "ValueError"
        assert "topk_ids must be [T, K]" in message
        assert "T must be at most max_tokens = 64; got 65" in more


@pytest.mark.parametrize("before", [True, False])
def test_an_error_in_the_arguments_of_one_rank_names_it_on_the_others(before: bool) -> None:
    (others,), (own,), (third,) = run_ranks(3, _wrong_arguments, "one", before)
    assert own[0] == "ValueError"
    for kind, message in (others, third):
        assert kind in ("RuntimeError", "DistBackendError")
        assert "found an error in its own arguments" in message or "given up" in message
    assert "rank 1" in others[1] + third[1]


def _no_kernel(rank: int, ranks: int, what: str) -> list[tuple[str, str]]:
    dispatcher = cuda_ipc(4, timeout=100)
    case = small_case_of(rank)
    tokens = dispatcher.dispatch(*arguments(case))
    x, y = (without_kernel(t, what) if rank == 1 else t for t in (case.x, tokens.x))
    first = raised(dispatcher.combine, y, tokens.handle)
    return [first, raised(dispatcher.check), raised(dispatcher.dispatch, x, case.ids, case.weights)]


@pytest.mark.parametrize("what", ["sparse", "meta", "none"])
def test_what_has_no_kernel_on_one_rank_names_it_on_the_others(what: str) -> None:
    (others, later, over), (own, _, again) = run_ranks(2, _no_kernel, what, timeout=30)
    assert others[0] == "nothing"  # the device finds it
    assert later[0] == "RuntimeError", later[1]
    assert "rank 1 (process" in later[1]
    assert "found an error in its own arguments" in later[1]
    assert over[0] == "DistBackendError"
    assert own[0] == again[0] == ("ValueError" if what == "meta" else "TypeError")


def _wrong_id(rank: int, ranks: int) -> tuple[str, str]:
    dispatcher = cuda_ipc(4)
    case = small_case_of(rank)
    ids = case.ids.clone()
    if rank == 1:
        ids[3, 1] = 5
    tokens = dispatcher.dispatch(case.x, ids, case.weights)
    assert not received(tokens, ranks).x.numel()
    return raised(dispatcher.check)


def test_an_id_that_is_no_expert_is_an_index_error() -> None:
    (kind, message), own = run_ranks(2, _wrong_id)
    assert own[0] == "IndexError"
    assert "topk_ids must be in [-1, E]; an earlier call got another at slot 7" in own[1]
    assert kind == "RuntimeError"
    assert "rank 1" in message


def _wrong_handle(rank: int, ranks: int, host: bool) -> list[tuple[str, str]]:
    dispatcher, other = cuda_ipc(4), cuda_ipc(4, capacity=20 if host else None)
    case = small_case_of(rank)
    tokens, theirs = dispatcher.dispatch(*arguments(case)), other.dispatch(*arguments(case))
    found = [raised(dispatcher.combine, tokens.x, theirs.handle)]
    if host:
        round_trip(dispatcher, case, rank)
    return [*found, raised(dispatcher.check)]


@pytest.mark.parametrize("host", [True, False])
def test_a_handle_of_another_dispatcher_is_refused(host: bool) -> None:
    for at_once, later in run_ranks(2, _wrong_handle, host):
        kind, message = at_once if host else later
        assert (later if host else at_once)[0] == "nothing"
        assert kind == "ValueError"
        assert "the handle must be that of a dispatch by" in message


def _long_rows(rank: int, ranks: int) -> list[tuple[str, str]]:
    dispatcher = cuda_ipc(4)
    case = small_case_of(rank)
    tokens = dispatcher.dispatch(*arguments(case))
    wide = torch.zeros(1, 1).expand(len(tokens.x), 2**28)
    found = [
        raised(dispatcher.combine, wide, tokens.handle),
        raised(dispatcher.dispatch, wide[: len(case.ids)], case.ids, case.weights),
    ]
    round_trip(dispatcher, case, rank)
    return found


def test_rows_that_32_bits_cannot_count_are_refused() -> None:
    for found in run_ranks(2, _long_rows):
        for kind, message in found:
            assert kind == "ValueError"
            assert "a row must have less than 2**30 bytes; got 1073741824" in message


def _forked(rank: int, ranks: int) -> int:
    """A fork that ends the use of the memory ends neither the rank's nor itself waits for it."""
    dispatcher = cuda_ipc(4)
    case = small_case_of(rank)
    dispatcher.dispatch(*arguments(case))
    memory, _ = _C.recall_peer_memory("0")
    child = os.fork()
    if child == 0:
        memory.close()
        os._exit(7)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
    round_trip(dispatcher, case, rank)
    return os.waitstatus_to_exitcode(ended[1]) if ended[0] else -1


def test_a_fork_that_ends_does_not_wait_for_threads_it_has_not() -> None:
    assert run_ranks(2, _forked) == [7, 7]


class _WithoutFiles:
    """The extension, in a process that may make no more memory once it joins GPUs."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_C, name)

    def PeerMemory(self, *arguments: Any) -> Any:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, limit[1]))
        try:
            return _C.PeerMemory(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def _obstacle(rank: int, ranks: int) -> list[Any]:
    os.environ[EMULATE_GPUS] = "1"
    group = dist.new_group([0, 1, 2])
    if rank == 1:
        joining.extension = _WithoutFiles
    found = [raised(lambda: AllToAllDispatcher(group, 12, transport="cuda_ipc", max_tokens=64))]
    auto = AllToAllDispatcher(group, 12, max_tokens=64)
    round_trip(auto, small_case(rank), rank)
    return [*found, auto.transport, auto.gpu_transport]


def test_memory_that_a_machine_does_not_share_is_an_obstacle_and_no_fault() -> None:
    for rank, (error, *transports) in enumerate(run_ranks(3, _obstacle)):
        assert error[0] == "ValueError"
        assert ("fallocate" if rank == 1 else "rank 1 (process") in error[1]
        assert transports == ["shared_memory", "process_group"]


def _no_memory(rank: int, ranks: int) -> tuple[str, str]:
    dispatcher = cuda_ipc(12, timeout=100)
    round_trip(dispatcher, small_case(rank), rank)
    if rank == 1:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
    return raised(dispatcher.dispatch, *arguments(make_case(1, rank, 9, 30000, 2, 12)))


def test_memory_that_cannot_grow_is_an_error_on_every_rank() -> None:
    results = run_ranks(3, _no_memory, timeout=30)
    for rank, (kind, message) in enumerate(results):
        assert kind == "DistBackendError", message
        assert "bytes: File too large" in message
        if rank != 1:
            assert "rank 1 (process" in message


def _left(rank: int, ranks: int) -> tuple[str, str]:
    """A rank that is done may go: what it left is there, and the memory is freed at the end."""
    os.environ[EMULATE_GPUS] = "1"
    group = dist.new_group([0, 1])
    dispatcher = AllToAllDispatcher(group, 4, transport="cuda_ipc", max_tokens=64)
    case = small_case_of(rank)
    tokens = dispatcher.dispatch(*arguments(case))
    copy = tokens.x.clone()
    if rank == 0:
        dist.barrier()
        assert torch.equal(tokens.x, copy)
        return raised(dispatcher.dispatch, *arguments(case))
    dist.destroy_process_group(group)
    del group
    gc.collect()
    dist.barrier()
    return raised(dispatcher.dispatch, *arguments(case))


def test_a_rank_that_destroys_the_group_is_an_error_at_once() -> None:
    (kind, message), own = run_ranks(2, _left)
    assert kind == own[0] == "DistBackendError"
    assert "rank 1 (process" in message
    assert "has destroyed the group" in message
    assert "has been destroyed" in own[1]


def _leaks(rank: int, ranks: int) -> None:
    """Dispatchers by the hundred, and groups, leave no file, mapping or thread behind."""

    def open_things() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    case = small_case_of(rank)
    owners = [[0], [1], [1], [0]]
    round_trip(cuda_ipc(4), case, rank)
    cuda_ipc(4, placement=owners)  # of which the numbers stay, for the next
    before = open_things()
    for turn in range(200):
        dispatcher = cuda_ipc(4, placement=owners if turn % 2 else None)
        if turn % 20 == 0:
            dispatcher.dispatch(*arguments(case))
    del dispatcher
    assert open_things() == before
    for _ in range(3):
        group = dist.new_group([0, 1])
        dispatcher = AllToAllDispatcher(group, 4, transport="cuda_ipc", max_tokens=64)
        dispatcher.dispatch(*arguments(case))
        dist.barrier()
        dist.destroy_process_group(group)
        del group, dispatcher
        dist.barrier()
    assert open_things()[1] <= before[1] + 3  # gloo's threads end late
    assert open_things()[0] <= before[0] + 3


def test_dispatchers_and_groups_leave_nothing_behind() -> None:
    run_ranks(2, _leaks)


def _unequal_growth(rank: int, ranks: int, what: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """A call that needs more memory than there is, but not on rank 1."""
    dispatcher = cuda_ipc(12, timeout=100)
    dispatcher.dispatch(*arguments(small_case(rank)))
    case = make_case(1, rank, 9, 30000, 2, 12)
    if rank == 1 and what == "hidden":
        case = small_case(rank)
    if rank == 1 and what == "refused":
        case = Case(case.x[:-1], case.ids, case.weights)
    result = raised(dispatcher.dispatch, *arguments(case))
    return result, raised(dispatcher.check)


@pytest.mark.parametrize("what", ["hidden", "refused"])
def test_memory_that_one_rank_does_not_need_is_an_error_at_once(what: str) -> None:
    """Not at the timeout; and it says what differs."""
    results = run_ranks(3, _unequal_growth, what, timeout=30)
    for rank, (call, check) in enumerate(results):
        if rank == 1 and what == "refused":
            assert call[0] == "ValueError"
            assert "topk_ids must be [T, K] with T = 8" in call[1]
            continue
        kind, message = check if rank == 1 else call
        if what == "refused":
            assert kind == "RuntimeError", message
            assert "rank 1 (process" in message
            assert "found an error in its own arguments" in message
        else:
            assert kind == "ValueError", message
            mine, other = ("6", "30000") if rank == 1 else ("30000", "6")
            assert f"must agree on H (the columns of x); rank {rank} has {mine} and" in message
            assert f"has {other}." in message
