"""Every source of implementations. A new one is a file here and its name in PROVIDERS."""

from benchmarks.providers.copy_limit import copy_limit
from benchmarks.providers.dense_limit import dense_limit
from benchmarks.providers.dispatch import gloo_rows, torch_all_to_all, transports
from benchmarks.providers.moe_kernels import moe_kernels
from benchmarks.providers.quantized import (
    moe_kernels_fp8,
    moe_kernels_mxfp4,
    moe_kernels_unquantized,
    torch_packed,
)
from benchmarks.providers.torch_chain import torch_chain
from benchmarks.providers.transformers import transformers_batched_mm as batched_mm
from benchmarks.providers.transformers import transformers_eager as eager
from benchmarks.providers.transformers import transformers_grouped_mm as grouped_mm
from benchmarks.registry import Provider

OURS = moe_kernels.name
# all that this package implements, and would rather be compared with others
OWN = (
    OURS,
    moe_kernels_fp8.name,
    moe_kernels_mxfp4.name,
    *(transport.name for transport in transports),
)
YARDSTICK = torch_chain.name  # whose error against float64 the others' is held to
MACHINE = (dense_limit.name, copy_limit.name)  # what the machine allows
LIMITS = (*MACHINE, gloo_rows.name)  # what computes nothing that could be wrong

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        moe_kernels,
        torch_chain,
        eager,
        grouped_mm,
        batched_mm,
        moe_kernels_fp8,
        moe_kernels_mxfp4,
        moe_kernels_unquantized,
        torch_packed,
        *transports,
        torch_all_to_all,
        gloo_rows,
        dense_limit,
        copy_limit,
    )
}
