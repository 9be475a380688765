"""Drives CMake, which builds ``moe_kernels._C`` against the torch of this environment.

Metadata is in pyproject.toml; sources, flags and CUDA architectures are in CMakeLists.txt.

Environment:
    CXX                     the C++ compiler (C++20: GCC 11, Clang 14 or newer), and flags after it.
    MOE_KERNELS_CUDA        auto (default): use CUDA if torch and a toolkit have it; on: fail if
                            they do not; off; compile: as off, and compile the CUDA sources
                            without linking them, a check where torch has no CUDA.
    MOE_KERNELS_CUDA_ARCHS  in CMake's notation, "90a-real" or "80;90a-real" for example.
    MOE_KERNELS_EMULATE_AMX 1: the CPU kernels for AMX call an emulation of its instructions. For
                            tests, on a processor with AVX-512 BF16.
    CUDACXX, CUDA_HOME      where nvcc is, if it is not on PATH.
    CXXFLAGS, LDFLAGS, CUDAFLAGS
                            more flags; builds with others lie beside each other.
    MAX_JOBS                parallel compilations, or CMAKE_BUILD_PARALLEL_LEVEL; all processors by
                            default.

One that is empty counts as unset.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, NoReturn

try:
    from setuptools import Extension, __version__, setup
    from setuptools.command.build_ext import build_ext
    from setuptools.command.build_py import build_py
    from setuptools.command.dist_info import dist_info
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "setuptools":
        raise
    raise SystemExit(
        "\nmoe-kernels: building needs setuptools 77 or newer, and this Python has none.\n"
        "Remedy: pip install 'setuptools>=77' cmake ninja pybind11\n"
    ) from None

ROOT = Path(__file__).parent.resolve()


def stop(message: str) -> NoReturn:
    raise SystemExit(f"\nmoe-kernels: {message}\n")


def setting(name: str, default: str, pattern: str, requirement: str) -> str:
    """An environment variable whose whole value fits ``pattern``; empty is as good as unset."""
    value = os.environ.get(name) or default
    if not re.fullmatch(pattern, value):
        stop(f"{name} must be {requirement}; got {value!r}")
    return value


def find_tool(program: str) -> str:
    """A program beside this interpreter (pip installs cmake and ninja there), or else on PATH."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    return shutil.which(program, path=path) or stop(
        f"building needs {program}, which was not found. Remedy: pip install {program}"
    )


def cxx_words() -> list[str]:
    """$CXX, split as a shell does."""
    text = os.environ.get("CXX", "")
    try:
        return shlex.split(text)
    except ValueError as error:
        stop(f"CXX must be a compiler and flags after it, as a shell reads them; {error}: {text}")


def find_cxx() -> str:
    """The C++ compiler that $CXX names and the flags after it, or else one on PATH, as a list of
    CMake's. CMakeLists.txt adds ccache itself."""
    words = cxx_words()
    named = [word for word in words if Path(word).name not in ("ccache", "sccache")]
    for name in named[:1] or ["c++", "g++", "clang++"]:
        if path := shutil.which(name):
            return ";".join([path, *named[1:]])
    stop(
        f"building needs a C++20 compiler; {f'CXX={named[0]}' if named else 'c++, g++ or clang++'} "
        "was not found. Remedy: install one (the package g++ of most systems), or set CXX to one."
    )


def find_nvcc() -> str | None:
    """nvcc: $CUDACXX, or that of $CUDA_HOME, or the one on PATH, or that of /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named := os.environ.get("CUDACXX") or (home and f"{home}/bin/nvcc"):
        return shutil.which(named)
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def why_no_cuda(nvcc: str | None, torch_cuda: str | None) -> str:
    """Why a build with `nvcc` for a torch built with CUDA `torch_cuda` is impossible, or ""."""
    if torch_cuda is None:
        return "this torch is built without CUDA; install a CUDA build of torch"
    if nvcc is None:
        return (
            f"no nvcc was found by CUDACXX, CUDA_HOME, PATH or in /usr/local/cuda; install the "
            f"toolkit of CUDA {torch_cuda} or set CUDA_HOME to where it is"
        )
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.\d+", text)
    if release and release[1] == torch_cuda.split(".")[0]:
        return ""
    return (
        f"{nvcc} is {release[0] if release else 'no nvcc'} and this torch is built with CUDA "
        f"{torch_cuda}; set CUDA_HOME to a toolkit of the same major version"
    )


def standard_library() -> str:
    """The file of the C++ standard library that torch has loaded, or "" off Linux."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    found = [line.split()[-1] for line in lines if "/libstdc++.so" in line]
    return next((path for path in found if Path(path).exists()), "")


