"""A small Qwen3-MoE over bytes, its MoE layers replaced, its experts and the rest sharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from lm.cluster import Cluster
from lm.data import VOCABULARY
from lm.settings import Settings
from moe_parallel import MoE
from moe_parallel.integrations.transformers import replace_moe_layers
from moe_parallel.parallelizer import parallelize_model
from moe_parallel.training import scale_grads_and_clip_grad_norm


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
    loads: list[Any] = [layer.gate._last_expert_load for layer in moe_layers(model)]
    return torch.stack(loads)


def shard(model: nn.Module, cluster: Cluster) -> None:
    """Spread the experts over ranks, and shard everything else over all ranks with FSDP2."""
    parallelize_model(
        model,
        cluster.world_mesh,
        cluster.moe_mesh,
        **cluster.axes,
        mp_policy=MixedPrecisionPolicy(),  # float32 throughout
    )


def parameter_groups(model: nn.Module) -> list[list[nn.Parameter]]:
    """The experts' parameters, after the others: they live on different meshes."""
    experts = [p for layer in moe_layers(model) for p in layer.experts.parameters()]
    known = set(experts)
    return [[p for p in model.parameters() if p not in known], experts]


def finish_gradients(model: nn.Module, cluster: Cluster, max_norm: float) -> float:
    """Bring every gradient to that of the mean loss over all ranks, then clip.

    Each rank has back-propagated its share of the mean loss times the number of ranks. FSDP
    averages over the ranks: right for what all of them compute. An expert's gradient is a sum over
    the ranks that its tokens came from, and is scaled here.

    Returns:
        The norm of the whole gradient before clipping.
    """
    return scale_grads_and_clip_grad_norm(
        max_norm,
        [model],
        moe_mesh=cluster.moe_mesh,
        ep_axis_name="ep",
        dp_group_size=cluster.world,
    )
