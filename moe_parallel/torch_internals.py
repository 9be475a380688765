"""What this package uses of PyTorch's private interfaces, 2.11 to 2.13, and nothing else does."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.utils import checkpoint


def flattened_meshes(mesh: DeviceMesh) -> dict[str, DeviceMesh]:
    """The 1-D meshes, by axis, made by :func:`flatten_mesh` of the root that ``mesh`` is part of.

    Slicing a root by such an axis is deprecated: a mesh has to be kept by whoever made it.
    """
    return mesh._get_root_mesh()._flatten_mapping


def flatten_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """``mesh`` as a 1-D mesh of the same root, with the axis ``name``. Collective over the root."""
    return mesh._flatten(name)


def unflatten_mesh(mesh: DeviceMesh, sizes: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """The 1-D ``mesh`` as a mesh of several axes of the same root. Collective over the root."""
    return mesh._unflatten(0, sizes, names)


def fsdp_param_groups(state: Any) -> list[Any]:
    """The parameter groups of an FSDP state: one attribute in 2.11, a list from 2.13."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if isinstance(groups, (list, tuple)):
        return list(groups)
    group = getattr(state, "_fsdp_param_group", None)
    return [] if group is None else [group]


def fully_sharded_modules(module: Any) -> Iterator[Any]:
    """``module`` and what is in it, as far as ``fully_shard`` was applied to it."""
    if isinstance(module, nn.Module):
        yield from (child for child in module.modules() if isinstance(child, FSDPModule))


def reshards_after_forward(module: Any) -> bool:
    """Whether FSDP frees any parameters of ``module`` between its forward and its backward."""
    return any(
        group.post_forward_mesh_info is not None
        for unit in fully_sharded_modules(module)
        for group in fsdp_param_groups(unit._get_fsdp_state())
    )


def has_run(state: Any) -> bool:
    """Whether an FSDP state has seen a forward, before which it knows no other states."""
    return getattr(state, "_is_root", False) is not None


def complete_accumulated_grads(group: Any) -> None:
    """Bring the accumulated gradients of an FSDP parameter group to its reduce dtype.

    FSDP does so for gradients that autograd accumulated before its hook ran. What it finds later,
    of a split backward, or of a parameter that only the last micro-batch used, is in the dtype of
    the parameter, and it refuses a mixture. Parameters that have none yet get zeros where others
    have some, so that autograd adds to them.
    """
    params = [
        param
        for param in getattr(group, "fsdp_params", ())
        if hasattr(param, "_unsharded_param") and param._unsharded_param.requires_grad
    ]
    for param in params:
        param.accumulate_unsharded_grad_if_needed()
        param.to_accumulated_grad_if_needed()
    if all(param.unsharded_accumulated_grad is None for param in params):
        return
    for param in params:
        if param.unsharded_accumulated_grad is None:
            param.unsharded_accumulated_grad = torch.zeros_like(
                param._unsharded_param, dtype=param.reduce_dtype
            )


def stages_of(schedule: Any) -> list[Any]:
    """This rank's stages of a pipeline schedule."""
    stages = getattr(schedule, "_stages", None)
    return [schedule._stage] if stages is None else list(stages)


def splits_backward(schedule: Any) -> bool:
    """Whether a pipeline schedule computes the gradients of inputs and of weights apart."""

    def is_split(action: Any) -> bool:
        name = action.computation_type.name
        return name in ("BACKWARD_INPUT", "BACKWARD_WEIGHT") or any(
            is_split(sub_action) for sub_action in getattr(action, "sub_actions", None) or ()
        )

    orders = getattr(schedule, "pipeline_order_with_comms", None) or {}
    return any(is_split(action) for order in orders.values() for action in order if action)


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)


@functools.cache
def _functions_hide_metadata() -> bool:
    node: Any = _Identity.apply(torch.ones(1, requires_grad=True)).grad_fn
    try:
        return node._input_metadata is None
    except RuntimeError:
        return True


def keep_graph(param_groups: list[dict[str, Any]], edges: list[Any]) -> None:
    """Keep what follows the intermediate nodes of a split backward alive until its weight pass.

    Before 2.13 nobody owns the node of a custom op among them once the outputs are detached.
    """
    if _functions_hide_metadata():
        for group in param_groups:
            group["edges_of_outputs"] = edges


def gradient_edges(outputs: Any) -> list[Any]:
    """Where the backward of ``outputs`` starts; they own the graph."""
    tensors = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    return [
        torch.autograd.graph.get_gradient_edge(tensor)
        for tensor in tensors
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad
    ]


@contextmanager
def edges_of_functions() -> Iterator[None]:
    """Let ``torch.autograd.grad`` start at a custom op's node, as a split backward does.

    Before 2.13 it compares the given gradients with metadata that such nodes do not show; inside
    of this they are taken as they are.
    """
    if not _functions_hide_metadata():
        yield
        return
    make_grads = torch.autograd._make_grads

    def take(outputs: Any, grads: Any, is_grads_batched: bool) -> Any:
        if all(isinstance(grad, torch.Tensor) for grad in grads):
            return tuple(grads)
        return make_grads(outputs, grads, is_grads_batched)

    torch.autograd._make_grads = take
    try:
        yield
    finally:
        torch.autograd._make_grads = make_grads


def tolerate_unrecorded_ops(contexts: Any) -> Any:
    """Let the recomputation of a selective checkpoint run ops that its forward did not.

    From 2.13 it looks up every op, even those it does not keep, and raises for one it has not seen.
    FSDP's runtime inside the region, and an active profiler, run other ops in recomputation than in
    forward: parameters may have been gathered already, or freed since.
    """
    recompute = getattr(checkpoint, "_RECOMPUTE", None)
    if recompute is None:
        return contexts

    class Entries(dict[int, Any]):
        def get(self, index: int, default: Any = None) -> Any:
            return super().get(index, recompute)

    class Storage(defaultdict[Any, Entries]):
        def get(self, key: Any, default: Any = None) -> Entries:
            return self[key]

    storage = Storage(Entries)
    for context in contexts:
        if isinstance(getattr(context, "storage", None), dict):
            context.storage = storage
    return contexts
