"""Random models of a few thousand parameters, one for each transformers family under test."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 97
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
_LATENT_ATTENTION = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
_GROUPS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 20,
    "routed_scaling_factor": 1.5,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 28,
    },
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20},
    "deepseek_v3": {**_LATENT_ATTENTION, **_GROUPS, "first_k_dense_replace": 1},
    "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "glm4_moe": {**_GROUPS, "first_k_dense_replace": 1},
    "granitemoe": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "nemotron_h": {
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "moe_shared_expert_intermediate_size": 20,
        "layers_block_type": ["moe", "attention", "mamba", "moe"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 4,
    },
    "phimoe": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "ernie4_5_moe": {
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_intermediate_size": 20,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "minimax_m2": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 2,
        "moe_intermediate_size": 20,
        "global_head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
    },
}


# Families whose MoE blocks can be replaced, beside those above.
_SIGMOID = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
_INDEXER = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
CONFIGS_OF_MODULES: dict[str, dict[str, Any]] = {
    "flex_olmo": {"num_experts": 6, "num_experts_per_tok": 2},
    "mellum": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
    "minimax": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen3_next": {
        **CONFIGS["qwen2_moe"],
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "deepseek_v2": {**CONFIGS["deepseek_v3"], "topk_method": "greedy"},
    "deepseek_v32": {**CONFIGS["deepseek_v3"], **_INDEXER},
    "dots1": CONFIGS["glm4_moe"],
    "glm4_moe_lite": CONFIGS["deepseek_v3"],
    "glm_moe_dsa": {**CONFIGS["deepseek_v3"], **_INDEXER},
    "solar_open": _GROUPS,
    "exaone_moe": {
        **{key: _GROUPS[key] for key in ("num_experts_per_tok", "n_group", "topk_group")},
        "num_experts": 8,
        "num_shared_experts": 1,
        "moe_intermediate_size": 20,
        "routed_scaling_factor": 1.5,
        "first_k_dense_replace": 1,
    },
    "hunyuan_v1_moe": {"num_experts": 6, "moe_topk": 2},
    "afmoe": {**_SIGMOID, "num_dense_layers": 1, "num_shared_experts": 1},
    "hy_v3": {**_SIGMOID, "num_shared_experts": 1},
}


def tiny_model(family: str, **overrides: Any) -> PreTrainedModel:
    """A model of ``family`` whose every parameter is random, norms, biases and buffers included."""
    own = {**CONFIGS, **CONFIGS_OF_MODULES}[family]
    config = AutoConfig.for_model(family, **{**_COMMON, **own, **overrides})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, value in model.named_parameters():
        mean, spread = (1.0 if "norm" in name else 0.0), (0.3 if value.dim() > 1 else 0.1)
        torch.nn.init.normal_(value, mean, spread)
    for name, value in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(value, 0.0, 0.1)
    return model.train()


def tokens(batch: int = 2, length: int = 11) -> torch.Tensor:
    """[batch, length] random ids."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
