"""Dense products of the same flops: what the matrix unit gives when there is but one expert."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.registry import Builder, Case, Implementation, Inputs, Output, Provider


def _products(*letters: tuple[str, ...]) -> Builder:
    """[M, D] @ [D, N] for every (M, D, N); backward: both gradients of each.

    A size is a product of the shape's letters; "2" doubles it.
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

        triples = []
        for m, d, n in letters:
            a, b, c = (size(m), size(d)), (size(n), size(d)), (size(m), size(n))
            triples.append((random(*a), random(*b), random(*c)))
        results = [tuple(map(torch.empty_like, triple)) for triple in triples]

        def run(inputs: Inputs) -> Output:
            with torch.no_grad():
                for (a, b, _), (_, _, c) in zip(triples, results, strict=True):
                    torch.mm(a, b.T, out=c)
            return results[-1][2]

        def backward(outputs: Output, inputs: Inputs) -> None:
            with torch.no_grad():
                for (a, b, c), (da, db, _) in zip(triples, results, strict=True):
                    torch.mm(c, b, out=da)
                    torch.mm(c.T, a, out=db)

        return Implementation(run, backward)

    return build


dense_limit = Provider(
    "dense_limit",
    {
        "fused_experts": _products(("TK", "H", "2I"), ("TK", "I", "H")),
        "grouped_gemm": _products(("R", "D", "N")),
    },
    limit=True,
)
