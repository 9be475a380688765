"""One decoding step of a whole transformers model: few layers, real widths.

L layers, T sequences that each add a token, C tokens in each sequence's cache, H hidden size,
I expert intermediate size, E experts, K experts a token. The model is Qwen3-MoE with a vocabulary
of VOCABULARY tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.registry import Case, Implementation, Inputs, Output, Shape
from moe_kernels import reference
from moe_kernels.integrations.transformers import register

VOCABULARY, HEADS, KEY_HEADS, HEAD = 1024, 32, 4, 128
_EXPERTS = ("gate_up_proj", "down_proj")


def config_of(shape: Shape, implementation: str) -> Any:
    from transformers.models.qwen3_moe import configuration_qwen3_moe

    config = configuration_qwen3_moe.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape["H"],
        intermediate_size=shape["I"],
        moe_intermediate_size=shape["I"],
        num_hidden_layers=shape["L"],
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=HEAD,
        num_experts=shape["E"],
        num_experts_per_tok=shape["K"],
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    config._experts_implementation = implementation
    return config


def build_model(case: Case, implementation: str, weights: Mapping[str, Tensor]) -> Any:
    """The model with ``weights``, which it shares, on their device."""
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    with torch.device("meta"):
        model = modeling_qwen3_moe.Qwen3MoeForCausalLM(config_of(case.shape, implementation))
    model.load_state_dict(dict(weights), assign=True, strict=True)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config).to(case.device)
    return model.eval().requires_grad_(False)


def random_weights(
    shape: Shape, dtype: torch.dtype, device: torch.device, seed: int
) -> dict[str, Tensor]:
    """Parameters by name, such that every product has outputs of unit scale."""
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    with torch.device("meta"):
        model = modeling_qwen3_moe.Qwen3MoeForCausalLM(config_of(shape, "eager"))
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
        if parameter.dim() == 1:
            values.fill_(1)
        else:
            scale = 1.0 if "embed_tokens" in name else parameter.shape[-1] ** -0.5
            values.normal_(std=scale, generator=generator)
        weights[name] = values
    return weights


def make_cache(case: Case, inputs: Inputs, rows: slice, dtype: torch.dtype) -> Any:
    """A cache that holds the context of the sequences ``rows``, and has room for one token."""
    from transformers import StaticCache

    context = case.shape["C"]
    cache = StaticCache(config_of(case.shape, "eager"), max_cache_len=context + 1)
    for layer, (keys, values) in zip(cache.layers, inputs["context"], strict=True):
        keys, values = keys[rows].to(dtype), values[rows].to(dtype)
        layer.lazy_initialization(keys, values)
        layer.keys[:, :, :context] = keys
        layer.values[:, :, :context] = values
    return cache


def decode(model: Callable[..., Any], cache: Any, context: int, tokens: Tensor) -> Tensor:
    """The logits after one more token of each sequence; the cache is as before afterwards."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(context)
    logits: Tensor = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1]
    return logits


def chosen_experts(
    model: Any, cache: Any, context: int, tokens: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """For each layer the ids [T, K] that a step chooses, and how clear the choice is: the gap
    between the last chosen and the first left out, in units of the logits' deviation [T]."""
    found: list[tuple[Tensor, Tensor]] = []

    def note(module: Any, _: Any, output: tuple[Tensor, ...]) -> None:
        logits = output[0].float()
        top = logits.topk(module.top_k + 1, dim=-1).values
        found.append((output[2], (top[:, -2] - top[:, -1]) / logits.std(dim=-1)))

    handles = [layer.mlp.gate.register_forward_hook(note) for layer in model.model.layers]
    try:
        decode(model, cache, context, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return found


def true_logits(case: Case, inputs: Inputs, rows: slice) -> Tensor:
    """The logits of the sequences ``rows`` in float64: the experts are widened as they are used."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def experts(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        used, local = ids.unique(return_inverse=True)
        gate_up, down = (getattr(module, name)[used].double() for name in _EXPERTS)
        y: Tensor = reference.fused_experts(x, gate_up.mT, down.mT, local, weights.double())
        return y

    name = "float64_of_the_benchmarks"
    ALL_EXPERTS_FUNCTIONS.register(name, experts)
    wide = {
        name: value if name.endswith(_EXPERTS) else value.double()
        for name, value in case.weights.items()
    }
    model = build_model(case, name, wide)
    cache = make_cache(case, inputs, rows, torch.float64)
    return decode(model, cache, case.shape["C"], inputs["tokens"][rows])


def decoding(implementation: str, *, compiled: bool = False) -> Callable[[Case], Implementation]:
    """Decoding with one of transformers' experts implementations, ours among them."""

    def build(case: Case) -> Implementation:
        if implementation == "moe_kernels":
            register()
        model = build_model(case, implementation, case.weights)
        step = torch.compile(model) if compiled else model
        whole = slice(None)
        cache = make_cache(case, case.inputs[0], whole, case.dtype)

        def run(inputs: Inputs) -> Output:
            return decode(step, cache, case.shape["C"], inputs["tokens"])

        if compiled:  # whose first calls take minutes, and say nothing of the others
            with torch.inference_mode():
                for inputs in case.inputs[:3]:
                    run(inputs)
        return Implementation(run)

    return build
