"""The two interfaces of DeepEP behind one: what a dispatcher needs of a buffer.

Served are ``deep_ep.Buffer`` (with ``explicitly_destroy``, from July 2025: 1.2, and the legacy part
of 2.0 and 2.1), by its kernels for many tokens, and ``deep_ep.ElasticBuffer`` of 2.0 and 2.1. A
call follows what is on the current stream, by no event of ours; what it brings is ready on that
stream when :class:`Begun` has ended.

T tokens, H hidden size, K experts a token, E experts, P ranks, U tokens received. ``route`` is what
DeepEP calls a handle: a tuple of tensors, or an ``EPHandle``.
"""

from __future__ import annotations

import importlib
import logging
import math
import weakref
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

OP = "DeepEPDispatcher"
MAX_TOP_K = 32  # a warp of CUDA has a lane for each


def load_deep_ep() -> Any:
    """The package ``deep_ep``.

    Raises:
        ImportError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module("deep_ep")
    except ImportError as error:
        raise ImportError(
            f"{OP}: transport 'deepep' needs the package deep_ep, which cannot be imported "
            f"({error}). Build it in this environment, from https://github.com/deepseek-ai/DeepEP: "
            "`python setup.py install`, after the NCCL or NVSHMEM that its README asks for; or use "
            "transport 'process_group'."
        ) from error


class Received(NamedTuple):
    """x [U, H], topk_ids and topk_weights [U, K], rows for each expert here, and the way back."""

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    counts: list[int]
    route: Any


class Begun(Generic[Result]):
    """A call whose kernels are launched, on DeepEP's own stream.

    Args:
        result: what it brings; of no use before it has ended.
        event: DeepEP's ``EventOverlap``, or None where the current stream waits already.
    """

    def __init__(self, result: Result, event: Any) -> None:
        self._result: Result | None = result
        self._event = event

    def end(self) -> Result:
        """Have the current stream wait; once. ElasticBuffer brings its rows into order then."""
        result, self._result = self._result, None
        if result is None:
            raise RuntimeError(f"{OP}: this call has ended already; wait for it once")
        if self._event is not None:
            self._event.current_stream_wait()
        return result


class Buffers(Protocol):
    """DeepEP's memory in one group, made and enlarged as needed by calls of all its ranks."""

    def check_hidden(self, hidden: int) -> None:
        """Raise a ValueError if DeepEP's kernels cannot carry rows of this size."""

    def reserve(self, x: Tensor, top_k: int, max_tokens: int | None) -> None:
        """Have room for ``x [T, H]`` with T up to ``max_tokens``, the same on all ranks."""

    def dispatch(
        self, x: Tensor, ids: Tensor, weights: Tensor, num_experts: int, *, overlap: bool
    ) -> Begun[Received]:
        """Send ``x [T, H]`` to the ranks of the experts ``ids [T, K]``.

        With ``overlap`` the current stream goes on meanwhile, here and in combine.
        """

    def repeat(self, x: Tensor, route: Any) -> Tensor:
        """Send ``x [T, H]`` the way of an earlier dispatch."""

    def combine(
        self, y: Tensor, route: Any, weights: Tensor | None = None, *, overlap: bool = False
    ) -> Begun[tuple[Tensor, Tensor | None]]:
        """Add the rows ``y [U, H]``, and the ``weights [U, K]``, at the tokens they came from."""

    def close(self) -> None:
        """Free the memory; all ranks together. It is made again when needed."""


class _Owned:
    """A buffer of DeepEP's, ended when its owner is: its end is a call of all ranks."""

    def __init__(self, group: ProcessGroup, given: Any) -> None:
        self.group = group
        self.given = given is not None
        self._buffer = given
        self._end: Any = lambda: None

    @property
    def buffer(self) -> Any:
        if self._buffer is None:
            raise RuntimeError(
                f"{OP}: the buffer of group '{self.group.group_name}' was closed, and what was in "
                "flight is lost. Close it after the last backward."
            )
        return self._buffer

    def _replace(self, make: Any, **options: Any) -> None:
        """Make a buffer in the place of the present one, whose memory may be needed for it."""
        self.close()
        self._buffer = make(self.group, **options, explicitly_destroy=True)
        self._end = weakref.finalize(self, self._buffer.destroy)
        # At exit the other ranks may be gone, and the system frees what there is.
        self._end.atexit = False
        logger.info(
            "dispatch in group '%s': made a deep_ep.%s with %s",
            self.group.group_name,
            make.__name__,
            options,
        )

    def close(self) -> None:
        if not self.given:
            self._buffer = None
            self._end()


