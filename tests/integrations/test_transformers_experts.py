"""transformers with experts_implementation="moe_kernels" against its own eager experts."""

from __future__ import annotations

import copy
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")

from moe_kernels.integrations import transformers as integration  # noqa: E402
from moe_kernels.integrations.transformers import fused_options, register  # noqa: E402
from tests.conftest import GPU, HAS_GPU  # noqa: E402
from tests.integrations import families  # noqa: E402
from tests.integrations.tiny_models import CONFIGS, tiny_model, tokens  # noqa: E402

register()


class OpCount(TorchDispatchMode):
    """Counts calls of our ops: a test that ran transformers' own experts must not pass."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "moe_kernels":
            name = func._schema.name.split("::")[1]
            self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def experts_calls(model: nn.Module) -> int:
    return sum(hasattr(module, "_apply_gate") for module in model.modules())


# --- whole models -------------------------------------------------------------------------------


def loss_and_gradients(model: Any, implementation: str, ids: Tensor) -> tuple[Any, dict[str, Any]]:
    model.set_experts_implementation(implementation)
    assert model.config._experts_implementation == implementation
    torch.manual_seed(3)  # routers that add noise in training
    model.zero_grad()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    return output, {name: value.grad for name, value in model.named_parameters()}


def eager_rounding(model: Any, gradients: dict[str, Tensor | None], ids: Tensor) -> float:
    """How far two float32 gradients may be apart, at least 3e-6: each as far from float64 as the
    farthest of eager's. Makes the model float64.

    A family's other layers may amplify roundings, and sums of few tokens have few of them. A router
    that draws noise draws other noise in float64, which then tells nothing.
    """
    model.zero_grad()
    _, exact = loss_and_gradients(model.double(), "eager", ids)
    errors = [
        relative_error(gradient.double(), exact[name])
        for name, gradient in gradients.items()
        if gradient is not None
    ]
    return max(3e-6, 2 * max(errors)) if max(errors) < 1e-3 else 3e-6


@pytest.mark.parametrize("family", CONFIGS)
def test_models_equal_eager(family: str) -> None:
    model, ids = tiny_model(family), tokens()
    expected, expected_grads = loss_and_gradients(model, "eager", ids)
    with OpCount() as ops:
        found, grads = loss_and_gradients(model, "moe_kernels", ids)
    calls = experts_calls(model)
    assert ops.calls["fused_experts"] == ops.calls["fused_experts_backward_"] == calls
    assert relative_error(found.logits, expected.logits) < 1e-6
    assert relative_error(found.loss, expected.loss) < 1e-6
    rounding = eager_rounding(model, expected_grads, ids)
    experts_seen = 0
    for name, grad in grads.items():
        if expected_grads[name] is None:
            assert grad is None, name
            continue
        assert relative_error(grad, expected_grads[name]) < rounding, name
        experts_seen += "experts" in name and "shared" not in name
    assert experts_seen >= 2


def test_from_pretrained_and_generate(tmp_path: Path) -> None:
    """A saved model loads with the implementation and generates, with a cache, what eager does."""
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path, experts_implementation="moe_kernels")
    eager = load(tmp_path, experts_implementation="eager")
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    with OpCount() as ops:
        found = model.generate(tokens(), **options)
    assert ops.calls["fused_experts"] == 12 * experts_calls(model)
    assert torch.equal(found, eager.generate(tokens(), **options))
    assert found.shape[1] > tokens().shape[1] + 3


@pytest.mark.parametrize(("family", "checkpointing"), [("qwen3_moe", False), ("gpt_oss", True)])
def test_compiles_in_one_graph(family: str, checkpointing: bool) -> None:
    model, ids = tiny_model(family), tokens()
    if checkpointing:
        model.gradient_checkpointing_enable()
    expected, expected_grads = loss_and_gradients(model, "eager", ids)
    model.set_experts_implementation("moe_kernels")
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(input_ids=ids, labels=ids, use_cache=False)
    found.loss.backward()
    assert relative_error(found.logits, expected.logits) < 1e-6
    grads = {name: value.grad for name, value in model.named_parameters()}
    rounding = eager_rounding(model, expected_grads, ids)
    for name, grad in grads.items():
        assert relative_error(grad, expected_grads[name]) < rounding, name


# --- every experts class ------------------------------------------------------------------------


def inputs(experts: nn.Module, dtype: torch.dtype, tokens: int = 23) -> list[Tensor]:
    """x [T, H] wide enough to reach every clamp, distinct ids [T, K], weights [T, K]."""
    generator = torch.Generator().manual_seed(5)
    hidden = experts.down_proj.shape[2 if experts.is_transposed else 1]
    x = 2 * torch.randn(tokens, hidden, dtype=dtype, generator=generator)
    scores = torch.rand(tokens, experts.num_experts, generator=generator)
    weights, ids = scores.topk(3)
    return [x, ids, weights.to(dtype)]


def run_experts(
    experts: nn.Module, implementation: str, x: Tensor, ids: Tensor, weights: Tensor, grad: Tensor
) -> dict[str, Tensor]:
    """Output and every gradient, by name."""
    experts.config._experts_implementation = implementation
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    experts.zero_grad()
    y = experts(x, ids, weights)
    y.backward(grad.to(y.dtype))
    results = {"y": y.detach(), "dx": x.grad, "dweights": weights.grad}
    return results | {name: value.grad for name, value in experts.named_parameters()}


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert relative_error(value, expected[name]) < tolerance, name


# Families, not all of them in the oldest transformers, whose own gate or norm computes in float32;
# and classes with a gate that is none of ours, or with a norm of what each expert gives.
COMPUTE_IN_FLOAT32 = {"openai_privacy_filter", "beam", "inkling2", "inkling2_loop", "muse_spark"}
ROW_BY_ROW = {"Inkling2Experts", "Inkling2LoopExperts", "MuseSparkExperts"}


@pytest.mark.parametrize("family", families.families(), ids=lambda family: family.experts)
def test_every_experts_class_equals_eager(family: families.Family) -> None:
    """In float64, with sentinel ids: eager gets an expert with weight zero in their place."""
    experts = family.build(torch.float64)
    for name, value in (("alpha", 1.25), ("limit", 0.75)):  # not what they are by default
        for own in (name, f"swiglu_{name}"):
            if hasattr(experts, own):
                setattr(experts, own, value)
    x, ids, weights = inputs(experts, torch.float64)
    dropped = torch.rand(ids.shape, generator=torch.Generator().manual_seed(6)) < 0.2
    dropped[4] = True  # a token without any expert of this rank
    sentinel = torch.where(torch.rand(ids.shape) < 0.5, -1, experts.num_experts)
    grad = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(7))

    expected = run_experts(experts, "eager", x, ids, weights.masked_fill(dropped, 0.0), grad)
    expected["dweights"].masked_fill_(dropped, 0.0)
    ids = torch.where(dropped, sentinel, ids)
    with OpCount() as ops:
        found = run_experts(experts, "moe_kernels", x, ids, weights, grad)
    if family.experts in ROW_BY_ROW:
        assert ops.calls["grouped_gemm"] == 4
        assert "fused_experts" not in ops.calls
    else:
        assert ops.calls == {"fused_experts": 1, "fused_experts_backward_": 1}
    check_equal(found, expected, 1e-6 if family.name in COMPUTE_IN_FLOAT32 else 1e-12)


def test_table_of_families_is_up_to_date() -> None:
    """docs/transformers.md claims a number of families and a path for each."""
    text = (Path(__file__).parents[2] / "docs/transformers.md").read_text(encoding="utf-8")
    documented = re.search(r"transformers (\d+\.\d+\.\d+)", text)
    assert documented is not None
    if documented[1] != transformers.__version__:
        pytest.skip(f"the table is of transformers {documented[1]}")
    assert families.table() in text
    names = {family.name for family in families.families()}
    assert f"{len(names)} model families" in text
    for name in families.outside_the_interface():
        assert f"`{name}`" in text
        assert name not in names


# --- gates that are not ours --------------------------------------------------------------------


def experts_class(**layout: Any) -> type[nn.Module]:
    """Experts of any layout, written as transformers' classes are, with one eager loop for all."""

    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, inner, hidden = 5, 10, 12
            self.act_fn = config.act_fn
            wide = inner * (2 if layout.get("has_gate", True) else 1)
            first, second = (wide, hidden), (hidden, inner)
            if layout.get("is_transposed"):
                first, second = first[::-1], second[::-1]
            up = "gate_up_proj" if layout.get("has_gate", True) else "up_proj"
            for name, shape in ((up, first), ("down_proj", second)):
                setattr(self, name, nn.Parameter(torch.randn(5, *shape, dtype=torch.float64)))
            if layout.get("has_bias"):
                for name, size in ((up, wide), ("down_proj", hidden)):
                    bias = nn.Parameter(torch.randn(5, size, dtype=torch.float64))
                    setattr(self, f"{name}_bias", bias)

        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            up = "gate_up_proj" if self.has_gate else "up_proj"
            y = torch.zeros_like(x)
            for e in range(self.num_experts):
                first, second = getattr(self, up)[e], self.down_proj[e]
                if not self.is_transposed:
                    first, second = first.mT, second.mT
                token, slot = torch.where(ids == e)
                h = x[token] @ first
                if self.has_bias:
                    h = h + getattr(self, f"{up}_bias")[e]
                out = (self._apply_gate(h) if self.has_gate else self.act_fn(h)) @ second
                if self.has_bias:
                    out = out + self.down_proj_bias[e]
                if getattr(self, "has_post_expert_norm", False):
                    out = self.post_expert_norm(out)
                y = y.index_add(0, token, out * weights[token, slot, None])
            return y

    return transformers.integrations.use_experts_implementation(**layout)(Experts)


