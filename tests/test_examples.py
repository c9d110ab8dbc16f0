"""The scripts of examples/, each run on a few rows: they train, resume, and refuse bad rows before any work."""

import gzip
import json
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import convert_t5
import data
import finetune_classification
import finetune_seq2seq
import finetune_token_classification
import model_arguments
import pretrain
import pytest
import text_metrics
import torch
from datasets import Dataset, DatasetDict
from example_runs import FAST, NEW_MODEL, ROWS, TINY_T5, TOKENIZER, seq2seq_arguments, write_rows
from models import pad, tiny_model
from peft import PeftModel
from rounding import assert_same_but_for_rounding, assert_trained_alike
from safetensors.torch import load_file
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Seq2SeqTrainer,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import integration_utils

from modeling_colt5 import (
    CoLT5ForConditionalGeneration,
    CoLT5ForSequenceClassification,
    CoLT5ForTokenClassification,
    CoLT5Tokenizer,
)

# where weights are compared: so large that one other batch shows
LEARNING_RATE = 1e-2
# of every fine-tuning script: good rows with their columns' arguments
TASKS: dict[ModuleType, tuple[list[dict[str, Any]], list[str]]] = {
    finetune_seq2seq: (ROWS, ["--max_target_length", "8"]),
    finetune_classification: ([{"text": row["document"], "label": "ab"[i % 2]} for i, row in enumerate(ROWS)], []),
    finetune_token_classification: ([{"tokens": ["x", "returns", "argument"], "tags": [0, 1, 0]}] * 4, []),
}


def task_arguments(script: ModuleType, tmp_path: Path, output: str = "out") -> list[str]:
    """The arguments of a fine-tuning script for a new model on its rows, without steps."""
    rows, columns = TASKS[script]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    return [*NEW_MODEL, *FAST, *columns, "--train_file", file, "--output_dir", str(tmp_path / output)]


def assert_same_weights(left: Path, right: Path, name: str = "model.safetensors") -> None:
    """After training at `LEARNING_RATE`."""
    assert_trained_alike(load_file(left / name), load_file(right / name), LEARNING_RATE)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [pytest.param(False, id="full"), pytest.param(True, id="lora")])
def test_summarisation_and_questions(tmp_path, lora):
    arguments = [*seq2seq_arguments(tmp_path, ROWS), "--max_steps", "2", "--max_target_length", "8"]
    arguments += ["--save_strategy", "no"]
    # Transformers calls it anew
    new_name = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    checkpointing = "--activation_checkpointing" if new_name else "--gradient_checkpointing"
    arguments += ["--lora", "true", checkpointing, "true"] if lora else ["--query_column", "query"]
    metrics = finetune_seq2seq.main(arguments)
    assert {"eval_rouge1", "eval_rouge2", "eval_rougeL", "eval_rougeLsum", "train_loss", "eval_loss"} <= metrics.keys()
    assert ("eval_f1" in metrics) != lora
    assert (tmp_path / "out" / ("adapter_config.json" if lora else "model.safetensors")).exists()
    if not lora:
        assert (tmp_path / "out" / "modeling_colt5.py").exists()
        assert AutoTokenizer.from_pretrained(tmp_path / "out")("x").input_ids[-1] == 1
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")


