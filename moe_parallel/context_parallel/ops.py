"""Attention over sequences that ranks share, as ops: ``moe_kernels::context_attention`` and others.

Functional, so that autograd, torch.compile and selective activation checkpointing know them: the
name of a process group and tensors go in, tensors come out.

B sequences, N heads, G key and value heads, L tokens of a rank, D size of a head, P ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_parallel.context_parallel.blocks import wide_dtype
from moe_parallel.context_parallel.exchange import Ranks, agree, bits
from moe_parallel.context_parallel.gathered import gathered_backward, gathered_forward
from moe_parallel.context_parallel.heads import to_heads, to_tokens
from moe_parallel.context_parallel.ring import ring_backward, ring_forward
from moe_parallel.torch_internals import group_of_name, stream_of_key

NAMESPACE = "moe_kernels"
NAME = "ContextParallelAttention"
COMM_TYPES = ("p2p", "all_gather", "a2a")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def _define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _ranks(group: str, stream: str) -> Ranks:
    return Ranks(group_of_name(group), stream_of_key(stream))


def check_arguments(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    """What one rank can tell of its arguments alone.

    Raises:
        ValueError, TypeError: they do not fit together.
    """
    shapes = [list(tensor.shape) for tensor in (q, k, v)]
    if any(len(shape) != 4 for shape in shapes):
        raise ValueError(
            f"{NAME}: query, key and value must be [B, heads, tokens, size]; got {shapes}"
        )
    if len({tensor.dtype for tensor in (q, k, v)}) > 1 or q.dtype not in DTYPES:
        raise TypeError(
            f"{NAME}: query, key and value must all be bfloat16, float16, float32 or float64; got "
            f"{q.dtype}, {k.dtype} and {v.dtype}"
        )
    if len({tensor.device for tensor in (q, k, v)}) > 1:
        raise ValueError(
            f"{NAME}: query, key and value must be on one device; got {q.device}, {k.device} and "
            f"{v.device}"
        )
    if (
        k.shape[:3] != v.shape[:3]
        or q.shape[0] != k.shape[0]
        or q.shape[3] != k.shape[3]
        or k.shape[1] == 0
        or q.shape[1] % k.shape[1]
    ):
        raise ValueError(
            f"{NAME}: key must be [B, heads, tokens, size] with B = {q.shape[0]} and size = "
            f"{q.shape[3]} of query, heads that divide its {q.shape[1]}, and value's heads and "
            f"tokens; got query, key and value {shapes}"
        )
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"{NAME}: causal attention needs as many keys as queries; got {q.shape[2]} queries and "
            f"{k.shape[2]} keys"
        )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    comm_type: str,
    balanced: bool,
    ranks: Ranks,
) -> None:
    """This rank's arguments, and that the other ranks have such ones, where looking costs little.

    That is on a CPU, and with ``MOE_KERNELS_CHECK=1`` everywhere. Else wrong arguments are an error
    on their rank alone, and ranks that do not fit together are for the backend to find.
    """
    error: Exception | None = None
    try:
        check_arguments(q, k, v, causal)
        _check_split(q, k, causal, comm_type, balanced, ranks.size)
    except (TypeError, ValueError) as wrong:
        error = wrong
    if q.device.type == "cpu" or os.environ.get("MOE_KERNELS_CHECK", "0") == "1":
        facts = {
            f"{name}.shape[{dim}]": tensor.shape[dim] if dim < tensor.ndim else -1
            for name, tensor in (("query", q), ("key", k), ("value", v))
            for dim in range(4)
        }
        facts |= {
            "the dtype": DTYPES.index(q.dtype) if q.dtype in DTYPES else -1,
            "scale": bits(scale),
            "is_causal": int(causal),
            "window": -1 if window is None else window,
            "cp_comm_type": COMM_TYPES.index(comm_type),
            "balanced": int(balanced),
        }
        agree(ranks, NAME, facts, error, q.device)
    elif error is not None:
        raise error


def _check_split(
    q: Tensor, k: Tensor, causal: bool, comm_type: str, balanced: bool, size: int
) -> None:
    if comm_type == "a2a" and (q.shape[1] % size or k.shape[1] % size):
        raise ValueError(
            f"{NAME}: cp_comm_type 'a2a' needs numbers of heads that the {size} context parallel "
            f"ranks divide; got {q.shape[1]} of query and {k.shape[1]} of key and value. Use 'p2p' "
            "or 'all_gather'."
        )
    odd = q.shape[2] % 2 or k.shape[2] % 2
    if balanced and odd and (causal or comm_type == "a2a"):
        raise ValueError(
            f"{NAME}: in the balanced order a rank has two chunks of equal length; got "
            f"{q.shape[2]} tokens. Pad the sequence to a multiple of {2 * size}, or shard it with "
            "balanced=False."
        )


def _contiguous_rows(*tensors: Tensor) -> list[Tensor]:
    """With unit stride along the last dimension, which attention kernels need."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    comm_type: str,
    balanced: bool,
    group: str,
    stream: str,
) -> tuple[Tensor, Tensor]:
    ranks = _ranks(group, stream)
    _check(q, k, v, scale, causal, window, comm_type, balanced, ranks)
    if k.numel() == 0 or q.numel() == 0 or v.numel() == 0:
        out, lse = _attention_fake(q, k, v)
        return out.zero_(), lse.zero_()
    q, k, v = _contiguous_rows(q, k, v)
    if comm_type == "p2p":
        return ring_forward(q, k, v, scale, causal, balanced, ranks)
    return gathered_forward(q, k, v, scale, causal, balanced, window, ranks)


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    b, n, length, _ = q.shape
    out = q.new_empty(b, length, n, v.shape[3]).transpose(1, 2)
    return out, q.new_empty(b, n, length, dtype=wide_dtype(q.dtype))


