"""Rows for the fine-tuning scripts: loaded, checked by number before any work, their labels numbered, tokenized."""

import glob
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from run_costs import RowShape
from sources import check_dataset_config, check_least
from transformers import BatchEncoding, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)

# what `datasets` calls a file's kind
KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# a folder's texts
TEXTS = (".txt", ".txt.gz", ".pdf")
# beside a folder's texts: a row for each, with what else belongs to it
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# what Python raises for a gzip file that ends too early, or has something else in it
BROKEN = (EOFError, gzip.BadGzipFile, zlib.error)


@dataclass
class DataArguments:
    """Where the rows come from."""

    train_file: str | None = field(
        default=None,
        metadata={
            "help": "a JSON lines (also .gz), CSV or Parquet file, or a folder of .txt and .pdf files: a document "
            "each, whose label is the folder that it is in, or stands in a metadata.jsonl or .csv beside its file_name"
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "rows for evaluation, likewise"})
    dataset_name: str | None = field(
        default=None, metadata={"help": "a dataset of the Hub, or a folder of its form, instead of files"}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "the Hub dataset's configuration"})
    validation_share: float = field(
        default=0.0, metadata={"help": "without rows for evaluation: hold out this share of the training rows"}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "use the first so many training rows"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "use the first so many evaluation rows"})

    def __post_init__(self) -> None:
        check_least(1, max_train_samples=self.max_train_samples, max_eval_samples=self.max_eval_samples)
        check_dataset_config(self.dataset_name, self.dataset_config_name)


def ends(name: str | Path, *endings: str) -> bool:
    """Whether a file's name ends so, in small letters or capital ones."""
    return str(name).lower().endswith(endings)


def table_suffix(file: str) -> str:
    """What a table's name ends in, without .gz."""
    return Path(file.lower().removesuffix(".gz")).suffix


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
    suffixes = sorted({table_suffix(file) for file in files})
    if len(suffixes) != 1 or suffixes[0] not in KINDS:
        raise ValueError(
            f"files end in {', '.join(suffixes)}; they must all end in one of {', '.join(KINDS)}. "
            f"Texts and PDFs are given as the folder that they are in"
        )
    return KINDS[suffixes[0]]


def open_text(file: str, errors: str = "replace") -> IO[str]:
    """A text file, packed by gzip or not; what is not UTF-8 becomes U+FFFD, or what Python's `errors` says.

    Raises:
        ValueError: for a file that ends in .gz and is not packed.
    """
    if ends(file, ".gz"):
        with open(file, "rb") as packed:
            if packed.read(2) != b"\x1f\x8b":
                raise ValueError(f"{file} is not packed by gzip; its name must not end in .gz")
        return gzip.open(file, "rt", encoding="utf-8", errors=errors)
    return open(file, encoding="utf-8", errors=errors)


def read_pdf(path: Path) -> str:
    """The text of a PDF, page after page.

    Raises:
        ImportError: without pypdf.
        ValueError: for a file that cannot be read, or has no text.
    """
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError:
        raise ImportError(f"reading {path} needs pypdf: pip install pypdf") from None
    try:
        pages = [page.extract_text().strip() for page in PdfReader(path).pages]
    except PyPdfError as error:
        raise ValueError(f"{path} cannot be read as a PDF: {error}") from None
    empty = [number for number, text in enumerate(pages, 1) if not text]
    if len(empty) == len(pages):
        raise ValueError(
            f"{path} has no text on its {len(pages)} pages. Pages that are pictures, as a scanner makes them, need "
            "text recognition (OCR) first"
        )
    if empty:
        logger.warning(f"{path}: {len(empty)} of {len(pages)} pages have no text, the first is page {empty[0]}")
    return "\n".join(filter(None, pages))


def read_document(path: Path) -> str:
    """The text of a file: of a PDF, or of a text file, packed by gzip or not.

    Raises:
        ValueError: for a broken gzip file, or what `read_pdf` raises it for.
    """
    if ends(path, ".pdf"):
        return read_pdf(path)
    try:
        with open_text(str(path)) as file:
            return file.read()
    except BROKEN as error:
        raise ValueError(f"{path} cannot be unpacked: {error}") from None


def check_encoding(file: str) -> None:
    """Refuse JSON that is not UTF-8: `datasets` would notice at the first use of such a row.

    Raises:
        ValueError: naming the file and the line; the first is 1.
    """
    with open_text(file, "surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{file}, line {number} is not UTF-8; save the file as UTF-8") from None


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