# three runs each, of which Trainer's part is in test_training.py: each script once, and both kinds of weights
@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "lora"),
    [pytest.param(script, number == 1, id=script.__name__) for number, script in enumerate(TASKS)],
)
def test_fine_tuning_resumes_to_the_same_weights(script, lora, tmp_path):
    """From a named checkpoint, and from the newest of the folder."""
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    more = ["--max_steps", "4", "--save_steps", "2", "--lora", str(lora), "--learning_rate", str(LEARNING_RATE)]
    script.main([*task_arguments(script, tmp_path, "whole"), *more])
    checkpoint = ["--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-2")]
    script.main([*task_arguments(script, tmp_path, "resumed"), *more, *checkpoint])
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed", weights)
    first, last = (load_file(tmp_path / "whole" / f"checkpoint-{step}" / weights) for step in (2, 4))
    assert any(not torch.equal(first[name], last[name]) for name in first), "nothing was trained in between"

    more[1] = "6"
    script.main([*task_arguments(script, tmp_path, "whole"), *more, "--resume_from_checkpoint", "true"])
    state = json.loads((tmp_path / "whole" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "train_runtime" in entry] == [6]


@pytest.mark.slow
@pytest.mark.parametrize("model_class", [CoLT5ForConditionalGeneration, CoLT5ForSequenceClassification])
def test_adapters_hold_all_that_is_trained(model_class, tmp_path):
    """Routers and heads too: what training changed is in the folder, and nothing else was changed."""
    task, heads = (
        ("SEQ_2_SEQ_LM", []) if model_class is CoLT5ForConditionalGeneration else ("SEQ_CLS", ["classification_head"])
    )
    base = tiny_model(model_class)
    base.save_pretrained(tmp_path / "base")
    arguments = model_arguments.FineTunedModelArguments(lora=True, lora_rank=2)
    model = model_arguments.with_lora(model_class.from_pretrained(tmp_path / "base"), arguments, task, heads).eval()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert (
        sum("router" in name for name in trained) == sum("router" in name for name, _ in base.named_parameters()) > 0
    )
    batch = pad([torch.arange(3, 40), torch.arange(5, 30)])
    if not heads:
        batch["labels"] = torch.tensor([[5, 6], [7, 8]])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.add_(0.1 * torch.randn_like(parameter))
        expected = model(**batch).logits
    model.save_pretrained(tmp_path / "adapter")
    base = model_class.from_pretrained(tmp_path / "base")
    # PEFT puts what it loads on a GPU where there is one
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", torch_device="cpu").eval()
    with torch.no_grad():
        assert_same_but_for_rounding(loaded(**batch).logits, expected)


# three runs; that an adapter's folder holds all that was trained is the test above
@pytest.mark.slow
def test_an_adapter_is_evaluated_and_trained_further(tmp_path):
    base = tmp_path / "base"
    tiny_model(vocab_size=8192).save_pretrained(base)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(base)
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    common = [*FAST, "--validation_file", file, "--max_target_length", "8", "--save_strategy", "no"]
    training = ["--train_file", file, "--max_steps", "2", "--learning_rate", "1e-1"]
    adapter = tmp_path / "adapter"
    run = [*common, *training, "--lora", "true", "--model_name_or_path", str(base), "--output_dir", str(adapter)]
    trained = finetune_seq2seq.main(run)
    again = [*common, "--model_name_or_path", str(adapter), "--output_dir"]
    evaluated = finetune_seq2seq.main([*again, str(tmp_path / "evaluated")])
    assert model_arguments.load_checkpoint(str(adapter), AutoModelForSeq2SeqLM).config.routers_trained
    # the same operations on the same weights, in fp32
    assert evaluated["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-5)
    further = tmp_path / "further"
    finetune_seq2seq.main([*again, str(further), *training])
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, further))
    assert first.keys() == second.keys()
    assert {name for name in first if torch.equal(first[name], second[name])} == set()
    with pytest.raises(ValueError, match="is an adapter already"):
        finetune_seq2seq.main([*again, str(further), *training, "--lora", "true"])


@pytest.mark.slow
def test_batches_are_grouped_by_length_and_padded_to_multiples(tmp_path, monkeypatch):
    shapes = []

    class Watching(Seq2SeqTrainer):
        def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
            shapes.append(tuple(inputs["input_ids"].shape))
            return super().compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(finetune_seq2seq, "Seq2SeqTrainer", Watching)
    rows = [{"document": "import os " * (20, 200)[i % 2], "summary": "x"} for i in range(32)]
    arguments = [*seq2seq_arguments(tmp_path, rows), "--save_strategy", "no", "--num_train_epochs", "1"]
    arguments += [
        "--train_sampling_strategy",
        "group_by_length",
        "--pad_to_multiple_of",
        "64",
        "--eval_strategy",
        "no",
    ]
    arguments = [part for part in arguments if part != "--validation_file"]
    arguments.remove(arguments[arguments.index("--train_file") + 1])
    finetune_seq2seq.main(arguments)
    # 20 words and an end, 200 words and an end
    assert set(shapes) == {(2, 64), (2, 448)} and len(shapes) == 16
    # Trainer puts a longest row first, which may leave one short row over; a random order would give 4, and 7 seldom
    assert shapes.count((2, 64)) >= 7


