"""Exchanges that begin and end apart: the same bits, whatever happens in between.

T tokens, H hidden size, K experts a token, E experts, P ranks.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from moe_kernels import _C
from moe_parallel import BackendConfig, MoE
from moe_parallel.dispatch import AllToAllDispatcher, Dispatched, ops
from moe_parallel.experts import GroupedExperts
from moe_parallel.parallelizer import ExpertParallel
from moe_parallel.torch_internals import store_of
from tests.parallel.definitions import make_config, randomize
from tests.parallel.ranks import run_ranks
from tests.parallel.test_dispatch import WAYS, Case, apply_experts, dispatcher_of, make_case, raised

EXPERTS = 12


def begin(dispatcher: AllToAllDispatcher, case: Case) -> tuple[Any, Tensor, Tensor]:
    x, weights = case.x.clone().requires_grad_(), case.weights.clone().requires_grad_()
    return dispatcher.dispatch_async(x, case.ids, weights), x, weights


def same(a: Dispatched, b: Dispatched) -> bool:
    names = ("x", "topk_ids", "topk_weights")
    return a.num_rows == b.num_rows and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in names
    )


def _equal(rank: int, ranks: int, way: str) -> None:
    dispatcher = dispatcher_of(way, EXPERTS)
    for seed, dtype in enumerate((torch.bfloat16, torch.float32)):
        case = make_case(seed, rank, 30 + rank, 40, 3, EXPERTS, dtype=dtype, weight_dtype=dtype)
        results = []
        for separately in (False, True):
            x, weights = case.x.clone().requires_grad_(), case.weights.clone().requires_grad_()
            if separately:
                tokens = dispatcher.dispatch_async(x, case.ids, weights).wait()
                rows = apply_experts(tokens, rank * EXPERTS // ranks)
                y = dispatcher.combine_async(rows, tokens.handle).wait()
            else:
                tokens = dispatcher.dispatch(x, case.ids, weights)
                rows = apply_experts(tokens, rank * EXPERTS // ranks)
                y = dispatcher.combine(rows, tokens.handle)
            y.square().sum().backward()
            results.append((tokens, y, x.grad, weights.grad))
        assert same(results[0][0], results[1][0])
        for a, b in zip(results[0][1:], results[1][1:], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_same_bits_and_gradients(ranks: int, way: str) -> None:
    run_ranks(ranks, _equal, way)


def _in_flight(rank: int, ranks: int, way: str) -> None:
    """Several begun before the first is waited for, in any order that the ranks share."""
    dispatcher, other = dispatcher_of(way, EXPERTS), dispatcher_of(way, EXPERTS)
    cases = [make_case(seed, rank, 20 + seed, 16, 2, EXPERTS) for seed in range(3)]
    expected = [dispatcher.dispatch(case.x, case.ids, case.weights) for case in cases]
    for order in ((0, 1, 2), (2, 0, 1)):
        begun = [begin(d, c) for d, c in zip((dispatcher, other, dispatcher), cases, strict=True)]
        tokens = {seed: begun[seed][0].wait() for seed in order}
        for seed in order:
            assert same(tokens[seed], expected[seed])
        returning = {s: dispatcher.combine_async(tokens[s].x, tokens[s].handle) for s in order}
        dispatcher.dispatch(cases[0].x, cases[0].ids, cases[0].weights)
        for seed in reversed(order):
            y = returning[seed].wait()
            (dx,) = torch.autograd.grad(y.sum(), begun[seed][1])
            assert torch.equal(y, dispatcher.combine(expected[seed].x, expected[seed].handle))
            rows = (cases[seed].ids * ranks // EXPERTS).sort(1).values
            copies = 1 + (rows[:, 1:] != rows[:, :-1]).sum(1, keepdim=True)
            assert torch.equal(dx, copies.double().expand_as(dx))
    pending, *_ = begin(dispatcher, cases[0])
    pending.wait()
    kind, message = raised(pending.wait)
    assert kind == "RuntimeError"
    assert "dispatch: this call has ended already; wait for it once" in message
    # What nobody waits for ends by itself.
    begin(dispatcher, cases[1])
    assert same(dispatcher.dispatch(cases[2].x, cases[2].ids, cases[2].weights), expected[2])


@pytest.mark.parametrize("way", WAYS[:2])
def test_any_number_in_flight(way: str) -> None:
    run_ranks(2, _in_flight, way)


def _not_waited_for(rank: int, ranks: int) -> None:
    """What nobody waits for is not kept, whether it has ended by then or not."""
    dispatcher = dispatcher_of("shared_memory", EXPERTS)
    case = make_case(1, rank, 2000, 512, 2, EXPERTS, dtype=torch.float32)
    reserved = []
    for turn in range(20):
        pending, *_ = begin(dispatcher, case)
        if turn % 3 == 0:  # so that it ends before it is dropped
            dispatcher.dispatch(case.x, case.ids, case.weights)
        tokens = None if turn % 3 else dispatcher.dispatch(case.x, case.ids, case.weights)
        if tokens is not None and turn % 2 == 0:
            dispatcher.combine_async(tokens.x, tokens.handle)
        del pending, tokens
        reserved.append(_C.recall_joined("0")[0].reserved_bytes)
    assert reserved[6] == reserved[-1], reserved


def test_what_nobody_waits_for_is_not_kept() -> None:
    run_ranks(2, _not_waited_for)


def _reads_late(rank: int, ranks: int) -> None:
    """Rank 1 has ended its combine and begun the next before rank 0 reads what it left."""
    dispatcher, store = dispatcher_of("shared_memory", EXPERTS), store_of(dist.group.WORLD)
    case = make_case(1, rank, 9, 6, 2, EXPERTS)
    tokens = dispatcher.dispatch(case.x, case.ids, case.weights)
    expected = [dispatcher.combine(y, tokens.handle) for y in (tokens.x, -tokens.x)]
    if rank == 0:
        first = dispatcher.combine_async(tokens.x, tokens.handle)
        store.set("begun", "")
        store.wait(["next"])
        y = first.wait()
        second = dispatcher.combine_async(-tokens.x, tokens.handle)
    else:
        store.wait(["begun"])
        y = dispatcher.combine(tokens.x, tokens.handle)
        second = dispatcher.combine_async(-tokens.x, tokens.handle)
        store.set("next", "")
    assert torch.equal(y, expected[0])
    assert torch.equal(second.wait(), expected[1])


def test_what_a_rank_leaves_stays_until_it_was_read() -> None:
    run_ranks(2, _reads_late, timeout=20)


def _threads(rank: int, ranks: int) -> None:
    """A thread waits for its turn while another leaves a call open, and then waits for it."""
    dispatcher = dispatcher_of("shared_memory", EXPERTS)
    store = store_of(dist.group.WORLD)
    case = make_case(1, rank, 9, 6, 2, EXPERTS)
    arguments = (case.x, case.ids, case.weights)
    expected = dispatcher.dispatch(*arguments)
    for turn in range(5):
        thread = threading.Thread(target=dispatcher.dispatch, args=arguments)
        if rank == 1:  # makes the three calls that rank 0 makes, late
            store.get(f"{turn}")
            time.sleep(0.1)
            thread.run()
        else:
            threading.Timer(0.05, thread.start).start()
            store.set(f"{turn}", "")
        dispatcher.dispatch(*arguments)
        pending = dispatcher.dispatch_async(*arguments)
        while rank == 0 and thread.ident is None:
            time.sleep(0.01)
        if rank == 0:
            thread.join()
        assert same(pending.wait(), expected)


def test_a_thread_that_waits_for_its_turn_ends_what_another_leaves_open() -> None:
    run_ranks(2, _threads, timeout=20)


_EXITS = """
import atexit, sys, threading, time
import torch
import torch.distributed as dist
from moe_parallel.dispatch import AllToAllDispatcher

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
dispatcher = AllToAllDispatcher(dist.group.WORLD, 2)
ids = torch.zeros(1, 1, dtype=torch.int64)
call = lambda: dispatcher.dispatch(torch.ones(1, 2), ids, torch.ones(1, 1))
call()
if rank == 1:
    sys.stdin.read()
