"""Dense products of the same flops: what the matrix unit gives when there is but one expert."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.registry import Builder, Case, Implementation, Inputs, Output, Provider

FLOAT8_CAPABILITY = (8, 9)


def _products(*letters: tuple[str, ...], float8: bool = False) -> Builder:
    """[M, D] @ [D, N] for every (M, D, N); backward: both gradients of each.

    A size is a product of the shape's letters; "2" doubles it. With float8, products of a gradient
    of b aside, they are in float8 with one scale a tensor, where the device has it.
    """

    def build(case: Case) -> Implementation:
        def size(text: str) -> int:
            total = 1
            for letter in text:
                total *= 2 if letter == "2" else case.shape[letter]
            return total

        def random(*sizes: int) -> Tensor:
            generator = torch.Generator(case.device).manual_seed(0)
            values = torch.empty(sizes, dtype=case.dtype, device=case.device)
            return values.normal_(generator=generator)

        cuda = case.device.type == "cuda"
        narrow = float8 and cuda and torch.cuda.get_device_capability() >= FLOAT8_CAPABILITY
        one = torch.ones((), device=case.device)

        def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
            if a.dtype == torch.float8_e4m3fn:
                torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=out.dtype, out=out)
            else:
                torch.mm(a, b, out=out)

        triples = []
        for m, d, n in letters:
            a, b, c = (size(m), size(d)), (size(n), size(d)), (size(m), size(n))
            triples.append((random(*a), random(*b), random(*c)))
        results = [tuple(map(torch.empty_like, triple)) for triple in triples]
        operands = [
            tuple(value.to(torch.float8_e4m3fn) if narrow else value for value in (a, b, c))
            for a, b, c in triples
        ]
        # float8 is contracted along both operands' last dimension alone
        columns = [b.T.contiguous().T if narrow else b for _, b, _ in operands]

        def run(inputs: Inputs) -> Output:
            with torch.no_grad():
                for (a, b, _), (_, _, c) in zip(operands, results, strict=True):
                    multiply(a, b.T, c)
            return results[-1][2]

        def backward(outputs: Output, inputs: Inputs) -> None:
            with torch.no_grad():
                for i, (a, _, c) in enumerate(triples):
                    multiply(operands[i][2], columns[i], results[i][0])
                    torch.mm(c.T, a, out=results[i][1])

        return Implementation(run, backward)

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