@pytest.mark.slow
def test_metrics_reach_the_usual_integrations(tmp_path, monkeypatch):
    """An integration of Trainer's gets losses while it trains, and the metrics of the evaluation."""
    logged: dict[str, float] = {}

    class Recorder(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            logged.update(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Recorder)
    arguments = [*seq2seq_arguments(tmp_path, ROWS), "--query_column", "query", "--report_to", "tensorboard"]
    finetune_seq2seq.main([*arguments, "--max_steps", "1", "--logging_steps", "1", "--max_target_length", "8"])
    assert {"loss", "eval_loss", "eval_rougeLsum", "eval_exact_match", "eval_f1"} <= logged.keys()


@pytest.mark.slow
def test_new_models_get_a_dense_start_unless_told_otherwise(tmp_path):
    arguments = task_arguments(finetune_classification, tmp_path)
    arguments += ["--max_steps", "3", "--save_strategy", "no", "--dense_start_closed", "0.3"]
    arguments += ["--dense_start_opening", "0.3", "--dense_start_input_share", "0.5", "--output_dir"]
    for more, trained in (([], True), (["--dense_start", "false"], False)):
        folder = tmp_path / str(trained)
        finetune_classification.main([*arguments, str(folder), *more])
        model = CoLT5ForSequenceClassification.from_pretrained(folder)
        assert model.config.routers_trained is trained and model.encoder.dense_start is None
    with pytest.raises(ValueError, match="input_share is 2.0"):
        finetune_classification.main([*arguments, str(folder), "--dense_start_input_share", "2"])


BAD_ROWS = {
    "empty": ({"document": " ", "text": "", "tokens": []}, "is empty"),
    "of another type": ({"document": 3, "text": 3, "tokens": "x y"}, r"is (int|str), must be (str|list)"),
    "without a value": ({"summary": None, "label": None, "tags": None}, r"is NoneType, must be (str|list)"),
}


@pytest.mark.parametrize("script", TASKS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("bad", BAD_ROWS)
def test_bad_rows_are_named_before_anything_is_written(script, bad, tmp_path):
    rows, _ = TASKS[script]
    values, message = BAD_ROWS[bad]
    arguments = [*task_arguments(script, tmp_path), "--max_steps", "1"]
    write_rows(tmp_path / "rows.jsonl", [*rows, {**rows[0], **{k: v for k, v in values.items() if k in rows[0]}}])
    with pytest.raises(ValueError, match=rf"train has bad rows:\nrow {len(rows)}: \w+ {message}"):
        script.main(arguments)
    assert not (tmp_path / "out").exists()


def test_missing_columns_and_broken_files_are_named_before_anything_is_written(tmp_path):
    arguments = seq2seq_arguments(tmp_path, ROWS)
    with pytest.raises(ValueError, match="train has no column abstract; its columns are document, summary, query"):
        finetune_seq2seq.main([*arguments, "--target_column", "abstract"])
    file = tmp_path / "rows.jsonl"
    with file.open("a") as lines:
        lines.write('{"document": "x"\n')
    with pytest.raises(ValueError, match=r"rows.jsonl: row 4 is not JSON: Expecting ',' delimiter"):
        finetune_seq2seq.main(arguments)
    file.write_text("[1]\n")
    with pytest.raises(ValueError, match="row 0 is list, must be an object with columns"):
        finetune_seq2seq.main(arguments)
    file.write_text("")
    with pytest.raises(ValueError, match="rows.jsonl is missing or empty"):
        finetune_seq2seq.main(arguments)
    assert not (tmp_path / "out").exists()


def test_evaluation_without_generated_texts_is_refused(tmp_path):
    """Also where there are no files; by default, and where it is asked for, the model generates."""
    kinds = (finetune_seq2seq.RunArguments,)
    for given in ([], ["--predict_with_generate"], ["--predict_with_generate", "true"]):
        options = ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true", *given]
        (training,) = model_arguments.parse_arguments(kinds, None, options)
        assert training.predict_with_generate is True
    with pytest.raises(ValueError, match="predict_with_generate is false; it must be true"):
        finetune_seq2seq.main([*seq2seq_arguments(tmp_path, ROWS), "--predict_with_generate", "false"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either --dataset_name, or --train_file"),
        ({"dataset_name": "d", "train_file": "f.csv"}, "give either --dataset_name, or --train_file"),
        ({"train_file": "f.csv", "dataset_config_name": "c"}, "dataset_config_name is for a dataset"),
        ({"train_file": "nowhere.csv"}, "nowhere.csv is missing or empty"),
        ({"train_file": __file__}, r"files end in .py; they must all end in one of .jsonl, .json, .csv, .parquet"),
        ({"train_file": __file__, "max_train_samples": 0}, "max_train_samples is 0; it must be at least 1"),
    ],
)
def test_sources_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load_rows(data.DataArguments(**arguments))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b'text,label\n"a,1\n', r"rows.csv cannot be read as csv: .*EOF inside string"),
        ("rows.csv", "text,label\né,1\n".encode("latin-1"), r"rows.csv cannot be read as csv: 'utf-8' codec"),
        ("rows.csv", b"text,label\n", r"rows.csv cannot be read as csv: "),
        ("rows.json", b"{broken", r"rows.json cannot be read as json: JSON parse error"),
        ("rows.parquet", b"nothing", r"rows.parquet cannot be read as parquet: "),
        ("rows.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', r"rows.jsonl, line 2 is not UTF-8"),
        ("rows.json", b'[{"a": "\xe9"}]', r"rows.json, line 1 is not UTF-8"),
        ("rows.jsonl.gz", b'{"a": 1}\n', r"rows.jsonl.gz is not packed by gzip"),
        ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 50, mtime=0)[:-9], r"rows.jsonl.gz cannot be unpacked: "),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.load_rows(data.DataArguments(train_file=str(tmp_path / name)))


