"""The transport between GPUs of one machine: that its kernels compile well; and, on a machine with
a GPU, on which all ranks run then, what arrives, in a graph too, and its faults.

T tokens, H hidden size, K experts a token, E experts, P ranks, U tokens received, C capacity.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_parallel.dispatch import AllToAllDispatcher
from tests.conftest import HAS_GPU
from tests.parallel.emulated_gpus import assert_equal
from tests.parallel.ranks import run_ranks
from tests.parallel.test_dispatch import Case, make_case, raised, round_trip

ROOT = Path(__file__).parents[2]
ARCHITECTURES = (80, 90, 100)
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_kernels_compile_without_spills_or_local_memory(tmp_path: Path) -> None:
    sources = sorted(ROOT.glob("csrc/**/*.cu"))
    assert sources
    for source in sources:
        command = [NVCC, "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "--expt-relaxed-constexpr"]
        command += ["-Xcompiler=-Wall,-Wextra", "-Xptxas=-v", "-c", source]
        command += ["--keep", "--keep-dir", tmp_path]
        for arch in ARCHITECTURES:
            command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        result = subprocess.run(
            [str(word) for word in [*command, "-o", tmp_path / "kernels.o"]],
            capture_output=True,
            text=True,
            timeout=500,
        )
        text = result.stdout + result.stderr
        assert result.returncode == 0, text
        assert "warning" not in text, text
        kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", text)
        frames = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
        )
        registers = [int(number) for number in re.findall(r"Used (\d+) registers", text)]
        assert {int(arch) for _, arch in kernels} == set(ARCHITECTURES)
        assert len(kernels) == len(frames) == len(registers) >= 3 * len(ARCHITECTURES)
        assert all(frame == ("0", "0", "0") for frame in frames), text
        assert max(registers) <= 128, text  # 512 threads a block
        # What waits for another rank may not fill a GPU: nothing does but one small kernel.
        for arch in ARCHITECTURES:
            code = (tmp_path / f"{source.stem}.compute_{arch}.ptx").read_text()
            entries = re.split(r"\.entry\s+(\w+)", code)[1:]
            waiting = [
                name
                for name, body in zip(entries[::2], entries[1::2], strict=True)
                if "nanosleep" in body
            ]
            assert len(waiting) == 1
            assert "wait_kernel" in waiting[0]


# ---------------------------------------------------------------------------------------- on a GPU

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device; torch sees none"),
]


def gpu(test: Callable[..., None]) -> Any:
    for mark in on_gpu:
        test = mark(test)
    return test


def cuda_ipc(experts: int, max_tokens: int = 64, **options: Any) -> AllToAllDispatcher:
    return AllToAllDispatcher(
        dist.group.WORLD, experts, transport="cuda_ipc", max_tokens=max_tokens, **options
    )


def there(case: Case) -> Case:
    return Case(case.x.cuda(), case.ids.cuda(), case.weights.cuda())


def arguments(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    return case.x, case.ids, case.weights


def _equal(rank: int, ranks: int) -> None:
    """Bit for bit as process_group, which carries the tensors through the host here."""
    twin = AllToAllDispatcher(dist.group.WORLD, 12, transport="process_group")
    for seed, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32, torch.float64)):
        for hidden, skew in ((64, "even"), (77, "dropped"), (4096, "one_expert")):
            case = make_case(
                seed, rank, 50 + rank, hidden, 3, 12, dtype=dtype, weight_dtype=dtype, skew=skew
            )
            dispatcher = cuda_ipc(12)
            got, *results = round_trip(dispatcher, there(case), rank)
            expected, *others = round_trip(twin, there(case), rank)
            dispatcher.check()
            assert_equal(got, expected, ranks)
            for ours, theirs in zip(results, others, strict=True):
                assert torch.equal(ours, theirs), (dtype, hidden, skew)
    placed = cuda_ipc(12, placement=[(7 * e) % ranks for e in range(12)])
    case = there(make_case(1, rank, 50, 64, 3, 12))
    tokens = placed.dispatch(*arguments(case))
    assert torch.isfinite(placed.combine(tokens.x, tokens.handle)).all()
    placed.check()


@gpu
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_exchange_is_that_of_process_group(ranks: int) -> None:
    run_ranks(ranks, _equal)


def _graph(rank: int, ranks: int) -> None:
    """Captured once, replayed with other tokens and other experts."""
    dispatcher = cuda_ipc(8)
    cases = [there(make_case(seed, rank, 40, 256, 3, 8, dtype=torch.bfloat16)) for seed in range(6)]
    x, ids, weights = (value.clone() for value in arguments(cases[0]))

    def layer() -> Tensor:
        tokens = dispatcher.dispatch(x, ids, weights)
        return dispatcher.combine(tokens.x * 2, tokens.handle)

    expected = []
    for case in cases:
        for to, value in zip((x, ids, weights), arguments(case), strict=True):
            to.copy_(value)
        expected.append(layer())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer()
    for seed in (3, 0, 5, 1, 1):
        for to, value in zip((x, ids, weights), arguments(cases[seed]), strict=True):
            to.copy_(value)
        graph.replay()
        assert torch.equal(out, expected[seed])
        dispatcher.check()
    assert torch.equal(layer(), expected[1])  # calls and replays in turn


@gpu
def test_graphs_are_captured_and_replayed() -> None:
    run_ranks(2, _graph)


def _without_waiting(rank: int, ranks: int) -> None:
    dispatcher = cuda_ipc(8)
    case = there(make_case(1, rank, 40, 256, 3, 8, dtype=torch.bfloat16))
    round_trip(dispatcher, case, rank)  # makes the memory
    x, weights = case.x.clone().requires_grad_(), case.weights.clone().requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = dispatcher.dispatch_async(x, case.ids, weights)
        tokens = pending.wait()
        y = tokens.x * tokens.topk_weights.sum(1, keepdim=True).bfloat16()
        dispatcher.combine(y, tokens.handle).backward(torch.ones_like(x))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    dispatcher.check()


@gpu
def test_the_host_waits_for_nothing() -> None:
    run_ranks(2, _without_waiting)


def _too_many(rank: int, ranks: int) -> tuple[str, str]:
    dispatcher = cuda_ipc(4, 10, capacity=12)
    x, weights = torch.ones(10, 64, device="cuda"), torch.ones(10, 2, device="cuda")
    ids = torch.tensor([[2, 3]], device="cuda").expand(10, 2)
    tokens = dispatcher.dispatch(x, ids, weights)
    assert len(tokens.x) == 12
    return raised(dispatcher.check)


@gpu
def test_what_there_is_no_room_for_is_told() -> None:
    for kind, message in run_ranks(2, _too_many):
        assert kind == "RuntimeError"
        assert "up to 20 rows and 40 slots" in message


def _killed(rank: int, ranks: int) -> None:
    dispatcher = cuda_ipc(4, timeout=20.0)
    case = there(make_case(1, rank, 9, 64, 2, 4))
    round_trip(dispatcher, case, rank)
    torch.cuda.synchronize()
    pids: list[int] = [0] * ranks
    dist.all_gather_object(pids, os.getpid())
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    first = raised(dispatcher.dispatch, *arguments(case))
    kind, message = first if first[0] != "nothing" else raised(dispatcher.check)
    assert time.monotonic() - begin < 10
    assert kind == "DistBackendError", message
    assert f"rank 1 (process {pids[1]})" in message


@gpu
def test_a_killed_rank_is_named() -> None:
    with pytest.raises(AssertionError, match="1 of 2 ranks failed\n--- rank 1: died"):
        run_ranks(2, _killed)


def _on_the_cpu(rank: int, ranks: int) -> tuple[str, str]:
    return raised(cuda_ipc(4).dispatch, *arguments(make_case(1, rank, 9, 64, 2, 4)))


@gpu
def test_tensors_of_the_cpu_are_refused() -> None:
    for kind, message in run_ranks(2, _on_the_cpu):
        assert kind == "ValueError"
        assert "transport 'cuda_ipc' carries tensors of CUDA devices; got one on cpu" in message
