"""What a training loop does around the backward pass.

With D data- and context-parallel ranks that share the dense parameters, S ranks in a group of
``ep_shard``, and N label tokens in all micro-batches of all ranks: a rank back-propagates ``D / N``
times the sum of its tokens' losses. FSDP averages dense gradients over D ranks, which leaves the
gradient of the mean loss. Experts' gradients are summed over their Expert Parallel group by the
exchange of tokens and averaged over S by FSDP: ``D / S`` times too large.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from moe_parallel.mesh import MeshError, get_submesh, ranks_of_ep_shard
from moe_parallel.tensors import local_tensor
from moe_parallel.torch_internals import fully_sharded_modules, holds_unreduced_grads

_PLAIN_EXPERT = re.compile(
    r"(^|\.)(mlp|moe)\.experts\.(gate_up_linear|down_linear)\.(weight|bias)\d+$"
)


class MoEAuxLossAutoScaler(torch.autograd.Function):
    """Joins an auxiliary loss to the graph through a tensor that the main loss uses.

    ``apply(output, aux)`` returns ``output``; in backward ``aux [] `` gets the gradient
    ``main_loss_backward_scale`` (None means 1) and ``output`` its own, unchanged. It should be what
    the loss is multiplied with: D without pipeline parallelism; with it, where losses are plain
    sums, N. The scale is that of the time of backward, under torch.compile too.
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
        grad = torch.ops.moe_kernels.aux_loss_gradient(aux.detach(), grad_output.detach())
        return grad_output, grad.to(ctx.aux_dtype)


def _aux_loss_gradient(aux: Tensor, grad_output: Tensor) -> Tensor:
    """The gradient of ``aux``. An op, for a compiled graph would keep the scale of its first run;
    it takes ``grad_output``, which it does not read, for a compiler would run it in forward."""
    scale = MoEAuxLossAutoScaler.main_loss_backward_scale
    grad = torch.ones_like(aux)
    return grad if scale is None else grad.mul_(scale)


