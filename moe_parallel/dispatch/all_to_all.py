"""Token dispatch between the ranks of a process group.

T tokens, H hidden size, K experts a token, E experts, P ranks, U tokens received.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from operator import index
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moe_kernels.ops._checks import check_count, check_num_experts, refuse_tangent
from moe_parallel.dispatch import ops
from moe_parallel.dispatch.arguments import (
    check_tensor,
    check_timeout,
    device_among,
    refuse_pickling,
)
from moe_parallel.dispatch.joining import (
    Joined,
    JoinedGpus,
    join,
    join_gpus,
    timeout_of_any,
)
from moe_parallel.dispatch.native import extension
from moe_parallel.dispatch.protocol import ALL_TO_ALL_TRANSPORTS, Dispatched, Pending
from moe_parallel.torch_internals import backend_of


class Handle(NamedTuple):
    """The way back of dispatched tokens.

    Attributes:
        slot_rows: [T, K] int32, the row of the exchange that each slot travelled in, or -1.
        plan: [2 P + 2] int64 on the CPU: rows sent to each rank, rows received from each, the
            number of the dispatch, the same on every rank, and a tag of the group. By "cuda_ipc" it
            is on the device, and holds more.
    """

    slot_rows: Tensor
    plan: Tensor


def _ranks_of(entry: Any) -> list[int]:
    """The ranks that an entry of a placement names, ascending."""
    try:
        return [index(entry)]
    except TypeError:
        return sorted(map(index, entry))


def _owners(
    experts: int, ranks: int, placement: Sequence[int | Sequence[int]] | None
) -> list[list[int]]:
    """The ranks of each expert, ascending."""
    if placement is None:
        return [[e * ranks // experts] for e in range(experts)]
    try:
        entries = list(placement)
    except TypeError:
        raise TypeError(
            "AllToAllDispatcher: placement must be a sequence with an entry for each of the "
            f"{experts} experts; got {placement!r}"
        ) from None
    if len(entries) != experts:
        raise ValueError(
            f"AllToAllDispatcher: placement must have an entry for each of the {experts} experts; "
            f"got {len(entries)}"
        )
    owners = []
    for expert, entry in enumerate(entries):
        try:
            mine = _ranks_of(entry)
        except TypeError:
            raise TypeError(
                f"AllToAllDispatcher: placement must give expert {expert} a rank, or several; got "
                f"{entry!r}"
            ) from None
        if not mine or len(set(mine)) < len(mine) or mine[0] < 0 or mine[-1] >= ranks:
            raise ValueError(
                f"AllToAllDispatcher: placement must give expert {expert} one or more different "
                f"ranks in [0, {ranks}); got {entry}"
            )
        owners.append(mine)
    return owners


def _capacities(
    ranks: int,
    transport: str,
    max_tokens: int | None,
    capacity: int | None,
    slot_capacity: int | None,
) -> tuple[int, int, int] | None:
    """max_tokens, capacity and slot_capacity (0: the most there can be); None if not given."""
    op = "AllToAllDispatcher"
    given = {"max_tokens": max_tokens, "capacity": capacity, "slot_capacity": slot_capacity}
    for name, value in given.items():
        if value is None:
            continue
        check_count(op, name, value)
        if value < 1:
            raise ValueError(f"{op}: {name} must be positive; got {value}")
    if max_tokens is None:
        if transport == "cuda_ipc" or capacity is not None or slot_capacity is not None:
            raise ValueError(
                f"{op}: transport 'cuda_ipc', and a capacity, need max_tokens, the most tokens "
                "that any rank dispatches; got None"
            )
        return None
    if ranks * max_tokens >= 2**31:
        raise ValueError(
            f"{op}: max_tokens times the {ranks} ranks must be below 2**31; got {max_tokens}"
        )
    return max_tokens, capacity or ranks * max_tokens, slot_capacity or 0


def _dispatched(outputs: tuple[Tensor, ...], sent: Tensor | None) -> Dispatched:
    x, ids, weights, slot_rows, plan, num_slots, extra = outputs
    # The number of slots is the size of a tensor without elements: under torch.compile a size may
    # be unknown and yet an integer, and reading a value would break the graph.
    number = num_slots.shape[0]
    handle = Handle(slot_rows, plan)
    return Dispatched(x, ids, weights, handle, number, None if sent is None else extra)


class AllToAllDispatcher:
    """Sends each token once to every rank that owns one of its experts, and adds what they return.

    Rank r of the group owns the experts ``[r * E / P, (r + 1) * E / P)``, or those that
    ``placement`` gives it; it numbers them from 0 in ascending order. Received tokens are in the
    order of their ranks, then of their positions there. What the ranks return is added in the order
    of the ranks in float32 (float64 for float64), so that results repeat bit for bit; a row is
    rounded to its dtype once on the wire. Differentiable in x and topk_weights, not twice and
    not in forward mode.

    Every rank of the group must make the same calls in the same order, with any number of tokens,
    zero included; the order is otherwise free, and so is that of the backward passes. Calls that
    do not match are a ValueError on every rank: another operation or direction, other sizes or
    dtypes, or the handle of another dispatch, told by the numbers of the dispatches. On CUDA that
    is checked in dispatch alone, since reading what the others say would make the host wait; but by
    MPI, for which it waits in any case.

    Dispatchers are told apart by their number in the group, for which every attempt counts to make
    one: what raises here on some ranks alone leaves the next dispatcher alike on all.

    What the ranks do alike is not a mismatch: the handle of dispatch 2 with results of dispatch 1,
    on every rank, is only refused if their number of rows differs.

    Args:
        group: the ranks; of any c10d backend that can exchange tensors on the device of the tokens.
        num_experts: E, a multiple of P unless there is a ``placement``.
        transport: "process_group", c10d's all-to-all: the counts first, then the tokens.
            "shared_memory", for CPU ranks on one Linux machine: rows are written where the receiver
            needs them. "cuda_ipc", for GPU ranks on one machine: they read each other's memory, the
            host waits for nothing, and what arrives has ``capacity`` rows. "auto" takes shared
            memory where the ranks can share it, see :meth:`explain`, and the process group
            elsewhere; for the tensors of GPUs cuda_ipc if ``max_tokens`` is given and they can, and
            else the process group. But for "process_group", every rank of the group must make its
            first dispatcher together; of "cuda_ipc", with its GPU as the current device.
        timeout: seconds a rank waits for the others in each exchange, and for their first
            dispatcher; None for the group's own timeout, which one of MPI has not. NCCL's exchanges
            know the group's alone, and its watchdog, which then ends the process.
        placement: the rank of every expert, or the ranks that hold copies of it, of which a token
            takes its own rank's, or else each in turn; the same on all ranks. Copies are for
            inference: in training they would drift apart.
        max_tokens: for "cuda_ipc", which needs it: the most tokens that any rank dispatches.
        capacity: for "cuda_ipc": the rows that a rank has room for. By default P * max_tokens, as
            many as can come. Rows beyond it are left out, as if they had no expert, and the next
            call, or :meth:`check`, raises a RuntimeError that says what is needed.
        slot_capacity: for "cuda_ipc": the same for the slots in those rows, which is
            ``Dispatched.num_rows``. By default capacity * K.

    Attributes:
        local_experts: the experts of this rank, in the order of their numbers here.
        transport: what carries tensors of the CPU, "process_group" or "shared_memory"; or
            "cuda_ipc", if that was asked for, which carries none.
        gpu_transport: what carries those of GPUs, "process_group" or "cuda_ipc".
        passed_over: why it is not another dispatcher, for :meth:`explain`, or None.

    Raises:
        ValueError: an unknown transport, a timeout that is not positive or endless, E not a
            multiple of P, a placement that has not a rank of the group for every expert,
            "shared_memory" or "cuda_ipc" of ranks that cannot, capacities that are not positive.
        TypeError: a group, number or placement of another kind.
        ImportError: moe_kernels was built without its extension.
        torch.distributed.DistBackendError: a rank did not come to share its memory; it is named.
    """

    def __init__(
        self,
        group: ProcessGroup,
        num_experts: int,
        *,
        transport: str = "auto",
        timeout: float | None = None,
        placement: Sequence[int | Sequence[int]] | None = None,
        max_tokens: int | None = None,
        capacity: int | None = None,
        slot_capacity: int | None = None,
    ) -> None:
        op = "AllToAllDispatcher"
        if not isinstance(group, ProcessGroup):
            raise TypeError(f"{op}: group must be a ProcessGroup; got {type(group).__name__}")
        native = extension()
        # Before all that may raise on this rank alone: the others count on.
        number = native.begin_dispatcher(group.group_name)
        if transport not in ("auto", *ALL_TO_ALL_TRANSPORTS):
            raise ValueError(
                f"{op}: transport must be one of auto, {', '.join(ALL_TO_ALL_TRANSPORTS)}; "
                f"got {transport!r}"
            )
        check_num_experts(op, num_experts)
        if num_experts < 1 or (placement is None and num_experts % group.size()):
            raise ValueError(
                f"{op}: num_experts must be a positive multiple of the group's size "
                f"{group.size()}; got {num_experts}. Choose another Expert Parallel size, or give "
                "a placement."
            )
        if timeout is not None:
            check_timeout(op, "timeout", timeout)
        sizes = _capacities(group.size(), transport, max_tokens, capacity, slot_capacity)
        owners = _owners(num_experts, group.size(), placement)
        # The name alone: the group may end first.
        self.group_name: str = group.group_name
        self.num_experts = num_experts
        self.num_ranks: int = group.size()
        self.timeout = timeout
        joined = Joined(None, "it was asked for")
        if transport != "process_group":
            joined = join(group, timeout)
        if transport == "shared_memory" and joined.shared_memory is None:
            raise ValueError(
                f"{op}: transport 'shared_memory' needs ranks that share a machine: "
                f"{joined.reason}. Use 'process_group' or 'auto'."
            )
        gpus = JoinedGpus(None, "")
        if transport in ("auto", "cuda_ipc"):
            gpus = JoinedGpus(None, "max_tokens is not given")
            if sizes is not None:
                gpus = join_gpus(group, joined, timeout)
        if transport == "cuda_ipc" and gpus.memory is None:
            raise ValueError(
                f"{op}: transport 'cuda_ipc' needs ranks whose GPUs reach each other's memory: "
                f"{gpus.reason}. Use 'process_group' or 'auto'."
            )
        self.transport = "process_group" if joined.shared_memory is None else "shared_memory"
        if transport == "cuda_ipc":
            self.transport = transport
        self.gpu_transport = "process_group" if gpus.memory is None else "cuda_ipc"
        self._reason, self._gpu_reason = joined.reason, gpus.reason
        self.passed_over: str | None = None
        seconds = timeout or 0.0  # for c10d, 0 is the group's own
        if joined.shared_memory is not None and timeout is None:
            seconds = timeout_of_any(group).total_seconds()
        self._native = native.Dispatcher(
            group.group_name,
            number,
            group.rank(),
            group.size(),
            num_experts,
            seconds,
            joined.shared_memory,
            None if placement is None else owners,
            gpus.memory,
            *(sizes or (0, 0, 0)),
            transport == "cuda_ipc",
        )
        rank = group.rank()
        self.local_experts = tuple(e for e, ranks in enumerate(owners) if rank in ranks)
        self._has_copies = any(len(ranks) > 1 for ranks in owners)
        self._name: str = self._native.name
        self._device = "cpu" if backend_of(group, "cpu") is not None else "cuda"

    def __repr__(self) -> str:
        return (
            f"AllToAllDispatcher(group={self.group_name!r}, num_ranks={self.num_ranks}, "
            f"num_experts={self.num_experts}, transport={self.transport!r}, timeout={self.timeout})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> AllToAllDispatcher:
        return self  # it has no state of its own, and copies of a module take turns in one group

    def __copy__(self) -> AllToAllDispatcher:
        return self

    def __reduce__(self) -> NoReturn:
        refuse_pickling("AllToAllDispatcher")

    def explain(self) -> str:
        """Which transport carries what, and why."""
        more = "" if self.passed_over is None else f"; {self.passed_over}"
        if self.transport == "cuda_ipc":
            return f"cuda_ipc carries tensors of the GPUs: {self._gpu_reason}{more}"
        others = (
            "" if self.transport == self.gpu_transport else f", {self.gpu_transport} of the GPUs'"
        )
        if self._gpu_reason:
            used = "for" if self.gpu_transport == "cuda_ipc" else "is not used:"
            more = f"; cuda_ipc {used} {self._gpu_reason}{more}"
        return f"{self.transport} carries tensors of the CPU{others}: {self._reason}{more}"

    def check(self) -> None:
        """Wait until this rank's GPU is done, and raise what "cuda_ipc" has found meanwhile.

        What goes wrong on the device, or did not fit, is raised by the call that follows it; this
        is for the last one, and for captured graphs, whose replays are no calls. By other
        transports it does nothing.

        Raises:
            RuntimeError: more arrived than ``capacity`` or ``slot_capacity``, since it was last
                raised; it says what is needed. Ranks that check after the same calls raise alike.
            ValueError, IndexError, torch.distributed.DistBackendError: as :meth:`dispatch`.
        """
        self._native.check()

    def trim(self) -> int:
        """Give memory in which this rank receives, and has no rows, back to the system.

        That of "shared_memory", which all dispatchers of the group share. It grows with the largest
        call and stays; after one that was much larger than those to come, this frees the parts in
        which no tensor of an earlier call lives. They are taken again when a call needs them. Of
        this rank alone: it may call it whenever it likes, the others need not.

        Returns:
            The bytes that were freed; 0 by other transports.

        Raises:
            torch.distributed.DistBackendError: the dispatchers of the group are of no use any more.
        """
        try:
            freed: int = self._native.trim()
        except RuntimeError as error:
            raise dist.DistBackendError(str(error)) from None
        return freed

    def dispatch(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, *, extra: Tensor | None = None
    ) -> Dispatched:
        """Send tokens to their experts.

        Args:
            x: [T, H] in bf16, fp16, fp32 or fp64, any strides; float8 without a gradient.
            topk_ids: [T, K] int32 or int64, in [0, E); -1 and E mean "no expert".
            topk_weights: [T, K] in bf16, fp16, fp32 or fp64.
            extra: [T, ...] of any dtype, which travels with the tokens, without gradient: the
                scales of a float8 x, or numbers that describe tokens.

        Returns:
            :class:`Dispatched` with int32 ids; weights of other ranks' slots are 0.

        Raises:
            ValueError, TypeError, IndexError: arguments that do not fit, or not those of the other
                ranks. Ranks whose own arguments are right raise a RuntimeError that names the rank.
            torch.distributed.DistBackendError: a rank is missing; it names the exchange.
        """
        self._check_dispatch(x, topk_ids, topk_weights, extra)
        return _dispatched(ops.dispatch(x, topk_ids, topk_weights, extra, self._name), extra)

    def dispatch_async(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, *, extra: Tensor | None = None
    ) -> Pending[Dispatched]:
        """Begin :meth:`dispatch`, so that something else can be computed while tokens travel.

        ``wait()`` returns what ``dispatch`` does, with its gradients. Every rank begins and waits
        in the same order; another exchange that begins meanwhile may end this one first. Through a
        process group the tokens travel meanwhile; in shared memory the ranks learn how many rows
        each brings, and nobody waits for the last to come. Until ``wait()`` returns, the tensors
        must not be changed in place. What nobody waits for ends by itself, with the next call.
        """
        self._check_dispatch(x, topk_ids, topk_weights, extra)
        begun = ops.dispatch_start(x, topk_ids, topk_weights, extra, self._name)
        tokens = (x.detach(), topk_ids, topk_weights.detach(), extra)
        needs = (x.requires_grad, topk_weights.requires_grad)
        return Pending(
            lambda: _dispatched(ops.dispatch_finish(*tokens, *begun, *needs, self._name), extra)
        )

    # What they raise comes with a call that has nothing right, so that the other ranks learn of it,
    # instead of waiting for this one.
    def _check_dispatch(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, extra: Tensor | None
    ) -> None:
        try:
            check_tensor("dispatch", "x", x)
            check_tensor("dispatch", "topk_ids", topk_ids)
            check_tensor("dispatch", "topk_weights", topk_weights)
            if extra is not None:
                check_tensor("dispatch", "extra", extra)
            self._refuse_what_cannot_be_differentiated(x, topk_weights)
        except (TypeError, ValueError, NotImplementedError):
            device = device_among((x, topk_ids, topk_weights, extra), self._device)
            nothing = torch.empty((), device=device)
            with suppress(RuntimeError, ValueError, TypeError):
                ops.dispatch(nothing, nothing, nothing, None, self._name)
            raise

    def _check_combine(self, y: Tensor, handle: Handle) -> None:
        try:
            if not (isinstance(handle, tuple) and len(handle) == 2):
                raise TypeError(
                    f"combine: handle must be that of a dispatch; got {type(handle).__name__}"
                )
            check_tensor("combine", "y", y)
            check_tensor("combine", "the handle's slot_rows", handle[0])
            check_tensor("combine", "the handle's plan", handle[1])
            refuse_tangent("combine", "y", y)
        except (TypeError, ValueError, NotImplementedError):
            slot_rows = handle[0] if isinstance(handle, tuple) and handle else None
            nothing = torch.empty((), device=device_among((slot_rows, y), self._device))
            with suppress(RuntimeError, ValueError, TypeError):
                ops.combine(nothing, nothing, nothing, self._name)
            raise

    def _refuse_what_cannot_be_differentiated(self, x: Tensor, topk_weights: Tensor) -> None:
        refuse_tangent("dispatch", "x", x)
        refuse_tangent("dispatch", "topk_weights", topk_weights)
        if x.requires_grad and x.element_size() == 1:
            raise ValueError(f"dispatch: x of dtype {x.dtype} has no gradient; detach it")
        trained = torch.is_grad_enabled() and (x.requires_grad or topk_weights.requires_grad)
        if self._has_copies and trained:
            raise ValueError(
                "dispatch: copies of experts are for inference, but x or topk_weights requires a "
                "gradient, and the copies would be trained apart. Place each expert on one rank, "
                "or use torch.no_grad()."
            )

    def combine(self, y: Tensor, handle: Handle) -> Tensor:
        """Send results back and add them.

        Args:
            y: [U, H], a row for each received token.
            handle: of the dispatch; any number may be in flight, and each may be used once more for
                every y.

        Returns:
            [T, H]: zero for a token without experts.

        Raises:
            ValueError: the handle is of another group, y has not the rows of its dispatch, or the
                ranks use handles of different dispatches. Ranks whose own arguments are right raise
                a RuntimeError that names the rank.
            torch.distributed.DistBackendError: a rank is missing; it names the exchange.
        """
        self._check_combine(y, handle)
        out: Tensor = ops.combine(y, *handle, self._name)
        return out

    def combine_async(self, y: Tensor, handle: Handle) -> Pending[Tensor]:
        """Begin :meth:`combine`, as :meth:`dispatch_async` does dispatch; so y must not change."""
        self._check_combine(y, handle)
        begun = ops.combine_start(y, *handle, self._name)
        tokens = (y.detach(), *handle)
        return Pending(lambda: ops.combine_finish(*tokens, *begun, self._name))
