"""The sparse MoE blocks of transformers that :class:`moe_parallel.MoE` computes exactly.

E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Routing = Callable[[Any, Any], dict[str, Any]]

_SPLIT = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
_NUMBERED = ("w1.weight", "w3.weight", "w2.weight")


@dataclass(frozen=True)
class Family:
    """One class of MoE block.

    Attributes:
        block: name of the class.
        routing: ``routing(block, router)`` gives the routing fields of MoEConfig, or raises a
            ValueError that says what the block does and MoE does not.
        router: the block's child that routes.
        router_weight: name of the projection [E, H] in the block.
        router_bias: name of its bias [E], if it has one.
        router_float32: it computes in float32 whatever the model's dtype.
        correction: name of the correction bias [E], if it has one.
        correction_row: that bias is [1, E].
        shared, shared_gate: the children that are the shared experts and their gate.
        expert_names: how published checkpoints call one expert's gate, up and down matrices;
            empty if they hold the experts stacked, as the module does.
        published: beginnings of names in the block that published checkpoints spell otherwise.
        published_block: their name of the block itself, which the module calls ``mlp``.
        returns_scores: the block returns a tuple, of which its layer uses the first.
    """

    block: str
    routing: Routing
    router: str = "gate"
    router_weight: str = "gate.weight"
    router_bias: str | None = None
    router_float32: bool = False
    correction: str | None = None
    correction_row: bool = False
    shared: str | None = None
    shared_gate: str | None = None
    expert_names: tuple[str, str, str] | tuple[()] = _SPLIT
    published: Mapping[str, str] = field(default_factory=dict)
    published_block: str = "mlp"
    returns_scores: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles of a layer have the same family: its functions cannot be pickled."""
        return family_named, (self.block,)


def _softmax(block: Any, router: Any) -> dict[str, Any]:
    """Softmax over all experts, K best."""
    return {
        "score_func": "softmax",
        "softmax_before_topk": True,
        "norm_topk_prob": bool(getattr(router, "norm_topk_prob", True)),
    }


def _softmax_of_chosen(block: Any, router: Any) -> dict[str, Any]:
    return {"score_func": "softmax", "softmax_before_topk": False, "norm_topk_prob": False}


def _without_jitter(routing: Routing) -> Routing:
    def checked(block: Any, router: Any) -> dict[str, Any]:
        if block.jitter_noise > 0:
            raise ValueError(f"router_jitter_noise must be 0; got {block.jitter_noise}")
        return routing(block, router)

    return checked


def _softmax_greedy(block: Any, router: Any) -> dict[str, Any]:
    if router.topk_method != "greedy":
        raise ValueError(f"topk_method must be greedy; got {router.topk_method!r}")
    return {
        "score_func": "softmax",
        "softmax_before_topk": True,
        "norm_topk_prob": False,
        "route_scale": router.routed_scaling_factor,
    }


def _softmax_corrected(block: Any, router: Any) -> dict[str, Any]:
    return {"score_func": "softmax_with_bias", "norm_topk_prob": True}


def _sigmoid(block: Any, router: Any) -> dict[str, Any]:
    """Sigmoid and correction bias, without groups; the scale's name differs."""
    scale = getattr(router, "route_scale", getattr(router, "router_scaling_factor", 1.0))
    return {"score_func": "sigmoid_with_bias", "norm_topk_prob": True, "route_scale": scale}


def _sigmoid_in_groups(block: Any, router: Any) -> dict[str, Any]:
    """DeepSeek-V3 (arXiv:2412.19437, section 2.1.2)."""
    return {
        "score_func": "sigmoid_with_bias",
        "norm_topk_prob": bool(router.norm_topk_prob),
        "route_scale": router.routed_scaling_factor,
        "n_expert_groups": router.num_group,
        "n_limited_groups": router.topk_group,
    }


def _like_deepseek_v3(block: str, **changes: Any) -> Family:
    options: dict[str, Any] = {
        "routing": _sigmoid_in_groups,
        "router_float32": True,
        "correction": "gate.e_score_correction_bias",
        "shared": "shared_experts",
    }
    return Family(block, **{**options, **changes})


_FAMILIES = (
    Family("Qwen3MoeSparseMoeBlock", _softmax),
    Family("OlmoeSparseMoeBlock", _softmax),
    Family("FlexOlmoSparseMoeBlock", _softmax),
    Family("MellumSparseMoeBlock", _softmax),
    Family(
        "Qwen2MoeSparseMoeBlock",
        _softmax,
        shared="shared_expert",
        shared_gate="shared_expert_gate",
    ),
    Family(
        "Qwen3NextSparseMoeBlock",
        _softmax,
        shared="shared_expert",
        shared_gate="shared_expert_gate",
    ),
    Family(
        "MixtralSparseMoeBlock",
        _without_jitter(_softmax),
        expert_names=_NUMBERED,
        published_block="block_sparse_moe",
    ),
    Family(
        "MiniMaxSparseMoeBlock",
        _without_jitter(_softmax),
        expert_names=_NUMBERED,
        published_block="block_sparse_moe",
    ),
    Family(
        "MiniMaxM2SparseMoeBlock",
        _without_jitter(_sigmoid),
        correction="e_score_correction_bias",
        expert_names=_NUMBERED,
        published_block="block_sparse_moe",
    ),
    Family(
        "HunYuanMoEV1Moe",
        _softmax,
        router_weight="gate.wg.weight",
        shared="shared_mlp",
    ),
    Family(
        "DeepseekV2Moe",
        _softmax_greedy,
        router_float32=True,
        shared="shared_experts",
    ),
    _like_deepseek_v3("DeepseekV3MoE"),
    _like_deepseek_v3("DeepseekV32MoE"),
    _like_deepseek_v3("Dots1MoE"),
    _like_deepseek_v3("Glm4MoeMoE"),
    _like_deepseek_v3("Glm4MoeLiteMoE"),
    _like_deepseek_v3("GlmMoeDsaMoE"),
    _like_deepseek_v3("SolarOpenMoE"),
    _like_deepseek_v3(
        "ExaoneMoeSparseMoEBlock",
        published={"gate.e_score_correction_bias": "e_score_correction_bias"},
    ),
    _like_deepseek_v3(
        "HYV3MoE",
        routing=_sigmoid,
        correction="e_score_correction_bias",
        published={
            "gate.weight": "router.gate.weight",
            "e_score_correction_bias": "expert_bias",
            "shared_experts.": "shared_mlp.",
        },
    ),
    _like_deepseek_v3(
        "AfmoeSparseMoeBlock",
        routing=_sigmoid,
        router="router",
        router_weight="router.gate.weight",
        router_float32=False,
        correction="expert_bias",
    ),
    Family(
        "Ernie4_5_MoeSparseMoeBlock",
        _softmax_corrected,
        router_float32=True,
        correction="gate.moe_statics.e_score_correction_bias",
        correction_row=True,
        shared="shared_experts",
        published={"gate.moe_statics.": "moe_statics."},
    ),
    Family(
        "GptOssMLP",
        _softmax_of_chosen,
        router="router",
        router_weight="router.weight",
        router_bias="router.bias",
        expert_names=(),
        returns_scores=True,
    ),
)
FAMILIES: Mapping[str, Family] = {family.block: family for family in _FAMILIES}


def family_named(block: str) -> Family:
    """The family of the blocks of a class."""
    return FAMILIES[block]


def family_of(module: nn.Module) -> Family | None:
    """The family of a block, if it is one of these."""
    cls = type(module)
    known = FAMILIES.get(cls.__name__)
    return known if cls.__module__.startswith("transformers.models.") else None
