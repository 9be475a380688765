"""Calls that are decided once and then repeated.

Which kernels an op launches, on what grids and with which numbers, follows from its tensors' types,
sizes, strides and alignment and from its other arguments, not from what is in the tensors. To find
it out takes the host longer than small kernels run: tiles are chosen, descriptors made, compiled
kernels looked up. So the second call with such a set of arguments is noted as a plan, what memory
it asked for and what it launched on it, and later ones follow the plan.

A call has no plan, and goes on being decided, if it does anything else than to ask for memory,
look at it in another way and call :func:`launch`: if it copies a tensor, or reads one on the host.
Nor if one cannot tell from an address which argument it lies in, where two overlap. Nothing is
noted or repeated off CUDA, under a hook of Triton's, or with a release of Triton whose launches may
differ.

Memory is freed after the last launch that uses it, which is when the call that was noted could free
it at the earliest. The allocator gives, as any on CUDA, multiples of 16 bytes.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from moe_kernels.triton._launch import (
    INTERPRETED,
    TRITON_VERSION,
    checks_values,
    is_known,
    on_device_of,
)

KNOWN_TRITON = not INTERPRETED and torch.version.hip is None and is_known(TRITON_VERSION)
SMALL = 2**16  # bytes; what is smaller, and not returned, is allocated together
ALIGNMENT = 256
KEPT = 512  # sets of arguments of an op that are remembered

aten = torch.ops.aten
EMPTY = (aten.empty, aten.new_empty, aten.empty_strided, aten.new_empty_strided, aten.empty_like)
ZEROS = (aten.zeros, aten.new_zeros)


class Allocation(NamedTuple):
    """Memory that is asked for; ``stride`` None for contiguous."""

    size: tuple[int, ...]
    stride: tuple[int, ...] | None
    dtype: torch.dtype
    zeroed: bool


class Step(NamedTuple):
    """A launch.

    Attributes:
        run, function, packed: of the compiled kernel.
        arguments: all of its arguments, but for tensors.
        pointers: the place of each tensor among them, the number of the memory that it lies in, and
            how far into it.
        descriptors: likewise, and the descriptor.
        last: memory that no later launch uses.
    """

    run: Any
    function: int
    packed: Any
    grid: tuple[int, int, int]
    arguments: list[Any]
    pointers: list[tuple[int, int, int]]
    descriptors: list[tuple[int, int, int, Any]]
    last: list[int]


class Plan(NamedTuple):
    """Memory is numbered: the tensors among the arguments, then what is allocated, in order.

    ``outputs``: the numbers of what is returned, one alone, or None if nothing is.
    """

    steps: list[Allocation | Step]
    outputs: list[int] | int | None


class _Known:
    """What is known of a set of arguments: nothing yet; that they were seen; their plan, or that
    they have none. And whether they were checked: the op itself does not."""

    __slots__ = ("checked", "plan", "state")

    def __init__(self) -> None:
        self.state = "new"
        self.checked = False
        self.plan: Plan | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``: all launches go through here, to be noted.

    Products and sums are fused: Triton 3.9 warns that this will not be its default for ever.
    """
    compiled = kernel[grid](*args, enable_fp_fusion=True, **constants)
    recorder = _get_current_dispatch_mode()
    if isinstance(recorder, _Recorder):
        recorder.launched(kernel, compiled, grid, args, constants)


def is_repeated(tensor: Tensor) -> bool:
    """Whether calls with the tensor are noted and repeated."""
    return tensor.is_cuda and KNOWN_TRITON


def _is_hooked() -> bool:
    """Whether someone wants to see launches, or kernels as they are looked up."""
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):  # a chain of them, perhaps empty
            return True
    return getattr(runtime, "add_stages_inspection_hook", None) is not None


def _read(args: Sequence[Any]) -> tuple[list[Tensor], list[int], tuple[Any, ...]]:
    """The tensors among the arguments, where they start, and all else that decides a call."""
    tensors: list[Tensor] = []
    addresses: list[int] = []
    key: list[Any] = []
    for value in args:
        if isinstance(value, Tensor):
            address = value.data_ptr()
            tensors.append(value)
            addresses.append(address)
            key.append((value.dtype, value.shape, value.stride(), address & 15, value.device))
        elif isinstance(value, list):
            key.append(tuple(value))
        else:  # a True is no 1, and a zero has a sign
            zero = isinstance(value, float) and not value
            key.append((type(value), str(value) if zero else value))
    key += (
        torch.backends.cuda.matmul.fp32_precision if tensors[0].dtype == torch.float32 else None,
        checks_values(),
        triton.knobs.runtime.debug,
        triton.knobs.compilation.instrumentation_mode,
        getattr(triton.knobs.compilation, "fpsan_homomorphic_casts", None),  # from 3.9
    )
    return tensors, addresses, tuple(key)


def _rebased(descriptor: Any, base: Any) -> Any:
    """The descriptor of another tensor of the layout, without the checks that were made."""
    made = object.__new__(type(descriptor))
    made.__dict__.update(descriptor.__dict__)
    made.base = base
    return made


