"""Adapters to other libraries, against stand-ins that compute what those libraries document.

This proves layouts, arguments as they were read, and the way back of gradients; not that the
libraries have the functions.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import results, runner
from benchmarks.cli import main
from benchmarks.limits import Limits
from benchmarks.providers import PROVIDERS
from benchmarks.providers.peers import PEERS
from benchmarks.registry import Case, Implementation, Provider, Shape
from moe_kernels import reference

SHAPE = "T=6,H=32,I=16,E=4,K=2"


def swiglu(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return functional.silu(gate) * up


def module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """``name`` and its parents can be imported."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        if end > 1:
            monkeypatch.setattr(
                sys.modules[".".join(parts[: end - 1])], parts[end - 1], sys.modules[path], False
            )
    for key, value in contents.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)


def per_expert(rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """Grouped rows times each expert's [inner, outer]."""
    return torch.cat(
        [part @ weight for part, weight in zip(rows.split(counts), weights, strict=True)]
    )


def counts_of(ids: Tensor, experts: int) -> list[int]:
    return torch.bincount(ids.flatten(), minlength=experts).tolist()


def fake_scattermoe(monkeypatch: pytest.MonkeyPatch) -> None:
    def flatten_sort_count(expert_idxs: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        ids, order = expert_idxs.flatten().sort(stable=True)
        return ids, order, torch.bincount(ids, minlength=num_experts).cumsum(0)

    def parallel_linear(
        inputs: Tensor, expert_weights: Tensor, k: int, sorted_expert_idxs: Tensor,
        sorted_scattered_idxs: Tensor, expert_offsets: Tensor, expert_biases: Any = None,
        gates: Tensor | None = None, grouped_in: bool = False, grouped_out: bool = False,
    ) -> Tensor:  # fmt: skip
        rows = inputs if grouped_in else inputs[sorted_scattered_idxs // k]
        counts = expert_offsets.diff(prepend=torch.zeros(1, dtype=torch.long)).tolist()
        out = per_expert(rows, expert_weights, counts)
        if grouped_out:
            return out
        assert gates is not None
        by_slot = out[sorted_scattered_idxs.argsort()].view(*gates.shape, -1)
        return (gates[:, None] @ by_slot)[:, 0]

    module(
        monkeypatch, "scattermoe.parallel_experts", flatten_sort_count=flatten_sort_count,
        parallel_linear=parallel_linear,
    )  # fmt: skip


def fake_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    class LigerFusedMoEFunction:
        @staticmethod
        def apply(x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            assert ids.dtype == torch.int32
            return reference.fused_experts(x, w13.mT, w2.mT, ids, weights)

    module(monkeypatch, "liger_kernel.ops", LigerFusedMoEFunction=LigerFusedMoEFunction)


def fake_sonicmoe(monkeypatch: pytest.MonkeyPatch) -> None:
    def moe_general_routing_inputs(
        x: Tensor, router_scores: Tensor, token_indices: Tensor, expert_indices: Tensor,
        w1: Tensor, b1: None, w2: Tensor, b2: None, E: int, stream_id: int, activation_type: str,
        is_inference_mode_enabled: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        assert (activation_type, w1.shape[2], w2.shape[2]) == ("swiglu", E, E)
        assert token_indices.dtype == expert_indices.dtype == torch.int32
        h = torch.einsum("rh,whr->rw", x[token_indices], w1[..., expert_indices])
        a = functional.silu(h[:, ::2]) * h[:, 1::2]
        out = torch.einsum("ri,hir->rh", a, w2[..., expert_indices]) * router_scores[:, None]
        return torch.zeros_like(x).index_add(0, token_indices, out), None

    stream = types.SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    module(monkeypatch, "sonicmoe.enums", ActivationType=types.SimpleNamespace(SWIGLU="swiglu"))
    module(
        monkeypatch, "sonicmoe.functional", moe_general_routing_inputs=moe_general_routing_inputs
    )


def fake_megablocks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Arguments(types.SimpleNamespace):
        pass

    class ParallelDroplessMLP(torch.nn.Module):
        def __init__(self, args: Arguments) -> None:
            super().__init__()
            self.args, self.mlp = args, torch.nn.Module()
            assert (args.mlp_type, args.mlp_impl, args.return_bias) == ("glu", "grouped", False)

        def forward(self, x: Tensor, scores: None, weights: Tensor, ids: Tensor) -> Tensor:
            E, H = self.args.moe_num_experts, self.args.hidden_size
            w1, v1, w2 = (getattr(self.mlp, name).view(E, -1, H) for name in ("w1", "v1", "w2"))
            return reference.fused_experts(x, torch.cat([w1, v1], 1).mT, w2, ids, weights)

    module(monkeypatch, "megablocks.layers.arguments", Arguments=Arguments)
    module(monkeypatch, "megablocks.layers.dmoe", ParallelDroplessMLP=ParallelDroplessMLP)


def fake_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    class GroupedLinear(torch.nn.Module):
        def __init__(
            self, num_gemms: int, in_features: int, out_features: int, *, bias: bool,
            params_dtype: torch.dtype, device: torch.device,
        ) -> None:  # fmt: skip
            super().__init__()
            self.count = num_gemms
            for number in range(num_gemms):
                value = torch.empty(out_features, in_features, dtype=params_dtype, device=device)
                setattr(self, f"weight{number}", torch.nn.Parameter(value))

        def forward(self, inp: Tensor, m_splits: list[int]) -> Tensor:
            assert all(isinstance(rows, int) for rows in m_splits)
            weights = torch.stack([getattr(self, f"weight{n}") for n in range(self.count)])
            return per_expert(inp, weights.mT, m_splits)

    def moe_permute(x: Tensor, ids: Tensor, *, map_type: str) -> tuple[Tensor, Tensor]:
        assert (map_type, ids.dtype) == ("index", torch.int32)
        order = ids.flatten().argsort(stable=True)
        return x[order // ids.shape[1]], order

    def moe_unpermute(out: Tensor, order: Tensor, probs: Tensor, *, map_type: str) -> Tensor:
        assert (map_type, probs.dtype) == ("index", torch.float32)
        rows = out[order.argsort()].view(*probs.shape, -1).float()
        return (rows * probs[..., None]).sum(1).to(out.dtype)

    module(
        monkeypatch, "transformer_engine.pytorch", GroupedLinear=GroupedLinear,
        moe_permute=moe_permute, moe_unpermute=moe_unpermute,
    )  # fmt: skip


def fake_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass
    class RoutingData:
        gate_scal: Tensor
        expt_hist: Tensor
        n_expts_tot: int
        n_expts_act: int
        expt_data: Any = None

    @dataclasses.dataclass
    class Indices:  # both GatherIndx and ScatterIndx
        src_indx: Tensor
        dst_indx: Tensor

    @dataclasses.dataclass
    class FnSpecs:
        name: str
        fn: Any
        fn_arg_names: tuple[str, ...]
        fn_arg_do_not_specialize: tuple[str, ...] = ()
        reduction_n: int = 1

    @dataclasses.dataclass
    class FusedActivation:
        specs: FnSpecs
        fn_args: tuple[float, ...] = ()

    def topk(
        x: Tensor, k: int, apply_softmax: bool = True, dim: int = 1, y_indx: Tensor | None = None
    ) -> Any:
        assert y_indx is not None
        assert (y_indx.dtype, apply_softmax) == (torch.int32, True)
        order = y_indx.flatten().argsort(stable=True)
        metadata = types.SimpleNamespace(
            col_sum=torch.tensor(counts_of(y_indx, x.shape[1]), dtype=torch.int32),
            col_sorted_indx=order.int(), row_sorted_indx=order.argsort().int(),
        )  # fmt: skip
        vals = x.gather(1, y_indx.long()).softmax(1)
        return types.SimpleNamespace(vals=vals, indx=y_indx, mask_metadata=metadata)

    def make_ragged_tensor_metadata(slice_sizes: Tensor, n_total_rows: int) -> Any:
        assert int(slice_sizes.sum()) == n_total_rows
        return types.SimpleNamespace(slice_sizes=slice_sizes)

    def matmul_ogs(
        x: Tensor, w: Tensor, bias: Tensor | None, routing_data: RoutingData,
        gather_indx: Indices | None = None, scatter_indx: Indices | None = None,
        precision_config: Any = None, betas: None = None, gammas: Tensor | None = None,
        fused_activation: FusedActivation | None = None,
    ) -> Tensor:  # fmt: skip
        counts, top_k = routing_data.expt_hist.tolist(), routing_data.n_expts_act
        assert routing_data.n_expts_tot == len(w)
        rows = x if gather_indx is None else x[gather_indx.src_indx // top_k]
        out = per_expert(rows, w, counts)
        if bias is not None:
            assert bias.dtype == torch.float32
            out = out + bias.repeat_interleave(torch.tensor(counts), 0)
        if fused_activation is not None:
            specs = fused_activation.specs
            assert (specs.fn_arg_names, specs.reduction_n) == (("alpha", "limit"), 2)
            alpha, limit = fused_activation.fn_args
            out = reference.expert_activation(out, "swigluoai", None, True, alpha, limit)
        if gammas is not None:
            out = out * gammas[:, None]
        if scatter_indx is not None:
            slots = torch.empty(len(x), w.shape[2])
            slots[scatter_indx.dst_indx.long()] = out.float()
            assert torch.equal(slots[scatter_indx.dst_indx[scatter_indx.src_indx]], slots)
            out = slots.view(-1, top_k, w.shape[2]).sum(1)
        return out.to(precision_config)

    module(
        monkeypatch, "triton_kernels.matmul_ogs", matmul_ogs=matmul_ogs, FnSpecs=FnSpecs,
        FusedActivation=FusedActivation, GatherIndx=Indices, ScatterIndx=Indices,
        PrecisionConfig=lambda out_dtype: out_dtype, RoutingData=RoutingData,
    )  # fmt: skip
    module(monkeypatch, "triton_kernels.topk", topk=topk)
    module(
        monkeypatch, "triton_kernels.tensor",
        make_ragged_tensor_metadata=make_ragged_tensor_metadata,
    )  # fmt: skip
    module(monkeypatch, "triton_kernels.swiglu", swiglu_fn=None)


FAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "scattermoe": fake_scattermoe,
    "liger": fake_liger,
    "sonicmoe": fake_sonicmoe,
    "megablocks": fake_megablocks,
    "transformer_engine": fake_transformer_engine,
    "triton_kernels": fake_triton_kernels,
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(flops=1e11, bytes=1e10)
    monkeypatch.setattr("benchmarks.runner.measure_limits", lambda *arguments: limits)
    for peer in PEERS:
        monkeypatch.setitem(PROVIDERS, peer.name, dataclasses.replace(peer, devices=("cpu",)))


def run(name: str, out: Path, shape: str = SHAPE, op: str = "fused_experts") -> list[dict]:
    options = ["--dtype", "fp32", "--rounds", "1", "--seconds", "1", "--shape", shape]
    options += ["--direction", "forward", "backward", "--provider", "torch", name]
    assert main(["run", op, "--device", "cpu", "--out", str(out), *options]) == 0
    return [row for row in results.read(out)["rows"] if row["provider"] == name]


def test_every_peer_has_a_stand_in() -> None:
    assert set(FAKES) == {peer.name for peer in PEERS}


@pytest.mark.parametrize("name", FAKES)
def test_adapters_compute_the_layer(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FAKES[name](monkeypatch)
    forward, backward = run(name, tmp_path / "out.json")
    assert (forward["void"], forward["note"]) == ("", "")
    assert forward["ms"] > 0
    if name == "triton_kernels":
        assert (backward["note"], backward["unsupported"]) == ("has no backward", True)
    else:
        assert (backward["void"], backward["note"]) == ("", "")
        assert backward["error"] < 1e-5


@pytest.mark.parametrize("name", FAKES)
def test_what_adapters_do_with_gpt_oss(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FAKES[name](monkeypatch)
    forward, _ = run(name, tmp_path / "out.json", f"{SHAPE},swigluoai")
    if name == "triton_kernels":
        assert (forward["void"], forward["note"]) == ("", "")
    else:
        assert forward["note"] == "computes swiglu without biases only"


@pytest.mark.parametrize("name", FAKES)
def test_a_library_with_other_functions_is_a_row_that_says_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FAKES[name](monkeypatch)
    for path, found in list(sys.modules.items()):
        if path.split(".")[0] == PROVIDERS[name].requires[0].split(".")[0]:
            for key, value in list(vars(found).items()):
                if callable(value) and not isinstance(value, types.ModuleType):
                    monkeypatch.setattr(found, key, lambda: None)
    forward, backward = run(name, tmp_path / "out.json")
    for row in (forward, backward):
        assert row["note"].startswith("does not run: ")
        assert row["ms"] is None


def test_a_call_that_compiles_and_tunes_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the first call takes the time of its compiler and the memory of its tuner."""
    laps, peaks = iter([[30000.0], [2.0]]), iter([300, 20])
    clock = types.SimpleNamespace(mark=lambda: None, laps=lambda: next(laps))

    class PeakMemory:
        def __init__(self, device: torch.device) -> None:
            self.bytes = next(peaks)

        def __enter__(self) -> PeakMemory:
            return self

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(runner, "PeakMemory", PeakMemory)
    case = Case(Shape({"T": 1}), torch.float32, torch.device("cuda"), [{"x": torch.zeros(1)}])
    library = Provider("library", {"op": lambda case: Implementation(lambda inputs: inputs["x"])})
    op: Any = types.SimpleNamespace(name="op", outputs=("y",))
    contender = runner._try(op, library, case, cast(Any, clock), {}, False)
    assert (contender.note, contender.first, contender.peak_bytes) == ("", [2.0], 20)


def test_rows_that_transformer_engine_permutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_transformer_engine(monkeypatch)
    forward, backward = run(
        "transformer_engine", tmp_path / "out.json", "T=5,H=16,E=4,K=2", op="permute"
    )
    assert forward["error"] == 0.0
    assert (backward["void"], backward["note"]) == ("", "")
