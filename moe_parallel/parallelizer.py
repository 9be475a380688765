"""Applying parallelism to a model, in place.

Words used here: the *outer model* is the object passed in; the *inner model* is its ``model``, if
it has one, else itself; the *backbone* is the inner model's text module; a *block* is a child of
the backbone's ``layers`` or of the outer model's ``mtp.layers``.

What a function uses of torch and of this package is looked up among this module's globals when it
runs, so that a test or a framework can replace it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper as ptd_checkpoint_wrapper,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from moe_parallel.activation_checkpointing import (
    SELECTIVE_AC_WRAPPER_FLAG,
    checkpoint_options,
    leave_out_caches,
    repeated_mtp_layers,
    router_saving_contexts,
    router_sizes,
)
from moe_parallel.config import dtype_from_str
from moe_parallel.context_parallel_setup import check_blocks, tell_block
from moe_parallel.fsdp_preparation import (
    check_ep_mesh,
    check_equal_experts,
    check_expert_counts,
    check_experts_shared,
    check_shards,
    fp32_param_holders,
    keep_in_fp32_names,
    replicate_correction_bias,
    unit_maker,
    warn_without_experts,
)
from moe_parallel.fsdp_roots import check_ends, head_dtype, units_around_blocks
from moe_parallel.gate import Gate
from moe_parallel.layers import MoE
from moe_parallel.mesh import ranks_of_stage
from moe_parallel.model_meshes import Axes
from moe_parallel.refusals import check_alike, check_transports, refused_together
from moe_parallel.text_module import (
    _is_deepseek_v4_model,
    _is_selective_ac,
    _module_weights_are_tied,
    block_containers,
    blocks_of,
    get_text_module,
    inner_model,
    moe_config_of,
    mtp_layers,
    named_blocks,
)
from moe_parallel.torch_internals import reduce_unused_parameters

logger = logging.getLogger(__name__)

_CP_STREAM: torch.cuda.Stream | None = None


def _iter_transformer_and_mtp_blocks(model: Any) -> Iterator[tuple[Any, str, Any]]:
    """``(container, name, block)`` of every block, so that it can be replaced in its container."""
    for container in block_containers(model, get_text_module(inner_model(model))):
        for name, block in named_blocks(container):
            yield container, name, block


def _iter_moe_blocks(model_wrapper: Any, backbone: Any) -> Iterator[Any]:
    """The blocks of ``backbone``, then those of the wrapper's multi-token prediction."""
    for container in block_containers(model_wrapper, backbone):
        yield from blocks_of(container)


def _get_moe_module(block: Any) -> Any | None:
    """The block's MoE layer: ``moe``, then ``mlp``, whichever is one; None for a dense block."""
    for name in ("moe", "mlp"):
        module = getattr(block, name, None)
        if isinstance(module, MoE):
            return module
    return None


def _moe_layers(model: Any) -> list[tuple[str, Any]]:
    """The model's MoE layers, with the names of their blocks."""
    return [
        (name, moe)
        for _, name, block in _iter_transformer_and_mtp_blocks(model)
        if (moe := _get_moe_module(block)) is not None
    ]


def _get_model_moe_config(model: Any) -> Any:
    """The ``moe_config`` of the inner model, its text module or the outer model.

    Raises:
        AttributeError: none of them has one.
    """
    inner = inner_model(model)
    return moe_config_of(model, inner, get_text_module(inner))


def _moe_shard_placement(param: Any) -> Shard:
    """Along which dimension FSDP shards a parameter of experts: shards may outnumber experts."""
    return Shard(0) if param.ndim < 2 else Shard(1)


def _get_cp_stream() -> torch.cuda.Stream:
    """The CUDA stream on which context parallelism communicates; one a process."""
    global _CP_STREAM
    if _CP_STREAM is None:
        _CP_STREAM = torch.cuda.Stream()
    return _CP_STREAM


def _fp32_policy(**options: Any) -> Any:
    fields = dict.fromkeys(("param_dtype", "reduce_dtype", "output_dtype"), torch.float32)
    return MixedPrecisionPolicy(**(fields | options))


