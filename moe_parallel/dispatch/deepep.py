"""Token dispatch by an installed DeepEP.

T tokens, H hidden size, K experts a token, E experts, P ranks, U tokens received.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from moe_kernels.ops._checks import (
    check_count,
    check_device,
    check_dtype,
    check_num_experts,
    check_tensor,
    shape,
)
from moe_parallel.dispatch.arguments import check_timeout, refuse_pickling
from moe_parallel.dispatch.deepep_buffers import (
    MAX_TOP_K,
    OP,
    Begun,
    Buffers,
    BuffersOfGroups,
    ElasticBuffers,
    LegacyBuffers,
    Received,
    check_experts,
    load_deep_ep,
)
from moe_parallel.dispatch.protocol import Dispatched, OverlappingDispatcher, Pending
from moe_parallel.torch_internals import graph_is_kept

_buffers = BuffersOfGroups()  # where dispatchers find each other's; it keeps none alive

INTERFACES: dict[str, Any] = {"elastic": ElasticBuffers, "legacy": LegacyBuffers}
_OPAQUE = "the handles of DeepEP are objects, and a buffer may be made in the call"


class DeepEPHandle(NamedTuple):
    """The way back of dispatched tokens.

    Attributes:
        route: DeepEP's own handle.
        tokens, received: T and U.
        group: the name of the group.
        interface: "elastic" or "legacy".
    """

    route: Any
    tokens: int
    received: int
    group: str
    interface: str


def _dense(tensor: Tensor) -> Tensor:
    """Contiguous, and where a copy engine can read it: at a multiple of 16 bytes."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _at_least_one(rows: Tensor) -> Tensor:
    """``rows [T, n]``, or a row of zeros if T is 0: DeepEP takes no pointer that is null."""
    return rows if rows.shape[0] else torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


_Gradients = Begun[tuple[Tensor, Tensor | None]]


class _Returning:
    """The gradients of a dispatch on their way: begun by one node of the graph, ended by another.

    Args:
        overlap: let the current stream go on meanwhile.
    """

    def __init__(self, overlap: bool) -> None:
        self.overlap = overlap
        self._begun: _Gradients | None = None
        self._begin: Callable[[], _Gradients] | None = None

    def begin(self, begin: Callable[[], _Gradients]) -> None:
        """Begin by ``begin``, which holds what is sent: it lives until that has arrived."""
        self._begin, self._begun = begin, begin()

    def end(self) -> tuple[Tensor, Tensor | None]:
        begun, self._begun = self._begun, None
        if begun is None:  # a pipeline's backward of the weights, after that of the inputs
            assert self._begin is not None
            begun = self._begin()
        gradients = begun.end()
        if not graph_is_kept():
            self._begin = None
        return gradients


class _Outgoing(NamedTuple):
    """A dispatch that has begun."""

    begun: Begun[Received]
    anchor: Tensor  # of x and the weights, which have gradients through it
    with_weights: bool  # have one
    returning: _Returning
    tokens: int  # T


class _BeginDispatch(torch.autograd.Function):
    """A tensor without elements, whose gradient stands for those of ``x`` and ``weights``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, returning: _Returning) -> Tensor:
        ctx.returning = returning
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> Any:
        with_x, *_ = ctx.needs_input_grad
        dx, dweights = ctx.returning.end()
        return dx if with_x else None, dweights, None


class _EndDispatch(torch.autograd.Function):
    """Ends a dispatch. Backward begins the way back; what was computed meanwhile goes between."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, outgoing: _Outgoing, buffers: Buffers) -> tuple[Any, ...]:
        received = outgoing.begun.end()
        here = received.topk_ids >= 0
        # ElasticBuffer brings the weights of all slots; combine adds those of all ranks.
        local_weights = received.topk_weights.masked_fill(~here, 0.0)
        local_ids = received.topk_ids.to(torch.int32)
        ctx.mark_non_differentiable(local_ids)
        ctx.save_for_backward(here)
        ctx.buffers, ctx.route = buffers, received.route
        ctx.with_weights, ctx.returning = outgoing.with_weights, outgoing.returning
        return received.x, local_ids, local_weights, received.counts, received.route

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, _: Any, grad_weights: Tensor, *__: Any) -> Any:
        """Every rank takes part: what its graph did not use of the outputs has a gradient of 0."""
        (here,) = ctx.saved_tensors
        rows = _dense(grad_x)
        weights = _dense(grad_weights.masked_fill(~here, 0.0)) if ctx.with_weights else None
        buffers, route, overlap = ctx.buffers, ctx.route, ctx.returning.overlap
        ctx.returning.begin(lambda: buffers.combine(rows, route, weights, overlap=overlap))
        return grad_x.new_empty(0), None, None


