"""Mixture-of-Experts kernels: routing, permutation, grouped GEMM and whole expert layers.

Triton on NVIDIA GPUs, C++ on CPUs, plain PyTorch elsewhere, behind one function an op.
"""

from moe_kernels._version import __version__
from moe_kernels.ops import (
    ExpertOrder,
    QuantizedExperts,
    RouterOutput,
    chunk_permute,
    expert_activation,
    experts_from_mxfp4,
    fused_experts,
    fused_experts_quantized,
    fused_moe,
    grouped_gemm,
    grouped_gemm_wgrad,
    permute,
    quantize_experts,
    sort_by_expert,
    topk_router,
    unpermute,
    use_large_pages,
)

__all__ = [
    "ExpertOrder",
    "QuantizedExperts",
    "RouterOutput",
    "__version__",
    "chunk_permute",
    "expert_activation",
    "experts_from_mxfp4",
    "fused_experts",
    "fused_experts_quantized",
    "fused_moe",
    "grouped_gemm",
    "grouped_gemm_wgrad",
    "permute",
    "quantize_experts",
    "sort_by_expert",
    "topk_router",
    "unpermute",
    "use_large_pages",
]
