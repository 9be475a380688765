"""Which dispatcher a group gets."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from torch.distributed import ProcessGroup

from moe_parallel.dispatch.all_to_all import AllToAllDispatcher
from moe_parallel.dispatch.deepep import DeepEPDispatcher
from moe_parallel.dispatch.deepep_buffers import load_deep_ep
from moe_parallel.dispatch.joining import exchange
from moe_parallel.dispatch.protocol import TRANSPORTS, TokenDispatcher
from moe_parallel.torch_internals import backend_of, timeout_of


def _machine() -> str:
    """A name that processes share if they run on one machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _problem_with_deep_ep() -> str:
    """Why the package cannot be used in this process; empty if it can."""
    try:
        load_deep_ep()
    except Exception as error:  # it checks its libraries when imported, by assertions
        return str(error) or repr(error)
    return ""


def _obstacle(group: ProcessGroup, seconds: float | None) -> str | None:
    """Why "auto" leaves DeepEP alone, the same on every rank; None if it is to be used."""
    backend = backend_of(group, "cuda")
    if backend != "nccl":
        return f"the group's backend for GPUs is {backend}, not nccl"
    timeout = timeout_of(group, "cuda") if seconds is None else timedelta(seconds=seconds)
    machines = exchange(group, "machine", _machine(), timeout)
    if len(set(machines)) == 1:
        return "all ranks are on one machine"
    problems = exchange(group, "deepep", _problem_with_deep_ep(), timeout)
    return next((f"rank {rank}: {what}" for rank, what in enumerate(problems) if what), None)


def build_dispatcher(
    group: ProcessGroup,
    num_experts: int,
    *,
    transport: str = "auto",
    timeout: float | None = None,
    placement: Sequence[int | Sequence[int]] | None = None,
    max_tokens: int | None = None,
    capacity: int | None = None,
    slot_capacity: int | None = None,
) -> TokenDispatcher:
    """The dispatcher of a transport.

    Args:
        group, num_experts, timeout, placement, max_tokens, capacity, slot_capacity: as for
            :class:`AllToAllDispatcher`; "deepep" knows no placement and no capacities.
        transport: "process_group", "shared_memory", "cuda_ipc", "deepep"
            (:class:`DeepEPDispatcher`), or "auto": DeepEP where an NCCL group spans several
            machines and every rank can import ``deep_ep``, for the tensors that it takes; for all
            else what AllToAllDispatcher does with "auto". ``explain()`` of the result says what was
            chosen and why.

    Raises:
        ValueError: an unknown transport, a placement with "deepep", or what the dispatcher refuses.
        ImportError: "deepep" without DeepEP.
    """
    if transport not in ("auto", *TRANSPORTS):
        raise ValueError(
            f"build_dispatcher: transport must be one of auto, {', '.join(TRANSPORTS)}; "
            f"got {transport!r}"
        )
    if transport == "deepep":
        if placement is not None:
            raise ValueError(
                "build_dispatcher: transport 'deepep' knows no placement: its rank r owns the "
                "experts from r * E / P on. Leave placement None, or use 'process_group'."
            )
        return DeepEPDispatcher(group, num_experts, timeout=timeout, max_tokens=max_tokens)
    dispatcher = AllToAllDispatcher(
        group,
        num_experts,
        transport=transport,
        timeout=timeout,
        placement=placement,
        max_tokens=max_tokens,
        capacity=capacity,
        slot_capacity=slot_capacity,
    )
    if transport != "auto":
        return dispatcher
    obstacle = "it knows no placement"
    if placement is None:
        obstacle = _obstacle(group, timeout) or ""
    if not obstacle:
        reason = "the group spans several machines, and every rank can import deep_ep"
        try:
            return DeepEPDispatcher(
                group,
                num_experts,
                timeout=timeout,
                max_tokens=max_tokens,
                otherwise=dispatcher,
                reason=reason,
            )
        except ValueError as error:  # of the group's size or the timeout: on every rank
            obstacle = str(error)
    dispatcher.passed_over = f"deepep is not used: {obstacle}"
    return dispatcher
