r"""Pre-train CoLT5 with UL2's mixture of denoisers, or with T5's span corruption, on streamed text.

    python examples/pretrain.py --size base --tokenizer_name my-tokenizer --train_files corpus/*.txt \
        --output_dir out --max_steps 10000

Documents are read one at a time, joined, and cut so that every input is full: no token is spent on padding.
A folder of .txt and .pdf files may stand for the files in it.
All options of `TrainingArguments` work; `--resume_from_checkpoint true` continues an interrupted run where it stopped.
"""

import glob
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from data import KINDS, check_files, ends, file_kind, open_text, read_document, read_pdf, table_suffix, text_files
from datasets import load_dataset
from model_arguments import (
    ModelArguments,
    RouterArguments,
    check_model,
    load_model,
    load_tokenizer,
    parse_arguments,
    watch_routers,
)
from run_costs import RowShape, decide_costs
from run_record import run
from sources import check_dataset_config, check_least
from training_defaults import TimeLeft, TrainingDefaults, run_script
from transformers import AutoModelForSeq2SeqLM, Trainer, TrainingArguments, set_seed

from modeling_colt5.denoising import (
    ChunkedDocuments,
    DataCollatorForDenoising,
    MixtureOfDenoisers,
    SpanCorruption,
    chunk_documents,
)
from modeling_colt5.dense_start import ShortenDenoising


@dataclass
class CorpusArguments:
    """The text, and how it is corrupted."""

    train_files: list[str] = field(
        default_factory=list,
        metadata={
            "help": "text files and PDFs, a document each, and folders of them, or JSON lines, CSV or Parquet, a "
            "document a row; also .gz"
        },
    )
    validation_files: list[str] = field(
        default_factory=list, metadata={"help": "files of the same kind to evaluate on"}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "a dataset of the Hub, or a folder of its form, instead; it is streamed"}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "the Hub dataset's configuration"})
    text_column: str = field(default="text", metadata={"help": "the column of text, where there are columns"})
    objective: Literal["ul2", "span_corruption"] = field(
        default="ul2", metadata={"help": "UL2's mixture of denoisers, or T5's span corruption"}
    )
    input_length: int = field(default=4096, metadata={"help": "tokens of every input"})
    target_length: int = field(default=910, metadata={"help": "tokens of every target at most"})
    max_eval_chunks: int = field(default=64, metadata={"help": "evaluate on so many inputs"})

    def __post_init__(self) -> None:
        check_least(1, max_eval_chunks=self.max_eval_chunks)
        check_dataset_config(self.dataset_name, self.dataset_config_name)


@dataclass
class RunArguments(TrainingDefaults, TrainingArguments):
    """Trainer's arguments, with the defaults of these scripts."""

    # inputs are shorter than the documents of fine-tuning
    per_device_train_batch_size: int = field(default=8, metadata={"help": "rows of a pass on each device"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "passes of a step"})


class TextFiles(Iterable[str]):
    """Text files and PDFs, read when their turn comes, and as often as asked for."""

    def __init__(self, names: list[str]):
        self.names = names

    def __iter__(self) -> Iterator[str]:
        for name in self.names:
            yield read_document(Path(name))


def with_folders(names: list[str]) -> list[str]:
    """The names, each folder replaced by the text files in it.

    Raises:
        ValueError: for a folder without text files.
    """
    found = []
    for name in names:
        found += map(str, text_files(Path(name))) if Path(name).is_dir() else [name]
    return found


def load_documents(arguments: CorpusArguments) -> tuple[Iterable[Any], Iterable[Any] | None]:
    """The documents to train on, and those to evaluate on.

    Raises:
        ImportError: for a PDF, without pypdf.
        ValueError: without documents, with two sources of them, for a file that is missing or empty, or is not packed
            as its name says, a PDF without text, for files of several kinds, or for a dataset without a split "train"
            or without the column of text.
    """
    if arguments.dataset_name is not None and (arguments.train_files or arguments.validation_files):
        raise ValueError(
            "give either --dataset_name, whose split validation is evaluated on, or --train_files and "
            "--validation_files"
        )
    if arguments.dataset_name is None and not arguments.train_files:
        raise ValueError("give either --dataset_name or --train_files")
    if arguments.dataset_name is not None:
        streams = load_dataset(arguments.dataset_name, arguments.dataset_config_name, streaming=True)
        if "train" not in streams:
            raise ValueError(f"{arguments.dataset_name} has no split train; it has {', '.join(streams)}")
    else:
        files = {"train": arguments.train_files, "validation": arguments.validation_files}
        files = {split: with_folders(names) for split, names in files.items() if names}
        names = sum(files.values(), [])
        if not any(table_suffix(name) in KINDS for name in names):
            check_files(names)
            for name in names:
                if ends(name, ".pdf"):
                    # one without text is found now, and not when its turn comes
                    read_pdf(Path(name))
                elif ends(name, ".gz"):
                    # likewise one that is not packed
                    open_text(name).close()
            return TextFiles(files["train"]), TextFiles(files["validation"]) if "validation" in files else None
        # the shell has filled patterns in, and a name is none
        escaped = {split: [glob.escape(name) for name in names] for split, names in files.items()}
        streams = load_dataset(file_kind(names), data_files=escaped, streaming=True)
    columns = streams["train"].column_names
    if columns is not None and arguments.text_column not in columns:
        raise ValueError(f"text_column is {arguments.text_column!r}; the columns are {', '.join(columns)}")
    return streams["train"], streams.get("validation")


