"""Cutting sequences into the parts of context parallel ranks, and putting them together again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_parallel.context_parallel.exchange import Ranks, agree
from moe_parallel.context_parallel.layout import part_of_sequence, positions_of, to_sequence_order

Group = dist.ProcessGroup | DeviceMesh


def shard_sequence(tensor: Tensor, group: Group, dim: int = 1, *, balanced: bool = True) -> Tensor:
    """This rank's part of whole sequences, without communication.

    In the balanced order the sequence is cut into 2 P chunks for P ranks; rank r gets chunk r and
    chunk 2 P - 1 - r, so that causal attention costs every rank the same. Else it gets the r-th of
    P consecutive parts.

    Args:
        tensor: whole sequences along ``dim``: ids, labels, embeddings. Labels must have been
            shifted already: the next token is not always on the same rank.
        group: the context parallel ranks, a process group or a 1-D mesh.
        dim: which dimension is the sequence.
        balanced: as for the :class:`ContextParallelAttention` that will see them.

    Returns:
        The same with size / P along ``dim``, in memory of its own. Differentiable: the gradient is
        zero for what other ranks hold.

    Raises:
        ValueError: a length that 2 P (P if not balanced) does not divide, or is zero.
        IndexError: there is no such dimension.
    """
    ranks = _ranks(group)
    dim = _dim("shard_sequence", tensor, dim)
    _check_length("shard_sequence", tensor.shape[dim], ranks.size, balanced)
    return part_of_sequence(tensor, ranks.rank, ranks.size, dim, balanced)


def sequence_positions(
    length: int,
    group: Group,
    *,
    balanced: bool = True,
    device: torch.device | str | None = None,
) -> Tensor:
    """[length / P] int64: where this rank's tokens are in sequences of ``length`` tokens.

    For rotary and other position embeddings.

    Raises:
        ValueError: as for :func:`shard_sequence`.
    """
    ranks = _ranks(group)
    _check_length("sequence_positions", length, ranks.size, balanced)
    return positions_of(ranks.rank, ranks.size, length // ranks.size, balanced).to(device)


def shard_batch(
    batch: Mapping[str, Tensor], group: Group, dim: int = 1, *, balanced: bool = True
) -> dict[str, Tensor]:
    """This rank's part of every tensor of a batch, and the positions of its tokens.

    Args:
        batch: tensors that all have the same whole sequences along ``dim``, by name.
        group, dim, balanced: of :func:`shard_sequence`.

    Returns:
        The parts by name, with "position_ids" [1, length / P] if the batch has none.

    Raises:
        ValueError: as for :func:`shard_sequence`, or tensors of different lengths, or none.
        TypeError: what is no tensor.
    """
    for name, tensor in batch.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"shard_batch: batch must hold tensors; got {type(tensor).__name__} as {name!r}. "
                "Leave it out."
            )
    lengths = {n: t.shape[_dim("shard_batch", t, dim)] for n, t in batch.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(
            f"shard_batch: all tensors must have one length along dim {dim}; got {lengths}"
        )
    parts = {n: shard_sequence(t, group, dim, balanced=balanced) for n, t in batch.items()}
    if "position_ids" not in parts:
        name, tensor = next(iter(batch.items()))
        positions = sequence_positions(
            lengths[name], group, balanced=balanced, device=tensor.device
        )
        parts["position_ids"] = positions[None]
    return parts


def unshard_sequence(
    tensor: Tensor, group: Group, dim: int = 1, *, balanced: bool = True
) -> Tensor:
    """Whole sequences, on every rank, from the parts of all; undoes :func:`shard_sequence`.

    Args:
        tensor: this rank's part along ``dim``, of one shape and dtype on all ranks.
        group, dim, balanced: of :func:`shard_sequence`.

    Returns:
        The same with size * P along ``dim``. Differentiable: the gradient of a part is that of the
        sum of all ranks' losses.

    Raises:
        ValueError: an odd or zero length in the balanced order; on CPUs also shapes that are not
            equal on all ranks.
        IndexError: there is no such dimension.
    """
    ranks = _ranks(group)
    whole: Tensor = _Unshard.apply(tensor, ranks, dim, balanced)
    return whole


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks, dim: int, balanced: bool) -> Tensor:
        error: Exception | None = None
        try:
            dim = _dim("unshard_sequence", tensor, dim)
            _check_length("unshard_sequence", tensor.shape[dim] * ranks.size, ranks.size, balanced)
        except (IndexError, ValueError) as wrong:
            error = wrong
        if tensor.device.type == "cpu":
            facts = {
                "the number of dimensions": tensor.ndim,
                "dim": dim,
                "the length": tensor.shape[dim] if error is None else -1,
                "the number of elements": tensor.numel(),
                "the size of an element": tensor.element_size(),
                "balanced": int(balanced),
            }
            agree(ranks, "unshard_sequence", facts, error, tensor.device)
        elif error is not None:
            raise error
        ctx.options = (ranks, dim, balanced)
        everything = tensor.new_empty(ranks.size, *tensor.shape)
        own = tensor.contiguous()
        ranks.gather(own, everything).wait()
        return to_sequence_order(everything.unbind(0), dim, balanced)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ranks, dim, balanced = ctx.options
        parts = torch.stack(
            [part_of_sequence(grad, rank, ranks.size, dim, balanced) for rank in range(ranks.size)]
        )
        own = torch.empty_like(parts[0])
        ranks.scatter_sum(parts, own).wait()
        return own, None, None, None


def _ranks(group: Group) -> Ranks:
    return Ranks(group.get_group() if isinstance(group, DeviceMesh) else group)


def _dim(function: str, tensor: Tensor, dim: int) -> int:
    if not -tensor.ndim <= dim < tensor.ndim:
        raise IndexError(
            f"{function}: dim must be one of the {tensor.ndim} dimensions of {list(tensor.shape)}; "
            f"got {dim}"
        )
    return dim % tensor.ndim


def _check_length(function: str, length: int, ranks: int, balanced: bool) -> None:
    parts = 2 * ranks if balanced else ranks
    if length == 0 or length % parts:
        how = f"2 * {ranks} in the balanced order" if balanced else "the number of ranks"
        other = (
            " or shard with balanced=False," if balanced and length and not length % ranks else ""
        )
        raise ValueError(
            f"{function}: the length of sequences must be a positive multiple of {parts}, {how}; "
            f"got {length}. Pad them,{other} or choose another context parallel size."
        )
