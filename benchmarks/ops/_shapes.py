"""The layers that ops are measured on.

T tokens, H hidden size, I intermediate size, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.registry import Shape

# H, I, E, K of one layer
LAYERS = {
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "qwen3-235b-a22b": (4096, 1536, 128, 8),
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "deepseek-v3": (7168, 2048, 256, 8),
    "kimi-k2": (7168, 2048, 384, 8),
}
CPU_TOKENS = (1, 4, 16, 128, 1024)
DECODE_TOKENS = (1, 4, 16, 64)
TRAINING_TOKENS = (4096, 32768)

# T and H, then (I, E, K): the twelve shapes published for SonicMoE (arXiv:2512.14080)
_FINE_GRAINED = (
    (40960, 768, ((256, 128, 8), (512, 64, 4), (1024, 32, 2))),
    (24576, 1536, ((256, 128, 8), (512, 64, 4), (1024, 32, 2))),
    (32768, 4096, ((256, 256, 16), (512, 128, 8), (1024, 64, 4))),
    (32768, 4096, ((512, 256, 16), (1024, 128, 8), (2048, 64, 4))),
)


def layer(tokens: int, hidden: int, inner: int, experts: int, top_k: int) -> Shape:
    return Shape({"T": tokens, "H": hidden, "I": inner, "E": experts, "K": top_k})


def _set(name: str, tokens: Sequence[int]) -> list[Shape]:
    return [layer(t, *LAYERS[name]) for t in tokens]


def layer_sets() -> dict[str, list[Shape]]:
    """Shapes of whole layers by set name."""
    sets = {
        "cpu": _set("qwen3-30b-a3b", CPU_TOKENS),
        "sonicmoe": [
            layer(tokens, hidden, *rest) for tokens, hidden, wide in _FINE_GRAINED for rest in wide
        ],
    }
    for name in LAYERS:
        sets[name] = _set(name, TRAINING_TOKENS)
        sets[f"{name}-decode"] = _set(name, DECODE_TOKENS)
    return sets
