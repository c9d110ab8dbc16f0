"""Triton's interpreter without two things that take it more than half of its time and prove nothing here."""

import dataclasses
import inspect
import types


def make_interpreter_fast() -> None:
    """Change Triton's interpreter of this process.

    Each call of a function within a kernel looks through all of Triton's language for what it is to replace, which is
    the same every time. And each sum and product of integers is computed once more in 64 bits, to see whether it
    overflows; compiled kernels do without that. Integers wrap around as on a GPU, so that what overflows gives a wrong
    result.
    """
    from triton import language
    from triton.runtime import interpreter

    names = {
        part: [name for name, member in inspect.getmembers(part) if language.core.is_builtin(member)]
        for part in (language, language.core, language.math, language.tensor)
    }

    def getmembers(part: object, *predicate: object) -> list[tuple[str, object]]:
        if part not in names or predicate:
            return inspect.getmembers(part, *predicate)
        return [(name, getattr(part, name)) for name in names[part]]

    interpreter.inspect = types.SimpleNamespace(**(vars(inspect) | {"getmembers": getmembers}))
    builder = interpreter.interpreter_builder
    if hasattr(builder.options, "sanitize_overflow"):
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
