"""The adapter to DeepEP, against a stand-in of its interface that checks every call.

T tokens, H hidden size, K experts a token, E experts, P ranks.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_parallel.activation_checkpointing import make_selective_checkpoint_context_fn
from moe_parallel.dispatch import (
    AllToAllDispatcher,
    DeepEPDispatcher,
    DeepEPHandle,
    build_dispatcher,
    building,
)
from tests.parallel import stand_in_deep_ep as stand_in
from tests.parallel.definitions import make_config
from tests.parallel.ranks import run_ranks
from tests.parallel.test_dispatch import Case, apply_experts, raised, round_trip
from tests.parallel.test_expert_parallel import (
    check_half_precision,
    make_layer,
    run_expert_parallel,
)

INTERFACES = ("legacy", "elastic")


def prepare(version: int = 2) -> Any:
    """DeepEP of that version is installed, and takes the tensors of CPUs."""
    DeepEPDispatcher.device_type = "cpu"  # type: ignore[misc]
    return stand_in.install(version)


def make_case(
    seed: int, rank: int, tokens: int, hidden: int, top_k: int, experts: int, **options: Any
) -> Case:
    """Any rank's. Sums over the ranks are exact in float32, in whatever order."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    strided = options.get("strided", False)
    shape = (hidden, tokens) if strided else (tokens, hidden)
    x = torch.randn(shape, generator=generator).sign() * (
        1 + torch.rand(shape, generator=generator)
    )
    ids = torch.rand(tokens, experts, generator=generator).topk(top_k, dim=1).indices
    if options.get("dropped", False):
        drop = torch.rand(ids.shape, generator=generator)
        ids[drop < 0.4] = -1
        ids[drop > 0.8] = experts
    weights = 0.5 + torch.rand(tokens, top_k, generator=generator)
    x = x.to(torch.bfloat16)
    if strided:
        return Case(x.T, ids.T.contiguous().T.to(torch.int32), weights.T.contiguous().T)
    return Case(x, ids, weights)


