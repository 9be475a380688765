"""When FSDP communicates: gradient accumulation, with and without a pipeline schedule.

A *unit* is a module that ``fully_shard`` was applied to. Gradients of micro-batches add up in the
unsharded gradients, in the reduce dtype, and travel once, with the last backward of a step.

What a function uses of torch and of this package is looked up among this module's globals when it
runs, so that a test or a framework can replace it.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining._backward import (
    stage_backward,
    stage_backward_input,
    stage_backward_weight,
)
from torch.nn.parallel import DistributedDataParallel, distributed

from moe_parallel.activation_checkpointing import load_unchanged
from moe_parallel.mesh import MeshError
from moe_parallel.refusals import refused_in
from moe_parallel.text_module import blocks_of, get_text_module, is_module
from moe_parallel.torch_internals import (
    complete_accumulated_grads,
    discard_accumulated_grads,
    edges_of_functions,
    final_callback,
    fsdp_param_groups,
    fully_sharded_modules,
    gradient_edges,
    greet_other_ranks_alone,
    has_checkpoints,
    has_run,
    keep_graph,
    reshards_after_forward,
    restore_stage,
    splits_backward,
    stages_of,
)
from moe_parallel.training import get_is_optim_step


def _candidates(module: Any) -> Iterator[Any]:
    """What may be a unit of the outer model ``module``, roots before what they contain."""
    yield module
    inner = getattr(module, "model", None)
    inner = module if inner is None else inner
    yield inner
    backbone = get_text_module(inner)
    yield backbone
    yield getattr(backbone, "embed_tokens", None)
    yield getattr(module, "lm_head", None)
    yield getattr(module, "audio_tower", None)
    yield getattr(module, "visual", None)
    for block in _blocks(backbone):
        yield from _experts_of(block)
    for block in _blocks(getattr(module, "mtp", None)):
        yield block
        yield from _experts_of(block)


def _blocks(owner: Any) -> list[Any]:
    layers = getattr(owner, "layers", None)
    return [] if layers is None else blocks_of(layers)


def _experts_of(block: Any) -> Iterator[Any]:
    for name in ("mlp", "moe"):
        yield getattr(getattr(block, name, None), "experts", None)


def _iter_fsdp_modules(module: Any) -> Iterator[FSDPModule]:
    """The units of the outer model ``module`` that are roots or have a mesh of their own, each
    once; units inside them follow their settings."""
    seen: set[int] = set()
    for candidate in _candidates(module):
        if isinstance(candidate, FSDPModule) and id(candidate) not in seen:
            seen.add(id(candidate))
            yield candidate


def _configure_fsdp_module(
    fsdp_module: FSDPModule,
    *,
    is_last_backward: bool,
    reshard_after_backward: bool,
    requires_gradient_sync: bool,
) -> None:
    """Set what a unit, and the units in it, do in the backward passes from now on."""
    fsdp_module.set_is_last_backward(is_last_backward)
    fsdp_module.set_reshard_after_backward(reshard_after_backward)
    fsdp_module.set_requires_gradient_sync(requires_gradient_sync)


def _configure_all(units: Iterable[FSDPModule], communicate: bool) -> None:
    for fsdp_module in units:
        _configure_fsdp_module(
            fsdp_module,
            is_last_backward=communicate,
            reshard_after_backward=communicate,
            requires_gradient_sync=communicate,
        )


class MoEFSDPSyncMixin:
    """For a model class: lets micro-batches accumulate gradients without FSDP communication.

    Needs ``self.backend``, a :class:`BackendConfig`; does nothing unless its
    ``enable_fsdp_optimizations`` is on. Parameters stay unsharded and gradients whole in between:
    accumulation costs memory for both.
    """

    backend: Any

    def prepare_for_grad_accumulation(self, pp_enabled: bool = False) -> None:
        """Call before the first of several micro-batches.

        Args:
            pp_enabled: a pipeline schedule runs the backward passes and decides itself.
        """
        if self.backend.enable_fsdp_optimizations and not pp_enabled:
            _configure_all(_iter_fsdp_modules(self), communicate=False)

    def prepare_for_final_backward(self, pp_enabled: bool = False) -> None:
        """Call before the last micro-batch: its backward reduces what was accumulated."""
        if self.backend.enable_fsdp_optimizations and not pp_enabled:
            _configure_all(_iter_fsdp_modules(self), communicate=True)
            _complete_accumulated_grads(self)


def _disable_fsdp_for_moe_module(module: Any) -> None:
    """Keep every unit of ``module`` from communicating in backward."""
    _configure_all(_iter_fsdp_modules(module), communicate=False)


def _run_post_backward_hooks(fsdp_module: FSDPModule) -> Callable[[], None]:
    """Reduce the gradients of every unit that shares the root of ``fsdp_module``.

    Harmless where there is nothing to reduce.

    Returns:
        The root's final callback, which waits for the reductions; not yet called.
    """
    root_state = fully_shard.state(fsdp_module)  # type: ignore[attr-defined]
    if not has_run(root_state):
        return lambda: None
    for state in root_state._state_ctx.all_states:
        for group in fsdp_param_groups(state):
            complete_accumulated_grads(group)
            group.post_backward()
    return final_callback(root_state)


def _run_post_backward_for_moe_module(module: Any) -> None:
    """Reduce what the backward passes of ``module`` accumulated, and reshard.

    All reductions start before the first is waited for.
    """
    units = list(_iter_fsdp_modules(module))
    _configure_all(units, communicate=True)
    callbacks = [_run_post_backward_hooks(unit) for unit in units]
    for callback in callbacks:
        callback()


def _complete_accumulated_grads(module: Any) -> None:
    for unit in fully_sharded_modules(module):
        for group in fsdp_param_groups(unit._get_fsdp_state()):
            complete_accumulated_grads(group)


def _refuse_split_backward(submod: Any) -> None:
    if reshards_after_forward(submod):
        raise MeshError(
            "a pipeline schedule with a split backward (zero bubble) needs "
            "reshard_after_forward=False; this stage's FSDP units reshard after forward, which "
            "would lose weight gradients. Pass reshard_after_forward=False to parallelize_model, "
            "or choose a schedule with full backward passes (GPipe, 1F1B, Interleaved1F1B)."
        )


def _refuse_split_data_parallel(submod: Any) -> None:
    if isinstance(submod, DistributedDataParallel):
        raise MeshError(
            "a pipeline schedule with a split backward (zero bubble) does not reduce the gradients "
            "of a DistributedDataParallel stage, whose hooks a backward for weights alone does not "
            "run. Use FSDP (parallelize_model), or choose a schedule with full backward passes "
            "(GPipe, 1F1B, Interleaved1F1B)."
        )


def _refuse_split_without_mixin(submod: Any) -> None:
    """Who else would keep the units from communicating between the passes?"""
    has_units = next(fully_sharded_modules(submod), None) is not None
    if has_units and not any(isinstance(submod, kind) for kind in (FSDPModule, MoEFSDPSyncMixin)):
        raise MeshError(
            "a pipeline schedule with a split backward (zero bubble) needs a stage that is a "
            "MoEFSDPSyncMixin, or an FSDP unit itself, so that the units in it keep their "
            f"parameters until the weights' pass; got {type(submod).__name__}. Derive its class "
            "from MoEFSDPSyncMixin, pass wrap_outer_model=True to parallelize_model, or choose a "
            "schedule with full backward passes (GPipe, 1F1B, Interleaved1F1B)."
        )


def _refuse_ends_apart(stage: Any) -> None:
    """Embeddings tied by the configuration must be in one stage, as they are one parameter."""
    submod = stage.submod
    tied = getattr(getattr(submod, "config", None), "tie_word_embeddings", False)
    if not tied or getattr(stage, "num_stages", 1) == 1:
        return
    inner = getattr(submod, "model", None)
    backbone = get_text_module(submod if inner is None else inner)
    heads = [getattr(owner, "lm_head", None) for owner in (backbone, submod)]
    if getattr(backbone, "embed_tokens", None) is None or heads == [None, None]:
        raise MeshError(
            "install_pipeline_backward: config.tie_word_embeddings is set, but stage "
            f"{getattr(stage, 'stage_index', '?')} of {stage.num_stages} does not hold both "
            "embed_tokens and lm_head; in different stages each gets its own part of the gradient "
            "alone. Untie them (tie_word_embeddings=False), or use no pipeline parallelism."
        )


def _all_at_once(bwd_kwargs: dict[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    """The "input" pass of a stage with checkpointed blocks, which leaves the "weight" pass nothing.

    Apart, each of the passes, and within the weights' each group of parameters, would compute the
    blocks again, and a selective checkpoint allows a single backward.
    """
    outputs, output_grads = bwd_kwargs["stage_output"], bwd_kwargs["output_grads"]
    if output_grads is None and outputs is not None and not isinstance(outputs, Tensor):
        output_grads = [None] * len(outputs)
    return stage_backward(outputs, output_grads, bwd_kwargs["input_values"]), []


def _stage_backward(
    stage: Any, backward_type: str, bwd_kwargs: dict[str, Any]
) -> tuple[Any, list[dict[str, Any]] | None]:
    """``(gradients of the inputs or weights, param_groups)`` of one part of a stage's backward."""
    if backward_type == "full":
        grads = stage_backward(
            bwd_kwargs["stage_output"], bwd_kwargs["output_grads"], bwd_kwargs["input_values"]
        )
        return grads, None
    if backward_type == "input":
        _refuse_split_backward(stage.submod)
        if has_checkpoints(stage.submod):
            return _all_at_once(bwd_kwargs)
        edges = gradient_edges(bwd_kwargs["stage_output"])
        grads, groups = stage_backward_input(
            bwd_kwargs["stage_output"],
            bwd_kwargs["output_grads"],
            bwd_kwargs["input_values"],
            stage.submod.parameters(),
        )
        keep_graph(groups, edges)
        return grads, groups
    if backward_type == "weight":
        with edges_of_functions():
            grads = stage_backward_weight(stage.submod.parameters(), bwd_kwargs["param_groups"])
        _complete_accumulated_grads(stage.submod)
        return grads, None
    raise RuntimeError(f"Unknown backward type: {backward_type}")


