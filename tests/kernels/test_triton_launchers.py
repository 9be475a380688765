"""What Triton launchers promise beyond their ops: any tile shape, any memory, any ids."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import moe_kernels
from moe_kernels import reference
from moe_kernels.triton import (
    _fused_experts_backward,
    _operands,
    _wgrad,
    fused_experts,
    grouped_gemm,
    permute,
    quantize,
    sort_by_expert,
    unpermute,
)
from moe_kernels.triton._config_tables import WARP_SPECIALIZE, Config
from moe_kernels.triton._configs import CONFIGS
from moe_kernels.triton._math import exp, fast_sigmoid, sigmoid, softplus
from moe_kernels.triton._tiles import build_tile_map, walk
from moe_kernels.triton.sort_by_expert import sort_and_map
from tests.conftest import HAS_GPU, TRITON, Implementation, poisoned_memory, triton_alone
from tests.kernels.accuracy import gradients
from tests.kernels.test_fused_experts import check

ops = torch.ops.moe_kernels


@triton.jit
def _walk_kernel(visits, steps, row_tiles, column_tiles, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    for step in range(steps):
        row, column = walk(step, row_tiles, column_tiles, GROUP)
        cell = visits + row * column_tiles + column
        tl.store(cell, tl.load(cell) + 1)


@triton.jit
def _functions_kernel(x, out, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(out + i, exp(value))
    tl.store(out + N + i, sigmoid(value))
    tl.store(out + 2 * N + i, softplus(value))
    tl.store(out + 3 * N + i, fast_sigmoid(value))


impl = pytest.fixture(params=TRITON)(triton_alone)


def _case(
    dtype: torch.dtype = torch.bfloat16, hidden: int = 72, inner: int = 136
) -> tuple[dict[str, Tensor], Tensor]:
    """One expert has more rows than any tile, one has none, and some slots have no expert."""
    tokens, experts = 150, 4
    ids = torch.stack([torch.zeros(tokens), torch.randint(-1, experts - 1, (tokens,))], 1)
    inputs = {
        "x": torch.randn(tokens, hidden),
        "gate_up": torch.randn(experts, hidden, 2 * inner) / hidden**0.5,
        "down": torch.randn(experts, inner, hidden) / inner**0.5,
        "gate_up_bias": torch.randn(experts, 2 * inner),
        "down_bias": torch.randn(experts, hidden),
    }
    inputs = {name: value.to(dtype) for name, value in inputs.items()}
    inputs["topk_ids"] = ids.int()
    inputs["topk_weights"] = torch.rand(ids.shape)
    return inputs, torch.randn(tokens, hidden).to(dtype)


def _run(impl: Implementation, inputs: dict[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
    moved = {name: value.to(impl.device) for name, value in inputs.items()}
    return gradients(lambda **kw: moe_kernels.fused_experts(**kw), moved, upstream.to(impl.device))


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 128, 8), (37, 5, 3), (70, 3, 5)])
def test_sorting_and_tiling_at_once(
    impl: Implementation, tokens: int, experts: int, top_k: int, block_m: int
) -> None:
    """The same order and tiles as by two kernels, with dropped slots and a bound below all rows."""
    ids = torch.randint(-1, experts + 1, (tokens, top_k), dtype=torch.int32, device=impl.device)
    for rows in (tokens * top_k, max(1, tokens * top_k // 3)):
        order, (found, bound) = sort_and_map(ids, experts, rows, block_m)
        for value, right in zip(order, ops.sort_by_expert(ids, experts), strict=True):
            assert torch.equal(value, right)
        expected = build_tile_map(order[2], rows, block_m)
        count = int(expected.tiles[0])
        assert (bound, int(found[0])) == (expected.bound, count)
        for part in range(3):
            start = 1 + part * bound
            one, other = (tiles[start : start + count] for tiles in (found, expected.tiles))
            assert torch.equal(one, other)


def _configurations() -> list[Any]:
    keys = CONFIGS["up"]  # as of the other kernels of the layer; float8 has tests of its own
    return [
        pytest.param(
            key,
            id=f"{key[0]}-{key[2]}",
            marks=[] if key[0] == 90 or key[1] == "full" else pytest.mark.slow,
        )
        for key in keys
    ]


@pytest.mark.parametrize("key", _configurations())
def test_every_configuration(
    impl: Implementation, key: tuple[int, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if HAS_GPU and key[0] > 10 * torch.cuda.get_device_capability()[0]:
        pytest.skip(f"the device cannot run what is meant for sm_{key[0]}")

    def chosen(kernel: str, *_: Any, **__: Any) -> Config:
        of = CONFIGS[kernel]
        return of.get(key) or of[80, key[1], key[2]]  # as default_config has it

    for module in (_fused_experts_backward, _wgrad, fused_experts):
        monkeypatch.setattr(module, "config", chosen)
    inputs, upstream = _case(torch.float32 if key[1] == "full" else torch.bfloat16)
    check(impl, inputs, upstream)


@pytest.mark.skipif(HAS_GPU, reason="on a GPU the tuner compares them, where they end")
@pytest.mark.parametrize("arch", [90, 100])
def test_roles_of_warps_change_nothing(
    impl: Implementation, arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the loops that may have them, and of the descriptor that a kernel makes for them."""
    monkeypatch.setattr(_operands, "architecture", lambda device: arch)
    monkeypatch.setattr(_operands, "TRITON_VERSION", (3, 7))
    inputs, upstream = _case()
    asked: list[bool] = []
    specializes = _operands.specializes
    results = []
    for by in ("no", "triton", "gluon"):
        cut = Config(128, 64, 32, warps=4, stages=2, warp_specialize=by)
        for module in (_fused_experts_backward, fused_experts):
            monkeypatch.setattr(
                module,
                "config",
                lambda kernel, *_, cut=cut, **__: replace(
                    cut,
                    warp_specialize=cut.warp_specialize
                    if cut.warp_specialize in WARP_SPECIALIZE.get(kernel, ())
                    else "no",
                ),
            )
        for module in (_fused_experts_backward, fused_experts, grouped_gemm):

            def noted(*arguments: Any) -> bool:
                asked.append(specializes(*arguments))
                return asked[-1]

            monkeypatch.setattr(module, "specializes", noted)
        asked.clear()
        results.append(_run(impl, inputs, upstream))
        # up, down, through down, dX
        assert asked == [by == "triton" and (arch == 100 or gemm) for gemm in (False, True) * 2]
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
        assert torch.equal(value, results[2][name]), name


