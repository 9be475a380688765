"""The experts of one layer with both products in float8, scaled by blocks.

Weights and inputs are those of ``fused_experts``, and are rounded in every call. The truth rounds
nothing: an error is that of float8, for every provider alike.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.accuracy import FLOAT8_LAYER
from benchmarks.ops.fused_experts import fused_experts

fused_experts_fp8 = replace(
    fused_experts,
    name="fused_experts_fp8",
    defaults={"cpu": ("cpu",), "cuda": ("qwen3-30b-a3b", "deepseek-v3")},
    dtypes={"cpu": ("bf16",), "cuda": ("bf16",)},
    bound=FLOAT8_LAYER,
)
