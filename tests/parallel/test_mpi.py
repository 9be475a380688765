"""The exchange, and layers with Expert Parallelism, between ranks that MPI joins.

T tokens, H hidden size, K experts a token, E experts, P ranks.
"""

from __future__ import annotations

import re
import shutil
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_parallel.dispatch import AllToAllDispatcher
from tests.parallel.mpi_ranks import run_mpi_ranks
from tests.parallel.ranks import run_ranks
from tests.parallel.test_dispatch import (
    _narrow_dtypes,
    _payloads,
    _random_cases,
    _sub_groups_and_handles_in_flight,
    dispatcher_of,
    make_case,
    raised,
    round_trip,
)
from tests.parallel.test_dispatch_agreement import MISMATCHES, _mismatch, _wrong_arguments
from tests.parallel.test_dispatch_async import _equal, _in_flight
from tests.parallel.test_dispatch_placement import _fuzz
from tests.parallel.test_expert_parallel import LAYERS, _layer

pytestmark = pytest.mark.skipif(
    not dist.is_mpi_available() or shutil.which("mpirun") is None,
    reason="needs a torch that is built with MPI, and its mpirun",
)

WAYS = ("process_group", "aten")
SEEDS = list(range(12))


def _exchange(rank: int, ranks: int, way: str) -> None:
    """What the tests of gloo do on so many ranks."""
    _random_cases(rank, ranks, SEEDS, way)
    for copies in (False, True):
        _fuzz(rank, ranks, SEEDS, way, copies)
    _equal(rank, ranks, way)
    _in_flight(rank, ranks, way)
    if ranks == 3:
        _payloads(rank, ranks, way)
    else:
        _narrow_dtypes(rank, ranks, way)
    if ranks == 4:
        _sub_groups_and_handles_in_flight(rank, ranks)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_exchange_is_the_definition(ranks: int, way: str) -> None:
    run_mpi_ranks(ranks, _exchange, way)


def _results(rank: int, ranks: int, transport: str) -> list[Tensor]:
    dispatcher = AllToAllDispatcher(dist.group.WORLD, 12, transport=transport)
    assert dispatcher.transport == "process_group"
    results = []
    for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        case = make_case(seed, rank, 40 * rank, 70, 3, 12, dtype=dtype, weight_dtype=torch.float32)
        tokens, *back = round_trip(dispatcher, case, rank)
        results += [tokens.x, tokens.topk_ids, tokens.topk_weights, *back]
    return results


def test_the_results_are_those_of_gloo_bit_for_bit() -> None:
    expected = run_ranks(3, _results, "process_group")
    for ours, theirs in zip(run_mpi_ranks(3, _results, "auto"), expected, strict=True):
        assert all(map(torch.equal, ours, theirs))


def _mismatches(rank: int, ranks: int, way: str) -> list[tuple[tuple[str, str], bool]]:
    whats = [row[0] for row in MISMATCHES] + ["rows"]
    return [_mismatch(rank, ranks, what, way) for what in whats]


@pytest.mark.parametrize("way", WAYS)
def test_calls_that_do_not_match_are_an_error_on_every_rank(way: str) -> None:
    """In each phase by the steps meant for GPUs too: there is no store for notices."""
    for rank, results in enumerate(run_mpi_ranks(3, _mismatches, way)):
        *differing, ((kind, message), healthy) = results
        assert (kind, healthy) == ("ValueError" if rank == 1 else "RuntimeError", True), message
        for ((kind, message), healthy), row in zip(differing, MISMATCHES, strict=True):
            assert (kind, healthy) == ("ValueError", True), message
            assert f"must agree on {row[1]}; rank {rank} has" in message


def test_one_rank_with_wrong_arguments_leaves_nobody_waiting() -> None:
    good, bad = run_mpi_ranks(2, _wrong_arguments, "process_group")
    assert all("rank 1 of group '0' found an error in its own" in message for _, message in good)
    assert all(kind in ("IndexError", "ValueError", "TypeError") for kind, _ in bad)


def _late(rank: int, ranks: int) -> tuple[str, str]:
    """Rank 1 comes after the others have given up, with what they wait for."""
    dispatcher = dispatcher_of("process_group", 6, timeout=1.0)
    case = make_case(1, rank, 9, 6, 2, 6)
    dispatcher.dispatch(case.x, case.ids, case.weights)
    if rank == 1:
        time.sleep(3)
        lines = torch.zeros(ranks, 32, dtype=torch.int64)
        one = [1] * ranks
        dist.all_to_all_single(torch.empty_like(lines), lines, one, one)
        return "", ""
    return raised(dispatcher.dispatch, case.x, case.ids, case.weights)


def test_a_late_rank_is_an_error_after_the_timeout() -> None:
    """There is no store, so the error tells of none that does not answer."""
    first, _, last = run_mpi_ranks(3, _late)
    for kind, message in (first, last):
        assert kind == "DistBackendError"
        told = "a rank has died, stopped, or not made this call: every rank of the group must"
        assert re.search(f"in group '0': {told}.* The backend says: ", message), message


def _layers(rank: int, ranks: int) -> None:
    for changes in LAYERS.values():
        _layer(rank, ranks, changes, {})


@pytest.mark.parametrize("ranks", [2, 4])
def test_layers_give_what_one_process_gives(ranks: int) -> None:
    run_mpi_ranks(ranks, _layers)
