"""What the Triton launchers of a layer allocate: chunks change no bits, and peaks keep a bound.

T tokens, K experts a token, R = T * K slots, H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moe_kernels
from moe_kernels.triton import _combine, permute
from moe_kernels.triton import _fused_experts_backward as backward
from moe_kernels.triton.fused_experts import (
    fused_experts,
    fused_experts_backward,
    fused_experts_backward_,
)
from tests.conftest import HAS_GPU, TRITON, Implementation, triton_alone
from tests.kernels.test_triton_launchers import _case, _run
from tests.kernels.test_triton_launches import GATHER

# name: T, H, I, E, K; the published shapes of SonicMoE (arXiv:2512.14080), then some models' layers
SHAPES = {
    "sonic_768_256": (40960, 768, 256, 128, 8),
    "sonic_768_512": (40960, 768, 512, 64, 4),
    "sonic_768_1024": (40960, 768, 1024, 32, 2),
    "sonic_1536_256": (24576, 1536, 256, 128, 8),
    "sonic_1536_512": (24576, 1536, 512, 64, 4),
    "sonic_1536_1024": (24576, 1536, 1024, 32, 2),
    "sonic_4096_256": (32768, 4096, 256, 256, 16),
    "sonic_4096_512": (32768, 4096, 512, 128, 8),
    "sonic_4096_1024": (32768, 4096, 1024, 64, 4),
    "sonic_4096_512_16": (32768, 4096, 512, 256, 16),
    "sonic_4096_1024_8": (32768, 4096, 1024, 128, 8),
    "sonic_4096_2048": (32768, 4096, 2048, 64, 4),
    "qwen3_30b": (32768, 2048, 768, 128, 8),
    "qwen3_235b": (32768, 4096, 1536, 128, 8),
    "deepseek_v3": (32768, 7168, 2048, 256, 8),
    "gpt_oss_120b": (32768, 2880, 2880, 128, 4),
    "mixtral_8x7b": (32768, 4096, 14336, 8, 2),
}
# whose gradient of h, and what backward has beside it, are two buffers [R, H] or more
WIDE_EXPERTS = ("sonic_768_1024", "gpt_oss_120b", "mixtral_8x7b")
WIDER_THAN_TWO_BUFFERS = ("mixtral_8x7b",)  # their activations alone


impl = pytest.fixture(params=TRITON)(triton_alone)


class Allocations(TorchDispatchMode):
    """Bytes of the tensors made meanwhile that still live: the most at any time, and of one."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.largest = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def alive(self) -> int:
        return sum(size for ref, size in self._storages.values() if not ref.expired())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {v.untyped_storage()._cdata for v in tree_leaves(args) if isinstance(v, Tensor)}
        for value in tree_leaves(out):
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            if storage._cdata in given or storage._cdata in self._storages:
                continue
            self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, self.alive())
        return out


