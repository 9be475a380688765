"""Tile shapes that a kernel may be cut into."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from benchmarks.architectures import shared_memory
from moe_kernels.triton._config_tables import (
    GLUON,
    LARGEST,
    SCALED,
    WARP_SPECIALIZE,
    Config,
    suits_gluon,
)

REGISTERS = 65536  # of a multiprocessor
LARGEST_SUM = 128  # float32 sums that a thread can hold besides all else
SMALLEST_SUM = 4  # fewer leave most of a thread's time to addresses
DEEPEST = 6
BESIDE_RING = 81 * 1024  # bytes that backward in Gluon needs, for h and for what it writes
GROUPS = (1, 4, 8, 16, 32)
PROGRAMS = (1, 2, 3, 4)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _row_blocks(rows: int | None) -> tuple[int, ...]:
    """Heights of a tile of rows, for up to that many rows an expert."""
    if rows is None or rows > 64:
        return (64, 128, 256)
    return (16, 32, 64, 128) if rows > 16 else (16, 32) if rows > 4 else (16,)


def candidates(
    kernel: str, arch: int, itemsize: int, rows: int | None, contracted: int, columns: int
) -> list[Config]:
    """Shapes of tiles with all that follows from them, in a fixed order.

    Of the stages only the two deepest that fit are tried; walking order and programs a
    multiprocessor are left to :func:`refinements`, which need no other tiles.

    Args:
        kernel: "grouped_gemm", "up", "down_backward", "wgrad" or "scaled_grouped_gemm".
        itemsize: bytes of an element.
        rows: the most rows that an expert has on average, or None.
        contracted, columns: of a product. Of "up", columns of the activation; of "wgrad", which
            contracts rows, the two sides of the gradient.
    """
    memory = shared_memory(arch)
    widths = 2 if kernel == "up" else 1  # weights of gate and up for a column
    # float8 products are summed anew at each step, beside the sum of the steps
    held = 2 if kernel == "scaled_grouped_gemm" else widths
    if kernel == "wgrad":
        blocks_m: tuple[int, ...] = (64, 128, 256)
        deepest_k = max(16, min(128, next_power_of_2(rows or 128)))
        blocks_k: tuple[int, ...] = tuple(k for k in (16, 32, 64, 128) if k <= deepest_k)
        fits_m = next_power_of_2(contracted)
        blocks_m = tuple(m for m in blocks_m if m <= max(64, fits_m))
    else:
        blocks_m = _row_blocks(rows)
        blocks_k = (32, 64, 128) if itemsize < 4 else (16, 32)
        blocks_k = tuple(k for k in blocks_k if k <= max(32, next_power_of_2(contracted)))
    most = LARGEST.get(kernel, 256)
    blocks_k = tuple(k for k in blocks_k if k <= most)
    widest = min(most, max(32, next_power_of_2(columns)))
    blocks_n = tuple(n for n in (32, 64, 128, 256) if n <= widest)
    found = []
    for m, n, k, warps in product(blocks_m, blocks_n, blocks_k, (4, 8)):
        sums = m * n * held / (32 * warps)
        if not SMALLEST_SUM <= sums <= LARGEST_SUM:
            continue
        if 90 <= arch < 120 and itemsize <= 2 and warps == 8 and m < 128 and kernel != "wgrad":
            continue  # two groups of warps would share 64 rows
        stage = (m * k + k * n * widths) * itemsize
        fit = min(DEEPEST, memory // stage)
        for stages in range(max(2, fit - 1), fit + 1):
            programs = 2 if 2 * stages * stage <= memory and sums <= LARGEST_SUM / 2 else 1
            found.append(Config(m, n, k, warps=warps, stages=stages, programs=programs))
    others = [
        other for config in found for other in _specialized(kernel, arch, config, memory, columns)
    ]
    return found + list(dict.fromkeys(others))


def _specialized(
    kernel: str, arch: int, config: Config, memory: int, columns: int
) -> Iterator[Config]:
    """The same tile where warps have roles; one program a multiprocessor then.

    On sm_90 Triton halves a tile between two groups of four warps beside the one that loads. The
    kernels in Gluon give each group tiles of its own, or halve those that are too large for one;
    tiles that leave half of a thread's sums unused are not tried, but for float8, whose products
    are held beside the sums. Its tiles may have twice the columns that others have.

    Args:
        memory: bytes of shared memory.
    """
    ways = WARP_SPECIALIZE.get(kernel, ())
    if "triton" in ways and 100 <= arch < 120:
        yield replace(config, programs=1, warp_specialize="triton")
    if not 90 <= arch < 100:
        return
    if kernel == "grouped_gemm" and config.warps == 8 and config.block_m >= 128:
        yield replace(config, warps=4, programs=1, warp_specialize="triton")
    sums = config.block_m * config.block_n * (2 if kernel == "up" else 1) / (32 * config.warps)
    stages = config.stages
    if kernel == "down_backward":  # the ring shares memory with slots for h
        stage = 2 * config.block_k * (config.block_m + config.block_n)
        stages = min(stages, (memory - BESIDE_RING) // stage)
    gluon = replace(config, warps=8, stages=stages, programs=1, warp_specialize="gluon")
    if kernel == "scaled_grouped_gemm":
        for n in (config.block_n, 2 * config.block_n):
            fit = memory // (config.block_k * (config.block_m + n))
            wide = replace(gluon, block_n=n, stages=min(stages, fit))
            if suits_gluon(kernel, wide) and n < 2 * columns:
                yield wide
                if n == 2 * SCALED:  # gate and up of what shares a scale
                    yield replace(wide, warp_specialize="gluon_activate")
        return
    for way in ways:
        other = replace(gluon, warp_specialize=way)
        if way in GLUON and sums == LARGEST_SUM and suits_gluon(kernel, other):
            yield other


def refinements(config: Config, shared: int, registers: int, arch: int) -> Iterator[Config]:
    """The same tiles in other walking orders and numbers of programs that a multiprocessor holds.

    Args:
        shared, registers: bytes a program and registers a thread that the compiler needs.
    """
    memory = shared_memory(arch)
    for group_m, programs in product(GROUPS, PROGRAMS):
        resident = (
            programs * shared <= memory
            and programs * registers * 32 * config.warps <= REGISTERS
            and config.warp_specialize == "no"  # roles take most of the registers
        )
        other = replace(config, group_m=group_m, programs=programs)
        if (resident or programs == 1) and other != config:
            yield other
