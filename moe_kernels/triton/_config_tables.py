"""Tables of tuned tile shapes: files of data, read at the first launch on a device and kept.

A table is JSON, ``{"format": 1, "device": "sm_90-h200", "entries": [...]}``; an entry is a bucket,
what won there, and what that is known from:

    {"kernel": "up", "precision": "half", "rows": 64, "inner": "narrow",
     "config": {"block_m": 64, ...}, "measured": {...}}

"warp_specialize" may be left out of a configuration: "no".

``rows``: the most rows an expert has on average, one of ROWS, or null for more than all of them.
``inner``: whether the shorter of the two sides of an expert's matrix has at most SLIM elements
("slim"), at most NARROW ("narrow"), more ("wide"), or any number ("any"). An entry for narrow ones
also holds for slim ones that have none.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_kernels.triton._launch import architecture

VARIABLE = "MOE_KERNELS_CONFIGS"
FORMAT = 1
ROWS = (4, 16, 64, 256, 1024)
SLIM, NARROW = 256, 512
INNER = ("any", "slim", "narrow", "wide")
PRECISIONS = ("half", "full", "fp8")
# who may give the warps of a kernel roles, where not all of them do the same
WARP_SPECIALIZE = {
    "grouped_gemm": ("no", "triton", "gluon"),
    "up": ("no", "triton", "gluon"),
    "down_backward": ("no", "triton", "gluon", "gluon_gather"),
    "wgrad": ("no", "gluon"),
    "scaled_grouped_gemm": ("no", "gluon", "gluon_activate"),
}
GLUON = ("gluon", "gluon_gather", "gluon_activate")
LARGEST_TILE = 128 * 128  # of a group of four warps: 128 sums a thread
WIDEST = 256  # columns of a tile: what is computed by chunks of columns has them begin with one
SCALED = 128  # columns, and contracted elements, that share a scale
# columns and contracted elements of a tile, where they do; a kernel in Gluon takes more columns
LARGEST = {"scaled_grouped_gemm": SCALED}
FOLDER = Path(__file__).parent / "configs"
# parts of the names by which GPUs of one architecture are told apart
MODELS = ("h200", "h100", "h800", "h20", "gh200", "a100", "b200", "b300", "gb200")


@dataclass(frozen=True)
class Config:
    """How a GEMM is cut.

    Attributes:
        block_m, block_n, block_k: rows, columns and contracted elements of a tile. Of the kernels
            with a gate, block_n counts columns of the activation; a weight gradient contracts rows.
        warps: of a program.
        stages: how deep loads are pipelined.
        group_m: row tiles that are walked together, so that they find a weight tile in L2.
        programs: programs a multiprocessor holds; each walks many tiles.
        warp_specialize: whether warps have roles, to load or to multiply: "no", or given by
            "triton", its compiler, see ``_operands.specializes``, or "gluon", a kernel written so
            (``_hopper_*.py``), whose ``warps`` are those that multiply; or "gluon_gather", such a
            kernel that gathers rows itself, which else are gathered before; or "gluon_activate",
            such a product that, where it projects up, goes through the activation, which else a
            kernel does after it. Never a default.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8
    programs: int = 1
    warp_specialize: str = "no"


