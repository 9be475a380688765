"""The experts implementations of transformers, on the same weights, by Qwen3-MoE's own module."""

from __future__ import annotations

from benchmarks.models import decoding
from benchmarks.registry import Builder, Case, Implementation, Inputs, Output, Provider, Unsupported

# batched_mm copies each slot's weights: above this many bytes it is no option, but a mistake
_BATCHED_LIMIT = 8 << 30


def _fused_experts(implementation: str) -> Builder:
    def build(case: Case) -> Implementation:
        import torch
        from transformers.models.qwen3_moe import configuration_qwen3_moe, modeling_qwen3_moe

        T, H, I, E, K = (case.shape[letter] for letter in "THIEK")  # noqa: E741
        copied = T * K * 3 * H * I * case.dtype.itemsize
        if implementation == "batched_mm" and copied > _BATCHED_LIMIT:
            raise Unsupported(f"would copy {copied / 2**30:.0f} GiB of weights")
        config = configuration_qwen3_moe.Qwen3MoeConfig(
            hidden_size=H, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=K
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = modeling_qwen3_moe.Qwen3MoeExperts(config)
        # assigned past nn.Module's registration: the case's tensors are leaves, not Parameters
        for name in ("gate_up", "down"):
            delattr(experts, f"{name}_proj")
            setattr(experts, f"{name}_proj", case.weights[name])

        def run(inputs: Inputs) -> Output:
            y: Output = experts(inputs["x"], inputs["topk_ids"], inputs["topk_weights"])
            return y

        return Implementation(run)

    return build


def _provider(implementation: str) -> Provider:
    return Provider(
        f"transformers_{implementation}",
        {
            "fused_experts": _fused_experts(implementation),
            "model_decode": decoding(implementation),
        },
        requires=("transformers.integrations.moe",),
    )


transformers_eager = _provider("eager")
transformers_grouped_mm = _provider("grouped_mm")
transformers_batched_mm = _provider("batched_mm")
