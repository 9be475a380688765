"""fused_experts with precision="fp8_block": values, gradients, layouts, contracts."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import moe_kernels
from moe_kernels import reference
from moe_kernels.ops.expert_activation import resolve_activation
from moe_kernels.reference.fused_experts_fp8 import (
    fused_experts_fp8_backward,
    fused_experts_fp8_forward,
)
from tests.conftest import HAS_GPU, Implementation
from tests.kernels.accuracy import (
    assert_accurate,
    frobenius_error,
    gradients,
    requantized_limit,
    torch_activation,
)
from tests.kernels.interpreter import mended_interpreter
from tests.kernels.routing import SHAPES
from tests.kernels.test_fused_experts import make_case
from tests.kernels.test_main_grads import leaves_of, zeros_for

FLOAT8 = torch.float8_e4m3fn
NAMES = ("x", "gate_up", "down", "topk_weights", "gate_up_bias", "down_bias")


def fp8(**arguments: Any) -> Tensor:
    return moe_kernels.fused_experts(**arguments, precision="fp8_block")


def on(impl: Implementation, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(impl.device) for name, value in inputs.items()}


def definition(inputs: dict[str, Tensor], upstream: Tensor, **options: Any) -> dict[str, Tensor]:
    """Value and gradients in float64 of what is documented to be computed."""
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    kind, interleaved = options.get("activation", "swiglu"), options.get("interleaved", False)
    alpha, limit = resolve_activation("test", kind, interleaved, None, options.get("limit"))
    biases = (wide.get("gate_up_bias"), wide.get("down_bias"))
    tail = (kind, interleaved, alpha, limit)
    x, gate_up, down, ids, weights = (
        wide[name] for name in ("x", "gate_up", "down", "topk_ids", "topk_weights")
    )
    y, h, *order = fused_experts_fp8_forward(
        x, gate_up, down, ids, weights, *biases, *tail, ids.numel(), True
    )
    needs = [True] * 4 + [bias is not None for bias in biases]
    grads = fused_experts_fp8_backward(
        upstream.double(), x, gate_up, down, weights, h, *order, *biases, *tail, needs
    )
    found = dict(zip(NAMES, grads, strict=False))
    return {"out": y, **{name: found[name] for name in NAMES if name in inputs}}


def rounded(x: Tensor, rows: int) -> Tensor:
    """To float8 and back in plain PyTorch, in blocks of ``rows`` x 128."""
    out = torch.empty_like(x)
    for i in range(0, x.shape[-2], rows):
        for j in range(0, x.shape[-1], 128):
            piece = x[..., i : i + rows, j : j + 128].float()
            scale = (piece.abs().amax((-2, -1), keepdim=True) / 448).clamp_min(1e-30)
            out[..., i : i + rows, j : j + 128] = ((piece / scale).to(FLOAT8).float() * scale).to(x)
    return out


class Rounded(torch.autograd.Function):
    """A product of rounded operands; backward rounds the upstream rows for the left one alone."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return rounded(a, 1) @ rounded(b, 128)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return rounded(grads[0], 1) @ rounded(b, 128).mT, a.mT @ grads[0]


def chain(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "swiglu",
    interleaved: bool = False,
) -> Tensor:
    """The yardstick: a loop over experts in x's dtype."""
    y = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        token, slot = torch.where(topk_ids == e)
        h: Tensor = Rounded.apply(x[token], gate_up[e])
        h = h if gate_up_bias is None else h + gate_up_bias[e]
        limit = 7.0 if activation == "swigluoai" else float("inf")
        a = torch_activation(h, activation, interleaved, 1.702, limit)
        out: Tensor = Rounded.apply(a, down[e])
        out = out if down_bias is None else out + down_bias[e]
        y = y.index_add(0, token, out * topk_weights[token, slot, None].to(out.dtype))
    return y


