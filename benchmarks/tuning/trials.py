"""Runs of configurations that may never end, or break the device for this process.

Where warps have roles they wait for one another, and a mistake of the compiler can make them wait
for ever. Nothing interrupts that: the process has to end. So it has after an address that is not
valid. So the configuration is written to ``TABLE.trying`` before, and what a process leaves there
when it ends, the next one moves to ``TABLE.hung`` and tries no more.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import results
from moe_kernels.triton._config_tables import Bucket, Config

SECONDS = 60.0  # a run takes milliseconds, and what it needs is compiled by then


class Trials:
    """Those beside one table; ``check`` raises if the device is broken."""

    def __init__(self, table: Path, check: Callable[[], None] = lambda: None) -> None:
        self._check = check
        self._trying, self._hung = table.with_suffix(".trying"), table.with_suffix(".hung")
        self.hung: list[Any] = json.loads(self._hung.read_text()) if self._hung.exists() else []
        if self._trying.exists():
            self.hung.append(json.loads(self._trying.read_text()))
            self._hung.write_text(json.dumps(self.hung, indent=1) + "\n")
            self._trying.unlink()

    def ended(self, bucket: Bucket, config: Config, times: int = 1) -> bool:
        """Whether fewer than so many earlier processes ended in a run of the configuration."""
        return self.hung.count(_entry(bucket, config)) < times

    @contextmanager
    def of(self, bucket: Bucket, config: Config, seconds: float = SECONDS) -> Iterator[None]:
        """Around a run and its synchronisation; where warps have roles, ends the process after
        ``seconds``."""
        results.write(self._trying, _entry(bucket, config))  # in one step: never half of it
        if config.warp_specialize != "no":
            faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._check()  # what it raises leaves the file
            self._trying.unlink()


def _entry(bucket: Bucket, config: Config) -> dict[str, Any]:
    return {"bucket": dataclasses.asdict(bucket), "config": dataclasses.asdict(config)}
