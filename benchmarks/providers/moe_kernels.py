"""The package itself."""

from __future__ import annotations

import moe_kernels as ours
from benchmarks.ops._order import order_of
from benchmarks.registry import Builder, Case, Implementation, Inputs, Output, Provider, Unsupported


def _fused_experts(case: Case) -> Implementation:
    gate_up, down = case.weights["gate_up"], case.weights["down"]

    def run(inputs: Inputs) -> Output:
        return ours.fused_experts(
            inputs["x"], gate_up.mT, down.mT, inputs["topk_ids"], inputs["topk_weights"]
        )

    return Implementation(run)


def quantized_experts(formats: dict[int, str]) -> Builder:
    """Ours in a format for each number of bits."""

    def build(case: Case) -> Implementation:
        format = formats.get(case.shape["B"])
        if format is None:
            raise Unsupported(f"has no format of {case.shape['B']} bits")
        gate_up = ours.quantize_experts(case.weights["gate_up"].mT, format)
        down = ours.quantize_experts(case.weights["down"].mT, format)
        for weight in (gate_up, down) if case.large_pages else ():
            ours.use_large_pages(weight.codes)
            ours.use_large_pages(weight.scales)

        def run(inputs: Inputs) -> Output:
            return ours.fused_experts_quantized(
                inputs["x"], gate_up, down, inputs["topk_ids"], inputs["topk_weights"]
            )

        return Implementation(run)

    return build


def _grouped_gemm(case: Case) -> Implementation:
    w = case.weights["w"]
    return Implementation(lambda i: ours.grouped_gemm(i["a"], w.mT, i["offsets"]))


def _topk_router(case: Case) -> Implementation:
    top_k = case.shape["K"]

    def run(inputs: Inputs) -> Output:
        routed = ours.topk_router(inputs["logits"], top_k, renormalize=True)
        return routed.topk_weights, routed.topk_ids

    return Implementation(run)


def _sort_by_expert(case: Case) -> Implementation:
    experts = case.shape["E"]
    return Implementation(lambda i: ours.sort_by_expert(i["topk_ids"], experts))


moe_kernels = Provider(
    "moe_kernels",
    {
        "fused_experts": _fused_experts,
        "fused_experts_quantized": quantized_experts({8: "int8", 4: "int4"}),
        "grouped_gemm": _grouped_gemm,
        "expert_activation": lambda case: Implementation(
            lambda i: ours.expert_activation(i["h"], "swiglu")
        ),
        "permute": lambda case: Implementation(lambda i: ours.permute(i["x"], order_of(i))),
        "unpermute": lambda case: Implementation(
            lambda i: ours.unpermute(i["rows"], order_of(i), i["weights"])
        ),
        "sort_by_expert": _sort_by_expert,
        "topk_router": _topk_router,
    },
)
