"""Every source of implementations. A new one is a file here and its name in PROVIDERS."""

from benchmarks.providers.compiled_models import compiled_models, our_compiled_model
from benchmarks.providers.copy_limit import copy_limit
from benchmarks.providers.dense_limit import dense_limit
from benchmarks.providers.dispatch import gloo_rows, torch_all_to_all, transports
from benchmarks.providers.float8_chain import torch_scaled_mm
from benchmarks.providers.moe_kernels import moe_kernels, moe_kernels_graph
from benchmarks.providers.moe_overlap import in_turn, overlapping
from benchmarks.providers.peers import PEERS
from benchmarks.providers.quantized import (
    moe_kernels_fp8,
    moe_kernels_mxfp4,
    moe_kernels_unquantized,
    torch_packed,
)
from benchmarks.providers.roles import roles
from benchmarks.providers.torch_chain import torch_chain
from benchmarks.providers.transformers import (
    transformers_batched_mm,
    transformers_deepgemm,
    transformers_eager,
    transformers_grouped_mm,
    transformers_sonicmoe,
)
from benchmarks.registry import Provider

OURS = moe_kernels.name
# all that this package implements, and would rather be compared with others
OWN = (
    OURS,
    moe_kernels_fp8.name,
    moe_kernels_mxfp4.name,
    moe_kernels_graph.name,
    our_compiled_model.name,
    *(transport.name for transport in transports),
    *(provider.name for provider in roles),
    *(provider.name for provider in overlapping),
)
DENSE = dense_limit.name
COPY = copy_limit.name
MACHINE = (DENSE, COPY)  # what the machine allows
LIMITS = (*MACHINE, gloo_rows.name)  # what computes nothing that could be wrong

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        moe_kernels,
        moe_kernels_graph,
        torch_chain,
        transformers_eager,
        transformers_grouped_mm,
        transformers_batched_mm,
        transformers_sonicmoe,
        transformers_deepgemm,
        *PEERS,
        torch_scaled_mm,
        our_compiled_model,
        *compiled_models,
        moe_kernels_fp8,
        moe_kernels_mxfp4,
        moe_kernels_unquantized,
        torch_packed,
        *roles,
        *transports,
        torch_all_to_all,
        gloo_rows,
        *overlapping,
        *in_turn,
        dense_limit,
        copy_limit,
    )
}
