"""The definition of every op: plain PyTorch, on any device, in any float dtype up to float64.

Each file holds the definition itself, written to be read and differentiated by autograd, and
beneath it, with the op's schema, what the dispatcher runs where there is no kernel.
"""

from moe_kernels.reference.chunk_permute import chunk_permute
from moe_kernels.reference.expert_activation import ACTIVATIONS, expert_activation, is_gated
from moe_kernels.reference.fused_experts import fused_experts
from moe_kernels.reference.fused_experts_fp8 import fused_experts_fp8
from moe_kernels.reference.fused_experts_quantized import fused_experts_quantized
from moe_kernels.reference.grouped_gemm import grouped_gemm
from moe_kernels.reference.permute import permute
from moe_kernels.reference.quantize import (
    dequantize_rows,
    dequantize_weights,
    permute_quantize,
    quantize_rows,
    quantize_weights,
)
from moe_kernels.reference.round_tokens import round_tokens
from moe_kernels.reference.scaled_grouped_gemm import fp8_grouped_gemm, scaled_grouped_gemm
from moe_kernels.reference.sort_by_expert import sort_by_expert
from moe_kernels.reference.topk_router import topk_router
from moe_kernels.reference.unpermute import unpermute

__all__ = [
    "ACTIVATIONS",
    "chunk_permute",
    "dequantize_rows",
    "dequantize_weights",
    "expert_activation",
    "fp8_grouped_gemm",
    "fused_experts",
    "fused_experts_fp8",
    "fused_experts_quantized",
    "grouped_gemm",
    "is_gated",
    "permute",
    "permute_quantize",
    "quantize_rows",
    "quantize_weights",
    "round_tokens",
    "scaled_grouped_gemm",
    "sort_by_expert",
    "topk_router",
    "unpermute",
]
