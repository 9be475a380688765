"""MoE layers as formulas: plain PyTorch, written from the papers, differentiated by autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe_parallel import MoE, MoEConfig
from tests.kernels.accuracy import torch_experts


def make_config(**changes: Any) -> MoEConfig:
    """A small layer of odd sizes, in float64 unless told otherwise."""
    settings: dict[str, Any] = {
        "n_routed_experts": 8,
        "n_shared_experts": 0,
        "n_activated_experts": 3,
        "n_expert_groups": 1,
        "n_limited_groups": 1,
        "train_gate": True,
        "gate_bias_update_factor": 0.0,
        "aux_loss_coeff": 0.0,
        "score_func": "softmax",
        "route_scale": 1.0,
        "dim": 13,
        "inter_dim": 29,
        "moe_inter_dim": 11,
        "norm_topk_prob": False,
        "softmax_before_topk": True,
        "dtype": torch.float64,
    }
    return MoEConfig(**{**settings, **changes})


def randomize(module: torch.nn.Module) -> None:
    """Unit-scale weights, so that no path of the layer is negligible."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            rows = parameter.shape[-2] if parameter.dim() > 1 else 1
            scale = 1.0 if "bias" in name or "gate.weight" in name else rows**-0.5
            parameter.copy_(torch.randn_like(parameter) * scale)


def scores_and_choice(
    config: MoEConfig, logits: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Every expert's score [T, E], and what the K best are chosen by."""
    kind = config.score_func
    if kind == "softmax":
        scores = logits.exp() / logits.exp().sum(-1, keepdim=True)
        return scores, scores if config.softmax_before_topk else logits
    if kind == "sqrtsoftplus":
        scores = torch.log1p(logits.exp()) ** 0.5
    elif kind == "softmax_with_bias":
        scores = logits.exp() / logits.exp().sum(-1, keepdim=True)
    else:
        scores = 1 / (1 + (-logits).exp())
    choice = scores.detach() + (0 if bias is None else bias)
    groups = config.n_expert_groups
    if groups > 1 and kind != "sqrtsoftplus":
        size = config.n_routed_experts // groups
        with_max = bias is None and kind not in ("softmax_with_bias", "sigmoid_with_bias")
        fill = float("-inf") if kind == "sigmoid_with_bias" else 0.0
        for row in choice:
            values = []
            for g in range(groups):
                members = row[g * size : (g + 1) * size].sort(descending=True).values
                values.append(float(members[0] if with_max else members[:2].sum()))
            best = sorted(range(groups), key=lambda g: -values[g])[: config.n_limited_groups]
            for g in set(range(groups)) - set(best):
                row[g * size : (g + 1) * size] = fill
    return scores, choice


def gate(
    config: MoEConfig,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
    mask: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``weights [T, K], indices [T, K], load [E], aux``, best expert first."""
    logits = x @ weight.T + (0 if bias is None else bias)
    scores, choice = scores_and_choice(config, logits, correction)
    top_k = config.n_activated_experts
    indices = choice.detach().topk(top_k, dim=-1).indices
    if config.score_func == "softmax" and not config.softmax_before_topk:
        chosen = logits.gather(1, indices).exp()
        weights = chosen / chosen.sum(-1, keepdim=True)
    else:
        weights = scores.gather(1, indices)
    if config.norm_topk_prob and top_k > 1:
        weights = weights / weights.sum(-1, keepdim=True)
        scores = scores / scores.sum(-1, keepdim=True)
    load = torch.stack([(indices[mask] == e).sum() for e in range(config.n_routed_experts)])
    count = max(int(mask.sum()), 1)
    share = load * config.n_routed_experts / (top_k * count)
    aux = (share * scores[mask].sum(0) / count).sum()
    return weights * config.route_scale, indices, load, aux


def moe(
    config: MoEConfig, parameters: dict[str, Tensor], x: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """``y [T, H]`` and the auxiliary loss of :class:`MoE` with ``parameters``, by their names."""
    p = parameters
    weights, indices, _, aux = gate(
        config,
        x,
        p["gate.weight"],
        p.get("gate.bias"),
        p.get("gate.e_score_correction_bias"),
        mask,
    )
    routed = x
    if config.moe_latent_size is not None:
        routed = x @ p["fc1_latent_proj.weight"].T
    activation: dict[str, Any] = {"activation": config.expert_activation}
    if config.expert_activation in ("swigluoai", "quick_geglu"):
        activation = {
            "activation": "swigluoai",
            "interleaved": config.expert_activation == "quick_geglu",
            "alpha": config.activation_alpha,
            "limit": config.activation_limit,
        }
    elif config.expert_activation == "swiglu" and config.swiglu_limit > 0:
        activation["limit"] = config.swiglu_limit
    y = torch_experts(
        routed,
        p["experts.gate_and_up_projs"],
        p["experts.down_projs"],
        torch.where(mask[:, None], indices, -1),
        weights,
        gate_up_bias=p.get("experts.gate_up_proj_bias"),
        down_bias=p.get("experts.down_proj_bias"),
        **activation,
    )
    if config.moe_latent_size is not None:
        y = y @ p["fc2_latent_proj.weight"].T
    if config.n_shared_experts:
        up = x @ p["shared_experts.up_proj.weight"].T
        if config.shared_expert_activation == "relu2":
            inner = up.clamp(min=0) ** 2
        else:
            gated = x @ p["shared_experts.gate_proj.weight"].T
            if config.swiglu_limit > 0:
                gated = gated.clamp(max=config.swiglu_limit)
                up = up.clamp(-config.swiglu_limit, config.swiglu_limit)
            inner = functional.silu(gated) * up
        shared = inner @ p["shared_experts.down_proj.weight"].T
        if config.shared_expert_gate:
            shared = torch.sigmoid(x @ p["shared_expert_gate.weight"].T) * shared
        y = y + shared
    return y, aux


def leaves(layer: MoE) -> dict[str, Tensor]:
    """Copies of a layer's state to differentiate the definition by."""
    trained = {name for name, value in layer.named_parameters() if value.requires_grad}
    return {
        name: value.detach().clone().requires_grad_(name in trained)
        for name, value in layer.state_dict().items()
    }
