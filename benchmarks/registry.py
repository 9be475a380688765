"""What a benchmark is made of: an op, a shape, a case, and providers of implementations.

An :class:`Op` says what is computed, on which shapes, what it costs at least and what the right
answer is. A :class:`Provider` builds one implementation of it. Neither knows of clocks or files.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIRECTIONS = ("forward", "backward", "forward+backward")
FORWARD_ONLY = {"cpu": ("forward",), "cuda": ("forward",)}  # of ops without gradients

Inputs = Mapping[str, Tensor]
Output = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Shape:
    """Sizes by their letter, in the op's order: ``Shape({"T": 16, "H": 2048})`` is "T16 H2048".

    ``variant`` names what else the op computes differently; "" is the usual.
    """

    sizes: Mapping[str, int]
    variant: str = ""

    def __str__(self) -> str:
        sizes = " ".join(f"{letter}{size}" for letter, size in self.sizes.items())
        return f"{sizes} {self.variant}".rstrip()

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter]

    def replace(self, text: str, variants: Sequence[str] = ()) -> Shape:
        """This shape with the sizes that ``text`` names ("T=4,E=8", "T4 E8"), the others kept.

        A word of ``variants`` is the variant.
        """
        words = [word for word in re.split(r"[\s,]+", text.strip()) if word]
        sizes, variant = dict(self.sizes), self.variant
        for word in words:
            if word in variants:
                variant = word
                continue
            match = re.fullmatch(r"([A-Za-z]+)=?(\d+)", word)
            if not match or match[1] not in sizes:
                raise ValueError(
                    f"shape must be sizes by letter, of {', '.join(sizes)} (T=16,H=2048); "
                    f"got {word!r} in {text!r}"
                )
            sizes[match[1]] = int(match[2])
        if min(sizes.values()) < 1:
            raise ValueError(f"shape must have sizes of at least 1; got {text!r}")
        return Shape(sizes, variant)


@dataclass(frozen=True)
class Case:
    """One op on one shape, ready to be computed.

    Attributes:
        weights: tensors that every call shares; leaves, in checkpoint layout.
        inputs: sets of arguments that calls rotate through, so that no cache holds the last one's.
            "grad" is the gradient of the (first) output.
        differentiable: the names in weights and inputs that backward yields gradients of.
        check: further inputs of the call whose results are checked; it is not the one timed.
        group: the process group of the ranks that compute the case together, if several do.
        large_pages: the weights lie on large pages of memory; those made of them should too.
        product: the dtype of dense products that are its limit; None where it is the case's own.
    """

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    inputs: Sequence[Inputs]
    weights: Inputs = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()
    check: Inputs = field(default_factory=dict)
    group: Any = None
    large_pages: bool = False
    product: torch.dtype | None = None

    def leaves(self, index: int) -> dict[str, Tensor]:
        """The differentiable tensors of input set ``index``."""
        both = {**self.weights, **self.inputs[index]}
        return {name: both[name] for name in self.differentiable}


@dataclass(frozen=True)
class Cost:
    """What any implementation must do at the least."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Truth:
    """Right values, float64, of some rows (entries of dim 0) of an output or a gradient.

    ``independent`` is how many of the values have an error of their own; none means all of them.
    """

    rows: Tensor
    values: Tensor
    independent: int | None = None


def autograd_backward(outputs: Output, inputs: Inputs) -> None:
    y = outputs if isinstance(outputs, Tensor) else outputs[0]
    torch.autograd.backward(y, inputs["grad"])


@dataclass(frozen=True)
class Implementation:
    """One provider's way to compute one case.

    Attributes:
        run: from one set of inputs to the outputs.
        backward: from the outputs and the inputs; by default autograd's, of the first output.
        own_weights: for weights that it keeps in another layout: its leaves, and the function that
            brings the leaves' gradients into the layout of the case.
        during: entered before calls and left after them, neither of which is timed. It has what no
            other implementation should have to do without meanwhile: memory.
    """

    run: Callable[[Inputs], Output]
    backward: Callable[[Output, Inputs], None] = autograd_backward
    own_weights: Mapping[str, tuple[Sequence[Tensor], Callable[..., Tensor]]] = field(
        default_factory=dict
    )
    during: Callable[[], AbstractContextManager[object]] = nullcontext


