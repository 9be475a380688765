"""Parts that only some models have, on every mesh what they are in one process."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from moe_parallel import MoE
from moe_parallel.mesh import build_meshes, parallel_axis_names
from moe_parallel.parallelizer import parallelize_model
from moe_parallel.text_module import get_text_module
from tests.parallel.ranks import run_ranks
from tests.parallel.test_parallelize_model import (
    FULL_AC,
    INNER_ROOT,
    LR,
    MAX_NORM,
    REPLAY,
    RESHARD,
    ROUTER_AC,
    SELECTIVE_AC,
    Case,
    check,
    parallel_step,
    shards_of,
)
from tests.parallel.tiny_lm import (
    Block,
    ModelOptions,
    TinyLM,
    loss_sum,
    make_shards,
    one_process,
)


class ScaledBlock(Block):
    """Its MoE layer is called ``moe``; a float32 parameter is read through its holder."""

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        x = x * self.scale_fp32_params().to(x.dtype)
        x = x + self.self_attn(self.norms[0](x))
        y = self.norms[1](x)
        return x + (self.moe(y, padding_mask) if hasattr(self, "moe") else self.mlp(y))


class Holder(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, size))

    def forward(self) -> Tensor:
        return self.scale.clone()


class Tower(nn.Module):
    """Ranks whose batch begins with an even token do not use the second matrix."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        y = 2 * self.always(x)
        return y + self.sometimes(x) if int(ids[0, 0]) % 2 else y


@dataclass(frozen=True)
class PartOptions(ModelOptions):
    depths: int = 0  # of multi-token prediction
    repeated: bool = False  # by one block
    holders: bool = False
    tower: bool = False
    frozen_tower: bool = False
    within: bool = False  # the backbone is the inner model's language_model

    def build(self) -> TinyLM:
        return PartLM(self)


class Inner(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.language_model = backbone

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        return self.language_model(x, padding_mask)


class PartLM(TinyLM):
    def __init__(self, options: PartOptions) -> None:
        super().__init__(options)
        config, blocks = self.model.moe_config, self.model.layers.values()
        self.options, added = options, nn.ModuleList()
        if options.depths:
            count = 1 if options.repeated else options.depths
            layers = [Block(config, self.backend, False, False) for _ in range(count)]
            self.mtp = nn.Module()
            self.mtp.layers = nn.ModuleList(layers)
            self.mtp.mtp_config = SimpleNamespace(use_repeated_layer=options.repeated)
            added.append(self.mtp)
        if options.tower or options.frozen_tower:
            self.visual = Tower(config.dim)
            added.append(self.visual)
        generator = torch.Generator().manual_seed(8)
        with torch.no_grad():
            for parameter in added.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.3 * noise + (parameter.ndim == 1))
        if options.frozen_tower:
            self.visual.requires_grad_(False)
        for block in blocks if options.holders else ():
            block.scale_fp32_params = Holder(config.dim)
            block.__class__ = ScaledBlock
            if isinstance(block.mlp, MoE):
                block.moe, block.mlp = block.mlp, None
        if options.within:
            self.model = Inner(self.model)

    def get_input_embeddings(self) -> nn.Module:
        return get_text_module(self.model).embed_tokens

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        h = self.model(x, padding_mask)
        if hasattr(self, "visual"):
            h = h + self.visual(h, x)
        logits = self.lm_head(h)
        for depth in range(self.options.depths):
            h = self.mtp.layers[0 if self.options.repeated else depth](h, padding_mask)
            logits = logits + 0.5 * self.lm_head(h)
        return logits


def parts(moe: dict[str, Any] | None = None, **options: Any) -> PartOptions:
    return PartOptions(moe={} if moe is None else moe, layers=2, **options)


BALANCED = {"aux_loss_coeff": 0.1, "gate_bias_update_factor": 0.01}
UNEVEN = {"uneven": True}
CASES = [
    Case(
        "multi-token prediction",
        parts(BALANCED, depths=2, optimizations=True),
        RESHARD | ROUTER_AC,
        UNEVEN,
        micro_batches=3,
    ),
    Case("one block repeated", parts(BALANCED, depths=2, repeated=True), RESHARD | ROUTER_AC),
    Case("repeated, selective", parts(BALANCED, depths=2, repeated=True), SELECTIVE_AC, UNEVEN, 2),
    Case("holders, moe", parts(holders=True, optimizations=True), RESHARD | ROUTER_AC, {}, 2),
    Case("frozen router", parts({"train_gate": False}), FULL_AC | INNER_ROOT),
    Case("tower used by some ranks", parts(tower=True, optimizations=True), RESHARD, {}, 3),
    Case("frozen tower", parts(frozen_tower=True)),
    Case("model within a model, tied", parts(within=True, tied=True), RESHARD | ROUTER_AC),
]


