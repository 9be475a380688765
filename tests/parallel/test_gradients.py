"""Gradients in narrow dtypes, on several devices, and of what a pipeline uses now and then."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from moe_parallel import fsdp_mixin, training
from moe_parallel.fsdp_mixin import MoEFSDPSyncMixin
from moe_parallel.mesh import build_meshes, get_submesh
from tests.parallel.ranks import run_ranks
from tests.parallel.test_training import TwoWeights


def test_the_norm_of_bfloat16_gradients_is_summed_in_float32() -> None:
    """In bfloat16 a further part below 1/256 of the sum would count as nothing."""
    model = nn.ParameterList(torch.zeros(n, dtype=torch.bfloat16) for n in (1000, *[3] * 200))
    for parameter in model:
        parameter.grad = torch.ones_like(parameter)
    assert training.clip_grad_norm(1e9, [model]) == pytest.approx(math.sqrt(1600), rel=1e-6)


@pytest.mark.parametrize("foreach", [False, True])
def test_gradients_on_several_devices_are_all_scaled(foreach: bool) -> None:
    grads = [torch.ones(2, device=device) for device in ("meta", "cpu", "meta")]
    training._multiply(grads, torch.tensor(0.5), foreach)
    assert grads[1].tolist() == [0.5, 0.5]


class Around(nn.Module, MoEFSDPSyncMixin):
    """A stage that is no unit itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.model = inner

    def forward(self, *args: Any) -> torch.Tensor:
        return self.model(*args)


def _late_gradient_of_a_stage(rank: int, ranks: int, uses: tuple[tuple[bool, ...], ...]) -> None:
    """With parameters that are used or not, by micro-batch and rank; one is frozen."""
    torch.manual_seed(0)
    whole = TwoWeights()
    whole.always.bias.requires_grad_(False)
    for wrap in (Around, lambda inner: inner):
        inner, expected = copy.deepcopy(whole), copy.deepcopy(whole)
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        fully_shard(inner, mesh=get_submesh(build_meshes()[0], "dp_cp"), mp_policy=policy)
        stage = SimpleNamespace(submod=wrap(inner))
        x = torch.randn(3, 4)
        training.prepare_for_final_backward([stage.submod], pp_enabled=True)
        for index, both in enumerate(uses):
            y = stage.submod(x, both[rank]).float().sum()
            inputs = {"stage_output": y, "output_grads": None, "input_values": []}
            fsdp_mixin.patched_backward_maybe_with_nosync(
                stage, "full", inputs, last_backward=index == len(uses) - 1
            )
            for used in both:
                (expected(x, used).sum() / ranks).backward()
        for (name, p), q in zip(inner.named_parameters(), expected.parameters(), strict=True):
            if not q.requires_grad:
                assert p.grad is None, name
                continue
            torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=2e-2, atol=5e-2, msg=name)


NONE, BOTH, FIRST = (False, False), (True, True), (True, False)


@pytest.mark.parametrize("uses", [(NONE, BOTH), (BOTH, NONE), (NONE, FIRST)], ids=str)
def test_a_parameter_that_a_stage_uses_in_some_micro_batches(uses: Any) -> None:
    run_ranks(2, _late_gradient_of_a_stage, uses)
