"""transformers models with replaced MoE layers against the models as they were."""

from __future__ import annotations

import copy
import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

transformers = pytest.importorskip("transformers")

from moe_parallel import BackendConfig, MoE  # noqa: E402
from moe_parallel.integrations._families import FAMILIES  # noqa: E402
from moe_parallel.integrations.transformers import (  # noqa: E402
    load_hf_state_dict,
    replace_moe_layers,
    save_hf_checkpoint,
    to_hf_state_dict,
)
from tests.integrations.tiny_models import (  # noqa: E402
    CONFIGS,
    CONFIGS_OF_MODULES,
    tiny_model,
    tokens,
)

REFUSED = ("granitemoe", "nemotron_h", "phimoe", "gemma4_text")
REPLACED = [name for name in (*CONFIGS, *CONFIGS_OF_MODULES) if name not in REFUSED]


def original_and_replaced(family: str, **overrides: Any) -> tuple[Any, Any, dict[str, MoE]]:
    original = tiny_model(family, **overrides)
    original.set_experts_implementation("eager")
    replaced = copy.deepcopy(original)
    return original, replaced, replace_moe_layers(replaced)


def run(model: Any, **options: Any) -> Any:
    model.zero_grad()
    output = model(input_ids=tokens(), labels=tokens(), **options)
    output.loss.backward()
    return output


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every gradient, under the name of transformers' parameter."""
    holder = copy.deepcopy(model)
    for mine, parameter in zip(holder.parameters(), model.parameters(), strict=True):
        missing = torch.zeros_like(parameter)
        mine.data = missing if parameter.grad is None else parameter.grad
    names = {name for name, _ in model.named_parameters()}
    is_replaced = any(isinstance(module, MoE) for module in model.modules())
    named = to_hf_state_dict(holder, "module") if is_replaced else holder.state_dict().items()
    buffers = {name for name, _ in model.named_buffers()} - names
    return {
        name: grad.clone()
        for name, grad in named
        if name not in buffers and "correction_bias" not in name and "expert_bias" not in name
    }


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def check_equal(replaced: Any, original: Any, **options: Any) -> tuple[Any, Any]:
    found, expected = run(replaced, **options), run(original, **options)
    assert relative_error(found.logits, expected.logits) < 1e-6
    assert relative_error(found.loss, expected.loss) < 1e-6
    grads, expected_grads = gradients(replaced), gradients(original)
    assert grads.keys() == expected_grads.keys()
    exact = copy.deepcopy(original).double()
    run(exact, **options)
    exact_grads = gradients(exact)
    errors = [
        relative_error(value.double(), exact_grads[name]) for name, value in expected_grads.items()
    ]
    limit = max(5e-6, 2 * max(errors))  # each may be as far from float64 as eager
    for name, grad in grads.items():
        assert relative_error(grad, expected_grads[name]) < limit, name
    return found, expected


# --- the same function --------------------------------------------------------------------------


@pytest.mark.parametrize("family", REPLACED)
def test_replaced_models_equal_eager(family: str, tmp_path: Path) -> None:
    """Logits, loss, every gradient; and the way back to both kinds of names, bit for bit."""
    original, replaced, layers = original_and_replaced(family)
    blocks = {name: original.get_submodule(name) for name in layers}
    assert layers
    assert not any(hasattr(module, "_apply_gate") for module in replaced.modules())
    assert all(replaced.get_submodule(name) is layer for name, layer in layers.items())
    assert {type(block).__name__ for block in blocks.values()} <= FAMILIES.keys()
    check_equal(replaced, original)

    config = replaced.model.moe_config
    assert config.n_routed_experts == next(iter(blocks.values())).experts.num_experts

    module_names = dict(to_hf_state_dict(replaced, "module"))
    state = original.state_dict()
    assert module_names.keys() == state.keys()
    assert all(torch.equal(module_names[name], value) for name, value in state.items())

    original.save_pretrained(tmp_path)
    checkpoint, published = (
        dict(to_hf_state_dict(replaced)),
        load_file(tmp_path / "model.safetensors"),
    )
    assert checkpoint.keys() == published.keys()
    assert all(torch.equal(checkpoint[name], value) for name, value in published.items())


