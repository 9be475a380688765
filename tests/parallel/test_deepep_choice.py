"""Which of DeepEP's interfaces is used, when it is used at all, and what is refused before a call.

T tokens, H hidden size, K experts a token, E experts, P ranks.
"""

from __future__ import annotations

import copy
import gc
import pickle
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_parallel.dispatch import (
    AllToAllDispatcher,
    DeepEPDispatcher,
    DeepEPHandle,
    build_dispatcher,
    building,
)
from moe_parallel.experts import GroupedExperts
from tests.parallel import stand_in_deep_ep as stand_in
from tests.parallel.definitions import make_config
from tests.parallel.ranks import run_ranks
from tests.parallel.test_deepep import INTERFACES, assert_equal, make_case, prepare
from tests.parallel.test_dispatch import Case, raised, round_trip


def _choose_interface(rank: int, ranks: int) -> list[tuple[str, str]]:
    group = dist.group.WORLD
    prepare(1)
    old = DeepEPDispatcher(group, 4)
    assert old.interface == "legacy"
    assert old.explain() == (
        "deepep, by deep_ep.Buffer, carries bfloat16 tensors of GPUs: it was asked for"
    )
    missing = raised(lambda: DeepEPDispatcher(group, 4, interface="elastic"))
    prepare(2)
    assert DeepEPDispatcher(group, 4).interface == "elastic"
    timed = DeepEPDispatcher(group, 4, timeout=7.2)
    case = make_case(1, rank, 100 * rank, 256, 2, 4)
    timed.dispatch(case.x, case.ids, case.weights)
    assert timed._buffers.buffer.timeouts == (8, 8)  # type: ignore[attr-defined]
    bounded = DeepEPDispatcher(group, 4, max_tokens=150, timeout=5)
    bounded.dispatch(case.x, case.ids, case.weights)
    assert [facts["most"] for call, facts in stand_in.CALLS if call == "dispatch"] == [128, 150]
    too_many = raised(bounded.dispatch, *make_case(1, rank, 151, 256, 2, 4).__dict__.values())
    return [missing, too_many]


def test_interface_is_that_of_the_installed_version() -> None:
    missing, too_many = run_ranks(2, _choose_interface)[0]
    assert missing[0] == "ImportError"
    assert "needs deep_ep.ElasticBuffer, which the installed DeepEP does not have" in missing[1]
    assert too_many == (
        "ValueError",
        "dispatch: x must have at most 150 tokens, for which there is room; got 151",
    )


def _given_buffers(rank: int, ranks: int) -> list[tuple[str, str]]:
    deep_ep = prepare()
    group = dist.group.WORLD
    errors = []
    case = make_case(1, rank, 8 + rank, 256, 2, 4)
    theirs: Any = AllToAllDispatcher(group, 4, transport="process_group")
    config = deep_ep.Buffer.get_dispatch_config(ranks)
    for buffer, interface in (
        (deep_ep.Buffer(group, config.get_nvl_buffer_size_hint(512, ranks)), "legacy"),
        (
            deep_ep.ElasticBuffer(
                group, num_max_tokens_per_rank=10, hidden=256, num_topk=2, deterministic=True
            ),
            "elastic",
        ),
    ):
        ours: Any = DeepEPDispatcher(group, 4, buffer=buffer)
        assert ours.interface == interface
        assert_equal(round_trip(ours, case, rank), round_trip(theirs, case, rank))
        larger = make_case(1, rank, 8, 512 * 1024, 2, 4)
        errors.append(raised(ours.dispatch, *larger.__dict__.values()))
        ours.close()
        del ours
        gc.collect()
        assert not buffer.destroyed
    more = make_case(1, rank, 11, 256, 2, 4)
    ours = DeepEPDispatcher(group, 4, buffer=buffer)
    errors.append(raised(ours.dispatch, *more.__dict__.values()))
    for options in ({"deterministic": True}, {"num_max_tokens_per_rank": 10}):
        buffer = deep_ep.ElasticBuffer(group, num_bytes=2**21, **options)
        errors.append(raised(lambda: DeepEPDispatcher(group, 4, buffer=buffer)))  # noqa: B023
    return errors


def test_a_given_buffer_is_used_and_left_alone() -> None:
    errors = run_ranks(2, _given_buffers)[0]
    assert {kind for kind, _ in errors} == {"ValueError"}
    for (_, message), part in zip(
        errors,
        [
            "needs H to be a multiple of 16, at most 8176; x has H = 524288",
            "need a buffer of",
            "at most 10 tokens, for which there is room; got 11",
            "made with num_max_tokens_per_rank",
            "made with deterministic=True; the one given is not",
        ],
        strict=True,
    ):
        assert part in message


