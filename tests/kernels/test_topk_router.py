"""topk_router: every score function, groups, bias, ties, replay, gradients."""

import math
from typing import Any

import pytest
import torch

import moe_kernels
from moe_kernels import reference
from tests.conftest import Implementation
from tests.kernels.accuracy import assert_accurate

OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "mixtral": {"renormalize": True},
    "gpt_oss": {"softmax_before_topk": False},
    "softmax_bias_groups": {
        "correction_bias": True,
        "num_groups": 4,
        "topk_groups": 2,
        "group_score": "top2",
        "group_fill": 0.0,
    },
    "deepseek_v3": {
        "score_func": "sigmoid",
        "correction_bias": True,
        "num_groups": 4,
        "topk_groups": 2,
        "group_score": "top2",
        "renormalize": True,
        "route_scale": 2.5,
    },
    "sigmoid_groups": {"score_func": "sigmoid", "num_groups": 2, "group_fill": 0.0},
    "sqrtsoftplus": {"score_func": "sqrtsoftplus", "correction_bias": True, "renormalize": True},
}


@pytest.mark.parametrize("shape", [(29, 16, 3), (1, 8, 1), (0, 8, 2), (5, 132, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_definition(
    impl: Implementation, name: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    tokens, experts, top_k = shape
    options = dict(OPTIONS[name])
    if top_k > experts // options.get("num_groups", 1) * options.get("topk_groups", 1):
        options["topk_groups"] = options["num_groups"]
    if options.get("correction_bias"):
        options["correction_bias"] = 0.3 * torch.randn(experts)
    logits = torch.randn(tokens, experts).to(dtype)
    mask = torch.rand(tokens) < 0.7
    upstream = torch.randn(tokens, top_k), torch.randn(tokens, experts)

    def run(values: torch.Tensor, function: Any) -> list[torch.Tensor]:
        leaf = values.detach().clone().requires_grad_()
        moved = {
            key: value.to(leaf.device) if isinstance(value, torch.Tensor) else value
            for key, value in options.items()
        }
        out = function(leaf, top_k, token_mask=mask.to(leaf.device), return_scores=True, **moved)
        grads = [upstream[0].to(out[0]), upstream[1].to(out[2])]
        (grad,) = torch.autograd.grad([out[0], out[2]], leaf, grads)
        return [*(value.detach().cpu() for value in out), grad.cpu()]

    ours = run(logits.to(impl.device), moe_kernels.topk_router)
    truth = run(logits.double(), reference.topk_router)
    yardstick = run(logits.float(), reference.topk_router)
    assert torch.equal(ours[1], truth[1])
    assert torch.equal(ours[3], truth[3])
    assert_accurate("weights", ours[0], truth[0], yardstick[0])
    assert_accurate("scores", ours[2], truth[2], yardstick[2])
    assert_accurate("grad", ours[4], truth[4], yardstick[4].to(dtype))


def test_lower_id_wins_a_tie(impl: Implementation) -> None:
    logits = torch.zeros(3, 12, device=impl.device)
    logits[1, 7:] = 1.0
    out = moe_kernels.topk_router(logits, 4)
    assert out.topk_ids.tolist() == [[0, 1, 2, 3], [7, 8, 9, 10], [0, 1, 2, 3]]


def test_zeros_are_equal_and_nan_is_above_all(impl: Implementation) -> None:
    logits = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0], [1.0, 2.0, torch.nan, 3.0, torch.inf]])
    out = moe_kernels.topk_router(logits.to(impl.device), 3, softmax_before_topk=False)
    assert out.topk_ids.tolist() == [[0, 1, 2], [2, 4, 3]]


@pytest.mark.parametrize("group_score", ["max", "top2"])
def test_a_group_with_a_nan_is_above_all(impl: Implementation, group_score: str) -> None:
    """As the definition has it, so that such a token has the same experts on every backend."""
    logits = torch.randn(6, 12).sort(-1).values  # without a NaN the last group would win
    logits[0, 1] = logits[1, 5] = logits[2, [0, 10]] = logits[3, 8:] = torch.nan
    options: dict[str, Any] = {"num_groups": 3, "topk_groups": 1, "group_score": group_score}
    for score_func in ("sigmoid", "softmax"):
        options |= {"score_func": score_func, "softmax_before_topk": False}
        ours = moe_kernels.topk_router(logits.to(impl.device), 3, **options)
        assert torch.equal(ours.topk_ids.cpu(), reference.topk_router(logits, 3, **options)[1])


def test_given_ids_are_replayed_with_live_gradients(impl: Implementation) -> None:
    logits = torch.randn(9, 8).to(impl.device).requires_grad_()
    ids = torch.stack([torch.randperm(8)[:3] for _ in range(9)]).to(impl.device)
    out = moe_kernels.topk_router(logits, 3, given_ids=ids, renormalize=True)
    assert torch.equal(out.topk_ids.long(), ids)
    expected = logits.softmax(-1).gather(1, ids)
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(out.topk_weights, expected)
    upstream = torch.randn(9, 3).to(impl.device)
    ours = torch.autograd.grad(out.topk_weights, logits, upstream)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, logits, upstream))
    assert int(out.load.sum()) == 27