def test_every_supported_block_is_tested_and_documented() -> None:
    text = (Path(__file__).parents[2] / "docs/transformers.md").read_text(encoding="utf-8")
    table = text.partition("| families | router |")[2].partition("### Checkpoints")[0]
    tested = set()
    assert set(re.findall(r"`([a-z0-9_]+)`", table)) - {"router_jitter_noise"} == set(REPLACED)
    for family in REPLACED:
        blocks = tiny_model(family).modules()
        tested |= {type(block).__name__ for block in blocks} & FAMILIES.keys()
    assert tested == FAMILIES.keys()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "qwen2_moe"])
def test_router_logits_and_their_loss(family: str) -> None:
    """output_router_logits=True gives the same logits, load-balancing loss and gradients."""
    original, replaced, layers = original_and_replaced(family, router_aux_loss_coef=0.5)
    found, expected = check_equal(replaced, original, output_router_logits=True)
    assert len(found.router_logits) == len(expected.router_logits) == len(layers)
    for mine, theirs in zip(found.router_logits, expected.router_logits, strict=True):
        assert relative_error(mine, theirs) < 1e-6
    assert expected.aux_loss > 0
    assert relative_error(found.aux_loss, expected.aux_loss) < 1e-6


def test_gradient_checkpointing_and_frozen_weights() -> None:
    original = tiny_model("qwen2_moe")
    original.model.layers[0].mlp.experts.requires_grad_(False)
    original.model.layers[1].mlp.gate.requires_grad_(False)
    original.gradient_checkpointing_enable()
    original.set_experts_implementation("eager")
    replaced = copy.deepcopy(original)
    replace_moe_layers(replaced)
    assert replaced.model.layers[0].mlp.experts.gate_and_up_projs.requires_grad is False
    assert replaced.model.layers[0].mlp.experts.down_projs.requires_grad is False
    assert replaced.model.layers[1].mlp.gate.weight.requires_grad is False
    check_equal(replaced, original)
    assert replaced.model.layers[0].mlp.experts.down_projs.grad is None


def test_generates_the_same_tokens() -> None:
    original, replaced, _ = original_and_replaced("deepseek_v3")
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    original.eval()
    replaced.eval()
    expected = original.generate(tokens(), **options)
    assert torch.equal(replaced.generate(tokens(), **options), expected)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_compiles_in_one_graph(family: str) -> None:
    original, replaced, _ = original_and_replaced(family)
    compiled = torch.compile(replaced, fullgraph=True, backend="aot_eager")
    found = compiled(input_ids=tokens(), labels=tokens(), use_cache=False)
    found.loss.backward()
    expected = run(original)
    assert relative_error(found.logits, expected.logits) < 1e-6
    exact = copy.deepcopy(original).double()
    run(exact)
    grads, expected_grads, exact_grads = map(gradients, (replaced, original, exact))
    for name, grad in grads.items():
        # Gradients of gpt_oss's sinks nearly cancel: how float32 rounds anywhere in the model
        # decides their error, twice as much with one number of threads as with another.
        limit = max(5e-6, 4 * relative_error(expected_grads[name], exact_grads[name]))
        assert relative_error(grad, exact_grads[name]) < limit, name


