"""What this machine can do, measured: the rate of a dense product and of reading memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.registry import Cost
from benchmarks.timing import Clock, make_clock, measure

ROUNDS = 4
PROBE = 256  # side of the matrices that tell which dtype is faster


@dataclass(frozen=True)
class Limits:
    """Rates of one device and dtype.

    Attributes:
        flops: per second, of a large square product, in float32 if that is faster.
        bytes: per second, of reading memory once.
        product: the dtype of that product; None where it is that of the rows.
    """

    flops: float
    bytes: float
    product: torch.dtype | None = None

    def floor_ms(self, cost: Cost) -> float:
        """The time below which nothing on this machine can do this much work."""
        return 1e3 * max(cost.flops / self.flops, cost.bytes / self.bytes)

    def best(self, other: Limits) -> Limits:
        """The fastest that the machine was seen to be."""
        fastest = max(self, other, key=lambda limits: limits.flops)
        return replace(fastest, bytes=max(self.bytes, other.bytes))


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """In which matrices of ``dtype`` are multiplied fastest: it, or float32.

    PyTorch's large products of 16 bits take many times as long as those of float32 on a processor
    with AVX2 alone, which can multiply numbers of 16 bits as floats all the same.
    """
    if device.type == "cuda" or dtype.itemsize != 2:
        return dtype
    took = {}
    for other in (dtype, torch.float32):
        a = torch.randn(PROBE, PROBE, device=device).to(other)
        c = torch.empty_like(a)

        def call(clock: Clock, _: int, a: Tensor = a, c: Tensor = c) -> None:
            clock.mark()
            torch.mm(a, a, out=c)
            clock.mark()

        took[other] = min(measure(make_clock(device), call, 0, 1)[0] for _ in range(ROUNDS))
    return min(took, key=lambda other: took[other])


def measure_limits(clock: Clock, device: torch.device, dtype: torch.dtype) -> Limits:
    """The best of a few repetitions: a limit is what the machine can do, not what it did."""
    cuda = device.type == "cuda"
    size = 8192 if cuda else 2048
    product = product_dtype(device, dtype)
    a = torch.randn(size, size, device=device).to(product)
    b = torch.randn(size, size, device=device).to(product)
    c = torch.empty_like(a)
    memory = torch.ones((4 << 30 if cuda else 256 << 20) // 4, device=device)
    integers = memory.view(torch.int32)
    stages = {
        "product": lambda: torch.mm(a, b, out=c),
        "sum": lambda: memory.sum(),
        "maximum": lambda: integers.amax(),
    }
    ms = {}
    for name, stage in stages.items():

        def call(clock: Clock, _: int, stage: object = stage) -> None:
            clock.mark()
            stage()  # type: ignore[operator]
            clock.mark()

        ms[name] = min(measure(clock, call, 0, 1)[0] for _ in range(ROUNDS))
    read_ms = min(ms["sum"], ms["maximum"])
    flops, read = 2 * size**3 / ms["product"] * 1e3, memory.nbytes / read_ms * 1e3
    return Limits(flops, read, None if product == dtype else product)
