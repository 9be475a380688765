"""Processes for ops on ranks: started here, joined by gloo (and NCCL on GPUs), on one machine.

They are forked by a server that has imported what they need and computed nothing: a fork of a
process with OpenMP threads would inherit their locks.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.ops import OPS
from benchmarks.rank_runner import run_rank
from benchmarks.registry import Op
from benchmarks.routing import check_top_k
from benchmarks.runner import Row, Settings

GRACE = 5.0  # seconds that the other ranks have to say why, after one has failed


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def placement(ranks: int, threads: int | None = None) -> dict[str, Any]:
    """How ranks share the cores: PyTorch's threads of each, and whether there are too many."""
    each = threads or max(1, cores() // ranks)
    return {"threads": each, "cores": cores(), "oversubscribed": ranks * each > cores()}


def impossible(op: Op, settings: Settings, ranks: int) -> str:
    """What that many ranks would need and this machine has not, or "".

    Raises:
        ValueError: the op's shapes cannot be shared by that many.
    """
    for shape in op.shapes(settings.device.type, settings.shapes):
        check_top_k(shape["K"], shape["E"])
        if shape["E"] % ranks:
            raise ValueError(
                f"E must be a multiple of the number of ranks; got {shape} and {ranks} ranks"
            )
    if settings.device.type == "cuda" and torch.cuda.device_count() < ranks:
        return f"{ranks} ranks need a GPU each; found {torch.cuda.device_count()}"
    return ""


class RanksFailed(RuntimeError):
    """A rank failed or died; the message has what each of them said."""


def run_on_ranks(op: Op, settings: Settings, ranks: int) -> Iterator[list[Row]]:
    """Measure ``op`` on ``ranks`` processes: its rows, shape by shape.

    Raises:
        RanksFailed: a rank failed or died.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    connections: list[Connection] = []
    processes: list[Any] = []
    try:
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (theirs, store.port, rank, ranks, op.name, settings)
            process = context.Process(target=_main, args=arguments, daemon=True)
            process.start()
            theirs.close()
            connections.append(ours)
            processes.append(process)
        yield from _received(connections, processes)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _received(connections: list[Connection], processes: list[Any]) -> Iterator[list[Row]]:
    """What the first rank sends, until all have ended."""
    waiting = list(connections)
    failures: dict[int, str] = {}
    while waiting:
        ready = wait(waiting, GRACE if failures else None)
        if not ready:
            break
        for connection in [c for c in waiting if c in ready]:
            rank = connections.index(connection)
            try:
                kind, value = connection.recv()
            except EOFError:
                processes[rank].join()
                kind, value = "died", f"exit code {processes[rank].exitcode}"
            if kind == "rows":
                yield value
                continue
            waiting.remove(connection)
            if kind != "done":
                failures[rank] = f"{kind}: {value}"
    if failures:
        text = "\n".join(f"rank {rank} {why}" for rank, why in sorted(failures.items()))
        raise RanksFailed(f"{len(failures)} of {len(processes)} ranks failed\n{text}")


def _end_with_the_parent() -> None:
    """A rank whose command was killed would wait for the others, and they for it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _main(
    connection: Connection, port: int, rank: int, ranks: int, op: str, settings: Settings
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its ranks
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name need not resolve
    torch.set_num_threads(placement(ranks, settings.threads)["threads"])
    device, backend = settings.device, "gloo"
    try:
        if device.type == "cuda":
            device, backend = torch.device("cuda", rank), "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend,
            store=dist.TCPStore("127.0.0.1", port, is_master=False),
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=4 * settings.timeout),  # outlasts all that is timed
        )
        for rows in run_rank(OPS[op], dataclasses.replace(settings, device=device)):
            if rank == 0:
                connection.send(("rows", rows))
        connection.send(("done", None))
    except BaseException:
        connection.send(("failed", traceback.format_exc()))
    finally:
        connection.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # without the clean-up of a group whose other ranks may be gone
