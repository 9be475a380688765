"""Calls of the adapter to DeepEP that begin and end apart, against the stand-in: what they bring is
not there before they end, and then the same bits.

T tokens, H hidden size, K experts a token, E experts, P ranks.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from moe_parallel import BackendConfig, MoE
from moe_parallel.dispatch import AllToAllDispatcher, DeepEPDispatcher, DeepEPHandle, Dispatched
from moe_parallel.dispatch.deepep_buffers import Begun
from moe_parallel.experts import GroupedExperts
from moe_parallel.parallelizer import ExpertParallel
from tests.parallel import stand_in_deep_ep as stand_in
from tests.parallel.definitions import make_config, randomize
from tests.parallel.ranks import run_ranks
from tests.parallel.test_deepep import INTERFACES, assert_equal, make_case, prepare
from tests.parallel.test_dispatch import Case, apply_experts, raised, round_trip


class Apart:
    """A dispatcher by whose calls that begin and end apart."""

    def __init__(self, of: DeepEPDispatcher) -> None:
        self.of, self.num_experts, self.num_ranks = of, of.num_experts, of.num_ranks

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Dispatched:
        return self.of.dispatch_async(x, ids, weights).wait()

    def combine(self, y: Tensor, handle: Any) -> Tensor:
        return self.of.combine_async(y, handle).wait()


def _round_trips(rank: int, ranks: int, interface: str) -> None:
    """There and back, with gradients; and what goes another way."""
    prepare()
    group: Any = dist.group.WORLD
    dispatcher = DeepEPDispatcher(
        group,
        8,
        interface=interface,
        max_tokens=64,
        otherwise=AllToAllDispatcher(group, 8, transport="process_group"),
    )
    for tokens, dropped, dtype in (
        (9 + rank, False, torch.bfloat16),
        (40 * rank, True, torch.bfloat16),
        (9, False, torch.float32),
    ):
        case = make_case(tokens, rank, tokens, 256, 3, 8, dropped=dropped)
        same = Case(case.x.to(dtype), case.ids, case.weights)
        expected = round_trip(dispatcher, same, rank)  # type: ignore[arg-type]
        result = round_trip(Apart(dispatcher), same, rank)  # type: ignore[arg-type]
        assert_equal(result, expected)
        assert isinstance(result[0].handle, DeepEPHandle) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("interface", INTERFACES)
def test_the_same_bits_and_gradients(interface: str) -> None:
    run_ranks(2, _round_trips, interface)


def _apart(rank: int, ranks: int, interface: str) -> None:
    """Two dispatches, then two combines, begun before the first of each is waited for."""
    prepare()
    group, first = dist.group.WORLD, rank * 8 // ranks
    dispatcher = DeepEPDispatcher(group, 8, interface=interface, max_tokens=64)
    cases = [
        make_case(seed, rank, (tokens + 7 * rank) % 40, 256, 3, 8, dropped=seed == 1)
        for seed, tokens in enumerate((33, 1))
    ]
    expected = [round_trip(dispatcher, case, rank) for case in cases]  # type: ignore[arg-type]
    stand_in.CALLS.clear()
    begun = [dispatcher.dispatch_async(case.x, case.ids, case.weights) for case in cases]
    assert [call for call, _ in stand_in.CALLS] == ["dispatch", "dispatch"]
    tokens = [pending.wait() for pending in begun]
    kind, message = raised(begun[0].wait)
    assert (kind, "has ended already; wait for it once" in message) == ("RuntimeError", True)
    returning = [
        dispatcher.combine_async(apply_experts(t, first), t.handle) for t in reversed(tokens)
    ]
    outs = [pending.wait() for pending in returning][::-1]
    for got, out, (arrived, y, *_) in zip(tokens, outs, expected, strict=True):
        assert_equal((got, out), (arrived, y))
        assert got.num_rows == arrived.num_rows


@pytest.mark.parametrize("interface", INTERFACES)
def test_calls_may_begin_and_end_apart(interface: str) -> None:
    run_ranks(2, _apart, interface)


def _shared_experts(rank: int, ranks: int, version: int) -> None:
    """Computed while the tokens travel, or after: the same bits, and likewise in backward."""
    prepare(version)
    options = {"n_shared_experts": 1, "shared_expert_gate": True}
    config = make_config(dtype=torch.bfloat16, dim=256, moe_inter_dim=48, **options)
    torch.manual_seed(0)
    layers = [MoE(config, BackendConfig(dispatcher="deepep")) for _ in range(2)]
    randomize(layers[0])
    layers[1].load_state_dict(layers[0].state_dict())
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))

    class After(GroupedExperts):
        overlaps = False  # type: ignore[assignment]

    layers[1].experts.__class__ = After
    end = Begun.end

    def noted(begun: Begun[Any]) -> Any:
        stand_in.CALLS.append(("end", {}))
        return end(begun)

    Begun.end = noted  # type: ignore[method-assign]
    results = []
    torch.manual_seed(rank)
    x = torch.randn(11 + rank, 256).bfloat16()
    orders = (
        "dispatch shared end combine end | repeat combine shared end",
        "dispatch end combine end shared | shared repeat combine end",
    )
    for layer, order in zip(layers, orders, strict=True):
        ExpertParallel()._apply(layer.experts, mesh)
        assert layer.experts.overlaps == (layer is layers[0])
        layer.shared_experts.register_forward_hook(lambda *_: stand_in.CALLS.append(("shared", {})))
        layer.shared_experts.register_full_backward_hook(
            lambda *_: stand_in.CALLS.append(("shared", {}))
        )
        mine = x.clone().requires_grad_()
        stand_in.CALLS.clear()
        y = layer(mine)
        stand_in.CALLS.append(("|", {}))
        y.float().square().sum().backward()
        calls = " ".join(call for call, _ in stand_in.CALLS if call != "create")
        assert calls == order
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        local = [g.to_local() if hasattr(g, "to_local") else g for g in grads]
        results.append([y.detach(), mine.grad, *local])
    assert len(results[0]) == len(results[1]) > 5
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("version", [1, 2])
def test_a_layer_computes_its_shared_experts_while_tokens_travel(version: int) -> None:
    run_ranks(2, _shared_experts, version)


def _inputs_first(rank: int, ranks: int, interface: str) -> None:
    """A pipeline's backward of the inputs, then of weights that meet them at the dispatch alone."""
    prepare()
    dispatcher = DeepEPDispatcher(dist.group.WORLD, 8, interface=interface, max_tokens=64)
    case = make_case(0, rank, 20 + rank, 256, 3, 8)
    results = []
    for split in (False, True):
        x, scores = case.x.clone().requires_grad_(), case.weights.clone().requires_grad_()
        tokens = dispatcher.dispatch_async(x, case.ids, scores.sigmoid()).wait()
        y = dispatcher.combine(apply_experts(tokens, rank * 8 // ranks), tokens.handle)
        loss = y.float().square().sum()
        if split:
            parameters: list[Any] = [scores]
            _, groups = stage_backward_input([loss], None, [x], iter(parameters))
            stage_backward_weight(iter(parameters), groups)
        else:
            loss.backward()
        results.append((x.grad, scores.grad))
    for whole, halves in zip(*results, strict=True):
        assert whole is not None
        assert torch.equal(whole, halves)


@pytest.mark.parametrize("interface", INTERFACES)
def test_gradients_of_inputs_and_then_of_weights(interface: str) -> None:
    run_ranks(2, _inputs_first, interface)
