"""Clipping over meshes, FSDP's communication between micro-batches, and models that do not fit."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from moe_parallel import fsdp_mixin, training
from moe_parallel.fsdp_mixin import MoEFSDPSyncMixin
from moe_parallel.mesh import MeshError, build_meshes, get_submesh, parallel_axis_names
from moe_parallel.parallelizer import apply_ep, parallelize_model
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny_lm import ModelOptions, TinyLM

# Clipping


def _clip(rank: int, ranks: int, norm_type: float, foreach: bool) -> None:
    world_mesh, moe_mesh = build_meshes(pp=2, ep=2)
    mesh, expert_mesh = get_submesh(world_mesh, "dp_cp"), moe_mesh["ep"]
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(shape, generator=generator) for shape in ((1, 5), (4, 3), (6,), (2, 2))]
    stage = world_mesh["pp"].get_local_rank()

    part = nn.Module()
    # One row over two ranks: the second has an empty shard.
    part.small = nn.Parameter(distribute_tensor(torch.zeros(1, 5), mesh, [Shard(0)]))
    part.experts = nn.Parameter(distribute_tensor(torch.zeros(4, 3), expert_mesh, [Shard(0)]))
    part.plain = nn.Parameter(torch.zeros(6))
    # Alone with its placements: without it there would be no group for them.
    part.missing = nn.Parameter(distribute_tensor(torch.zeros(2, 2), mesh, [Shard(1)]))
    part.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
    part.frozen.grad = torch.ones(3)  # of a time when it was trained
    grads = [value * (stage + 1) for value in values]
    part.small.grad = distribute_tensor(grads[0], mesh, [Shard(0)])
    part.experts.grad = distribute_tensor(grads[1], expert_mesh, [Shard(0)])
    part.plain.grad = grads[2].clone()
    if mesh.get_local_rank() == 0:  # an unused parameter, on some ranks
        part.missing.grad = distribute_tensor(grads[3], mesh, [Shard(1)], src_data_rank=None)
    everything = torch.cat(
        [(v * s).flatten() for s in (1, 2) for v in (*values[:3], values[3][:, :1])]
    )
    expected = torch.linalg.vector_norm(everything, norm_type)

    norm = training.clip_grad_norm(
        0.5,
        [part],
        norm_type=norm_type,
        pp_enabled=True,
        device_mesh=world_mesh,
        pp_axis_name="pp",
        foreach=foreach,
    )
    assert norm == pytest.approx(expected.item(), rel=1e-6)
    scale = 0.5 / expected
    torch.testing.assert_close(part.small.grad.full_tensor(), grads[0] * scale)
    torch.testing.assert_close(part.experts.grad.full_tensor(), grads[1] * scale)
    torch.testing.assert_close(part.plain.grad, grads[2] * scale)

    # A gradient whose sum over the ranks is still owed.
    part = nn.Module()
    part.weight = nn.Parameter(distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)]))
    part.weight.grad = DTensor.from_local(values[1].clone(), mesh, [Partial()])
    norm = training.clip_grad_norm(1e9, [part], norm_type=str(norm_type))
    assert norm == pytest.approx(2 * torch.linalg.vector_norm(values[1], norm_type).item())

    # A stage without parameters takes part.
    part = nn.Linear(2, 1, bias=False).requires_grad_(stage == 0)
    part.weight.grad = torch.ones(1, 2)
    options = {"pp_enabled": True, "device_mesh": world_mesh, "pp_axis_name": "pp"}
    norm = training.clip_grad_norm(1e9, [part], norm_type=norm_type, **options)
    assert norm == pytest.approx(torch.linalg.vector_norm(torch.ones(2), norm_type).item())


@pytest.mark.parametrize(("norm_type", "foreach"), [(2.0, False), (math.inf, True), (1.0, True)])
def test_clip_grad_norm(norm_type: float, foreach: bool) -> None:
    run_ranks(4, _clip, norm_type, foreach)


def test_clip_without_gradients_or_meshes() -> None:
    model = nn.Linear(3, 2)
    assert training.clip_grad_norm(1.0, [model]) == 0.0
    model(torch.ones(1, 3)).sum().backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    before = [p.grad.clone() for p in model.parameters()]
    assert training.clip_grad_norm(100.0, [model, model]) == pytest.approx(expected.item())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    with pytest.raises(MeshError, match="pp_enabled needs device_mesh and pp_axis_name"):
        training.clip_grad_norm(1.0, [model], pp_enabled=True)


@pytest.mark.parametrize("norm_type", [0, -1, "nan"])
def test_norms_that_there_are_not(norm_type: Any) -> None:
    with pytest.raises(ValueError, match="norm_type must be above 0; got"):
        training.clip_grad_norm(1.0, [nn.Linear(3, 2)], norm_type=norm_type)


def _gathered_parameters(rank: int, ranks: int) -> None:
    """Which hide those that have gradients: a forward after backward leaves them so."""
    world_mesh, moe_mesh = build_meshes(ep=ranks)
    options = {"moe_mesh": moe_mesh, "ep_axis_name": "ep", "dp_group_size": ranks}
    model = TinyLM(ModelOptions(optimizations=True))
    parallelize_model(
        model,
        world_mesh,
        moe_mesh,
        **parallel_axis_names(world_mesh, moe_mesh),
        mp_policy=MixedPrecisionPolicy(),
    )
    tokens, mask = torch.randint(0, 23, (2, 8)), torch.zeros(2, 8, dtype=torch.bool)
    norms = []
    for evaluates in (False, True):
        training.prepare_for_final_backward([model])
        model(tokens, mask).square().sum().backward()
        if evaluates:
            with torch.no_grad():
                model(tokens, mask)
        norms.append(training.scale_grads_and_clip_grad_norm(1e9, [model], **options))
        assert norms[-1] == pytest.approx(training.clip_grad_norm(1e9, [model]))
        model.zero_grad()
    assert norms[1] == pytest.approx(norms[0])

    training.prepare_for_grad_accumulation([model])
    model(tokens, mask).sum().backward()
    for call in (training.clip_grad_norm, training.scale_grads_and_clip_grad_norm):
        with pytest.raises(MeshError, match=r"must have been reduced .* Call prepare_for"):
            call(1.0, [model])


def test_gradients_are_found_behind_gathered_parameters() -> None:
    run_ranks(2, _gathered_parameters)


def test_the_norm_is_summed_on_the_device_of_the_mesh() -> None:
    """Which its collectives need, though gradients may be offloaded."""
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    mesh: Any = SimpleNamespace(device_type="meta", size=lambda dim: 1)
    for grad in (weight.grad, None):
        weight.grad = grad
        power = training._group_power(training._Group(mesh, (Shard(0),)), [weight], 2.0)
        assert power.device.type == "meta"


class NamedAxes:
    """A mesh of another framework."""

    def __init__(self, axes: dict[str, int]) -> None:
        self.axes, self.mesh_dim_names = axes, tuple(axes)

    def size(self) -> int:
        return math.prod(self.axes.values())

    def __getitem__(self, name: str) -> NamedAxes:
        return NamedAxes({name: self.axes[name]})


@pytest.mark.parametrize("stages", [{}, {"pp": 3}], ids=str)  # meshes of some frameworks have both
def test_plain_experts_are_known_by_name(stages: dict[str, int]) -> None:
    expected = {"model.layers.0.mlp.experts.down_linear.scale": 12.0}
    expected["model.layers.0.other.experts.down_linear.weight0"] = 12.0
    for layer in ("mlp", "moe"):
        for linear in ("gate_up_linear", "down_linear"):
            for kind in ("weight0", "weight13", "bias3"):
                expected[f"model.layers.0.{layer}.experts.{linear}.{kind}"] = 6.0  # D / S = 8 / 4
    model = nn.Module()
    for name in expected:
        *path, last = name.split(".")
        owner = model
        for word in path:
            if not hasattr(owner, word):
                owner.add_module(word, nn.Module())
            owner = owner.get_submodule(word)
        owner.register_parameter(last, nn.Parameter(torch.zeros(2)))
    mesh = NamedAxes({**stages, "ep_shard": 4, "ep": 2})
    for foreach in (False, True):
        for parameter in model.parameters():
            parameter.grad = torch.full((2,), 12.0)
        norm = training.scale_grads_and_clip_grad_norm(
            None,
            [model, model],  # a parameter that parts share is divided once
            moe_mesh=mesh,
            ep_axis_name="ep",
            dp_group_size=8,
            foreach=foreach,
        )
        assert norm == 0.0
        assert {name: p.grad.tolist() for name, p in model.named_parameters()} == {
            name: [value] * 2 for name, value in expected.items()
        }


def test_experts_are_not_scaled_without_their_axis() -> None:
    model = nn.Linear(1, 1)
    model.bias.grad = torch.ones(1)
    options = {"moe_mesh": NamedAxes({"ep_shard": 4, "ep": 2}), "dp_group_size": 8}
    with pytest.raises(MeshError, match=r"need ep_axis_name.* Pass the axis"):
        training.scale_grads_and_clip_grad_norm(
            None, [model], pp_enabled=True, num_label_tokens=4, **options
        )
    assert model.bias.grad == 1
    options["dp_group_size"] = None
    assert training.scale_grads_and_clip_grad_norm(1.0, [model], **options) == 1.0


@pytest.mark.parametrize(
    ("pipeline", "tokens", "expected"),
    [(True, 24.0, 1.0), (True, None, 6.0), (True, 0, 6.0), (False, 24.0, 6.0)],
)
def test_pipeline_gradients_are_divided_by_tokens_per_rank(
    pipeline: bool, tokens: float | None, expected: float
) -> None:
    model = nn.Linear(1, 1)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 6.0)
    training.scale_grads_and_clip_grad_norm(
        None, [model], pp_enabled=pipeline, num_label_tokens=tokens, dp_group_size=4
    )
    assert model.bias.grad.item() == expected


# Flags and the mixin


def test_step_flags() -> None:
    told: list[Any] = []

    class Part:
        def prepare_for_grad_accumulation(self, pp_enabled: bool = False) -> None:
            told.append(("accumulate", pp_enabled))

        def prepare_for_final_backward(self, pp_enabled: bool = False) -> None:
            told.append(("final", pp_enabled))

    flags = training._StepFlags()  # at the start
    assert (flags.is_optim_step, flags.is_first_microbatch) == (False, False)
    training.set_is_first_microbatch(False)
    training.prepare_for_grad_accumulation([Part(), object()])
    assert training.get_is_optim_step() is False
    assert training.get_is_first_microbatch() is True
    training.set_is_first_microbatch(False)
    training.prepare_for_final_backward([Part()], pp_enabled=True)
    assert training.get_is_optim_step() is True
    assert training.get_is_first_microbatch() is False
    assert told == [("accumulate", False)]
    training.set_is_optim_step(False)


class Unit:
    """Notes what FSDP is told."""

    def __init__(self, **attributes: Any) -> None:
        self.told: list[Any] = []
        self.__dict__.update(attributes)

    def set_is_last_backward(self, value: bool) -> None:
        self.told.append(("last", value))

    def set_reshard_after_backward(self, value: bool) -> None:
        self.told.append(("reshard", value))

    def set_requires_gradient_sync(self, value: bool) -> None:
        self.told.append(("sync", value))


class MixinUnit(Unit, MoEFSDPSyncMixin):
    pass


def make_units() -> tuple[Any, list[Any]]:
    def layers(*blocks: Any) -> Any:
        return SimpleNamespace(children=lambda: iter(blocks))

    experts = [Unit() for _ in range(3)]
    blocks = [
        SimpleNamespace(mlp=object(), moe=None),
        SimpleNamespace(
            moe=SimpleNamespace(experts=experts[1]), mlp=SimpleNamespace(experts=experts[0])
        ),
    ]
    mtp_block = Unit(mlp=SimpleNamespace(experts=experts[2]))
    inner = Unit(embed_tokens=Unit(), layers=layers(*blocks))
    model = MixinUnit(
        model=inner, lm_head=Unit(), visual=Unit(), mtp=SimpleNamespace(layers=layers(mtp_block))
    )
    model.audio_tower = None
    units = [model, inner, inner.embed_tokens, model.lm_head, model.visual]
    return model, [*units, *experts[:2], mtp_block, experts[2]]


def test_units_come_in_order_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsdp_mixin, "FSDPModule", Unit)
    model, units = make_units()
    assert list(fsdp_mixin._iter_fsdp_modules(model)) == units
    assert list(fsdp_mixin._iter_fsdp_modules(SimpleNamespace())) == []
    model.visual = model.lm_head
    assert list(fsdp_mixin._iter_fsdp_modules(model)) == [u for u in units if u is not units[4]]

    text = nn.Module()  # of a multimodal model
    text.embed_tokens, text.layers = units[2], model.model.layers
    multimodal = SimpleNamespace(model=SimpleNamespace(language_model=text))
    assert list(fsdp_mixin._iter_fsdp_modules(multimodal)) == [units[2], *units[5:7]]


@pytest.mark.parametrize(("optimizations", "pp"), [(True, False), (False, False), (True, True)])
def test_mixin_sets_every_unit(
    monkeypatch: pytest.MonkeyPatch, optimizations: bool, pp: bool
) -> None:
    monkeypatch.setattr(fsdp_mixin, "FSDPModule", Unit)
    model, units = make_units()
    model.backend = SimpleNamespace(enable_fsdp_optimizations=optimizations)
    for method, value in (("grad_accumulation", False), ("final_backward", True)):
        getattr(model, f"prepare_for_{method}")(pp_enabled=pp)
        expected = [("last", value), ("reshard", value), ("sync", value)]
        for unit in units:
            assert unit.told == (expected if optimizations and not pp else [])
            unit.told.clear()


def test_branches_of_the_patched_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    monkeypatch.setattr(fsdp_mixin, "FSDPModule", Unit)
    monkeypatch.setattr(fsdp_mixin, "stage_backward", lambda *args: log.append(args) or "grads")
    monkeypatch.setattr(fsdp_mixin, "stage_backward_input", lambda *args: ("grads", args[3]))
    monkeypatch.setattr(fsdp_mixin, "stage_backward_weight", lambda *args: args)
    monkeypatch.setattr(
        fsdp_mixin, "_run_post_backward_for_moe_module", lambda module: log.append("reduced")
    )
    optim_step = [False]
    monkeypatch.setattr(fsdp_mixin, "get_is_optim_step", lambda: optim_step[0])
    backward = fsdp_mixin.patched_backward_maybe_with_nosync
    kwargs = {"stage_output": "y", "output_grads": "dy", "input_values": "x", "param_groups": "g"}

    plain = SimpleNamespace(submod=SimpleNamespace(parameters=lambda: "weights"))
    assert backward(plain, "full", kwargs) == ("grads", None)
    assert log == [("y", "dy", "x")]
    assert backward(plain, "input", kwargs) == ("grads", "weights")
    assert backward(plain, "weight", kwargs) == (("weights", "g"), None)
    with pytest.raises(RuntimeError, match="Unknown backward type: half"):
        backward(plain, "half", kwargs)

    class Mixed(MoEFSDPSyncMixin):
        model = None

    log.clear()
    inner = Unit()
    mixed = Mixed()
    mixed.model = inner
    for last, step, reduced in ((False, True, 0), (True, False, 0), (True, True, 1)):
        optim_step[0] = step
        log.clear()
        backward(SimpleNamespace(submod=mixed), "full", kwargs, last_backward=last)
        assert log.count("reduced") == reduced
        assert inner.told[-3:] == [("last", False), ("reshard", False), ("sync", False)]

    root_state = SimpleNamespace(
        _state_ctx=SimpleNamespace(
            all_states=[
                SimpleNamespace(
                    _fsdp_param_group=SimpleNamespace(post_backward=lambda: log.append("one"))
                ),
                SimpleNamespace(_fsdp_param_group=None),
                SimpleNamespace(
                    _fsdp_param_groups=[
                        SimpleNamespace(post_backward=lambda: log.append("of a list"))
                    ]
                ),
            ]
        ),
        _root_post_backward_final_callback=lambda: log.append("final"),
    )
    monkeypatch.setattr(fsdp_mixin, "fully_shard", SimpleNamespace(state=lambda _: root_state))
    optim_step[0] = False
    unit = MixinUnit()  # an outer root takes FSDP's branch, whatever the flag
    stage = SimpleNamespace(submod=unit)
    log.clear()
    backward(stage, "full", kwargs)
    assert unit.told == [("last", False), ("reshard", False), ("sync", False)]
    assert log == [("y", "dy", "x")]
    log.clear()
    backward(stage, "full", kwargs, last_backward=True)
    assert unit.told[-3:] == [("last", True), ("reshard", True), ("sync", True)]
    assert log == [("y", "dy", "x"), "one", "of a list", "final"]
    log.clear()
    callback = fsdp_mixin._run_post_backward_hooks(unit)
    assert log == ["one", "of a list"]
    callback()
    assert log == ["one", "of a list", "final"]
    stage._reduce_grad_per_microbatch = True
    unit.told.clear()
    backward(stage, "full", kwargs)
    assert unit.told == [("last", True), ("reshard", True), ("sync", True)]


class TwoWeights(nn.Module, MoEFSDPSyncMixin):
    def __init__(self) -> None:
        super().__init__()
        self.backend = SimpleNamespace(enable_fsdp_optimizations=True)
        self.always, self.sometimes = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
        return self.sometimes(self.always(x)) if both else self.always(x)


def _late_gradient(rank: int, ranks: int, uses: tuple[bool, ...]) -> None:
    mesh = get_submesh(build_meshes()[0], "dp_cp")
    torch.manual_seed(0)
    model, expected = TwoWeights(), TwoWeights()
    expected.load_state_dict(model.state_dict())
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    x = torch.randn(3, 4)
    for index, both in enumerate(uses):
        if index == 0:
            training.prepare_for_grad_accumulation([model])
        if index == len(uses) - 1:
            training.prepare_for_final_backward([model])
        model(x, both).float().sum().backward()
        expected(x, both).sum().backward()
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=2e-2, atol=5e-2, msg=name)


@pytest.mark.parametrize("uses", [(False, True), (True, False), (False, True, False)])
def test_a_parameter_used_in_some_micro_batches(uses: tuple[bool, ...]) -> None:
    run_ranks(2, _late_gradient, uses)


# Models and meshes that do not fit


def _refused(rank: int, ranks: int) -> None:
    world_mesh, moe_mesh = build_meshes(ep=2)
    axes = parallel_axis_names(world_mesh, moe_mesh)

    def refuse(message: str, options: ModelOptions, kind: type = MeshError, **changes: Any) -> None:
        model = TinyLM(options)
        with pytest.raises(kind, match=message):
            parallelize_model(model, world_mesh, moe_mesh, **{**axes, **changes})

    refuse(
        r"gate_and_up_projs must be a multiple of the ep_shard size 2; got \[4, 15, 16\]",
        ModelOptions(moe={"moe_latent_size": 15}),
    )
    refuse(
        "lm_head, of the outer model, is tied to embed_tokens",
        ModelOptions(tied=True),
        wrap_outer_model=False,
    )
    refuse(r"Pass ep_shard_axis_names=\('ep_shard',\)", ModelOptions(), ep_shard_axis_names=None)
    refuse(
        "n_routed_experts 5 must be a multiple",
        ModelOptions(moe={"n_routed_experts": 5}),
        AssertionError,
    )
    replicated, _ = build_meshes(dp_replicate=2)
    with pytest.raises(MeshError, match=r"has 2 ranks, but 4 share the parameters.*train apart"):
        parallelize_model(TinyLM(), replicated, None, dp_axis_names=("dp_shard_cp",))
    with pytest.raises(MeshError, match="has 2 ranks, but 4 share"):
        parallelize_model(TinyLM(), replicated, None, dp_axis_names=("dp_replicate",))
    with pytest.raises(MeshError, match="has 2 ranks, but 4 share"):
        parallelize_model(TinyLM(), build_meshes(cp=2)[0], None, dp_axis_names=("dp_shard",))
    model = TinyLM()
    parallelize_model(model, replicated, None, dp_axis_names=None)  # none is asked for
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())

    model = TinyLM()
    if rank == 3:  # the owner of half the experts in the second group
        with torch.no_grad():
            model.moes()[1].experts.down_projs[0, 0, 0] += 1
    if rank == 2:
        with torch.no_grad():
            model.moes()[1].experts.down_projs[2, 0, 0] += 1
    with pytest.raises(MeshError, match="groups of ep_shard must hold equal weights"):
        apply_ep(model, moe_mesh["ep"], moe_mesh=moe_mesh)
    apply_ep(TinyLM(), moe_mesh["ep"], moe_mesh=moe_mesh)


def test_what_does_not_fit_is_refused_on_every_rank() -> None:
    run_ranks(4, _refused)
