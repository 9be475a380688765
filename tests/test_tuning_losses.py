"""Tuning goes on after runs that never end, fail, or break the device."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cli import main
from benchmarks.runner import DeviceLostError
from benchmarks.sweep import DEVICE_LOST
from benchmarks.tuning.trials import Trials
from moe_kernels.triton._config_tables import Config
from tests.kernels.interpreter import mended_interpreter
from tests.test_tuning import BUCKET, DEFAULT, without_a_gpu


def test_a_run_that_does_not_end_is_tried_once(tmp_path: Path) -> None:
    """The process really ends, and the next one leaves the configuration out."""
    path, ours = tmp_path / "new" / "tiles.json", [Config(128, 64, 64, warps=4, stages=2)]
    ours += [dataclasses.replace(ours[0], warp_specialize="triton", stages=s) for s in (2, 3)]
    for cut in ours[:2]:
        with Trials(path).of(BUCKET, cut):
            pass
    child = os.fork()
    if child == 0:
        with (
            open(os.devnull, "w") as sys.stderr,  # where the traceback goes
            Trials(path).of(BUCKET, ours[1], seconds=0.1),
        ):
            time.sleep(60)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert path.with_suffix(".trying").exists()
    for trials in (Trials(path), Trials(path)):
        assert [trials.ended(BUCKET, cut) for cut in ours] == [True, False, True]
        assert trials.ended(dataclasses.replace(BUCKET, rows=4), ours[1])
        assert not path.with_suffix(".trying").exists()


def test_a_run_that_breaks_the_device_is_tried_once(tmp_path: Path) -> None:
    path, broken = tmp_path / "tiles.json", []

    def check() -> None:
        if broken:
            raise DeviceLostError("left the GPU unusable")

    with Trials(path, check).of(BUCKET, DEFAULT):
        pass
    assert not path.with_suffix(".trying").exists()
    with pytest.raises(DeviceLostError), Trials(path, check).of(BUCKET, DEFAULT):
        broken.append(DEFAULT)
    assert path.with_suffix(".trying").exists()
    trials = Trials(path, check)
    assert not trials.ended(BUCKET, DEFAULT)
    assert trials.ended(BUCKET, dataclasses.replace(DEFAULT, stages=2))


def test_a_call_that_fails_is_left_out_and_a_lost_device_is_not_overlooked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether it fails when it is first timed, or in a later turn."""
    from benchmarks.tuning import command

    first, later, right = (dataclasses.replace(DEFAULT, block_n=n) for n in (32, 64, 256))
    guarded: list[Config] = []
    calls: list[Config] = []

    @contextmanager
    def guard(config: Config) -> Iterator[None]:
        guarded.append(config)
        yield

    def call(config: Config) -> Callable[[], None]:
        def run() -> None:
            calls.append(config)
            if config == first or (config == later and calls.count(later) > 1):
                raise RuntimeError("too many resources")

        return run

    measure = command.measure_in_turns(torch.device("cpu"), 0.01)
    times = measure({config: call(config) for config in (first, later, right)}, guard)
    assert set(times) == {right}
    assert times[right] >= 0
    assert guarded[:3] == [first, later, right]
    assert guarded.count(right) >= 4

    def lost(device: torch.device, user: str) -> None:
        raise DeviceLostError("left the GPU unusable")

    monkeypatch.setattr(command, "check_device", lost)
    calls.clear()
    with pytest.raises(DeviceLostError):
        measure({config: call(config) for config in (later, right)}, guard)


def test_a_default_that_breaks_the_device_costs_its_bucket_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was found before is written and said; two tries later the others are tuned."""
    from benchmarks.tuning import command

    out, broken, buckets = tmp_path / "table.json", [], []

    def check(device: torch.device, name: str) -> None:
        if broken:
            raise DeviceLostError(f"{name} left the GPU unusable")

    def measure_in_turns(device: torch.device, seconds: float) -> Any:
        def measure(calls: Mapping[Config, Any], guard: Any) -> dict[Config, float]:
            buckets.append(calls)
            for config in calls:
                with guard(config):
                    if len(buckets) in breaks and config == next(iter(calls)):
                        broken.append(config)
            return dict.fromkeys(calls, 1.0)

        return measure

    monkeypatch.setattr(command, "check_device", check)
    arguments = without_a_gpu(monkeypatch, out, measure_in_turns)
    breaks = (1,)  # the first bucket is that of the up-projection
    with mended_interpreter():
        for _ in range(2):
            assert main(arguments) == DEVICE_LOST
            said = capsys.readouterr()
            assert "call again to go on without what broke it" in said.err
            assert "The default is within" in said.out
            assert out.with_suffix(".trying").exists()
            broken.clear()
            buckets.clear()
        breaks = ()
        assert main(arguments) == 1
    assert "up" in capsys.readouterr().err
    assert {entry["kernel"] for entry in json.loads(out.read_text())["entries"]} == {"wgrad"}