def text_files(folder: Path) -> list[Path]:
    """A folder's .txt files, packed by gzip or not, and .pdf files, with those of the folders in it, in the order of
    their names.

    Raises:
        ValueError: for a folder without any.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and ends(path, *TEXTS))
    # a Mac leaves ._1.txt beside 1.txt on other disks, with no text in it
    files = [path for path in files if not path.name.startswith(".")]
    if not files:
        others = sorted({path.suffix for path in folder.rglob("*") if path.is_file()})
        found = f"; it has files that end in {', '.join(others)}" if others else ", nor any other file"
        raise ValueError(f"{folder} has no .txt or .pdf files{found}")
    return files


def load_folder(folder: Path, text_column: str) -> Dataset:
    """The rows of a folder of texts: `text_column`, `file_name`, the columns of its metadata file, and without such a
    column `label`, the folder that a text is in, where all are in one.

    Raises:
        ImportError: for a PDF, without pypdf.
        ValueError: for a folder without texts, a PDF without text, a text without a row of metadata, or a row without
            its text.
    """
    files = text_files(folder)
    names = [path.relative_to(folder).as_posix() for path in files]
    columns = {text_column: [read_document(path) for path in files], "file_name": names}
    metadata = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if metadata is not None:
        table = load_table(str(metadata), file_kind([str(metadata)]))
        if "file_name" not in table.column_names:
            raise ValueError(f"{metadata} has no column file_name; its columns are {', '.join(table.column_names)}")
        places = {name: number for number, name in enumerate(table["file_name"])}
        for missing, where in ((set(names) - set(places), metadata), (set(places) - set(names), folder)):
            if missing:
                raise ValueError(f"{where} has no {sorted(missing)[0]} ({len(missing)} of {len(files)} texts)")
        order = [places[name] for name in names]
        more = table.select(order).to_dict()
        columns |= {name: values for name, values in more.items() if name not in columns}
    if "label" not in columns and all("/" in name for name in names):
        columns["label"] = [Path(name).parent.as_posix() for name in names]
    return Dataset.from_dict(columns)


def load_table(file: str, kind: str) -> Dataset:
    """The rows of a JSON, CSV or Parquet file.

    Raises:
        ValueError: for a broken file, or one without rows; says what is wrong there.
    """
    try:
        if kind == "json":
            check_encoding(file)
        if table_suffix(file) == ".jsonl":
            check_json_lines(file)
    except BROKEN as error:
        raise ValueError(f"{file} cannot be unpacked: {error}") from None
    try:
        # a name is no pattern: "rows [1].jsonl" would be looked for as "rows 1.jsonl"
        return load_dataset(kind, data_files=glob.escape(file), split="train")
    except (DatasetGenerationError, ValueError) as error:
        # the first cause is what the file's reader says
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        first, *_ = str(cause).splitlines() or [type(cause).__name__]
        raise ValueError(f"{file} cannot be read as {kind}: {first}") from None


def load_rows(arguments: DataArguments, text_column: str = "text") -> DatasetDict:
    """The splits "train" and "validation", as far as they are given.

    Args:
        arguments: where they are.
        text_column: what the column of a folder's texts is called.

    Raises:
        ValueError: without a source, with two, for a file that is missing, empty, broken or of another kind, for a
            folder without texts or beside a file, or for a dataset with neither split.
    """
    files = {"train": arguments.train_file, "validation": arguments.validation_file}
    files = {split: file for split, file in files.items() if file is not None}
    if (arguments.dataset_name is None) == (not files):
        raise ValueError("give either --dataset_name, or --train_file and/or --validation_file")
    limits = {"train": arguments.max_train_samples, "validation": arguments.max_eval_samples}
    folders = [file for file in files.values() if Path(file).is_dir()]
    if arguments.dataset_name is not None:
        dataset = load_dataset(arguments.dataset_name, arguments.dataset_config_name)
    elif folders:
        if len(folders) < len(files):
            raise ValueError(f"{folders[0]} is a folder: give folders for training and validation, or files for both")
        dataset = DatasetDict({split: load_folder(Path(folder), text_column) for split, folder in files.items()})
    else:
        kind = file_kind(list(files.values()))
        # each on its own: together, columns that one of them lacks, or has in another type, would be an error
        dataset = DatasetDict({split: load_table(file, kind) for split, file in files.items()})
    if not limits.keys() & dataset.keys():
        raise ValueError(f"{arguments.dataset_name} has no split train or validation; it has {', '.join(dataset)}")
    return DatasetDict(
        {
            split: rows.select(range(min(limits[split] or len(rows), len(rows))))
            for split, rows in dataset.items()
            if split in limits
        }
    )


def hold_out(rows: DatasetDict, share: float) -> DatasetDict:
    """The splits, with some of the training rows as "validation": the same for every run. Called once rows and labels
    are checked, so that errors name a row by its number in the file, and a rare label that is held out has its number.

    Args:
        rows: the splits.
        share: of the training rows; 0 for none, which says so where nothing is evaluated.

    Raises:
        ValueError: for a share outside of 0 to 1, where there are validation rows, or none to train on.
    """
    if not 0 <= share < 1:
        raise ValueError(f"validation_share is {share}; it must be at least 0 and below 1")
    if not share:
        if "validation" not in rows:
            logger.warning(
                "No rows for evaluation: nothing is evaluated, and the last model is kept. --validation_file gives "
                "some, --validation_share 0.1 holds a tenth of the training rows out"
            )
        return rows
    if "validation" in rows or "train" not in rows:
        raise ValueError("validation_share holds out training rows: leave it out where validation rows are given")
    count = len(rows["train"])
    held_out = math.ceil(share * count)
    if held_out == count:
        raise ValueError(
            f"validation_share is {share}, which holds out all of the {count} training rows; lower it, or "
            "give more rows"
        )
    parts = rows["train"].train_test_split(held_out, seed=0)
    return DatasetDict({"train": parts["train"], "validation": parts["test"]})


def refuse(split: str, problems: list[tuple[int, str]]) -> None:
    """Raise for rows with problems, naming the first ten.

    Raises:
        ValueError: where there are any.
    """
    if problems:
        more = f"\n... and {len(problems) - 10} more" if len(problems) > 10 else ""
        lines = [f"row {number}: {problem}" for number, problem in sorted(problems)[:10]]
        raise ValueError(f"{split} has bad rows:\n" + "\n".join(lines) + more)


def check_rows(rows: Dataset, split: str, columns: dict[str, type]) -> None:
    """Refuse rows that would fail, or teach nothing, in the middle of training.

    Args:
        rows: the rows of one split.
        split: its name, for the message.
        columns: what each column must hold: `str` (not empty), `int`, `list` (not empty), or `object` for anything.

    Raises:
        ValueError: naming the split, the first ten bad rows by number (the first is 0), and what is wrong with each.
    """
    missing = columns.keys() - set(rows.column_names)
    if missing:
        raise ValueError(
            f"{split} has no column {', '.join(sorted(missing))}; its columns are {', '.join(rows.column_names)}. "
            "The options that end in _column name them"
        )
    if not len(rows):
        raise ValueError(f"{split} has no rows")
    problems = []
    for name, kind in columns.items():
        for number, value in enumerate(rows[name] if kind is not object else ()):
            if not isinstance(value, kind) or isinstance(value, bool):
                problems.append((number, f"{name} is {type(value).__name__}, must be {kind.__name__}"))
            elif kind is not int and not (value.strip() if kind is str else value):
                problems.append((number, f"{name} is empty"))
    refuse(split, problems)


# what a row's label is, as Transformers' configurations name it
SINGLE, SEVERAL, NUMBERS = "single_label_classification", "multi_label_classification", "regression"


def label_kind(rows: DatasetDict, column: str, wanted: str | None) -> str:
    """What the labels are, checked: names, whole numbers or truth values for one class of a row, lists of such for any
    number of classes, other numbers or lists of them for regression.

    Args:
        rows: the splits; each has the column.
        column: of the labels.
        wanted: one of the three kinds, None to tell it by the first label.

    Raises:
        ValueError: naming the split and the rows whose labels are of another kind, or lists of another length.
    """
    first = next((part[0][column] for part in rows.values() if len(part)), None)
    is_list = isinstance(first, list)
    # the first rows of several classes may be empty lists, of which no type is known
    inner = next((label for part in rows.values() for _, label in labels_of(part, column)), None)
    kind = wanted or (NUMBERS if isinstance(inner, float) else SEVERAL if is_list else SINGLE)
    if wanted == SINGLE:
        is_list = False
    # a truth value is a whole number to Python, and no number to regress
    own = next((own for own in (bool, int) if isinstance(inner, own)), str)
    allowed = (int, float) if kind == NUMBERS else (own,)
    name = "float" if kind == NUMBERS else own.__name__
    is_list = is_list or kind == SEVERAL
    for split, part in rows.items():
        problems = []
        for number, label in enumerate(part[column]):
            if isinstance(label, list) != is_list:
                must = f"a list, each of it {name}" if is_list else name
                problems.append((number, f"{column} is {type(label).__name__}, must be {must}"))
                continue
            for value in label if is_list else [label]:
                if not isinstance(value, allowed) or isinstance(value, bool) and bool not in allowed:
                    must = f"each {name}" if is_list else name
                    problems.append((number, f"{column} is {type(value).__name__}, must be {must}"))
                elif isinstance(value, str) and not value.strip():
                    problems.append((number, f"{column} is empty"))
                elif isinstance(value, float) and not math.isfinite(value):
                    problems.append((number, f"{column} is {value}, must be finite"))
            if kind == NUMBERS and is_list and len(label) != len(first):
                problems.append((number, f"{column} has {len(label)} numbers, the first row has {len(first)}"))
        refuse(split, problems)
    return kind


def labels_of(rows: Dataset, column: str) -> Iterator[tuple[int, Any]]:
    """Each row's number with its label, or with each of its list of labels."""
    for number, value in enumerate(rows[column]):
        for label in value if isinstance(value, list) else [value]:
            yield number, label