def check_text(documents: Iterable[Any], split: str, text_column: str) -> None:
    """Refuse documents of which none has text; reads up to the first that has.

    Args:
        documents: texts, or rows with `text_column`.
        split: theirs, for the message.
        text_column: where a row has its text.

    Raises:
        ValueError: also for a row before that with something else in the place of text.
    """
    for number, document in enumerate(documents):
        text = document if isinstance(document, str) else document[text_column]
        if not isinstance(text, str):
            raise ValueError(f"{split}: row {number}: {text_column} is {type(text).__name__}, must be str")
        if text.strip():
            return
    raise ValueError(f"{split} has no text: all of its documents are blank")


def prepare(argv: list[str] | None = None) -> Callable[[], dict[str, float]]:
    """Check the corpus, load the model; gives what trains, evaluates and saves."""
    kinds = (ModelArguments, RouterArguments, CorpusArguments, RunArguments)
    model_arguments, routers, corpus, training = parse_arguments(kinds, __doc__, argv)
    if training.max_steps <= 0:
        raise ValueError(f"max_steps is {training.max_steps}; a stream has no epochs: it must be above 0")
    check_model(model_arguments)
    set_seed(training.seed)
    # the collator makes the labels out of the chunks' only column, and needs no splitting among processes
    training.remove_unused_columns = False

    documents, held_out = load_documents(corpus)
    check_text(documents, "train", corpus.text_column)
    if held_out is not None:
        check_text(held_out, "validation", corpus.text_column)
    # UL2's denoisers need their tokens, which fit into the spare rows of T5's embedding
    mode_tokens = {"mode_tokens": True} if corpus.objective == "ul2" else {}
    tokenizer = load_tokenizer(model_arguments, **mode_tokens)
    model = load_model(model_arguments, AutoModelForSeq2SeqLM, tokenizer)
    collator = DataCollatorForDenoising(
        tokenizer,
        corpus.input_length,
        corpus.target_length,
        MixtureOfDenoisers() if corpus.objective == "ul2" else SpanCorruption(),
        seed=training.seed,
    )
    # workers take turns by batches: their number changes nothing
    batch_size = training.per_device_train_batch_size
    train_dataset = ChunkedDocuments(
        documents, collator, text_column=corpus.text_column, repeat=True, batch_size=batch_size
    )
    eval_dataset = None
    if held_out is not None:
        chunks = chunk_documents(held_out, collator, text_column=corpus.text_column)
        eval_dataset = [chunk for _, chunk in zip(range(corpus.max_eval_chunks), chunks, strict=False)]
    # the last model has seen the most text
    training.decide_evaluation(eval_dataset is not None, keep_best=False)
    optimizer = training.make_optimizer(model, is_new=model_arguments.size is not None)
    trainer = Trainer(
        model,
        training,
        optimizers=(optimizer, None),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[TimeLeft()],
    )
    shorten = ShortenDenoising(collator.sentinels, collator.mode_ids)
    dense_start = watch_routers(trainer, routers, corpus.input_length, shorten)
    count = len(with_folders(corpus.train_files))
    data = corpus.dataset_name or ("1 file" if count == 1 else f"{count} files")
    start = partial(
        run,
        trainer,
        "pre-training",
        f"{data}, {corpus.objective}, inputs of {corpus.input_length} tokens",
        corpus.dataset_name,
        model_arguments.model_name_or_path,
    )
    return decide_costs(trainer, [RowShape(corpus.input_length, corpus.target_length)], dense_start, start)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate, save; gives the metrics."""
    return prepare(argv)()


if __name__ == "__main__":
    run_script(prepare)
