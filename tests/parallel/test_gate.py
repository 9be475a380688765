"""Routers against their formulas, and the state they keep between forwards."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from moe_parallel import FakeBalancedGate, Gate
from moe_parallel.training import MoEAuxLossAutoScaler
from tests.parallel import definitions
from tests.parallel.definitions import make_config

SCORE_FUNCS = ("softmax", "softmax_with_bias", "sqrtsoftplus", "sigmoid_with_bias", "sigmoid")


def make_gate(**changes: Any) -> Gate:
    gate = Gate(make_config(**changes))
    definitions.randomize(gate)
    if gate.e_score_correction_bias is not None:
        # Positive: losing groups count as 0, and zeros would tie.
        gate.e_score_correction_bias.copy_(torch.rand(gate.n_experts))
    return gate


def run(gate: Gate, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    mask = torch.ones(x.shape[0], dtype=torch.bool) if mask is None else mask
    return gate(x, mask, None)


def by_id(weights: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    order = indices.argsort(dim=1)
    return weights.gather(1, order), indices.gather(1, order)


CASES = [
    (kind, corrected, groups, before)
    for kind, corrected, groups, before in itertools.product(
        SCORE_FUNCS, (False, True), (1, 4), (False, True)
    )
    if groups == 1 or kind != "softmax"
    if not before or kind == "softmax"
]


@pytest.mark.parametrize(("score_func", "corrected", "groups", "before"), CASES)
@pytest.mark.parametrize("normalize", [False, True])
def test_gate_is_its_formula(
    score_func: str, corrected: bool, groups: int, before: bool, normalize: bool
) -> None:
    """Weights, choice, load, auxiliary loss, and the gradients of weights and loss together."""
    gate = make_gate(
        score_func=score_func,
        softmax_before_topk=before,
        force_e_score_correction_bias=corrected,
        n_expert_groups=groups,
        n_limited_groups=2 if groups > 1 else 1,
        norm_topk_prob=normalize,
        router_bias=True,
        route_scale=2.5,
        aux_loss_coeff=0.3,
    )
    gate._track_load_balance = True
    config = make_config(
        score_func=score_func,
        softmax_before_topk=before,
        n_expert_groups=groups,
        n_limited_groups=2 if groups > 1 else 1,
        norm_topk_prob=normalize,
        route_scale=2.5,
    )
    x = torch.randn(41, gate.dim, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(41) < 0.7
    weights, indices, aux = run(gate, x, mask)

    twin = {name: value.detach().clone() for name, value in gate.state_dict().items()}
    inputs = [x.detach().clone(), twin["weight"], twin["bias"]]
    inputs = [value.requires_grad_() for value in inputs]
    correction = twin.get("e_score_correction_bias")
    expected = definitions.gate(config, *inputs, correction, mask)

    actual_weights, actual_indices = by_id(weights, indices)
    expected_weights, expected_indices = by_id(expected[0], expected[1])
    assert torch.equal(actual_indices, expected_indices)
    assert_close(actual_weights, expected_weights)
    assert gate._last_expert_load is not None
    assert torch.equal(gate._last_expert_load, expected[2])
    assert aux is not None
    assert_close(aux.double(), expected[3], rtol=1e-5, atol=1e-6)
    assert indices.dtype == torch.int64
    assert aux.dtype == torch.float32

    upstream = torch.randn_like(actual_weights)
    actual = torch.autograd.grad(actual_weights, [x, gate.weight, gate.bias], upstream)
    truth = torch.autograd.grad((expected_weights * upstream).sum() + 0.3 * expected[3], inputs)
    for name, ours, theirs in zip(("x", "weight", "bias"), actual, truth, strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)


def test_the_weight_of_a_single_expert_is_its_score() -> None:
    """Divided by itself it would be 1, and the router would learn nothing of the main loss."""
    gate = make_gate(n_activated_experts=1, norm_topk_prob=True, score_func="sigmoid")
    x = torch.randn(9, gate.dim, dtype=torch.float64)
    assert_close(run(gate, x)[0], (x @ gate.weight.T).sigmoid().amax(1, keepdim=True))


def test_the_auxiliary_loss_never_sees_raw_logits() -> None:
    """Softmax after top-k scores by the full softmax: a shift of all logits changes nothing."""
    gate = make_gate(softmax_before_topk=False, aux_loss_coeff=1.0, router_bias=True)
    x = torch.randn(16, gate.dim, dtype=torch.float64)
    before = run(gate, x)[2]
    with torch.no_grad():
        assert gate.bias is not None
        gate.bias.add_(10)
    after = run(gate, x)[2]
    assert before is not None
    assert after is not None
    assert_close(before, after)
    assert 0.5 < after.item() < gate.n_experts


def test_losing_groups_may_win_with_fill_zero_but_not_with_minus_infinity() -> None:
    for score_func, outside in (("sigmoid", True), ("sigmoid_with_bias", False)):
        gate = make_gate(
            score_func=score_func,
            n_expert_groups=2,
            n_limited_groups=1,
            force_e_score_correction_bias=True,
        )
        assert gate.e_score_correction_bias is not None
        gate.e_score_correction_bias.copy_(torch.tensor([5.0, 5, -9, -9, 0, 0, 0, 0]))
        indices = run(gate, torch.randn(9, gate.dim, dtype=torch.float64))[1]
        assert bool((indices >= 4).any()) == outside


def test_precision_and_dtypes() -> None:
    """The projection runs in gate_precision; what leaves has the dtype of what came."""
    config = make_config(dtype="bf16", score_func="sigmoid", dim=64)
    gate = Gate(config, gate_precision=torch.float32)
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    weights, indices, aux = run(gate, x)
    assert gate.weight.dtype == weights.dtype == torch.bfloat16
    assert aux is None
    truth = definitions.gate(
        config, x.double(), gate.weight.double(), None, None, torch.ones(32, dtype=torch.bool)
    )
    assert torch.equal(by_id(weights, indices)[1], by_id(truth[0], truth[1])[1])
    expected = truth[0].to(torch.bfloat16)
    assert_close(by_id(weights, indices)[0], by_id(expected, truth[1])[0], rtol=2**-8, atol=0)


def test_autocast_leaves_the_router_its_precision() -> None:
    gate = make_gate(dtype=torch.float32, score_func="sigmoid", dim=64)
    x = torch.randn(16, 64)
    plain = run(gate, x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(gate, x)
    assert torch.equal(plain[0], cast[0])
    assert torch.equal(plain[1], cast[1])


def test_load_adds_up_over_micro_batches_of_training_alone() -> None:
    gate = make_gate(gate_bias_update_factor=0.1)
    mask = torch.arange(20) < 15
    x = torch.randn(2, 20, gate.dim, dtype=torch.float64)
    for batch in x:
        run(gate, batch, mask)
    gate.eval()
    run(gate, x[0])
    load = gate._cumulative_expert_load
    assert load is not None
    assert int(load.sum()) == 2 * 15 * gate.topk


def test_what_is_kept_for_reports_and_what_is_not() -> None:
    gate = make_gate(aux_loss_coeff=0.5)
    x = torch.randn(6, gate.dim, dtype=torch.float64)
    aux = run(gate, x)[2]
    assert aux is not None
    assert (gate._last_expert_load, gate._last_aux_loss) == (None, None)
    gate._track_load_balance = True
    run(gate, x)
    assert gate._last_expert_load is not None
    assert int(gate._last_expert_load.sum()) == 6 * gate.topk
    assert gate._last_aux_loss is not None
    assert torch.equal(gate._last_aux_loss, aux)
    assert not gate._last_aux_loss.requires_grad
    assert gate._cumulative_expert_load is None  # there is no bias to update
    assert run(gate.eval(), x)[2] is None  # nothing to balance
    assert gate._last_aux_loss is None


def test_recomputed_forwards_are_not_counted_again() -> None:
    for use_reentrant in (False, True):
        gate = make_gate(gate_bias_update_factor=0.1, aux_loss_coeff=0.1)
        x = torch.randn(20, gate.dim, dtype=torch.float64, requires_grad=True)
        mask = torch.ones(20, dtype=torch.bool)
        weights, _, _ = checkpoint(gate, x, mask, None, use_reentrant=use_reentrant)
        weights.sum().backward()
        load = gate._cumulative_expert_load
        assert load is not None
        assert int(load.sum()) == 20 * gate.topk


def test_update_bias_follows_the_load() -> None:
    gate = make_gate(gate_bias_update_factor=0.25)
    gate.init_weights()
    gate._cumulative_expert_load = torch.tensor([4, 0, 2, 2, 8, 0, 0, 0])
    gate.update_bias()
    bias = gate.e_score_correction_bias
    assert bias is not None
    assert bias.tolist() == [-0.25, 0.25, 0, 0, -0.25, 0.25, 0.25, 0.25]
    with pytest.raises(AssertionError, match="no forward"):
        gate.update_bias()
    gate._cumulative_expert_load = torch.ones(8, dtype=torch.int64)
    gate.init_weights()
    assert gate.e_score_correction_bias_master is None
    assert gate._cumulative_expert_load is None
    assert not bias.any()


def test_the_load_of_a_meta_device_is_none() -> None:
    gate = make_gate(gate_bias_update_factor=0.25).to("meta")
    x = torch.randn(5, gate.dim, dtype=gate.weight.dtype)
    gate(x.to("meta"), torch.ones(5, dtype=torch.bool, device="meta"), None)
    gate.to_empty(device="cpu")
    torch.nn.init.normal_(gate.weight)
    gate(x, torch.ones(5, dtype=torch.bool), None)
    assert gate._cumulative_expert_load.sum() == 5 * gate.topk


def test_small_bias_steps_survive_a_narrow_buffer_and_a_checkpoint_wins() -> None:
    """In bf16 alone, 4 plus 0.001 is 4 for ever."""
    gate = make_gate(gate_bias_update_factor=0.001, score_func="sigmoid")
    gate.init_weights()
    bias = gate.e_score_correction_bias
    assert bias is not None
    bias.fill_(4.0)
    gate.to(torch.bfloat16)
    load = torch.tensor([0, 1, 1, 1, 1, 1, 1, 2])
    for _ in range(20):
        gate._cumulative_expert_load = load.clone()
        gate.update_bias()
    buffer = gate.e_score_correction_bias
    assert buffer is not None
    assert buffer[0] == torch.tensor(4.02, dtype=torch.bfloat16)
    gate.load_state_dict(
        {**gate.state_dict(), "e_score_correction_bias": torch.full((8,), 1.0).bfloat16()}
    )
    gate._cumulative_expert_load = load.clone()
    gate.update_bias()
    master = gate.e_score_correction_bias_master
    assert master is not None
    assert_close(master[[0, 1]], torch.tensor([1.001, 1.0]))


def test_update_bias_refuses_a_gate_that_does_not_learn() -> None:
    with pytest.raises(AssertionError, match="train_gate"):
        Gate(make_config(train_gate=False, gate_bias_update_factor=0.1))
    frozen = Gate(make_config(train_gate=False, router_bias=True))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    with pytest.raises(AssertionError, match="frozen"):
        frozen.update_bias()
    with pytest.raises(AssertionError, match="is 0"):
        Gate(make_config()).update_bias()
    gate = Gate(make_config(gate_bias_update_factor=0.1)).eval()
    with pytest.raises(AssertionError, match="training mode"):
        gate.update_bias()


def test_correction_bias_exists_where_it_should() -> None:
    assert Gate(make_config()).e_score_correction_bias is None
    forced = Gate(make_config(force_e_score_correction_bias=True))
    assert "e_score_correction_bias" in forced.state_dict()
    assert forced.e_score_correction_bias is not None
    assert forced.e_score_correction_bias.dtype == torch.float32


@pytest.mark.parametrize("scale", [None, 4.0, torch.tensor(4.0)])
def test_the_scale_of_the_auxiliary_loss(
    scale: float | Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", scale)
    output = torch.randn(3, requires_grad=True)
    aux = torch.tensor(2.0, requires_grad=True)
    joined = MoEAuxLossAutoScaler.apply(output, aux)
    assert torch.equal(joined, output)
    joined.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert output.grad is not None
    assert aux.grad is not None
    assert output.grad.tolist() == [1, 2, 3]
    assert float(aux.grad) == (1.0 if scale is None else 4.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_auxiliary_loss_is_kept_in_float32(dtype: torch.dtype) -> None:
    """Whatever dtype a forward computes it in, one that is repeated keeps an equal tensor."""
    kept = []
    aux = torch.tensor(2.0, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        joined = MoEAuxLossAutoScaler.apply(torch.randn(3, requires_grad=True), aux)
    assert kept == [torch.float32]
    joined.sum().backward()
    assert aux.grad is not None
    assert aux.grad.dtype == dtype


def test_no_tokens_and_no_unmasked_tokens_give_zero_loss() -> None:
    gate = make_gate(aux_loss_coeff=1.0)
    for tokens in (0, 5):
        x = torch.randn(tokens, gate.dim, dtype=torch.float64)
        weights, indices, aux = run(gate, x, torch.zeros(tokens, dtype=torch.bool))
        assert weights.shape == indices.shape == (tokens, gate.topk)
        assert aux is not None
        assert aux.item() == 0
        weights.sum().backward()
        assert gate.weight.grad is not None
        assert bool(gate.weight.grad.isfinite().all())


def test_replay_repeats_the_choice_and_keeps_gradients_live() -> None:
    gate = make_gate(enable_routing_replay=True, norm_topk_prob=True)
    replay = gate.routing_replay
    assert replay is not None
    x = torch.randn(2, 12, gate.dim, dtype=torch.float64)
    with replay.record() as choices:
        originals = [run(gate, batch) for batch in x]
    assert len(choices) == 2
    with torch.no_grad():
        gate.weight.neg_()
    with replay.replay(choices):
        for batch, original in zip(x, originals, strict=True):
            weights, indices, _ = run(gate, batch)
            assert torch.equal(indices, original[1])
            logits = batch @ gate.weight.T
            assert_close(weights, logits.gather(1, indices).softmax(-1))
            weights.square().sum().backward()
        assert gate.weight.grad is not None
        assert float(gate.weight.grad.abs().max()) > 0
        with pytest.raises(RuntimeError, match="more often"):
            run(gate, x[0])
    assert not torch.equal(run(gate, x[0])[1], originals[0][1])


def test_replay_under_checkpointing() -> None:
    """What backward computes again is neither recorded nor taken for a further forward."""
    gate = make_gate(enable_routing_replay=True)
    replay = gate.routing_replay
    assert replay is not None
    batches = torch.randn(2, 12, gate.dim, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(12, dtype=torch.bool)

    def step() -> list[Tensor]:
        used = []
        for batch in batches:
            weights, indices, _ = checkpoint(gate, batch, mask, None, use_reentrant=False)
            weights.square().sum().backward()
            used.append(indices)
        return used

    with replay.record() as choices:
        step()
    assert len(choices) == 2
    with torch.no_grad():
        gate.weight.neg_()
    with replay.replay(choices):
        used = step()
    assert all(torch.equal(a, b) for a, b in zip(used, choices, strict=True))


@pytest.mark.parametrize("mode", ["nearest", "up", "down"])
@pytest.mark.parametrize("groups", [1, 4])
def test_token_rounding_is_for_training_alone(mode: str, groups: int) -> None:
    """Counts are multiples of the tile; evaluation, load and auxiliary loss are those without."""
    changes = {
        "score_func": "sigmoid_with_bias",
        "norm_topk_prob": True,
        "n_expert_groups": groups,
        "n_limited_groups": 2 if groups > 1 else 1,
        "aux_loss_coeff": 0.01,
        "force_e_score_correction_bias": True,
    }
    gate = make_gate(**changes, token_rounding=mode, token_rounding_tile=4)
    plain = Gate(make_config(**changes))
    plain.load_state_dict(gate.state_dict())
    x, mask = torch.randn(93, gate.dim, dtype=torch.float64), torch.rand(93) < 0.9
    for module in (gate, plain):
        module._track_load_balance = True
    weights, indices, aux = run(gate, x, mask)
    plain_weights, plain_indices, plain_aux = run(plain, x, mask)
    assert_close(aux, plain_aux, rtol=0, atol=0)
    assert torch.equal(gate._last_expert_load, plain._last_expert_load)

    top_k, used = gate.topk, indices >= 0
    assert indices.shape == (93, top_k + gate.rounding_candidates)
    assert not used[~mask].any()
    counts = torch.bincount(indices[used], minlength=gate.n_experts)
    before = torch.bincount(plain_indices[mask].flatten(), minlength=gate.n_experts)
    assert (counts % 4 == 0).all()
    assert ((counts - before).abs() < 4).all()
    assert (counts != before).any()
    assert {"up": counts >= before, "down": counts <= before}.get(mode, counts == counts).all()
    kept = used[:, :top_k]
    assert torch.equal(indices[:, :top_k][kept], plain_indices[kept])
    assert torch.equal(weights[:, :top_k][kept], plain_weights[kept])
    assert (weights[~used] == 0).all()

    for module in (gate.eval(), plain.eval()):
        weights, indices, _ = run(module, x, mask)
        assert torch.equal(weights, plain_weights)
        assert torch.equal(indices, plain_indices)


def test_fake_gate_balances_perfectly() -> None:
    gate = FakeBalancedGate(make_config(), skip_first_n_experts=3)
    x = torch.randn(10, 13, dtype=torch.bfloat16)
    weights, indices, aux = gate(x, torch.ones(10, dtype=torch.bool), None)
    assert aux is None
    assert weights.dtype == torch.bfloat16
    assert_close(weights, torch.full_like(weights, 1 / 3))
    assert torch.equal(indices.flatten(), torch.arange(30) % 5 + 3)
    assert gate.bias_update_factor == 0
    assert not list(gate.parameters())
    gate.update_bias()


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_noisy_fake_gate_repeats_itself_on_equal_input(noise: float) -> None:
    gate = FakeBalancedGate(make_config(), skip_first_n_experts=2, noise=noise)
    mask = torch.ones(500, dtype=torch.bool)
    x = torch.randn(500, 13)
    weights, indices, _ = gate(x, mask, None)
    torch.rand(7)  # the global generator plays no part
    again = gate(x.clone(), mask, None)
    assert torch.equal(weights, again[0])
    assert torch.equal(indices, again[1])
    assert not torch.equal(indices, gate(x + 1, mask, None)[1])
    assert_close(weights.sum(1), torch.ones(500))
    assert bool((weights >= (1 - noise) / 3 - 1e-6).all())
    ordered = indices.sort(dim=1).values
    assert bool((ordered[:, 1:] > ordered[:, :-1]).all())
    assert int(indices.min()) == 2
    assert int(indices.max()) == 7


def test_fake_gate_names_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="skip_first_n_experts must be in"):
        FakeBalancedGate(make_config(), skip_first_n_experts=6)
    with pytest.raises(ValueError, match="noise must be in"):
        FakeBalancedGate(make_config(), noise=1.5)
