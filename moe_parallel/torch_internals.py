"""What this package uses of PyTorch's private interfaces that differ or may move, 2.11 to 2.15.

Beside them stand those that the specification of ``fsdp_mixin.py`` names, the passes of a
pipeline's backward and the state of an FSDP unit, and the root of a mesh in ``mesh.py``.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.utils import _create_file_view
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import _backward
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils import checkpoint

from moe_parallel.text_module import is_module


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
    if is_module(module):
        yield from (child for child in module.modules() if issubclass(type(child), FSDPModule))


def reshards_after_forward(module: Any) -> bool:
    """Whether FSDP frees any parameters of ``module`` between its forward and its backward."""
    return any(
        group.post_forward_mesh_info is not None
        for unit in fully_sharded_modules(module)
        for group in fsdp_param_groups(unit._get_fsdp_state())
    )


def has_checkpoints(module: Any) -> bool:
    """Whether :func:`apply_ac`, or the user, wrapped any part of ``module`` for checkpointing."""
    return is_module(module) and any(
        isinstance(child, CheckpointWrapper) for child in module.modules()
    )


def has_run(state: Any) -> bool:
    """Whether an FSDP state has seen a forward, before which it knows no other states."""
    return getattr(state, "_is_root", False) is not None


def complete_accumulated_grads(group: Any) -> None:
    """Bring the accumulated gradients of an FSDP parameter group to its reduce dtype.

    FSDP does so for gradients that autograd accumulated before its hook ran. What it finds later,
    of a split backward, or of a parameter that only the last micro-batch used, is in the dtype of
    the parameter, and it refuses a mixture. Parameters that have none yet get zeros where others
    have some, so that autograd adds to them. From 2.15 parameters accumulate in the reduce dtype
    themselves, and such zeros are theirs.
    """
    fsdp_params = getattr(group, "fsdp_params", None)
    params = [
        param
        for param in (fsdp_params if isinstance(fsdp_params, (list, tuple)) else ())
        if hasattr(param, "_unsharded_param") and param._unsharded_param.requires_grad
    ]
    before = [param for param in params if hasattr(param, "to_accumulated_grad_if_needed")]
    for param in before:
        param.accumulate_unsharded_grad_if_needed()
        param.to_accumulated_grad_if_needed()
    if all(param.unsharded_accumulated_grad is None for param in params):
        return
    for param in params:
        if param.unsharded_accumulated_grad is None:
            whole = param._unsharded_param
            if before:
                param.unsharded_accumulated_grad = torch.zeros_like(whole, dtype=param.reduce_dtype)
            else:
                whole.grad = torch.zeros_like(whole, dtype=whole.grad_dtype)


def final_callback(root_state: Any) -> Callable[[], None]:
    """That of a root's backward, which waits for the reductions; it may be called again and again.

    From 2.15 it wants to have been queued by a backward, and says so but once.
    """
    context = root_state._state_ctx
    callback: Callable[[], None] = root_state._root_post_backward_final_callback

    def finish() -> None:
        if getattr(context, "manual_backward_finalization_active", False) is None:
            context.manual_backward_finalization_active = context.manual_backward_finalization
        callback()

    return finish


def discard_accumulated_grads(module: Any) -> None:
    """Forget what backward passes without communication left in FSDP's units, and reshard them.

    ``zero_grad`` does not see gradients that are kept in a reduce dtype of their own.
    """
    for unit in fully_sharded_modules(module):
        for group in fsdp_param_groups(unit._get_fsdp_state()):
            for param in group.fsdp_params:
                if "unsharded_accumulated_grad" in vars(param):  # until 2.15
                    param.unsharded_accumulated_grad = None
                if hasattr(param, "_unsharded_param"):
                    param._unsharded_param.grad = None
        unit.reshard()


def holds_unreduced_grads(module: Any) -> bool:
    """Whether backward passes without communication left gradients in FSDP's units."""
    return any(
        param.unsharded_accumulated_grad is not None
        or getattr(getattr(param, "_unsharded_param", None), "grad", None) is not None
        for unit in fully_sharded_modules(module)
        for group in fsdp_param_groups(unit._get_fsdp_state())
        for param in group.fsdp_params
    )


