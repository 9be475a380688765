"""One decoding step of a whole model: see :mod:`benchmarks.models` for the letters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.models import (
    HEAD,
    HEADS,
    KEY_HEADS,
    VOCABULARY,
    build_model,
    chosen_experts,
    make_cache,
    random_weights,
    true_logits,
)
from benchmarks.ops._shapes import DECODE_TOKENS, LAYERS
from benchmarks.registry import FORWARD_ONLY, Case, Cost, Inputs, Op, Shape, Truth
from moe_kernels.integrations.transformers import register

INPUT_SETS = 8
CANDIDATES = 32
CHECKED = slice(0, 4)  # sequences whose logits are held to float64
LAYERS_OF_MODEL, CONTEXT = 2, 256


def _shapes(name: str) -> list[Shape]:
    H, I, E, K = LAYERS[name]  # noqa: E741
    return [
        Shape({"L": LAYERS_OF_MODEL, "T": T, "C": CONTEXT, "H": H, "I": I, "E": E, "K": K})
        for T in DECODE_TOKENS
    ]


def _make_case(
    shape: Shape, dtype: torch.dtype, device: torch.device, routing: str, seed: int
) -> Case:
    T, L, C = shape["T"], shape["L"], shape["C"]
    if shape["K"] >= shape["E"]:  # how clear a router's choice is needs one that it leaves out
        raise ValueError(f"K must be below E = {shape['E']}; got {shape['K']}")
    generator = torch.Generator(device).manual_seed(seed + 1)
    context = torch.randn(L, 2, T, KEY_HEADS, C, HEAD, device=device, generator=generator)
    tokens = torch.randint(0, VOCABULARY, (CANDIDATES, T, 1), device=device, generator=generator)
    inputs: list[Inputs] = [{"tokens": t, "context": context.to(dtype)} for t in tokens]
    case = Case(shape, dtype, device, inputs, random_weights(shape, dtype, device, seed))
    return Case(shape, dtype, device, _clearest(case, tokens), case.weights)


def _clearest(case: Case, tokens: Tensor) -> list[Inputs]:
    """The inputs whose tokens leave no router in doubt: rounding would else decide which experts
    run, and implementations that are all right would differ by whole experts."""
    register()
    model = build_model(case, "moe_kernels", case.weights)
    cache = make_cache(case, case.inputs[0], slice(None), case.dtype)
    gaps = []
    with torch.inference_mode():
        for inputs in case.inputs:
            layers = chosen_experts(model, cache, case.shape["C"], inputs["tokens"])
            gaps.append(torch.stack([gap for _, gap in layers]).amin(0))
        best = torch.stack(gaps).argsort(0, descending=True)[:INPUT_SETS]  # [sets, T]
        chosen: list[Inputs] = []
        for order in best:
            picked = tokens[order, torch.arange(len(order), device=order.device)]
            layers = chosen_experts(model, cache, case.shape["C"], picked)
            hit = sum(len(ids.unique()) for ids, _ in layers)
            chosen.append({**case.inputs[0], "tokens": picked, "experts_hit": torch.tensor(hit)})
    return chosen


def _cost(case: Case) -> Mapping[str, Cost]:
    """Every weight that is needed and the cache, read once; of all layers together."""
    L, T, C, H, I, E, K = (case.shape[letter] for letter in "LTCHIEK")  # noqa: E741
    size = case.dtype.itemsize
    hit = sum(int(i["experts_hit"]) for i in case.inputs) / len(case.inputs)
    attention = 2 * H * HEAD * (HEADS + KEY_HEADS)
    dense = L * (attention + E * H) + VOCABULARY * H
    cache = L * 2 * T * C * KEY_HEADS * HEAD
    flops = 2.0 * T * (dense + L * K * 3 * H * I + L * 2 * C * HEADS * HEAD)
    return {"forward": Cost(flops, size * (hit * 3.0 * H * I + dense + cache))}


def _truth(case: Case, index: int, gradients: bool) -> Mapping[str, Truth]:
    inputs = case.inputs[index]
    rows = torch.arange(case.shape["T"], device=case.device)[CHECKED]
    with torch.inference_mode():
        return {"logits": Truth(rows, true_logits(case, inputs, CHECKED))}


model_decode = Op(
    name="model_decode",
    outputs=("logits",),
    shape_sets={name: _shapes(name) for name in ("qwen3-30b-a3b", "mixtral-8x7b")},
    defaults={"cpu": ("qwen3-30b-a3b",), "cuda": ("qwen3-30b-a3b",)},
    make_case=_make_case,
    cost=_cost,
    truth=_truth,
    dtypes={"cpu": ("bf16",), "cuda": ("bf16",)},
    directions=FORWARD_ONLY,
    routed=False,
    plain="transformers_eager",
    requires=("transformers.models.qwen3_moe",),
)
