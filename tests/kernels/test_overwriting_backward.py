"""A backward that is the last one leaves the gradient of h in the place of h."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import moe_kernels
from tests.conftest import Implementation
from tests.kernels.test_fused_experts import make_case
from tests.kernels.test_op_contract import leaves_of

OPS = ("fused_experts", "fused_experts_fp8")
NEEDS = {
    "all": [True] * 6,
    "x": [True, *[False] * 5],
    "weights": [False, True, True, False, False, False],
    "none": [False] * 6,  # for gradients that are added to a buffer
}


def arguments_of(
    name: str, impl: Implementation, case: str, dtype: torch.dtype, **options: Any
) -> tuple[list[Any], list[Any]]:
    """Those of backward, but for ``needs`` and what follows them; and float8's scales."""
    activation, interleaved = options.get("activation", "swiglu"), options.get("interleaved", False)
    inputs, upstream = make_case(case, dtype, bias=True, activation=activation)
    leaves = {key: value.detach() for key, value in leaves_of(inputs, impl).items()}
    weights = [leaves[key] for key in ("gate_up", "down")]
    biases = [leaves[key] for key in ("gate_up_bias", "down_bias")]
    tail = [*biases, activation, interleaved, 1.702, 2.0]
    scales: list[Any] = [None, None] if name.endswith("fp8") else []
    op = getattr(torch.ops.moe_kernels, name)
    _, h, *order = op(
        leaves["x"], *weights, leaves["topk_ids"], leaves["topk_weights"], *tail,
        leaves["topk_ids"].numel(), True, None, None, *scales,
    )  # fmt: skip
    up = upstream.to(impl.device)
    return [up, leaves["x"], *weights, leaves["topk_weights"], h, *order, *tail], scales


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize(
    ("case", "dtype", "options"),
    [
        ("plain", torch.bfloat16, {}),
        ("dropped", torch.float32, {"interleaved": True}),
        ("many_experts", torch.bfloat16, {"activation": "relu2"}),
        ("all_to_one", torch.float16, {"activation": "swigluoai", "interleaved": True}),
        ("no_tokens", torch.float32, {}),
        ("all_dropped", torch.bfloat16, {}),
    ],
)
@pytest.mark.parametrize("name", OPS)
def test_the_bits_are_those_of_a_backward_that_keeps_h(
    impl: Implementation,
    name: str,
    case: str,
    dtype: torch.dtype,
    options: dict[str, Any],
    needs: str,
) -> None:
    arguments, scales = arguments_of(name, impl, case, dtype, **options)
    *right, grad_h, weighted_a = getattr(torch.ops.moe_kernels, f"{name}_backward")(
        *arguments, NEEDS[needs], None, True, True, *scales
    )
    used = int(arguments[8][-1])
    for _ in range(3):  # on a GPU: seen, noted, repeated
        h = arguments[5].clone()
        given = [*arguments[:5], h, *arguments[6:]]
        *found, found_a = getattr(torch.ops.moe_kernels, f"{name}_backward_")(
            *given, NEEDS[needs], True, *scales
        )
        for one, other in zip(found, right, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(h[:used], grad_h[:used])
        assert torch.equal(found_a[:used], weighted_a[:used])


LAYERS: dict[str, dict[str, Any]] = {"plain": {}, "fp8": {"precision": "fp8_block"}}


def layer_of(impl: Implementation, case: str) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
    """Arguments of a layer, those of them that require a gradient, and the upstream gradient."""
    inputs, upstream = make_case(case, torch.bfloat16, bias=True)
    leaves = leaves_of(inputs, impl)
    wanted = [value for value in leaves.values() if value.requires_grad]
    return leaves, wanted, upstream.to(impl.device)


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_h_is_kept_for_a_backward_that_may_follow(
    impl: Implementation, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients are the same, and h is overwritten once, by the last of them."""
    leaves, wanted, up = layer_of(impl, "dropped")
    saved: list[Tensor] = []

    def unpack(value: Tensor) -> Tensor:
        saved.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(lambda value: value, unpack):
        y = moe_kernels.fused_experts(**leaves, **options)
    found, changed = [], []
    for again in (True, True, False):
        saved.clear()
        found.append(torch.autograd.grad(y, wanted, up, retain_graph=again))
        changed.append([value.clone() for value in saved])
    for first, second, third in zip(*found, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)
    h = next(i for i, value in enumerate(saved) if value.shape == (29 * 4, 48))
    assert all(
        torch.equal(*(torch.nan_to_num(value) for value in pair))
        for pair in zip(*changed[:2], strict=True)
    )
    different = [i for i, pair in enumerate(zip(*changed[1:], strict=True)) if differ(*pair)]
    assert different == [h]


def test_h_stays_with_who_has_called_the_op(impl: Implementation) -> None:
    """Unless they say that they do not look at it."""
    inputs, _ = make_case("plain", torch.float32)
    leaves = leaves_of(inputs, impl)
    arguments = [leaves[n] for n in ("x", "gate_up", "down", "topk_ids", "topk_weights")]
    options = (None, None, "swiglu", False, 1.702, float("inf"), 37 * 3, True, None, None)
    for owned in (False, True):
        y, h, *_ = torch.ops.moe_kernels.fused_experts(*arguments, *options, owned)
        before = h.clone()
        y.sum().backward()
        assert torch.equal(h, before) == (not owned)


def differ(one: Tensor, other: Tensor) -> bool:
    return not torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_a_checkpointed_layer_has_the_same_gradients(
    impl: Implementation, options: dict[str, Any]
) -> None:
    leaves, wanted, up = layer_of(impl, "dropped")

    def layer(x: Tensor) -> Tensor:
        once = moe_kernels.fused_experts(**{**leaves, "x": x}, **options)
        return moe_kernels.fused_experts(**{**leaves, "x": once}, **options)

    right = torch.autograd.grad(layer(leaves["x"]), wanted, up, retain_graph=True)
    y = checkpoint(layer, leaves["x"], use_reentrant=False)
    for again in (True, False):
        found = torch.autograd.grad(y, wanted, up, retain_graph=again)
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


class Fails(TorchDispatchMode):
    """Lets the memory end when h is overwritten and not all gradients are there."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._opname in [f"{name}_backward_" for name in OPS]:
            raise torch.OutOfMemoryError("the memory has ended")
        return result


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_a_backward_that_fails_is_not_repeated_with_what_it_has_left(
    impl: Implementation, options: dict[str, Any]
) -> None:
    leaves, wanted, up = layer_of(impl, "plain")
    y = moe_kernels.fused_experts(**leaves, **options)
    with pytest.raises(torch.OutOfMemoryError), Fails():
        torch.autograd.grad(y, wanted, up)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        torch.autograd.grad(y, wanted, up)


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_gradients_are_not_differentiated_though_the_graph_is_not_retained(
    impl: Implementation, options: dict[str, Any]
) -> None:
    leaves, wanted, up = layer_of(impl, "plain")
    y = moe_kernels.fused_experts(**leaves, **options)
    grad, *_ = torch.autograd.grad(y, wanted, up, retain_graph=False, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(grad.sum(), wanted, allow_unused=True)


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_several_gradients_at_once_do_not_share_what_is_overwritten(
    impl: Implementation, options: dict[str, Any]
) -> None:
    """As of a vectorized Jacobian, which retains nothing either."""
    leaves, wanted, up = layer_of(impl, "plain")
    ups = torch.stack([up, -up])
    y = moe_kernels.fused_experts(**leaves, **options)
    right = [torch.autograd.grad(y, wanted, grad, retain_graph=True) for grad in ups]
    found = torch.autograd.grad(y, wanted, ups, is_grads_batched=True)
    for both, one, other in zip(found, *right, strict=True):
        assert torch.equal(both, torch.stack([one, other]))


@pytest.mark.parametrize("name", OPS)
def test_opcheck(impl: Implementation, name: str) -> None:
    arguments, scales = arguments_of(name, impl, "dropped", torch.float32)
    # PyTorch's check of aliases compares what is written with what was there
    arguments[5] = torch.nan_to_num(arguments[5])
    for needs in NEEDS.values():
        torch.library.opcheck(
            getattr(torch.ops.moe_kernels, f"{name}_backward_").default,
            (*arguments, needs, True, *scales),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_h_that_is_not_contiguous_is_refused() -> None:
    impl = Implementation("cpu", torch.device("cpu"))
    arguments, _ = arguments_of("fused_experts", impl, "plain", torch.float32)
    arguments[5] = arguments[5].repeat_interleave(2, 1)[:, ::2]
    with pytest.raises(ValueError, match=r"fused_experts_backward_: h, which is overwritten, must"):
        torch.ops.moe_kernels.fused_experts_backward_(*arguments, [True] * 6)
