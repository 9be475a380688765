"""What backends of torch.distributed other than gloo need of the transport by process groups, as
far as it shows without them.

T tokens, H hidden size, K experts a token, E experts, P ranks.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_parallel.dispatch import AllToAllDispatcher, joining
from moe_parallel.torch_internals import timeout_of
from tests.parallel.emulated_gpus import cuda_ipc
from tests.parallel.ranks import run_ranks
from tests.parallel.test_dispatch import WAYS, dispatcher_of, make_case, raised, round_trip


def _without_store(rank: int, ranks: int) -> str:
    """As a group of MPI, whose store is a placeholder."""

    def no_store(*_: Any) -> Any:
        raise AssertionError("a placeholder, of which every method raises")

    joining.backend_of = lambda group, device: "mpi"  # type: ignore[assignment]
    joining.exchange = no_store  # type: ignore[assignment]
    dispatcher = AllToAllDispatcher(dist.group.WORLD, 4, max_tokens=16)
    assert (dispatcher.transport, dispatcher.gpu_transport) == ("process_group", "process_group")
    round_trip(dispatcher, make_case(1, rank, 9, 6, 2, 4), rank)
    return dispatcher.explain()


def test_a_group_of_mpi_needs_no_store() -> None:
    for text in run_ranks(2, _without_store):
        assert text.startswith("process_group carries tensors of the CPU")
        assert "the group's backend on the CPU is mpi" in text


def _without_backend_for_the_cpu(rank: int, ranks: int) -> tuple[str, str]:
    group = dist.new_group(range(ranks), backend="cuda:gloo")
    dispatcher = AllToAllDispatcher(group, 4, transport="process_group")
    case = make_case(1, rank, 9, 6, 2, 4)
    return raised(dispatcher.dispatch, case.x, case.ids, case.weights)


def test_a_group_without_a_backend_for_the_tokens_is_told() -> None:
    for kind, message in run_ranks(2, _without_backend_for_the_cpu):
        assert kind == "ValueError"
        assert message.startswith("dispatch: group '")
        assert "must have a backend for tensors on cpu; it has them for [cuda]. Make" in message


def test_a_backend_without_options_has_the_default_timeout() -> None:
    class Backend:
        @property
        def options(self) -> Any:
            raise RuntimeError("Backend ucc does not implement getBackendOptions.")

    class Group:
        def _get_backend(self, device: torch.device) -> Backend:
            return Backend()

    assert timeout_of(Group()) == dist.constants.default_pg_timeout
    assert isinstance(timeout_of(Group()), timedelta)


def _units(rank: int, ranks: int) -> None:
    """Rows travel as integers of 8, 4 or 1 bytes, wherever in their storage they begin."""
    for way in ("process_group", "aten"):
        dispatcher = dispatcher_of(way, 4)
        for hidden, dtype in (
            (4, torch.bfloat16),
            (2, torch.bfloat16),
            (3, torch.bfloat16),
            (1, torch.float64),
        ):
            case = make_case(hidden, rank, 7 + rank, hidden, 2, 4, dtype=dtype)
            tokens = dispatcher.dispatch(case.x, case.ids, case.weights)
            expected = dispatcher.combine(tokens.x, tokens.handle)

            def moved(rows: Tensor) -> Tensor:
                return torch.cat([rows.new_zeros(1), rows.flatten()])[1:].view_as(rows)

            y = moved(tokens.x)
            assert y.storage_offset() == 1
            assert torch.equal(dispatcher.combine(y, tokens.handle), expected)
            float8 = case.x.float().to(torch.float8_e4m3fn)
            arrived = dispatcher.dispatch(float8, case.ids, case.weights, extra=case.x)
            assert arrived.extra is not None
            assert torch.equal(arrived.extra, tokens.x)
            assert torch.equal(arrived.x.float(), tokens.x.float().to(torch.float8_e4m3fn).float())


def test_rows_of_any_size_and_place_travel() -> None:
    run_ranks(2, _units)


def _zeros(rank: int, ranks: int) -> None:
    """A zero keeps its sign where it is alone, and has none where it is added to another."""
    x = torch.tensor([[-0.0, 0.0, 3.0]]).expand(3, 3).bfloat16()
    ids = torch.tensor([[0, -1], [0, 3], [-1, -1]])
    ones = torch.ones(3, 2)
    for dispatcher in (cuda_ipc(4), *(dispatcher_of(way, 4) for way in WAYS)):
        tokens = dispatcher.dispatch(x, ids, ones)
        y = dispatcher.combine(tokens.x, tokens.handle)
        assert y.tolist() == [[0, 0, 3], [0, 0, 6], [0, 0, 0]]
        assert y.signbit().tolist() == [[True, False, False], [False] * 3, [False] * 3]


def test_zeros_have_the_same_sign_by_every_transport() -> None:
    run_ranks(2, _zeros)
