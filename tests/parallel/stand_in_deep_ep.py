"""A stand-in for the package ``deep_ep``: its interface and its results, on CPUs by gloo.

Written from the signatures and docstrings of DeepEP 1.2 and 2.1. It checks what DeepEP's host code
and kernels assert of each call, and that all ranks make the same call with handles of the same
dispatch. What a call brings that the current stream does not wait for is not there before its event
was waited for. It knows nothing else of streams, and nothing of speed and memory.

T tokens, H hidden size, K experts a token, E experts, P ranks, U tokens received.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

CALLS: list[tuple[str, dict[str, Any]]] = []  # of this process, which runs one test
INDEX = torch.int64
_SMS = 20


def install(version: int) -> ModuleType:
    """Make ``import deep_ep`` find the stand-in: 1 has no ElasticBuffer and no topk_idx_t."""
    module: Any = ModuleType("deep_ep")
    module.Buffer, module.Config = Buffer, Config
    if version == 2:
        module.ElasticBuffer, module.EPHandle, module.topk_idx_t = ElasticBuffer, EPHandle, INDEX
    sys.modules["deep_ep"] = module
    return module


def _check(tensor: Any, dtype: torch.dtype, *sizes: int) -> None:
    assert isinstance(tensor, Tensor)
    assert tensor.dtype == dtype, f"{tensor.dtype}, not {dtype}"
    assert tensor.is_contiguous()
    assert tuple(tensor.shape) == sizes, f"{tuple(tensor.shape)}, not {sizes}"
    assert tensor.data_ptr() % 16 == 0
    assert tensor.data_ptr() or not sizes[0]


class EventOverlap:
    """Of a call: whether the current stream has waited for it."""

    def __init__(self, fill: Callable[[], None] | None) -> None:
        self.fill = fill

    def current_stream_wait(self) -> None:
        assert self.fill is not None, "no event of this call, or it was waited for already"
        self.fill()
        self.fill = None


class _Ranks:
    """What a buffer does in its group, whichever the interface."""

    multiple: ClassVar[int]  # H is one of it

    def __init__(self, group: ProcessGroup, explicitly_destroy: bool) -> None:
        self.group = group
        self.explicitly_destroy = explicitly_destroy
        self.destroyed = False
        self.serial = 0
        self._agree("create")

    def destroy(self) -> None:
        assert self.explicitly_destroy
        assert not self.destroyed
        self._agree("destroy")
        self.destroyed = True

    def _agree(self, call: str, **facts: Any) -> None:
        """All ranks are here, in the same call of the same buffer."""
        assert not self.destroyed, "the buffer was destroyed"
        said: list[Any] = [None] * self.group.size()
        mine = (type(self).__name__, call, facts)
        dist.all_gather_object(said, mine, self.group)
        assert said == [mine] * len(said), f"the ranks differ: {said}"
        CALLS.append((call, facts))

    def _send(self, parts: list[Tensor]) -> list[Tensor]:
        """Part r goes to rank r; what comes, by rank."""
        sent = torch.tensor([len(part) for part in parts])
        counts = torch.empty_like(sent)
        dist.all_to_all_single(counts, sent, group=self.group)
        out = parts[0].new_empty(int(counts.sum()), *parts[0].shape[1:])
        dist.all_to_all_single(
            out, torch.cat(parts), counts.tolist(), sent.tolist(), group=self.group
        )
        return list(out.split(counts.tolist()))

    def _scatter(self, rows: Tensor, in_rank: Tensor) -> Tensor:
        return torch.cat(self._send([rows[mask] for mask in in_rank.T]))

    def _sum(self, rows: Tensor, counts: list[int], in_rank: Tensor, order: list[int]) -> Tensor:
        """In float32, in the ``order`` of the ranks, rounded once."""
        parts = self._send(list(rows.split(counts)))
        out = torch.zeros(len(in_rank), rows.shape[1])
        for rank in order:
            out[in_rank[:, rank]] += parts[rank].float()
        return out.to(rows.dtype)

    def _check_streams(self, *events: Any, allocate_on_comm_stream: bool) -> None:
        """No event goes in: a call follows the current stream, and allocates there."""
        assert all(event is None for event in events)
        assert not allocate_on_comm_stream

    def _bring(self, overlap: bool, *results: Any) -> tuple[Any, ...]:
        """The results and their event; if the stream goes on meanwhile, they come with its wait."""
        if not overlap:
            return *results, EventOverlap(None)
        hidden = [r.clone() if isinstance(r, Tensor) else r for r in results]

        def fill() -> None:
            for to, value in zip(results, hidden, strict=True):
                if isinstance(to, Tensor):
                    to.copy_(value)

        for result in results:
            if isinstance(result, Tensor):
                result.fill_(float("nan") if result.is_floating_point() else 12345)
        return *results, EventOverlap(fill)

    def _check_rows(self, x: Tensor, rows: int, needed_bytes: int, has_bytes: int) -> None:
        _check(x, torch.bfloat16, rows, x.shape[1])
        assert x.shape[1] % self.multiple == 0
        assert needed_bytes <= has_bytes, "the buffer is too small"

    def _check_routing(self, x: Tensor, topk_idx: Any, topk_weights: Any) -> tuple[Tensor, Tensor]:
        assert len(x), "a pointer is null"
        assert topk_idx is not None
        assert topk_weights is not None
        assert topk_idx.shape[1] <= 32
        _check(topk_idx, INDEX, len(x), topk_idx.shape[1])
        _check(topk_weights, torch.float32, len(x), topk_idx.shape[1])
        return topk_idx, topk_weights

    def _deliver(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, experts: int, **facts: Any
    ) -> tuple[Tensor, Tensor, Tensor, list[int], list[int], Tensor]:
        """x, local ids, weights of all slots, rows by expert and by rank, and who gets a token."""
        self.serial += 1
        facts = {"hidden": x.shape[1], "top_k": topk_idx.shape[1], "experts": experts, **facts}
        self._agree("dispatch", serial=self.serial, **facts)
        in_rank = self._in_rank(topk_idx, experts)
        parts = self._send([x[mask] for mask in in_rank.T])
        local = self._local(self._scatter(topk_idx, in_rank), experts)
        weights = self._scatter(topk_weights, in_rank)
        by_expert = torch.bincount(local[local >= 0], minlength=experts // self.group.size())
        by_rank = [len(part) for part in parts]
        return torch.cat(parts), local, weights, by_expert.tolist(), by_rank, in_rank

    def _repeat(self, x: Tensor, serial: int, in_rank: Tensor) -> Tensor:
        assert len(x), "a pointer is null"
        self._agree("repeat", serial=serial, hidden=x.shape[1])
        return self._scatter(x, in_rank)

    def _return(
        self,
        x: Tensor,
        topk_weights: Tensor | None,
        serial: int,
        counts: list[int],
        in_rank: Tensor,
        order: list[int],
    ) -> tuple[Tensor, Tensor | None]:
        with_weights = topk_weights is not None
        self._agree("combine", serial=serial, hidden=x.shape[1], weights=with_weights)
        out = self._sum(x, counts, in_rank, order)
        if topk_weights is None:
            return out, None
        _check(topk_weights, torch.float32, len(x), topk_weights.shape[1])
        return out, self._sum(topk_weights, counts, in_rank, order)

    def _in_rank(self, ids: Tensor, num_experts: int) -> Tensor:
        size = self.group.size()
        assert num_experts % size == 0
        assert ((ids >= -1) & (ids < num_experts)).all(), "ids outside [-1, E)"
        owner = torch.where(ids >= 0, ids // (num_experts // size), -1)
        return (owner[:, :, None] == torch.arange(size)).any(1)

    def _local(self, ids: Tensor, num_experts: int) -> Tensor:
        here = num_experts // self.group.size()
        local = ids - self.group.rank() * here
        return torch.where((ids >= 0) & (local >= 0) & (local < here), local, -1)


class Config:
    """Positional, as DeepEP's."""

    def __init__(self, num_sms: int, *chunks: int) -> None:
        assert len(chunks) == 4
        self.num_sms, self.chunk = num_sms, chunks[1]

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return self.num_sms // 2 * num_ranks * self.chunk * (hidden_bytes + 2048)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0 if num_ranks <= 8 else self.get_nvl_buffer_size_hint(hidden_bytes, num_ranks)


