"""Large buffers are reused, and nothing of their last use shows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import moe_kernels

E, H, W = 16, 512, 1024  # a float32 gradient [E, H, W] has 32 MiB
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    moe_kernels.free_kept_buffers()
    yield
    moe_kernels.free_kept_buffers()


def weight_gradient(counts: list[int], columns: int = W) -> Tensor:
    """The gradient of [E, H, columns]; experts without rows have a gradient of zero."""
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(counts), H, generator=generator)
    grad = torch.randn(sum(counts), columns, generator=generator)
    return moe_kernels.grouped_gemm_wgrad(rows, grad, offsets)


def test_a_freed_buffer_is_used_again_and_is_as_good_as_new() -> None:
    some, other = [3] * E, [0, 5] * (E // 2)
    expected = weight_gradient(other).clone()
    moe_kernels.free_kept_buffers()
    first = weight_gradient(some)
    address = first.data_ptr()
    del first
    second = weight_gradient(other)
    assert second.data_ptr() == address
    assert torch.equal(second, expected)
    assert moe_kernels.free_kept_buffers() == 0  # it is in use
    del second
    assert moe_kernels.free_kept_buffers() == 32 * MIB
    assert moe_kernels.free_kept_buffers() == 0


def test_tensors_outlive_what_is_given_back() -> None:
    kept = weight_gradient([2] * E)
    expected = kept.clone()
    view = kept[3, :5]
    del kept
    assert moe_kernels.free_kept_buffers() == 0
    assert torch.equal(view, expected[3, :5])


def test_no_more_is_kept_than_a_half_above_what_was_in_use() -> None:
    most = 0
    for columns in (W, 2 * W, 4 * W, W, 3 * W):
        used = weight_gradient([1] * E, columns)
        most = max(most, used.nbytes)
        del used
    assert 0 < moe_kernels.free_kept_buffers() <= 1.5 * max(most, 128 * MIB)


def test_quantised_experts_use_no_more_with_many_threads() -> None:
    experts, hidden, inner, tokens, top_k = 8, 2048, 16, 2048, 8
    packed = {
        "gate_up": moe_kernels.quantize_experts(torch.randn(experts, hidden, 2 * inner), "int8"),
        "down": moe_kernels.quantize_experts(torch.randn(experts, inner, hidden), "int8"),
        "down_bias": torch.randn(experts, hidden),
        "x": torch.randn(tokens, hidden),
        "topk_ids": torch.arange(tokens * top_k).view(tokens, top_k) % (experts + 1),
        "topk_weights": torch.rand(tokens, top_k),
    }
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 64):
            torch.set_num_threads(threads)
            results.append(moe_kernels.fused_experts_quantized(**packed))
            # a packed row has up to 4.5 bytes an element; products have 4, and of all columns they
            # would take 128 MiB, and more on 64 threads
            most = 4.5 * tokens * hidden + 64 * MIB
            assert moe_kernels.free_kept_buffers() <= most
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


def test_a_much_larger_buffer_is_not_wasted_on_a_small_one() -> None:
    large = weight_gradient([1] * E, 4 * W)
    address = large.data_ptr()
    del large
    assert weight_gradient([1] * E).data_ptr() != address


def test_what_is_kept_is_given_back_before_memory_runs_out() -> None:
    code = (
        "import resource, torch, moe_kernels\n"
        "o = torch.tensor([0, 1]).int(); a = torch.ones(1, 1 << 12)\n"
        "grads = [torch.ones(1, mib << 6) for mib in (256, 256, 192)]\n"  # MiB of the results
        "torch.ones(1 << 20).exp()\n"  # starts threads
        "both = [moe_kernels.grouped_gemm_wgrad(a, g, o) for g in grads[:2]]; del both\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))\n"
        "print((moe_kernels.grouped_gemm_wgrad(a, grads[2], o) == 1).all().item())\n"
        "print(moe_kernels.free_kept_buffers())\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["True", str(192 * MIB)]


def test_such_tensors_are_ordinary_ones() -> None:
    weight = torch.zeros(E, H, W, requires_grad=True)
    grad = weight_gradient([2] * E)
    weight.grad = grad
    weight.grad.add_(1).mul_(2)
    torch.optim.SGD([weight], lr=0.1).step()
    assert torch.equal(weight.detach(), -0.1 * grad)
    grad.share_memory_()
    loaded = torch.zeros_like(grad)
    loaded.set_(grad.untyped_storage(), 0, (4,), (1,))
    assert torch.equal(loaded, grad.flatten()[:4])
    other = weight_gradient([2] * E)
    storage = other.untyped_storage()
    storage.resize_(2 * storage.nbytes())
    storage.resize_(0)
    assert other.untyped_storage().nbytes() == 0


def test_autograd_takes_them_over() -> None:
    x, w = torch.randn(32, H), torch.randn(E, H, W, requires_grad=True)
    offsets = torch.arange(0, 33, 2).int()
    addresses = set()
    for _ in range(3):
        w.grad = None
        moe_kernels.grouped_gemm(x, w, offsets).sum().backward()
        assert w.grad is not None
        addresses.add(w.grad.data_ptr())
    assert len(addresses) == 1


def test_poisoned_memory_stays_poisoned() -> None:
    """Tests of kernels count on it."""
    del_me = weight_gradient([1] * E)
    del del_me
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        kept = moe_kernels.free_kept_buffers()
        weight_gradient([1] * E)
        assert kept > 0
        assert moe_kernels.free_kept_buffers() == 0
    finally:
        torch.use_deterministic_algorithms(before)


def test_a_fork_has_its_own() -> None:
    keep = weight_gradient([1] * E)
    expected = keep.clone()
    child = os.fork()
    if child == 0:
        right = torch.equal(weight_gradient([1] * E), expected)
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(keep, expected)


def test_a_fork_waits_for_no_thread_that_it_does_not_have() -> None:
    """Not even where another thread was giving memory back to the system just then."""
    code = (
        "import os, signal, threading, torch, moe_kernels\n"
        "a = torch.randn(1, 512); o = torch.tensor([0, *[1] * 8]).int()\n"
        "def work():\n"
        "    while not done:\n"
        "        moe_kernels.grouped_gemm_wgrad(a, grad, o)\n"
        "grad = torch.randn(1, 4096); done = False\n"
        "thread = threading.Thread(target=work); thread.start()\n"
        "right = 0\n"
        "for _ in range(40):\n"
        "    if (child := os.fork()) == 0:\n"
        "        signal.alarm(20)\n"
        "        moe_kernels.free_kept_buffers()\n"
        "        os._exit(0)\n"
        "    if os.waitpid(child, 0)[1]:\n"
        "        break\n"
        "    right += 1\n"
        "done = True; thread.join(); print(right)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MOE_KERNELS_KEEP_BUFFERS": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(found.stdout) == 40


def test_keeping_can_be_turned_off() -> None:
    code = (
        "import moe_kernels, torch\n"
        "a = torch.randn(8, 512); o = torch.tensor([0, *range(0, 9)]).int()\n"
        "moe_kernels.grouped_gemm_wgrad(a, torch.randn(8, 4096), o)\n"
        "print(moe_kernels.free_kept_buffers())\n"
    )
    kept = [
        int(
            subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, "MOE_KERNELS_KEEP_BUFFERS": value},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for value in ("0", "1")
    ]
    assert kept[0] == 0
    assert kept[1] == 72 * MIB
