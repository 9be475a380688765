"""Compile the kernels that launchers launch, for a GPU that need not be there, and report on them.

    python -m tests.kernels.compile_check --arch 90 [case ...]

Launchers run on CPU tensors under a driver that compiles and never launches, so specialisation
(alignment, divisibility, strides of one) is that of a real call. Each kernel's PTX, resources and
machine code are then read: one JSON object a kernel. Triton's cache makes a second run cheap.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict

os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are decorated

from benchmarks.architectures import ARCHITECTURES
from benchmarks.compile_only import Report, compile_only, read


def check(names: list[str], arch: int) -> Iterator[Report]:
    """Report on the kernels of the named cases, each under the first case that launches it.

    Those that are compiled again to the same code count in cases of "other_counts" alone.
    """
    from tests.kernels.compile_cases import CASES, MORE_CASES

    cases = CASES | MORE_CASES
    done: set[str] = set()
    compiled: set[str] = set()
    with compile_only(arch) as kernels:
        for name in names or cases:
            kernels.clear()
            cases[name]()
            for kernel in kernels:
                again = name.startswith("other_counts") and kernel.hash not in compiled
                if again or kernel.asm["ptx"] not in done:
                    done.add(kernel.asm["ptx"])
                    yield read(name, kernel, arch)
                compiled.add(kernel.hash)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, default=90, choices=ARCHITECTURES)
    parser.add_argument("cases", nargs="*")
    options = parser.parse_args()
    for report in check(options.cases, options.arch):
        json.dump(asdict(report), sys.stdout)
        print(flush=True)
