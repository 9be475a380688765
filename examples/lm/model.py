"""A small Qwen3-MoE over bytes, its MoE layers replaced, its experts and the rest sharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AttentionInterface, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from lm.cluster import Cluster
from lm.data import VOCABULARY
from lm.settings import Settings
from moe_parallel import BackendConfig, MoE
from moe_parallel.context_parallel import ContextParallelAttention
from moe_parallel.fsdp_mixin import MoEFSDPSyncMixin
from moe_parallel.integrations.transformers import replace_moe_layers
from moe_parallel.parallelizer import parallelize_model
from moe_parallel.training import scale_grads_and_clip_grad_norm


class LanguageModel(Qwen3MoeForCausalLM, MoEFSDPSyncMixin):
    """transformers' model, which communicates once for a batch that comes in several parts."""

    backend = BackendConfig(enable_fsdp_optimizations=True)


def make_model(settings: Settings) -> Qwen3MoeForCausalLM:
    """transformers' own model with random weights, the same on every rank."""
    return _with_random_weights(Qwen3MoeForCausalLM, settings)


def make_trained_model(settings: Settings) -> LanguageModel:
    """The same, to be sharded and trained."""
    return _with_random_weights(LanguageModel, settings)


def _with_random_weights(kind: Any, settings: Settings) -> Any:
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=1 if settings.heads % 2 else settings.heads // 2,
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
    model = kind(config)
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


def moe_layers(model: nn.Module) -> dict[int, MoE]:
    """By the number of the layer: those that this rank has."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            found[int(name.split("layers.")[1].split(".")[0])] = module
    return found


class ExpertLoad:
    """Counts the tokens that this rank's forward passes send to each expert, once each.

    Attributes:
        total: [layers, experts], zero for the layers of other pipeline stages.
    """

    def __init__(self, model: nn.Module, settings: Settings, cluster: Cluster) -> None:
        size = (settings.layers, settings.experts)
        self.total = torch.zeros(size, dtype=torch.float64, device=cluster.device)
        self._layers = moe_layers(model)
        model.register_forward_hook(self._count)

    def _count(self, *call: Any) -> None:
        for number, layer in self._layers.items():
            load: Any = layer.gate._last_expert_load
            self.total[number] += load


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """What transformers calls for [B, heads, S, size]; it wants [B, S, heads, size]."""
    return module.attn_module(query, key, value).transpose(1, 2), None


def share_sequences(model: LanguageModel) -> None:
    """Give every layer attention that works on a rank's part of the sequences."""
    AttentionInterface.register("context_parallel", _attend)
    AttentionMaskInterface.register("context_parallel", lambda *args, **kwargs: None)
    model.set_attn_implementation("context_parallel")
    for layer in model.model.layers:
        layer.self_attn.attn_module = ContextParallelAttention(scale=layer.self_attn.scaling)


def shard(model: nn.Module, cluster: Cluster) -> None:
    """Spread the experts over ranks, and shard everything else with FSDP2; of a stage alike."""
    recomputed = cluster.parallelism.ac
    parallelize_model(
        model,
        cluster.world_mesh,
        cluster.moe_mesh,
        **cluster.axes,
        mp_policy=MixedPrecisionPolicy(),  # float32 throughout
        activation_checkpointing="selective" if recomputed == "selective" else recomputed != "off",
        ignore_router_for_ac=recomputed != "full",
        wrap_outer_model=cluster.stages == 1,
    )


def parameter_groups(model: nn.Module) -> list[list[nn.Parameter]]:
    """The experts' parameters, after the others: they live on different meshes."""
    experts = [p for moe in moe_layers(model).values() for p in moe.experts.parameters()]
    known = set(experts)
    return [[p for p in model.parameters() if p not in known], experts]


def finish_gradients(model: nn.Module, cluster: Cluster, max_norm: float, tokens: int) -> float:
    """Bring every gradient to that of the mean loss over all ranks, then clip.

    Each rank has back-propagated its share of the mean loss times the number of ranks that share
    the parameters, or, in a pipeline, its sum of the losses. FSDP averages over the ranks: right
    for what all of them compute. An expert's gradient is a sum over the ranks that its tokens came
    from, and is scaled here.

    Args:
        tokens: in the whole batch.

    Returns:
        The norm of the whole gradient before clipping.
    """
    return scale_grads_and_clip_grad_norm(
        max_norm,
        [model],
        pp_enabled=cluster.stages > 1,
        device_mesh=cluster.world_mesh,
        moe_mesh=cluster.moe_mesh,
        ep_axis_name="ep",
        pp_axis_name="pp",
        num_label_tokens=tokens,
        dp_group_size=cluster.sharing,
    )
