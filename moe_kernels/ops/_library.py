"""How an op reaches PyTorch's dispatcher: one schema, one implementation per dispatch key.

    CompositeExplicitAutograd   the plain PyTorch reference: any device without kernels of its own
    CPU                         C++, registered by importing ``moe_kernels._C``; or a chain of ops
    CUDA                        Triton, imported at the first call
    Meta                        the fake
    Autograd                    one formula for every device
    ADInplaceOrView             of ops that write to an argument: counts that for autograd

``MOE_KERNELS_BACKEND=reference``, read once at import, puts the reference under CPU and CUDA too.
With ``triton`` the extension may be missing: the reference serves CPU then, and Triton CUDA. An
extension that does not load counts as missing with either.
The extension is imported before the first op, so that the reference is registered over it.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch._library.autograd import Info, make_autograd_impl

NAMESPACE = "moe_kernels"
BACKENDS = ("native", "reference", "triton")
# ops in a file of another name, beside the parts of a backward
FILES = {
    "quantize_rows": "quantize",
    "quantize_weights": "quantize",
    "dequantize_rows": "quantize",
    "permute_quantize": "quantize",
    "fp8_grouped_gemm": "scaled_grouped_gemm",
}

_lib = torch.library.Library(NAMESPACE, "DEF")


def _read_backend() -> str:
    backend = os.environ.get("MOE_KERNELS_BACKEND", "native")
    if backend not in BACKENDS:
        raise ValueError(f"MOE_KERNELS_BACKEND must be one of {BACKENDS}; got {backend!r}")
    return backend


_backend = _read_backend()


def _check_settings() -> None:
    """Refuse at import what would be taken for the default later."""
    for name in ("MOE_KERNELS_CHECK", "MOE_KERNELS_KEEP_BUFFERS"):
        value = os.environ.get(name, "")
        if value not in ("", "0", "1"):
            raise ValueError(f"{name} must be 0 or 1; got {value!r}")


_check_settings()


def _load_native() -> Any:
    """Import the extension, which registers the CPU kernels, or say what to do about it."""
    build = (
        "Build it in this environment: pip install --no-build-isolation . (or, in a checkout, "
        "python setup.py build_ext --inplace)."
    )
    remedy = (
        f"{build} MOE_KERNELS_BACKEND=reference runs the slow plain PyTorch definitions without "
        "it; MOE_KERNELS_BACKEND=triton those on CPU alone."
    )
    try:
        native = importlib.import_module(f"{NAMESPACE}._C")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        if missing and error.name != f"{NAMESPACE}._C":
            raise
        if _backend != "native":
            return None
        if missing:
            raise ImportError(
                f"moe_kernels: the compiled extension is missing in {_what_is_there()}. {remedy}"
            ) from error
        raise ImportError(
            f"moe_kernels: the compiled extension does not load with torch {torch.__version__}; "
            f"it was built for another torch or Python ({error}). {remedy}"
        ) from error
    built = native.build_info()["torch"]
    if built.split("+")[0] != torch.__version__.split("+")[0]:
        # Its kernels are registered by now, so that no backend goes without them.
        raise ImportError(
            f"moe_kernels: the compiled extension was built for torch {built} and this is torch "
            f"{torch.__version__}. {build} To go without it, remove {native.__file__} and set "
            "MOE_KERNELS_BACKEND=reference, or triton."
        )
    if "MOE_KERNELS_CPU_CAPABILITY" in os.environ:
        native.cpu_capability()  # a wrong one is refused here, not by the first op
    return native


def _what_is_there() -> str:
    """The package's folder, which may be a checkout that hides what pip installed, and the
    extensions in it that this Python does not look for."""
    folder = Path(__file__).parents[1]
    others = ", ".join(sorted(path.name for path in folder.glob("_C.*")))
    return f"{folder}{others and f', where {others} is for another Python'}"


_native = _load_native()


class TritonOp:
    """The Triton launcher ``name`` of ``moe_kernels.triton.<file>``, imported when first called."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._launcher: Any = None

    def __call__(self, *args: Any) -> Any:
        if self._launcher is None:
            self._launcher = self._load()
        return self._launcher.call(*args)

    @property
    def loaded(self) -> bool:
        """Whether there was a call; only then is there one to repeat."""
        return self._launcher is not None

    def is_repeated(self, tensor: torch.Tensor) -> bool:
        return bool(self._launcher.is_repeated(tensor))

    def repeat(self, *args: Any) -> Any:
        """See ``_replay.Replayed``; so with ``confirm``."""
        return self._launcher.repeat(*args)

    def confirm(self, *args: Any) -> None:
        self._launcher.confirm(*args)

    def _load(self) -> Any:
        module = self.name.removesuffix("_").removesuffix("_backward")
        module = module.removesuffix("_wgrad").removesuffix("_dbias")
        module = FILES.get(module, module)
        try:
            loaded = importlib.import_module(f"{NAMESPACE}.triton.{module}")
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.split(".")[0] == "triton":
                raise
            raise ImportError(
                f"moe_kernels.{self.name}: CUDA tensors need Triton, which is not installed. "
                "Install the release your torch names (pip show torch), or set "
                "MOE_KERNELS_BACKEND=reference."
            ) from error
        replayed = importlib.import_module(f"{NAMESPACE}.triton._replay").replayed
        return replayed(getattr(loaded, self.name))


