"""The transport between GPUs of one machine, its device code run by CPU processes: what arrives, in
all sizes, and what comes back.

T tokens, H hidden size, K experts a token, E experts, P ranks, U tokens received, C capacity.
"""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from moe_kernels import _C
from moe_parallel import BackendConfig, MoE
from moe_parallel.dispatch import AllToAllDispatcher, build_dispatcher
from moe_parallel.dispatch.joining import EMULATE_GPUS
from moe_parallel.parallelizer import ExpertParallel
from tests.parallel.definitions import make_config, randomize
from tests.parallel.emulated_gpus import assert_equal, counts, cuda_ipc, received
from tests.parallel.ranks import run_ranks
from tests.parallel.test_dispatch import (
    Case,
    apply_experts,
    dispatcher_of,
    expected_tokens,
    make_case,
    raised,
    round_trip,
)
from tests.parallel.test_dispatch_placement import draw_placement

ROOT = Path(__file__).parents[2]


def arguments(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    return case.x, case.ids, case.weights


def _random_cases(rank: int, ranks: int, seeds: list[int]) -> None:
    """Against the definition there, and bit for bit as process_group there and back."""
    for seed in seeds:
        draw = random.Random(seed)
        tokens = [draw.choice([0, 1, 2, 17, 40]) for _ in range(ranks)]
        experts = ranks * draw.choice([1, 2, 5])
        dtype = draw.choice([torch.bfloat16, torch.float16, torch.float32, torch.float64])
        settings: dict[str, Any] = {
            "hidden": draw.choice([1, 3, 64, 77, 300]),
            "top_k": draw.randint(1, min(experts, 9)),
            "experts": experts,
            "skew": draw.choice(["even", "even", "one_expert", "dropped"]),
            "ids_dtype": draw.choice([torch.int32, torch.int64]),
            "strided": draw.random() < 0.3,
            "dtype": dtype,
            "weight_dtype": draw.choice([dtype, torch.float32]),
        }
        cases = [make_case(seed, r, tokens[r], **settings) for r in range(ranks)]
        dispatcher = cuda_ipc(experts, 40)
        got, *results = round_trip(dispatcher, cases[rank], rank)
        x, ids, weights = expected_tokens(cases, rank, experts // ranks)
        mine = received(got, ranks)
        assert len(got.x) == 40 * ranks
        assert torch.equal(mine.x, x), (seed, "x")
        assert torch.equal(mine.topk_ids, ids), (seed, "ids")
        assert torch.equal(mine.topk_weights, weights), (seed, "weights")
        assert got.num_rows == 40 * ranks * settings["top_k"]
        there, *twins = round_trip(dispatcher_of("process_group", experts), cases[rank], rank)
        assert_equal(got, there, ranks)
        sent = [sum(counts(got, ranks)[0]), sum(there.handle.plan[:ranks].tolist())]
        assert sent[0] == sent[1]
        for name, ours, theirs in zip(("y", "dx", "dweights"), results, twins, strict=True):
            assert torch.equal(ours, theirs), (seed, name)
    dispatcher.check()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_exchange_is_the_definition(ranks: int) -> None:
    run_ranks(ranks, _random_cases, list(range(16)))


def _special_numbers(rank: int, ranks: int) -> None:
    """Sums that overflow, are tiny, lie between two numbers or are none."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        limits = torch.finfo(dtype)
        values = torch.tensor(
            (
                *(limits.max, -limits.max, limits.tiny, limits.smallest_normal / 4),
                *(1 + limits.eps, float("inf"), float("nan"), -0.0, limits.eps / 2, 3.0),
            ),
            dtype=torch.float64,
        ).to(dtype)
        x = values[torch.randint(10, (64, 40), generator=torch.Generator().manual_seed(rank))]
        ids = torch.arange(64)[:, None] % 4 + torch.arange(4)
        case = Case(x, ids % 4, torch.ones(64, 4, dtype=dtype))
        results = []
        for dispatcher in (cuda_ipc(4), dispatcher_of("process_group", 4)):
            tokens = dispatcher.dispatch(*arguments(case))
            results.append(dispatcher.combine(tokens.x, tokens.handle))
        assert torch.equal(results[0].isnan(), results[1].isnan())
        assert torch.equal(results[0].nan_to_num(7.0), results[1].nan_to_num(7.0)), dtype


def test_sums_are_rounded_as_everywhere() -> None:
    run_ranks(4, _special_numbers)


def _placements(rank: int, ranks: int) -> None:
    for seed in range(8):
        draw = random.Random(seed)
        experts, copies = draw.randint(1, 9), seed % 2 == 1
        owners = draw_placement(draw, experts, ranks, copies)
        case = make_case(seed, rank, draw.choice([0, 7, 30]), 12, min(experts, 3), experts)
        both = (
            cuda_ipc(experts, placement=owners),
            dispatcher_of("process_group", experts, placement=owners),
        )
        with torch.no_grad():
            got, expected = (dispatcher.dispatch(*arguments(case)) for dispatcher in both)
            assert_equal(got, expected, ranks)
            sums = [
                dispatcher.combine(apply_experts(tokens, 0), tokens.handle)
                for dispatcher, tokens in zip(both, (got, expected), strict=True)
            ]
        assert torch.equal(*sums)


@pytest.mark.parametrize("ranks", [2, 3])
def test_experts_may_be_anywhere(ranks: int) -> None:
    run_ranks(ranks, _placements)


def _payloads(rank: int, ranks: int) -> None:
    """float8 tokens with their scales, and rows of numbers."""
    dispatcher, other = cuda_ipc(6), dispatcher_of("process_group", 6)
    case = make_case(1, rank, 8 + rank, 37, 3, 6, skew="dropped")
    float8 = case.x.float().to(torch.float8_e4m3fn)
    for extra in (
        case.x[:, :4].float(),
        torch.arange(len(case.x) * 6).view(-1, 2, 3).short(),
        torch.full((len(case.x),), rank),
        torch.empty(len(case.x), 0),
        torch.ones(len(case.x), dtype=torch.bool),
    ):
        sent = (float8, case.ids, case.weights)
        got, expected = (d.dispatch(*sent, extra=extra) for d in (dispatcher, other))
        later = dispatcher.dispatch_async(*sent, extra=extra).wait()
        for tokens in (got, later):
            assert_equal(tokens, expected, ranks)
            rows = received(tokens, ranks).extra
            assert rows is not None
            assert expected.extra is not None
            assert rows.dtype == extra.dtype
            assert torch.equal(rows, expected.extra)
            assert tokens.extra is not None
            assert tokens.extra.shape == (len(tokens.x), *extra.shape[1:])
        assert dispatcher.dispatch(*sent).extra is None


def test_any_rows_travel_with_the_tokens() -> None:
    run_ranks(3, _payloads)


def _frozen_inputs(rank: int, ranks: int) -> None:
    """Only what needs a gradient travels in backward; what the loss does not use is zero."""
    for way in ("cuda_ipc", "process_group"):
        dispatcher = cuda_ipc(4) if way == "cuda_ipc" else dispatcher_of(way, 4)
        case = make_case(5, rank, 6, 4, 2, 4)
        x, weights = case.x.clone().requires_grad_(), case.weights.clone().requires_grad_()
        tokens = dispatcher.dispatch(x, case.ids, case.weights)
        found = [*torch.autograd.grad(tokens.x.sum(), x)]
        tokens = dispatcher.dispatch(case.x, case.ids, weights)
        found += torch.autograd.grad(tokens.topk_weights.square().sum(), weights)
        tokens = dispatcher.dispatch(x, case.ids, weights)
        used = tokens.x if rank == 0 else tokens.topk_weights
        found += torch.autograd.grad(used.sum(), (x, weights))
        if way == "cuda_ipc":
            first = found
    assert all(torch.equal(*pair) for pair in zip(first, found, strict=True))


def test_only_what_needs_a_gradient_gets_one() -> None:
    run_ranks(2, _frozen_inputs)


def _in_flight(rank: int, ranks: int) -> None:
    """Several begun before the first is waited for, of two dispatchers with other capacities."""
    dispatcher, other = cuda_ipc(12), cuda_ipc(12, 80, capacity=70)
    assert isinstance(dispatcher, AllToAllDispatcher)
    twin = dispatcher_of("process_group", 12)
    cases = [make_case(seed, rank, 20 + seed, 16 + 8 * seed, 2, 12) for seed in range(3)]
    expected = [twin.dispatch(*arguments(case)) for case in cases]
    ways = (dispatcher, other, dispatcher)
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        begun = [d.dispatch_async(*arguments(c)) for d, c in zip(ways, cases, strict=True)]
        tokens = {seed: begun[seed].wait() for seed in order}
        for seed in order:
            assert_equal(tokens[seed], expected[seed], ranks)
        with pytest.raises(RuntimeError, match="has ended already"):
            begun[0].wait()
        first = rank * 12 // ranks
        back = {
            s: ways[s].combine_async(apply_experts(tokens[s], first), tokens[s].handle)
            for s in order
        }
        dispatcher.dispatch(*arguments(cases[0]))
        for seed in reversed(order):
            y = twin.combine(apply_experts(expected[seed], first), expected[seed].handle)
            assert torch.equal(back[seed].wait(), y)


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_exchanges_in_flight(ranks: int) -> None:
    run_ranks(ranks, _in_flight)


def _growth(rank: int, ranks: int) -> None:
    dispatcher, twin = cuda_ipc(4), dispatcher_of("process_group", 4)
    memory, _ = _C.recall_peer_memory("0")
    reserved, kept = [], []
    for hidden in (8, 20000, 8, 30000, 30000):
        case = make_case(hidden, rank, 20, hidden, 2, 4, dtype=torch.float32)
        kept.append((dispatcher.dispatch(*arguments(case)), twin.dispatch(*arguments(case))))
        reserved.append(memory.reserved_bytes)
    assert reserved[0] < reserved[1] == reserved[2] < reserved[3] == reserved[4]
    for got, expected in kept:
        assert_equal(got, expected, ranks)
        y = dispatcher.combine(got.x, got.handle)
        assert torch.equal(y, twin.combine(expected.x, expected.handle))


def test_memory_grows_as_needed() -> None:
    run_ranks(2, _growth)


def _too_many(rank: int, ranks: int) -> list[tuple[str, str]]:
    """All tokens go to rank 1, which has room for 12 of 20; then for 15 of 40 slots."""
    x = torch.arange(10.0)[:, None].expand(10, 8) + 100 * rank
    ids = torch.tensor([[2, 3]]).expand(10, 2)
    weights = torch.ones(10, 2)
    errors = []
    for options, rows, slots in (
        ({"capacity": 12}, 12, 24),
        ({"slot_capacity": 15}, 20, 14),
    ):
        dispatcher = cuda_ipc(4, 10, **options)
        tokens = dispatcher.dispatch(x, ids, weights)
        assert counts(tokens, ranks)[1] == ([10, 10] if rank == 1 else [0, 0])
        assert int((tokens.topk_ids >= 0).sum()) == (slots if rank == 1 else 0)
        if rank == 1:
            assert len(tokens.x) == options.get("capacity", 20)
            assert torch.equal(tokens.x[:rows, 0] % 100, torch.arange(rows).float() % 10)
        y = apply_experts(tokens, 2 * rank)
        kind, message = raised(dispatcher.combine, y, tokens.handle)
        errors.append((kind, message))
        # Once; what was left out has no expert.
        out = dispatcher.combine(y, tokens.handle)
        room = {(0, 12): 10, (1, 12): 2, (0, 20): 7, (1, 20): 0}[rank, rows]
        assert torch.equal(out[:room], 7 * x[:room])
        assert not out[room:].any()
        weighted = weights.clone().requires_grad_()
        tokens = dispatcher.dispatch(x, ids, weighted)
        errors.append(raised(dispatcher.check))
        dispatcher.check()
        (grad,) = torch.autograd.grad(tokens.topk_weights.sum(), weighted)
        assert grad[: min(room, 10)].all()
    # No harm is done.
    case = make_case(1, rank, 9, 6, 2, 4)
    round_trip(cuda_ipc(4), case, rank)
    return errors


def test_what_there_is_no_room_for_is_told_to_all_ranks_alike() -> None:
    results = run_ranks(2, _too_many)
    assert results[0] == results[1]
    for kind, message in results[0]:
        assert kind == "RuntimeError"
        assert "up to 20 rows and 40 slots" in message
    assert "capacity of 12 rows and 24 slots" in results[0][0][1]
    assert results[0][0][1].startswith("combine: 1 earlier dispatches")
    assert results[0][1][1].startswith("check: 1 earlier dispatches")
    assert "capacity of 20 rows and 15 slots" in results[0][2][1]


def _compiled(rank: int, ranks: int) -> None:
    dispatcher = cuda_ipc(4, capacity=70)
    case = make_case(2, rank, 9, 6, 2, 4, dtype=torch.float32, weight_dtype=torch.float32)

    def layer(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        tokens = dispatcher.dispatch(x, ids, weights)
        assert tokens.x.shape[0] == 70
        y = tokens.x * tokens.topk_weights.sum(1, keepdim=True)
        return dispatcher.combine(y, tokens.handle)

    results = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        x, weights = case.x.clone().requires_grad_(), case.weights.clone().requires_grad_()
        y = call(x, case.ids, weights)
        y.sum().backward()
        results.append((y.detach(), x.grad, weights.grad))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    tokens = dispatcher.dispatch(*arguments(case))
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in arguments(case)]
        fake = dispatcher.dispatch(*fakes)
    for name in ("x", "topk_ids", "topk_weights"):
        ours, theirs = getattr(fake, name), getattr(tokens, name)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert fake.num_rows == tokens.num_rows
    assert fake.handle.plan.shape == tokens.handle.plan.shape
    assert fake.handle.plan.device == fakes[0].device


def test_compiles_in_one_graph_with_sizes_that_are_known() -> None:
    run_ranks(2, _compiled)


def _layer(rank: int, ranks: int) -> None:
    """A whole layer, with its experts' gradients: the same bits as by process_group."""
    os.environ[EMULATE_GPUS] = "1"
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))
    config = make_config(dtype=torch.float32)
    x = torch.randn(2, 10 + rank, config.dim)
    results = []
    for options in (
        {"dispatcher": "process_group"},
        {"dispatcher": "cuda_ipc", "dispatcher_max_tokens": 40},
    ):
        torch.manual_seed(1)
        layer = MoE(config, BackendConfig(**options))
        randomize(layer)
        ExpertParallel()._apply(layer.experts, mesh)
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y = y[0] if isinstance(y, tuple) else y
        y.square().sum().backward()
        gradients = [p.grad for p in layer.parameters() if p.grad is not None]
        local = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
        results.append([y.detach(), inputs.grad, *local])
    assert len(results[0]) == len(results[1]) > 4
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_a_layer_gives_the_same_bits() -> None:
    run_ranks(2, _layer)


