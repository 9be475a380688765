"""A language model with every part that parallelism treats differently, and one process as truth.

B sequences, L tokens each, V words, R ranks that share the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from moe_parallel import MLP, BackendConfig, MoE, MoEConfig
from moe_parallel.context_parallel import ContextParallelAttention, shard_sequence
from moe_parallel.fsdp_mixin import MoEFSDPSyncMixin
from moe_parallel.training import MoEAuxLossAutoScaler

VOCABULARY = 23
IGNORED = -100


@dataclass(frozen=True)
class ModelOptions:
    """What of the model a case changes."""

    moe: dict[str, Any] = field(default_factory=dict)
    layers: int = 3
    tied: bool = False
    optimizations: bool = False
    frozen_experts: bool = False
    dtype: torch.dtype = torch.float32
    scale: float = 0.3  # of the matrices
    shared_attention: bool = False  # ContextParallelAttention

    def build(self) -> TinyLM:
        return TinyLM(self)


class _Gather(torch.autograd.Function):
    """Every rank's part of a sequence [B, heads, L / ranks, D], in order; gradients go back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Any) -> Tensor:
        ctx.mesh, ctx.length = mesh, x.shape[2]
        parts = [torch.empty_like(x) for _ in range(mesh.size())]
        dist.all_gather(parts, x.contiguous(), group=mesh.get_group())
        return torch.cat(parts, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.mesh.get_group())
        return grad.narrow(2, ctx.mesh.get_local_rank() * ctx.length, ctx.length), None


class Attention(nn.Module):
    """Causal attention with two heads, which may hold consecutive parts of a sequence."""

    cp_mesh: Any = None

    def __init__(self, dim: int, shared: bool = False) -> None:
        super().__init__()
        self.attn_module = ContextParallelAttention() if shared else None
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def setup_cp_attention(self, cp_mesh: Any) -> None:
        self.cp_mesh = cp_mesh

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        if self.attn_module is not None:
            return self.out(self.attn_module(q, k, v).transpose(1, 2).flatten(-2))
        start, length = 0, q.shape[2]
        if self.cp_mesh is not None:
            start = self.cp_mesh.get_local_rank() * length
            k, v = _Gather.apply(k, self.cp_mesh), _Gather.apply(v, self.cp_mesh)
        shape = (start + length, k.shape[2])
        mask = torch.ones(shape, dtype=torch.bool, device=q.device).tril()[start:]
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(
        self, config: MoEConfig, backend: BackendConfig, dense: bool, shared: bool
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(config.dim) for _ in range(2))
        self.self_attn = Attention(config.dim, shared)
        if dense:
            self.mlp = MLP(config.dim, config.inter_dim, dtype=config.dtype)
        else:
            self.mlp = MoE(config, backend)

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.norms[0](x))
        y = self.norms[1](x)
        return x + (self.mlp(y, padding_mask) if isinstance(self.mlp, MoE) else self.mlp(y))


class Backbone(nn.Module):
    def __init__(
        self, config: MoEConfig, backend: BackendConfig, layers: int, shared: bool
    ) -> None:
        super().__init__()
        self.moe_config = config
        self.embed_tokens: nn.Module | None = nn.Embedding(VOCABULARY, config.dim)
        self.layers = nn.ModuleDict(
            {str(i): Block(config, backend, i == 1, shared) for i in range(layers)}
        )
        self.norm: nn.Module | None = nn.RMSNorm(config.dim)

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        for layer in self.layers.values():
            x = layer(x, padding_mask)
        return x if self.norm is None else self.norm(x)