def suits_gluon(kernel: str, cut: Config) -> bool:
    """Whether a kernel in Gluon computes such tiles.

    Two groups of four warps multiply 64 rows or more each, 64 contracted elements a step, whose
    rows are swizzled by 128 bytes. A tile that one group can hold is its own, a larger one is
    halved. A slot of the ring is handed back after the next step was multiplied, so there are two
    at least. Threads that gather hold an address for every eighth of 128 rows, and can no more. A
    group's columns of a weight gradient go through buffers of 128 rows, and backward through the
    activation goes by parts of a group's 64 or 128 rows.

    Float8 contracts the 128 elements that share a scale, in 128 bytes, and tiles of 128 rows are
    halved: a group adds one block of columns at a time to the sums of one block or two.
    """
    if kernel == "scaled_grouped_gemm":
        whole = cut.block_n in (SCALED, 2 * SCALED) and (cut.block_k, cut.warps) == (SCALED, 8)
        return whole and cut.block_m == 128 and cut.stages >= 2
    width = 2 * cut.block_n if kernel == "up" else cut.block_n
    halved = cut.block_m * width > LARGEST_TILE
    own = kernel in ("down_backward", "wgrad") and not halved  # tiles of one group
    gathers = kernel == "up" or cut.warp_specialize == "gluon_gather"
    tallest = 128 if gathers or own else 256
    return (
        (128 if halved else 64) <= cut.block_m <= tallest
        and cut.block_n >= 64
        and width <= 256
        and cut.block_m * width <= 2 * LARGEST_TILE
        and (cut.block_k, cut.warps) == (64, 8)
        and cut.stages >= 2
    )


@dataclass(frozen=True)
class Bucket:
    """What a configuration was chosen for; see the top of the file."""

    kernel: str
    precision: str
    rows: int | None
    inner: str = "any"

    def __str__(self) -> str:
        rows = f"at most {self.rows}" if self.rows else f"more than {ROWS[-1]}"
        return f"{self.kernel}, {self.precision}, {rows} rows an expert, {self.inner}"


Table = Mapping[Bucket, Config]


def precision_class(dtype: torch.dtype) -> str:
    return "full" if dtype.itemsize == 4 else "fp8" if dtype.itemsize == 1 else "half"


def rows_class(rows: int, experts: int) -> int | None:
    """The class of ``rows`` rows spread over ``experts``."""
    for most in ROWS:
        if rows <= most * max(experts, 1):
            return most
    return None


def inner_class(inner: int) -> str:
    return "slim" if inner <= SLIM else "narrow" if inner <= NARROW else "wide"


def inner_classes(inner: int) -> tuple[str, ...]:
    """Whose entries hold, first the one that decides; ``inner`` is 0 where it is not told."""
    if not inner:
        return ("any",)
    of = inner_class(inner)
    return ("slim", "narrow", "any") if of == "slim" else (of, "any")


def device_class(device: torch.device) -> str:
    """The name of a device's table: ``sm_90-h200``, or ``sm_90`` for an unlisted GPU."""
    arch = f"sm_{architecture(device)}"
    if device.type != "cuda":
        return arch
    words = torch.cuda.get_device_properties(device).name.lower().replace("-", " ").split()
    model = next((name for name in MODELS if name in words), "")
    return f"{arch}-{model}" if model else arch


def read_table(path: Path, kernels: Collection[str]) -> dict[str, Any]:
    """A table's document, checked.

    Raises:
        ValueError: it is no table, an entry is not valid, or two are for one bucket.
        OSError: it cannot be read.
    """
    try:
        document = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: a table of configurations must be JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(
            f'{path}: a table of configurations must be an object with "format": {FORMAT}'
        )
    if not isinstance(document.get("device"), str) or not isinstance(document.get("entries"), list):
        raise ValueError(f'{path}: a table must have "device", a string, and "entries", a list')
    seen: set[Bucket] = set()
    for number, entry in enumerate(document["entries"]):
        where = f"{path}: entry {number}"
        bucket, _ = parse_entry(entry, kernels, where)
        if bucket in seen:
            raise ValueError(f"{where}: {bucket}: there is an earlier entry for this; remove one")
        seen.add(bucket)
    return document


