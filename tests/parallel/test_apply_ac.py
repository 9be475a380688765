"""Activation checkpointing: which blocks are wrapped, what is kept, what must not happen twice."""

from __future__ import annotations

import logging
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from moe_parallel import activation_checkpointing, parallelizer
from moe_parallel.activation_checkpointing import (
    SELECTIVE_AC_WRAPPER_FLAG,
    make_selective_checkpoint_context_fn,
    router_sizes,
)
from moe_parallel.parallelizer import apply_ep
from tests.parallel.ranks import run_ranks
from tests.parallel.stand_ins import Container, StandInMoE, make_model
from tests.parallel.tiny_lm import TinyLM


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of ``ptd_checkpoint_wrapper``, by call."""
    made: list[dict[str, Any]] = []

    def wrapper(block: Any, **options: Any) -> Any:
        made.append(options)
        return SimpleNamespace(wraps=block)

    monkeypatch.setattr(parallelizer, "MoE", StandInMoE)
    monkeypatch.setattr(parallelizer, "ptd_checkpoint_wrapper", wrapper)
    return made


def test_apply_ac_wraps_every_block(
    wrapped: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_model(mtp=SimpleNamespace(layers=Container(m=SimpleNamespace())))
    originals = [*model.model.layers.children(), *model.mtp.layers.children()]
    model.config = SimpleNamespace(llm_config=SimpleNamespace(hidden_size=16))
    policies: list[Any] = []
    monkeypatch.setattr(
        parallelizer,
        "create_selective_checkpoint_contexts",
        lambda policy: policies.append(policy) or ("forward", "recompute"),
    )
    parallelizer.apply_ac(model)
    blocks = [*model.model.layers.children(), *model.mtp.layers.children()]
    assert [block.wraps for block in blocks] == originals
    assert all(options["preserve_rng_state"] is True for options in wrapped)
    assert wrapped[0]["context_fn"]() == ("forward", "recompute")
    aten, x = torch.ops.aten, torch.empty(5, 16)
    router, other = torch.empty(16, 8), torch.empty(8, 16)
    save, recompute = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
    for expected, func, args in [
        (save, aten.mm.default, (x, router)),
        (recompute, aten.mm.default, (x, other)),
        (recompute, aten.mm.default, (x, router, None)),
        (save, aten.addmm.default, (torch.empty(8), x, router)),
        (recompute, aten.addmm.default, (torch.empty(8), x, other)),
        (save, aten.linear.default, (x, other)),
        (recompute, aten.linear.default, (x, router)),
        (save, aten.topk.default, (x, 2)),
        (save, torch.ops.moe_kernels.topk_router.default, (x,)),
        (recompute, aten.add.Tensor, (x, x)),
    ]:
        assert policies[0](None, func, *args) is expected, func
    assert not caplog.records


def test_apply_ac_without_the_router(
    wrapped: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    parallelizer.apply_ac(make_model(), ignore_router=False)
    assert wrapped == [{"preserve_rng_state": True}] * 2
    [record] = caplog.records
    assert (record.levelname, record.name) == ("WARNING", "moe_parallel.parallelizer")
    assert "ignore_router_for_ac" in record.message


def test_apply_ac_needs_sizes(wrapped: list[dict[str, Any]]) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="hidden_size must be provided"):
        parallelizer.apply_ac(model)
    model.model.moe_config = None
    model.config = SimpleNamespace(hidden_size=4)
    with pytest.raises(ValueError, match="num_experts must be provided"):
        parallelizer.apply_ac(model)
    assert wrapped == []
    model.config.num_local_experts = 3
    parallelizer.apply_ac(model)
    assert len(wrapped) == 2


def test_apply_ac_finds_sizes_of_a_model_within_a_model(wrapped: list[dict[str, Any]]) -> None:
    text = nn.Module()
    text.layers, text.moe_config = nn.ModuleList(), SimpleNamespace(n_routed_experts=3)
    config = SimpleNamespace(text_config=SimpleNamespace(hidden_size=4))
    model = SimpleNamespace(model=SimpleNamespace(language_model=text), config=config)
    assert router_sizes(model, None, None) == (4, 3)
    config.num_experts = 5
    assert router_sizes(model, None, None) == (4, 5)
    model.model.moe_config = SimpleNamespace(n_routed_experts=6)
    assert router_sizes(model, None, None) == (4, 6)
    assert router_sizes(model, 5, 7) == (5, 7)


def test_the_order_in_which_apply_ac_looks_for_sizes() -> None:
    names = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
    config = SimpleNamespace(hidden_size=9)
    model = SimpleNamespace(config=config)
    for owner, first in ((config, 30), (None, 20), (None, 10)):
        if owner is None:
            owner = SimpleNamespace(hidden_size=first)
            setattr(config, {20: "llm_config", 10: "text_config"}[first], owner)
        for index, name in reversed(list(enumerate(names))):
            setattr(owner, name, first + index)
            hidden_size = getattr(owner, "hidden_size", None)
            assert router_sizes(model, None, None) == (hidden_size, first + index)
    config.text_config.hidden_size = 0  # not known
    assert router_sizes(model, None, None) == (20, 10)


def test_apply_ac_selective(wrapped: list[dict[str, Any]]) -> None:
    model = make_model()
    parallelizer.apply_ac(model, ignore_router=False, selective=True)
    assert wrapped[0]["context_fn"] is wrapped[1]["context_fn"]
    assert all(getattr(b, SELECTIVE_AC_WRAPPER_FLAG) for b in model.model.layers.children())


def test_apply_ac_takes_the_contexts_it_is_given(
    wrapped: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts = object()
    monkeypatch.setattr(
        parallelizer, "create_selective_checkpoint_contexts", lambda policy: contexts
    )
    model = make_model()
    model.model.layers.blocks["b"].mlp.gate = SimpleNamespace(_cumulative_expert_load=None)
    parallelizer.apply_ac(model, hidden_size=4)
    assert [options["context_fn"]() for options in wrapped] == [contexts] * 2


@pytest.mark.parametrize("selective", [False, True])
def test_a_repeated_mtp_block_is_left_alone(
    wrapped: list[dict[str, Any]], caplog: pytest.LogCaptureFixture, selective: bool
) -> None:
    caplog.set_level(logging.INFO)
    mtp = SimpleNamespace(
        layers=Container(dense=SimpleNamespace(), sparse=SimpleNamespace(mlp=StandInMoE())),
        mtp_config=SimpleNamespace(use_repeated_layer=True),
    )
    model = make_model(mtp=mtp, config=SimpleNamespace(hidden_size=4))
    parallelizer.apply_ac(model, selective=selective)
    assert not hasattr(mtp.layers.blocks["sparse"], "wraps")
    assert hasattr(mtp.layers.blocks["dense"], "wraps") == selective
    assert len([r for r in caplog.records if "repeats one block" in r.message]) == 1


def test_selective_policy_alternates() -> None:
    torch.manual_seed(0)
    computed: list[str] = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            computed.append(str(func))
            return func(*args, **(kwargs or {}))

    weights = [torch.randn(4, 4, requires_grad=True) for _ in range(4)]

    def region(x: torch.Tensor) -> torch.Tensor:
        for weight in weights:
            x = (x @ weight).sin()
        return x.topk(2).values.sum()

    for _ in range(2):  # counts start anew in each region
        x = torch.randn(3, 4, requires_grad=True)
        loss = torch.utils.checkpoint.checkpoint(
            region, x, use_reentrant=False, context_fn=make_selective_checkpoint_context_fn()
        )
        expected = torch.autograd.grad(region(x), weights)
        computed.clear()
        with Counting():
            actual = torch.autograd.grad(loss, weights)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        assert computed.count("aten.topk.default") == 0
        # Products of the backward pass: two a layer, less that of x. Computed again: two of four.
        assert computed.count("aten.mm.default") == 7 + 2


def resolve(name: str) -> Any:
    namespace, op = name.split("::")
    packet, _, overload = op.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")


PARTS = ("start", "finish")
ALWAYS_KEPT = (
    *(f"aten::{op}" for op in ("addmm", "bmm", "topk", "max", "max.dim", "_scaled_mm")),
    *(
        f"aten::_scaled_dot_product_{kind}"
        for kind in (
            "cudnn_attention",
            "efficient_attention",
            "flash_attention",
            "flash_attention_for_cpu",
            "fused_attention_overrideable",
        )
    ),
    "_c10d_functional::all_to_all_single",
    "_c10d_functional::reduce_scatter_tensor",
    *(f"moe_kernels::{op}" for op in ("topk_router", "dispatch", "combine")),
    *(
        f"moe_kernels::{op}_{part}"
        for op in ("dispatch", "combine")
        for part in ("start", "finish")
    ),
    *(f"moe_kernels::{op}" for op in ("context_attention", "whole_sequences", "exchange_heads")),
)
PRODUCTS = (
    *(f"aten::{op}" for op in ("mm", "linear", "_grouped_mm")),
    *(f"moe_kernels::{op}" for op in ("grouped_gemm", "fused_experts", "fused_experts_fp8")),
)
COMPUTED_AGAIN = (
    "aten::add.Tensor",
    "aten::silu",
    "aten::native_layer_norm",
    "moe_kernels::permute",
)


def test_selective_policy_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    policies: list[Any] = []
    monkeypatch.setattr(
        activation_checkpointing,
        "create_selective_checkpoint_contexts",
        lambda policy: policies.append(policy),
    )
    context_fn = make_selective_checkpoint_context_fn()
    forward, recompute = SimpleNamespace(is_recompute=False), SimpleNamespace(is_recompute=True)
    save, again = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
    for _ in range(2):  # regions
        context_fn()
        policy = policies[-1]
        for context in (forward, recompute):
            for index, name in enumerate(PRODUCTS):
                found = policy(context, resolve(name))
                assert found is (again if index % 2 else save), name
                for other in ALWAYS_KEPT:
                    assert policy(context, resolve(other)) is save, other
                for other in COMPUTED_AGAIN:
                    assert policy(context, resolve(other)) is again, other
    copy, far, near = resolve("aten::_to_copy"), torch.empty(2, device="meta"), torch.empty(2)
    assert policy(forward, copy, far, device=torch.device("cpu")) is save
    for source, options in ((far, {"device": "meta"}), (near, {"device": "cpu"}), (far, {})):
        assert policy(forward, copy, source, **options) is again


class OpCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


# How often a block's backward runs ops of its forward.
REPEATED = {
    "router": {"topk_router": 0, "dispatch_start": 1, "combine": 1, "fused_experts": 1},
    "full": {"topk_router": 1, "dispatch_start": 1, "combine": 1, "fused_experts": 1},
    "selective": {"topk_router": 0, "dispatch_start": 0, "combine": 0},
}


def _repeated(rank: int, ranks: int) -> None:
    for kind, expected in REPEATED.items():
        model = TinyLM()
        apply_ep(model, init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",)))
        parallelizer.apply_ac(model, ignore_router=kind == "router", selective=kind == "selective")
        x = torch.randn(2, 5, 16, requires_grad=True)
        y = model.model.layers["0"](x, torch.zeros(2, 5, dtype=torch.bool))
        with OpCounter() as counter:
            y.sum().backward()
        assert {op: counter.counts[op] for op in expected} == expected, kind


def test_what_backward_runs_again_between_ranks() -> None:
    run_ranks(2, _repeated)


class CountingGate(nn.Module):
    """A router of another framework, which adds to its load in place in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self._cumulative_expert_load: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._cumulative_expert_load is None:
            self._cumulative_expert_load = torch.zeros(1)
        self._cumulative_expert_load += x.shape[0]
        return x.exp()


class CountingMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = CountingGate()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate(x.sin()).cos().sum()  # recomputation stops after the last tensor it needs


@pytest.mark.parametrize(
    "options",
    [{}, {"ignore_router": False}, {"selective": True}],
    ids=("router", "full", "selective"),
)
def test_recomputation_leaves_the_load_alone(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(parallelizer, "MoE", CountingMoE)
    block = nn.Module()
    block.mlp = CountingMoE()
    block.forward = lambda x: block.mlp(x)
    layers = nn.ModuleList([block])
    model = SimpleNamespace(layers=layers, config=SimpleNamespace(hidden_size=4, num_experts=2))
    parallelizer.apply_ac(model, **options)
    x = torch.randn(3, 4, requires_grad=True)
    for total in (3, 6):
        layers[0](x).backward()
        assert block.mlp.gate._cumulative_expert_load.item() == total
