"""MoE layers on several ranks against the same layer in one process on all their tokens."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from moe_parallel import BackendConfig, MoE, MoEConfig
from moe_parallel.dispatch import AllToAllDispatcher
from moe_parallel.parallelizer import apply_ep
from tests.kernels.accuracy import assert_accurate
from tests.parallel import definitions
from tests.parallel.definitions import make_config
from tests.parallel.ranks import run_ranks

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixtral": {"norm_topk_prob": True, "softmax_before_topk": False},
    "deepseek": {
        "score_func": "sigmoid",
        "n_expert_groups": 4,
        "n_limited_groups": 2,
        "norm_topk_prob": True,
        "route_scale": 2.5,
        "n_shared_experts": 2,
    },
    "gpt_oss": {"expert_activation": "quick_geglu", "expert_bias": True, "router_bias": True},
    "nemotron": {"expert_activation": "relu2", "moe_latent_size": 7, "expert_bias": True},
}
TOKENS = {2: [11, 6], 4: [5, 0, 9, 3]}


class Block(nn.Module):
    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.mlp = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Model(nn.Module):
    """The least that apply_ep needs: blocks in ``layers``, an MoE in ``mlp``."""

    def __init__(self, *layers: MoE) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(layer) for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


def make_layer(config: MoEConfig, prefer: list[int] | None = None, **backend: Any) -> MoE:
    """Equal on every rank; the router's bias may make tokens prefer some experts."""
    torch.manual_seed(7)
    layer = MoE(config, BackendConfig(**backend))
    definitions.randomize(layer)
    if prefer is not None:
        assert layer.gate.bias is not None
        with torch.no_grad():
            layer.gate.bias.fill_(-30.0)
            layer.gate.bias[prefer] = 30.0
    return layer


