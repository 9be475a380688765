"""Order the slots of a routed batch by expert.

T tokens, K experts a token, R = T * K slots, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels.ops._checks import (
    INDEX_DTYPES,
    check_dtype,
    check_num_experts,
    check_rows,
    check_tensor,
)
from moe_kernels.ops._library import define
from moe_kernels.reference.sort_by_expert import (
    sort_by_expert as sort_by_expert_reference,
)


class ExpertOrder(NamedTuple):
    """Where each slot (token t, choice k) stands once slots are grouped by expert; all int32.

    Attributes:
        row_to_slot: [R], the slot ``t * K + k`` in each row. Dropped slots fill the tail.
        slot_to_row: [T, K], the inverse.
        offsets: [E + 1], rows of expert e are ``offsets[e]:offsets[e + 1]``; rows from
            ``offsets[E]`` on belong to no expert.
    """

    row_to_slot: Tensor
    slot_to_row: Tensor
    offsets: Tensor


def _fake(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        topk_ids.new_empty(topk_ids.numel(), dtype=torch.int32),
        topk_ids.new_empty(topk_ids.shape, dtype=torch.int32),
        topk_ids.new_empty(num_experts + 1, dtype=torch.int32),
    )


_op = define(
    "sort_by_expert(Tensor topk_ids, int num_experts) -> (Tensor, Tensor, Tensor)",
    reference=sort_by_expert_reference,
    fake=_fake,
)


def sort_by_expert(topk_ids: Tensor, num_experts: int) -> ExpertOrder:
    """Group slots by expert: a stable, deterministic counting sort, without host synchronisation.

    Args:
        topk_ids: [T, K], int32 or int64, in [0, E). -1 and E mean dropped.
        num_experts: E, at least 0.

    Returns:
        The order, from which :func:`permute`, :func:`unpermute` and :func:`grouped_gemm` work.

    Raises:
        IndexError: an id outside [-1, E]. On CUDA only with ``MOE_KERNELS_CHECK=1`` (it costs a
            synchronisation); without it such a slot is dropped.
        ValueError: topk_ids is not [T, K], T * K >= 2**31, or num_experts is not in [0, 2**31).
        TypeError: topk_ids is not int32 or int64, or num_experts is not an integer.
    """
    check_tensor("sort_by_expert", "topk_ids", topk_ids, 2, "[T, K]")
    check_dtype("sort_by_expert", "topk_ids", topk_ids, INDEX_DTYPES)
    check_rows("sort_by_expert", topk_ids.shape[0] * topk_ids.shape[1])
    check_num_experts("sort_by_expert", num_experts)
    return ExpertOrder(*_op(topk_ids, num_experts))
