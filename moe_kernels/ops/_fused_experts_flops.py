"""What ``torch.utils.flop_counter`` counts of ``fused_experts``: functions of shapes.

R = T * K rows of a call, H hidden size, I intermediate size, W columns of gate_up.
"""

from __future__ import annotations

from typing import Any


def flops(
    x: Any, gate_up: Any, down: Any, topk_ids: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Two products over every slot: ``2 * R * (H * W + I * H)``."""
    slots = topk_ids[0] * topk_ids[1]
    num_rows = args[7] if len(args) > 7 else slots
    return int(2 * min(slots, num_rows) * (gate_up[1] * gate_up[2] + down[1] * down[2]))


def backward_flops(
    grad: Any,
    x: Any,
    gate_up: Any,
    down: Any,
    topk_weights: Any,
    h: Any,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """Each of the products whose result is owed: dA, unless grad_h is known, dX, dW1, dW2."""
    dx, dgate_up, ddown, dweights, dbias1, _ = args[9]
    known_grad_h = args[10] if len(args) > 10 else None
    keep_grad_h = args[11] if len(args) > 11 else False
    up, low = 2 * h[0] * gate_up[1] * gate_up[2], 2 * h[0] * down[1] * down[2]
    wanted = dx or dgate_up or dweights or dbias1 or keep_grad_h
    through_down = known_grad_h is None and wanted
    return int(low * (through_down + ddown) + up * (dx + dgate_up))


def overwriting_flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return backward_flops(*args[:16], None, True)


def wgrad_flops(
    out: Any, a: Any, grad: Any, row_to_slot: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    gathered = args[2]
    rows = grad[0] if gathered else a[0]
    return int(2 * rows * a[1] * grad[1])
