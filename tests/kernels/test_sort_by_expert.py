"""sort_by_expert: the definition, stability, dropped ids, errors."""

import pytest
import torch

import moe_kernels
from moe_kernels import reference
from tests.conftest import Implementation
from tests.kernels.routing import SHAPES, make_ids


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_definition(impl: Implementation, name: str, dtype: torch.dtype) -> None:
    ids, experts = make_ids(name, dtype)
    order = moe_kernels.sort_by_expert(ids.to(impl.device), experts)
    for actual, expected in zip(order, reference.sort_by_expert(ids, experts), strict=True):
        assert actual.dtype == torch.int32
        assert torch.equal(actual.cpu(), expected)


def test_is_stable_and_repeatable_for_many_tokens(impl: Implementation) -> None:
    ids = torch.randint(-1, 8, (800, 3))
    first = moe_kernels.sort_by_expert(ids.to(impl.device), 7)
    second = moe_kernels.sort_by_expert(ids.to(impl.device), 7)
    expected = reference.sort_by_expert(ids, 7)
    for a, b, c in zip(first, second, expected, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.cpu(), c)


def test_takes_a_non_contiguous_view(impl: Implementation) -> None:
    ids = torch.randint(0, 5, (11, 6)).to(impl.device)[:, ::2]
    order = moe_kernels.sort_by_expert(ids, 5)
    expected = reference.sort_by_expert(ids.cpu().contiguous(), 5)
    for actual, wanted in zip(order, expected, strict=True):
        assert torch.equal(actual.cpu(), wanted)


@pytest.mark.parametrize("bad", [-2, 6, 2**31 - 1])
def test_refuses_ids_out_of_range(bad: int) -> None:
    ids = torch.zeros(4, 2, dtype=torch.int32)
    ids[2, 1] = bad
    with pytest.raises(IndexError, match=rf"\[-1, 5\].*got {bad}"):
        moe_kernels.sort_by_expert(ids, 5)


def test_refuses_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="topk_ids must be one of int32, int64; got float32"):
        moe_kernels.sort_by_expert(torch.zeros(4, 2), 5)
    with pytest.raises(ValueError, match=r"topk_ids must be \[T, K\]; got \[4\]"):
        moe_kernels.sort_by_expert(torch.zeros(4, dtype=torch.int32), 5)
    with pytest.raises(ValueError, match="num_experts must be at least 0"):
        moe_kernels.sort_by_expert(torch.zeros(4, 2, dtype=torch.int32), -1)
    with pytest.raises(ValueError, match=r"num_experts must be below 2\*\*31.*got 2147483648"):
        moe_kernels.sort_by_expert(torch.zeros(4, 2, dtype=torch.int32), 2**31)