def patched_backward_maybe_with_nosync(
    self: Any,
    backward_type: str,
    bwd_kwargs: dict[str, Any],
    last_backward: bool = False,
) -> tuple[Any, list[dict[str, Any]] | None]:
    """A pipeline stage's backward, with communication when an optimizer step needs it.

    Takes the place of the stage's method of the same name, see :func:`install_pipeline_backward`.
    A stage that is a :class:`MoEFSDPSyncMixin` and no FSDP unit itself, as ``parallelize_model``
    leaves it with ``wrap_outer_model=False``, accumulates over several schedule steps and reduces
    at the end of the step that :func:`prepare_for_final_backward` announced. A stage that is an
    FSDP unit reduces at the end of every schedule step.

    Args:
        self: the stage.
        backward_type: "full", or "input" and later "weight".
        bwd_kwargs: stage_output and output_grads, input_values or param_groups.
        last_backward: whether this ends the schedule step for the stage.

    Returns:
        ``(grads, param_groups)``; param_groups, for the "weight" pass, of "input" alone.

    Raises:
        RuntimeError: another backward_type.
        MeshError: a split backward of parameters that FSDP has freed since their forward.
    """
    if isinstance(self.submod, DistributedDataParallel):
        if last_backward:
            outputs = list(distributed._find_tensors(bwd_kwargs["stage_output"]))
            self.submod.reducer.prepare_for_backward(outputs)
            return _stage_backward(self, backward_type, bwd_kwargs)
        with self.submod.no_sync():
            return _stage_backward(self, backward_type, bwd_kwargs)

    if isinstance(self.submod, FSDPModule):
        # Parameters must stay gathered between the passes of a split backward.
        each = getattr(self, "_reduce_grad_per_microbatch", False) is True
        each = each and backward_type == "full"
        _configure_fsdp_module(
            self.submod,
            is_last_backward=each,
            reshard_after_backward=each,
            requires_gradient_sync=each,
        )
        result = _stage_backward(self, backward_type, bwd_kwargs)
        if last_backward:
            _configure_fsdp_module(
                self.submod,
                is_last_backward=True,
                reshard_after_backward=True,
                requires_gradient_sync=True,
            )
            _run_post_backward_hooks(self.submod)()
        return result

    if isinstance(self.submod, MoEFSDPSyncMixin):
        _disable_fsdp_for_moe_module(self.submod)
        result = _stage_backward(self, backward_type, bwd_kwargs)
        if last_backward and get_is_optim_step():
            _run_post_backward_for_moe_module(self.submod)
        return result

    return _stage_backward(self, backward_type, bwd_kwargs)