def number_labels(rows: DatasetDict, column: str, known: Mapping[str, int] | None) -> dict[str, int]:
    """The labels' names, each with its number: what the training rows hold, in order.

    Args:
        rows: the checked splits.
        column: where a row has its label, or its list of labels: whole numbers, names or truth values.
        known: a checkpoint's labels, which keep their numbers where the training rows hold just those, and which alone
            count where there are no training rows. None for a checkpoint without a head, and for a new model.

    Raises:
        ValueError: for a validation row with a label that is none of these, training rows without any, or validation
            rows alone without `known`.
    """
    if "train" in rows:
        found = {label for _, label in labels_of(rows["train"], column)}
        if not found:
            raise ValueError(f"no training row has a label: {column} is an empty list in each")
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


def lost_tokens(inputs: BatchEncoding) -> list[int]:
    """How many tokens of each text its truncation left out; special tokens do not count."""
    return [sum(part.special_tokens_mask.count(0) for part in encoding.overflowing) for encoding in inputs.encodings]


def map_rows(
    rows: DatasetDict, tokenize: Callable[[dict[str, list[Any]]], Any], training: TrainingArguments
) -> DatasetDict:
    """Each split tokenized in batches, in the first process alone where there are several; the rest read its cache.
    Says how much of the texts did not fit.

    Args:
        rows: the checked splits.
        tokenize: gives the model's inputs, and under the name of what was cut, such as "inputs", how many tokens each
            row lost, with "lost_" before it.
        training: the run's arguments.
    """
    with training.main_process_first(desc="tokenization"):
        tokenized = DatasetDict(
            {split: part.map(tokenize, batched=True, remove_columns=part.column_names) for split, part in rows.items()}
        )
    for split, part in tokenized.items():
        for column in [name for name in part.column_names if name.startswith("lost_")]:
            lost = part[column]
            cut = sum(number > 0 for number in lost)
            what = column.removeprefix("lost_")
            if cut and training.process_index == 0:
                kept = sum(map(len, part["labels" if what == "targets" else "input_ids"]))
                logger.warning(
                    f"{split}: {cut:,} of {len(part):,} {what} were cut, and {sum(lost):,} tokens of "
                    f"{kept + sum(lost):,} lost; the longest lost {max(lost):,}"
                )
            tokenized[split] = tokenized[split].remove_columns(column)
    return tokenized


def row_shapes(rows: Dataset | None, has_targets: bool = False) -> list[RowShape]:
    """The lengths of tokenized rows, and those of their targets where they have any; nothing for None."""
    if rows is None:
        return []
    targets = map(len, rows["labels"]) if has_targets else [0] * len(rows)
    return [RowShape(*lengths) for lengths in zip(map(len, rows["input_ids"]), targets, strict=True)]


def describe(arguments: DataArguments) -> str:
    """The data's name for a model card."""
    return arguments.dataset_name or Path(arguments.train_file or arguments.validation_file or "").name
