"""Tests on several ranks: processes of one machine, joined by gloo, or on one GPU by NCCL.

The processes are forked by a server that has imported what they need and done nothing else: a fork
of the test process itself would inherit its OpenMP, CUDA and autograd threads as locks that nobody
opens. It imports all modules of tests that start processes, once, when the first one does: pytest
alone would cost every process more than its start. A test costs a tenth of a second after that.
"""

from __future__ import annotations

import faulthandler
import io
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_parallel.torch_internals import store_of

GRACE = 3.0  # seconds that the other ranks have to report after one has failed
IMPORTS = 300.0  # seconds for what the function's module imports, which are not the test's
STDERR = 12_000  # characters of a failed rank's that are shown
ONE_GPU = "cpu:gloo,cuda:nccl"
# NCCL refuses a second rank on a GPU of the same host, so each says that it is a host of its own.
_NCCL = {"NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
# What processes import later in any case: DTensor when first used, and what brings results back.
_PRELOADED = ("moe_parallel.parallelizer", "torch._dynamo", "torch.utils.serialization.config")


def run_ranks(
    ranks: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 60.0,
    stay: bool = True,
    backend: str = "gloo",
) -> list[Any]:
    """Run ``function(rank, ranks, *args)`` on every rank of a new group.

    Args:
        ranks: how many processes.
        function: at module level, as are the classes of ``args`` (they are pickled).
        timeout: seconds after which every process is killed, from when all have imported what
            they need.
        stay: whether a rank that has returned stays until all have, for a slower one may still be
            connecting to it; else it exits.
        backend: of the group; with :data:`ONE_GPU` all ranks share the first GPU, by NCCL.

    Returns:
        What the ranks returned, in their order; tensors come on the CPU.

    Raises:
        AssertionError: with the traceback of every rank that raised, and the ranks that died,
            or were still running at the end, with what they wrote to stderr: their stacks.
    """
    context = fork_context()
    with tempfile.TemporaryDirectory() as folder:
        connections, processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_main,
                args=(theirs, Path(folder), rank, ranks, timeout, stay, backend, function, args),
            )
            process.start()
            theirs.close()
            connections.append(ours)
            processes.append(process)
        try:
            _start_together(connections)
            return _collect(connections, processes, timeout, Path(folder))
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            for rank in range(len(processes)):
                sys.stderr.write(_stderr(Path(folder), rank))


def end_group(rank: int, ranks: int) -> None:
    """Destroy the group of :func:`run_ranks` when every rank has it: a slower one may still be
    connecting to this."""
    store = store_of(dist.group.WORLD)
    store.set(f"{rank} has a group", "")
    store.wait([f"{other} has a group" for other in range(ranks)])
    dist.destroy_process_group()


def fork_context() -> ForkServerContext:
    """What starts processes, for tests that end them themselves."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOADED, *_modules_with_ranks()])
    return context


def _modules_with_ranks() -> list[str]:
    """The modules of tests that use this one, with what they import."""
    modules = {name: module for name, module in sys.modules.items() if name.startswith("tests.")}
    return [name for name, module in modules.items() if "run_ranks" in vars(module)]


def _start_together(connections: list[Connection]) -> None:
    deadline = time.monotonic() + IMPORTS
    for connection in connections:
        if connection.poll(max(deadline - time.monotonic(), 0.0)):
            with suppress(EOFError):  # it died, as _collect will find
                connection.recv()
    for connection in connections:
        with suppress(BrokenPipeError):
            connection.send(None)


def _stderr_path(folder: Path, rank: int) -> Path:
    return folder / f"stderr.{rank}"


def _stderr(folder: Path, rank: int) -> str:
    """What the rank has written to stderr so far."""
    path = _stderr_path(folder, rank)
    return path.read_text(errors="replace") if path.exists() else ""


def _collect(
    connections: list[Connection], processes: list[Any], timeout: float, folder: Path
) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    waiting = dict(zip(connections, range(len(connections)), strict=True))
    while waiting and (left := deadline - time.monotonic()) > 0:
        for connection in wait(list(waiting), left):
            rank = waiting.pop(connection)  # type: ignore[arg-type]
            try:
                succeeded, payload = connection.recv()  # type: ignore[union-attr]
            except EOFError:
                processes[rank].join()
                payload = f"died with exit code {processes[rank].exitcode}"
                succeeded, payload = False, _with_stderr(payload, folder, rank)
            if succeeded:
                results[rank] = torch.load(io.BytesIO(payload), weights_only=False)
            else:
                deadline = min(deadline, time.monotonic() + GRACE)
                failures[rank] = payload
    for rank in waiting.values():
        failures[rank] = _with_stderr("was still running and was killed", folder, rank)
    if failures:
        report = "\n".join(f"--- rank {rank}: {failures[rank]}" for rank in sorted(failures))
        raise AssertionError(f"{len(failures)} of {len(processes)} ranks failed\n{report}")
    return [results[rank] for rank in range(len(processes))]


def _with_stderr(failure: str, folder: Path, rank: int) -> str:
    text = _stderr(folder, rank)
    if len(text) > STDERR:  # the first stack is that of the thread that fails
        text = f"{text[: STDERR // 2]}\n[...]\n{text[-STDERR // 2 :]}"
    return f"{failure}; its stderr:\n{text}" if text else failure


def _tell_of_fatal_signals(path: Path) -> None:
    """Send stderr to a file, and to it the stacks of the threads when a signal ends the process:
    those of Python, by a handler that hardly needs anything, then by torch's those of C."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 2)
    os.close(file)
    # Theirs is called by the one that is installed later.
    torch._C._set_print_stack_traces_on_fatal_signal(True)
    faulthandler.enable(2)


def _main(
    connection: Connection,
    folder: Path,
    rank: int,
    ranks: int,
    timeout: float,
    stay: bool,
    backend: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    _tell_of_fatal_signals(_stderr_path(folder, rank))
    connection.send(None)
    connection.recv()
    faulthandler.dump_traceback_later(timeout * 0.9, file=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if backend == ONE_GPU:
        os.environ.update(_NCCL, NCCL_HOSTID=f"rank {rank}")
    try:
        dist.init_process_group(
            backend,
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=timeout),
        )
        payload = io.BytesIO()
        torch.save(function(rank, ranks, *args), payload)
        connection.send((True, payload.getvalue()))
        faulthandler.cancel_dump_traceback_later()
        if stay:
            with suppress(EOFError):
                connection.recv()  # nothing comes: all have returned when it is closed
    except BaseException:
        connection.send((False, traceback.format_exc()))
    finally:
        connection.close()
        sys.stdout.flush()
        sys.stderr.flush()
        # Without the clean-up of a group whose other ranks may be gone.
        os._exit(0)
