"""Order the slots of a routed batch by expert.

T tokens, K experts a token, R = T * K slots, E experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Order = tuple[Tensor, Tensor, Tensor]


def check_ids(op: str, ids: Tensor, num_experts: int) -> None:
    """Raise unless every id is of an expert, or -1 or E."""
    out_of_range = (ids < -1) | (ids > num_experts)
    if bool(out_of_range.any()):
        raise IndexError(
            f"{op}: topk_ids must be in [-1, {num_experts}] (-1 and {num_experts} mean dropped); "
            f"got {int(ids[out_of_range][0])}"
        )


def sort_by_expert(topk_ids: Tensor, num_experts: int) -> Order:
    """``row_to_slot [R]``, ``slot_to_row [T, K]``, ``offsets [E + 1]``, all int32.

    Slot ``t * K + k`` holds ``topk_ids[t, k]``; rows are the slots sorted by expert, stably. Ids -1
    and E sort to the tail, past ``offsets[E]``.
    """
    ids = topk_ids.reshape(-1).to(torch.int64)
    check_ids("sort_by_expert", ids, num_experts)
    ids = torch.where(ids < 0, num_experts, ids)
    row_to_slot = torch.argsort(ids, stable=True)
    slot_to_row = torch.empty_like(row_to_slot)
    slot_to_row[row_to_slot] = torch.arange(ids.numel(), device=ids.device)
    counts = torch.bincount(ids, minlength=num_experts + 1)[:num_experts]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return (
        row_to_slot.to(torch.int32),
        slot_to_row.view(topk_ids.shape).to(torch.int32),
        offsets.to(torch.int32),
    )


def sort_within(
    op: str,
    topk_ids: Tensor,
    num_experts: int,
    sort: Callable[[Tensor, int], Order] = sort_by_expert,
) -> Order:
    """What ``sort`` returns, in an op that its error shall name: that is what was called."""
    try:
        return sort(topk_ids, num_experts)
    except IndexError as error:
        raise IndexError(str(error).replace("sort_by_expert:", f"{op}:", 1)) from None