def _load_of_stage_unchanged(submod: Any) -> AbstractContextManager[Any]:
    modules = submod.modules() if is_module(submod) else ()
    return load_unchanged(*(m for m in modules if hasattr(m, "_cumulative_expert_load")))


def _infer_without_load(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A stage's preparation, in which it may run its module to learn shapes."""
    with _load_of_stage_unchanged(self.submod):
        return type(self)._prepare_forward_infra(self, *args, **kwargs)


class PipelineBackwardHandle:
    """Undoes :func:`install_pipeline_backward`: by :meth:`remove`, or as a context manager.

    As a context manager that an exception leaves, it discards gradients too.
    """

    def __init__(self, stages: list[Any]) -> None:
        self._stages = stages
        for stage in stages:
            stage.backward_maybe_with_nosync = types.MethodType(
                patched_backward_maybe_with_nosync, stage
            )
            stage._prepare_forward_infra = types.MethodType(_infer_without_load, stage)
            greet_other_ranks_alone(stage)

    def remove(self) -> None:
        """Give the stages their own methods back."""
        for stage in self._stages:
            restore_stage(stage)

    def discard_grads(self) -> None:
        """Forget the gradients of schedule steps that no optimizer step will follow.

        FSDP keeps what is not reduced yet where ``zero_grad`` does not reach; call both after an
        exception in a schedule step, and go on with a new schedule.
        """
        for stage in self._stages:
            discard_accumulated_grads(stage.submod)

    def __enter__(self) -> PipelineBackwardHandle:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self.remove()
        if kind is not None:
            self.discard_grads()


def install_pipeline_backward(schedule: Any) -> PipelineBackwardHandle:
    """Make this rank's stages of ``schedule`` use :func:`patched_backward_maybe_with_nosync`.

    Call it on every rank, once the model parts are parallelized; what one rank of a pipeline is
    refused with, all are. Example::

        schedule = Schedule1F1B(stage, n_microbatches=8, loss_fn=sum_of_losses, scale_grads=False)
        handle = install_pipeline_backward(schedule)
        for batch in step_batches:  # several schedule steps an optimizer step
            (prepare_for_final_backward if batch is last else prepare_for_grad_accumulation)(
                parts, pp_enabled=True
            )
            schedule.step(...)

    Args:
        schedule: of torch.distributed.pipelining.

    Returns:
        A handle whose ``remove()`` undoes it.

    Raises:
        MeshError: the schedule splits its backward (zero bubble) and FSDP would have freed the
            parameters by then (reshard_after_forward=True), or a stage is a
            DistributedDataParallel, or has units and is neither one itself nor a
            :class:`MoEFSDPSyncMixin`; embeddings are tied across stages.
    """
    stages, split = stages_of(schedule), splits_backward(schedule)
    with _refused_by_pipeline(stages):
        for stage in stages:
            _refuse_ends_apart(stage)
            if split:
                _refuse_split_backward(stage.submod)
                _refuse_split_data_parallel(stage.submod)
                _refuse_split_without_mixin(stage.submod)
    return PipelineBackwardHandle(stages)


def _refused_by_pipeline(stages: list[Any]) -> AbstractContextManager[None]:
    """What one rank of a pipeline is refused with, all are: its schedule would wait for it."""
    size = getattr(stages[0], "group_size", 1)
    if issubclass(type(size), int) and size > 1:
        return refused_in(stages[0].group, "on rank {} of the pipeline")
    return nullcontext()
