"""On a GPU: every call of an op is decided, noted and repeated, and gives the same bits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Repeats:
    """Wraps the launchers of ops while ``installed``; compares while :meth:`checked`."""

    def __init__(self) -> None:
        self._checks = False

    def install(self) -> None:
        """Before the first call of an op."""
        from moe_kernels.triton import _replay

        replayed = _replay.replayed

        def checking(op: Callable[..., Any]) -> _replay.Replayed:
            call, repeat, confirm, is_repeated = replayed(op)

            @functools.wraps(op)
            def checked(*args: Any) -> Any:
                if not self._checks or op.__name__.endswith("_"):  # what is added twice differs
                    return call(*args)
                decided = op(*args)
                for _ in range(3):  # seen, noted, repeated
                    repeated = call(*args)
                _check_same(op.__name__, decided, repeated)
                return repeated

            def unchecked(*args: Any) -> Any:
                return None if self._checks else repeat(*args)

            return _replay.Replayed(checked, unchecked, confirm, is_repeated)

        _replay.replayed = checking

    @contextmanager
    def checked(self) -> Iterator[None]:
        self._checks = True
        try:
            yield
        finally:
            self._checks = False


def _check_same(name: str, decided: Any, repeated: Any) -> None:
    pairs = [
        [result] if isinstance(result, Tensor) else list(result or ())
        for result in (decided, repeated)
    ]
    for one, other in zip(*pairs, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        if one.numel():
            bits, others = (t.contiguous().view(-1).view(torch.uint8) for t in (one, other))
            assert torch.equal(bits, others), f"{name}: a repeated call gives other bits"
