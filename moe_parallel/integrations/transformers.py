"""Hugging Face models with this package's MoE layers, and their checkpoints.

model = AutoModelForCausalLM.from_pretrained(name)
replace_moe_layers(model)              # the same function of the same weights
...                                    # apply_ep, apply_fsdp, train
save_hf_checkpoint(model, directory)   # loads in plain transformers
"""

from __future__ import annotations

import dataclasses
import operator
import re
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from moe_kernels.integrations.transformers import (
    activation_name,
    fused_options,
    require_transformers,
)
from moe_kernels.ops._checks import check_number
from moe_parallel.config import BackendConfig, MoEConfig
from moe_parallel.integrations._checkpoint import (
    check_module,
    load_hf_checkpoint,
    load_hf_state_dict,
    save_hf_checkpoint,
    to_hf_state_dict,
)
from moe_parallel.integrations._families import Family, family_of
from moe_parallel.integrations._pretrained import redirect_checkpoints
from moe_parallel.layers import MoE

__all__ = [
    "load_hf_checkpoint",
    "load_hf_state_dict",
    "replace_moe_layers",
    "save_hf_checkpoint",
    "to_hf_state_dict",
]

SHARED = ("gate_proj", "up_proj", "down_proj")  # of the shared experts


def replace_moe_layers(
    model: nn.Module,
    backend: BackendConfig | None = None,
    *,
    gate_bias_update_factor: float = 0.0,
    aux_loss_coeff: float = 0.0,
    enable_routing_replay: bool = False,
) -> dict[str, MoE]:
    """Replace every sparse MoE block of a transformers model by a :class:`moe_parallel.MoE`.

    Outputs and gradients stay those of the model, up to rounding, and so does everything around
    the layers: generation, gradient checkpointing, ``output_router_logits=True`` and its
    load-balancing loss. Router, shared experts, and experts stored as :class:`GroupedExperts`
    stores them, are taken over as they are; experts stored the other way round are copied, one
    layer at a time. So replace before an optimizer is made and before the model is sharded. The
    configuration of the layers becomes the ``moe_config`` of the module that holds them.

    ``save_pretrained`` and ``push_to_hub`` of the model go on writing what plain transformers
    loads, and ``load_state_dict`` takes it; ``state_dict()`` has the names of the new layers, which
    :func:`to_hf_state_dict` translates.

    Args:
        model: a model, or base model, of one of the families in ``docs/transformers.md``.
        backend: what the layers run on. Where the model's router computes in float32, so does
            theirs, unless ``gate_precision`` says otherwise.
        gate_bias_update_factor: step of :meth:`Gate.update_bias`, for routers with a correction
            bias.
        aux_loss_coeff: weight of the load-balancing loss of :class:`Gate`; it is there beside the
            model's own ``output_router_logits``, so use one of the two.
        enable_routing_replay: give every gate a :class:`RoutingReplay`.

    Returns:
        The new layers by name.

    Raises:
        ValueError: a block, or an option of one, that MoE does not compute; no MoE block at all; a
            model that is already sharded, or offloaded; adapters on, or parametrizations of,
            routers or experts. Nothing has been replaced then.
        ImportError: transformers is missing, or older than 5.7.
    """
    require_transformers("moe_parallel.integrations.transformers")
    from moe_parallel.integrations._layers import TransformersMoE

    check_module("replace_moe_layers", model)
    check_number("replace_moe_layers", "gate_bias_update_factor", gate_bias_update_factor)
    backend = BackendConfig() if backend is None else backend
    if not isinstance(backend, BackendConfig):
        raise TypeError(
            f"replace_moe_layers: backend must be a BackendConfig; got {type(backend).__name__}"
        )
    if backend.fake_balanced_gate:
        raise ValueError(
            "replace_moe_layers: backend.fake_balanced_gate must be False: it has no place for the "
            "weights of the model's router"
        )
    training = {
        "gate_bias_update_factor": gate_bias_update_factor,
        "aux_loss_coeff": aux_loss_coeff,
        "enable_routing_replay": enable_routing_replay,
    }
    planned = []
    for name, block, family in _blocks(model):
        try:
            planned.append((name, block, family, _config(model, block, family, training)))
        except (ValueError, TypeError) as error:
            raise type(error)(
                f"replace_moe_layers: {type(block).__name__} ({name}): {error}"
            ) from error

    layers: dict[str, MoE] = {}
    for name, block, family, config in planned:
        used = backend
        if backend.gate_precision is None and _routes_in_float32(block, family):
            used = dataclasses.replace(backend, gate_precision=torch.float32)
        with torch.device("meta"):
            layer = TransformersMoE(config, used, family, not block.experts.is_transposed)
        _take_over(layer, block, family)
        layers[name] = layer.train(block.training)
        model.set_submodule(name, layer)
        holder: Any = model.get_submodule(name.rpartition("layers.")[0].rstrip("."))
        if getattr(holder, "moe_config", None) is None:
            holder.moe_config = config
    redirect_checkpoints(model)
    return layers


