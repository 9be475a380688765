"""Tables of tuned tile shapes: how they are read, checked and chosen from. Needs no GPU."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget

from moe_kernels.triton import _config_tables as tables
from moe_kernels.triton import _configs, _launch
from moe_kernels.triton._config_tables import Config
from moe_kernels.triton.scaled_grouped_gemm import scaled_config

CPU = torch.device("cpu")
OTHER = Config(64, 64, 32, warps=4, stages=2, group_m=4, programs=2)
BF16 = torch.empty(0, dtype=torch.bfloat16)


def entry(rows: int | None = 256, inner: str = "any", **changes: Any) -> dict[str, Any]:
    config = dataclasses.asdict(OTHER)
    base = {"kernel": "up", "precision": "half", "rows": rows, "inner": inner, "config": config}
    return base | changes


def _specialized(by: Any) -> dict[str, Any]:
    return dataclasses.asdict(OTHER) | {"warp_specialize": by}


GLUON = dataclasses.asdict(Config(128, 64, 64, warps=8, stages=4, warp_specialize="gluon"))


def write(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"format": 1, "device": "sm_90-h200", "entries": entries}))
    return path


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Tables are read once in a process; here, once in a test."""
    caches = (tables.tuned, _configs._tuned_config)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_the_shipped_tables_are_valid() -> None:
    files = sorted(tables.FOLDER.glob("*.json"))
    assert files
    for path in files:
        document = tables.read_table(path, _configs.CONFIGS)
        assert document["device"] == path.stem


@pytest.mark.parametrize("name", ["NVIDIA GH200 480GB", "NVIDIA H800", "NVIDIA of tomorrow"])
def test_every_gpu_of_hopper_has_the_shipped_tables(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(tables.VARIABLE, raising=False)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name=name)
    )
    monkeypatch.setattr(tables, "architecture", lambda device: 90)
    found = tables.tuned(torch.device("cuda"), tuple(_configs.CONFIGS))
    assert found
    assert found[-1][tables.Bucket("up", "half", None, "wide")].warp_specialize == "gluon"


def test_without_a_table_the_default_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tables.VARIABLE, raising=False)
    found = _configs.config("up", BF16, 256 * 8, 8, aligned=True, inner=768)
    assert found == _configs.CONFIGS["up"][90, "half", "many"]


