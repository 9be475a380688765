"""Configuration: names of dtypes, defaults, refused values."""

from __future__ import annotations

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
        ({"dispatcher": "pigeon"}, "dispatcher must be one of auto, process_group.*'pigeon'"),
        ({"experts": "loop"}, "experts must be one of auto, reference; got 'loop'"),
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