def assert_equal(actual: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    """Bit for bit: the results of :func:`round_trip`."""
    (tokens, *values), (others, *truths) = actual, expected
    pairs = [
        (tokens.x, others.x),
        (tokens.topk_ids, others.topk_ids),
        (tokens.topk_weights, others.topk_weights),
        *zip(values, truths, strict=True),
    ]
    for value, truth in pairs:
        assert value.dtype == truth.dtype
        assert torch.equal(value, truth)


def _random_cases(rank: int, ranks: int, interface: str) -> None:
    prepare()
    group = dist.group.WORLD
    for seed, (hidden, top_k, per_rank, options) in enumerate(
        [
            (512, 2, 1, {}),
            (256, 3, 4, {"dropped": True}),
            (256, 5, 8, {"strided": True}),
            (768, 1, 2, {"dropped": True, "strided": True}),
        ]
    ):
        experts = ranks * per_rank
        tokens = [[7, 0, 40, 1], [0, 3, 0, 0], [65, 130, 2, 5], [0, 0, 0, 0]][seed][rank]
        top_k = min(top_k, experts)
        case = make_case(seed, rank, tokens, hidden, top_k, experts, **options)
        ours = DeepEPDispatcher(group, experts, interface=interface)
        theirs: Any = AllToAllDispatcher(group, experts, transport="process_group")
        result = round_trip(ours, case, rank)  # type: ignore[arg-type]
        assert_equal(result, round_trip(theirs, case, rank))
        assert result[0].num_rows == (result[0].topk_ids >= 0).sum()


@pytest.mark.parametrize(
    ("ranks", "interface"), [(1, "elastic"), *((n, i) for n in (2, 4) for i in INTERFACES)]
)
def test_gives_what_the_process_group_gives(ranks: int, interface: str) -> None:
    """Uneven and absent tokens, slots without expert, any strides and dtypes of indices."""
    run_ranks(ranks, _random_cases, interface)


def _weights_of_other_ranks(rank: int, ranks: int, interface: str) -> None:
    """Of a slot's gradients in several ranks, that of its expert's rank alone comes back."""
    prepare()
    group = dist.group.WORLD
    case = make_case(1, rank, 8 + rank, 256, 3, 8)
    x = torch.cat([case.x.new_zeros(1), case.x.flatten()])[1:].view_as(case.x)
    assert x.data_ptr() % 16, "where no copy engine can read it"
    grads = []
    for dispatcher in (
        DeepEPDispatcher(group, 8, interface=interface),
        AllToAllDispatcher(group, 8, transport="process_group"),
    ):
        weights = case.weights.clone().requires_grad_()
        tokens = dispatcher.dispatch(x, case.ids, weights)
        y = tokens.x * (2.0 + rank + tokens.topk_weights.sum(1, keepdim=True)).to(tokens.x.dtype)
        dispatcher.combine(y, tokens.handle).sum().backward()
        grads.append(weights.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("interface", INTERFACES)
def test_gradients_of_other_ranks_slots_are_left_out(interface: str) -> None:
    run_ranks(2, _weights_of_other_ranks, interface)


def _in_flight(rank: int, ranks: int, interface: str) -> None:
    """Four dispatches, finished in another order; the buffer grows and loses SMs meanwhile."""
    prepare()
    group = dist.group.WORLD
    sizes = [(9 + rank, 256, 2), (2000, 512, 3), (3 * rank, 256, 2), (1, 256, 1)]
    results = []
    for dispatcher in (
        DeepEPDispatcher(group, 4, interface=interface),
        AllToAllDispatcher(group, 4, transport="process_group"),
    ):
        cases = [make_case(i, rank, t, h, k, 4) for i, (t, h, k) in enumerate(sizes)]
        xs = [case.x.clone().requires_grad_() for case in cases]
        weights = [case.weights.clone().requires_grad_() for case in cases]
        arrived = [
            dispatcher.dispatch(x, case.ids, weight)
            for x, case, weight in zip(xs, cases, weights, strict=True)
        ]
        stand_in.Buffer.set_num_sms(10)
        outs: dict[int, Tensor] = {}
        for i in (2, 0, 3, 1):
            y = apply_experts(arrived[i], rank * 2)
            outs[i] = dispatcher.combine(y, arrived[i].handle)
        for i in (1, 3, 0, 2):
            outs[i].backward(torch.ones_like(outs[i]))
        stand_in.Buffer.set_num_sms(20)
        grads = [tensor.grad for tensor in (*xs, *weights)]
        results.append([*(outs[i] for i in range(4)), *grads])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert [call for call, _ in stand_in.CALLS if call in ("create", "destroy")] == [
        "create",
        "destroy",
        "create",
    ]


@pytest.mark.parametrize("interface", INTERFACES)
def test_several_are_in_flight(interface: str) -> None:
    run_ranks(2, _in_flight, interface)


def _life_of_buffers(rank: int, ranks: int, interface: str) -> None:
    prepare()

    def made() -> list[str]:
        names = [call for call, _ in stand_in.CALLS if call in ("create", "destroy")]
        stand_in.CALLS.clear()
        return names

    group: Any = dist.group.WORLD
    case = make_case(1, rank, 8, 256, 2, 4)
    first = DeepEPDispatcher(group, 4, interface=interface)
    second = DeepEPDispatcher(group, 8, interface=interface)
    other = DeepEPDispatcher(dist.new_group(range(ranks)), 4, interface=interface)
    assert made() == []
    for dispatcher in (first, second, first):
        dispatcher.dispatch(case.x, case.ids, case.weights)
    assert made() == ["create"]
    other.dispatch(case.x, case.ids, case.weights)
    assert made() == ["create"]
    del other
    gc.collect()
    assert made() == ["destroy"]

    tokens = first.dispatch(case.x.clone().requires_grad_(), case.ids, case.weights)
    first.close()
    second.close()
    assert made() == ["destroy"]
    kind, message = raised(second.combine, tokens.x, tokens.handle)
    assert kind == "RuntimeError"
    assert "was closed, and what was in flight is lost" in message

    x = case.x.clone().requires_grad_()
    tokens = first.dispatch(x, case.ids, case.weights)
    y = first.combine(tokens.x, tokens.handle)
    del first, second, dispatcher
    gc.collect()
    assert made() == ["create"], "the graph needs it"
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach() / case.x), "each token as often as it has ranks"
    del y, tokens, x
    gc.collect()
    assert made() == ["destroy"]


@pytest.mark.parametrize("interface", INTERFACES)
def test_a_group_has_one_buffer_while_it_is_needed(interface: str) -> None:
    run_ranks(2, _life_of_buffers, interface)


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
    assert "num_experts=4" in repr(build_dispatcher(group, 4, transport="deepep"))
    return [
        *errors,
        raised(lambda: build_dispatcher(group, 4, transport="pigeon")),
        raised(lambda: build_dispatcher(group, 2, transport="deepep", placement=[0, 0])),
        raised(lambda: DeepEPDispatcher(group, 3 * ranks + 1)),
        raised(lambda: DeepEPDispatcher(group, 6, timeout=0)),
        raised(lambda: DeepEPDispatcher(group, 6, interface="fast")),
        raised(lambda: DeepEPDispatcher(group, 6, max_tokens=0)),
        raised(lambda: DeepEPDispatcher(group, 6, timeout=5, interface="legacy")),
    ]


def test_constructor_names_what_does_not_fit() -> None:
    expected = [
        ("ImportError", "Build it in this environment, from https://github.com/deepseek-ai/DeepEP"),
        ("ValueError", "auto, process_group, shared_memory, cuda_ipc, deepep; got 'pigeon'"),
        ("ValueError", "'deepep' knows no placement"),
        ("ValueError", "positive multiple of the group's size 2; got 7"),
        ("ValueError", "timeout must be positive, in seconds; got 0"),
        ("ValueError", "interface must be one of auto, elastic, legacy; got 'fast'"),
        ("ValueError", "max_tokens must be at least 1; got 0"),
        ("ValueError", "deep_ep.Buffer has no timeout that can be set"),
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


def _layer(rank: int, ranks: int, version: int, dispatcher: str) -> dict[str, Tensor | None]:
    prepare(version)
    torch.set_default_dtype(torch.bfloat16)
    config = make_config(dtype=torch.bfloat16, dim=256, moe_inter_dim=48, expert_bias=True)
    layer = make_layer(config, dispatcher=dispatcher)
    result = run_expert_parallel(rank, ranks, layer, [40, 24])
    assert any(call == "repeat" for call, _ in stand_in.CALLS) == (dispatcher == "deepep")
    return result


@pytest.mark.parametrize("version", [1, 2])
def test_a_layer_gives_what_one_process_gives(version: int) -> None:
    """Bit for bit what the process group gives, and as near to one process as plain PyTorch."""
    actual = run_ranks(2, _layer, version, "deepep")[0]
    others = run_ranks(2, _layer, version, "process_group")[0]
    for name, value in actual.items():
        assert value is not None
        assert torch.equal(value, others[name]), name
    config = make_config(dtype=torch.bfloat16, dim=256, moe_inter_dim=48, expert_bias=True)
    check_half_precision(actual, config)


def _recomputed(rank: int, ranks: int, interface: str) -> None:
    """Checkpointing sends the tokens once more; torch.compile leaves the calls as they are."""
    prepare()
    dispatcher = DeepEPDispatcher(dist.group.WORLD, 4, interface=interface)
    case = make_case(1, rank, 9 - rank, 256, 2, 4)

    def layer(x: Tensor, weights: Tensor) -> Tensor:
        tokens = dispatcher.dispatch(x, case.ids, weights)
        return dispatcher.combine(apply_experts(tokens, rank * 2), tokens.handle)

    ways = {
        "plain": layer,
        "checkpoint": lambda *inputs: checkpoint(layer, *inputs, use_reentrant=False),
        "selective": lambda *inputs: checkpoint(
            layer, *inputs, use_reentrant=False, context_fn=make_selective_checkpoint_context_fn()
        ),
        "compile": torch.compile(layer, backend="eager"),
    }
    results = {}
    for name, run in ways.items():
        stand_in.CALLS.clear()
        x, weights = case.x.clone().requires_grad_(), case.weights.clone().requires_grad_()
        y = run(x, weights)
        y.backward(torch.ones_like(y))
        results[name] = [y, x.grad, weights.grad]
        calls = [call for call, _ in stand_in.CALLS]
        assert calls.count("dispatch") == (1 if name in ("plain", "compile") else 2)
    for name in ways:
        for value, plain in zip(results[name], results["plain"], strict=True):
            assert torch.equal(value, plain), name


@pytest.mark.parametrize("interface", INTERFACES)
def test_can_be_recomputed_and_compiled(interface: str) -> None:
    run_ranks(2, _recomputed, interface)