def build(act_fn: Any, gate: Any = None, **layout: Any) -> nn.Module:
    torch.manual_seed(0)
    built = experts_class(**layout)
    if gate is not None:
        built._apply_gate = gate
    return built(types.SimpleNamespace(act_fn=act_fn, _experts_implementation="eager"))


def tanh_gate(self: nn.Module, gate_up: Tensor) -> Tensor:
    up, gate = gate_up.chunk(2, dim=-1)  # the other way round
    return torch.tanh(gate) * up.exp2()


ACT2FN = transformers.activations.ACT2FN
OTHER_GATES = {
    "custom gate": (ACT2FN["silu"], tanh_gate, {}),
    "custom gate, bias, transposed": (None, tanh_gate, {"has_bias": True, "is_transposed": True}),
    "custom gate, bias": (None, tanh_gate, {"has_bias": True}),
    "erf gelu": (ACT2FN["gelu"], None, {}),
    "mish": (ACT2FN["mish"], None, {"is_transposed": True}),
    "a function": (torch.tanh, None, {}),
    "no gate, relu": (ACT2FN["relu"], None, {"has_gate": False, "has_bias": True}),
}
OUR_GATES = {
    "silu": (ACT2FN["swish"], None, {"has_bias": True}),
    "silu, transposed": (ACT2FN["silu"], None, {"is_transposed": True, "has_bias": True}),
    "tanh gelu": (ACT2FN["gelu_pytorch_tanh"], None, {}),
    "new gelu": (ACT2FN["gelu_new"], None, {}),
    "fast gelu": (ACT2FN["gelu_fast"], None, {}),
    "accurate gelu": (ACT2FN["gelu_accurate"], None, {}),
    "relu": (ACT2FN["relu"], None, {}),
    "no gate, silu": (ACT2FN["silu"], None, {"has_gate": False, "is_transposed": True}),
    "no gate, gelu": (ACT2FN["gelu"], None, {"has_gate": False, "has_bias": True}),
    "no gate, relu2": (ACT2FN["relu2"], None, {"has_gate": False}),
}


