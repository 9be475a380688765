"""The kernels of a layer, each alone and many times: do they always give the same bits?

    python -m tests.kernels.stress_hopper [--kernel up dx] [--even] [--wait-twice]

runs each under four conditions: alone; beside a stream that keeps the memory busy; beside processes
with long kernels, for which this one's are interrupted; and both. It tells how many runs differ
from the first, and of the first such run where, and what would explain it: a step of the product
that is missing or counted twice, or has rows or weights of another step, as of another use of its
slot. Products of torch
and plain kernels run for comparison: where theirs differ, too, it is not the kernels in Gluon.

R rows, E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import subprocess
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_kernels.triton._activation import Activation
from moe_kernels.triton._config_tables import Config
from moe_kernels.triton._fused_experts_backward import _through_down, prepare
from moe_kernels.triton._launch import ceil_div
from moe_kernels.triton._operands import Source
from moe_kernels.triton._wgrad import gathered_weight_gradient, weight_gradient
from moe_kernels.triton.fused_experts import _project_up
from moe_kernels.triton.fused_experts_fp8 import _project_up as project_up_float8
from moe_kernels.triton.grouped_gemm import multiply_rows
from moe_kernels.triton.permute import permute
from moe_kernels.triton.quantize import quantize_rows, quantize_weights
from moe_kernels.triton.scaled_grouped_gemm import multiply_scaled_rows
from moe_kernels.triton.sort_by_expert import sort_and_map
from moe_kernels.triton.unpermute import sum_slots

ROOT = Path(__file__).parents[2]
CONDITIONS = ("alone", "stream", "processes", "both")
BATCH = 20  # runs whose outputs are kept until they are compared
SAMPLES = 64  # differing elements that an explanation is sought for
GLUON = {
    "up": Config(128, 128, 64, warps=8, stages=4, group_m=16, warp_specialize="gluon"),
    "gemm": Config(128, 256, 64, warps=8, stages=4, warp_specialize="gluon"),
    "gemm_turns": Config(128, 128, 64, warps=8, stages=4, warp_specialize="gluon"),
    "down_backward": Config(128, 128, 64, warps=8, stages=4, warp_specialize="gluon"),
    "down_gathers": Config(128, 128, 64, warps=8, stages=4, warp_specialize="gluon_gather"),
    "wgrad": Config(256, 128, 64, warps=8, stages=4, warp_specialize="gluon"),
    "scaled": Config(128, 256, 128, warps=8, stages=3, warp_specialize="gluon"),
    "scaled_up": Config(128, 256, 128, warps=8, stages=3, warp_specialize="gluon_activate"),
}
PLAIN = {
    "up": Config(128, 128, 64, warps=8, stages=4),
    "gemm": Config(128, 256, 64, warps=8, stages=4),
    "down_backward": Config(128, 128, 64, warps=8, stages=4),
    "wgrad": Config(128, 256, 64, warps=8, stages=4),
    "scaled": Config(128, 128, 128, warps=8, stages=5),
}


@dataclass(frozen=True)
class Sizes:
    """``even``: all experts have as many rows, a multiple of a tile's: no tile is ragged."""

    tokens: int = 1111
    experts: int = 16
    top_k: int = 4
    hidden: int = 1024
    inner: int = 768
    even: bool = False


@dataclass(frozen=True)
class Product:
    """What an element of the first output is: ``rows[r] @ weight[expert of r]``, perhaps more."""

    rows: Tensor
    weight: Tensor
    cut: Config


@dataclass(frozen=True)
class Kernel:
    """``run`` writes outputs that ``make`` has allocated."""

    make: Callable[[], list[Tensor]]
    run: Callable[[list[Tensor]], object]
    product: Product | None = None


def explain(
    difference: float, slack: float, rows: Tensor, weight: Tensor, block_k: int, stages: int
) -> list[str]:
    """Which mistakes of which steps make an element differ so, but for ``slack``.

    Some do by chance, others in each element: only what explains many of a tile explains anything.

    Args:
        rows, weight: [Kd], of the element, in float64.
    """
    count = ceil_div(len(rows), block_k)
    whole = rows.new_zeros(2, count * block_k)
    whole[0, : len(rows)], whole[1, : len(rows)] = rows, weight
    x, w = whole.view(2, count, block_k)
    right = (x * w).sum(1)
    found = {"step {} is missing": (0, -right), "step {} counts twice": (0, right)}
    for shift in (-1, 1, -stages, stages):
        if abs(shift) < count:
            kept = slice(max(-shift, 0), count - max(shift, 0))
            other = slice(max(shift, 0), count + min(shift, 0))
            changes = {
                "weights": (x[kept] * w[other]).sum(1) - right[kept],
                "rows": (x[other] * w[kept]).sum(1) - right[kept],
                "all": right[other] - right[kept],
            }
            for what, values in changes.items():
                found[f"step {{}} has {what} of step {shift:+d}"] = kept.start, values
    return [
        name.format(start + int(i))
        for name, (start, values) in found.items()
        for i in ((values - difference).abs() <= slack).nonzero()
    ]


