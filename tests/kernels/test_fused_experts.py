"""fused_experts: every option against the definition in float64, forward and all gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

import moe_kernels
from moe_kernels import reference
from moe_kernels.ops.expert_activation import resolve_activation
from moe_kernels.reference import ACTIVATIONS, is_gated
from tests.conftest import Implementation
from tests.kernels.accuracy import assert_accurate, gradients, torch_experts
from tests.kernels.routing import SHAPES, make_ids

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_case(
    routing: str,
    dtype: torch.dtype,
    *,
    hidden: int = 40,
    inner: int = 24,
    activation: str = "swiglu",
    bias: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:
    """Unit-scale inputs of fused_experts, and the gradient of its result."""
    ids, experts = make_ids(routing)
    width = 2 * inner if is_gated(activation) else inner
    inputs = {
        "x": torch.randn(ids.shape[0], hidden),
        "gate_up": torch.randn(experts, hidden, width) / hidden**0.5,
        "down": torch.randn(experts, inner, hidden) / inner**0.5,
    }
    if bias:
        inputs["gate_up_bias"] = torch.randn(experts, width)
        inputs["down_bias"] = torch.randn(experts, hidden)
    inputs = {name: value.to(dtype) for name, value in inputs.items()}
    inputs["topk_ids"] = ids
    inputs["topk_weights"] = torch.rand(ids.shape)
    return inputs, torch.randn(ids.shape[0], hidden).to(dtype)


def limit_between(inputs: dict[str, Tensor]) -> float:
    """A limit that many pre-activations meet and none is near.

    Gradients jump there, and one whose rounding lies on the other side would say nothing of ours.
    """
    values = []
    for e, (weight, bias) in enumerate(
        zip(inputs["gate_up"].double(), inputs["gate_up_bias"].double(), strict=True)
    ):
        token, _ = torch.where(inputs["topk_ids"] == e)
        values.append(inputs["x"][token].double() @ weight + bias)
    sizes = torch.cat(values).abs().flatten()
    sizes = sizes[(sizes > 0.6) & (sizes < 1)].sort().values
    widest = sizes.diff().argmax()
    return sizes[widest : widest + 2].mean().item()


def check(
    impl: Implementation,
    inputs: dict[str, Tensor],
    upstream: Tensor,
    layouts: Any = lambda name, value: value,
    num_rows: int | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Compare value and gradients with the definition; returns ours."""
    alpha, limit = resolve_activation(
        "test",
        options.get("activation", "swiglu"),
        options.get("interleaved", False),
        options.get("alpha"),
        options.get("limit"),
    )

    def ours(**kwargs: Tensor) -> Tensor:
        viewed = {name: layouts(name, value) for name, value in kwargs.items()}
        return moe_kernels.fused_experts(**viewed, num_rows=num_rows, **options)

    resolved = {**options, "alpha": alpha, "limit": limit}
    actual = gradients(
        ours, {k: v.to(impl.device) for k, v in inputs.items()}, upstream.to(impl.device)
    )
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    truth = gradients(lambda **kw: reference.fused_experts(**kw, **resolved), wide, upstream)
    yardstick = gradients(lambda **kw: torch_experts(**kw, **resolved), inputs, upstream)
    for name, value in truth.items():
        assert_accurate(name, actual[name], value, yardstick[name])
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("routing", SHAPES)
def test_routings(impl: Implementation, routing: str, bias: bool, dtype: torch.dtype) -> None:
    inputs, upstream = make_case(routing, dtype, bias=bias)
    check(impl, inputs, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_activations(
    impl: Implementation, interleaved: bool, activation: str, dtype: torch.dtype
) -> None:
    if interleaved and not is_gated(activation):
        return  # refused: see test_refuses_what_does_not_fit
    inputs, upstream = make_case("dropped", dtype, activation=activation, bias=True)
    options: dict[str, Any] = {"activation": activation, "interleaved": interleaved}
    if activation in ("swiglu", "swigluoai"):
        options["limit"] = limit_between(inputs)
    check(impl, inputs, upstream, **options)


@pytest.mark.parametrize("hidden", [1, 33, 72])
@pytest.mark.parametrize("inner", [1, 17, 64])
def test_sizes_without_alignment(impl: Implementation, hidden: int, inner: int) -> None:
    inputs, upstream = make_case("plain", torch.bfloat16, hidden=hidden, inner=inner, bias=True)
    check(impl, inputs, upstream)


def test_one_row_without_alignment(impl: Implementation) -> None:
    """Of a tensor with one row the stride is free; descriptors may not take that for alignment."""
    inputs, upstream = make_case("plain", torch.bfloat16, hidden=33, inner=17, bias=True)
    for name in ("topk_ids", "topk_weights"):
        inputs[name] = inputs[name][:1, :1]
    inputs["x"] = inputs["x"][:1]
    check(impl, inputs, upstream[:1])


def test_definition_has_the_same_defaults() -> None:
    inputs, _ = make_case("plain", torch.float32, activation="swigluoai")
    inputs["x"] = 20 * inputs["x"]  # most pre-activations pass the limit
    ours = moe_kernels.fused_experts(**inputs, activation="swigluoai")
    truth = reference.fused_experts(**inputs, activation="swigluoai")
    torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["transposed", "strided", "mixed"])
