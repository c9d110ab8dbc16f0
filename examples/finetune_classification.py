"""Fine-tune CoLT5 to classify long documents.

    python examples/finetune_classification.py --model_name_or_path my-colt5 --train_file train.jsonl \
        --validation_file validation.jsonl --text_column text --label_column label --output_dir out

Labels are whole numbers or names. All options of `TrainingArguments` work.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

from data import DataArguments, check_rows, describe, load_rows
from model_arguments import ModelArguments, load_model, load_tokenizer, save_whole, with_lora
from run_record import finish
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
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
    parser = HfArgumentParser((ModelArguments, TaskArguments, TrainingArguments), description=__doc__)
    model_arguments, task, training = parser.parse_args_into_dataclasses(argv)
    set_seed(training.seed)

    rows = load_rows(task)
    parts = list(rows.values())
    kind = type(parts[0][0].get(task.label_column)) if len(parts[0]) else str
    for split, part in rows.items():
        check_rows(part, split, {task.text_column: str, task.label_column: kind if kind in (int, str) else str})
    names = sorted({label for part in parts for label in part[task.label_column]})
    numbers = {name: number for number, name in enumerate(names)}

    tokenizer = load_tokenizer(model_arguments)
    model = load_model(
        model_arguments,
        AutoModelForSequenceClassification,
        tokenizer,
        id2label={number: str(name) for name, number in numbers.items()},
        label2id={str(name): number for name, number in numbers.items()},
    )
    model = with_lora(model, model_arguments, "SEQ_CLS", ["classification_head"])

    def tokenize(batch: dict[str, list[Any]]) -> Any:
        inputs = tokenizer(batch[task.text_column], max_length=task.max_length, truncation=True)
        inputs["labels"] = [numbers[label] for label in batch[task.label_column]]
        return inputs

    with training.main_process_first(desc="tokenization"):
        tokenized = rows.map(tokenize, batched=True, remove_columns=parts[0].column_names)
    trainer = Trainer(
        model,
        training,
        train_dataset=tokenized.get("train"),
        eval_dataset=tokenized.get("validation"),
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=task.pad_to_multiple_of),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    result: dict[str, float] = {}
    if "train" in tokenized:
        result |= trainer.train(resume_from_checkpoint=training.resume_from_checkpoint).metrics
        save_whole(trainer)
    if "validation" in tokenized:
        result |= trainer.evaluate()
    finish(
        trainer, result, "text classification", describe(task), task.dataset_name, model_arguments.model_name_or_path
    )
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
