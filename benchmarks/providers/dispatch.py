"""Ways to take tokens to the ranks of their experts and back: the transports of the package's
dispatcher, PyTorch's own all-to-all of one copy per expert, and gloo alone.

T tokens, H hidden size, K experts a token, E experts, P ranks, S tokens sent, U received.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from benchmarks.ops.dispatch import weighted
from benchmarks.registry import (
    Builder,
    Case,
    Implementation,
    Inputs,
    Output,
    Provider,
    Unsupported,
)
from moe_parallel.dispatch import TRANSPORTS, build_dispatcher


class _Instant:
    """Experts that take no time: their results, and gradients, lie ready in ordinary memory."""

    def __init__(self) -> None:
        self._ready: dict[int, Tensor] = {}

    def __call__(self, rows: Tensor) -> Tensor:
        y: Tensor = _Exchanged.apply(rows, self)
        return y

    def instead_of(self, rows: Tensor) -> Tensor:
        """What is ready of that size; made when first asked for, which is not timed."""
        count = rows.shape[0]
        if count not in self._ready:
            self._ready[count] = torch.ones(rows.shape, dtype=rows.dtype, device=rows.device)
        return self._ready[count].detach()


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ready: _Instant) -> Tensor:
        ctx.ready = ready
        return ready.instead_of(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ready.instead_of(grad), None


def _transport(transport: str) -> Builder:
    def build(case: Case) -> Implementation:
        experts, inputs = case.shape["E"], case.inputs[0]
        try:
            dispatcher = build_dispatcher(
                case.group,
                experts,
                transport=transport,
                max_tokens=case.shape["T"] if transport == "cuda_ipc" else None,
            )
            with torch.no_grad():  # of no tokens: whether it takes such tensors at all
                dispatcher.dispatch(
                    *(inputs[name][:0] for name in ("x", "topk_ids", "topk_weights"))
                )
        except (ValueError, TypeError, ImportError, NotImplementedError) as error:
            raise Unsupported(str(error).split("\n")[0]) from error
        first = case.group.rank() * (experts // case.shape["P"])
        instant = _Instant()

        def run(inputs: Inputs) -> Output:
            sent = dispatcher.dispatch(inputs["x"], inputs["topk_ids"], inputs["topk_weights"])
            if "factors" in inputs:
                y = weighted(
                    sent.x, sent.topk_ids, sent.topk_weights, inputs["factors"], first=first
                )
            else:
                y = instant(sent.x)
            return dispatcher.combine(y, sent.handle)

        return Implementation(run)

    return build


class _Gather(torch.autograd.Function):
    """``rows[index]``; backward gathers too, and adds where a row was taken several times.

    PyTorch's own backward of indexing adds one row after the other, slowly and in bf16.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, back: Tensor, copies: int) -> Tensor:
        ctx.copies = copies
        ctx.save_for_backward(back)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        rows = grad.index_select(0, back)
        if ctx.copies > 1:
            rows = rows.view(-1, ctx.copies, rows.shape[1]).sum(1)
        return rows, None, None, None


def _torch_all_to_all(case: Case) -> Implementation:
    """A copy of the token for each of its experts, as dispatchers built on collectives send it.

    The counts of each expert travel first. The received rows are left in the order of their ranks:
    what it costs to group them by expert, there and back, is not charged.
    """
    E, K, P = (case.shape[letter] for letter in "EKP")
    group, rank = case.group, case.group.rank()
    instant = _Instant()

    def exchange(rows: Tensor, received: list[int], sent: list[int]) -> Tensor:
        trained = torch.is_grad_enabled() and rows.requires_grad
        call = functional.all_to_all_single_autograd if trained else functional.all_to_all_single
        return functional.wait_tensor(call(rows, received, sent, group))

    def run(inputs: Inputs) -> Output:
        slots = inputs["topk_ids"].flatten()
        order = slots.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        counts = torch.bincount(slots, minlength=E)
        theirs = exchange(counts, [E // P] * P, [E // P] * P).view(P, E // P)
        sent, received = torch.stack([counts.view(P, -1).sum(1), theirs.sum(1)]).tolist()
        rows = exchange(_Gather.apply(inputs["x"], order // K, place, K), received, sent)
        if "factors" in inputs:
            mine = torch.arange(rank * (E // P), (rank + 1) * (E // P), device=rows.device)
            ids = mine.repeat(P).repeat_interleave(theirs.flatten())[:, None]
            y = weighted(rows, ids, torch.ones_like(ids), inputs["factors"])
        else:
            y = instant(rows)
        back = _Gather.apply(exchange(y, sent, received), place, order, 1)
        copies = back.view(-1, K, back.shape[1])
        return torch.bmm(inputs["topk_weights"][:, None], copies).squeeze(1)

    return Implementation(run)


def _gloo_rows(case: Case) -> Implementation:
    """Each token once for each of its ranks, there and back: known counts, nothing packed or added.

    A rank's rows for itself are among them; gloo copies those.
    """
    rank, hidden = case.group.rank(), case.shape["H"]
    most = max(int(i["rows"].sum(dim).max()) for i in case.inputs for dim in (0, 1))
    sent, received = (torch.ones(most, hidden, dtype=case.dtype) for _ in range(2))

    def run(inputs: Inputs) -> Output:
        out, in_ = inputs["rows"][rank].tolist(), inputs["rows"][:, rank].tolist()
        there, back = received[: sum(in_)], sent[: sum(out)]
        dist.all_to_all_single(there, back, in_, out, group=case.group)
        dist.all_to_all_single(back, there, out, in_, group=case.group)
        return back

    def backward(outputs: Output, inputs: Inputs) -> None:
        run(inputs)

    return Implementation(run, backward)


def _provider(name: str, build: Callable[[Case], Implementation], **options: Any) -> Provider:
    return Provider(name, {"dispatch": build}, **options)


# Those that do not carry the tensors of every device, or belong to another package.
LIMITED: dict[str, dict[str, Any]] = {
    "shared_memory": {"devices": ("cpu",)},
    "cuda_ipc": {"devices": ("cuda",)},
    "deepep": {"devices": ("cuda",), "requires": ("deep_ep",)},
}
transports = tuple(
    _provider(name, _transport(name), **LIMITED.get(name, {})) for name in TRANSPORTS
)
torch_all_to_all = _provider("torch_all_to_all", _torch_all_to_all)
gloo_rows = _provider("gloo_rows", _gloo_rows, devices=("cpu",), limit=True)