def reduce_unused_parameters(unit: Any) -> None:
    """Let the ranks reduce together what some of them did not use in a batch.

    That is parameters of the FSDP unit, and of the units in it, whose forward ran on every rank.
    """
    setter = getattr(unit, "set_reduce_scatter_unused_params", None)
    if setter is not None:  # from 2.13
        setter(True)
        return
    for module in fully_sharded_modules(unit):
        for group in fsdp_param_groups(module._get_fsdp_state()):
            group.post_backward = functools.partial(_reduce_with_zeros, group, group.post_backward)


def _reduce_with_zeros(group: Any, post_backward: Callable[[], None]) -> None:
    if group.reduce_grads:
        for param in group.fsdp_params:
            whole = getattr(param, "_unsharded_param", None)
            if (
                whole is not None
                and whole.requires_grad
                and whole.grad is None
                and param.unsharded_accumulated_grad is None
            ):
                whole.grad = torch.zeros_like(whole)
    post_backward()


def stages_of(schedule: Any) -> list[Any]:
    """This rank's stages of a pipeline schedule."""
    stages = getattr(schedule, "_stages", None)
    return [schedule._stage] if stages is None else list(stages)


def greet_other_ranks_alone(stage: Any) -> None:
    """Keep a pipeline stage from a transfer to its own rank before the first step.

    Before 2.13 each stage exchanges a number with its neighbours then, even if they are on the same
    rank, as ZBVZeroBubble and DualPipeV place them; gloo refuses that.
    """
    name = "_get_init_p2p_neighbors_ops"
    operations = getattr(stage, name, None)
    if operations is not None:
        own = stage.group_rank
        setattr(stage, name, lambda: [op for op in operations() if op.group_peer != own])


def restore_stage(stage: Any) -> None:
    """Undo what this package has put in the place of a pipeline stage's methods."""
    for name in (
        "backward_maybe_with_nosync",
        "_prepare_forward_infra",
        "_get_init_p2p_neighbors_ops",
    ):
        vars(stage).pop(name, None)


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


def keep_graph(param_groups: Any, edges: list[Any]) -> None:
    """Keep what follows the intermediate nodes of a split backward alive until its weight pass.

    Before 2.13 nobody owns the node of a custom op among them once the outputs are detached. What
    was put in the place of PyTorch's function may return other groups, which are left alone.
    """
    if edges and _functions_hide_metadata():
        for group in param_groups or ():
            if isinstance(group, dict):
                group["edges_of_outputs"] = edges


def graph_is_kept() -> bool:
    """In a backward: whether the graph is retained, so that another may follow."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


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
    of this they are taken as they are. The weight pass also adds each gradient to zero then, which
    hides from the op that it has seen it in the input pass; here a single one stays what it is.
    """
    if not _functions_hide_metadata():
        yield
        return
    make_grads = torch.autograd._make_grads

    def take(outputs: Any, grads: Any, is_grads_batched: bool) -> Any:
        if all(isinstance(grad, torch.Tensor) for grad in grads):
            return tuple(grads)
        return make_grads(outputs, grads, is_grads_batched)

    def total(grads: list[torch.Tensor]) -> Any:
        return grads[0] if len(grads) == 1 else sum(grads)

    torch.autograd._make_grads = take
    vars(_backward)["sum"] = total  # before the builtin
    try:
        yield
    finally:
        torch.autograd._make_grads = make_grads
        vars(_backward).pop("sum", None)


def tolerate_unrecorded_ops(contexts: Any) -> Any:
    """Let the recomputation of a selective checkpoint run ops that its forward did not.

    From 2.13 it looks up every op, even those it does not keep, and raises for one it has not seen.
    FSDP's runtime inside the region, and an active profiler, run other ops in recomputation than in
    forward: parameters may have been gathered already, or freed since.
    """
    recompute = getattr(checkpoint, "_RECOMPUTE", None)
    if recompute is None or not isinstance(contexts, (tuple, list)):
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


def _unused_seed(tensor: torch.Tensor) -> torch.Tensor:
    """In the place of the random state of dropout, which is 0 here."""
    return torch.zeros(2, dtype=torch.uint64, device=tensor.device)


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A bool mask as what is added to the scores."""
    if mask is None:
        return None
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [B, heads, queries, size] and its log-sum-exp [B, heads, queries].

    On CPUs in any float dtype and with any mask; on GPUs in bfloat16 and float16, without mask.
    """
    aten = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=_additive(mask, q.dtype), scale=scale
        )
        return out, lse
    out, lse, *_ = aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, causal, False, scale=scale
    )
    return out, lse


