"""The language model example: what it writes, and that it goes on from where it stopped."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import train_lm  # noqa: E402
from lm import checkpoint, cluster, data, model, report  # noqa: E402
from lm.settings import Settings  # noqa: E402
from moe_parallel.checkpoint.folders import PARTIAL  # noqa: E402

TINY = [
    *("--batch", "6", "--length", "32", "--hidden", "32", "--inner", "16"),
    *("--layers", "2", "--experts", "4", "--warmup", "4"),
]
QUICK = ["--sample", "8", "--compare-seconds", "0"]
# Clipped, of uneven parts, and without the balancing loss, which is of each rank's own tokens.
EXACT = [*TINY, *QUICK, "--batch", "7", "--balance", "0", "--clip", "0.5", "--steps", "3"]
EXACT += ["--hidden", "48", "--inner", "24"]  # what 3 ranks can share


def _runs(rank: int, ranks: int, *runs: list[str]) -> None:
    """Several runs of the example, one after the other, in the same ranks."""
    for arguments in runs:
        assert train_lm.main(arguments) == 0


def run_example(ranks: int, *runs: list[str]) -> None:
    run_ranks(ranks, _runs, *runs, timeout=300.0)


def summary(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs on 2 ranks: "whole" took 6 steps, "half" the first 3 of them; "exact"."""
    folder = tmp_path_factory.mktemp("lm")
    whole, half, exact = (str(folder / name) for name in ("whole", "half", "exact"))
    run_example(
        2,
        [*TINY, "--sample", "8", "--compare-seconds", "0.1", "--steps", "6", "--out", whole],
        [*TINY, *QUICK, "--steps", "3", "--out", half],
        [*EXACT, "--out", exact],
    )
    return folder


def test_summary(trained: Path) -> None:
    found = summary(trained / "whole")
    assert found["max_logit_difference"] < 1e-4
    assert set(found["tokens_per_second"]) == {"moe_kernels", "eager", "grouped_mm"}
    assert all(speed > 0 for speed in found["tokens_per_second"].values())
    assert found["training_tokens_per_second"] > 0
    assert found["ranks"] == found["expert_parallel"] == 2
    assert found["steps"] == len(found["losses"]) == 6
    # an untrained model knows nothing of bytes; a few steps teach it something
    assert found["losses"][0] == pytest.approx(math.log(256), abs=0.2)
    assert found["heldout"] < found["losses"][0]
    assert found["unigram"] > found["bigram"] > 0
    assert found["bigram_counted"] > found["bigram"]
    # every token of every step went to two experts of each layer
    assert [sum(layer) for layer in found["expert_load"]] == [6 * 6 * 32 * 2] * 2
    assert found["sample"].startswith(train_lm.PROMPT)
    assert Path(found["picture"]).read_bytes().startswith(b"\x89PNG")
    assert Path(found["checkpoint"]) == checkpoint.find(trained / "whole")


