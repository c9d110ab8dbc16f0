r"""Fine-tune CoLT5 on long-document summarisation, or on questions about long documents.

    python examples/finetune_seq2seq.py --model_name_or_path my-colt5 --train_file train.jsonl \
        --validation_file validation.jsonl --output_dir out --num_train_epochs 3

With `--query_column` the input is the query, a newline, and the document, and exact match and F1 are reported as well.
A folder of .txt and .pdf files does as well, with a metadata.jsonl in it that has a file's name and its summary in a
row.
All options of `Seq2SeqTrainingArguments` work, but for `--predict_with_generate false`: ROUGE is of generated texts.
`--resume_from_checkpoint` continues an interrupted run.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from data import DataArguments, check_rows, describe, hold_out, load_rows, lost_tokens, map_rows, row_shapes
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
from run_record import run
from sources import check_least
from text_metrics import exact_match_and_f1, rouge
from training_defaults import TimeLeft, TrainingDefaults, run_script
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)


@dataclass
class TaskArguments(DataArguments):
    """Columns and lengths."""

    document_column: str = field(default="document", metadata={"help": "the column of the long text"})
    target_column: str = field(default="summary", metadata={"help": "the column of the summary or answer"})
    query_column: str | None = field(default=None, metadata={"help": "the column of the query, if there is one"})
    max_source_length: int = field(default=16_384, metadata={"help": "tokens of input at most"})
    max_target_length: int = field(default=512, metadata={"help": "tokens of output at most"})
    pad_to_multiple_of: int | None = field(default=128, metadata={"help": "pad batches to a multiple of this"})

    def __post_init__(self) -> None:
        super().__post_init__()
        # a token of text, and the end
        check_least(2, max_source_length=self.max_source_length, max_target_length=self.max_target_length)
        check_least(1, pad_to_multiple_of=self.pad_to_multiple_of)


@dataclass
class RunArguments(TrainingDefaults, Seq2SeqTrainingArguments):
    """Trainer's arguments, with the defaults of these scripts."""

    predict_with_generate: bool = field(
        default=True, metadata={"help": "evaluate what the model generates; must be true, for ROUGE and F1 need texts"}
    )

    def __post_init__(self) -> None:
        if not self.predict_with_generate:
            raise ValueError(
                "predict_with_generate is false; it must be true, for ROUGE and F1 are of generated texts"
            )
        # a limit counts the token that decoding starts with
        check_least(2, generation_max_length=self.generation_max_length)
        check_least(1, generation_num_beams=self.generation_num_beams)
        super().__post_init__()


def prepare(argv: list[str] | None = None) -> Callable[[], dict[str, float]]:
    """Check the rows, load the model; gives what trains, evaluates and saves."""
    kinds = (FineTunedModelArguments, RouterArguments, TaskArguments, RunArguments)
    model_arguments, routers, task, training = parse_arguments(kinds, __doc__, argv)
    check_model(model_arguments)
    set_seed(training.seed)

    rows = load_rows(task, task.document_column)
    columns = [task.document_column, task.target_column, *filter(None, [task.query_column])]
    for split, part in rows.items():
        check_rows(part, split, dict.fromkeys(columns, str))
    rows = hold_out(rows, task.validation_share)
    tokenizer = load_tokenizer(model_arguments)
    model = load_model(model_arguments, AutoModelForSeq2SeqLM, tokenizer)
    model = with_lora(model, model_arguments, "SEQ_2_SEQ_LM", [])

    def tokenize(batch: dict[str, list[Any]]) -> Any:
        sources = batch[task.document_column]
        if task.query_column is not None:
            sources = [f"{query}\n{text}" for query, text in zip(batch[task.query_column], sources, strict=True)]
        inputs = tokenizer(sources, max_length=task.max_source_length, truncation=True)
        targets = tokenizer(text_target=batch[task.target_column], max_length=task.max_target_length, truncation=True)
        inputs["labels"] = targets["input_ids"]
        inputs["lost_inputs"], inputs["lost_targets"] = lost_tokens(inputs), lost_tokens(targets)
        return inputs

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        texts = [
            tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)
            for ids in (prediction.predictions, prediction.label_ids)
        ]
        result = rouge(*texts)
        return result if task.query_column is None else result | exact_match_and_f1(*texts)

    tokenized = map_rows(rows, tokenize, training)
    # of the model, which is saved with it: a limit that it came with, or Transformers' 20 tokens, would cut otherwise.
    # One more for the token that decoding starts with
    model.generation_config.max_new_tokens = None
    model.generation_config.max_length = training.generation_max_length or task.max_target_length + 1
    training.decide_evaluation(
        "validation" in rows, True, "rougeLsum" if task.query_column is None else "f1", greater=True
    )
    optimizer = training.make_optimizer(model, is_new=model_arguments.size is not None)
    trainer = Seq2SeqTrainer(
        model,
        training,
        optimizers=(optimizer, None),
        train_dataset=tokenized.get("train"),
        eval_dataset=tokenized.get("validation"),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model, pad_to_multiple_of=task.pad_to_multiple_of),
        processing_class=tokenizer,
        compute_metrics=metrics,
        callbacks=[TimeLeft()],
    )
    dense_start = watch_routers(trainer, routers, task.max_source_length)
    kind = "summarization" if task.query_column is None else "question answering"
    start = partial(run, trainer, kind, describe(task), task.dataset_name, model_arguments.model_name_or_path)
    return decide_costs(trainer, row_shapes(tokenized.get("train"), has_targets=True), dense_start, start)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Check the rows, train, evaluate, save; gives the metrics."""
    return prepare(argv)()


if __name__ == "__main__":
    run_script(prepare)
