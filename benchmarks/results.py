"""Results as JSON: written, read and checked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from benchmarks.limits import Limits
from benchmarks.registry import DIRECTIONS, DTYPES, Cost
from benchmarks.tables import grouped, vs_best_peer

Row = dict[str, Any]
ROW_KEYS = (
    *("op", "shape", "dtype", "routing", "direction", "provider", "ms", "ms_min", "rounds"),
    *("tflops", "gbs", "floor_ms", "over_floor", "peak_bytes", "error", "void", "note"),
)
# what a reader looks up in each part of a file
HEADER_KEYS: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("op", "date", "threads", "versions", "limits", "providers", "rows"), ()),
    "device": ("type", "name"),
    "commit": ("hash", "dirty"),
}
NOT_RESULTS = (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError, KeyError)
TABLES = ("device", "commit", "versions", "limits", "providers")


def document(
    op: str,
    environment: Mapping[str, Any],
    providers: Mapping[str, str],
    limits: Mapping[str, Limits],
    rows: Sequence[Row],
) -> dict[str, Any]:
    """One JSON document. Rows get their floor here, when the machine's limits are all measured.

    Those that bring one keep it: what limits an op on ranks depends on their number. And each gets
    its ratio to the best peer.
    """
    full = []
    for row in rows:
        if "floor_ms" in row:
            full.append(dict(row))
            continue
        floor = limits[row["dtype"]].floor_ms(Cost(row["flops"], row["bytes"]))
        over = row["ms"] / floor if row["ms"] else None
        full.append({**row, "floor_ms": floor, "over_floor": over})
    for group in grouped(full).values():
        for row in group:
            row["vs_best_peer"] = vs_best_peer(row, group)
    return {
        "op": op,
        **environment,
        "limits": {name: _rates(limit) for name, limit in limits.items()},
        "providers": dict(providers),
        "rows": full,
    }


def _rates(limit: Limits) -> dict[str, Any]:
    rates: dict[str, Any] = {"flops_per_second": limit.flops, "bytes_per_second": limit.bytes}
    if limit.product is not None:
        rates["product_dtype"] = next(name for name in DTYPES if DTYPES[name] == limit.product)
    return rates


def make_way(path: Path) -> None:
    """Make the folder of ``path``, before anything is measured that is to be written there.

    Raises:
        ValueError: nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"--out must be where files can be written: {error}") from error


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Replace ``path`` in one step: an interrupted run leaves the last complete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


def read(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        ValueError: it is not one.
    """
    try:
        value: dict[str, Any] = json.loads(path.read_text())
        missing = [key for key in HEADER_KEYS if key not in value]
        for key in TABLES:
            if not isinstance(value.get(key, {}), dict):
                raise TypeError(f"its {key} is {value[key]!r}")
        for key, names in HEADER_KEYS.items():
            missing += [f"{key}.{name}" for name in names if name not in value.get(key, names)]
        for row in value.get("rows", []):
            missing += [key for key in ROW_KEYS if key not in row]
            if row["direction"] not in DIRECTIONS:
                raise ValueError(f"{path}: direction {row['direction']!r} of {row['provider']}")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except NOT_RESULTS as error:
        raise ValueError(f"{path} is not a results file: {error}") from error
    if missing:
        raise ValueError(
            f"{path} is not a results file: it lacks {', '.join(sorted(set(missing)))}"
        )
    return value