@pytest.mark.parametrize(
    ("rows", "inner", "aligned", "expected"),
    [
        (256 * 8, 768, True, OTHER),
        (65 * 8, 768, True, OTHER),  # the bucket holds 64 < rows <= 256
        (64 * 8, 768, True, None),
        (257 * 8, 768, True, None),
        (256 * 8, 512, True, dataclasses.replace(OTHER, block_m=32)),  # before "any"
        (256 * 8, 256, True, dataclasses.replace(OTHER, block_m=32)),  # there is none for slim ones
        (16 * 8, 256, True, dataclasses.replace(OTHER, block_m=64)),
        (16 * 8, 257, True, None),
        (256 * 8, 0, True, OTHER),
        (256 * 8, 768, False, None),  # tables are of aligned operands
        (4096 * 8, 768, True, dataclasses.replace(OTHER, block_m=128)),
    ],
)
def test_a_users_table_decides_for_its_buckets(
    rows: int,
    inner: int,
    aligned: bool,
    expected: Config | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of = dataclasses.asdict
    slim, narrow, large = (dataclasses.replace(OTHER, block_m=m) for m in (64, 32, 128))
    path = write(
        tmp_path / "own.json",
        entry(),
        entry(inner="narrow", config=of(narrow)),
        entry(rows=16, inner="slim", config=of(slim)),
        entry(rows=None, config=of(large)),
    )
    monkeypatch.setenv(tables.VARIABLE, str(path))
    found = _configs.config("up", BF16, rows, 8, aligned=aligned, inner=inner)
    default = _configs.default_config("up", 90, "half", rows, 8, aligned=aligned)
    assert found == (expected or default)
    # other kernels and dtypes are not touched
    other = _configs.config("wgrad", BF16, rows, 8, aligned=aligned, inner=inner)
    assert other == _configs.default_config("wgrad", 90, "half", rows, 8, aligned=aligned)
    full = _configs.config("up", torch.empty(0), rows, 8, aligned=aligned, inner=inner)
    assert full == _configs.CONFIGS["up"][80, "full", "any"]


def test_float8_products_look_up_their_shorter_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = dataclasses.asdict(dataclasses.replace(OTHER, stages=3))
    of: dict[str, Any] = {"kernel": "scaled_grouped_gemm", "precision": "fp8"}
    path = write(
        tmp_path / "own.json",
        entry(inner="narrow", **of),
        entry(inner="wide", **of | {"config": other}),
    )
    monkeypatch.setenv(tables.VARIABLE, str(path))
    for sizes, stages in (((1024, 512), 2), ((512, 1024), 2), ((528, 1024), 3)):
        b = torch.empty(2, *sizes, dtype=torch.float8_e4m3fn)
        assert scaled_config(b, 256 * 2, aligned=True).stages == stages


def test_a_users_table_comes_before_the_shipped_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even an entry for any side; and the model's before the architecture's."""
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    monkeypatch.setattr(tables, "device_class", lambda device: "sm_90-h200")
    of = dataclasses.asdict
    by_stages = [dataclasses.replace(OTHER, stages=stages) for stages in range(6)]
    rows = (64, 256, 1024)
    write(
        tmp_path / "sm_90.json",
        *(entry(rows=r, inner="wide", config=of(by_stages[1])) for r in rows),
    )
    write(
        tmp_path / "sm_90-h200.json",
        *(entry(rows=r, inner="wide", config=of(by_stages[2])) for r in rows[:2]),
    )
    own = write(tmp_path / "own.json", entry(rows=64, config=of(by_stages[3])))
    monkeypatch.setenv(tables.VARIABLE, str(own))
    gpu, inner = torch.device("cuda"), tables.inner_classes(768)
    found = [_configs._tuned_config(gpu, "up", "half", r, inner) for r in rows]
    assert [cut.stages for cut in found if cut] == [3, 2, 1]
    # what is interpreted, or compiled without a GPU, has no table but the user's
    stages = [_configs.config("up", BF16, r, 1, aligned=True, inner=768).stages for r in rows]
    default = _configs.default_config("up", 90, "half", 256, 1).stages
    assert stages == [3, default, default]


def test_roles_of_warps_are_only_what_a_table_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = [cut for of in _configs.CONFIGS.values() for cut in of.values()]
    assert {cut.warp_specialize for cut in defaults} == {"no"}
    older = {k: v for k, v in dataclasses.asdict(OTHER).items() if k != "warp_specialize"}
    path = write(
        tmp_path / "own.json",
        entry(config=_specialized("triton")),
        entry(rows=64, config=older),  # the key may be left out
        entry(rows=1024, config=GLUON),
    )
    monkeypatch.setenv(tables.VARIABLE, str(path))
    found = [_configs.config("up", BF16, rows, 1, aligned=True) for rows in (256, 64, 1024)]
    assert found == [dataclasses.replace(OTHER, warp_specialize="triton"), OTHER, Config(**GLUON)]


def test_a_table_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "own.json", entry())
    monkeypatch.setenv(tables.VARIABLE, str(path))
    for _ in range(2):
        assert _configs.config("up", BF16, 2048, 8, aligned=True) == OTHER
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "must be JSON"),
        ([], '"format": 1'),
        ({"format": 2, "device": "x", "entries": []}, '"format": 1'),
        ({"format": 1, "entries": []}, '"device"'),
        ([entry(), entry()], "entry 1.*earlier entry"),
        ([entry(kernel="upp")], 'kernel must be one of .*"down_backward".*got "upp"'),
        ([entry(precision="bf16")], 'precision must be one of "half", "full", "fp8"; got "bf16"'),
        ([entry(rows=100)], "rows must be one of 4, 16, 64, 256, 1024, null; got 100"),
        ([entry(inner="small")], "inner must be one of"),
        ([entry(config=None)], "config must be an object"),
        ([entry(config={"block_m": 64})], "exactly block_m, block_n, block_k, warps"),
        ([entry(config=dataclasses.asdict(OTHER) | {"block_n": 96})], "block_n .* power of 2"),
        ([entry(config=dataclasses.asdict(OTHER) | {"block_k": 8})], "block_k must be at least 16"),
        ([entry(config=dataclasses.asdict(OTHER) | {"stages": 0})], "stages must be an integer"),
        ([entry(config=dataclasses.asdict(OTHER) | {"stages": True})], "stages must be an integer"),
        # backward by chunks of 256 columns would write past one
        ([entry(config=dataclasses.asdict(OTHER) | {"block_n": 512})], "block_n must be at most"),
        ([entry(config=dataclasses.asdict(OTHER) | {"warps": 64})], "warps must be at most 32"),
        ([entry(config=_specialized("gluon"))], "tile of up with warp_specialize gluon must have"),
        *(
            ([entry(kernel=kernel, config=GLUON | wrong)], "2 or more stages, 64 or more rows")
            for kernel, wrong in (
                ("up", {"stages": 1}),  # would never end
                ("up", {"block_k": 128}),
                ("up", {"warps": 4}),
                ("up", {"block_m": 256}),
                ("up", {"block_n": 32}),
                ("up", {"block_n": 256}),
                ("grouped_gemm", {"stages": 1}),
                ("grouped_gemm", {"block_m": 32}),
                ("grouped_gemm", {"block_m": 256, "block_n": 256}),
                ("grouped_gemm", {"block_n": 32}),
            )
        ),
        (
            [
                entry(
                    kernel="scaled_grouped_gemm",
                    precision="fp8",
                    config=dataclasses.asdict(OTHER) | {"block_n": 256},
                )
            ],
            "block_n of scaled_grouped_gemm must be at most 128, which share a scale; got 256",
        ),
        ([entry(config=_specialized(True))], "warp_specialize of up must be .*; got True"),
        (
            [entry(kernel="wgrad", config=_specialized("triton"))],
            "warp_specialize of wgrad must be one of no, gluon; got 'triton'",
        ),
        ([3], "entry 0: must be an object"),
    ],
)
def test_a_bad_table_is_an_error_that_names_it(
    document: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bad.json"
    if isinstance(document, list) and document:
        write(path, *document)
    else:
        path.write_text(document if isinstance(document, str) else json.dumps(document))
    monkeypatch.setenv(tables.VARIABLE, str(path))
    with pytest.raises(ValueError, match=f"(?s)bad.json.*{message}"):
        _configs.config("up", BF16, 2048, 8, aligned=True)


@pytest.mark.parametrize(
    ("target", "got"),
    [(GPUTarget("cuda", 75, 32), "7.5"), (GPUTarget("hip", "gfx942", 64), "hip gfx942")],
)
def test_another_gpu_is_refused_with_a_remedy(
    target: GPUTarget, got: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Driver:
        active = property(lambda self: self)

        def get_current_target(self) -> Any:
            return target

    monkeypatch.setattr(_launch, "INTERPRETED", False)
    monkeypatch.setattr(_launch.triton.runtime, "driver", Driver())
    message = f"an NVIDIA GPU of compute capability 8.0 or later; got {got}. Set MOE_KERNELS_BACK"
    with pytest.raises(ValueError, match=message):
        _launch.architecture.__wrapped__(torch.device("cpu"))


def test_a_missing_table_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tables.VARIABLE, "/no/such/table.json")
    with pytest.raises(FileNotFoundError, match="MOE_KERNELS_CONFIGS must name a table"):
        _configs.config("up", BF16, 2048, 8, aligned=True)


@pytest.mark.parametrize(
    ("name", "arch", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 90, "sm_90-h100"),
        ("NVIDIA H200", 90, "sm_90-h200"),
        ("NVIDIA A100-SXM4-80GB", 80, "sm_80-a100"),
        ("NVIDIA B200", 100, "sm_100-b200"),
        ("NVIDIA GeForce RTX 4090", 89, "sm_89"),
    ],
)
def test_device_classes(
    name: str, arch: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(name=name)
    monkeypatch.setattr(tables, "architecture", lambda device: arch)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert tables.device_class(torch.device("cuda")) == expected
