"""Going on with an interrupted run: what its file has, and what ended the process.

While a provider is tried, a file beside the results names it. One that takes the process with it
(a segmentation fault, a lost device, a hang that had to be killed) leaves that file behind; the
next run says so on the provider's rows and does not try it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.limits import Limits
from benchmarks.registry import DTYPES
from benchmarks.runner import CaseKey, Done

Row = dict[str, Any]


def marker(path: Path) -> Path:
    return path.with_suffix(".trying")


def watch(path: Path, case: CaseKey, provider: str | None) -> None:
    """Leave word of what is tried; to be called before, and with None after."""
    if provider is None:
        marker(path).unlink(missing_ok=True)
        return
    results.write(marker(path), {"case": list(case), "provider": provider})


@dataclass
class Earlier:
    """What an earlier run left.

    Attributes:
        rows, limits: of its file.
        ranks: how those of an op on ranks were placed, by their number.
        crashed: by provider why it is not tried again.
    """

    rows: list[Row] = field(default_factory=list)
    limits: dict[str, Limits] = field(default_factory=dict)
    ranks: dict[str, Any] = field(default_factory=dict)
    crashed: dict[str, str] = field(default_factory=dict)

    @property
    def done(self) -> Done:
        return frozenset(
            ((row["shape"], row["dtype"], row["routing"]), row["direction"]) for row in self.rows
        )


def earlier(path: Path, described: Mapping[str, Any]) -> Earlier:
    """What the run that wrote ``path`` left, if it was of this commit, device and packages, and had
    these threads and settings.

    Another's file is moved aside, to one that ends in ".old".
    """
    found = Earlier()
    if path.exists():
        document = results.read(path)
        if not _same(document, described):
            path.replace(path.with_suffix(".old"))
            marker(path).unlink(missing_ok=True)
            return found
        found.rows, found.ranks = document["rows"], document.get("ranks", {})
        found.limits = {
            dtype: Limits(
                rates["flops_per_second"],
                rates["bytes_per_second"],
                DTYPES.get(rates.get("product_dtype")),
            )
            for dtype, rates in document["limits"].items()
        }
        found.crashed = dict(document.get("crashed", {}))
    if marker(path).exists():
        left = json.loads(marker(path).read_text())
        case = " ".join(left["case"])
        found.crashed[left["provider"]] = f"does not run: it ended the process at {case}"
        marker(path).unlink()
    return found


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether rows of both may stand in one file, whose head says all this once."""
    ranks = [{str(n): of for n, of in each.get("ranks", {}).items()} for each in (one, other)]
    both = ranks[0].keys() & ranks[1].keys()
    return _identity(one) == _identity(other) and all(ranks[0][n] == ranks[1][n] for n in both)


def _identity(document: Mapping[str, Any]) -> tuple[Any, ...]:
    return (
        document["commit"],
        document["versions"],
        document["device"]["name"],
        document.get("environment", {}),
        document.get("large_pages", False),
        None if "ranks" in document else document["threads"],
    )
