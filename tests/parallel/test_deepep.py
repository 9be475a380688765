"""The adapter to DeepEP, against a stand-in of its interface that checks every call.

T tokens, H hidden size, K experts a token, E experts, P ranks.
"""

from __future__ import annotations

import gc
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
