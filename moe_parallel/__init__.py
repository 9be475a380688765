"""MoE layers for one device or many: expert, data, context and pipeline parallelism."""

from moe_parallel.config import BackendConfig, MoEConfig
from moe_parallel.experts import GroupedExperts
from moe_parallel.layers import MLP, FakeBalancedGate, Gate, MoE

__all__ = [
    "MLP",
    "BackendConfig",
    "FakeBalancedGate",
    "Gate",
    "GroupedExperts",
    "MoE",
    "MoEConfig",
]
