"""The transport between GPUs of one machine while a graph is captured, imitated on the CPU: nothing
is asked of the device that CUDA does not allow then.

T tokens, H hidden size, K experts a token, E experts, P ranks.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_kernels import _C
from moe_parallel.dispatch import AllToAllDispatcher
from tests.parallel.emulated_gpus import cuda_ipc
from tests.parallel.ranks import run_ranks
from tests.parallel.test_dispatch import make_case, raised, round_trip
from tests.parallel.test_shared_memory import arguments, open_things

OWNERS = ([1, 0, 0, 1], [0, 1, 0, 1], [1, 1, 0, 0])


class Capture:
    """A region that a graph is captured in; ``forbidden`` calls in it are counted."""

    def __init__(self, memory: Any) -> None:
        self.memory, self.forbidden = memory, 0

    def __enter__(self) -> Capture:
        self.before = self.memory.emulate_capture(True)
        return self

    def __exit__(self, *error: object) -> None:
        self.forbidden = self.memory.emulate_capture(False) - self.before


def layer(dispatcher: AllToAllDispatcher, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    tokens = dispatcher.dispatch(x, ids, weights)
    return dispatcher.combine(tokens.x * 2, tokens.handle)


def _dropped(rank: int, ranks: int) -> None:
    """Where experts are is in the device's memory, which nobody may free then."""
    case = make_case(1, rank, 9, 6, 2, 4)
    first, second = (cuda_ipc(4, placement=owners) for owners in OWNERS[:2])
    twin = cuda_ipc(4, placement=OWNERS[0])
    memory, _ = _C.recall_peer_memory("0")
    assert memory.tables == 2, "one for equal placements"
    for dispatcher in (first, second, twin):
        layer(dispatcher, *arguments(case))
    with Capture(memory) as capture:
        expected = layer(first, *arguments(case))
        del first, second, twin, dispatcher
        gc.collect()
        kind, message = raised(lambda: cuda_ipc(4, placement=OWNERS[2]))
    assert capture.forbidden == 0
    assert (kind, "Make it before" in message) == ("RuntimeError", True)
    # A graph reads the first still; the second is given up for the next.
    third = cuda_ipc(4, placement=OWNERS[2])
    assert memory.tables == 2
    layer(third, *arguments(case))
    again = cuda_ipc(4, placement=OWNERS[0])
    assert memory.tables == 2
    assert torch.equal(layer(again, *arguments(case)), expected)


def test_a_placement_may_be_dropped_while_a_graph_is_captured() -> None:
    run_ranks(2, _dropped)


def _whole_layer(rank: int, ranks: int) -> None:
    """Forward and backward, begun and ended apart too; then what needs more memory."""
    dispatcher = cuda_ipc(4, placement=OWNERS[0])
    memory, _ = _C.recall_peer_memory("0")
    case = make_case(1, rank, 9, 6, 2, 4)
    (*expected,) = round_trip(dispatcher, case, rank)
    with Capture(memory) as capture:
        (*got,) = round_trip(dispatcher, case, rank)
        pending = dispatcher.dispatch_async(*arguments(case))
        tokens = pending.wait()
        returning = dispatcher.combine_async(tokens.x, tokens.handle)
        layer(dispatcher, *arguments(case))
        returning.wait()
        larger = make_case(1, rank, 9, 4096, 2, 4)
        kind, message = raised(dispatcher.dispatch, *arguments(larger))
        assert "nobody can while a graph is captured" in raised(dispatcher.check)[1]
    assert capture.forbidden == 0
    for ours, theirs in zip(got[1:], expected[1:], strict=True):
        assert torch.equal(ours, theirs)
    assert kind == "RuntimeError"
    assert "needs more staging memory than there is" in message
    layer(dispatcher, *arguments(larger))
    layer(dispatcher, *arguments(case))


def test_a_layer_asks_for_nothing_that_a_capture_forbids() -> None:
    run_ranks(2, _whole_layer)


def _across(rank: int, ranks: int, begins_inside: bool) -> list[tuple[str, str]]:
    """A call that begins on one side and would end on the other."""
    dispatcher = cuda_ipc(4)
    memory, _ = _C.recall_peer_memory("0")
    case = make_case(1, rank, 9, 6, 2, 4)
    layer(dispatcher, *arguments(case))
    if begins_inside:
        with Capture(memory):
            pending = dispatcher.dispatch_async(*arguments(case))
        dist.barrier()  # or the error of one ends the beginning of the other
        found = raised(pending.wait)
    else:
        pending = dispatcher.dispatch_async(*arguments(case))
        dist.barrier()
        with Capture(memory):
            found = raised(pending.wait)
    return [found, raised(dispatcher.dispatch, *arguments(case))]


def _grown(rank: int, ranks: int, captures: bool) -> None:
    """A graph of one rank reads the memory of all, so all keep it when they take more."""
    dispatcher = cuda_ipc(4)
    small, large = (make_case(1, rank, 9, hidden, 2, 4) for hidden in (6, 30000))
    layer(dispatcher, *arguments(small))
    if captures and rank == 0:
        with Capture(_C.recall_peer_memory("0")[0]):
            layer(dispatcher, *arguments(small))
    else:
        layer(dispatcher, *arguments(small))
    before = open_things()[1]
    layer(dispatcher, *arguments(large))
    assert open_things()[1] == before + (ranks if captures else 0)


@pytest.mark.parametrize("captures", [True, False])
def test_memory_that_a_graph_reads_is_kept(captures: bool) -> None:
    run_ranks(2, _grown, captures)


@pytest.mark.parametrize("begins_inside", [True, False])
def test_a_call_ends_on_the_side_it_began_on(begins_inside: bool) -> None:
    for (kind, message), (later, again) in run_ranks(2, _across, begins_inside):
        assert kind == "RuntimeError"
        assert "a call that begins while a graph is captured must end then" in message
        assert later == "DistBackendError"
        assert "are of no use after an error" in again
