"""A stand-in for the package ``deep_ep``: its interface and its results, on CPUs by gloo.

Written from the signatures and docstrings of DeepEP 1.2 and 2.1. It checks what DeepEP's host code
and kernels assert of each call, and that all ranks make the same call with handles of the same
dispatch. It knows nothing of speed, streams and memory.

T tokens, H hidden size, K experts a token, E experts, P ranks, U tokens received.
"""

from __future__ import annotations

import sys
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


class _Ranks:
    """What a buffer does in its group."""

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

    def _scatter(self, rows: Tensor, in_rank: Tensor) -> list[Tensor]:
        return self._send([rows[mask] for mask in in_rank.T])

    def _sum(self, rows: Tensor, counts: list[int], in_rank: Tensor, order: list[int]) -> Tensor:
        """In float32, in the ``order`` of the ranks, rounded once."""
        parts = self._send(list(rows.split(counts)))
        out = torch.zeros(len(in_rank), rows.shape[1])
        for rank in order:
            out[in_rank[:, rank]] += parts[rank].float()
        return out.to(rows.dtype)

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

    def _check_rows(self, x: Tensor, rows: int, config: Any) -> None:
        _check(x, torch.bfloat16, rows, x.shape[1])
        assert x.shape[1] % 16 == 0
        assert isinstance(config, Config)
        needed = config.get_nvl_buffer_size_hint(2 * x.shape[1], self.group.size())
        assert needed <= self.num_nvl_bytes, "the buffer is too small"

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        assert not async_finish
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
        assert not async_finish
        assert not allocate_on_comm_stream
        assert len(x), "a pointer is null"
        size, hidden = self.group.size(), x.shape[1]
        if handle is not None:
            layout = (num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert)
            assert all(value is None for value in (*layout, topk_idx, topk_weights))
            serial, _, in_rank = self._open(handle, config)
            self._check_rows(x, len(in_rank), config)
            self._agree("repeat", serial=serial, hidden=hidden)
            return torch.cat(self._scatter(x, in_rank)), None, None, None, None, None
        assert topk_idx is not None
        assert topk_weights is not None
        assert num_tokens_per_expert is not None
        assert is_token_in_rank is not None
        assert num_tokens_per_rdma_rank is None
        assert config is not None
        top_k, experts = topk_idx.shape[1], num_tokens_per_expert.shape[0]
        assert top_k <= 32
        self._check_rows(x, len(topk_idx), config)
        _check(topk_idx, INDEX, len(x), top_k)
        _check(topk_weights, torch.float32, len(x), top_k)
        _check(num_tokens_per_expert, torch.int32, experts)
        _check(num_tokens_per_rank, torch.int32, size)
        _check(is_token_in_rank, torch.bool, len(x), size)
        assert torch.equal(is_token_in_rank, self._in_rank(topk_idx, experts))
        self.serial += 1
        facts = {"hidden": hidden, "top_k": top_k, "experts": experts}
        self._agree("dispatch", serial=self.serial, **facts)
        parts = self._scatter(x, is_token_in_rank)
        local = self._local(torch.cat(self._scatter(topk_idx, is_token_in_rank)), experts)
        weights = torch.cat(self._scatter(topk_weights, is_token_in_rank))
        counts = torch.bincount(local[local >= 0], minlength=experts // size).tolist()
        per_source = torch.tensor([len(part) for part in parts], dtype=torch.int32)
        channels = torch.zeros(size, config.num_sms // 2, dtype=torch.int32)
        head = torch.full((len(x), size), self.serial, dtype=torch.int32)
        source = torch.zeros(len(local), dtype=torch.int32)
        route = (per_source, channels, channels.clone(), source, is_token_in_rank, head)
        weights = weights.masked_fill(local < 0, 0.0)
        return torch.cat(parts), local, weights, counts, route, None

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
        assert not async_finish
        assert not allocate_on_comm_stream
        serial, counts, in_rank = self._open(handle, config)
        self._check_rows(x, sum(counts), config)
        with_weights = topk_weights is not None
        self._agree("combine", serial=serial, hidden=x.shape[1], weights=with_weights)
        order = list(range(self.group.size()))
        out = self._sum(x, counts, in_rank, order)
        if topk_weights is None:
            return out, None, None
        _check(topk_weights, torch.float32, len(x), topk_weights.shape[1])
        return out, self._sum(topk_weights, counts, in_rank, order), None


class EPHandle:
    """Of ElasticBuffer."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


class ElasticBuffer(_Ranks):
    """The interface of 2.0 and 2.1, but for what is not experts' dispatch."""

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

    def _check_rows(self, x: Tensor, rows: int, most: int, top_k: int) -> None:
        _check(x, torch.bfloat16, rows, x.shape[1])
        assert x.shape[1] % 256 == 0
        needed = self.get_buffer_size_hint(self.group, most, x.shape[1], top_k)
        assert needed <= self.num_bytes, "the buffer is too small"

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
        assert not async_with_compute_stream
        assert not allocate_on_comm_stream
        assert not do_expand
        assert len(x), "a pointer is null"
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            assert num_sms == handle.num_sms, "another number of SMs than the handle's"
            most, top_k = handle.num_max_tokens_per_rank, handle.topk_idx.shape[1]
            self._check_rows(x, len(handle.topk_idx), most, top_k)
            self._agree("repeat", serial=handle.serial, hidden=x.shape[1])
            rows = torch.cat(self._scatter(x, handle.in_rank))
            return self._arrange(rows, handle.serial), None, None, handle, None
        assert topk_idx is not None
        assert topk_weights is not None
        assert num_experts is not None, "the number of SMs depends on it"
        most = num_max_tokens_per_rank or self.num_max_tokens_per_rank
        assert len(x) <= most
        top_k = topk_idx.shape[1]
        assert top_k <= 32
        self._check_rows(x, len(topk_idx), most, top_k)
        _check(topk_idx, INDEX, len(x), top_k)
        _check(topk_weights, torch.float32, len(x), top_k)
        for row in topk_idx.tolist():
            chosen = [expert for expert in row if expert >= 0]
            assert len(chosen) == len(set(chosen)), "an expert twice in a token"
        self.serial += 1
        facts = {"hidden": x.shape[1], "top_k": top_k, "experts": num_experts, "most": most}
        self._agree("dispatch", serial=self.serial, **facts)
        in_rank = self._in_rank(topk_idx, num_experts)
        parts = self._scatter(x, in_rank)
        local = self._local(torch.cat(self._scatter(topk_idx, in_rank)), num_experts)
        here = num_experts // self.group.size()
        route = EPHandle(
            num_sms=_SMS + num_experts,
            num_max_tokens_per_rank=most,
            topk_idx=topk_idx.clone() if do_handle_copy else topk_idx,
            num_recv_tokens_per_expert_list=torch.bincount(
                local[local >= 0], minlength=here
            ).tolist(),
            serial=self.serial,
            in_rank=in_rank,
            counts=[len(part) for part in parts],
        )
        # The weights of other ranks' slots come too.
        weights = torch.cat(self._scatter(topk_weights, in_rank))
        arranged = [self._arrange(part, self.serial) for part in (torch.cat(parts), local, weights)]
        return *arranged, route, None

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
        assert not async_with_compute_stream
        assert not allocate_on_comm_stream
        top_k = handle.topk_idx.shape[1]
        self._check_rows(x, sum(handle.counts), handle.num_max_tokens_per_rank, top_k)
        with_weights = topk_weights is not None
        self._agree("combine", serial=handle.serial, hidden=x.shape[1], weights=with_weights)
        x = self._arrange(x, -handle.serial)
        # Not in the order of the ranks.
        order = list(reversed(range(self.group.size())))
        out = self._sum(x, handle.counts, handle.in_rank, order)
        if topk_weights is None:
            return out, None, None
        _check(topk_weights, torch.float32, len(x), top_k)
        weights = self._arrange(topk_weights, -handle.serial)
        return out, self._sum(weights, handle.counts, handle.in_rank, order), None