Builder = Callable[[Case], Implementation]


MakeCase = Callable[[Shape, torch.dtype, torch.device, str, int], Case]


@dataclass(frozen=True)
class Op:
    """An operation that can be measured.

    Attributes:
        name: as in the package.
        outputs: names of the results, in order; only the first is differentiated.
        shape_sets: lists of shapes by name.
        defaults: for each device type the names of the sets to run if none is asked for.
        make_case: from shape, dtype, device, routing and seed to random inputs.
        cost: the least work of "forward" and of "backward", averaged over the case's inputs.
        truth: results (and ``gradients``) for an input set in float64, of a subset of rows.
        dtypes, directions: that it is measured in by default, for each device type.
        routings: that a shape is measured with if none is asked for.
        routed: whether inputs depend on the routing; without, it is always the op's own.
        yardstick: an implementation whose error the others' is held to; None for the provider
            that has this part.
        plain: the provider whose error against float64 the others' is held to.
        bound: on the error where that provider has none; None for the dtype's.
        requires: modules that must be importable to make a case.
        on_ranks: several processes compute it together, as many as the shape's "P".
        details: what else the rows of a case say.
        variants: of shapes.
    """

    name: str
    outputs: tuple[str, ...]
    shape_sets: Mapping[str, Sequence[Shape]]
    defaults: Mapping[str, Sequence[str]]
    make_case: MakeCase
    cost: Callable[[Case], Mapping[str, Cost]]
    truth: Callable[[Case, int, bool], Mapping[str, Truth]]
    dtypes: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"cpu": ("bf16", "fp32"), "cuda": ("bf16",)}
    )
    directions: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "cpu": ("forward", "forward+backward"),
            "cuda": ("forward", "backward"),
        }
    )
    routings: Callable[[Shape], tuple[str, ...]] = lambda shape: ("uniform",)
    routed: bool = True
    yardstick: Builder | None = None
    plain: str = "torch"
    bound: float | None = None
    requires: tuple[str, ...] = ()
    on_ranks: bool = False
    details: Callable[[Case], Mapping[str, Any]] = lambda case: {}
    variants: tuple[str, ...] = ()

    def shapes(self, device: str, wanted: Sequence[str] = ()) -> list[Shape]:
        """Shapes named by set, or by sizes (those missing come from the first default set)."""
        default_sets = [self.shape_sets[name] for name in self.defaults[device]]
        if not wanted:
            return [shape for shapes in default_sets for shape in shapes]
        found: list[Shape] = []
        for text in wanted:
            known = self.shape_sets.get(text)
            found += known if known else [default_sets[0][0].replace(text, self.variants)]
        return found


class Unsupported(Exception):
    """Raised for a case that a provider cannot compute; the message says why."""


@dataclass(frozen=True)
class Provider:
    """One source of implementations.

    Attributes:
        name: in tables and results.
        builders: by op.
        bound: on the error where that provider has none; None for the dtype's.
        requires: modules that must be importable.
        devices: device types it runs on.
        limit: it stands for a limit of the machine and computes nothing that could be wrong.
        by_name: it runs only if it is asked for.
    """

    name: str
    builders: Mapping[str, Builder]
    requires: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    limit: bool = False
    by_name: bool = False

    def unavailable(self, device: str) -> str:
        """Why it cannot run on ``device`` here, or ""."""
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        for module in self.requires:
            try:
                importlib.import_module(module)
            except Exception as error:  # an installed but broken package must not end the run
                return f"{module} does not import ({type(error).__name__}: {error})".split("\n")[0]
        return ""
