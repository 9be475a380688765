"""What activation checkpointing keeps of a block, and what it computes again in backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from moe_parallel.text_module import get_text_module, inner_model, is_module, mtp_layers
from moe_parallel.torch_internals import tolerate_unrecorded_ops

ContextFn = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
Policy = Callable[..., CheckpointPolicy]

# A wrapper with this attribute set is a selective one: what compiles layers compiles it whole.
SELECTIVE_AC_WRAPPER_FLAG = "SELECTIVE_AC_WRAPPER_FLAG"


def _ops(*names: str) -> set[Any]:
    """The overloads "namespace::op.overload" that this PyTorch has."""
    found = set()
    for name in names:
        namespace, _, op = name.partition("::")
        packet, _, overload = op.partition(".")
        try:
            found.add(getattr(getattr(getattr(torch.ops, namespace), packet), overload))
        except (AttributeError, RuntimeError):
            continue
    return found


# Discrete choices: equal logits do not make ties, or a top-k that is not deterministic, repeat.
_CHOICES = (
    "aten::topk.default",
    "aten::max.dim",
    "moe_kernels::topk_router.default",
    "moe_kernels::round_tokens.default",
)
_ALTERNATING = (
    "aten::mm.default",
    "aten::linear.default",
    "aten::_grouped_mm.default",
    "moe_kernels::grouped_gemm.default",
    "moe_kernels::fused_experts.default",
    "moe_kernels::fused_experts_fp8.default",
)
_SAVED = (
    *_CHOICES,
    "aten::addmm.default",
    "aten::bmm.default",
    "aten::max.default",
    "aten::_scaled_mm.default",
    "aten::_scaled_grouped_mm.default",
    "aten::_scaled_dot_product_cudnn_attention.default",
    "aten::_scaled_dot_product_efficient_attention.default",
    "aten::_scaled_dot_product_flash_attention.default",
    "aten::_scaled_dot_product_flash_attention_for_cpu.default",
    "aten::_scaled_dot_product_fused_attention_overrideable.default",
    "aten::_flash_attention_forward.default",
    "aten::_efficient_attention_forward.default",
    "_c10d_functional::all_to_all_single.default",
    "_c10d_functional::reduce_scatter_tensor.default",
    "moe_kernels::dispatch.default",
    "moe_kernels::dispatch_start.default",
    "moe_kernels::dispatch_finish.default",
    "moe_kernels::combine.default",
    "moe_kernels::combine_start.default",
    "moe_kernels::combine_finish.default",
    "moe_kernels::context_attention.default",
    "moe_kernels::whole_sequences.default",
    "moe_kernels::exchange_heads.default",
)


def router_saving_policy(hidden_size: int, num_experts: int) -> Policy:
    """Keep the router's projection and its choice; compute everything else again.

    Args:
        hidden_size, num_experts: a projection is recognised by its weight, ``[hidden_size,
            num_experts]`` or transposed.
    """
    choices = _ops(*_CHOICES)
    mm, addmm, linear = (_ops(f"aten::{name}.default") for name in ("mm", "addmm", "linear"))

    def policy(ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        shape = (hidden_size, num_experts)
        is_router = func in choices
        if func in mm:
            is_router = len(args) == 2 and tuple(args[1].shape) == shape
        elif func in addmm:
            is_router = len(args) > 2 and tuple(args[2].shape) == shape
        elif func in linear:
            is_router = len(args) > 1 and tuple(args[1].shape) == shape[::-1]
        return CheckpointPolicy.MUST_SAVE if is_router else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def router_saving_contexts(
    sizes: tuple[int, int], create: Callable[[Policy], Any]
) -> Callable[[], Any]:
    """The context function that keeps what :func:`router_saving_policy` of ``sizes`` says.

    Args:
        sizes: see there.
        create: makes the contexts of a policy.
    """
    policy = router_saving_policy(*sizes)
    return lambda: tolerate_unrecorded_ops(create(policy))


def _copies_to_host(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    source = args[0] if args else None
    device = kwargs.get("device")
    return (
        isinstance(source, torch.Tensor)
        and source.device.type != "cpu"
        and device is not None
        and torch.device(device).type == "cpu"
    )


def make_selective_checkpoint_context_fn() -> ContextFn:
    """Keep every second matrix product, and all that is dear, discrete or communication.

    Of the products (mm, linear, grouped GEMM, fused experts) the first of a region is kept, the
    second computed again, and so on. Attention, addmm, bmm, top-k, max, scaled products, exchanges
    between ranks and copies to the host are kept; the rest is computed again.
    """
    saved, alternating = _ops(*_SAVED), _ops(*_ALTERNATING)
    to_copy = _ops("aten::_to_copy.default")

    def context_fn() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        seen: Counter[bool] = Counter()  # products of this region, in forward and in recompute

        def policy(ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            keep = func in saved or (func in to_copy and _copies_to_host(func, args, kwargs))
            if func in alternating:
                keep = seen[ctx.is_recompute] % 2 == 0
                seen[ctx.is_recompute] += 1
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        return tolerate_unrecorded_ops(create_selective_checkpoint_contexts(policy))

    return context_fn


@contextmanager
def load_unchanged(*gates: Any) -> Any:
    """Leave the gates' expert load as it was, however the body ends.

    Recomputation counts tokens again, and stops early by an exception.
    """
    kept = []
    for gate in gates:
        load = gate._cumulative_expert_load
        kept.append(load.clone() if isinstance(load, torch.Tensor) else load)
    try:
        yield
    finally:
        for gate, load in zip(gates, kept, strict=True):
            gate._cumulative_expert_load = load


class _WithLoadUnchanged:
    """``context`` inside :func:`load_unchanged`; every backward through a region enters it."""

    def __init__(self, context: AbstractContextManager[Any], gate: Any) -> None:
        self._context, self._gate = context, gate
        self._entered: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(load_unchanged(self._gate))
            stack.enter_context(self._context)
            self._entered.append(stack.pop_all())

    def __exit__(self, *exception: Any) -> bool | None:
        return self._entered.pop().__exit__(*exception)


def count_load_once(context_fn: ContextFn | None, moe: Any) -> ContextFn | None:
    """``context_fn``, which may be None, for a block with the MoE layer ``moe``, or None.

    Recomputation then leaves the load alone by which the router's bias is updated.
    """
    gate = getattr(moe, "gate", None)
    if not hasattr(gate, "_cumulative_expert_load"):
        return context_fn

    def with_load() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        inner: Any = (nullcontext(), nullcontext()) if context_fn is None else context_fn()
        if not isinstance(inner, (tuple, list)):  # of what was put in the place of PyTorch's own
            return inner
        forward, recompute = inner
        return forward, _WithLoadUnchanged(recompute, gate)

    return with_load


def checkpoint_options(context_fn: ContextFn | None, moe: Any) -> dict[str, Any]:
    """How a block with the MoE layer ``moe``, or None, is checkpointed."""
    options: dict[str, Any] = {"preserve_rng_state": True}
    context_fn = count_load_once(context_fn, moe)
    return options if context_fn is None else {**options, "context_fn": context_fn}


def _without_cache(
    block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not (block.training and torch.is_grad_enabled()):
        return None  # nothing is computed again
    for name in ("cache", "past_key_values", "layer_past"):  # by transformers' age
        length: Any = getattr(kwargs.get(name), "get_seq_length", None)
        if not callable(length):
            continue
        if length() > 0:
            raise ValueError(
                f"apply_ac: {name} must be None or empty in training, since a block that is "
                f"computed again would append to it again; got {length()} tokens"
            )
        kwargs = {**kwargs, name: None}
    return args, kwargs


def leave_out_caches(block: Any) -> None:
    """Call a checkpointed block of transformers without a cache of keys and values, in training.

    Its model makes an empty one by default, which forward and recomputation would both append to.
    """
    if is_module(block):
        block.register_forward_pre_hook(_without_cache, with_kwargs=True)


def router_sizes(model: Any, hidden_size: int | None, num_experts: int | None) -> tuple[int, int]:
    """The sizes :func:`router_saving_policy` needs, where they are not given, from the model.

    Raises:
        ValueError: the model's configuration does not tell.
    """
    config = getattr(model, "config", None)
    configs = [getattr(config, name, None) for name in ("text_config", "llm_config")] + [config]
    if hidden_size is None:
        sizes = (getattr(c, "hidden_size", None) for c in configs)
        hidden_size = next((size for size in sizes if size), None)
    if hidden_size is None:
        raise ValueError(
            "hidden_size must be provided: neither config.text_config, config.llm_config nor "
            "config of the model has it"
        )
    if num_experts is None:
        inner = inner_model(model)
        num_experts = getattr(getattr(inner, "moe_config", None), "n_routed_experts", None)
    if num_experts is None:
        names = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
        counts = (getattr(c, name, None) for c in configs for name in names)
        num_experts = next((count for count in counts if count is not None), None)
    if num_experts is None:
        owners = (getattr(owner, "moe_config", None) for owner in (get_text_module(inner), model))
        counts = (getattr(owner, "n_routed_experts", None) for owner in owners)
        num_experts = next((count for count in counts if count is not None), None)
    if num_experts is None:
        raise ValueError(
            "num_experts must be provided: neither the model's moe_config nor its config has it"
        )
    return hidden_size, num_experts


def repeated_mtp_layers(model: Any) -> Any:
    """Multi-token prediction's blocks if one physical block serves every depth, else None."""
    mtp_config = getattr(getattr(model, "mtp", None), "mtp_config", None)
    return mtp_layers(model) if getattr(mtp_config, "use_repeated_layer", False) else None
