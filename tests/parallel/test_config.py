"""Configuration: names of dtypes, defaults, refused values."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_parallel import BackendConfig, MoE, MoEConfig
from moe_parallel.config import FLAGS, dtype_from_str
from moe_parallel.experts import GroupedExperts
from moe_parallel.layers import MLP, FakeBalancedGate, Gate
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
        (
            {"dtype": "int32"},
            "dtype must be one of bfloat16, float16, float32, float64; got torch.int32",
        ),
        (
            {"expert_activation": "tanh"},
            "expert_activation must be one of swiglu, .*, geglu, relu2; got 'tanh'",
        ),
        (
            {"shared_expert_activation": "geglu", "n_shared_experts": 1},
            "shared_expert_activation must be one of swiglu, relu2; got 'geglu'",
        ),
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
        {"n_expert_groups": 4, "n_limited_groups": 2, "score_func": "sigmoid"},
        {"shared_expert_activation": "geglu"},
        {"train_gate": False, "activation_limit": 0.0, "shared_expert_inter_dim": 0},
    ],
    ids=["no groups", "groups", "no shared experts", "unused"],
)
def test_moe_config_accepts(settings: dict[str, Any]) -> None:
    make_config(**settings)


def test_moe_config_warns_of_a_name_taken_for_another() -> None:
    with pytest.warns(UserWarning, match="score_func 'sigmoid_with_bais' is none of .*'sigmoid'"):
        make_config(score_func="sigmoid_with_bais")


@pytest.mark.parametrize("score_func", ["softmax", "sqrtsoftplus"])
def test_moe_config_warns_of_groups_that_nothing_reads(score_func: str) -> None:
    with pytest.warns(UserWarning, match=rf"n_expert_groups 2 has no effect .*'{score_func}'"):
        make_config(n_expert_groups=2, n_limited_groups=1, score_func=score_func)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_config(n_expert_groups=2, n_limited_groups=1, score_func="sigmoid")


def test_dtypes_that_nothing_computes_in_are_refused() -> None:
    for make in (
        lambda: make_config(dtype=torch.float8_e4m3fn),
        lambda: BackendConfig(gate_precision=torch.float8_e4m3fn),
    ):
        with pytest.raises(ValueError, match=r"must be one of bfloat16, .*; got torch\.float8"):
            make()


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
        ({"dispatcher_timeout": 0}, "dispatcher_timeout must be positive and at most .*; got 0"),
        ({"dispatcher_timeout": float("inf")}, r"at most 1e\+09, in seconds; got inf\. None is"),
        ({"dispatcher_max_tokens": 0}, "dispatcher_max_tokens must be positive; got 0"),
        (
            {"gate_precision": "int8"},
            "gate_precision must be one of bfloat16, float16, float32, float64; got torch.int8",
        ),
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
        {"score_func": None},
        {"dtype": 3},
        *({name: 1} for name in FLAGS),
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
        {"fake_balanced_gate": "no"},
        {"enable_fsdp_optimizations": None},
        {"gate_precision": 3},
    ],
)
def test_backend_config_names_what_is_no_number(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"BackendConfig: {next(iter(wrong))} must be"):
        BackendConfig(**wrong)


@pytest.mark.parametrize("owner", [MoEConfig, BackendConfig])
def test_a_name_of_no_dtype_is_that_of_an_argument(owner: Any) -> None:
    name = "dtype" if owner is MoEConfig else "gate_precision"
    make = make_config if owner is MoEConfig else BackendConfig
    with pytest.raises(KeyError, match=f"{owner.__name__}: {name}: dtype must be one of float"):
        make(**{name: "float99"})


LAYERS: dict[str, Any] = {
    "Gate": Gate,
    "FakeBalancedGate": FakeBalancedGate,
    "MoE": MoE,
    "GroupedExperts": GroupedExperts,
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("wrong", [None, 8, {"dim": 8}])
def test_layers_ask_for_a_configuration(name: str, wrong: Any) -> None:
    found = (
        f"{name}: config must be a MoEConfig, or have its attributes; got {type(wrong).__name__}"
    )
    with pytest.raises(TypeError, match=f"^{found} without .*n_routed_experts"):
        LAYERS[name](wrong)
    if name in ("MoE", "GroupedExperts"):
        with pytest.raises(TypeError, match=f"{name}: backend must be a BackendConfig, .*got str"):
            LAYERS[name](make_config(), "auto")


@pytest.mark.parametrize("name", LAYERS)
def test_layers_take_what_is_like_a_configuration(name: str) -> None:
    config = make_config(n_shared_experts=1)
    alike = SimpleNamespace(**vars(config), expert_dim=config.dim, rounding_candidates=0)
    del alike.inter_dim
    LAYERS[name](alike)


def test_layers_name_what_is_of_another_kind() -> None:
    for arguments, options, found in (
        ((None, 3), {}, "dim must be an integer; got None"),
        ((3, "x"), {}, "inter_dim must be an integer; got 'x'"),
        ((3, 3), {"dtype": "bf16"}, "dtype must be a torch.dtype; got 'bf16'"),
        ((3, 3), {"bias": None}, "bias must be True or False; got None"),
        ((3, 3), {"swiglu_limit": "x"}, "swiglu_limit must be a number; got 'x'"),
    ):
        with pytest.raises(TypeError, match=f"^MLP: {found}"):
            MLP(*arguments, **options)
    for arguments, options, found in (
        ((-1, 3), {}, "dim must be at least 0; got -1"),
        ((3, 3), {"swiglu_limit": -1.0}, "swiglu_limit must be at least 0; got -1.0"),
        ((3, 3), {"activation": "geglu"}, "activation must be one of swiglu, relu2; got 'geglu'"),
    ):
        with pytest.raises(ValueError, match=f"^MLP: {found}"):
            MLP(*arguments, **options)
    with pytest.raises(TypeError, match=r"Gate: gate_precision must be a torch\.dtype .*; got"):
        Gate(make_config(), gate_precision="float32")
    with pytest.raises(TypeError, match="FakeBalancedGate: noise must be a number; got 'x'"):
        FakeBalancedGate(make_config(), noise="x")


def test_layers_name_what_they_are_called_with() -> None:
    config = make_config()
    x, mask = torch.randn(4, config.dim, dtype=config.dtype), torch.ones(4, dtype=torch.bool)
    weights, ids = torch.rand(4, 3), torch.zeros(4, 3, dtype=torch.int64)
    gate, experts = Gate(config), GroupedExperts(config)
    for error, found, call in (
        (
            TypeError,
            r"MLP: x must be a tensor \[\.\.\., dim\]; got NoneType",
            lambda: MLP(3, 3)(None),
        ),
        (TypeError, "Gate: x must be a tensor .*; got NoneType", lambda: gate(None, mask, None)),
        (
            ValueError,
            r"Gate: x must be .* H = 13; got \[4, 2\]",
            lambda: gate(x[:, :2], mask, None),
        ),
        (TypeError, "Gate: token_mask must be a tensor .*; got list", lambda: gate(x, [1], None)),
        (
            TypeError,
            "FakeBalancedGate: x must be a tensor .*; got NoneType",
            lambda: FakeBalancedGate(config)(None, mask, None),
        ),
        (
            TypeError,
            "GroupedExperts: x must be a tensor .*; got NoneType",
            lambda: experts(None, mask, weights, ids),
        ),
        (
            TypeError,
            "GroupedExperts: token_mask must be one of bool; got int64",
            lambda: experts(x, mask.long(), weights, ids),
        ),
        (
            TypeError,
            "GroupedExperts: indices must be a tensor .*; got list",
            lambda: experts(x, mask, weights, ids.tolist()),
        ),
        (
            ValueError,
            r"GroupedExperts: weights must be \[4, 3\] as indices; got \[4, 2\]",
            lambda: experts(x, mask, weights[:, :2], ids),
        ),
        (
            ValueError,
            r"GroupedExperts: token_mask must have T = 4 rows .*; got \[3\]",
            lambda: experts(x, mask[:3], weights, ids),
        ),
    ):
        with pytest.raises(error, match=found):
            call()
