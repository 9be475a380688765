"""What a training loop does around the backward pass."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor


class MoEAuxLossAutoScaler(torch.autograd.Function):
    """Joins an auxiliary loss to the graph through a tensor that the main loss uses.

    ``apply(output, aux)`` returns ``output``; in backward ``aux [] `` gets the gradient
    ``main_loss_backward_scale`` (None means 1) and ``output`` its own, unchanged.
    """

    main_loss_backward_scale: ClassVar[float | Tensor | None] = None

    @staticmethod
    def forward(ctx: Any, output: Tensor, aux: Tensor) -> Tensor:
        # float32 whatever the autocast: a recomputed forward must save equal metadata.
        ctx.save_for_backward(aux.to(torch.float32))
        ctx.aux_dtype = aux.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        (aux,) = ctx.saved_tensors
        scale = MoEAuxLossAutoScaler.main_loss_backward_scale
        grad = torch.ones_like(aux) if scale is None else torch.ones_like(aux) * scale
        return grad_output, grad.to(ctx.aux_dtype)