def _shard_fp32_param_holders(
    block: Any, fsdp_mesh: DeviceMesh, reshard_after_forward: bool, offload_policy: Any
) -> set[nn.Parameter]:
    """Make every sub-module called ``..._fp32_params`` an FSDP unit that computes in float32.

    The model must read its parameters through the holder's own forward, which gathers them.

    Returns:
        The parameters that the holders owned before.
    """
    holders = fp32_param_holders(block)
    owned = {parameter for holder in holders for parameter in holder.parameters(recurse=False)}
    for holder in holders:
        fully_shard(
            holder,
            mesh=fsdp_mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=_fp32_policy(cast_forward_inputs=False),
            offload_policy=offload_policy,
        )
    return owned


class ExpertParallel(ParallelStyle):
    """Shards an experts module over a 1-D mesh: each rank keeps E / size consecutive experts.

    Every parameter of the module, whose dimension 0 is the expert, becomes a DTensor ``Shard(0)``
    with the data of the mesh's first rank: groups that are to hold the same experts must hold equal
    weights before. A module with ``init_token_dispatcher`` is then told the mesh.
    """

    def _partition_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        assert device_mesh.ndim == 1, f"ExpertParallel needs a 1-D mesh; got {device_mesh}"
        for key, parameter in list(module.named_parameters(recurse=False)):
            sharded = nn.Parameter(
                distribute_tensor(parameter, device_mesh, [Shard(0)]),
                requires_grad=parameter.requires_grad,
            )
            module.register_parameter(key, sharded)
        init_token_dispatcher = getattr(module, "init_token_dispatcher", None)
        if init_token_dispatcher is not None:
            init_token_dispatcher(ep_mesh=device_mesh)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, self._partition_fn)


def apply_ep(model: nn.Module, ep_mesh: DeviceMesh, moe_mesh: DeviceMesh | None = None) -> None:
    """Shard the experts of every MoE block over ``ep_mesh``, in place.

    Shared experts and dense blocks stay as they are, and of routers all but the correction bias:
    it becomes a DTensor, replicated over the ranks of ``moe_mesh``, else of ``ep_mesh``, whose load
    updates it. Gradients of a rank's experts are sums over the tokens of all ranks of ``ep_mesh``.

    Args:
        model: the outer model.
        ep_mesh: 1-D, more than one rank.
        moe_mesh: the mesh that ``ep_mesh`` is part of: then it is checked that the groups of ranks
            that are to hold the same experts do, in every stage of its pipeline, and what one stage
            is refused with, all are.

    Raises:
        AssertionError: ``ep_mesh`` has one rank, or several axes.
        MeshError: an MoE's experts cannot be spread evenly, or the groups of ranks that are to hold
            the same experts hold others. The model is as it was.
        ValueError, ImportError: a layer's transport is not to be had on some rank. Likewise.
        RuntimeError: the experts are sharded already.
    """
    check_ep_mesh(ep_mesh)
    with refused_together(moe_mesh):  # or the ranks of other stages would wait for this one's
        layers = _moe_layers(model)
        check_expert_counts(layers, ep_mesh.size())
        check_transports(layers, ep_mesh, moe_mesh)
    warn_without_experts(layers, ep_mesh)
    check_equal_experts(layers, ep_mesh, moe_mesh)
    _shard_experts(layers, ep_mesh, moe_mesh)


def _shard_experts(
    layers: list[tuple[str, Any]], ep_mesh: DeviceMesh, moe_mesh: DeviceMesh | None
) -> None:
    stage = ranks_of_stage(ep_mesh, moe_mesh)
    for _, moe in layers:
        parallelize_module(
            module=moe.experts, device_mesh=ep_mesh, parallelize_plan=ExpertParallel()
        )
        gate = getattr(moe, "gate", None)
        if isinstance(gate, Gate):  # another class may add its bias to plain tensors
            replicate_correction_bias(gate, stage)