def make_inputs(tokens: list[int], dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``x`` and the gradient of ``y``, both [T, H], of all ranks."""
    generator = torch.Generator().manual_seed(3)
    x, upstream = torch.randn(2, sum(tokens), dim, generator=generator, dtype=torch.float64)
    return x.to(dtype), upstream.to(dtype)


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mesh_of(ranks: int) -> DeviceMesh:
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))


def run_layer(module: nn.Module, x: Tensor, upstream: Tensor) -> dict[str, Tensor | None]:
    """The output and every gradient, by name."""
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(upstream)
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **grads}


def run_expert_parallel(
    rank: int, ranks: int, layer: MoE, tokens: list[int]
) -> dict[str, Tensor | None]:
    """:func:`run_layer` with experts on all ranks, each with its tokens; gathered and summed."""
    apply_ep(Model(layer), mesh_of(ranks))
    x, upstream = make_inputs(tokens, layer.dim, torch.get_default_dtype())
    begin = sum(tokens[:rank])
    mine = slice(begin, begin + tokens[rank])
    result = run_layer(layer, x[mine], upstream[mine])
    for name, value in result.items():
        if value is None:
            continue
        if name in ("y", "x"):
            whole = value.new_zeros(sum(tokens), layer.dim)
            whole[mine] = value
            value = whole
        if isinstance(value, DTensor):
            assert value.placements == (Shard(0),), name
            mine_alone = value.to_local().contiguous()
            parts = [torch.empty_like(mine_alone) for _ in range(ranks)]
            dist.all_gather(parts, mine_alone)  # full_tensor() needs what MPI has not
            value = torch.cat(parts)
        else:
            dist.all_reduce(value)  # gloo adds bfloat16 in bfloat16; shards and zeros here
        result[name] = value
    return result


def _layer(rank: int, ranks: int, changes: dict[str, Any], options: dict[str, Any]) -> None:
    tokens = options.get("tokens", TOKENS[ranks])
    dtype = options.get("dtype", torch.float64)
    torch.set_default_dtype(dtype)
    config = make_config(dtype=dtype, **changes)
    frozen = options.get("frozen", False)
    layers = []
    for _ in range(2):
        layer = make_layer(config, options.get("prefer"), experts=options.get("experts", "auto"))
        layer.experts.requires_grad_(not frozen)
        layers.append(layer)
    single, sharded = layers
    x, upstream = make_inputs(tokens, config.dim, dtype)
    expected = run_layer(single, x, upstream)
    actual = run_expert_parallel(rank, ranks, sharded, tokens)

    assert isinstance(sharded.experts.token_dispatcher, AllToAllDispatcher)
    for name, parameter in sharded.named_parameters():
        assert isinstance(parameter, DTensor) == name.startswith("experts."), name
        assert (parameter.grad is None) == (frozen and name.startswith("experts.")), name
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, name
            continue
        scale = value.abs().max().clamp(min=1e-3).item() if value.numel() else 1.0
        assert_close(actual[name], value, rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_give_what_one_process_gives(ranks: int, name: str) -> None:
    """Output and every gradient, router and biases included, with uneven and absent tokens."""
    run_ranks(ranks, _layer, LAYERS[name], {})


@pytest.mark.parametrize(
    "options",
    [
        {"prefer": [5]},
        {"prefer": [2, 3, 1]},
        {"tokens": [0, 7]},
        {"tokens": [0, 0]},
        {"frozen": True},
        {"experts": "reference"},
        {"dtype": torch.float32},
    ],
    ids=[
        "mostly_one_expert",
        "one_rank_gets_nothing",
        "one_rank_has_nothing",
        "no_tokens_at_all",
        "frozen_experts",
        "reference",
        "float32",
    ],
)
def test_ranks_give_what_one_process_gives_in_corner_cases(options: dict[str, Any]) -> None:
    run_ranks(2, _layer, {"router_bias": True, "expert_bias": True}, options)


def _all_to_one(rank: int, ranks: int) -> None:
    _layer(
        rank,
        ranks,
        {"router_bias": True, "expert_bias": True, "n_activated_experts": 1},
        {"prefer": [6], "tokens": [4, 0, 13, 2]},
    )


def test_all_tokens_to_one_expert() -> None:
    run_ranks(4, _all_to_one)


def _token_rounding(rank: int, ranks: int) -> None:
    torch.set_default_dtype(torch.float64)
    config = make_config(token_rounding="nearest", token_rounding_tile=4, norm_topk_prob=True)
    counts = [21, 14]
    x, upstream = make_inputs(counts, config.dim, torch.float64)
    parts = zip(x.split(counts), upstream.split(counts), strict=True)
    alone = [run_layer(make_layer(config), *part) for part in parts]  # each rank rounds its own
    actual = run_expert_parallel(rank, ranks, make_layer(config), counts)
    for name, value in actual.items():
        results = [result[name] for result in alone]
        assert value is not None
        assert_close(value, torch.cat(results) if name in ("y", "x") else sum(results), msg=name)


def test_each_rank_rounds_its_own_tokens() -> None:
    run_ranks(2, _token_rounding)


def _float8(rank: int, ranks: int) -> None:
    """Rows and experts are rounded alone, wherever they are."""
    torch.set_default_dtype(torch.float64)
    config = make_config(expert_bias=True, n_shared_experts=1)
    options = {"experts_precision": "fp8_block"}
    x, upstream = make_inputs(TOKENS[ranks], config.dim, torch.float64)
    expected = run_layer(make_layer(config, **options), x, upstream)
    plain = run_layer(make_layer(config), x, upstream)
    actual = run_expert_parallel(rank, ranks, make_layer(config, **options), TOKENS[ranks])
    for name, value in actual.items():
        assert_close(value, expected[name], msg=name)
    assert not torch.allclose(expected["y"], plain["y"], rtol=1e-4)  # type: ignore[arg-type]


def test_experts_in_float8() -> None:
    run_ranks(2, _float8)


def _half_precision(rank: int, ranks: int) -> dict[str, Tensor | None]:
    torch.set_default_dtype(torch.bfloat16)
    config = make_config(dtype=torch.bfloat16, dim=64, moe_inter_dim=48, expert_bias=True)
    return run_expert_parallel(rank, ranks, make_layer(config), [40, 24])


def check_half_precision(actual: dict[str, Tensor | None], config: MoEConfig) -> None:
    """The truth is the layer's formula in float64, the yardstick the same chain in bfloat16."""
    layer = make_layer(config)
    x, upstream = make_inputs([40, 24], config.dim, torch.bfloat16)
    mask = torch.ones(64, dtype=torch.bool)
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        twin = {
            name: value.to(dtype).detach().requires_grad_()
            for name, value in definitions.leaves(layer).items()
        }
        tokens = x.to(dtype).requires_grad_()
        y, _ = definitions.moe(config, twin, tokens, mask)
        grads = torch.autograd.grad(y, [tokens, *twin.values()], upstream.to(dtype))
        results.append({"y": y, "x": grads[0], **dict(zip(twin, grads[1:], strict=True))})
    truth, yardstick = results
    for name in truth:
        value = actual[name]
        assert value is not None, name
        assert_accurate(name, value, truth[name], yardstick[name])


def test_bfloat16_is_as_close_as_plain_pytorch() -> None:
    actual = run_ranks(2, _half_precision)[0]
    config = make_config(dtype=torch.bfloat16, dim=64, moe_inter_dim=48, expert_bias=True)
    check_half_precision(actual, config)


def _repeat(rank: int, ranks: int) -> None:
    torch.set_default_dtype(torch.float32)
    layer = make_layer(make_config(dtype=torch.float32, dim=96, moe_inter_dim=80, expert_bias=True))
    apply_ep(Model(layer), mesh_of(ranks))
    x, upstream = torch.randn(2, 50 + rank, 96)
    results = []
    for _ in range(3):
        layer.zero_grad()
        results.append(run_layer(layer, x, upstream))
    for name, first in results[0].items():
        for other in (results[1][name], results[2][name]):
            assert first is not None
            assert other is not None
            assert torch.equal(_local(first), _local(other)), name


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def test_runs_repeat_bit_for_bit() -> None:
    run_ranks(4, _repeat)


def _zero_gradients_are_clean(rank: int, ranks: int) -> None:
    """Experts that nobody chose hold infinities: no token meets them, nor does a gradient."""
    config = make_config(expert_bias=True, router_bias=True)
    layer = make_layer(config, prefer=[0, 1, 2])
    apply_ep(Model(layer), mesh_of(ranks))
    if rank == 1:
        with torch.no_grad():
            for parameter in layer.experts.parameters():
                _local(parameter).fill_(torch.inf)
    x = torch.randn(6, config.dim, dtype=torch.float64)
    y = layer(x)
    assert bool(y.isfinite().all())
    y.sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        grad = _local(parameter.grad)
        assert bool(grad.isfinite().all()), name
        if rank == 1 and name.startswith("experts."):
            assert bool((grad == 0).all()), name


def test_unused_experts_get_zero_gradients_whatever_they_hold() -> None:
    run_ranks(2, _zero_gradients_are_clean)


def _compiled(rank: int, ranks: int) -> None:
    """Token counts differ from call to call and from rank to rank: one graph serves them."""
    config = make_config(n_shared_experts=1, norm_topk_prob=True, expert_bias=True)
    layer = make_layer(config)
    apply_ep(Model(layer), mesh_of(ranks))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for tokens in ([7, 4], [5, 12], [3, 3]):
        x, upstream = torch.randn(2, tokens[rank], config.dim, dtype=torch.float64)
        torch._dynamo.mark_dynamic(x, 0)
        layer.zero_grad()
        expected = run_layer(layer, x, upstream)
        layer.zero_grad()
        actual = run_layer(compiled, x, upstream)
        for name, value in expected.items():
            got = actual.get(name, actual.get(f"_orig_mod.{name}"))
            assert got is not None, name
            assert value is not None, name
            assert_close(_local(got), _local(value), msg=name)


def test_a_layer_compiles_whole_under_expert_parallelism() -> None:
    run_ranks(2, _compiled, timeout=120)


def _with_fsdp(rank: int, ranks: int) -> None:
    """Experts sharded over all ranks, the rest by FSDP: dense gradients are averaged by FSDP,
    experts' are summed by the exchange."""
    config = make_config(n_shared_experts=1, dim=16, dtype=torch.float32)
    single, sharded = (Model(*(make_layer(config) for _ in range(2))) for _ in range(2))
    mesh = mesh_of(ranks)
    apply_ep(sharded, mesh)
    for block in sharded.layers:
        fully_shard(block, mesh=mesh, ignored_params=set(block.mlp.experts.parameters()))
    fully_shard(sharded, mesh=mesh)
    x, upstream = torch.randn(2, ranks, 6, 16)
    expected = run_layer(single, x.flatten(0, 1), upstream.flatten(0, 1))
    actual = run_layer(sharded, x[rank], upstream[rank])
    for name, value in expected.items():
        got = actual[name]
        assert got is not None, name
        assert value is not None, name
        if name in ("x", "y"):
            value = value.unflatten(0, (ranks, 6))[rank]
        elif "experts." not in name or "shared" in name:
            value = value / ranks
        assert_close(full(got), value, rtol=1e-5, atol=1e-5 * value.abs().max().item(), msg=name)


def test_experts_beside_fsdp() -> None:
    run_ranks(2, _with_fsdp)


def _errors(rank: int, ranks: int) -> None:
    mesh = mesh_of(ranks)
    model = Model(make_layer(make_config()))
    apply_ep(model, mesh)
    with pytest.raises(RuntimeError, match="once"):
        apply_ep(model, mesh)
    odd = make_layer(make_config(n_routed_experts=9))
    with pytest.raises(ValueError, match=r"multiple of the EP size 2; block 0 has 9"):
        apply_ep(Model(odd), mesh)
    assert not any(isinstance(parameter, DTensor) for parameter in odd.parameters())
    with pytest.raises(ValueError, match=r"multiple of the group's size 2; got 9"):
        odd.experts.init_token_dispatcher(ep_mesh=mesh)


def test_errors_of_apply_ep() -> None:
    run_ranks(2, _errors)


def _refused_mask(rank: int, ranks: int) -> None:
    layer, config = make_layer(make_config()), make_config()
    apply_ep(Model(layer), mesh_of(ranks))
    x = torch.randn(2, 3, config.dim, dtype=config.dtype)
    mask = torch.zeros(2, 3 + rank, dtype=torch.bool)
    error, message = ((RuntimeError, "rank 1 .* found an error"), (ValueError, "padding_mask"))[
        rank
    ]
    with pytest.raises(error, match=message):
        layer(x, mask)
    layer(x, mask[:, :3])


def test_a_mask_refused_on_one_rank_is_an_error_on_all() -> None:
    run_ranks(2, _refused_mask, timeout=30)


def _aux_loss(rank: int, ranks: int) -> None:
    """Parts of one sequence: every rank sees the whole's loss, and owes its part's gradient."""
    config = make_config(aux_loss_coeff=0.7, score_func="sigmoid", norm_topk_prob=True)
    gate = make_layer(config).gate
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("cp",))
    x = torch.randn(12, config.dim, dtype=torch.float64)
    part = slice(0, 3) if rank == 0 else slice(3, 12)
    for mask in (torch.arange(12) != 5, torch.arange(12) > 2):  # of the first part all or nothing
        _, _, whole = gate(x, mask, None)
        gate.weight.grad = None
        weights, _, aux = gate(x[part], mask[part], mesh)
        assert_close(aux, whole)
        assert gate.weight.grad is None
        weights.mul(0).sum().backward()  # the auxiliary loss alone
        assert isinstance(gate.weight.grad, Tensor)
        dist.all_reduce(gate.weight.grad)
        (expected,) = torch.autograd.grad(0.7 * whole, gate.weight)
        assert_close(gate.weight.grad, expected, rtol=1e-6, atol=1e-8)