def test_a_part_compiles_in_one_graph() -> None:
    """A block alone, as in training that compiles block by block; with router logits, in two."""
    original, replaced, _ = original_and_replaced("qwen3_moe")
    replaced.model.layers[0].compile(backend="eager", fullgraph=True)
    assert relative_error(run(replaced).logits, run(original).logits) < 1e-6
    grads, expected_grads = gradients(replaced), gradients(original)
    assert all(relative_error(grads[name], expected_grads[name]) < 5e-6 for name in grads)

    original, replaced, layers = original_and_replaced("qwen3_moe")
    next(iter(layers.values())).compile(backend="eager")
    options = {"input_ids": tokens(), "labels": tokens(), "output_router_logits": True}
    expected, found = original(**options), replaced(**options)
    assert len(found.router_logits) == len(expected.router_logits) == 2
    assert relative_error(found.loss, expected.loss) < 1e-6


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_pickles(family: str, tmp_path: Path) -> None:
    _, replaced, layers = original_and_replaced(family)
    again = pickle.loads(pickle.dumps(replaced))
    assert torch.equal(run(again).logits, run(replaced).logits)
    again.save_pretrained(tmp_path)
    loaded = type(replaced).from_pretrained(tmp_path)
    assert relative_error(run(loaded).logits, run(replaced).logits) < 1e-6
    for layer in layers.values():
        assert pickle.loads(pickle.dumps(layer)).family is layer.family


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss", "ernie4_5_moe"])
def test_bf16_layers_are_as_close_as_the_blocks(family: str) -> None:
    """Layer by layer, since a model may route a token elsewhere after a rounding."""
    exact = tiny_model(family)
    exact.set_experts_implementation("eager")
    exact = exact.to(torch.bfloat16).to(torch.float64)
    block_model = copy.deepcopy(exact).to(torch.bfloat16)
    block_model.set_experts_implementation("batched_mm")
    replaced = copy.deepcopy(block_model)
    for name in replace_moe_layers(replaced):
        x = torch.randn(4, 64, 32).to(torch.bfloat16)
        outputs = [
            model.get_submodule(name)(x.to(next(model.parameters()).dtype))
            for model in (exact, block_model, replaced)
        ]
        expected, theirs, ours = (
            (value[0] if isinstance(value, tuple) else value).double() for value in outputs
        )
        assert outputs[2][0].dtype == torch.bfloat16
        # rows whose choice of experts a rounding tips are left out, for both
        rows = [relative_rows(value, expected) for value in (theirs, ours)]
        same = torch.stack(rows).amax(0) < 0.1
        assert same.float().mean() > 0.9
        errors = [relative_error(value[same], expected[same]) for value in (theirs, ours)]
        assert errors[1] <= 1.5 * errors[0]
        # but routers that compute in float32 choose as theirs do
        if FAMILIES[type(block_model.get_submodule(name)).__name__].router_float32:
            assert (relative_rows(ours, theirs) < 0.1).all()


def relative_rows(found: Tensor, expected: Tensor) -> Tensor:
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


# --- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [1, 4])
def test_saved_checkpoint_loads_in_plain_transformers(
    shards: int, tied: bool, tmp_path: Path
) -> None:
    original, replaced, _ = original_and_replaced("mixtral", tie_word_embeddings=tied)
    size = sum(value.nbytes for value in replaced.parameters())
    save_hf_checkpoint(replaced, tmp_path, max_shard_bytes=size // shards + 1)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == (shards == 1)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert type(loaded) is type(original)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in original.state_dict().items())


def test_plain_save_pretrained_takes_the_state_dict(tmp_path: Path) -> None:
    original, replaced, _ = original_and_replaced("deepseek_v3")
    for names in ("checkpoint", "module"):
        replaced.save_pretrained(
            tmp_path / names, state_dict=dict(to_hf_state_dict(replaced, names))
        )
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / names)
        state = loaded.state_dict()
        assert all(torch.equal(state[name], value) for name, value in original.state_dict().items())


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {name: value for file in files for name, value in file.items()}


def assert_loads_as(original: Any, folder: Path) -> None:
    """Plain transformers reads ``folder``, whole, as the weights of ``original``."""
    loaded, report = type(original).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in original.state_dict().items())


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "ernie4_5_moe"]
)
def test_save_pretrained_writes_what_transformers_reads(family: str, tmp_path: Path) -> None:
    """By every way that it is called in, tensor for tensor what the original would write."""
    original, replaced, _ = original_and_replaced(family, tie_word_embeddings=family == "mixtral")
    copied = copy.deepcopy(replaced)
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "shards": {"max_shard_size": 30_000},
        "variant": {"variant": "other"},
        "module names": {"save_original_format": False},
    }
    for way, options in ways.items():
        replaced.save_pretrained(tmp_path / way, **options)
        original.save_pretrained(tmp_path / "expected" / way, **options)
        found, wanted = saved_tensors(tmp_path / way), saved_tensors(tmp_path / "expected" / way)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        if way != "variant":
            assert_loads_as(original, tmp_path / way)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert (tmp_path / "variant" / "model.other.safetensors").exists()

    with torch.no_grad():
        for value in replaced.parameters():
            value.zero_()
    copied.save_pretrained(tmp_path / "copied")  # the copy's own weights
    assert_loads_as(original, tmp_path / "copied")
    replaced.save_pretrained(tmp_path / "given", state_dict=copied.state_dict())
    assert_loads_as(original, tmp_path / "given")
    replaced.save_pretrained(tmp_path / "not main", is_main_process=False)
    assert not list((tmp_path / "not main").glob("*"))