def apply_ac(
    model: nn.Module,
    ignore_router: bool = True,
    hidden_size: int | None = None,
    num_experts: int | None = None,
    selective: bool = False,
) -> None:
    """Wrap every block in an activation checkpoint, in place; after EP and CP, before FSDP.

    Each token counts once in the load that :meth:`Gate.update_bias` uses. Routing repeats in
    backward, unless ``ignore_router=False`` lets routers that are not deterministic run again.

    Args:
        model: the outer model.
        ignore_router: keep the routers' projections and choices, compute the rest again.
        hidden_size, num_experts: shape of the routers' projection; None for that of the model's
            configuration. Of no use with ``selective``.
        selective: keep also what is dear to compute, and every second matrix product.

    Raises:
        ValueError: a size is neither given nor configured.
    """
    context_fn = None
    if selective:
        from moe_parallel.activation_checkpointing import make_selective_checkpoint_context_fn

        context_fn = make_selective_checkpoint_context_fn()
    elif ignore_router:
        sizes = router_sizes(model, hidden_size, num_experts)
        context_fn = router_saving_contexts(sizes, create_selective_checkpoint_contexts)
    else:
        logger.warning(
            "apply_ac: ignore_router_for_ac is False, so routers are computed again in backward "
            "and may choose other experts than in forward. Set ignore_router_for_ac=True."
        )

    repeated, skipped = repeated_mtp_layers(model), False
    for container, name, block in list(_iter_transformer_and_mtp_blocks(model)):
        moe = _get_moe_module(block)
        if container is repeated and (not selective or moe is not None):
            # One block serves every depth: FSDP gathers its experts for the first recomputation
            # and not again for the next.
            skipped = True
            continue
        wrapped = ptd_checkpoint_wrapper(block, **checkpoint_options(context_fn, moe))
        leave_out_caches(wrapped)
        if selective:
            setattr(wrapped, SELECTIVE_AC_WRAPPER_FLAG, True)
        container.register_module(name, wrapped)
    if skipped:
        logger.info("apply_ac: multi-token prediction repeats one block; it is not checkpointed")


def apply_fsdp(
    model: nn.Module,
    fsdp_mesh: DeviceMesh,
    ep_enabled: bool,
    ep_shard_enabled: bool,
    ep_shard_mesh: DeviceMesh | None = None,
    mp_policy: Any = None,
    offload_policy: Any = None,
    reshard_after_forward: bool = False,
    lm_head_precision: torch.dtype | str | None = None,
    wrap_outer_model: bool = True,
) -> None:
    """Shard the model over ``fsdp_mesh``, in place: experts, blocks, embedding, head, roots.

    With a pipeline every rank calls it for each of its stages; what one is refused with, all are.

    Args:
        model: the outer model; after EP, CP and activation checkpointing.
        fsdp_mesh: 1-D, or 2-D to replicate over its first axis.
        ep_enabled: the experts are sharded over an Expert Parallel mesh already.
        ep_shard_enabled: shard them further over ``ep_shard_mesh``.
        ep_shard_mesh: 1-D; with the Expert Parallel mesh it has the ranks of ``fsdp_mesh``.
        mp_policy: None for bfloat16 parameters and outputs and float32 reductions.
        offload_policy: of every unit.
        reshard_after_forward: free parameters between forward and backward. Not with pipeline
            schedules that split the backward (zero bubble).
        lm_head_precision: a dtype or its name; float32 keeps the output projection, and so the
            logits, in float32. Not for a head that is tied to the embedding.
        wrap_outer_model: make the outer model a unit. With pipeline schedules leave it False, so
            that several schedule steps accumulate gradients without communication.

    Raises:
        KeyError: ``lm_head_precision`` is a name of no dtype.
        MeshError: ``fsdp_mesh`` has more axes; the experts' widths do not divide over
            ``ep_shard_mesh``, or it is missing; some ranks of ``fsdp_mesh`` would train copies of
            the experts apart; or the head outside of the inner model is tied to the embedding
            inside, with ``wrap_outer_model=False``. The model is as it was.
    """
    with refused_together(fsdp_mesh):
        head_precision = head_dtype(lm_head_precision, dtype_from_str)
        backbone = get_text_module(inner_model(model))
        blocks = list(_iter_moe_blocks(model, backbone))
        moes = [moe for block in blocks if (moe := _get_moe_module(block)) is not None]
        check_shards(moes, fsdp_mesh, ep_shard_enabled, ep_shard_mesh)
        check_experts_shared(
            moes, fsdp_mesh, ep_enabled, ep_shard_mesh if ep_shard_enabled else None
        )
        check_ends(model, backbone, wrap_outer_model)
    if mp_policy is None:
        narrow = dict.fromkeys(("param_dtype", "output_dtype"), torch.bfloat16)
        mp_policy = _fp32_policy(**narrow, cast_forward_inputs=True)
    shard = unit_maker(
        fully_shard,
        FSDPModule,
        keep_in_fp32_names(model) if _is_deepseek_v4_model(model) else None,
        _fp32_policy,
        mesh=fsdp_mesh,
        reshard_after_forward=reshard_after_forward,
        offload_policy=offload_policy,
    )

    units = units_around_blocks(
        model,
        backbone,
        tied=_module_weights_are_tied,
        lm_head_precision=head_precision,
        wrap_outer_model=wrap_outer_model,
        logger=logger,
    )
    mtp_blocks = {id(block) for block in blocks_of(mtp_layers(model))}
    for block in blocks:
        moe = _get_moe_module(block)
        ignored: set[nn.Parameter] = set()
        if moe is not None:
            if ep_shard_enabled:
                fully_shard(
                    moe.experts,
                    mesh=ep_shard_mesh,
                    shard_placement_fn=_moe_shard_placement,
                    reshard_after_forward=reshard_after_forward and id(block) not in mtp_blocks,
                    mp_policy=mp_policy,
                    offload_policy=offload_policy,
                )
            if ep_enabled:
                ignored.update(moe.experts.parameters())
            replicate_correction_bias(getattr(moe, "gate", None), fsdp_mesh)
        ignored |= _shard_fp32_param_holders(
            block, fsdp_mesh, reshard_after_forward, offload_policy
        )
        shard(block, mp_policy, ignored_params=ignored or None)
        if id(block) in mtp_blocks:
            reduce_unused_parameters(block)

    for unit in units:
        shard(unit.module, unit.policy(mp_policy, MixedPrecisionPolicy))
        if unit.may_be_unused:
            reduce_unused_parameters(unit.module)