def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    comm_type: str,
    balanced: bool,
    group: str,
    stream: str,
) -> tuple[Tensor, Tensor, Tensor]:
    ranks = _ranks(group, stream)
    if k.numel() == 0 or q.numel() == 0 or v.numel() == 0:
        dq, dk, dv = _attention_backward_fake(grad, q, k, v)
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, k, v, grad = _contiguous_rows(q, k, v, grad)
    if comm_type == "p2p":
        return ring_backward(grad, q, k, v, out, lse, scale, causal, balanced, ranks)
    return gathered_backward(grad, q, k, v, out, lse, scale, causal, balanced, window, ranks)


def _attention_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _whole_sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    balanced: bool,
    group: str,
    stream: str,
) -> tuple[Tensor, ...]:
    _check(q, k, v, scale, causal, window, "a2a", balanced, _ranks(group, stream))
    return tuple(_exchange([q, k, v], True, balanced, group, stream))


def _whole_sequences_fake(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return tuple(_exchange_fake([q, k, v], True, *options[3:]))


def _exchange(
    tensors: list[Tensor], to_whole: bool, balanced: bool, group: str, stream: str
) -> list[Tensor]:
    ranks = _ranks(group, stream)
    return (to_heads if to_whole else to_tokens)(tensors, balanced, ranks)


def _exchange_fake(
    tensors: list[Tensor], to_whole: bool, balanced: bool, group: str, stream: str
) -> list[Tensor]:
    ranks, found = group_of_name(group).size(), []
    for t in tensors:
        b, n, length, size = t.shape
        n, length = (n // ranks, length * ranks) if to_whole else (n * ranks, length // ranks)
        found.append(t.new_empty(b, n, length, size))
    return found


context_attention = _define(
    "context_attention(Tensor q, Tensor k, Tensor v, float scale, bool causal, int? window,"
    " str comm_type, bool balanced, str group, str stream) -> (Tensor out, Tensor lse)",
    _attention,
    _attention_fake,
)
_backward_op = _define(
    "context_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " float scale, bool causal, int? window, str comm_type, bool balanced, str group,"
    " str stream) -> (Tensor, Tensor, Tensor)",
    _attention_backward,
    _attention_backward_fake,
)
whole_sequences = _define(
    "whole_sequences(Tensor q, Tensor k, Tensor v, float scale, bool causal, int? window,"
    " bool balanced, str group, str stream) -> (Tensor, Tensor, Tensor)",
    _whole_sequences,
    _whole_sequences_fake,
)
exchange_heads = _define(
    "exchange_heads(Tensor[] tensors, bool to_whole, bool balanced, str group, str stream)"
    " -> Tensor[]",
    _exchange,
    _exchange_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, lse = output
    ctx.mark_non_differentiable(lse)
    q, k, v, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, out, lse)


def _backward(ctx: Any, grad: Tensor, grad_lse: None) -> tuple[Tensor | None, ...]:
    """Whichever of the gradients are wanted, every rank computes and sends all of them."""
    grads = _backward_op(grad, *ctx.saved_tensors, *ctx.options)
    return (*grads, *[None] * len(ctx.options))


def _whole_sequences_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[6:]


def _whole_sequences_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    return (*exchange_heads(list(grads), False, *ctx.options), *[None] * 6)


def _exchange_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, ctx.to_whole, *ctx.options = inputs


def _exchange_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    found = exchange_heads(grads, not ctx.to_whole, *ctx.options)
    return (found, *[None] * (1 + len(ctx.options)))


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(f"{NAME}: double backward is not supported. Differentiate once.")


for _name, _derivative, _prepare in (
    ("context_attention", _backward, _setup),
    ("whole_sequences", _whole_sequences_backward, _whole_sequences_setup),
    ("exchange_heads", _exchange_backward, _exchange_setup),
    ("context_attention_backward", _refuse, None),
):
    torch.library.register_autograd(
        f"{NAMESPACE}::{_name}", _derivative, setup_context=_prepare, lib=_library
    )
