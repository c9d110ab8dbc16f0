"""Pre-train CoLT5 with UL2's mixture of denoisers, or with T5's span corruption, on streamed text.

    python examples/pretrain.py --size base --tokenizer_name my-tokenizer --train_files corpus/*.txt \
        --output_dir out --max_steps 10000

Documents are read one at a time, joined, and cut so that every input is full: no token is spent on padding.
All options of `TrainingArguments` work; `--resume_from_checkpoint` continues an interrupted run where it stopped.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import load_dataset
from model_arguments import ModelArguments, load_model, load_tokenizer, save_whole
from run_record import finish
from transformers import AutoModelForSeq2SeqLM, HfArgumentParser, Trainer, TrainingArguments, set_seed

from modeling_colt5.denoising import (
    ChunkedDocuments,
    DataCollatorForDenoising,
    MixtureOfDenoisers,
    SpanCorruption,
    chunk_documents,
)


@dataclass
class CorpusArguments:
    """The text, and how it is corrupted."""

    train_files: list[str] = field(default_factory=list, metadata={"help": "text files, a document each"})
    validation_files: list[str] = field(default_factory=list, metadata={"help": "text files to evaluate on"})
    dataset_name: str | None = field(default=None, metadata={"help": "a dataset of the Hub, streamed, instead"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "the Hub dataset's configuration"})
    text_column: str = field(default="text", metadata={"help": "the Hub dataset's column of text"})
    objective: str = field(default="ul2", metadata={"help": "ul2 or span_corruption"})
    input_length: int = field(default=4096, metadata={"help": "tokens of every input"})
    target_length: int = field(default=910, metadata={"help": "tokens of every target at most"})
    max_eval_chunks: int = field(default=64, metadata={"help": "evaluate on so many inputs"})


class TextFiles(Iterable[str]):
    """Text files, read when their turn comes, and as often as asked for."""

    def __init__(self, names: list[str]):
        self.paths = [Path(name) for name in names]

    def __iter__(self) -> Any:
        for path in self.paths:
            yield path.read_text(encoding="utf-8", errors="replace")


def load_documents(arguments: CorpusArguments) -> tuple[Iterable[Any], Iterable[Any] | None]:
    """The documents to train on, and those to evaluate on.

    Raises:
        ValueError: without documents, with two sources of them, for a file that is missing or empty, or for a
            dataset without the column of text.
    """
    if (arguments.dataset_name is None) == (not arguments.train_files):
        raise ValueError("give either --dataset_name or --train_files")
    if arguments.dataset_name is not None:
        streams = load_dataset(arguments.dataset_name, arguments.dataset_config_name, streaming=True)
        columns = streams["train"].column_names
        if columns is not None and arguments.text_column not in columns:
            raise ValueError(f"text_column is {arguments.text_column!r}; the columns are {', '.join(columns)}")
        return streams["train"], streams.get("validation")
    for name in arguments.train_files + arguments.validation_files:
        if not Path(name).is_file() or not Path(name).stat().st_size:
            raise ValueError(f"{name} is missing or empty")
    return TextFiles(arguments.train_files), TextFiles(arguments.validation_files) or None


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate, save; gives the metrics."""
    parser = HfArgumentParser((ModelArguments, CorpusArguments, TrainingArguments), description=__doc__)
    model_arguments, corpus, training = parser.parse_args_into_dataclasses(argv)
    if training.max_steps <= 0:
        raise ValueError(f"max_steps is {training.max_steps}; a stream has no epochs: it must be above 0")
    if corpus.objective not in ("ul2", "span_corruption"):
        raise ValueError(f"objective is {corpus.objective!r}; it must be 'ul2' or 'span_corruption'")
    set_seed(training.seed)
    # the collator makes the labels out of the chunks' only column, and needs no splitting among processes
    training.remove_unused_columns = False

    documents, held_out = load_documents(corpus)
    tokenizer = load_tokenizer(model_arguments)
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
        eval_dataset = [chunk for _, chunk in zip(range(corpus.max_eval_chunks), chunks, strict=False)] or None
    trainer = Trainer(
        model,
        training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=tokenizer,
    )
    result = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint).metrics
    save_whole(trainer)
    if eval_dataset is not None:
        result |= trainer.evaluate()
    data = corpus.dataset_name or f"{len(corpus.train_files)} text files"
    finish(
        trainer,
        result,
        "pre-training",
        f"{data}, {corpus.objective}, inputs of {corpus.input_length} tokens",
        corpus.dataset_name,
        model_arguments.model_name_or_path,
    )
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