def apply_cp(model: nn.Module, cp_mesh: DeviceMesh, cp_comm_type: str = "p2p") -> None:
    """Tell the attention, the state-space mixers and the routers which ranks share a sequence.

    With a pipeline every rank calls it for each of its stages; what one is refused with, all are.

    Attention modules with ``set_context_parallel_group`` get the group, its ranks, the stream of
    :func:`_get_cp_stream` (None on CPU) and the way to communicate; others are asked for
    ``setup_cp_attention``.

    Args:
        model: the outer model.
        cp_mesh: 1-D.
        cp_comm_type: "p2p", "all_gather" or "a2a"; sliding-window attention always all-gathers.

    Raises:
        ValueError: a block's attention knows no such ``cp_comm_type``. The model is as it was.
        MeshError: a block's attention cannot work on parts of sequences. The model is as it was.
    """
    with refused_together(cp_mesh):
        check_blocks(_iter_transformer_and_mtp_blocks(model), cp_comm_type)
    backbone = get_text_module(inner_model(model))
    for owner in (model, backbone):
        owner._cp_enabled = True
    for _, name, block in _iter_transformer_and_mtp_blocks(model):
        left = tell_block(block, cp_mesh, cp_comm_type, _get_cp_stream)
        if left is not None:
            logger.warning(
                f"apply_cp: block {name}, {left}, has nothing that supports context parallelism; "
                "it sees this rank's part of the sequences alone"
            )
        moe = _get_moe_module(block)
        if moe is not None:
            moe.cp_mesh = cp_mesh


_OWN_STEPS = (apply_cp, apply_ep, apply_ac, apply_fsdp)


def _is_own(step: Any) -> bool:
    """Whether a step is this module's; what replaces it may accept what that refuses."""
    return any(step is own for own in _OWN_STEPS)


