"""Every experts class behind transformers' experts interface; the table of docs/transformers.md.

python -m tests.integrations.families      prints the table
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from transformers import PreTrainedConfig

from moe_kernels.integrations.transformers import fused_options

_MODELS = Path(transformers.__file__).parent / "models"
_DECORATED = re.compile(r"^@use_experts_implementation.*\n^class (\w+)", re.MULTILINE)
_EXPERTS_LIKE = re.compile(r"^class \w*Experts\(nn\.Module\)", re.MULTILINE)

EXPERTS, HIDDEN, INTERMEDIATE = 5, 12, 10
_SMALL = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "moe_intermediate_size": INTERMEDIATE,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "moe_latent_size": None,
}


class Family(NamedTuple):
    """One experts class of a model family."""

    name: str
    module: str
    experts: str

    def build(self, dtype: torch.dtype) -> nn.Module:
        """Random experts of small size, with the activation of the family's default config."""
        module = importlib.import_module(self.module)
        experts_class = getattr(module, self.experts)
        config = _small_config(module, experts_class)
        torch.manual_seed(0)
        experts = experts_class(config, **_size_argument(experts_class)).to(dtype)
        for value in experts.parameters():
            # large enough for clamped activations to clamp some of their inputs
            nn.init.normal_(value, 0.0, 1.0)
        return experts


@functools.cache
def families() -> tuple[Family, ...]:
    """The classes decorated with ``use_experts_implementation``, in order of family."""
    found = []
    for file in sorted(_MODELS.glob("*/modeling_*.py")):
        module = f"transformers.models.{file.parent.name}.{file.stem}"
        for experts in _DECORATED.findall(file.read_text(encoding="utf-8")):
            found.append(Family(file.parent.name, module, experts))
    return tuple(found)


def outside_the_interface() -> list[str]:
    """Families with an ``...Experts`` class that transformers does not put behind the interface."""
    found = []
    for file in sorted(_MODELS.glob("*/modeling_*.py")):
        source = file.read_text(encoding="utf-8")
        if _EXPERTS_LIKE.search(source) and not _DECORATED.search(source):
            found.append(file.parent.name)
    return found


def _size_argument(experts_class: type[nn.Module]) -> dict[str, int]:
    """Experts of two sizes in one model take the size beside the config."""
    takes_size = "intermediate_size" in inspect.signature(experts_class.__init__).parameters
    return {"intermediate_size": INTERMEDIATE} if takes_size else {}


def _small_config(module: Any, experts_class: type[nn.Module]) -> PreTrainedConfig:
    """The first config of the family that these experts accept, made small."""
    annotated = inspect.signature(experts_class.__init__).parameters["config"].annotation
    candidates = [annotated] if inspect.isclass(annotated) else []
    candidates += [value for value in vars(module).values() if inspect.isclass(value)]
    reasons = []
    for candidate in candidates:
        if not issubclass(candidate, PreTrainedConfig) or candidate is PreTrainedConfig:
            continue
        config = candidate()
        for name, value in _SMALL.items():
            if hasattr(config, name):
                with contextlib.suppress(StrictDataclassFieldValidationError):  # one size a layer
                    setattr(config, name, value)
        config._experts_implementation = "eager"
        try:
            with torch.device("meta"):
                experts_class(config, **_size_argument(experts_class))
        except AttributeError as error:  # a config of another part of the model
            reasons.append(str(error))
            continue
        return config
    raise LookupError(f"no config of {module.__name__} builds {experts_class.__name__}: {reasons}")


def describe(options: dict[str, Any] | None) -> str:
    """The path of a module, as the table says it."""
    if options is None:
        return "rows"
    words = [options["activation"]]
    words += ["interleaved"] if options.get("interleaved") else []
    words += [f"{name} {options[name]}" for name in ("alpha", "limit") if name in options]
    return f"fused: {', '.join(words)}"


def table() -> str:
    """Markdown: family, experts class, path and layout of each."""
    rows = ["| family | experts class | path | weights |", "|---|---|---|---|"]
    for family in families():
        experts = family.build(torch.float32)
        layout = [
            "[E, H, W]" if experts.is_transposed else "[E, W, H]",
            *(["bias"] if experts.has_bias else []),
            *([] if experts.has_gate else ["no gate"]),
        ]
        path = describe(fused_options(experts))
        rows.append(f"| {family.name} | {family.experts} | {path} | {', '.join(layout)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
    print()
    print("Outside the interface:", ", ".join(outside_the_interface()))