def check_experts(name: str, ranks: int, experts: int, limits: dict[str, int]) -> None:
    """Raise a ValueError if there are more than DeepEP has room for: its kernels would stop."""
    has = {"P": ranks, "E": experts, "E / P": experts // ranks}
    if any(has[what] > most for what, most in limits.items()):
        most = ", ".join(f"{what} <= {most}" for what, most in limits.items())
        raise ValueError(
            f"{OP}: deep_ep.{name} needs {most}; got P = {ranks} ranks and E = {experts} experts. "
            "Use transport 'process_group'."
        )


class LegacyBuffers(_Owned):
    """``deep_ep.Buffer``."""

    name = "Buffer"
    limits: ClassVar[dict[str, int]] = {"E / P": 1024}

    def __init__(
        self, deep_ep: Any, group: ProcessGroup, timeout: float | None, given: Any = None
    ) -> None:
        super().__init__(group, given)
        if timeout is not None:
            raise ValueError(
                f"{OP}: deep_ep.Buffer has no timeout that can be set (it gives up after about 100 "
                f"seconds), but timeout = {timeout} was asked for. Leave it None."
            )
        self._make = deep_ep.Buffer
        size = group.size()
        try:
            # Once: they depend on Buffer.num_sms, and a route is good for one number alone.
            self._configs = [
                deep_ep.Buffer.get_dispatch_config(size),
                deep_ep.Buffer.get_combine_config(size),
            ]
        except AssertionError as error:
            raise ValueError(
                f"{OP}: deep_ep.Buffer has no kernels for a group of {size} ranks. Choose another "
                "Expert Parallel size, or transport 'process_group'."
            ) from error

    def check_hidden(self, hidden: int) -> None:
        # Within a machine, of 8 ranks at most, a row travels in two halves of 16-byte pieces, else
        # in pieces of a warp; either has to fit the shared memory of a warp.
        step, most = (16, 8176) if self.group.size() <= 8 else (256, 7936)
        if hidden % step or hidden > most:
            raise ValueError(
                f"dispatch: deep_ep.Buffer with {self.group.size()} ranks needs H to be a multiple "
                f"of {step}, at most {most}; x has H = {hidden}. Use transport 'process_group'."
            )

    def reserve(self, x: Tensor, top_k: int, max_tokens: int | None) -> None:
        row, size = x.shape[1] * x.element_size(), self.group.size()
        nvl = max(config.get_nvl_buffer_size_hint(row, size) for config in self._configs)
        rdma = max(config.get_rdma_buffer_size_hint(row, size) for config in self._configs)
        has = self._buffer
        if has is not None and has.num_nvl_bytes >= nvl and has.num_rdma_bytes >= rdma:
            return
        if self.given:
            raise ValueError(
                f"dispatch: H = {x.shape[1]} needs a buffer with num_nvl_bytes = {nvl} and "
                f"num_rdma_bytes = {rdma} at least; the one given has {has.num_nvl_bytes} and "
                f"{has.num_rdma_bytes}"
            )
        self._replace(self._make, num_nvl_bytes=nvl, num_rdma_bytes=rdma)

    def dispatch(
        self, x: Tensor, ids: Tensor, weights: Tensor, num_experts: int, *, overlap: bool
    ) -> Begun[Received]:
        per_rank, per_rdma_rank, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(
            ids, num_experts
        )
        rows, local_ids, local_weights, counts, route, event = self.buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=ids,
            topk_weights=weights,
            config=self._configs[0],
            async_finish=overlap,
        )
        received = Received(rows, local_ids, local_weights, counts, route)
        return Begun(received, event if overlap else None)

    def repeat(self, x: Tensor, route: Any) -> Tensor:
        received: Tensor = self.buffer.dispatch(x, handle=route, config=self._configs[0])[0]
        return received

    def combine(
        self, y: Tensor, route: Any, weights: Tensor | None = None, *, overlap: bool = False
    ) -> Begun[tuple[Tensor, Tensor | None]]:
        *sums, event = self.buffer.combine(
            y, route, topk_weights=weights, config=self._configs[1], async_finish=overlap
        )
        return Begun((sums[0], sums[1]), event if overlap else None)


class _Room(NamedTuple):
    """What an ElasticBuffer was made for."""

    tokens: int = 0
    hidden: int = 0
    top_k: int = 0


