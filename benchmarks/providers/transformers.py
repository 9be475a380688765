"""The experts implementations of transformers, on the same weights, by its modules of Qwen3-MoE
and, for that variant, of gpt-oss.

"sonicmoe" and "deepgemm" are kernels that the package ``kernels`` fetches from the Hub when first
called.
"""

from __future__ import annotations

from typing import Any

from benchmarks.models import decoding
from benchmarks.ops.fused_experts import is_oai
from benchmarks.registry import Builder, Case, Implementation, Inputs, Output, Provider, Unsupported

# batched_mm copies each slot's weights: above this many bytes it is no option, but a mistake
_BATCHED_LIMIT = 8 << 30


def _fused_experts(implementation: str) -> Builder:
    def build(case: Case) -> Implementation:
        import torch

        T, H, I, K = (case.shape[letter] for letter in "THIK")  # noqa: E741
        copied = T * K * 3 * H * I * case.dtype.itemsize
        if implementation == "batched_mm" and copied > _BATCHED_LIMIT:
            raise Unsupported(f"would copy {copied / 2**30:.0f} GiB of weights")
        with torch.device("meta"):
            experts = _module(case, implementation)
        # assigned past nn.Module's registration: the case's tensors are leaves, not Parameters
        for name, value in case.weights.items():
            kind = name.removesuffix("_bias")
            own = f"{kind}_proj_bias" if name.endswith("_bias") else f"{kind}_proj"
            delattr(experts, own)
            setattr(experts, own, value)

        def run(inputs: Inputs) -> Output:
            y: Output = experts(inputs["x"], inputs["topk_ids"], inputs["topk_weights"])
            return y

        return Implementation(run)

    return build


def _module(case: Case, implementation: str) -> Any:
    H, I, E, K = (case.shape[letter] for letter in "HIEK")  # noqa: E741
    sizes: dict[str, Any] = {"hidden_size": H, "num_experts_per_tok": K}
    if is_oai(case):
        from transformers.models.gpt_oss import configuration_gpt_oss, modeling_gpt_oss

        config: Any = configuration_gpt_oss.GptOssConfig(
            intermediate_size=I, num_local_experts=E, **sizes
        )
        config._experts_implementation = implementation
        return modeling_gpt_oss.GptOssExperts(config)
    from transformers.models.qwen3_moe import configuration_qwen3_moe, modeling_qwen3_moe

    config = configuration_qwen3_moe.Qwen3MoeConfig(moe_intermediate_size=I, num_experts=E, **sizes)
    config._experts_implementation = implementation
    return modeling_qwen3_moe.Qwen3MoeExperts(config)


def _provider(
    implementation: str,
    requires: tuple[str, ...] = (),
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> Provider:
    return Provider(
        f"transformers_{implementation}",
        {
            "fused_experts": _fused_experts(implementation),
            "model_decode": decoding(implementation),
        },
        requires=("transformers.integrations.moe", *requires),
        devices=devices,
    )


transformers_eager = _provider("eager")
transformers_grouped_mm = _provider("grouped_mm")
transformers_batched_mm = _provider("batched_mm")
transformers_sonicmoe = _provider(
    "sonicmoe", ("transformers.integrations.sonicmoe", "kernels"), ("cuda",)
)
transformers_deepgemm = _provider(
    "deepgemm", ("transformers.integrations.deepgemm", "kernels"), ("cuda",)
)