@functools.cache
def triton_op(name: str) -> TritonOp:
    return TritonOp(name)


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    triton: bool = True,
    cpu: Callable[..., Any] | None = None,
) -> torch._ops.OpOverload:
    """Define ``moe_kernels::<schema>`` and register every Python implementation of it.

    Args:
        schema: ``name(arguments) -> returns``. The Triton launcher is found by that name.
        reference: plain PyTorch with the schema's arguments.
        fake: shapes, dtypes and strides of the outputs.
        triton: whether there is a launcher; without one the reference serves CUDA.
        cpu: what runs on CPU where the extension has no kernel: a chain of ops that it has.

    Returns:
        The op's default overload.
    """
    name = schema.split("(", 1)[0]
    _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _lib.impl(name, reference, "CompositeExplicitAutograd")
    if _backend != "reference":
        if triton:
            _lib.impl(name, triton_op(name).__call__, "CUDA")
        if cpu is not None:
            _lib.impl(name, cpu, "CPU")
    else:
        with warnings.catch_warnings():  # the kernel of the extension is overridden on purpose
            warnings.simplefilter("ignore")
            _lib.impl(name, reference, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_lib)
    overload: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    _count_writes(name, overload)
    return overload


def _count_writes(name: str, overload: torch._ops.OpOverload) -> None:
    """Let autograd know of the arguments that an op writes to, as it does of PyTorch's own ops: a
    graph that saved one before must not use what is in it now."""
    arguments = enumerate(overload._schema.arguments)
    written = [i for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]
    if not written:
        return

    def run(keys: Any, *args: Any) -> Any:
        try:
            return overload.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)
        finally:  # who runs out of memory may have written by then
            torch.autograd.graph.increment_version([args[i] for i in written])

    _lib.impl(name, run, "ADInplaceOrView", with_keyset=True)


def reads_reference() -> bool:
    """Whether the reference computes everywhere."""
    return _backend == "reference"


def record_callbacks() -> bool:
    """Whether a profiler or another observer is told of each op."""
    if _native is None:
        return bool(torch._C._autograd._profiler_enabled())
    return bool(_native.has_record_callbacks())


