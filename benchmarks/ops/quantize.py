"""float8 values with scales of blocks of 128: T tokens, H hidden, E experts, K a token, N columns.

The error of values is that of rounding to float8, for every provider alike.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.accuracy import FLOAT8_ROUNDING
from benchmarks.ops._order import INPUT_SETS, ROW_DEFAULTS, make_orders, row_sets
from benchmarks.ops._shapes import LAYERS
from benchmarks.registry import FORWARD_ONLY, Case, Cost, Op, Shape, Truth

BLOCK = 128
LARGEST = 448.0  # of float8_e4m3fn


def blocks_of(size: int) -> int:
    return -(-size // BLOCK)


def _rows_case(
    shape: Shape, dtype: torch.dtype, device: torch.device, routing: str, seed: int
) -> Case:
    generator = torch.Generator(device).manual_seed(seed)
    inputs = []
    for _ in range(INPUT_SETS):
        x = torch.empty(shape["T"], shape["H"], dtype=dtype, device=device)
        inputs.append({"x": x.normal_(generator=generator)})
    return Case(shape, dtype, device, inputs)


def _permute_case(
    shape: Shape, dtype: torch.dtype, device: torch.device, routing: str, seed: int
) -> Case:
    rows = _rows_case(shape, dtype, device, routing, seed)
    orders = make_orders(shape, device, routing, seed)
    inputs = [{**x, **order} for x, order in zip(rows.inputs, orders, strict=True)]
    return Case(shape, dtype, device, inputs)


def _weights_case(
    shape: Shape, dtype: torch.dtype, device: torch.device, routing: str, seed: int
) -> Case:
    generator = torch.Generator(device).manual_seed(seed)
    w = torch.empty(*(shape[letter] for letter in "ENH"), dtype=dtype, device=device)
    return Case(shape, dtype, device, [{}], {"w": w.normal_(generator=generator)})


def _bytes(rows: int, columns: int, scales: int) -> float:
    return float(rows * columns + 4 * scales)


def _rows_cost(case: Case) -> Mapping[str, Cost]:
    T, H = case.shape["T"], case.shape["H"]
    return {"forward": Cost(0.0, T * H * case.dtype.itemsize + _bytes(T, H, T * blocks_of(H)))}


def _permute_cost(case: Case) -> Mapping[str, Cost]:
    """Each token is read once, however many rows it has."""
    T, H, K = (case.shape[letter] for letter in "THK")
    written = _bytes(T * K, H, T * K * blocks_of(H))
    return {"forward": Cost(0.0, T * H * case.dtype.itemsize + written)}


def _weights_cost(case: Case) -> Mapping[str, Cost]:
    E, N, H = (case.shape[letter] for letter in "ENH")
    written = _bytes(E * N, H, E * blocks_of(N) * blocks_of(H))
    return {"forward": Cost(0.0, E * N * H * case.dtype.itemsize + written)}


def _quantized(x: Tensor, rows: Tensor) -> Mapping[str, Truth]:
    """Of [rows, H], each block divided by its scale, unrounded."""
    wide = x.double()
    cells = torch.nn.functional.pad(wide, (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    scales = cells.abs().amax(2) / LARGEST
    values = (cells / scales[:, :, None]).flatten(1)[:, : x.shape[1]]
    return {"values": Truth(rows, values), "scales": Truth(rows, scales)}


def _rows_truth(case: Case, index: int, gradients: bool) -> Mapping[str, Truth]:
    rows = torch.arange(0, case.shape["T"], max(1, case.shape["T"] // 64), device=case.device)
    return _quantized(case.inputs[index]["x"][rows], rows)


def _permute_truth(case: Case, index: int, gradients: bool) -> Mapping[str, Truth]:
    inputs, top_k = case.inputs[index], case.shape["K"]
    count = case.shape["T"] * top_k
    rows = torch.arange(0, count, max(1, count // 64), device=case.device)
    return _quantized(inputs["x"][inputs["row_to_slot"][rows].long() // top_k], rows)


def _weights_truth(case: Case, index: int, gradients: bool) -> Mapping[str, Truth]:
    """Of the last expert."""
    w = case.weights["w"][-1].double()  # [N, H]
    N, H = w.shape
    padded = torch.nn.functional.pad(w, (0, -H % BLOCK, 0, -N % BLOCK))
    cells = padded.view(blocks_of(N), BLOCK, blocks_of(H), BLOCK)
    scales = cells.abs().amax((1, 3)) / LARGEST
    values = (cells / scales[:, None, :, None]).reshape(padded.shape)[:N, :H]
    last = torch.tensor([case.shape["E"] - 1], device=case.device)
    return {"values": Truth(last, values.T[None]), "scales": Truth(last, scales.T[None])}


def _weight_shapes(name: str) -> list[Shape]:
    hidden, inner, experts, _ = LAYERS[name]
    return [
        Shape({"E": experts, "H": h, "N": n}) for h, n in ((hidden, 2 * inner), (inner, hidden))
    ]


quantize_rows = Op(
    name="quantize_rows",
    outputs=("values", "scales"),
    shape_sets=row_sets(),
    defaults=ROW_DEFAULTS,
    make_case=_rows_case,
    cost=_rows_cost,
    routed=False,
    truth=_rows_truth,
    directions=FORWARD_ONLY,
    bound=FLOAT8_ROUNDING,
)
permute_quantize = Op(
    name="permute_quantize",
    outputs=("values", "scales"),
    shape_sets=row_sets(),
    defaults=ROW_DEFAULTS,
    make_case=_permute_case,
    cost=_permute_cost,
    truth=_permute_truth,
    directions=FORWARD_ONLY,
    bound=FLOAT8_ROUNDING,
)
quantize_weights = Op(
    name="quantize_weights",
    outputs=("values", "scales"),
    shape_sets={"cpu": _weight_shapes("qwen3-30b-a3b")[1:]}
    | {name: _weight_shapes(name) for name in LAYERS},
    defaults={"cpu": ("cpu",), "cuda": ("qwen3-30b-a3b",)},
    make_case=_weights_case,
    cost=_weights_cost,
    routed=False,
    truth=_weights_truth,
    directions=FORWARD_ONLY,
    bound=FLOAT8_ROUNDING,
)
