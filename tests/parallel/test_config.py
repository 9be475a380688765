"""Configuration: names of dtypes, defaults, refused values."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from moe_parallel import BackendConfig, MoEConfig
from moe_parallel.config import dtype_from_str
from tests.parallel.definitions import make_config


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("float", torch.float32),
        ("torch.Float32", torch.float32),
        ("DOUBLE", torch.float64),
        ("torch.half", torch.float16),
        ("bf16", torch.bfloat16),
        ("TORCH.bfloat16", torch.bfloat16),
        ("int64", torch.int64),
        ("uint8", torch.uint8),
        ("bool", torch.bool),
        (torch.float16, torch.float16),
    ],
)
def test_dtype_from_str(name: str | torch.dtype, dtype: torch.dtype) -> None:
    assert dtype_from_str(name) is dtype


def test_dtype_from_str_falls_back_for_what_is_no_name() -> None:
    assert dtype_from_str(None) is torch.bfloat16
    assert dtype_from_str(3, default=torch.float32) is torch.float32
    assert dtype_from_str("float32", default=None) is torch.float32
    with pytest.raises(KeyError, match="float99"):
        dtype_from_str("float99")
    with pytest.raises(AssertionError, match=r"torch\.dtype"):
        dtype_from_str(None, default=None)


def test_moe_config() -> None:
    config = make_config(dtype="torch.float16")
    assert config.dtype is torch.float16
    assert config.expert_dim == config.dim
    assert make_config(moe_latent_size=5).expert_dim == 5
    with pytest.raises(TypeError):
        MoEConfig(8, 0)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"n_routed_experts": 0}, "n_routed_experts must be finite and at least 1; got 0"),
        ({"n_activated_experts": 0}, "n_activated_experts must be .* at least 1; got 0"),
        ({"n_activated_experts": 9}, "n_activated_experts must be at most n_routed_experts 8; got"),
        (
            {"token_rounding": "even"},
            "token_rounding must be None or one of nearest, up, down; got",
        ),
        ({"token_rounding_tile": 0}, "token_rounding_tile must be .* at least 1; got 0"),
        (
            {"token_rounding": "up", "enable_routing_replay": True},
            "token_rounding must be None with enable_routing_replay",
        ),
        ({"n_shared_experts": -1}, "n_shared_experts must be .* at least 0; got -1"),
        ({"n_expert_groups": -2}, "n_expert_groups must be .* at least 0; got -2"),
        ({"n_expert_groups": 3}, "n_expert_groups must divide n_routed_experts 8; got 3"),
        (
            {"n_expert_groups": 4, "n_limited_groups": 5},
            r"n_limited_groups must be in \[1, n_expert_groups = 4\]; got 5",
        ),
        ({"n_expert_groups": 4}, r"at most the experts of n_limited_groups, 1 \* 2; got 3"),
        ({"dim": 0}, "dim must be .* at least 1; got 0"),
        ({"inter_dim": -1}, "inter_dim must be .* at least 0; got -1"),
        ({"moe_inter_dim": 0}, "moe_inter_dim must be .* at least 1; got 0"),
        ({"moe_latent_size": 0}, "moe_latent_size must be .* at least 1; got 0"),
        ({"shared_expert_inter_dim": -4}, "shared_expert_inter_dim must be .* at least 0; got -4"),
        ({"swiglu_limit": -1.0}, "swiglu_limit must be .* at least 0; got -1.0"),
        ({"aux_loss_coeff": float("nan")}, "aux_loss_coeff must be finite .*; got nan"),
        ({"gate_bias_update_factor": -0.1}, "gate_bias_update_factor must be .*; got -0.1"),
        ({"route_scale": float("inf")}, "route_scale must be finite; got inf"),
        ({"dtype": "int32"}, "dtype must be floating point; got torch.int32"),
        (
            {"expert_activation": "swigluoai", "activation_limit": 0.0},
            "activation_limit must be positive for expert_activation swigluoai; got 0.0",
        ),
        (
            {"expert_activation": "quick_geglu", "activation_alpha": float("nan")},
            "activation_alpha must be finite; got nan",
        ),
    ],
)
def test_moe_config_names_what_no_layer_can_have(settings: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=f"MoEConfig: .*{found}"):
        make_config(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"n_expert_groups": 0, "n_limited_groups": 0, "inter_dim": 0},
        {"n_expert_groups": 4, "n_limited_groups": 2, "score_func": "another"},
        {"train_gate": False, "activation_limit": 0.0, "shared_expert_inter_dim": 0},
    ],
    ids=["no groups", "groups", "unused"],
)
def test_moe_config_accepts(settings: dict[str, Any]) -> None:
    make_config(**settings)


def test_moe_config_warns_of_a_bias_that_nothing_reads() -> None:
    with pytest.warns(UserWarning, match="no effect with score_func 'softmax'.*softmax_with_bias"):
        make_config(gate_bias_update_factor=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_config(gate_bias_update_factor=0.1, score_func="softmax_with_bias")


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        (
            {"dispatcher": "pigeon"},
            "dispatcher must be one of auto, process_group, .*cuda_ipc, deepep.*'pigeon'",
        ),
        ({"experts": "loop"}, "experts must be one of auto, reference; got 'loop'"),
        (
            {"experts_precision": "fp4"},
            "experts_precision must be one of None, fp8_block; got 'fp4'",
        ),
        (
            {"experts_precision": "fp8_block", "experts": "reference"},
            "experts_precision must be None with experts 'reference'",
        ),
        ({"dispatcher_timeout": 0}, "dispatcher_timeout must be positive; got 0"),
        ({"fake_gate_noise": 2.0}, r"fake_gate_noise must be in \[0, 1\]; got 2.0"),
    ],
)
def test_backend_config_names_the_choices(settings: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        BackendConfig(**settings)


def test_backend_config_converts_names_of_dtypes() -> None:
    assert BackendConfig(gate_precision="float32").gate_precision is torch.float32
    assert BackendConfig().gate_precision is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"dim": 1.5},
        {"dim": "3"},
        {"n_activated_experts": 1.5},
        {"n_shared_experts": [1]},
        {"shared_expert_inter_dim": "zz"},
        {"aux_loss_coeff": "x"},
        {"route_scale": [1.0]},
        {"token_rounding_tile": 1.5},
        {"expert_activation": "swigluoai", "activation_limit": "x"},
        {"expert_activation": "swigluoai", "activation_alpha": 1j},
    ],
)
def test_moe_config_names_what_is_no_number(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"MoEConfig: {[*wrong][-1]} must be"):
        make_config(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"dispatcher_timeout": "x"},
        {"dispatcher_max_tokens": "x"},
        {"dispatcher_capacity": 1.5},
        {"fake_gate_noise": [1.0]},
    ],
)
def test_backend_config_names_what_is_no_number(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"BackendConfig: {next(iter(wrong))} must be"):
        BackendConfig(**wrong)
