"""How the ranks of a group are joined: which transports they can use together, and why.

Decided once for a group, by what every rank publishes in the group's store, so that all ranks
decide alike.
"""

from __future__ import annotations

import atexit
import json
import logging
import math
import multiprocessing
import multiprocessing.util
import os
import sys
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from moe_parallel.dispatch.native import extension
from moe_parallel.torch_internals import backend_of, timeout_of

logger = logging.getLogger(__name__)

# Backends whose ranks are processes that a store joins; MPI does without one, and others imitate
# ranks in one process.
_BACKENDS_OF_PROCESSES = ("gloo", "ucc", "nccl")


# For tests: GPUs are imitated by the CPU, which runs the device code on tensors of its own.
EMULATE_GPUS = "MOE_KERNELS_EMULATE_GPUS"

# That a rank which ends by an error waits for those that read its memory.
SECONDS_AFTER_ERROR = 1.0

# That a group's store has to answer, beyond the time it is told to wait.
SECONDS_FOR_STORE = 1.0


class JoinedGpus(NamedTuple):
    """What the GPUs of a group's ranks have in common.

    Attributes:
        memory: a ``moe_kernels._C.PeerMemory`` that joins them, or None.
        reason: why there is one, or none.
    """

    memory: Any
    reason: str


class Joined(NamedTuple):
    """What the ranks of a group have in common.

    Attributes:
        shared_memory: a ``moe_kernels._C.SharedMemory`` that joins them, or None.
        reason: why there is one, or none.
    """

    shared_memory: Any
    reason: str


def _host() -> str:
    """A name that processes share if and only if they can reach each other's memory."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net")]
    return " ".join([boot, *namespaces, f"uid:{os.geteuid()}"])


def _offer(group: ProcessGroup) -> tuple[Any, dict[str, Any]]:
    """What this rank brings: its memory, or None, and what it tells the others of it."""
    try:
        host = _host()
        memory = extension().SharedMemory(group.rank(), group.size(), group.group_name)
    except (OSError, RuntimeError) as error:
        return None, {"obstacle": str(error)}
    return memory, {"host": host, "process": os.getpid(), "address": memory.address}


def exchange(group: ProcessGroup, key: str, value: Any, timeout: timedelta) -> list[Any]:
    """The ``value`` of each rank, by the group's store; a rank gives a ``key`` the same each time.

    Raises:
        torch.distributed.DistBackendError: a rank did not come in time; it is named. Or the store
            does not answer.
    """
    seconds = timeout.total_seconds()
    values, missing, problem = extension().meet(
        group.group_name, key, json.dumps(value), seconds, SECONDS_FOR_STORE
    )
    me = f"AllToAllDispatcher: rank {group.rank()} of group '{group.group_name}'"
    if problem:
        raise dist.DistBackendError(
            f"{me} cannot meet the others: the group's store does not answer ({problem}). The "
            "process that keeps it, often that of rank 0, has died or is stopped; it must run for "
            "as long as the ranks do."
        )
    if missing:
        raise dist.DistBackendError(
            f"{me} has waited {seconds:g} s for these ranks to make their first dispatcher: "
            f"{missing}. Every rank of the group must make it."
        )
    return [json.loads(value) for value in values]


def _exchange_offers(
    group: ProcessGroup, key: str, offer: dict[str, Any], timeout: timedelta
) -> list[dict[str, Any]]:
    """The ``offer`` of each rank. The ranks agree on the number of the dispatcher that they make:
    they may have tried in vain before, one more often than another."""
    native = extension()
    begun = native.begun_dispatchers(group.group_name)
    offers = exchange(group, key, {**offer, "begun": begun}, timeout)
    native.agree_on_dispatchers(group.group_name, max(offer["begun"] for offer in offers))
    return offers


def _obstacle(offers: list[dict[str, Any]]) -> str | None:
    """Why the ranks cannot share memory, the same on every rank; None if they can."""
    for rank, offer in enumerate(offers):
        if "obstacle" in offer:
            return f"rank {rank} cannot share memory: {offer['obstacle']}"
        if offer["host"] != offers[0]["host"]:
            return (
                f"ranks 0 and {rank} are on different machines, in different containers or of "
                "different users"
            )
    if len({offer["process"] for offer in offers}) < len(offers):
        return "several ranks are threads of one process"
    return None


def _join(group: ProcessGroup, seconds: float | None) -> Joined:
    device = "cpu" if backend_of(group, "cpu") is not None else "cuda"
    backend = backend_of(group, device)
    if backend not in _BACKENDS_OF_PROCESSES:
        return Joined(None, f"the group's backend on the CPU is {backend}")
    timeout = timeout_of_any(group) if seconds is None else timedelta(seconds=seconds)
    memory, offer = _offer(group)
    offers = _exchange_offers(group, "offer", offer, timeout)
    obstacle = _obstacle(offers)
    if obstacle is not None:
        return Joined(None, obstacle)
    try:
        memory.connect([offer["address"] for offer in offers], timeout.total_seconds())
    except RuntimeError as error:
        raise dist.DistBackendError(f"AllToAllDispatcher: {error}") from error
    return Joined(memory, f"all {group.size()} ranks are processes of one machine")


def timeout_of_any(group: ProcessGroup) -> timedelta:
    """The group's own timeout: of its backend on the CPU, or else on GPUs."""
    return timeout_of(group, "cpu" if backend_of(group, "cpu") is not None else "cuda")


