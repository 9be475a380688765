"""The experts implementation "moe_kernels" of Hugging Face transformers.

    moe_kernels.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moe_kernels")

It serves every experts module behind transformers' ``use_experts_implementation``. Two paths:

    fused    the module's gate is one of :func:`moe_kernels.expert_activation`: one fused op
    rows     any other gate: our ops sort, multiply and sum the rows, and the module's own
             ``_apply_gate`` (or ``act_fn``) runs on them in between

T tokens, K experts a token, R = T * K rows, H hidden size, I intermediate size, E experts (of this
rank, where transformers shards them), W = 2 * I columns for gated experts, else I.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from moe_kernels.ops import (
    expert_activation,
    fused_experts,
    grouped_gemm,
    permute,
    sort_by_expert,
    unpermute,
)

NAME = "moe_kernels"
MINIMUM_VERSION = (5, 7)  # the first that accepts implementations registered from outside


class _Gate(NamedTuple):
    """A gate as an activation of ours; ``alpha`` and ``limit`` name attributes of the module."""

    activation: str
    interleaved: bool = False
    alpha: str | None = None
    limit: str | None = None


# What act_fn computes, by the name of its class (or its own, if it is a function). The tanh forms
# of GELU differ from each other in the last bits alone.
_ACT_FNS = {
    "torch.nn.functional.silu": "silu",
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.FastGELUActivation": "gelu_tanh",
    "transformers.activations.AccurateGELUActivation": "gelu_tanh",
    "torch.nn.modules.activation.ReLU": "relu",
    "transformers.activations.ReLUSquaredActivation": "relu2",
}
_DEFAULT_GATE_NAME = "transformers.integrations.moe._default_apply_gate"
_WITHOUT_GATE = {act: _Gate(act) for act in ("silu", "gelu", "relu2")}
_DEFAULT_GATE = {"silu": _Gate("swiglu"), "gelu_tanh": _Gate("geglu"), "relu": _Gate("reglu")}

# Gates that a model family defines itself.
_OWN_GATES = {
    "DeepseekV4Experts._apply_gate": _Gate("swiglu", limit="limit"),
    "Glm5NextTextExperts._apply_gate": _Gate("swiglu", limit="swiglu_limit"),
    "GptOssExperts._apply_gate": _Gate("swigluoai", True, "alpha", "limit"),
    "HYV4Experts._apply_gate": _Gate("swiglu", limit="swiglu_limit"),
    "MiniMaxM3VLExperts._apply_gate": _Gate("swigluoai", False, "swiglu_alpha", "swiglu_limit"),
    "OpenAIPrivacyFilterExperts._apply_gate": _Gate("swigluoai", False, "alpha", "limit"),
}


def require_transformers(caller: str) -> None:
    """Raise an ImportError that speaks for ``caller`` unless a usable transformers is installed."""
    needed = ".".join(map(str, MINIMUM_VERSION))
    who = f"{caller} needs transformers >= {needed}"
    remedy = f'Install it: pip install "transformers>={needed}".'
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{who}, and importing it failed ({error}). {remedy}") from error
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < MINIMUM_VERSION:
        raise ImportError(f"{who}; found {transformers.__version__}. {remedy}")


def register() -> None:
    """Make ``experts_implementation="moe_kernels"`` known to transformers. Any number of times.

    Afterwards ``from_pretrained(..., experts_implementation="moe_kernels")`` and
    ``model.set_experts_implementation("moe_kernels")`` run a model's experts with this package.

    Raises:
        ImportError: transformers is missing, or older than 5.7.
    """
    require_transformers("moe_kernels.integrations.transformers.register")
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def _computes(gate: Callable[[Any, Tensor], Tensor], known: _Gate) -> bool:
    """Whether ``gate`` computes the activation that its name stands for, on a grid of values.

    A later transformers may change a gate and keep its name; such a gate must run as it is.
    """
    values = {known.alpha: 1.25, known.limit: 0.75}
    experts = types.SimpleNamespace(
        act_fn=functional.silu, **{name: value for name, value in values.items() if name}
    )
    with _disable_current_modes(), torch.no_grad():
        line = torch.linspace(-2, 2, 9, dtype=torch.float64, device="cpu")
        h = torch.cartesian_prod(line, line)
        if not known.interleaved:
            h = h.T.reshape(1, -1)
        expected = expert_activation(
            h,
            known.activation,
            interleaved=known.interleaved,
            alpha=values[known.alpha] if known.alpha else None,
            limit=values[known.limit],
        )
        try:
            found = gate(experts, h)
        except Exception:  # it reads what it did not read before
            return False
        return found.shape == expected.shape and torch.allclose(found, expected, atol=1e-12)


def activation_name(act_fn: Any) -> str | None:
    """What an activation of transformers computes, if we know it.

    Args:
        act_fn: a module such as those of ``ACT2FN``, its class, or a function.

    Returns:
        "silu", "gelu" (erf), "gelu_tanh", "relu", "relu2", or None.
    """
    named = act_fn if isinstance(act_fn, type | types.FunctionType) else type(act_fn)
    return _ACT_FNS.get(f"{named.__module__}.{named.__qualname__}")


@functools.cache
def _recognise(gate: Callable[..., Tensor] | None, act_fn: Any) -> _Gate | None:
    """What ``gate`` (None: experts without one) computes over ``act_fn``, a function or a class."""
    act = activation_name(act_fn) or ""
    if gate is None:
        return _WITHOUT_GATE.get(act)
    if not isinstance(gate, types.FunctionType):
        return None
    if f"{gate.__module__}.{gate.__qualname__}" == _DEFAULT_GATE_NAME:
        return _DEFAULT_GATE.get(act)
    known = _OWN_GATES.get(gate.__qualname__)
    if known is None or not gate.__module__.startswith("transformers.models."):
        return None
    uses_silu = act == "silu" or act_fn is type(None)
    return known if uses_silu and _computes(gate, known) else None


@torch.compiler.assume_constant_result
def _recognise_once(gate: Callable[..., Tensor] | None, act_fn: Any) -> _Gate | None:
    """For torch.compile, which would trace through the cache."""
    return _recognise(gate, act_fn)


def fused_options(experts: Any) -> dict[str, Any] | None:
    """The options of :func:`moe_kernels.fused_experts` that give this module's gate.

    Args:
        experts: a module whose class went through transformers' ``use_experts_implementation``.

    Returns:
        ``activation`` and, where it has them, ``interleaved``, ``alpha`` and ``limit``; None if the
        gate is the module's own affair, and its experts run row by row around it.
    """
    gate, act_fn = experts._apply_gate, getattr(experts, "act_fn", None)
    gate = gate.__func__ if isinstance(gate, types.MethodType) else gate
    kind = act_fn if isinstance(act_fn, types.FunctionType) else type(act_fn)
    known = _recognise_once(gate if experts.has_gate else None, kind)
    if known is None:
        return None
    options: dict[str, Any] = {"activation": known.activation}
    if known.interleaved:
        options["interleaved"] = True
    if known.alpha is not None:
        options["alpha"] = getattr(experts, known.alpha)
    if known.limit is not None:
        options["limit"] = getattr(experts, known.limit)
    return options


def experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward that transformers calls in place of the module's own.

    Args:
        experts: a module whose class went through transformers' ``use_experts_implementation``.
        hidden_states: [T, H], any float dtype; computed in the dtype of the experts' weights.
        top_k_index: [T, K], ids of this rank's experts; E (its sentinel) and -1 add nothing.
        top_k_weights: [T, K], any float dtype.

    Returns:
        [T, H] in hidden_states.dtype.
    """
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    second = experts.down_proj
    first_bias = second_bias = None
    if experts.has_bias:
        first_bias = experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias
        second_bias = experts.down_proj_bias
    if not experts.is_transposed:  # stored as [E, W, H] and [E, H, I]
        first, second = first.mT, second.mT
    x = hidden_states.to(first.dtype)
    options = fused_options(experts)
    if options is not None:
        y = fused_experts(
            x,
            first,
            second,
            top_k_index,
            top_k_weights,
            gate_up_bias=first_bias,
            down_bias=second_bias,
            **options,
        )
    else:
        order = sort_by_expert(top_k_index, first.shape[0])
        h = grouped_gemm(permute(x, order), first, order.offsets, bias=first_bias)
        a = experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
        rows = grouped_gemm(a.to(h.dtype), second, order.offsets, bias=second_bias)
        y = unpermute(rows, order, top_k_weights)
    return y.to(hidden_states.dtype)
