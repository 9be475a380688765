"""Saves that are interrupted, checkpoints that do not fit: one error on all ranks, nothing lost."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moe_parallel.checkpoint import (
    CheckpointError,
    checkpoints,
    folders,
    latest_checkpoint,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    saving,
    storage,
)
from tests.parallel.checkpoint_cases import MOE, Case, Run, differences
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny_lm import ModelOptions

EP = Case({"ep": 2})


def save(run: Run, folder: str, step: int, **options: Any) -> Path:
    return save_checkpoint(folder, step, run.parts, run.optimizer, run.scheduler, **options)


def load(run: Run, path: Any) -> Any:
    return load_checkpoint(path, run.parts, run.optimizer, run.scheduler)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- interrupted --------------------------------------------------------------------------------


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed(rank: int, ranks: int, folder: str, where: str) -> None:
    run = Run(EP)
    run.step(1)
    save(run, folder, 1)
    run.step(2)
    if where == "writing" and rank == 1:
        storage._PiecePlanner.resolve_data = die  # type: ignore[method-assign]
    elif where == "before the end" and rank == 0:
        folders.sync_folder = die
    elif where == "between two names" and rank == 0:
        rename = Path.rename

        def once(path: Path, target: Path) -> Any:
            rename(path, target)
            if str(target).endswith(".replaced"):
                die()

        Path.rename = once  # type: ignore[method-assign]
    save(run, folder, 1 if where == "between two names" else 2)


def _go_on(rank: int, ranks: int, folder: str) -> list[bool]:
    """Load the last checkpoint, compare with what was saved there, and save once more."""
    run, expected = Run(EP, seed=3), Run(EP)
    expected.step(1)
    load(run, latest_checkpoint(folder))
    same = not differences(run.state(), expected.state())
    save(run, folder, 2)
    return [same]


@pytest.mark.parametrize("where", ["writing", "before the end", "between two names"])
def test_a_killed_rank_leaves_the_last_checkpoint(where: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="died with exit code -9") as caught:
        run_ranks(2, _killed, str(tmp_path), where)
    assert "Traceback" in str(caught.value), "the other rank must raise"
    assert "still running" not in str(caught.value)
    before = "step-00000001" + (".replaced" if where == "between two names" else "")
    assert len(names(tmp_path)) == 2
    assert before in names(tmp_path)
    assert any(name.endswith(".partial") for name in names(tmp_path))
    assert latest_checkpoint(tmp_path) == tmp_path / before
    assert checkpoints(tmp_path) == [tmp_path / before]
    assert run_ranks(2, _go_on, str(tmp_path)) == [[True]] * 2
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def _no_space(rank: int, ranks: int, folder: str) -> str:
    run = Run(EP)
    save(run, folder, 1)
    run.step(1)
    if rank == 1:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    with pytest.raises(CheckpointError) as caught:
        save(run, folder, 2, keep=1)
    return str(caught.value)


def test_no_space_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(2, _no_space, str(tmp_path))
    assert first == second
    assert "rank 1: OSError: [Errno 27] File too large" in first
    assert names(tmp_path) == ["step-00000001"]


def _unwritable(rank: int, ranks: int, folder: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        save(Run(EP), folder, 1)
    return str(caught.value)


def test_a_folder_that_cannot_be_made_is_an_error_on_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    first, second = run_ranks(2, _unwritable, str(tmp_path / "file"))
    assert first == second
    assert "FileExistsError" in first


def _own_disk(rank: int, ranks: int, folder: str) -> str:
    """Rank 1 writes to a folder of the same name that no other rank sees."""
    run = Run(EP)
    save(run, folder, 1)
    if rank == 1:
        own, write = Path(folder).parent / "own", saving.write
        own.mkdir()
        saving.write = lambda tensors, partial, most: write(tensors, own, most)
    with pytest.raises(CheckpointError) as caught:
        save(run, folder, 2, keep=1)
    return str(caught.value)


def test_what_is_written_elsewhere_is_no_checkpoint(tmp_path: Path) -> None:
    first, second = run_ranks(2, _own_disk, str(tmp_path / "run"))
    assert first == second
    assert "file system that all ranks share" in first
    assert "__1_0.distcp must have" in first
    assert names(tmp_path / "run") == ["step-00000001"]


def _keep(rank: int, ranks: int, folder: str) -> None:
    run = Run(EP)
    for step in (5, 7, 9):
        save(run, folder, step, keep=2)
    # a run that begins anew in the same folder: its checkpoints are the newer ones
    save(run, folder, 3, keep=2)
    save(run, folder, 9, keep=2)


def test_old_checkpoints_go_in_the_order_written(tmp_path: Path) -> None:
    run_ranks(2, _keep, str(tmp_path))
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003", "step-00000009"]
    assert names(tmp_path) == ["step-00000003", "step-00000009"]
    assert read_checkpoint(tmp_path / "step-00000003").step == 3


# --- what does not fit ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Misfit:
    """A run that a checkpoint does not fit, and what the error says."""

    message: str
    case: Case = EP
    change: str = ""


def _refused(rank: int, ranks: int, tries: list[tuple[Misfit, str]]) -> list[tuple[str, Any]]:
    return [_one_refused(misfit, path) for misfit, path in tries]


def _one_refused(misfit: Misfit, path: str) -> tuple[str, Any]:
    run = Run(misfit.case)
    run.step(1)
    parameters = [parameter for _, parameter in run.named()]
    optimizers: Any = run.optimizer
    schedulers: Any = run.scheduler
    if misfit.change == "two schedules":
        schedulers = [run.scheduler] * 2
    elif misfit.change == "a frozen parameter":
        run.optimizer.param_groups[0]["params"] = run.optimizer.param_groups[0]["params"][1:]
    elif misfit.change == "a foreign parameter":
        optimizers = torch.optim.AdamW([*parameters, nn.Parameter(torch.ones(3))])
    elif misfit.change == "one group":
        optimizers, schedulers = torch.optim.AdamW(parameters), ()
    before = run.state() if misfit.change != "a frozen parameter" else {}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, run.parts, optimizers, schedulers)
    return str(caught.value), differences(run.state(), before) if before else []


def other(**changes: Any) -> Case:
    layers = changes.pop("layers", 4)
    return Case({"ep": 2}, ModelOptions(moe={**MOE, **changes}, layers=layers))


def _write(rank: int, ranks: int, folder: str) -> None:
    run = Run(EP)
    run.step(1)
    save(run, folder, 1)
    save_checkpoint(folder, 2, run.parts)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    run_ranks(2, _write, str(folder))
    return folder


def check_refused(tries: list[tuple[Misfit, Path]]) -> None:
    first, second = run_ranks(2, _refused, [(misfit, str(path)) for misfit, path in tries])
    for (misfit, _), ours, theirs in zip(tries, first, second, strict=True):
        assert re.search(misfit.message, ours[0]), ours[0]
        assert ours == theirs
        assert ours[1] == [], "something has been changed"


def test_what_does_not_fit_is_refused(written: Path) -> None:
    path = written / "step-00000001"
    check_refused(
        [
            (misfit, path)
            for misfit in (
                Misfit("must have all of the checkpoint; model.layers.3.", other(layers=3)),
                Misfit("must have all of the model; model.layers.4.", other(layers=5)),
                Misfit(r"gate.weight must be \[6, 18\].*has \[4, 18\]", other(n_routed_experts=6)),
                Misfit(r"must be \[4, 18, 16\], .*has \[4, 18, 24\]", other(moe_inter_dim=8)),
                Misfit("as many schedulers as in .*, 1; got 2", change="two schedules"),
                Misfit("all parameters of the .*embed.* is not in", change="a frozen parameter"),
                Misfit(r"one of shape \[3\] is not", change="a foreign parameter"),
                Misfit("must have equal options in the checkpoint", change="one group"),
            )
        ]
    )


def test_folders_that_are_no_checkpoint(written: Path, tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert latest_checkpoint(written) == written / "step-00000002"
    partial = tmp_path / "step-00000003.partial"
    shutil.copytree(written / "step-00000001", partial)
    (partial / "checkpoint.json").unlink()
    check_refused(
        [
            (Misfit("not a checkpoint: there is no such folder"), tmp_path / "nowhere"),
            (Misfit("not a checkpoint: it has no checkpoint.json. latest_"), tmp_path),
            (Misfit("a folder of checkpoints; .* is .*step-00000002"), written),
            (Misfit("Its writing was interrupted"), partial),
            (Misfit("it has none of [0-9]+, such as "), written / "step-00000002"),
        ]
    )


def test_damaged_files_are_found_before_anything_is_read(written: Path, tmp_path: Path) -> None:
    tries = []
    for file in (".metadata", "training.pt", "__1_0.distcp"):
        for size in (None, 100):
            path = tmp_path / f"{file} {size}"
            shutil.copytree(written / "step-00000001", path)
            if size is None:
                (path / file).unlink()
            else:
                os.truncate(path / file, size)
            tries.append((Misfit(f"{re.escape(str(path))} is damaged: .*{file}"), path))
    check_refused(tries)


class Counted(nn.Module):
    """A stage of two that calls its only layer 0."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3)])
        nn.init.constant_(self.layers[0].weight, value)
        nn.init.zeros_(self.layers[0].bias)


