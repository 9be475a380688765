"""What is shipped, and what a user reads when the build or the import cannot work."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import moe_kernels
import moe_kernels._C as native

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MOE_KERNELS_", "CUDA", "CXX"))
    }
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=environment.pop("cwd", ROOT),
        env=inherited | environment,
        capture_output=True,
        text=True,
    )


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ("setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder)
    return run(*command, **environment)


# ------------------------------------------------------------------------------------- the package


def test_version_is_the_same_everywhere():
    assert re.fullmatch(r"\d+\.\d+\.\d+", moe_kernels.__version__)
    assert native.build_info()["version"] == moe_kernels.__version__
    try:
        installed = importlib.metadata.version("moe-kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    assert installed == moe_kernels.__version__


def test_build_info_describes_this_build():
    info = native.build_info()
    assert info["torch"] == torch.__version__
    assert re.match(r"(GNU|Clang|AppleClang|IntelLLVM) \d+\.", info["compiler"])
    assert (info["cuda"] is None) == (info["cuda_architectures"] == [])
    if torch.version.cuda is None:
        assert info["cuda"] is None


def test_cmake_lists_every_source():
    listed = set(re.findall(r"csrc/\S+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text()))
    present = {str(p.relative_to(ROOT)) for e in ("cpp", "cu") for p in ROOT.glob(f"csrc/**/*.{e}")}
    assert listed == present


def test_every_requirement_has_one_pin():
    requirements = PYPROJECT["project"]["dependencies"] + PYPROJECT["build-system"]["requires"]
    for extra in PYPROJECT["project"]["optional-dependencies"].values():
        requirements += extra
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in requirements} - {"moe-kernels"}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==")[0] for line in lines if "==" in line]
    assert sorted(pins) == sorted(names)


def test_numpy_is_required_for_the_bytes_of_tensors():
    sources = [*ROOT.glob("moe_kernels/**/*.py"), *ROOT.glob("moe_parallel/**/*.py")]
    assert [path for path in sources if ".numpy()" in path.read_text()]
    assert "numpy" in PYPROJECT["project"]["dependencies"]


def requirements_of(extra: str) -> list[Requirement]:
    """What an extra asks for, with that of the extras it names."""
    found = []
    for line in PYPROJECT["project"]["optional-dependencies"][extra]:
        requirement = Requirement(line)
        if requirement.name == "moe-kernels":
            found += [inner for name in requirement.extras for inner in requirements_of(name)]
        else:
            found.append(requirement)
    return found


@pytest.mark.parametrize("extra", ["triton", "bench", "test", "dev"])
@pytest.mark.parametrize(
    "version",
    ["3.6.0", "3.7.1", "3.8.0", "3.9.0"],
    ids=["torch 2.11", "torch 2.13", "torch 2.14", "torch 2.15"],
)
def test_extras_take_the_triton_that_torch_demands(extra, version):
    specifiers = [r.specifier for r in requirements_of(extra) if r.name == "triton"]
    assert specifiers
    assert all(version in specifier for specifier in specifiers)


def test_only_the_loader_and_the_dispatch_import_the_extension():
    # import-linter sees Python files alone.
    importers = set()
    for path in [*ROOT.glob("moe_kernels/**/*.py"), *ROOT.glob("moe_parallel/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                modules = [ast.unparse(node)]
            else:
                continue
            if any(m == "moe_kernels._C" or m.startswith("moe_kernels._C.") for m in modules):
                importers.add(path.relative_to(ROOT).as_posix())
    allowed = ("moe_kernels/ops/_library.py", "moe_parallel/dispatch/")
    assert not [path for path in importers if not path.startswith(allowed)]


def test_wheel_holds_both_packages_and_nothing_else(tmp_path):
    # As the extension that is tested: built with CUDA, all sources would be compiled again.
    off = torch.version.cuda is not None and native.build_info()["cuda"] is None
    mode = {"MOE_KERNELS_CUDA": "off"} if off else {}
    result = run("setup.py", "-q", "bdist_wheel", "--dist-dir", tmp_path, **mode)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"moe_kernels", "moe_parallel"}
    assert {"moe_kernels/py.typed", "moe_parallel/py.typed"} <= set(names)
    tables = ROOT.glob("moe_kernels/triton/configs/*.json")
    assert {str(path.relative_to(ROOT)) for path in tables} <= set(names)
    assert "moe_kernels/triton/configs/sm_90.json" in names
    assert len([name for name in names if re.fullmatch(r"moe_kernels/_C\..*\.(so|pyd)", name)]) == 1
    assert [name for name in names if name.endswith("licenses/LICENSE")]
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h", ".in", ".txt.in"))]


# ------------------------------------------------------------------------------- builds that cannot


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"CXX": "/nonexistent/c++"}, ["C++20 compiler", "CXX=/nonexistent/c++", "Remedy"]),
        ({"CXX": "g++ '-O1"}, ["CXX must be a compiler", "No closing quotation: g++ '-O1"]),
        (
            {"MOE_KERNELS_CUDA": "on", "CUDA_HOME": "/nonexistent"},
            ["MOE_KERNELS_CUDA=on, but", "CUDA", "MOE_KERNELS_CUDA=off"],
        ),
        ({"MOE_KERNELS_CUDA": "compile", "CUDA_HOME": "/nonexistent"}, ["no nvcc", "CUDA_HOME"]),
        ({"MOE_KERNELS_CUDA": "maybe"}, ["auto, on, off or compile", "'maybe'"]),
        ({"MOE_KERNELS_CUDA_ARCHS": "9.0a"}, ["MOE_KERNELS_CUDA_ARCHS must", "'9.0a'"]),
        ({"MOE_KERNELS_EMULATE_AMX": "yes"}, ["MOE_KERNELS_EMULATE_AMX must", "'yes'"]),
        ({"MAX_JOBS": "0"}, ["MAX_JOBS must", "'0'"]),
    ],
    ids=["compiler", "quotes", "cuda", "nvcc", "mode", "architectures", "emulation", "jobs"],
)
def test_build_refuses_with_one_message(tmp_path, environment, said):
    result = build(tmp_path, **environment)
    assert result.returncode != 0
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("moe-kernels:")]
    for words in said:
        assert words in message
    assert "Traceback" not in result.stderr


def test_a_torch_that_pip_would_exchange_is_refused_first(tmp_path):
    command = ("setup.py", "-q", "dist_info", "--output-dir", tmp_path)
    assert run(*command).returncode == 0
    other = tmp_path / "torch-2.99.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.99.0\n")
    result = run(*command, PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("moe-kernels:")]
    for words in ("torch must be", "found 2.99.0", "pip install 'torch<"):
        assert words in message
    assert "Traceback" not in result.stderr


def test_cuda_auto_goes_without_and_says_why(tmp_path):
    # Asked for a compiler that is not there, it stops after it has decided on CUDA.
    result = build(tmp_path, CUDA_HOME="/nonexistent", CXX="/nonexistent")
    reason = "built without CUDA" if torch.version.cuda is None else "no nvcc was found"
    assert re.search(f"moe-kernels: CUDA off: .*{reason}", result.stdout), result.stdout


def configuration(**environment: str) -> list[str]:
    """The command by which a build without CUDA has CMake configure."""
    code = """
