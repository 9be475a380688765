"""Weights moved to large pages are the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from moe_kernels import quantize_experts, use_large_pages

PAGE = 2 << 20


def large_pages_of_process() -> int:
    """Bytes of this process's own memory that are on large pages."""
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHuge"))


def test_values_addresses_and_views_stay() -> None:
    weights = torch.randn(9, 1 << 18)
    expected, view = weights.clone(), weights[3:].mT
    address = weights.data_ptr()
    moved = use_large_pages(weights)
    assert moved % PAGE == 0
    assert 0 <= moved <= weights.nbytes
    assert weights.data_ptr() == address
    assert torch.equal(weights, expected)
    assert torch.equal(view, expected[3:].mT)


def test_says_how_many_bytes_are_on_large_pages() -> None:
    weights = torch.randn(16 * PAGE // 4)
    before = large_pages_of_process()
    moved = use_large_pages(weights)
    if not moved:
        pytest.skip("this system does not move memory to large pages")
    assert large_pages_of_process() - before >= moved - PAGE
    assert use_large_pages(weights) == moved  # they still are


def test_a_module_counts_shared_weights_once() -> None:
    model = nn.Sequential(nn.Linear(1024, 2048), nn.Linear(1024, 2048))
    alone = use_large_pages(model[0].weight)
    model[1].weight = model[0].weight
    assert use_large_pages(model) == alone


def test_leaves_other_memory_alone() -> None:
    assert use_large_pages(torch.randn(4 * PAGE).share_memory_()) == 0
    assert use_large_pages(torch.empty(4 * PAGE, device="meta")) == 0
    assert use_large_pages(torch.empty(0)) == 0
    assert use_large_pages(torch.randn(1024)) == 0


def test_weights_inside_of_others() -> None:
    """As quantised ones of other libraries are, which have no memory of their own."""
    parts = [torch.randn(2048, 2048) for _ in range(2)]
    model = nn.Linear(1, 1)
    model.weight = nn.Parameter(TwoTensor(*parts))
    expected = [part.clone() for part in parts]
    assert use_large_pages(model) == sum(use_large_pages(part) for part in parts)
    assert all(map(torch.equal, parts, expected))


def test_quantised_experts() -> None:
    weights = quantize_experts(torch.randn(8, 1024, 1024), "int8")
    expected = weights.dequantize()
    moved = use_large_pages(weights)
    assert moved == use_large_pages(weights.codes) + use_large_pages(weights.scales)
    assert torch.equal(weights.dequantize(), expected)
