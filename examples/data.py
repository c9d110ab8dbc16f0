"""Rows for the fine-tuning scripts: loaded, checked by number before any work, their labels numbered, tokenized."""

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from datasets import Dataset, DatasetDict, load_dataset
from transformers import TrainingArguments

# what `datasets` calls a file's kind
KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class DataArguments:
    """Where the rows come from."""

    train_file: str | None = field(default=None, metadata={"help": "a JSON lines (also .gz), CSV or Parquet file"})
    validation_file: str | None = field(default=None, metadata={"help": "rows for evaluation, likewise"})
    dataset_name: str | None = field(
        default=None, metadata={"help": "a dataset of the Hub, or a folder of its form, instead of files"}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "the Hub dataset's configuration"})
    max_train_samples: int | None = field(default=None, metadata={"help": "use the first so many training rows"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "use the first so many evaluation rows"})


def check_files(files: list[str]) -> None:
    """Refuse files that cannot be read.

    Raises:
        ValueError: for a file that is missing or empty.
    """
    for file in files:
        if not Path(file).is_file() or not Path(file).stat().st_size:
            raise ValueError(f"{file} is missing or empty")


def file_kind(files: list[str]) -> str:
    """What `datasets` calls the files' kind, by the ends of their names.

    Raises:
        ValueError: for a file that is missing or empty, or files of several or unknown kinds.
    """
    check_files(files)
    suffixes = sorted({Path(file.removesuffix(".gz")).suffix for file in files})
    if len(suffixes) != 1 or suffixes[0] not in KINDS:
        raise ValueError(f"files end in {', '.join(suffixes)}; they must all end in one of {', '.join(KINDS)}")
    return KINDS[suffixes[0]]


def open_text(file: str) -> IO[str]:
    """A text file, packed by gzip or not; what is not UTF-8 becomes U+FFFD."""
    if file.endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8", errors="replace")
    return open(file, encoding="utf-8", errors="replace")


def check_json_lines(file: str) -> None:
    """Refuse a file whose lines are not one JSON object each: `datasets` would not say which line it is.

    Raises:
        ValueError: naming the file and the row; the first is 0.
    """
    with open_text(file) as lines:
        for number, line in enumerate(lines):
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}: row {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{file}: row {number} is {type(row).__name__}, must be an object with columns")


def load_rows(arguments: DataArguments) -> DatasetDict:
    """The splits "train" and "validation", as far as they are given.

    Raises:
        ValueError: without a source, with two, for a file that is missing, empty, broken or of another kind, for a
            dataset with neither split, or for a limit below 1.
    """
    files = {"train": arguments.train_file, "validation": arguments.validation_file}
    files = {split: file for split, file in files.items() if file is not None}
    if (arguments.dataset_name is None) == (not files):
        raise ValueError("give either --dataset_name, or --train_file and/or --validation_file")
    limits = {"train": arguments.max_train_samples, "validation": arguments.max_eval_samples}
    for limit in limits.values():
        if limit is not None and limit < 1:
            raise ValueError(f"max_train_samples and max_eval_samples must be at least 1, one is {limit}")
    if arguments.dataset_name is not None:
        dataset = load_dataset(arguments.dataset_name, arguments.dataset_config_name)
    else:
        kind = file_kind(list(files.values()))
        for file in files.values():
            if file.removesuffix(".gz").endswith(".jsonl"):
                check_json_lines(file)
        dataset = load_dataset(kind, data_files=files)
    if not limits.keys() & dataset.keys():
        raise ValueError(f"{arguments.dataset_name} has no split train or validation; it has {', '.join(dataset)}")
    return DatasetDict(
        {
            split: rows.select(range(min(limits[split] or len(rows), len(rows))))
            for split, rows in dataset.items()
            if split in limits
        }
    )


def check_rows(rows: Dataset, split: str, columns: dict[str, type]) -> None:
    """Refuse rows that would fail, or teach nothing, in the middle of training.

    Args:
        rows: the rows of one split.
        split: its name, for the message.
        columns: what each column must hold: `str` (not empty), `int`, or `list` (not empty).

    Raises:
        ValueError: naming the split, the first ten bad rows by number (the first is 0), and what is wrong with each.
    """
    missing = columns.keys() - set(rows.column_names)
    if missing:
        raise ValueError(
            f"{split} has no column {', '.join(sorted(missing))}; its columns are {', '.join(rows.column_names)}"
        )
    if not len(rows):
        raise ValueError(f"{split} has no rows")
    problems = []
    for name, kind in columns.items():
        for number, value in enumerate(rows[name]):
            if not isinstance(value, kind) or isinstance(value, bool):
                problems.append((number, f"{name} is {type(value).__name__}, must be {kind.__name__}"))
            elif kind is not int and not (value.strip() if kind is str else value):
                problems.append((number, f"{name} is empty"))
    if problems:
        more = f"\n... and {len(problems) - 10} more" if len(problems) > 10 else ""
        lines = [f"row {number}: {problem}" for number, problem in sorted(problems)[:10]]
        raise ValueError(f"{split} has bad rows:\n" + "\n".join(lines) + more)


def labels_of(rows: Dataset, column: str) -> Iterator[tuple[int, Any]]:
    """Each row's number with its label, or with each of its list of labels."""
    for number, value in enumerate(rows[column]):
        for label in value if isinstance(value, list) else [value]:
            yield number, label


def number_labels(rows: DatasetDict, column: str, known: Mapping[str, int] | None) -> dict[str, int]:
    """The labels' names, each with its number: what the training rows hold, in order.

    Args:
        rows: the checked splits.
        column: where a row has its label, or its list of labels: whole numbers or names.
        known: a checkpoint's labels, which keep their numbers where the training rows hold just those, and which alone
            count where there are no training rows. None for a checkpoint without a head, and for a new model.

    Raises:
        ValueError: for a validation row with a label that is none of these, or validation rows alone without `known`.
    """
    if "train" in rows:
        found = {label for _, label in labels_of(rows["train"], column)}
        # numbers in their own order, "10" not before "2"
        ordered = sorted(found, key=lambda label: (isinstance(label, str), label))
        numbers = {str(label): number for number, label in enumerate(ordered)}
        if known is not None and known.keys() == numbers.keys():
            numbers = dict(known)
    elif known is None:
        raise ValueError(
            "validation rows alone need a model that was fine-tuned: without one their labels mean nothing"
        )
    else:
        numbers = dict(known)
    for number, label in labels_of(rows["validation"], column) if "validation" in rows else ():
        if str(label) not in numbers:
            raise ValueError(
                f"validation: row {number} has the {column} {label!r}, unknown among {', '.join(numbers)}"
            )
    return numbers


def map_rows(
    rows: DatasetDict, tokenize: Callable[[dict[str, list[Any]]], Any], training: TrainingArguments
) -> DatasetDict:
    """Each split tokenized in batches, in the first process alone where there are several; the rest read its cache."""
    with training.main_process_first(desc="tokenization"):
        return DatasetDict(
            {split: part.map(tokenize, batched=True, remove_columns=part.column_names) for split, part in rows.items()}
        )


def describe(arguments: DataArguments) -> str:
    """The data's name for a model card."""
    return arguments.dataset_name or Path(arguments.train_file or arguments.validation_file or "").name