def parallelize_model(
    model: nn.Module,
    world_mesh: DeviceMesh,
    moe_mesh: DeviceMesh | None,
    *,
    dp_axis_names: Sequence[str] | None,
    cp_axis_name: str | None = None,
    tp_axis_name: str | None = None,
    ep_axis_name: str | None = None,
    ep_shard_axis_names: Sequence[str] | None = None,
    activation_checkpointing: bool | str = False,
    ignore_router_for_ac: bool = True,
    reshard_after_forward: bool = False,
    lm_head_precision: torch.dtype | str | None = None,
    wrap_outer_model: bool = True,
    mp_policy: Any = None,
) -> None:
    """Apply context and Expert Parallelism, activation checkpointing and FSDP, in place.

    Every rank must hold equal weights. With a pipeline every rank calls it for each of its stages,
    and what one stage is refused with, all are. Example::

        world_mesh, moe_mesh = build_meshes(ep=4)
        axes = parallel_axis_names(world_mesh, moe_mesh)
        parallelize_model(model, world_mesh, moe_mesh, **axes, activation_checkpointing="selective")

    Args:
        model: the outer model; with Expert Parallelism it has a ``moe_config``.
        world_mesh, moe_mesh: of :func:`build_meshes`.
        dp_axis_names: the axes of FSDP: one, or two to replicate over the first; None for no FSDP.
        cp_axis_name, tp_axis_name: axes of ``world_mesh``. Tensor parallelism is not applied here.
        ep_axis_name, ep_shard_axis_names: axes of ``moe_mesh``.
        activation_checkpointing: "selective"; or any other true value, a misspelt one too, for what
            ``ignore_router_for_ac`` says. See :func:`apply_ac`.
        ignore_router_for_ac: see ``ignore_router`` of :func:`apply_ac`.
        reshard_after_forward, lm_head_precision, wrap_outer_model, mp_policy: see
            :func:`apply_fsdp`.

    Raises:
        AssertionError: tensor parallelism; or experts that Expert Parallelism cannot spread evenly.
        KeyError: ``lm_head_precision`` is a name of no dtype.
        MeshError: axes that leave parameters without a reduction of their gradients; another model
            (names, shapes, dtypes, what is trained, settings of MoE layers) or other options on
            another rank; and all that :func:`apply_cp`, :func:`apply_ep` and :func:`apply_fsdp`
            refuse. The model is as it was.
        ValueError, ImportError: see :func:`apply_ep` and :func:`apply_ac`. Likewise.
    """
    axes = Axes(dp_axis_names, cp_axis_name, tp_axis_name, ep_axis_name, ep_shard_axis_names)
    cp_mesh, ep_mesh, fsdp_mesh, ep_shard_mesh = axes.meshes(
        world_mesh, moe_mesh, lambda: _get_model_moe_config(model).n_routed_experts
    )
    ep_shard_enabled = ep_shard_mesh is not None and ep_shard_mesh.size() > 1
    selective = _is_selective_ac(activation_checkpointing)
    options: dict[str, Any] = {
        "mp_policy": mp_policy,
        "reshard_after_forward": reshard_after_forward,
        "lm_head_precision": lm_head_precision,
        "wrap_outer_model": wrap_outer_model,
    }

    # What this module's steps would refuse half-way; a model for others may have no such parts.
    own_ep, own_fsdp = _is_own(apply_ep), _is_own(apply_fsdp)
    layers: list[tuple[str, Any]] = []
    with refused_together(world_mesh):
        if own_fsdp:
            head_dtype(lm_head_precision, dtype_from_str)
        if cp_mesh is not None and _is_own(apply_cp):
            check_blocks(_iter_transformer_and_mtp_blocks(model), "p2p")
        if ep_mesh is not None and own_ep:
            layers = _moe_layers(model)
            check_expert_counts(layers, ep_mesh.size())
        if own_fsdp and fsdp_mesh is not None:
            moes = (moe for _, moe in _moe_layers(model))
            check_shards(moes, fsdp_mesh, ep_shard_enabled, ep_shard_mesh)
            check_ends(model, get_text_module(inner_model(model)), wrap_outer_model)
        saves_router = activation_checkpointing and ignore_router_for_ac and not selective
        if saves_router and _is_own(apply_ac):
            router_sizes(model, None, None)
        if own_ep and own_fsdp:
            sharing = fsdp_mesh if ep_mesh is None else ranks_of_stage(ep_mesh, moe_mesh)
            kept = {"ignore_router_for_ac": ignore_router_for_ac}
            given = {**options, "activation_checkpointing": activation_checkpointing, **kept}
            check_alike(sharing, model, _moe_layers(model), given)
        check_transports(layers, ep_mesh, moe_mesh)
    if ep_mesh is not None and own_ep:
        check_equal_experts(layers, ep_mesh, moe_mesh)

    if cp_mesh is not None:
        apply_cp(model, cp_mesh)
    if ep_mesh is not None:
        if own_ep:
            _shard_experts(_moe_layers(model), ep_mesh, moe_mesh)  # apply_ep would hash again
        else:
            apply_ep(model, ep_mesh, moe_mesh=moe_mesh)
    if activation_checkpointing:
        apply_ac(model, ignore_router=ignore_router_for_ac, selective=selective)
    if fsdp_mesh is not None:
        apply_fsdp(
            model,
            fsdp_mesh,
            ep_enabled=ep_mesh is not None,
            ep_shard_enabled=ep_shard_enabled,
            ep_shard_mesh=ep_shard_mesh,
            **options,
        )
