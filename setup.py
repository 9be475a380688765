"""Drives CMake, which builds ``moe_kernels._C`` against the torch of this environment.

Metadata is in pyproject.toml; sources, flags and CUDA architectures are in CMakeLists.txt.

Environment:
    CXX                     the C++ compiler (C++20: GCC 11, Clang 14 or newer).
    MOE_KERNELS_CUDA        auto (default): with CUDA if torch and a toolkit have it; on: fail if not; off.
    MOE_KERNELS_CUDA_ARCHS  CMake's notation, for example "90a" or "80;90a" (the default is in CMakeLists.txt).
    MAX_JOBS                parallel compilations; all processors by default.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def stop(message: str) -> None:
    raise SystemExit(f"\nmoe-kernels: {message}\n")


def which(program: str) -> str | None:
    """A program beside this interpreter (pip installs cmake and ninja there), or else on PATH."""
    beside = str(Path(sys.executable).parent)
    return shutil.which(program, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))


def tool(program: str) -> str:
    found = which(program)
    if not found:
        stop(f"building needs {program}, which was not found. Remedy: pip install {program}")
    return found


def cxx_compiler() -> str:
    """The C++ compiler, from $CXX (arguments and launchers allowed) or PATH."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    found = next(filter(None, map(shutil.which, wanted[-1:] or ["c++", "g++", "clang++"])), None)
    if not found:
        tried = f"CXX={os.environ['CXX']}" if wanted else "c++, g++ and clang++"
        stop(
            f"building needs a C++20 compiler; tried {tried} and found none. Remedy: install one "
            "(for example the package g++ of your system) or set CXX to its path."
        )
    return found


def cuda_compiler() -> tuple[str | None, str]:
    """The nvcc to build with, or None and the reason why the build goes without CUDA."""
    import torch

    mode = os.environ.get("MOE_KERNELS_CUDA", "auto").lower()
    if mode not in ("auto", "on", "off"):
        stop(f"MOE_KERNELS_CUDA must be auto, on or off; got {mode!r}")
    if mode == "off":
        return None, "MOE_KERNELS_CUDA=off"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = os.environ.get("CUDACXX") or (
        shutil.which("nvcc", path=f"{home}/bin") if home else which("nvcc")
    )
    nvcc = nvcc or shutil.which("nvcc", path="/usr/local/cuda/bin")
    reason = ""
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    elif not nvcc or not shutil.which(nvcc):
        reason = (
            f"no CUDA toolkit was found (nvcc on PATH, CUDA_HOME or CUDACXX); "
            f"install CUDA {torch.version.cuda}, the version of this torch"
        )
    else:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)\.\d+", text)
        if not release or release[1] != torch.version.cuda.split(".")[0]:
            found = release[0] if release else "of an unknown version"
            reason = (
                f"{nvcc} is {found}, but torch {torch.__version__} is built with "
                f"CUDA {torch.version.cuda}; set CUDA_HOME to a toolkit of the same major version"
            )
    if reason and mode == "on":
        stop(f"MOE_KERNELS_CUDA=on, but {reason}. Or build for the CPU with MOE_KERNELS_CUDA=off.")
    return (None, reason) if reason else (nvcc, "")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import torch
        from torch.utils import cpp_extension

        cmake, ninja, cxx = tool("cmake"), tool("ninja"), cxx_compiler()
        nvcc, why_not = cuda_compiler()
        print(f"moe-kernels: CUDA {'on, ' + nvcc if nvcc else 'off: ' + why_not}", flush=True)
        pybind11 = importlib.util.find_spec(
            "pybind11"
        )  # torch's own copy comes first, if it has one
        version = self.distribution.get_version()
        name = f"{sys.implementation.cache_tag}-torch{torch.__version__}{'-cuda' if nvcc else ''}"
        build = ROOT / "build" / "cmake" / name
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        variables = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_CXX_COMPILER": cxx,
            "Python_EXECUTABLE": sys.executable,
            "MOE_KERNELS_VERSION": version,
            "MOE_KERNELS_OUTPUT_DIR": output.parent,
            "MOE_KERNELS_WITH_CUDA": "ON" if nvcc else "OFF",
            "MOE_KERNELS_CUDA_ARCHS": os.environ.get("MOE_KERNELS_CUDA_ARCHS", "") if nvcc else "",
            "TORCH_VERSION": torch.__version__,
            "TORCH_INCLUDE_DIRS": ";".join(cpp_extension.include_paths()),
            "TORCH_LIBRARY_DIR": cpp_extension.TORCH_LIB_PATH,
            "TORCH_CXX11_ABI": int(torch.compiled_with_cxx11_abi()),
            "PYBIND11_INCLUDE_DIR": Path(pybind11.origin).parent / "include" if pybind11 else "",
        }
        if nvcc:
            variables["CMAKE_CUDA_COMPILER"] = nvcc
        defines = [f"-D{key}={value}" for key, value in variables.items()]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        try:
            subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *defines], check=True)
            subprocess.run([cmake, "--build", build, "--parallel", jobs], check=True)
        except subprocess.CalledProcessError as error:
            stop(f"{shlex.join(map(str, error.cmd[:3]))} failed; its own message is above.")


if importlib.util.find_spec("torch") is None:
    stop(
        "the extension is built against the torch you will use, and torch is not importable here.\n"
        "Remedy: pip install torch setuptools cmake ninja pybind11 && pip install --no-build-isolation ."
    )
setup(ext_modules=[Extension("moe_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
