"""Ranks that share one GPU, by NCCL: what they compute is what one process does, or the CPU.

Each rank tells NCCL that it is a host of its own (``ranks.ONE_GPU``), so rows go through sockets:
the collectives and their streams are those of several GPUs, their speed is not.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from moe_parallel.context_parallel import ContextParallelAttention, shard_sequence, unshard_sequence
from moe_parallel.parallelizer import _get_cp_stream
from tests.conftest import HAS_GPU
from tests.parallel.ranks import ONE_GPU, run_ranks
from tests.parallel.test_context_parallel import COMM_TYPES, Case, error, run
from tests.parallel.test_dispatch import exchange_on_gpu
from tests.parallel.test_parallelize_model import COVERING, SHARED, check
from tests.test_example import QUICK, TINY, _runs, run_example, summary

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device; torch sees none"),
]

HALF = (torch.bfloat16, torch.float16)
ATTENTION = [
    *(Case(c, dtype, tokens=256, heads=(4, 4), sizes=(64, 64), balanced=balanced)
      for c in COMM_TYPES for dtype in HALF for balanced in (True, False)),
    *(Case(c, torch.float32, tokens=96, is_causal=causal)
      for c in COMM_TYPES for causal in (True, False)),
    *(Case(c, window=7, tokens=96, dtype=torch.float32) for c in ("all_gather", "a2a")),
    *(Case(c, torch.bfloat16, tokens=64, sizes=(12, 7)) for c in COMM_TYPES),
]  # fmt: skip


def _attention(rank: int, ranks: int) -> list[str]:
    """Communicates on the stream that ``apply_cp`` takes."""
    group, found = dist.group.WORLD, []
    for case in ATTENTION:
        inputs = [tensor.cuda() for tensor in case.inputs()]
        truth = run(case.attention(), [tensor.double() for tensor in inputs])
        yardstick = run(case.attention(), inputs)
        shared = case.attention()
        members = dist.get_process_group_ranks(group)
        shared.set_context_parallel_group(
            group, members, _get_cp_stream(), cp_comm_type=case.comm_type
        )
        parts = run(shared, [shard_sequence(t, group, 2, balanced=case.balanced) for t in inputs])
        for part, y, t in zip(parts, yardstick, truth, strict=True):
            assert part.dtype == case.dtype
            ours = unshard_sequence(part, group, 2, balanced=case.balanced)
            limit = max(1.5 * error(y, t), 1e-6)
            if not error(ours, t) <= limit:
                found.append(f"{case}: {error(ours, t):.2e}, more than {limit:.2e}")
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_attention_over_shared_sequences_equals_one_process(ranks: int) -> None:
    assert run_ranks(ranks, _attention, backend=ONE_GPU, timeout=120.0) == [[]] * ranks


def _overlap(rank: int, ranks: int) -> tuple[int, float, float]:
    """Kernels of NCCL, how long they took, and how long of that others ran, in ms."""
    group = dist.group.WORLD
    attention = ContextParallelAttention()
    members = dist.get_process_group_ranks(group)
    attention.set_context_parallel_group(group, members, _get_cp_stream(), cp_comm_type="p2p")
    q, k, v = (torch.randn(1, 8, 8192, 128, device="cuda").bfloat16() for _ in range(3))
    for tensor in (q, k, v):
        tensor.requires_grad_()
    attention(q, k, v).sum().backward()
    torch.cuda.synchronize()
    dist.all_reduce(torch.zeros(1, device="cuda"))  # both begin together
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        attention(q, k, v).sum().backward()
        torch.cuda.synchronize()
    kernels = [e for e in recorded.events() if e.device_type == DeviceType.CUDA]
    sends = [e.time_range for e in kernels if "nccl" in e.name.lower()]
    others = [e.time_range for e in kernels if "flash" in e.name.lower()]
    assert others, sorted({e.name for e in kernels})
    together = sum(max(min(a.end, b.end) - max(a.start, b.start), 0) for a in sends for b in others)
    return len(sends), sum(s.end - s.start for s in sends) / 1e3, together / 1e3


def test_keys_travel_while_attention_is_computed() -> None:
    """Forward sends keys and values on; backward sends them again, and their gradients."""
    for sends, took, together in run_ranks(2, _overlap, backend=ONE_GPU):
        print(f"{sends} kernels of NCCL took {took:.2f} ms, beside attention {together:.2f}")
        assert sends >= 3
        assert together > 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_exchange_is_that_of_the_cpu(ranks: int) -> None:
    run_ranks(ranks, exchange_on_gpu, "process_group", backend=ONE_GPU)


@pytest.mark.parametrize("sizes", [{"ep": 2}, {"dp_replicate": 2, "ep": 4}], ids=str)
def test_training_equals_one_process(sizes: dict[str, int]) -> None:
    check(sizes, COVERING, backend=ONE_GPU)


def test_context_parallel_training_equals_one_process() -> None:
    check({"cp": 2, "ep": 2}, SHARED, backend=ONE_GPU)


EXAMPLE = [*TINY, *QUICK, "--batch", "8", "--clip", "0.5", "--balance", "0", "--steps", "3"]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "--cp 2 --ac router"),
        (2, "--pp 2 --accumulate 2"),
        (4, "--cp 2 --pp 2 --ep 2 --ac full"),
    ],
)
def test_the_example_trains_as_on_the_cpu(ranks: int, layout: str, tmp_path: Path) -> None:
    out = {name: tmp_path / name for name in ("cpu", "gpu")}
    run_example(1, [*EXAMPLE, "--out", str(out["cpu"])])
    arguments = [*EXAMPLE, *layout.split(), "--out", str(out["gpu"])]
    run_ranks(ranks, _runs, arguments, backend=ONE_GPU, timeout=240.0)
    expected, found = summary(out["cpu"]), summary(out["gpu"])
    assert found["ranks"] == ranks
    for value in ("losses", "gradient_norms", "heldout"):
        assert found[value] == pytest.approx(expected[value], rel=1e-4), value
    assert found["expert_load"] == expected["expert_load"]