@pytest.mark.parametrize("routing", SHAPES)
def test_equals_the_definition(impl: Implementation, routing: str) -> None:
    """In float32, whose rounding seldom moves a value from one float8 to the next."""
    bias = routing not in ("plain", "one_expert")
    # what TMA loads, halves of h that begin with a block; and what it does not, within one
    aligned = routing in ("one_token", "all_to_one", "dropped")
    sizes = {"hidden": 144, "inner": 128} if aligned else {"hidden": 136, "inner": 72}
    inputs, upstream = make_case(routing, torch.float32, **sizes, bias=bias)
    found = gradients(fp8, on(impl, inputs), upstream.to(impl.device))
    for name, value in definition(inputs, upstream).items():
        assert frobenius_error(found[name], value) < requantized_limit(impl.device), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("routing", ["plain", "dropped"])
def test_is_as_close_as_plain_pytorch(
    impl: Implementation, routing: str, dtype: torch.dtype
) -> None:
    """To the layer that rounds nothing, and its gradients."""
    aligned = routing == "dropped"  # so that the up-projection rounds the activation
    sizes = {"hidden": 208, "inner": 128} if aligned else {"hidden": 200, "inner": 136}
    inputs, upstream = make_case(routing, dtype, **sizes, bias=True)
    actual = gradients(fp8, on(impl, inputs), upstream.to(impl.device))
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    truth = gradients(reference.fused_experts, wide, upstream)
    yardstick = gradients(chain, inputs, upstream)
    for name, value in truth.items():
        assert_accurate(name, actual[name], value, yardstick[name])


@pytest.mark.parametrize(
    ("activation", "interleaved", "inner"),
    [
        ("swiglu", True, 200),
        ("swigluoai", True, 24),
        ("swigluoai", False, 128),
        ("geglu", False, 130),
        ("reglu", True, 128),
        ("relu2", False, 200),
        ("silu", False, 1),
        ("gelu", False, 129),
    ],
)
def test_activations_and_blocks(
    impl: Implementation, activation: str, interleaved: bool, inner: int
) -> None:
    """Halves that begin with a block and within one, and the last block in part."""
    inputs, upstream = make_case(
        "dropped", torch.float32, hidden=130, inner=inner, activation=activation, bias=True
    )
    options = {"activation": activation, "interleaved": interleaved}
    found = gradients(
        lambda **given: fp8(**given, **options), on(impl, inputs), upstream.to(impl.device)
    )
    for name, value in definition(inputs, upstream, **options).items():
        assert frobenius_error(found[name], value) < requantized_limit(impl.device), name


def test_each_gradient_alone(impl: Implementation) -> None:
    inputs, upstream = make_case("one_token", torch.float32, hidden=40, inner=72, bias=True)
    whole = gradients(fp8, on(impl, inputs), upstream.to(impl.device))
    for names in (*((name,) for name in NAMES), ("x", "down"), ("gate_up", "topk_weights")):
        leaves = {
            k: v.detach().clone().requires_grad_(k in names) for k, v in on(impl, inputs).items()
        }
        fp8(**leaves).backward(upstream.to(impl.device))
        for name, value in leaves.items():
            if name in names:
                assert value.grad is not None
                assert torch.equal(value.grad, whole[name]), name
            else:
                assert value.grad is None


def test_bytes_kept_are_those_without_float8(impl: Implementation) -> None:
    inputs, _ = make_case("plain", torch.bfloat16, hidden=128, inner=128, bias=True)
    leaves = leaves_of(inputs, impl)

    def kept(**options: Any) -> int:
        sizes: dict[int, int] = {}

        def pack(value: Tensor) -> Tensor:
            sizes[value.data_ptr()] = value.numel() * value.element_size()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            moe_kernels.fused_experts(**leaves, **options)
        return sum(sizes.values())

    assert kept(precision="fp8_block") == kept()
    with torch.no_grad():
        assert kept(precision="fp8_block") == 0


def _check_close(name: str, found: Tensor, expected: Tensor) -> None:
    """Of weights in other layouts, which a GPU's tensor cores sum in another order."""
    if found.is_cuda:
        assert frobenius_error(found, expected.double()) < requantized_limit(found.device), name
    else:
        torch.testing.assert_close(found, expected, msg=name)


