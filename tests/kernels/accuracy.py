"""How close is close: against the definition in float64, with plain PyTorch as the yardstick."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.accuracy import spread
from moe_kernels.reference.expert_activation import clamp_gate_up, split_gate_up


def _pair(actual: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    width = truth.shape[-1] if truth.dim() else 1
    return actual.double().cpu().reshape(-1, width), truth.double().cpu().reshape(-1, width)


def _finite(error: Tensor) -> float:
    """NaN counts as infinite."""
    return float("inf") if error.isnan() else error.item()


def frobenius_error(actual: Tensor, truth: Tensor) -> float:
    """Relative error of the whole tensor."""
    actual, truth = _pair(actual, truth)
    return _finite((actual - truth).norm() / truth.norm().clamp_min(1e-300))


def worst_row_error(actual: Tensor, truth: Tensor) -> float:
    """Largest error of a row, relative to the root mean square row."""
    actual, truth = _pair(actual, truth)
    scale = truth.norm() / truth.shape[0] ** 0.5
    return _finite((actual - truth).norm(dim=1).max() / scale.clamp_min(1e-300))


def float8_limit(device: torch.device) -> float:
    """The largest relative error of a product of float8 operands in float32.

    Hopper's tensor cores align the products that an instruction adds to the largest and keep about
    14 bits of them (DeepSeek-V3, arXiv:2412.19437, section 3.3.2), so 2**-14 = 6e-5 of a sum, which
    leaves a row's values a little farther.
    """
    return 2e-4 if device.type == "cuda" else 1e-6


def requantized_limit(device: torch.device) -> float:
    """The same of a product whose operands are products that were rounded to float8 again.

    Values e away move to the next float8, d = 0.09 away, with a chance of about e / d, which is an
    error of sqrt(e * d): 3e-3 with the 8e-5 of a tensor core. Backward has two such roundings.
    """
    return 8e-3 if device.type == "cuda" else 2e-3


def assert_accurate(name: str, actual: Tensor, truth: Tensor, yardstick: Tensor) -> None:
    """Our error is at most 1.5 times the yardstick's, and no single row stands out.

    Both may have a few roundings in a row, which a small sample of the yardstick may by luck not
    show (see ``spread``). The worst of many rows scatters more than their sum, so it may be three
    times as far, and nine times where a row is one value: the worst of 600 cases of that was five
    times as far, and a row that is wrong is a hundred times as far.
    """
    assert actual.shape == truth.shape, f"{name}: {actual.shape} is not {truth.shape}"
    assert actual.dtype == yardstick.dtype, f"{name}: {actual.dtype} is not {yardstick.dtype}"
    if truth.numel() == 0:
        return
    if truth.double().norm() == 0:
        assert actual.double().norm() == 0, f"{name} must be zero"
        return
    rounding = torch.finfo(yardstick.dtype).eps * (0.5 if yardstick.element_size() == 2 else 2)
    scatter = 1 + spread(truth.numel())
    width = truth.shape[-1] if truth.dim() else 1
    for measure, factor in ((frobenius_error, 1.5), (worst_row_error, 3.0 + 6.0 / width**0.5)):
        ours, theirs = measure(actual, truth), measure(yardstick, truth)
        limit = factor * scatter * max(theirs, rounding)
        assert ours <= limit, f"{name}: {measure.__name__} {ours:.2e}, limit {limit:.2e}"


def torch_activation(h: Tensor, kind: str, interleaved: bool, alpha: float, limit: float) -> Tensor:
    """The activation with PyTorch's functions in h's dtype."""
    if kind == "relu2":
        return functional.relu(h).square()
    if kind in ("silu", "gelu"):
        out: Tensor = getattr(functional, kind)(h)
        return out
    gate, up = split_gate_up(h, interleaved)
    if kind == "geglu":
        return functional.gelu(gate, approximate="tanh") * up
    if kind == "reglu":
        return functional.relu(gate) * up
    if limit < float("inf"):
        gate, up = clamp_gate_up(gate, up, limit)
    if kind == "swiglu":
        return functional.silu(gate) * up
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def torch_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    activation: str = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = float("inf"),
) -> Tensor:
    """The chain a model would run without us, in x's dtype: the yardstick of fused_experts."""
    y = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        token, slot = torch.where(topk_ids == e)
        h = x[token] @ gate_up[e]
        if gate_up_bias is not None:
            h = h + gate_up_bias[e]
        out = torch_activation(h, activation, interleaved, alpha, limit) @ down[e]
        if down_bias is not None:
            out = out + down_bias[e]
        y = y.index_add(0, token, out * topk_weights[token, slot, None].to(out.dtype))
    return y


def gradients(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], upstream: Tensor
) -> dict[str, Tensor]:
    """The value, under "out", and the gradient of every float input under its name."""
    leaves = {
        name: value.detach().clone().requires_grad_(value.is_floating_point())
        for name, value in inputs.items()
    }
    out = function(**leaves)
    wanted = [name for name, value in leaves.items() if value.requires_grad]
    grads = torch.autograd.grad(out, [leaves[name] for name in wanted], upstream.to(out))
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}
