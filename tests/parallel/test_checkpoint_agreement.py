"""Ranks that are given different arguments: one error on all, instead of a mixture or a wait."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from moe_parallel.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from tests.parallel.checkpoint_cases import Case, Run, differences
from tests.parallel.ranks import run_ranks

WEIGHT = "model.embed_tokens.weight"
NO_OPTIMIZER = f"optimizers of their parameters; rank {{}} has one of {WEIGHT}, rank {{}} has none"
SAVES: dict[str, tuple[Any, Any, str]] = {  # of rank 0 and 1: what is not as usual
    "folder": ({}, {"folder": "elsewhere"}, "folder must be the same on all ranks; got "),
    "no path": ({}, {"folder": None}, "rank 1: TypeError: "),
    "step": ({"step": 8}, {"step": 9}, "step must be the same on all ranks; got 8 on rank 0 and 9"),
    "keep, rank 0": ({"keep": 1}, {}, "keep must be the same on all ranks; got 1 on rank 0"),
    "keep, rank 1": ({}, {"keep": 1}, "keep must be the same on all ranks; got None on rank 0"),
    "optimizer, rank 0": ({}, {"optimizers": ()}, NO_OPTIMIZER.format(0, 1)),
    "optimizer, rank 1": ({"optimizers": None}, {}, NO_OPTIMIZER.format(1, 0)),
    "no optimizer": ({}, {"optimizers": 3}, "rank 1: TypeError: "),
}
LOADS: dict[str, tuple[Any, Any, str]] = {
    "checkpoint": ({}, {"number": 2}, "all ranks must load the same checkpoint; rank 0 was given "),
    "no path": ({"number": None}, {}, "TypeError: "),
    "optimizer, rank 0": ({}, {"optimizers": ()}, NO_OPTIMIZER.format(0, 1)),
    "optimizer, rank 1": ({"optimizers": None}, {}, NO_OPTIMIZER.format(1, 0)),
    "scheduler": ({}, {"schedulers": ()}, "as many schedulers; rank 0 has 1, rank 1 0"),
}


def _refused(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    run = Run(Case({"ep": 2}))
    run.step(1)
    first = save_checkpoint(folder, 1, run.parts, run.optimizer, run.scheduler)
    run.step(2)
    second = save_checkpoint(folder, 2, run.parts, run.optimizer, run.scheduler)
    before, found = run.state(), {}
    for name, case in SAVES.items():
        given = {"folder": folder, "step": 3, "optimizers": run.optimizer, **case[rank]}
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(model_parts=run.parts, schedulers=run.scheduler, **given)
        found[f"save: {name}"] = str(caught.value)
    for name, case in LOADS.items():
        given = {"optimizers": run.optimizer, "schedulers": run.scheduler, **case[rank]}
        path: Any = {1: first, 2: second, None: None}[given.pop("number", 1)]
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path, run.parts, **given)
        found[f"load: {name}"] = str(caught.value)
    assert not differences(run.state(), before), "something has been changed"
    return found


def test_other_arguments_on_one_rank(tmp_path: Path) -> None:
    first, second = run_ranks(2, _refused, str(tmp_path))
    assert first == second
    for kind, cases in (("save", SAVES), ("load", LOADS)):
        for name, (_, _, message) in cases.items():
            assert message in first[f"{kind}: {name}"], first[f"{kind}: {name}"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def _copied(rank: int, ranks: int, folder: str) -> list[str]:
    run, expected = Run(Case({"ep": 2}), seed=3), Run(Case({"ep": 2}))
    expected.step(1)
    path = save_checkpoint(folder, 1, expected.parts, expected.optimizer, expected.scheduler)
    if rank == 1:
        path = Path(shutil.copytree(path, Path(folder) / "a copy"))
    load_checkpoint(path, run.parts, run.optimizer, run.scheduler)
    return differences(run.state(), expected.state())


def test_a_rank_may_have_a_copy_of_its_own(tmp_path: Path) -> None:
    assert run_ranks(2, _copied, str(tmp_path)) == [[], []]