import json, runpy, subprocess, sys
sys.argv = ["setup.py", "-q", "build_ext"]
subprocess.run = lambda command, **options: sys.exit(json.dumps(command))
runpy.run_path("setup.py", run_name="__main__")
"""
    result = run("-c", code, MOE_KERNELS_CUDA="off", **environment)
    return json.loads(result.stderr.splitlines()[-1])


@pytest.mark.parametrize("name", ["CXXFLAGS", "LDFLAGS", "CUDAFLAGS"])
def test_builds_with_other_flags_lie_beside_each_other(name):
    flags = dict.fromkeys(("CXXFLAGS", "LDFLAGS", "CUDAFLAGS"), "")
    folders = [
        command[command.index("-B") + 1]
        for command in (configuration(**flags), configuration(**flags | {name: "-g"}))
    ]
    assert folders[0] != folders[1]


def test_flags_after_the_compiler_reach_cmake():
    command = configuration(CXX="ccache sh -DA=1 -g")  # a compiler is only looked for here
    assert f"-DCMAKE_CXX_COMPILER={shutil.which('sh')};-DA=1;-g" in command


def test_an_old_cmake_is_told_what_to_install(tmp_path):
    script = tmp_path / "old.cmake"
    script.write_text(f'set(CMAKE_VERSION 3.25.1)\ninclude("{ROOT}/CMakeLists.txt")\n')
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [shutil.which("cmake", path=path), "-P", script]
    result = subprocess.run(command, capture_output=True, text=True)
    assert "3.25.1; building needs 3.26" in " ".join(result.stderr.split())
    assert "pip install 'cmake>=3.26'" in result.stderr


def test_an_extension_is_replaced_as_a_whole(tmp_path):
    """What imports it meanwhile may not find half of it."""
    code = """