@pytest.mark.parametrize("name", ["rows [1].jsonl", "rows?1.jsonl", "*.jsonl"])
def test_a_files_name_is_no_pattern(tmp_path, name):
    """Another file that fits it is not read."""
    write_rows(tmp_path / "rows 1.jsonl", [{"text": "another"}])
    file = write_rows(tmp_path / name, [{"text": "own"}])
    assert data.load_rows(data.DataArguments(train_file=file))["train"]["text"][:] == ["own"]
    documents, held_out = pretrain.load_documents(pretrain.CorpusArguments([file], [file]))
    assert [[row["text"] for row in rows] for rows in (documents, held_out)] == [["own"], ["own"]]


def test_files_need_not_have_the_same_columns(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 1}\n')
    (tmp_path / "other.jsonl").write_text('{"text": "b", "label": "x", "more": 3}\n')
    files = {"train_file": str(tmp_path / "train.jsonl"), "validation_file": str(tmp_path / "other.jsonl")}
    rows = data.load_rows(data.DataArguments(**files))
    assert {split: table.to_list() for split, table in rows.items()} == {
        "train": [{"text": "a", "label": 1}],
        "validation": [{"text": "b", "label": "x", "more": 3}],
    }


@pytest.mark.slow
def test_classification_of_documents(tmp_path):
    """It learns four documents by heart; evaluation alone keeps the numbers of the labels that it learned."""
    arguments = task_arguments(finetune_classification, tmp_path)
    more = ["--validation_file", str(tmp_path / "rows.jsonl"), "--save_strategy", "no", "--seed", "1"]
    metrics = finetune_classification.main([*arguments, *more, "--max_steps", "40", "--learning_rate", "1e-2"])
    assert metrics["eval_accuracy"] == 1
    labels = json.loads((tmp_path / "out" / "config.json").read_text())["label2id"]
    assert labels == {"a": 0, "b": 1}
    # of the second label alone, and a column more than before
    row = {"extra": 0, **TASKS[finetune_classification][0][1]}
    file = write_rows(tmp_path / "one.jsonl", [row])
    arguments = ["--model_name_or_path", str(tmp_path / "out"), *FAST, "--validation_file", file]
    arguments += ["--output_dir", str(tmp_path / "evaluated")]
    assert finetune_classification.main(arguments)["eval_accuracy"] == 1
    write_rows(tmp_path / "one.jsonl", [row, {**row, "label": "c"}])
    with pytest.raises(ValueError, match="validation: row 1 has the label 'c', unknown among a, b"):
        finetune_classification.main(arguments)


