"""What the stress test of kernels tells: what it runs, and which mistakes it recognises."""

from __future__ import annotations

import re

import pytest
import torch

from tests.conftest import HAS_GPU, triton_under_cpu
from tests.kernels import stress_hopper
from tests.kernels.stress_hopper import describe, explain

pytestmark = pytest.mark.skipif(HAS_GPU, reason="there it is run itself")

BLOCK_K, STAGES = 4, 3
WRONG = {
    "step 2 is missing": lambda x, w: -(x[2] * w[2]).sum(),
    "step 0 counts twice": lambda x, w: (x[0] * w[0]).sum(),
    "step 4 has weights of step -3": lambda x, w: (x[4] * (w[1] - w[4])).sum(),
    "step 4 has weights of step +1": lambda x, w: (x[4] * (w[5] - w[4])).sum(),
    "step 1 has rows of step -1": lambda x, w: ((x[0] - x[1]) * w[1]).sum(),
    "step 1 has all of step +3": lambda x, w: (x[4] * w[4] - x[1] * w[1]).sum(),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_of_a_step_are_recognised(name: str) -> None:
    torch.manual_seed(0)
    for _ in range(10):
        rows, weight = torch.randn(2, 22).double()
        parts = torch.zeros(2, 24).double()
        parts[0, :22], parts[1, :22] = rows, weight
        difference = float(WRONG[name](*parts.view(2, 6, BLOCK_K)))
        assert explain(difference, 1e-6, rows, weight, BLOCK_K, STAGES) == [name]
        assert explain(difference * 0.7, 1e-6, rows, weight, BLOCK_K, STAGES) == []


def test_where_outputs_differ_is_told() -> None:
    first = torch.zeros(300, 16)
    found = first.clone()
    found[170, 5], found[171, 9] = 2.0, -3.0
    text = describe(found, first, torch.tensor([0, 30, 200, 300]))
    assert "2 elements; tiles (expert, number, rows left) [[1, 1, 42]] of 1" in text
    assert "rows of a tile 12 to 13; columns 5 to 9; largest difference 3" in text


def test_all_kernels_run_and_a_differing_one_is_told() -> None:
    """Of few rows, interpreted; the plain kernels in place of those in Gluon."""
    sizes = stress_hopper.Sizes(tokens=24, experts=3, top_k=2, hidden=64, inner=32)
    with triton_under_cpu():
        found, offsets = stress_hopper.kernels(sizes, torch.device("cpu"))
        for name, kernel in found.items():
            lines = stress_hopper.stress(kernel, offsets, 1, lambda: None)
            assert not lines, (name, lines)
        kernel, runs = found["dx"], []

        def lose_a_step(outputs: list[torch.Tensor]) -> None:
            kernel.run(outputs)
            runs.append(outputs)
            if len(runs) == 3 and kernel.product:
                e = int((offsets[1:] <= 20).sum())
                last = kernel.product.rows[20, -16:].double()
                lost = last @ kernel.product.weight[e, -16:].double()
                outputs[0][20] = (outputs[0][20].double() - lost).to(outputs[0].dtype)

        assert kernel.product is not None
        cut = stress_hopper.dataclasses.replace(kernel.product.cut, block_k=16)
        product = stress_hopper.dataclasses.replace(kernel.product, cut=cut)
        wrong = stress_hopper.Kernel(kernel.make, lose_a_step, product)
        lines = stress_hopper.stress(wrong, offsets, 4, lambda: None)
        assert lines[0] == "1 of 4 runs differ"
        assert "[[1, 0, 19]] of 1; rows of a tile 7 to 7" in lines[1]
        explained = re.search(r"elements: step 3 is missing: (\d+)", lines[2])
        assert explained is not None, lines
        assert int(explained[1]) > 50, lines
