"""What is used of PyTorch's private interfaces, by itself and as older releases have it."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import _backward
from torch.utils import checkpoint

from moe_parallel import fsdp_mixin, torch_internals
from moe_parallel.fsdp_mixin import patched_backward_maybe_with_nosync
from moe_parallel.mesh import build_meshes
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny_lm import ModelOptions, TinyLM


class Unit(nn.Module):
    """A module that looks like one of FSDP's, with groups of parameters."""

    def __init__(self, *groups: Any) -> None:
        super().__init__()
        self.state = SimpleNamespace(_fsdp_param_groups=list(groups))
        self.resharded = False

    def _get_fsdp_state(self) -> Any:
        return self.state

    def reshard(self) -> None:
        self.resharded = True


class Param:
    """One of FSDP's parameters: ``grad`` is what autograd left, ``accumulated`` what is kept."""

    def __init__(
        self, grad: float | None = None, accumulated: float | None = None, trained: bool = True
    ) -> None:
        self._unsharded_param = torch.zeros(2, dtype=torch.bfloat16, requires_grad=trained)
        if grad is not None:
            self._unsharded_param.grad = torch.full((2,), grad, dtype=torch.bfloat16)
        self.reduce_dtype = torch.float32
        kept = None if accumulated is None else torch.full((2,), accumulated, dtype=torch.float32)
        self.unsharded_accumulated_grad = kept

    def accumulate_unsharded_grad_if_needed(self) -> None:
        if self.unsharded_accumulated_grad is not None and self._unsharded_param.grad is not None:
            self.unsharded_accumulated_grad += self._unsharded_param.grad
            self._unsharded_param.grad = None

    def to_accumulated_grad_if_needed(self) -> None:
        if self._unsharded_param.grad is not None:
            self.unsharded_accumulated_grad = self._unsharded_param.grad.to(self.reduce_dtype)
            self._unsharded_param.grad = None

    def grads(self) -> list[Any]:
        both = (self._unsharded_param.grad, self.unsharded_accumulated_grad)
        return [None if grad is None else (grad[0].item(), grad.dtype) for grad in both]


class NotGathered:
    """A parameter that no forward has gathered yet."""

    unsharded_accumulated_grad: Any = None


NARROW, WIDE = torch.bfloat16, torch.float32


def test_accumulated_gradients_are_completed_in_the_reduce_dtype() -> None:
    params: list[Any] = [Param(1, 2), Param(3), Param(None, 4), Param(), Param(trained=False)]
    torch_internals.complete_accumulated_grads(SimpleNamespace(fsdp_params=[*params, object()]))
    kept = [[None, (value, WIDE)] for value in (3.0, 3.0, 4.0, 0.0)]
    assert [param.grads() for param in params] == [*kept, [None, None]]
    params = [Param(), Param(trained=False)]  # where nobody has any, none are made
    torch_internals.complete_accumulated_grads(SimpleNamespace(fsdp_params=params))
    assert [param.grads() for param in params] == [[None, None]] * 2


@pytest.mark.parametrize("reduces", [False, True])
def test_zeros_for_what_was_not_used_before_it_is_reduced(
    monkeypatch: pytest.MonkeyPatch, reduces: bool
) -> None:
    monkeypatch.setattr(torch_internals, "FSDPModule", Unit)
    params: list[Any] = [Param(1), Param(None, 2), Param(), Param(trained=False), NotGathered()]
    seen: list[Any] = []
    group = SimpleNamespace(fsdp_params=params, reduce_grads=reduces)
    group.post_backward = lambda: seen.extend(param.grads() for param in params[:4])
    unit = Unit()
    unit.inner = Unit(group)
    torch_internals.reduce_unused_parameters(unit)
    group.post_backward()
    zeros = (0.0, NARROW) if reduces else None
    assert seen == [[(1.0, NARROW), None], [None, (2.0, WIDE)], [zeros, None], [None, None]]

    monkeypatch.setattr(Unit, "set_reduce_scatter_unused_params", seen.append, raising=False)
    seen.clear()
    torch_internals.reduce_unused_parameters(Unit(SimpleNamespace()))
    assert len(seen) == 1


