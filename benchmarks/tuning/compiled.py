"""What the compiler makes of configurations, in processes that need no GPU.

    python -m benchmarks.tuning.compiled --arch 90 < jobs > reports

A job, a line of JSON, names a problem and a configuration; so does the report that answers it. What
is compiled here is found in Triton's cache when it is launched.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.architectures import shared_memory
from benchmarks.environment import ROOT
from benchmarks.registry import DTYPES, Shape
from moe_kernels.triton._config_tables import Config


@dataclass(frozen=True)
class Compiled:
    """What is known of a compiled configuration; ``problem`` says why it is not to be tried."""

    problem: str = ""
    registers: int = 0
    shared: int = 0


def small_shape(shape: Shape) -> Shape:
    """A layer of the same kernels with little memory: two experts, as many rows each."""
    rows = max(1, -(-shape["T"] * shape["K"] // shape["E"]))
    experts = min(2, shape["E"])
    return Shape({**shape.sizes, "T": rows * experts, "E": experts, "K": 1})


def compile_all(
    kernel: str,
    part: int,
    shape: Shape,
    dtype: str,
    configs: Sequence[Config],
    arch: int,
    *,
    processes: int,
    seconds: float,
) -> dict[Config, Compiled]:
    """Compile one problem with every configuration, in ``processes`` at a time.

    Those that are not compiled within ``seconds``, or that the compiler dies of, have that as their
    problem.
    """
    processes = max(1, min(processes, len(configs)))
    jobs = [
        json.dumps(
            {
                "kernel": kernel,
                "part": part,
                "sizes": dict(small_shape(shape).sizes),
                "dtype": dtype,
                "config": dataclasses.asdict(config),
            }
        )
        for config in configs
    ]
    found = {config: Compiled("was not compiled in time") for config in configs}
    workers = [_Worker(arch, jobs[i::processes], seconds) for i in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        for line in worker.lines:
            answer = json.loads(line)
            config = Config(**answer.pop("config"))
            found[config] = Compiled(**answer)
    return found


class _Worker(threading.Thread):
    """One process and the lines that it wrote before it ended, or was ended."""

    def __init__(self, arch: int, jobs: Sequence[str], seconds: float) -> None:
        super().__init__(daemon=True)
        self._command = [sys.executable, "-m", "benchmarks.tuning.compiled", "--arch", str(arch)]
        self._jobs, self._seconds = jobs, seconds
        self.lines: list[str] = []

    def run(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        limit = threading.Timer(self._seconds, process.kill)
        limit.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n".join(self._jobs) + "\n")
            process.stdin.close()
            self.lines = [line for line in process.stdout if line.startswith("{")]
        except BrokenPipeError:
            pass
        finally:
            limit.cancel()
            process.wait()


def judge(report: Mapping[str, Any], memory: int, specialized: bool) -> str:
    """Why a compiled kernel is not worth a try, or ""."""
    if report["spilled"]:
        return f"spills {report['spilled']} bytes of registers"
    if report["shared"] > memory:
        return f"needs {report['shared']} bytes of shared memory; there are {memory}"
    if report["serialized"]:
        return "products wait for one another"
    if report["torn"]:
        return f"copies {report['torn']} tiles of another size than their descriptors have"
    if specialized and not report["specialized"]:
        return "has no warps with roles, although it is asked for"
    return ""


def _answer(job: Mapping[str, Any], arch: int, kernels: list[Any]) -> dict[str, Any]:
    """Compile one job; ``kernels`` are those that the driver compiles."""
    import torch

    from benchmarks.compile_only import read
    from benchmarks.tuning.problems import PROBLEMS, Layer

    layer = Layer(Shape(job["sizes"]), DTYPES[job["dtype"]], torch.device("cpu"), filled=False)
    problem = PROBLEMS[job["kernel"]][job["part"]].make(layer)
    kernels.clear()
    cut = Config(**job["config"])
    problem.run(cut)
    # its own: backward through the down-projection runs a weight gradient too
    in_gluon = {"grouped_gemm": ["gemm"], "scaled_grouped_gemm": ["scaled", "scaled_up"]}
    names = [f"_hopper_{role}_kernel" for role in in_gluon.get(job["kernel"], [job["kernel"]])]
    names += ["_scaled_up_kernel", f"_{job['kernel']}_kernel"]
    (kernel,) = (kernel for kernel in kernels if kernel.metadata.name in names)
    report = dataclasses.asdict(read(job["kernel"], kernel, arch))
    # the activation in float8 is left to warps that are all alike
    specialized = cut.warp_specialize != "no" and kernel.metadata.name != "_scaled_up_kernel"
    return {
        "problem": judge(report, shared_memory(arch), specialized),
        "registers": report["registers"],
        "shared": report["shared"],
    }


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are decorated
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", type=int, required=True)
    arch = parser.parse_args().arch
    from benchmarks.compile_only import compile_only

    with compile_only(arch) as kernels:
        for line in sys.stdin:
            job = json.loads(line)
            try:
                answer = _answer(job, arch, kernels)
            except Exception as error:  # the compiler's own failure is an answer, too
                text = (str(error).strip() or "?").split("\n")[0][:200]
                answer = {"problem": f"does not compile: {type(error).__name__}: {text}"}
            print(json.dumps({**answer, "config": job["config"]}), flush=True)


if __name__ == "__main__":
    main()