def test_save_pretrained_of_the_base_model_and_what_it_refuses(tmp_path: Path) -> None:
    original, replaced, _ = original_and_replaced("qwen3_moe")
    replaced.model.save_pretrained(tmp_path)
    assert_loads_as(original.model, tmp_path)
    with pytest.raises(ValueError, match="ranks of a sharded model write together"):
        replaced.save_pretrained(tmp_path, distributed_checkpoint=True)


@pytest.mark.parametrize("names", ["checkpoint", "module"])
@pytest.mark.parametrize("family", ["qwen2_moe", "ernie4_5_moe", "gpt_oss", "mixtral", "hy_v3"])
def test_loads_what_it_exports(family: str, names: str) -> None:
    _, replaced, _ = original_and_replaced(family)
    exported = {name: value.clone() for name, value in to_hf_state_dict(replaced, names)}
    expected = {name: value.clone() for name, value in replaced.state_dict().items()}
    for value in (*replaced.parameters(), *replaced.buffers()):
        value.data.fill_(torch.nan)
    load_hf_state_dict(replaced, ((name, value.double()) for name, value in exported.items()))
    state = replaced.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_names_are_those_of_the_model_under_wrappers() -> None:
    """Activation checkpointing and torch.compile put words into names; checkpoints lack them."""
    _, replaced, _ = original_and_replaced("deepseek_v3")
    weights = {name: value.clone() for name, value in to_hf_state_dict(replaced)}
    layers = replaced.model.layers
    layers[1].mlp.shared_experts = checkpoint_wrapper(layers[1].mlp.shared_experts)
    layers[1].mlp = checkpoint_wrapper(layers[1].mlp)
    layers[0] = checkpoint_wrapper(layers[0])
    wrapped = torch.compile(replaced)
    found = dict(to_hf_state_dict(wrapped))
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    load_hf_state_dict(wrapped, {name: value + 1 for name, value in weights.items()})
    found = dict(to_hf_state_dict(wrapped))
    assert all(torch.equal(found[name], value + 1) for name, value in weights.items())


def test_loading_checks_names_shapes_and_completeness() -> None:
    _, replaced, _ = original_and_replaced("qwen3_moe", tie_word_embeddings=True)
    weights = dict(to_hf_state_dict(replaced))
    assert "lm_head.weight" not in weights
    load_hf_state_dict(replaced, weights)
    expert = "model.layers.1.mlp.experts.4.up_proj.weight"
    with pytest.raises(KeyError, match=r"no place for model\.layers\.7\.norm"):
        load_hf_state_dict(replaced, {**weights, "model.layers.7.norm": weights[expert]})
    with pytest.raises(
        ValueError, match=r"experts\.4\.up_proj\.weight must be \[20, 32\]; got \[32"
    ):
        load_hf_state_dict(replaced, {**weights, expert: weights[expert].mT})
    del weights[expert]
    with pytest.raises(ValueError, match=r"1 weights .*layers\.1\.mlp\.experts\.gate_and_up_projs"):
        load_hf_state_dict(replaced, weights)
    load_hf_state_dict(replaced, {"unknown": torch.ones(1), **weights}, strict=False)
    with pytest.raises(ValueError, match=r"names must be one of .* got 'hub'"):
        next(to_hf_state_dict(replaced, "hub"))