def test_discarding_reaches_every_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_internals, "FSDPModule", Unit)
    params: list[Any] = [Param(1, 2), Param(None, 3), NotGathered()]
    unit = Unit()
    unit.inner = Unit(SimpleNamespace(fsdp_params=params))
    torch_internals.discard_accumulated_grads(unit)
    assert [param.grads() for param in params[:2]] == [[None, None]] * 2
    assert unit.resharded
    assert unit.inner.resharded
    torch_internals.discard_accumulated_grads(object())


def test_one_group_that_reshards_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_internals, "FSDPModule", Unit)
    kept, freed = (SimpleNamespace(post_forward_mesh_info=info) for info in (None, "mesh"))
    unit = Unit(kept)
    unit.inner = Unit(kept, kept)
    assert not torch_internals.reshards_after_forward(unit)
    unit.inner = Unit(kept, freed)
    assert torch_internals.reshards_after_forward(unit)


def _never_run(rank: int, ranks: int) -> None:
    unit = nn.Linear(2, 2)
    fully_shard(unit, mesh=build_meshes()[0]["dp_shard"])
    state = fully_shard.state(unit)
    assert not torch_internals.has_run(state)
    fsdp_mixin._run_post_backward_hooks(unit)()
    assert all(parameter.grad is None for parameter in unit.parameters())
    unit(torch.ones(1, 2))
    assert torch_internals.has_run(state)


def test_a_unit_that_has_not_run_has_nothing_to_reduce() -> None:
    run_ranks(1, _never_run)


def test_stages_do_not_greet_their_own_rank() -> None:
    operations = [SimpleNamespace(group_peer=peer) for peer in (0, 1, 2)]
    stage = SimpleNamespace(group_rank=1, _get_init_p2p_neighbors_ops=lambda: operations)
    torch_internals.greet_other_ranks_alone(stage)
    assert stage._get_init_p2p_neighbors_ops() == [operations[0], operations[2]]
    other = SimpleNamespace(group_rank=1)
    torch_internals.greet_other_ranks_alone(other)
    assert vars(other) == {"group_rank": 1}


def test_a_stage_gets_its_own_methods_back() -> None:
    class Stage:
        group_rank, submod = 0, nn.Linear(2, 2)

        def _get_init_p2p_neighbors_ops(self) -> list[Any]:
            return []

    stage = Stage()
    handle = fsdp_mixin.install_pipeline_backward(SimpleNamespace(_stages=[stage]))
    assert vars(stage).keys() == {
        "backward_maybe_with_nosync",
        "_prepare_forward_infra",
        "_get_init_p2p_neighbors_ops",
    }
    handle.remove()
    assert vars(stage) == {}


@pytest.mark.parametrize("name", ["BACKWARD_INPUT", "BACKWARD_WEIGHT", "FULL_BACKWARD"])
def test_which_schedules_split_the_backward(name: str) -> None:
    def action(kind: str, *parts: Any) -> Any:
        return SimpleNamespace(computation_type=SimpleNamespace(name=kind), sub_actions=parts)

    plain = action("FORWARD")
    for last in (action(name), action("OVERLAP_F_B", plain, action(name))):
        schedule = SimpleNamespace(pipeline_order_with_comms={0: [plain, None], 1: [plain, last]})
        assert torch_internals.splits_backward(schedule) == (name != "FULL_BACKWARD")
    assert not torch_internals.splits_backward(SimpleNamespace())


