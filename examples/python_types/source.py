"""A Python file read and written without changing anything that is not meant: bytes, encoding, line endings, mode."""

import ast
import difflib
import os
import platform
import re
import shutil
import tempfile
import tokenize
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

# the ends of lines as Python sees them; str.splitlines knows more, for example the form feed
LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
# and as `patch` does
PATCH_LINE = re.compile(r"[^\n]*\n|[^\n]+")


class SourceError(ValueError):
    """A file that cannot be read, annotated or written; the message names the file, its line and the cure."""


@dataclass(frozen=True)
class Source:
    """A file as it was read.

    `text` has the file's own line endings and no byte order mark: the encoding "utf-8-sig" writes that again.
    """

    path: Path
    text: str
    encoding: str
    data: bytes


@contextmanager
def not_too_deep(name: str) -> Iterator[None]:
    """Whatever walks a module's tree by recursion, in Python's parser or after it, stops with a SourceError."""
    try:
        yield
    except (RecursionError, MemoryError):
        raise SourceError(f"{name}: is nested too deeply for Python; split its longest expression") from None


def parse(text: str, name: str = "the module") -> ast.Module:
    """A module's syntax tree.

    Raises:
        SourceError: if the text does not parse; names the line.
    """
    with not_too_deep(name), warnings.catch_warnings():
        # a strange escape in somebody's string is not ours to report
        warnings.simplefilter("ignore")
        try:
            return ast.parse(text)
        except SyntaxError as error:
            # without a line it is about the module as a whole, such as one with null bytes
            line = f", line {error.lineno}" if error.lineno else ""
            raise SourceError(
                f"{name}{line}: is not Python {platform.python_version()}: {error.msg}; mend it there, or use the "
                "Python that the file is written for"
            ) from None
        except ValueError as error:
            raise SourceError(f"{name}: is not Python: {error}; must be text") from None


def source_of(text: str, name: str = "module.py") -> Source:
    """A module that is no file, such as one that was pasted.

    Args:
        text: the module.
        name: what errors and the diff call it.

    Raises:
        SourceError: if it is empty, has a character that no file has, or does not parse.
    """
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        line = text.count("\n", 0, error.start) + 1
        raise SourceError(f"{name}, line {line}: UTF-8 has no {text[error.start]!r}; must be text") from None
    source = Source(Path(name), text, "utf-8", data)
    _check(source)
    return source


def _check(source: Source) -> None:
    if not source.text.strip():
        raise SourceError(f"{source.path}: is empty; must be a module with at least one function")
    parse(source.text, str(source.path))


def read_source(path: str | os.PathLike[str]) -> Source:
    """Read a Python file in the encoding that it declares.

    Raises:
        SourceError: if it is missing, empty, in another encoding than it declares, or does not parse.
    """
    path = Path(path)
    if not path.is_file():
        raise SourceError(f"{path}: is not a file; must be the path of a Python module")
    data = path.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(BytesIO(data).readline)
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SourceError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not {error.encoding}; save the file as UTF-8, or "
            "declare its encoding in the first line, such as `# -*- coding: latin-1 -*-`"
        ) from None
    except (SyntaxError, LookupError, UnicodeError) as error:
        # detect_encoding decodes the first two lines, and reports what is wrong there as a SyntaxError
        raise SourceError(
            f"{path}, line 1: has no encoding that Python reads: {error}; save the file as UTF-8, or declare its "
            "encoding in the first line, such as `# -*- coding: latin-1 -*-`"
        ) from None
    source = Source(path, text, encoding, data)
    if text.encode(encoding) != data:
        raise SourceError(f"{path}: {encoding} would write other bytes than were read; save the file as UTF-8")
    _check(source)
    return source


def _encoded(source: Source, text: str) -> bytes:
    """A text as the file's bytes.

    Raises:
        SourceError: if the encoding lacks a character of the text.
    """
    try:
        return text.encode(source.encoding)
    except UnicodeEncodeError as error:
        line = text.count("\n", 0, error.start) + 1
        raise SourceError(
            f"{source.path}, line {line}: {source.encoding} has no {text[error.start]!r}; save the file as UTF-8"
        ) from None


def write_source(source: Source, text: str) -> None:
    """Replace a file's text in one step: at no time is there half a file under its name. Mode bits and symbolic links
    stay.

    Raises:
        SourceError: if the encoding lacks a character of the text, the file is read-only, or it is not what was read.
    """
    data = _encoded(source, text)
    # a link's target is replaced, not the link
    path = source.path.resolve()
    # a rename would not ask
    if not os.access(path, os.W_OK):
        raise SourceError(f"{source.path}: must not be written; make it writable first")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, name)
        if path.read_bytes() != source.data:
            raise SourceError(f"{source.path}: has changed since it was read; run again on what it is now")
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def lines_of(text: str) -> list[str]:
    """A text's lines with their ends, as Python counts lines."""
    return LINE.findall(text)


def unified_diff(before: str, after: str, name: str) -> str:
    """The difference in the form that `patch` reads, for which lines end with a line feed; empty if there is none."""
    lines = difflib.unified_diff(PATCH_LINE.findall(before), PATCH_LINE.findall(after), f"a/{name}", f"b/{name}")
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def patch_of(source: Source, text: str, name: str) -> bytes:
    """The difference between a file and a new text of it in the bytes of that file, to which `patch` applies it: in
    its encoding, with its byte order mark; empty if there is none.

    Raises:
        SourceError: if the encoding lacks a character of the text.
    """
    # names the line of the text, which the difference does not know
    _encoded(source, text)
    mark, encoding = ("\ufeff", "utf-8") if source.encoding == "utf-8-sig" else ("", source.encoding)
    difference = unified_diff(mark + source.text, mark + text, name)
    head = f"--- a/{name}\n+++ b/{name}\n"
    # the file's name is the system's
    return os.fsencode(difference[: len(head)]) + difference[len(head) :].encode(encoding)
