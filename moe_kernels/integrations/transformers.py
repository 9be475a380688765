"""The experts implementation "moe_kernels" of Hugging Face transformers.

    moe_kernels.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moe_kernels")

:func:`quantize_experts_of` instead replaces the experts of a loaded model by ones of 8 or 4 bits.

The implementation serves every experts module behind transformers' ``use_experts_implementation``.
Two paths:

    fused    the module's gate is one of :func:`moe_kernels.expert_activation`: one fused op
    rows     any other gate, or experts that normalise what they give: our ops sort, multiply and
             sum the rows, and the module's own ``_apply_gate`` (or ``act_fn``) and
             ``post_expert_norm`` run on them in between

T tokens, K experts a token, R = T * K rows, H hidden size, I intermediate size, E experts (of this
rank, where transformers shards them), W = 2 * I columns for gated experts, else I.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from moe_kernels.ops import (
    QuantizedExperts,
    expert_activation,
    fused_experts,
    fused_experts_quantized,
    grouped_gemm,
    permute,
    quantize_experts,
    sort_by_expert,
    unpermute,
)
from moe_kernels.ops._checks import check_choice
from moe_kernels.reference.quantized_experts import FORMATS

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

# What use_experts_implementation may be told about a class, and is heeded here.
_HEEDED = {"is_concatenated", "is_transposed", "has_bias", "has_gate", "has_post_expert_norm"}

# Gates that a model family defines itself.
_OWN_GATES = {
    "BeamExperts._apply_gate": _Gate("swiglu"),
    "DeepseekV4Experts._apply_gate": _Gate("swiglu", limit="limit"),
    "Glm5NextTextExperts._apply_gate": _Gate("swiglu", limit="swiglu_limit"),
    "GptOssExperts._apply_gate": _Gate("swigluoai", True, "alpha", "limit"),
    "HYV4Experts._apply_gate": _Gate("swiglu", limit="swiglu_limit"),
    "HYV4VLExperts._apply_gate": _Gate("swiglu", limit="swiglu_limit"),
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
    from transformers.integrations import finegrained_fp8
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    with_scales = getattr(finegrained_fp8, "ALL_FP8_EXPERTS_FUNCTIONS", None)
    if with_scales is not None:
        with_scales.register(NAME, _refuse_scales)


def _refuse_scales(experts: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of experts that transformers keeps in 8 or 4 bits, with scales beside them."""
    raise ValueError(
        f"experts_implementation={NAME!r}: the experts' weights must have 16 bits or more; "
        f"{type(experts).__name__} keeps {experts.down_proj.dtype} with scales. Load the model "
        "with quantization_config=FineGrainedFP8Config(dequantize=True), or use another "
        "experts_implementation."
    )


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
            limit=values[known.limit] if known.limit else None,
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
def _later_traits() -> tuple[tuple[str, bool], ...]:
    """What a later transformers may say of a class of experts besides, with its default."""
    from transformers.integrations.moe import use_experts_implementation

    parameters = inspect.signature(use_experts_implementation).parameters.values()
    return tuple(
        (value.name, value.default)
        for value in parameters
        if isinstance(value.default, bool) and value.name not in _HEEDED
    )


@torch.compiler.assume_constant_result
def _later_traits_once() -> tuple[tuple[str, bool], ...]:
    """For torch.compile, as below."""
    return _later_traits()