@pytest.mark.parametrize(
    ("script", "model_class", "head"),
    [
        (finetune_classification, CoLT5ForSequenceClassification, "classification_head.out_proj"),
        (finetune_token_classification, CoLT5ForTokenClassification, "classifier"),
    ],
    ids=["documents", "words"],
)
def test_a_head_for_other_labels_begins_anew(script, model_class, head, tmp_path, monkeypatch):
    """And nothing else of the checkpoint does; an adapter, which holds such a head, is refused."""
    said: list[str] = []
    monkeypatch.setattr(model_arguments.logger, "warning", said.append)
    base = tmp_path / "base"
    saved = tiny_model(model_class, vocab_size=8192, num_labels=2)
    saved.config.id2label, saved.config.label2id = {0: "a", 1: "b"}, {"a": 0, "b": 1}
    saved.save_pretrained(base)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(base)
    rows = [{"text": "x = 1", "label": label, "tokens": ["x", "y"], "tags": ["a", label]} for label in "abc"]
    options = [*FAST, "--train_file", write_rows(tmp_path / "rows.jsonl", rows[:2]), "--max_steps", "1"]
    options += ["--save_strategy", "no", "--output_dir", str(tmp_path / "out"), "--model_name_or_path"]
    script.main([*options, str(base), "--lora", "true"])
    assert said == []
    write_rows(tmp_path / "rows.jsonl", rows)
    model = script.prepare([*options, str(base)]).args[0].model
    assert model.config.label2id == {"a": 0, "b": 1, "c": 2} and model.get_submodule(head).out_features == 3
    weights = saved.state_dict()
    for name, weight in model.state_dict().items():
        assert name.startswith(head) or torch.equal(weight, weights[name]), name
    assert len(said) == 1 and "is for 2 labels and the rows have 3" in said[0]
    with pytest.raises(ValueError, match=f"an adapter for the labels a, b, and .* a, b, c; .*path {base} --lora true"):
        script.prepare([*options, str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", "cut", "the weights of .*base cannot be read: "),
        ("tokenizer.json", "{", "the tokenizer of .*base cannot be read: "),
        ("config.json", "{", "base/config.json' is not a valid JSON file"),
        ("run.json", "{}", "base/run.json is no record of a training script: "),
    ],
)
def test_a_broken_file_of_a_checkpoint_is_named(file, content, message, tmp_path):
    base = tmp_path / "base"
    tiny_model(CoLT5ForSequenceClassification, vocab_size=8192).save_pretrained(base)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(base)
    (base / file).write_text(content)
    rows, _ = TASKS[finetune_classification]
    options = [*FAST, "--train_file", write_rows(tmp_path / "rows.jsonl", rows), "--model_name_or_path", str(base)]
    # what a script says in one line
    with pytest.raises((ValueError, OSError), match=message):
        finetune_classification.prepare([*options, "--output_dir", str(tmp_path / "out")])


