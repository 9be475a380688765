"""Compile kernels for a GPU that need not be there, and read what the compiler made of them.

Launchers run on CPU tensors under a driver that compiles and never launches, so specialisation
(alignment, divisibility, strides of one) is that of a real call. Import this before kernels, where
TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

from benchmarks.architectures import shared_memory

MBARRIERS = {
    "init": "init",
    "arrive": "arrive",
    "expect": r"arrive\.expect_tx",
    "copied": r"arrive\.noinc",
    "wait": r"try_wait\.parity",
}


class CompileOnlyDriver(DriverBase):
    """Says which GPU to compile for and has none."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing can be timed without a GPU")


class SilentDriver(CompileOnlyDriver):
    """Takes kernels and launches as a GPU's driver does, and runs nothing.

    ``launched``: is called with a kernel's name, the types of its arguments, its grid and the
    arguments of each launch.
    """

    def __init__(self, arch: int, launched: Callable[..., None]) -> None:
        super().__init__(arch)
        self.launched = launched
        self.utils = self
        self.launcher_cls = SilentLauncher

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": shared_memory(self.target.arch)}

    def load_binary(self, *args: Any) -> tuple[Any, int, int, int, int]:
        return None, 0, 0, 0, 1024  # module, function, registers, spills, the most threads


class SilentLauncher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = source.fn.fn.__name__
        self.types = list(source.signature.values())

    def __call__(self, *args: Any) -> None:
        # of the driver now, as kernels keep their launchers
        triton.runtime.driver.active.launched(self.name, self.types, args[:3], args[9:])


@contextmanager
def compile_only(arch: int, launches: list[str] | None = None) -> Iterator[list[Any]]:
    """While open, a launch compiles its kernel for ``arch``, and puts it on the list, once.

    The names of all that are launched are appended to ``launches``.
    """
    triton.runtime.driver.set_active(CompileOnlyDriver(arch))
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_instead(self: Any, *args: Any, warmup: bool = True, **kwargs: Any) -> Any:
        kernel = run(self, *args, warmup=True, **kwargs)
        if kernel not in kernels:
            kernels.append(kernel)
        if launches is not None:
            launches.append(self.fn.__name__)
        return kernel

    JITFunction.run = compile_instead
    try:
        yield kernels
    finally:
        JITFunction.run = run


@dataclass(frozen=True)
class Report:
    """What the compiler made of a kernel.

    Attributes:
        registers: of a thread.
        spilled: bytes of registers stored to and loaded from memory, and of any stack.
        shared: bytes of shared memory of a block; ``fits`` if the architecture has them.
        wgmma, tcgen05, mma: tensor core instructions of each kind, in the PTX.
        float8: those among them that multiply float8.
        tma_load, tma_store, cp_async: instructions that copy to or from shared memory.
        wide_loads: loads of 16 bytes a thread to registers.
        detours: tiles that pass through registers on their way to a ``wgmma``, in a pipelined loop.
        fenced: every wait for ``cp.async`` is followed by a proxy fence before a ``wgmma``.
        shown: a proxy fence follows the making of barriers, before TMA is asked to arrive at them.
        serialized: ptxas could not keep ``wgmma`` asynchronous.
        specialized: warps have roles of their own.
        torn: TMA copies of another size than the box of their descriptor. The barrier then waits
            for fewer or more bytes than come: results are wrong, or the kernel never ends.
        role_registers: of a thread, as warps with roles set them, in the order of the code.
        mbarriers: how often barriers are made ("init"), arrived at ("arrive", and "expect" where
            bytes are to come, "copied" by ``cp.async``) and waited for ("wait").
    """

    case: str
    kernel: str
    arch: int
    warps: int
    registers: int
    spilled: int
    shared: int
    fits: bool
    wgmma: int
    tcgen05: int
    mma: int
    float8: int
    tma_load: int
    tma_store: int
    cp_async: int
    wide_loads: int
    detours: int
    fenced: bool
    shown: bool
    serialized: bool
    specialized: bool
    torn: int
    role_registers: list[int]
    mbarriers: dict[str, int]
    instructions: int


def _run(tool: str, *args: str) -> str:
    done = subprocess.run([tool, *args], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr}")
    return done.stdout + done.stderr