def test_parts_equal_one_process() -> None:
    check({"ep": 2}, CASES)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"ep": 4}, {"dp_replicate": 2, "ep": 2}], ids=str)
def test_parts_on_other_meshes(sizes: dict[str, int]) -> None:
    check(sizes, CASES)


class Norm(nn.RMSNorm):
    """In float32, and on in the dtype of what came."""

    def forward(self, x: Tensor) -> Tensor:
        wide = functional.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)
        return wide.to(x.dtype)


@dataclass(frozen=True)
class V4Options(ModelOptions):
    def build(self) -> TinyLM:
        model = TinyLM(self)
        model.config.model_type = "deepseek_v4"
        for module in model.modules():
            if isinstance(module, nn.RMSNorm):
                module.__class__ = Norm
                module.float()
        for moe in model.moes():
            moe.experts.float()
        return model


def _deepseek_v4(rank: int, ranks: int, ep: int) -> float:
    """How far all gradients are off, beside float32 parameters in a bfloat16 model."""
    options = V4Options(moe=REPLAY, scale=0.1, dtype=torch.bfloat16)
    case = Case("", options, {"mp_policy": None}, choices=((0, 1, 2, 3),) * ranks)
    actual = parallel_step(case, build_meshes(ep=ep), rank, ranks)
    expected = one_process(options, shards_of(case, ranks), MAX_NORM, LR)
    for name, value in expected.parameters.items():
        assert actual.parameters[name].dtype == value.dtype, name
        wide = torch.float32 if "norm" in name or ".experts." in name else torch.bfloat16
        assert value.dtype == wide, name
    ours, theirs = (
        torch.cat([step.grads[name].flatten().float() for name in sorted(expected.grads)])
        for step in (actual, expected)
    )
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("ep", [2, 4])
def test_float32_parameters_of_a_bfloat16_model(ep: int) -> None:
    assert max(run_ranks(4, _deepseek_v4, ep)) < 0.02


def _initialised(rank: int, ranks: int) -> None:
    """Seeded alike, replicas hold equal weights, and shards of one matrix others."""
    for sizes in ({"dp_replicate": 2}, {"ep": 2}, {"dp_replicate": 2, "ep": 2}):
        meshes, model = build_meshes(**sizes), TinyLM()
        parallelize_model(model, *meshes, **parallel_axis_names(*meshes))
        torch.manual_seed(5)
        for moe in model.moes():
            moe.init_weights(init_std=0.5)
        for name, parameter in model.moes()[0].named_parameters():
            parts = [torch.empty_like(parameter.full_tensor()) for _ in range(ranks)]
            torch.distributed.all_gather(parts, parameter.full_tensor())
            assert all(torch.equal(part, parts[0]) for part in parts), name
            assert 0.35 < parts[0].std() < 0.65, name
            assert parts[0].unique().numel() > 0.9 * parts[0].numel(), name  # no shard twice


def test_ranks_draw_their_parts_of_one_model() -> None:
    run_ranks(4, _initialised)


def _without_memory(rank: int, ranks: int) -> None:
    """A model is parallelized before it has memory, and initialised in its shards."""
    model = TinyLM(ModelOptions(moe={"gate_bias_update_factor": 0.25})).to("meta")
    meshes = build_meshes(ep=2)
    parallelize_model(model, *meshes, **parallel_axis_names(*meshes))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().fill_(0.5)
    for moe in model.moes():
        moe.init_weights("cpu")
    shard = make_shards(ranks, 1)[0][rank]
    loss_sum(model, shard).backward()
    for moe in model.moes():
        moe.gate.update_bias()
        bias = moe.gate.e_score_correction_bias
        assert isinstance(bias, DTensor)
        assert bias.device.type == "cpu"
        assert set(bias.to_local().tolist()) <= {-0.25, 0.0, 0.25}
        assert bool(bias.to_local().any())


def test_a_model_without_memory() -> None:
    run_ranks(4, _without_memory)
