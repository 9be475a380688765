"""One GEMM kernel on the rows of a layer: run with any tile shape, and checked.

T tokens, K experts a token, R = T * K rows, H hidden size, I intermediate size, E experts.
Weights are in checkpoint layout, as benchmarks have them: gate_up [E, 2I, H], down [E, H, I].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from benchmarks.registry import Shape
from benchmarks.routing import make_topk_ids
from moe_kernels import reference
from moe_kernels.triton import fused_experts_fp8 as float8
from moe_kernels.triton._activation import Activation
from moe_kernels.triton._config_tables import (
    Bucket,
    Config,
    inner_class,
    precision_class,
    rows_class,
)
from moe_kernels.triton._fused_experts_backward import _through_down
from moe_kernels.triton._launch import ceil_div, on_device_of
from moe_kernels.triton._operands import Source, gathers_grad, has_hopper_down_backward
from moe_kernels.triton._tiles import TileMap, build_tile_map
from moe_kernels.triton._wgrad import gathered_weight_gradient, rows_to_add, weight_gradient
from moe_kernels.triton.fused_experts import _project_up
from moe_kernels.triton.grouped_gemm import multiply_rows
from moe_kernels.triton.permute import gathered_rows
from moe_kernels.triton.quantize import Scaled, quantize_rows
from moe_kernels.triton.scaled_grouped_gemm import BLOCK, multiply_scaled_rows

SMALLEST_BLOCK = 16
SAMPLES = 16  # rows that are compared with float64
# Relative Frobenius error of the sample, and of all against the default's: sums differ in order,
# after which some values are rounded to the next of float8, a sixteenth or an eighth away
TOLERANCE = {"half": 6e-3, "full": 1e-4, "fp8": 1.5e-2}


@dataclass(frozen=True)
class Problem:
    """A kernel's call.

    Attributes:
        name: what it computes; several problems may be of one kernel.
        bucket: of the table.
        contracted, columns: as :func:`benchmarks.tuning.candidates.candidates` wants them.
        run: writes the outputs with a configuration; it is what is timed.
        finish: afterwards, before results are compared.
        outputs: what is written.
        truth: for some rows of dim 0 of each output (in order) the right values, float64.
        flops: of the call.
    """

    name: str
    bucket: Bucket
    rows: int
    experts: int
    contracted: int
    columns: int
    run: Callable[[Config], None]
    finish: Callable[[Config], None]
    outputs: tuple[Tensor, ...]
    truth: Callable[[], list[tuple[Tensor, Tensor]]]
    flops: float

    def wrong(self, config: Config, default: list[Tensor] | None = None) -> str:
        """Why the results of ``config`` are not right, or "". Outputs hold NaN before the call."""
        for output in self.outputs:
            output.fill_(torch.nan)
        self.run(config)
        self.finish(config)
        limit = TOLERANCE[self.bucket.precision]
        for output, (rows, right) in zip(self.outputs, self.truth(), strict=True):
            error = _distance(output[rows].double(), right)
            if not error <= limit:
                return f"error against float64 {error:.1e} is above {limit:.0e}"
        for output, first in zip(self.outputs, default or (), strict=False):
            error = _distance(output, first)
            if not error <= limit:
                return f"differs from the default by {error:.1e}, above {limit:.0e}"
        return ""

    def results(self) -> list[Tensor]:
        return [output.clone() for output in self.outputs]


def _distance(found: Tensor, right: Tensor) -> float:
    wide = torch.promote_types(found.dtype, torch.float32)
    size = torch.linalg.vector_norm(right, dtype=wide)
    return float(torch.linalg.vector_norm(found.to(wide) - right.to(wide)) / size.clamp(min=1e-30))


class Layer:
    """The tensors of one layer; problems of it share them.

    Args:
        tuned: configurations in place of the device's, of other kernels that a problem runs too.
        filled: whether they hold data; without, kernels can be compiled only.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        routing: str = "uniform",
        seed: int = 0,
        *,
        tuned: Mapping[Bucket, Config] = MappingProxyType({}),
        filled: bool = True,
    ) -> None:
        T, H, I, E, K = (shape[letter] for letter in "THIEK")  # noqa: E741
        self.shape, self.dtype, self.device, self.tuned = shape, dtype, device, tuned
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            values = torch.empty(size, dtype=dtype, device=device)
            return values.normal_(std=scale, generator=generator) if filled else values

        self.x, self.grad = normal(T, H), normal(T, H)
        self.gate_up = normal(E, 2 * I, H, scale=H**-0.5)
        self.down = normal(E, H, I, scale=I**-0.5)
        self.h, self.a = normal(T * K, 2 * I), normal(T * K, I)
        ids = make_topk_ids(T, E, K, routing, torch.Generator().manual_seed(seed))
        order = [value.to(device) for value in reference.sort_by_expert(ids, E)]
        self.order: tuple[Tensor, Tensor, Tensor] = (order[0], order[1], order[2])
        self.row_weights = torch.rand(T * K, device=device) + 0.1
        self.rows, self.activation = T * K, Activation("swiglu", False, 1.0, float("inf"))
        self._maps: dict[int, TileMap] = {}

    def tiles(self, block_m: int) -> TileMap:
        if block_m not in self._maps:
            with on_device_of(self.x):
                self._maps[block_m] = build_tile_map(self.order[2], self.rows, block_m)
        return self._maps[block_m]

    def empty(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(size, dtype=dtype or self.dtype, device=self.device)

    def sample(self) -> Tensor:
        """Rows of many experts, the first and the last among them."""
        count = min(SAMPLES, self.rows)
        return torch.linspace(0, self.rows - 1, count, device=self.device).round().long().unique()

    def expert_of(self, rows: Tensor) -> Tensor:
        return torch.searchsorted(self.order[2][1:].contiguous(), rows.int(), right=True)

    def token_of(self, rows: Tensor) -> Tensor:
        return self.order[0][rows].long() // self.shape["K"]

    def grad_of(self, rows: Tensor) -> Tensor:
        return self.grad[self.token_of(rows)].double()

    def sums_of_products(
        self, left: Callable[[Tensor], Tensor], right: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """A few experts, and for each the sum of outer products of its rows, float64."""
        experts = self.expert_of(self.sample()).unique()[:2]
        sums = []
        for expert in experts.tolist():
            first, end = self.order[2][expert : expert + 2].tolist()
            rows = torch.arange(first, end, device=self.device)
            sums.append(left(rows).T @ right(rows))
        return experts, torch.stack(sums)

    def bucket(self, kernel: str, inner: int) -> Bucket:
        rows = rows_class(self.rows, self.shape["E"])
        precision = precision_class(operand_dtype(kernel, self.dtype))
        return Bucket(kernel, precision, rows, inner_class(inner))

    def problem(
        self,
        kernel: str,
        part: str,
        contracted: int,
        columns: int,
        run: Callable[[Config], None],
        outputs: tuple[Tensor, ...],
        truth: Callable[[], list[tuple[Tensor, Tensor]]],
        flops: float,
        finish: Callable[[Config], None] = lambda cut: None,
    ) -> Problem:
        def on_device(config: Config) -> None:
            with on_device_of(self.x):
                run(config)

        return Problem(
            f"{kernel} {part}", self.bucket(kernel, min(contracted, columns)), self.rows,
            self.shape["E"], contracted, columns, on_device, finish, outputs, truth, flops,
        )  # fmt: skip


def _product(layer: Layer, part: str, a: Tensor, b: Tensor) -> Problem:
    """``a [R, Kd]`` times ``b [E, Kd, N]``."""
    Kd, N = b.shape[1:]
    out = layer.empty(layer.rows, N)

    def run(cut: Config) -> None:
        multiply_rows(a, b, None, out, layer.tiles(cut.block_m), cut)

    def truth() -> list[tuple[Tensor, Tensor]]:
        rows = layer.sample()
        weights = b[layer.expert_of(rows)].double()
        return [(rows, torch.bmm(a[rows].double()[:, None], weights)[:, 0])]

    flops = 2.0 * layer.rows * Kd * N
    return layer.problem("grouped_gemm", part, Kd, N, run, (out,), truth, flops)


def _down(layer: Layer) -> Problem:
    return _product(layer, "down", layer.a, layer.down.mT)


def _dx(layer: Layer) -> Problem:
    return _product(layer, "dx", layer.h, layer.gate_up)


def _up(layer: Layer) -> Problem:
    H, I = layer.shape["H"], layer.shape["I"]  # noqa: E741
    # a few rows are inference, which keeps no h
    saves = layer.rows > 16 * layer.shape["E"]
    h, a = layer.empty(layer.rows if saves else 0, 2 * I), layer.empty(layer.rows, I)

    def run(cut: Config) -> None:
        _project_up(
            layer.x, layer.gate_up.mT, None, layer.order, h, a, layer.activation,
            layer.tiles(cut.block_m), cut,
        )  # fmt: skip

    def truth() -> list[tuple[Tensor, Tensor]]:
        rows = layer.sample()
        weights = layer.gate_up[layer.expert_of(rows)].double()
        right = torch.bmm(weights, layer.x[layer.token_of(rows)].double()[..., None])[..., 0]
        activated = reference.expert_activation(right, "swiglu", None, False, 1.0, float("inf"))
        return ([(rows, right)] if saves else []) + [(rows, activated)]

    outputs = (h, a) if saves else (a,)
    return layer.problem("up", "up", H, I, run, outputs, truth, 4.0 * layer.rows * H * I)


def _down_backward(layer: Layer) -> Problem:
    H, I = layer.shape["H"], layer.shape["I"]  # noqa: E741
    down = layer.down.mT
    dh, weighted = layer.empty(layer.rows, 2 * I), layer.empty(layer.rows, I)
    parts = layer.empty(ceil_div(I, SMALLEST_BLOCK), layer.rows, dtype=torch.float32)
    ds = layer.empty(layer.rows, dtype=torch.float32)
    ddown = layer.empty(layer.shape["E"], H, I).mT

    def run(cut: Config) -> None:
        # The copy of rows that some kernels need, and others do without, is a part of their time;
        # and the weight gradient, which reads that copy or has to gather as well.
        in_gluon = has_hopper_down_backward(cut, layer.grad, down, layer.h)
        rows, order, act = layer.grad, layer.order, layer.activation
        by = layer.tuned.get(layer.bucket("wgrad", min(H, I)))
        source: Source | None = Source(order[0], layer.shape["K"])
        gathers = in_gluon and gathers_grad(cut, rows, act.interleaved, act.limit)
        if not gathers:
            rows, source = gathered_rows(rows, order, layer.rows, by_tma=in_gluon)
        _through_down(
            rows, source, down, layer.h, layer.row_weights, act, range(I), dh, weighted, parts,
            layer.tiles(cut.block_m), cut,
        )  # fmt: skip
        if gathers:
            rows, source = rows_to_add(rows, weighted, order, layer.rows, ddown.mT, cut=by)
        weight_gradient(weighted, None, rows, source, order[2], layer.rows, ddown, cut=by)

    def finish(cut: Config) -> None:
        torch.sum(parts[: ceil_div(I, cut.block_n)], 0, out=ds)

    def activated(h: Tensor) -> Tensor:
        return reference.expert_activation(h, "swiglu", None, False, 1.0, float("inf"))

    def weighted_a(rows: Tensor) -> Tensor:
        return activated(layer.h[rows].double()) * layer.row_weights[rows].double()[:, None]

    def truth() -> list[tuple[Tensor, Tensor]]:
        sample = layer.sample()
        weights = layer.down[layer.expert_of(sample)].double()
        grad = torch.bmm(layer.grad_of(sample)[:, None], weights)[:, 0]
        scale = layer.row_weights[sample].double()[:, None]
        h = layer.h[sample].double().requires_grad_()
        with torch.enable_grad():
            a = activated(h)
            (right,) = torch.autograd.grad(a, h, grad * scale)
        a = a.detach()
        return [
            (sample, right),
            (sample, a * scale),
            (sample, (grad * a).sum(1)),
            layer.sums_of_products(weighted_a, layer.grad_of),
        ]

    outputs, flops = (dh, weighted, ds, ddown), 4.0 * layer.rows * H * I
    return layer.problem("down_backward", "down", H, I, run, outputs, truth, flops, finish)


def _weight_gradient(layer: Layer, part: str, a: Tensor, grad: Tensor, gather_a: bool) -> Problem:
    """Of gathered rows of ``a``, or of ``grad``, as the layer has them.

    Those of the layer's gradient it gathers before the backward through the down-projection, if it
    does; those of x it leaves to this kernel, or gathers for it, which counts.
    """
    M, N = a.shape[1], grad.shape[1]
    out = layer.empty(layer.shape["E"], N, M).mT  # stored as the weight is
    right, source = grad, None
    if not gather_a:
        right, source = gathered_rows(grad, layer.order, layer.rows)

    def run(cut: Config) -> None:
        if gather_a:
            gathered_weight_gradient(a, grad, layer.order, layer.rows, out, cut=cut)
        else:
            weight_gradient(a, None, right, source, layer.order[2], layer.rows, out, cut=cut)

    def truth() -> list[tuple[Tensor, Tensor]]:
        return [
            layer.sums_of_products(
                lambda rows: a[layer.token_of(rows) if gather_a else rows].double(),
                lambda rows: grad[rows if gather_a else layer.token_of(rows)].double(),
            )
        ]

    flops = 2.0 * layer.rows * M * N
    # what is stored by columns is written as the transposed product
    return layer.problem("wgrad", part, N, M, run, (out,), truth, flops)


def _rounded(rows: Tensor) -> Scaled:
    return quantize_rows(rows, float8.FLOAT8, BLOCK.value, False)


def _scaled_rows(rows: Tensor, layer: Layer, a: Scaled, b: Scaled) -> Tensor:
    """Those rows of the product of what operands were rounded to, float64."""
    experts = layer.expert_of(rows)
    left = reference.dequantize_rows(a[0][rows], a[1][rows], torch.float64)
    weights = reference.dequantize_weights(b[0][experts], b[1][experts], torch.float64)
    return torch.bmm(left[:, None], weights)[:, 0]


def _scaled_product(layer: Layer, part: str, a: Scaled, weight: Tensor) -> Problem:
    """``a [R, Kd]`` times ``weight [E, Kd, N]``, which is rounded before."""
    b = float8._float8(weight, None)
    Kd, N = weight.shape[1:]
    out = layer.empty(layer.rows, N)

    def run(cut: Config) -> None:
        multiply_scaled_rows(a, b, None, out, layer.tiles(cut.block_m), cut)

    def truth() -> list[tuple[Tensor, Tensor]]:
        rows = layer.sample()
        return [(rows, _scaled_rows(rows, layer, a, b))]

    flops = 2.0 * layer.rows * Kd * N
    return layer.problem("scaled_grouped_gemm", part, Kd, N, run, (out,), truth, flops)


def _scaled_up(layer: Layer) -> Problem:
    """Up to the activation in float8: in one kernel, or in two where a tile has too few columns."""
    saves, I = layer.rows > 16 * layer.shape["E"], layer.shape["I"]  # as _up does  # noqa: E741
    x = float8._gather(layer.x, layer.order, layer.rows)
    w = float8._float8(layer.gate_up.mT, None)
    H, W = w[0].shape[1:]
    h = layer.empty(layer.rows if saves else 0, W)
    wide = layer.empty(layer.rows, I, dtype=torch.float32)
    a = float8._empty_scaled(h, layer.rows, I)

    def forget() -> None:
        for part in a:
            part.fill_(torch.nan)

    def run(cut: Config) -> None:
        tiles = layer.tiles(cut.block_m)
        float8._project_up(x, w, None, layer.order[2], h, a, layer.activation, tiles, cut)

    def finish(cut: Config) -> None:
        wide.copy_(reference.dequantize_rows(*a))
        forget()  # so that the next run has to write all of it

    def truth() -> list[tuple[Tensor, Tensor]]:
        rows = layer.sample()
        right = _scaled_rows(rows, layer, x, w)
        # the layer's dtype comes before float8
        own = right.to(layer.dtype).double()
        activated = reference.expert_activation(own, "swiglu", None, False, 1.0, float("inf"))
        pair = reference.quantize_rows(activated.to(layer.dtype))
        rounded = reference.dequantize_rows(*pair, torch.float64)
        return ([(rows, right)] if saves else []) + [(rows, rounded)]

    forget()
    outputs, flops = (h, wide) if saves else (wide,), 4.0 * layer.rows * H * I
    return layer.problem("scaled_grouped_gemm", "up", H, W, run, outputs, truth, flops, finish)


@dataclass(frozen=True)
class Part:
    """A product that a kernel computes in a layer.

    Attributes:
        sides: its contracted size and its columns; see :class:`Problem`.
    """

    sides: Callable[[Shape], tuple[int, int]]
    make: Callable[[Layer], Problem]


PROBLEMS: Mapping[str, tuple[Part, ...]] = {
    "up": (Part(lambda s: (s["H"], s["I"]), _up),),
    "grouped_gemm": (
        Part(lambda s: (s["I"], s["H"]), _down),
        Part(lambda s: (2 * s["I"], s["H"]), _dx),
    ),
    "down_backward": (Part(lambda s: (s["H"], s["I"]), _down_backward),),
    "wgrad": (
        Part(
            lambda s: (2 * s["I"], s["H"]),
            lambda layer: _weight_gradient(layer, "gate_up", layer.x, layer.h, True),
        ),
        Part(
            lambda s: (s["H"], s["I"]),
            lambda layer: _weight_gradient(layer, "down", layer.a, layer.grad, False),
        ),
    ),
    "scaled_grouped_gemm": (
        Part(lambda s: (s["H"], 2 * s["I"]), _scaled_up),
        Part(
            lambda s: (s["I"], s["H"]),
            lambda layer: _scaled_product(layer, "down", _rounded(layer.a), layer.down.mT),
        ),
        Part(
            lambda s: (s["H"], s["I"]),
            lambda layer: _scaled_product(
                layer, "da", float8._gather(layer.grad, layer.order, layer.rows), layer.down
            ),
        ),
        Part(
            lambda s: (2 * s["I"], s["H"]),
            lambda layer: _scaled_product(layer, "dx", _rounded(layer.h), layer.gate_up),
        ),
    ),
}


def operand_dtype(kernel: str, dtype: torch.dtype) -> torch.dtype:
    """What a kernel multiplies in a layer of a dtype."""
    return float8.FLOAT8 if kernel == "scaled_grouped_gemm" else dtype


def bucket_of(kernel: str, part: Part, shape: Shape, dtype: torch.dtype) -> Bucket:
    """The bucket of a problem, without making it."""
    rows = rows_class(shape["T"] * shape["K"], shape["E"])
    precision = precision_class(operand_dtype(kernel, dtype))
    return Bucket(kernel, precision, rows, inner_class(min(part.sides(shape))))