class CMakeBuild(build_ext):
    def run(self) -> None:
        cxx_words()  # setuptools looks at $CXX before anything is built
        super().run()

    def build_extension(self, ext: Extension) -> None:
        mode = setting(
            "MOE_KERNELS_CUDA", "auto", "(?i:auto|on|off|compile)", "auto, on, off or compile"
        ).lower()
        arch = r"[0-9]+[af]?(-real|-virtual)?"
        architectures = setting(
            "MOE_KERNELS_CUDA_ARCHS",
            "",
            rf"(|all|all-major|native|{arch}(;{arch})*)",
            'architectures as CMake writes them, "90a-real" or "80;90a-real" for example',
        )
        emulated = setting("MOE_KERNELS_EMULATE_AMX", "0", "[01]", "0 or 1") == "1"
        jobs = setting(
            "MAX_JOBS" if os.environ.get("MAX_JOBS") else "CMAKE_BUILD_PARALLEL_LEVEL",
            str(os.cpu_count() or 1),
            "0*[1-9][0-9]*",
            "how many compilations may run side by side, 1 or more",
        )

        import torch
        from torch.utils import cpp_extension

        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            stop(
                f"building needs the headers of Python {sysconfig.get_python_version()}, and "
                f"{sysconfig.get_path('include')}/Python.h does not exist. Remedy: install your "
                "system's package python3-dev (python3-devel), or use another Python."
            )
        nvcc = None if mode == "off" else find_nvcc()
        reason = why_no_cuda(nvcc, torch.version.cuda) if mode != "off" else "as asked"
        if mode == "on" and reason:
            stop(f"MOE_KERNELS_CUDA=on, but {reason}. Without CUDA: MOE_KERNELS_CUDA=off.")
        if mode == "compile" and not nvcc:
            stop("MOE_KERNELS_CUDA=compile, but no nvcc was found; set CUDA_HOME to a toolkit.")
        cuda = "COMPILE" if mode == "compile" else "OFF" if reason else "ON"
        print(f"moe-kernels: CUDA {f'off: {reason}' if reason else f'on: {nvcc}'}", flush=True)

        # A package of pybind11 is used only where torch does not bring its own.
        pybind11 = importlib.util.find_spec("pybind11")
        settings = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "CMAKE_CXX_COMPILER": find_cxx(),
            "Python_EXECUTABLE": sys.executable,
            "MOE_KERNELS_VERSION": self.distribution.get_version(),
            "MOE_KERNELS_CUDA": cuda,
            "MOE_KERNELS_CUDA_ARCHS": architectures,
            "TORCH_VERSION": torch.__version__,
            "TORCH_INCLUDE_DIRS": ";".join(cpp_extension.include_paths()),
            "TORCH_LIBRARY_DIR": cpp_extension.TORCH_LIB_PATH,
            "TORCH_STANDARD_LIBRARY": standard_library(),
            "TORCH_CXX11_ABI": int(torch.compiled_with_cxx11_abi()),
            "PYBIND11_DIR": os.path.dirname(pybind11.origin or "") if pybind11 else "",
        }
        if cuda != "OFF":
            settings["CMAKE_CUDA_COMPILER"] = nvcc
        # CMake cannot exchange compilers in a folder: one for each combination of tools and torch.
        parts = [
            settings["CMAKE_CXX_COMPILER"],
            nvcc,
            cuda,
            sys.executable,
            cpp_extension.TORCH_LIB_PATH,
        ]
        # CMake reads these once, when it makes the folder.
        if flags := [f for n in ("CXXFLAGS", "LDFLAGS", "CUDAFLAGS") if (f := os.environ.get(n))]:
            parts += [*flags, settings["CMAKE_BUILD_TYPE"]]
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:8]
        tag = f"{sys.implementation.cache_tag}-torch{torch.__version__}-{digest}"
        build = ROOT / "build" / "cmake" / tag
        defines = [f"-D{name}={value}" for name, value in settings.items()]
        target = "_C_emulated" if emulated else "all"
        cmake = find_tool("cmake")
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "--log-level=NOTICE"]
        try:
            subprocess.run([*configure, *defines], check=True)
            make = [cmake, "--build", str(build), "--parallel", jobs, "--target", target]
            subprocess.run(make, check=True)
        except subprocess.CalledProcessError as error:
            stop(f"`{shlex.join(error.cmd[:3])} ...` failed; the reason is above.")

        path = Path(self.get_ext_fullpath(ext.name))
        self.mkpath(str(path.parent))
        self.force = True  # copy whatever the dates say: another torch may have been here before
        self.copy_file(str((build / "emulated" if emulated else build) / path.name), str(path))

    def copy_file(self, infile: str, outfile: str, *args: Any, **kwargs: Any) -> tuple[str, bool]:
        """Put the extension there at once: what imports it meanwhile finds the old or the new one,
        whole."""
        path = Path(outfile)
        part = path.with_name(f".{os.getpid()}.{path.name}")
        super().copy_file(infile, str(part), *args, **kwargs)
        os.replace(part, path)
        return outfile, True


class FreshPackages(build_py):
    def run(self) -> None:
        """Without modules and tables that an earlier build copied and that are no more."""
        if not self.editable_mode and Path(self.build_lib).resolve() != ROOT:
            for package in ("moe_kernels", "moe_parallel"):
                shutil.rmtree(Path(self.build_lib, package), ignore_errors=True)
        super().run()


class Metadata(dist_info):
    def run(self) -> None:
        """Which pip asks for first. It would exchange a torch that they do not allow for another,
        and build the extension against the one before."""
        from packaging.requirements import Requirement  # setuptools brings it

        allowed = [Requirement(text) for text in self.distribution.install_requires]
        (torch,) = [requirement for requirement in allowed if requirement.name == "torch"]
        found = importlib.metadata.version("torch")
        if not torch.specifier.contains(found, prereleases=True):
            stop(
                f"torch must be {torch.specifier}; found {found}. Remedy: pip install '{torch}', "
                "or try this one by python setup.py build_ext --inplace"
            )
        super().run()


if importlib.util.find_spec("torch") is None:
    stop(
        "the extension is built against the torch you will use, and this Python finds no torch;\n"
        "pip's and build's own environments for building never have one.\n"
        "Remedy: pip install torch setuptools cmake ninja pybind11\n"
        "        pip install --no-build-isolation .\n"
        "        (or python -m build --no-isolation)"
    )
if int(__version__.split(".")[0]) < 77:
    stop(f"building needs setuptools 77; found {__version__}. Remedy: pip install -U setuptools")
setup(
    ext_modules=[Extension("moe_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": FreshPackages, "dist_info": Metadata},
)
