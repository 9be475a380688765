"""What a rank holds of optimizers, by the names of the parameters."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moe_parallel.checkpoint.agreement import CheckpointError, all_gathered

OPTIMIZER = "optimizer."
Sizes = Mapping[str, tuple[torch.Size, torch.dtype]]
# How a step is computed, not what: the loading run decides.
_IMPLEMENTATION = ("params", "param_names", "foreach", "fused", "capturable", "differentiable")


@dataclass
class OptimizerState:
    """The state of optimizers, on this rank or, without the tensors, in a checkpoint.

    Attributes:
        tensors: those shaped, and sharded, as their parameter: ``<parameter>.<name>``.
        scalars: the rest, by parameter and name.
        groups: options, and the parameters that have them.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: list[tuple[dict[str, Any], list[str]]] = field(default_factory=list)

    def options(self) -> dict[str, dict[str, Any]]:
        """The options by parameter."""
        return {name: options for options, names in self.groups for name in names}


@dataclass(frozen=True)
class Group:
    """A group of an optimizer, with the names of its parameters."""

    optimizer: Optimizer
    values: dict[str, Any]
    names: list[str]

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield from zip(self.names, self.values["params"], strict=True)


def groups_of(optimizers: Sequence[Optimizer], names: Mapping[int, str]) -> list[Group]:
    """The groups of all optimizers.

    Raises:
        CheckpointError: a parameter that is not of the model, or that several have.
    """
    groups = []
    seen: set[str] = set()
    for optimizer in optimizers:
        for values in optimizer.param_groups:
            members = [names.get(id(parameter), "") for parameter in values["params"]]
            if "" in members:
                shape = list(values["params"][members.index("")].shape)
                raise CheckpointError(
                    f"an optimizer must have parameters of the model alone; one of shape {shape} "
                    "is not. Make the optimizer after the model is sharded."
                )
            if seen & set(members):
                raise CheckpointError(
                    f"a parameter must have one optimizer; {min(seen & set(members))} has two"
                )
            seen |= set(members)
            groups.append(Group(optimizer, values, members))
    return groups


def optimizer_state(groups: Sequence[Group]) -> OptimizerState:
    """The state of all parameters in ``groups``.

    Raises:
        CheckpointError: state that is neither a number nor shaped as its parameter.
    """
    state = OptimizerState()
    for group in groups:
        options = {k: _plain(v) for k, v in group.values.items() if k not in _IMPLEMENTATION}
        state.groups.append((options, group.names))
        for name, parameter in group.parameters():
            for key, value in group.optimizer.state.get(parameter, {}).items():
                if _follows(key, value, parameter):
                    state.tensors[f"{name}.{key}"] = value
                elif isinstance(value, Tensor) and (
                    value.numel() != 1 or isinstance(value, DTensor)
                ):
                    raise CheckpointError(
                        "state of an optimizer must be numbers, or tensors shaped and sharded as "
                        f"their parameter; {key} of {name} {_layout(parameter)} is {_layout(value)}"
                    )
                else:
                    value = value.detach().cpu().clone() if isinstance(value, Tensor) else value
                    state.scalars.setdefault(name, {})[key] = value
    return state


def _follows(key: str, value: Any, parameter: Tensor) -> bool:
    """Whether state is shaped and sharded as its parameter. A step never is, as in PyTorch's own
    ``load_state_dict``: that of a parameter without dimensions looks as if."""
    return (
        isinstance(value, Tensor)
        and key != "step"
        and value.shape == parameter.shape
        and isinstance(value, DTensor) == isinstance(parameter, DTensor)
    )


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _layout(tensor: Tensor) -> str:
    kind = f"sharded {tensor.placements}" if isinstance(tensor, DTensor) else "not sharded"
    return f"{list(tensor.shape)} ({kind})"


def merge(states: Sequence[OptimizerState]) -> OptimizerState:
    """The scalars and groups of all ranks together.

    Raises:
        CheckpointError: ranks disagree.
    """
    merged = OptimizerState()
    options: dict[str, dict[str, Any]] = {}
    for state in states:
        for name, values in state.options().items():
            if options.setdefault(name, values) != values:
                raise CheckpointError(
                    f"all ranks must optimize {name} with equal options; got {options[name]} and "
                    f"{values}"
                )
        for name, scalars in state.scalars.items():
            if merged.scalars.setdefault(name, scalars) != scalars:
                raise CheckpointError(
                    f"all ranks must have taken the same steps with {name}; got "
                    f"{merged.scalars[name]} and {scalars}"
                )
    for name, values in options.items():
        for known, names in merged.groups:
            if known == values:
                names.append(name)
                break
        else:
            merged.groups.append((values, [name]))
    return merged