def test_layouts_and_strides_of_gradients(
    impl: Implementation, layout: str, dtype: torch.dtype
) -> None:
    inputs, upstream = make_case("plain", dtype, bias=True)

    def view(name: str, value: Tensor) -> Tensor:
        if name == "x":
            return value.t().contiguous().t() if layout == "strided" else value
        if name == "topk_weights":
            return value.repeat_interleave(2, 1)[:, ::2] if layout == "strided" else value
        transposed = layout == "transposed" or (layout == "mixed" and name == "down")
        if name in ("gate_up", "down") and transposed:
            return value.mT.contiguous().mT
        if name not in ("topk_ids", "topk_weights") and layout == "strided":
            return value.repeat_interleave(2, -1)[..., ::2]
        return value

    check(impl, inputs, upstream, layouts=view)
    stored = inputs["gate_up"].mT.contiguous().to(impl.device).requires_grad_()
    others = {k: v.to(impl.device) for k, v in inputs.items() if k != "gate_up"}
    y = moe_kernels.fused_experts(gate_up=stored.mT, **others)
    (grad,) = torch.autograd.grad(y.float().sum(), stored)
    assert grad.stride() == stored.stride()


@pytest.mark.parametrize("extra", [0, 5])
def test_num_rows_bounds_the_buffers(impl: Implementation, extra: int) -> None:
    inputs, upstream = make_case("dropped", torch.bfloat16, bias=True)
    ids = inputs["topk_ids"]
    valid = int(((ids >= 0) & (ids < inputs["down"].shape[0])).sum())
    bounded = check(impl, inputs, upstream, num_rows=valid + extra)
    # tile shapes of Triton kernels follow the bound, so sums may be in another order without it
    same = check(impl, inputs, upstream, num_rows=valid + 1 if impl.name != "cpu" else None)
    for name, value in same.items():
        assert torch.equal(bounded[name], value), name