def test_the_auxiliary_loss_of_a_sharded_sequence() -> None:
    run_ranks(2, _aux_loss)


class CountOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func).removesuffix(".default")] += 1
        return func(*args, **(kwargs or {}))


def _selective_checkpointing(rank: int, ranks: int) -> None:
    """Saved by name, the exchange runs once; forgotten, it runs again in backward."""
    config = make_config(norm_topk_prob=True)
    layer = make_layer(config)
    apply_ep(Model(layer), mesh_of(ranks))
    x, upstream = torch.randn(2, 6 + rank, config.dim, dtype=torch.float64)
    expected = run_layer(layer, x, upstream)
    exchange = ("moe_kernels.topk_router", "moe_kernels.dispatch", "moe_kernels.combine")

    def policy(saved: tuple[str, ...], ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        keep = str(op).removesuffix(".default") in saved
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    for saved, runs in ((exchange, 0), ((), 1)):
        layer.zero_grad()
        context_fn = partial(create_selective_checkpoint_contexts, partial(policy, saved))
        wrapped = checkpoint_wrapper(layer, context_fn=context_fn, early_stop=False)
        tokens = x.clone().requires_grad_()
        y = wrapped(tokens)
        with CountOps() as counter:
            y.backward(upstream)
        assert [counter.counts[name] for name in exchange] == [runs] * 3
        assert counter.counts["moe_kernels.fused_experts"] == 1
        assert expected["y"] is not None
        assert expected["x"] is not None
        assert tokens.grad is not None
        assert torch.equal(y, expected["y"])
        assert torch.equal(tokens.grad, expected["x"])
        for name, parameter in layer.named_parameters():
            value = expected[name]
            assert value is not None, name
            assert parameter.grad is not None, name
            assert torch.equal(_local(parameter.grad), _local(value)), name


def test_selective_checkpointing_saves_the_exchange() -> None:
    run_ranks(2, _selective_checkpointing)