else:
    threading.Thread(target=call, daemon=True).start()
    time.sleep(1)
    # The interpreter ends with its lock held for longer than a wait lasts without looking up.
    nothing = [None] * 30_000_000
    atexit.register(nothing.count, 1)
    atexit.register(nothing.count, 1)
"""


@pytest.mark.slow
def test_a_thread_that_waits_does_not_keep_the_interpreter_from_ending(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _EXITS, str(rank), str(tmp_path / "store")],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, errors = ranks[0].communicate(timeout=120)
        assert ranks[0].returncode == 0, errors
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def _late(rank: int, ranks: int) -> None:
    """Rank 1 begins only when rank 0 says that it has begun."""
    dispatcher = dispatcher_of("shared_memory", EXPERTS)
    store = store_of(dist.group.WORLD)
    case = make_case(1, rank, 9, 6, 2, EXPERTS)
    for turn in range(3):
        if rank == 0:
            pending, *_ = begin(dispatcher, case)
            store.set(f"begun {turn}", "")
        else:
            store.get(f"begun {turn}")
            pending, *_ = begin(dispatcher, case)
        tokens = pending.wait()
        if rank == 0:
            returning = dispatcher.combine_async(tokens.x, tokens.handle)
            store.set(f"returned {turn}", "")
        else:
            store.get(f"returned {turn}")
            returning = dispatcher.combine_async(tokens.x, tokens.handle)
        returning.wait()


def test_shared_memory_waits_for_nobody_to_begin() -> None:
    run_ranks(2, _late, timeout=20)


def _errors(rank: int, ranks: int, way: str) -> list[tuple[str, str]]:
    dispatcher = dispatcher_of(way, EXPERTS)
    case = make_case(1, rank, 9, 6 + rank, 2, EXPERTS)
    good = make_case(1, rank, 9, 6, 2, EXPERTS)
    tokens = dispatcher.dispatch(good.x, good.ids, good.weights)
    wrong = tokens.x[1:] if rank == 1 else tokens.x
    return [
        raised(lambda: dispatcher.dispatch_async(case.x, case.ids, case.weights).wait()),
        raised(lambda: dispatcher.combine_async(wrong, tokens.handle).wait()),
        raised(lambda: dispatcher.dispatch_async(good.x, good.ids, good.weights).wait()),
    ]


@pytest.mark.parametrize("way", WAYS[:2])
def test_calls_that_do_not_match_are_an_error_on_every_rank(way: str) -> None:
    for rank, (sizes, rows, fine) in enumerate(run_ranks(2, _errors, way)):
        assert sizes[0] == "ValueError"
        assert "must agree on H (the columns of x)" in sizes[1]
        assert rows[0] == ("ValueError" if rank == 1 else "RuntimeError")
        assert fine[0] == "nothing"


def note_backwards(phase: str, events: list[str]) -> None:
    """Note when the backward of an exchange begins and when it ends."""
    for half in ("start", "finish"):
        name = f"_{phase}_backward_{half}"
        op = getattr(ops, name)

        def noted(*arguments: Any, op: Any = op, half: str = half) -> Any:
            events.append(f"{phase} {half}")
            return op(*arguments)

        setattr(ops, name, noted)


def _between(rank: int, ranks: int, way: str) -> None:
    """What is computed between the halves of a call has its backward between those of its own."""
    dispatcher = dispatcher_of(way, EXPERTS)
    case = make_case(0, rank, 20 + rank, 16, 2, EXPERTS)
    events: list[str] = []

    def watched(value: Tensor, name: str) -> Tensor:
        result = value.exp()
        result.register_hook(lambda _: events.append(name))
        return result

    for phase in ("dispatch", "combine"):
        note_backwards(phase, events)
    pending, x, _ = begin(dispatcher, case)
    first = watched(x, "first")
    tokens = pending.wait()
    returning = dispatcher.combine_async(apply_experts(tokens, 0), tokens.handle)
    second = watched(x, "second")
    y = returning.wait()
    (first + second + y).sum().backward()
    assert events == [
        *("combine start", "second", "combine finish"),
        *("dispatch start", "first", "dispatch finish"),
    ]


@pytest.mark.parametrize("way", WAYS)
def test_backward_computes_while_gradients_travel(way: str) -> None:
    run_ranks(2, _between, way)


def _some_gradients(rank: int, ranks: int, way: str) -> None:
    """Of x alone, of the weights alone, twice through one graph: as in one piece."""
    dispatcher = dispatcher_of(way, EXPERTS)
    case = make_case(0, rank, 20 + rank, 16, 2, EXPERTS)

    def gradients(separately: bool, of_x: bool, of_weights: bool) -> list[Tensor]:
        x = case.x.clone().requires_grad_(of_x)
        weights = case.weights.clone().requires_grad_(of_weights)
        if separately:
            tokens = dispatcher.dispatch_async(x, case.ids, weights).wait()
            y = dispatcher.combine_async(
                tokens.x * tokens.topk_weights.sum(1, keepdim=True), tokens.handle
            ).wait()
        else:
            tokens = dispatcher.dispatch(x, case.ids, weights)
            y = dispatcher.combine(
                tokens.x * tokens.topk_weights.sum(1, keepdim=True), tokens.handle
            )
        inputs = [value for value in (x, weights) if value.requires_grad]
        once = torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)
        again = torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)
        only = torch.autograd.grad(y.square().sum(), inputs[-1:])
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
        assert torch.equal(only[0], once[-1])
        return list(once)

    for needs in ((True, False), (False, True), (True, True)):
        found = zip(gradients(True, *needs), gradients(False, *needs), strict=True)
        assert all(torch.equal(a, b) for a, b in found)


@pytest.mark.parametrize("way", WAYS)
def test_some_gradients_are_those_of_a_call_in_one_piece(way: str) -> None:
    run_ranks(2, _some_gradients, way)


def _inputs_first(rank: int, ranks: int, way: str) -> None:
    """A pipeline's backward of the inputs, then of weights that meet them at the dispatch alone."""
    dispatcher = dispatcher_of(way, EXPERTS)
    case = make_case(0, rank, 20 + rank, 16, 2, EXPERTS)

    def gradients(separately: bool) -> tuple[Tensor | None, ...]:
        x, scores = case.x.clone().requires_grad_(), case.weights.clone().requires_grad_()
        if separately:
            tokens = dispatcher.dispatch_async(x, case.ids, scores.sigmoid()).wait()
        else:
            tokens = dispatcher.dispatch(x, case.ids, scores.sigmoid())
        loss = dispatcher.combine(apply_experts(tokens, 0), tokens.handle).square().sum()
        parameters: list[Any] = [scores]
        _, groups = stage_backward_input([loss], None, [x], iter(parameters))
        stage_backward_weight(iter(parameters), groups)
        return x.grad, scores.grad

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_inputs_and_then_of_weights(way: str) -> None:
    run_ranks(2, _inputs_first, way)