@pytest.mark.parametrize("case", [*OTHER_GATES, *OUR_GATES])
def test_gates_and_layouts_equal_eager(case: str) -> None:
    act_fn, gate, layout = {**OTHER_GATES, **OUR_GATES}[case]
    experts = build(act_fn, gate, **layout)
    x, ids, weights = inputs(experts, torch.float64)
    grad = torch.randn_like(x)
    expected = run_experts(experts, "eager", x, ids, weights, grad)
    with OpCount() as ops:
        found = run_experts(experts, "moe_kernels", x, ids, weights, grad)
    # "fast gelu" has its constant to ten digits
    check_equal(found, expected, 1e-9 if case == "fast gelu" else 1e-12)
    assert ("fused_experts" in ops.calls) == (case in OUR_GATES)
    assert ("grouped_gemm" in ops.calls) == (case in OTHER_GATES)


def test_rows_path_drops_sentinels_and_takes_no_tokens() -> None:
    """A gate that makes inf of a zero row must not reach the tail of dropped rows."""

    def inverse_gate(self: nn.Module, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return up / gate

    experts = build(None, inverse_gate, has_bias=True)
    x, ids, weights = inputs(experts, torch.float64)
    grad = torch.randn_like(x)
    dropped = torch.rand(ids.shape) < 0.3
    expected = run_experts(experts, "eager", x, ids, weights.masked_fill(dropped, 0.0), grad)
    expected["dweights"].masked_fill_(dropped, 0.0)
    ids = ids.masked_fill(dropped, experts.num_experts)
    check_equal(run_experts(experts, "moe_kernels", x, ids, weights, grad), expected, 1e-11)

    nothing = run_experts(experts, "moe_kernels", x[:0], ids[:0], weights[:0], grad[:0])
    assert nothing["y"].shape == (0, x.shape[1])
    assert all(not value.any() for value in nothing.values())


def test_a_changed_gate_runs_as_it_is() -> None:
    """Known gates are known by name and by what they compute; neither alone is enough."""
    experts = next(family for family in families.families() if family.name == "gpt_oss").build(
        torch.float64
    )
    assert fused_options(experts) is not None
    with pytest.raises(TypeError, match=r"must be a module of .* interface; got Linear"):
        fused_options(torch.nn.Linear(2, 2))
    original = type(experts)._apply_gate

    def changed(self: nn.Module, gate_up: Tensor) -> Tensor:
        return 2 * original(self, gate_up)

    def reads_more(self: nn.Module, gate_up: Tensor) -> Tensor:
        return original(self, gate_up) * (2 if self.config.num_hidden_layers else 1)

    for gate in (changed, reads_more):
        gate.__module__, gate.__qualname__ = original.__module__, original.__qualname__
        experts._apply_gate = types.MethodType(gate, experts)
        assert fused_options(experts) is None
        x, ids, weights = inputs(experts, torch.float64)
        grad = torch.ones_like(x)
        expected = run_experts(experts, "eager", x, ids, weights, grad)
        check_equal(run_experts(experts, "moe_kernels", x, ids, weights, grad), expected, 1e-12)
    del experts._apply_gate
    experts.limit = 1.5  # options are read when they are used
    assert fused_options(experts)["limit"] == 1.5
    with torch._subclasses.FakeTensorMode():
        assert fused_options(copy.copy(experts)) is not None


def test_rows_path_compiles_in_one_graph() -> None:
    experts = build(ACT2FN["mish"], has_bias=True)
    x, ids, weights = inputs(experts, torch.float64)
    expected = run_experts(experts, "eager", x, ids, weights, torch.ones_like(x))
    experts.config._experts_implementation = "moe_kernels"
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    weights.requires_grad_()
    experts.zero_grad()
    y = compiled(x, ids, weights)
    y.sum().backward()
    found = {"y": y.detach(), "dx": x.grad, "dweights": weights.grad}
    found |= {name: value.grad for name, value in experts.named_parameters()}
    check_equal(found, expected, 1e-12)


# --- dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["silu", "mish"])  # the fused path and the rows path
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("device", ["cpu", *([GPU] if HAS_GPU else [])])
def test_bf16_is_as_close_as_eager(act: str, autocast: bool, device: str) -> None:
    """At most 1.5 times the error of transformers' experts, in bf16 and under autocast."""
    truth = build(ACT2FN[act], has_bias=True)
    x, ids, weights = inputs(truth, torch.float64, tokens=64)
    grad = torch.randn_like(x)
    truth.requires_grad_().to(torch.bfloat16).to(torch.float64)
    x, grad = (value.to(torch.bfloat16).to(torch.float64) for value in (x, grad))
    expected = run_experts(truth, "eager", x, ids, weights, grad)
    dtype = torch.float32 if autocast else torch.bfloat16
    experts = copy.deepcopy(truth).to(device, dtype)
    arguments = [x.to(device, dtype), ids.to(device), weights.to(device, torch.float32)]
    results = {}
    for implementation in ("batched_mm", "moe_kernels"):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            found = run_experts(experts, implementation, *arguments, grad.to(device))
        results[implementation] = {name: value.cpu() for name, value in found.items()}
    for name, value in expected.items():
        ours, theirs = (results[key][name] for key in ("moe_kernels", "batched_mm"))
        assert ours.dtype == theirs.dtype, name
        yardstick = relative_error(theirs.double(), value)
        assert relative_error(ours.double(), value) <= 1.5 * yardstick, name


def test_hidden_states_of_another_dtype() -> None:
    """float32 hidden states (a norm kept in float32) over bf16 experts come back as float32."""
    experts = build(ACT2FN["silu"]).to(torch.bfloat16)
    x, ids, weights = inputs(experts, torch.float32)
    experts.config._experts_implementation = "moe_kernels"
    y = experts(x, ids, weights)
    assert y.dtype == torch.float32
    assert torch.equal(y, experts(x.bfloat16(), ids, weights).float())


# --- registration -------------------------------------------------------------------------------


def test_registering_twice_changes_nothing() -> None:
    functions = transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS
    before = dict(functions)
    register()
    assert dict(functions) == before
    assert "moe_kernels" in functions


def test_missing_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers >= 5\.7.*pip install"):
        register()


@pytest.mark.parametrize("version", ["4.57.3", "5.6.0"])
def test_old_transformers_is_named(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    with pytest.raises(ImportError, match=rf">= 5\.7; found {re.escape(version)}.*pip install"):
        register()


def test_experts_that_normalise_what_they_give() -> None:
    experts: Any = build(ACT2FN["silu"])
    experts.has_post_expert_norm = True  # transformers tells of it since 5.18
    experts.post_expert_norm = nn.RMSNorm(12, dtype=torch.float64)
    nn.init.normal_(experts.post_expert_norm.weight)
    x, ids, weights = inputs(experts, torch.float64)
    grad = torch.randn(x.shape, dtype=x.dtype)
    found = run_experts(experts, "moe_kernels", x, ids, weights, grad)
    check_equal(found, run_experts(experts, "eager", x, ids, weights, grad), 1e-12)
    assert fused_options(experts) is None


def test_traits_of_a_later_transformers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignoring one would give wrong results without an error."""

    def later(experts_class: Any = None, *, has_gate: bool = True, is_paired: bool = False) -> None:
        """As use_experts_implementation."""

    monkeypatch.setattr(transformers.integrations.moe, "use_experts_implementation", later)
    integration._later_traits.cache_clear()
    try:
        experts: Any = build(ACT2FN["silu"])
        x, ids, weights = inputs(experts, torch.float64)
        assert fused_options(experts) is not None
        experts.config._experts_implementation = "moe_kernels"
        experts.is_paired = True
        with pytest.raises(ValueError, match="Experts has is_paired=True, which this moe"):
            experts(x, ids, weights)
    finally:
        integration._later_traits.cache_clear()
