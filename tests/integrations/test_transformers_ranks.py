"""transformers models on several ranks against the same model in one process."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

transformers = pytest.importorskip("transformers")

from moe_kernels.integrations.transformers import register  # noqa: E402
from moe_parallel.integrations.transformers import (  # noqa: E402
    load_hf_state_dict,
    replace_moe_layers,
    save_hf_checkpoint,
    to_hf_state_dict,
)
from moe_parallel.mesh import build_meshes, parallel_axis_names  # noqa: E402
from moe_parallel.parallelizer import apply_ep, parallelize_model  # noqa: E402
from moe_parallel.training import scale_grads_and_clip_grad_norm  # noqa: E402
from tests.integrations.tiny_models import VOCABULARY, tiny_model, tokens  # noqa: E402
from tests.parallel.ranks import run_ranks  # noqa: E402

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss")


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def forward_and_backward(model: Any, ids: Tensor, upstream: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits
    logits.backward(upstream)
    return logits.detach()


def batch(rows: int) -> tuple[Tensor, Tensor]:
    """Ids, and the gradient of the logits."""
    generator = torch.Generator().manual_seed(2)
    ids = tokens(rows)
    return ids, torch.randn(*ids.shape, VOCABULARY, generator=generator)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# --- transformers' own expert parallelism -------------------------------------------------------


def note_highest_id(highest: list[int], module: Any, args: tuple[Tensor, ...]) -> None:
    highest.append(int(args[1].max()))


def transformers_mesh(ranks: int) -> Any:
    """What the installed transformers takes: a mesh, or one of layers and one of experts."""
    from transformers.distributed import utils

    if not hasattr(utils, "TransformersDeviceMesh"):
        return init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    names = (("pp", "dp_replicate", "fsdp", "tp"), ("pp", "dp_replicate", "efsdp", "ep"))
    meshes = [init_device_mesh("cpu", (1, 1, 1, ranks), mesh_dim_names=axes) for axes in names]
    return utils.TransformersDeviceMesh(*meshes)


def run_transformers_ep(rank: int, ranks: int) -> dict[str, dict[str, Tensor]]:
    from transformers.distributed import DistributedConfig

    register()
    results = {}
    for family in FAMILIES:
        model: Any = tiny_model(family)
        if hasattr(DistributedConfig, "ep_size"):  # the later way
            settings = DistributedConfig(tp_size=ranks, ep_size=ranks)
        else:
            settings = DistributedConfig(tp_size=ranks, tp_plan="auto", enable_expert_parallel=True)
        model.config.distributed_config = settings
        model = type(model).maybe_distribute_model(model, settings, transformers_mesh(ranks))
        model.set_experts_implementation("moe_kernels")
        experts = [module for module in model.modules() if hasattr(module, "_apply_gate")]
        highest: list[int] = []
        hook = functools.partial(note_highest_id, highest)
        for module in experts:
            module.register_forward_pre_hook(hook)
        results[family] = {"logits": forward_and_backward(model, *batch(2))}
        # The sentinel of transformers' routers is this rank's number of experts. Later the ids of
        # others become it within the module.
        later = hasattr(DistributedConfig, "ep_size")
        assert later or highest == [module.num_experts for module in experts]
        assert all(module.num_experts < module.gate_up_proj.shape[0] for module in experts)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                results[family][name] = whole(parameter.grad)
    return results


def test_expert_parallel_mode_of_transformers() -> None:
    """Two ranks with sentinel ids give eager's logits and gradients."""
    found = run_ranks(2, run_transformers_ep, timeout=120)[0]
    for family in FAMILIES:
        model: Any = tiny_model(family)
        model.set_experts_implementation("eager")
        logits = forward_and_backward(model, *batch(2))
        assert relative_error(found[family].pop("logits"), logits) < 1e-6
        expected = {name: value.grad for name, value in model.named_parameters()}
        assert found[family].keys() == {key for key, value in expected.items() if value is not None}
        for name, grad in found[family].items():
            assert relative_error(grad, expected[name]) < 5e-6, (family, name)


# --- replaced layers ----------------------------------------------------------------------------


def sharded_model(family: str, ranks: int) -> Any:
    """EP over two ranks; with four, FSDP over the other two."""
    model: Any = tiny_model(family)
    layers = replace_moe_layers(model)
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("ep_shard", "ep"))
    apply_ep(model, mesh["ep"])
    if ranks == 4:
        for layer in layers.values():
            fully_shard(
                layer.experts, mesh=mesh["ep_shard"], shard_placement_fn=lambda value: Shard(1)
            )
    return model


