"""Configuration of MoE layers and of what they run on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_kernels.ops._checks import (
    FLOAT_DTYPES,
    check_choice,
    check_count,
    check_flag,
    check_number,
)
from moe_parallel.dispatch import TRANSPORTS
from moe_parallel.dispatch.arguments import check_timeout

SCORE_FUNCS = ("softmax", "softmax_with_bias", "sqrtsoftplus", "sigmoid", "sigmoid_with_bias")
EXPERT_ACTIVATIONS = ("swiglu", "swigluoai", "quick_geglu", "geglu", "relu2")
MLP_ACTIVATIONS = ("swiglu", "relu2")
ROUNDING_MODES = ("nearest", "up", "down")
PRECISIONS = ("fp8_block",)
REAL_NUMBERS = ("gate_bias_update_factor", "aux_loss_coeff", "swiglu_limit")
FLAGS = (
    "train_gate",
    "norm_topk_prob",
    "router_bias",
    "expert_bias",
    "softmax_before_topk",
    "shared_expert_gate",
    "force_e_score_correction_bias",
    "enable_routing_replay",
)

_DTYPES = {
    "float": torch.float32,
    "float32": torch.float32,
    "double": torch.float64,
    "float64": torch.float64,
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "short": torch.int16,
    "int32": torch.int32,
    "int": torch.int32,
    "int64": torch.int64,
    "long": torch.int64,
    "bool": torch.bool,
}


def dtype_from_str(val: Any, default: torch.dtype | None = torch.bfloat16) -> torch.dtype:
    """The dtype that ``val`` names.

    Args:
        val: a dtype, returned as it is, or its name in any case, with or without ``torch.``.
        default: the result for None and for every other type.

    Raises:
        KeyError: an unknown name.
        AssertionError: ``default`` is needed and is not a dtype.
    """
    if isinstance(val, torch.dtype):
        return val
    if isinstance(val, str):
        name = val.lower().removeprefix("torch.")
        if name not in _DTYPES:
            raise KeyError(f"dtype must be one of {', '.join(_DTYPES)}; got {val!r}")
        return _DTYPES[name]
    assert isinstance(default, torch.dtype), f"default must be a torch.dtype; got {default!r}"
    return default


def _float_dtype(owner: str, name: str, value: Any) -> torch.dtype:
    """The floating point dtype that ``value`` is, or names; bfloat16 for None."""
    if not isinstance(value, torch.dtype | str | None):
        raise TypeError(f"{owner}: {name} must be a torch.dtype or its name; got {value!r}")
    try:
        dtype = dtype_from_str(value)
    except KeyError as error:
        raise KeyError(f"{owner}: {name}: {error.args[0]}") from None
    if dtype not in FLOAT_DTYPES:
        names = ", ".join(str(one).removeprefix("torch.") for one in FLOAT_DTYPES)
        raise ValueError(f"{owner}: {name} must be one of {names}; got {dtype}")
    return dtype


def check_positive(owner: str, name: str, value: Any) -> None:
    """Raise unless ``value`` is an integer of at least 1."""
    check_count(owner, name, value)
    if value < 1:
        raise ValueError(f"{owner}: {name} must be positive; got {value}")


def check_attributes(owner: str, name: str, value: Any, kind: type, needed: Sequence[str]) -> None:
    """Raise unless ``value`` is a ``kind``, or has the attributes of one that are ``needed``."""
    if isinstance(value, kind):
        return
    missing = [attribute for attribute in needed if not hasattr(value, attribute)]
    if missing:
        raise TypeError(
            f"{owner}: {name} must be a {kind.__name__}, or have its attributes; got "
            f"{type(value).__name__} without {', '.join(missing)}"
        )


@dataclass(kw_only=True)
class MoEConfig:
    """The shape and the routing of one MoE layer.

    Attributes:
        n_routed_experts, n_shared_experts: experts to choose from, and experts every token uses.
        n_activated_experts: experts a token, K.
        n_expert_groups, n_limited_groups: groups of consecutive experts, and how many of them a
            token may use; 1 group (or 0) is no limit. "softmax" and "sqrtsoftplus" choose among
            all experts, and warn.
        train_gate: whether the router learns.
        gate_bias_update_factor: step of the correction bias, see :meth:`Gate.update_bias`; 0: none.
            "softmax" chooses without the bias: it counts the load and warns that it is of no use.
        aux_loss_coeff: weight of the load-balancing loss; 0 is none.
        score_func: "softmax", "softmax_with_bias", "sqrtsoftplus", "sigmoid_with_bias"; any other
            is "sigmoid", with a warning.
        route_scale: multiplies the routing weights.
        dim, inter_dim, moe_inter_dim: hidden size of the model, intermediate size of its dense
            layers, and of an expert.
        norm_topk_prob: whether a token's routing weights sum to 1 (before ``route_scale``).
        router_bias, expert_bias: whether the router's projection and the experts have biases.
        expert_activation: "swiglu", "swigluoai", "quick_geglu", "geglu" or "relu2".
        activation_alpha, activation_limit: of swigluoai and quick_geglu.
        swiglu_limit: clamps swiglu's factors; 0 is no clamp.
        softmax_before_topk: for "softmax": over all experts, or over the K chosen.
        dtype: of the parameters; a name is converted.
        shared_expert_gate, shared_expert_inter_dim, shared_expert_activation: of the shared
            experts; an intermediate size of None is ``moe_inter_dim``.
        force_e_score_correction_bias: keep a correction bias although nothing updates it.
        moe_latent_size: hidden size of the routed experts, if it is not ``dim``.
        enable_routing_replay: give the gate a :class:`RoutingReplay`.
        token_rounding: "nearest", "up" or "down" to round each expert's number of tokens to a
            multiple of ``token_rounding_tile``, in training mode alone, by
            :func:`moe_kernels.round_tokens`; None for plain top-k. It spares the grouped GEMM tiles
            that are filled in part, and drops or adds the tokens that matter least to an expert:
            what a token gets then depends on the rest of the batch. Up to as many experts as it
            chose may be added to a token. Evaluation, the load and the auxiliary loss are those of
            plain top-k.
        token_rounding_tile: rows of a tile of the grouped GEMM. Give each expert two tiles or more
            on average: with "nearest" and "down", one with few tokens gets none in that step.

    Raises:
        ValueError: a size, number, group, dtype or activation that no layer can have. That of
            shared experts counts where there are any.
        TypeError: a number, a flag, a dtype or ``score_func`` of another kind.
        KeyError: a name of no dtype.
    """

    n_routed_experts: int
    n_shared_experts: int
    n_activated_experts: int
    n_expert_groups: int
    n_limited_groups: int
    train_gate: bool
    gate_bias_update_factor: float
    aux_loss_coeff: float
    score_func: str
    route_scale: float
    dim: int
    inter_dim: int
    moe_inter_dim: int
    norm_topk_prob: bool
    router_bias: bool = False
    expert_bias: bool = False
    expert_activation: str = "swiglu"
    activation_alpha: float = 1.702
    activation_limit: float = 7.0
    swiglu_limit: float = 0.0
    softmax_before_topk: bool = False
    dtype: torch.dtype = torch.bfloat16
    shared_expert_gate: bool = False
    shared_expert_inter_dim: int | None = None
    shared_expert_activation: str = "swiglu"
    force_e_score_correction_bias: bool = False
    moe_latent_size: int | None = None
    enable_routing_replay: bool = False
    token_rounding: str | None = None
    token_rounding_tile: int = 128

    def __post_init__(self) -> None:
        self.dtype = _float_dtype("MoEConfig", "dtype", self.dtype)
        for name in FLAGS:
            check_flag("MoEConfig", name, getattr(self, name))
        if not isinstance(self.score_func, str):
            raise TypeError(
                f"MoEConfig: score_func must be a string, one of {', '.join(SCORE_FUNCS)}; "
                f"got {self.score_func!r}"
            )
        check_choice("MoEConfig", "expert_activation", self.expert_activation, EXPERT_ACTIVATIONS)
        for name in ("n_routed_experts", "n_activated_experts", "dim", "moe_inter_dim"):
            self._check_at_least(name, 1)
        for name in (
            "n_shared_experts",
            "n_expert_groups",
            "n_limited_groups",
            "inter_dim",
            *REAL_NUMBERS,
        ):
            self._check_at_least(name, 0)
        if self.n_shared_experts > 0:
            check_choice(
                "MoEConfig",
                "shared_expert_activation",
                self.shared_expert_activation,
                MLP_ACTIVATIONS,
            )
        if self.moe_latent_size is not None:
            self._check_at_least("moe_latent_size", 1)
        if self.shared_expert_inter_dim is not None:
            self._check_at_least("shared_expert_inter_dim", 0)
        check_number("MoEConfig", "route_scale", self.route_scale)
        if not math.isfinite(self.route_scale):
            raise ValueError(f"MoEConfig: route_scale must be finite; got {self.route_scale}")
        if self.expert_activation in ("swigluoai", "quick_geglu"):
            for name in ("activation_alpha", "activation_limit"):
                check_number("MoEConfig", name, getattr(self, name))
            if not self.activation_limit > 0:
                raise ValueError(
                    "MoEConfig: activation_limit must be positive for expert_activation "
                    f"{self.expert_activation}; got {self.activation_limit}"
                )
            if not math.isfinite(self.activation_alpha):
                raise ValueError(
                    f"MoEConfig: activation_alpha must be finite; got {self.activation_alpha}"
                )
        if self.n_activated_experts > self.n_routed_experts:
            raise ValueError(
                "MoEConfig: n_activated_experts must be at most n_routed_experts "
                f"{self.n_routed_experts}; got {self.n_activated_experts}"
            )
        if self.n_expert_groups > 1:
            self._check_groups()
        self._check_token_rounding()
        if self.score_func not in SCORE_FUNCS:
            warnings.warn(
                f"MoEConfig: score_func {self.score_func!r} is none of {', '.join(SCORE_FUNCS)}; "
                "it is taken for 'sigmoid'",
                stacklevel=3,
            )
        if self.gate_bias_update_factor > 0 and self.score_func == "softmax":
            warnings.warn(
                "MoEConfig: gate_bias_update_factor has no effect with score_func 'softmax', which "
                "chooses experts without a correction bias; softmax_with_bias uses it",
                stacklevel=3,
            )

        if self.n_expert_groups > 1 and self.score_func in ("softmax", "sqrtsoftplus"):
            warnings.warn(
                f"MoEConfig: n_expert_groups {self.n_expert_groups} has no effect with score_func "
                f"{self.score_func!r}, which chooses among all experts; softmax_with_bias, sigmoid "
                "and sigmoid_with_bias know groups",
                stacklevel=3,
            )

    def _check_at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        check_number("MoEConfig", name, value)
        if name not in REAL_NUMBERS and math.isfinite(value) and value >= least:
            check_count("MoEConfig", name, value)
        if not value >= least or not math.isfinite(value):
            raise ValueError(f"MoEConfig: {name} must be finite and at least {least}; got {value}")

    def _check_groups(self) -> None:
        experts, groups = self.n_routed_experts, self.n_expert_groups
        if experts % groups:
            raise ValueError(
                f"MoEConfig: n_expert_groups must divide n_routed_experts {experts}; got {groups}"
            )
        if not 1 <= self.n_limited_groups <= groups:
            raise ValueError(
                f"MoEConfig: n_limited_groups must be in [1, n_expert_groups = {groups}]; "
                f"got {self.n_limited_groups}"
            )
        if self.n_activated_experts > self.n_limited_groups * (experts // groups):
            raise ValueError(
                "MoEConfig: n_activated_experts must be at most the experts of n_limited_groups, "
                f"{self.n_limited_groups} * {experts // groups}; got {self.n_activated_experts}"
            )

    def _check_token_rounding(self) -> None:
        if self.token_rounding not in (None, *ROUNDING_MODES):
            raise ValueError(
                f"MoEConfig: token_rounding must be None or one of {', '.join(ROUNDING_MODES)}; "
                f"got {self.token_rounding!r}"
            )
        self._check_at_least("token_rounding_tile", 1)
        if self.token_rounding is not None and self.enable_routing_replay:
            raise ValueError(
                "MoEConfig: token_rounding must be None with enable_routing_replay, which repeats "
                f"a choice as it was; got {self.token_rounding!r}"
            )

    @property
    def rounding_candidates(self) -> int:
        """How many experts token rounding may add to a token, of those that may be chosen."""
        if self.token_rounding in (None, "down"):
            return 0
        allowed = self.n_routed_experts
        if self.n_expert_groups > 1:
            allowed = allowed // self.n_expert_groups * self.n_limited_groups
        return min(self.n_activated_experts, allowed - self.n_activated_experts)

    @property
    def expert_dim(self) -> int:
        """Hidden size of the routed experts."""
        return self.dim if self.moe_latent_size is None else self.moe_latent_size


@dataclass(kw_only=True)
class BackendConfig:
    """What an MoE layer runs on.

    Attributes:
        dispatcher: transport of the tokens under Expert Parallelism, or "auto", see
            :func:`moe_parallel.dispatch.build_dispatcher`.
        dispatcher_timeout: seconds a rank waits for the others; None for the group's own timeout.
        dispatcher_max_tokens: the most tokens that any rank dispatches, which "cuda_ipc" needs.
        dispatcher_capacity: rows that a rank has room for by "cuda_ipc"; None for all there can be.
        dispatcher_slot_capacity: the same for the slots in them.
        experts: "auto" for :func:`moe_kernels.fused_experts`, "reference" for its definition.
        experts_precision: of the routed experts' products, None for the dtype of their input;
            "fp8_block" for float8 with a scale for each block, see
            :func:`moe_kernels.fused_experts`. Parameters and their gradients stay as they are.
        fake_balanced_gate: replace the router by one that balances perfectly (for benchmarks).
        fake_gate_noise: how uneven that one is, 0 to 1.
        enable_fsdp_optimizations: skip FSDP communication between accumulated micro-batches.
        gate_precision: dtype the router computes in, or its name; None for that of its input.

    Raises:
        ValueError: a choice that there is not, or a number or dtype out of range.
        TypeError: a number, a flag or a dtype of another kind.
        KeyError: a name of no dtype.
    """

    dispatcher: str = "auto"
    dispatcher_timeout: float | None = None
    dispatcher_max_tokens: int | None = None
    dispatcher_capacity: int | None = None
    dispatcher_slot_capacity: int | None = None
    experts: str = "auto"
    experts_precision: str | None = None
    fake_balanced_gate: bool = False
    fake_gate_noise: float = 0.0
    enable_fsdp_optimizations: bool = False
    gate_precision: torch.dtype | None = None

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str | None, ...]] = {
            "dispatcher": ("auto", *TRANSPORTS),
            "experts": ("auto", "reference"),
            "experts_precision": (None, *PRECISIONS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"BackendConfig: {name} must be one of {', '.join(map(str, allowed))}; "
                    f"got {getattr(self, name)!r}"
                )
        if self.experts_precision is not None and self.experts == "reference":
            raise ValueError(
                "BackendConfig: experts_precision must be None with experts 'reference', which "
                f"computes in one precision; got {self.experts_precision!r}"
            )
        if self.dispatcher_timeout is not None:
            check_timeout("BackendConfig", "dispatcher_timeout", self.dispatcher_timeout)
        for name in ("dispatcher_max_tokens", "dispatcher_capacity", "dispatcher_slot_capacity"):
            if getattr(self, name) is not None:
                check_positive("BackendConfig", name, getattr(self, name))
        for name in ("fake_balanced_gate", "enable_fsdp_optimizations"):
            check_flag("BackendConfig", name, getattr(self, name))
        check_number("BackendConfig", "fake_gate_noise", self.fake_gate_noise)
        if not 0 <= self.fake_gate_noise <= 1:
            raise ValueError(
                f"BackendConfig: fake_gate_noise must be in [0, 1]; got {self.fake_gate_noise}"
            )
        if self.gate_precision is not None:
            self.gate_precision = _float_dtype(
                "BackendConfig", "gate_precision", self.gate_precision
            )