import os, runpy, setuptools, sys
from pathlib import Path
given = {}
setuptools.setup = given.update
runpy.run_path("setup.py")
new, old = map(Path, sys.argv[1:])
moved = os.replace
def replace(*paths):
    print(old.read_text(), end=" ")
    moved(*paths)
os.replace = replace
build = given["cmdclass"]["build_ext"](setuptools.Distribution())
build.copy_file(str(new), str(old))
print(old.read_text(), os.listdir(old.parent) == [old.name])
"""
    new, old = tmp_path / "new.so", tmp_path / "place" / "_C.so"
    new.write_text("new")
    old.parent.mkdir()
    old.write_text("old")
    assert run("-c", code, new, old).stdout.split() == ["old", "new", "True"]


def test_what_is_no_more_is_not_shipped(tmp_path):
    stale = [tmp_path / "moe_kernels/triton/configs/sm_1.json", tmp_path / "moe_parallel/gone.py"]
    for path in stale:
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    result = run("setup.py", "-q", "build_py", "--build-lib", tmp_path)
    assert result.returncode == 0, result.stderr
    assert not [path for path in stale if path.exists()]
    assert (tmp_path / "moe_kernels/triton/configs/sm_90.json").exists()
    assert (tmp_path / "moe_parallel/layers.py").exists()


def test_build_without_torch_names_the_command():
    hide = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version']; "
    result = run("-c", hide + "runpy.run_path('setup.py')")
    assert result.returncode != 0
    assert "no torch" in result.stderr
    assert "pip install --no-build-isolation ." in result.stderr
    assert "python -m build --no-isolation" in result.stderr
    assert "Traceback" not in result.stderr


def test_build_without_setuptools_names_the_command():
    hide = "import runpy, sys; sys.modules['setuptools'] = None; sys.argv = ['setup.py', 'build']; "
    result = run("-c", hide + "runpy.run_path('setup.py')")
    assert result.returncode != 0
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("moe-kernels:")]
    assert "needs setuptools 77" in message
    assert "pip install 'setuptools>=77'" in result.stderr
    assert "Traceback" not in result.stderr


# ------------------------------------------------------------------------------ imports that cannot


def import_alone(tmp_path, extension, code="", **environment):
    """Import a copy of the package that has no extension, or this file in its place."""
    sources = shutil.ignore_patterns("_C.*", "__pycache__")
    shutil.copytree(ROOT / "moe_kernels", tmp_path / "moe_kernels", ignore=sources)
    if extension:
        (tmp_path / "moe_kernels" / extension[0]).write_text(extension[1])
    # an editable installation would find the extension of the checkout
    alone = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in "
        f"getattr(f, '__module__', '')]; import moe_kernels\n{code}"
    )
    return run("-c", alone, PYTHONPATH=str(tmp_path), cwd=str(tmp_path), **environment)


@pytest.mark.parametrize(
    ("extension", "said"),
    [
        (None, "extension is missing"),
        (("_C.abi3.so", "no shared library"), "does not load"),
        (("_C.py", "def build_info():\n    return {'torch': '1.13.1'}\n"), "torch 1.13.1"),
    ],
    ids=["missing", "damaged", "other torch"],
)
def test_import_refuses_with_the_remedy(tmp_path, extension, said):
    result = import_alone(tmp_path, extension)
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError: moe_kernels:")
    assert said in message
    assert "pip install --no-build-isolation ." in message
    if extension:
        assert torch.__version__ in message


def test_a_missing_extension_is_told_from_one_of_another_python(tmp_path):
    result = import_alone(tmp_path, ("_C.cpython-27-x86_64-linux-gnu.so", ""))
    message = result.stderr.splitlines()[-1]
    said = f"missing in {tmp_path / 'moe_kernels'}, where _C.cpython-27-x86_64-linux-gnu.so is for"
    assert said in message


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_definitions_need_no_extension_that_loads(tmp_path, backend):
    code = """
import sys, torch
print(moe_kernels.topk_router(torch.tensor([[1.0, 3.0, 2.0]]), 2).topk_ids.tolist())
from moe_parallel.dispatch.native import extension
try:
    extension()
