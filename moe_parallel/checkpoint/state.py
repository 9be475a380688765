"""What a rank holds of a model, by names that every sharding shares."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial

from moe_parallel.checkpoint.agreement import (
    CheckpointError,
    from_coordinator,
    gathered,
    on_coordinator,
)
from moe_parallel.checkpoint.pieces import boxes, piece_bytes, slices_of
from moe_parallel.module_names import plain_name
from moe_parallel.tensors import local_tensor
from moe_parallel.torch_internals import local_region

MODEL, LOAD = "model.", "load."
MASTER = "e_score_correction_bias_master"


@dataclass
class ModelState:
    """This rank's part of a model.

    Attributes:
        tensors: parameters and persistent buffers by their name in the whole model; the model's
            own, so that writing into them loads it.
        gates: routers, by name, that steer their load.
        names: of the parameters, by identity.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    gates: dict[str, Any] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)


def model_state(parts: Sequence[nn.Module]) -> ModelState:
    """The state of the model, or of the stages of it, that this rank has.

    Raises:
        CheckpointError: two stages use one name; or a module has state other than tensors.
    """
    state = ModelState()
    for part in parts:
        for unit in part.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()
        found: dict[str, Tensor] = {}
        for name, parameter in part.named_parameters():
            found[plain_name(name)] = parameter
            state.names[id(parameter)] = plain_name(name)
        for prefix, module in part.named_modules():
            _check_extra_state(prefix, module)
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    found[plain_name(f"{prefix}.{name}" if prefix else name)] = buffer
            if getattr(module, "bias_update_factor", 0) and hasattr(module, MASTER):
                state.gates[plain_name(prefix)] = module
        both = found.keys() & state.tensors.keys()
        if both:
            raise CheckpointError(
                f"stages of a model must name their parameters as the whole model does; two of "
                f"one rank have {min(both)}"
            )
        state.tensors |= found
    return state


def _check_extra_state(name: str, module: nn.Module) -> None:
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        raise CheckpointError(
            f"state of modules must be parameters and buffers; {name} ({type(module).__name__}) "
            "has an extra state"
        )


def gate_tensors(gates: Mapping[str, Any]) -> dict[str, Tensor]:
    """What routers keep beside their buffers: the bias in full precision, and the load since its
    last update, over all ranks. Collective."""
    tensors = {}
    for name, gate in gates.items():
        if getattr(gate, MASTER) is not None:
            tensors[f"{MODEL}{name}.{MASTER}"] = getattr(gate, MASTER)
        load = gate._cumulative_expert_load
        buffer = gate.e_score_correction_bias
        if load is None:
            load = torch.zeros_like(local_tensor(buffer), dtype=torch.int64)
        if isinstance(buffer, DTensor):
            mesh = buffer.device_mesh
            load = DTensor.from_local(load, mesh, [Partial()] * mesh.ndim).full_tensor()
        tensors[f"{LOAD}{name}"] = load
    return tensors


def empty_gate_tensors(gates: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors to read what :func:`gate_tensors` gave into, as far as a checkpoint has it."""
    tensors = {}
    for name, gate in gates.items():
        buffer = local_tensor(gate.e_score_correction_bias)
        for key, dtype in ((f"{MODEL}{name}.{MASTER}", torch.float32), (LOAD + name, torch.int64)):
            if key in sizes:
                tensors[key] = torch.zeros_like(buffer, dtype=dtype)
    return tensors


def set_gates(gates: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Give routers what :func:`gate_tensors` gave. The load of all ranks goes to one of them: the
    update of the bias sums over the ranks."""
    for name, gate in gates.items():
        setattr(gate, MASTER, tensors.get(f"{MODEL}{name}.{MASTER}"))
        load = tensors.get(LOAD + name)
        if load is None or not load.any():
            gate._cumulative_expert_load = None
            continue
        buffer = gate.e_score_correction_bias
        if isinstance(buffer, DTensor) and any(buffer.device_mesh.get_coordinate() or ()):
            load = torch.zeros_like(load)
        gate._cumulative_expert_load = load


def check_names(tensors: Mapping[str, Tensor]) -> None:
    """Ranks that have a name in common must have the same, or parts of the same, under it.

    Stages that count their layers from zero would overwrite each other. Collective.

    Raises:
        CheckpointError: they do not.
    """
    holders: dict[str, list[int]] = {}
    shapes: dict[str, dict[Any, int]] = {}
    meshes: dict[str, set[Any]] = {}
    own = {name: (tuple(t.shape), _mesh_ranks(t)) for name, t in tensors.items()}
    for number, described in enumerate(gathered(own)):
        for name, (shape, mesh) in described.items():
            holders.setdefault(name, []).append(number)
            shapes.setdefault(name, {}).setdefault(shape, number)
            meshes.setdefault(name, set()).add(mesh)
    other = {name: found for name, found in shapes.items() if len(found) > 1}
    # plain tensors of several ranks, or shards over several meshes, have to be copies
    unsure = [
        name
        for name, found in meshes.items()
        if len(found) > 1 or (None in found and len(holders[name]) > 1)
    ]
    unsure = [] if other else from_coordinator(unsure)
    contents: dict[tuple[str, Any], dict[Any, int]] = {}
    digests = {name: _digest(tensors[name]) for name in unsure if name in tensors}
    for number, described in enumerate(gathered(digests)):
        for name, (region, digest) in described.items():
            contents.setdefault((name, region), {}).setdefault(digest, number)

    def judge() -> None:
        for name, found in (*other.items(), *((n, f) for (n, _), f in contents.items())):
            if len(found) > 1:
                first, second, *_ = found.values()
                raise CheckpointError(
                    f"ranks {first} and {second} must have the same under the name {name}, and do "
                    "not. Stages of a pipeline must name their layers as the whole model does; "
                    "replicas must hold equal values."
                )

    on_coordinator(judge)


def _mesh_ranks(tensor: Tensor) -> tuple[int, ...] | None:
    return (
        tuple(tensor.device_mesh.mesh.flatten().tolist()) if isinstance(tensor, DTensor) else None
    )


def _digest(tensor: Tensor) -> tuple[Any, Any]:
    """The region that this rank has of a tensor, and what no other contents share."""
    local = local_tensor(tensor).detach()
    found = hashlib.sha256(str(local.dtype).encode())
    elements = piece_bytes([local]) // local.itemsize
    for start, shape in boxes((0,) * local.dim(), local.shape, elements):
        piece = local[slices_of(start, shape)].resolve_conj().resolve_neg()
        found.update(piece.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return local_region(tensor), found.hexdigest()
