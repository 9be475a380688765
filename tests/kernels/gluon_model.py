"""Runs the source of a Gluon kernel on a CPU: warps as threads, memory and barriers as a model.

Gluon has no interpreter. Here the functions of a kernel run as the Python they are, with stand-ins
for its language: tensors are torch's, layouts are ignored. What is modelled is what can go wrong:

* one thread runs at a time, and at every operation on a barrier a generator of random numbers
  says which goes on, so that a seed is a schedule;
* a role has several warps, each a thread; arrivals and copies by TMA are of the first one, and a
  warp may look at a barrier late;
* a barrier has a phase, arrivals and bytes that it waits for, and knows parities only; to TMA it is
  there when a fence has followed its making;
* memory that TMA or ``cp.async`` is copying to holds NaN, which no thread is to read, until the
  copy, at some later time, is done; of rows that ``cp.async`` copies each warp has its own, and
  arrives when they are there;
* an asynchronous product reads its operands when it is issued, and once more when it is waited for;
  what ``cp.async`` brought it reads only behind a fence of the same warp;
* TMA overwrites what a warp's threads have read themselves only behind a fence of that warp;
* TMA stores what each warp has written of its rows, behind a fence of each, at some later time,
  for which the first warp can wait.

When nothing can go on, that is a :class:`DeadlockError`; a product that reads what is not there, or
no longer, is a :class:`RaceError`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.kernels.gluon_machine import Barrier, Barriers, Machine, RaceError


class Memory:
    """Shared memory: a tensor and its views, and when ``cp.async`` wrote what is there, or 0.

    ``read``, of the whole: by which warps' threads, when, and which addresses.
    """

    def __init__(self, machine: Machine, values: Tensor, written: Tensor, read: list[Any]) -> None:
        self.machine, self.values, self.written, self.read = machine, values, written, read

    def _view(self, view: Callable[[Tensor], Tensor]) -> Memory:
        return Memory(self.machine, view(self.values), view(self.written), self.read)

    def _addresses(self) -> range:
        extent = sum(
            (n - 1) * s for n, s in zip(self.values.shape, self.values.stride(), strict=True)
        )
        start = self.values.storage_offset()
        return range(start, start + extent + 1)

    def load(self, layout: None) -> Tensor:
        """By the warp's threads."""
        self.machine.pause()
        if self.values.isnan().any():
            raise RaceError("threads read memory that is not loaded")
        self.read.append((self.machine.warp, self.machine.tick(), self._addresses()))
        return self.values.clone()

    def check_overwritten(self) -> None:
        """By TMA, after reads that are fenced."""
        own = self._addresses()
        for warp, time, addresses in self.read:
            if own.start < addresses.stop and addresses.start < own.stop and warp.fenced < time:
                raise RaceError("TMA overwrites what is read through another proxy")

    def store(self, values: Tensor) -> None:
        warp = self.machine.warp
        own = slice(warp.number, None, self.machine.sizes[warp.role])
        self.machine.pause()
        self.values[own] = values[own]
        warp.wrote = True

    def index(self, number: Any) -> Memory:
        return self._view(lambda tensor: tensor[int(number)])

    def slice(self, start: int, length: int, dim: int) -> Memory:
        return self._view(lambda tensor: tensor.narrow(dim, start, length))

    def permute(self, order: Sequence[int]) -> Memory:
        return self._view(lambda tensor: tensor.permute(*order))


@dataclass(frozen=True)
class Descriptor:
    """Of TMA: what is past a dimension's end is zero."""

    values: Tensor
    block: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def read(self, coordinates: Sequence[Any], shape: torch.Size) -> Tensor:
        out = torch.zeros(self.block, dtype=self.dtype)
        source, target = [], []
        for start, size, extent in zip(
            map(int, coordinates), self.block, self.values.shape, strict=True
        ):
            length = max(min(size, extent - start), 0)
            source.append(slice(start, start + length))
            target.append(slice(0, length))
        out[tuple(target)] = self.values[tuple(source)]
        return out.reshape(shape)

    def write(self, coordinates: Sequence[Any], values: Tensor) -> None:
        values = values.reshape(self.block)
        places = zip(map(int, coordinates), self.block, self.values.shape, strict=True)
        lengths = [(start, max(min(size, extent - start), 0)) for start, size, extent in places]
        target = tuple(slice(start, start + length) for start, length in lengths)
        self.values[target] = values[tuple(slice(0, length) for _, length in lengths)]


@dataclass(frozen=True)
class RaggedDescriptor(Descriptor):
    """Of rows, of which a copy names the last, and how far before the first it begins."""

    def read(self, coordinates: Sequence[Any], shape: torch.Size) -> Tensor:
        billion, end, row, column = map(int, coordinates)
        assert billion == 2**30
        return Descriptor(self.values[:end], self.block).read((end + row - billion, column), shape)


@dataclass(frozen=True)
class Pointer:
    values: Tensor  # flat
    offset: Any = 0

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.values, self.offset + offset)

    @property
    def dtype(self) -> Any:
        return types.SimpleNamespace(element_ty=self.values.dtype)


