"""Folders of checkpoints: what else is in them, and who else writes there."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from torch import nn

from moe_parallel.checkpoint import (
    CheckpointError,
    checkpoints,
    folders,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from tests.parallel.ranks import fork_context, run_ranks


def layer(value: float) -> nn.Linear:
    made = nn.Linear(3, 3)
    nn.init.constant_(made.weight, value)
    nn.init.constant_(made.bias, value)
    return made


def value_in(path: Path | None) -> float:
    assert path is not None
    model = layer(-1)
    load_checkpoint(path, model)
    assert model.weight.unique().numel() == 1
    assert model.bias[0] == model.weight[0, 0]
    return float(model.bias[0])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_of_a_link_no_more_than_the_link_is_removed(tmp_path: Path) -> None:
    run, archive = tmp_path / "run", tmp_path / "archive"
    archive.mkdir()
    for step in (1, 2):
        save_checkpoint(run, step, layer(step))
        (run / f"step-{step:08d}").rename(archive / str(step))
        (run / f"step-{step:08d}").symlink_to(archive / str(step))
    (run / "step-00000009.partial").symlink_to(archive)
    assert value_in(latest_checkpoint(run)) == 2
    save_checkpoint(run, 2, layer(7))  # in the place of a link
    assert names(run) == ["step-00000001", "step-00000002"]
    assert value_in(latest_checkpoint(run)) == 7
    save_checkpoint(run, 3, layer(3), keep=1)
    assert names(run) == ["step-00000003"]
    assert [value_in(archive / name) for name in ("1", "2")] == [1, 2]


@pytest.mark.parametrize("suffix", ["", ".partial", ".replaced"])
def test_a_file_or_a_link_to_nothing_makes_place(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"step-00000001{suffix}"
    for kind in ("file", "link"):
        path.write_text("x") if kind == "file" else path.symlink_to(tmp_path / "nowhere")
        assert checkpoints(tmp_path) == []
        save_checkpoint(tmp_path, 1, layer(1))
        assert names(tmp_path) == ["step-00000001"]
        assert value_in(latest_checkpoint(tmp_path)) == 1
        for file in (tmp_path / "step-00000001").iterdir():
            file.unlink()
        (tmp_path / "step-00000001").rmdir()


def _interrupt(*args: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", [3, 2])
def test_an_interrupted_removal_is_finished_by_the_next_save(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an old checkpoint, and of one that another of its step replaces."""
    for before in (1, 2):
        save_checkpoint(tmp_path, before, layer(before))
    with monkeypatch.context() as patch:
        patch.setattr(folders.shutil, "rmtree", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, step, layer(7), keep=1)
    assert value_in(latest_checkpoint(tmp_path)) == 7
    save_checkpoint(tmp_path, 4, layer(4), keep=1)
    assert names(tmp_path) == ["step-00000004"]


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    for name in ("step-", "step-x", "notes.txt", "step-3-kept", "a.partial"):
        (tmp_path / name).mkdir()
    before = names(tmp_path)
    for step in (1, 2):
        save_checkpoint(tmp_path, step, layer(step), keep=1)
    assert names(tmp_path) == sorted([*before, "step-00000002"])


def test_clocks_do_not_matter(tmp_path: Path) -> None:
    for step in (5, 2, 3):
        path = save_checkpoint(tmp_path, step, layer(step))
        for file in (*path.iterdir(), path):
            os.utime(file, (1e9 - step, 1e9 - step))
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["5", "2", "3"]


def _second_run(rank: int, ranks: int, folder: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(folder, 2, layer(2))
    return str(caught.value)


def test_two_runs_do_not_write_in_one_folder_at_a_time(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, layer(1))
    with folders.writing(tmp_path):
        partial = folders.begin(tmp_path, 2)
        first, second = run_ranks(2, _second_run, str(tmp_path))
        assert first == second
        assert "must have one run that writes checkpoints" in first
        assert partial.is_dir()
        assert value_in(latest_checkpoint(tmp_path)) == 1
    save_checkpoint(tmp_path, 2, layer(2))
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def _save_on_and_on(connection: Connection, folder: Path) -> None:
    for step in range(1, 10**6):
        save_checkpoint(folder, step, layer(step), keep=2)
        connection.send(step)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Whatever the moment, the last checkpoint is whole, and another run goes on."""
    for attempt in range(3):
        context = fork_context()
        ours, theirs = context.Pipe()
        process = context.Process(target=_save_on_and_on, args=(theirs, tmp_path))
        process.start()
        theirs.close()
        for _ in range(3):
            done = ours.recv()
        time.sleep(0.0017 * attempt)
        process.kill()
        process.join()
        with suppress(EOFError):
            while True:
                done = ours.recv()
        last = latest_checkpoint(tmp_path)
        # it may have had no time to say that it was done
        assert value_in(last) in (done, done + 1)
        assert len(checkpoints(tmp_path)) <= 3