except ImportError as error:
    print(error)
"""
    damaged = ("_C.abi3.so", "no shared library")
    shutil.copytree(ROOT / "moe_parallel", tmp_path / "moe_parallel")
    result = import_alone(tmp_path, damaged, code, MOE_KERNELS_BACKEND=backend)
    assert result.stdout.startswith("[[1, 2]]\nAllToAllDispatcher: "), result.stderr
    assert "does not load" in result.stdout
    assert "pip install --no-build-isolation ." in result.stdout


def test_the_definitions_do_not_hide_an_extension_of_another_torch(tmp_path):
    extension = ("_C.py", "def build_info():\n    return {'torch': '1.13.1'}\n")
    result = import_alone(tmp_path, extension, MOE_KERNELS_BACKEND="reference")
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError: moe_kernels: the compiled extension was built for")
    assert f"remove {tmp_path / 'moe_kernels' / '_C.py'}" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MOE_KERNELS_BACKEND", "cuda"),
        ("MOE_KERNELS_CHECK", "true"),
        ("MOE_KERNELS_CPU_CAPABILITY", "avx3"),
        ("MOE_KERNELS_KEEP_BUFFERS", "no"),
    ],
)
def test_import_refuses_settings_that_would_be_ignored(name, value):
    result = run("-c", "import moe_kernels", PYTHONPATH=str(ROOT), **{name: value})
    message = result.stderr.splitlines()[-1]
    assert message.startswith(f"ValueError: {name} must be ")
    assert message.endswith((f"got {value!r}", f'got "{value}"'))


def test_triton_alone_needs_no_extension(tmp_path):
    """CUDA tensors have the Triton kernels then, and those of a CPU the definitions."""
    code = """
import torch
has = torch._C._dispatch_has_kernel_for_dispatch_key
ops = ("moe_kernels::topk_router", "moe_kernels::fused_experts")
print([has(op, key) for op in ops for key in ("CUDA", "CPU")])
logits = torch.randn(3, 4)
with torch.inference_mode():
    print(bool((moe_kernels.topk_router(logits, 2).topk_ids == logits.topk(2).indices).all()))
"""
    result = import_alone(tmp_path, None, code, MOE_KERNELS_BACKEND="triton")
    assert result.stdout.splitlines() == ["[True, False, True, False]", "True"], result.stderr


# ------------------------------------------------------------------------------------ CUDA sources

KERNEL = """
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAStream.h>

namespace moe {
namespace {
__global__ void fill_kernel(float* x, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = 1.0f;
}
}  // namespace

void fill(at::Tensor x) {
  const int n = static_cast<int>(x.numel());
  fill_kernel<<<(n + 255) / 256, 256, 0, c10::cuda::getCurrentCUDAStream()>>>(
      x.mutable_data_ptr<float>(), n);
}
}  // namespace moe
"""


@pytest.mark.slow
def test_cuda_sources_compile_for_each_architecture(tmp_path):
    if not (shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")):
        pytest.skip("needs nvcc")
    for name in ("csrc", "moe_kernels", "moe_parallel"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    # The sources of the repository, if any, and one that is always there; nothing for the CPU.
    (tmp_path / "csrc/cuda").mkdir(exist_ok=True)
    (tmp_path / "csrc/cuda/fill.cu").write_text(KERNEL)
    cmake = (ROOT / "CMakeLists.txt").read_text()
    for kind in ("CPU", "DIRECT", "CPU_SIMD", "AMX_SIMD", "AMX", "DISPATCH"):
        empty = f"set({kind}_SOURCES csrc/empty.cpp)"
        cmake = re.sub(rf"set\({kind}_SOURCES\b[^)]*\)", empty, cmake)
    cmake = cmake.replace("set(CUDA_SOURCES", "set(CUDA_SOURCES csrc/cuda/fill.cu ")
    (tmp_path / "CMakeLists.txt").write_text(cmake)
    for name in ("bindings.cpp", "empty.cpp"):
        (tmp_path / "csrc" / name).write_text("")

    command = ("setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib")
    result = run(*command, MOE_KERNELS_CUDA="compile", cwd=str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    (compiled,) = tmp_path.glob("build/cmake/*/CMakeFiles/cuda_kernels.dir/csrc/cuda/fill.cu.o")
    binary = compiled.read_bytes()
    for architecture in (b"sm_80", b"sm_90a", b"sm_100a"):
        assert architecture in binary