class Sums:
    """A tensor and the products that are still to be added, oldest first."""

    def __init__(self, values: Tensor, pending: tuple[tuple[Memory, Memory, Tensor], ...]) -> None:
        self.values, self.pending = values, pending


def _product(a: Memory, b: Memory) -> Tensor:
    result = a.values.float() @ b.values.float()
    if not result.isfinite().all():
        raise RaceError("a product read memory that is not loaded")
    return result


def block_scales(largest: Tensor, power_of_two: bool, exact: bool) -> tuple[Tensor, Tensor]:
    assert not power_of_two
    magnitude = largest.view(torch.float32)
    scale = torch.where(magnitude.isfinite(), (magnitude / 448).clamp(min=2**-126), torch.nan)
    nothing = largest == 0
    return scale.masked_fill(nothing, 0), (1 / scale).masked_fill(nothing, 0)


class Language:
    """Stand-ins for the names that a kernel's module has imported."""

    def __init__(self, program: int, programs: int, seed: int) -> None:
        self.machine = machine = Machine(seed)
        barriers: list[Barrier] = []
        layouts = {
            name: lambda *arguments: None
            for name in (
                *("SliceLayout", "BlockedLayout", "NVMMADistributedLayout", "NVMMASharedLayout"),
                *("MBarrierLayout", "AutoLayout", "DistributedLinearLayout"),
            )
        }

        def copy(
            source: Descriptor, coordinates: list[Any], barrier: Barrier, target: Memory
        ) -> None:
            if machine.warp.number:
                return
            if not barrier.shown:
                raise RaceError("TMA may arrive at a barrier before it is made")
            values = source.read(coordinates, target.values.shape)
            target.check_overwritten()
            target.values.fill_(torch.nan)

            def arrive() -> None:
                target.values.copy_(values)
                target.written.zero_()
                barrier.change(0, -values.numel() * values.element_size())

            machine.copies.append((lambda: True, arrive))
            machine.pause()

        def gather(target: Memory, source: Pointer, mask: Tensor | None = None) -> None:
            """A warp's rows: every one of so many as there are warps."""
            warp = machine.warp
            own = slice(warp.number, None, machine.sizes[warp.role])
            inside = torch.ones(()).bool() if mask is None else mask
            inside = inside.expand(source.offset.shape)
            values = torch.zeros(source.offset.shape, dtype=source.values.dtype)
            values[inside] = source.values[source.offset[inside]]
            target.values[own] = torch.nan

            def write() -> None:
                target.values[own] = values[own]
                target.written[own] = machine.tick()
                warp.copying.remove(write)

            warp.copying.append(write)
            machine.copies.append((lambda: True, write))
            machine.pause()

        def arrive_copied(barrier: Barrier, *, increment_count: bool) -> None:
            """A warp's threads, when the copies are done that it has issued."""
            assert not increment_count, "the barrier would count more with each arrival"
            warp = machine.warp
            issued, threads = list(warp.copying), 32 * machine.real[warp.role]
            threads //= machine.sizes[warp.role]

            def done() -> bool:
                return not any(copy in warp.copying for copy in issued)

            machine.copies.append((done, lambda: barrier.change(threads, 0)))
            machine.pause()

        def store_copy(target: Descriptor, coordinates: list[Any], source: Memory) -> None:
            warp = machine.warp
            if warp.number:
                return
            if any(other.wrote for other in machine.warps if other.role == warp.role):
                raise RaceError("TMA stores what was written through another proxy")
            values = source.values.clone()

            def read() -> None:
                if not torch.equal(source.values, values):
                    raise RaceError("what TMA stores was overwritten")
                target.write(coordinates, values)
                warp.storing.remove(read)

            warp.storing.append(read)
            machine.copies.append((lambda: True, read))
            machine.pause()

        def store_wait(pending: int) -> None:
            machine.pause(lambda warp=machine.warp: len(warp.storing) <= pending)

        def fence() -> None:
            time = machine.tick()
            if machine.sizes:
                machine.warp.fenced = time
                machine.warp.wrote = False
            for barrier in barriers:
                barrier.shown = True

        def change(barrier: Barrier, arrivals: int, size: int, condition: Any) -> None:
            machine.pause()
            if condition and machine.warp.number == 0:
                barrier.change(arrivals, size)

        def meet() -> None:
            """All of the role's warps, as often as each other."""
            warp = machine.warp
            counts = machine.met.setdefault(warp.role, [0] * machine.sizes[warp.role])
            counts[warp.number] += 1
            machine.pause(lambda: min(counts) >= counts[warp.number])

        def issue(a: Memory, b: Memory, acc: Any, *, use_acc: bool = True, is_async: bool) -> Sums:
            before = acc if isinstance(acc, Sums) else Sums(acc, ())
            if not use_acc:
                before = Sums(torch.zeros_like(before.values), ())
            if max(int(a.written.max()), int(b.written.max())) > machine.warp.fenced:
                raise RaceError("a product reads what was copied through another proxy")
            return Sums(before.values, (*before.pending, (a, b, _product(a, b))))

        def complete(number: int, deps: tuple[Any]) -> Any:
            (acc,) = deps
            if not isinstance(acc, Sums):  # of no product
                return acc
            values, pending = acc.values, list(acc.pending)
            machine.pause()
            while len(pending) > number:
                a, b, first = pending.pop(0)
                if not torch.equal(_product(a, b), first):
                    raise RaceError("a product's operands were overwritten")
                values = values + first
            return Sums(values, tuple(pending)) if pending else values

        def load(pointer: Pointer, mask: Any = None, other: float = 0.0) -> Tensor:
            offset = torch.as_tensor(pointer.offset)
            if mask is None:
                return pointer.values[offset]
            mask = torch.as_tensor(mask)
            inside = torch.where(mask, offset, 0)
            return torch.where(mask, pointer.values[inside], other).to(pointer.values.dtype)

        def store(pointer: Pointer, values: Tensor, mask: Tensor) -> None:
            own = slice(machine.warp.number, None, machine.sizes[machine.warp.role])
            mask = mask[own]
            pointer.values[pointer.offset[own][mask]] = values[own][mask]

        def allocate(dtype: torch.dtype, shape: list[int], layout: None) -> Any:
            if dtype == torch.int64:
                made = Barriers(shape[0])
                barriers.extend(made.all)
                return made
            written = torch.zeros(shape, dtype=torch.int64)
            return Memory(machine, torch.full(shape, torch.nan, dtype=dtype), written, [])

        language = types.SimpleNamespace(
            **layouts,
            float32=torch.float32,
            int32=torch.int32,
            int64=torch.int64,
            program_id=lambda axis: program,
            num_programs=lambda axis: programs,
            cdiv=lambda a, b: -(-int(a) // b),
            minimum=lambda a, b, **_: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
            maximum=lambda a, b, **_: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
            clamp=lambda tile, low, high, **_: tile.clamp(low, high),
            where=lambda condition, a, b: torch.where(torch.as_tensor(condition), a, b),
            cast=lambda value, dtype: value,
            exp2=torch.exp2,
            rsqrt=torch.rsqrt,
            erf=torch.erf,
            abs=torch.abs,
            static_assert=lambda condition: None,
            PropagateNan=types.SimpleNamespace(ALL=None),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            arange=lambda start, end, layout: torch.arange(start, end),
            static_range=range,
            split=lambda tile: (tile[..., 0], tile[..., 1]),
            join=lambda left, right: torch.stack((left, right), -1),
            sum=lambda tile, axis: tile.sum(axis),
            max=lambda tile, axis: tile.amax(axis),
            convert_layout=lambda tile, layout, **_: tile,
            load=load,
            store=store,
            allocate_shared_memory=allocate,
            # the first role has the warps of the launch, four
            warp_specialize=lambda roles, warps, registers: machine.run(roles, [4, *warps]),
        )
        self.names: dict[str, Any] = {
            "gl": language,
            "tl": language,
            "tma": types.SimpleNamespace(store_wait=store_wait),
            "tma_load": copy,
            "tma_store": store_copy,
            "mbarrier": types.SimpleNamespace(
                MBarrierLayout=lambda: None,
                init=lambda barrier, count: barrier.init(count),
                wait=lambda barrier, parity, pred=True: machine.pause(
                    lambda: not pred or barrier.phase % 2 != int(parity)
                ),
                expect=lambda barrier, size: change(barrier, 1, size, True),
                arrive=lambda barrier, pred=True: change(barrier, 1, 0, pred),
            ),
            "async_copy": types.SimpleNamespace(mbarrier_arrive=arrive_copied),
            "copy_async": gather,
            "fence_async_shared": fence,
            "warpgroup_mma": issue,
            "warpgroup_mma_wait": complete,
            "meet": meet,
            # of quantize.py and _fp8.py, whose tensors change their bits' type
            "magnitude": lambda tile: tile.float().view(torch.int32) & 0x7FFFFFFF,
            "block_scales": block_scales,
            "encode": lambda tile, as_bytes: tile.to(torch.float8_e4m3fn),
        }


def as_python(
    kernel: Any, names: dict[str, Any], made: dict[Any, Callable[..., Any]] | None = None
) -> Callable[..., Any]:
    """The function behind a compiled one, and those that it calls, with other globals.

    Args:
        made: those that are made already; a function's names may include its own.
    """
    function, made = kernel.fn, {} if made is None else made
    if function in made:
        return made[function]
    scope = dict(function.__globals__) | {"__builtins__": __builtins__}
    made[function] = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__
    )
    for name in function.__code__.co_names:
        value = scope.get(name)
        if isinstance(getattr(value, "fn", None), types.FunctionType) and name not in names:
            scope[name] = as_python(value, names, made)
        elif type(value).__name__ == "constexpr":
            scope[name] = value.value
    scope.update(names)
    return made[function]
