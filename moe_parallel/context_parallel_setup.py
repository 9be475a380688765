"""Telling a block's modules which ranks hold the other parts of its sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist


def check_blocks(blocks: Iterable[tuple[Any, str, Any]], cp_comm_type: str) -> None:
    """Refuse what the attention of one of the blocks would refuse when it is told.

    Raises:
        MeshError: see :meth:`ContextParallelAttention.check_context_parallel`.
    """
    for _, _, block in blocks:
        _, comm_type = _type_of(block, cp_comm_type)
        inner: Any = getattr(getattr(block, "self_attn", None), "attn_module", None)
        check = getattr(type(inner), "check_context_parallel", None)  # not of a mock, which has all
        if comm_type is not None and check is not None:
            check(inner, comm_type)


def _type_of(block: Any, cp_comm_type: str) -> tuple[str, str | None]:
    """The block's type, and how its attention is to communicate; None if it has another mixer."""
    layer_type = getattr(block, "layer_type", None) or getattr(block, "attention_type", None)
    layer_type = layer_type or "full_attention"
    types = {"full_attention": cp_comm_type, "sliding_attention": "all_gather"}
    return layer_type, types.get(layer_type)


def tell_block(
    block: Any, cp_mesh: Any, cp_comm_type: str, get_stream: Callable[[], Any]
) -> str | None:
    """Set up what mixes a block's tokens, attention or a mixer; where there is none that can be,
    what the block is."""
    layer_type, comm_type = _type_of(block, cp_comm_type)
    if comm_type is None:
        told = tell_mixer(block, cp_mesh)
    else:
        told = tell_attention(block, cp_mesh, comm_type, get_stream)
    return None if told else f"of type {layer_type}{_attention_of(block)}"


def tell_attention(
    block: Any, cp_mesh: Any, cp_comm_type: str, get_stream: Callable[[], Any]
) -> bool:
    """Set up a block's attention; whether there was one that supports context parallelism."""
    attention: Any = getattr(block, "self_attn", None)
    inner: Any = getattr(attention, "attn_module", None)
    if hasattr(inner, "set_context_parallel_group"):
        group = cp_mesh.get_group()
        on_cpu = getattr(cp_mesh, "device_type", None) == "cpu"
        inner.set_context_parallel_group(
            group,
            dist.get_process_group_ranks(group),
            None if on_cpu else get_stream(),
            cp_comm_type=cp_comm_type,
        )
        return True
    if hasattr(attention, "setup_cp_attention"):
        attention.setup_cp_attention(cp_mesh)
        return True
    return False


def tell_mixer(block: Any, cp_mesh: Any) -> bool:
    """Set up a block's linear attention or state-space mixer; whether there was one to set up."""
    told = False
    linear_attn: Any = getattr(block, "linear_attn", None)
    mixers: tuple[Any, ...] = (getattr(block, "mixer", None), linear_attn)
    for mixer in mixers:
        if hasattr(mixer, "setup_context_parallel"):
            mixer.setup_context_parallel(cp_mesh)
            told = True
    if hasattr(linear_attn, "_cp_mesh"):
        linear_attn._cp_mesh = cp_mesh
        told = True
    return told


def _attention_of(block: Any) -> str:
    """The class of what a block attends with, to follow the block's own in a sentence."""
    attention: Any = getattr(block, "self_attn", None)
    inner = getattr(attention, "attn_module", None)
    attention = attention if inner is None else inner
    return "" if attention is None else f" with {type(attention).__name__}"
