"""Checkpoints of sharded models that any other sharding can load."""

from moe_parallel.checkpoint.agreement import CheckpointError
from moe_parallel.checkpoint.folders import checkpoints, latest_checkpoint
from moe_parallel.checkpoint.loading import CheckpointInfo, load_checkpoint, read_checkpoint
from moe_parallel.checkpoint.saving import save_checkpoint

__all__ = [
    "CheckpointError",
    "CheckpointInfo",
    "checkpoints",
    "latest_checkpoint",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
]
