"""Triton's interpreter in less than half the time, with the same results.

It runs a kernel's programs one after the other and each operation in Python, where most of the time
went into types and shapes that are found out again for every operation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Make the interpreter quicker for a while. Has no effect on compiled kernels.

    Types of blocks are made inside of it: those made before lack what it adds.
    """
    with _types(), _calls(), _operations():
        yield


@contextmanager
def _types() -> Iterator[None]:
    """What follows from a type alone is computed once; tiles of a shape share one object of it."""
    import triton.language as tl
    from triton.runtime import interpreter

    block_type, tensor, dtype = tl.core.block_type, tl.core.tensor, tl.core.dtype
    of_block, of_tensor, equal = block_type.__init__, tensor.__init__, dtype.__eq__
    numpy_type = interpreter._get_np_dtype
    numpy_types: dict[str, Any] = {}
    blocks: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, tuple[Any, Any]] = {}

    def _get_np_dtype(kind: Any) -> Any:
        found = numpy_types.get(kind.name)
        if found is None:
            found = numpy_types[kind.name] = numpy_type(kind)
        return found

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([s.value if isinstance(s, tl.constexpr) else s for s in shape])
        found = blocks.get((element_ty.name, sizes))
        if found is None:
            of_block(self, element_ty, shape)
            found = {**vars(self), "sizes": sizes}
            blocks[element_ty.name, sizes] = found
        self.__dict__.update(found)
        self.element_ty = element_ty

    def tile(self: Any, handle: Any, type: Any) -> None:
        sizes = type.sizes if isinstance(type, block_type) else ()
        found = shapes.get(sizes)
        if found is None:
            of_tensor(self, handle, type)
            found = shapes[sizes] = (self.shape, self.numel)
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = found

    def same(self: Any, other: Any) -> bool:
        return self is other or equal(self, other)

    with (
        mock.patch.object(dtype, "__eq__", same),
        mock.patch.object(interpreter, "_get_np_dtype", _get_np_dtype),
        mock.patch.object(block_type, "__init__", block),
        mock.patch.object(tensor, "__init__", tile),
    ):
        yield


@contextmanager
def _calls() -> Iterator[None]:
    """triton.language is looked through once, for all kernels and the functions they call."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.errors import InterpreterError
    from triton.runtime.interpreter import InterpretedFunction

    patch = interpreter._patch_lang
    patched: list[tuple[Any, str, Any]] = []

    def _patch_lang(kernel: Any) -> Any:
        """All modules at once, so that device functions find theirs patched."""
        if not patched:
            scope = patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
            places = {(id(place), name): (place, name) for place, name, _ in scope._changes}
            patched.extend((place, name, vars(place)[name]) for place, name in places.values())
            return scope
        scope = interpreter._LangPatchScope()
        for change in patched:
            scope.set_attr(*change)
        return scope

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """A device function: the kernel that calls it has patched triton.language."""
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    with (
        mock.patch.object(InterpretedFunction, "__call__", call),
        mock.patch.object(interpreter, "_patch_lang", _patch_lang),
    ):
        yield


@contextmanager
def _operations() -> Iterator[None]:
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter
    from triton.runtime.interpreter import ReduceOps

    broadcast = TritonSemantic.broadcast_impl_value
    reduce = ReduceOps.apply_impl

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        """Blocks of one rank, as almost all are, and two scalars; the rest is left to Triton."""
        if lhs.shape is rhs.shape:
            return lhs, rhs
        if len(lhs.shape) != len(rhs.shape):
            return broadcast(self, lhs, rhs)
        common = [max(pair) for pair in zip(lhs.type.sizes, rhs.type.sizes, strict=True)]
        results = []
        for block in (lhs, rhs):
            if any(size not in (1, c) for size, c in zip(block.type.sizes, common, strict=True)):
                return broadcast(self, lhs, rhs)  # which says what is wrong
            if block.type.sizes != tuple(common):
                kind = tl.block_type(block.type.scalar, common)
                block = self.tensor(self.builder.create_broadcast(block.handle, common), kind)
            results.append(block)
        return results

    def apply_impl(self: Any, values: Any) -> Any:
        """Exclusive or, of which sorts consist, by numpy instead of value by value."""
        if self.combine_fn is not tl.standard._xor_combine:
            return reduce(self, values)
        found = np.bitwise_xor.reduce(
            values[0].handle.data, axis=self.axis, keepdims=self.keep_dims
        )
        return self.to_tensor(found, values[0].dtype)

    # whether integers overflow took nine operations for each of theirs; nobody looks at what they
    # find but in Triton's debug mode, which the interpreter has off
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    options = dataclasses.replace(builder.options, sanitize_overflow=False)
    with (
        mock.patch.object(TritonSemantic, "broadcast_impl_value", broadcast_impl_value),
        mock.patch.object(ReduceOps, "apply_impl", apply_impl),
        mock.patch.object(builder, "options", options),
    ):
        yield
