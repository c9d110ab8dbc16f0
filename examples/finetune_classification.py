r"""Fine-tune CoLT5 to classify long documents, with one label or several each, or to give numbers for them.

    python examples/finetune_classification.py --model_name_or_path my-colt5 --train_file train.jsonl \
        --validation_file validation.jsonl --text_column text --label_column label --output_dir out

Labels are whole numbers, names, or true and false, lists of such for several labels, and other numbers for regression.
A folder of folders of .txt and .pdf files does as well, with the folders' names for labels. All options of
`TrainingArguments` work.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from class_metrics import class_scores, label_scores, number_scores
from data import (
    NUMBERS,
    SEVERAL,
    SINGLE,
    DataArguments,
    check_rows,
    describe,
    hold_out,
    label_kind,
    load_rows,
    lost_tokens,
    map_rows,
    number_labels,
    row_shapes,
)
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
    label_column: str = field(default="label", metadata={"help": "the column of the label, or of the list of labels"})
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = field(
        default=None, metadata={"help": "what labels are; by default the first label tells it"}
    )
    max_length: int = field(default=16_384, metadata={"help": "tokens of input at most"})
    pad_to_multiple_of: int | None = field(default=128, metadata={"help": "pad batches to a multiple of this"})

    def __post_init__(self) -> None:
        super().__post_init__()
        # a token of text, and the end
        check_least(2, max_length=self.max_length)
        check_least(1, pad_to_multiple_of=self.pad_to_multiple_of)


@dataclass
class RunArguments(TrainingDefaults, TrainingArguments):
    """Trainer's arguments, with the defaults of these scripts."""


def scores(prediction: EvalPrediction, kind: str) -> dict[str, float]:
    """The metrics of labels of a kind (`data.label_kind`)."""
    logits, labels = prediction.predictions, prediction.label_ids
    if kind == NUMBERS:
        return number_scores(logits, labels)
    return label_scores(logits > 0, labels > 0) if kind == SEVERAL else class_scores(logits.argmax(-1), labels)


def prepare(argv: list[str] | None = None) -> Callable[[], dict[str, float]]:
    """Check the rows, load the model; gives what trains, evaluates and saves."""
    kinds = (FineTunedModelArguments, RouterArguments, TaskArguments, RunArguments)
    model_arguments, routers, task, training = parse_arguments(kinds, __doc__, argv)
    check_model(model_arguments)
    set_seed(training.seed)

    rows = load_rows(task, task.text_column)
    for split, part in rows.items():
        check_rows(part, split, {task.text_column: str, task.label_column: object})
    kind = label_kind(rows, task.label_column, task.problem_type)
    if kind == NUMBERS:
        first = next(iter(rows.values()))[0][task.label_column]
        # named as Transformers names what has no names
        numbers = {f"LABEL_{i}": i for i in range(len(first) if isinstance(first, list) else 1)}
    else:
        numbers = number_labels(rows, task.label_column, known_labels(model_arguments.model_name_or_path))
    if kind == SINGLE and len(numbers) == 1:
        # such as the first rows of a file that is sorted by its labels
        raise ValueError(
            f"all training rows have the {task.label_column} {next(iter(numbers))!r}; they must have at least two"
        )
    rows = hold_out(rows, task.validation_share)

    tokenizer = load_tokenizer(model_arguments)
    model = load_model(
        model_arguments,
        AutoModelForSequenceClassification,
        tokenizer,
        id2label={number: name for name, number in numbers.items()},
        label2id=numbers,
        problem_type=kind,
    )
    model = with_lora(model, model_arguments, "SEQ_CLS", ["classification_head"])

    def tokenize(batch: dict[str, list[Any]]) -> Any:
        inputs = tokenizer(batch[task.text_column], max_length=task.max_length, truncation=True)
        inputs["lost_inputs"] = lost_tokens(inputs)
        labels = batch[task.label_column]
        if kind == NUMBERS:
            inputs["labels"] = labels
        elif kind == SEVERAL:
            inputs["labels"] = [[float(name in map(str, row)) for name in numbers] for row in labels]
        else:
            inputs["labels"] = [numbers[str(label)] for label in labels]
        return inputs

    tokenized = map_rows(rows, tokenize, training)
    training.decide_evaluation("validation" in rows, True, "mse" if kind == NUMBERS else "f1", greater=kind != NUMBERS)
    optimizer = training.make_optimizer(model, is_new=model_arguments.size is not None)
    trainer = Trainer(
        model,
        training,
        optimizers=(optimizer, None),
        train_dataset=tokenized.get("train"),
        eval_dataset=tokenized.get("validation"),
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=task.pad_to_multiple_of),
        processing_class=tokenizer,
        compute_metrics=partial(scores, kind=kind),
        callbacks=[TimeLeft()],
    )
    dense_start = watch_routers(trainer, routers, task.max_length)
    what = "text regression" if kind == NUMBERS else "text classification"
    start = partial(run, trainer, what, describe(task), task.dataset_name, model_arguments.model_name_or_path)
    return decide_costs(trainer, row_shapes(tokenized.get("train")), dense_start, start)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Check the rows, train, evaluate, save; gives the metrics."""
    return prepare(argv)()


if __name__ == "__main__":
    run_script(prepare)
