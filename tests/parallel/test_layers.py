"""MoE layers on one device against their formulas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from moe_parallel import MLP, BackendConfig, FakeBalancedGate, GroupedExperts, MoE, MoEConfig
from moe_parallel import experts as experts_module
from moe_parallel.dispatch import Dispatched, LocalDispatcher
from moe_parallel.training import MoEAuxLossAutoScaler
from tests.parallel import definitions
from tests.parallel.definitions import make_config

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixtral": {"norm_topk_prob": True, "softmax_before_topk": False, "aux_loss_coeff": 0.2},
    "deepseek": {
        "score_func": "sigmoid",
        "n_expert_groups": 4,
        "n_limited_groups": 2,
        "norm_topk_prob": True,
        "route_scale": 2.5,
        "force_e_score_correction_bias": True,
        "n_shared_experts": 2,
    },
    "gpt_oss": {
        "expert_activation": "quick_geglu",
        "expert_bias": True,
        "router_bias": True,
        "softmax_before_topk": False,
        "activation_limit": 1.5,
    },
    "swigluoai": {"expert_activation": "swigluoai", "expert_bias": True, "activation_alpha": 1.1},
    "geglu": {"expert_activation": "geglu", "n_shared_experts": 1, "shared_expert_gate": True},
    "nemotron": {
        "expert_activation": "relu2",
        "shared_expert_activation": "relu2",
        "n_shared_experts": 1,
        "shared_expert_inter_dim": 17,
        "moe_latent_size": 7,
        "score_func": "sqrtsoftplus",
    },
    "clamped": {"swiglu_limit": 0.5, "n_shared_experts": 1},
}


def make_moe(backend: BackendConfig | None = None, **changes: Any) -> tuple[MoE, MoEConfig]:
    config = make_config(**changes)
    layer = MoE(config, BackendConfig() if backend is None else backend)
    definitions.randomize(layer)
    if config.force_e_score_correction_bias:
        bias = layer.gate.e_score_correction_bias
        assert isinstance(bias, Tensor)
        bias.copy_(torch.rand(bias.shape))
    return layer, config


@pytest.mark.parametrize("experts", ["auto", "reference"])
@pytest.mark.parametrize("name", LAYERS)
def test_moe_is_its_formula(name: str, experts: str) -> None:
    """Output and every gradient, with padding; tokens in three dimensions, not contiguous."""
    layer, config = make_moe(BackendConfig(experts=experts), **LAYERS[name])
    x = torch.randn(config.dim, 7, 5, dtype=torch.float64).transpose(0, 2).requires_grad_()
    padding = torch.rand(5, 7) < 0.3
    upstream = torch.randn(5, 7, config.dim, dtype=torch.float64)
    y = layer(x, padding)
    assert y.shape == x.shape
    trained = dict(layer.named_parameters())
    actual = torch.autograd.grad(y, [x, *trained.values()], upstream)

    twin = definitions.leaves(layer)
    tokens = x.detach().reshape(-1, config.dim).requires_grad_()
    mask = ~padding.flatten()
    expected, aux = definitions.moe(config, twin, tokens, mask)
    total = (expected * upstream.flatten(0, 1)).sum() + config.aux_loss_coeff * aux
    truth = torch.autograd.grad(total, [tokens, *(twin[key] for key in trained)])
    assert_close(y.flatten(0, 1), expected)
    assert_close(actual[0].flatten(0, 1), truth[0], rtol=1e-6, atol=1e-7)
    for key, ours, theirs in zip(trained, actual[1:], truth[1:], strict=True):
        assert_close(ours, theirs, rtol=1e-6, atol=1e-7, msg=key)


def test_experts_see_nothing_of_masked_tokens_and_dropped_slots() -> None:
    """Not even if they hold NaN, in forward or in backward."""
    config = make_config(expert_bias=True)
    experts = GroupedExperts(config)
    definitions.randomize(experts)
    x = torch.randn(9, config.dim, dtype=torch.float64)
    mask = torch.arange(9) % 3 > 0
    weights = torch.rand(9, 3, dtype=torch.float64)
    indices = torch.rand(9, 8).topk(3).indices
    indices[4] = torch.tensor([-1, 8, 2])
    poisoned = torch.where(mask[:, None], x, torch.nan).requires_grad_()
    y = experts(poisoned, mask, weights.requires_grad_(), indices)
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask]))
    y.sum().backward()
    assert poisoned.grad is not None
    assert weights.grad is not None
    assert bool((poisoned.grad[~mask] == 0).all())
    assert bool((weights.grad[~mask] == 0).all())
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())
    alone = experts(x[4:5], mask[4:5], weights[4:5, 2:].expand(1, 3), torch.tensor([[2, -1, 8]]))
    assert_close(y[4:5], alone)


@pytest.mark.parametrize("tokens", [0, 6])
def test_every_expert_parameter_gets_a_gradient(tokens: int) -> None:
    """Zero where no token came, whatever the weights and the tokens hold."""
    config = make_config(expert_bias=True)
    experts = GroupedExperts(config)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.fill_(torch.inf)
    x = torch.full((tokens, config.dim), torch.nan, dtype=torch.float64)
    indices = torch.full((tokens, 3), -1)
    weights = torch.rand(tokens, 3, dtype=torch.float64)
    y = experts(x, torch.ones(tokens, dtype=torch.bool), weights, indices)
    assert torch.equal(y, torch.zeros_like(y))
    y.sum().backward()
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_float32_parameters_serve_bfloat16_activations() -> None:
    config = make_config(dtype=torch.float32, dim=32, moe_inter_dim=16)
    experts = GroupedExperts(config)
    definitions.randomize(experts)
    x = torch.randn(12, 32, dtype=torch.bfloat16)
    y = experts(
        x, torch.ones(12, dtype=torch.bool), torch.rand(12, 3), torch.rand(12, 8).topk(3).indices
    )
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert experts.down_projs.grad is not None
    assert experts.down_projs.grad.dtype == torch.float32


def test_unknown_activations_are_named() -> None:
    config = make_config()
    config.expert_activation = "tanh"
    with pytest.raises(ValueError, match=r"expert_activation must be one of swiglu.*'tanh'"):
        GroupedExperts(config)
    with pytest.raises(ValueError, match="MLP: activation must be one of swiglu, relu2; got 'geg"):
        MLP(3, 4, activation="geglu")


def test_mlp() -> None:
    x = torch.randn(4, 6, dtype=torch.float64) * 3
    layer = MLP(6, 5, dtype=torch.float64, bias=True)
    assert layer.gate_proj is not None
    gate, up = layer.gate_proj(x), layer.up_proj(x)
    assert_close(layer(x), layer.down_proj(gate * torch.sigmoid(gate) * up))
    layer.swiglu_limit = 0.3
    gate, up = gate.clamp(max=0.3), up.clamp(-0.3, 0.3)
    assert_close(layer(x), layer.down_proj(gate * torch.sigmoid(gate) * up))
    for module in (layer.gate_proj, layer.up_proj, layer.down_proj):
        assert module.bias is not None
    layer.init_weights(init_std=0.5)
    for name, value in layer.named_parameters():
        assert bool(value.any()) == ("weight" in name), name
    narrow = MLP(64, 32, swiglu_limit=1.0)
    x_narrow = torch.randn(16, 64).bfloat16() * 10
    gate, up = (module(x_narrow).float() for module in (narrow.gate_proj, narrow.up_proj) if module)
    inner = functional.silu(gate.clamp(max=1.0)) * up.clamp(-1.0, 1.0)  # rounded once
    assert torch.equal(narrow(x_narrow), narrow.down_proj(inner.bfloat16()))
    plain = MLP(6, 5, dtype=torch.float64, activation="relu2")
    assert plain.up_proj.bias is None
    assert plain.gate_proj is None
    assert_close(plain(x), plain.down_proj(plain.up_proj(x).relu() ** 2))
    assert MLP(6, 5)(torch.randn(2, 6).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["plain", "deepseek"])
def test_output_is_a_tensor_of_its_own(name: str) -> None:
    """Residual connections may be added in place."""
    layer, config = make_moe(**LAYERS[name])
    for shape in ((3, 4, config.dim), (5, config.dim), (0, config.dim)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        y = layer(x)
        assert y.shape == shape
        assert not y._is_view()
        y += 1
        y.sum().backward()


def test_parts_are_called_with_positional_arguments() -> None:
    layer, config = make_moe(moe_latent_size=7, n_shared_experts=1)
    x = torch.randn(2, 4, config.dim, dtype=torch.float64)
    padding = torch.rand(2, 4) < 0.5
    weights, indices = torch.rand(8, 3), torch.zeros(8, 3, dtype=torch.int64)
    layer.gate.forward = MagicMock(return_value=(weights, indices, None))
    routed = torch.randn(8, 7, dtype=torch.float64)
    layer.experts.forward = MagicMock(return_value=routed)
    mesh = MagicMock()
    layer.cp_mesh = mesh
    layer(x, padding)
    tokens, mask, cp_mesh = layer.gate.forward.call_args.args
    assert torch.equal(tokens, x.flatten(0, 1))
    assert torch.equal(mask, ~padding.flatten())
    assert cp_mesh is mesh
    assert layer.experts.forward.call_args.kwargs == {}
    latent, mask, *routing = layer.experts.forward.call_args.args
    assert layer.fc1_latent_proj is not None
    assert_close(latent, layer.fc1_latent_proj(tokens))
    assert torch.equal(mask, ~padding.flatten())
    assert routing[0] is weights
    assert routing[1] is indices
    other = MagicMock()
    layer(x, cp_mesh=other)
    assert layer.gate.forward.call_args.args[2] is other
    assert bool(layer.gate.forward.call_args.args[1].all())


def test_balanced_gate_of_the_backend() -> None:
    layer, config = make_moe(BackendConfig(fake_balanced_gate=True, fake_gate_noise=0.5))
    assert isinstance(layer.gate, FakeBalancedGate)
    assert layer.gate.noise == 0.5
    assert layer(torch.randn(4, config.dim, dtype=torch.float64)).shape == (4, config.dim)


def test_padding_may_be_integers() -> None:
    layer, config = make_moe()
    x, padding = torch.randn(2, 4, config.dim, dtype=torch.float64), torch.rand(2, 4) < 0.5
    assert torch.equal(layer(x, padding.to(torch.int64)), layer(x, padding))


def test_what_a_layer_is_made_of() -> None:
    """Sizes and precision of the configuration; matrices that are drawn, biases that are zero."""
    changes = {"n_shared_experts": 2, "shared_expert_gate": True, "moe_latent_size": 7}
    biased = {"expert_bias": True, "router_bias": True}
    layer = MoE(make_config(**changes, **biased), BackendConfig(gate_precision="float32"))
    assert layer.gate.gate_precision == torch.float32
    assert layer.shared_experts is not None
    assert layer.shared_experts.up_proj.weight.shape == (2 * 11, 13)
    other = MoE(make_config(**changes, shared_expert_inter_dim=5)).shared_experts
    assert other is not None
    assert other.up_proj.weight.shape == (2 * 5, 13)
    for name, value in layer.named_parameters():
        assert value.dtype == torch.float64, name
        assert bool(value.any()) == ("bias" not in name), name


def test_the_dispatcher_is_made_as_the_backend_says(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    dispatcher = LocalDispatcher()
    monkeypatch.setattr(
        experts_module,
        "build_dispatcher",
        lambda *args, **options: made.append((args, options)) or dispatcher,
    )
    backend = BackendConfig(
        dispatcher="cuda_ipc",
        dispatcher_timeout=7.0,
        dispatcher_max_tokens=5,
        dispatcher_capacity=6,
        dispatcher_slot_capacity=9,
    )
    experts = GroupedExperts(make_config(), backend)
    mesh: Any = SimpleNamespace(get_group=lambda: "group")
    experts.init_token_dispatcher(ep_mesh=mesh)
    assert experts.token_dispatcher is dispatcher
    settings = {"timeout": 7.0, "max_tokens": 5, "capacity": 6, "slot_capacity": 9}
    assert made == [(("group",), {"num_experts": 8, "transport": "cuda_ipc", **settings})]


@pytest.mark.parametrize("kind", ["auto", "reference"])
def test_which_experts_compute_and_what_meanwhile(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    called: list[str] = []
    for owner, name in ((experts_module, "auto"), (experts_module.reference, "reference")):
        compute = owner.fused_experts

        def note(*args: Any, _name: str = name, _compute: Any = compute, **options: Any) -> Tensor:
            called.append(_name)
            return _compute(*args, **options)

        monkeypatch.setattr(owner, "fused_experts", note)
    experts = GroupedExperts(make_config(), BackendConfig(experts=kind))
    assert not experts.overlaps  # with a dispatcher that sends nothing
    x, ids = torch.randn(4, 13, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.int64)
    mask, weights = torch.ones(4, dtype=torch.bool), torch.rand(4, 3)
    experts(x, mask, weights, ids, lambda: called.append("meanwhile"))
    assert called == ["meanwhile", kind]

    class Sending(LocalDispatcher):
        def dispatch_async(self, *args: Any) -> Any:
            called.append("sent")
            return SimpleNamespace(wait=lambda: called.append("here") or self.dispatch(*args))

    called.clear()
    experts.token_dispatcher = Sending()
    assert experts.overlaps
    experts(x, mask, weights, ids, lambda: called.append("meanwhile"))
    assert called == ["sent", "meanwhile", "here", kind]


def test_init_weights() -> None:
    parts = {"n_shared_experts": 1, "shared_expert_gate": True, "moe_latent_size": 7}
    layer, config = make_moe(**LAYERS["gpt_oss"], **parts, force_e_score_correction_bias=True)
    with torch.no_grad():
        for value in layer.state_dict().values():
            value.fill_(9.0)
    layer.init_weights(torch.device("cpu"), init_std=0.5)
    for name, value in layer.state_dict().items():
        if "bias" in name:
            assert bool((value == 0).all()), name
        else:
            assert 0.3 < value.std().item() < 0.7, name
    with torch.device("meta"):
        bare = MoE(config, BackendConfig())
    bare.to_empty(device="cpu").init_weights(torch.device("cpu"))
    assert all(bool(value.isfinite().all()) for value in bare.state_dict().values())


def test_a_layer_compiles_whole() -> None:
    layer, config = make_moe(**LAYERS["deepseek"])
    x = torch.randn(6, config.dim, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y, expected = compiled(x), layer(x)
    assert_close(y, expected)
    for ours, theirs in zip(
        torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]),
        torch.autograd.grad(expected.square().sum(), [x, *layer.parameters()]),
        strict=True,
    ):
        assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_an_auxiliary_loss_compiles_and_takes_the_scale_of_its_backward(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """One graph for every scale, a float or a tensor, set after forward as a schedule may."""
    layer, config = make_moe(aux_loss_coeff=0.7)
    layer.train()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    weights = [layer.gate.weight, layer.experts.down_projs]
    found = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for scale in (None, 3.0, 5.0, torch.tensor(7.0, dtype=torch.float64)):
            x = torch.randn(9, config.dim, dtype=torch.float64)
            gradients = []
            for run in (compiled, layer):
                monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", 100.0)
                y = run(x)
                monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", scale)
                gradients.append(torch.autograd.grad(y.square().sum(), weights))
            for ours, theirs in zip(*gradients, strict=True):
                assert_close(ours, theirs)
            monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", 0.0)
            plain = torch.autograd.grad(layer(x).square().sum(), weights)
            found.append(float((gradients[0][0] - plain[0]).norm()))
    assert min(found) > 1e-3  # the auxiliary loss is there


def test_runs_on_meta_tensors() -> None:
    with torch.device("meta"):
        layer, config = MoE(make_config(n_shared_experts=1)), make_config()
        x = torch.empty(5, config.dim, dtype=config.dtype)
    assert layer(x).shape == x.shape


@pytest.mark.parametrize("rounding", [{}, {"token_rounding": "up", "token_rounding_tile": 4}])
def test_row_buffers_are_as_long_as_the_dispatcher_says(rounding: dict[str, Any]) -> None:
    """What backward keeps follows the bound, not the slots received, most of which are no one's."""
    config = make_config(**rounding)
    experts = GroupedExperts(config)
    definitions.randomize(experts)
    bound = 4

    class Bounded(LocalDispatcher):
        def dispatch(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Dispatched:
            mine = torch.arange(topk_ids.numel()).view(topk_ids.shape) < bound
            ids = torch.where(mine, topk_ids, -1)
            return Dispatched(x, ids, topk_weights, None, num_rows=bound)

    experts.token_dispatcher = Bounded()
    x = torch.randn(9, config.dim, dtype=config.dtype)
    columns = config.n_activated_experts + config.rounding_candidates * bool(rounding)
    ids = torch.zeros(9, columns, dtype=torch.int64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        experts(x, torch.ones(9, dtype=torch.bool), torch.rand(ids.shape), ids)
    width = experts.gate_and_up_projs.shape[2]
    assert (bound, width) in kept
    assert (ids.numel(), width) not in kept


def test_row_buffers_are_as_long_as_token_rounding_can_fill() -> None:
    layer, config = make_moe(token_rounding="nearest", token_rounding_tile=4)
    kept: list[int] = []

    def pack(value: Tensor) -> Tensor:
        if value.dim() == 2 and value.shape[1] == 2 * config.moe_inter_dim:
            kept.append(value.shape[0])
        return value

    x = torch.randn(40, config.dim, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        layer(x)
        layer.eval()(x)
    # at most half a tile more for each of the 8 experts, though there are twice as many columns
    assert kept == [40 * 3 + 8 * 2, 40 * 3]


def test_a_layer_with_token_rounding_compiles_whole() -> None:
    layer, config = make_moe(token_rounding="up", token_rounding_tile=4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (40, 17):
        x = torch.randn(tokens, config.dim, dtype=torch.float64)
        assert_close(compiled(x), layer(x))


def test_experts_in_float8() -> None:
    """Close to the layer without, in value and gradients, and no nearer than rounding allows."""
    backend = BackendConfig(experts_precision="fp8_block")
    layer, config = make_moe(backend, expert_bias=True, token_rounding="up", token_rounding_tile=4)
    plain = MoE(config, BackendConfig())
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(40, config.dim, dtype=torch.float64)
    upstream = torch.randn_like(x)
    found, expected = (
        [y, *torch.autograd.grad(y, list(module.parameters()), upstream)]
        for module in (layer, plain)
        for y in [module(x)]
    )
    names = ["y", *dict(layer.named_parameters())]
    for name, ours, theirs in zip(names, found, expected, strict=True):
        error = (ours - theirs).norm() / theirs.norm()
        assert error < 0.2, name
        if name == "y" or name.endswith("projs"):
            assert error > 1e-4, name
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), layer(x))


def test_autocast_computes_the_experts_narrow_and_returns_what_came() -> None:
    layer, config = make_moe(dtype="float32", n_shared_experts=1)
    x = torch.randn(9, config.dim, requires_grad=True)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routed = layer.gate(x, torch.ones(9, dtype=torch.bool), None)
        experts = layer.experts(x, torch.ones(9, dtype=torch.bool), *routed[:2])
        y = layer(x)
    assert experts.dtype == y.dtype == torch.float32
    assert not torch.equal(y, expected)
    assert (y - expected).norm() < 0.02 * expected.norm()
    y.sum().backward()
    assert layer.experts.down_projs.grad is not None
    assert layer.experts.down_projs.grad.dtype == torch.float32


def test_moe_refuses_what_does_not_fit() -> None:
    layer, config = make_moe()
    x = torch.randn(2, 3, config.dim, dtype=config.dtype)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    for error, message, arguments in (
        (TypeError, r"MoE: x must be a tensor \[\.\.\., H\]; got list", ([1.0],)),
        (TypeError, r"MoE: x must be dense and floating point; got .* torch\.int64", (x.long(),)),
        (TypeError, r"MoE: x must be dense .* layout torch\.sparse_coo", (x.to_sparse(),)),
        (ValueError, rf"MoE: x must be .* H = {config.dim}; got \[2, 3, 1\]", (x[..., :1],)),
        (ValueError, r"MoE: x must be .* got \[\]", (x[0, 0, 0],)),
        (TypeError, "MoE: padding_mask must be a tensor of bool; got list", (x, [True])),
        (
            ValueError,
            r"MoE: padding_mask must be \[2, 3\] .* got \[3, 2\]",
            (x, mask.view(4, 2)[:3]),
        ),
        (ValueError, r"MoE: padding_mask must be \[2, 3\] .* got \[2, 4\]", (x, mask)),
    ):
        with pytest.raises(error, match=message):
            layer(*arguments)
    mask[0, 1] = True
    assert torch.equal(layer(x, mask[:, :3].flatten()), layer(x, mask[:, :3]))