class Buffer(_Ranks):
    """The legacy interface. A handle is six tensors; the last but one tells the ranks."""

    num_sms: ClassVar[int] = _SMS
    multiple = 16

    def __init__(
        self,
        group: ProcessGroup,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
    ) -> None:
        assert num_nvl_bytes > 0
        assert num_nvl_bytes % 128 == 0
        assert num_rdma_bytes == 0, "for more than 8 ranks"
        assert not low_latency_mode
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        super().__init__(group, explicitly_destroy)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8), f"Unsupported number of EP ranks: {num_ranks}"
        return Config(Buffer.num_sms, 6, 256, 6, 128)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8), f"Unsupported number of EP ranks: {num_ranks}"
        return Config(Buffer.num_sms, 4, 256, 6, 128)

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        assert new_num_sms % 2 == 0
        Buffer.num_sms = new_num_sms

    def _check_buffer(self, x: Tensor, rows: int, config: Any) -> None:
        assert isinstance(config, Config)
        needed = config.get_nvl_buffer_size_hint(2 * x.shape[1], self.group.size())
        self._check_rows(x, rows, needed, self.num_nvl_bytes)

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        self._check_streams(previous_event, allocate_on_comm_stream=allocate_on_comm_stream)
        assert not async_finish, "what follows needs it"
        assert len(topk_idx), "a pointer is null"
        _check(topk_idx, INDEX, *topk_idx.shape)
        in_rank = self._in_rank(topk_idx, num_experts)
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts)
        return in_rank.sum(0, dtype=torch.int32), None, per_expert.int(), in_rank, None

    def dispatch(
        self,
        x: Tensor,
        handle: tuple[Tensor, ...] | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        assert expert_alignment == 1
        assert not num_worst_tokens
        self._check_streams(previous_event, allocate_on_comm_stream=allocate_on_comm_stream)
        size = self.group.size()
        if handle is not None:
            layout = (num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert)
            assert all(value is None for value in (*layout, topk_idx, topk_weights))
            serial, _, in_rank = self._open(handle, config)
            self._check_buffer(x, len(in_rank), config)
            rows = self._repeat(x, serial, in_rank)
            return self._bring(async_finish, rows, None, None, None, None)
        ids, sent_weights = self._check_routing(x, topk_idx, topk_weights)
        assert num_tokens_per_expert is not None
        assert is_token_in_rank is not None
        assert num_tokens_per_rdma_rank is None
        assert config is not None
        experts = num_tokens_per_expert.shape[0]
        self._check_buffer(x, len(ids), config)
        _check(num_tokens_per_expert, torch.int32, experts)
        _check(num_tokens_per_rank, torch.int32, size)
        _check(is_token_in_rank, torch.bool, len(x), size)
        assert torch.equal(is_token_in_rank, self._in_rank(ids, experts))
        rows, local, weights, by_expert, by_rank, in_rank = self._deliver(
            x, ids, sent_weights, experts
        )
        channels = torch.zeros(size, config.num_sms // 2, dtype=torch.int32)
        head = torch.full((len(x), size), self.serial, dtype=torch.int32)
        source = torch.zeros(len(local), dtype=torch.int32)
        per_source = torch.tensor(by_rank, dtype=torch.int32)
        route = (per_source, channels, channels.clone(), source, in_rank, head)
        weights = weights.masked_fill(local < 0, 0.0)
        return self._bring(async_finish, rows, local, weights, by_expert, route)

    def _open(self, handle: Any, config: Any) -> tuple[int, list[int], Tensor]:
        per_source, channels, _, _, in_rank, head = handle
        assert channels.shape[1] == config.num_sms // 2, "another number of SMs than the handle's"
        return int(head[0, 0]), per_source.tolist(), in_rank

    def combine(
        self,
        x: Tensor,
        handle: tuple[Tensor, ...],
        topk_weights: Tensor | None = None,
        bias: Any = None,
        config: Config | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        assert bias is None
        self._check_streams(previous_event, allocate_on_comm_stream=allocate_on_comm_stream)
        serial, counts, in_rank = self._open(handle, config)
        self._check_buffer(x, sum(counts), config)
        order = list(range(self.group.size()))
        sums = self._return(x, topk_weights, serial, counts, in_rank, order)
        return self._bring(async_finish, *sums)


class EPHandle:
    """Of ElasticBuffer."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


class ElasticBuffer(_Ranks):
    """The interface of 2.0 and 2.1, but for what is not experts' dispatch."""

    multiple = 256

    def __init__(
        self,
        group: ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        sizes = (num_max_tokens_per_rank, hidden, num_topk)
        self.num_bytes = num_bytes or self.get_buffer_size_hint(group, *sizes)
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.deterministic = deterministic
        assert isinstance(num_cpu_timeout_secs, int)
        assert isinstance(num_gpu_timeout_secs, int)
        self.timeouts = (num_cpu_timeout_secs, num_gpu_timeout_secs)
        super().__init__(group, explicitly_destroy)

    @staticmethod
    def get_buffer_size_hint(
        group: ProcessGroup,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        assert num_max_tokens_per_rank > 0
        assert hidden > 0
        row = 2 * hidden + 8 * (num_topk or 32)
        return -(-group.size() * num_max_tokens_per_rank * row // 2**21) * 2**21

    def _check_buffer(self, x: Tensor, rows: int, most: int, top_k: int) -> None:
        needed = self.get_buffer_size_hint(self.group, most, x.shape[1], top_k)
        self._check_rows(x, rows, needed, self.num_bytes)

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Any, ...]:
        events = (previous_event, previous_event_before_epilogue)
        self._check_streams(*events, allocate_on_comm_stream=allocate_on_comm_stream)
        assert not do_expand
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            assert num_sms == handle.num_sms, "another number of SMs than the handle's"
            most, top_k = handle.num_max_tokens_per_rank, handle.topk_idx.shape[1]
            self._check_buffer(x, len(handle.topk_idx), most, top_k)
            rows = self._arrange(self._repeat(x, handle.serial, handle.in_rank), handle.serial)
            return self._bring(async_with_compute_stream, rows, None, None, handle)
        ids, sent_weights = self._check_routing(x, topk_idx, topk_weights)
        assert num_experts is not None, "the number of SMs depends on it"
        most = num_max_tokens_per_rank or self.num_max_tokens_per_rank
        assert len(x) <= most
        self._check_buffer(x, len(ids), most, ids.shape[1])
        for row in ids.tolist():
            chosen = [expert for expert in row if expert >= 0]
            assert len(chosen) == len(set(chosen)), "an expert twice in a token"
        # The weights of other ranks' slots come too.
        *arrived, by_expert, by_rank, in_rank = self._deliver(
            x, ids, sent_weights, num_experts, most=most
        )
        route = EPHandle(
            num_sms=_SMS + num_experts,
            num_max_tokens_per_rank=most,
            topk_idx=ids.clone() if do_handle_copy else ids,
            num_recv_tokens_per_expert_list=by_expert,
            serial=self.serial,
            in_rank=in_rank,
            counts=by_rank,
        )
        arranged = [self._arrange(part, self.serial) for part in arrived]
        return self._bring(async_with_compute_stream, *arranged, route)

    def _arrange(self, rows: Tensor, serial: int) -> Tensor:
        """As they happen to come, another order in each dispatch, unless deterministic."""
        return rows if self.deterministic else rows.roll(serial, 0)

    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Any = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        assert isinstance(handle, EPHandle)
        assert bias is None
        assert num_sms in (0, handle.num_sms)
        events = (previous_event, previous_event_before_epilogue)
        self._check_streams(*events, allocate_on_comm_stream=allocate_on_comm_stream)
        serial, top_k = handle.serial, handle.topk_idx.shape[1]
        self._check_buffer(x, sum(handle.counts), handle.num_max_tokens_per_rank, top_k)
        x = self._arrange(x, -serial)
        if topk_weights is not None:
            _check(topk_weights, torch.float32, len(x), top_k)
            topk_weights = self._arrange(topk_weights, -serial)
        # Not in the order of the ranks.
        order = list(reversed(range(self.group.size())))
        sums = self._return(x, topk_weights, serial, handle.counts, handle.in_rank, order)
        return self._bring(async_with_compute_stream, *sums)
