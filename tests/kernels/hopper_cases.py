"""Products in Gluon that ``compile_cases.py`` compiles, and what such kernels are cut into."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

T, E, H, INNER = 4096, 128, 2048, 768
BF16 = torch.bfloat16
# of kernels whose warps have roles, given by Triton or in Gluon
ROLES: dict[str, Any] = {
    "block_m": 128, "block_k": 64, "warps": 4, "stages": 3, "warp_specialize": "triton"
}  # fmt: skip
GLUON = ROLES | {"warps": 8, "stages": 4, "warp_specialize": "gluon"}
HOPPER = range(90, 100)


def gluon_biased(block_n: int) -> None:
    """The product, with a bias."""
    from moe_kernels.triton._config_tables import Config
    from moe_kernels.triton._launch import architecture
    from moe_kernels.triton._tiles import build_tile_map
    from moe_kernels.triton.grouped_gemm import multiply_rows

    if architecture(torch.device("cpu")) not in HOPPER:
        return
    tiles = build_tile_map(torch.empty(E + 1, dtype=torch.int32), T, 128)
    a, out = torch.empty(T, INNER, dtype=BF16), torch.empty(T, H, dtype=BF16)
    b, bias = torch.empty(E, H, INNER, dtype=BF16).mT, torch.empty(E, H, dtype=BF16)
    multiply_rows(a, b, bias, out, tiles, Config(**GLUON, block_n=block_n))


def gluon_scaled(
    block_n: int,
    stages: int = 4,
    columns: int = H,
    biased: bool = False,
    dtype: torch.dtype = BF16,
) -> None:
    """The product of float8."""
    from moe_kernels.triton._config_tables import Config
    from moe_kernels.triton._launch import architecture
    from moe_kernels.triton._tiles import build_tile_map
    from moe_kernels.triton.scaled_grouped_gemm import multiply_scaled_rows

    if architecture(torch.device("cpu")) not in HOPPER:
        return
    float8, blocks = torch.float8_e4m3fn, INNER // 128
    a = torch.empty(T, INNER, dtype=float8), torch.empty(blocks, T).t()
    b = torch.empty(E, columns, INNER, dtype=float8).mT, torch.empty(E, blocks, -(-columns // 128))
    bias = torch.empty(E, columns, dtype=dtype) if biased else None
    tiles = build_tile_map(torch.empty(E + 1, dtype=torch.int32), T, 128)
    cut = Config(**GLUON | {"block_k": 128, "stages": stages}, block_n=block_n)
    multiply_scaled_rows(a, b, bias, torch.empty(T, columns, dtype=dtype), tiles, cut)


def gluon_scaled_up(
    kind: str,
    block_n: int = 256,
    stages: int = 4,
    *,
    saves: bool = False,
    interleaved: bool = False,
    limit: float = math.inf,
    biased: bool = False,
    inner: int = INNER,
    dtype: torch.dtype = BF16,
) -> None:
    """The up-projection of float8 and its activation."""
    from moe_kernels.triton import _hopper_scaled_up
    from moe_kernels.triton._activation import Activation
    from moe_kernels.triton._config_tables import Config
    from moe_kernels.triton._launch import architecture
    from moe_kernels.triton._scaled_up import activates_in_roles
    from moe_kernels.triton._tiles import build_tile_map

    if architecture(torch.device("cpu")) not in HOPPER:
        return
    float8, blocks, act = torch.float8_e4m3fn, H // 128, Activation(kind, interleaved, 1.702, limit)
    width = inner * (2 if act.gated else 1)
    x = torch.empty(T, H, dtype=float8), torch.empty(blocks, T).t()
    w = torch.empty(E, width, H, dtype=float8).mT, torch.empty(E, blocks, -(-width // 128))
    bias = torch.empty(E, width, dtype=dtype) if biased else None
    h = torch.empty(T if saves else 0, width, dtype=dtype)
    a = torch.empty(T, inner, dtype=float8), torch.empty(-(-inner // 128), T).t()
    tiles = build_tile_map(torch.empty(E + 1, dtype=torch.int32), T, 128)
    changes = {"block_k": 128, "stages": stages, "warp_specialize": "gluon_activate"}
    cut = Config(**GLUON | changes, block_n=block_n)
    assert activates_in_roles(act, x[0], w[0], h, inner, cut)
    _hopper_scaled_up.project_up(x, w, bias, h, a, act, tiles, cut)


SCALED: dict[str, Callable[[], None]] = {
    "gluon_scaled_256_4_roles": partial(gluon_scaled, 256),
    "gluon_scaled_up_256_4_roles": partial(gluon_scaled_up, "swiglu"),
}
MORE_SCALED: dict[str, Callable[[], None]] = {
    "gluon_scaled_256_3_biased_roles": partial(gluon_scaled, 256, stages=3, biased=True),
    "gluon_scaled_256_4_columns_roles": partial(gluon_scaled, 256, columns=H + 6, biased=True),
    "gluon_scaled_128_6_roles": partial(gluon_scaled, 128, stages=6, dtype=torch.float16),
    "gluon_scaled_128_5_biased_roles": partial(gluon_scaled, 128, stages=5, biased=True),
    "gluon_scaled_up_256_3_h_roles": partial(gluon_scaled_up, "swiglu", stages=3, saves=True),
    "gluon_scaled_up_256_4_h_roles": partial(gluon_scaled_up, "swiglu", saves=True),
    "gluon_scaled_up_256_4_biased_roles": partial(
        gluon_scaled_up, "swigluoai", saves=True, limit=7.0, biased=True
    ),
    "gluon_scaled_up_256_4_pairs_roles": partial(
        gluon_scaled_up,
        "swigluoai",
        saves=True,
        interleaved=True,
        limit=7.0,
        biased=True,
        inner=720,
    ),
    "gluon_scaled_up_256_4_geglu_roles": partial(gluon_scaled_up, "geglu", biased=True),
    "gluon_scaled_up_256_4_ungated_roles": partial(
        gluon_scaled_up, "silu", saves=True, biased=True, inner=720
    ),
    "gluon_scaled_up_128_6_ungated_roles": partial(
        gluon_scaled_up, "relu2", 128, 6, biased=True, inner=720, dtype=torch.float16
    ),
}
