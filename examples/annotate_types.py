"""Fill in the annotations that a Python module lacks: the whole module is read in one piece, and answered in one pass.

    python examples/annotate_types.py module.py               # prints a diff
    python examples/annotate_types.py module.py --write       # changes the file
    python examples/annotate_types.py module.py --score       # hides the file's own annotations, and counts

The diff goes to stdout, in the form that `patch` reads; the model's probability of each type, and the imports that the
types need, go to stderr. Where the model is not sure and the module itself annotates that name elsewhere, the nearest
such annotation is copied instead, and said to be copied; `--no-copy` leaves that out. The module is not imported. From
a notebook, with examples/ on `sys.path`:

    from annotate_types import annotate, load, read_source
    annotated = annotate(read_source("module.py"), *load("checkpoints/python-types"))
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from python_types.holes import Hole, Needed, choose, fill, holes_of, holes_to_fill, needed_names, passes, possible
from python_types.predict import Prediction, load, predict_all
from python_types.score import copied_by_name, copied_from_nearest, is_copied, nearest_in_module
from python_types.source import Source, SourceError, patch_of, read_source, write_source
from transformers import PreTrainedModel
from transformers.utils import logging

CHECKPOINT = Path(__file__).resolve().parents[1] / "checkpoints/python-types"
# what is hidden at a time by --score
SHARES = (0.3, 1.0)


@dataclass(frozen=True)
class Annotation:
    """A place without an annotation, the model's type for it, None where that is none, and its probability.

    `copied` is the type that the place gets instead, where the module shows it at the same name and the model is not
    sure (`score.is_copied`); else None.
    """

    hole: Hole
    type: str | None
    probability: float
    copied: str | None = None

    def written(self, least_probability: float = 0.0) -> str | None:
        """What is written there; None where nothing is. Only a type of the model needs the probability."""
        if self.copied is not None:
            return self.copied
        return self.type if self.probability >= least_probability else None


@dataclass(frozen=True)
class Annotated:
    """A module with types: its text, what was asked, and the names that the types need."""

    text: str
    annotations: list[Annotation]
    needed: Needed


@dataclass(frozen=True)
class Scored:
    """How many of the hidden types each way gets right."""

    share: float
    hidden: int
    model: int
    tool: int
    by_name: int
    nearest: int


def ask(source: Source, holes: Sequence[Hole], model: PreTrainedModel, tokenizer: Any) -> list[Prediction]:
    """The model's type for each of a module's holes, all in one pass if they are a hundred at most.

    Raises:
        SourceError: if the module has more tokens than the tokenizer's `model_max_length`.
    """
    parts = list(passes(source.text, holes))
    rows = [tokenizer(part.text, verbose=False)["input_ids"] for part in parts]
    most = tokenizer.model_max_length
    if max(map(len, rows)) > most:
        longest = max(map(len, rows))
        raise SourceError(f"{source.path}: has {longest:,} tokens; must have at most {most:,}: split the module")
    answers: dict[int, list[Prediction]] = {}
    for batch in predict_all(model, tokenizer, rows, [len(part.holes) for part in parts]):
        answers |= batch
    return [prediction for number in range(len(parts)) for prediction in answers[number]]


def annotate(
    source: Source, model: PreTrainedModel, tokenizer: Any, least_probability: float = 0.0, is_copying: bool = True
) -> Annotated:
    """Fill in the annotations of parameters and returns that a module lacks.

    Args:
        source: the module, of `read_source`.
        model: in evaluation mode.
        tokenizer: its tokenizer.
        least_probability: less probable types of the model are not written.
        is_copying: whether the module's own annotations are copied where the model is not sure.

    Raises:
        SourceError: if nothing is missing, or the module is too long.
    """
    holes = holes_to_fill(source)
    predictions = ask(source, holes, model, tokenizer)
    given = possible(source.text, holes, [one.type for one in predictions])
    annotations = [
        Annotation(hole, one, sure.probability, copied if is_copied(one, sure.probability, copied) else None)
        for hole, one, sure, copied in zip(
            holes,
            given,
            predictions,
            nearest_in_module(holes, holes_of(source.text)) if is_copying else [None] * len(holes),
            strict=True,
        )
    ]
    types = [annotation.written(least_probability) for annotation in annotations]
    return Annotated(fill(source.text, holes, types), annotations, needed_names(source.text, holes, types))


def score(
    source: Source, model: PreTrainedModel, tokenizer: Any, table: Mapping[str, str], share: float, seed: int = 0
) -> Scored:
    """Hide a share of the annotations that a module has, fill them in, and count the right ones.

    Args:
        source: the module, of `read_source`.
        model: in evaluation mode.
        tokenizer: its tokenizer.
        table: each name's commonest type in other modules, for the baselines; may be empty.
        share: of the annotations.
        seed: of their choice.

    Raises:
        SourceError: if the module has no annotation, or is too long.
    """
    holes = holes_of(source.text, str(source.path))
    chosen = choose(holes, seed, share)
    if not chosen:
        raise SourceError(f"{source.path}: has no annotation to hide; must have some, or be read without --score")
    predictions = ask(source, chosen, model, tokenizer)
    given = [one.type for one in predictions]
    tool = [
        copied if is_copied(one.type, one.probability, copied) else one.type
        for one, copied in zip(predictions, nearest_in_module(chosen, holes), strict=True)
    ]

    def right(types: Sequence[str | None]) -> int:
        return sum(one == hole.annotation for one, hole in zip(types, chosen, strict=True))

    by_name, nearest = copied_by_name(chosen, holes, table), copied_from_nearest(chosen, holes, table)
    return Scored(share, len(chosen), right(given), right(tool), right(by_name), right(nearest))


def report(annotated: Annotated, least_probability: float) -> str:
    """What was found for each place, and what the types need."""
    lines = []
    for annotation in annotated.annotations:
        hole, probability = annotation.hole, f"{annotation.probability:4.0%}"
        what = f"line {hole.line}: {hole.function}" + ("" if hole.is_return else f", {hole.key}")
        if annotation.copied is not None:
            model = "no type" if annotation.type is None else f"{annotation.type}, {annotation.probability:.0%}"
            lines.append(f"copied  {what}: {annotation.copied} (the model: {model})")
        elif annotation.type is None:
            lines.append(f"{probability}  {what}: left, for the answer is no type")
        elif annotation.probability < least_probability:
            lines.append(f"{probability}  {what}: left, {annotation.type} is not probable enough")
        else:
            lines.append(f"{probability}  {what}: {annotation.type}")
    needed = annotated.needed
    if needed.imports:
        lines.append(f"to be imported: {', '.join(needed.imports)}")
    if needed.early:
        names = ", ".join(needed.early)
        lines.append(f"used before they are there: {names}; put `from __future__ import annotations` first")
    if needed.inner:
        lines.append(f"known by these names alone, and by none inside a function: {', '.join(needed.inner)}")
    return "\n".join(lines)


def baselines_of(model: str) -> dict[str, str]:
    """What the checkpoint's folder knows of each name's commonest type; nothing if it has no such file."""
    file = Path(model) / "baselines.json"
    return json.loads(file.read_text(encoding="utf-8"))["table"] if file.exists() else {}


def run(arguments: argparse.Namespace) -> None:
    """Do what was asked.

    Raises:
        SourceError: for a file that cannot be read, annotated or written.
        OSError: for a model that is not there.
    """
    # before the model, which takes longer
    source = read_source(arguments.file)
    if not arguments.score:
        holes_to_fill(source)
    model, tokenizer = load(arguments.model)
    started = time.perf_counter()
    if arguments.score:
        for share in SHARES:
            scored = score(source, model, tokenizer, baselines_of(arguments.model), share)
            parts = [
                f"{name} {100 * count / scored.hidden:.1f} %"
                for name, count in (
                    ("right", scored.tool),
                    ("the model alone", scored.model),
                    ("copied by name", scored.by_name),
                    ("copied from the nearest of that name", scored.nearest),
                )
            ]
            print(f"{scored.hidden} annotations hidden ({share:.0%}): {', '.join(parts)}")
        return
    annotated = annotate(source, model, tokenizer, arguments.least_probability, not arguments.no_copy)
    if arguments.write:
        write_source(source, annotated.text)
    # bytes, because the terminal's encoding and line ends need not be the file's
    sys.stdout.buffer.write(patch_of(source, annotated.text, str(arguments.file)))
    sys.stdout.flush()
    print(report(annotated, arguments.least_probability), file=sys.stderr)
    print(f"{len(annotated.annotations)} places in {time.perf_counter() - started:.1f} s", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    """Read the arguments; an error is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a Python module")
    parser.add_argument("--model", default=str(CHECKPOINT), help="a checkpoint's folder, or its name on the Hub")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="change the file")
    what.add_argument("--score", action="store_true", help="hide the annotations that are there, and count")
    parser.add_argument(
        "--least-probability", type=float, default=0.0, help="leave types of the model that are less probable"
    )
    parser.add_argument(
        "--no-copy", action="store_true", help="the model's types alone, also where the module annotates that name"
    )
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.least_probability <= 1:
        parser.error(f"--least-probability is {arguments.least_probability}; it must be from 0 to 1")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        first, *_ = str(error).splitlines() or [type(error).__name__]
        sys.exit(f"annotate_types.py: {first}")


if __name__ == "__main__":
    main()