def test_given_ids_of_no_expert_count_for_nothing(
    impl: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody looks at them, which would stop the host of a GPU; else they are an error."""
    logits = torch.randn(5, 6).to(impl.device).requires_grad_()
    ids = torch.tensor([[0, -1], [6, 1], [2, 5], [2**31 - 1, -(2**31)], [4, 3]]).to(impl.device)
    if impl.name == "cpu":
        with pytest.raises(IndexError, match="given_ids"):
            moe_kernels.topk_router(logits, 2, given_ids=ids)
        return
    out = moe_kernels.topk_router(logits, 2, given_ids=ids)
    real = (ids >= 0) & (ids < 6)
    scores = logits.softmax(-1).gather(1, ids.clamp(0, 5))
    torch.testing.assert_close(out.topk_weights, torch.where(real, scores, 0))
    assert out.load.tolist() == [1] * 6
    upstream = torch.randn(5, 2).to(impl.device)
    (grad,) = torch.autograd.grad(out.topk_weights, logits, upstream)
    (expected,) = torch.autograd.grad(scores, logits, torch.where(real, upstream, 0))
    torch.testing.assert_close(grad, expected)
    monkeypatch.setenv("MOE_KERNELS_CHECK", "1")
    with pytest.raises(IndexError, match=r"given_ids must be in \[0, 5\]"):
        moe_kernels.topk_router(logits, 2, given_ids=ids)


def test_non_finite_logits_never_leave_the_range(impl: Implementation) -> None:
    logits = torch.randn(4, 8)
    logits[0] = -math.inf
    logits[1, :5] = -math.inf
    logits[2] = math.nan
    logits[3, 2] = math.inf
    ids = moe_kernels.topk_router(logits.to(impl.device), 4).topk_ids
    assert ((ids >= 0) & (ids < 8)).all()
    assert all(len(set(row)) == 4 for row in ids.tolist())


def test_gradient_of_sqrtsoftplus_vanishes_far_below_zero(impl: Implementation) -> None:
    logits = torch.tensor([[0.5, -300.0, -math.inf, 1.0]]).to(impl.device).requires_grad_()
    out = moe_kernels.topk_router(logits, 3, score_func="sqrtsoftplus", renormalize=True)
    (grad,) = torch.autograd.grad(out.topk_weights, logits, torch.tensor([[1.0, 2, 3]]).to(logits))
    assert (grad[0, 1:3] == 0).all()
    assert grad.isfinite().all()
    assert (grad[0, ::3] != 0).all()


def test_refuses_wrong_options() -> None:
    logits = torch.randn(4, 8)
    for message, top_k, options in (
        (r"top_k must be in \[1, E = 8\]; got 9", 9, {}),
        (r"top_k must be in \[1, E = 8\]; got 0", 0, {}),
        ("score_func must be one of", 2, {"score_func": "tanh"}),
        ("num_groups must be at least 1 and divide E = 8; got 3", 2, {"num_groups": 3}),
        ("topk_groups must be in", 2, {"num_groups": 2, "topk_groups": 3}),
        ("top_k must be at most the experts", 5, {"num_groups": 2, "topk_groups": 1}),
        ("group_fill must be 0 or -inf", 2, {"group_fill": 1.0}),
        ("group_score must be one of", 2, {"group_score": "mean"}),
        (r"correction_bias must be \[E\]", 2, {"correction_bias": torch.zeros(7)}),
        (r"token_mask must be \[T\]", 2, {"token_mask": torch.ones(3, dtype=torch.bool)}),
        (r"given_ids must be \[T, K\]", 2, {"given_ids": torch.zeros(4, 3, dtype=torch.int64)}),
        ("route_scale must be finite", 2, {"route_scale": math.nan}),
    ):
        with pytest.raises(ValueError, match=message):
            moe_kernels.topk_router(logits, top_k, **options)
    with pytest.raises(TypeError, match=r"top_k must be an integer; got 2\.0"):
        moe_kernels.topk_router(logits, 2.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="token_mask must be one of bool"):
        moe_kernels.topk_router(logits, 2, token_mask=torch.ones(4))
    with pytest.raises(IndexError, match="given_ids"):
        moe_kernels.topk_router(logits, 2, given_ids=torch.full((4, 2), 8))


@pytest.mark.parametrize(("num_groups", "topk_groups"), [(2, -40), (2, 0), (2, 3), (3, 1)])
def test_the_op_on_cpu_refuses_groups_that_it_does_not_have(
    num_groups: int, topk_groups: int
) -> None:
    """Called past the public function, as an exported program does: ids are indices there."""
    options = ("softmax", True, False, None, num_groups, topk_groups, "max", -math.inf, 1.0)
    with pytest.raises(ValueError, match=r"topk_router: (num|topk)_groups must be .*; got"):
        torch.ops.moe_kernels.topk_router(torch.randn(4, 8), 2, *options, None, None, False)
