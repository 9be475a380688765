"""Results do not depend on how many threads there are, nor on who else calls meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import moe_kernels

# One expert has all rows, or most, or one; several blocks of rows at any level; others have none.
COUNTS = [
    (300,),
    (800,),
    (0,) * 3 + (200,) + (0,) * 60,
    (384,) + (1,) * 20,
    (1,),
    (0,) * 511 + (1,),
]
Case = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_case(counts: tuple[int, ...], transposed: bool) -> Case:
    experts, hidden, inner = len(counts), 83, 131
    ids = torch.repeat_interleave(torch.arange(experts), torch.tensor(counts))
    case = {
        "x": torch.randn(len(ids), hidden),
        "gate_up": torch.randn(experts, hidden, 2 * inner) / hidden**0.5,
        "down": torch.randn(experts, inner, hidden) / inner**0.5,
        "gate_up_bias": torch.randn(experts, 2 * inner),
        "down_bias": torch.randn(experts, hidden),
    }
    case = {name: value.bfloat16() for name, value in case.items()}
    if transposed:
        case = {n: v.mT.contiguous().mT if v.dim() == 3 else v for n, v in case.items()}
    case["topk_ids"] = ids[torch.randperm(len(ids))].view(-1, 1)
    case["topk_weights"] = torch.rand(len(ids), 1)
    return case


def results(case: Case) -> list[Tensor]:
    """Of the layer, its gradients, and quantised."""
    leaves = {n: v.detach().requires_grad_() for n, v in case.items() if v.is_floating_point()}
    y = moe_kernels.fused_experts(**{**case, **leaves})
    out = [y, *torch.autograd.grad(y.float().pow(2).sum(), list(leaves.values()))]
    packed = {n: moe_kernels.quantize_experts(case[n], "int4") for n in ("gate_up", "down")}
    with torch.inference_mode():
        out.append(moe_kernels.fused_experts(**case))
        out.append(moe_kernels.fused_experts_quantized(**{**case, **packed}))
    return out


def same(found: list[Tensor], truth: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, truth, strict=True))


def cases() -> tuple[list[Case], list[list[Tensor]]]:
    made = [make_case(counts, transposed=i % 2 == 1) for i, counts in enumerate(COUNTS)]
    torch.set_num_threads(1)
    return made, [results(case) for case in made]


class Repeated(Dataset[bool]):
    """Whether a worker's results are those of its parent."""

    def __init__(self) -> None:
        self.cases, self.truth = cases()

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, i: int) -> bool:
        return same(results(self.cases[i]), self.truth[i])


def test_any_number_of_threads_gives_the_same_bits() -> None:
    made, truth = cases()
    for threads in (2, 3, 7, 64, 1):
        torch.set_num_threads(threads)
        for counts, case, right in zip(COUNTS, made, truth, strict=True):
            assert same(results(case), right), (threads, counts)


def test_calls_from_threads_do_not_meet() -> None:
    """Each with threads, and thus memory, of its own, as many as it says."""
    made, truth = cases()
    right: list[bool] = []

    def work(threads: int) -> None:
        torch.set_num_threads(threads)
        right.extend(
            same(results(case), one)
            for _ in range(2)
            for case, one in zip(made, truth, strict=True)
        )

    started = [threading.Thread(target=work, args=(threads,)) for threads in (1, 2, 3, 2)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert right == [True] * 4 * 2 * len(made)


def test_workers_of_a_data_loader_compute_too() -> None:
    """Forked from a process whose threads have worked: they have none of them."""
    data = Repeated()
    torch.set_num_threads(2)
    results(data.cases[0])
    loader = DataLoader(data, num_workers=2, batch_size=None)
    assert list(loader) == [True] * len(data)
