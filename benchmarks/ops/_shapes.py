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
# the same, of layers with biases, interleaved gates and ups, and the activation swigluoai
OAI = "swigluoai"
OAI_LAYERS = {"gpt-oss-120b": (2880, 2880, 128, 4)}
ALL_LAYERS = LAYERS | OAI_LAYERS
CPU_TOKENS = (1, 4, 16, 128, 1024)
DECODE_TOKENS = (1, 2, 4, 8, 16, 32, 64)
TRAINING_TOKENS = (4096, 32768)

# T and H, then (I, E, K): the twelve shapes published for SonicMoE (arXiv:2512.14080)
_FINE_GRAINED = (
    (40960, 768, ((256, 128, 8), (512, 64, 4), (1024, 32, 2))),
    (24576, 1536, ((256, 128, 8), (512, 64, 4), (1024, 32, 2))),
    (32768, 4096, ((256, 256, 16), (512, 128, 8), (1024, 64, 4))),
    (32768, 4096, ((512, 256, 16), (1024, 128, 8), (2048, 64, 4))),
)


def layer(
    tokens: int, hidden: int, inner: int, experts: int, top_k: int, variant: str = ""
) -> Shape:
    return Shape({"T": tokens, "H": hidden, "I": inner, "E": experts, "K": top_k}, variant)


def _set(name: str, tokens: Sequence[int]) -> list[Shape]:
    if name in OAI_LAYERS:
        return [layer(t, *OAI_LAYERS[name], OAI) for t in tokens]
    return [layer(t, *LAYERS[name]) for t in tokens]


def _scaling() -> dict[str, list[Shape]]:
    """One size grows, the others stay: tokens, experts at equal work, intermediate size."""
    hidden, inner, experts, top_k = LAYERS["qwen3-30b-a3b"]
    return {
        "scaling-T": [
            layer(t, hidden, inner, experts, top_k) for t in (64, 256, 1024, 4096, 16384, 65536)
        ],
        "scaling-E": [
            layer(16384, hidden, inner, e, top_k) for e in (8, 16, 32, 64, 128, 256, 512)
        ],
        "scaling-I": [
            layer(16384, hidden, i, 64, top_k) for i in (128, 256, 512, 1024, 2048, 4096)
        ],
    }


def layer_sets() -> dict[str, list[Shape]]:
    """Shapes of whole layers by set name."""
    sets = {
        "cpu": _set("qwen3-30b-a3b", CPU_TOKENS),
        # of the kinds of Mixtral and gpt-oss, small enough for two cores
        "cpu-few-experts": [layer(t, 1024, 3584, 8, 2) for t in CPU_TOKENS],
        "cpu-swigluoai": [layer(t, 2880, 2880, 32, 4, OAI) for t in CPU_TOKENS],
        "cpu-prefill": [
            *_set("qwen3-30b-a3b", (4096,)),
            layer(4096, 1024, 3584, 8, 2),
            layer(4096, 2880, 2880, 32, 4, OAI),
        ],
        "sonicmoe": [
            layer(tokens, hidden, *rest) for tokens, hidden, wide in _FINE_GRAINED for rest in wide
        ],
    }
    sets["sonicmoe-wide"] = [sets["sonicmoe"][index] for index in (8, 11)]
    sets["decode"] = [layer(t, *LAYERS["qwen3-30b-a3b"]) for t in (1, 16, 64)]
    for name in (*LAYERS, *OAI_LAYERS):
        sets[name] = _set(name, TRAINING_TOKENS)
        sets[f"{name}-decode"] = _set(name, DECODE_TOKENS)
    return sets | _scaling()


def tuning_set() -> list[Shape]:
    """A shape or more for each bucket of the tables of configurations, small to large."""
    wide, large = LAYERS["qwen3-30b-a3b"], LAYERS["qwen3-235b-a22b"]
    narrow, slim = (1536, 512, 128, 8), (1536, 256, 128, 8)
    few = [layer(t, *sizes) for t in (8, 64, 256, 1024) for sizes in (wide, narrow, slim)]
    many = [layer(t, *sizes) for t in (4096, 16384, 32768) for sizes in (wide, narrow, slim)]
    return [*few, *many, *(layer(t, *large) for t in (4096, 16384))]
