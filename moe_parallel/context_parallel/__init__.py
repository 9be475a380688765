"""Context parallelism: attention over sequences that several ranks hold parts of."""

from moe_parallel.context_parallel.attention import ContextParallelAttention
from moe_parallel.context_parallel.sharding import (
    sequence_positions,
    shard_batch,
    shard_sequence,
    unshard_sequence,
)

__all__ = [
    "ContextParallelAttention",
    "sequence_positions",
    "shard_batch",
    "shard_sequence",
    "unshard_sequence",
]
