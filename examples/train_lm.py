"""Train a small Mixture-of-Experts language model on real text, byte by byte.

A transformers Qwen3-MoE gets its MoE layers replaced, its experts spread over the ranks (Expert
Parallelism) and the rest sharded with FSDP2. One line starts it on the CPU's cores or on GPUs:

    torchrun --standalone --nproc-per-node=2 examples/train_lm.py

Every rank has a GPU of its own; where there are fewer, all compute on the CPU, and say so.
``--ep --dp-replicate --cp --pp`` say what the ranks share, ``--ac --accumulate`` how a step is
computed; none of them changes what is learnt. Ctrl-C leaves a checkpoint; ``--resume`` goes on from
it, with the same ranks bit for bit. The end of a run is in ``<out>``: summary.json, train_lm.png,
and checkpoints/.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from lm import checkpoint, cluster, data, evaluation, model, network, report, training
from lm.settings import Settings

PROMPT = "The "


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400, help="to take in this run, at most")
    parser.add_argument("--seconds", type=float, default=120.0, help="of training, at most")
    parser.add_argument("--out", type=Path, default=Path("runs/train_lm"), help="folder")
    parser.add_argument(
        "--resume",
        nargs="?",
        type=Path,
        const=...,
        help="go on from the last checkpoint of --out, or from the one given",
    )
    parser.add_argument("--text", type=Path, help="a file to learn instead of Python's topics")
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--compare-seconds", type=float, default=20.0, help="0 leaves it out")
    parser.add_argument("--sample", type=int, default=300, help="bytes to generate at the end")
    ranks = parser.add_argument_group("the ranks, and how a step is computed on them")
    ranks.add_argument(
        "--ep", type=int, help="ranks that share the experts; default: most that fit"
    )
    ranks.add_argument("--dp-replicate", type=int, default=1, help="copies of the parameters")
    ranks.add_argument("--cp", type=int, default=1, help="ranks that share sequences")
    ranks.add_argument("--pp", type=int, default=1, help="pipeline stages that share the layers")
    ranks.add_argument(
        "--ac",
        choices=("off", "full", "router", "selective"),
        default="off",
        help="activation checkpointing: of everything, all but the routing, or the cheap parts",
    )
    ranks.add_argument("--accumulate", type=int, default=1, help="parts of a batch, in turn")
    run = parser.add_argument_group("the run itself (from the checkpoint when it is resumed)")
    for field in fields(Settings):
        if field.name != "text":
            name = "--" + field.name.replace("_", "-")
            kind = type(field.default)
            run.add_argument(name, type=kind, help=f"default {field.default}")
    return parser.parse_args(arguments)


def choose_settings(
    options: argparse.Namespace, text: data.Text
) -> tuple[Settings, checkpoint.Progress, Path | None]:
    """Those asked for; in a resumed run those of its checkpoint, which must not be contradicted."""
    given = {
        field.name: getattr(options, field.name)
        for field in fields(Settings)
        if field.name != "text" and getattr(options, field.name) is not None
    }
    if options.steps < 1 or options.save_every < 1:
        raise ValueError("--steps and --save-every must be at least 1")
    if options.resume is None:
        settings = replace(Settings(text=text.sha256), **given)
        settings.check()
        return settings, checkpoint.Progress(), None
    path = checkpoint.find(options.out if options.resume is ... else options.resume)
    settings, progress = checkpoint.read_about(path)
    for name, value in {**given, "text": text.sha256}.items():
        if getattr(settings, name) != value:
            raise ValueError(
                f"--resume: {path} was trained with {name} = {getattr(settings, name)}; "
                f"got {value}. Leave it out, or start anew without --resume."
            )
    return settings, progress, path


def make_folder(out: Path) -> None:
    """At once, not at the first checkpoint."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out must be a folder: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    text = data.load(options.text)
    settings, progress, resumed = choose_settings(options, text)
    text.starts(settings.length)  # there must be some
    chosen = {field.name: getattr(options, field.name) for field in fields(cluster.Parallelism)}
    parallelism = cluster.Parallelism(**chosen)
    settings.check_layout(parallelism.ep, parallelism.cp, parallelism.pp, parallelism.accumulate)
    ranks = cluster.start(settings.experts, parallelism)
    try:
        settings.check_batch(ranks.data_ranks, ranks.stages, parallelism.accumulate)
        make_folder(options.out)
        return run(options, text, settings, progress, resumed, ranks)
    finally:
        ranks.stop()


