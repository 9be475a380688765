"""A small Qwen3-MoE over bytes, its MoE layers replaced, its experts and the rest sharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from lm.cluster import Cluster
from lm.data import VOCABULARY
from lm.settings import Settings
from moe_parallel import GroupedExperts, MoE
from moe_parallel.integrations.transformers import replace_moe_layers
from moe_parallel.parallelizer import apply_ep


def make_model(settings: Settings) -> Qwen3MoeForCausalLM:
    """transformers' own model with random weights, the same on every rank."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=max(1, settings.heads // 2),
        head_dim=settings.hidden // settings.heads,
        intermediate_size=2 * settings.hidden,
        moe_intermediate_size=settings.inner,
        num_experts=settings.experts,
        num_experts_per_tok=settings.top_k,
        norm_topk_prob=True,
        max_position_embeddings=4 * settings.length,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    state = torch.get_rng_state()
    torch.manual_seed(settings.seed)
    model = Qwen3MoeForCausalLM(config)
    torch.set_rng_state(state)
    return model


@torch.no_grad()
def replace_and_compare(model: nn.Module, settings: Settings, tokens: Tensor) -> float:
    """Replace the MoE layers by :class:`moe_parallel.MoE` in place, and let them count their load.

    Returns:
        The largest difference of a logit for ``tokens`` [B, S] before and after.
    """
    model.eval()
    before = model(input_ids=tokens, use_cache=False).logits
    for layer in replace_moe_layers(model, aux_loss_coeff=settings.balance).values():
        layer.gate._track_load_balance = True
    after = model(input_ids=tokens, use_cache=False).logits
    model.train()
    return float((after - before).abs().max())


def moe_layers(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def expert_load(model: nn.Module) -> Tensor:
    """[layers, experts]: tokens that this rank's last forward sent to each expert."""
    loads = [layer.gate._last_expert_load for layer in moe_layers(model)]
    return torch.stack(loads)


def shard(model: nn.Module, cluster: Cluster) -> None:
    """Spread the experts over the ``ep`` ranks, and everything else over all ranks with FSDP2."""
    experts = [module for module in model.modules() if isinstance(module, GroupedExperts)]
    owned: set[nn.Parameter] = set()
    if cluster.expert_parallel > 1:
        apply_ep(model, cluster.moe["ep"])
        if cluster.moe["ep_shard"].size() > 1:
            for module in experts:
                fully_shard(module, mesh=cluster.moe["ep_shard"], reshard_after_forward=False)
        owned = {parameter for module in experts for parameter in module.parameters()}
    # The dense part is small: kept whole between forward and backward.
    options: dict[str, Any] = {"mesh": cluster.dp, "reshard_after_forward": False}
    for block in model.model.layers:
        fully_shard(block, **options, ignored_params=owned)
    fully_shard(model, **options, ignored_params=owned)


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Experts and the rest: they live on different meshes."""
    experts = {
        parameter
        for module in model.modules()
        if isinstance(module, GroupedExperts)
        for parameter in module.parameters()
    }
    dense = [parameter for parameter in model.parameters() if parameter not in experts]
    return {"dense": dense, "experts": [p for p in model.parameters() if p in experts]}


def finish_gradients(
    groups: dict[str, list[nn.Parameter]], cluster: Cluster, max_norm: float
) -> float:
    """Bring every gradient to that of the mean loss over all ranks, then clip.

    Each rank has back-propagated its share of the mean loss times the number of ranks. FSDP
    averages over the ranks: right for what all of them compute. An expert's gradient is the sum
    over the ranks of its EP group, which the tokens came from, averaged over ``ep_shard`` alone:
    it is ``ep`` times too large.

    Returns:
        The norm of the whole gradient before clipping.
    """
    if cluster.expert_parallel > 1:
        for parameter in groups["experts"]:
            assert parameter.grad is not None
            parameter.grad.div_(cluster.expert_parallel)
    norms = []
    for parameters in groups.values():
        total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norms.append(total.full_tensor() if isinstance(total, DTensor) else total)
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for parameters in groups.values():
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)