def _not_given_away(rank: int, ranks: int, way: str) -> None:
    """Nobody else gets a gradient that travels for its own, as a leaf would, to change in place."""
    dispatcher = dispatcher_of(way, EXPERTS)
    case = make_case(0, rank, 20 + rank, 16, 2, EXPERTS)
    rows = dispatcher.dispatch(case.x, case.ids, case.weights).x.shape
    leaf = torch.zeros(rows, dtype=case.x.dtype, requires_grad=True)
    pending, *_ = begin(dispatcher, case)
    other = leaf.clone()  # its backward comes while the gradient travels
    tokens = pending.wait()
    travels: list[int] = []
    tokens.x.register_hook(lambda grad: travels.append(grad.data_ptr()))
    ((tokens.x + other) * torch.ones(16, dtype=case.x.dtype)).sum().backward()
    assert leaf.grad is not None
    assert travels != [leaf.grad.data_ptr()]


@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_that_travels_is_not_given_away(way: str) -> None:
    run_ranks(2, _not_given_away, way)


def _layer(rank: int, ranks: int, way: str, latent: int | None) -> None:
    """Shared experts computed while the tokens travel, or after: the same bits."""
    config = make_config(n_shared_experts=1, shared_expert_gate=True, moe_latent_size=latent)
    torch.manual_seed(0)
    layers = [MoE(config, BackendConfig(dispatcher=way)) for _ in range(2)]
    randomize(layers[0])
    layers[1].load_state_dict(layers[0].state_dict())
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))
    for layer in layers:
        ExpertParallel()._apply(layer.experts, mesh)
    assert layers[0].experts.overlaps
    calls = []

    class After(GroupedExperts):
        overlaps = False  # type: ignore[assignment]

    layers[1].experts.__class__ = After
    for name, layer in zip(("while", "after"), layers, strict=True):
        layer.shared_experts.register_forward_hook(lambda *_, name=name: calls.append(name))
        layer.shared_experts.register_full_backward_hook(lambda *_: calls.append("backward"))
    note_backwards("dispatch", calls)
    torch.manual_seed(rank)
    x = torch.randn(200, 13, dtype=torch.float64)
    outputs = []
    for layer in layers:
        mine = x.clone().requires_grad_()
        y = layer(mine)
        y.square().sum().backward()
        outputs.append((y, mine.grad, [p.grad for p in layer.parameters()]))
    around = ["dispatch start", "backward", "dispatch finish"]
    assert calls == ["while", *around, "after", "backward"]
    (y, dx, grads), (other_y, other_dx, other_grads) = outputs
    assert torch.equal(y, other_y)
    assert torch.equal(dx, other_dx)
    for a, b in zip(grads, other_grads, strict=True):
        assert torch.equal(*(t.to_local() if hasattr(t, "to_local") else t for t in (a, b)))
    copy.deepcopy(layers[0])


@pytest.mark.parametrize("latent", [None, 6])
@pytest.mark.parametrize("way", WAYS[:2])
def test_a_layer_computes_its_shared_experts_while_tokens_travel(
    way: str, latent: int | None
) -> None:
    run_ranks(2, _layer, way, latent)
