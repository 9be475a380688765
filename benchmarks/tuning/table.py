"""Tables of configurations: new entries into a file, and what they say of the default."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.tables import number
from benchmarks.tuning.search import Found
from moe_kernels.triton._config_tables import FORMAT, ROWS, parse_entry, read_table

PROMISE = 1.15  # the default takes at most this many times as long as the best


def load(path: Path, device: str, kernels: Collection[str]) -> dict[str, Any]:
    """The table at ``path``, or an empty one.

    Raises:
        ValueError: it is not valid, or of another class of devices.
    """
    if not path.exists():
        return {"format": FORMAT, "device": device, "entries": []}
    document = read_table(path, kernels)
    if document["device"] != device:
        raise ValueError(
            f"{path} is the table of {document['device']}, and this device is {device}: name "
            "another file with --out"
        )
    return document


def merge(
    document: dict[str, Any], found: Found, known_from: dict[str, Any], kernels: Collection[str]
) -> dict[str, Any]:
    """The document with what was found in place of an earlier entry for its bucket, in order."""
    new = {
        **dataclasses.asdict(found.bucket),
        "config": dataclasses.asdict(found.config),
        "measured": {
            "ms": found.ms,
            "default_ms": found.default_ms,
            "default_over_best": round(found.default_over_best, 4),
            "tried": found.tried,
            **known_from,
        },
    }
    kept = [
        entry
        for entry in document["entries"]
        if parse_entry(entry, kernels, "table")[0] != found.bucket
    ]
    return {**document, "entries": sorted([*kept, new], key=_order)}


def _order(entry: dict[str, Any]) -> tuple[str, str, int, str]:
    rows = entry["rows"] or ROWS[-1] + 1
    return entry["kernel"], entry["precision"], rows, entry["inner"]


def write(path: Path, document: dict[str, Any]) -> None:
    results.write(path, document)


def summary(entries: Sequence[dict[str, Any]]) -> str:
    """How far the default is from the best in every bucket, as markdown."""
    lines = [
        "| kernel | precision | rows an expert | inner | default ms | best ms | default / best "
        "| best |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    ratios = []
    for entry in entries:
        measured = entry.get("measured", {})
        if "default_over_best" not in measured:
            continue
        ratio = measured["default_over_best"]
        ratios.append(ratio)
        cut = entry["config"]
        tile = f"{cut['block_m']}x{cut['block_n']}x{cut['block_k']}"
        rest = f"{cut['warps']} warps, {cut['stages']} stages, group {cut['group_m']}"
        if cut.get("warp_specialize", "no") != "no":
            rest += f", roles by {cut['warp_specialize']}"
        cells = [
            entry["kernel"],
            entry["precision"],
            f"<= {entry['rows']}" if entry["rows"] else f"> {ROWS[-1]}",
            entry["inner"],
            " ".join(number(ms) for ms in measured["default_ms"].values()),
            " ".join(number(ms) for ms in measured["ms"].values()),
            f"{ratio:.2f}" + " ABOVE 1.15" * (ratio > PROMISE),
            f"{tile}, {rest}, {cut['programs']} a multiprocessor",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    within = sum(ratio <= PROMISE for ratio in ratios)
    text = f"within 15 percent of the best in {within} of {len(ratios)} buckets"
    lines += ["", f"The default is {text}."]
    return "\n".join(lines)
