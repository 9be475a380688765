"""What only a GPU can show: races, host synchronisation, graph capture, addresses past 2**31."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moe_kernels
from moe_kernels.triton import _replay
from moe_kernels.triton._launch import TRITON_VERSION, is_known
from tests.conftest import HAS_GPU
from tests.kernels import hopper_runs
from tests.kernels.accuracy import worst_row_error
from tests.kernels.known_calls import Counting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device; torch sees none"),
]
BF16 = torch.bfloat16
GIB = 2**30
ROOT = Path(__file__).parents[2]
ENDS_WITHIN = 60  # seconds, with compiling; less than gpu-check gives a test


def _layer(
    tokens: int, experts: int, top_k: int, hidden: int, inner: int, dtype: torch.dtype = BF16
) -> dict[str, Tensor]:
    """Inputs of fused_experts in a checkpoint's layout, leaves that require gradients."""

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device="cuda") * scale).to(dtype).requires_grad_()

    logits = torch.randn(tokens, experts, device="cuda")
    weights, ids, _, _ = moe_kernels.topk_router(logits, top_k)
    return {
        "x": leaf(tokens, hidden),
        "gate_up": leaf(experts, 2 * inner, hidden, scale=hidden**-0.5),
        "down": leaf(experts, hidden, inner, scale=inner**-0.5),
        "topk_ids": ids,
        "topk_weights": weights.requires_grad_(),
        "gate_up_bias": leaf(experts, 2 * inner),
        "down_bias": leaf(experts, hidden),
    }


