"""The parts that attention over shared sequences is made of: who sees whom, and one block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_parallel.context_parallel import ContextParallelAttention, blocks, layout
from tests.parallel.test_context_parallel import COMM_TYPES, Case, error, run

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_what_is_visible(ranks: int, balanced: bool) -> None:
    length = 6
    positions = [layout.positions_of(r, ranks, length, balanced) for r in range(ranks)]
    assert sorted(torch.cat(positions).tolist()) == list(range(ranks * length))
    work = []
    for rank in range(ranks):
        seen = torch.zeros(length, ranks, length, dtype=torch.bool)
        for source in range(ranks):
            block = layout.visible(rank, source, ranks, length, True, balanced)
            if block is not None:
                part = seen[block.queries, source, block.keys]
                part |= torch.ones_like(part).tril() if block.causal else True
            expected = positions[rank][:, None] >= positions[source]
            assert torch.equal(seen[:, source], expected)
        work.append(int(seen.sum()))
        for window in (None, 1, 4, 50):
            again = torch.zeros_like(seen)
            for piece in layout.pieces(rank, ranks, length, True, balanced, window):
                keys = [(s, k) for s, part in piece.keys for k in range(length)[part]]
                for index, (source, key) in enumerate(keys):
                    rows = torch.arange(length)[piece.queries]
                    mask = rows >= 0 if piece.mask is None else piece.mask[:, index]
                    mask = mask & (torch.arange(len(rows)) >= index) if piece.causal else mask
                    again[rows, source, key] |= mask
            distance = positions[rank][:, None, None] - torch.stack(positions)
            within = distance < (window or ranks * length)
            assert torch.equal(again, seen & within)
    if balanced:
        assert len(set(work)) == 1


def _compare_kernels(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel of a block against the plain one, in float64, with others' out and lse."""
    for n, g, queries, keys, causal in (
        (4, 4, 33, 33, True),
        (6, 2, 40, 72, False),
        (6, 2, 8, 8, True),
        (4, 1, 1, 5, False),
    ):
        shapes = ((n, queries), (g, keys), (g, keys), (n, queries))
        tensors = [torch.randn(2, *s, 16, device=device, dtype=dtype) for s in shapes]
        q, k, v, grad = tensors
        assert blocks._kernel(q, v, None) != "plain"
        out, lse = blocks.attend(q, k, v, 0.3, causal)
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "_kernel", lambda *args: "plain")
            wide = [t.double() for t in tensors]
            true_out, true_lse = blocks.attend(*wide[:3], 0.3, causal)
            # As if other keys had half of the attention.
            true_lse += 0.7
            true_out = true_out * 0.5 + 0.1
            expected = blocks.attend_backward(wide[3], *wide[:3], true_out, true_lse, 0.3, causal)
            yardstick = blocks.attend_backward(
                grad, q, k, v, true_out.to(dtype), true_lse.to(lse.dtype), 0.3, causal
            )
        tolerance = max(torch.finfo(dtype).eps * 4, 1e-6 if dtype != torch.float64 else 1e-13)
        torch.testing.assert_close(lse.double() + 0.7, true_lse, rtol=tolerance, atol=tolerance)
        assert error(out.double() * 0.5 + 0.1, true_out) < tolerance
        actual = blocks.attend_backward(
            grad, q, k, v, true_out.to(dtype), true_lse.to(lse.dtype), 0.3, causal
        )
        for a, y, b in zip(actual, yardstick, expected, strict=True):
            assert error(a, b) <= max(1.5 * error(y, b), tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_kernels_of_a_block(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    _compare_kernels("cpu", dtype, monkeypatch)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels_of_a_block_on_gpus(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    _compare_kernels("cuda", dtype, monkeypatch)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_stream_of_its_own(dtype: torch.dtype, tmp_path: Path) -> None:
    """A group of one GPU: the kernels, their gradients and the streams, not the exchange."""
    device = torch.device("cuda", torch.cuda.current_device())
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("nccl", init_method=store, rank=0, world_size=1, device_id=device)
    try:
        for comm_type in COMM_TYPES:
            inputs = [t.to(device) for t in Case(comm_type, dtype, tokens=256).inputs()]
            truth = run(ContextParallelAttention(), [t.double() for t in inputs])
            yardstick = run(ContextParallelAttention(), inputs)
            shared = ContextParallelAttention()
            stream = torch.cuda.Stream()
            shared.set_context_parallel_group(dist.group.WORLD, [0], stream, comm_type)
            for ours, y, t in zip(run(shared, inputs), yardstick, truth, strict=True):
                assert error(ours, t) <= max(1.5 * error(y, t), 1e-6)
    finally:
        dist.destroy_process_group()
