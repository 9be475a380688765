"""``python -m benchmarks simulate``: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from benchmarks import environment, network, results, simulate
from benchmarks.network import Layer, Machine
from benchmarks.ops._shapes import LAYERS
from benchmarks.registry import Shape

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
TOKENS = (128, 4096)  # of a step of decoding, and of training
OUT = environment.ROOT / "runs" / "simulate"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "simulate", help="expected times of the exchange of tokens on 8 to 1024 GPUs: a model"
    )
    parser.add_argument("--layer", choices=list(LAYERS), default="deepseek-v3")
    parser.add_argument(
        "--shape",
        default="E=1024",
        help="sizes other than the layer's; default E=1024: 1024 GPUs can share the experts",
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="of each GPU")
    parser.add_argument("--gpus", nargs="+", type=int, default=GPUS)
    parser.add_argument("--fp8", action="store_true", help="dispatch fp8, combine bf16")
    parser.add_argument(
        "--set",
        nargs="+",
        default=(),
        metavar="NAME=VALUE",
        help="other assumptions, in seconds and bytes a second, such as rdma.bandwidth=25e9",
    )
    parser.add_argument("--results", type=Path, help="a results file of run dispatch")
    parser.add_argument("--out", type=Path, default=OUT, help="a folder")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    hidden, _, experts, top_k = LAYERS[options.layer]
    shape = Shape({"H": hidden, "E": experts, "K": top_k}).replace(options.shape)
    layers = [
        Layer(tokens, shape["H"], shape["E"], shape["K"], options.fp8) for tokens in options.tokens
    ]
    machine = network.with_settings(Machine(), _settings(options.set))
    _check(layers[0], machine, options)
    report, picture = options.out / "dispatch.md", options.out / "dispatch.png"
    results.make_way(report)
    parts, software = ["# Dispatch: a model"], {}
    if options.results:
        found = results.read(options.results)
        fits = simulate.fit(found["rows"])
        if not fits:
            raise ValueError(f"{options.results} has no forward times of dispatch at several sizes")
        parts.append(f"## Measured on {found['device']['name']} (commit {found['commit']['hash']})")
        sizes = next(row["sizes"] for row in found["rows"] if row["op"] == "dispatch")
        measured = Layer(4096, sizes["H"], sizes["E"], sizes["K"])
        if found["device"]["type"] == "cuda":
            software = simulate.measured_software(fits, measured, machine)
            parts.append(f"Costs of calls and rows below are measured for: {', '.join(software)}.")
        else:
            parts += [
                f"A round trip is us a call + ns a row sent. The last columns extend it to T"
                f"{measured.tokens} with more ranks, each on a core of its own ({simulate.LABEL}).",
                simulate.host_ranks(fits, measured),
                "CPU ranks say nothing of the costs of GPUs: those below are assumed.",
            ]
    parts += [
        "## GPUs (docs/dispatch-model.md has the assumptions)",
        simulate.tables(layers, machine, options.gpus, software),
    ]
    text = "\n\n".join(parts) + "\n"
    if find_spec("matplotlib") is None:
        print("benchmarks: no plot, which needs matplotlib", file=sys.stderr)
        report.write_text(text)
        print(f"{text}\nwritten: {report}")
        return 0
    simulate.draw(layers, machine, options.gpus, software, picture)
    report.write_text(f"{text}\n![{simulate.LABEL}](dispatch.png)\n")
    print(f"{text}\nwritten: {report}, {picture}")
    return 0


def _settings(texts: list[str]) -> dict[str, float]:
    values = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            values[name] = float(value)
        except ValueError:
            raise ValueError(f"--set must be NAME=NUMBER; got {text!r}") from None
    return values


def _check(layer: Layer, machine: Machine, options: argparse.Namespace) -> None:
    """That experts and GPUs divide evenly: the model knows no other case."""
    if layer.top_k > layer.experts:
        raise ValueError(f"K must be at most E = {layer.experts}; got {layer.top_k}")
    if min(options.tokens) < 1:
        raise ValueError(f"--tokens must be at least 1; got {min(options.tokens)}")
    for count in options.gpus:
        ranks = network.expert_parallel(layer, count)
        node = machine.gpus_per_node
        if count < 1 or layer.experts % ranks or (ranks > node and ranks % node):
            raise ValueError(
                f"--gpus must divide E = {layer.experts} (or be larger) and be at most, or a "
                f"multiple of, {node} GPUs of a node; got {count}"
            )
