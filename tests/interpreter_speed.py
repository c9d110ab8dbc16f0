"""Triton's interpreter without what takes it more than half of its time and proves nothing here."""

import dataclasses
import functools
import inspect
import math
import types
from collections.abc import Callable
from typing import Any

import numpy


def make_interpreter_fast() -> None:
    """Change Triton's interpreter of this process.

    A launch looks through all of Triton's language for what it is to replace, and each call of a function within the
    kernel does so again, when everything is in place. And each sum and product of integers is computed once more in 64
    bits, to see whether it overflows; compiled kernels do without that. Integers wrap around as on a GPU, so that what
    overflows gives a wrong result. What types and shapes are is worked out anew for each value, and a round of random
    numbers takes a dozen of its operations.
    """
    from triton import language
    from triton.runtime import interpreter

    make_types_fast()
    make_operands_fast()
    make_random_numbers_fast()

    is_builtin = language.core.is_builtin
    parts = (language, language.core, language.math, language.tensor)
    names = {part: [name for name, member in inspect.getmembers(part) if is_builtin(member)] for part in parts}

    def getmembers(part: Any, *predicate: Any) -> list[tuple[str, Any]]:
        if part not in names or predicate:
            return inspect.getmembers(part, *predicate)
        return [(name, getattr(part, name)) for name in names[part]]

    replace = interpreter._patch_lang

    @functools.cache
    def languages_of(kernel: Callable) -> list[Any]:
        return [part for part in parts[:2] if any(value is part for value in kernel.__globals__.values())]

    def replace_once(kernel: Callable) -> Any:
        # what stands in the place of a built-in function is not one
        if any(is_builtin(part.load) for part in languages_of(kernel)):
            return replace(kernel)
        return types.SimpleNamespace(restore=lambda: None)

    def put_in_place(owner: Any, name: str, member: Callable, builder: Any, scope: Any) -> None:
        # without the wrapper that only looks whether it is called in a kernel
        inner = getattr(member, "__wrapped__", member)

        def call(*arguments: Any, **named: Any) -> Any:
            named["_semantic"] = interpreter.interpreter_semantic
            return inner(*arguments, **named)

        scope.set_attr(owner, name, call)

    interpreter._patch_attr = put_in_place
    interpreter.inspect = types.SimpleNamespace(**(vars(inspect) | {"getmembers": getmembers}))
    interpreter._patch_lang = replace_once
    builder = interpreter.interpreter_builder
    if hasattr(builder.options, "sanitize_overflow"):
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def make_types_fast() -> None:
    """Work out once what the interpreter asks of a type or of a shape for each value."""
    from triton import language
    from triton.runtime import interpreter

    numpy_type = interpreter._get_np_dtype
    numpy_types: dict[str, Any] = {}

    def numpy_type_once(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(kind)
        return numpy_types[name]

    make_block_type = language.block_type.__init__
    block_types: dict[tuple, dict[str, Any]] = {}

    def make_block_type_once(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in block_types:
            make_block_type(self, element_ty, shape)
            block_types[key] = dict(vars(self))
        vars(self).update(block_types[key], element_ty=element_ty)

    @functools.cache
    def sizes_of(shape: tuple[int, ...]) -> tuple[Any, tuple]:
        return language.constexpr(math.prod(shape)), language.tuple([language.constexpr(size) for size in shape])

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = sizes_of(tuple(type.shape) if type.is_block() else ())

    interpreter._get_np_dtype = numpy_type_once
    language.block_type.__init__ = make_block_type_once
    language.tensor.__init__ = make_tensor


def make_operands_fast() -> None:
    """Leave alone what needs no change: plain values among constants, and two operands of one type and shape."""
    from triton import language
    from triton.language import core
    from triton.runtime import interpreter

    semantic = type(interpreter.interpreter_semantic)
    unwrap, broadcast = core._unwrap_if_constexpr, semantic.broadcast_impl_value
    check = semantic.binary_op_type_checking_impl
    plain = {language.tensor, int, float, bool, str, type(None)}
    # two of a kind give their own kind, whatever is computed
    kinds = {"fp32", "fp64", "int1", "int32", "int64", "uint32", "uint64"}

    def unwrap_quickly(value: Any) -> Any:
        if type(value) is core.constexpr:
            return value.value
        return value if type(value) in plain else unwrap(value)

    def broadcast_quickly(self: Any, one: Any, other: Any) -> tuple[Any, Any]:
        same = one.handle.data.shape == other.handle.data.shape and one.type.is_block() == other.type.is_block()
        return (one, other) if same else broadcast(self, one, other)

    def check_quickly(self: Any, one: Any, other: Any, *options: Any, **named: Any) -> tuple[Any, Any]:
        if (
            type(one) is type(other) is language.tensor
            and one.dtype.name == other.dtype.name
            and one.dtype.name in kinds
        ):
            return broadcast_quickly(self, one, other)
        return check(self, one, other, *options, **named)

    core._unwrap_if_constexpr = unwrap_quickly
    semantic.broadcast_impl_value = broadcast_quickly
    semantic.binary_op_type_checking_impl = check_quickly


def make_random_numbers_fast() -> None:
    """Philox of 32 bits in NumPy: Salmon et al. 2011, section 3.3."""
    from triton import language
    from triton.runtime.interpreter import TensorHandle

    in_triton = language.random.philox_impl
    low = numpy.uint64(0xFFFFFFFF)
    half = numpy.uint64(32)
    factors = numpy.uint64(0xD2511F53), numpy.uint64(0xCD9E8D57)
    steps = numpy.uint64(0x9E3779B9), numpy.uint64(0xBB67AE85)

    def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any, n_rounds: Any = 10) -> Any:
        if c0.dtype != language.uint32 or any(word.type != c0.type for word in (c1, c2, c3)):
            return in_triton(c0, c1, c2, c3, k0, k1, n_rounds)
        words = [word.handle.data.astype(numpy.uint64) for word in (c0, c1, c2, c3)]
        keys = [key.handle.data.astype(numpy.uint64) for key in (k0, k1)]
        for _ in range(getattr(n_rounds, "value", n_rounds)):
            one, other = factors[0] * words[0], factors[1] * words[2]
            words = [(other >> half) ^ words[1] ^ keys[0], other & low, (one >> half) ^ words[3] ^ keys[1], one & low]
            keys = [(key + step) & low for key, step in zip(keys, steps, strict=True)]
        return tuple(
            language.tensor(TensorHandle(word.astype(numpy.uint32).reshape(c0.handle.data.shape), c0.dtype), c0.type)
            for word in words
        )

    language.random.philox_impl = philox