class _Address:
    """Stands for the tensor of a descriptor, of which a launch wants nothing else."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


def _end(tensor: Tensor) -> int:
    """The address behind the last element."""
    extents = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in extents)
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


def _stride(tensor: Tensor) -> tuple[int, ...] | None:
    """None for that of a new tensor of the shape."""
    stride = tensor.stride()
    return None if stride == torch.empty(tensor.shape, device="meta").stride() else stride


class _Recorder(TorchDispatchMode):
    """Notes what a call does; ``steps`` is None once it did what no plan can hold."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.inputs = len(tensors)
        # where the tensors lie, by number
        self.spans = [(t.data_ptr(), _end(t)) if t.numel() else (0, 0) for t in tensors]
        self.steps: list[Allocation | Step] | None = []
        if any(tensor.device != tensors[0].device for tensor in tensors):
            self.steps = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in EMPTY or packet in ZEROS:
            if result.numel():
                self.allocated(result, zeroed=packet in ZEROS)
        elif not func.is_view:
            self.steps = None
        return result

    def allocated(self, tensor: Tensor, *, zeroed: bool = False) -> None:
        if self.steps is None:
            return
        stride = _stride(tensor)
        self.spans.append((tensor.data_ptr(), _end(tensor)) if tensor.numel() else (0, 0))
        self.steps.append(Allocation(tuple(tensor.shape), stride, tensor.dtype, zeroed))

    def find(self, address: int) -> int | None:
        """The number of the tensor in whose memory the address is, if that is certain."""
        found = [number for number, (begin, end) in enumerate(self.spans) if begin <= address < end]
        if any(number < self.inputs for number in found):
            return found[0] if len(found) == 1 else None
        return found[-1] if found else None  # memory may have been freed and given out again

    def launched(self, *call: Any) -> None:
        """See :meth:`_step`."""
        if self.steps is not None:
            step = self._step(*call)
            self.steps = None if step is None else [*self.steps, step]

    def _step(
        self,
        kernel: Any,
        compiled: Any,
        grid: tuple[int, ...],
        args: tuple[Any, ...],
        constants: dict[str, Any],
    ) -> Step | None:
        if kernel.pre_run_hooks or not isinstance(compiled, triton.compiler.CompiledKernel):
            return None
        if compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size:
            return None
        named = {name: value for name, value in constants.items() if name in kernel.arg_names}
        bound = kernel.signature.bind(*args, **named)
        bound.apply_defaults()
        arguments = list(bound.arguments.values())
        pointers, descriptors = [], []
        for place, value in enumerate(arguments):
            tensor = getattr(value, "base", value)  # of a descriptor
            if not isinstance(tensor, Tensor):
                continue
            address = tensor.data_ptr()
            arguments[place] = 0
            if not address and tensor is value:
                continue
            number = self.find(address)
            if number is None:
                return None
            offset = address - self.spans[number][0]
            if tensor is value:
                pointers.append((place, number, offset))
            else:
                descriptors.append((place, number, offset, _rebased(value, None)))
        x, y, z = (*grid, 1, 1)[:3]
        return Step(
            compiled.run,
            compiled.function,
            compiled.packed_metadata,
            (x, y, z),
            arguments,
            pointers,
            descriptors,
            [],
        )

    def plan(self, result: Any) -> Plan | None:
        """That of the call, which returned ``result``."""
        single = isinstance(result, Tensor)
        returned = [result] if single else list(result or ())
        outputs = [number for tensor in returned if (number := self._output(tensor)) is not None]
        if self.steps is None or len(set(outputs)) < len(returned):
            return None
        steps, numbers = self._together(self.steps, set(outputs))
        outputs = [numbers[number][0] for number in outputs]
        seen = {*range(self.inputs), *outputs}
        for step in reversed(steps):
            if isinstance(step, Step):
                used = {item[1] for item in (*step.pointers, *step.descriptors)}
                step.last.extend(used - seen)
                seen |= used
        return Plan(steps, outputs[0] if single else outputs if returned else None)

    def _together(
        self, steps: list[Allocation | Step], outputs: set[int]
    ) -> tuple[list[Allocation | Step], dict[int, tuple[int, int]]]:
        """The steps with one allocation for all that is small and not returned; and, by number, the
        new number of each tensor's memory and how far into it the tensor starts."""
        numbers = {number: (number, 0) for number in range(self.inputs)}
        allocations = [step for step in steps if isinstance(step, Allocation)]
        sizes = {
            number: torch.Size(made.size).numel() * made.dtype.itemsize
            for number, made in enumerate(allocations, self.inputs)
            if number not in outputs and not made.zeroed
        }
        small = {number: size for number, size in sizes.items() if size <= SMALL}
        offset = 0
        for number, size in small.items():
            numbers[number] = (self.inputs, offset)
            offset += -(-size // ALIGNMENT) * ALIGNMENT
        found: list[Allocation | Step] = []
        if small:
            found.append(Allocation((offset,), None, torch.uint8, False))
        for number in range(self.inputs, self.inputs + len(allocations)):
            if number not in small:
                numbers[number] = (len(numbers) - len(small) + bool(small), 0)
        number = self.inputs
        for step in steps:
            if isinstance(step, Step):
                pointers = [
                    (place, numbers[n][0], numbers[n][1] + offset)
                    for place, n, offset in step.pointers
                ]
                descriptors = [
                    (place, numbers[n][0], numbers[n][1] + offset, descriptor)
                    for place, n, offset, descriptor in step.descriptors
                ]
                found.append(step._replace(pointers=pointers, descriptors=descriptors))
            else:
                if number not in small:
                    found.append(step)
                number += 1
        return found, numbers

    def _output(self, tensor: Tensor) -> int | None:
        """The number of a tensor that is returned: all of an allocation, seen in some way."""
        if self.steps is None:
            return None
        if not tensor.numel():
            self.allocated(tensor)
            return len(self.spans) - 1
        number = self.find(tensor.data_ptr())
        if number is None or number < self.inputs:
            return None
        whole = (tensor.data_ptr(), _end(tensor)) == self.spans[number]
        allocations = [i for i, step in enumerate(self.steps) if isinstance(step, Allocation)]
        place = allocations[number - self.inputs]
        made = self.steps[place]
        assert isinstance(made, Allocation)
        same = made.dtype == tensor.dtype and torch.Size(made.size).numel() == tensor.numel()
        stride = _stride(tensor)
        if not whole or not same or (made.zeroed and stride is not None):
            return None
        self.steps[place] = Allocation(tuple(tensor.shape), stride, made.dtype, made.zeroed)
        return number


def _follow(plan: Plan, tensors: list[Any], addresses: list[int]) -> Any:
    first = tensors[0]
    driver = triton.runtime.driver.active
    stream = driver.get_current_stream(driver.get_current_device())
    for step in plan.steps:
        if isinstance(step, Allocation):
            size, stride, dtype, zeroed = step
            if zeroed:
                made = first.new_zeros(size, dtype=dtype)
            elif stride is None:
                made = first.new_empty(size, dtype=dtype)
            else:
                made = first.new_empty_strided(size, stride, dtype=dtype)
            tensors.append(made)
            addresses.append(made.data_ptr())
        else:
            run, function, packed, grid, known, pointers, descriptors, last = step
            arguments = known.copy()
            for place, number, offset in pointers:
                arguments[place] = addresses[number] + offset
            for place, number, offset, descriptor in descriptors:
                arguments[place] = _rebased(descriptor, _Address(addresses[number] + offset))
            run(*grid, stream, function, packed, None, None, None, *arguments)
            for number in last:
                tensors[number] = None
    if plan.outputs is None:
        return None
    if isinstance(plan.outputs, int):
        return tensors[plan.outputs]
    return tuple([tensors[number] for number in plan.outputs])


class Replayed(NamedTuple):
    """An op whose calls are repeated; see the top of the file.

    Attributes:
        call: the op.
        repeat: the same for who has not checked the arguments: None unless such a call has a plan
            and was confirmed.
        confirm: says that the arguments of an earlier call were checked.
        is_repeated: whether calls with a tensor may be.
    """

    call: Callable[..., Any]
    repeat: Callable[..., Any]
    confirm: Callable[..., None]
    is_repeated: Callable[[Tensor], bool]


def replayed(op: Callable[..., Any]) -> Replayed:
    known: OrderedDict[tuple[Any, ...], _Known] = OrderedDict()

    def find(key: tuple[Any, ...]) -> _Known | None:
        found = known.get(key)
        if found is not None:
            with contextlib.suppress(KeyError):  # another thread may have made place meanwhile
                known.move_to_end(key)
        return found

    def remember(key: tuple[Any, ...]) -> _Known:
        found = find(key) or known.setdefault(key, _Known())
        if len(known) > KEPT:
            known.popitem(last=False)
        return found

    @functools.wraps(op)
    def call(*args: Any) -> Any:
        first = next((value for value in args if isinstance(value, Tensor)), None)
        if first is None or not is_repeated(first) or _is_hooked():
            return op(*args)
        tensors, addresses, key = _read(args)
        found = remember(key)
        if found.plan is not None:
            with on_device_of(first):
                return _follow(found.plan, tensors, addresses)
        if found.state != "seen":
            result = op(*args)
            if found.state == "new":
                found.state = "seen"
            return result
        with _Recorder(tensors) as recorder:
            result = op(*args)
        found.state = "noted"
        found.plan = recorder.plan(result)
        return result

    def repeat(*args: Any) -> Any:
        if _is_hooked():
            return None
        tensors, addresses, key = _read(args)
        found = find(key)
        if found is None or found.plan is None or not found.checked:
            return None
        with on_device_of(tensors[0]):
            return _follow(found.plan, tensors, addresses)

    def confirm(*args: Any) -> None:
        found = find(_read(args)[2])
        if found is not None:
            found.checked = True

    # looked up at each call, since it may be another one where nothing is launched
    return Replayed(call, repeat, confirm, lambda tensor: is_repeated(tensor))
