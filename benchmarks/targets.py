"""What the package is to reach on an H100 or H200, and how far the rows of a GPU are from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.providers import COPY, DENSE, OURS
from benchmarks.tables import grouped, number

Row = dict[str, Any]
# TFLOP/s forward and backward of SonicMoE on an H100 in bf16 (arXiv:2512.14080), by T, H, I, E, K
PUBLISHED = {
    (40960, 768, 256, 128, 8): (336, 364),
    (40960, 768, 512, 64, 4): (398, 397),
    (40960, 768, 1024, 32, 2): (404, 434),
    (24576, 1536, 256, 128, 8): (364, 404),
    (24576, 1536, 512, 64, 4): (432, 439),
    (24576, 1536, 1024, 32, 2): (464, 466),
    (32768, 4096, 256, 256, 16): (428, 460),
    (32768, 4096, 512, 128, 8): (503, 511),
    (32768, 4096, 1024, 64, 4): (552, 554),
    (32768, 4096, 512, 256, 16): (518, 526),
    (32768, 4096, 1024, 128, 8): (558, 567),
    (32768, 4096, 2048, 64, 4): (595, 586),
}
ROWS_AN_EXPERT = 256  # from which on products are held to dense ones
ROUTED = {"T": 32768, "E": 256, "K": 8}  # the layer whose router is weighed
# where float8 is held to bf16: a layer, and its products
WIDE = ({"H": 4096, "I": 2048}, {"D": 4096, "N": 4096}, {"D": 2048, "N": 4096})


class Found:
    """Rows in bf16 by what they are."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.groups = [
            {row["provider"]: row for row in group if row["ms"]}
            for (_, _, dtype, _, _), group in grouped(rows).items()
            if dtype == "bf16"
        ]

    def of(self, *ops: str) -> Iterator[tuple[Row, dict[str, Row]]]:
        """Our row, and those of all providers."""
        for group in self.groups:
            ours = group.get(OURS)
            if ours and ours["op"] in ops and ours["direction"] != "forward+backward":
                yield ours, group

    def like(self, row: Row, op: str) -> Row | None:
        """Ours of another op with the same shape, routing and direction."""
        same = [
            other
            for other, _ in self.of(op)
            if all(other[key] == row[key] for key in ("shape", "routing", "direction"))
        ]
        return same[0] if same else None


Values = Iterator[tuple[float, Row]]


def _over_dense(found: Found) -> Values:
    for row, group in found.of("grouped_gemm"):
        if DENSE in group and row["sizes"]["R"] >= ROWS_AN_EXPERT * row["sizes"]["E"]:
            yield row["tflops"] / group[DENSE]["tflops"], row


def _over_torch(found: Found) -> Values:
    for row, group in found.of("grouped_gemm"):
        if "torch" in group:
            yield group["torch"]["ms_min"] / row["ms_min"], row


def _over_peers(found: Found) -> Values:
    for row, _ in found.of("fused_experts"):
        if row["vs_best_peer"]:
            yield row["vs_best_peer"], row


def _over_published(found: Found) -> Values:
    for row, _ in found.of("fused_experts"):
        sizes = tuple(row["sizes"][letter] for letter in "THIEK")
        if sizes in PUBLISHED and row["routing"] in ("uniform", "balanced"):
            forward, backward = PUBLISHED[sizes]
            yield row["tflops"] / (forward if row["direction"] == "forward" else backward), row


def _routers_share(found: Found) -> Values:
    for row, _ in found.of("fused_experts"):
        if all(row["sizes"][letter] == size for letter, size in ROUTED.items()):
            for router, _ in found.of("topk_router"):
                same = all(router[key] == row[key] for key in ("routing", "direction"))
                if same and dict(router["sizes"]) == ROUTED:
                    yield router["ms"] / (router["ms"] + row["ms"]), row


def _over_copy(found: Found) -> Values:
    for row, group in found.of("permute", "unpermute", "chunk_permute"):
        if COPY in group:
            yield row["gbs"] / group[COPY]["gbs"], row


def _over_bf16(found: Found) -> Values:
    for op, narrow in (
        ("fused_experts", "fused_experts_fp8"),
        ("grouped_gemm", "scaled_grouped_gemm"),
    ):
        for row, _ in found.of(narrow):
            sizes, wide = row["sizes"], found.like(row, op)
            at = any(all(sizes.get(name) == size for name, size in of.items()) for of in WIDE)
            if wide and at and row["direction"] == "forward":
                yield wide["ms"] / row["ms"], row


@dataclass(frozen=True)
class Target:
    """A ratio that each of some rows is to have: ``goal`` or more, or at most that."""

    text: str
    goal: float
    values: Callable[[Found], Values]
    at_most: bool = False

    def line(self, found: Found) -> str:
        values = list(self.values(found))
        goal = f"{'at most' if self.at_most else 'at least'} {self.goal:g}"
        if not values:
            return f"| {self.text} | {goal} | not yet measured | |"
        worst, row = (max if self.at_most else min)(values, key=lambda pair: pair[0])
        met = sum((v <= self.goal) if self.at_most else (v >= self.goal) for v, _ in values)
        where = f"{row['op']} {row['shape']} {row['routing']} {row['direction']}"
        return f"| {self.text} | {goal} | {met} of {len(values)} | {number(worst)}: {where} |"


TARGETS = (
    Target(
        f"grouped_gemm, rate over the dense product's, {ROWS_AN_EXPERT} rows an expert or more",
        0.9,
        _over_dense,
    ),
    Target("grouped_gemm, times as fast as torch's", 1.0, _over_torch),
    Target("fused_experts, times as fast as the best peer", 1.0, _over_peers),
    Target("fused_experts, rate over SonicMoE's published on an H100", 1.0, _over_published),
    Target("topk_router, part of the layer at T32768 E256 K8", 0.05, _routers_share, at_most=True),
    Target("permute, unpermute, chunk_permute, rate over a copy's", 0.85, _over_copy),
    Target("float8, times as fast as bf16 at H4096 I2048, forward", 1.5, _over_bf16),
)


def table(rows: Sequence[Row]) -> str:
    """Each target, how many rows reach it, and the one that is farthest from it, as markdown."""
    found = Found(rows)
    head = ["| target | goal | reached by | worst |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *(target.line(found) for target in TARGETS)])
