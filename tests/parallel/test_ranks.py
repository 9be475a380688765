"""The test vehicle itself: a failing, dying or hanging rank is reported, and soon."""

from __future__ import annotations

import ctypes
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.parallel.ranks import run_ranks


def _sum(rank: int, ranks: int, scale: float) -> torch.Tensor:
    value = torch.full((2,), scale * (rank + 1))
    dist.all_reduce(value)
    return value + rank


def _outlived_by_the_first(rank: int, ranks: int) -> None:
    processes = [None] * ranks
    dist.all_gather_object(processes, os.getpid())
    if rank == 1:
        time.sleep(0.5)
        os.kill(processes[0], 0)  # raises where there is no such process


def _fail_on_one(rank: int, ranks: int) -> None:
    assert rank == 0, "rank one is wrong"
    time.sleep(30)


def _die_on_one(rank: int, ranks: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def _break_on_one(rank: int, ranks: int) -> None:
    if rank == 1:
        ctypes.memset(None, 0, 1)


def _hang(rank: int, ranks: int) -> None:
    if rank == 0:
        time.sleep(30)


def test_results_come_in_the_order_of_ranks() -> None:
    first, second, third = run_ranks(3, _sum, 0.5)
    assert first.tolist() == [3.0, 3.0]
    assert second.tolist() == [4.0, 4.0]
    assert third.tolist() == [5.0, 5.0]


def test_a_rank_that_has_returned_stays_for_the_others() -> None:
    run_ranks(2, _outlived_by_the_first)


@pytest.mark.parametrize(
    ("function", "message", "timeout"),
    [
        (_fail_on_one, "rank 1: Traceback[^$]*rank one is wrong", 60),
        (_die_on_one, "1 of 2 ranks failed\n--- rank 1: died with exit code -9", 60),
        (
            _break_on_one,
            r"--- rank 1: died with exit code -11; its stderr:[^$]*"
            r"Segmentation fault[^$]* in _break_on_one\n[^$]*frame #\d+: ffi_call",
            60,
        ),
        (
            _hang,
            r"1 of 2 ranks failed\n--- rank 0: was still running and was killed; its stderr:[^$]*"
            r" in _hang\n",
            5,
        ),
    ],
)
def test_failures_are_reported(function, message: str, timeout: float) -> None:
    begin = time.monotonic()
    with pytest.raises(AssertionError, match=message):
        run_ranks(2, function, timeout=timeout)
    assert time.monotonic() - begin < 20
