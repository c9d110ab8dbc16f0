r"""Fine-tune CoLT5 to classify long documents.

    python examples/finetune_classification.py --model_name_or_path my-colt5 --train_file train.jsonl \
        --validation_file validation.jsonl --text_column text --label_column label --output_dir out

Labels are whole numbers or names. All options of `TrainingArguments` work.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

from data import DataArguments, check_rows, describe, load_rows, map_rows, number_labels
from model_arguments import (
    FineTunedModelArguments,
    RouterArguments,
    load_model,
    load_tokenizer,
    parse_arguments,
    watch_routers,
    with_lora,
)
from run_record import known_labels, run
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)


@dataclass
class TaskArguments(DataArguments):
    """Columns and lengths."""

    text_column: str = field(default="text", metadata={"help": "the column of the document"})
    label_column: str = field(default="label", metadata={"help": "the column of the label"})
    max_length: int = field(default=16_384, metadata={"help": "tokens of input at most"})
    pad_to_multiple_of: int | None = field(default=128, metadata={"help": "pad batches to a multiple of this"})


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of documents with the right label."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Check the rows, train, evaluate, save; gives the metrics."""
    kinds = (FineTunedModelArguments, RouterArguments, TaskArguments, TrainingArguments)
    model_arguments, routers, task, training = parse_arguments(kinds, __doc__, argv)
    set_seed(training.seed)

    rows = load_rows(task)
    # the first label says whether labels are numbers or names
    first = next((part[0].get(task.label_column) for part in rows.values() if len(part)), None)
    kind = int if type(first) is int else str
    for split, part in rows.items():
        check_rows(part, split, {task.text_column: str, task.label_column: kind})
    numbers = number_labels(rows, task.label_column, known_labels(model_arguments.model_name_or_path))

    tokenizer = load_tokenizer(model_arguments)
    model = load_model(
        model_arguments,
        AutoModelForSequenceClassification,
        tokenizer,
        id2label={number: name for name, number in numbers.items()},
        label2id=numbers,
    )
    model = with_lora(model, model_arguments, "SEQ_CLS", ["classification_head"])

    def tokenize(batch: dict[str, list[Any]]) -> Any:
        inputs = tokenizer(batch[task.text_column], max_length=task.max_length, truncation=True)
        inputs["labels"] = [numbers[str(label)] for label in batch[task.label_column]]
        return inputs

    tokenized = map_rows(rows, tokenize, training)
    trainer = Trainer(
        model,
        training,
        train_dataset=tokenized.get("train"),
        eval_dataset=tokenized.get("validation"),
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=task.pad_to_multiple_of),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    watch_routers(trainer, routers, task.max_length)
    return run(trainer, "text classification", describe(task), task.dataset_name, model_arguments.model_name_or_path)


if __name__ == "__main__":
    main(sys.argv[1:])