class _Combine(torch.autograd.Function):
    """Ends a combine of ``y`` that has begun."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, begun: Begun[Any], route: Any, buffers: Buffers) -> Tensor:
        ctx.buffers, ctx.route = buffers, route
        out: Tensor = begun.end()[0]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.buffers.repeat(_dense(grad), ctx.route), None, None, None


class DeepEPDispatcher:
    """Sends each token once to every rank that owns one of its experts, by DeepEP.

    What ``AllToAllDispatcher`` is, for bfloat16 on GPUs that NVLink and RDMA join: rank r owns the
    experts ``[r * E / P, (r + 1) * E / P)``, received tokens are in the order of their ranks and of
    their positions there, and it is differentiable in x and topk_weights, once. Sums are DeepEP's:
    not in the order of the ranks everywhere, nor always in float32, so results can differ from
    other transports' by rounding. Under torch.compile the calls break the graph.

    Every rank of the group must make the same calls in the same order, backward passes included; no
    call checks that. A rank that is missing is an error of DeepEP's, at its timeout.

    The dispatchers of a group share one buffer, made in the first dispatch and made again when a
    larger H, K or T asks for more; it is freed with the last of them, or by :meth:`close`.

    Args:
        group: the ranks, of a backend that carries CUDA tensors; ElasticBuffer wants NCCL.
        num_experts: E, a multiple of P.
        timeout: seconds that a rank waits for the others, rounded up; ElasticBuffer's alone.
            None for DeepEP's own: 300 on the host and 100 on the GPU, in Buffer 100.
        buffer: a ``deep_ep.Buffer`` or ``deep_ep.ElasticBuffer`` (``deterministic=True``) of this
            group to use in place of the shared one. It is neither enlarged nor freed here.
        interface: "elastic" for ElasticBuffer, "legacy" for Buffer, "auto" for the first of them
            that the installed DeepEP has.
        max_tokens: the largest T of any rank in any call. Without it ElasticBuffer, which needs to
            know, costs an all-reduce of the largest T before each dispatch.
        otherwise: carries the tensors that DeepEP does not take; None: they are an error.
        reason: why this transport, for :meth:`explain`.

    Raises:
        ImportError: deep_ep is not installed.
        ValueError: E not a multiple of P, or more ranks or experts than DeepEP has room for; for
            Buffer a number of ranks that it has no kernels for, or a timeout; a buffer that does
            not fit.
    """

    device_type: ClassVar[str] = "cuda"

    def __init__(
        self,
        group: ProcessGroup,
        num_experts: int,
        *,
        timeout: float | None = None,
        buffer: Any = None,
        interface: str = "auto",
        max_tokens: int | None = None,
        otherwise: OverlappingDispatcher | None = None,
        reason: str = "it was asked for",
    ) -> None:
        if not isinstance(group, ProcessGroup):
            raise TypeError(f"{OP}: group must be a ProcessGroup; got {type(group).__name__}")
        check_num_experts(OP, num_experts)
        if num_experts < 1 or num_experts % group.size():
            raise ValueError(
                f"{OP}: num_experts must be a positive multiple of the group's size "
                f"{group.size()}; got {num_experts}. Choose another Expert Parallel size, or "
                "transport 'process_group' with a placement."
            )
        if timeout is not None:
            check_timeout(OP, "timeout", timeout)
        if max_tokens is not None:
            check_count(OP, "max_tokens", max_tokens)
            if max_tokens < 1:
                raise ValueError(f"{OP}: max_tokens must be at least 1; got {max_tokens}")
        if interface not in ("auto", *INTERFACES):
            raise ValueError(
                f"{OP}: interface must be one of auto, {', '.join(INTERFACES)}; got {interface!r}"
            )
        deep_ep = load_deep_ep()
        if buffer is not None:
            interface = "legacy" if hasattr(buffer, "get_dispatch_layout") else "elastic"
        elif interface == "auto":
            interface = "elastic" if hasattr(deep_ep, "ElasticBuffer") else "legacy"
        self.interface = interface
        kind = INTERFACES[interface]
        if not hasattr(deep_ep, kind.name):
            raise ImportError(
                f"{OP}: interface '{interface}' needs deep_ep.{kind.name}, which the installed "
                "DeepEP does not have. Install version 2 or later, or leave interface 'auto'."
            )
        check_experts(kind.name, group.size(), num_experts, kind.limits)
        self._buffers: Buffers = (
            _buffers.find(deep_ep, kind, group, timeout)
            if buffer is None
            else kind(deep_ep, group, timeout, given=buffer)
        )
        self._ids_dtype = getattr(deep_ep, "topk_idx_t", torch.int64)
        self.group_name: str = group.group_name
        self.num_experts = num_experts
        self.num_ranks: int = group.size()
        self.timeout = timeout
        self.max_tokens = max_tokens
        self.otherwise = otherwise
        self.transport = "deepep"
        self._reason = reason

    def __repr__(self) -> str:
        return (
            f"DeepEPDispatcher(group={self.group_name!r}, num_ranks={self.num_ranks}, "
            f"num_experts={self.num_experts}, interface={self.interface!r}, timeout={self.timeout})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> DeepEPDispatcher:
        return self  # as of AllToAllDispatcher: copies of a module take turns in one group

    def __copy__(self) -> DeepEPDispatcher:
        return self

    def __reduce__(self) -> NoReturn:
        refuse_pickling("DeepEPDispatcher")

    def explain(self) -> str:
        """Which transport carries what, and why."""
        own = (
            f"deepep, by deep_ep.{INTERFACES[self.interface].name}, carries bfloat16 tensors of "
            f"GPUs: {self._reason}"
        )
        others: Any = getattr(self.otherwise, "explain", None)
        return own if others is None else f"{own}; of the rest, {others()}"

    def close(self) -> None:
        """Free the group's buffer, by all ranks together; a later dispatch makes another.

        Do so before the group is destroyed if dispatchers outlive it: ElasticBuffer uses its
        communicator.
        """
        self._buffers.close()

    def dispatch(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Dispatched:
        """Send tokens to their experts.

        Args:
            x: [T, H] bfloat16 on a GPU, any strides, T of 0 included. H a multiple of 256 for
                ElasticBuffer and for Buffer beyond 8 ranks (at most 7936), else of 16 (at most
                8176).
            topk_ids: [T, K] int32 or int64, in [0, E), K at most 32; -1 and E mean "no expert".
                For ElasticBuffer the experts of a token must differ.
            topk_weights: [T, K], any float dtype.

        Returns:
            :class:`Dispatched` with int32 ids and float32 weights, 0 for other ranks' slots.

        Raises:
            ValueError, TypeError: arguments that do not fit. The other ranks wait for this one.
        """
        if self.otherwise is not None and not self._takes(x, topk_ids):
            return self.otherwise.dispatch(x, topk_ids, topk_weights)
        self._check(x, topk_ids, topk_weights)
        return self._end_dispatch(self._begin_dispatch(x, topk_ids, topk_weights, overlap=False))

    def dispatch_async(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Pending[Dispatched]:
        """Begin :meth:`dispatch`, so that something else can be computed while tokens travel.

        ``wait()``, once and on the same stream, returns what ``dispatch`` does, with its gradients.
        The host has waited for the counts of all ranks before that; the tokens travel on DeepEP's
        stream.
        """
        if self.otherwise is not None and not self._takes(x, topk_ids):
            return self.otherwise.dispatch_async(x, topk_ids, topk_weights)
        self._check(x, topk_ids, topk_weights)
        outgoing = self._begin_dispatch(x, topk_ids, topk_weights, overlap=True)
        return Pending(lambda: self._end_dispatch(outgoing))

    def combine(self, y: Tensor, handle: Any) -> Tensor:
        """Send results back and add them.

        Args:
            y: [U, H] bfloat16, a row for each received token.
            handle: of the dispatch; any number may be in flight, and each may be used once more for
                every y.

        Returns:
            [T, H]: zero for a token without experts.

        Raises:
            ValueError, TypeError: the handle is of another group, or y does not fit it.
        """
        if self.otherwise is not None and not isinstance(handle, DeepEPHandle):
            return self.otherwise.combine(y, handle)
        self._check_combine(y, handle)
        return self._end_combine(*self._begin_combine(y, handle, overlap=False), handle)

    def combine_async(self, y: Tensor, handle: Any) -> Pending[Tensor]:
        """Begin :meth:`combine`, as :meth:`dispatch_async` does dispatch."""
        if self.otherwise is not None and not isinstance(handle, DeepEPHandle):
            return self.otherwise.combine_async(y, handle)
        self._check_combine(y, handle)
        begun = self._begin_combine(y, handle, overlap=True)
        return Pending(lambda: self._end_combine(*begun, handle))

    def _check_combine(self, y: Tensor, handle: DeepEPHandle) -> None:
        check_tensor("combine", "y", y, 2, "[U, H]")
        check_dtype("combine", "y", y, (torch.bfloat16,))
        if (handle.group, handle.interface) != (self.group_name, self.interface):
            raise ValueError(
                f"combine: handle is of group '{handle.group}' and deep_ep's {handle.interface} "
                f"interface; this dispatcher is of group '{self.group_name}', {self.interface}"
            )
        if y.shape[0] != handle.received:
            raise ValueError(
                f"combine: y must have a row for each of the {handle.received} tokens that its "
                f"dispatch received; got {shape(y)}"
            )

    def _takes(self, x: Tensor, topk_ids: Tensor) -> bool:
        """Whether DeepEP can carry x: told by what is the same on all ranks."""
        try:
            self._buffers.check_hidden(x.shape[-1])
        except ValueError:
            return False
        return (
            x.device.type == self.device_type
            and x.dtype == torch.bfloat16
            and topk_ids.shape[-1] <= MAX_TOP_K
        )

    def _check(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
        check_tensor("dispatch", "x", x, 2, "[T, H]")
        check_tensor("dispatch", "topk_ids", topk_ids, 2, "[T, K]")
        check_tensor("dispatch", "topk_weights", topk_weights, 2, "[T, K]")
        if x.device.type != self.device_type:
            raise ValueError(
                f"dispatch: DeepEP carries {self.device_type} tensors; x is on {x.device}. Use "
                "transport 'process_group'."
            )
        if x.dtype != torch.bfloat16:
            raise TypeError(
                f"dispatch: DeepEP carries bfloat16; x is {x.dtype}. Convert it, or use transport "
                "'process_group'."
            )
        check_dtype("dispatch", "topk_ids", topk_ids, (torch.int32, torch.int64))
        if topk_ids.shape[0] != x.shape[0] or not 1 <= topk_ids.shape[1] <= MAX_TOP_K:
            raise ValueError(
                f"dispatch: topk_ids must be [T, K] with T = {x.shape[0]} (x.shape[0]) and K from "
                f"1 to {MAX_TOP_K}; got {shape(topk_ids)}"
            )
        if topk_weights.shape != topk_ids.shape or not topk_weights.is_floating_point():
            raise ValueError(
                f"dispatch: topk_weights must be {shape(topk_ids)} like topk_ids, of a float "
                f"dtype; got {shape(topk_weights)}, {topk_weights.dtype}"
            )
        check_device("dispatch", "x", x, "topk_ids", topk_ids)
        check_device("dispatch", "x", x, "topk_weights", topk_weights)
        self._buffers.check_hidden(x.shape[1])

    @torch.compiler.disable(reason=_OPAQUE)
    def _begin_dispatch(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, *, overlap: bool
    ) -> _Outgoing:
        self._buffers.reserve(x, topk_ids.shape[1], self.max_tokens)
        valid = (topk_ids >= 0) & (topk_ids < self.num_experts)
        ids = torch.where(valid, topk_ids, -1).to(self._ids_dtype)
        if not x.shape[0]:
            ids = ids.new_full((1, ids.shape[1]), -1)
        rows = _dense(_at_least_one(x))
        weights = _dense(_at_least_one(topk_weights.to(torch.float32)))
        begun = self._buffers.dispatch(
            rows.detach(), _dense(ids), weights.detach(), self.num_experts, overlap=overlap
        )
        returning = _Returning(overlap)
        anchor = _BeginDispatch.apply(rows, weights, returning)
        return _Outgoing(begun, anchor, weights.requires_grad, returning, x.shape[0])

    @torch.compiler.disable(reason=_OPAQUE)
    def _end_dispatch(self, outgoing: _Outgoing) -> Dispatched:
        received, local_ids, weights, counts, route = _EndDispatch.apply(
            outgoing.anchor, outgoing, self._buffers
        )
        name, tokens = self.group_name, outgoing.tokens
        handle = DeepEPHandle(route, tokens, received.shape[0], name, self.interface)
        return Dispatched(received, local_ids, weights, handle, sum(counts))

    @torch.compiler.disable(reason=_OPAQUE)
    def _begin_combine(
        self, y: Tensor, handle: DeepEPHandle, *, overlap: bool
    ) -> tuple[Tensor, Begun[Any]]:
        rows = _dense(y)
        return rows, self._buffers.combine(rows.detach(), handle.route, overlap=overlap)

    @torch.compiler.disable(reason=_OPAQUE)
    def _end_combine(self, rows: Tensor, begun: Begun[Any], handle: DeepEPHandle) -> Tensor:
        out: Tensor = _Combine.apply(rows, begun, handle.route, self._buffers)
        return out if handle.tokens else out[:0]