def _step(layer: dict[str, Tensor], upstream: Tensor) -> list[Tensor]:
    """The output and all gradients."""
    arguments = dict(layer)
    arguments["gate_up"], arguments["down"] = layer["gate_up"].mT, layer["down"].mT
    y = moe_kernels.fused_experts(**arguments)
    leaves = [value for value in layer.values() if value.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


@contextmanager
def _synchronisation_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", [17, 1111])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_a_thousand_runs_give_the_same_bits(tokens: int, dtype: torch.dtype) -> None:
    """A tensor core that read a tile before it was there would show here.

    Another stream keeps the memory system busy, so that arrival times differ from run to run.
    """
    layer = _layer(tokens, 16, 4, 1024, 768, dtype)
    upstream = torch.randn_like(layer["x"])
    expected = _step(layer, upstream)
    noise, other = torch.zeros(GIB // 4, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    inputs = {name: value.detach().clone() for name, value in layer.items()}
    differences = torch.zeros(len(expected), dtype=torch.int64, device="cuda")
    for run in range(1000):
        if run % 10 == 0:
            with torch.cuda.stream(other):
                noise.add_(1)
        for i, (value, first) in enumerate(zip(_step(layer, upstream), expected, strict=True)):
            differences[i] += (value.view(torch.uint8) != first.view(torch.uint8)).any()
    torch.cuda.synchronize()  # before the other stream's memory is given to the next test
    names = ["y", *(name for name, value in layer.items() if value.requires_grad)]
    found = dict(zip(names, differences.tolist(), strict=True))
    # which kernel it is tells tests/kernels/stress_hopper.py
    assert not any(found.values()), f"runs that differ: {found}"
    assert all(torch.equal(value, layer[name]) for name, value in inputs.items())


def test_nothing_synchronises_with_the_host() -> None:
    layer = _layer(300, 16, 4, 256, 128)
    logits = torch.randn(300, 16, device="cuda", requires_grad=True)
    upstream = torch.randn_like(layer["x"])
    sizes, order = (
        torch.tensor([100, 150, 50], device="cuda"),
        torch.tensor([2, 0, 1], device="cuda"),
    )

    def everything() -> None:
        _step(layer, upstream)
        route = moe_kernels.topk_router(logits, 4, renormalize=True, return_scores=True)
        route.scores.sum().backward(retain_graph=True)
        wider = moe_kernels.topk_router(logits, 4, candidates=4)
        rounded = moe_kernels.round_tokens(*wider[:2], 16, top_k=4, tile=16)
        rounded.topk_weights.sum().backward()
        expert_order = moe_kernels.sort_by_expert(route.topk_ids, 16)
        rows = moe_kernels.permute(layer["x"], expert_order)
        h = moe_kernels.grouped_gemm(
            rows, layer["gate_up"].mT, expert_order.offsets, bias=layer["gate_up_bias"]
        )
        a = moe_kernels.expert_activation(h, "swiglu")
        out = moe_kernels.grouped_gemm(a, layer["down"].mT, expert_order.offsets)
        y = moe_kernels.unpermute(out, expert_order, route.topk_weights)
        y.backward(upstream)
        moe_kernels.chunk_permute(layer["x"], sizes, order).sum().backward()
        rounded = moe_kernels.fp8_grouped_gemm(
            rows.detach().requires_grad_(),
            layer["gate_up"].mT,
            expert_order.offsets,
            bias=layer["gate_up_bias"],
        )
        rounded.sum().backward()
        y = moe_kernels.fused_experts(
            layer["x"], layer["gate_up"].mT, layer["down"].mT, route.topk_ids,
            route.topk_weights.detach().requires_grad_(), num_rows=500, precision="fp8_block",
        )  # fmt: skip
        y.backward(upstream)
        with torch.no_grad():
            values, scales = moe_kernels.permute_quantize(layer["x"], expert_order)
            w, w_scales = moe_kernels.quantize_weights(layer["gate_up"].mT)
            moe_kernels.scaled_grouped_gemm(values, w, scales, w_scales, expert_order.offsets)
            moe_kernels.permute(values[:300], expert_order, scales=scales[:300])
        with torch.inference_mode():
            moe_kernels.fused_experts(
                layer["x"], layer["gate_up"].mT, layer["down"].mT, route.topk_ids,
                route.topk_weights, num_rows=500,
            )  # fmt: skip

    everything()  # compiles
    with _synchronisation_is_an_error():
        everything()


@pytest.mark.parametrize("tokens", [1, 33, 1000])
def test_calls_that_are_not_checked_again_give_the_same_bits(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other tokens and weights each time, elsewhere in memory, on another stream too."""
    kept = []  # so that no address is used again

    def call(x: Tensor, logits: Tensor, weights: tuple[Tensor, Tensor]) -> list[Tensor]:
        with torch.inference_mode():
            routed = moe_kernels.topk_router(logits, 4, renormalize=True)
            args = (x, *weights, routed.topk_ids, routed.topk_weights)
            return [*routed, moe_kernels.fused_experts(*args)]

    checks = []
    for number in range(6):
        layer = _layer(tokens, 16, 4, 256, 128)
        logits = torch.randn(tokens, 16, device="cuda")
        weights = layer["gate_up"].detach().mT, layer["down"].detach().mT
        kept.append((layer, logits))
        arguments = (layer["x"].detach(), logits, weights)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream() if number == 4 else torch.cuda.current_stream()
        with torch.cuda.stream(stream), Counting() as counting:
            found = call(*arguments)
        checks.append(counting.count)
        torch.cuda.synchronize()
        with monkeypatch.context() as patch:
            patch.setattr(_replay, "is_repeated", lambda tensor: False)
            decided = call(*arguments)
        for i, (value, expected) in enumerate(zip(found, decided, strict=True)):
            assert torch.equal(value, expected), (number, i)
    assert checks[2:] == [0] * 4


def test_a_graph_replays_with_other_routings() -> None:
    layer = _layer(257, 16, 4, 512, 256)
    upstream = torch.randn_like(layer["x"])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            _step(layer, upstream)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(layer, upstream)
    for routing in range(3):
        with torch.no_grad():
            layer["x"].copy_(torch.randn_like(layer["x"]))
            ids = torch.rand(257, 16, device="cuda").topk(4).indices.int()
            layer["topk_ids"].copy_(ids if routing else ids.fill_(3))
        graph.replay()
        for i, (value, expected) in enumerate(zip(captured, _step(layer, upstream), strict=True)):
            assert torch.equal(value, expected), (routing, i)


@pytest.mark.parametrize("group", hopper_runs.GROUPS)
def test_kernels_whose_warps_have_roles(group: str) -> None:
    """In a process of its own: where a kernel does not end, that is ended, and this test alone."""
    if torch.cuda.get_device_capability()[0] != 9 or not is_known(TRITON_VERSION):
        pytest.skip("needs sm_90 and a Triton whose Gluon is known")
    command = [sys.executable, "-m", "tests.kernels.hopper_runs", group]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=ENDS_WITHIN, check=False
        )
    except subprocess.TimeoutExpired as late:
        begun = (late.stdout or b"").decode()
        pytest.fail(f"{group} did not end within {ENDS_WITHIN} s; the last case began:\n{begun}")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


def _needs_memory(size: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < size:
        pytest.skip(f"needs {size / GIB:.0f} GiB of free GPU memory; {free / GIB:.0f} are free")


def test_buffers_past_two_to_the_31_elements() -> None:
    """Rows near both ends of buffers of more than 2**31 elements are those of a small problem."""
    _needs_memory(60 * GIB)
    tokens, top_k, hidden, inner, experts = 2**18, 5, 2048, 1024, 4
    layer = _layer(tokens, experts, top_k=2, hidden=hidden, inner=inner)
    # five choices of the four experts: R * W = 1.3e6 * 2048 and R * H are past 2**31
    layer["topk_ids"] = torch.randint(0, experts, (tokens, top_k), device="cuda").int()
    layer["topk_weights"] = torch.rand(tokens, top_k, device="cuda").requires_grad_()
    assert tokens * top_k * hidden > 2**31
    upstream = torch.randn_like(layer["x"])
    y, dx, _, _, dweights, *_ = _step(layer, upstream)
    ends = torch.cat([torch.arange(64), torch.arange(tokens - 64, tokens)]).cuda()
    part = {
        name: value[ends].detach().requires_grad_(value.requires_grad)
        if name in ("x", "topk_ids", "topk_weights")
        else value
        for name, value in layer.items()
    }
    small_y, small_dx, _, _, small_dweights, *_ = _step(part, upstream[ends])
    # tiles, and so the order of sums, follow the number of rows: a few roundings to bf16 differ
    for large, small in ((y, small_y), (dx, small_dx), (dweights, small_dweights)):
        assert worst_row_error(large[ends], small) < 0.01


def test_copies_past_two_to_the_31_elements() -> None:
    _needs_memory(30 * GIB)
    tokens, hidden = 2**20 + 3, 2**11 + 8
    x = torch.empty(tokens, hidden, dtype=BF16, device="cuda")
    x.copy_(torch.arange(tokens, device="cuda")[:, None] % 251)
    ids = torch.randint(-1, 8, (tokens, 1), device="cuda")
    order = moe_kernels.sort_by_expert(ids, 8)
    rows = moe_kernels.permute(x, order)
    used = int(order.offsets[-1])
    expected = (order.row_to_slot[:used] % 251).to(BF16)
    assert torch.equal(rows[:used, -1], expected)
    assert (rows[used:] == 0).all()
    back = moe_kernels.unpermute(rows, order)
    assert torch.equal(back[:, 7], torch.where(ids[:, 0] >= 0, x[:, 7], 0))
    del back
    half = torch.tensor([tokens // 2, tokens - tokens // 2], device="cuda")
    swapped = moe_kernels.chunk_permute(x, half, torch.tensor([1, 0], device="cuda"))
    assert torch.equal(swapped[: int(half[1])], x[int(half[0]) :])