def _is_fenced(ptx: str) -> bool:
    """Data copied by cp.async is read by wgmma only behind a proxy fence.

    Reads straight through the text: between a wait for copies and the next wgmma there is a fence.
    Where copies arrive at barriers, every wait for a barrier may be for them.
    """
    waiting, at_barriers = False, "cp.async.mbarrier.arrive" in ptx
    for line in ptx.splitlines():
        if ("cp.async.wait" in line and "bulk" not in line) or (
            at_barriers and "mbarrier.try_wait" in line
        ):
            waiting = True
        elif "fence.proxy.async" in line:
            waiting = False
        elif "wgmma.mma_async" in line and waiting:
            return False
    return True


def _shows_barriers(ptx: str) -> bool:
    """Reads straight through the text, from the last barrier that is made to the first copy."""
    made = ptx.rpartition("mbarrier.init")[2]
    return "fence.proxy.async" in made.partition("cp.async.bulk.tensor")[0].partition("wgmma")[0]


def _detours(ttgir: str) -> int:
    """Allocations of shared memory inside the innermost loop with a product."""
    lines = ttgir.splitlines()
    products = [i for i, line in enumerate(lines) if "ttng.warp_group_dot " in line]
    if not products:
        return 0
    start = max((i for i in range(products[0]) if "scf.for" in lines[i]), default=0)
    indent = len(lines[start]) - len(lines[start].lstrip())
    end = next(i for i in range(start + 1, len(lines)) if lines[i].startswith(" " * indent + "}"))
    return sum("ttg.local_alloc" in line for line in lines[start:end])


def _torn(ttgir: str) -> int:
    """TMA copies to shared memory that has not as many elements as the descriptor's box."""
    copy = r"async_tma_copy_global_to_local .*tensordesc<tensor<([0-9x]+)x.*memdesc<([0-9x]+)x\D"
    pairs = re.findall(copy, ttgir)
    return sum(_elements(box) != _elements(memory) for box, memory in pairs)


def _elements(shape: str) -> int:
    return prod(int(extent) for extent in shape.split("x"))


def read(case: str, kernel: Any, arch: int) -> Report:
    ptx, meta = kernel.asm["ptx"], kernel.metadata
    gpu = re.search(r"\.target (\w+)", ptx)
    assert gpu is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        log = _run(
            get_ptxas(arch).path,
            "-v",
            f"--gpu-name={gpu[1]}",
            str(source),
            "-o",
            str(Path(folder) / "out.cubin"),
        )
    stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert stack is not None
    assert registers is not None
    return Report(
        case=case,
        kernel=meta.name,
        arch=arch,
        warps=meta.num_warps,
        registers=int(registers[1]),
        spilled=sum(int(value) for value in stack.groups()),
        shared=meta.shared,
        fits=meta.shared <= shared_memory(arch),
        wgmma=ptx.count("wgmma.mma_async"),
        tcgen05=ptx.count("tcgen05.mma"),
        mma=ptx.count("mma.sync"),
        float8=len(re.findall(r"mma\S*(?:e4m3\S*e4m3|kind::f8f6f4)", ptx)),
        tma_load=len(re.findall(r"cp\.async\.bulk\.tensor\S*\.shared::c\w+\.global", ptx)),
        tma_store=len(re.findall(r"cp\.async\.bulk\.tensor\S*\.global\.shared", ptx)),
        cp_async=len(re.findall(r"cp\.async\.c[ag]", ptx)),
        wide_loads=len(re.findall(r"ld\.global\S*\.(?:v4\.b32|v2\.b64)", ptx)),
        detours=_detours(kernel.asm["ttgir"]),
        fenced=_is_fenced(ptx),
        shown=_shows_barriers(ptx),
        serialized="serialized" in log,
        specialized="ttg.warp_specialize(" in kernel.asm["ttgir"],
        torn=_torn(kernel.asm["ttgir"]),
        role_registers=[int(n) for n in re.findall(r"setmaxnreg\S+\s+(\d+)", ptx)],
        mbarriers={
            name: len(re.findall(rf"mbarrier\.{operation}\.shared", ptx))
            for name, operation in MBARRIERS.items()
        },
        instructions=len(re.findall(r"^\s+[a-z@].*;", ptx, re.M)),
    )
