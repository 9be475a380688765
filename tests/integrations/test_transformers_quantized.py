"""Models of transformers whose experts are quantised."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from moe_kernels.integrations.transformers import (  # noqa: E402
    QuantizedExpertsLayer,
    quantize_experts_of,
)
from moe_parallel.integrations.transformers import replace_moe_layers  # noqa: E402
from tests.integrations.test_transformers_experts import OpCount, relative_error  # noqa: E402
from tests.integrations.tiny_models import tiny_model, tokens  # noqa: E402

# what a format may change of a weight, and how many times more random layers make of it at most
ERRORS = {"int8": 0.01, "fp8": 0.03, "int4": 0.09, "mxfp4": 0.125}
AMPLIFIED = 5
FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "nemotron_h")


def with_rounded_weights(model: Any, layers: dict[str, QuantizedExpertsLayer]) -> Any:
    """The model with the weights that the codes of ``layers`` stand for, run by eager."""
    for name, layer in layers.items():
        experts = model.get_submodule(name)
        first = experts.gate_up_proj if experts.has_gate else experts.up_proj
        for weight, packed in ((first, "gate_up"), (experts.down_proj, "down")):
            values = layer._packed(packed).dequantize()
            with torch.no_grad():
                weight.copy_(values if experts.is_transposed else values.mT)
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("format", ERRORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, format: str) -> None:
    """Close to those of the model, and as good as equal to those with the rounded weights."""
    original, ids = tiny_model(family).eval(), tokens()
    model = copy.deepcopy(original)
    layers = quantize_experts_of(model, format)
    assert all(isinstance(model.get_submodule(name), QuantizedExpertsLayer) for name in layers)
    with torch.no_grad(), OpCount() as count:
        logits = model(input_ids=ids).logits
    assert count.calls["fused_experts_quantized"] == len(layers)
    with torch.no_grad():
        original.set_experts_implementation("eager")
        error = relative_error(logits, original(input_ids=ids).logits)
        assert 0.1 * ERRORS[format] < error < AMPLIFIED * ERRORS[format]
        rounded = with_rounded_weights(original, layers)(input_ids=ids).logits
    assert relative_error(logits, rounded) < 1e-5


def test_memory_is_that_of_the_codes() -> None:
    model = tiny_model("qwen3_moe", hidden_size=64, moe_intermediate_size=64)
    weights = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    others = sum(p.nbytes for name, p in model.named_parameters() if ".experts." not in name)
    quantize_experts_of(model)
    left = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert left == others + weights * 0.5625 / 4
    assert not any(".experts." in name for name, _ in model.named_parameters())


def test_generates() -> None:
    model = tiny_model("qwen3_moe").eval()
    rounded = copy.deepcopy(model)
    layers = quantize_experts_of(model, "int4")
    with_rounded_weights(rounded, layers)
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = rounded.generate(tokens(), **options)
    assert torch.equal(model.generate(tokens(), **options), expected)


def test_compiles_whole() -> None:
    model, ids = tiny_model("gpt_oss").eval(), tokens()
    quantize_experts_of(model, "mxfp4")
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(input_ids=ids).logits, expected)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_other_dtypes_leave_scales_alone(format: str) -> None:
    ids, errors = tokens(), []
    for quantised in (False, True):
        model = tiny_model("gpt_oss").eval()
        layers = quantize_experts_of(model, format) if quantised else {}
        before = [layer._packed("down").scales.clone() for layer in layers.values()]
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            logits = model.to(torch.bfloat16)(input_ids=ids).logits
        assert logits.dtype == torch.bfloat16
        for layer, scales in zip(layers.values(), before, strict=True):
            assert torch.equal(layer._packed("down").scales, scales)
        errors.append(relative_error(logits.float(), expected))
    assert errors[1] < 1.5 * errors[0]


def test_state_is_kept_by_models_quantised_alike(tmp_path: Path) -> None:
    model, ids = tiny_model("gpt_oss").eval(), tokens()
    quantize_experts_of(model, "int4")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = tiny_model("gpt_oss").eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
        quantize_experts_of(other, "int4")
        other.load_state_dict(torch.load(tmp_path / "state.pt"))
        assert torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)
    for part in (model, model.model):
        with pytest.raises(RuntimeError, match=r"save_pretrained: .* quantised by quantize_exp"):
            part.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"gate_up_proj|gate_up_int4"):
        tiny_model("gpt_oss").load_state_dict(model.state_dict())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_codes_load_into_a_model_without_weights(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, tie_word_embeddings=True).eval()
    with torch.device("meta"):
        other = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    layers = quantize_experts_of(other, "int4")
    assert all(value.is_meta for layer in layers.values() for value in layer.buffers())
    quantize_experts_of(model, "int4")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.to_empty(device="cpu").init_weights()
    other.load_state_dict(torch.load(tmp_path / "state.pt", mmap=True))
    other.eval()
    with torch.no_grad():
        expected = model(input_ids=tokens()).logits
        torch.testing.assert_close(other(input_ids=tokens()).logits, expected, rtol=0, atol=0)


def test_what_cannot_be_quantised_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[3, 1, 2] = float("inf")
    for format, message in (("int8", r"layers\.0.*must be finite .* expert 3"), ("int3", "int3")):
        with pytest.raises(ValueError, match=message):
            quantize_experts_of(model, format)
        assert not any(isinstance(module, QuantizedExpertsLayer) for module in model.modules())
        with torch.no_grad():
            model.model.layers[0].mlp.experts.down_proj[3, 1, 2] = 0.0
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize(("saved", "loaded"), [("int8", "fp8"), ("mxfp4", "int4")])
def test_codes_of_another_format_are_refused(saved: str, loaded: str) -> None:
    state, model = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
    quantize_experts_of(state, saved)
    quantize_experts_of(model, loaded)
    with pytest.raises(RuntimeError, match=f"gate_up_{loaded}"):
        model.load_state_dict(state.state_dict())


def test_training_is_refused() -> None:
    model = tiny_model("qwen3_moe")
    quantize_experts_of(model, "int8")
    loss = model(input_ids=tokens(), labels=tokens()).loss
    with pytest.raises(RuntimeError, match="quantised weights are for inference"):
        loss.backward()
    with pytest.raises(ValueError, match=r"mlp\): experts .* down_proj; got QuantizedExpertsLayer"):
        replace_moe_layers(model)


def test_experts_that_layers_share_are_replaced_everywhere() -> None:
    model = tiny_model("qwen3_moe").eval()
    first, second = (layer.mlp for layer in model.model.layers[:2])
    second.experts = first.experts
    layers = quantize_experts_of(model, "int8")
    assert second.experts is first.experts
    assert first.experts in layers.values()
    assert not any(".experts." in name for name, _ in model.named_parameters())


def test_what_cannot_be_quantised_is_named() -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(ValueError, match="got the experts themselves, Qwen3MoeExperts"):
        quantize_experts_of(model.model.layers[0].mlp.experts)
    experts = model.model.layers[1].mlp.experts
    experts.act_fn = torch.nn.Tanh()
    before = list(model.modules())
    with pytest.raises(
        ValueError, match=r"Qwen3MoeExperts \(model\.layers\.1\.mlp\.experts\): no "
    ):
        quantize_experts_of(model)
    with pytest.raises(ValueError, match="Linear has no experts to quantise: no module of it"):
        quantize_experts_of(torch.nn.Linear(2, 2))
    partly = tiny_model("qwen3_moe")
    partly.model.layers[0].mlp.experts.to("meta")
    name = r"layers\.0\.mlp\.experts\): .* meta device, and model\.embed_tokens.* on cpu"
    with pytest.raises(ValueError, match=name):
        quantize_experts_of(partly)
    offloaded = tiny_model("qwen3_moe").to("meta")
    offloaded.model.layers[0]._hf_hook = object()  # as accelerate marks a layer
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\): accelerate has offloaded"):
        quantize_experts_of(offloaded)
    assert [id(module) for module in model.modules()] == [id(module) for module in before]
    with pytest.raises(ValueError, match="quantize_experts_of: format must be one of"):
        quantize_experts_of(model, "q4_0")  # the format is wrong, whatever the experts are


def test_what_is_quantised_already_is_named() -> None:
    model = tiny_model("qwen3_moe")
    layers = quantize_experts_of(model, "int8")
    first = "model.layers.0.mlp.experts"
    for part, name in ((model, first), (model.get_submodule(first), "itself")):
        with pytest.raises(ValueError, match=rf"quantised already \({name}, int8\)"):
            quantize_experts_of(part, "int4")
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())
