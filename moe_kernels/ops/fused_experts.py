"""The experts of an MoE layer in one op.

T tokens, K experts a token, R = T * K rows, H hidden size, I intermediate size, E experts,
W = 2 * I columns for gated activations, else I.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_kernels.ops._autocast import autocast
from moe_kernels.ops._checks import check_count, check_rows, check_tensor, describe
from moe_kernels.ops._fused_experts_checks import check_layer, check_main_grad, check_precision
from moe_kernels.ops._fused_experts_flops import (
    backward_flops,
    flops,
    overwriting_flops,
    wgrad_flops,
)
from moe_kernels.ops._library import (
    call_op,
    define,
    direct_call,
    owed_gradients,
    refuse_double_backward,
    register_autograd,
    remember_inputs,
)
from moe_kernels.ops._repeated import Repeated, is_plain
from moe_kernels.ops.expert_activation import resolve_activation
from moe_kernels.ops.grouped_gemm import empty_like_weight
from moe_kernels.reference.fused_experts import (
    fused_experts_backward as fused_experts_backward_reference,
)
from moe_kernels.reference.fused_experts import (
    fused_experts_forward as fused_experts_forward_reference,
)
from moe_kernels.reference.fused_experts import (
    fused_experts_wgrad_ as fused_experts_wgrad_reference_,
)
from moe_kernels.reference.fused_experts import overwriting
from moe_kernels.reference.grouped_gemm import is_transposed


def experts_fake(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    num_rows: Any,
    save_for_backward: bool,
    gate_up_main_grad: Tensor | None,
    down_main_grad: Tensor | None,
    owns_h: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, top_k = topk_ids.shape
    kept = save_for_backward
    return (
        x.new_empty(x.shape),
        x.new_empty(num_rows if kept else 0, gate_up.shape[2]),
        topk_ids.new_empty(tokens * top_k if kept else 0, dtype=torch.int32),
        topk_ids.new_empty(tokens if kept else 0, top_k, dtype=torch.int32),
        topk_ids.new_empty(gate_up.shape[0] + 1 if kept else 0, dtype=torch.int32),
    )


def backward_fake(
    grad: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    h: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    offsets: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    needs: list[bool],
    known_grad_h: Tensor | None = None,
    keep_grad_h: bool = False,
    keep_weighted_a: bool = False,
) -> tuple[Tensor, ...]:
    def weight_like(weight: Tensor) -> Tensor:
        return empty_like_weight(weight, weight.shape, weight.dtype, is_transposed(weight))

    def contiguous_like(value: Tensor) -> Tensor:
        return value.new_empty(value.shape)

    outputs = (
        (x, contiguous_like),
        (gate_up, weight_like),
        (down, weight_like),
        (topk_weights, contiguous_like),
        (gate_up_bias, contiguous_like),
        (down_bias, contiguous_like),
    )
    grads = tuple(
        make(value) if need and value is not None else x.new_empty(0)
        for need, (value, make) in zip(needs, outputs, strict=True)
    )
    weighted_a = h.new_empty((h.shape[0], down.shape[1]) if keep_weighted_a else 0)
    return (*grads, h.new_empty(h.shape if keep_grad_h else 0), weighted_a)


def overwriting_fake(*args: Any) -> tuple[Tensor, ...]:
    all_args = [*args[:16], None, False, *args[16:17]]
    *grads, _, weighted_a = backward_fake(*all_args)
    return (*grads, weighted_a)


# owns_h: nobody will look at the output h but backward, which may overwrite it.
_op = define(
    "fused_experts(Tensor x, Tensor gate_up, Tensor down, Tensor topk_ids, Tensor topk_weights,"
    " Tensor? gate_up_bias, Tensor? down_bias, str activation, bool interleaved, float alpha,"
    " float limit, SymInt num_rows, bool save_for_backward, Tensor? gate_up_main_grad,"
    " Tensor? down_main_grad, bool owns_h=False)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=fused_experts_forward_reference,
    fake=experts_fake,
)
_direct, _repeated = direct_call("fused_experts"), Repeated(_op)
_backward_op = define(
    "fused_experts_backward(Tensor grad, Tensor x, Tensor gate_up, Tensor down,"
    " Tensor topk_weights, Tensor h, Tensor row_to_slot, Tensor slot_to_row, Tensor offsets,"
    " Tensor? gate_up_bias, Tensor? down_bias, str activation, bool interleaved, float alpha,"
    " float limit, bool[6] needs, Tensor? known_grad_h=None, bool keep_grad_h=False,"
    " bool keep_weighted_a=False)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=fused_experts_backward_reference,
    fake=backward_fake,
)
_overwriting_op = define(
    "fused_experts_backward_(Tensor grad, Tensor x, Tensor gate_up, Tensor down,"
    " Tensor topk_weights, Tensor(a!) h, Tensor row_to_slot, Tensor slot_to_row, Tensor offsets,"
    " Tensor? gate_up_bias, Tensor? down_bias, str activation, bool interleaved, float alpha,"
    " float limit, bool[6] needs, bool keep_weighted_a=False)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=overwriting(fused_experts_backward_reference),
    fake=overwriting_fake,
)
_wgrad_op = define(
    "fused_experts_wgrad_(Tensor(a!) out, Tensor a, Tensor grad, Tensor row_to_slot,"
    " Tensor slot_to_row, Tensor offsets, bool gather_a) -> ()",
    reference=fused_experts_wgrad_reference_,
    fake=lambda out, a, grad, row_to_slot, slot_to_row, offsets, gather_a: None,
)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gate_up, down, _, topk_weights, gate_up_bias, down_bias, *options = inputs
    *scales, ctx.owns_h = options[8:]  # of float8 weights
    _, h, row_to_slot, slot_to_row, offsets = output
    ctx.mark_non_differentiable(h, row_to_slot, slot_to_row, offsets)
    ctx.set_materialize_grads(False)
    remember_inputs(ctx, inputs)
    ctx.options = options[:4]
    ctx.main_grads = options[6:8]  # not saved: other micro-batches add to them meanwhile
    ctx.kept = None
    ctx.save_for_backward(
        x,
        gate_up,
        down,
        topk_weights,
        h,
        row_to_slot,
        slot_to_row,
        offsets,
        gate_up_bias,
        down_bias,
        *scales,
    )


def _is_followed_by_weights(ctx: Any, owed: list[bool]) -> bool:
    """Whether the inputs' half of a split backward runs: that of the weights then needs grad_h."""
    later = any(ctx.needs_input_grad[i] and not owed[i] for i in (1, 5))  # gate_up and its bias
    return later and bool(torch._C._autograd._get_current_graph_task_keep_graph())


