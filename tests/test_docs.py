"""The documentation: its links lead somewhere, its snippets call what there is, and those run that
need no more than a tiny model or two ranks.
"""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.parallel.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
        *ROOT.glob("docs/*.md"),
    ]
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", NAMES)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = path if not name else (path.parent / name).resolve()
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


@pytest.mark.parametrize("page", [page for page in NAMES if snippets(page)])
def test_snippets_call_what_there_is(page: str) -> None:
    known: dict[str, Any] = {}
    for snippet in snippets(page):
        tree = ast.parse(snippet)
        imports = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), page, "exec"), known)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if (function := known.get(node.func.id)) is None:
                continue
            keywords = {k.arg: None for k in node.keywords if k.arg}
            spread = any(isinstance(a, ast.Starred) for a in node.args)
            arguments = [] if spread else [None] * len(node.args)
            inspect.signature(function).bind_partial(*arguments, **keywords)


def test_quantised_experts() -> None:
    x, ids, weights = torch.randn(5, 64), torch.randint(4, (5, 2)), torch.rand(5, 2)
    names = {
        "x": x,
        "w13": torch.randn(4, 64, 64) / 8,
        "w2": torch.randn(4, 64, 32) / 8,
        "topk_ids": ids,
        "topk_weights": weights,
    }
    exec(snippets("docs/quantized-experts.md")[0], names)
    assert names["y"].shape == x.shape
    assert names["y"].isfinite().all()


def test_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.integrations.tiny_models import tiny_model, tokens

    original: Any = tiny_model("qwen3_moe")
    original.save_pretrained(tmp_path / "original")
    implementation, quantised, modules = snippets("docs/transformers.md")
    names: dict[str, Any] = {"name": str(tmp_path / "original"), "directory": tmp_path / "saved"}
    exec(implementation, names)
    assert names["model"].config._experts_implementation == "moe_kernels"
    exec(modules, names)
    ids = tokens(2)
    torch.testing.assert_close(
        names["model"](ids).logits, original(ids).logits, atol=1e-5, rtol=1e-5
    )
    for key, value in type(original).from_pretrained(tmp_path / "saved").state_dict().items():
        assert torch.equal(value, original.state_dict()[key]), key
    exec(quantised.replace("model.generate(...)", ""), names)
    assert not any("experts" in name for name, _ in names["model"].named_parameters())


def exchange(rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(3, 8)
    names = {
        "group": dist.group.WORLD,
        "num_experts": 4,
        "x": x,
        "topk_ids": torch.randint(4, (3, 2)),
        "topk_weights": torch.full((3, 2), 0.5),
        "my_experts": lambda x, ids, weights: x * (weights * (ids >= 0)).sum(1, keepdim=True),
    }
    exec(snippets("docs/dispatch.md")[0], names)
    return x, names["out"]


def test_dispatch() -> None:
    for x, out in run_ranks(2, exchange):
        torch.testing.assert_close(out, x)
