"""Every op that can be measured. A new one is a file here and its name in OPS."""

from benchmarks.ops.chunk_permute import chunk_permute
from benchmarks.ops.dispatch import dispatch
from benchmarks.ops.expert_activation import expert_activation
from benchmarks.ops.fused_experts import fused_experts
from benchmarks.ops.fused_experts_fp8 import fused_experts_fp8
from benchmarks.ops.fused_experts_quantized import fused_experts_quantized
from benchmarks.ops.grouped_gemm import grouped_gemm
from benchmarks.ops.model_decode import model_decode
from benchmarks.ops.moe_layer import moe_layer
from benchmarks.ops.moe_overlap import moe_overlap
from benchmarks.ops.permute import permute
from benchmarks.ops.quantize import permute_quantize, quantize_rows, quantize_weights
from benchmarks.ops.round_tokens import round_tokens
from benchmarks.ops.scaled_grouped_gemm import fp8_grouped_gemm, scaled_grouped_gemm
from benchmarks.ops.sort_by_expert import sort_by_expert
from benchmarks.ops.topk_router import topk_router
from benchmarks.ops.unpermute import unpermute
from benchmarks.registry import Op

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        fused_experts,
        fused_experts_fp8,
        fused_experts_quantized,
        grouped_gemm,
        expert_activation,
        permute,
        unpermute,
        chunk_permute,
        sort_by_expert,
        topk_router,
        quantize_rows,
        permute_quantize,
        quantize_weights,
        scaled_grouped_gemm,
        fp8_grouped_gemm,
        moe_layer,
        model_decode,
        round_tokens,
        dispatch,
        moe_overlap,
    )
}
