"""The FSDP units around a model's blocks: embedding, output projection, towers, roots.

The words are those of :mod:`moe_parallel.parallelizer`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from moe_parallel.mesh import MeshError
from moe_parallel.text_module import _module_weights_are_tied, is_module, mtp_layers

Precision = Literal["given", "float32", "float32_output"]


@dataclass(frozen=True)
class Ends:
    """Where tokens come in and logits go out; None for what the model lacks.

    Attributes:
        embed_tokens: of the backbone.
        lm_head: of the backbone, else of the outer model.
        head_is_outer: the backbone has none.
    """

    embed_tokens: Any
    lm_head: Any
    head_is_outer: bool


@dataclass(frozen=True)
class Unit:
    """A module to shard.

    Attributes:
        module: the module.
        precision: "given" for the policy of the caller, "float32", or "float32_output" for the
            policy of the caller with outputs in float32.
        may_be_unused: some ranks may not use it in a batch.
    """

    module: Any
    precision: Precision = "given"
    may_be_unused: bool = False

    def policy(self, given: Any, make: Callable[..., Any]) -> Any:
        """The unit's mixed precision, of the caller's and the class of such policies."""
        if self.precision == "given":
            return given
        if self.precision == "float32":
            wide = torch.float32
            return make(param_dtype=wide, reduce_dtype=wide, output_dtype=wide)
        fields = ("param_dtype", "reduce_dtype", "cast_forward_inputs")
        kept = {name: getattr(given, name) for name in fields if hasattr(given, name)}
        return make(**kept, output_dtype=torch.float32)


def head_dtype(precision: Any, dtype_from_str: Callable[..., Any]) -> Any:
    """The ``lm_head_precision`` of :func:`apply_fsdp`, which may be a name, as a dtype or None.

    Raises:
        KeyError: it is a name of no dtype.
    """
    if not isinstance(precision, str):
        return precision
    try:
        return dtype_from_str(precision, default=None)
    except KeyError as error:
        raise KeyError(f"apply_fsdp: lm_head_precision: {error.args[0]}") from None


def find_ends(model: Any, backbone: Any) -> Ends:
    """The model's ends."""
    inner_head = getattr(backbone, "lm_head", None)
    outer = inner_head is None
    lm_head = getattr(model, "lm_head", None) if outer else inner_head
    return Ends(getattr(backbone, "embed_tokens", None), lm_head, outer)


def units_around_blocks(
    model: Any,
    backbone: Any,
    *,
    tied: Callable[[Any, Any], bool],
    lm_head_precision: torch.dtype | None,
    wrap_outer_model: bool,
    logger: logging.Logger,
) -> list[Unit]:
    """What is to be sharded after the blocks, in that order. Ties again what shall be tied.

    Args:
        model, backbone: the outer model, and its backbone.
        tied: whether two modules have one weight.
        lm_head_precision, wrap_outer_model: see :func:`apply_fsdp`.
        logger: of what is not as asked.

    Raises:
        MeshError: tied ends on both sides of the outer model's root, which is not to be.
    """
    retie_embeddings(model)
    ends = find_ends(model, backbone)
    ends_are_tied = tied(ends.embed_tokens, ends.lm_head)
    across = _check_boundary(model, backbone, ends, ends_are_tied, wrap_outer_model)
    units = []
    head_is_fp32 = False
    if ends_are_tied:
        if lm_head_precision is not None:
            logger.warning(
                "apply_fsdp: lm_head_precision %s is not applied: lm_head is tied to embed_tokens",
                lm_head_precision,
            )
    else:
        if ends.embed_tokens is not None:
            units.append(Unit(ends.embed_tokens))
        if ends.lm_head is not None:
            head_is_fp32 = lm_head_precision == torch.float32
            units.append(Unit(ends.lm_head, "float32" if head_is_fp32 else "given"))
    units += _towers(model)

    # A root casts its outputs: that of a float32 head must not round the logits again.
    above_head: Precision = "float32_output" if head_is_fp32 else "given"
    if across:
        logger.info("apply_fsdp: the outer root owns the weight of embed_tokens and lm_head")
    else:
        owns_head = not ends.head_is_outer or backbone is model
        units.append(Unit(backbone, above_head if owns_head else "given"))
    if wrap_outer_model and backbone is not model:
        units.append(Unit(model, above_head))
    elif backbone is not model:
        parts = [backbone, mtp_layers(model), *(unit.module for unit in units)]
        if rest := _trainable_outside(model, parts):
            logger.warning(
                "apply_fsdp: with wrap_outer_model=False no unit owns %s: nothing reduces their "
                "gradients over the ranks. Use wrap_outer_model=True, or reduce them.",
                ", ".join(rest),
            )
    return units


def _trainable_outside(model: Any, parts: list[Any]) -> list[str]:
    if not is_module(model):
        return []
    modules = (part for part in parts if is_module(part))
    inside = {id(parameter) for module in modules for parameter in module.parameters()}
    return [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in inside]


def check_ends(model: Any, backbone: Any, wrap_outer_model: bool) -> None:
    """Refuse what :func:`units_around_blocks` would, before anything is changed.

    Raises:
        MeshError: see there.
    """
    ends = find_ends(model, backbone)
    tied = _module_weights_are_tied(ends.embed_tokens, ends.lm_head)
    output, source = _ends_to_tie(model)
    tied = tied or (source is ends.embed_tokens is not None and output is ends.lm_head)
    _check_boundary(model, backbone, ends, tied, wrap_outer_model)


def _check_boundary(
    model: Any, backbone: Any, ends: Ends, tied: bool, wrap_outer_model: bool
) -> bool:
    """Whether one weight is on both sides of the outer model's root."""
    across = tied and ends.head_is_outer and backbone is not model
    if across and not wrap_outer_model:
        raise MeshError(
            "apply_fsdp: lm_head, of the outer model, is tied to embed_tokens, of the inner one. "
            "With wrap_outer_model=False they would be sharded apart and the embedding's gradient "
            "would lose the head's part. Use wrap_outer_model=True, or untie them."
        )
    return across


def _towers(model: Any) -> Iterator[Unit]:
    for name, label in (("audio_tower", "audio"), ("visual", "visual")):
        tower = getattr(model, name, None)
        if tower is not None and any(p.requires_grad for p in tower.parameters()):
            yield Unit(tower, may_be_unused=True)
        elif tower is not None:
            logging.info(f"Skipping FSDP wrap for frozen {label} tower")


def retie_embeddings(model: Any) -> None:
    """Share the embedding with the output projection again, if the configuration says so.

    Moving a model to another dtype or device may have copied them.
    """
    output, source = _ends_to_tie(model)
    if output is not None:
        output.weight = source.weight


def _ends_to_tie(model: Any) -> tuple[Any, Any]:
    """``(output projection, embedding)`` that the configuration wants tied, or two None."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return None, None
    getters = [getattr(model, f"get_{end}_embeddings", None) for end in ("output", "input")]
    if not all(map(callable, getters)):
        return None, None
    output, source = (getter() for getter in getters)  # type: ignore[misc]
    if getattr(output, "weight", None) is None or getattr(source, "weight", None) is None:
        return None, None
    return output, source
