"""Activations of expert layers.

R rows, I intermediate size, W = 2 * I columns for gated kinds, else I.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from moe_kernels.ops._checks import (
    FLOAT_DTYPES,
    check_choice,
    check_device,
    check_dtype,
    check_flag,
    check_number,
    check_tensor,
    shape,
    without_infinity,
)
from moe_kernels.ops._library import (
    call_op,
    define,
    refuse_double_backward,
    register_autograd,
)
from moe_kernels.reference.expert_activation import ACTIVATIONS, default_limit, is_gated
from moe_kernels.reference.expert_activation import (
    expert_activation as expert_activation_reference,
)
from moe_kernels.reference.expert_activation import (
    expert_activation_backward as expert_activation_backward_reference,
)

CLAMPED = ("swiglu", "swigluoai")


def resolve_activation(
    op: str,
    kind: str,
    interleaved: bool,
    alpha: float | None,
    limit: float | None,
    name: str = "activation",
) -> tuple[float, float]:
    """Check the options of the activation that op calls ``name``, and fill in its defaults.

    Returns:
        ``(alpha, limit)``.
    """
    check_choice(op, name, kind, ACTIVATIONS)
    check_flag(op, "interleaved", interleaved)
    if interleaved and not is_gated(kind):
        raise ValueError(f"{op}: interleaved needs a gated activation; {kind} has no gate")
    if alpha is not None and kind != "swigluoai":
        raise ValueError(f"{op}: alpha belongs to swigluoai; {name} is {kind}")
    if limit is not None and kind not in CLAMPED:
        raise ValueError(f"{op}: limit belongs to {' and '.join(CLAMPED)}; {name} is {kind}")
    if limit is not None:
        check_number(op, "limit", limit)
        if not limit > 0:
            raise ValueError(f"{op}: limit must be positive (None for no clamp); got {limit}")
    if alpha is not None:
        check_number(op, "alpha", alpha)
        if not abs(alpha) < math.inf:
            raise ValueError(f"{op}: alpha must be finite; got {alpha}")
    return (
        1.702 if alpha is None else float(alpha),
        without_infinity(default_limit(kind) if limit is None else float(limit)),
    )


def _fake(
    h: Tensor,
    kind: str,
    row_weights: Tensor | None,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> Tensor:
    return h.new_empty(h.shape[0], h.shape[1] // 2 if is_gated(kind) else h.shape[1])


def _backward_fake(
    grad: Tensor,
    h: Tensor,
    kind: str,
    row_weights: Tensor | None,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> tuple[Tensor, Tensor]:
    return (
        h.new_empty(h.shape),
        h.new_empty(0) if row_weights is None else row_weights.new_empty(row_weights.shape),
    )


_op = define(
    "expert_activation(Tensor h, str kind, Tensor? row_weights, bool interleaved, float alpha,"
    " float limit) -> Tensor",
    reference=expert_activation_reference,
    fake=_fake,
)
_backward_op = define(
    "expert_activation_backward(Tensor grad, Tensor h, str kind, Tensor? row_weights,"
    " bool interleaved, float alpha, float limit) -> (Tensor, Tensor)",
    reference=expert_activation_backward_reference,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, ctx.kind, row_weights, *ctx.options = inputs
    ctx.save_for_backward(h, row_weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    h, row_weights = ctx.saved_tensors
    grad_h, grad_weights = _backward_op(grad, h, ctx.kind, row_weights, *ctx.options)
    return grad_h, None, grad_weights if row_weights is not None else None, None, None, None


register_autograd("expert_activation", _backward, _setup_context)
refuse_double_backward("expert_activation_backward")


def expert_activation(
    h: Tensor,
    kind: str,
    *,
    row_weights: Tensor | None = None,
    interleaved: bool = False,
    alpha: float | None = None,
    limit: float | None = None,
) -> Tensor:
    """Apply an expert layer's activation, and row weights in the same pass.

    Gated kinds take the gate g and the up half u from the columns of h:
    ``swiglu`` silu(g) * u (Shazeer 2020, arXiv:2002.05202), ``geglu`` gelu_tanh(g) * u, ``reglu``
    relu(g) * u, ``swigluoai`` g * sigmoid(alpha * g) * (u + 1) (gpt-oss, arXiv:2508.10925).
    Not gated: ``relu2`` relu(h)**2 (So et al. 2021, arXiv:2109.08668), ``silu``, ``gelu`` (erf).

    Args:
        h: [R, W], any float dtype; computed in float32.
        kind: one of the names above.
        row_weights: [R], any float dtype, multiplies each row.
        interleaved: gate and up columns alternate (g0 u0 g1 u1 ...) instead of two halves.
        alpha: of swigluoai, default 1.702.
        limit: clamps g above and u to +-limit. swigluoai: default 7; swiglu: default no clamp. At
            the bound the slope is 1, as that of torch.clamp was before 2.14.

    Returns:
        [R, I] in h.dtype.

    Raises:
        ValueError: unknown kind, odd W for a gated kind, options of another kind, shapes that do
            not fit.
        TypeError: not floating point.
    """
    op = "expert_activation"
    alpha_value, limit_value = resolve_activation(op, kind, interleaved, alpha, limit, "kind")
    check_tensor(op, "h", h, 2, "[R, W]")
    check_dtype(op, "h", h, FLOAT_DTYPES)
    if is_gated(kind) and h.shape[1] % 2:
        raise ValueError(f"{op}: h must be [R, 2 * I] for {kind}; got {shape(h)}")
    if row_weights is not None:
        check_tensor(op, "row_weights", row_weights, 1, "[R]")
        check_dtype(op, "row_weights", row_weights, FLOAT_DTYPES)
        check_device(op, "h", h, "row_weights", row_weights)
        if row_weights.shape[0] != h.shape[0]:
            raise ValueError(
                f"{op}: row_weights must be [R] with R = {h.shape[0]} (h.shape[0]); "
                f"got {shape(row_weights)}"
            )
    out: Tensor = call_op(_op, h, kind, row_weights, interleaved, alpha_value, limit_value)
    return out