def test_strides_and_a_bound_of_rows_change_nothing(impl: Implementation) -> None:
    inputs, upstream = make_case("dropped", torch.float32, hidden=136, inner=72)
    valid = int(((inputs["topk_ids"] >= 0) & (inputs["topk_ids"] < 8)).sum())
    right = gradients(fp8, on(impl, inputs), upstream.to(impl.device))

    def viewed(x: Tensor, gate_up: Tensor, down: Tensor, **others: Tensor) -> Tensor:
        wide = x.repeat_interleave(2, 1)[:, ::2]
        stored = gate_up.mT.contiguous().mT, down.mT.contiguous().mT
        return fp8(x=wide, gate_up=stored[0], down=stored[1], **others, num_rows=valid + 3)

    strided = upstream.to(impl.device)[:1].expand(upstream.shape)
    found = gradients(viewed, on(impl, inputs), upstream.to(impl.device))
    for name, value in right.items():
        _check_close(name, found[name], value)
    expanded = gradients(fp8, on(impl, inputs), strided)
    copied = gradients(fp8, on(impl, inputs), strided.contiguous())
    for name, value in copied.items():
        assert torch.equal(expanded[name], value), name


@pytest.mark.parametrize(
    ("tokens", "hidden", "inner"), [(0, 8, 8), (5, 0, 8), (5, 8, 0), (1, 1, 1)]
)
def test_empty_sizes(impl: Implementation, tokens: int, hidden: int, inner: int) -> None:
    given = {
        "x": torch.randn(tokens, hidden),
        "gate_up": torch.randn(3, hidden, 2 * inner),
        "down": torch.randn(3, inner, hidden),
        "topk_weights": torch.rand(tokens, 2),
        "gate_up_bias": torch.randn(3, 2 * inner),
        "down_bias": torch.randn(3, hidden),
    }
    ids = torch.arange(2).repeat(tokens, 1)
    inputs, upstream = {**given, "topk_ids": ids}, torch.randn(tokens, hidden)
    found = gradients(fp8, on(impl, inputs), upstream.to(impl.device))
    truth = gradients(reference.fused_experts, inputs, upstream)
    for name, value in truth.items():
        assert found[name].shape == value.shape, name
        assert found[name].isfinite().all(), name
        if min(tokens, hidden, inner) == 0:
            torch.testing.assert_close(found[name].cpu(), value, msg=name)


def test_odd_numbers_stay_in_their_row(impl: Implementation) -> None:
    """A NaN or an infinity of a token is no other token's; nor are zeros and tiny numbers."""
    inputs, _ = make_case("plain", torch.float32, hidden=136, inner=72)
    right = fp8(**on(impl, inputs))
    x = inputs["x"].clone()
    x[3, 5], x[7, 130], x[9], x[11] = torch.nan, torch.inf, 0, 1e-42
    y = fp8(**on(impl, {**inputs, "x": x}))
    assert not y[[3, 7]].isfinite().any()
    assert torch.equal(y[[9, 11]], torch.zeros_like(y[[9, 11]])) or y[[9, 11]].abs().max() < 1e-35
    others = [t for t in range(37) if t not in (3, 7, 9, 11)]
    assert torch.equal(y[others], right[others])


def test_an_expert_without_tokens_is_not_read(impl: Implementation) -> None:
    """Its weights may be NaN, and its gradients are zero."""
    inputs, upstream = make_case("one_token", torch.float32, hidden=16, inner=8, bias=True)
    right = gradients(fp8, on(impl, inputs), upstream.to(impl.device))
    unused = [e for e in range(4) if e not in inputs["topk_ids"]]
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        inputs[name][unused] = torch.nan
        assert (right[name][unused] == 0).all(), name
    found = gradients(fp8, on(impl, inputs), upstream.to(impl.device))
    for name, value in right.items():
        assert torch.equal(found[name], value), name