def _refuse_later_traits(experts: Any) -> None:
    """Experts that differ in a way that is not heeded would compute something else."""
    for name, default in _later_traits_once():
        value = getattr(experts, name, default)
        if value != default:
            raise ValueError(
                f"experts_implementation={NAME!r}: {type(experts).__name__} has {name}={value}, "
                "which this moe_kernels does not know. Use another experts_implementation, or a "
                "newer moe_kernels."
            )


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

    Raises:
        TypeError: ``experts`` is no such module.
        ValueError: its class has a trait that only a later transformers knows.
    """
    if not hasattr(experts, "_apply_gate"):
        raise TypeError(
            "fused_options: experts must be a module of transformers' experts interface; got "
            f"{type(experts).__name__}"
        )
    _refuse_later_traits(experts)
    if getattr(experts, "has_post_expert_norm", False):
        return None
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


def _weights(experts: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """[E, H, W], [E, I, H] and the biases [E, W] and [E, H] of a module of transformers."""
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    second = experts.down_proj
    first_bias = second_bias = None
    if experts.has_bias:
        first_bias = experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias
        second_bias = experts.down_proj_bias
    if not experts.is_transposed:  # stored as [E, W, H] and [E, H, I]
        first, second = first.mT, second.mT
    return first, second, first_bias, second_bias


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
    options = fused_options(experts)
    first, second, first_bias, second_bias = _weights(experts)
    # Asking costs less than a conversion that does nothing, here and below.
    same = hidden_states.dtype == first.dtype
    x = hidden_states if same else hidden_states.to(first.dtype)
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
        if getattr(experts, "has_post_expert_norm", False):
            rows = experts.post_expert_norm(rows)
        y = unpermute(rows, order, top_k_weights)
    return y if y.dtype == hidden_states.dtype else y.to(hidden_states.dtype)


class QuantizedExpertsLayer(nn.Module):
    """The experts of a model in 8 or 4 bits, in place of the module that had them.

    Codes and scales are buffers. Their names have the format, so that a ``state_dict`` loads into
    no other. Scales are stored as the integers of their bits, so that converting the model to
    another dtype leaves them as they are; x decides what is computed in.
    """

    def __init__(self, experts: Any, format: str, options: dict[str, Any]) -> None:
        super().__init__()
        first, second, first_bias, second_bias = _weights(experts)
        self.format, self.options = format, options
        self.sizes: dict[str, tuple[int, int, int]] = {}
        for name, weight in (("gate_up", first), ("down", second)):
            packed = quantize_experts(weight, format)
            self.sizes[name] = packed.shape
            self.register_buffer(f"{name}_{format}", packed.codes)
            bits = torch.int32 if packed.scales.dtype == torch.float32 else torch.int16
            self.register_buffer(f"{name}_scales", packed.scales.view(bits))
        for name, bias in (("gate_up_bias", first_bias), ("down_bias", second_bias)):
            self.register_buffer(name, None if bias is None else bias.detach())

    def _packed(self, name: str) -> QuantizedExperts:
        scales = getattr(self, f"{name}_scales")
        dtype = torch.float32 if scales.dtype == torch.int32 else torch.bfloat16
        codes = getattr(self, f"{name}_{self.format}")
        return QuantizedExperts(codes, scales.view(dtype), self.format, self.sizes[name])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the module's own: [T, H], [T, K] and [T, K] to [T, H]."""
        dtype = hidden_states.dtype
        biases = [
            bias.to(dtype) if isinstance(bias, Tensor) else None
            for bias in (self.gate_up_bias, self.down_bias)
        ]
        return fused_experts_quantized(
            hidden_states,
            self._packed("gate_up"),
            self._packed("down"),
            top_k_index,
            top_k_weights,
            gate_up_bias=biases[0],
            down_bias=biases[1],
            **self.options,
        ).to(dtype)

    def extra_repr(self) -> str:
        experts, hidden, width = self.sizes["gate_up"]
        return f"{self.format}, experts={experts}, hidden={hidden}, width={width}, {self.options}"


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        "save_pretrained: the model's experts were quantised by quantize_experts_of, and what "
        "from_pretrained reads has no place for their codes. Save the model before quantising it, "
        "or keep model.state_dict() with torch.save and load it into a model quantised alike, "
        'which may have been made under torch.device("meta").'
    )


def _refuse_to_leave_behind(who: str, model: nn.Module) -> None:
    """Experts on the meta device are right in a model that is all there: codes are to be loaded."""
    if any(hasattr(part, "_hf_hook") for part in model.modules()):
        raise ValueError(
            f"{who}: accelerate has offloaded its weights. Load the model without a device_map "
            "that offloads."
        )
    for name, value in model.named_parameters():
        if not value.is_meta:
            raise ValueError(
                f"{who}: its weights are on the meta device, and {name} is on {value.device}. Load "
                "them first, or make the whole model on meta, to load codes into it."
            )