@contextmanager
def without_launches() -> Iterator[None]:
    from triton.runtime.interpreter import InterpretedFunction

    def skip(*args: Any, **kwargs: Any) -> None:  # a mock would keep what it was called with
        pass

    with mock.patch.object(InterpretedFunction, "run", skip):
        yield


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize(
    ("transposed", "dtype"),
    [(False, torch.bfloat16), (True, torch.float32)],
    ids=["rows", "columns"],
)
def test_chunks_change_no_bits(
    impl: Implementation,
    transposed: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs, upstream = _case(dtype, hidden=272, inner=264)
    for name in ("x", "topk_ids", "topk_weights"):
        inputs[name] = inputs[name][:40]
    upstream = upstream[:40]
    if transposed:
        for name in ("gate_up", "down"):
            inputs[name] = inputs[name].mT.contiguous().mT
    whole = _run(impl, inputs, upstream)
    monkeypatch.setattr(_combine, "WHOLE_BYTES", 0)
    monkeypatch.setattr(_combine, "CHUNK", 256)
    assert _combine.chunk_width(80, 272, 2) == 256
    assert _combine.backward_widths(80, 264, 272, 2) == (256, 256)
    chunked = _run(impl, inputs, upstream)
    for name, value in whole.items():
        assert torch.equal(value, chunked[name]), name


def test_rows_that_one_kernel_gathers_are_copied_once_for_the_others(
    impl: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for each part of the columns of I."""
    inputs, upstream = _case(torch.bfloat16, hidden=272, inner=264)
    upstream = upstream[:40].to(impl.device)
    leaves = {name: value.to(impl.device) for name, value in inputs.items()}
    for name in ("x", "topk_ids", "topk_weights"):
        leaves[name] = leaves[name][:40].contiguous()
    wanted = [leaves[name].requires_grad_() for name in ("x", "gate_up", "down", "topk_weights")]
    y = moe_kernels.fused_experts(**leaves)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, wanted, upstream, retain_graph=True)

    whole = gradients()
    monkeypatch.setattr(_combine, "WHOLE_BYTES", 0)
    monkeypatch.setattr(_combine, "CHUNK", 256)
    monkeypatch.setattr(permute, "pipelines_pointer_loads", lambda device: False)
    through_down, copy = backward._through_down, permute.permute
    copied: list[Tensor] = []
    parts: list[range] = []

    def plain(*args: Any) -> None:
        parts.append(args[6])
        with monkeypatch.context() as patch:
            patch.setattr(backward, "has_hopper_down_backward", lambda *args: False)
            through_down(*args)

    def counted(x: Tensor, *args: Any) -> Tensor:
        copied.append(x)
        return copy(x, *args)

    monkeypatch.setattr(backward, "has_hopper_down_backward", lambda *args: True)
    monkeypatch.setattr(backward, "gathers_grad", lambda *args: True)
    monkeypatch.setattr(backward, "_through_down", plain)
    monkeypatch.setattr(permute, "permute", counted)
    for value, right in zip(gradients(), whole, strict=True):
        assert torch.equal(value, right)
    assert parts == [range(256), range(256, 264)]
    assert sum(torch.equal(x, upstream) for x in copied) == 1


def test_chunks_are_few_and_only_of_large_buffers() -> None:
    assert _combine.chunk_width(2**13, 8192, 2) == 8192  # 128 MiB
    assert _combine.chunk_width(2**13 + 1, 8192, 2) == 2048
    for columns, width in ((768, 768), (2048, 2048), (2880, 1536), (4096, 2048), (7168, 1792)):
        assert _combine.chunk_width(2**18, columns, 2) == width
        assert _combine.chunk_width(2**10, columns, 2) == columns
    for inner, hidden, widths in (
        (1024, 2048, (1024, 2048)),
        (2048, 4096, (2048, 2048)),
        (1024, 1536, (512, 768)),
        (512, 768, (256, 256)),  # halves of 512 would just reach two buffers
        (850, 1024, (512, 512)),  # quarters would be needed
        (2880, 2880, (1536, 1536)),
    ):
        assert _combine.backward_widths(2**18, inner, hidden, 2) == widths
        assert _combine.backward_widths(2**10, inner, hidden, 2) == (inner, hidden)
    for inner, hidden, width in (
        (512, 768, 768),
        (1024, 768, 256),  # halves of 512 would just reach two buffers
        (768, 2048, 2048),
        (2880, 2880, 1536),
        (14336, 4096, 2048),  # activations that are larger than two buffers
    ):
        assert _combine.forward_width(2**18, inner, hidden, 2) == width
        assert _combine.forward_width(2**10, inner, hidden, 2) == hidden


@pytest.mark.skipif(HAS_GPU, reason="counts allocations of interpreted launchers, without launches")
@pytest.mark.parametrize("name", SHAPES)
def test_peaks_are_as_documented(name: str) -> None:
    """2TH + 4RI saved, as SonicMoE; at work activations, gradients of h and a chunk of columns.

    That is less than the two buffers [R, H] that the published formula leaves out: the last
    backward has the gradient of h in the place of h, and beside it weighted activations, 2RI, or a
    chunk of the rows of dX. One that is not the last has a buffer for that gradient, 4RI, and
    beside it at most about half of the others where I is more than about 2/3 of H.

    Counted are all allocations of forward and backward but the results and their upstream, whose
    memory is the caller's; x is, as saved. Row weights, ids and maps are counted too. Gathered rows
    are one more buffer [R, H] where products cannot gather them.
    """
    tokens, hidden, inner, experts, top_k = SHAPES[name]
    rows = tokens * top_k
    make = {"dtype": torch.bfloat16, "device": "meta"}
    x = torch.empty(tokens, hidden, **make)
    gate_up = torch.empty(experts, hidden, 2 * inner, **make)
    down = torch.empty(experts, inner, hidden, **make)
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device="meta")
    weights = torch.empty(tokens, top_k, device="meta")
    options = (None, None, "swiglu", False, 1.702, float("inf"))
    saved, buffer = 2 * tokens * hidden + 4 * rows * inner, 2 * rows * hidden
    order_bytes = 12 * rows + 4 * (experts + 1)
    chunk = 2 * rows * _combine.chunk_width(rows, hidden, 2)
    width = max(_combine.backward_widths(rows, inner, hidden, 2))
    small = (64 + inner // 16) * rows  # weights of rows, their gradient by column tile, maps
    gathered = buffer if GATHER else 0

    with without_launches(), Allocations() as forward:
        y, h, *order = fused_experts(
            x, gate_up, down, ids, weights, *options, rows, True, None, None
        )
    kept = forward.alive()
    assert kept == nbytes(y, h, *order)
    assert nbytes(x, h, *order, weights) == saved + order_bytes
    forward_peak = nbytes(x) + forward.peak - nbytes(y)
    assert forward_peak <= saved + 2 * rows * inner + max(chunk, gathered) + small

    arguments = (y, x, gate_up, down, weights, h, *order, *options, [True] * 4 + [False] * 2)
    peaks = {}
    for run in (fused_experts_backward, fused_experts_backward_):
        with without_launches(), Allocations() as backward:
            grads = run(*arguments)
        assert backward.alive() == nbytes(*grads)
        peaks[run] = nbytes(x, h, *order) + backward.peak - nbytes(*grads)
        if chunk < buffer and not gathered:
            # no buffer [R, H], unless h [R, 2I] is as large
            largest = max(forward.largest, backward.largest)
            assert largest <= max(0.55 * buffer, nbytes(h), nbytes(gate_up)), (largest, buffer)
    once_more, last = peaks.values()
    assert once_more <= saved + 4 * rows * inner + 2 * rows * width + gathered + small
    assert last <= saved + max(2 * rows * inner, chunk) + gathered + small
    if not gathered and name not in WIDER_THAN_TWO_BUFFERS:
        assert max(forward_peak, last) <= saved + 2 * buffer
        if name not in WIDE_EXPERTS:
            assert once_more <= saved + 2 * buffer
