"""Calls on CUDA, without gradients, that are like an earlier one.

Checks in Python and the way through PyTorch's dispatcher take longer than to launch a few kernels.
Where a call was checked and noted as a plan (``triton/_replay.py``), what there is to check of such
arguments has been found right: the plan is followed at once. But not where the dispatcher would do
more than to call the kernels: under a mode, a transform, autocast, a trace or an observer, which
are to hear of the op, nor with tensors of other kinds, or that it would materialise first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moe_kernels.ops._library import reads_reference, record_callbacks, triton_op

PLAIN = (Tensor, torch.nn.Parameter)
SCALARS = (type(None), bool, int, float, str)


def _keys(*names: str) -> int:
    found = 0
    for name in names:
        found |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr()
    return found


# of a tensor in memory, which nothing wraps, conjugates or negates
_USUAL = _keys(
    *("CPU", "AutogradCPU", "AutocastCPU"),
    *("CUDA", "AutogradCUDA", "AutocastCUDA"),
    "ADInplaceOrView",
)
_ALWAYS = _keys("BackendSelect", "ADInplaceOrView")


def is_plain(value: Any) -> bool:
    return type(value) in PLAIN and not torch._C._dispatch_keys(value).raw_repr() & ~_USUAL


def _is_heard(device: str) -> bool:
    """Whether someone is to hear of an op on that device."""
    return bool(
        torch._C._dispatch_tls_local_include_set().raw_repr() & ~_ALWAYS
        or torch._C._len_torch_function_stack()
        or torch.is_autocast_enabled(device)
        or record_callbacks()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


class Repeated:
    """An op whose first argument is a tensor. Not for torch.compile."""

    def __init__(self, op: torch._ops.OpOverload) -> None:
        self._op = triton_op(op._opname)
        self._never = reads_reference()
        # kernels are not given those at the end that are as by default
        self._defaults = [(a.has_default_value(), a.default_value) for a in op._schema.arguments]

    @property
    def possible(self) -> bool:
        """Whether there may be such a call now; else it needs no arguments."""
        return self._op.loaded and not self._never and not torch.is_grad_enabled()

    def __call__(self, *args: Any) -> Any:
        """The op's result, or None where the call is not like one before that was checked."""
        return self._with(self._op.repeat, args)

    def confirm(self, *args: Any) -> None:
        """The arguments of a call that has just returned were checked."""
        self._with(self._op.confirm, args)

    def _with(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if not self.possible or not is_plain(args[0]) or not self._op.is_repeated(args[0]):
            return None
        if not all(type(value) in SCALARS or is_plain(value) for value in args[1:]):
            return None
        if _is_heard(args[0].device.type):
            return None
        count = len(args)
        for value, (has_default, default) in zip(
            reversed(args), reversed(self._defaults), strict=True
        ):
            if not has_default or type(value) is not type(default) or value != default:
                break
            count -= 1
        return function(*args[:count])
