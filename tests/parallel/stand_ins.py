"""Stand-ins for models and meshes: all that the parallelizer may ask of those of a framework."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class Container:
    """All a model of another framework need offer for its blocks."""

    def __init__(self, **blocks: Any) -> None:
        self.blocks = blocks

    def children(self) -> Any:
        return iter(self.blocks.values())

    def named_children(self) -> Any:
        return iter(self.blocks.items())

    def register_module(self, name: str, module: Any) -> None:
        self.blocks[name] = module


class StandInMoE:
    def __init__(self) -> None:
        self.experts = SimpleNamespace(parameters=lambda: ["up", "down"])


class StandInMesh:
    def __init__(self, sizes: dict[Any, int]) -> None:
        self.sizes = sizes
        self.axis: Any = None

    def __getitem__(self, axis: Any) -> StandInMesh:
        mesh = StandInMesh(self.sizes)
        mesh.axis = axis
        self.sizes[axis]  # a KeyError for an axis that is not there
        return mesh

    def size(self) -> int:
        return self.sizes[self.axis]


def make_model(**attributes: Any) -> Any:
    dense, sparse = SimpleNamespace(mlp=object()), SimpleNamespace(mlp=StandInMoE())
    inner = SimpleNamespace(
        layers=Container(a=dense, b=sparse),
        embed_tokens=SimpleNamespace(weight=object()),
        moe_config=SimpleNamespace(n_routed_experts=8),
    )
    settings = {"lm_head": SimpleNamespace(weight=object()), **attributes}
    return SimpleNamespace(model=inner, **settings)