def test_weights_are_shared_where_their_layout_allows() -> None:
    model = tiny_model("gpt_oss")
    blocks = {name: model.get_submodule(name) for name in ("model.layers.0.mlp",)}
    layers = replace_moe_layers(model)
    for name, block in blocks.items():
        assert layers[name].experts.gate_and_up_projs is block.experts.gate_up_proj
        assert layers[name].experts.down_proj_bias is block.experts.down_proj_bias
        assert layers[name].gate.weight is block.router.weight
    model = tiny_model("qwen2_moe").eval()
    block = model.model.layers[0].mlp
    layer = replace_moe_layers(model)["model.layers.0.mlp"]
    assert layer.shared_experts.up_proj is block.shared_expert.up_proj
    assert layer.gate.weight is block.gate.weight
    assert layer.experts.gate_and_up_projs.is_contiguous()  # which FSDP insists on
    assert not layer.training


def test_models_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_model("deepseek_v3").config)
    replace_moe_layers(model)
    assert all(value.is_meta for value in model.parameters())
    _, source, _ = original_and_replaced("deepseek_v3")
    with pytest.raises(ValueError, match=r"load_hf_state_dict: .* meta device; .*to_empty"):
        load_hf_state_dict(model, to_hf_state_dict(source))  # there is nowhere to copy to
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().fill_(math.nan)
    model.init_weights()
    load_hf_state_dict(model, to_hf_state_dict(source))
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in source.state_dict().items())
    assert torch.equal(*(net.eval()(tokens()).logits for net in (model, source)))


# --- training options ---------------------------------------------------------------------------


def test_correction_bias_and_auxiliary_loss_train() -> None:
    model = tiny_model("deepseek_v3")
    layer = next(iter(replace_moe_layers(model, gate_bias_update_factor=0.25).values()))
    before = layer.gate.e_score_correction_bias.clone()
    run(model)
    load = layer.gate._cumulative_expert_load.float()
    layer.gate.update_bias()
    after = dict(to_hf_state_dict(model))["model.layers.1.mlp.gate.e_score_correction_bias"]
    torch.testing.assert_close(after, before + 0.25 * torch.sign(load.mean() - load))

    plain, balanced = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
    replace_moe_layers(plain)
    replace_moe_layers(balanced, aux_loss_coeff=1.0, enable_routing_replay=True)
    assert torch.equal(run(plain).logits, run(balanced).logits)
    name = "model.layers.1.mlp.gate.weight"
    assert relative_error(gradients(balanced)[name], gradients(plain)[name]) > 1e-3


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("granitemoe", {}, r"GraniteMoeMoE \(model\.layers\.0\.block_sparse_moe\) is not a block"),
        ("nemotron_h", {}, r"NemotronHMoE \(model\.layers\.0\.mixer\)"),
        ("phimoe", {}, r"PhimoeSparseMoeBlock \(model\.layers\.0\.mlp\)"),
        ("gemma4_text", {}, r"Gemma4TextDecoderLayer \(model\.layers\.0\)"),
        (
            "mixtral",
            {"router_jitter_noise": 0.1},
            r"\(model\.layers\.0\.mlp\): router_jitter_noise",
        ),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, r"topk_method must be greedy"),
        ("qwen3_moe", {"hidden_act": "relu"}, r"Qwen3MoeSparseMoeBlock .*activation .*ReLU"),
        ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": True}, r"one expert a token"),
        ("qwen3_moe", {"num_experts": 0}, r"Qwen3MoeForCausalLM has no MoE block"),
    ],
)
def test_what_cannot_be_replaced_is_named(
    family: str, overrides: dict[str, Any], message: str
) -> None:
    model = tiny_model(family, **overrides)
    modules = list(model.modules())
    with pytest.raises(ValueError, match=message):
        replace_moe_layers(model)
    assert [id(module) for module in model.modules()] == [id(module) for module in modules]


def test_options_that_do_not_fit_are_named() -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(ValueError, match=r"gate_bias_update_factor needs a router with"):
        replace_moe_layers(model, gate_bias_update_factor=0.1)
    with pytest.raises(ValueError, match=r"fake_balanced_gate must be False"):
        replace_moe_layers(model, BackendConfig(fake_balanced_gate=True))
    with pytest.raises(TypeError, match="backend must be a BackendConfig; got int"):
        replace_moe_layers(model, 3)
    replace_moe_layers(model)
    with pytest.raises(ValueError, match=r"has no MoE block .*this package's already"):
        replace_moe_layers(model)
