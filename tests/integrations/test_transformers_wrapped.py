"""Models that others have changed: adapters, parametrizations, offloading, weights in 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

transformers = pytest.importorskip("transformers")

from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear  # noqa: E402

from moe_kernels.integrations.transformers import quantize_experts_of, register  # noqa: E402
from moe_parallel.integrations.transformers import replace_moe_layers  # noqa: E402
from tests.integrations.tiny_models import tiny_model, tokens  # noqa: E402


class Adapted(nn.Module):
    """As PEFT's LoRA layers: the layer below ``base_layer``, and its weight by its old name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    def forward(self, *args: Any) -> Tensor:
        return self.base_layer(*args)


class WithAdapter(Adapted):
    """A linear layer with an adapter."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.lora = nn.Linear(layer.in_features, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora(x)

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class PeftLike(nn.Module):
    """A wrapper that saves something of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def save_pretrained(self, directory: Path) -> str:
        return f"adapters in {directory}"


def adapt(model: Any, name: str, cls: type[nn.Module] = Adapted) -> None:
    model.set_submodule(name, cls(model.get_submodule(name)))


@pytest.mark.parametrize(
    ("family", "name", "cls", "message"),
    [
        ("hunyuan_v1_moe", "gate.wg", WithAdapter, r"gate\.wg\.base_layer\.weight has no place"),
        ("qwen3_moe", "gate", Adapted, r"gate\.base_layer\.weight has no place .*merge_and_unload"),
        ("qwen3_moe", "experts", Adapted, r"experts\.base_layer\.gate_up_proj has no place"),
    ],
)
def test_adapters_are_not_left_behind(
    family: str, name: str, cls: type[nn.Module], message: str
) -> None:
    model = tiny_model(family)
    adapt(model, f"model.layers.1.mlp.{name}", cls)
    modules = list(model.modules())
    with pytest.raises(ValueError, match=rf"\(model\.layers\.1\.mlp\): {message}"):
        replace_moe_layers(model)
    assert [id(module) for module in model.modules()] == [id(module) for module in modules]


def test_adapters_of_shared_experts_go_on_working() -> None:
    model = tiny_model("qwen2_moe").eval()
    for name in ("gate_proj", "up_proj", "down_proj"):
        adapt(model, f"model.layers.1.mlp.shared_expert.{name}", WithAdapter)
    adapt(model, "model.layers.1.mlp.shared_expert_gate", WithAdapter)
    expected = model(input_ids=tokens()).logits
    replace_moe_layers(model)
    torch.testing.assert_close(model(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "weight"), [("gate", "weight"), ("experts", "down_proj")])
def test_parametrizations_are_not_left_behind(name: str, weight: str) -> None:
    model = tiny_model("qwen3_moe")
    block = model.model.layers[1].mlp
    parametrize.register_parametrization(getattr(block, name), weight, Doubled())
    with pytest.raises(ValueError, match=rf"{name}\.parametrizations\.{weight}\.original has no "):
        replace_moe_layers(model)


def test_offloaded_weights_are_not_left_behind() -> None:
    with torch.device("meta"):
        model = tiny_model("qwen3_moe")
    experts: Any = model.model.layers[1].mlp.experts
    experts._hf_hook = object()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\): \S+ is offloaded by accelerate"):
        replace_moe_layers(model)
    del experts._hf_hook
    replace_moe_layers(model)


def test_a_wrapper_saves_what_it_saved() -> None:
    model = PeftLike(tiny_model("qwen3_moe"))
    replace_moe_layers(model)
    assert model.save_pretrained(Path("here")) == "adapters in here"
    model = PeftLike(tiny_model("qwen3_moe"))
    quantize_experts_of(model, "int8")
    assert model.save_pretrained(Path("here")) == "adapters in here"


def test_experts_with_adapters_are_not_quantised() -> None:
    model = tiny_model("qwen3_moe")
    adapt(model, "model.layers.1.mlp.experts")
    with pytest.raises(ValueError, match=r"experts\.base_layer\): an adapter of PEFT .*Merge it"):
        quantize_experts_of(model)


def test_experts_in_8_bits_are_named() -> None:
    """Codes without their scales would be taken for weights."""
    register()
    model = tiny_model("qwen3_moe")
    config = transformers.FineGrainedFP8Config(weight_block_size=(4, 4))
    model = replace_with_fp8_linear(model, ["lm_head"], config).to_empty(device="cpu")
    model.set_experts_implementation("moe_kernels")
    experts = model.model.layers[0].mlp.experts
    ids = torch.zeros(3, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"FP8Experts keeps torch\.float8_e4m3fn .*dequantize"):
        experts(torch.ones(3, 32), ids, torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"must have 16 bits or more; they are torch\.float8_"):
        quantize_experts_of(model)
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj_scale_inv has no place"):
        replace_moe_layers(model)
    experts = tiny_model("gpt_oss").model.layers[0].mlp.experts  # weights in codes, as mxfp4
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.uint8), requires_grad=False)
    holder = tiny_model("gpt_oss")
    holder.model.layers[0].mlp.experts = experts
    with pytest.raises(ValueError, match=r"GptOssExperts of torch\.uint8"):
        replace_moe_layers(holder)
