"""The level of the CPU kernels for Intel's AMX: when it is offered, and what its instruction sums.

`make test-amx` runs these, and all other tests of the CPU kernels, with the instructions emulated.
"""

import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_kernels
from moe_kernels import _C, reference
from tests.kernels.accuracy import assert_accurate, gradients, torch_experts

EMULATED = _C.build_info()["amx_emulated"]
OFFERED = "amx" in _C.cpu_capabilities()

on_amx = pytest.mark.skipif(not OFFERED, reason="needs AMX; see make test-amx")
on_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="needs an x86")


@pytest.fixture
def amx() -> Iterator[None]:
    before = _C.cpu_capability()
    _C.set_cpu_capability("amx")
    yield
    _C.set_cpu_capability(before)


@on_x86
def test_is_offered_only_where_it_runs() -> None:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    flags = set(re.findall(r"\w+", cpuinfo[cpuinfo.index("flags") :].split("\n")[0]))
    assert not OFFERED or EMULATED or {"amx_tile", "amx_bf16"} <= flags
    if not OFFERED:
        with pytest.raises(ValueError, match='on this processor; got "amx"'):
            _C.set_cpu_capability("amx")


@on_x86
def test_build_has_the_instruction() -> None:
    """tdpbf16ps of tiles 0 to 3 from tiles 4 and 5, and 6 or 7."""
    found = re.search(rb"\xc4\xe2[\x42\x4a]\x5c[\xc0-\xff]", Path(_C.__file__).read_bytes())
    assert (found is None) == EMULATED


def _flushed(value: Tensor) -> Tensor:
    """Float32 without denormals."""
    return torch.where(value.abs() < 2.0**-126, value * 0, value)


def _summed(a: Tensor, b: Tensor) -> Tensor:
    """a @ b over 32 values of k, as Intel's manual defines TDPBF16PS on a tile of zeros.

    Each product is exact in float64, and so is its sum with one other number of like size, so that
    rounding to float32 is that of a fused operation.
    """
    a, b = _flushed(a.float()).double(), _flushed(b.float()).double()
    sums = [torch.zeros(a.shape[0], b.shape[1]), torch.zeros(a.shape[0], b.shape[1])]
    for k in range(32):
        fused = sums[k % 2].double() + a[:, k, None] * b[k]
        sums[k % 2] = _flushed(fused.float())
    return _flushed(sums[0] + sums[1])


@on_amx
@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("size", [1.0, 2.0**-60, 2.0**-63, 2.0**-130])
def test_sums_are_those_of_the_instruction(size: float, transposed: bool) -> None:
    """Bit for bit; small numbers make small and no sums, and are denormal themselves."""
    a = (torch.randn(48, 32) * size).bfloat16()
    b = (torch.randn(1, 32, 48) * (1.0 if size < 2.0**-126 else size)).bfloat16()
    offsets = torch.tensor([0, 48], dtype=torch.int32)
    stored = b.mT.contiguous().mT if transposed else b
    out = moe_kernels.grouped_gemm(a, stored, offsets, out_dtype=torch.float32)
    assert torch.equal(out, _summed(a, b[0]))


@on_amx
@pytest.mark.usefixtures("amx")
def test_sums_follow_each_other() -> None:
    """The sums of 32 values of k each are added in the order of k."""
    a, b = torch.randn(32, 320).bfloat16(), torch.randn(1, 320, 32).bfloat16()
    out = moe_kernels.grouped_gemm(
        a, b, torch.tensor([0, 32], dtype=torch.int32), out_dtype=torch.float32
    )
    expected = torch.zeros(32, 32)
    for part, matrix in zip(a.split(32, 1), b[0].split(32, 0), strict=True):
        expected += _summed(part, matrix)
    assert torch.equal(out, expected)