def join(group: ProcessGroup, timeout: float | None) -> Joined:
    """Join the ranks of ``group``, the first time; later the same again.

    Args:
        group: every rank of it makes this call.
        timeout: seconds to wait for the others; None for the group's own timeout.

    Raises:
        torch.distributed.DistBackendError: a rank did not come in time, or has died; it is named.
    """
    native = extension()
    known = native.recall_joined(group.group_name)
    if known is not None:
        return Joined(*known)
    joined = _join(group, timeout)
    native.remember_joined(group.group_name, *joined)
    weakref.finalize(group, native.forget_joined, group.group_name)
    logger.info(
        "dispatch in group '%s': %s, for %s",
        group.group_name,
        "process_group" if joined.shared_memory is None else "shared_memory",
        joined.reason,
    )
    return joined


def _gpu_offer(emulate: bool) -> dict[str, Any]:
    """This rank's GPU as the others know it, or why there is none."""
    if emulate:
        return {"bus_id": ""}
    if not torch.cuda.is_available():
        built = extension().build_info()["cuda"] is not None
        missing = "torch sees no CUDA device" if built else "moe_kernels is built without CUDA"
        return {"obstacle": missing}
    try:
        return {"bus_id": extension().cuda_bus_id(torch.cuda.current_device())}
    except RuntimeError as error:
        return {"obstacle": str(error)}


def _join_gpus(group: ProcessGroup, joined: Joined, seconds: float | None) -> JoinedGpus:
    if joined.shared_memory is None:
        return JoinedGpus(None, joined.reason)
    native = extension()
    emulate = os.environ.get(EMULATE_GPUS) == "1"
    timeout = timeout_of_any(group) if seconds is None else timedelta(seconds=seconds)
    offers = _exchange_offers(group, "gpu", _gpu_offer(emulate), timeout)
    for rank, offer in enumerate(offers):
        if "obstacle" in offer:
            return JoinedGpus(None, f"rank {rank} has no GPU to use: {offer['obstacle']}")
    device = None if emulate else torch.cuda.current_device()
    obstacle = ""
    if device is not None:
        obstacle = native.cuda_peer_obstacle(device, [offer["bus_id"] for offer in offers])
    for rank, what in enumerate(exchange(group, "gpu_peers", obstacle, timeout)):
        if what:
            return JoinedGpus(None, f"rank {rank}: {what}")
    try:
        memory = native.PeerMemory(joined.shared_memory, device, timeout.total_seconds())
    except RuntimeError as error:
        raise dist.DistBackendError(f"AllToAllDispatcher: {error}") from error
    if memory.obstacle:
        return JoinedGpus(None, memory.obstacle)
    return JoinedGpus(memory, f"the GPUs of all {group.size()} ranks reach each other's memory")


def _leave(last: bool) -> None:
    """Wait until the others are done with the memory of this process's GPU.

    For the timeout; but who starts the ranks shall learn of an error soon, and then end them all.
    With what status a program ends is not known here: there exit() makes the ``last`` call, and
    waits on if that is 0.
    """
    error = sys.exc_info()[1]  # in a process of multiprocessing
    failed = error is not None and getattr(error, "code", 1) not in (None, 0)
    failed = failed or getattr(sys, "last_value", None) is not None  # in a program
    last = last or failed
    extension().leave_groups(SECONDS_AFTER_ERROR if failed or not last else math.inf, last)


def _leave_at_exit() -> None:
    atexit.unregister(_leave)
    atexit.register(_leave, last=not extension().leave_groups_at_exit())
    if multiprocessing.parent_process() is not None:  # which exits without atexit
        multiprocessing.util.Finalize(None, _leave, kwargs={"last": True}, exitpriority=0)


def join_gpus(group: ProcessGroup, joined: Joined, timeout: float | None) -> JoinedGpus:
    """Join the current CUDA devices of the ranks, the first time; later the same again.

    Args:
        group: every rank of it makes this call.
        joined: what :func:`join` has found.
        timeout: as there.

    Raises:
        torch.distributed.DistBackendError: a rank did not come in time, or has died; it is named.
    """
    native = extension()
    known = native.recall_peer_memory(group.group_name)
    if known is not None:
        return JoinedGpus(*known)
    found = _join_gpus(group, joined, timeout)
    native.remember_peer_memory(group.group_name, *found)
    if found.memory is not None:
        _leave_at_exit()
    logger.info("GPUs of group '%s': %s", group.group_name, found.reason)
    return found
