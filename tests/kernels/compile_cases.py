"""Calls whose kernels ``compile_check`` compiles: launchers on tensors of a real layer's shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.kernels.hopper_cases import (
    BF16,
    GLUON,
    HOPPER,
    INNER,
    MORE_SCALED,
    ROLES,
    SCALED,
    E,
    H,
    T,
    gluon_biased,
)

K = 8


def _order(tokens: int = T) -> tuple[Tensor, Tensor, Tensor]:
    rows = tokens * K
    return (
        torch.empty(rows, dtype=torch.int32),
        torch.empty(tokens, K, dtype=torch.int32),
        torch.empty(E + 1, dtype=torch.int32),
    )


def _sort(tokens: int, experts: int = E) -> None:
    from moe_kernels.triton.sort_by_expert import sort_by_expert

    sort_by_expert(torch.empty(tokens, K, dtype=torch.int32), experts)


def _sort_and_map(tokens: int) -> None:
    from moe_kernels.triton.sort_by_expert import sort_and_map

    sort_and_map(torch.empty(tokens, K, dtype=torch.int32), E, tokens * K, 128)


def _permute(dtype: torch.dtype) -> None:
    from moe_kernels.triton.permute import permute
    from moe_kernels.triton.unpermute import unpermute, unpermute_backward

    x, rows, weights = torch.empty(T, H, dtype=dtype), torch.empty(T * K, H, dtype=dtype), None
    permute(x, *_order(), T * K)
    unpermute(rows, *_order(), weights)
    unpermute(rows, *_order(), torch.empty(T, K))
    unpermute_backward(x, rows, *_order(), torch.empty(T, K), [True, True])


def _chunk_permute() -> None:
    from moe_kernels.triton.chunk_permute import chunk_permute

    chunk_permute(torch.empty(T, H, dtype=BF16), *torch.empty(2, E, dtype=torch.int32))


def _activation(kind: str, dtype: torch.dtype) -> None:
    from moe_kernels.triton.expert_activation import (
        expert_activation,
        expert_activation_backward,
    )

    h, grad, weights = torch.empty(T, H), torch.empty(T, H // 2), torch.empty(T)
    options = (kind, weights, kind == "swigluoai", 1.702, 7.0)
    expert_activation(h.to(dtype), *options)
    expert_activation_backward(grad.to(dtype), h.to(dtype), *options)


def _router(
    dtype: torch.dtype = torch.float32, experts: int = E, tokens: int = T, **changes: object
) -> None:
    from moe_kernels.triton.topk_router import topk_router, topk_router_backward

    options = {
        "score_func": "softmax",
        "softmax_before_topk": True,
        "renormalize": True,
        "correction_bias": None,
        "num_groups": 1,
        "topk_groups": 1,
        "group_score": "top2",
        "group_fill": 0.0,
        "route_scale": 2.5,
        "token_mask": None,
        "given_ids": None,
        "return_scores": True,
        "candidates": 0,
        **changes,
    }
    logits = torch.empty(tokens, experts, dtype=dtype)
    weights, ids, scores, _ = topk_router(logits, K, **options)  # type: ignore[arg-type]
    keys = ("score_func", "softmax_before_topk", "renormalize", "route_scale", "candidates")
    topk_router_backward(weights, scores, logits, ids, *(options[key] for key in keys))


def _round(mode: str, dtype: torch.dtype = torch.float32, masked: bool = False) -> None:
    from moe_kernels.triton.round_tokens import round_tokens

    weights, ids = torch.empty(T, 2 * K, dtype=dtype), torch.empty(T, 2 * K, dtype=torch.int32)
    mask = torch.empty(T, dtype=torch.bool) if masked else None
    round_tokens(weights, ids, mask, E, K, 128, mode)


def _grouped_gemm(
    rows: int, dtype: torch.dtype, transposed: bool, hidden: int = H, biased: bool = False
) -> None:
    from moe_kernels.triton import grouped_gemm as module

    offsets = torch.empty(E + 1, dtype=torch.int32)
    a, grad = torch.empty(rows, hidden, dtype=dtype), torch.empty(rows, INNER, dtype=dtype)
    b = torch.empty(E, INNER, hidden, dtype=dtype).mT if transposed else None
    b = torch.empty(E, hidden, INNER, dtype=dtype) if b is None else b
    bias = torch.empty(E, INNER, dtype=dtype) if biased else None
    module.grouped_gemm(a, b, offsets, bias, None)
    module.grouped_gemm_wgrad(a, grad, offsets, dtype, transposed)
    if dtype == BF16:
        module.grouped_gemm_wgrad_(torch.empty(E, hidden, INNER), a, grad, offsets)
        module.grouped_gemm_dbias(grad, offsets, dtype)


def _quantize(dtype: torch.dtype, block: int = 128, hidden: int = H, tokens: int = T) -> None:
    from moe_kernels.triton import quantize as module

    x, float8 = torch.empty(tokens, hidden, dtype=dtype), torch.float8_e4m3fn
    values, scales = module.quantize_rows(x, float8, block, False)
    module.permute_quantize(x, *_order(tokens), tokens * K, float8, block, True)
    module.dequantize_rows(values, scales, dtype, block)
    for stored in (False, True):
        w = torch.empty(E, INNER, hidden, dtype=dtype).mT if stored else None
        w = torch.empty(E, hidden, INNER, dtype=dtype) if w is None else w
        for transposed in (False, True):
            module.quantize_weights(w, float8, block, False, transposed)


def _scaled_gemm(
    rows: int,
    dtype: torch.dtype = BF16,
    hidden: int = H,
    biased: bool = False,
    transposed: bool = True,
) -> None:
    from moe_kernels.triton.permute import permute
    from moe_kernels.triton.scaled_grouped_gemm import scaled_grouped_gemm

    float8, blocks = torch.float8_e4m3fn, -(-hidden // 128)
    a = torch.empty(rows, hidden, dtype=float8)
    b = torch.empty(E, INNER, hidden, dtype=float8).mT if transposed else None
    b = torch.empty(E, hidden, INNER, dtype=float8) if b is None else b
    scales = torch.empty(blocks, rows).t(), torch.empty(E, blocks, -(-INNER // 128))
    offsets = torch.empty(E + 1, dtype=torch.int32)
    bias = torch.empty(E, INNER, dtype=dtype) if biased else None
    scaled_grouped_gemm(a, b, *scales, offsets, bias, dtype)
    permute(torch.empty(T, hidden, dtype=float8), *_order(), T * K)


def _fused_experts(
    activation: str,
    dtype: torch.dtype = BF16,
    tokens: int = T,
    hidden: int = H,
    transposed: bool = True,
    interleaved: bool = False,
    biased: bool = False,
    experts: int = E,
    top_k: int = K,
) -> None:
    from moe_kernels.triton.fused_experts import fused_experts, fused_experts_backward

    def weight(rows: int, columns: int) -> Tensor:
        if transposed:
            return torch.empty(experts, columns, rows, dtype=dtype).mT
        return torch.empty(experts, rows, columns, dtype=dtype)

    gated = activation not in ("relu2", "silu", "gelu")
    width = 2 * INNER if gated else INNER
    x, topk_weights = torch.empty(tokens, hidden, dtype=dtype), torch.empty(tokens, 32)[:, :top_k]
    biases = (
        torch.empty(experts, width, dtype=dtype) if biased else None,
        torch.empty(experts, hidden, dtype=dtype) if biased else None,
    )
    gate_up, down = weight(hidden, width), weight(INNER, hidden)
    ids = torch.empty(tokens, top_k, dtype=torch.int32)
    options = (activation, interleaved, 1.702, 7.0)
    y, h, *order = fused_experts(
        x, gate_up, down, ids, topk_weights, *biases, *options, tokens * top_k, True, None, None
    )
    needs = [True] * 4 + [biased] * 2
    fused_experts_backward(y, x, gate_up, down, topk_weights, h, *order, *biases, *options, needs)


def _fused_experts_fp8(
    activation: str = "swiglu",
    dtype: torch.dtype = BF16,
    tokens: int = T,
    hidden: int = H,
    inner: int = INNER,
    interleaved: bool = False,
    biased: bool = False,
) -> None:
    from moe_kernels.triton.fused_experts_fp8 import (
        fused_experts_fp8,
        fused_experts_fp8_backward,
    )

    width = inner if activation == "relu2" else 2 * inner
    x, topk_weights = torch.empty(tokens, hidden, dtype=dtype), torch.empty(tokens, K)
    gate_up = torch.empty(E, width, hidden, dtype=dtype).mT
    down = torch.empty(E, hidden, inner, dtype=dtype).mT
    biases = (
        torch.empty(E, width, dtype=dtype) if biased else None,
        torch.empty(E, hidden, dtype=dtype) if biased else None,
    )
    ids = torch.empty(tokens, K, dtype=torch.int32)
    options = (activation, interleaved, 1.702, 7.0)
    saved = (tokens * K, True, None, None, None, None)
    y, h, *order = fused_experts_fp8(x, gate_up, down, ids, topk_weights, *biases, *options, *saved)
    needs = [True] * 4 + [biased] * 2
    fused_experts_fp8_backward(
        y, x, gate_up, down, topk_weights, h, *order, *biases, *options, needs
    )


def _main_grads(tokens: int, dtype: torch.dtype) -> None:
    from moe_kernels.triton.fused_experts import fused_experts_wgrad_

    x, dh = torch.empty(tokens, H, dtype=dtype), torch.empty(tokens * K, 2 * INNER, dtype=dtype)
    slots = torch.empty(tokens * K, dtype=torch.int32)
    order = (slots, slots.view(tokens, K), torch.empty(E + 1, dtype=torch.int32))
    fused_experts_wgrad_(torch.empty(E, H, 2 * INNER), x, dh, *order, True)
    fused_experts_wgrad_(torch.empty(E, 2 * INNER, H), dh, x, *order, False)


def _fused_experts_of(*counts: tuple[int, int, int]) -> None:
    """On each number of tokens, experts and choices, which give the same tiles."""
    for tokens, experts, top_k in counts:
        _fused_experts("swiglu", tokens=tokens, biased=True, experts=experts, top_k=top_k)


def _roles(parts: dict[str, int], archs: range, **cut: Any) -> None:
    """A part of each kernel where warps have roles, on the architectures that this is for."""
    from benchmarks.registry import Shape
    from benchmarks.tuning.problems import PROBLEMS, Layer
    from moe_kernels.triton._config_tables import Config
    from moe_kernels.triton._launch import TRITON_VERSION, architecture

    arch = architecture(torch.device("cpu"))
    by_triton = cut["warp_specialize"] == "triton"
    if arch not in archs or (by_triton and TRITON_VERSION < (3, 7)):
        return
    shape = Shape({"T": 512, "H": H, "I": INNER, "E": 2, "K": 1})
    layer = Layer(shape, BF16, torch.device("cpu"), filled=False)
    for kernel, part in parts.items():
        PROBLEMS[kernel][part].make(layer).run(Config(**cut))


def _gluon_up(
    block_n: int,
    activation: str = "swiglu",
    hidden: int = H,
    transposed: bool = True,
    interleaved: bool = False,
    biased: bool = False,
    **changes: int,
) -> None:
    """The up-projection in Gluon, of other layers than :func:`_roles` has."""
    from moe_kernels.triton._activation import Activation
    from moe_kernels.triton._config_tables import Config
    from moe_kernels.triton._launch import architecture
    from moe_kernels.triton._tiles import build_tile_map
    from moe_kernels.triton.fused_experts import _project_up

    if architecture(torch.device("cpu")) not in HOPPER:
        return
    act = Activation(activation, interleaved, 1.702, 7.0)
    width, order = INNER * (2 if act.gated else 1), _order()
    w = torch.empty(E, width, hidden, dtype=BF16).mT if transposed else None
    w = torch.empty(E, hidden, width, dtype=BF16) if w is None else w
    bias = torch.empty(E, width, dtype=BF16) if biased else None
    h, a = torch.empty(T * K, width, dtype=BF16), torch.empty(T * K, INNER, dtype=BF16)
    cut = Config(**GLUON | changes, block_n=block_n)
    tiles = build_tile_map(order[2], T * K, cut.block_m)
    _project_up(torch.empty(T, hidden, dtype=BF16), w, bias, order, h, a, act, tiles, cut)


def _gluon_down(
    block_n: int,
    activation: str = "swiglu",
    transposed: bool = False,
    interleaved: bool = False,
    limit: float = math.inf,
    gathered: bool = False,
    **changes: Any,
) -> None:
    """Backward through the down-projection in Gluon, of rows that are contiguous or gathered."""
    from moe_kernels.triton._activation import Activation
    from moe_kernels.triton._config_tables import Config
    from moe_kernels.triton._fused_experts_backward import _through_down
    from moe_kernels.triton._launch import architecture
    from moe_kernels.triton._operands import Source
    from moe_kernels.triton._tiles import build_tile_map

    if architecture(torch.device("cpu")) not in HOPPER:
        return
    act = Activation(activation, interleaved, 1.702, limit)
    h = torch.empty(T, INNER * (2 if act.gated else 1), dtype=BF16)
    down = torch.empty(E, INNER, H, dtype=BF16) if transposed else None
    down = torch.empty(E, H, INNER, dtype=BF16).mT if down is None else down
    if gathered:
        changes["warp_specialize"] = "gluon_gather"
    cut = Config(**GLUON | changes, block_n=block_n)
    source = Source(torch.empty(T, dtype=torch.int32), K) if gathered else None
    _through_down(
        torch.empty(T, H, dtype=BF16), source, down, h, torch.empty(T), act, range(INNER),
        torch.empty_like(h), torch.empty(T, INNER, dtype=BF16), torch.empty(INNER // 64, T),
        build_tile_map(torch.empty(E + 1, dtype=torch.int32), T, cut.block_m), cut,
    )  # fmt: skip


def _gluon_wgrad(
    block_n: int, gathered: bool = False, accumulate: bool = False, **changes: int
) -> None:
    """The weight gradient in Gluon, of other operands and results than :func:`_roles` has."""
    from moe_kernels.triton._config_tables import Config
    from moe_kernels.triton._launch import architecture
    from moe_kernels.triton._wgrad import gathered_weight_gradient, weight_gradient

    if architecture(torch.device("cpu")) not in HOPPER:
        return
    order, cut = _order(), Config(**GLUON | changes, block_n=block_n)
    dh = torch.empty(T * K, 2 * INNER, dtype=BF16)
    dtype = torch.float32 if accumulate else BF16
    out, x = torch.empty(E, H, 2 * INNER, dtype=dtype), torch.empty(T * K, H, dtype=BF16)
    if gathered:
        x, options = x[:T], {"accumulate": accumulate, "cut": cut}
        gathered_weight_gradient(x, dh, order, T * K, out, **options)
    else:
        weight_gradient(x, None, dh, None, order[2], T * K, out, accumulate=accumulate, cut=cut)


def _with_tf32(call: Callable[[], None]) -> None:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        call()
    finally:
        matmul.fp32_precision = before


# compiled in every run of the suite
CASES: dict[str, Callable[[], None]] = {
    "sort_small": partial(_sort, 64),
    "sort": partial(_sort, T),
    "sort_and_map_small": partial(_sort_and_map, 64),
    "sort_and_map": partial(_sort_and_map, T),
    "router_of_one_program": partial(_router, tokens=8),
    "permute": partial(_permute, BF16),
    "chunk_permute": _chunk_permute,
    "router": _router,
    "router_of_the_target": partial(_router, BF16, 256, 32768, return_scores=False),
    "router_groups": partial(
        _router,
        score_func="sigmoid",
        correction_bias=torch.empty(E),
        num_groups=8,
        topk_groups=4,
        token_mask=torch.empty(T, dtype=torch.bool),
    ),
    "router_candidates": partial(
        _router, softmax_before_topk=False, candidates=8, return_scores=False
    ),
    "round": partial(_round, "nearest", masked=True),
    "activation": partial(_activation, "swiglu", BF16),
    "gemm_many": partial(_grouped_gemm, T * K, BF16, False),
    "gemm_roles": partial(_roles, {"grouped_gemm": 0}, HOPPER, **ROLES, block_n=256),
    "gluon_turns_roles": partial(_roles, {"grouped_gemm": 0}, HOPPER, **GLUON, block_n=128),
    "gluon_shared_roles": partial(_roles, {"grouped_gemm": 1}, HOPPER, **GLUON, block_n=256),
    "gluon_up_turns_roles": partial(_roles, {"up": 0}, HOPPER, **GLUON, block_n=64),
    "gluon_down_turns_roles": partial(_gluon_down, 128),
    "gluon_down_turns_gathered_roles": partial(_gluon_down, 128, gathered=True, limit=7.0),
    "gluon_wgrad_shared_roles": partial(_roles, {"wgrad": 0}, HOPPER, **GLUON, block_n=256),
    "gluon_wgrad_copied_roles": partial(_gluon_wgrad, 256),
    **SCALED,
    "quantize": partial(_quantize, BF16),
    "scaled_many": partial(_scaled_gemm, T * K),
    "experts": partial(_fused_experts, "swiglu"),
    "experts_interleaved": partial(
        _fused_experts, "swigluoai", transposed=False, interleaved=True, biased=True
    ),
    "experts_fp8": _fused_experts_fp8,
    "main_grads": partial(_main_grads, T, BF16),
    "experts_few": partial(_fused_experts, "swiglu", tokens=8),
    "experts_full": partial(_fused_experts, "swiglu", torch.float32),
    "counts": partial(_fused_experts_of, (16, 9, 1)),
    "other_counts": partial(_fused_experts_of, (8, 16, 2), (1, 10, 16)),
    # whose slots are no multiple of 16
    "other_counts_fp8": partial(_fused_experts_fp8, tokens=T + 1),
    "other_counts_quantized": partial(_quantize, BF16, tokens=T + 1),
}
# the other configurations and layouts
MORE_CASES: dict[str, Callable[[], None]] = {
    "sort_many_experts": partial(_sort, T, 2000),
    "router_many_experts": partial(_router, experts=512),
    "round_up": partial(_round, "up", BF16),
    "round_double": partial(_round, "down", torch.float64),
    "activation_oai": partial(_activation, "swigluoai", torch.float32),
    "activation_double": partial(_activation, "geglu", torch.float64),
    "permute_double": partial(_permute, torch.float64),
    "router_double": partial(_router, dtype=torch.float64),
    "gemm_many_transposed": partial(_grouped_gemm, T * K, BF16, True, biased=True),
    "gemm_some": partial(_grouped_gemm, 32 * E, torch.float16, True),
    "gemm_few": partial(_grouped_gemm, 64, BF16, True),
    "gemm_full": partial(_grouped_gemm, T * K, torch.float32, True),
    "gemm_tf32": partial(_with_tf32, partial(_grouped_gemm, T * K, torch.float32, True)),
    "gemm_unaligned": partial(_grouped_gemm, T * K, BF16, False, hidden=H + 1),
    "quantize_wide": partial(_quantize, torch.float32, block=64),
    "quantize_odd": partial(_quantize, torch.float16, hidden=H + 1),
    "scaled_many_biased": partial(_scaled_gemm, T * K, torch.float32, biased=True),
    "scaled_some": partial(_scaled_gemm, 32 * E, torch.float16),
    "scaled_few": partial(_scaled_gemm, 64),
    "scaled_unaligned": partial(_scaled_gemm, T * K, hidden=H + 1),
    "scaled_n_contiguous": partial(_scaled_gemm, T * K, transposed=False),
    "experts_biased": partial(_fused_experts, "swigluoai", biased=True),
    "experts_fp8_oai": partial(
        _fused_experts_fp8, "swigluoai", interleaved=True, biased=True, tokens=512
    ),
    "experts_fp8_half": partial(_fused_experts_fp8, "geglu", torch.float16, inner=INNER + 16),
    "experts_fp8_few": partial(_fused_experts_fp8, "swigluoai", tokens=8, interleaved=True),
    "experts_fp8_ungated": partial(_fused_experts_fp8, "relu2", biased=True),
    "experts_fp8_full": partial(_fused_experts_fp8, "swiglu", torch.float32),
    "main_grads_few": partial(_main_grads, 8, BF16),
    "main_grads_full": partial(_main_grads, T, torch.float32),
    "experts_plain": partial(_fused_experts, "geglu", torch.float16, transposed=False),
    "experts_ungated": partial(_fused_experts, "relu2", biased=True),
    "experts_some": partial(_fused_experts, "swiglu", tokens=512),
    "experts_tf32": partial(_with_tf32, partial(_fused_experts, "swiglu", torch.float32)),
    "experts_full_interleaved": partial(
        _fused_experts, "swigluoai", torch.float32, transposed=False, interleaved=True, biased=True
    ),
    "gemm_dx_roles": partial(_roles, {"grouped_gemm": 1}, range(90, 110), **ROLES, block_n=128),
    "gluon_turns_dx_roles": partial(_roles, {"grouped_gemm": 1}, HOPPER, **GLUON, block_n=128),
    "gluon_shared_down_roles": partial(_roles, {"grouped_gemm": 0}, HOPPER, **GLUON, block_n=256),
    # of 64 or 256 rows, and of so many slots
    "gluon_turns_64_5_roles": partial(
        _roles, {"grouped_gemm": 0}, HOPPER, **GLUON | {"block_m": 64, "stages": 5}, block_n=256
    ),
    "gluon_shared_256_3_roles": partial(
        _roles, {"grouped_gemm": 1}, HOPPER, **GLUON | {"block_m": 256, "stages": 3}, block_n=128
    ),
    "gluon_up_turns_64_5_roles": partial(
        _roles, {"up": 0}, HOPPER, **GLUON | {"block_m": 64, "stages": 5}, block_n=128
    ),
    "gluon_turns_biased_roles": partial(gluon_biased, 128),
    "gluon_shared_biased_roles": partial(gluon_biased, 256),
    # a clamp takes the most registers
    "gluon_up_shared_roles": partial(_gluon_up, 128, biased=True),
    "gluon_up_turns_64_5_biased_roles": partial(_gluon_up, 128, biased=True, block_m=64, stages=5),
    "gluon_up_shared_geglu_roles": partial(_gluon_up, 128, "geglu", biased=True),
    "gluon_up_turns_rows_roles": partial(_gluon_up, 64, "reglu", transposed=False, biased=True),
    "gluon_up_shared_oai_roles": partial(
        _gluon_up, 128, "swigluoai", transposed=False, interleaved=True, biased=True
    ),
    "gluon_up_turns_ungated_roles": partial(_gluon_up, 128, "silu", H - 8, biased=True),
    "gluon_down_turns_64_3_roles": partial(_gluon_down, 256, block_m=64, stages=3, limit=7.0),
    "gluon_down_shared_128_3_roles": partial(_gluon_down, 256, stages=3, limit=7.0),
    "gluon_down_shared_256_3_roles": partial(_gluon_down, 128, block_m=256, stages=3),
    "gluon_down_turns_columns_roles": partial(_gluon_down, 128, transposed=True, limit=7.0),
    "gluon_down_turns_oai_roles": partial(
        _gluon_down, 128, "swigluoai", interleaved=True, limit=7.0
    ),
    "gluon_down_turns_geglu_roles": partial(_gluon_down, 128, "geglu"),
    "gluon_down_turns_ungated_roles": partial(_gluon_down, 128, "gelu"),
    "gluon_down_turns_64_3_gathered_roles": partial(
        _gluon_down, 256, gathered=True, block_m=64, stages=3
    ),
    "gluon_down_shared_128_3_gathered_roles": partial(_gluon_down, 256, gathered=True, stages=3),
    "gluon_down_turns_gathered_columns_roles": partial(
        _gluon_down, 128, "geglu", transposed=True, gathered=True
    ),
    "gluon_down_turns_gathered_ungated_roles": partial(_gluon_down, 128, "gelu", gathered=True),
    "gluon_wgrad_turns_128_6_roles": partial(
        _roles, {"wgrad": 1}, HOPPER, **GLUON | {"stages": 6}, block_n=128
    ),
    "gluon_wgrad_turns_gathered_roles": partial(_gluon_wgrad, 128, True),
    "gluon_wgrad_turns_64_4_roles": partial(_gluon_wgrad, 256, True, block_m=64),
    "gluon_wgrad_shared_256_4_roles": partial(_gluon_wgrad, 128, True, block_m=256),
    "gluon_wgrad_shared_sums_roles": partial(_gluon_wgrad, 256, True, True),
    "gluon_wgrad_shared_256_3_sums_roles": partial(
        _gluon_wgrad, 128, False, True, block_m=256, stages=3
    ),
    "gluon_wgrad_turns_sums_roles": partial(_gluon_wgrad, 128, True, True),
    **MORE_SCALED,
    "experts_roles": partial(
        _roles, {"up": 0, "down_backward": 0}, range(100, 110), **ROLES, block_n=64
    ),
    "experts_unaligned": partial(_fused_experts, "swiglu", hidden=H + 1),
}
