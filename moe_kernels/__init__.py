"""Mixture-of-Experts kernels: routing, permutation, grouped GEMM and whole expert layers.

Triton on NVIDIA GPUs, C++ on CPUs, plain PyTorch elsewhere, behind one function an op.
"""

from moe_kernels._version import __version__
from moe_kernels.ops import (
    ExpertOrder,
    RoundedTokens,
    RouterOutput,
    chunk_permute,
    dequantize_rows,
    expert_activation,
    fp8_grouped_gemm,
    free_kept_buffers,
    fused_experts,
    fused_moe,
    grouped_gemm,
    grouped_gemm_wgrad,
    permute,
    permute_quantize,
    quantize_rows,
    quantize_weights,
    round_tokens,
    rounded_rows,
    scaled_grouped_gemm,
    sort_by_expert,
    topk_router,
    unpermute,
    use_large_pages,
)

__all__ = [
    "ExpertOrder",
    "RoundedTokens",
    "RouterOutput",
    "__version__",
    "chunk_permute",
    "dequantize_rows",
    "expert_activation",
    "fp8_grouped_gemm",
    "free_kept_buffers",
    "fused_experts",
    "fused_moe",
    "grouped_gemm",
    "grouped_gemm_wgrad",
    "permute",
    "permute_quantize",
    "quantize_rows",
    "quantize_weights",
    "round_tokens",
    "rounded_rows",
    "scaled_grouped_gemm",
    "sort_by_expert",
    "topk_router",
    "unpermute",
    "use_large_pages",
]