class Opaque(nn.Module):
    def get_extra_state(self) -> str:
        return "state"


def _cannot_be_saved(rank: int, ranks: int, folder: str) -> list[str]:
    found = []
    weird = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    model = nn.Linear(4, 4)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    factored = torch.optim.AdamW(model.parameters())
    factored.state[model.weight]["row"] = torch.ones(4)
    different = torch.optim.AdamW(model.parameters(), lr=1.0 + rank)
    for arguments, options in (
        ((-1, model), {}),
        ((1, model), {"keep": 0}),
        ((1, Counted(rank)), {}),
        ((1, Opaque()), {}),
        ((1, model, weird), {}),
        ((1, model, factored), {}),
        ((1, model, different), {}),
        ((1, model), {"extra": {"path": Path()}}),
    ):
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(folder, *arguments, **options)  # type: ignore[arg-type]
        found.append(str(caught.value))
    assert saving.as_list(None) == []
    return found


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    first, second = run_ranks(2, _cannot_be_saved, str(tmp_path))
    assert first == second
    for text, expected in zip(
        first,
        [
            "step must be an integer of at least 0; got -1",
            "keep must be at least 1, or None; got 0",
            "ranks 0 and 1 must have the same under the name layers.0.weight",
            "(Opaque) has an extra state",
            "one of shape [2, 2] is not",
            "row of weight [4, 4] (not sharded) is [4] (not sharded)",
            "all ranks must optimize weight with equal options",
            "torch.load(weights_only=True) says",
        ],
        strict=True,
    ):
        assert expected in text
    assert list(tmp_path.iterdir()) == []