def run(
    options: argparse.Namespace,
    text: data.Text,
    settings: Settings,
    progress: checkpoint.Progress,
    resumed: Path | None,
    ranks: cluster.Cluster,
) -> int:
    def say(line: str) -> None:
        if ranks.rank == 0:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    begin = time.perf_counter()
    if not report.can_draw():
        say("there will be no picture, which needs matplotlib: pip install matplotlib")
    levels = data.entropies(text)
    parts = "one part" if options.accumulate == 1 else f"{options.accumulate} parts"
    say(
        f"{ranks.world} ranks on {ranks.device.type}: {ranks.describe()}; activation "
        f"checkpointing {options.ac}, {parts} a batch"
    )
    say(f"{len(text.values):,} bytes of text, {sum(b - a for a, b in text.heldout):,} held out")
    net = model.make_trained_model(settings).to(ranks.device)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    probe = text.batch(text.starts(settings.length), 2, settings.length, settings.seed, 0)
    difference = model.replace_and_compare(net, settings, probe[:, :-1].to(ranks.device))
    say(
        f"Qwen3-MoE, {parameters / 1e6:.1f} M parameters; {len(model.moe_layers(net))} MoE layers "
        f"replaced: largest logit difference {difference:.1e}"
    )
    sharded = network.Network(net, settings, ranks)
    del net  # a pipeline stage keeps its own layers alone
    optimizer = training.make_optimizer(sharded.module, settings)
    torch.manual_seed(settings.seed)
    first_step = progress.step
    if resumed is not None:
        checkpoint.load(resumed, sharded.module, optimizer)
        say(f"resumed from {resumed}, after step {progress.step}")

    saved: Path | None = None

    def save() -> Path:
        return checkpoint.save(options.out, sharded.module, optimizer, settings, progress)

    bar = tqdm(total=options.steps, unit="step", disable=ranks.rank != 0, dynamic_ncols=True)

    def after_step(now: checkpoint.Progress, speed: training.Speed) -> None:
        bar.set_postfix_str(
            f"loss {now.losses[-1]:.3f}, {speed.tokens / speed.seconds[-1]:,.0f} tokens/s, "
            f"expert load max/mean {now.balances[-1]:.2f}",
            refresh=False,
        )
        bar.update()
        if now.step % options.save_every == 0:
            save()

    with training.StopOnSignal() as stop:
        speed = training.train(
            sharded,
            optimizer,
            text,
            settings,
            ranks,
            progress,
            steps=options.steps,
            seconds=options.seconds,
            stop=stop,
            after_step=after_step,
        )
        bar.close()
        saved = save()
    taken = progress.step - first_step
    if taken < options.steps and not stop.signal:
        say(f"{options.seconds:.0f} seconds are over after {taken} of {options.steps} steps")
    say(f"checkpoint: {saved}")
    if stop.signal:
        say(f"stopped by signal {stop.signal} after step {progress.step}; go on with --resume")
        return 128 + stop.signal

    heldout = evaluation.heldout_loss(sharded, text, settings, ranks)
    say(
        f"held out {heldout:.3f} nats per byte; bigram {levels['bigram']:.3f} "
        f"(counted on the training part {levels['bigram_counted']:.3f}), "
        f"unigram {levels['unigram']:.3f}"
    )
    generated = evaluation.sample(sharded, settings, ranks, PROMPT, options.sample)
    say(f"--- sample\n{generated}\n---")
    compared: dict[str, float] = {}
    if options.compare_seconds > 0:
        compared = evaluation.compare_experts(text, settings, ranks, options.compare_seconds)
        told = ", ".join(f"{name} {value:,.0f}" for name, value in compared.items())
        say(f"training step of the transformers model, tokens/s by experts: {told}")
    if ranks.rank == 0:
        picture = options.out / "train_lm.png" if report.can_draw() else None
        if picture is not None:
            report.draw(picture, progress, levels, heldout)
        summary = {
            "heldout": heldout,
            **levels,
            "max_logit_difference": difference,
            "tokens_per_second": compared,
            "training_tokens_per_second": speed.tokens_per_second(),
            "parameters": parameters,
            "ranks": ranks.world,
            "expert_parallel": ranks.expert_parallel,
            "meshes": ranks.describe(),
            "parallelism": asdict(ranks.parallelism),
            "device": ranks.device.type,
            "first_step": first_step,
            "first_loss": progress.losses[first_step],
            "steps": progress.step,
            "losses": progress.losses,
            "gradient_norms": progress.norms,
            "balances": progress.balances,
            "expert_load": progress.load,
            "sample": generated,
            "seconds": time.perf_counter() - begin,
            "checkpoint": str(saved),
            "picture": None if picture is None else str(picture),
            "settings": settings.as_json(),
            "versions": versions(),
        }
        report.write(options.out / "summary.json", summary)
        written = [options.out / "summary.json", *([picture] if picture else [])]
        say(f"written: {', '.join(map(str, written))}")
    return 0


def versions() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    try:
        code = main()
    except ValueError as error:
        sys.exit(f"train_lm.py: {error}")
    sys.exit(code)
