"""Scaled dot-product attention over sequences that several ranks hold parts of.

B sequences, N heads, G key and value heads, L tokens of a rank, D size of a head, P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from moe_parallel.context_parallel.ops import (
    COMM_TYPES,
    NAME,
    context_attention,
    exchange_heads,
    whole_sequences,
)
from moe_parallel.mesh import MeshError
from moe_parallel.torch_internals import stream_key


def _check_comm_type(cp_comm_type: str) -> None:
    if cp_comm_type not in COMM_TYPES:
        raise ValueError(
            f"{NAME}: cp_comm_type must be one of {', '.join(COMM_TYPES)}; got {cp_comm_type!r}"
        )


class ContextParallelAttention(nn.Module):
    """Attention, on one rank or over a group of them.

    Without a group it is :func:`torch.nn.functional.scaled_dot_product_attention`. With one, every
    rank gives the queries, keys and values of its part of the sequences, as
    :func:`shard_sequence` cuts them, and gets their part of the output; outputs and gradients are
    those of the whole sequences. All ranks of the group call it with equal shapes.

    How the ranks communicate:

    * "p2p": keys and values travel around a ring, the next ones while attention to the present ones
      is computed. Backward sends them around again. Needs the least memory.
    * "all_gather": every rank gathers the keys and values of all, in forward and in backward.
    * "a2a": ranks exchange parts of the sequence for heads; P must divide N and G.

    Results are added in the order of the blocks in float32 (float64 for float64).

    Args:
        is_causal: tokens see those up to their own position.
        scale: of the scores; None for 1 / sqrt(D).
        window: tokens see their own and the ``window - 1`` before it (with is_causal); None for no
            such limit.
        dropout_p: of the attention weights, in training, and without a group alone.
        balanced: whether sequences are cut in the balanced order of :func:`shard_sequence`, which
            gives all ranks the same work under a causal mask, or into consecutive parts.

    Raises:
        ValueError: a window without is_causal, or less than 1; a scale that is not positive.
    """

    def __init__(
        self,
        *,
        is_causal: bool = True,
        scale: float | None = None,
        window: int | None = None,
        dropout_p: float = 0.0,
        balanced: bool = True,
    ) -> None:
        super().__init__()
        if window is not None and (not is_causal or window < 1):
            raise ValueError(
                f"{NAME}: window must be at least 1, with is_causal=True; got window={window} and "
                f"is_causal={is_causal}"
            )
        # PyTorch's kernels scale the scores that they have masked: 0 gives nan, less gives inf
        if scale is not None and not 0 < scale < float("inf"):
            raise ValueError(f"{NAME}: scale must be positive and finite; got {scale}")
        self.is_causal = is_causal
        self.scale = scale
        self.window = window
        self.dropout_p = dropout_p
        self.balanced = balanced
        self.cp_comm_type = "p2p"
        # The name alone: the module stays copyable, and the group may end first.
        self.group_name: str | None = None
        self._stream = ""

    def extra_repr(self) -> str:
        shared = "" if self.group_name is None else f", cp_comm_type={self.cp_comm_type!r}"
        return (
            f"is_causal={self.is_causal}, scale={self.scale}, window={self.window}, "
            f"dropout_p={self.dropout_p}, balanced={self.balanced}{shared}"
        )

    def set_context_parallel_group(
        self,
        group: dist.ProcessGroup | None,
        global_ranks: Sequence[int] | None,
        stream: torch.cuda.Stream | None,
        cp_comm_type: str = "p2p",
    ) -> None:
        """Say which ranks share the sequences; :func:`moe_parallel.parallelizer.apply_cp` does.

        Args:
            group: None for no context parallelism, as at the start.
            global_ranks: those of the group, in its order; None to take them as they are.
            stream: where to communicate on a GPU; None for the current stream, and on CPUs.
            cp_comm_type: "p2p", "all_gather" or "a2a".

        Raises:
            ValueError: another cp_comm_type; global_ranks of another group; or, a MeshError,
                dropout; a window with "p2p".
        """
        _check_comm_type(cp_comm_type)
        if group is None:
            self.group_name, self._stream = None, ""
            return
        own_ranks = dist.get_process_group_ranks(group)
        if global_ranks is not None and list(global_ranks) != own_ranks:
            raise ValueError(
                f"{NAME}: global_ranks must be those of the group, {own_ranks}; got "
                f"{list(global_ranks)}"
            )
        self.check_context_parallel(cp_comm_type)
        self.group_name = group.group_name
        self._stream = stream_key(stream)
        self.cp_comm_type = cp_comm_type

    def check_context_parallel(self, cp_comm_type: str) -> None:
        """Refuse what no context parallel group can have, before one is set.

        Raises:
            ValueError: a cp_comm_type that there is not.
            MeshError: dropout; a window with "p2p".
        """
        _check_comm_type(cp_comm_type)
        if self.dropout_p > 0:
            raise MeshError(
                f"{NAME}: dropout_p must be 0 with a context parallel group; got {self.dropout_p}. "
                "Drop after the output projection instead."
            )
        if self.window is not None and cp_comm_type == "p2p":
            raise MeshError(
                f"{NAME}: cp_comm_type 'p2p' does not support a window; got {self.window}. Use "
                "'all_gather', as apply_cp does where a block's layer_type is 'sliding_attention'."
            )

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the queries.

        Args:
            query: [B, N, L, D] in bf16, fp16, fp32 or fp64, any strides.
            key: [B, G, L, D]; G divides N. Without is_causal it may have another L than query.
            value: [B, G, L, D of values].

        Returns:
            [B, N, L, D of values].

        Raises:
            ValueError, TypeError: arguments that do not fit, or, with a group on CPUs or under
                ``MOE_KERNELS_CHECK=1``, not those of the other ranks. Ranks whose own arguments
                are right raise a RuntimeError that names the rank.
        """
        if self.group_name is None:
            return self._local(query, key, value)
        query, key, value = _autocast(query, key, value)
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        options = (scale, self.is_causal, self.window)
        place = (self.balanced, self.group_name, self._stream)
        out: Tensor
        if self.cp_comm_type != "a2a":
            out, _ = context_attention(query, key, value, *options, self.cp_comm_type, *place)
            return out
        whole = whole_sequences(query, key, value, *options, *place)
        (out,) = exchange_heads([self._local(*whole)], False, *place)
        return out

    def _local(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = None
        if self.window is not None:
            places = torch.arange(query.shape[2], device=query.device)
            distance = places[:, None] - places
            mask = (distance >= 0) & (distance < self.window)
        # a branch, not a bool: under torch.compile numbers of heads may be symbols
        groups = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout_p if self.training else 0.0,
            is_causal=self.is_causal and mask is None,
            scale=self.scale,
            **groups,
        )


def _autocast(*tensors: Tensor) -> tuple[Any, ...]:
    """As scaled_dot_product_attention casts its arguments under autocast."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
