"""expert_activation: every kind against the definition, with clamps met and weights."""

import math

import pytest
import torch

import moe_kernels
from moe_kernels import reference
from moe_kernels.reference import ACTIVATIONS, is_gated
from tests.conftest import Implementation
from tests.kernels.accuracy import assert_accurate, gradients, torch_activation

CASES = [
    (kind, interleaved)
    for kind in ACTIVATIONS
    for interleaved in ((False, True) if is_gated(kind) else (False,))
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "interleaved"), CASES)
def test_equals_definition(
    impl: Implementation, kind: str, interleaved: bool, dtype: torch.dtype
) -> None:
    limit = 1.25 if kind in ("swiglu", "swigluoai") else None
    alpha = 1.3 if kind == "swigluoai" else None
    h = (2 * torch.randn(23, 2 * 37)).to(dtype)
    weights = torch.rand(23)
    upstream = torch.randn(23, 37 if is_gated(kind) else 74).to(dtype)

    ours = gradients(
        lambda h, row_weights: moe_kernels.expert_activation(
            h, kind, row_weights=row_weights, interleaved=interleaved, alpha=alpha, limit=limit
        ),
        {"h": h.to(impl.device), "row_weights": weights.to(impl.device)},
        upstream.to(impl.device),
    )
    options = (interleaved, alpha or 1.702, limit or math.inf)
    truth = gradients(
        lambda h, row_weights: reference.expert_activation(h, kind, row_weights, *options),
        {"h": h.double(), "row_weights": weights.double()},
        upstream,
    )
    yardstick = gradients(
        lambda h, row_weights: (
            torch_activation(h, kind, *options) * row_weights.to(h.dtype)[:, None]
        ),
        {"h": h, "row_weights": weights},
        upstream,
    )
    for name, value in truth.items():
        assert_accurate(name, ours[name], value, yardstick[name])


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_stays_finite_far_out(impl: Implementation, kind: str) -> None:
    h = torch.tensor([[-1e4, -90.0, -20.0, 20.0, 90.0, 1e4] * 2], device=impl.device)
    h.requires_grad_()
    out = moe_kernels.expert_activation(h, kind)
    (grad,) = torch.autograd.grad(out.sum(), h)
    limit = 7.0 if kind == "swigluoai" else math.inf
    truth = reference.expert_activation(h.detach().double().cpu(), kind, limit=limit)
    torch.testing.assert_close(out.detach().cpu().double(), truth, rtol=1e-5, atol=1e-6)
    assert grad.isfinite().all()


def test_takes_views_and_no_rows(impl: Implementation) -> None:
    h = torch.randn(10, 31).to(impl.device).t()[:, ::5]
    out = moe_kernels.expert_activation(h, "swiglu")
    assert torch.equal(out, moe_kernels.expert_activation(h.contiguous(), "swiglu"))
    assert moe_kernels.expert_activation(h[:0], "relu2").shape == (0, 2)


def test_refuses_wrong_options() -> None:
    h = torch.randn(3, 8)
    for message, kind, options in (
        ("kind must be one of", "tanh", {}),
        ("alpha belongs to swigluoai", "swiglu", {"alpha": 1.0}),
        ("limit belongs to", "geglu", {"limit": 1.0}),
        ("limit must be positive", "swiglu", {"limit": 0.0}),
        ("interleaved needs a gated", "relu2", {"interleaved": True}),
        (r"row_weights must be \[R\]", "swiglu", {"row_weights": torch.rand(4)}),
    ):
        with pytest.raises(ValueError, match=message):
            moe_kernels.expert_activation(h, kind, **options)
    with pytest.raises(ValueError, match=r"h must be \[R, 2 \* I\]"):
        moe_kernels.expert_activation(h[:, :7], "swiglu")
