"""The snippets of README.md run, and do what the README says of them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
ONE_LAYER, IMPLEMENTATION, QUANTISED, TWO_RANKS = SNIPPETS


def execute(snippet: str, **names: Any) -> dict[str, Any]:
    exec(compile(snippet, "README.md", "exec"), names)
    return names


def batch(rank: int) -> torch.Tensor:
    from tests.integrations.tiny_models import tokens

    return tokens(4).chunk(2)[rank]


def model_to_load(folder: Path) -> tuple[Any, str]:
    pytest.importorskip("transformers")
    from tests.integrations.tiny_models import tiny_model

    model: Any = tiny_model("qwen3_moe")
    model.save_pretrained(folder / "original")
    return model, str(folder / "original")


def test_one_layer():
    names = execute(ONE_LAYER)
    assert names["y"].shape == (names["tokens"], names["hidden"])
    for name in ("x", "router", "gate_up", "down"):
        assert names[name].grad.isfinite().all()
        assert names[name].grad.count_nonzero() > 0


def test_experts_implementation(tmp_path):
    expected, name = model_to_load(tmp_path)
    model = execute(IMPLEMENTATION, name=name)["model"]
    assert model.config._experts_implementation == "moe_kernels"
    ids = batch(0)
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, atol=1e-5, rtol=1e-5)


def test_quantised_experts(tmp_path):
    expected, name = model_to_load(tmp_path)
    model = execute(IMPLEMENTATION, name=name)["model"]
    execute(QUANTISED, model=model)
    with torch.no_grad():
        error = model(batch(0)).logits - expected(batch(0)).logits
    assert 0 < error.norm() < 0.2 * expected(batch(0)).logits.norm()
    assert not any("experts" in parameter for parameter, _ in model.named_parameters())


def run_two_ranks(rank: int, ranks: int, name: str, directory: str) -> dict[str, torch.Tensor]:
    names = execute(TWO_RANKS, name=name, directory=directory, ids=batch(rank))
    return {key: p.grad.full_tensor() for key, p in names["model"].named_parameters()}


def test_two_ranks(tmp_path):
    model, name = model_to_load(tmp_path)
    found = run_ranks(2, run_two_ranks, name, str(tmp_path / "saved"), timeout=120)

    loss = sum(model(input_ids=batch(rank), labels=batch(rank)).loss for rank in range(2)) / 2
    loss.backward()
    compared = 0
    for key, parameter in model.named_parameters():
        if key in found[0]:  # all but the experts and the router, whose names are ours
            for grads in found:
                torch.testing.assert_close(grads[key], parameter.grad, atol=1e-6, rtol=1e-4)
            compared += 1
    assert compared >= 10
    ours = {key: g for key, g in found[0].items() if ".experts." in key and "layers.0." in key}
    gate_up = next(g for key, g in ours.items() if "gate" in key)
    expected = model.model.layers[0].mlp.experts.gate_up_proj.grad
    torch.testing.assert_close(gate_up.norm(), expected.norm(), atol=1e-6, rtol=1e-4)

    saved = type(model).from_pretrained(tmp_path / "saved").state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(saved[key], value), key