def test_weights_that_are_float8_already(impl: Implementation) -> None:
    inputs, upstream = make_case("dropped", torch.float32, hidden=136, inner=72)
    leaves = leaves_of(inputs, impl)
    right = fp8(**leaves)
    right_grads = torch.autograd.grad(
        right, [leaves["x"], leaves["topk_weights"]], upstream.to(impl.device)
    )
    pairs = [moe_kernels.quantize_weights(leaves[name].detach()) for name in ("gate_up", "down")]
    given = {**leaves, "gate_up": pairs[0][0], "down": pairs[1][0]}
    y = fp8(**given, weight_scales=(pairs[0][1], pairs[1][1]))
    assert torch.equal(y, right)
    grads = torch.autograd.grad(y, [leaves["x"], leaves["topk_weights"]], upstream.to(impl.device))
    for name, found, expected in zip(("x", "topk_weights"), grads, right_grads, strict=True):
        _check_close(name, found, expected)


def test_main_grads_and_a_split_backward(impl: Implementation) -> None:
    inputs, upstream = make_case("dropped", torch.float32, hidden=136, inner=72, bias=True)
    leaves, up = leaves_of(inputs, impl), upstream.to(impl.device)
    whole = gradients(fp8, on(impl, inputs), up)
    main_grads = zeros_for(leaves)
    fp8(**leaves, main_grads=main_grads).backward(up)
    assert leaves["gate_up"].grad is leaves["down"].grad is None
    for name, buffer in zip(("gate_up", "down"), main_grads, strict=True):
        torch.testing.assert_close(buffer, whole[name])
    with FlopCounterMode(display=False) as counter:
        y = fp8(**leaves)
        torch.autograd.grad(y, [leaves[name] for name in NAMES], up)
    cost = counter.get_total_flops()
    assert cost == 18 * 29 * 4 * 136 * 72
    with FlopCounterMode(display=False) as counter:
        y = fp8(**leaves)
        first = torch.autograd.grad(y, (leaves["x"], leaves["topk_weights"]), up, retain_graph=True)
        names = ("gate_up", "down", "gate_up_bias", "down_bias")
        second = torch.autograd.grad(y, [leaves[name] for name in names], up)
    assert counter.get_total_flops() == cost
    for name, value in zip(("x", "topk_weights", *names), (*first, *second), strict=True):
        assert torch.equal(value, whole[name]), name


