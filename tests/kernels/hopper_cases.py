"""Products in Gluon that ``compile_cases.py`` compiles, and what such kernels are cut into."""

from __future__ import annotations

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
