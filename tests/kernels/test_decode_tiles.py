"""Whether the untuned tiles of a few rows can keep a GPU's memory busy, by arithmetic alone.

One token is the hardest: its experts' weights are read once, by as many programs as they have
tiles. That says nothing of how fast it is, which only a GPU does.
"""

from __future__ import annotations

import pytest

from benchmarks.architectures import ARCHITECTURES, shared_memory
from benchmarks.ops._shapes import ALL_LAYERS
from moe_kernels.triton._config_tables import Config
from moe_kernels.triton._configs import CONFIGS, default_config

PROCESSORS = 132
BANDWIDTH = {"h100": 3.35e12, "h200": 4.8e12}  # bytes a second, of the data sheets
LATENCY = 1e-6  # assumed: seconds from a request to its bytes, where memory is busy
PORT = 64 * 1.7e9  # bytes a second that a multiprocessor can take from L2
PRECISIONS = sorted({(kernel, key[1]) for kernel, keys in CONFIGS.items() for key in keys})


def _cut(kernel: str, experts: int, top_k: int) -> Config:
    return default_config(kernel, 90, "half", top_k, experts)


@pytest.mark.parametrize("gpu", BANDWIDTH)
@pytest.mark.parametrize("name", ALL_LAYERS)
def test_one_token_reads_weights_at_the_bandwidth_of_memory(name: str, gpu: str) -> None:
    hidden, inner, experts, top_k = ALL_LAYERS[name]
    for kernel, contracted, columns, widths in (
        ("up", hidden, inner, 2),  # of gate and of up
        ("grouped_gemm", inner, hidden, 1),
    ):
        cut = _cut(kernel, experts, top_k)
        tiles = top_k * -(-columns // cut.block_n)
        loaded = 2 * cut.block_k * cut.block_n * widths  # bytes of weights a step
        # a program that waits for a step has asked for as many as there are stages but one
        in_flight = min(tiles, PROCESSORS * cut.programs) * (cut.stages - 1) * loaded
        assert in_flight >= 2 * BANDWIDTH[gpu] * LATENCY, (kernel, in_flight)
        # the multiprocessor with the most tiles, while memory sends all bytes
        whole = 2 * top_k * contracted * columns * widths
        most = -(-tiles // PROCESSORS) * 2 * contracted * cut.block_n * widths
        assert most / (whole / BANDWIDTH[gpu]) <= PORT / 2, (kernel, most)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", ["up", "grouped_gemm"])
def test_programs_fit_beside_each_other(kernel: str, arch: int) -> None:
    cut = default_config(kernel, arch, "half", 8, 128)
    assert cut.programs * (_slots(kernel, cut, 2) + 1024) <= shared_memory(arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("kernel", "precision"), PRECISIONS)
def test_untuned_tiles_fit(kernel: str, precision: str, arch: int) -> None:
    itemsize = {"full": 4, "half": 2, "fp8": 1}[precision]
    for rows in (1, 32, 1024):
        for aligned in (False, True):
            cut = default_config(kernel, arch, precision, rows, 1, aligned=aligned)
            assert _slots(kernel, cut, itemsize) < shared_memory(arch), cut


def _slots(kernel: str, cut: Config, itemsize: int) -> int:
    """Bytes of a program's pipeline, which has no slot for the step that is in registers."""
    width = cut.block_n * (2 if kernel == "up" else 1)
    return (cut.stages - 1) * itemsize * cut.block_k * (cut.block_m + width)
