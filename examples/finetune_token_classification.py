r"""Fine-tune CoLT5 to label the words of long documents.

    python examples/finetune_token_classification.py --model_name_or_path my-colt5 --train_file train.jsonl \
        --validation_file validation.jsonl --words_column tokens --labels_column tags --output_dir out

A row holds a list of words and a list of as many labels: names, whole numbers, or true and false. A word's first token
carries its label, and its others are left out of loss and metrics. All options of `TrainingArguments` work.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from class_metrics import class_scores
from data import (
    DataArguments,
    check_rows,
    describe,
    hold_out,
    load_rows,
    lost_tokens,
    map_rows,
    number_labels,
    row_shapes,
)
from datasets import Dataset
from model_arguments import (
    FineTunedModelArguments,
    RouterArguments,
    check_model,
    load_model,
    load_tokenizer,
    parse_arguments,
    watch_routers,
    with_lora,
)
from run_costs import decide_costs
from run_record import known_labels, run
from sources import check_least
from training_defaults import TimeLeft, TrainingDefaults, run_script
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)


@dataclass
class TaskArguments(DataArguments):
    """Columns and lengths."""

    words_column: str = field(default="tokens", metadata={"help": "the column of the list of words"})
    labels_column: str = field(default="tags", metadata={"help": "the column of the list of labels"})
    max_length: int = field(default=16_384, metadata={"help": "tokens of input at most"})
    pad_to_multiple_of: int | None = field(default=128, metadata={"help": "pad batches to a multiple of this"})

    def __post_init__(self) -> None:
        super().__post_init__()
        # a token of text, and the end
        check_least(2, max_length=self.max_length)
        check_least(1, pad_to_multiple_of=self.pad_to_multiple_of)


def check_lists(rows: Dataset, split: str, words: str, labels: str) -> None:
    """Refuse rows whose words and labels differ in number, or are no words and labels.

    Raises:
        ValueError: naming the split and the row.
    """
    for number, row in enumerate(rows):
        if len(row[words]) != len(row[labels]):
            raise ValueError(f"{split}: row {number} has {len(row[words])} {words} and {len(row[labels])} {labels}")
        for column, kinds in ((words, str), (labels, (int, str))):
            wrong = [item for item in row[column] if not isinstance(item, kinds)]
            if wrong:
                raise ValueError(f"{split}: row {number} has {wrong[0]!r} among its {column}")


@dataclass
class RunArguments(TrainingDefaults, TrainingArguments):
    """Trainer's arguments, with the defaults of these scripts."""


def scores(prediction: EvalPrediction) -> dict[str, float]:
    """The metrics of the words' labels."""
    counted = prediction.label_ids != -100
    return class_scores(prediction.predictions.argmax(-1)[counted], prediction.label_ids[counted])


def prepare(argv: list[str] | None = None) -> Callable[[], dict[str, float]]:
    """Check the rows, load the model; gives what trains, evaluates and saves."""
    kinds = (FineTunedModelArguments, RouterArguments, TaskArguments, RunArguments)
    model_arguments, routers, task, training = parse_arguments(kinds, __doc__, argv)
    check_model(model_arguments)
    set_seed(training.seed)

    rows = load_rows(task)
    for split, part in rows.items():
        check_rows(part, split, {task.words_column: list, task.labels_column: list})
        check_lists(part, split, task.words_column, task.labels_column)
    numbers = number_labels(rows, task.labels_column, known_labels(model_arguments.model_name_or_path))
    rows = hold_out(rows, task.validation_share)

    tokenizer = load_tokenizer(model_arguments)
    model = load_model(
        model_arguments,
        AutoModelForTokenClassification,
        tokenizer,
        id2label={number: name for name, number in numbers.items()},
        label2id=numbers,
    )
    model = with_lora(model, model_arguments, "TOKEN_CLS", ["classifier"])

    def tokenize(batch: dict[str, list[Any]]) -> Any:
        inputs = tokenizer(
            batch[task.words_column], is_split_into_words=True, max_length=task.max_length, truncation=True
        )
        inputs["lost_inputs"], inputs["labels"] = lost_tokens(inputs), []
        for i, labels in enumerate(batch[task.labels_column]):
            words = inputs.word_ids(i)
            firsts = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
            inputs["labels"].append(
                [numbers[str(labels[word])] if first else -100 for word, first in zip(words, firsts, strict=True)]
            )
        return inputs

    tokenized = map_rows(rows, tokenize, training)
    for split, part in tokenized.items():
        # blank words have no tokens; without any label there is no loss, and there are no scores
        if all(label == -100 for labels in part["labels"] for label in labels):
            raise ValueError(
                f"{split} has no label to learn or to score: no word of its {task.words_column} has a token"
            )
    training.decide_evaluation("validation" in rows, True, "f1", greater=True)
    optimizer = training.make_optimizer(model, is_new=model_arguments.size is not None)
    trainer = Trainer(
        model,
        training,
        optimizers=(optimizer, None),
        train_dataset=tokenized.get("train"),
        eval_dataset=tokenized.get("validation"),
        data_collator=DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=task.pad_to_multiple_of),
        processing_class=tokenizer,
        compute_metrics=scores,
        callbacks=[TimeLeft()],
    )
    dense_start = watch_routers(trainer, routers, task.max_length)
    start = partial(
        run, trainer, "token classification", describe(task), task.dataset_name, model_arguments.model_name_or_path
    )
    return decide_costs(trainer, row_shapes(tokenized.get("train")), dense_start, start)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Check the rows, train, evaluate, save; gives the metrics."""
    return prepare(argv)()


if __name__ == "__main__":
    run_script(prepare)