def _blocks(model: nn.Module) -> list[tuple[str, Any, Family]]:
    """Every sparse MoE block of the model; a ValueError if one is of no known family."""
    found: dict[str, tuple[Any, Family]] = {}
    seen: list[str] = []
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        is_experts = name.split(".")[-1] == "experts" or type(module).__name__.endswith("Experts")
        # Inside of a block seen before are its experts, wrapped: those _config refuses.
        if not is_experts or any(f"{parent}.".startswith(f"{block}.") for block in seen):
            continue
        seen.append(parent)
        block = model.get_submodule(parent)
        if isinstance(block, MoE):
            continue
        family = family_of(block)
        if family is None or not re.search(r"(^|\.)layers\.\d+\.mlp$", parent):
            raise ValueError(
                f"replace_moe_layers: {type(block).__name__} ({parent or 'the model itself'}) is "
                "not a block that moe_parallel.MoE can replace (docs/transformers.md lists those). "
                'experts_implementation="moe_kernels" needs no replacement and serves every family '
                "behind transformers' experts interface."
            )
        found[parent] = (block, family)
    if not found:
        replaced = any(isinstance(module, MoE) for module in model.modules())
        done = "; its layers are this package's already" if replaced else ""
        raise ValueError(
            f"replace_moe_layers: {type(model).__name__} has no MoE block to replace{done}"
        )
    return [(name, block, family) for name, (block, family) in found.items()]


def _config(model: nn.Module, block: Any, family: Family, training: dict[str, Any]) -> MoEConfig:
    """The configuration of the layer; a ValueError says what stands against it."""
    if any(isinstance(value, DTensor) for value in block.parameters()):
        raise ValueError("the model is already sharded; replace its layers before")
    _refuse_what_is_left_over(block, family)
    router, experts = block.get_submodule(family.router), block.experts
    routing: dict[str, Any] = {"n_expert_groups": 1, "n_limited_groups": 1, "route_scale": 1.0}
    routing |= family.routing(block, router)
    if routing["norm_topk_prob"] and router.top_k == 1:
        raise ValueError("one expert a token with norm_topk_prob gives the router no gradient")
    if training["gate_bias_update_factor"] > 0 and family.correction is None:
        raise ValueError("gate_bias_update_factor needs a router with a correction bias")
    rows, columns = experts.down_proj.shape[1:]
    inner, hidden = (rows, columns) if experts.is_transposed else (columns, rows)
    settings = getattr(model, "config", None)
    return MoEConfig(
        n_routed_experts=experts.down_proj.shape[0],
        n_activated_experts=router.top_k,
        train_gate=block.get_parameter(family.router_weight).requires_grad,
        dim=hidden,
        inter_dim=getattr(settings, "intermediate_size", inner),
        moe_inter_dim=inner,
        router_bias=family.router_bias is not None,
        expert_bias=experts.has_bias,
        force_e_score_correction_bias=family.correction is not None,
        dtype=experts.down_proj.dtype,
        **routing,
        **training,
        **_activation(experts),
        **_shared(block, family),
    )


