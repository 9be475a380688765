"""The benchmark of whole models on a tiny one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import models, results
from benchmarks.cli import main
from benchmarks.limits import Limits
from benchmarks.ops.model_decode import model_decode
from benchmarks.registry import Case, Shape

SHAPE = Shape({"L": 2, "T": 5, "C": 6, "H": 64, "I": 32, "E": 8, "K": 2})


@pytest.fixture(scope="module")
def case() -> Case:
    return model_decode.make_case(SHAPE, torch.float32, torch.device("cpu"), "uniform", 0)


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(flops=1e11, bytes=1e10)
    monkeypatch.setattr("benchmarks.runner.measure_limits", lambda *_: limits)
    out = tmp_path / "out.json"
    providers = ("moe_kernels", "transformers_eager", "transformers_grouped_mm", "copy_limit")
    shape = ",".join(f"{letter}={size}" for letter, size in SHAPE.sizes.items())
    arguments = ["run", "model_decode", "--device", "cpu", "--shape", shape, "--out", str(out)]
    assert main([*arguments, "--rounds", "2", "--provider", *providers]) == 0
    rows = results.read(out)["rows"]
    assert {row["provider"] for row in rows} == set(providers)
    for row in rows:
        assert row["direction"] == "forward"
        assert row["void"] == row["note"] == ""
        assert row["ms"] > 0


@pytest.mark.parametrize("implementation", ["eager", "moe_kernels"])
def test_a_step_repeats_and_is_right(case: Case, implementation: str) -> None:
    """In float32, where rounding leaves no doubt; the cache is as it was after each step."""
    run = models.decoding(implementation)(case).run
    with torch.inference_mode():
        first = [run(inputs) for inputs in case.inputs]
        assert all(torch.equal(run(i), y) for i, y in zip(case.inputs, first, strict=True))
        rows = slice(1, 4)
        for inputs, found in zip(case.inputs[:2], first, strict=False):
            right = models.true_logits(case, inputs, rows)
            assert (found[rows].double() - right).norm() < 1e-5 * right.norm()


def test_a_step_is_the_last_of_a_whole_pass(case: Case) -> None:
    """A cache that a pass over the context has filled, and one more token."""
    from transformers import StaticCache

    model = models.build_model(case, "eager", case.weights)
    context, tokens = SHAPE["C"], torch.randint(0, models.VOCABULARY, (SHAPE["T"], SHAPE["C"] + 1))
    with torch.inference_mode():
        whole = model(input_ids=tokens, use_cache=False).logits[:, -1]
        cache = StaticCache(model.config, max_cache_len=context + 1)
        model(input_ids=tokens[:, :context], past_key_values=cache, use_cache=True)
        for _ in range(2):
            found = models.decode(model, cache, context, tokens[:, context:])
            assert torch.allclose(found, whole, atol=1e-5)


def test_no_router_is_in_doubt(case: Case) -> None:
    model = models.build_model(case, "moe_kernels", case.weights)
    cache = models.make_cache(case, case.inputs[0], slice(None), case.dtype)
    with torch.inference_mode():
        for inputs in case.inputs:
            layers = models.chosen_experts(model, cache, SHAPE["C"], inputs["tokens"])
            assert min(float(gap.min()) for _, gap in layers) > 0.02
            hit = sum(len(ids.unique()) for ids, _ in layers)
            assert hit == int(inputs["experts_hit"])


def test_the_cost_counts_every_needed_weight_once(case: Case) -> None:
    cost = model_decode.cost(case)["forward"]
    hit = sum(int(i["experts_hit"]) for i in case.inputs) / len(case.inputs)
    experts = sum(w.numel() for name, w in case.weights.items() if "experts" in name)
    norms = sum(w.numel() for w in case.weights.values() if w.dim() == 1)
    embedding = case.weights["model.embed_tokens.weight"].numel()
    others = sum(w.numel() for w in case.weights.values()) - experts - norms - embedding
    cache = 2 * 2 * 5 * 6 * models.KEY_HEADS * models.HEAD
    assert cost.bytes == 4 * (experts * hit / (2 * 8) + others + cache)