def test_a_split_backward_as_before_2_13(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nodes of custom ops hide their metadata; nothing of it stays behind."""
    model = TinyLM(ModelOptions(moe={"expert_bias": True, "aux_loss_coeff": 0.1}))
    stage = SimpleNamespace(submod=model.moes()[0])
    x = torch.randn(2, 40, 16, requires_grad=True)
    y = stage.submod(x, torch.zeros(2, 40, dtype=torch.bool))
    upstream = torch.randn_like(y)
    expected = torch.autograd.grad(y, [x, *stage.submod.parameters()], upstream)

    make_grads = torch.autograd._make_grads
    monkeypatch.setattr(torch_internals, "_functions_hide_metadata", lambda: True)
    y = stage.submod(x, torch.zeros(2, 40, dtype=torch.bool))
    last = y.grad_fn
    inputs = {"stage_output": [y], "output_grads": [upstream], "input_values": [x]}
    (of_x,), groups = patched_backward_maybe_with_nosync(stage, "input", inputs)
    assert len(groups) > 1
    for group in groups:
        assert [edge.node for edge in group["edges_of_outputs"]] == [last]
    inputs["param_groups"] = groups
    patched_backward_maybe_with_nosync(stage, "weight", inputs)
    actual = [of_x, *(parameter.grad for parameter in stage.submod.parameters())]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)

    with torch_internals.edges_of_functions():
        assert torch.autograd._make_grads is not make_grads
        one, two = torch.ones(2), torch.ones(2)
        assert vars(_backward)["sum"]([one]) is one
        assert vars(_backward)["sum"]([one, two]).tolist() == [2.0, 2.0]
        taken = torch.autograd._make_grads((torch.ones(()).requires_grad_(),), (None,), False)
        assert taken[0].item() == 1.0  # what was not given is made as ever
    assert torch.autograd._make_grads is make_grads
    assert "sum" not in vars(_backward)
    torch_internals.keep_graph(None, [y])
    torch_internals.keep_graph(["other"], [y])  # of what was put in PyTorch's place


def test_a_graph_is_kept_alive_only_where_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for hidden in (False, True):
        monkeypatch.setattr(
            torch_internals, "_functions_hide_metadata", lambda hidden=hidden: hidden
        )
        groups: list[dict[str, Any]] = [{}]
        torch_internals.keep_graph(groups, ["edge"])
        assert groups == [{"edges_of_outputs": ["edge"]} if hidden else {}]


def test_edges_are_those_of_tensors_with_a_gradient() -> None:
    y = torch.ones(1, requires_grad=True) * 2
    for outputs in (y, [y], (torch.ones(1), y, None, 3)):
        assert [edge.node for edge in torch_internals.gradient_edges(outputs)] == [y.grad_fn]


def test_what_recomputation_ran_in_addition_is_tolerated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_RECOMPUTE", "recompute", raising=False)
    forward, backward = (SimpleNamespace(storage={}) for _ in range(2))
    contexts = (forward, backward, object())
    assert torch_internals.tolerate_unrecorded_ops(contexts) is contexts
    forward.storage["op"][0] = "kept"
    assert forward.storage is backward.storage
    assert backward.storage["op"].get(0) == "kept"
    assert backward.storage["op"].get(1) == "recompute"
    assert backward.storage.get("other").get(0) == "recompute"
    for other in (object(), "contexts"):
        assert torch_internals.tolerate_unrecorded_ops(other) is other
    monkeypatch.setattr(checkpoint, "_RECOMPUTE", None)  # before 2.13
    plain = (SimpleNamespace(storage={}),)
    assert type(torch_internals.tolerate_unrecorded_ops(plain)[0].storage) is dict


def test_streams_travel_by_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", SimpleNamespace)
    stream: Any = SimpleNamespace(stream_id=7, device_index=2, device_type=1)
    assert torch_internals.stream_of_key(torch_internals.stream_key(stream)) == stream
    assert torch_internals.stream_of_key(torch_internals.stream_key(None)) is None


def test_backends_and_timeouts_of_groups() -> None:
    gloo = SimpleNamespace(
        name=lambda: "gloo", options=SimpleNamespace(_timeout=timedelta(seconds=3))
    )

    def backend(device: torch.device) -> Any:
        if device.type != "cpu":
            raise RuntimeError("no backend for it")
        return gloo

    group = SimpleNamespace(_get_backend=backend)
    assert torch_internals.backend_of(group, "cpu") == "gloo"
    assert torch_internals.backend_of(group, "cuda") is None
    assert torch_internals.timeout_of(group) == timedelta(seconds=3)
    gloo.options = object()
    assert torch_internals.timeout_of(group) == dist.constants.default_pg_timeout
