"""Public functions: schema, checks, fakes, autograd, and the kernels behind them."""

from moe_kernels.ops import fused_experts_fp8 as _  # noqa: F401  registers its op
from moe_kernels.ops.chunk_permute import chunk_permute
from moe_kernels.ops.expert_activation import expert_activation
from moe_kernels.ops.fused_experts import fused_experts, fused_moe
from moe_kernels.ops.fused_experts_quantized import fused_experts_quantized
from moe_kernels.ops.grouped_gemm import grouped_gemm, grouped_gemm_wgrad
from moe_kernels.ops.kept_buffers import free_kept_buffers
from moe_kernels.ops.large_pages import use_large_pages
from moe_kernels.ops.permute import permute
from moe_kernels.ops.quantize import (
    dequantize_rows,
    permute_quantize,
    quantize_rows,
    quantize_weights,
)
from moe_kernels.ops.quantized_experts import QuantizedExperts, experts_from_mxfp4, quantize_experts
from moe_kernels.ops.round_tokens import RoundedTokens, round_tokens, rounded_rows
from moe_kernels.ops.scaled_grouped_gemm import fp8_grouped_gemm, scaled_grouped_gemm
from moe_kernels.ops.sort_by_expert import ExpertOrder, sort_by_expert
from moe_kernels.ops.topk_router import RouterOutput, topk_router
from moe_kernels.ops.unpermute import unpermute

__all__ = [
    "ExpertOrder",
    "QuantizedExperts",
    "RoundedTokens",
    "RouterOutput",
    "chunk_permute",
    "dequantize_rows",
    "expert_activation",
    "experts_from_mxfp4",
    "fp8_grouped_gemm",
    "free_kept_buffers",
    "fused_experts",
    "fused_experts_quantized",
    "fused_moe",
    "grouped_gemm",
    "grouped_gemm_wgrad",
    "permute",
    "permute_quantize",
    "quantize_experts",
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
