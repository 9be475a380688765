"""Public functions on the Triton launchers, with nothing launched: what they would launch, and that
they never read from the device. In a process of its own, since kernels elsewhere may be decorated
for the interpreter.

    python -m tests.kernels.launch_check
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable

os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are decorated

import torch

from benchmarks.launches import HostReadError, layer_steps, watched

LAYERS: dict[str, tuple[tuple[int, ...], bool]] = {
    "one token": ((1, 256, 128, 16, 4), False),
    "one token, biased": ((1, 256, 128, 16, 4), True),
    "some tokens": ((64, 256, 128, 16, 4), False),
    "many tokens": ((2048, 256, 128, 16, 4), False),
}


def every_op() -> None:
    """As test_gpu does where there is a GPU."""
    import moe_kernels

    def leaf(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16).requires_grad_()

    x, gate_up, down, bias = leaf(300, 256), leaf(16, 256, 256), leaf(16, 256, 128), leaf(16, 256)
    logits = torch.empty(300, 16).requires_grad_()
    routed = moe_kernels.topk_router(
        logits, 4, score_func="sigmoid", num_groups=4, topk_groups=2,
        correction_bias=torch.empty(16), return_scores=True,
    )  # fmt: skip
    routed.scores.sum().backward(retain_graph=True)
    order = moe_kernels.sort_by_expert(routed.topk_ids, 16)
    rows = moe_kernels.permute(x, order)
    h = moe_kernels.grouped_gemm(rows, gate_up.mT, order.offsets, bias=bias)
    a = moe_kernels.expert_activation(h, "swiglu")
    out = moe_kernels.grouped_gemm(a, down.mT, order.offsets)
    moe_kernels.unpermute(out, order, routed.topk_weights).backward(torch.empty_like(x))
    sizes = torch.empty(3, dtype=torch.int64)
    moe_kernels.chunk_permute(x, sizes, torch.arange(3)).sum().backward()
    y = moe_kernels.fused_experts(
        x, gate_up.mT, down.mT, routed.topk_ids, routed.topk_weights.detach(), num_rows=500
    )
    y.sum().backward()
    y = moe_kernels.fused_experts(
        x, gate_up.mT, down.mT, routed.topk_ids, routed.topk_weights.detach().requires_grad_(),
        num_rows=500, precision="fp8_block",
    )  # fmt: skip
    y.sum().backward()


READS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda values: values[0].item(),
    "int": lambda values: int(values[0]),
    "float": lambda values: float(values[0]),
    "bool": lambda values: bool(values[0] > 0),
    "if": lambda values: 1 if values[0] > 0 else 0,
    "index": lambda values: [1, 2][values[0]],
    "tolist": lambda values: values.tolist(),
    "numpy": lambda values: values.numpy(),
    "cpu": lambda values: values.cpu(),
    "nonzero": lambda values: values.nonzero(),
    "mask": lambda values: values[values > 0],
    "where": lambda values: torch.where(values > 0),
    "unique": lambda values: values.unique(),
    "repeat": lambda values: values.repeat_interleave(values),
    "equal": lambda values: torch.equal(values, values),
    "list to device": lambda values: torch.tensor([1, 2]),
}


def caught() -> list[str]:
    """The ways to read that are refused."""
    names = []
    with watched(90):
        for name, read in READS.items():
            try:
                read(torch.zeros(2, dtype=torch.int64))
            except HostReadError:
                names.append(name)
    return names


if __name__ == "__main__":
    with watched(90) as launches:
        every_op()
        found = {"every op": {"all": list(launches)}}
    for name, (sizes, biased) in LAYERS.items():
        steps = layer_steps(*sizes, biased=biased, calls=1)
        found[name] = {step.name: step.launches for step in steps}
    print(json.dumps({"launches": found, "caught": caught(), "reads": list(READS)}))