def test_labels_are_numbered_in_their_own_order():
    def splits(**columns: list) -> DatasetDict:
        return DatasetDict({split: Dataset.from_dict({"tags": values}) for split, values in columns.items()})

    numbers = data.number_labels(splits(train=[[10, 2], [0]], validation=[[2]]), "tags", None)
    assert numbers == {"0": 0, "2": 1, "10": 2}
    assert data.number_labels(splits(train=["b", "a"]), "tags", None) == {"a": 0, "b": 1}
    # a checkpoint's numbers stay where its labels are these
    assert data.number_labels(splits(train=["b", "a"]), "tags", {"b": 0, "a": 1}) == {"b": 0, "a": 1}
    assert data.number_labels(splits(train=["b", "c"]), "tags", {"b": 0, "a": 1}) == {"b": 0, "c": 1}
    assert data.number_labels(splits(validation=["b"]), "tags", {"b": 0, "a": 1}) == {"b": 0, "a": 1}
    with pytest.raises(ValueError, match="validation rows alone need a model that was fine-tuned"):
        data.number_labels(splits(validation=["b"]), "tags", None)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_words_without_any_token_are_refused(tmp_path, split):
    """They would have no score at the end of the run; among other words they may stand."""
    rows = [{"tokens": ["x", "", " "], "tags": ["a", "b", "a"]}]
    files = {name: write_rows(tmp_path / f"{name}.jsonl", rows) for name in ("train", "validation")}
    options = [*NEW_MODEL, *FAST, "--output_dir", str(tmp_path / "out")]
    options += [part for name, file in files.items() for part in (f"--{name}_file", file)]
    (row,) = finetune_token_classification.prepare(options).args[0].train_dataset
    assert [label for label in row["labels"] if label != -100] == [0]
    shutil.rmtree(tmp_path / "out")
    write_rows(tmp_path / f"{split}.jsonl", [{"tokens": ["", " "], "tags": ["a", "b"]}] * 2)
    with pytest.raises(
        ValueError, match=f"{split} has no label to learn or to score: no word of its tokens has a token"
    ):
        finetune_token_classification.prepare(options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_classification_of_words(tmp_path):
    arguments = task_arguments(finetune_token_classification, tmp_path)
    more = ["--validation_file", str(tmp_path / "rows.jsonl"), "--save_strategy", "no", "--max_steps", "30"]
    assert finetune_token_classification.main([*arguments, *more, "--learning_rate", "1e-2"])["eval_accuracy"] == 1
    rows, _ = TASKS[finetune_token_classification]
    write_rows(tmp_path / "rows.jsonl", [*rows, {"tokens": ["x"], "tags": [0, 1]}])
    with pytest.raises(ValueError, match="row 4 has 1 tokens and 2 tags"):
        finetune_token_classification.main(arguments)
    write_rows(tmp_path / "rows.jsonl", [*rows, {"tokens": ["x", "y"], "tags": [0, None]}])
    with pytest.raises(ValueError, match="row 4 has None among its tags"):
        finetune_token_classification.main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ul2", "span_corruption"])
def test_pretraining_resumes_to_the_same_weights(tmp_path, objective):
    text = tmp_path / "text.txt"
    text.write_text("".join(row["document"] for row in ROWS) * 8)
    arguments = [*NEW_MODEL, *FAST, "--train_files", str(text), "--validation_files", str(text)]
    arguments += ["--objective", objective, "--input_length", "128", "--target_length", "48", "--max_eval_chunks", "2"]
    arguments += ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "1"]
    arguments += ["--learning_rate", str(LEARNING_RATE)]
    if objective == "span_corruption":
        arguments += ["--size_scaled_learning_rate", "true", "--warmup_steps", "1"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    metrics = pretrain.main([*arguments, "--output_dir", str(whole)])
    assert metrics["eval_loss"] > 0
    checkpoint = str(whole / "checkpoint-2")
    pretrain.main([*arguments, "--output_dir", str(resumed), "--resume_from_checkpoint", checkpoint])
    assert_same_weights(whole, resumed)


# starts processes; what a batch holds is in test_denoising.py
@pytest.mark.slow
def test_pretraining_is_the_same_for_any_number_of_workers(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(row["document"] for row in ROWS) * 8)
    arguments = [*NEW_MODEL, *FAST, "--train_files", str(text), "--input_length", "64", "--target_length", "32"]
    arguments += ["--max_steps", "3", "--save_strategy", "no", "--learning_rate", str(LEARNING_RATE)]
    for workers in ("0", "2"):
        pretrain.main([*arguments, "--dataloader_num_workers", workers, "--output_dir", str(tmp_path / workers)])
    assert_same_weights(tmp_path / "0", tmp_path / "2")


@pytest.mark.slow
def test_pretraining_reads_the_same_from_texts_and_from_rows(tmp_path):
    """A document a file, a folder of them, a document a row, and packed: the same documents give the same weights. The
    run's record has the number of files, also of those in a folder."""
    texts = [row["document"] * 4 for row in ROWS]
    (tmp_path / "texts").mkdir()
    files: dict[str, list[Path]] = {"text": [tmp_path / "texts" / f"{i}.txt" for i in range(len(texts))]}
    files["folder"] = [tmp_path / "texts"]
    for path, text in zip(files["text"], texts, strict=True):
        path.write_text(text)
    files["rows"], files["packed"] = [tmp_path / "rows.jsonl"], [tmp_path / "packed.jsonl.gz"]
    write_rows(tmp_path / "rows.jsonl", [{"body": text, "number": i} for i, text in enumerate(texts)])
    files["packed"][0].write_bytes(gzip.compress(files["rows"][0].read_bytes()))
    arguments = [*NEW_MODEL, *FAST, "--text_column", "body", "--input_length", "64", "--target_length", "32"]
    arguments += ["--max_steps", "2", "--save_strategy", "no", "--learning_rate", str(LEARNING_RATE)]
    for kind, names in files.items():
        output = ["--train_files", *map(str, names), "--output_dir", str(tmp_path / kind)]
        pretrain.main([*arguments, *output])
        assert_same_weights(tmp_path / kind, tmp_path / "text")
        count = f"{len(texts)} files, " if kind in ("text", "folder") else "1 file, "
        assert json.loads((tmp_path / kind / "run.json").read_text())["data"].startswith(count)


@pytest.mark.slow
def test_datasets_are_taken_by_name(tmp_path):
    """A folder has the Hub's form of a dataset: the same call loads both."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split in ("train", "validation"):
        write_rows(folder / f"{split}.jsonl", ROWS * 8)
    arguments = [*NEW_MODEL, *FAST, "--dataset_name", str(folder), "--max_steps", "2", "--save_strategy", "no"]
    metrics = finetune_seq2seq.main(
        [*arguments, "--output_dir", str(tmp_path / "tuned"), "--max_train_samples", "3", "--max_eval_samples", "2"]
        + ["--max_target_length", "8"]
    )
    assert metrics["eval_loss"] > 0
    # streamed
    arguments += ["--input_length", "64", "--target_length", "32", "--max_eval_chunks", "2"]
    metrics = pretrain.main([*arguments, "--text_column", "document", "--output_dir", str(tmp_path / "trained")])
    assert metrics["eval_loss"] > 0
    with pytest.raises(ValueError, match="text_column is 'text'; the columns are document, summary, query"):
        pretrain.main([*arguments, "--output_dir", str(tmp_path / "nothing")])
    assert not (tmp_path / "nothing").exists()


def test_pretraining_refuses_what_is_missing(tmp_path):
    arguments = [*NEW_MODEL, *FAST, "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]
    with pytest.raises(ValueError, match="nowhere.txt is missing or empty"):
        pretrain.main([*arguments, "--train_files", str(tmp_path / "nowhere.txt")])
    with pytest.raises(ValueError, match="give either --dataset_name or --train_files"):
        pretrain.main(arguments)
    for option in ("--train_files", "--validation_files"):
        # neither the files nor the dataset are there: the mix is refused before either is looked for
        with pytest.raises(ValueError, match="give either --dataset_name, whose split validation"):
            pretrain.main([*arguments, "--dataset_name", "nowhere", option, "nowhere.txt"])
    with pytest.raises(ValueError, match="dataset_config_name is for a dataset"):
        pretrain.main([*arguments, "--train_files", "nowhere.txt", "--dataset_config_name", "c"])
    with pytest.raises(ValueError, match="text_column is 'text'; the columns are document"):
        rows = write_rows(tmp_path / "rows.jsonl", ROWS)
        pretrain.main([*arguments, "--train_files", rows])
    with pytest.raises(ValueError, match="files end in .jsonl, .txt; they must all end in one of"):
        (tmp_path / "text.txt").write_text("x")
        pretrain.main([*arguments, "--train_files", rows, str(tmp_path / "text.txt")])
    arguments += ["--train_files", rows, "--text_column", "document"]
    number = write_rows(tmp_path / "number.jsonl", [{"document": None}, {"document": 1}])
    for option, split in (("--train_files", "train"), ("--validation_files", "validation")):
        (tmp_path / "text.txt").write_text(" \n")
        files = [*arguments, "--validation_files", rows, option]
        with pytest.raises(ValueError, match=f"{split} has no text: all of its documents are blank"):
            pretrain.main([*files, write_rows(tmp_path / "blank.jsonl", [{"document": " "}] * 2)])
        with pytest.raises(ValueError, match=f"{split}: row 0: document is NoneType, must be str"):
            pretrain.main([*files, number])
    texts = [*arguments, "--train_files", str(tmp_path / "text.txt")]
    with pytest.raises(ValueError, match="train has no text"):
        pretrain.main(texts)
    (tmp_path / "later.txt.gz").write_text("not packed")
    with pytest.raises(ValueError, match="later.txt.gz is not packed by gzip"):
        pretrain.main([*texts, str(tmp_path / "later.txt.gz")])
    # adapters are for fine-tuning
    with pytest.raises(ValueError, match="lora"):
        pretrain.main([*arguments, "--train_files", rows, "--lora", "true"])
    assert not (tmp_path / "out").exists()


def test_a_t5_tokenizer_becomes_ours_with_mode_tokens(tmp_path):
    tokenizer = CoLT5Tokenizer.from_pretrained(TOKENIZER)
    vocabulary = [(piece, 0.0) for piece in sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)]
    source = T5Tokenizer(vocab=vocabulary[: len(tokenizer) - 3])
    source.save_pretrained(tmp_path)
    arguments = model_arguments.ModelArguments(tokenizer_name=str(tmp_path))
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is T5Tokenizer
    loaded = model_arguments.load_tokenizer(arguments, mode_tokens=True)
    assert sorted(loaded.get_mode_token_ids().values()) == [len(source), len(source) + 1, len(source) + 2]
    text = "def f(x): return <extra_id_0>"
    assert loaded(text)["input_ids"] == source(text)["input_ids"]


def test_fields_of_a_new_model_are_read_as_python():
    text = "d_model=64,routing=even,dropout_rate=0.5,tie_word_embeddings=True,routed_cross_key_values=7"
    expected = {"d_model": 64, "routing": "even", "dropout_rate": 0.5, "tie_word_embeddings": True}
    assert model_arguments.parse_overrides(text) == expected | {"routed_cross_key_values": 7}
    for wrong in ("layers=2", "to_dict=2", "d_model"):
        with pytest.raises(ValueError, match=f"config_overrides has '{wrong}'"):
            model_arguments.parse_overrides(wrong)
    with pytest.raises(ValueError, match="config_overrides is for a new model"):
        arguments = model_arguments.ModelArguments(model_name_or_path="x", config_overrides="d_model=64")
        model_arguments.load_model(arguments, AutoModelForSeq2SeqLM, SimpleNamespace())


def test_a_checkpoint_in_half_precision_is_trained_in_full(tmp_path):
    tiny_model(vocab_size=8192, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    arguments = model_arguments.ModelArguments(model_name_or_path=str(tmp_path / "half"), query_fraction=0.5)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    model = model_arguments.load_model(arguments, AutoModelForSeq2SeqLM, tokenizer)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (model.config.routed_query_fraction, model.config.routed_key_value_fraction) == (0.5, 1 / 3)


@pytest.mark.slow
def test_conversion_from_a_folder(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    source = T5ForConditionalGeneration(T5Config(**TINY_T5))
    source.save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    sample = tmp_path / "sample.txt"
    sample.write_text(ROWS[0]["document"])
    convert_t5.main([str(tmp_path / "t5"), str(tmp_path / "colt5"), "--sample", str(sample), "--sample-length", "64"])
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "colt5")
    model.set_routing_budget(feed_forward=1.0, query=1.0, key_value=1.0)
    batch = AutoTokenizer.from_pretrained(tmp_path / "colt5")("def f(x):\n    return x", return_tensors="pt")
    target = torch.tensor([[5, 6, 7]])
    expected = source.eval()(**batch, decoder_input_ids=target).logits
    # what rounding in fp32 may come to: 1e-4
    assert (model(**batch, decoder_input_ids=target).logits - expected).abs().max() < 1e-4


@pytest.mark.slow
def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    source = tmp_path / "t5"
    T5ForConditionalGeneration(T5Config(**TINY_T5)).save_pretrained(source)
    CoLT5Tokenizer.from_pretrained(TOKENIZER).save_pretrained(source)
    with pytest.raises(SystemExit):
        convert_t5.main([str(source), str(tmp_path / "colt5"), "--cross-key-value-heads", "3"])
    assert "num_cross_key_value_heads is 3; it must divide num_heads, which is 4" in capsys.readouterr().err

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(CoLT5Tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        convert_t5.main([str(source), str(tmp_path / "colt5")])
    assert {path.name for path in tmp_path.iterdir()} == {"t5"}


def test_metrics_are_squads_and_rouges():
    assert text_metrics.exact_match_and_f1(["The cat!", "a dog"], ["cat", "dogs"]) == {"exact_match": 50.0, "f1": 50.0}
    # two of three words, in both directions
    assert text_metrics.exact_match_and_f1(["big red dog"], ["big red cat"])["f1"] == pytest.approx(100 * 2 / 3)
    assert text_metrics.exact_match_and_f1([""], [""]) == {"exact_match": 100.0, "f1": 100.0}
    scores = text_metrics.rouge(["the cat sat"], ["the cat sat"])
    assert scores == pytest.approx({"rouge1": 100.0, "rouge2": 100.0, "rougeL": 100.0, "rougeLsum": 100.0})
    # one common word of two and two; no common pair
    expected = {"rouge1": 50.0, "rouge2": 0.0, "rougeL": 50.0, "rougeLsum": 50.0}
    assert text_metrics.rouge(["one two"], ["two three"]) == pytest.approx(expected)
    # two sentences in another order: each is found whole, but the longest common run of words is one of the two
    scores = text_metrics.rouge(["The cat sat. A dog ran."], ["A dog ran. The cat sat."])
    assert scores["rougeLsum"] == pytest.approx(100) and scores["rougeL"] == pytest.approx(50)