def test_autocast_checkpoint_and_a_second_backward(impl: Implementation) -> None:
    inputs, upstream = make_case("plain", torch.float32, hidden=40, inner=24)
    leaves, up = leaves_of(inputs, impl), upstream.to(impl.device)
    narrow = {k: v.detach().bfloat16() for k, v in leaves.items() if v.dtype == torch.float32}
    narrow["topk_weights"] = leaves["topk_weights"].detach()
    with torch.autocast(impl.device.type, dtype=torch.bfloat16):
        y = fp8(**leaves)
    assert torch.equal(y, fp8(**narrow, topk_ids=leaves["topk_ids"]))
    y.float().sum().backward()
    assert leaves["down"].grad is not None
    assert leaves["down"].grad.dtype == torch.float32
    right = gradients(fp8, on(impl, inputs), up)
    y = checkpoint(lambda x: fp8(**{**leaves, "x": x}), leaves["x"], use_reentrant=False)
    (grad,) = torch.autograd.grad(y, leaves["x"], up)
    assert torch.equal(grad, right["x"])
    (grad,) = torch.autograd.grad(fp8(**leaves), leaves["x"], up, create_graph=True)
    assert not grad.requires_grad or grad.grad_fn is not None
    wanted = up.clone().requires_grad_()
    (grad,) = torch.autograd.grad(fp8(**leaves), leaves["x"], wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


def test_repeats_bit_for_bit(impl: Implementation) -> None:
    inputs, upstream = make_case("all_to_one", torch.bfloat16, hidden=136, inner=72, bias=True)
    first, second = (gradients(fp8, on(impl, inputs), upstream.to(impl.device)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_chunks_of_columns_change_nothing(
    impl: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, upstream = make_case("plain", torch.float32, hidden=300, inner=24, bias=True)
    whole = gradients(fp8, on(impl, inputs), upstream.to(impl.device))
    from moe_kernels.triton import _combine

    monkeypatch.setattr(_combine, "WHOLE_BYTES", 0)
    monkeypatch.setattr(_combine, "CHUNK", 256)
    parts = gradients(fp8, on(impl, inputs), upstream.to(impl.device))
    for name, value in whole.items():
        assert torch.equal(parts[name], value), name


@pytest.mark.parametrize(("inner", "interleaved"), [(24, True), (200, True), (128, False)])
def test_kernels_write_within_their_buffers(inner: int, interleaved: bool) -> None:
    """The last block of activations has one block of h, or two."""
    from moe_kernels.triton.fused_experts_fp8 import Activation, _activate, _activate_backward

    device = torch.device("cuda" if HAS_GPU else "cpu")
    rows, width, spare = 37, 2 * inner, 5
    blocks = -(-width // 128)
    with contextlib.nullcontext() if HAS_GPU else mended_interpreter():
        h = torch.randn(rows, width, device=device)
        offsets = torch.tensor([0, 20, rows - 3], dtype=torch.int32, device=device)
        act = Activation("swigluoai", interleaved, 1.702, 7.0)
        values = torch.full((rows + spare, width), 1.0, device=device).to(FLOAT8)
        scales = torch.full((blocks + 2, rows), 7.0, device=device)
        quantized = values[:rows], scales[:blocks].t()
        grad_h = torch.full((rows + spare, width), 7.0, device=device)
        partials = torch.full((4, rows), 7.0, device=device)
        weights = torch.rand(rows, device=device)
        grad = torch.randn(rows, inner, device=device)
        _activate_backward(
            grad, h, weights, offsets, act, grad_h[:rows], quantized, None, partials[:2]
        )
        found = moe_kernels.reference.quantize_rows(grad_h[:rows].cpu())
        assert torch.equal(values[: rows - 3].cpu().float(), found[0][: rows - 3].float())
        assert torch.equal(quantized[1][: rows - 3].cpu(), found[1][: rows - 3])
        for buffer, written in ((grad_h, rows - 3), (values.float(), rows - 3), (scales, blocks)):
            untouched = buffer[written:]
            assert torch.equal(untouched, untouched[:1, :1].expand(untouched.shape))
        assert (partials[-(-inner // 128) :] == 7).all()
        a = h.new_empty(rows, inner, dtype=FLOAT8)
        a_scales = h.new_empty(-(-inner // 128), rows).t()
        _activate(h, offsets, (a, a_scales), act)
        value = moe_kernels.reference.expert_activation(
            h.cpu(), "swigluoai", None, interleaved, 1.702, 7.0
        )
        back = moe_kernels.reference.dequantize_rows(a.cpu(), a_scales.cpu(), torch.float32)
        assert frobenius_error(back[: rows - 3], value[: rows - 3].double()) < 0.04


def test_opcheck(impl: Implementation) -> None:
    inputs, _ = make_case("dropped", torch.float32, hidden=40, inner=24, bias=True)
    leaves = leaves_of(inputs, impl)
    arguments = (
        *(leaves[name] for name in ("x", "gate_up", "down", "topk_ids", "topk_weights")),
        *(leaves["gate_up_bias"], leaves["down_bias"], "swiglu", False, 1.702, float("inf")),
        *(leaves["topk_ids"].numel(), True, None, None, None, None),
    )
    op = torch.ops.moe_kernels.fused_experts_fp8
    torch.library.opcheck(op, arguments)
    y, h, *order = (value.detach() for value in op(*arguments))
    plain = [v.detach() if isinstance(v, Tensor) else v for v in arguments]
    tail = [*plain[5:7], *plain[7:11]]
    for needs in ([True] * 6, [True] + [False] * 5, [False, True, True, False, False, False]):
        torch.library.opcheck(
            torch.ops.moe_kernels.fused_experts_fp8_backward,
            (y, *plain[:3], plain[4], h, *order, *tail, needs),
            {"keep_grad_h": True, "keep_weighted_a": True},
            test_utils=("test_schema", "test_faketensor"),
        )


def test_a_gradient_that_is_known_is_given_back_as_a_copy(impl: Implementation) -> None:
    """An op's output is no input of it."""
    inputs, upstream = make_case("one_token", torch.float32, hidden=8, inner=4)
    x, gate_up, down, ids, weights = (
        on(impl, inputs)[name] for name in ("x", "gate_up", "down", "topk_ids", "topk_weights")
    )
    tail = (None, None, "swiglu", False, 1.702, float("inf"))
    saved = (ids.numel(), True, None, None, None, None)
    ops = torch.ops.moe_kernels
    _, h, *order = ops.fused_experts_fp8(x, gate_up, down, ids, weights, *tail, *saved)
    known, needs = torch.randn_like(h), [True, False, False, False, False, False]
    saved = (x, gate_up, down, weights, h, *order, *tail, needs, known, True)
    for backward in (ops.fused_experts_fp8_backward, ops.fused_experts_backward):
        found = backward(upstream.to(impl.device), *saved)[6]
        assert torch.equal(found, known)
        assert found.data_ptr() != known.data_ptr()


def test_compiles_whole(impl: Implementation) -> None:
    inputs, upstream = make_case("plain", torch.float32, hidden=40, inner=24)
    given, up = on(impl, inputs), upstream.to(impl.device)
    right = gradients(fp8, given, up)
    for options in ({}, {"dynamic": True}):
        compiled = torch.compile(fp8, fullgraph=True, backend="aot_eager", **options)
        for name, value in gradients(compiled, given, up).items():
            torch.testing.assert_close(value, right[name], msg=name)


def test_meta_tensors_give_shapes() -> None:
    inputs, _ = make_case("plain", torch.float32)
    given = {k: v.to("meta").requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
    y = fp8(**given)
    assert y.is_meta
    assert y.shape == inputs["x"].shape
    y.sum().backward()
    assert given["down"].grad is not None


def test_float64_is_for_cpus() -> None:
    inputs, upstream = make_case("dropped", torch.float64, hidden=136, inner=72, bias=True)
    inputs["topk_weights"] = inputs["topk_weights"].double()
    found = gradients(fp8, inputs, upstream)
    for name, value in definition(inputs, upstream).items():
        assert frobenius_error(found[name], value) < 1e-12, name


def test_refuses_what_does_not_fit() -> None:
    inputs, _ = make_case("plain", torch.float32)

    def refused(kind: type[Exception], match: str, **changes: Any) -> None:
        arguments = {**inputs, "precision": "fp8_block", **changes}
        with pytest.raises(kind, match=match):
            moe_kernels.fused_experts(**arguments)

    pairs = [moe_kernels.quantize_weights(inputs[name]) for name in ("gate_up", "down")]
    scales = (pairs[0][1], pairs[1][1])
    ready = {"gate_up": pairs[0][0], "down": pairs[1][0], "weight_scales": scales}
    refused(ValueError, "precision must be one of fp8_block; got 'fp8'", precision="fp8")
    refused(TypeError, "gate_up must have x's dtype", gate_up=pairs[0][0])
    refused(TypeError, "gate_up, with weight_scales, must be one of float8", weight_scales=scales)
    refused(ValueError, "weight_scales need precision", **ready, precision=None)
    refused(TypeError, "weight_scales must be a pair", **{**ready, "weight_scales": scales[:1]})
    wrong = (scales[0][:1], scales[1])
    refused(ValueError, r"that of gate_up must be \[8, 1, 1\]", **{**ready, "weight_scales": wrong})
    wrong = (scales[0], scales[1].double())
    refused(TypeError, "that of down must be one of float32", **{**ready, "weight_scales": wrong})
    main = torch.zeros(inputs["gate_up"].shape)
    refused(ValueError, "main_grads must be None with", **ready, main_grads=(main, None))
    learned = ready["gate_up"].clone().requires_grad_()
    refused(ValueError, "gate_up, with weight_scales, has no", **{**ready, "gate_up": learned})
