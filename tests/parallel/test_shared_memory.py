"""The transport between processes of one machine: what it shares, and what becomes of its faults.

T tokens, H hidden size, K experts a token, E experts, P ranks, U tokens received.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import select
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_kernels import _C
from moe_parallel.dispatch import AllToAllDispatcher
from moe_parallel.dispatch.joining import _obstacle
from moe_parallel.torch_internals import store_of
from tests.parallel.ranks import run_ranks
from tests.parallel.test_dispatch import Case, dispatcher_of, make_case, raised, round_trip


def small_case(rank: int, seed: int = 1) -> Case:
    return make_case(seed, rank, 9, 6, 2, 12)


def arguments(case: Case) -> tuple[torch.Tensor, ...]:
    return case.x, case.ids, case.weights


def timed(function: Callable[..., Any], *args: Any) -> tuple[str, str, float]:
    begin = time.monotonic()
    kind, message = raised(function, *args)
    return kind, message, time.monotonic() - begin


def processes() -> list[int]:
    """The process of each rank."""
    everybody: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(everybody, os.getpid())
    return everybody


def _transports_agree(rank: int, ranks: int) -> None:
    for seed, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32, torch.float64)):
        case = make_case(seed, rank, 50 + rank, 70, 3, 12, dtype=dtype, weight_dtype=dtype)
        results = [
            round_trip(dispatcher_of(way, 12), case, rank)
            for way in ("process_group", "shared_memory", "shared_memory")
        ]
        for tokens, *others in results[1:]:
            for name in ("x", "topk_ids", "topk_weights"):
                assert torch.equal(getattr(tokens, name), getattr(results[0][0], name)), name
            for ours, theirs in zip(others, results[0][1:], strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_transports_agree_bit_for_bit(ranks: int) -> None:
    run_ranks(ranks, _transports_agree)


def _large_rows(rank: int, ranks: int) -> None:
    """Of sizes that pass the caches by, that fill no whole vectors, and that grow the memory."""
    dispatcher = dispatcher_of("shared_memory", 12)
    reserved = []
    for tokens, hidden in ((3000, 517), (3000, 1024), (6000, 1024), (6000, 1024), (10, 7)):
        case = make_case(1, rank, tokens, hidden, 4, 12, dtype=torch.float32)
        twin = round_trip(dispatcher_of("process_group", 12), case, rank)
        got = round_trip(dispatcher, case, rank)
        assert torch.equal(got[0].x, twin[0].x)
        for ours, theirs in zip(got[1:], twin[1:], strict=True):
            assert torch.equal(ours, theirs)
        del got, twin
        reserved.append(_C.recall_joined("0")[0].reserved_bytes)
    assert reserved[0] < reserved[2] == reserved[3] == reserved[4]


def test_memory_grows_as_needed_and_is_used_again() -> None:
    run_ranks(2, _large_rows)


def _parts(rank: int, ranks: int) -> None:
    """What was cut up for small tensors is whole again for a large one, in whatever order they
    went."""
    dispatcher = dispatcher_of("shared_memory", 12)
    large, small = (make_case(1, rank, number, 64, 2, 12) for number in (3000, 200))
    dispatcher.dispatch(*arguments(large))
    before = _C.recall_joined("0")[0].reserved_bytes
    kept = [dispatcher.dispatch(*arguments(small)) for _ in range(20)]  # more than was left
    del kept[::2]
    kept.clear()
    dispatcher.dispatch(*arguments(large))
    assert _C.recall_joined("0")[0].reserved_bytes == before
    sizes = set()
    for _ in range(12):
        kept.append(dispatcher.dispatch(*arguments(large)))
        sizes.add(_C.recall_joined("0")[0].reserved_bytes)
    assert len(sizes) <= 5, "it doubles"


def test_memory_is_cut_up_and_whole_again() -> None:
    run_ranks(2, _parts)


def _kept(rank: int, ranks: int) -> None:
    """What arrived stays, whatever comes after, as long as a tensor of it lives; with its views."""
    dispatcher = dispatcher_of("shared_memory", 12)
    cases = [make_case(seed, rank, 40, 64, 3, 12, dtype=torch.float32) for seed in range(6)]
    arrived = [dispatcher.dispatch(*arguments(case)) for case in cases[:3]]
    copies = [(tokens.x.clone(), tokens.topk_weights.clone()) for tokens in arrived]
    view = arrived.pop().x[1:, ::2]
    for case in cases:
        round_trip(dispatcher, Case(case.x.double(), case.ids, case.weights), rank)
    for tokens, (x, weights) in zip(arrived, copies[:2], strict=True):
        assert torch.equal(tokens.x, x)
        assert torch.equal(tokens.topk_weights, weights)
    assert torch.equal(view, copies[2][0][1:, ::2])


def test_what_arrived_lives_as_long_as_its_tensors() -> None:
    run_ranks(2, _kept)


def _missing(rank: int, ranks: int, how: str, phase: str) -> tuple[str, ...]:
    """Rank 1 goes missing before ``phase``; the others say who, and do not recover."""
    dispatcher = dispatcher_of("shared_memory", 12, timeout=1.0)
    pids, store = processes(), store_of(dist.group.WORLD)
    case = small_case(rank)
    x = case.x.clone().requires_grad_()
    call = lambda: dispatcher.dispatch(x, case.ids, case.weights)  # noqa: E731
    if phase != "dispatch":
        tokens = call()
        y = dispatcher.combine(tokens.x * 2, tokens.handle) if "backward" in phase else None
        call = lambda: dispatcher.combine(tokens.x, tokens.handle)  # noqa: E731
        if y is not None:
            call = y.sum().backward
    if rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exited":
            os._exit(0)
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "late":
            store.wait(["0 has given up", "2 has given up"])
        raised(call)  # what the others have sent before they gave up is there
        return raised(dispatcher.dispatch, *arguments(case))
    kind, message, seconds = timed(call)
    store.set(f"{rank} has given up", "")
    if how == "stopped" and rank == 0:
        store.wait(["2 has given up"])
        os.kill(pids[1], signal.SIGCONT)
    assert kind == "DistBackendError", message
    assert f"rank 1 (process {pids[1]}) of group '0'" in message
    assert message.startswith(phase if phase != "backward" else "combine_backward")
    if how in ("killed", "exited"):
        assert seconds < 1.0
        assert "has exited while rank" in message or "has failed while rank" in message
    else:
        # Who comes later is told by the other, before it has waited as long.
        assert seconds > 0.9 or "has failed while rank" in message
        assert seconds < 2.5
        assert "is stopped" in message or how != "stopped"
        assert "has waited the timeout of 1 s" in message
    # The first error is what counts from now on, for every dispatcher of the group.
    for other in (dispatcher, dispatcher_of("shared_memory", 12)):
        again_kind, again = raised(other.dispatch, *arguments(case))
        assert again_kind == "DistBackendError"
        assert "are of no use after an error" in again
        assert message.splitlines()[0] in again
    return kind, message


@pytest.mark.parametrize("phase", ["dispatch", "combine", "backward"])
@pytest.mark.parametrize("how", ["killed", "exited"])
def test_a_dead_rank_is_an_error_at_once_that_names_it(how: str, phase: str) -> None:
    before = set(os.listdir("/dev/shm"))
    with pytest.raises(AssertionError, match="1 of 3 ranks failed\n--- rank 1: died"):
        run_ranks(3, _missing, how, phase)
    left = set(os.listdir("/dev/shm")) - before
    assert not [name for name in left if "moe" in name]


@pytest.mark.parametrize("how", ["stopped", "late"])
def test_a_stuck_rank_is_an_error_at_the_timeout_that_names_it(how: str) -> None:
    results = run_ranks(3, _missing, how, "combine")
    kind, message = results[1]
    assert kind == "DistBackendError"
    assert "has failed while rank 1 waited" in message
    if how == "late":
        assert "has made 1 calls of the dispatchers and not this one" in results[0][1]


def _never_joins(rank: int, ranks: int) -> tuple[str, str, float]:
    store = store_of(dist.group.WORLD)
    if rank == 1:
        store.wait(["0 has given up", "2 has given up"])
        return "", "", 0
    result = timed(lambda: dispatcher_of("shared_memory", 12, timeout=0.5))
    store.set(f"{rank} has given up", "")
    return result


def test_a_rank_that_never_joins_is_named() -> None:
    for rank, (kind, message, seconds) in enumerate(run_ranks(3, _never_joins)):
        if rank != 1:
            assert kind == "DistBackendError", message
            assert "has waited 0.5 s for these ranks to make their first dispatcher: [1]" in message
            assert seconds < 2


def _no_memory(rank: int, ranks: int, limited: str) -> tuple[str, str]:
    dispatcher = dispatcher_of("shared_memory", 12)
    round_trip(dispatcher, small_case(rank), rank)
    case = make_case(1, rank, 2000, 1000, 2, 12)
    if rank == 1 and limited == "files":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    elif rank == 1:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (2 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    kind, message, seconds = timed(dispatcher.dispatch, *arguments(case))
    assert seconds < 5
    return kind, message


@pytest.mark.parametrize(
    ("limited", "cause"), [("files", "File too large"), ("addresses", "Cannot allocate memory")]
)
def test_memory_that_cannot_grow_is_an_error_on_every_rank(limited: str, cause: str) -> None:
    results = run_ranks(3, _no_memory, limited)
    for rank, (kind, message) in enumerate(results):
        assert kind == "DistBackendError", message
        assert f"bytes: {cause}" in message
        if rank != 1:
            assert "rank 1 (process" in message
            assert "has failed while rank" in message


def _trimmed(rank: int, ranks: int) -> None:
    """Ranks trim when they like, and at different times; what still lives stays."""
    dispatcher, twin = dispatcher_of("shared_memory", 12), dispatcher_of("process_group", 12)
    memory = _C.recall_joined("0")[0]
    small, large = small_case(rank), make_case(2, rank, 4000, 600, 3, 12, dtype=torch.float32)
    kept = dispatcher.dispatch(*arguments(small))
    copy = kept.x.clone()
    for turn in range(3):
        got = round_trip(dispatcher, large, rank)
        for ours, theirs in zip(got[1:], round_trip(twin, large, rank)[1:], strict=True):
            assert torch.equal(ours, theirs)
        del got, ours, theirs
        before, usage = memory.reserved_bytes, shared_bytes()
        if turn != rank:
            freed = dispatcher.trim()
            assert freed > large.x.nbytes
            assert memory.reserved_bytes == before - freed
            assert shared_bytes() == usage - freed
            assert dispatcher.trim() == 0
        assert torch.equal(kept.x, copy)
        y = dispatcher.combine(kept.x, kept.handle)
        assert torch.equal(y, twin.combine(kept.x, twin.dispatch(*arguments(small)).handle))
    assert twin.trim() == 0


def shared_bytes() -> int:
    """Of the memory files that this process has, its own and those of others."""
    files = {}
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if "memfd:moe_kernels" in os.readlink(entry):
                status = os.stat(entry)
                files[status.st_ino] = 512 * status.st_blocks
    return sum(files.values())


def test_memory_is_given_back_and_taken_again() -> None:
    run_ranks(2, _trimmed)


def _signals(rank: int, ranks: int) -> None:
    """As on systems where a signal undoes what is done of a piece: here of every large one."""
    dispatcher = dispatcher_of("shared_memory", 12)
    case = make_case(1, rank, 4000, 1024, 2, 12, dtype=torch.float32)
    fallocate = {"x86_64": 285, "aarch64": 47}[platform.machine()]
    forbid(fallocate, errno.EINTR, above=3 << 20)
    dispatcher.dispatch(*arguments(case))
    assert _C.recall_joined("0")[0].reserved_bytes > case.x.nbytes


def test_signals_do_not_keep_memory_from_growing() -> None:
    run_ranks(2, _signals, timeout=20)


def _leaves_early(rank: int, ranks: int) -> None:
    """Rank 1 exits after its last combine, with news of rank 0's memory unread; what it left is
    there, in memory that rank 0 has not mapped yet."""
    dispatcher = dispatcher_of("shared_memory", 2)
    watch = os.pidfd_open(processes()[1])  # readable when its last thread is gone
    x, weights = torch.randn(3000, 512), torch.ones(3000, 1)
    kept = dispatcher.dispatch(x, torch.full((3000, 1), rank), weights)  # nobody need know of it
    tokens = dispatcher.dispatch(x, torch.ones(3000, 1, dtype=torch.int64), weights)
    assert len(kept.x) == 3000
    assert len(tokens.x) == 6000 * rank
    pending = dispatcher.combine_async(tokens.x.repeat(1, 4), tokens.handle)
    if rank == 1:
        pending.wait()
        os._exit(0)
    select.select([watch], [], [])
    assert torch.equal(pending.wait(), x.repeat(1, 4))


def test_what_a_rank_leaves_when_it_exits_is_there() -> None:
    failed = "1 of 2 ranks failed\n--- rank 1: died with exit code 0"
    with pytest.raises(AssertionError, match=failed):
        run_ranks(2, _leaves_early)


def forbid(call: int, error: int, above: int = -1) -> None:
    """From now on a call of the system, by its number, fails in this process: where its fourth
    argument is larger."""
    libc = ctypes.CDLL(None, use_errno=True)
    load, equal, larger, back = 0x20, 0x15, 0x25, 0x06
    refused, allowed = 0x00050000 | error, 0x7FFF0000
    steps = [(load, 0, 0, 0), (equal, 0, 3 if above >= 0 else 1, call)]
    if above >= 0:
        steps += [(load, 0, 0, 40), (larger, 0, 1, above)]
    steps += [(back, 0, 0, refused), (back, 0, 0, allowed)]
    program = b"".join(struct.pack("HBBI", *step) for step in steps)
    filters = ctypes.create_string_buffer(program)
    settings = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(filters))
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
    assert libc.prctl(22, 2, settings) == 0, os.strerror(ctypes.get_errno())  # a filter of calls


def _no_pidfd(rank: int, ranks: int) -> str:
    if rank == 1:
        forbid(434, errno.EPERM)  # pidfd_open
    dispatcher = AllToAllDispatcher(dist.group.WORLD, 12)
    round_trip(dispatcher, small_case(rank), rank)
    return dispatcher.explain()


def test_a_system_that_cannot_watch_processes_has_no_shared_memory() -> None:
    for reason in run_ranks(2, _no_pidfd):
        assert reason.startswith("process_group carries tensors of the CPU: rank 1 cannot share")
        assert "pidfd_open of process" in reason


def open_things() -> tuple[int, int, int]:
    """Descriptors, mappings of shared memory, and threads of this process."""
    with open("/proc/self/maps") as maps:
        shared = sum("memfd:moe_kernels" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), shared, len(os.listdir("/proc/self/task"))


def _leaks(rank: int, ranks: int) -> None:
    for _ in range(1000):
        plain = dispatcher_of("process_group", 12)
    round_trip(plain, small_case(rank), rank)
    before = open_things()
    for _ in range(1000):
        plain = dispatcher_of("process_group", 12)
    assert open_things() == before
    case = small_case(rank)
    round_trip(dispatcher_of("shared_memory", 12), case, rank)
    during = open_things()
    assert during[1] > before[1]
    for number in range(1000):
        dispatcher = dispatcher_of("shared_memory", 12)
        if number % 100 == 0:
            round_trip(dispatcher, case, rank)
    assert open_things() == during
    with open("/proc/net/unix") as sockets:
        mine = [line.split() for line in sockets if f"moe_kernels.{os.getpid()}." in line]
    assert all(flags != "00010000" for _, _, _, flags, *_ in mine), "nobody else can join"
    group = dist.new_group([0, 1])
    made = open_things()
    round_trip(AllToAllDispatcher(group, 12, transport="shared_memory"), case, rank)
    dist.destroy_process_group(group)
    del group
    assert open_things()[1] == made[1]


def test_dispatchers_and_groups_leave_nothing_behind() -> None:
    run_ranks(2, _leaks)


def _interrupted(rank: int, ranks: int) -> tuple[str, str]:
    dispatcher = dispatcher_of("shared_memory", 12)
    store = store_of(dist.group.WORLD)
    case = small_case(rank)
    if rank == 0:
        # A command that was started in the background ignores it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            dispatcher.dispatch(*arguments(case))
        store.set("interrupted", "")
        store.get("over")
        return "", ""
    store.get("interrupted")
    result = raised(dispatcher.dispatch, *arguments(case))
    store.set("over", "")
    return result


def test_an_interrupt_ends_a_wait() -> None:
    kind, message = run_ranks(2, _interrupted)[1]
    assert kind == "DistBackendError"
    assert "rank 0 (process" in message
    assert "KeyboardInterrupt" in message


@pytest.mark.slow
def test_no_race_and_no_overrun_under_sanitizers() -> None:
    """Ranks as threads: what sanitizers do not see of other processes they see of these."""
    folder = Path(__file__).parents[2]
    result = subprocess.run(
        ["make", "test-stress"], cwd=folder, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(": right") == 18


def test_ranks_that_cannot_share_memory_say_why() -> None:
    def offers(**second: Any) -> list[dict[str, Any]]:
        return [{"host": "a", "process": 1, "address": "x"}, second]

    assert _obstacle(offers(host="a", process=2, address="y")) is None
    reason = _obstacle(offers(host="b", process=2, address="y"))
    assert reason is not None
    assert "ranks 0 and 1 are on different machines" in reason
    assert _obstacle(offers(host="a", process=1, address="y")) == (
        "several ranks are threads of one process"
    )
    assert _obstacle(offers(obstacle="memfd_create: Operation not permitted")) == (
        "rank 1 cannot share memory: memfd_create: Operation not permitted"
    )


def _refused(rank: int, ranks: int) -> list[str]:
    group = dist.new_group([0, 1], backend="fake")
    chosen = AllToAllDispatcher(group, 12).transport
    return [chosen, *raised(lambda: AllToAllDispatcher(group, 12, transport="shared_memory"))]


def test_shared_memory_of_a_group_that_cannot_is_refused() -> None:
    chosen, kind, message = run_ranks(2, _refused)[0]
    assert chosen == "process_group"
    assert kind == "ValueError"
    assert "transport 'shared_memory' needs ranks that share a machine: the group's" in message