class TinyLM(nn.Module, MoEFSDPSyncMixin):
    """An outer model with a head, around an inner one: a dense block between two MoE blocks."""

    def __init__(self, options: ModelOptions = ModelOptions()) -> None:
        super().__init__()
        settings: dict[str, Any] = {
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_activated_experts": 2,
            "n_expert_groups": 1,
            "n_limited_groups": 1,
            "train_gate": True,
            "gate_bias_update_factor": 0.0,
            "aux_loss_coeff": 0.0,
            "score_func": "sigmoid",
            "route_scale": 1.0,
            "dim": 16,
            "inter_dim": 24,
            "moe_inter_dim": 8,
            "norm_topk_prob": True,
            "dtype": torch.float32,
            **options.moe,
        }
        config = MoEConfig(**settings)
        self.backend = BackendConfig(enable_fsdp_optimizations=options.optimizations)
        self.config = SimpleNamespace(hidden_size=config.dim, tie_word_embeddings=options.tied)
        self.model = Backbone(config, self.backend, options.layers, options.shared_attention)
        self.lm_head: nn.Linear | None = nn.Linear(config.dim, VOCABULARY, bias=False)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 1 and "bias" not in name:
                    continue  # norms
                scale = 1.0 if "embed" in name or "gate.weight" in name else options.scale
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        if options.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        if options.frozen_experts:
            for module in self.moes():
                module.experts.requires_grad_(False)
        self.to(options.dtype)

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        x = self.model(x, padding_mask)
        return x if self.lm_head is None else self.lm_head(x)

    def keep_stage(self, stage: int, stages: int) -> TinyLM:
        """Drop what the other stages of a pipeline hold."""
        layers = self.model.layers
        kept = {name: layers[name] for name in layers if int(name) * stages // len(layers) == stage}
        self.model.layers = nn.ModuleDict(kept)
        if stage > 0:
            self.model.embed_tokens = None
        if stage < stages - 1:
            self.model.norm = self.lm_head = None
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def moes(self) -> list[MoE]:
        return [module for module in self.modules() if isinstance(module, MoE)]


@dataclass(frozen=True)
class Shard:
    """One micro-batch of one rank: ids, labels [B, L] (IGNORED for none), padding_mask [B, L].

    ``choices``: given experts [B * L, K] of each MoE layer, or None for the routers' own.
    """

    ids: Tensor
    labels: Tensor
    padding_mask: Tensor
    choices: tuple[Tensor, ...] | None = None

    def to(self, device: str) -> Shard:
        tensors = (self.ids, self.labels, self.padding_mask)
        choices = None if self.choices is None else tuple(c.to(device) for c in self.choices)
        return Shard(*(tensor.to(device) for tensor in tensors), choices)

    def part(self, index: int, parts: int) -> Shard:
        """A consecutive part of the sequences."""
        tensors = (self.ids, self.labels, self.padding_mask)
        return Shard(*(tensor.chunk(parts, 1)[index] for tensor in tensors))

    def cut(self, cp_mesh: Any) -> Shard:
        """This rank's part, in the balanced order."""
        tensors = (self.ids, self.labels, self.padding_mask)
        return Shard(*(shard_sequence(tensor, cp_mesh) for tensor in tensors))


def make_shards(
    ranks: int,
    micro_batches: int,
    *,
    length: int = 5,
    uneven: int = 0,
    padded_rank: int | None = None,
    seed: int = 11,
) -> list[list[Shard]]:
    """Shards [micro_batches][ranks] with labels for about three of four tokens, never as many."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(micro_batches):
        batch = []
        for rank in range(ranks):
            shape = (2, length + 2 * uneven * rank)
            ids = torch.randint(VOCABULARY, shape, generator=generator)
            labels = torch.randint(VOCABULARY, shape, generator=generator)
            keep = torch.rand(shape, generator=generator) < 0.9 - 0.1 * rank
            padding = torch.zeros(shape, dtype=torch.bool)
            padding[1, -1:] = True
            if rank == padded_rank:
                padding[:] = True
            batch.append(Shard(ids, labels.where(keep & ~padding, IGNORED), padding))
        batches.append(batch)
    return batches


def count_labels(batches: Sequence[Sequence[Shard]]) -> int:
    return sum(int((shard.labels != IGNORED).sum()) for batch in batches for shard in batch)


def loss_sum(model: nn.Module, shard: Shard) -> Tensor:
    """Sum of the label tokens' losses; backward must run inside :func:`replaying`."""
    logits = model(shard.ids, shard.padding_mask)
    return functional.cross_entropy(
        logits.flatten(0, 1), shard.labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def replaying(moes: Sequence[MoE], shard: Shard) -> ExitStack:
    """The routers take the shard's choices, where it has some."""
    stack = ExitStack()
    for moe, choice in zip(moes, shard.choices or (), strict=False):
        stack.enter_context(moe.gate.routing_replay.replay([choice]))
    return stack


@dataclass
class Step:
    """What one optimizer step computed, by parameter name."""

    loss: float
    norm: float
    grads: dict[str, Tensor]
    parameters: dict[str, Tensor]
    biases: list[Tensor]
    loads: list[Tensor] = field(default_factory=list)  # of the experts, where routers have a bias


def one_process(
    options: ModelOptions, batches: Sequence[Sequence[Shard]], max_norm: float, lr: float
) -> Step:
    """The step of one process that sees every shard of every rank."""
    model = options.build()
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    labels, loss = count_labels(batches), 0.0
    for batch in batches:
        for shard in batch:
            with replaying(model.moes(), shard):
                part = loss_sum(model, shard) / labels
                part.backward()
            loss += part.item()
    parameters = dict(model.named_parameters())
    grads = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm)
    torch.optim.SGD(model.parameters(), lr).step()
    loads, biases = [], []
    for moe in model.moes():
        if moe.gate.bias_update_factor:
            loads.append(moe.gate._cumulative_expert_load)
            moe.gate.update_bias()
        biases.append(moe.gate.e_score_correction_bias)
    return Step(
        loss,
        norm.item(),
        grads,
        {name: p.detach().clone() for name, p in parameters.items()},
        [bias.clone() for bias in biases if bias is not None],
        loads,
    )