_library = torch.library.Library("moe_kernels", "FRAGMENT")
_library.define(
    "aux_loss_gradient(Tensor aux, Tensor grad_output) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("aux_loss_gradient", _aux_loss_gradient, "CompositeExplicitAutograd")
torch.library.register_fake(
    "moe_kernels::aux_loss_gradient", lambda aux, grad_output: torch.empty_like(aux), lib=_library
)


@dataclass
class _StepFlags:
    is_optim_step: bool = False
    is_first_microbatch: bool = False


_flags = _StepFlags()  # of the process: pipeline schedules call backward out of the loop's sight


def set_is_optim_step(value: bool) -> None:
    """Say whether the backward passes from now on end in an optimizer step."""
    _flags.is_optim_step = value


def get_is_optim_step() -> bool:
    """Whether the current backward passes end in an optimizer step; False at the start."""
    return _flags.is_optim_step


def set_is_first_microbatch(value: bool) -> None:
    """Say whether the next micro-batch is the first since the optimizer's step."""
    _flags.is_first_microbatch = value


def get_is_first_microbatch() -> bool:
    """Whether the current micro-batch is the first since the optimizer's step."""
    return _flags.is_first_microbatch


def prepare_for_grad_accumulation(model_parts: Iterable[Any], pp_enabled: bool = False) -> None:
    """Before the first of several micro-batches: keep gradients local from here on.

    Args:
        model_parts: the model, or this rank's stages of it; parts that are a
            :class:`MoEFSDPSyncMixin` with its optimizations on are told.
        pp_enabled: whether a pipeline schedule runs the backward passes; then it decides itself.
    """
    set_is_optim_step(False)
    set_is_first_microbatch(True)
    _tell_parts("prepare_for_grad_accumulation", model_parts, pp_enabled)


def prepare_for_final_backward(model_parts: Iterable[Any], pp_enabled: bool = False) -> None:
    """Before the last micro-batch (with pipeline parallelism, the last schedule step) of an
    optimizer step: let its backward reduce what was accumulated."""
    set_is_optim_step(True)
    _tell_parts("prepare_for_final_backward", model_parts, pp_enabled)


def _tell_parts(method: str, model_parts: Iterable[Any], pp_enabled: bool) -> None:
    if pp_enabled:
        return
    for part in model_parts:
        prepare = getattr(part, method, None)
        if prepare is not None:
            prepare(pp_enabled=False)


def scale_grads_and_clip_grad_norm(
    max_norm: float | None,
    model_parts: Sequence[nn.Module],
    *,
    norm_type: float = 2.0,
    pp_enabled: bool = False,
    device_mesh: DeviceMesh | None = None,
    moe_mesh: DeviceMesh | None = None,
    ep_axis_name: str | None = None,
    pp_axis_name: str | None = None,
    foreach: bool = False,
    num_label_tokens: float | None = None,
    dp_group_size: int | None = None,
) -> float:
    """Bring every gradient to that of the mean loss, then clip by the global norm.

    Do not combine with FSDP's ``set_gradient_divide_factor`` on experts: that would divide twice.

    Args:
        max_norm: bound of the global norm; None to scale only.
        model_parts: the model, or this rank's stages of it.
        norm_type: p of the norm; ``math.inf`` for the largest entry.
        pp_enabled: whether the model is split over pipeline stages. Their losses are sums, so
            every gradient is divided by ``num_label_tokens / dp_group_size``.
        device_mesh: the world's mesh, with the axis ``pp_axis_name``.
        moe_mesh: the experts' mesh; with ``dp_group_size``, experts' gradients are divided by
            ``D / S``, S being the ranks of moe_mesh, without pipeline stages, over those of
            ``ep_axis_name``.
        ep_axis_name: the Expert Parallel axis. A DTensor on a mesh with this axis is an expert's.
        pp_axis_name: the pipeline axis.
        foreach: scale many tensors in one call.
        num_label_tokens: N; of no effect without pipeline parallelism, or when 0 or None.
        dp_group_size: D, context parallel ranks included.

    Returns:
        The norm before clipping; 0.0 for ``max_norm=None``.

    Raises:
        ValueError: ``norm_type`` is not above 0.
        MeshError: pipeline parallelism without its mesh or axis; moe_mesh without its axis;
            gradients that FSDP has not reduced.
    """
    if moe_mesh is not None and dp_group_size and ep_axis_name is None:
        raise MeshError(
            "scale_grads_and_clip_grad_norm: moe_mesh and dp_group_size need ep_axis_name, by "
            "which the experts' gradients, ep times too large, are found; got None. Pass the axis, "
            "or moe_mesh=None without Expert Parallelism."
        )
    refusal = _show_sharded_parameters(model_parts)
    if refusal is not None and (max_norm is None or not pp_enabled):
        raise refusal
    if pp_enabled and num_label_tokens and dp_group_size:
        tokens = float(num_label_tokens)
        _divide([p.grad for p in _parameters(model_parts)], tokens / dp_group_size, foreach)
    if moe_mesh is not None and dp_group_size and ep_axis_name is not None:
        shards = ranks_of_ep_shard(moe_mesh, ep_axis_name)
        experts = {
            id(parameter): parameter.grad
            for part in model_parts
            for name, parameter in part.named_parameters()
            if _is_expert(name, parameter, ep_axis_name)
        }
        _divide(list(experts.values()), dp_group_size / shards, foreach)
    if max_norm is None:
        return 0.0
    return clip_grad_norm(
        max_norm,
        model_parts,
        norm_type=norm_type,
        pp_enabled=pp_enabled,
        device_mesh=device_mesh,
        pp_axis_name=pp_axis_name,
        foreach=foreach,
    )


def _show_sharded_parameters(model_parts: Sequence[Any]) -> MeshError | None:
    """Have the parts' parameters be those that have gradients and that the optimizer knows.

    Gathered for a forward, and not freed since, they are others. Returns what is to be raised where
    FSDP holds gradients that no backward has reduced: after the ranks of other stages, which may
    hold none, have got what they wait for.
    """
    if any(holds_unreduced_grads(part) for part in model_parts):
        return MeshError(
            "clip_grad_norm: gradients must have been reduced over the ranks; FSDP holds some that "
            "were not. Call prepare_for_final_backward (or set_requires_gradient_sync(True)) "
            "before the last backward of a step."
        )
    for part in model_parts:
        for unit in fully_sharded_modules(part):
            unit.reshard()
    return None


def _is_expert(name: str, parameter: nn.Parameter, ep_axis_name: str) -> bool:
    if isinstance(parameter, DTensor):
        grad = parameter.grad
        return isinstance(grad, DTensor) and ep_axis_name in (grad.device_mesh.mesh_dim_names or ())
    return _PLAIN_EXPERT.search(name) is not None


def _parameters(model_parts: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Every parameter once, in the order of the parts."""
    return list({id(p): p for part in model_parts for p in part.parameters()}.values())


@torch.no_grad()
def _divide(grads: Sequence[Tensor | None], divisor: float, foreach: bool) -> None:
    local = [local_tensor(grad) for grad in grads if grad is not None]
    if divisor == 1 or not local:
        return
    if foreach:
        torch._foreach_div_(local, divisor)
        return
    for grad in local:
        grad.div_(divisor)


@dataclass(frozen=True)
class _Group:
    """Parameters whose gradients are spread over ranks alike; no mesh for plain tensors."""

    mesh: DeviceMesh | None
    placements: tuple[Placement, ...]


@torch.no_grad()
def clip_grad_norm(
    max_norm: float,
    model_parts: Sequence[nn.Module],
    *,
    norm_type: float = 2.0,
    pp_enabled: bool = False,
    device_mesh: DeviceMesh | None = None,
    pp_axis_name: str | None = None,
    foreach: bool = False,
) -> float:
    """Scale gradients in place so that their norm, over all ranks, is at most ``max_norm``.

    Collective: every rank of every mesh of the parameters must call it, whichever of its gradients
    are missing. Takes part: parameters that require a gradient, plain or DTensor, on any meshes.

    Returns:
        The p-norm before clipping, accumulated in float32 or wider; 0.0 without gradients.

    Raises:
        ValueError: ``norm_type`` is not above 0.
        MeshError: pipeline parallelism without its mesh or axis; gradients that FSDP has not
            reduced.
    """
    norm_type, pp_group = float(norm_type), None  # "inf" too, as PyTorch's own
    if not norm_type > 0:
        raise ValueError(f"clip_grad_norm: norm_type must be above 0; got {norm_type}")
    if pp_enabled:
        if device_mesh is None or pp_axis_name is None:
            raise MeshError(
                "clip_grad_norm: pp_enabled needs device_mesh and pp_axis_name; got "
                f"{device_mesh} and {pp_axis_name!r}"
            )
        pp_group = get_submesh(device_mesh, pp_axis_name).get_group()
    refusal = _show_sharded_parameters(model_parts)
    if refusal is not None and pp_group is None:
        raise refusal
    groups: dict[_Group, list[nn.Parameter]] = {}
    # Ranks must walk through the same groups in the same order: that of the parameters, which they
    # share, and not that of the gradients, which may be missing on some.
    for parameter in _parameters(model_parts):
        if parameter.requires_grad:
            groups.setdefault(_group_of(parameter), []).append(parameter)

    combined: Tensor | None = None
    for group, members in groups.items():
        power = _group_power(group, members, norm_type)
        if combined is None:
            combined = power
        else:
            combined = _combine(combined, power.to(combined.device), norm_type)
    if pp_group is not None:
        assert device_mesh is not None
        if combined is None:
            combined = torch.zeros(())
        combined = combined.to(device_mesh.device_type, torch.float32)
        dist.all_reduce(combined, op=_reduce_op(norm_type), group=pp_group)
    if refusal is not None:
        raise refusal
    if combined is None:
        return 0.0
    norm = combined if math.isinf(norm_type) else combined ** (1.0 / norm_type)
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for members in groups.values():
        _multiply([p.grad for p in members if p.grad is not None], scale, foreach)
    return float(norm)


def _group_of(parameter: nn.Parameter) -> _Group:
    if isinstance(parameter, DTensor):
        return _Group(parameter.device_mesh, tuple(parameter.placements))
    return _Group(None, ())


def _group_power(group: _Group, members: list[nn.Parameter], norm_type: float) -> Tensor:
    """Sum of the p-th powers (for inf: the maximum) of a group's gradients, on all its ranks.

    On the device of the mesh, which its collectives need, wherever the gradients live.
    """
    device = members[0].device if group.mesh is None else torch.device(group.mesh.device_type)
    wide = torch.float32
    for parameter in members:
        wide = torch.promote_types(wide, parameter.dtype)
    power = torch.zeros((), dtype=wide, device=device)
    for parameter in members:
        grad = parameter.grad
        if isinstance(grad, DTensor) and tuple(grad.placements) != group.placements:
            grad = grad.redistribute(placements=group.placements)  # partial sums, for instance
        if grad is None or (local := local_tensor(grad)).numel() == 0:
            continue
        norm = torch.linalg.vector_norm(local, norm_type, dtype=wide).to(device)
        power = _combine(power, norm if math.isinf(norm_type) else norm**norm_type, norm_type)
    for dim, placement in enumerate(group.placements):
        if group.mesh is not None and not placement.is_replicate() and group.mesh.size(dim) > 1:
            dist.all_reduce(power, op=_reduce_op(norm_type), group=group.mesh.get_group(dim))
    return power


def _combine(a: Tensor, b: Tensor, norm_type: float) -> Tensor:
    return torch.maximum(a, b) if math.isinf(norm_type) else a + b


def _reduce_op(norm_type: float) -> Any:
    return dist.ReduceOp.MAX if math.isinf(norm_type) else dist.ReduceOp.SUM


def _multiply(grads: list[Tensor], scale: Tensor, foreach: bool) -> None:
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        local = local_tensor(grad)
        by_device.setdefault(local.device, []).append(local)
    for device, local_grads in by_device.items():
        factor = scale.to(device)
        if foreach:
            torch._foreach_mul_(local_grads, factor)
            continue
        for grad in local_grads:
            grad.mul_(factor.to(grad.dtype))
