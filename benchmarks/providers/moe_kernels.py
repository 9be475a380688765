"""The package itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import moe_kernels as ours
from benchmarks.models import decoding
from benchmarks.ops._order import order_of
from benchmarks.ops.fused_experts import matrices, options
from benchmarks.ops.round_tokens import MODE, TILE
from benchmarks.registry import Builder, Case, Implementation, Inputs, Output, Provider, Unsupported


def _fused_experts(precision: str | None = None) -> Builder:
    def build(case: Case) -> Implementation:
        def run(inputs: Inputs) -> Output:
            return ours.fused_experts(
                inputs["x"],
                *matrices(case),
                inputs["topk_ids"],
                inputs["topk_weights"],
                **options(case),
                precision=precision,
            )

        return Implementation(run)

    return build


def _once(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """Router and experts, of x and logits."""

    def once(x: Tensor, logits: Tensor) -> Tensor:
        routed = ours.topk_router(logits, case.shape["K"], renormalize=True)
        return ours.fused_experts(
            x, *matrices(case), routed.topk_ids, routed.topk_weights, **options(case)
        )

    return once


def _moe_layer(case: Case) -> Implementation:
    once = _once(case)

    def run(inputs: Inputs) -> Output:
        for _ in range(case.shape["N"]):
            y = once(inputs["x"], inputs["logits"])
        return y

    return Implementation(run)


def _moe_layer_in_a_graph(case: Case) -> Implementation:
    """The same, captured once: what is left without the work of the host."""
    once = _once(case)
    x, logits = (torch.empty_like(case.inputs[0][name]) for name in ("x", "logits"))
    captured: list[tuple[torch.cuda.CUDAGraph, Tensor]] = []

    def capture() -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            once(x, logits)  # compiles
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = once(x, logits)
        captured.append((graph, y))

    def run(inputs: Inputs) -> Output:
        x.copy_(inputs["x"])
        logits.copy_(inputs["logits"])
        if not captured:
            capture()
        ((graph, y),) = captured
        for _ in range(case.shape["N"]):
            graph.replay()
        return y

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


def _scaled_grouped_gemm(case: Case) -> Implementation:
    w, scales_w, dtype = case.weights["w"], case.weights["scales_w"], case.dtype

    def run(inputs: Inputs) -> Output:
        return ours.scaled_grouped_gemm(
            inputs["a"], w.mT, inputs["scales_a"], scales_w.mT, inputs["offsets"], out_dtype=dtype
        )

    return Implementation(run)


def _fp8_grouped_gemm(case: Case) -> Implementation:
    w = case.weights["w"]
    return Implementation(lambda i: ours.fp8_grouped_gemm(i["a"], w.mT, i["offsets"]))


def _quantize_weights(case: Case) -> Implementation:
    w = case.weights["w"]
    return Implementation(lambda i: ours.quantize_weights(w.mT))


def _topk_router(case: Case) -> Implementation:
    top_k = case.shape["K"]

    def run(inputs: Inputs) -> Output:
        routed = ours.topk_router(inputs["logits"], top_k, renormalize=True)
        return routed.topk_weights, routed.topk_ids

    return Implementation(run)


def _sort_by_expert(case: Case) -> Implementation:
    experts = case.shape["E"]
    return Implementation(lambda i: ours.sort_by_expert(i["topk_ids"], experts))


def _round_tokens(case: Case) -> Implementation:
    experts, top_k = case.shape["E"], case.shape["K"]

    def run(inputs: Inputs) -> Output:
        weights, ids = inputs["topk_weights"], inputs["topk_ids"]
        return ours.round_tokens(weights, ids, experts, top_k=top_k, tile=TILE, mode=MODE)

    return Implementation(run)


moe_kernels = Provider(
    "moe_kernels",
    {
        "fused_experts": _fused_experts(),
        "fused_experts_fp8": _fused_experts("fp8_block"),
        "fused_experts_quantized": quantized_experts({8: "int8", 4: "int4"}),
        "grouped_gemm": _grouped_gemm,
        "expert_activation": lambda case: Implementation(
            lambda i: ours.expert_activation(i["h"], "swiglu")
        ),
        "permute": lambda case: Implementation(lambda i: ours.permute(i["x"], order_of(i))),
        "unpermute": lambda case: Implementation(
            lambda i: ours.unpermute(i["rows"], order_of(i), i["weights"])
        ),
        "chunk_permute": lambda case: Implementation(
            lambda i: ours.chunk_permute(i["rows"], i["sizes"], i["order"])
        ),
        "sort_by_expert": _sort_by_expert,
        "topk_router": _topk_router,
        "quantize_rows": lambda case: Implementation(lambda i: ours.quantize_rows(i["x"])),
        "permute_quantize": lambda case: Implementation(
            lambda i: ours.permute_quantize(i["x"], order_of(i))
        ),
        "quantize_weights": _quantize_weights,
        "scaled_grouped_gemm": _scaled_grouped_gemm,
        "fp8_grouped_gemm": _fp8_grouped_gemm,
        "moe_layer": _moe_layer,
        "model_decode": decoding("moe_kernels"),
        "round_tokens": _round_tokens,
    },
)

moe_kernels_graph = Provider(
    "moe_kernels_graph", {"moe_layer": _moe_layer_in_a_graph}, devices=("cuda",)
)
