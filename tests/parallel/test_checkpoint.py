"""Checkpoints: written on one mesh, read on any other, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_parallel.checkpoint import load_checkpoint, save_checkpoint
from moe_parallel.training import scale_grads_and_clip_grad_norm
from tests.parallel.checkpoint_cases import Case, Run, differences, together, whole
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny_lm import count_labels, loss_sum, make_shards

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


def test_one_mesh_goes_on_from_another(tmp_path: Path) -> None:
    targets = ("ep4", "pp2 x 2 stages", "1 rank")
    check(MESHES["pp2 ep2"], [MESHES[name] for name in targets], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("source", MESHES)
def test_all_pairs_of_meshes(source: str, tmp_path: Path) -> None:
    check(MESHES[source], list(MESHES.values()), tmp_path)


def _train(rank: int, ranks: int, sizes: dict[str, int], folder: str, save: bool) -> dict[str, Any]:
    """One step with data, saved or loaded, then another: its loss, gradients and parameters."""
    run = Run(Case(sizes), seed=0 if save else 5)

    def step(seed: int) -> float:
        # every rank has its share of four sequences' worth of shards
        shards = make_shards(4, 1, seed=seed)[0]
        labels, total = count_labels([shards]), torch.zeros(())
        for shard in shards[rank * 4 // ranks : (rank + 1) * 4 // ranks]:
            part = loss_sum(run.parts[0], shard) / labels
            (part * ranks).backward()
            total += part.detach()
        dist.all_reduce(total)
        moe_mesh = run.meshes[1]
        scale_grads_and_clip_grad_norm(
            1.0,
            run.parts,
            moe_mesh=moe_mesh,
            ep_axis_name=None if moe_mesh is None else "ep",
            dp_group_size=ranks,
        )
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.scheduler.step()
        for gate in run.gates().values():
            gate.update_bias()
        return total.item()

    if save:
        step(1)
        save_checkpoint(folder, 1, run.parts, run.optimizer, run.scheduler)
    else:
        load_checkpoint(f"{folder}/step-00000001", run.parts, run.optimizer, run.scheduler)
    loss = torch.tensor(step(2))
    return {"loss": loss, **{name: whole(parameter) for name, parameter in run.named()}}


def test_training_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    expected = run_ranks(4, _train, {"ep": 2}, str(tmp_path), True)[0]
    for ranks, sizes in ((4, {"ep": 4}), (2, {})):
        found = run_ranks(ranks, _train, sizes, str(tmp_path), False)[0]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            error = (found[name] - value).abs().max() / value.abs().max().clamp(min=1e-12)
            assert error <= 1e-6, (ranks, name, error)