@pytest.mark.parametrize("gpus", [0, 1, 2, 3])
def test_two_ranks_compute_on_gpus_of_their_own(
    gpus: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    found = []
    for rank in range(2):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        found.append(str(cluster._choose_device()))
    assert found == (["cuda:0", "cuda:1"] if gpus > 1 else ["cpu", "cpu"])
    told = capsys.readouterr().out
    assert ("all compute on the CPU. --nproc-per-node=1 computes on the GPU\n" in told) == (
        gpus == 1
    )
    assert told.count("\n") == (gpus == 1)


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 1), (2, 2), (3, 2), (16, 8)])
def test_make_demo_starts_a_rank_for_each_gpu(gpus: int, ranks: int, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(f"class cuda:\n    device_count = lambda: {gpus}\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = ["make", "--dry-run", "-C", str(ROOT), "demo", f"PYTHON={sys.executable}"]
    for options, expected in (([], ranks), (["RANKS=5"], 5)):
        done = subprocess.run(
            [*command, *options], env=environment, capture_output=True, text=True, timeout=60
        )
        assert f"--nproc-per-node={expected} " in done.stdout, done.stderr


def _without_matplotlib(rank: int, ranks: int, out: str) -> str:
    report.find_spec = lambda name: None  # type: ignore[assignment]
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert train_lm.main([*TINY, *QUICK, "--steps", "1", "--out", out]) == 0
    return told.getvalue()


def test_no_picture_without_matplotlib(tmp_path: Path) -> None:
    (told,) = run_ranks(1, _without_matplotlib, str(tmp_path))
    assert "no picture, which needs matplotlib: pip install matplotlib\n" in told
    assert told.endswith(f"written: {tmp_path / 'summary.json'}\n")
    assert summary(tmp_path)["picture"] is None
    assert not list(tmp_path.glob("*.png"))


def test_resume_repeats_bit_for_bit(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "half"
    shutil.copytree(trained / "half", out)
    run_example(2, [*QUICK, "--steps", "3", "--resume", "--out", str(out)])
    whole, resumed = summary(trained / "whole"), summary(out)
    assert resumed["first_step"] == 3
    for name in ("losses", "gradient_norms", "expert_load", "heldout"):
        assert resumed[name] == whole[name]


@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_resume_with_other_ranks(ranks: int, trained: Path, tmp_path: Path) -> None:
    run_example(
        ranks,
        [*QUICK, "--steps", "1", "--resume", str(trained / "half"), "--out", str(tmp_path)],
    )
    whole, resumed = summary(trained / "whole"), summary(tmp_path)
    assert resumed["ranks"] == ranks
    assert resumed["first_loss"] == resumed["losses"][3]
    assert resumed["first_loss"] == pytest.approx(whole["losses"][3], abs=1e-5)


@pytest.mark.parametrize("ranks", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_gradients_do_not_depend_on_the_ranks(ranks: int, trained: Path, tmp_path: Path) -> None:
    """2 ranks hold each expert once; 6 hold the experts three times over, sharded over 3."""
    run_example(ranks, [*EXACT, "--out", str(tmp_path)])
    two, other = summary(trained / "exact"), summary(tmp_path)
    assert other["expert_parallel"] == math.gcd(ranks, 4)
    for name in ("losses", "gradient_norms"):
        assert other[name] == pytest.approx(two[name], rel=2e-6)
    assert other["heldout"] == pytest.approx(two["heldout"], rel=2e-6)


def test_interrupt_leaves_a_checkpoint(tmp_path: Path) -> None:
    """Ctrl-C in a terminal: torchrun and its ranks get SIGINT, and the ranks a second one."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(ROOT / "examples" / "train_lm.py"), *TINY, *QUICK]
    command += ["--steps", "1000000", "--seconds", "200", "--save-every", "5", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            _wait_for(lambda: list((out / checkpoint.FOLDER).glob("step-*5")), process)
            os.killpg(process.pid, signal.SIGINT)
            printed, _ = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "go on with --resume" in printed
    assert (
        "2 ranks on cpu: pp 1 x dp_replicate 1 x dp_shard 2 x cp 1 x tp 1, experts: ep_" in printed
    )
    assert not list(out.rglob(f"*{PARTIAL}"))
    _, progress = checkpoint.read_about(checkpoint.find(out))
    assert f"after step {progress.step};" in printed
    run_example(1, [*QUICK, "--steps", "1", "--resume", "--out", str(out)])
    resumed = summary(out)
    assert resumed["first_step"] == progress.step
    assert resumed["losses"][:-1] == progress.losses
    assert resumed["losses"][-1] < resumed["losses"][0]


def _wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.05)


def test_half_written_checkpoints_are_not_found(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / checkpoint.FOLDER
    shutil.copytree(trained / "half" / checkpoint.FOLDER, folder)
    complete = checkpoint.find(tmp_path)
    # killed while writing: the name says so; killed before the end: checkpoint.json is not there
    shutil.copytree(complete, folder / f"step-00000009{PARTIAL}")
    (folder / "step-00000010").mkdir()
    assert checkpoint.find(tmp_path) == complete
    assert checkpoint.find(complete) == complete
    with pytest.raises(ValueError, match="--resume: no checkpoint in"):
        checkpoint.find(tmp_path / "elsewhere")


def test_a_resumed_run_must_not_be_contradicted(trained: Path) -> None:
    with pytest.raises(ValueError, match=r"was trained with lr = 0.003; got 0.1. Leave it out"):
        train_lm.main(["--resume", str(trained / "half"), "--lr", "0.1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch must be at least 1; got 0"),
        (["--lr", "nan"], "--lr must be finite"),
        (["--weight-decay", "-1"], "--weight-decay must be finite and not negative; got -1.0"),
        (["--clip", "0"], "--clip must be positive, or nothing is learnt; got 0.0"),
        (["--seed", str(2**64)], r"--seed must be below 2\*\*63; got 18446744073709551616"),
        (["--top-k", "0"], "--top-k must be at least 1; got 0"),
        (["--top-k", "17"], "--top-k must be at most experts = 16; got 17"),
        (["--hidden", "20"], "--hidden must be a multiple of 2 . heads = 8; got 20"),
        (["--steps", "0"], "--steps and --save-every must be at least 1"),
        (["--length", "100000"], "the text is too short for sequences of 100000 bytes"),
        (["--text", "/nowhere/text"], "--text must be a file that can be read: .*/nowhere/text"),
        (["--out", "/dev/null/runs"], "--out must be a folder: .*/dev/null"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_lm.main(arguments)


@pytest.mark.parametrize("heads", [1, 3, 5, 6])
def test_any_number_of_heads(heads: int) -> None:
    net = model.make_model(Settings(hidden=8 * heads, heads=heads, layers=1, experts=4, inner=8))
    assert net(input_ids=torch.zeros(1, 3, dtype=torch.int64)).logits.isfinite().all()


def test_text_is_split_and_counted_right(tmp_path: Path) -> None:
    # Two of three bytes follow from the byte before them: "ab" or "ac", and "a" after both.
    raw = (b"abac" * 25_000)[: 10 * data.BLOCK + 150]
    (tmp_path / "text").write_bytes(raw)
    text = data.load(tmp_path / "text")
    parts = sorted([*text.train, *text.heldout])
    assert parts[0][0] == 0
    assert parts[-1][1] == len(raw)
    assert all(end == start for (_, end), (start, _) in pairwise(parts))
    assert text.heldout == ((9 * data.BLOCK, 10 * data.BLOCK),)
    levels = data.entropies(text)
    assert levels["unigram"] == pytest.approx(1.5 * math.log(2), abs=1e-3)
    assert levels["bigram"] == pytest.approx(0.5 * math.log(2), abs=1e-3)
    assert levels["bigram_counted"] == pytest.approx(0.5 * math.log(2), abs=2e-2)

    length = 100
    windows, wanted = text.heldout_windows(length)
    predicted = Counter(windows[:, 1:][wanted].tolist())
    start, end = text.heldout[0]
    assert predicted == Counter(text.values[start + 1 : end].tolist())
    starts = text.starts(length)
    for first, last in text.train:
        inside = starts[(starts >= first) & (starts < last)]
        assert (int(inside[0]), int(inside[-1]) + length + 1) == (first, last)


def test_batches_depend_on_seed_and_step_alone() -> None:
    text = data.load()
    starts = text.starts(16)
    batch = text.batch(starts, 4, 16, 0, 7)
    assert batch.shape == (4, 17)
    torch.manual_seed(1)
    assert torch.equal(batch, text.batch(starts, 4, 16, 0, 7))
    assert not torch.equal(batch, text.batch(starts, 4, 16, 0, 8))
    assert not torch.equal(batch, text.batch(starts, 4, 16, 1, 7))


def test_learning_rate() -> None:
    settings = Settings(lr=1.0, warmup=4)
    rates = [settings.learning_rate(step) for step in (0, 1, 3, 15)]
    assert rates == [0.25, 0.5, 1.0, 0.5]


@pytest.mark.slow
def test_the_default_run_beats_the_bigram(tmp_path: Path) -> None:
    run_example(2, ["--seconds", "120", *QUICK, "--out", str(tmp_path)])
    found = summary(tmp_path)
    assert found["heldout"] < found["bigram"]
    assert max(found["balances"][-20:]) < 3
