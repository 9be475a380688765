"""Whether an implementation computed the right thing.

Two checks. Some rows of every result against float64: the relative Frobenius error may be at most
1.5 times that of plain PyTorch in the same dtype, which a sample of few values may by luck hide.
And the norm of every row against that of plain PyTorch, so that no row is missing or garbage. Where
plain PyTorch could not compute the case (out of memory, say), a fixed bound on the error is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.registry import Truth

MAX_RATIO = 1.5
FLOAT32_ROUNDING = 1e-6  # sums in another order differ by this much: never called wrong
# without plain PyTorch: several times what it has on layers of unit scale
ABSOLUTE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-3}  # TF32 at the worst
# likewise of what is rounded to float8 on the way: a rounding is wrong by 0.026
FLOAT8_ROUNDING, FLOAT8_PRODUCT, FLOAT8_LAYER = 0.04, 0.08, 0.2
NORM_TOLERANCE = 0.05  # relative; bf16 chains differ by less than 0.01
ERRORS_OF_A_ROW = 4  # of few values, of which each is wrong by about the error of all: float8's 6 %


def spread(values: int) -> float:
    """How far chance takes the ratio of two errors that are estimated from so many values each.

    Estimates scatter by (2 * values) ** -0.5 of what they estimate, their ratio by values ** -0.5.
    Four times that is all but never seen.
    """
    return 4 / values**0.5


@dataclass
class Accuracy:
    """Of one implementation on one case.

    Attributes:
        errors: relative Frobenius error against float64, by result.
        spreads: of those errors, by result.
        roundings: relative, the largest that a number of the result's dtype has, by result.
        norms: of every row (entry of dim 0) of every result.
        wrong: what is wrong beyond rounding, or "".
    """

    errors: dict[str, float] = field(default_factory=dict)
    spreads: dict[str, float] = field(default_factory=dict)
    roundings: dict[str, float] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    wrong: str = ""

    @property
    def error(self) -> float:
        return max(self.errors.values(), default=0.0)

    def verdict(self, yardstick: Accuracy | None, bound: float = math.inf) -> str:
        """Why the result must not be counted, or "". ``bound`` holds without a yardstick."""
        if self.wrong:
            return self.wrong
        if yardstick is None or not yardstick.errors:
            for name, error in self.errors.items():
                exact = self.roundings.get(name) == 0  # integers, which are right or wrong
                allowed = 0.0 if exact else bound
                if not error <= allowed:
                    return f"error of {name} is above {allowed:.0e}"
            return ""
        for name, error in self.errors.items():
            theirs = yardstick.errors[name]
            chance = yardstick.spreads[name] * max(theirs, yardstick.roundings[name])
            allowed = max(MAX_RATIO * (theirs + chance), FLOAT32_ROUNDING)
            if not error <= allowed:
                return f"error of {name} {error:.2e} is above {allowed:.2e}"
            own, other = self.norms[name], yardstick.norms[name]
            if len(own) != len(other):
                return f"{name} has {len(own)} rows instead of {len(other)}"
            slack = (NORM_TOLERANCE + ERRORS_OF_A_ROW * theirs) * (other + other.mean())
            bad = ((own - other).abs() > slack).nonzero().flatten()
            if len(bad):
                return f"{len(bad)} rows of {name} are wrong, first {int(bad[0])}"
        return ""


def judge(results: Mapping[str, Tensor], truth: Mapping[str, Truth]) -> Accuracy:
    """Compare results with the truth."""
    accuracy = Accuracy()
    for name, right in truth.items():
        found = results[name].detach()
        narrow = found.element_size() == 1 or not found.is_floating_point()
        norms = _row_norms(found.double() if narrow else found)
        if not bool(norms.isfinite().all()):
            accuracy.wrong = f"{name} is not finite"
        rows = found[right.rows].double()
        size = float(right.values.norm())
        difference = float((rows - right.values).norm())
        accuracy.errors[name] = difference / size if size else difference
        accuracy.spreads[name] = spread(max(1, right.independent or right.values.numel()))
        exact = not found.is_floating_point()
        accuracy.roundings[name] = 0.0 if exact else torch.finfo(found.dtype).eps / 2
        accuracy.norms[name] = norms
    return accuracy


def _row_norms(values: Tensor) -> Tensor:
    if values.dim() == 1:
        return values.abs().double()
    inner = tuple(range(1, values.dim()))
    wide = torch.promote_types(values.dtype, torch.float32)
    return torch.linalg.vector_norm(values, dim=inner, dtype=wide).double()
