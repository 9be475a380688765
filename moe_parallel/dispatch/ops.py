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
exchange, joined by a ``ticket []`` float64 on the CPU, and an ``anchor [0]`` on the device. Of x, y
and the weights the first half is a function, and the second one of the ticket: its backward begins
an exchange, whose ticket is the gradient of the ticket, and the backward of the first half ends it.
Autograd runs what was computed between the halves between their backwards. The anchor makes it run
these on the device's stream.
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


def _ticket_fake(*arguments: Any) -> Tensor:
    return torch.empty((), dtype=torch.float64, device="cpu")


def _start_fake(tensor: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _ticket_fake(), tensor.new_empty(0, dtype=torch.float64)


def _dispatch_finish_fake(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    extra: Tensor | None,
    ticket: Tensor,
    anchor: Tensor,
    with_x: bool,
    with_weights: bool,
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


def _dispatch_backward_finish_fake(
    ticket: Tensor,
    anchor: Tensor,
    x_size: Any,
    x_dtype: torch.dtype,
    weights_size: Any,
    weights_dtype: torch.dtype,
    dispatcher: str,
) -> tuple[Tensor, Tensor]:
    sizes = ((x_size, x_dtype), (weights_size, weights_dtype))
    x, weights = (anchor.new_empty(size or [0], dtype=dtype) for size, dtype in sizes)
    return x, weights


def _combine_fake(y: Tensor, slot_rows: Tensor, plan: Tensor, dispatcher: str) -> Tensor:
    return y.new_empty(slot_rows.shape[0], y.shape[1])


def _combine_finish_fake(
    y: Tensor, slot_rows: Tensor, plan: Tensor, ticket: Tensor, anchor: Tensor, dispatcher: str
) -> Tensor:
    return _combine_fake(y, slot_rows, plan, dispatcher)


def _combine_backward_fake(
    grad: Tensor, slot_rows: Tensor, plan: Tensor, received: Any, dispatcher: str
) -> Tensor:
    return grad.new_empty(received, grad.shape[1])


def _combine_backward_finish_fake(
    ticket: Tensor, anchor: Tensor, received: Any, hidden: Any, dtype: torch.dtype, dispatcher: str
) -> Tensor:
    return anchor.new_empty(received, hidden, dtype=dtype)


_TOKENS = "Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor? extra"
_ARRIVED = (
    "(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor slot_rows, Tensor plan,"
    " Tensor num_slots, Tensor extra)"
)
dispatch = _define(f"dispatch({_TOKENS}, str dispatcher) -> {_ARRIVED}", _dispatch_fake)
_BEGUN = "(Tensor ticket, Tensor anchor)"
dispatch_start = _define(f"dispatch_start({_TOKENS}, str dispatcher) -> {_BEGUN}", _start_fake)
dispatch_finish = _define(
    f"dispatch_finish({_TOKENS}, Tensor ticket, Tensor anchor, bool with_x, bool with_weights,"
    f" str dispatcher) -> {_ARRIVED}",
    _dispatch_finish_fake,
)
_dispatch_backward_op = _define(
    "dispatch_backward(Tensor? grad_x, Tensor? grad_weights, Tensor slot_rows, Tensor plan,"
    " str dispatcher) -> (Tensor, Tensor)",
    _dispatch_backward_fake,
)
_dispatch_backward_start = _define(
    "dispatch_backward_start(Tensor? grad_x, Tensor? grad_weights, Tensor slot_rows, Tensor plan,"
    " str dispatcher) -> Tensor",
    _ticket_fake,
)
_dispatch_backward_finish = _define(
    "dispatch_backward_finish(Tensor ticket, Tensor anchor, SymInt[] x_size, ScalarType x_dtype,"
    " SymInt[] weights_size, ScalarType weights_dtype, str dispatcher) -> (Tensor, Tensor)",
    _dispatch_backward_finish_fake,
)
combine = _define(
    "combine(Tensor y, Tensor slot_rows, Tensor plan, str dispatcher) -> Tensor",
    _combine_fake,
)
combine_start = _define(
    f"combine_start(Tensor y, Tensor slot_rows, Tensor plan, str dispatcher) -> {_BEGUN}",
    _start_fake,
)
combine_finish = _define(
    "combine_finish(Tensor y, Tensor slot_rows, Tensor plan, Tensor ticket, Tensor anchor,"
    " str dispatcher) -> Tensor",
    _combine_finish_fake,
)
_combine_backward_op = _define(
    "combine_backward(Tensor grad, Tensor slot_rows, Tensor plan, SymInt received,"
    " str dispatcher) -> Tensor",
    _combine_backward_fake,
)
_combine_backward_start = _define(
    "combine_backward_start(Tensor grad, Tensor slot_rows, Tensor plan, SymInt received,"
    " str dispatcher) -> Tensor",
    _ticket_fake,
)
_combine_backward_finish = _define(
    "combine_backward_finish(Tensor ticket, Tensor anchor, SymInt received, SymInt hidden,"
    " ScalarType dtype, str dispatcher) -> Tensor",
    _combine_backward_finish_fake,
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
    with_x, _, with_weights, *rest = ctx.needs_input_grad
    dx, dweights = _dispatch_backward_op(
        _dense(grad_x) if with_x else None,
        _dense(grad_weights) if with_weights else None,
        *ctx.saved_tensors,
        ctx.dispatcher,
    )
    return dx if with_x else None, None, dweights if with_weights else None, *[None] * len(rest)


def _dispatch_finish_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _dispatch_setup(ctx, inputs, output)
    *_, ctx.with_x, ctx.with_weights, _ = inputs


def _dispatch_finish_backward(
    ctx: Any, grad_x: Tensor, grad_ids: None, grad_weights: Tensor, *unused: Any
) -> tuple[Tensor | None, ...]:
    ticket = _dispatch_backward_start(
        _dense(grad_x) if ctx.with_x else None,
        _dense(grad_weights) if ctx.with_weights else None,
        *ctx.saved_tensors,
        ctx.dispatcher,
    )
    return None, None, None, None, ticket, grad_x.new_empty(0, dtype=ticket.dtype), *[None] * 3


def _dispatch_start_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, weights, _, name = inputs
    _keep_dispatcher(ctx, name)
    ctx.like = ((x.shape, x.dtype), (weights.shape, weights.dtype))


def _dispatch_start_backward(ctx: Any, ticket: Tensor, anchor: Tensor) -> tuple[Tensor | None, ...]:
    with_x, _, with_weights, *rest = ctx.needs_input_grad
    (x_size, x_dtype), (weights_size, weights_dtype) = ctx.like
    dx, dweights = _dispatch_backward_finish(
        ticket,
        anchor,
        x_size if with_x else [],
        x_dtype,
        weights_size if with_weights else [],
        weights_dtype,
        ctx.dispatcher,
    )
    return dx if with_x else None, None, dweights if with_weights else None, *[None] * len(rest)


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, slot_rows, plan, *_, dispatcher = inputs
    _keep_dispatcher(ctx, dispatcher)
    ctx.received = y.shape[0]
    ctx.save_for_backward(slot_rows, plan)


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_y = _combine_backward_op(_dense(grad), *ctx.saved_tensors, ctx.received, ctx.dispatcher)
    return grad_y, None, None, None


def _combine_finish_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ticket = _combine_backward_start(_dense(grad), *ctx.saved_tensors, ctx.received, ctx.dispatcher)
    return None, None, None, ticket, grad.new_empty(0, dtype=ticket.dtype), None


def _combine_start_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    y, _, _, name = inputs
    _keep_dispatcher(ctx, name)
    ctx.like = (*y.shape, y.dtype)


def _combine_start_backward(ctx: Any, ticket: Tensor, anchor: Tensor) -> tuple[Tensor | None, ...]:
    return _combine_backward_finish(ticket, anchor, *ctx.like, ctx.dispatcher), None, None, None


def _refuse(name: str) -> Callable[..., None]:
    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{name}: double backward is not supported. Differentiate once.")

    return backward


_FORMULAS: tuple[tuple[str, Callable[..., Any], Callable[..., Any] | None], ...] = (
    ("dispatch", _dispatch_backward, _dispatch_setup),
    ("dispatch_start", _dispatch_start_backward, _dispatch_start_setup),
    ("dispatch_finish", _dispatch_finish_backward, _dispatch_finish_setup),
    ("combine", _combine_backward, _combine_setup),
    ("combine_start", _combine_start_backward, _combine_start_setup),
    ("combine_finish", _combine_finish_backward, _combine_setup),
    *(
        (name, _refuse(name), None)
        for half in ("dispatch_backward", "combine_backward")
        for name in (half, f"{half}_start", f"{half}_finish")
    ),
)
for _name, _backward, _setup in _FORMULAS:
    torch.library.register_autograd(
        f"{NAMESPACE}::{_name}", _backward, setup_context=_setup, lib=_library
    )
