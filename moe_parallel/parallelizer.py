"""Applying parallelism to a model, in place.

Words used here: the *outer model* is the object passed in; the *inner model* is its ``model``, if
it has one, else itself; the *backbone* is the inner model's text module; a *block* is a child of
the backbone's ``layers`` or of the outer model's ``mtp.layers``.

What a function uses of torch and of this package is looked up among this module's globals when it
runs, so that a test or a framework can replace it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from moe_parallel.layers import MoE
from moe_parallel.text_module import get_text_module

logger = logging.getLogger(__name__)


def _inner_model(model: Any) -> Any:
    inner = getattr(model, "model", None)
    return model if inner is None else inner


def _iter_transformer_and_mtp_blocks(model: Any) -> Iterator[tuple[Any, str, Any]]:
    """``(container, name, block)`` of every block, so that it can be replaced in its container."""
    backbone = get_text_module(_inner_model(model))
    for owner in (backbone, getattr(model, "mtp", None)):
        container = getattr(owner, "layers", None)
        if container is not None:
            for name, block in container.named_children():
                yield container, name, block


def _iter_moe_blocks(model_wrapper: Any, backbone: Any) -> Iterator[Any]:
    """The blocks of ``backbone``, then those of the wrapper's multi-token prediction."""
    for owner in (backbone, getattr(model_wrapper, "mtp", None)):
        container = getattr(owner, "layers", None)
        if container is not None:
            yield from container.children()


def _get_moe_module(block: Any) -> Any | None:
    """The block's MoE layer: ``moe``, then ``mlp``, whichever is one; None for a dense block."""
    for name in ("moe", "mlp"):
        module = getattr(block, name, None)
        if isinstance(module, MoE):
            return module
    return None


def _get_model_moe_config(model: Any) -> Any:
    """The ``moe_config`` of the inner model, its text module or the outer model.

    Raises:
        AttributeError: none of them has one.
    """
    inner = _inner_model(model)
    for owner in (inner, get_text_module(inner), model):
        config = getattr(owner, "moe_config", None)
        if config is not None:
            return config
    raise AttributeError(
        f"{type(model).__name__} has no moe_config: neither the model, nor its .model, nor the "
        "text module there. Set it to the MoEConfig of its MoE layers."
    )


class ExpertParallel(ParallelStyle):
    """Shards an experts module over a 1-D mesh: each rank keeps E / size consecutive experts.

    Every parameter of the module, whose dimension 0 is the expert, becomes a DTensor ``Shard(0)``
    with the data of the mesh's first rank: groups that are to hold the same experts must hold equal
    weights before. A module with ``init_token_dispatcher`` is then told the mesh.
    """

    def _partition_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        assert device_mesh.ndim == 1, f"ExpertParallel needs a 1-D mesh; got {device_mesh}"
        for key, parameter in list(module.named_parameters(recurse=False)):
            sharded = nn.Parameter(
                distribute_tensor(parameter, device_mesh, [Shard(0)]),
                requires_grad=parameter.requires_grad,
            )
            module.register_parameter(key, sharded)
        init_token_dispatcher = getattr(module, "init_token_dispatcher", None)
        if init_token_dispatcher is not None:
            init_token_dispatcher(ep_mesh=device_mesh)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, self._partition_fn)


def apply_ep(model: nn.Module, ep_mesh: DeviceMesh, moe_mesh: DeviceMesh | None = None) -> None:
    """Shard the experts of every MoE block over ``ep_mesh``, in place.

    Routers, shared experts and dense blocks stay as they are. Gradients of a rank's experts are
    sums over the tokens of all ranks of ``ep_mesh``.

    Args:
        model: the outer model.
        ep_mesh: 1-D, more than one rank.
        moe_mesh: the mesh that ``ep_mesh`` is part of, for transports that follow the topology of
            nodes; "process_group" does not.

    Raises:
        AssertionError: ``ep_mesh`` has one rank.
        ValueError: an MoE's experts cannot be spread evenly.
        RuntimeError: the experts are sharded already.
    """
    size = ep_mesh.size()
    assert size > 1, f"apply_ep: ep_mesh must have more than one rank; got {size}"
    blocks = [
        (name, moe)
        for _, name, block in _iter_transformer_and_mtp_blocks(model)
        if (moe := _get_moe_module(block)) is not None
    ]
    for name, moe in blocks:
        experts = getattr(moe, "n_routed_experts", None)
        if isinstance(experts, int) and experts % size:
            raise ValueError(
                f"apply_ep: n_routed_experts must be a multiple of the EP size {size}; "
                f"block {name} has {experts}"
            )
    for _, moe in blocks:
        parallelize_module(
            module=moe.experts, device_mesh=ep_mesh, parallelize_plan=ExpertParallel()
        )
