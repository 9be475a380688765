"""The exchange as ops: ``moe_kernels::dispatch`` and ``combine``, and their backwards.

Functional, so that autograd, torch.compile and selective activation checkpointing know them: the
name of a dispatcher (``moe_kernels._C.Dispatcher``) and tensors go in, tensors come out. The
kernels are C++ (csrc/dispatch).

T tokens, H hidden size, K experts a token, E experts, P ranks, U tokens received.
``slot_rows [T, K]`` int32 is the row that each slot travelled in, -1 if in none; ``plan [2 P + 2]``
int64, on the CPU, the number of rows sent to each rank, of those received from each, the number of
the dispatch, which the ranks agree on and no other dispatch of their group has, and a tag of the
group. Between GPUs that read each other's memory U is a capacity, and ``plan`` is on the device,
with more in it (csrc/cuda/protocol.h). ``..._start`` and ``..._finish`` are the halves of an
exchange, joined by a ``ticket []`` int64; gradients go through the latter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_parallel.dispatch.native import extension

NAMESPACE = "moe_kernels"

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def _define(schema: str, fake: Callable[..., Any]) -> Any:
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _dispatch_fake(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, extra: Tensor | None, dispatcher: str
) -> tuple[Tensor, ...]:
    context, top_k = torch.library.get_ctx(), topk_ids.shape[1]
    owner = extension().find_dispatcher(dispatcher)
    plan = torch.empty(2 * owner.ranks + 2, dtype=torch.int64, device="cpu")
    if owner.has_fixed_sizes(x.device.type):
        received, slots, words = owner.fixed_sizes(int(top_k))
        plan = x.new_empty(words, dtype=torch.int64)
    else:
        received, slots = context.new_dynamic_size(), context.new_dynamic_size()
    return (
        x.new_empty(received, x.shape[1]),
        topk_ids.new_empty(received, top_k, dtype=torch.int32),
        topk_weights.new_empty(received, top_k),
        topk_ids.new_empty(topk_ids.shape, dtype=torch.int32),
        plan,
        x.new_empty(slots, 0, dtype=torch.uint8),
        x.new_empty(0) if extra is None else extra.new_empty(received, *extra.shape[1:]),
    )


def _start_fake(*arguments: Any) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


def _dispatch_finish_fake(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    extra: Tensor | None,
    ticket: Tensor,
    dispatcher: str,
) -> tuple[Tensor, ...]:
    return _dispatch_fake(x, topk_ids, topk_weights, extra, dispatcher)


def _dispatch_backward_fake(
    grad_x: Tensor | None,
    grad_weights: Tensor | None,
    slot_rows: Tensor,
    plan: Tensor,
    dispatcher: str,
) -> tuple[Tensor, Tensor]:
    empty = slot_rows.new_empty(0)
    return (
        empty if grad_x is None else grad_x.new_empty(slot_rows.shape[0], grad_x.shape[1]),
        torch.empty_like(empty)
        if grad_weights is None
        else grad_weights.new_empty(slot_rows.shape),
    )


def _combine_fake(y: Tensor, slot_rows: Tensor, plan: Tensor, dispatcher: str) -> Tensor:
    return y.new_empty(slot_rows.shape[0], y.shape[1])


def _combine_finish_fake(
    y: Tensor, slot_rows: Tensor, plan: Tensor, ticket: Tensor, dispatcher: str
) -> Tensor:
    return _combine_fake(y, slot_rows, plan, dispatcher)


def _combine_backward_fake(
    grad: Tensor, slot_rows: Tensor, plan: Tensor, received: Any, dispatcher: str
) -> Tensor:
    return grad.new_empty(received, grad.shape[1])


_TOKENS = "Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor? extra"
_ARRIVED = (
    "(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor slot_rows, Tensor plan,"
    " Tensor num_slots, Tensor extra)"
)
dispatch = _define(f"dispatch({_TOKENS}, str dispatcher) -> {_ARRIVED}", _dispatch_fake)
dispatch_start = _define(f"dispatch_start({_TOKENS}, str dispatcher) -> Tensor", _start_fake)
dispatch_finish = _define(
    f"dispatch_finish({_TOKENS}, Tensor ticket, str dispatcher) -> {_ARRIVED}",
    _dispatch_finish_fake,
)
_dispatch_backward_op = _define(
    "dispatch_backward(Tensor? grad_x, Tensor? grad_weights, Tensor slot_rows, Tensor plan,"
    " str dispatcher) -> (Tensor, Tensor)",
    _dispatch_backward_fake,
)
combine = _define(
    "combine(Tensor y, Tensor slot_rows, Tensor plan, str dispatcher) -> Tensor",
    _combine_fake,
)
combine_start = _define(
    "combine_start(Tensor y, Tensor slot_rows, Tensor plan, str dispatcher) -> Tensor", _start_fake
)
combine_finish = _define(
    "combine_finish(Tensor y, Tensor slot_rows, Tensor plan, Tensor ticket, str dispatcher)"
    " -> Tensor",
    _combine_finish_fake,
)
_combine_backward_op = _define(
    "combine_backward(Tensor grad, Tensor slot_rows, Tensor plan, SymInt received,"
    " str dispatcher) -> Tensor",
    _combine_backward_fake,
)


def _keep_dispatcher(ctx: Any, name: str) -> None:
    """Backward finds it by its name, though its module may be gone by then."""
    ctx.dispatcher = name
    ctx.owner = extension().find_dispatcher(name)


def _dispatch_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, ids, _, slot_rows, plan, num_slots, extra = output
    ctx.mark_non_differentiable(ids, slot_rows, plan, num_slots, extra)
    _keep_dispatcher(ctx, inputs[-1])
    ctx.save_for_backward(slot_rows, plan)


def _dense(grad: Tensor) -> Tensor:
    return grad if grad.layout is torch.strided else grad.to_dense()


def _dispatch_backward(
    ctx: Any, grad_x: Tensor, grad_ids: None, grad_weights: Tensor, *unused: Any
) -> tuple[Tensor | None, ...]:
    """Rows go back and are added; each slot's weight gradient comes from its expert's rank.

    Whatever this rank's graph used of the outputs, every rank takes part: missing gradients are
    zeros here, and what requires a gradient is the same on all ranks.
    """
    with_x, _, with_weights, *_ = ctx.needs_input_grad
    slot_rows, plan = ctx.saved_tensors
    dx, dweights = _dispatch_backward_op(
        _dense(grad_x) if with_x else None,
        _dense(grad_weights) if with_weights else None,
        slot_rows,
        plan,
        ctx.dispatcher,
    )
    rest = [None] * (len(ctx.needs_input_grad) - 3)
    return dx if with_x else None, None, dweights if with_weights else None, *rest


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, slot_rows, plan, *_, dispatcher = inputs
    _keep_dispatcher(ctx, dispatcher)
    ctx.received = y.shape[0]
    ctx.save_for_backward(slot_rows, plan)


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_y = _combine_backward_op(_dense(grad), *ctx.saved_tensors, ctx.received, ctx.dispatcher)
    return grad_y, *[None] * (len(ctx.needs_input_grad) - 1)


def _refuse(name: str) -> Callable[..., None]:
    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{name}: double backward is not supported. Differentiate once.")

    return backward


for _name, _backward, _setup in (
    ("dispatch", _dispatch_backward, _dispatch_setup),
    ("dispatch_finish", _dispatch_backward, _dispatch_setup),
    ("combine", _combine_backward, _combine_setup),
    ("combine_finish", _combine_backward, _combine_setup),
    ("dispatch_backward", _refuse("dispatch_backward"), None),
    ("combine_backward", _refuse("combine_backward"), None),
):
    torch.library.register_autograd(
        f"{NAMESPACE}::{_name}", _backward, setup_context=_setup, lib=_library
    )