@on_amx
@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize(
    ("rows", "n"), [*((m, 5000) for m in (9, 16, 17, 32, 33, 48, 49, 100, 192)), (49, 11000)]
)
def test_rows_meet_matrices_of_many_columns(rows: int, n: int) -> None:
    """Stored by rows, in several pieces of k and, in the last case, of a thread's columns too."""
    k = 600
    a, b = torch.randn(rows, k).bfloat16(), torch.randn(1, k, n).bfloat16()
    offsets = torch.tensor([0, rows], dtype=torch.int32)
    out = moe_kernels.grouped_gemm(a, b, offsets, out_dtype=torch.float32)
    error = (out.double() - a.double() @ b[0].double()).abs().max()
    assert error < 1e-3  # sums of 600 products: a wrong one is off by about 1
    for begin, end in ((0, 3), (941, 975), (1590, 2000), (4600, 5000)):
        columns = b[..., begin:end]  # rows of it stay as far apart
        some = moe_kernels.grouped_gemm(a, columns, offsets, out_dtype=torch.float32)
        assert torch.equal(some, out[:, begin:end])


@on_amx
@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("apart", [600, 2048], ids=["together", "on the same lines"])
@pytest.mark.parametrize("rows", [33, 128, 129, 300, 384, 385, 1000])
def test_many_rows_meet_columns(rows: int, apart: int) -> None:
    """In blocks of rows, and with each so many columns of a matrix that is stored by columns."""
    k, n = 600, 546
    a, b = torch.randn(rows, k).bfloat16(), torch.randn(n, apart).bfloat16()[None, :, :k].mT
    bias = torch.randn(1, n).bfloat16()
    offsets = torch.tensor([0, rows], dtype=torch.int32)
    out = moe_kernels.grouped_gemm(a, b, offsets, bias=bias, out_dtype=torch.float32)
    error = (out.double() - a.double() @ b[0].double() - bias.double()).abs().max()
    assert error < 1e-3
    some = offsets.clamp(max=40)
    few = moe_kernels.grouped_gemm(a[:40], b, some, bias=bias, out_dtype=torch.float32)
    assert torch.equal(few[: min(rows, 40)], out[:40])


@on_amx
@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("by_columns", [True, False], ids=["columns", "rows"])
@pytest.mark.parametrize(
    ("activation", "interleaved"), [("swiglu", False), ("swiglu", True), ("relu2", False)]
)
def test_experts_with_many_rows(activation: str, interleaved: bool, by_columns: bool) -> None:
    """Several blocks of rows, and several pieces of columns for each, in both directions."""
    tokens, hidden, inner, experts = 700, 70, 556, 2
    width = inner if activation == "relu2" else 2 * inner
    inputs = {
        "x": torch.randn(tokens, hidden),
        "gate_up": torch.randn(experts, hidden, width) / hidden**0.5,
        "down": torch.randn(experts, inner, hidden) / inner**0.5,
        "gate_up_bias": torch.randn(experts, width),
        "down_bias": torch.randn(experts, hidden),
    }
    inputs = {name: value.bfloat16() for name, value in inputs.items()}
    inputs["topk_ids"] = torch.randint(experts, (tokens, 1), dtype=torch.int32)
    inputs["topk_weights"] = torch.rand(tokens, 1)
    upstream = torch.randn(tokens, hidden).bfloat16()
    options: dict[str, Any] = {"activation": activation, "interleaved": interleaved}
    resolved = {**options, "alpha": 1.0, "limit": float("inf")}

    def ours(**kwargs: Tensor) -> Tensor:
        for name in ("gate_up", "down") if by_columns else ():
            kwargs[name] = kwargs[name].mT.contiguous().mT
        return moe_kernels.fused_experts(**kwargs, **options)

    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    actual = gradients(ours, inputs, upstream)
    truth = gradients(lambda **kw: reference.fused_experts(**kw, **resolved), wide, upstream)
    yardstick = gradients(lambda **kw: torch_experts(**kw, **resolved), inputs, upstream)
    for name, value in truth.items():
        assert_accurate(name, actual[name], value, yardstick[name])
