"""What a measurement was made on: device, versions, commit."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("benchmarks", "csrc", "moe_kernels", "moe_parallel")
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".json")
MODULES = ("torch", "triton", "transformers", "moe_kernels", "numpy")
# other libraries, by what pip calls them
PEERS = (
    "scattermoe",
    "liger-kernel",
    "sonic-moe",
    "sonicmoe",
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "megablocks",
    "transformer-engine",
    "triton-kernels",
    "kernels",
)
# settings that change times
VARIABLES = (
    "MOE_KERNELS_BACKEND",
    "MOE_KERNELS_KEEP_BUFFERS",
    "LIGER_FUSED_MOE_AUTOTUNE",
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "KMP_AFFINITY",
    "LD_PRELOAD",
    "THP_MEM_ALLOC_ENABLE",
    "ONEDNN_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_CUDA_ALLOC_CONF",
)


def describe(device: torch.device) -> dict[str, Any]:
    """Everything that a reader needs in order to judge a figure, as JSON values."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
        "device": _cuda(device) if device.type == "cuda" else _cpu(),
        "clocks": _cuda_clocks(device) if device.type == "cuda" else _cpu_clocks(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {module: _version(module) for module in MODULES}
        | _peers(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "load_average": os.getloadavg()[0],
        # what ranks talk through by sockets may be slowed to the speed of a network
        "loopback": _output("tc", "qdisc", "show", "dev", "lo"),
    }


def slug(device: dict[str, Any]) -> str:
    """A folder name for results of a device: "nvidia-h200", "cpu-amd-epyc"."""
    name = re.sub(r"[^a-z0-9]+", "-", str(device["name"]).lower()).strip("-")
    return name if device["type"] == "cuda" else f"cpu-{name}"


def commit() -> dict[str, Any]:
    """Hash of the checked out commit, whether tracked files differ from it, and a digest of the
    sources, which tells a copy without git from others."""
    hash_ = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return {"hash": hash_ or None, "dirty": bool(changed), "sources": digest(ROOT)}


def digest(root: Path) -> str:
    """Of the names and contents of source files; results are none."""
    seen = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*")):
            name = path.relative_to(root)
            if path.suffix in SUFFIXES and name.parts[:2] != ("benchmarks", "results"):
                content = path.read_bytes()
                seen.update(f"{name.as_posix()} {len(content)}\n".encode() + content)
    return seen.hexdigest()[:16]


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _version(module: str) -> str | None:
    try:
        loaded = importlib.import_module(module)
    except ImportError:
        return None
    own = getattr(loaded, "__version__", None)
    if own is None:
        own = getattr(importlib.import_module(f"{module}._version"), "__version__", None)
    return str(own)


def _peers() -> dict[str, str]:
    """Those that are installed; they are not imported for this."""
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _cpu_clocks() -> dict[str, Any]:
    return {"mhz": [float(mhz) for mhz in re.findall(r"cpu MHz\s*: ([\d.]+)", _cpuinfo())]}


def _kernel_level() -> str | None:
    """The instruction set of the C++ kernels; None where they are not built."""
    try:
        return str(importlib.import_module("moe_kernels._C").cpu_capability())
    except ImportError:
        return None


def _cpu() -> dict[str, Any]:
    text = _cpuinfo()
    model = re.search(r"model name\s*: (.*)", text)
    return {
        "type": "cpu",
        "name": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": _kernel_level(),
    }


def _cuda(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }


@contextmanager
def _busy(device: torch.device) -> Iterator[None]:
    """The GPU multiplies meanwhile, for some tenths of a second."""
    a = torch.randn(8192, 8192, device=device).bfloat16()
    out = torch.empty_like(a)
    for _ in range(200):
        torch.mm(a, a, out=out)
    yield
    torch.cuda.synchronize(device)


def _cuda_clocks(device: torch.device) -> dict[str, str]:
    """What nvidia-smi says under load: a GPU that waits is slower than one that is measured."""
    fields = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "driver_version")
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    command = ["nvidia-smi", *([f"--id=GPU-{uuid}"] if uuid else [])]
    command += [f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    with _busy(device):
        answer = _output(*command)
    values = [value.strip() for value in answer.split(",")] if answer else []
    return dict(zip(fields, values, strict=False))