def test_gathering_rows_first_changes_nothing(
    impl: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, upstream = _case()
    results = []
    for in_the_gemm in (True, False):
        monkeypatch.setattr(
            permute, "pipelines_pointer_loads", lambda _, answer=in_the_gemm: answer
        )
        results.append(_run(impl, inputs, upstream))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_fresh_memory_may_hold_anything(impl: Implementation) -> None:
    inputs, upstream = _case()
    clean = _run(impl, inputs, upstream)
    with poisoned_memory():
        poisoned = _run(impl, inputs, upstream)
    for name, value in clean.items():
        assert torch.equal(value, poisoned[name]), name


@pytest.mark.parametrize("dropped", [False, True])
def test_saved_rows_of_no_expert_are_zero(impl: Implementation, dropped: bool) -> None:
    """Though no tile has them: of a bound above the rows that there are, or of no row at all."""
    inputs, _ = _case()
    if dropped:
        inputs["topk_ids"].fill_(-1)
    moved = {name: value.to(impl.device) for name, value in inputs.items()}
    names = ("x", "gate_up", "down", "topk_ids", "topk_weights", "gate_up_bias", "down_bias")
    bound = inputs["topk_ids"].numel() + 37
    options = ("swiglu", False, 1.0, float("inf"), bound, True, None, None)
    with poisoned_memory():
        _, h, *order = fused_experts.fused_experts(*(moved[name] for name in names), *options)
    used = int(order[2][-1])
    assert (h.shape[0], used == 0) == (bound, dropped)
    assert h[:used].isfinite().all()
    assert h[:used].abs().sum(1).all()
    assert (h[used:] == 0).all()


def test_unknown_ids_are_dropped_unless_checked(
    impl: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, upstream = _case()
    bad = inputs["topk_ids"] == 2
    inputs["topk_ids"][bad] = -1
    expected = _run(impl, inputs, upstream)
    huge = inputs["topk_ids"].long()
    huge[bad] = torch.tensor([2**40, -(2**40), 5, -7]).repeat(bad.sum())[: bad.sum()]
    actual = _run(impl, {**inputs, "topk_ids": huge}, upstream)
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name
    monkeypatch.setenv("MOE_KERNELS_CHECK", "1")
    moved = {name: value.to(impl.device) for name, value in {**inputs, "topk_ids": huge}.items()}
    for precision in (None, "fp8_block"):
        with pytest.raises(IndexError, match=r"^fused_experts: topk_ids must be in \[-1, 4\]"):
            moe_kernels.fused_experts(**moved, precision=precision)


@pytest.mark.parametrize("tokens", [20, 1400])
def test_unknown_ids_are_sorted_as_dropped_ones(
    impl: Implementation, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sort_by_expert, "PARTS", 7)  # of three blocks, but for the last
    monkeypatch.setattr(sort_by_expert, "SCAN", 64)  # so that summing them takes several steps
    ids = torch.randint(-3, 12, (tokens, 3))
    known = torch.where((ids >= 0) & (ids < 7), ids, -1)
    order = moe_kernels.sort_by_expert(ids.to(impl.device), 7)
    for actual, expected in zip(order, reference.sort_by_expert(known, 7), strict=True):
        assert torch.equal(actual.cpu(), expected)


def test_rows_past_the_bound_are_dropped_unless_checked(
    impl: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, _ = _case()
    moved = {name: value.to(impl.device) for name, value in inputs.items()}
    bound = 131  # in the middle of an expert's tile
    order = reference.sort_by_expert(inputs["topk_ids"], 4)
    kept = inputs["topk_ids"].clone()
    kept[order[1] >= bound] = -1
    expected = moe_kernels.fused_experts(**{**moved, "topk_ids": kept.to(impl.device)})
    actual = moe_kernels.fused_experts(**moved, num_rows=bound)
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)
    monkeypatch.setenv("MOE_KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match="num_rows must be at least"):
        moe_kernels.fused_experts(**moved, num_rows=bound)


@pytest.mark.parametrize("offsets", [[0, 9, 4, 40], [-3, 2, 99, 7], [30, 20, 10, 0], [0, 5, 8, 99]])
def test_offsets_that_do_not_fit_stay_in_bounds(
    impl: Implementation, offsets: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = torch.tensor(offsets, dtype=torch.int32, device=impl.device)
    a = torch.randn(23, 8, device=impl.device)
    b = torch.randn(3, 8, 16, device=impl.device)
    calls: list[Callable[[], Any]] = [
        lambda: moe_kernels.grouped_gemm(a, b, bad),
        lambda: moe_kernels.grouped_gemm_wgrad(a, a, bad),
        lambda: ops.grouped_gemm_dbias(a, bad, torch.float32),
    ]
    for call in calls:
        call()
    monkeypatch.setenv("MOE_KERNELS_CHECK", "1")
    for call in calls:
        with pytest.raises(ValueError, match="offsets must rise from 0"):
            call()


def _launch_guarded(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """The launch on copies of its tensors; fails where bytes beside one of them are written."""
    beside = 2048
    copies: list[tuple[Tensor, Tensor, Tensor]] = []

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        assert value.is_contiguous() or value.t().is_contiguous()
        size = value.numel() * value.element_size()
        memory = torch.full((size + 2 * beside,), 123, dtype=torch.uint8, device=value.device)
        inner = memory[beside:-beside].view(value.dtype).as_strided(value.shape, value.stride())
        copies.append((value, inner.copy_(value), memory))
        return inner

    kernel[grid](*map(copied, args), **constants)
    for value, inner, memory in copies:
        value.copy_(inner)
        assert (memory[:beside] == 123).all()
        assert (memory[-beside:] == 123).all()


@pytest.mark.parametrize("last", [-7, 5, 99])
def test_orders_that_do_not_fit_stay_in_bounds(
    impl: Implementation, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (permute, quantize, unpermute):
        monkeypatch.setattr(module, "launch", _launch_guarded)
    x, rows = torch.randn(6, 8, device=impl.device), torch.randn(12, 8, device=impl.device)
    order = moe_kernels.sort_by_expert(torch.randint(0, 3, (6, 2)).to(impl.device), 3)
    order.offsets[-1] = last
    for num_rows in (12, 5):
        ops.permute(x, *order, num_rows)
        ops.permute_quantize(x, *order, num_rows, torch.float8_e4m3fn, 128, False)
    weights = torch.rand(6, 2, device=impl.device)
    ops.unpermute(rows, *order, weights)
    ops.unpermute_backward(x, rows, *order, weights, [True, True])


def test_chunks_that_do_not_fit_stay_in_bounds(
    impl: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.randn(9, 5, device=impl.device)
    for sizes, order in (([5, 7], [1, 0]), ([-3, 4], [0, 1]), ([4, 5], [7, 7]), ([4, 5], [-1, 0])):
        values = [torch.tensor(value, device=impl.device) for value in (sizes, order)]
        moe_kernels.chunk_permute(rows, *values)
        with monkeypatch.context() as patch:
            patch.setenv("MOE_KERNELS_CHECK", "1")
            with pytest.raises(ValueError, match=r"chunk_permute: (sizes|order) must be"):
                moe_kernels.chunk_permute(rows, *values)


def test_float64_products_are_refused(impl: Implementation) -> None:
    inputs, _ = _case(torch.float64)
    moved = {name: value.to(impl.device) for name, value in inputs.items()}
    with pytest.raises(TypeError, match=r"fused_experts: x must be .* got float64"):
        moe_kernels.fused_experts(**moved)
    offsets = torch.tensor([0, 3], dtype=torch.int32, device=impl.device)
    a = torch.randn(3, 4, dtype=torch.float64, device=impl.device)
    with pytest.raises(TypeError, match="grouped_gemm: a must be"):
        moe_kernels.grouped_gemm(a, a.mT.unsqueeze(0), offsets)


def test_strides_of_any_length(impl: Implementation) -> None:
    long = 2**22
    base = torch.empty(5, long, dtype=torch.bfloat16, device=impl.device)
    a = base[:, :17].t()  # [17, 5], a column every `long` elements
    a.copy_(torch.randn(17, 5))
    b = torch.randn(2, 5, 8, device=impl.device).bfloat16()
    offsets = torch.tensor([0, 9, 15], dtype=torch.int32, device=impl.device)
    assert torch.equal(
        moe_kernels.grouped_gemm(a, b, offsets),
        moe_kernels.grouped_gemm(a.contiguous(), b, offsets),
    )
    out = torch.ones(3, 2, long, device=impl.device).permute(1, 2, 0)[:, :5]  # [2, 5, 3]
    grad = torch.randn(17, 3, device=impl.device).bfloat16()
    moe_kernels.grouped_gemm_wgrad(a, grad, offsets, out=out)
    expected = moe_kernels.grouped_gemm_wgrad(a.contiguous(), grad, offsets)
    torch.testing.assert_close(out, 1 + expected.float(), rtol=0.01, atol=0.05)


def test_biases_whose_columns_lie_far_apart(impl: Implementation) -> None:
    """Further than 32 bits count in all, though not from one to the next."""
    experts, hidden, inner, apart = 2, 3, 2, 2**30 + 48
    make: dict[str, Any] = {"dtype": torch.bfloat16, "device": impl.device}

    def spread(columns: int) -> Tensor:
        memory = torch.empty(apart * (columns - 1) + experts, **make)
        bias = memory.as_strided((experts, columns), (1, apart))
        return bias.copy_(torch.randn(experts, columns))

    x, ids = torch.randn(5, hidden, **make), torch.tensor([[0], [1], [1], [0], [1]])
    gate_up = torch.randn(experts, hidden, 2 * inner, **make)
    down, weights = torch.randn(experts, inner, hidden, **make), torch.rand(5, 1)
    order = moe_kernels.sort_by_expert(ids.to(impl.device), experts)
    biases = spread(2 * inner), spread(hidden)

    def results(*biases: Tensor) -> list[Tensor]:
        leaf = weights.to(impl.device).requires_grad_()
        y = moe_kernels.fused_experts(
            x, gate_up, down, ids.to(impl.device), leaf, gate_up_bias=biases[0],
            down_bias=biases[1],
        )  # fmt: skip
        float8 = moe_kernels.fp8_grouped_gemm(x, gate_up, order.offsets, bias=biases[0])
        return [y, *torch.autograd.grad(y.sum(), leaf), float8]

    near = results(*(bias.contiguous() for bias in biases))
    for one, other in zip(results(*biases), near, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("block_m", [16, 128])
@pytest.mark.parametrize("experts", [1, 40])
def test_tiles_cover_every_row_once(impl: Implementation, experts: int, block_m: int) -> None:
    counts = torch.randint(0, 200, (experts,)) * (torch.rand(experts) < 0.7)
    offsets = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
    rows = max(int(offsets[-1]), 1) - 1  # the bound cuts the last expert short
    if rows == 0:
        rows = 1
    tiles = build_tile_map(offsets.to(impl.device), rows, block_m)
    found = tiles.tiles.tolist()
    expected = [
        (e, start, min(int(offsets[e + 1]), rows))
        for e in range(experts)
        for start in range(int(offsets[e]), min(int(offsets[e + 1]), rows), block_m)
    ]
    assert found[0] == len(expected) <= tiles.bound
    columns = [found[1 + i * tiles.bound :][: len(expected)] for i in range(3)]
    assert list(zip(*columns, strict=True)) == expected


@pytest.mark.parametrize("block_m", [16, 128])
@pytest.mark.parametrize(("tokens", "experts"), [(20, 7), (300, 1), (420, 7), (400, 67)])
def test_sorting_writes_the_map(
    impl: Implementation, tokens: int, experts: int, block_m: int
) -> None:
    """Of fewer rows than have an expert, and of more."""
    ids = torch.randint(-1, experts + 1, (tokens, 3), dtype=torch.int32)
    ids[: tokens // 3] = experts - 1
    expected = reference.sort_by_expert(ids, experts)
    for rows in (int(expected[2][-1]) * 2 // 3, ids.numel()):
        order, tiles = sort_by_expert.sort_and_map(ids.to(impl.device), experts, rows, block_m)
        for actual, wanted in zip(order, expected, strict=True):
            assert torch.equal(actual.cpu(), wanted)
        other = build_tile_map(order[2], rows, block_m)
        count = int(other.tiles[0])
        assert count > 0
        assert tiles.bound == other.bound
        assert int(tiles.tiles[0]) == count
        for i in range(3):
            begin = 1 + i * tiles.bound
            ours, theirs = (m.tiles[begin : begin + count].tolist() for m in (tiles, other))
            assert ours == theirs


def test_overlapping_groups_stay_within_the_map(impl: Implementation) -> None:
    offsets = torch.tensor([0, 40, 0, 40, 0, 40], dtype=torch.int32, device=impl.device)
    tiles = build_tile_map(offsets, 40, 16)
    assert 0 < int(tiles.tiles[0]) <= tiles.bound


@pytest.mark.parametrize("strided", ["gate_up", "down"])
def test_products_with_tiles_of_their_own(impl: Implementation, strided: str) -> None:
    """One weight is aligned and the other is not, so that their kernels cut rows differently."""
    inputs, upstream = _case()
    chosen = slice(80)  # few enough tokens for the tiles of "some" rows an expert
    for name in ("x", "topk_ids", "topk_weights"):
        inputs[name] = inputs[name][chosen]

    def layouts(name: str, value: Tensor) -> Tensor:
        return value.repeat_interleave(2, -1)[..., ::2] if name == strided else value

    check(impl, inputs, upstream[chosen], layouts=layouts)


@pytest.mark.parametrize(("row_tiles", "column_tiles", "group"), [(1, 1, 8), (19, 5, 8), (8, 3, 1)])
def test_walk_meets_every_tile_once(
    impl: Implementation, row_tiles: int, column_tiles: int, group: int
) -> None:
    visits = torch.zeros(row_tiles, column_tiles, dtype=torch.int32, device=impl.device)
    _walk_kernel[(1,)](visits, visits.numel(), row_tiles, column_tiles, GROUP=group)
    assert (visits == 1).all()


def test_elementary_functions(impl: Implementation) -> None:
    x = torch.cat([torch.linspace(-80, 80, 1024), torch.randn(1024)]).to(impl.device)
    out = torch.full((4, 2048), torch.nan, device=impl.device)
    _functions_kernel[(1,)](x, out, N=2048)
    wide = x.double()
    softplus = torch.nn.functional.softplus(wide, threshold=1e9)
    truth = torch.stack([wide.exp(), wide.sigmoid(), softplus, wide.sigmoid()])
    error = ((out.double() - truth) / truth).abs().amax(1).tolist()
    bounds = [4e-7, 6e-7, 6e-7, 2e-5]
    assert all(found < bound for found, bound in zip(error, bounds, strict=True)), error
