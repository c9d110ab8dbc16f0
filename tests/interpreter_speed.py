"""Triton's interpreter without what takes it more than half of its time and proves nothing here."""

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any


def make_interpreter_fast() -> None:
    """Change Triton's interpreter of this process.

    A launch looks through all of Triton's language for what it is to replace, and each call of a function within the
    kernel does so again, when everything is in place. And each sum and product of integers is computed once more in 64
    bits, to see whether it overflows; compiled kernels do without that. Integers wrap around as on a GPU, so that what
    overflows gives a wrong result.
    """
    from triton import language
    from triton.runtime import interpreter

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

    interpreter.inspect = types.SimpleNamespace(**(vars(inspect) | {"getmembers": getmembers}))
    interpreter._patch_lang = replace_once
    builder = interpreter.interpreter_builder
    if hasattr(builder.options, "sanitize_overflow"):
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