def _product_mistakes(
    found: Tensor, first: Tensor, where: Tensor, product: Product, offsets: Tensor
) -> str:
    """What explains most of the differing elements ``where [n, 2]``, of the largest differences."""
    places = where[:, 0], where[:, 1]
    values, right = found[places].double(), first[places].double()
    chosen = (values - right).abs().argsort(descending=True)[:SAMPLES].tolist()
    reasons: Counter[str] = Counter()
    for i in chosen:
        row, column = where[i].tolist()
        expert = int((offsets[1:] <= row).sum())
        size = float(values[i].abs() + right[i].abs())
        reasons.update(
            explain(
                float(values[i] - right[i]),
                size * torch.finfo(found.dtype).eps / 2,
                product.rows[row].double(),
                product.weight[expert, :, column].double(),
                product.cut.block_k,
                product.cut.stages,
            )
        )
    return f"of {len(chosen)} elements: " + (
        ", ".join(f"{name}: {count}" for name, count in reasons.most_common(3)) or "no mistake"
    )


def describe(found: Tensor, first: Tensor, offsets: Tensor, block_m: int = 128) -> str:
    """Where two outputs differ, in tiles of the experts' rows if they have rows, and how much."""
    wrong = found.flatten(0, -2) != first.flatten(0, -2) if found.dim() > 1 else found != first
    where = wrong.nonzero()
    parts = [f"{len(where)} elements"]
    if found.dim() == 2 and len(found) >= int(offsets[-1]):
        expert = (offsets[None, 1:] <= where[:, :1]).sum(1).clamp(max=len(offsets) - 2)
        within = where[:, 0] - offsets[expert]
        left = offsets[expert + 1] - offsets[expert] - within // block_m * block_m
        tiles = torch.stack([expert, within // block_m, left], 1).unique(dim=0)
        parts += [
            f"tiles (expert, number, rows left) {tiles[:6].tolist()} of {len(tiles)}",
            f"rows of a tile {int((within % block_m).min())} to {int((within % block_m).max())}",
        ]
    elif len(where):
        parts.append(f"first index {int(where[:, 0].min())} to {int(where[:, 0].max())}")
    if wrong.dim() == 2:
        parts.append(f"columns {int(where[:, 1].min())} to {int(where[:, 1].max())}")
    if found.dtype.is_floating_point:
        parts.append(f"largest difference {float((found.float() - first.float()).abs().max()):.3g}")
    return "; ".join(parts)


def _ids(sizes: Sizes, device: torch.device) -> Tensor:
    if sizes.even:
        slots = torch.arange(sizes.tokens * sizes.top_k, device=device) % sizes.experts
        return slots.view(sizes.tokens, sizes.top_k).int()
    scores = torch.rand(sizes.tokens, sizes.experts, device=device)
    return scores.topk(sizes.top_k).indices.int()


def kernels(
    sizes: Sizes, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> tuple[dict[str, Kernel], Tensor]:
    """Each with the inputs that a layer gives it; and where experts' rows end."""
    T, E, K, H, inner = dataclasses.astuple(sizes)[:5]
    R, W = T * K, 2 * inner
    activation = Activation("swiglu", False, 1.0, math.inf)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    def empty(*shapes: tuple[int, ...], dtype: torch.dtype = dtype) -> Callable[[], list[Tensor]]:
        return lambda: [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]

    x, upstream, ids = normal(T, H), normal(T, H), _ids(sizes, device)
    gate_up = normal(E, W, H, scale=H**-0.5).mT
    down = normal(E, H, inner, scale=inner**-0.5).mT
    up_bias, down_bias = normal(E, W), normal(E, H)
    topk_weights = torch.rand(T, K, device=device)
    block_m = GLUON["gemm"].block_m
    order, tiles = sort_and_map(ids, E, R, block_m)
    row_weights, _ = prepare(topk_weights, order, R, block_m)
    offsets = order[2].long()
    gathered = x[order[0].long() // K]
    grad_rows = permute(upstream, *order, R)
    found: dict[str, Kernel] = {}

    def sort(out: list[Tensor]) -> None:
        made, tile_map = sort_and_map(ids, E, R, block_m)
        for target, value in zip(out, (*made, tile_map.tiles[:1]), strict=True):
            target.copy_(value.flatten())

    found["sort"] = Kernel(empty((R,), (R,), (E + 1,), (1,), dtype=torch.int32), sort)
    found["prepare"] = Kernel(
        empty((R,), dtype=torch.float32),
        lambda out: out[0].copy_(prepare(topk_weights, order, R, block_m)[0]),
    )
    found["permute"] = Kernel(empty((R, H)), lambda out: out[0].copy_(permute(upstream, *order, R)))

    def project(cut: Config) -> Kernel:
        return Kernel(
            empty((R, W), (R, inner)),
            lambda out: _project_up(x, gate_up, up_bias, order, *out, activation, tiles, cut),
            Product(gathered, gate_up, cut),
        )

    found["up"] = project(GLUON["up"])
    h, a = found["up"].make()
    found["up"].run([h, a])

    def multiply(rows: Tensor, weight: Tensor, bias: Tensor | None, cut: Config) -> Kernel:
        return Kernel(
            empty((R, weight.shape[2])),
            lambda out: multiply_rows(rows, weight, bias, out[0], tiles, cut),
            Product(rows, weight, cut),
        )

    def through_down(cut: Config, gathers: bool = False) -> Kernel:
        parts = ceil_div(inner, cut.block_n)
        grad, source = (upstream, Source(order[0], K)) if gathers else (grad_rows, None)

        def run(out: list[Tensor]) -> None:
            _through_down(
                grad, source, down, h, row_weights, activation, range(inner), *out[:2],
                out[2].view(torch.float32), tiles, cut,
            )  # fmt: skip

        return Kernel(empty((R, W), (R, inner), (parts, 2 * R)), run)

    found["down_backward"] = through_down(GLUON["down_backward"])
    made = found["down_backward"].make()
    found["down_backward"].run(made)
    dh, weighted_a, _ = made
    found["down_backward, gathering"] = through_down(GLUON["down_gathers"], gathers=True)
    products: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {
        "down": (a, down, down_bias),
        "dx": (dh, gate_up.mT, None),
    }
    for name, product in products.items():
        found[name] = multiply(*product, GLUON["gemm"])
        found[f"{name} in turns"] = multiply(*product, GLUON["gemm_turns"])
    (rows,) = found["down"].make()
    found["down"].run([rows])
    found["unpermute"] = Kernel(
        empty((T, H)), lambda out: sum_slots(rows, *order, topk_weights, out[0])
    )

    def gradients(kind: str, cut: Config) -> None:
        found[f"wgrad of down{kind}"] = Kernel(
            empty((E, H, inner)),
            lambda out: weight_gradient(
                weighted_a, None, grad_rows, None, order[2], R, out[0].mT, cut=cut
            ),
        )
        found[f"wgrad of gate_up{kind}"] = Kernel(
            empty((E, W, H)),
            lambda out: gathered_weight_gradient(x, dh, order, R, out[0].mT, cut=cut),
        )

    gradients("", GLUON["wgrad"])
    found["wgrad of down, gathering"] = Kernel(
        empty((E, H, inner)),
        lambda out: gathered_weight_gradient(
            upstream, weighted_a, order, R, out[0], cut=GLUON["wgrad"]
        ),
    )
    float8 = quantize_rows(gathered, torch.float8_e4m3fn, 128, False)
    weights = quantize_weights(gate_up, torch.float8_e4m3fn, 128, False, True)

    def scaled(cut: Config) -> Kernel:
        return Kernel(
            empty((R, W)),
            lambda out: multiply_scaled_rows(float8, weights, None, out[0], tiles, cut),
        )

    def scaled_up(out: list[Tensor]) -> None:
        a = out[1].view(torch.float8_e4m3fn), out[2].t()
        cut = GLUON["scaled_up"]
        project_up_float8(float8, weights, None, order[2], out[0], a, activation, tiles, cut)

    found["scaled"] = scaled(GLUON["scaled"])
    found["scaled_up"] = Kernel(
        lambda: [
            *empty((R, W))(),
            torch.empty(R, inner, dtype=torch.uint8, device=device),
            torch.empty(ceil_div(inner, 128), R, device=device),
        ],
        scaled_up,
    )
    found["up, plain"] = project(PLAIN["up"])
    for name, product in products.items():
        found[f"{name}, plain"] = multiply(*product, PLAIN["gemm"])
    found["down_backward, plain"] = through_down(PLAIN["down_backward"])
    gradients(", plain", PLAIN["wgrad"])
    found["scaled, plain"] = scaled(PLAIN["scaled"])
    found["torch.mm"] = Kernel(empty((R, H)), lambda out: torch.mm(dh, gate_up[0].mT, out=out[0]))
    found["torch.bmm"] = Kernel(
        empty((E, T, W)),
        lambda out: torch.bmm(x.expand(E, T, H), gate_up, out=out[0]),
    )
    return found, offsets


def wait_twice() -> None:
    """Let kernels in Gluon that are not compiled yet wait at each barrier again when they have.

    If that changes anything, a wait has ended before its phase.
    """
    from triton.experimental import gluon
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier

    from moe_kernels.triton import (
        _hopper_down_backward,
        _hopper_gemm,
        _hopper_scaled,
        _hopper_up,
        _hopper_wgrad,
    )

    @gluon.jit
    def wait(barrier, phase, pred=True):  # type: ignore[no-untyped-def]
        mbarrier.wait(barrier, phase, pred)
        mbarrier.wait(barrier, phase, pred)

    changed = types.ModuleType("mbarrier")
    vars(changed).update({**vars(mbarrier), "wait": wait})
    modules = (_hopper_down_backward, _hopper_gemm, _hopper_scaled, _hopper_up, _hopper_wgrad)
    for module in modules:
        module.mbarrier = changed  # type: ignore[assignment]


def _bits(value: Tensor) -> Tensor:
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32}[value.element_size()]
    return value.view(integer)


def stress(kernel: Kernel, offsets: Tensor, runs: int, disturb: Callable[[], None]) -> list[str]:
    """Run it so often; what is known of the runs that differ from the first, if any do."""
    first = kernel.make()
    for out in first:
        _bits(out).fill_(-1)
    kernel.run(first)
    sets = [kernel.make() for _ in range(min(BATCH, runs))]
    differing, lines = 0, []
    for _ in range(ceil_div(runs, len(sets))):
        for outputs in sets:
            for out in outputs:
                _bits(out).fill_(-1)  # NaN, so that what is not written shows
        disturb()
        for outputs in sets:
            kernel.run(outputs)
        flags = torch.stack(
            [
                torch.stack([(_bits(a) != _bits(b)).any() for a, b in zip(s, first, strict=True)])
                for s in sets
            ]
        )
        differing += int(flags.any(1).sum())
        if not lines and flags.any():
            outputs = sets[int(flags.any(1).nonzero()[0])]
            for number, (out, right) in enumerate(zip(outputs, first, strict=True)):
                if not torch.equal(_bits(out), _bits(right)):
                    lines.append(f"output {number}: {describe(out, right, offsets)}")
                    if number == 0 and kernel.product:
                        where = (_bits(out) != _bits(right)).nonzero()
                        lines.append(_product_mistakes(out, right, where, kernel.product, offsets))
    if differing:
        lines.insert(0, f"{differing} of {ceil_div(runs, len(sets)) * len(sets)} runs differ")
    return lines


def _be_busy() -> None:
    """Long kernels, until this process is ended: of memory, and of tensor cores."""
    memory = torch.zeros(2**28, device="cuda")
    matrix = torch.zeros(8192, 8192, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(matrix)
    print("busy", flush=True)
    while True:
        for _ in range(4):
            memory.add_(1)
            torch.mm(matrix, matrix, out=out)
        torch.cuda.synchronize()


@contextmanager
def _other_process() -> Iterator[None]:
    command = [sys.executable, "-m", "tests.kernels.stress_hopper", "--be-busy"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "busy\n", "the other process did not start"
        yield
    finally:
        process.kill()
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--others", type=int, default=4, help="processes with long kernels")
    parser.add_argument("--kernel", nargs="*", help="only those; else all")
    parser.add_argument("--condition", nargs="*", choices=CONDITIONS, default=CONDITIONS)
    parser.add_argument("--even", action="store_true", help="no tile is ragged")
    parser.add_argument("--wait-twice", action="store_true", help="at each barrier")
    parser.add_argument("--be-busy", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be_busy:
        _be_busy()
    if options.wait_twice:
        wait_twice()
    torch.manual_seed(0)
    sizes = Sizes(tokens=1024, even=True) if options.even else Sizes()
    found, offsets = kernels(sizes, torch.device("cuda"))
    chosen = options.kernel or list(found)
    noise, other = torch.zeros(2**28, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()

    def disturb() -> None:
        with torch.cuda.stream(other):
            noise.add_(1)

    wrong = 0
    for condition in options.condition:
        with ExitStack() as stack:
            if condition in ("processes", "both"):
                for _ in range(options.others):
                    stack.enter_context(_other_process())
            for name in chosen:
                start = time.perf_counter()
                nothing = (lambda: None) if condition in ("alone", "processes") else disturb
                lines = stress(found[name], offsets, options.runs, nothing)
                seconds = time.perf_counter() - start
                print(f"{condition}, {name}: {lines[0] if lines else 'same bits'}", end=" ")
                print(f"({seconds:.1f} s)", *lines[1:], sep="\n    ", flush=True)
                wrong += bool(lines)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