def test_num_rows_beyond_every_slot_allocates_no_more(impl: Implementation) -> None:
    inputs, _ = make_case("plain", torch.float32)
    case = {k: v.to(impl.device).requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
    shapes: dict[int | None, list[torch.Size]] = {None: [], 10**12: []}
    for num_rows, kept in shapes.items():

        def note(value: Tensor, kept: list[torch.Size] = kept) -> Tensor:
            kept.append(value.shape)
            return value

        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            moe_kernels.fused_experts(**case, num_rows=num_rows)
    assert shapes[10**12] == shapes[None]


def test_is_bitwise_repeatable(impl: Implementation) -> None:
    inputs, upstream = make_case("plain", torch.bfloat16, bias=True)
    first, second = (check(impl, inputs, upstream) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_ignored_slots_may_hold_anything(impl: Implementation) -> None:
    inputs, upstream = make_case("dropped", torch.float32)
    ids = inputs["topk_ids"]
    dropped = (ids < 0) | (ids >= inputs["down"].shape[0])
    moved = {k: v.to(impl.device) for k, v in inputs.items()}
    poisoned = dict(moved)
    poisoned["topk_weights"] = torch.where(dropped, torch.nan, inputs["topk_weights"])
    poisoned["topk_weights"] = poisoned["topk_weights"].to(impl.device)
    run = moe_kernels.fused_experts
    up = upstream.to(impl.device)
    clean = gradients(lambda **kw: run(**kw), moved, up)
    dirty = gradients(lambda **kw: run(**kw), poisoned, up)
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name
    assert (dirty["topk_weights"].cpu()[dropped] == 0).all()


def test_one_bad_token_stays_alone(impl: Implementation) -> None:
    inputs, _ = make_case("plain", torch.float32)
    inputs["x"][5] = float("nan")
    y = moe_kernels.fused_experts(**{k: v.to(impl.device) for k, v in inputs.items()})
    bad = y.isnan().any(dim=1).cpu()
    assert bad.nonzero().flatten().tolist() == [5]


def test_one_bad_expert_stays_alone(impl: Implementation) -> None:
    """Nor is what lies behind an expert's matrix ever multiplied, be it with zero."""
    inputs, _ = make_case("plain", torch.float32, hidden=33, inner=17)
    for name in ("gate_up", "down"):
        inputs[name][3] = float("nan")
    y = moe_kernels.fused_experts(**{k: v.to(impl.device) for k, v in inputs.items()})
    assert torch.equal(y.isnan().any(dim=1).cpu(), (inputs["topk_ids"] == 3).any(dim=1))


def test_rows_of_no_expert_are_saved_as_zeros(impl: Implementation) -> None:
    inputs, _ = make_case("dropped", torch.bfloat16)
    ids = inputs["topk_ids"]
    moved = [value.to(impl.device) for value in inputs.values()]
    options = (None, None, "swiglu", False, 1.702, float("inf"), ids.numel() + 3, True)
    _, h, _, _, offsets = torch.ops.moe_kernels.fused_experts(*moved, *options, None, None)
    assert h.shape[0] == ids.numel() + 3
    assert (h[int(offsets[-1]) :] == 0).all()


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_index_and_weight_dtypes(
    impl: Implementation, ids: torch.dtype, weights: torch.dtype
) -> None:
    inputs, upstream = make_case("dropped", torch.bfloat16)
    inputs["topk_ids"] = inputs["topk_ids"].to(ids)
    inputs["topk_weights"] = inputs["topk_weights"].to(weights)
    moved = {k: v.to(impl.device) for k, v in inputs.items()}
    ours = gradients(lambda **kw: moe_kernels.fused_experts(**kw), moved, upstream.to(impl.device))
    assert ours["topk_weights"].dtype == weights
    truth = gradients(
        lambda **kw: reference.fused_experts(**kw),
        {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()},
        upstream,
    )
    yardstick = gradients(lambda **kw: torch_experts(**kw), inputs, upstream)
    for name, value in truth.items():
        assert_accurate(name, ours[name], value, yardstick[name])


def test_many_tokens_without_gradients() -> None:
    """On a CPU they pass in parts, each with its own weights and order."""
    tokens, experts = 40_000, 3
    inputs = {
        "x": torch.randn(tokens, 5),
        "gate_up": torch.randn(experts, 5, 8),
        "down": torch.randn(experts, 4, 5),
        "topk_ids": torch.randint(-1, experts, (tokens, 2)),
        "topk_weights": torch.rand(tokens, 2),
    }
    truth = reference.fused_experts(**inputs)
    torch.testing.assert_close(moe_kernels.fused_experts(**inputs), truth, rtol=1e-4, atol=1e-4)


def test_fused_moe_takes_the_layout_of_inference_engines(impl: Implementation) -> None:
    inputs, _ = make_case("plain", torch.float32)
    x, gate_up, down, ids, weights = (value.to(impl.device) for value in inputs.values())
    ours = moe_kernels.fused_moe(x, gate_up.mT.contiguous(), down.mT.contiguous(), weights, ids)
    torch.testing.assert_close(ours, moe_kernels.fused_experts(x, gate_up, down, ids, weights))


REFUSALS: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("gate_up must be [E, H, 2*I] with H = 40 (x.shape[1])", ValueError, {"gate_up": (8, 41, 48)}),
    ("gate_up must be [E, H, 2*I]", ValueError, {"gate_up": (8, 40, 47)}),
    ("down must be [E, I, H] = [8, 24, 40]", ValueError, {"down": (8, 25, 40)}),
    ("down must be [E, I, H] = [8, 24, 40]", ValueError, {"down": (7, 24, 40)}),
    ("topk_weights must be [37, 3] as topk_ids", ValueError, {"topk_weights": (37, 2)}),
    ("x must be [T, H]", ValueError, {"x": (37, 2, 20)}),
    ("topk_ids must be [T, K] with T = 36", ValueError, {"x": (36, 40)}),
    ("gate_up_bias must be [8, 48]", ValueError, {"gate_up_bias": (8, 24)}),
    ("down_bias must be [8, 40]", ValueError, {"down_bias": (1, 40)}),
    ("gate_up must have x's dtype", TypeError, {"x": torch.bfloat16}),
    ("topk_ids must be one of int32, int64", TypeError, {"topk_ids": torch.float32}),
    ("x must be one of", TypeError, {"x": torch.int32}),
    ("activation must be one of", ValueError, {"activation": "tanh"}),
    ("interleaved needs a gated activation", ValueError, {"activation": "relu2"}),
    ("num_rows must be at least", ValueError, {"num_rows": 110}),
    ("num_rows must be at least 0", ValueError, {"num_rows": -1}),
    ("num_rows must be an integer; got 111.0", TypeError, {"num_rows": 111.0}),
]


@pytest.mark.parametrize(("message", "error", "change"), REFUSALS)
def test_refuses_what_does_not_fit(
    message: str, error: type[Exception], change: dict[str, Any]
) -> None:
    inputs: dict[str, Any] = dict(make_case("plain", torch.float32)[0])
    for name, value in change.items():
        if isinstance(value, tuple):
            inputs[name] = torch.randn(value)
        elif isinstance(value, torch.dtype):
            inputs[name] = inputs[name].to(value)
        else:
            inputs[name] = value
    with pytest.raises(error) as caught:
        moe_kernels.fused_experts(**inputs, interleaved=change.get("activation") == "relu2")
    assert message in str(caught.value)
    assert str(caught.value).startswith("fused_experts: ")


@pytest.mark.parametrize("precision", [None, "fp8_block"])
@pytest.mark.parametrize("bad", [-2, 9])
def test_refuses_ids_out_of_range(bad: int, precision: str | None) -> None:
    inputs, _ = make_case("plain", torch.float32)
    inputs["topk_ids"][3, 1] = bad
    message = rf"^fused_experts: topk_ids must be in \[-1, 8\].*got {bad}"
    with pytest.raises(IndexError, match=message):
        moe_kernels.fused_experts(**inputs, precision=precision)
    with pytest.raises(IndexError, match=message):
        reference.fused_experts_fp8(**inputs)