def run_checkpointed(rank: int, ranks: int) -> dict[str, dict[str, Tensor]]:
    """As docs/parallelism.md has it, on a model that makes a cache of keys and values itself."""
    ids, upstream = (part.chunk(ranks)[rank] for part in batch(4))
    results = {}
    for ac in (True, "selective"):
        model: Any = tiny_model("qwen3_moe")
        replace_moe_layers(model)
        meshes = build_meshes(ep=2)
        parallelize_model(
            model,
            *meshes,
            **parallel_axis_names(*meshes),
            activation_checkpointing=ac,
            mp_policy=MixedPrecisionPolicy(torch.float32, torch.float32),
        )
        assert model.config.use_cache
        results[str(ac)] = {"logits": forward_and_backward(model, ids, upstream)}
        scale_grads_and_clip_grad_norm(
            None, [model], moe_mesh=meshes[1], ep_axis_name="ep", dp_group_size=ranks
        )
        for name, value in model.named_parameters():
            inner = name.replace("_checkpoint_wrapped_module.", "")
            results[str(ac)][inner] = whole(value.grad)
        with torch.no_grad():
            cache = model.eval()(input_ids=ids, use_cache=True).past_key_values
            assert cache.get_seq_length() == ids.shape[1]
            step = {"input_ids": ids[:, :1], "past_key_values": cache}
            assert model(**step).past_key_values.get_seq_length() == ids.shape[1] + 1
        with pytest.raises(
            ValueError, match=r"(past_key_values|cache) must be None or .*got 12 tok"
        ):
            model.train()(**step)
    return results


def test_blocks_computed_again_leave_caches_alone() -> None:
    found = run_ranks(2, run_checkpointed, timeout=120)[0]
    model: Any = tiny_model("qwen3_moe")
    ids, upstream = batch(4)
    logits = forward_and_backward(model, ids, upstream / 2)
    expected = {name: value.grad for name, value in model.named_parameters()}
    for results in found.values():
        assert relative_error(results["logits"], logits[:2]) < 1e-6
        compared = [name for name in results if name in expected]
        assert len(compared) >= 10
        for name in compared:
            assert relative_error(results[name], expected[name]) < 5e-6, name


def run_replaced(rank: int, ranks: int, folder: str) -> dict[str, dict[str, Tensor]]:
    results: dict[str, dict[str, Tensor]] = {}
    for family in FAMILIES:
        model = sharded_model(family, ranks)
        exported = {name: value.clone() for name, value in to_hf_state_dict(model)}
        save_hf_checkpoint(model, f"{folder}/{family}", max_shard_bytes=40_000)
        model.save_pretrained(f"{folder}/{family}-plain", max_shard_size=40_000)
        for value in (*model.parameters(), *model.buffers()):
            with torch.no_grad():
                (value.to_local() if isinstance(value, DTensor) else value).fill_(torch.nan)
        for name, buffer in tiny_model(family).named_buffers():
            if "inv_freq" in name:  # not part of any checkpoint
                model.get_buffer(name).copy_(buffer)
        load_hf_state_dict(model, exported)

        ids, upstream = batch(ranks)
        logits = forward_and_backward(model, ids[rank : rank + 1], upstream[rank : rank + 1])
        for parameter in model.parameters():
            if not isinstance(parameter, DTensor):
                dist.all_reduce(parameter.grad)
            elif ranks == 4:
                parameter.grad.mul_(2)  # FSDP has averaged over two
            with torch.no_grad():
                parameter.copy_(parameter.grad)
        grads = {name: value.clone() for name, value in to_hf_state_dict(model, "module")}
        results[family] = {"logits": logits, **grads}
    return results


@pytest.mark.parametrize("ranks", [2, 4])
def test_replaced_layers_over_ranks(ranks: int, tmp_path: Path) -> None:
    """Sharded, exported, emptied, loaded again: logits and gradients of the original model."""
    found = run_ranks(ranks, run_replaced, str(tmp_path), timeout=180)
    for family in FAMILIES:
        original: Any = tiny_model(family)
        load = transformers.AutoModelForCausalLM.from_pretrained
        for folder in (family, f"{family}-plain"):
            saved = load(tmp_path / folder, attn_implementation="eager")
            state = saved.state_dict()
            for name, value in original.state_dict().items():
                assert torch.equal(state[name], value), (folder, name)
        original.set_experts_implementation("eager")
        exact = copy.deepcopy(original).double()
        ids, upstream = batch(ranks)
        logits = forward_and_backward(original, ids, upstream)
        forward_and_backward(exact, ids, upstream.double())
        assert relative_error(torch.cat([r[family]["logits"] for r in found]), logits) < 1e-6
        for (name, value), right in zip(
            original.named_parameters(), exact.parameters(), strict=True
        ):
            assert value.grad is not None
            assert right.grad is not None
            # Gradients of gpt_oss's sinks nearly cancel: how float32 rounds anywhere in the model
            # decides their error, twice as much with one number of threads as with another.
            limit = max(5e-6, 4 * relative_error(value.grad, right.grad))
            assert relative_error(found[0][family][name], right.grad) < limit, (family, name)


def test_sharded_models_are_refused() -> None:
    """Replacing comes before sharding."""
    run_ranks(2, refuse_sharded, timeout=120)


def refuse_sharded(rank: int, ranks: int) -> None:
    model = tiny_model("qwen3_moe")
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\): the model is already sharded"):
        replace_moe_layers(model)