def _known_grad_h(ctx: Any, grad: Tensor, needs: list[bool]) -> Tensor | None:
    """The gradient of h that the first half of a split backward computed of the same ``grad``."""
    if ctx.kept is None or needs[3]:
        return None
    kept_grad, version, grad_h = ctx.kept
    same = grad is kept_grad and grad._version == version
    return grad_h if same else None


def _may_overwrite(ctx: Any, grad: Tensor, h: Tensor) -> bool:
    """Whether nobody needs h after this backward: neither who has called the op, nor a further
    backward, be it one of this one, nor a graph that is being traced, nor vmap's other gradients.
    """
    again = torch._C._autograd._get_current_graph_task_keep_graph() or torch.is_grad_enabled()
    again = again or _is_batched(grad)
    return ctx.owns_h and type(h) is Tensor and h.is_contiguous() and not again


def _is_batched(grad: Tensor) -> bool:
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad)


def backward_through(
    op: Any, overwriting_op: Any, *, x_takes_h: bool = True
) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward of an op with the arguments of ``fused_experts``, by its backward ops.

    Args:
        op: yields the gradient of h if asked for it.
        overwriting_op: leaves it in h, which saves the largest buffer of a backward.
        x_takes_h: whether the gradient of x alone needs that of h in memory.
    """

    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
        others = (None,) * (len(ctx.tensor_inputs) - 7)
        if grad is None:
            return *(None,) * 7, *others
        owed = owed_gradients(ctx)
        up_main, down_main = (
            main if need else None for main, need in zip(ctx.main_grads, owed[1:3], strict=True)
        )
        # x, gate_up, down, topk_weights, gate_up_bias, down_bias
        needs = [owed[0], owed[1], owed[2], owed[4], owed[5], owed[6]]
        needs[1] &= up_main is None
        needs[2] &= down_main is None
        if (up_main is not None or down_main is not None) and _is_batched(grad):
            raise NotImplementedError(
                f"{op._opname}: several gradients at once (is_grads_batched, vmap) cannot be added "
                "to main_grads. Differentiate once for each, or without main_grads."
            )
        grad_h = _known_grad_h(ctx, grad, needs)
        later = grad_h is None and needs[0] and _is_followed_by_weights(ctx, owed)
        keep_h = grad_h is None and (later or up_main is not None)
        saved = ctx.saved_tensors  # once: activation checkpointing gives them once
        arguments = (grad, *saved[:10], *ctx.options, needs)
        others_last = (down_main is not None, *saved[10:])
        stores_h = (needs[0] and x_takes_h) or needs[1] or needs[4] or keep_h
        if stores_h and grad_h is None and _may_overwrite(ctx, grad, saved[4]):
            kept = saved[4]
            *results, weighted_a = call_op(overwriting_op, *arguments, *others_last)
        else:
            *results, kept, weighted_a = call_op(op, *arguments, grad_h, keep_h, *others_last)
        ctx.kept = (grad, grad._version, kept) if later else None
        x, order = saved[0], saved[5:8]
        if up_main is not None:
            _wgrad_op(up_main, x, kept if grad_h is None else grad_h, *order, True)
        if down_main is not None:
            _wgrad_op(down_main, weighted_a, grad, *order, False)
        dx, dgate_up, ddown, dweights, dbias1, dbias2 = (
            result if need else None for result, need in zip(results, needs, strict=True)
        )
        return dx, dgate_up, ddown, None, dweights, dbias1, dbias2, *others

    return backward


register_autograd("fused_experts", backward_through(_backward_op, _overwriting_op), setup_context)
refuse_double_backward("fused_experts_backward")


register_flop_formula(torch.ops.moe_kernels.fused_experts)(flops)
register_flop_formula(torch.ops.moe_kernels.fused_experts_backward)(backward_flops)
register_flop_formula(torch.ops.moe_kernels.fused_experts_backward_)(overwriting_flops)
register_flop_formula(torch.ops.moe_kernels.fused_experts_wgrad_)(wgrad_flops)


def _repeat(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *options: Any,
) -> Tensor | None:
    """As ``_direct``, of a call on CUDA that is like an earlier one."""
    if not _repeated.possible or not is_plain(topk_ids) or topk_ids.dim() != 2:
        return None
    *given, num_rows = options
    slots = topk_ids.shape[0] * topk_ids.shape[1]
    if num_rows is None:
        num_rows = slots
    elif type(num_rows) is not int or not 0 <= num_rows < 2**63:
        return None
    arguments = (x, gate_up, down, topk_ids, topk_weights, *given, min(num_rows, slots))
    found = _repeated(*arguments, False, None, None, False)
    return None if found is None else found[0]


def fused_experts(
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
    alpha: float | None = None,
    limit: float | None = None,
    num_rows: int | None = None,
    main_grads: tuple[Tensor | None, Tensor | None] | None = None,
    precision: str | None = None,
    weight_scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Run every token through its experts and sum the weighted results.

    ``y[t] = sum_k w[t, k] * (act(x[t] @ gate_up[e] + gate_up_bias[e]) @ down[e] + down_bias[e])``
    with ``e = topk_ids[t, k]``. Weighting the activation instead gives the same value without a
    down bias. Deterministic: sums run in float32 in slot order. No host synchronisation on CUDA.

    Differentiable in x, both weights, both biases and topk_weights. For backward it keeps x, the
    pre-activation h [num_rows, W], topk_weights and the order; activations are recomputed. The
    gradients of the weights are stored as the weights are, with either of the last two dimensions
    contiguous. Without gradients nothing is kept. A backward that does not retain the graph writes
    the gradient of h over h, which nobody needs any more. One for x alone that retains it keeps the
    gradient of h [num_rows, W], which the next one for the weights takes over if it is of the same
    gradient of y: the halves of a split backward multiply no more than a whole one.

    Args:
        x: [T, H], bf16, fp16, fp32 (fp64 on CPU).
        gate_up: [E, H, 2*I] for gated activations, else [E, H, I]; x's dtype, any strides: a
            checkpoint's [E, 2*I, H] comes in as ``w.mT``.
        down: [E, I, H]; x's dtype, any strides.
        topk_ids: [T, K], int32 or int64, in [0, E). -1 and E mean "no expert here" and add nothing.
        topk_weights: [T, K], any float dtype; their gradient has that dtype.
        activation: see :func:`expert_activation`.
        gate_up_bias: [E, 2*I] (or [E, I]); x's dtype.
        down_bias: [E, H]; x's dtype; weighted like the rest of the expert's output.
        interleaved: gate and up alternate in the columns of gate_up (g0 u0 g1 u1 ...).
        alpha, limit: of the activation.
        num_rows: an upper bound, known on the host, of the ids in [0, E). Every row buffer has that
            many rows, if they are fewer than T * K: it saves memory where most ids are -1, as under
            Expert Parallelism.
        main_grads: for gate_up and down a float32 buffer (float64 for fp64) of the weight's shape,
            any strides, or None. Backward adds the weight's gradient to it, unrounded, and gives
            autograd none: gradients of many micro-batches accumulate in place. Only for weights
            that require a gradient.
        precision: of the products; None is x's dtype. "fp8_block" rounds x, the activation and the
            weights to float8_e4m3fn with a scale for each 128 elements of a row and 128 x 128 of a
            matrix, as :func:`quantize_rows` and :func:`quantize_weights` do. In backward the
            products that give the gradients of the activation and of x have the upstream gradient
            and that of h rounded likewise; those of the weights are products in x's dtype of what
            was not rounded. h is the only [rows, W] buffer kept, in x's dtype: as many bytes as
            without. For GPUs of sm_89 or later; elsewhere it is right and not fast.
        weight_scales: those of gate_up and down that are float8_e4m3fn already, as of
            :func:`quantize_weights` or a checkpoint: [E, ceil(H / 128), ceil(W / 128)] and
            [E, ceil(I / 128), ceil(H / 128)] float32. Only with "fp8_block". Such weights have no
            gradient; x and topk_weights do.

    Returns:
        [T, H] in x.dtype.

    Raises:
        ValueError: shapes, devices or options that do not fit, T * K >= 2**31, num_rows too small
            (always on CPU; on CUDA with ``MOE_KERNELS_CHECK=1``, else the surplus is dropped).
        IndexError: an id outside [-1, E] (always on CPU; on CUDA with ``MOE_KERNELS_CHECK=1``, else
            such a slot adds nothing).
        TypeError: dtypes that do not fit. Under autocast x, weights and biases are converted first,
            as for linear.
        RuntimeError: on differentiating twice; a NotImplementedError, which is one, on
            differentiating forwards (torch.func.jvp) or by a transform (torch.func.grad).
    """
    op = "fused_experts"
    alpha_value, limit_value = resolve_activation(op, activation, interleaved, alpha, limit)
    plain = main_grads is None and precision is None and weight_scales is None
    if plain and not torch.compiler.is_compiling():
        options = (activation, interleaved, alpha_value, limit_value, num_rows)
        usual = (x, gate_up, down, topk_ids, topk_weights, gate_up_bias, down_bias, *options)
        found: Tensor | None = _direct(*usual)
        if found is None:
            found = _repeat(*usual)
        if found is not None:
            return found
    x, gate_up, down, gate_up_bias, down_bias = autocast(x, gate_up, down, gate_up_bias, down_bias)
    check_layer(
        x, gate_up, down, topk_ids, topk_weights, activation, gate_up_bias, down_bias, weight_scales
    )
    slots = topk_ids.shape[0] * topk_ids.shape[1]
    check_rows(op, slots)
    if num_rows is not None:
        check_count(op, "num_rows", num_rows)
        # Not under torch.compile, where comparing sizes that only the run knows breaks the graph.
        if not torch.compiler.is_compiling():
            num_rows = min(num_rows, slots)
    if main_grads is None:
        main_grads = (None, None)
    if not isinstance(main_grads, tuple | list) or len(main_grads) != 2:
        raise TypeError(
            f"{op}: main_grads must be a pair, for gate_up and down, of buffers or None; got "
            f"{describe(main_grads)}"
        )
    main_up, main_down = main_grads
    check_precision(op, precision, weight_scales, (main_up, main_down))
    for name, main, weight in (("gate_up", main_up, gate_up), ("down", main_down, down)):
        if main is not None:
            check_main_grad(op, name, main, weight, x)
    differentiable = (x, gate_up, down, topk_weights, gate_up_bias, down_bias)
    save = torch.is_grad_enabled() and any(
        value is not None and value.requires_grad for value in differentiable
    )
    arguments = (
        x,
        gate_up,
        down,
        topk_ids,
        topk_weights,
        gate_up_bias,
        down_bias,
        activation,
        interleaved,
        alpha_value,
        limit_value,
        slots if num_rows is None else num_rows,
        save,
        main_up if save else None,
        main_down if save else None,
    )
    if precision is None:
        y: Tensor = call_op(_op, *arguments, save)[0]
        if not torch.compiler.is_compiling():
            _repeated.confirm(*arguments, save)
    else:
        scales = (None, None) if weight_scales is None else weight_scales
        op8 = torch.ops.moe_kernels.fused_experts_fp8.default
        y = call_op(op8, *arguments, *scales, save)[0]
    return y


def fused_moe(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    **options: Any,
) -> Tensor:
    """:func:`fused_experts` with the argument order and weight layout of inference engines.

    Args:
        x: [T, H].
        w13: [E, 2*I, H], gate above up.
        w2: [E, H, I].
        topk_weights: [T, K].
        topk_ids: [T, K].
        options: keyword arguments of :func:`fused_experts`; ``weight_scales`` are those of
            ``w13.mT`` and ``w2.mT``.

    Returns:
        [T, H].

    Raises:
        as :func:`fused_experts`, of which ``w13.mT`` is gate_up and ``w2.mT`` is down.
    """
    check_tensor("fused_moe", "w13", w13, 3, "[E, 2*I, H]")
    check_tensor("fused_moe", "w2", w2, 3, "[E, H, I]")
    return fused_experts(x, w13.mT, w2.mT, topk_ids, topk_weights, **options)