def _refuse_what_is_left_over(block: Any, family: Family) -> None:
    """Weights that :func:`_take_over` leaves behind, or does not find, would change the model."""
    taken = {family.router_weight, family.router_bias, family.correction}
    for name in ("gate_up_proj", "down_proj"):
        taken |= {f"experts.{name}", f"experts.{name}_bias"}
    modules = [family.shared_gate, *(f"{family.shared}.{name}" for name in SHARED)]
    for name, value in block.named_parameters():
        if name not in taken and not name.startswith(tuple(f"{part}." for part in modules)):
            raise ValueError(
                f"{name} has no place in moe_parallel.MoE. Merge adapters before (PEFT: "
                "merge_and_unload), or add them afterwards; remove parametrizations; load a "
                "quantised model dequantised"
            )
        if value.is_meta and any(hasattr(part, "_hf_hook") for part in block.modules()):
            raise ValueError(
                f"{name} is offloaded by accelerate, which would not bring it to the new layer. "
                "Load the model without a device_map that offloads"
            )
    weight = getattr(block.experts, "down_proj", None)
    if weight is None or not weight.is_floating_point() or weight.itemsize == 1:
        found = "" if weight is None else f" of {weight.dtype}"
        raise ValueError(
            f"experts must have, in 16 bits or more, weights down_proj; got "
            f"{type(block.experts).__name__}{found}. Replace the layers of a model whose experts "
            "are not quantised"
        )


def _activation(experts: Any) -> dict[str, Any]:
    options = fused_options(experts) or {"activation": None}
    kind, interleaved = options["activation"], options.get("interleaved", False)
    if kind == "swigluoai":
        return {
            "expert_activation": "quick_geglu" if interleaved else "swigluoai",
            "activation_alpha": options["alpha"],
            "activation_limit": options["limit"],
        }
    if kind not in ("swiglu", "geglu", "relu2") or len(options) > 1:
        act_fn = getattr(experts, "act_fn", None)
        raise ValueError(f"the experts' activation must be one of GroupedExperts; got {act_fn}")
    return {"expert_activation": kind}


def _shared(block: Any, family: Family) -> dict[str, Any]:
    if family.shared is None or getattr(block, family.shared) is None:
        return {"n_shared_experts": 0}
    shared = block.get_submodule(family.shared)
    if activation_name(shared.act_fn) != "silu":
        raise ValueError(f"the shared experts' activation must be silu; got {shared.act_fn}")
    return {
        "n_shared_experts": 1,
        "shared_expert_inter_dim": shared.up_proj.out_features,
        "shared_expert_gate": family.shared_gate is not None,
    }


def _routes_in_float32(block: Any, family: Family) -> bool:
    weight = block.get_parameter(family.router_weight)
    kept_wider = weight.dtype == torch.float32 and block.experts.down_proj.dtype != torch.float32
    return family.router_float32 or kept_wider


def _take_over(layer: Any, block: Any, family: Family) -> None:
    """Give ``layer``, made on the meta device, the block's weights."""

    def stacked(parameter: nn.Parameter) -> nn.Parameter:
        if not layer.stored_transposed:
            return parameter
        return nn.Parameter(parameter.detach().mT.contiguous(), parameter.requires_grad)

    layer.gate.weight = block.get_parameter(family.router_weight)
    if family.router_bias is not None:
        layer.gate.bias = block.get_parameter(family.router_bias)
    if family.correction is not None:
        bias = operator.attrgetter(family.correction)(block)
        layer.gate.e_score_correction_bias = bias.detach().to(torch.float32).reshape(-1)
    layer.experts.gate_and_up_projs = stacked(block.experts.gate_up_proj)
    layer.experts.down_projs = stacked(block.experts.down_proj)
    if block.experts.has_bias:
        layer.experts.gate_up_proj_bias = block.experts.gate_up_proj_bias
        layer.experts.down_proj_bias = block.experts.down_proj_bias
    if layer.shared_experts is not None:
        shared = block.get_submodule(family.shared)
        for name in SHARED:
            setattr(layer.shared_experts, name, getattr(shared, name))
    if family.shared_gate is not None:
        layer.shared_expert_gate = block.get_submodule(family.shared_gate)
