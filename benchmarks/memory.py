"""Peak memory of a call."""

from __future__ import annotations

import re
from pathlib import Path

import torch


class PeakMemory:
    """``with PeakMemory(device) as memory: ...``; then ``memory.bytes``.

    Attributes:
        bytes: needed at the peak beyond what was in use before, results included. CUDA: as
            PyTorch's allocator counts. CPU: growth of the process's resident set, on Linux; None
            elsewhere.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._before: int | None = None
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        self.synchronize()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
                self._before = _resident("VmRSS")
            except OSError:
                self._before = None
        return self

    def __exit__(self, *error: object) -> None:
        self.synchronize()
        if self._before is not None:
            peak = (
                torch.cuda.max_memory_allocated(self._device) if self._cuda else _resident("VmHWM")
            )
            self.bytes = max(0, peak - self._before)

    def synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)


def _resident(field: str) -> int:
    match = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(match[1]) if match else 0
