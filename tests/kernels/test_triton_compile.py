"""Every Triton kernel compiles for GPUs that need not be here, and to what it was designed for."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from benchmarks.architectures import ARCHITECTURES
from tests.kernels.compile_cases import CASES, MORE_CASES

ROOT = Path(__file__).parents[2]
TRITON = tuple(map(int, metadata.version("triton").split(".")[:2]))
FENCES_POINTER_LOADS = TRITON >= (3, 7)
GEMMS = {
    "_grouped_gemm_kernel",
    "_up_kernel",
    "_down_backward_kernel",
    "_wgrad_kernel",
    "_scaled_grouped_gemm_kernel",
    "_scaled_up_kernel",
}
# calls whose tiles are too small, or whose type is too wide, for the asynchronous tensor cores
WITHOUT_WGMMA = ("_few", "_full", "_tf32", "counts")

Reports = list[dict[str, Any]]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((90, tuple(CASES)), id="sm_90"),
        pytest.param((90, tuple(MORE_CASES)), id="sm_90-more", marks=pytest.mark.slow),
        *(
            pytest.param((arch, ()), id=f"sm_{arch}", marks=pytest.mark.slow)
            for arch in ARCHITECTURES
            if arch != 90
        ),
    ],
)
def reports(request: pytest.FixtureRequest) -> Reports:
    """One process an architecture, since kernels here may be decorated for the interpreter."""
    arch, names = request.param
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["MOE_KERNELS_BACKEND"] = "reference"
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_check", "--arch", str(arch), *names],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def _gemms(reports: Reports) -> Reports:
    found = [report for report in reports if report["kernel"] in GEMMS]
    without = set() if 90 <= reports[0]["arch"] < 120 else {"_scaled_up_kernel"}
    assert {report["kernel"] for report in found} == GEMMS - without
    return found


def test_kernels_keep_their_values_in_registers_and_fit(
    reports: Reports, record_property: Any
) -> None:
    for report in reports:
        record_property(f"registers {report['case']} {report['kernel']}", report["registers"])
        # with TF32, not the default, ptxas of Triton 3.6 stops at 64 registers on sm_100; elsewhere
        # it may leave some words of memory-bound kernels for another block beside them, and that of
        # Triton 3.9 leaves ten of weight gradients in float32 and four of an up-projection
        if report["arch"] != 100 or not report["case"].endswith("_tf32"):
            beside = report["arch"] in (86, 89, 120) and report["kernel"] not in GEMMS
            later = TRITON >= (3, 9) and report["kernel"] in ("_wgrad_kernel", "_hopper_up_kernel")
            assert report["spilled"] <= (48 if beside or later else 0), report
        assert report["fits"], report


def test_counts_of_experts_and_choices_compile_nothing_new(reports: Reports) -> None:
    assert not [r["kernel"] for r in reports if r["case"].startswith("other_counts")]


def test_products_run_on_tensor_cores(reports: Reports) -> None:
    for report in _gemms(reports):
        if report["case"].endswith("_full") or "_full_" in report["case"]:
            continue  # exact float32 has none
        kind = {90: "wgmma", 100: "tcgen05"}.get(report["arch"], "mma")
        if report["arch"] == 90 and report["case"].endswith(WITHOUT_WGMMA):
            assert report["mma"] + report["wgmma"] > 0, report
        elif report["arch"] == 100 and report["case"].endswith(WITHOUT_WGMMA):
            assert report["mma"] + report["tcgen05"] > 0, report
        else:
            assert report[kind] > 0, report
        assert not report["serialized"], report


def test_aligned_operands_are_loaded_by_tma(reports: Reports) -> None:
    for report in _gemms(reports):
        aligned = report["arch"] >= 90 and "unaligned" not in report["case"]
        assert (report["tma_load"] > 0) or not aligned, report
        if aligned and report["case"].startswith(("gemm", "scaled")):
            assert report["cp_async"] == 0, report  # both operands


def test_the_router_reads_rows_wide_and_within_a_warp(reports: Reports) -> None:
    """More warps would wait for each other for every expert that is chosen."""
    for report in reports:
        if report["kernel"] == "_topk_router_kernel":
            alone = report["case"] == "router_of_one_program"
            assert report["warps"] == (4 if alone else 1), report
            assert report["wide_loads"] > 0, report


def test_warps_have_roles_where_that_is_asked_for(reports: Reports) -> None:
    for report in reports:
        if report["kernel"] not in ("_tile_map_kernel", "_zero_tail_kernel", "_permute_kernel"):
            assert report["specialized"] == report["case"].endswith("_roles"), report


def _check_roles(
    reports: Reports,
    kernel: str,
    multiplying: int,
    loading: int,
    parts: int = 0,
    leads: bool | None = None,
) -> Reports:
    """Two groups multiply, by turns or half a tile each, with so many registers a thread.

    Args:
        parts: that are brought to a group of its tile, to two slots, besides what is multiplied.
        leads: None where a half without rows is passed over; else whether, of halves, one is begun
            before the other, which waits for it once.
    """
    found = [report for report in reports if report["kernel"] == kernel]
    assert bool(found) == any(report["arch"] == 90 for report in reports)
    for report in found:
        turns, rows, stages = _cut(report)
        # rows, 256 columns or fewer and 64 contracted, by 64 x n x 16, for either group
        assert report["wgmma"] == rows // (8 if turns else 16), report
        assert (report["serialized"], report["shown"]) == (False, True), report
        # two groups of four warps take no more than those that load, padded to four, leave of
        # what the block starts with; they would wait for it
        assert report["role_registers"].count(multiplying) == 2, report
        assert min(report["role_registers"]) == loading, report
        assert report["registers"] * report["warps"] >= 4 * (2 * multiplying + loading), report
        # full and empty for each slot, and two turns, if any are taken. Once those that load wait
        # and say how many bytes come; either group waits for full and hands back in the loop and
        # after it. With turns it waits for its own and passes it on; without, it waits and hands
        # back where its half has no rows. Threads that gather arrive once each. A part's warp
        # waits and says how many bytes come, its group waits for each half and hands back
        assert report["mbarriers"] == {
            "init": 2 * stages + 2 * (turns or leads is not None) + (8 if parts else 0),
            "expect": 1 + 2 * parts,
            "wait": 5 + 6 * parts if turns or leads is None else 3 + leads,
            "arrive": 6 + 2 * parts if turns or leads is None else 4 + leads,
            "copied": int(report["cp_async"] > 0),
        }, report
    return found


def _cut(report: dict[str, Any]) -> tuple[bool, int, int]:
    """Whether groups take turns, rows and stages of a case of roles."""
    numbers = [int(part) for part in report["case"].split("_") if part.isdecimal()]
    rows, stages = numbers or (128, 4)
    return "turns" in report["case"], rows, stages


def test_the_gemm_of_hopper_is_what_it_was_written_to_be(reports: Reports) -> None:
    """One warp loads all by TMA."""
    for report in _check_roles(reports, "_hopper_gemm_kernel", 240, 24):
        assert (report["tma_load"] >= 2, report["cp_async"]) == (True, 0), report


def test_the_up_projection_of_hopper_is_what_it_was_written_to_be(reports: Reports) -> None:
    """Four warps gather rows, and load weights by TMA."""
    for report in _check_roles(reports, "_hopper_up_kernel", 232, 40):
        # each of 128 threads brings 16 bytes at a time of 64 contracted elements
        assert report["cp_async"] == _cut(report)[1] // 16, report
        assert (report["tma_load"] >= 1, report["fenced"]) == (True, True), report


def test_backward_of_hopper_is_what_it_was_written_to_be(reports: Reports) -> None:
    """One warp loads what is multiplied, one for each group the parts of h, all by TMA; or two
    gather the rows that are multiplied."""
    gathers = [report for report in reports if report["cp_async"]]
    copies = [report for report in reports if not report["cp_async"]]
    kernel = "_hopper_down_backward_kernel"
    found = _check_roles(gathers, kernel, 224, 56, parts=4)
    for report in found:
        # each of 64 threads brings 16 bytes at a time of 64 contracted elements
        assert report["cp_async"] == _cut(report)[1] // 8, report
        assert report["fenced"], report
    copied = _check_roles(copies, kernel, 240, 24, parts=4)
    assert reports[0]["arch"] != 90 or (found and copied)
    for report in found + copied:
        # gate and up come apart where they are halves, for either group
        planes = 1 if report["case"].endswith(("oai_roles", "ungated_roles")) else 2
        by_tma = 2 if report in copied else 1
        assert report["tma_load"] >= by_tma + 2 * 4 * planes, report


def test_the_weight_gradient_of_hopper_is_what_it_was_written_to_be(reports: Reports) -> None:
    """One warp loads both operands, or four gather rows of one; what is not added to TMA stores."""
    gathers = [report for report in reports if report["cp_async"]]
    for report in _check_roles(gathers, "_hopper_wgrad_kernel", 232, 40, leads=True):
        # each of 128 threads brings 16 bytes at a time, of 64 rows of 64 columns or more
        assert report["cp_async"] >= 4, report
        assert (report["tma_load"] >= 1, report["fenced"]) == (True, True), report
    copies = [report for report in reports if not report["cp_async"]]
    assert reports[0]["arch"] != 90 or (gathers and copies)
    for report in _check_roles(copies, "_hopper_wgrad_kernel", 240, 24, leads=True):
        assert report["tma_load"] >= 2, report
    for report in reports:
        if report["kernel"] == "_hopper_wgrad_kernel":
            assert (report["tma_store"] > 0) == ("sums" not in report["case"]), report


def test_the_float8_product_of_hopper_is_what_it_was_written_to_be(reports: Reports) -> None:
    """One warp loads all by TMA; each group multiplies a block of 128 columns at a time."""
    names = {"_hopper_scaled_kernel", "_hopper_scaled_up_kernel"}
    found = [report for report in reports if report["kernel"] in names]
    assert {report["kernel"] for report in found} == (names if reports[0]["arch"] == 90 else set())
    for report in found:
        columns, stages = (int(part) for part in report["case"].split("_") if part.isdecimal())
        # 64 rows, 128 columns and 32 of 128 contracted elements at a time, for either group
        assert report["wgmma"] == report["float8"] == 2 * 4 * columns // 128, report
        assert (report["serialized"], report["shown"], report["detours"]) == (False, True, 0), (
            report
        )
        # halves of the weights come as two copies
        plain = report["kernel"] == "_hopper_scaled_kernel"
        one_copy = plain or "pairs" in report["case"] or "ungated" in report["case"]
        assert report["tma_load"] == (2 if one_copy else 3), report
        assert (report["cp_async"], report["mma"]) == (0, 0), report
        assert report["role_registers"].count(240) == 2, report
        assert min(report["role_registers"]) == 24, report
        assert report["registers"] * report["warps"] >= 4 * (2 * 240 + 24), report
        # full and empty for each slot. The warp that loads waits, and says how many bytes come;
        # either group waits and hands back in the loop, and where its half has no rows
        assert report["mbarriers"] == {
            "init": 2 * stages, "expect": 1, "wait": 5, "arrive": 4, "copied": 0
        }, report  # fmt: skip


def test_copies_fill_their_memory(reports: Reports) -> None:
    """With as many bytes as the barrier waits for."""
    assert [report for report in reports if report["torn"]] == []


def test_aligned_tiles_go_straight_to_tensor_cores(reports: Reports) -> None:
    """But for TF32 and float8, whose operands the tensor cores take in one order only."""
    for report in _gemms(reports):
        if not report["case"].endswith(("_unaligned", "_tf32", "_n_contiguous")):
            assert report["detours"] == 0, report


def test_float8_is_multiplied_as_such(reports: Reports) -> None:
    """By the asynchronous tensor cores, which the compiler else leaves unseen for wider ones.

    Of too few rows for them it makes float16, exactly.
    """
    for report in _gemms(reports):
        if report["kernel"] in ("_scaled_grouped_gemm_kernel", "_scaled_up_kernel"):
            others = report["mma"] if report["arch"] in (89, 120) else 0
            assert report["float8"] == report["wgmma"] + report["tcgen05"] + others, report


def test_copied_tiles_are_fenced_from_tensor_cores(reports: Reports) -> None:
    """Data that cp.async brings is not read through another proxy before it is there."""
    for report in _gemms(reports):
        if report["wgmma"] or report["tcgen05"]:
            assert report["fenced"], report
            assert FENCES_POINTER_LOADS or report["cp_async"] == 0, report
