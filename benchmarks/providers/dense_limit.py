"""Dense products of the same flops: what the matrix unit gives when there is but one expert."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil, prod

import torch
from torch import Tensor

from benchmarks.registry import Builder, Case, Implementation, Inputs, Output, Provider

FLOAT8_CAPABILITY = (8, 9)
Product = tuple[Tensor, Tensor, Tensor]  # operands and result
RANDOM = 1 << 20  # values that an operand repeats: to draw all of them takes long


def _products(*letters: tuple[str, ...], float8: bool = False) -> Builder:
    """[M, D] @ [D, N] for every (M, D, N); backward: both gradients of each.

    A size is a product of the shape's letters; "2" doubles it. With float8, products of a gradient
    of b aside, they are in float8 with one scale a tensor, where the device has it. Operands and
    results are there only during the calls: with many rows they are tens of gigabytes.
    """

    def build(case: Case) -> Implementation:
        def size(text: str) -> int:
            total = 1
            for letter in text:
                total *= 2 if letter == "2" else case.shape[letter]
            return total

        def random(*sizes: int) -> Tensor:
            total = prod(sizes)
            generator = torch.Generator(case.device).manual_seed(0)
            values = torch.empty(min(total, RANDOM), dtype=dtype, device=case.device)
            values.normal_(generator=generator)
            return values.repeat(ceil(total / len(values)))[:total].view(sizes)

        cuda = case.device.type == "cuda"
        dtype = case.product or case.dtype
        narrow = float8 and cuda and torch.cuda.get_device_capability() >= FLOAT8_CAPABILITY
        one = torch.ones((), device=case.device)

        forward: list[Product] = []
        backward: list[Product] = []

        def make(m: int, d: int, n: int) -> None:
            a, b, c = random(m, d), random(n, d), random(m, n)
            da, db, out = map(torch.empty_like, (a, b, c))
            backward.append((c.T, a, db))
            if narrow:
                a, b, c = (value.to(torch.float8_e4m3fn) for value in (a, b, c))
            forward.append((a, b.T, out))
            # float8 is contracted along both operands' last dimension alone
            backward.append((c, b.T.contiguous().T if narrow else b, da))

        def multiply(products: list[Product]) -> None:
            with torch.no_grad():
                for a, b, out in products:
                    if a.dtype == torch.float8_e4m3fn:
                        torch._scaled_mm(
                            a, b, scale_a=one, scale_b=one, out_dtype=out.dtype, out=out
                        )
                    else:
                        torch.mm(a, b, out=out)

        @contextmanager
        def during() -> Iterator[None]:
            try:
                for m, d, n in letters:
                    make(size(m), size(d), size(n))
                yield
            finally:
                forward.clear()
                backward.clear()

        def run(inputs: Inputs) -> Output:
            multiply(forward)
            return forward[-1][2]

        def run_backward(outputs: Output, inputs: Inputs) -> None:
            multiply(backward)

        return Implementation(run, run_backward, during=during)

    return build


dense_limit = Provider(
    "dense_limit",
    {
        "fused_experts": _products(("TK", "H", "2I"), ("TK", "I", "H")),
        "fused_experts_fp8": _products(("TK", "H", "2I"), ("TK", "I", "H"), float8=True),
        "grouped_gemm": _products(("R", "D", "N")),
        "scaled_grouped_gemm": _products(("R", "D", "N"), float8=True),
        "fp8_grouped_gemm": _products(("R", "D", "N"), float8=True),
    },
    limit=True,
)