def direct_call(name: str) -> Callable[..., Any]:
    """``moe_kernels::<name>`` for usual arguments on CPU, without gradients: checked and called in
    C++, since checks in Python and ``torch.ops`` take longer than a small op does.

    Returns:
        A function of the op's arguments that runs it and returns its result, or None where anything
        is unusual or does not fit: then the checks and the op in Python are to be gone through. Not
        for torch.compile, which does not see through it.
    """
    if _backend == "reference" or _native is None:
        return lambda *args: None
    call: Callable[..., Any] = getattr(_native, name)
    return call


def call_op(op: torch._ops.OpOverload, *args: Any) -> Any:
    """``op(*args)``, past its autograd formula where gradients are off: that formula, which is in
    Python, would do nothing but call the op again.

    Raises:
        NotImplementedError: it would be differentiated by a transform of torch.func.
    """
    plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if plain and torch._C._functorch.peek_interpreter_stack() is None:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)
    try:
        return op(*args)
    except RuntimeError as error:
        # PyTorch's words are for who wrote the op, not for who calls it.
        if torch._C._are_functorch_transforms_active() and "setup_context" in str(error):
            raise NotImplementedError(
                f"{op._opname}: torch.func.grad and the like (vjp, jacrev) are not supported. "
                "Differentiate by backward or torch.autograd.grad, or call the function of that "
                "name in moe_kernels.reference."
            ) from error
        raise


def register_autograd(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]
) -> None:
    """Register the backward of ``moe_kernels::<name>``.

    As ``torch.library.register_autograd`` does, but with the arguments of the op's schema at hand:
    to fill in defaults torch asks for all of them once for each, which takes longer than a launch.
    """
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    op: Any = _WithArguments(overload)
    kernel = make_autograd_impl(op, Info(backward, setup_context))
    _lib.impl(name, kernel, "Autograd", with_keyset=True)


class _WithArguments:
    """An op and its schema, whose arguments are in Python."""

    def __init__(self, op: Any) -> None:
        self._op = op
        self.redispatch = op.redispatch
        schema, keys = op._schema, ("name", "type", "kwarg_only", "default_value", "alias_info")
        arguments = [
            SimpleNamespace(**{key: getattr(argument, key) for key in keys})
            for argument in schema.arguments
        ]
        self._schema: Any = SimpleNamespace(arguments=arguments, returns=schema.returns)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._op, name)


def refuse_backward(reason: str, *names: str) -> None:
    """Make differentiating an op a clear error instead of a wrong gradient."""

    def refuse(name: str) -> Callable[..., Any]:
        def backward(ctx: Any, *grads: Any) -> None:
            raise RuntimeError(f"{name}: {reason}")

        return backward

    for name in names:
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}",
            refuse(name),
            lib=_lib,
        )


def refuse_double_backward(*names: str) -> None:
    """The same for ops that backward calls."""
    refuse_backward(
        "double backward is not supported. Differentiate once, or set "
        "MOE_KERNELS_BACKEND=reference and call moe_kernels.reference's functions, which "
        "autograd differentiates any number of times.",
        *names,
    )


def remember_inputs(ctx: Any, inputs: Sequence[Any]) -> None:
    """Keep in ``ctx`` which inputs were tensors: the graph has an edge for those alone."""
    ctx.tensor_inputs = tuple(isinstance(value, torch.Tensor) for value in inputs)


def owed_gradients(ctx: Any) -> list[bool]:
    """Which inputs' gradients this run of backward must produce.

    ``ctx.needs_input_grad`` says what requires grad at all; the engine knows what this run was
    asked for. They differ when a pipeline schedule runs backward for the inputs and later for the
    weights. Needs :func:`remember_inputs` in ``setup_context``.
    """
    owed = []
    edges = iter(ctx.next_functions)
    # defaults that were left out are among the former alone
    for is_tensor, needed in zip(ctx.tensor_inputs, ctx.needs_input_grad, strict=False):
        node = next(edges)[0] if is_tensor else None
        owed.append(bool(needed and node is not None and _engine_wants(node)))
    return owed


def _engine_wants(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        return True  # a leaf captured by torch.autograd.grad: wanted, and not executed
