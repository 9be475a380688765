"""What has to be known, checked and arranged before a model is sharded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.nn import functional

from moe_parallel.experts import GroupedExperts
from moe_parallel.mesh import MeshError, get_submesh, groups_of, is_mesh, pipeline_of
from moe_parallel.tensors import local_tensor
from moe_parallel.text_module import is_module

logger = logging.getLogger(__name__)


def replicate_correction_bias(gate: Any, mesh: Any) -> None:
    """Make a router's correction bias a DTensor, replicated over ``mesh``.

    FSDP leaves buffers alone. As a plain tensor the bias would follow each rank's own load, and the
    ranks' routers would drift apart; :meth:`Gate.update_bias` sums the load over a DTensor's mesh.
    The last mesh counts.
    """
    buffers = getattr(gate, "_buffers", None) or {}
    bias = buffers.get("e_score_correction_bias")
    if not isinstance(bias, Tensor) or not is_mesh(mesh):
        return
    bias = local_tensor(bias)
    local = bias if bias.is_meta else bias.to(mesh.device_type)
    buffers["e_score_correction_bias"] = DTensor.from_local(
        local, mesh, [Replicate()] * mesh.ndim, run_check=False
    )


def check_shards(
    moe_layers: Iterable[Any], fsdp_mesh: Any, ep_shard_enabled: bool, ep_shard_mesh: Any
) -> None:
    """The meshes must be such that FSDP can shard a model with these MoE layers over them.

    Raises:
        MeshError: they are not; before any communication.
    """
    if is_mesh(fsdp_mesh) and fsdp_mesh.ndim > 2:
        raise MeshError(
            "apply_fsdp: fsdp_mesh must be 1-D, or 2-D to replicate over the first axis; got "
            f"{fsdp_mesh.ndim}-D, of {fsdp_mesh.mesh_dim_names}. Use the axes of "
            "parallel_axis_names, which joins several into one."
        )
    if not ep_shard_enabled:
        return
    if ep_shard_mesh is None and is_mesh(fsdp_mesh):  # fully_shard would take all ranks
        raise MeshError(
            "apply_fsdp: ep_shard_enabled needs ep_shard_mesh, such as moe_mesh['ep_shard']; got "
            "None. Pass the mesh, or ep_shard_enabled=False."
        )
    check_expert_widths(moe_layers, ep_shard_mesh)


def check_expert_widths(moe_layers: Iterable[Any], mesh: Any) -> None:
    """Every width of the layers' experts, in dimension 1, must divide evenly over ``mesh``.

    Dimension 0 would not do: there may be more shards than experts. Some layers may be None.

    Raises:
        MeshError: one does not; before any communication.
    """
    for moe in moe_layers:
        experts = getattr(moe, "experts", None)
        if not is_mesh(mesh) or not is_module(experts):
            continue
        for name, parameter in experts.named_parameters():
            if parameter.ndim > 1 and parameter.shape[1] % mesh.size():
                raise MeshError(
                    f"apply_fsdp: dimension 1 of the experts' {name} must be a multiple of the "
                    f"ep_shard size {mesh.size()}; got {list(parameter.shape)}. Use a larger ep, "
                    "which makes ep_shard smaller, or other widths."
                )


def check_experts_shared(
    moe_layers: Iterable[Any], fsdp_mesh: Any, ep_enabled: bool, ep_shard_mesh: Any | None
) -> None:
    """Every rank of ``fsdp_mesh`` must have a part of the experts, or of their reduction.

    Args:
        ep_enabled: FSDP leaves the experts alone, but for ``ep_shard_mesh``.
        ep_shard_mesh: over which FSDP shards the experts; None for no such.

    Raises:
        MeshError: experts that are copies of each other would train apart; before any
            communication.
    """
    if not is_mesh(fsdp_mesh) or not (ep_shard_mesh is None or is_mesh(ep_shard_mesh)):
        return
    shards = 1 if ep_shard_mesh is None else ep_shard_mesh.size()
    for moe in moe_layers:
        experts = getattr(moe, "experts", None)
        if not is_module(experts) or not (ep_enabled or ep_shard_mesh is not None):
            continue
        for name, parameter in experts.named_parameters():
            sharded = isinstance(parameter, DTensor)
            if not parameter.requires_grad or not (sharded or isinstance(experts, GroupedExperts)):
                continue  # plain tensors of another class may be a rank's own experts
            owners = parameter.device_mesh.size() if isinstance(parameter, DTensor) else 1
            if owners * shards < fsdp_mesh.size():
                raise MeshError(
                    f"apply_fsdp: the experts' {name} is spread over {owners} ranks by Expert "
                    f"Parallelism x {shards} of ep_shard_mesh, but {fsdp_mesh.size()} ranks share "
                    "the model; copies would train apart. Call apply_ep before, and pass "
                    "ep_shard_enabled=True with moe_mesh['ep_shard']; or, without Expert "
                    "Parallelism, ep_enabled=False and ep_shard_enabled=False."
                )


def fp32_only_modules(
    module: Any, keep_in_fp32: tuple[str, ...], ignored: set[Any] | None = None
) -> Iterator[nn.Module]:
    """The largest sub-modules of ``module`` that must be FSDP units of their own, in float32.

    They are those named in ``keep_in_fp32``, and those whose parameters are all float32, if
    ``module`` has others too: a unit has parameters of one dtype. Not those that are units
    already, nor parameters that are not to be in one.
    """
    if not is_module(module):
        return

    def dtypes(part: nn.Module) -> set[torch.dtype]:
        parameters = (p for p in part.parameters() if p not in (ignored or ()))
        return {p.dtype for p in parameters if p.is_floating_point()}

    mixed = len(dtypes(module)) > 1
    stack = list(module.named_children())[::-1]
    while stack:
        name, child = stack.pop()
        if isinstance(child, FSDPModule):
            continue
        callable_module = type(child).forward is not nn.Module.forward
        fp32 = name in keep_in_fp32 or (mixed and dtypes(child) == {torch.float32})
        if dtypes(child) and callable_module and fp32:
            yield child
        else:
            stack += list(child.named_children())[::-1]


def unit_maker(
    fully_shard: Callable[..., Any],
    kind: type,
    keep_in_fp32: tuple[str, ...] | None,
    fp32_policy: Callable[..., Any],
    **common: Any,
) -> Callable[..., None]:
    """A function ``shard(module, policy, **options)`` that makes a module an FSDP unit.

    Args:
        fully_shard: what does so.
        kind: the class of units. With ``keep_in_fp32`` those that are one already are left alone.
        keep_in_fp32: see :func:`fp32_only_modules`, which become units before; None for no such.
        fp32_policy: makes the policy of theirs.
        common: options of every unit.
    """

    def shard(module: Any, policy: Any, **options: Any) -> None:
        if keep_in_fp32 is not None:
            if isinstance(module, kind):
                return
            # What such a module returns stays as it is: it goes on in the dtype of its input.
            fp32 = fp32_policy(output_dtype=None, cast_forward_inputs=False)
            for child in fp32_only_modules(module, keep_in_fp32, options.get("ignored_params")):
                fully_shard(child, mp_policy=fp32, **common)
        fully_shard(module, mp_policy=policy, **common, **options)

    return shard


def keep_in_fp32_names(model: Any) -> tuple[str, ...]:
    """The names of sub-modules that a Transformers model wants in float32."""
    names: list[str] = []
    for owner in (model, getattr(model, "model", None)):
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            value = getattr(owner, attribute, None)
            names += value if isinstance(value, (list, tuple, set)) else []
    return tuple(names)


def fp32_param_holders(block: Any) -> list[Any]:
    """The sub-modules called ``..._fp32_params`` that have parameters of their own."""
    named_modules = getattr(block, "named_modules", None)
    if named_modules is None:
        return []
    return [
        module
        for name, module in list(named_modules())
        if name.endswith("_fp32_params") and list(module.parameters(recurse=False))
    ]


def check_ep_mesh(ep_mesh: Any) -> None:
    """It must have one axis and several ranks.

    Raises:
        AssertionError: it has not.
        TypeError: it is no mesh.
    """
    if not hasattr(ep_mesh, "size"):
        raise TypeError(
            f"apply_ep: ep_mesh must be a 1-D DeviceMesh, such as moe_mesh['ep']; got {ep_mesh!r}"
        )
    size = ep_mesh.size()
    assert size > 1, f"apply_ep: ep_mesh must have more than one rank; got {size}"
    assert not is_mesh(ep_mesh) or ep_mesh.ndim == 1, (
        f"apply_ep: ep_mesh must be 1-D, such as moe_mesh['ep']; got {ep_mesh}"
    )


def warn_without_experts(moe_layers: list[tuple[str, Any]], ep_mesh: Any) -> None:
    """Say that Expert Parallelism changes nothing, but for a stage of a pipeline."""
    if not moe_layers and is_mesh(ep_mesh) and pipeline_of(ep_mesh) is None:
        logger.warning(
            "apply_ep: the model has no block with an MoE, as its .mlp or .moe: there are no "
            "experts to shard. A transformers model needs replace_moe_layers first."
        )


def check_expert_counts(moe_layers: list[tuple[str, Any]], ep_size: int) -> None:
    """The experts of every layer, given with the name of its block, must divide over the ranks.

    Raises:
        MeshError: one's do not.
    """
    for name, moe in moe_layers:
        experts = getattr(moe, "n_routed_experts", None)
        if isinstance(experts, int) and experts % ep_size:
            raise MeshError(
                f"apply_ep: n_routed_experts must be a multiple of the EP size {ep_size}; "
                f"block {name} has {experts}"
            )


@torch.no_grad()
def check_equal_experts(moe_layers: list[tuple[str, Any]], ep_mesh: Any, moe_mesh: Any) -> None:
    """The groups of ``ep_shard`` must hold the same experts: FSDP shards what each has.

    What counts is what the first rank of a group holds, before it is distributed. Collective over
    ``moe_mesh`` and all stages of its pipeline: a reduction of two numbers a stage, or one along
    each axis of a mesh of other making than :func:`build_meshes`.

    Raises:
        MeshError: they do not, in some stage; on every rank.
    """
    names = getattr(ep_mesh, "mesh_dim_names", None)
    if not is_mesh(moe_mesh) or not names:
        return
    ep_axis_name = names[0]
    stages = pipeline_of(moe_mesh)
    axes = tuple(name for name in moe_mesh.mesh_dim_names if name != "pp")
    ranks_of_stage = moe_mesh[axes]
    if ranks_of_stage.size() == get_submesh(moe_mesh, ep_axis_name).size():
        return
    # For each stage the greatest digest and the greatest negative one. Who has none takes part.
    least = -(2**62)
    extremes = torch.full((1 if stages is None else stages.size(), 2), least)
    tensors = [parameter for _, moe in moe_layers for parameter in moe.experts.parameters()]
    known = tensors and not any(t.is_meta or isinstance(t, DTensor) for t in tensors)
    if known and moe_mesh.get_local_rank(ep_axis_name) == 0:
        digest = sum((_digest(tensor, i) for i, tensor in enumerate(tensors)), start=0) % 2**62
        stage = 0 if stages is None else stages.get_local_rank()
        extremes[stage] = torch.tensor([digest, -digest])
    extremes = extremes.to(moe_mesh.device_type)
    for group in _groups_with(ranks_of_stage, stages):
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
    unequal = [
        stage
        for stage, (most, fewest) in enumerate(extremes.tolist())
        if most != least and most != -fewest
    ]
    if unequal:
        where = "" if stages is None else f" in pipeline stage {', '.join(map(str, unequal))}"
        raise MeshError(
            "apply_ep: the groups of ep_shard must hold equal weights of the experts; they differ"
            f"{where}. Initialise or load every rank alike (the same seed or the same checkpoint) "
            "first."
        )


def _groups_with(ranks_of_stage: Any, stages: Any) -> list[Any]:
    """Process groups over which one reduction after the other covers a stage's ranks, or those of
    all stages: one, if there is."""
    if stages is None:
        return groups_of(ranks_of_stage)
    if ranks_of_stage.size() * stages.size() == dist.get_world_size():
        return [dist.group.WORLD]
    return [*groups_of(ranks_of_stage), stages.get_group()]


def _digest(tensor: Tensor, seed: int) -> int:
    """A number that tensors of other bits hardly share: the bits, summed with random factors."""
    data = tensor.contiguous().flatten().view(torch.uint8)
    words = functional.pad(data, (0, -data.numel() % 8)).view(torch.int64)
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randint(-(2**63), 2**63 - 1, (2**20,), generator=generator) | 1  # invertible
    factors = factors.to(words.device)
    total = seed + 1
    for chunk in words.split(factors.numel()):
        total = (total * 31 + int((chunk * factors[: chunk.numel()]).sum())) % 2**64
    return total