def _refusals(rank: int, ranks: int, interface: str) -> list[tuple[str, str]]:
    prepare()
    group = dist.group.WORLD
    dispatcher = DeepEPDispatcher(group, 4, interface=interface)
    x, ids, weights = make_case(1, rank, 6, 256, 2, 4).__dict__.values()
    errors = [
        raised(dispatcher.dispatch, x.float(), ids, weights),
        raised(dispatcher.dispatch, x[:, :248], ids, weights),
        raised(dispatcher.dispatch, x, ids.repeat(1, 17), weights.repeat(1, 17)),
        raised(dispatcher.dispatch, x, ids[:5], weights),
        raised(dispatcher.dispatch, x, ids.short(), weights),
        raised(dispatcher.dispatch, x, ids, weights.long()),
        raised(dispatcher.dispatch, x[0], ids, weights),
    ]
    assert not any(call == "dispatch" for call, _ in stand_in.CALLS)
    tokens = dispatcher.dispatch(x.clone().requires_grad_(), ids, weights)
    assert isinstance(tokens.handle, DeepEPHandle)
    with pytest.raises(AttributeError):
        tokens.handle.tokens = 3  # type: ignore[misc]
    y = dispatcher.combine(tokens.x, tokens.handle)
    (grad,) = torch.autograd.grad(y.sum(), tokens.x, create_graph=True)
    errors += [
        raised(dispatcher.combine, torch.cat([tokens.x, x[:1]]), tokens.handle),
        raised(dispatcher.combine, tokens.x.float(), tokens.handle),
        raised(dispatcher.combine, tokens.x, tokens.handle._replace(group="gone")),
        raised(lambda: grad.sum().backward()),
    ]
    DeepEPDispatcher.device_type = "cuda"  # type: ignore[misc]
    errors.append(raised(dispatcher.dispatch, x, ids, weights))
    return errors


@pytest.mark.parametrize("interface", INTERFACES)
def test_refuses_what_deepep_does_not_take(interface: str) -> None:
    multiple = {"legacy": "of 16, at most 8176", "elastic": "of 256"}[interface]
    expected = [
        ("TypeError", "carries bfloat16; x is torch.float32. Convert it, or use transport"),
        ("ValueError", f"needs H to be a multiple {multiple}; x has H = 248"),
        ("ValueError", "K from 1 to 32; got [6, 34]"),
        ("ValueError", "[T, K] with T = 6 (x.shape[0]) and K from 1 to 32; got [5, 2]"),
        ("TypeError", "topk_ids must be one of int32, int64; got int16"),
        ("ValueError", "topk_weights must be [6, 2] like topk_ids, of a float dtype; got [6, 2]"),
        ("ValueError", "x must be [T, H]; got [256]"),
        ("ValueError", "tokens that its dispatch received; got"),
        ("TypeError", "y must be one of bfloat16; got float32"),
        ("ValueError", "handle is of group 'gone'"),
        ("RuntimeError", ""),
        ("ValueError", "DeepEP carries cuda tensors; x is on cpu. Use transport 'process_group'"),
    ]
    actual = run_ranks(2, _refusals, interface)[0]
    for (kind, message), (expected_kind, part) in zip(actual, expected, strict=True):
        assert (kind, part in message) == (expected_kind, True), message


def _constructor(rank: int, ranks: int) -> list[tuple[str, str]]:
    group = dist.group.WORLD
    sys.modules["deep_ep"] = None  # type: ignore[assignment]
    errors = [raised(lambda: build_dispatcher(group, 4, transport="deepep"))]
    prepare()
    made = build_dispatcher(group, 4, transport="deepep")
    assert "num_experts=4" in repr(made)
    assert copy.copy(made) is made
    assert "DeepEPDispatcher: it cannot be pickled" in raised(pickle.dumps, made)[1]
    return [
        *errors,
        raised(lambda: build_dispatcher(group, 4, transport="pigeon")),
        raised(lambda: build_dispatcher(group, 2, transport="deepep", placement=[0, 0])),
        raised(lambda: DeepEPDispatcher(group, 3 * ranks + 1)),
        raised(lambda: DeepEPDispatcher(group, 6, timeout=0)),
        raised(lambda: DeepEPDispatcher(group, 6, interface="fast")),
        raised(lambda: DeepEPDispatcher(group, 6, max_tokens=0)),
        raised(lambda: DeepEPDispatcher(group, 6, timeout=float("inf"))),
        raised(lambda: DeepEPDispatcher(group, 6.0)),
        raised(lambda: DeepEPDispatcher(3, 6)),
        raised(lambda: DeepEPDispatcher(group, 6, timeout=5, interface="legacy")),
        raised(lambda: DeepEPDispatcher(group, 514)),
        raised(lambda: DeepEPDispatcher(group, 2050, interface="legacy")),
    ]


