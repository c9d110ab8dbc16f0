"""Fine-tune CoLT5 on long-document summarisation, or on questions about long documents.

    python examples/finetune_seq2seq.py --model_name_or_path my-colt5 --train_file train.jsonl \
        --validation_file validation.jsonl --output_dir out --num_train_epochs 3

With `--query_column` the input is the query, a newline, and the document, and exact match and F1 are reported as well.
All options of `Seq2SeqTrainingArguments` work; `--resume_from_checkpoint` continues an interrupted run.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from data import DataArguments, check_rows, describe, exact_match_and_f1, load_rows, rouge
from model_arguments import ModelArguments, load_model, load_tokenizer, save_whole, with_lora
from run_record import finish
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedTokenizerBase,
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


def tokenize(rows: dict[str, list[Any]], arguments: TaskArguments, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Inputs and labels of a batch of rows."""
    sources = rows[arguments.document_column]
    if arguments.query_column is not None:
        sources = [f"{query}\n{text}" for query, text in zip(rows[arguments.query_column], sources, strict=True)]
    batch = tokenizer(sources, max_length=arguments.max_source_length, truncation=True)
    targets = tokenizer(
        text_target=rows[arguments.target_column], max_length=arguments.max_target_length, truncation=True
    )
    batch["labels"] = targets["input_ids"]
    return batch


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Check the rows, train, evaluate, save; gives the metrics."""
    parser = HfArgumentParser((ModelArguments, TaskArguments, Seq2SeqTrainingArguments), description=__doc__)
    model_arguments, task, training = parser.parse_args_into_dataclasses(argv)
    training.predict_with_generate = True
    set_seed(training.seed)

    rows = load_rows(task)
    columns = [task.document_column, task.target_column, *filter(None, [task.query_column])]
    for split, part in rows.items():
        check_rows(part, split, dict.fromkeys(columns, str))
    tokenizer = load_tokenizer(model_arguments)
    model = load_model(model_arguments, AutoModelForSeq2SeqLM, tokenizer)
    model = with_lora(model, model_arguments, "SEQ_2_SEQ_LM", [])
    with training.main_process_first(desc="tokenization"):
        tokenized = rows.map(
            tokenize,
            batched=True,
            fn_kwargs={"arguments": task, "tokenizer": tokenizer},
            remove_columns=next(iter(rows.values())).column_names,
        )

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        texts = [
            tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)
            for ids in (prediction.predictions, prediction.label_ids)
        ]
        result = rouge(*texts)
        return result if task.query_column is None else result | exact_match_and_f1(*texts)

    training.generation_max_length = training.generation_max_length or task.max_target_length
    trainer = Seq2SeqTrainer(
        model,
        training,
        train_dataset=tokenized.get("train"),
        eval_dataset=tokenized.get("validation"),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model, pad_to_multiple_of=task.pad_to_multiple_of),
        processing_class=tokenizer,
        compute_metrics=metrics,
    )
    result: dict[str, float] = {}
    if "train" in tokenized:
        result |= trainer.train(resume_from_checkpoint=training.resume_from_checkpoint).metrics
        save_whole(trainer)
    if "validation" in tokenized:
        result |= trainer.evaluate()
    kind = "summarization" if task.query_column is None else "question answering"
    finish(trainer, result, kind, describe(task), task.dataset_name, model_arguments.model_name_or_path)
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
