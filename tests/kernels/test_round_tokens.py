"""round_tokens: the definition, multiples of the tile, what is kept, gradients, bounds."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import moe_kernels
from moe_kernels import reference
from moe_kernels.reference.round_tokens import MODES
from tests.conftest import Implementation
from tests.kernels.accuracy import assert_accurate
from tests.kernels.test_topk_router import OPTIONS

# name: T, K, candidates, E, tile
SHAPES = {
    "plain": (61, 2, 2, 8, 8),
    "no_candidates": (61, 3, 0, 8, 8),
    "one_expert": (19, 1, 0, 1, 4),
    "one_token": (1, 2, 1, 4, 4),
    "many_experts": (40, 2, 3, 67, 2),
    "no_tokens": (0, 2, 1, 4, 8),
    "tile_of_one": (30, 2, 2, 8, 1),
    "large_tile": (30, 2, 2, 8, 64),
    "long": (640, 1, 1, 2, 16),  # an expert's slots fill more than one block
}


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, int, int, int]:
    """Weights with ties, ids of which some are dropped, K, E and the tile."""
    tokens, top_k, candidates, experts, tile = SHAPES[name]
    ids = torch.rand(tokens, experts).topk(top_k + candidates, dim=1).indices
    ids = torch.where(torch.rand(ids.shape) < 0.1, torch.where(ids % 2 == 0, -1, experts), ids)
    weights = (torch.rand(ids.shape) * 12).round() / 8 - 0.5
    return weights.to(dtype), ids, top_k, experts, tile


def counts(ids: Tensor, experts: int) -> list[int]:
    return [int((ids == e).sum()) for e in range(experts)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_definition(impl: Implementation, name: str, mode: str) -> None:
    dtypes = (torch.float32, torch.bfloat16) if name == "plain" else (torch.float32,)
    for dtype in (*dtypes, torch.float64) if name == "plain" else dtypes:
        weights, ids, top_k, experts, tile = make(name, dtype)
        mask = torch.rand(len(ids)) < 0.8
        for index_dtype, given in ((torch.int64, None), (torch.int32, mask)):
            expected = reference.round_tokens(weights, ids, given, experts, top_k, tile, mode)
            actual = moe_kernels.round_tokens(
                weights.to(impl.device),
                ids.to(impl.device, index_dtype),
                experts,
                top_k=top_k,
                tile=tile,
                mode=mode,
                token_mask=None if given is None else given.to(impl.device),
            )
            for a, b in zip(actual, expected, strict=True):
                assert a.dtype == b.dtype
                assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("mode", MODES)
def test_counts_are_multiples_and_the_best_stay(impl: Implementation, mode: str) -> None:
    """Said without the definition: from the counts and weights before and after."""
    weights, ids, top_k, experts, tile = make("long")
    out = moe_kernels.round_tokens(
        weights.to(impl.device), ids.to(impl.device), experts, top_k=top_k, tile=tile, mode=mode
    )
    rounded = out.topk_ids.cpu()
    assert out.load.tolist() == counts(rounded, experts)
    assert sum(out.load.tolist()) <= moe_kernels.rounded_rows(
        len(ids), top_k, experts, tile=tile, mode=mode
    )
    used = rounded >= 0
    assert torch.equal(rounded[used].long(), ids[used])
    assert torch.equal(out.topk_weights.cpu(), torch.where(used, weights, 0))
    is_chosen = (torch.arange(ids.shape[1]) < top_k).expand(ids.shape)
    for e in range(experts):
        before, after = counts(ids[:, :top_k], experts)[e], int(out.load[e])
        assert after % tile == 0
        assert abs(after - before) < tile
        assert (after >= before) if mode == "up" else True
        assert (after <= before) if mode == "down" else True
        assert (2 * abs(after - before) <= tile) if mode == "nearest" else True
        for kind, whole in ((is_chosen, after >= before), (~is_chosen, False)):
            mine = (ids == e) & kind
            kept, dropped = weights[mine & used], weights[mine & ~used]
            if whole:
                assert len(dropped) == 0
            elif len(kept) and len(dropped):
                assert kept.min() >= dropped.max()
        if after < before:
            assert not ((ids == e) & ~is_chosen & used).any()


def test_too_few_candidates(impl: Implementation) -> None:
    """Expert 0 has 3 chosen of a tile of 4 and nothing to gain, expert 1 has one candidate."""
    ids = torch.tensor([[0, -1], [0, 1], [0, -1], [1, -1], [1, -1]], device=impl.device)
    weights = torch.rand(5, 2, device=impl.device)
    loads = {
        mode: moe_kernels.round_tokens(weights, ids, 3, top_k=1, tile=4, mode=mode).load.tolist()
        for mode in MODES
    }
    assert loads == {"nearest": [0, 0, 0], "up": [3, 3, 0], "down": [0, 0, 0]}


def test_special_weights_rank_as_numbers(impl: Implementation) -> None:
    values = [0.0, -0.0, torch.nan, -torch.inf, torch.inf, -1e-40, 1e-40, -2.0, torch.nan, 0.0]
    weights = torch.tensor(values)[:, None]
    ids = torch.zeros(10, 1, dtype=torch.int32)
    for tile in range(1, 10):
        actual = moe_kernels.round_tokens(
            weights.to(impl.device), ids.to(impl.device), 1, top_k=1, tile=tile, mode="down"
        )
        expected = reference.round_tokens(weights, ids, None, 1, 1, tile, "down")
        assert torch.equal(actual.topk_ids.cpu(), expected[1]), tile


def test_strided_inputs_and_repeats(impl: Implementation) -> None:
    weights, ids, top_k, experts, tile = make("plain")
    wide = torch.full((len(ids), 8), torch.nan)
    wide[:, ::2] = weights
    runs = [
        moe_kernels.round_tokens(
            w.to(impl.device), i.to(impl.device), experts, top_k=top_k, tile=tile
        )
        for w, i in ((weights, ids), (wide[:, ::2], ids.t().contiguous().t()), (weights, ids))
    ]
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


def test_gradient_reaches_what_is_kept(impl: Implementation) -> None:
    weights, ids, top_k, experts, tile = make("plain")
    leaf = weights.to(impl.device).requires_grad_()
    out = moe_kernels.round_tokens(leaf, ids.to(impl.device), experts, top_k=top_k, tile=tile)
    upstream = torch.randn_like(leaf)
    upstream[out.topk_ids < 0] = torch.nan  # which must not leak
    (grad,) = torch.autograd.grad(out.topk_weights, leaf, upstream)
    assert torch.equal(grad, torch.where(out.topk_ids >= 0, upstream, 0))


def test_the_layer_of_rounded_tokens_is_its_formula(impl: Implementation) -> None:
    """Router with candidates, rounding and experts, against plain PyTorch in float64."""
    tokens, hidden, inner, experts, top_k, tile = 48, 16, 8, 6, 2, 8
    bound = moe_kernels.rounded_rows(tokens, top_k, experts, tile=tile, mode="nearest")
    x, router = torch.randn(tokens, hidden), torch.randn(hidden, experts)
    gate_up, down = torch.randn(experts, hidden, 2 * inner), torch.randn(experts, inner, hidden)
    upstream = torch.randn(tokens, hidden)

    def ours(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        routed = moe_kernels.topk_router(
            x @ router, top_k, score_func="sigmoid", renormalize=True, candidates=2
        )
        rounded = moe_kernels.round_tokens(
            routed.topk_weights, routed.topk_ids, experts, top_k=top_k, tile=tile
        )
        assert all(count % tile == 0 for count in rounded.load.tolist())
        return moe_kernels.fused_experts(
            x, gate_up, down, rounded.topk_ids, rounded.topk_weights, num_rows=bound
        )

    def plain(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        scores = (x @ router).sigmoid()
        best = scores.topk(top_k + 2, dim=-1)
        weights = best.values / best.values[:, :top_k].sum(-1, keepdim=True)
        args = (weights.detach(), best.indices, None, experts, top_k, tile, "nearest")
        ids = reference.round_tokens(*args)[1]
        return reference.fused_experts(x, gate_up, down, ids, weights)

    def run(function: Any, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        leaves = [v.to(device, dtype).requires_grad_() for v in (x, router, gate_up, down)]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y))]

    results = run(ours, torch.float32, impl.device)
    truth = run(plain, torch.float64, torch.device("cpu"))
    yardstick = run(plain, torch.float32, torch.device("cpu"))
    for name, a, b, c in zip(
        ("y", "x", "router", "gate_up", "down"), results, truth, yardstick, strict=True
    ):
        assert_accurate(name, a, b, c)


@pytest.mark.parametrize("name", OPTIONS)
def test_candidates_leave_the_chosen_as_they_are(impl: Implementation, name: str) -> None:
    """The first K columns keep their bits; the others are next best, on the scale of the K."""
    tokens, experts, top_k, extra = 23, 16, 3, 4
    options = dict(OPTIONS[name])
    if options.get("correction_bias"):
        options["correction_bias"] = 0.3 * torch.randn(experts)
    moved = {k: v.to(impl.device) if isinstance(v, Tensor) else v for k, v in options.items()}
    logits = torch.randn(tokens, experts)
    route = moe_kernels.topk_router
    plain = route(logits.to(impl.device), top_k, **moved)
    wider = route(logits.to(impl.device), top_k, candidates=extra, **moved)
    all_of = route(logits.to(impl.device), top_k + extra, **moved)
    assert torch.equal(wider.topk_weights[:, :top_k], plain.topk_weights)
    assert torch.equal(wider.topk_ids, all_of.topk_ids)
    assert torch.equal(wider.load, plain.load)
    given = route(
        logits.to(impl.device), top_k, candidates=extra, given_ids=wider.topk_ids, **moved
    )
    for a, b in zip(given, wider, strict=True):
        assert torch.equal(a, b)

    upstream = torch.randn(tokens, top_k + extra), torch.randn(tokens, experts)

    def run(values: Tensor, function: Any, options: dict[str, Any]) -> list[Tensor]:
        leaf = values.detach().clone().requires_grad_()
        out = function(leaf, top_k, candidates=extra, return_scores=True, **options)
        grads = [upstream[0].to(out[0]), upstream[1].to(out[2])]
        (grad,) = torch.autograd.grad([out[0], out[2]], leaf, grads)
        return [out[0].detach().cpu(), grad.cpu()]

    ours = run(logits.to(impl.device), route, moved)
    truth = run(logits.double(), reference.topk_router, options)
    yardstick = run(logits, reference.topk_router, options)
    for what, a, b, c in zip(("weights", "grad"), ours, truth, yardstick, strict=True):
        assert_accurate(what, a, b, c)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("options", [{}, {"softmax_before_topk": False}, {"score_func": "sigmoid"}])
def test_gradient_of_candidates(options: dict[str, Any], renormalize: bool) -> None:
    logits = (torch.randperm(4 * 6).view(4, 6).double() / 6 - 2).requires_grad_()

    def run(logits: Tensor) -> Tensor:
        return moe_kernels.topk_router(
            logits, 2, candidates=2, renormalize=renormalize, **options
        ).topk_weights

    assert gradcheck(run, (logits,))


def test_refuses_wrong_arguments() -> None:
    weights, ids = torch.rand(4, 3), torch.zeros(4, 3, dtype=torch.int32)
    for message, options in (
        (r"top_k must be at most topk_ids.shape\[1\] = 3; got 4", {"top_k": 4}),
        ("tile must be in", {"top_k": 2, "tile": 0}),
        ("mode must be one of nearest, up, down; got 'even'", {"top_k": 2, "mode": "even"}),
        (r"token_mask must be \[T\]", {"top_k": 2, "token_mask": torch.ones(3).bool()}),
    ):
        with pytest.raises(ValueError, match=message):
            moe_kernels.round_tokens(weights, ids, 5, **options)
    with pytest.raises(ValueError, match="rounded_rows: mode must be one of nearest, up, down"):
        moe_kernels.rounded_rows(4, 2, 5, tile=8, mode="even")
    with pytest.raises(ValueError, match="rounded_rows: tile must be in"):
        moe_kernels.rounded_rows(4, 2, 5, tile=0, mode="up")
    with pytest.raises(ValueError, match="rounded_rows: num_experts must be at least 0; got -5"):
        moe_kernels.rounded_rows(4, 2, -5, tile=8, mode="up")
    with pytest.raises(ValueError, match=r"topk_ids must be \[4, 3\] as topk_weights"):
        moe_kernels.round_tokens(weights, ids[:, :2], 5, top_k=2)
    with pytest.raises(TypeError, match="topk_weights must be one of"):
        moe_kernels.round_tokens(ids, ids, 5, top_k=2)
    with pytest.raises(IndexError, match=r"round_tokens: topk_ids must be in \[-1, 5\].*got 9"):
        moe_kernels.round_tokens(weights, ids + 9, 5, top_k=2)
    with pytest.raises(ValueError, match=r"candidates must be at most E - top_k = 2; got 3"):
        moe_kernels.topk_router(torch.randn(4, 5), 3, candidates=3)