class ElasticBuffers(_Owned):
    """``deep_ep.ElasticBuffer``, in its layout of a row a token and with repeatable order."""

    name = "ElasticBuffer"
    limits: ClassVar[dict[str, int]] = {"P": 1024, "E": 2048, "E / P": 256}

    def __init__(
        self, deep_ep: Any, group: ProcessGroup, timeout: float | None, given: Any = None
    ) -> None:
        super().__init__(group, given)
        self._make = deep_ep.ElasticBuffer
        self._room = _Room(tokens=getattr(given, "num_max_tokens_per_rank", 0))
        self._options: dict[str, int] = {"deterministic": True}
        if timeout is not None:
            seconds = math.ceil(timeout)
            self._options |= {"num_cpu_timeout_secs": seconds, "num_gpu_timeout_secs": seconds}
        if given is not None and not self._room.tokens:
            raise ValueError(
                f"{OP}: an ElasticBuffer must be made with num_max_tokens_per_rank, the most "
                "tokens that any rank brings; the one given has 0"
            )
        # Recomputed rows would else meet gradients in another order (2.0 does not tell).
        if not getattr(given, "deterministic", True):
            raise ValueError(
                f"{OP}: an ElasticBuffer must be made with deterministic=True; the one given is not"
            )

    def check_hidden(self, hidden: int) -> None:
        if hidden % 256:
            raise ValueError(
                "dispatch: deep_ep.ElasticBuffer needs H to be a multiple of 256; x has H = "
                f"{hidden}. Use transport 'process_group'."
            )

    def reserve(self, x: Tensor, top_k: int, max_tokens: int | None) -> None:
        if self.given:
            max_tokens = self._room.tokens
        if max_tokens is None:
            # Kernels are compiled for a number of tokens, so there should be few.
            max_tokens = 1 << (max(self._most_tokens(x), 128) - 1).bit_length()
        elif x.shape[0] > max_tokens:
            raise ValueError(
                f"dispatch: x must have at most {max_tokens} tokens, for which there is room; got "
                f"{x.shape[0]}"
            )
        wanted = _Room(max_tokens, x.shape[1], top_k)
        room = _Room(*map(max, self._room, wanted))
        if room == self._room and self._buffer is not None:
            return
        needed = self._make.get_buffer_size_hint(
            self.group, room.tokens, room.hidden, num_topk=room.top_k
        )
        if self._buffer is None or self._buffer.num_bytes < needed:
            if self.given:
                raise ValueError(
                    f"dispatch: H = {room.hidden}, K = {room.top_k} and up to {room.tokens} tokens "
                    f"need a buffer of {needed} bytes; the one given has {self._buffer.num_bytes}"
                )
            self._replace(
                self._make,
                num_max_tokens_per_rank=room.tokens,
                hidden=room.hidden,
                num_topk=room.top_k,
                **self._options,
            )
        self._room = room

    def _most_tokens(self, x: Tensor) -> int:
        """The largest T of all ranks; waits for them."""
        tokens = torch.tensor(x.shape[0], device=x.device)
        dist.all_reduce(tokens, dist.ReduceOp.MAX, self.group)
        return int(tokens)

    def close(self) -> None:
        super().close()
        if not self.given:
            self._room = _Room()

    def dispatch(
        self, x: Tensor, ids: Tensor, weights: Tensor, num_experts: int, *, overlap: bool
    ) -> Begun[Received]:
        rows, local_ids, local_weights, route, event = self.buffer.dispatch(
            x,
            topk_idx=ids,
            topk_weights=weights,
            num_experts=num_experts,
            num_max_tokens_per_rank=self._room.tokens,
            async_with_compute_stream=overlap,
        )
        counts = route.num_recv_tokens_per_expert_list
        received = Received(rows, local_ids, local_weights, counts, route)
        return Begun(received, event if overlap else None)

    def repeat(self, x: Tensor, route: Any) -> Tensor:
        # With its number of SMs: what 0 stands for takes the number of experts, not given here.
        received: Tensor = self.buffer.dispatch(x, handle=route, num_sms=route.num_sms)[0]
        return received

    def combine(
        self, y: Tensor, route: Any, weights: Tensor | None = None, *, overlap: bool = False
    ) -> Begun[tuple[Tensor, Tensor | None]]:
        *sums, event = self.buffer.combine(
            y, handle=route, topk_weights=weights, async_with_compute_stream=overlap
        )
        return Begun((sums[0], sums[1]), event if overlap else None)


class BuffersOfGroups:
    """The buffers that the dispatchers of a group share, as long as any of them lives.

    Dispatchers, and the graphs they are in, own them; a group cannot, since DeepEP's buffers own
    their group.
    """

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[
            ProcessGroup, weakref.WeakValueDictionary[tuple[str, float | None], Any]
        ] = weakref.WeakKeyDictionary()

    def find(self, deep_ep: Any, kind: Any, group: ProcessGroup, timeout: float | None) -> Buffers:
        known = self._known.setdefault(group, weakref.WeakValueDictionary())
        key = (kind.name, timeout)
        buffers = known.get(key)
        if buffers is None:
            buffers = known[key] = kind(deep_ep, group, timeout)
        found: Buffers = buffers
        return found