def flash_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v; ``out`` and ``lse`` may be those of more keys than ``k`` has."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        bias = _additive(mask, q.dtype)
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
        return dq, dk, dv
    lengths = (None, None, q.shape[2], k.shape[2])
    seed = _unused_seed(q)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, *lengths, 0.0, causal, seed, seed.new_empty(0), scale=scale
    )
    return dq, dk, dv


def efficient_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`flash_attention`, on GPUs in float32 too; k and v have as many heads as q."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, 0.0, causal, scale=scale
    )
    return out, lse[:, :, : q.shape[2]]  # it is padded


def efficient_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`flash_attention_backward`, for :func:`efficient_attention`."""
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=float("inf"))
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    grads = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, out, padded, seed, seed, 0.0, [True] * 3 + [False], causal, scale=scale
    )
    return grads[0], grads[1], grads[2]


def stream_key(stream: torch.cuda.Stream | None) -> str:
    """A CUDA stream as a string, which an op can take; empty for None."""
    if stream is None:
        return ""
    return f"{stream.stream_id} {stream.device_index} {stream.device_type}"


def stream_of_key(key: str) -> torch.cuda.Stream | None:
    """The stream of :func:`stream_key`."""
    if not key:
        return None
    stream_id, device_index, device_type = map(int, key.split())
    return torch.cuda.Stream(
        stream_id=stream_id, device_index=device_index, device_type=device_type
    )


def store_of(group: Any) -> Any:
    """The store by which the ranks of a process group found each other."""
    return dist.distributed_c10d._get_process_group_store(group)


def backend_of(group: Any, device_type: str) -> str | None:
    """The name of the backend that carries a group's tensors of a kind of device, or None."""
    try:
        return str(group._get_backend(torch.device(device_type)).name())
    except RuntimeError:
        return None


def timeout_of(group: Any, device_type: str = "cpu") -> timedelta:
    """How long the operations of a group on tensors of a kind of device wait."""
    timeout: timedelta = dist.constants.default_pg_timeout
    try:
        options = group._get_backend(torch.device(device_type)).options
    except RuntimeError:  # a backend that has none, as UCC's
        return timeout
    return getattr(options, "_timeout", timeout)


def group_of_name(name: str) -> Any:
    """The process group ``group.group_name``."""
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def all_gather(everything: torch.Tensor, own: torch.Tensor, group: Any) -> Any:
    """Start to gather ``own [n]`` of all ranks in ``everything [ranks * n]``."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    return getattr(dist, name)(everything, own, group=group, async_op=True)


def reduce_scatter(own: torch.Tensor, everything: torch.Tensor, group: Any) -> Any:
    """Start to add up this rank's part of all ranks' ``everything [ranks * n]`` in ``own [n]``."""
    new = hasattr(dist, "reduce_scatter_single")  # from 2.13
    name = "reduce_scatter_single" if new else "reduce_scatter_tensor"
    return getattr(dist, name)(own, everything, group=group, async_op=True)


def local_region(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """``(start, shape)`` of this rank's part in the whole of ``tensor``; of a plain tensor, all."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim(), tuple(tensor.shape)
    shape, start = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(start), tuple(shape)


def stored_at(file: str, offset: int, length: int) -> Any:
    """Where a checkpoint keeps an item, as ``FileSystemReader`` looks it up."""
    return _StorageInfo(file, offset, length)


def storage_extents(metadata: Any) -> dict[str, int]:
    """The bytes that every file of a checkpoint must have at least."""
    sizes: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        end = info.offset + info.length
        sizes[info.relative_path] = max(sizes.get(info.relative_path, 0), end)
    return sizes


def data_offset(file: BinaryIO, begin: int, length: int) -> int:
    """Where in ``file`` the values of a tensor are that ``torch.save`` wrote to a part of it."""
    view: Any = _create_file_view(cast(Any, file), begin, length)
    reader: Any = torch._C.PyTorchFileReader(view)
    return begin + int(reader.get_record_offset("data/0"))