def check_optimized_alike(parameters: Iterable[str], optimized: Container[str]) -> None:
    """What one rank optimizes, every rank that has it must. Collective.

    Args:
        parameters: names of those of this rank's model.
        optimized: names of those that its optimizers have.

    Raises:
        CheckpointError: a rank was given no optimizer of some.
    """
    without = {name: name in optimized for name in parameters}
    everyone = all_gathered(without)
    owners: dict[str, int] = {}
    for rank, found in enumerate(everyone):
        for name, has_one in found.items():
            if has_one:
                owners.setdefault(name, rank)
    for rank, found in enumerate(everyone):
        for name, has_one in found.items():
            if not has_one and name in owners:
                raise CheckpointError(
                    f"all ranks must be given the optimizers of their parameters; rank "
                    f"{owners[name]} has one of {name}, rank {rank} has none"
                )


def by_parameter(sizes: Sizes) -> dict[str, Sizes]:
    """The tensors of each parameter's state in a checkpoint: ``{parameter: {name: size}}``."""
    found: dict[str, dict[str, Any]] = {}
    for key, size in sizes.items():
        if key.startswith(OPTIMIZER):
            parameter, _, name = key.removeprefix(OPTIMIZER).rpartition(".")
            found.setdefault(parameter, {})[name] = size
    return dict(found)


def check_fits(groups: Sequence[Group], saved: OptimizerState, sizes: Mapping[str, Sizes]) -> None:
    """Raise a CheckpointError unless every parameter of ``groups`` has its state in a checkpoint.

    Groups may be cut otherwise than when saved, but in one of them the saved options must agree.
    """
    options = saved.options()
    for group in groups:
        unknown = [name for name in group.names if name not in options]
        if unknown:
            raise CheckpointError(
                f"the checkpoint must have optimizer state of all parameters; it has none of "
                f"{len(unknown)}, such as {unknown[0]}"
            )
        for name in group.names[1:]:
            if options[name] != options[group.names[0]]:
                raise CheckpointError(
                    "parameters of a group must have equal options in the checkpoint; "
                    f"{group.names[0]} has {options[group.names[0]]}, {name} has {options[name]}"
                )
        for name, parameter in group.parameters():
            for key, (size, _) in sizes.get(name, {}).items():
                if size != parameter.shape:
                    raise CheckpointError(
                        f"{key} of {name} must be {list(parameter.shape)}; the checkpoint has "
                        f"{list(size)}"
                    )


@torch.no_grad()
def tensors_to_fill(
    groups: Sequence[Group], sizes: Mapping[str, Sizes], saved_dtypes: Mapping[str, torch.dtype]
) -> dict[str, Tensor]:
    """Tensors in the optimizers to read a checkpoint's into, made where there are none yet: in the
    dtype of the parameter if that was so when saved, in ``saved_dtypes``, else in theirs."""
    tensors = {}
    for group in groups:
        for name, parameter in group.parameters():
            state = group.optimizer.state[parameter]
            for key, (_, dtype) in sizes.get(name, {}).items():
                if not _follows(key, state.get(key), parameter):
                    dtype = parameter.dtype if dtype == saved_dtypes[name] else dtype
                    state[key] = torch.zeros_like(parameter, dtype=dtype)
                tensors[f"{OPTIMIZER}{name}.{key}"] = state[key]
    return tensors


def restore(groups: Sequence[Group], saved: OptimizerState, sizes: Mapping[str, Sizes]) -> None:
    """Give the optimizers what a checkpoint has beside tensors, and nothing that it has not."""
    options = saved.options()
    for group in groups:
        for name, value in options[group.names[0]].items() if group.names else ():
            current = group.values.get(name)
            if isinstance(current, Tensor):
                current.fill_(value)
            else:
                group.values[name] = value
        # where PyTorch's own load_state_dict puts them
        on_device = group.values.get("fused") or group.values.get("capturable")
        for name, parameter in group.parameters():
            state = group.optimizer.state[parameter]
            scalars = saved.scalars.get(name, {})
            for key in set(state) - set(scalars) - set(sizes.get(name, {})):
                del state[key]
            for key, value in scalars.items():
                if isinstance(value, Tensor):
                    value = value.clone().to(parameter.device if on_device else "cpu")
                state[key] = value
            if not state:
                del group.optimizer.state[parameter]
