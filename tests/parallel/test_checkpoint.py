"""Checkpoints: written on one mesh, read on any other, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_parallel.checkpoint import load_checkpoint, save_checkpoint
from tests.parallel.checkpoint_cases import Case, Run, differences, together
from tests.parallel.ranks import run_ranks

SMALL_PIECES = 256  # bytes: most tensors are in several


def _save(rank: int, ranks: int, case: Case, folder: str) -> list[dict[str, Any]]:
    """The state saved, and that of a step later."""
    run = Run(case)
    run.step(1)
    run.step(2)
    run.load(3)  # a load that no update of the bias has seen yet
    path = save_checkpoint(
        folder,
        2,
        run.parts,
        run.optimizer,
        run.scheduler,
        extra={"note": "a", "rng": torch.arange(3)},
        piece_bytes=SMALL_PIECES,
    )
    assert path.name == "step-00000002"
    return [run.state(), _next(run)]


def _next(run: Run) -> dict[str, Any]:
    run.step(4)
    return run.state()


def _load(rank: int, ranks: int, case: Case, path: str) -> list[dict[str, Any]]:
    run = Run(case, seed=5)
    run.step(9)
    info = load_checkpoint(path, run.parts, run.optimizer, run.scheduler)
    assert info.step == 2
    assert info.extra["note"] == "a"
    assert info.extra["rng"].tolist() == [0, 1, 2]
    return [run.state(), _next(run)]


def _load_anew(rank: int, ranks: int, case: Case, path: str) -> list[dict[str, Any]]:
    """Into optimizers that have not taken a step."""
    run = Run(case, seed=5)
    load_checkpoint(path, run.parts, run.optimizer, run.scheduler)
    return [run.state(), _next(run)]


def check(source: tuple[int, Case], targets: list[tuple[int, Case]], folder: Path) -> None:
    ranks, case = source
    saved = [
        together(list(s)) for s in zip(*run_ranks(ranks, _save, case, str(folder)), strict=True)
    ]
    assert any("exp_avg" in name for name in saved[0])
    assert any(name.endswith("master") for name in saved[0])
    for index, (count, target) in enumerate(targets):
        load = _load_anew if index % 2 else _load
        found = run_ranks(count, load, target, str(folder / "step-00000002"))
        loaded = [together(list(states)) for states in zip(*found, strict=True)]
        for ours, expected in zip(loaded, saved, strict=True):
            assert ours.keys() == expected.keys()
            assert differences(ours, expected) == [], target


MESHES = {
    "ep4": (4, Case({"ep": 4})),
    "ep2": (4, Case({"ep": 2})),
    "fsdp": (4, Case()),
    "hsdp ep2": (4, Case({"dp_replicate": 2, "ep": 2})),
    "pp2 ep2": (4, Case({"pp": 2, "ep": 2})),
    "pp2 x 2 stages": (4, Case({"pp": 2}, stages_a_rank=2)),
    "2 ranks": (2, Case({"ep": 2}, options={"activation_checkpointing": True})),
    "pp2 of 2": (2, Case({"pp": 2})),
    "1 rank": (1, Case()),
}


@pytest.mark.parametrize(
    ("source", "targets"),
    [
        ("ep2", ["pp2 x 2 stages", "2 ranks", "1 rank"]),
        ("pp2 ep2", ["ep4", "hsdp ep2", "pp2 of 2"]),
    ],
)
def test_any_mesh_goes_on_from_any_other(source: str, targets: list[str], tmp_path: Path) -> None:
    check(MESHES[source], [MESHES[name] for name in targets], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("source", MESHES)
def test_all_pairs_of_meshes(source: str, tmp_path: Path) -> None:
    check(MESHES[source], list(MESHES.values()), tmp_path)
