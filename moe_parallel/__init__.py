"""MoE layers for one device or many: expert, data, context and pipeline parallelism."""

from moe_parallel.config import BackendConfig, MoEConfig
from moe_parallel.dispatch import AllToAllDispatcher
from moe_parallel.experts import GroupedExperts
from moe_parallel.layers import MLP, FakeBalancedGate, Gate, MoE
from moe_parallel.mesh import build_meshes, parallel_axis_names
from moe_parallel.parallelizer import ExpertParallel, apply_ep, parallelize_model

__all__ = [
    "MLP",
    "AllToAllDispatcher",
    "BackendConfig",
    "ExpertParallel",
    "FakeBalancedGate",
    "Gate",
    "GroupedExperts",
    "MoE",
    "MoEConfig",
    "apply_ep",
    "build_meshes",
    "parallel_axis_names",
    "parallelize_model",
]