def _chosen(rank: int, ranks: int) -> list[Any]:
    found: list[Any] = []
    plain = AllToAllDispatcher(dist.group.WORLD, 4, max_tokens=8)
    found.append((plain.transport, plain.gpu_transport, plain.explain()))
    make = lambda **options: AllToAllDispatcher(dist.group.WORLD, 4, **options)  # noqa: E731
    found.append(raised(lambda: make(transport="cuda_ipc", max_tokens=8)))
    found.append(raised(lambda: make(transport="cuda_ipc")))
    found.append(raised(lambda: make(capacity=8)))
    found.append(raised(lambda: make(max_tokens=8, capacity=0)))
    found.append(raised(lambda: make(max_tokens=2**30)))
    group = dist.new_group([0, 1])
    os.environ[EMULATE_GPUS] = "1"
    auto = build_dispatcher(group, 4, max_tokens=8)
    assert isinstance(auto, AllToAllDispatcher)
    found.append((auto.transport, auto.gpu_transport, auto.explain()))
    return found


def test_which_transport_is_chosen_and_why() -> None:
    for plain, refused, *wrong, auto in run_ranks(2, _chosen):
        missing = "moe_kernels is built without CUDA"
        if _C.build_info()["cuda"] is not None:
            missing = "torch sees no CUDA device"
        if not torch.cuda.is_available():
            assert plain[:2] == ("shared_memory", "process_group")
            assert f"; cuda_ipc is not used: rank 0 has no GPU to use: {missing}" in plain[2]
            assert refused[0] == "ValueError"
            assert "needs ranks whose GPUs reach each other's memory: rank 0 has no" in refused[1]
        for kind, message in wrong:
            assert kind == "ValueError"
            assert "max_tokens" in message or "capacity must be positive; got 0" in message
        assert auto[:2] == ("shared_memory", "cuda_ipc")
        assert ", cuda_ipc of the GPUs': all 2 ranks" in auto[2]
        assert "; cuda_ipc for the GPUs of all 2 ranks reach" in auto[2]


def test_device_code_on_threads(tmp_path: Path) -> None:
    """Grids of several blocks, each of several threads, with the faults of a device."""
    program = tmp_path / "cuda_ipc_emulation"
    source = ROOT / "tests/native/cuda_ipc_emulation.cpp"
    command = ["c++", "-std=c++20", "-O1", f"-I{ROOT / 'csrc'}", "-pthread", source, "-o", program]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=500)
    result = subprocess.run([program, "20", "7"], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "right" in result.stdout
