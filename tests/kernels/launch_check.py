"""Public functions on the Triton launchers, with nothing launched: what they would launch, and that
they never read from the device. In a process of its own, since kernels elsewhere may be decorated
for the interpreter.

    python -m tests.kernels.launch_check
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are decorated

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.launches import HostReadError, launcher_ops, layer_steps, watched
from tests.kernels import known_calls
from tests.kernels.replay_check import check, scenarios

LAYERS: dict[str, tuple[tuple[int, ...], bool]] = {
    "one token": ((1, 256, 128, 16, 4), False),
    "one token, biased": ((1, 256, 128, 16, 4), True),
    "some tokens": ((64, 256, 128, 16, 4), False),
    "many tokens": ((2048, 256, 128, 16, 4), False),
}


class Called(TorchDispatchMode):
    """Notes the package's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "moe_kernels":
            self.names.add(name)
        return func(*args, **(kwargs or {}))


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
    for again in (True, False):
        y.backward(torch.empty_like(x), retain_graph=again)
    y = moe_kernels.fused_experts(
        x, gate_up.mT, down.mT, routed.topk_ids, routed.topk_weights.detach().requires_grad_(),
        num_rows=500, precision="fp8_block",
    )  # fmt: skip
    for again in (True, False):
        y.backward(torch.empty_like(x), retain_graph=again)
    main_grads = torch.empty(16, 256, 256), torch.empty(16, 128, 256)
    y = moe_kernels.fused_experts(
        x, gate_up.mT, down.mT, routed.topk_ids, routed.topk_weights.detach(),
        main_grads=main_grads,
    )  # fmt: skip
    y.sum().backward()
    moe_kernels.grouped_gemm_wgrad(rows.detach(), h.detach(), order.offsets)
    moe_kernels.grouped_gemm_wgrad(rows.detach(), h.detach(), order.offsets, out=main_grads[0])
    mask, given = torch.empty(300, dtype=torch.bool), torch.empty(300, 4, dtype=torch.int64)
    moe_kernels.topk_router(logits, 4, given_ids=given, token_mask=mask).load.float()
    wider = moe_kernels.topk_router(logits, 4, candidates=4)
    rounded = moe_kernels.round_tokens(*wider[:2], 16, top_k=4, tile=16, token_mask=mask)
    rounded.topk_weights.sum().backward()
    product = moe_kernels.fp8_grouped_gemm(
        rows.detach().requires_grad_(), gate_up.mT, order.offsets, bias=bias
    )
    product.sum().backward()
    with torch.no_grad():
        moe_kernels.quantize_rows(x)
        values, scales = moe_kernels.permute_quantize(x, order)
        w, w_scales = moe_kernels.quantize_weights(gate_up.mT)
        moe_kernels.scaled_grouped_gemm(values, w, scales, w_scales, order.offsets)
        moe_kernels.permute(values[:300], order, scales=scales[:300])
        moe_kernels.dequantize_rows(values, scales)


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
    with watched(90) as launches, Called() as called:
        every_op()
        found = {"every op": {"all": list(launches)}}
    left_out = sorted(set(launcher_ops()) - called.names)
    for name, (sizes, biased) in LAYERS.items():
        steps = layer_steps(*sizes, biased=biased, calls=1)
        found[name] = {step.name: step.launches for step in steps}
    repeated = {
        "every op": check(every_op, apart=True),
        "together": check(every_op, apart=False),
        **scenarios(),
    }
    result = {"launches": found, "caught": caught(), "reads": list(READS), "left out": left_out}
    result |= {"repeated": repeated, "known": known_calls.found()}
    print(json.dumps(result))
