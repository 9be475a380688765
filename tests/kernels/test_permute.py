"""permute, unpermute and chunk_permute: values, gradients, dropped rows, determinism."""

import pytest
import torch
from torch import Tensor

import moe_kernels
from moe_kernels import reference
from moe_kernels.reference.unpermute import unpermute_backward
from tests.conftest import Implementation
from tests.kernels.accuracy import assert_accurate, gradients
from tests.kernels.routing import SHAPES, make_ids

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("hidden", [1, 40, 129])
@pytest.mark.parametrize("name", SHAPES)
def test_permute_copies_rows_and_sums_gradients(
    impl: Implementation, name: str, hidden: int
) -> None:
    ids, experts = make_ids(name)
    order = moe_kernels.sort_by_expert(ids.to(impl.device), experts)
    host = tuple(value.cpu() for value in order)
    x = torch.randn(ids.shape[0], hidden)
    upstream = torch.randn(ids.numel(), hidden)
    upstream[int(order.offsets[-1]) :] = float("nan")  # no gradient flows from rows of no expert
    ours = gradients(
        lambda x: moe_kernels.permute(x, order), {"x": x.to(impl.device)}, upstream.to(impl.device)
    )
    assert torch.equal(ours["out"].cpu(), reference.permute(x, *host, ids.numel()))
    truth = reference.unpermute(upstream.double(), *host, None)
    assert_accurate("dx", ours["x"], truth, truth.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_unpermute(impl: Implementation, name: str, weighted: bool, dtype: torch.dtype) -> None:
    ids, experts = make_ids(name)
    order = moe_kernels.sort_by_expert(ids.to(impl.device), experts)
    host = tuple(value.cpu() for value in order)
    rows = torch.randn(ids.numel(), 72, dtype=dtype)
    inputs = {"rows": rows, "weights": torch.rand(ids.shape)} if weighted else {"rows": rows}
    upstream = torch.randn(ids.shape[0], 72, dtype=dtype)
    poisoned = {key: value.clone() for key, value in inputs.items()}
    poisoned["rows"][int(order.offsets[-1]) :] = float("nan")  # never read
    if weighted:
        poisoned["weights"][(ids < 0) | (ids >= experts)] = float("nan")  # nor these

    ours = gradients(
        lambda rows, weights=None: moe_kernels.unpermute(rows, order, weights),
        {key: value.to(impl.device) for key, value in poisoned.items()},
        upstream.to(impl.device),
    )

    def definition(rows: Tensor, weights: Tensor | None = None) -> Tensor:
        return reference.unpermute(rows, *host, weights)

    wide = {key: value.double() for key, value in inputs.items()}
    for key, value in gradients(definition, wide, upstream).items():
        assert_accurate(key, ours[key], value, value.to(ours[key].dtype))


def test_num_rows_bounds_the_buffer(impl: Implementation) -> None:
    ids, experts = make_ids("dropped")
    order = moe_kernels.sort_by_expert(ids.to(impl.device), experts)
    valid = int(order.offsets[-1])
    x = torch.randn(ids.shape[0], 24).to(impl.device)
    full = moe_kernels.permute(x, order)
    bounded = moe_kernels.permute(x, order, num_rows=valid)
    assert torch.equal(bounded, full[:valid])
    assert torch.equal(moe_kernels.unpermute(bounded, order), moe_kernels.unpermute(full, order))
    # Rows that a bound too small has lost count as zero, on the way back and in its gradient.
    weights = torch.rand(ids.shape).to(impl.device)
    short = full[: valid - 3].clone().requires_grad_()
    padded = torch.cat([full[: valid - 3], full.new_zeros(3, 24)]).requires_grad_()
    for given in (None, weights):
        y, expected = (moe_kernels.unpermute(rows, order, given) for rows in (short, padded))
        assert torch.equal(y, expected)
        grad, expected_grad = (
            torch.autograd.grad(value.square().sum(), rows)[0]
            for value, rows in ((y, short), (expected, padded))
        )
        assert torch.equal(grad, expected_grad[: valid - 3])


def test_rows_that_are_missing_count_as_zero_in_the_definition() -> None:
    ids, experts = make_ids("dropped")
    order = moe_kernels.sort_by_expert(ids, experts)
    valid = int(order.offsets[-1])
    rows, weights = torch.randn(valid, 24), torch.rand(ids.shape)
    rows[valid - 3 :] = 0
    grad = torch.randn(ids.shape[0], 24)
    for given in (None, weights):
        short, padded = (reference.unpermute(some, *order, given) for some in (rows[:-3], rows))
        assert torch.equal(short, padded)
    found, expected = (
        unpermute_backward(grad, some, *order, weights, [True, True]) for some in (rows[:-3], rows)
    )
    assert torch.equal(found[0], expected[0][:-3])
    assert torch.equal(found[1], expected[1])


def test_views_and_repeated_backward(impl: Implementation) -> None:
    ids, experts = make_ids("plain")
    order = moe_kernels.sort_by_expert(ids.to(impl.device), experts)
    base = torch.randn(64, ids.shape[0]).to(impl.device).requires_grad_()
    x = base.t()[:, ::2]
    rows = moe_kernels.permute(x, order)
    assert torch.equal(rows, moe_kernels.permute(x.contiguous(), order))
    y = moe_kernels.unpermute(rows, order, torch.rand(ids.shape).to(impl.device))
    (first,) = torch.autograd.grad(y.sum(), base, retain_graph=True)
    (second,) = torch.autograd.grad(y.sum(), base)
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunk_permute(impl: Implementation, dtype: torch.dtype) -> None:
    sizes = torch.tensor([3, 0, 5, 1, 4, 0], dtype=torch.int32)
    order = torch.randperm(6)
    rows, upstream = torch.randn(17, 33, dtype=dtype), torch.randn(17, 33, dtype=dtype)
    ours = gradients(
        lambda rows: moe_kernels.chunk_permute(rows, sizes.to(rows.device), order.to(rows.device)),
        {"rows": rows.to(impl.device)},
        upstream.to(impl.device),
    )
    expected = gradients(
        lambda rows: reference.chunk_permute(rows, sizes, order), {"rows": rows}, upstream
    )
    for name, value in expected.items():
        assert torch.equal(ours[name].cpu(), value)


def test_chunk_permute_refuses_what_does_not_fit() -> None:
    rows = torch.randn(4, 3)
    with pytest.raises(ValueError, match="sum to at most"):
        moe_kernels.chunk_permute(rows, torch.tensor([3, 2]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="permutation"):
        moe_kernels.chunk_permute(rows, torch.tensor([1, 2]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"order must be \[2\]"):
        moe_kernels.chunk_permute(rows, torch.tensor([1, 2]), torch.tensor([0]))


def test_refuses_an_order_that_leads_elsewhere() -> None:
    x = torch.randn(3, 4)
    order = moe_kernels.sort_by_expert(torch.zeros(3, 2, dtype=torch.int64), 2)
    for name, wrong in (("row_to_slot", 6), ("slot_to_row", -1)):
        bad = getattr(order, name).clone()
        bad.view(-1)[2] = wrong
        message = rf"order.{name} must be in \[0, T \* K = 6\); got {wrong}$"
        with pytest.raises(IndexError, match=message):
            moe_kernels.permute(x, order._replace(**{name: bad}))


def test_refuses_what_does_not_fit() -> None:
    ids, experts = make_ids("plain")
    order = moe_kernels.sort_by_expert(ids, experts)
    with pytest.raises(ValueError, match=r"T = 5 \(x.shape\[0\]\)"):
        moe_kernels.permute(torch.randn(5, 8), order)
    with pytest.raises(TypeError, match="x must be one of"):
        moe_kernels.permute(torch.zeros(ids.shape[0], 8, dtype=torch.int32), order)
    with pytest.raises(ValueError, match="weights must be"):
        moe_kernels.unpermute(torch.randn(ids.numel(), 8), order, torch.rand(2, 2))
    x = torch.randn(ids.shape[0], 8)
    for function in (moe_kernels.permute, moe_kernels.unpermute):
        with pytest.raises(TypeError, match="order must be the ExpertOrder of sort_by_expert"):
            function(x, tuple(order))
    with pytest.raises(TypeError, match=r"num_rows must be an integer; got 2\.5"):
        moe_kernels.permute(x, order, num_rows=2.5)  # type: ignore[arg-type]
