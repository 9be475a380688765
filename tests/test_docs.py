"""The documentation: its links lead somewhere, its snippets call what there is, and those run that
need no more than a tiny model or two ranks.
"""

import ast
import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

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
    implementation, quantised, from_codes, modules = snippets("docs/transformers.md")
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
    logits = names["model"](ids).logits
    exec(from_codes.replace("int4.pt", str(tmp_path / "int4.pt")), names)
    assert torch.equal(names["model"](ids).logits, logits)


def layer(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    routing: tuple[torch.Tensor, torch.Tensor],
    act: Callable[[torch.Tensor], torch.Tensor] = functional.silu,
) -> torch.Tensor:
    """A gated layer, token by token: gate and up [E, I, H], down [E, H, I]."""
    ids, weights = routing
    return torch.stack(
        [
            sum(
                (
                    w * (down[e] @ (act(gate[e] @ token) * (up[e] @ token)))
                    for e, w in zip(ids[t].tolist(), weights[t], strict=True)
                ),
                torch.zeros_like(token),
            )
            for t, token in enumerate(x)
        ]
    )


def test_from_other_libraries() -> None:
    tokens, hidden, width, experts, top_k = 5, 12, 6, 4, 2
    first, *page = snippets("docs/from-other-libraries.md")
    left = iter(page)

    def run(**names: Any) -> dict[str, Any]:
        """The page's next snippet, after the import of its first."""
        names |= {"torch": torch, "x": x, "topk_ids": routing[0], "topk_weights": routing[1]}
        exec(first.splitlines()[0], names)
        exec(next(left), names)
        return names

    def check(names: dict[str, Any], act: Any = functional.silu) -> None:
        torch.testing.assert_close(names["y"], layer(x, gate, up, down, routing, act))

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.float64)

    x = random(tokens, hidden)
    gate, up = random(experts, width, hidden), random(experts, width, hidden)
    down = random(experts, hidden, width)
    routing = torch.rand(tokens, experts).topk(top_k).indices, torch.rand(tokens, top_k).double()
    numbers = {"num_experts": experts, "hidden_size": hidden}
    joined = torch.cat((gate, up), 1)

    names = run(w1=gate, w3=up, w2=down)
    check(names)
    assert torch.equal(names["w1"], gate)
    assert torch.equal(names["w3"], up)

    fc1, fc2 = (
        SimpleNamespace(**{f"weight{e}": w for e, w in enumerate(weights)})
        for weights in (joined, down)
    )
    check(run(fc1=fc1, fc2=fc2, **numbers))
    weight1, weight2 = joined.mT.reshape(hidden, -1), down.mT.reshape(-1, hidden)
    check(run(weight1=weight1, weight2=weight2, **numbers))

    w1, v1, w2 = (w.reshape(-1, hidden) for w in (gate, up, down.mT))
    check(run(w1=w1, v1=v1, w2=w2, **numbers), partial(functional.gelu, approximate="tanh"))

    check(run(experts=torch.cat((up, gate), 1), output_experts=down))

    alternating = torch.stack((gate, up), 2).flatten(1, 2)
    biases = {"c_fc_bias": random(experts, 2 * width), "c_proj_bias": random(experts, hidden)}
    names = run(c_fc=alternating, c_proj=down, **biases)
    # a bias is a column of weights for an input that is 1
    parts = biases["c_fc_bias"].view(experts, width, 2, 1).unbind(2)
    wide = (torch.cat(pair, 2) for pair in zip((gate, up), parts, strict=True))
    ones, zeros = torch.ones(tokens, 1), torch.zeros(experts, 1, width)
    y = layer(torch.cat((x, ones), 1), *wide, torch.cat((down, zeros), 1), routing)[:, :hidden]
    y = y + (routing[1][..., None] * biases["c_proj_bias"][routing[0]]).sum(1)
    torch.testing.assert_close(names["y"], y)

    weights = {"w13": joined, "w2": down}
    check(run(**weights))

    logits = random(tokens, experts)
    best = logits.topk(top_k)
    names = run(logits=logits, **weights)
    routing = best.indices, best.values.softmax(1)
    check(names)

    names = run(**weights, **numbers)
    one = torch.ones(1, 1, dtype=torch.float64)
    expected = [
        sum(layer(w * x[t : t + 1], gate, up, down, (e.view(1, 1), one)) for e, w in chosen)
        for t, chosen in enumerate(zip(i, w, strict=True) for i, w in zip(*routing, strict=True))
    ]
    torch.testing.assert_close(names["y"], torch.cat(expected))

    sizes = {"a13": (2, hidden), "b13": (2 * width, 2), "a2": (2, width), "b2": (hidden, 2)}
    adapters = {name: random(experts, *size).requires_grad_() for name, size in sizes.items()}
    a13, b13, a2, b2 = adapters.values()
    names = run(**names | adapters | {"scale": 0.5})
    grads = torch.autograd.grad(names["y"].square().sum(), list(adapters.values()))
    gate, up = (joined + 0.5 * b13 @ a13).chunk(2, 1)
    down = down + 0.5 * b2 @ a2
    check(names)
    expected = layer(x, gate, up, down, routing).square().sum()
    for ours, grad in zip(grads, torch.autograd.grad(expected, [a13, b13, a2, b2]), strict=True):
        torch.testing.assert_close(ours, grad)
    assert not list(left)


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
