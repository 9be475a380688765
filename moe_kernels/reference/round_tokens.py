"""Every expert's tokens rounded to a multiple of the tile of a grouped GEMM.

T tokens, K experts a token, C columns: the K chosen and C - K candidates, E experts.
"""

import torch
from torch import Tensor

MODES = ("nearest", "up", "down")


def rounded_count(chosen: int, available: int, tile: int, mode: str) -> int:
    """The tokens of an expert that was chosen ``chosen`` times and may gain ``available``."""
    rest = chosen % tile
    missing = (tile - rest) % tile
    if mode == "up":
        return chosen + min(missing, available)
    if mode == "nearest" and 2 * rest >= tile and missing <= available:
        return chosen + missing
    return chosen - rest


def round_tokens(
    topk_weights: Tensor,
    topk_ids: Tensor,
    token_mask: Tensor | None,
    num_experts: int,
    top_k: int,
    tile: int,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``topk_weights [T, C]``, ``topk_ids [T, C]`` i32 and ``load [E]`` i32 after rounding.

    An expert ranks the slots that name it: chosen ones (columns before ``top_k``) before
    candidates, among them by weight, NaN first, the lower slot on a tie; it keeps the first
    :func:`rounded_count`. Other slots become weight 0 and id -1.
    """
    ids = topk_ids.to(torch.int64)
    out_of_range = (ids < -1) | (ids > num_experts)
    if bool(out_of_range.any()):
        raise IndexError(
            f"round_tokens: topk_ids must be in [-1, {num_experts}] (-1 and {num_experts} mean "
            f"dropped); got {int(ids[out_of_range][0])}"
        )
    if token_mask is not None:
        ids = torch.where(token_mask[:, None], ids, -1)
    columns = ids.shape[1]
    slot_ids, weights = ids.reshape(-1), topk_weights.detach().reshape(-1)
    is_chosen = torch.arange(slot_ids.numel(), device=ids.device) % max(columns, 1) < top_k
    kept = torch.zeros_like(slot_ids, dtype=torch.bool)
    load = []
    for e in range(num_experts):
        ranked = [
            slots[weights[slots].sort(descending=True, stable=True).indices]
            for slots in (
                torch.nonzero((slot_ids == e) & is_chosen)[:, 0],
                torch.nonzero((slot_ids == e) & ~is_chosen)[:, 0],
            )
        ]
        load.append(rounded_count(ranked[0].numel(), ranked[1].numel(), tile, mode))
        kept[torch.cat(ranked)[: load[-1]]] = True
    kept = kept.view(ids.shape)
    return (
        torch.where(kept, topk_weights, topk_weights.new_zeros(())),
        torch.where(kept, ids, -1).to(torch.int32),
        torch.tensor(load, dtype=torch.int32, device=ids.device),
    )
