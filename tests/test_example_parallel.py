"""The language model example on meshes of every kind: the same run, whatever the ranks do."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch.distributed as dist

from tests.test_example import QUICK, TINY, data, run_example, summary, train_lm

RUN = [*TINY, *QUICK, "--batch", "8", "--clip", "0.5"]
STEPS = 3
LAYOUTS = {
    2: [
        "--cp 2 --ac router",
        "--pp 2 --accumulate 2",
        "--ep 1 --accumulate 3",
    ],
    4: [
        "--cp 2 --pp 2 --ep 2 --ac full",
        "--dp-replicate 2 --ep 4 --accumulate 2 --ac selective",
    ],
}
MORE_LAYOUTS = {
    4: [
        "--cp 4 --ep 4 --ac selective",
        "--pp 2 --ep 2 --ac router",
        "--cp 2 --ep 2 --accumulate 3 --ac full",
    ],
    8: [
        "--cp 2 --pp 2 --ep 4 --accumulate 2",
        "--dp-replicate 2 --cp 2 --ep 4 --ac full",
    ],
}
# Each of these computes the two halves of a batch apart, somewhere.
HALVES = {1: ["--accumulate 2"], 2: ["--ep 2", "--cp 2 --accumulate 2", "--pp 2"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the runs of this file, by their options; and what one rank does, in "plain"."""
    folder = tmp_path_factory.mktemp("layouts")
    everything = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    (folder / "text").write_bytes(everything[: data.HELD_OUT * data.BLOCK])
    run_example(
        1,
        [*RUN, "--balance", "0", "--steps", str(STEPS), *place(folder, "plain")],
        *balanced(folder, 1),
    )
    return folder


def place(folder: Path, name: str) -> list[str]:
    return ["--text", str(folder / "text"), "--out", str(folder / name)]


def balanced(folder: Path, ranks: int) -> list[list[str]]:
    return [
        [*RUN, "--balance", "0.5", "--steps", "2", *layout.split(), *place(folder, layout)]
        for layout in HALVES[ranks]
    ]


def interrupted(folder: Path, layout: str) -> list[list[str]]:
    """A run that ends before its last step, and what goes on from there."""
    out = [*layout.split(), *place(folder, layout)]
    return [
        [*RUN, "--balance", "0", "--steps", str(STEPS - 1), *out],
        [*QUICK, "--steps", "1", "--resume", *out],
    ]


def check(folder: Path, name: str, ranks: int) -> None:
    expected, found = summary(folder / "plain"), summary(folder / name)
    assert found["ranks"] == ranks
    assert found["first_step"] == STEPS - 1
    for value in ("losses", "gradient_norms", "heldout"):
        assert found[value] == pytest.approx(expected[value], rel=1e-5), name
    for value in ("expert_load", "sample"):
        assert found[value] == expected[value], name
    options = dict(zip(name.split()[::2], name.split()[1::2], strict=True))
    for axis in ("cp", "pp", "dp-replicate"):
        assert f"{axis.replace('-', '_')} {options.get('--' + axis, 1)} x" in found["meshes"]
    if "--ep" in options and options["--ep"] != "1":
        shards = ranks // int(options.get("--pp", 1)) // int(options["--ep"])
        assert f", experts: ep_shard {shards} x ep {options['--ep']}" in found["meshes"]


def test_every_layout_on_2_ranks_trains_alike_and_resumes(folder: Path) -> None:
    runs = [run for layout in LAYOUTS[2] for run in interrupted(folder, layout)]
    run_example(2, *runs, *balanced(folder, 2))
    for layout in LAYOUTS[2]:
        check(folder, layout, 2)
    # The balancing loss is the mean of that of the halves.
    expected = summary(folder / HALVES[1][0])
    plain = summary(folder / "plain")["gradient_norms"][:2]
    assert expected["gradient_norms"] != pytest.approx(plain, rel=1e-3)
    for layout in HALVES[2]:
        found = summary(folder / layout)
        for name in ("losses", "gradient_norms"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5), layout


def test_every_layout_on_4_ranks_trains_alike_and_resumes(folder: Path) -> None:
    """And a checkpoint goes on from one layout to another, and to a single rank."""
    runs = [run for layout in LAYOUTS[4] for run in interrupted(folder, layout)]
    out = place(folder, "moved")
    step = [*QUICK, "--steps", "1", "--resume", *out]
    moved = [
        [*RUN, "--balance", "0", "--steps", "1", "--pp", "2", "--ep", "2", *out],
        [*step, "--dp-replicate", "2", "--ep", "1", "--ac", "full"],
    ]
    run_example(4, *runs, *moved)
    for layout in LAYOUTS[4]:
        check(folder, layout, 4)
    run_example(1, [*step, "--accumulate", "2"])
    expected, found = summary(folder / "plain"), summary(folder / "moved")
    for name in ("losses", "gradient_norms"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", MORE_LAYOUTS)
def test_more_layouts(ranks: int, folder: Path) -> None:
    run_example(ranks, *[r for layout in MORE_LAYOUTS[ranks] for r in interrupted(folder, layout)])
    for layout in MORE_LAYOUTS[ranks]:
        check(folder, layout, ranks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cp", "3"], r"--length must be a multiple of 2 . cp = 6; got 256"),
        (["--pp", "5"], "--pp must be at most layers = 4; got 5"),
        (["--accumulate", "0"], "--accumulate must be at least 1; got 0"),
        (["--accumulate", "17"], r"1 ranks . accumulate 17 = 17; got 16"),
        (["--pp", "2"], r"the number of ranks must be a multiple of tp . cp . pp"),
        (["--dp-replicate", "2"], r"dp_replicate must divide dp = 1"),
        (["--dp-replicate", "0"], "dp_replicate must be a positive integer; got 0"),
        (["--ep", "2"], r"ep must divide dp . cp . tp"),
        (["--ep", "0"], "--ep must be at least 1; got 0"),
        (["--ep", "4", "--experts", "6"], "--ep must divide experts = 6; got 4"),
    ],
)
def test_layouts_that_do_not_fit(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_lm.main(arguments)
    assert not dist.is_initialized()


def test_a_pipeline_needs_pieces_of_equal_size() -> None:
    with pytest.raises(AssertionError, match=r"--batch must be a multiple of 1 ranks . accumulate"):
        run_example(2, ["--pp", "2", "--batch", "9"])