def quantize_experts_of(model: nn.Module, format: str = "int4") -> dict[str, QuantizedExpertsLayer]:
    """Replace the experts of a loaded model by ones of 8 or 4 bits, one layer after the other.

    For inference: ``generate`` and every forward run them by :func:`fused_experts_quantized`,
    whatever experts implementation is chosen, and a backward through them is refused. The weights
    they had are freed once nothing else holds them. ``state_dict`` has the codes, and loads into a
    model that was quantised alike; ``save_pretrained`` is refused.

    A model that was made under ``torch.device("meta")`` gets codes without values, and never has
    the memory of its weights: ``model.to_empty(device="cpu")``, ``model.init_weights()``, for the
    buffers that no state has, and ``model.load_state_dict`` fill it.

    Args:
        model: of transformers, its weights loaded, on any device, or none of them; the outermost,
            which is what then refuses to be saved. All experts modules behind
            ``use_experts_implementation`` are replaced; dense layers stay.
        format: of :func:`moe_kernels.quantize_experts`.

    Returns:
        The new modules by their name in the model.

    Raises:
        ImportError: transformers is missing, or older than 5.7.
        ValueError: a model without such experts, or with some that cannot be replaced: a gate that
            no activation of ours computes, adapters on their weights, weights that are sharded,
            offloaded, not loaded while others are, quantised or not finite in float32. Nothing is
            replaced then.
    """
    caller = "quantize_experts_of"
    require_transformers(f"moe_kernels.integrations.transformers.{caller}")
    from transformers import PreTrainedModel

    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a module; got {type(model).__name__}")
    check_choice(caller, "format", format, FORMATS)  # before the weights, which take a while
    found = {
        name: (module, fused_options(module))
        for name, module in model.named_modules()
        if hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")
    }
    if not found:
        who = f"{caller}: {type(model).__name__} has no experts to quantise"
        for name, module in model.named_modules():
            if isinstance(module, QuantizedExpertsLayer):
                raise ValueError(
                    f"{who}: they were quantised already ({name or 'itself'}, {module.format}). "
                    "Load the model again for another format."
                )
        raise ValueError(
            f"{who}: no module of it went through transformers' use_experts_implementation, as "
            "none does of a dense model, or of one whose MoE blocks were replaced"
        )
    if "" in found:
        raise ValueError(
            f"{caller}: model must be a module that holds the experts, in whose place others are "
            f"put; got the experts themselves, {type(model).__name__}"
        )
    for name, (module, options) in found.items():
        who = f"{caller}: {type(module).__name__} ({name})"
        if name.endswith(".base_layer"):  # PEFT's name of what an adapter wraps
            raise ValueError(
                f"{who}: an adapter of PEFT changes its weights. Merge it first (merge_and_unload)."
            )
        for weight in _weights(module)[:2]:
            if not weight.is_floating_point() or weight.itemsize == 1:
                raise ValueError(
                    f"{who}: its weights must have 16 bits or more; they are {weight.dtype}. Load "
                    "the model dequantised."
                )
        if options is None:
            raise ValueError(
                f"{who}: no activation of moe_kernels.expert_activation computes its gate. Leave "
                "the model as it is; experts_implementation='moe_kernels' runs it."
            )
        for weight in _weights(module)[:2]:
            if hasattr(weight, "device_mesh"):
                raise ValueError(f"{who}: its weights are sharded. Quantise before sharding.")
            if weight.is_meta:
                _refuse_to_leave_behind(who, model)
                continue
            for expert, matrix in enumerate(weight.detach()):
                if not matrix.to(torch.float32).isfinite().all():
                    raise ValueError(
                        f"{who}: its weights must be finite in float32; those of expert {expert} "
                        "are not"
                    )
    layers: dict[str, QuantizedExpertsLayer] = {}
    while found:
        name, (module, options) = found.popitem()
        assert options is not None
        layers[name] = QuantizedExpertsLayer(module, format, options).train(module.training)
        for part in model.modules():
            if isinstance(part, PreTrainedModel):  # a PeftModel saves adapters alone
                part.save_pretrained = _refuse_to_save
        for parent in list(model.modules()):  # a module may be in several places
            for child in [key for key, part in parent._modules.items() if part is module]:
                setattr(parent, child, layers[name])
        del module  # before the next one's codes are made
    return dict(reversed(layers.items()))