def parse_entry(entry: Any, kernels: Collection[str], where: str) -> tuple[Bucket, Config]:
    """The bucket and the configuration of an entry of a table's document."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: must be an object; got {entry!r}")
    allowed: dict[str, Collection[Any]] = {
        "kernel": kernels,
        "precision": PRECISIONS,
        "rows": (*ROWS, None),
        "inner": INNER,
    }
    for key, values in allowed.items():
        if key not in entry or entry[key] not in values or isinstance(entry[key], bool):
            choice = ", ".join(json.dumps(value) for value in values)
            raise ValueError(
                f"{where}: {key} must be one of {choice}; got {json.dumps(entry.get(key))}"
            )
    if not isinstance(entry.get("config"), dict):
        raise ValueError(f"{where}: config must be an object; got {entry.get('config')!r}")
    bucket = Bucket(**{key: entry[key] for key in allowed})
    return bucket, parse_config(entry["config"], bucket.kernel, where)


def parse_config(document: Mapping[str, Any], kernel: str, where: str) -> Config:
    names = [field.name for field in dataclasses.fields(Config)]
    values = {"warp_specialize": "no", **document}
    if sorted(values) != sorted(names):
        raise ValueError(
            f"{where}: config must have exactly {', '.join(names)}; got "
            f"{', '.join(sorted(document))}"
        )
    specialize, known = values.pop("warp_specialize"), WARP_SPECIALIZE.get(kernel, ("no",))
    if specialize not in known:
        raise ValueError(
            f"{where}: warp_specialize of {kernel} must be one of {', '.join(known)}; got "
            f"{specialize!r}"
        )
    for name, value in values.items():
        if type(value) is not int or not 1 <= value <= 1024:
            raise ValueError(f"{where}: {name} must be an integer from 1 to 1024; got {value!r}")
        if name.startswith(("block", "warps")) and value & (value - 1):
            raise ValueError(f"{where}: {name} must be a power of 2; got {value}")
    least = {"block_m": 16, "block_n": 16, "block_k": 16}
    for name, size in least.items():
        if values[name] < size:
            raise ValueError(f"{where}: {name} must be at least {size}; got {values[name]}")
    for name in ("block_n", "block_k") if specialize not in GLUON else ():
        if values[name] > LARGEST.get(kernel, values[name]):
            raise ValueError(
                f"{where}: {name} of {kernel} must be at most {LARGEST[kernel]}, which share a "
                f"scale; got {values[name]}"
            )
    if values["block_n"] > WIDEST:
        raise ValueError(
            f"{where}: block_n must be at most {WIDEST}, of which chunks of columns are multiples; "
            f"got {values['block_n']}"
        )
    if values["warps"] > 32:
        raise ValueError(f"{where}: warps must be at most 32; got {values['warps']}")
    found = Config(**values, warp_specialize=specialize)
    if specialize in GLUON and not suits_gluon(kernel, found):
        raise ValueError(
            f"{where}: a tile of {kernel} with warp_specialize {specialize} must have block_k 64, "
            "8 warps, 2 or more stages, 64 or more rows and columns, and no more than two groups "
            "of four warps can hold, and of rows that are gathered 128; of scaled_grouped_gemm "
            "block_k 128, 128 rows and 128 or 256 columns; as python -m benchmarks tune chooses "
            f"them; got {found}"
        )
    return found


def as_table(document: Mapping[str, Any], kernels: Collection[str]) -> dict[Bucket, Config]:
    return dict(parse_entry(entry, kernels, "table") for entry in document["entries"])


@functools.cache
def tuned(device: torch.device, kernels: tuple[str, ...]) -> tuple[Table, ...]:
    """The tables that hold on a device, first the one that decides.

    That is the file that ``MOE_KERNELS_CONFIGS`` names, whatever device it was measured on; then
    the shipped ones of the exact model and of its architecture; none of what is interpreted, or
    compiled alone. Read at the first launch.

    Raises:
        ValueError, OSError: as :func:`read_table`; what is asked for is never ignored.
    """
    paths = []
    own = os.environ.get(VARIABLE)
    if own:
        if not Path(own).is_file():
            raise FileNotFoundError(
                f"{VARIABLE} must name a table of configurations, as python -m benchmarks tune "
                f"writes it; there is no file {own}"
            )
        paths.append(Path(own))
    if device.type == "cuda":
        name = device_class(device)
        shipped = [FOLDER / f"{part}.json" for part in dict.fromkeys((name, name.split("-")[0]))]
        paths += [path for path in shipped if path.exists()]
    return tuple(as_table(read_table(path, kernels), kernels) for path in paths)