def test_constructor_names_what_does_not_fit() -> None:
    expected = [
        ("ImportError", "Build it in this environment, from https://github.com/deepseek-ai/DeepEP"),
        ("ValueError", "auto, process_group, shared_memory, cuda_ipc, deepep; got 'pigeon'"),
        ("ValueError", "'deepep' knows no placement"),
        ("ValueError", "positive multiple of the group's size 2; got 7"),
        ("ValueError", "timeout must be positive and at most 1e+09, in seconds; got 0"),
        ("ValueError", "interface must be one of auto, elastic, legacy; got 'fast'"),
        ("ValueError", "max_tokens must be at least 1; got 0"),
        ("ValueError", "timeout must be positive and at most 1e+09, in seconds; got inf"),
        ("TypeError", "num_experts must be an integer; got 6.0"),
        ("TypeError", "group must be a ProcessGroup; got int"),
        ("ValueError", "deep_ep.Buffer has no timeout that can be set"),
        (
            "ValueError",
            "deep_ep.ElasticBuffer needs P <= 1024, E <= 2048, E / P <= 256; got P = 2 ranks and "
            "E = 514 experts",
        ),
        ("ValueError", "deep_ep.Buffer needs E / P <= 1024; got P = 2 ranks and E = 2050 experts"),
    ]
    for (kind, message), (expected_kind, part) in zip(
        run_ranks(2, _constructor)[0], expected, strict=True
    ):
        assert (kind, part in message) == (expected_kind, True), message


def _alone(rank: int, ranks: int) -> tuple[str, str]:
    prepare()
    return raised(lambda: DeepEPDispatcher(dist.group.WORLD, 4, interface="legacy"))


def test_legacy_refuses_numbers_of_ranks_without_kernels() -> None:
    ((kind, message),) = run_ranks(1, _alone)
    assert kind == "ValueError"
    assert "deep_ep.Buffer has no kernels for a group of 1 ranks" in message


def _auto(rank: int, ranks: int) -> dict[str, str]:
    prepare()
    group: Any = dist.group.WORLD
    said = {}

    def build(name: str, **options: Any) -> Any:
        dispatcher: Any = build_dispatcher(dist.new_group(range(ranks)), 4, **options)
        said[name] = dispatcher.explain()
        return dispatcher

    build("gloo")
    building.backend_of = lambda group, device: "nccl"  # type: ignore[assignment]
    build("one machine")
    building._machine = lambda: f"machine {rank}"  # type: ignore[assignment]
    build("placement", placement=[1, 0, 0, 1])
    dispatcher = build("chosen")
    assert isinstance(dispatcher, DeepEPDispatcher)
    case = make_case(1, rank, 9, 256, 2, 4)
    theirs: Any = AllToAllDispatcher(group, 4, transport="process_group")
    for x, handle in ((case.x, DeepEPHandle), (case.x.float(), tuple), (case.x[:, :40], tuple)):
        same = Case(x, case.ids, case.weights)
        result = round_trip(dispatcher, same, rank)  # type: ignore[arg-type]
        assert_equal(result, round_trip(theirs, same, rank))
        assert isinstance(result[0].handle, handle)
        assert isinstance(result[0].handle, DeepEPHandle) == (handle is DeepEPHandle)
    if rank == 1:
        sys.modules["deep_ep"] = None  # type: ignore[assignment]
    build("missing")
    prepare(1)
    build("timeout", timeout=30)
    return said


def test_auto_takes_deepep_only_between_machines() -> None:
    first, second = run_ranks(2, _auto)
    assert first == second, "the ranks decide alike"
    assert first["chosen"].startswith(
        "deepep, by deep_ep.ElasticBuffer, carries bfloat16 tensors of GPUs: the group spans "
        "several machines, and every rank can import deep_ep; of the rest, shared_memory carries"
    )
    for name, part in {
        "gloo": "the group's backend for GPUs is gloo, not nccl",
        "one machine": "all ranks are on one machine",
        "placement": "it knows no placement",
        "missing": "rank 1: DeepEPDispatcher: transport 'deepep' needs the package deep_ep",
        "timeout": "DeepEPDispatcher: deep_ep.Buffer has no timeout that can be set",
    }.items():
        assert first[name].startswith("shared_memory carries tensors of the CPU, process_group of")
        assert f"; deepep is not used: {part}" in first[name]


def _refused_on_the_other_way(rank: int, ranks: int) -> None:
    """What DeepEP does not carry goes another way, and so does what a rank refuses of it."""
    prepare()
    group: Any = dist.group.WORLD
    config = make_config(dtype=torch.float32)
    experts = GroupedExperts(config)
    experts.token_dispatcher = DeepEPDispatcher(
        group,
        config.n_routed_experts,
        max_tokens=64,
        otherwise=AllToAllDispatcher(group, config.n_routed_experts, transport="process_group"),
    )
    x, mask = torch.randn(6, config.dim), torch.ones(6, dtype=torch.bool)
    ids = torch.zeros(6, 2, dtype=(torch.int64, torch.float32)[rank])
    error, message = ((RuntimeError, "rank 1 .* its own arguments"), (TypeError, "indices"))[rank]
    with pytest.raises(error, match=message):
        experts(x, mask, torch.rand(6, 2), ids)


def test_refused_arguments_are_told_by_the_way_that_tokens_take() -> None:
    run_ranks(2, _refused_on_the_other_way, timeout=20)
