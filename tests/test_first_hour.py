"""What a newcomer meets first in the training scripts: defaults, the estimate before a run, folders of texts, what was
cut off, kinds of labels, and errors in one line."""

import csv
import gzip
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import class_metrics
import data
import finetune_classification
import finetune_seq2seq
import finetune_token_classification
import model_arguments
import numpy as np
import pretrain
import pytest
import run_costs
import torch
import training_defaults
from datasets import Dataset, DatasetDict
from example_runs import FAST, NEW_MODEL, REPOSITORY, ROWS, TOKENIZER, write_rows
from models import tiny_model
from transformers import TrainerCallback

from modeling_colt5 import CoLT5ForConditionalGeneration, CoLT5ForSequenceClassification, CoLT5Tokenizer

LABELLED = [{"text": row["document"], "label": "ab"[i % 2]} for i, row in enumerate(ROWS)]


def arguments_of(tmp_path: Path, rows: list[dict[str, Any]], validation: bool = True) -> list[str]:
    """A new tiny model on the rows, which are the evaluation's as well."""
    file = write_rows(tmp_path / "rows.jsonl", rows)
    more = ["--validation_file", file] if validation else []
    return [*NEW_MODEL, *FAST, "--train_file", file, *more, "--output_dir", str(tmp_path / "out")]


def parse(script: Any, *options: str) -> Any:
    """The script's training arguments."""
    kinds = (script.RunArguments,)
    return model_arguments.parse_arguments(kinds, None, ["--output_dir", "out", "--use_cpu", "true", *options])[0]


SCRIPTS = [pretrain, finetune_seq2seq, finetune_classification, finetune_token_classification]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_what_is_given_stays(script):
    own = parse(script)
    assert (own.bf16, own.eval_steps, own.save_steps, own.logging_steps) == (False, 1 / 12, 1 / 12, 0.01)
    assert own.per_device_train_batch_size * own.gradient_accumulation_steps == 8
    given = parse(script, "--eval_steps", "7", "--save_steps", "14", "--logging_steps", "3", "--eval_strategy", "no")
    assert (given.eval_steps, given.save_steps, given.logging_steps, given.eval_strategy) == (7, 14, 3, "no")
    given.decide_evaluation(True, True)
    assert given.eval_strategy == "no" and not given.load_best_model_at_end
    with pytest.raises(ValueError, match="evaluations_per_epoch is 0"):
        parse(script, "--evaluations_per_epoch", "0")


@pytest.mark.parametrize("epochs", ["0.1", "0.25", "1", "3", "40"])
@pytest.mark.parametrize("evaluations", ["1", "4"])
def test_evaluations_an_epoch_for_any_number_of_epochs(epochs, evaluations):
    training = parse(finetune_classification, "--num_train_epochs", epochs, "--evaluations_per_epoch", evaluations)
    steps = 1000
    # what Trainer makes of it, which is never more often; the run's end is evaluated beside
    every = math.ceil(training.eval_steps * steps)
    expected = max(1.0, float(epochs) * int(evaluations))
    assert 0 < training.eval_steps < 1 and steps / every == pytest.approx(expected, rel=0.15)


def test_the_best_is_kept_where_every_save_is_evaluated():
    for options, best in (
        ([], True),
        (["--save_steps", "5"], True),
        (["--eval_steps", "5"], True),
        (["--eval_steps", "5", "--save_steps", "10"], False),
        (["--eval_strategy", "epoch", "--save_strategy", "epoch"], True),
        (["--save_strategy", "no"], False),
        (["--load_best_model_at_end", "false"], False),
    ):
        training = parse(finetune_classification, *options)
        training.decide_evaluation(True, True, "f1", True)
        assert training.load_best_model_at_end is best, options
        if best:
            assert (training.metric_for_best_model, training.greater_is_better) == ("f1", True)
    training = parse(finetune_classification, "--metric_for_best_model", "accuracy")
    training.decide_evaluation(True, True, "f1", True)
    assert training.load_best_model_at_end and training.metric_for_best_model == "accuracy"
    training = parse(finetune_classification)
    training.decide_evaluation(False, True, "f1", True)
    assert training.eval_strategy == "no" and not training.load_best_model_at_end


@pytest.mark.slow
def test_a_run_is_logged_evaluated_and_says_how_long_it_takes(tmp_path):
    """24 documents, two epochs: an evaluation four times an epoch, whatever the number of steps."""
    lines: list[dict[str, Any]] = []

    class Recorder(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            lines.append({"step": state.global_step, **logs})

    rows = LABELLED * 6
    start = finetune_classification.prepare([*arguments_of(tmp_path, rows), "--num_train_epochs", "2"])
    trainer = start.args[0]
    trainer.add_callback(Recorder())
    start()
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == list(range(1, 25))
    assert all(re.fullmatch(r"\d+:\d\d:\d\d", line["time_left"]) for line in losses)
    assert [line["step"] for line in lines if "eval_f1" in line][:8] == list(range(3, 25, 3))
    # dense start's first 15 steps: none of its models is the best
    assert trainer.state.best_global_step >= 15
    assert sum(path.name.startswith("checkpoint-") for path in (tmp_path / "out").iterdir()) <= 2


def test_rates_follow_sizes_unless_a_rate_is_given():
    model = tiny_model(CoLT5ForSequenceClassification)
    training = parse(finetune_classification)
    groups = training.make_optimizer(model, is_new=False).param_groups
    assert training.learning_rate == training_defaults.RATE and len({group["lr"] for group in groups}) > 1
    training = parse(finetune_classification)
    training.make_optimizer(model, is_new=True)
    assert training.learning_rate == training_defaults.NEW_MODEL_RATE
    for options, rate in (
        (["--learning_rate", "3e-4"], 3e-4),
        (["--size_scaled_learning_rate", "false"], 5e-5),
        (["--optim", "adafactor"], 5e-5),
    ):
        training = parse(finetune_classification, *options)
        assert training.make_optimizer(model, is_new=False) is None and training.learning_rate == rate
    training = parse(finetune_classification, "--learning_rate", "2e-3", "--size_scaled_learning_rate", "true")
    assert training.make_optimizer(model, is_new=False) is not None and training.learning_rate == 2e-3
    adapted = model_arguments.with_lora(
        model, model_arguments.FineTunedModelArguments(lora=True, lora_rank=2), "SEQ_CLS", ["classification_head"]
    )
    training = parse(finetune_classification)
    assert training.make_optimizer(adapted, is_new=False) is None
    assert training.learning_rate == training_defaults.ADAPTER_RATE


def kept_by_autograd(model: torch.nn.Module, **batch: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for its backward, each storage once, without the weights'."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    del loss
    return sum(kept.values())


@pytest.mark.slow
@pytest.mark.parametrize("targets", [64, 512])
def test_estimated_memory_is_near_what_autograd_keeps(targets):
    """Within a factor of 1.5 of the tensors that a pass on the CPU, in fp32, keeps in fact."""
    torch.manual_seed(0)
    sizes = {"d_model": 128, "d_kv": 16, "d_ff": 256, "num_heads": 8, "num_light_heads": 2, "num_heavy_heads": 6}
    sizes |= {"light_d_ff": 128, "heavy_d_ff": 1024, "num_layers": 3, "num_decoder_layers": 3, "vocab_size": 512}
    model = tiny_model(CoLT5ForConditionalGeneration, **sizes, dropout_rate=0.1).train()
    ids, labels = torch.randint(3, 512, (2, 1024)), torch.randint(3, 512, (2, targets))
    kept = kept_by_autograd(model, input_ids=ids, labels=labels)
    estimated = run_costs.kept_bytes(model, run_costs.RowShape(1024, targets), 2, False, False)
    assert kept / 1.5 < estimated < 1.5 * kept


def test_estimated_operations_are_those_of_the_products():
    """Against PyTorch's own count of a forward and backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    sizes = {"d_model": 128, "d_kv": 16, "d_ff": 256, "num_heads": 8, "num_light_heads": 2, "num_heavy_heads": 6}
    sizes |= {"light_d_ff": 128, "heavy_d_ff": 1024, "num_layers": 3, "num_decoder_layers": 3, "vocab_size": 512}
    model = tiny_model(CoLT5ForConditionalGeneration, **sizes)
    ids, labels = torch.randint(3, 512, (1, 1024)), torch.randint(3, 512, (1, 256))
    # of the fused one on the CPU PyTorch counts nothing
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=labels).loss.backward()
    estimated = run_costs.row_flops(model.config, run_costs.RowShape(1024, 256))
    # PyTorch's folded windows compute more pairs than the light attention needs
    assert counter.get_total_flops() / 1.5 < estimated < 1.1 * counter.get_total_flops()


@pytest.mark.parametrize(
    ("options", "steps", "passes"),
    [
        # 20 documents, two a pass: 10 passes an epoch
        (["--num_train_epochs", "3"], 30, 30),
        (["--num_train_epochs", "3", "--gradient_accumulation_steps", "4"], 9, 30),
        (["--max_steps", "7", "--gradient_accumulation_steps", "2"], 7, 14),
    ],
)
def test_a_dry_run_says_what_the_run_would_take(tmp_path, capsys, options, steps, passes):
    costs = finetune_seq2seq.main([*arguments_of(tmp_path, ROWS * 5), *options, "--dry_run", "true"])
    said = capsys.readouterr().out
    assert costs["steps"] == steps and f"steps   {steps}, of {passes} passes" in said
    assert re.search(r"Estimated by formula.*memory  [\d.]+ GiB.*hours   [\d.]+ on this CPU", said, re.DOTALL)
    assert costs["memory"] > 0 and list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("flops", "host", "seconds"), [(6e12, 1.0, 3.0), (6e12, 4.0, 4.0)])
def test_a_run_takes_as_long_as_the_slower_of_a_gpu_and_its_host(flops, host, seconds):
    costs = run_costs.RunCosts(10, 10, 0, 0, flops, 2e12, host, "GPU", False)
    assert costs.seconds == seconds and f"{seconds / 10:.1f} s a step" in str(costs)


def test_a_dry_run_of_every_script(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("import os\n" * 200)
    pretrain.main(
        [*NEW_MODEL, *FAST, "--train_files", str(tmp_path), "--max_steps", "10", "--dry_run", "true"]
        + ["--output_dir", str(tmp_path / "out")]
    )
    finetune_classification.main([*arguments_of(tmp_path, LABELLED), "--dry_run", "true"])
    rows = [{"tokens": ["x", "y"], "tags": [0, 1]}] * 4
    finetune_token_classification.main([*arguments_of(tmp_path, rows), "--dry_run", "true"])
    assert capsys.readouterr().out.count("Estimated by formula") == 3
    assert list((tmp_path / "out").iterdir()) == []
    file = str(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="no training rows"):
        finetune_seq2seq.main(
            [*NEW_MODEL, *FAST, "--validation_file", write_rows(Path(file), ROWS), "--dry_run", "true"]
            + ["--output_dir", str(tmp_path / "out")]
        )


def test_weights_in_the_estimate():
    model = tiny_model(CoLT5ForConditionalGeneration)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert run_costs.weight_bytes(model, bf16=False) == 16 * count
    assert run_costs.weight_bytes(model, bf16=True) == 18 * count
    model.requires_grad_(False)
    assert run_costs.weight_bytes(model, bf16=False) == 4 * count


class Card:
    """A GPU with some memory, as PyTorch describes it."""

    def __init__(self, total_memory: int):
        self.total_memory = total_memory


@pytest.mark.slow
@pytest.mark.parametrize(("gib", "wanted"), [(80, False), (1e-4, True)])
@pytest.mark.parametrize("given", [None, "false", "true"])
def test_checkpointing_where_the_card_would_not_do_without(tmp_path, monkeypatch, gib, wanted, given):
    option = [] if given is None else [f"--{training_defaults.CHECKPOINTING}", given]
    start = finetune_classification.prepare([*arguments_of(tmp_path, LABELLED), *option])
    trainer = start.args[0]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card(int(gib * 2**30)))
    monkeypatch.setattr(type(trainer.args), "device", torch.device("cuda"))
    run_costs.decide_costs(trainer, [run_costs.RowShape(300)], None, start)
    expected = wanted if given is None else given == "true"
    assert bool(getattr(trainer.args, training_defaults.CHECKPOINTING)) is expected


def make_folder(folder: Path, texts: dict[str, str]) -> Path:
    """A folder of text files by name."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def load(folder: Path, **more: Any) -> Dataset:
    return data.load_rows(data.DataArguments(train_file=str(folder), **more))["train"]


def test_folders_of_texts(tmp_path):
    texts = {"b/2.txt": "zwei\n\nLines", "a/1.txt": "ein ß", "a/deep/3.txt": "three", "a/notes.md": "not a text"}
    rows = load(make_folder(tmp_path / "plain", texts))
    assert rows["file_name"] == ["a/1.txt", "a/deep/3.txt", "b/2.txt"]
    assert rows["text"] == ["ein ß", "three", "zwei\n\nLines"] and rows["label"] == ["a", "a/deep", "b"]
    rows = load(make_folder(tmp_path / "flat", {"1.txt": "x", "2.txt": "y"}))
    assert set(rows.column_names) == {"text", "file_name"}
    assert load(tmp_path / "flat", max_train_samples=1)["text"] == ["x"]
    # as some machines write names, and what a Mac adds
    (make_folder(tmp_path / "capitals", {"1.TXT": "x", "._1.txt": "\0"}) / "2.Txt.GZ").write_bytes(gzip.compress(b"y"))
    assert load(tmp_path / "capitals")["text"] == ["x", "y"]
    write_rows(tmp_path / "ROWS.JSONL", LABELLED)
    assert load(tmp_path / "ROWS.JSONL").to_list() == LABELLED


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_folder_with_metadata(tmp_path, kind):
    folder = make_folder(tmp_path / "texts", {"1.txt": "one", "sub/2.txt": "two"})
    table = [{"file_name": "sub/2.txt", "summary": "II"}, {"file_name": "1.txt", "summary": "I"}]
    file = folder / f"metadata.{kind}"
    if kind == "jsonl":
        write_rows(file, table)
    else:
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["file_name", "summary"])
            writer.writeheader()
            writer.writerows(table)
    rows = load(folder)
    assert (rows["text"], rows["summary"]) == (["one", "two"], ["I", "II"])
    make_folder(folder, {"3.txt": "three"})
    with pytest.raises(ValueError, match=r"metadata\.\w+ has no 3.txt \(1 of 3 texts\)"):
        load(folder)


def test_folders_that_cannot_be_are_refused(tmp_path):
    folder = make_folder(tmp_path / "texts", {"1.doc": "x"})
    with pytest.raises(ValueError, match=r"texts has no .txt or .pdf files; it has files that end in .doc"):
        load(folder)
    with pytest.raises(ValueError, match="nor any other file"):
        (tmp_path / "none").mkdir()
        load(tmp_path / "none")
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    make_folder(folder, {"1.txt": "x"})
    with pytest.raises(ValueError, match="is a folder: give folders for training and validation, or files for both"):
        load(folder, validation_file=rows)
    with pytest.raises(ValueError, match="has no .txt or .pdf files"):
        pretrain.load_documents(pretrain.CorpusArguments(train_files=[str(tmp_path / "none")]))


@pytest.mark.slow
def test_scripts_read_folders(tmp_path):
    texts = {f"{'ab'[i % 2]}/{i}.txt": row["document"] for i, row in enumerate(ROWS)}
    folder = str(make_folder(tmp_path / "texts", texts))
    more = [*NEW_MODEL, *FAST, "--max_steps", "1", "--save_strategy", "no", "--output_dir", str(tmp_path / "out")]
    both = ["--train_file", folder, "--validation_file", folder]
    assert {"eval_accuracy", "eval_f1"} <= finetune_classification.main([*more, *both]).keys()
    rows = [{"file_name": name, "summary": "s"} for name in texts]
    write_rows(tmp_path / "texts/metadata.jsonl", rows)
    assert "eval_rouge1" in finetune_seq2seq.main([*more, *both, "--max_target_length", "4"])
    documents, held_out = pretrain.load_documents(pretrain.CorpusArguments(train_files=[folder]))
    assert sorted(documents) == sorted(texts.values()) and held_out is None


def test_what_is_cut_off_is_counted_and_said(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(data.logger, "warning", said.append)
    tokenizer = CoLT5Tokenizer.from_pretrained(TOKENIZER)
    rows = [{**row, "document": row["document"] * (i + 1)} for i, row in enumerate(ROWS)]
    lengths = [len(tokenizer(row["document"])["input_ids"]) for row in rows]
    limit = sorted(lengths)[1]
    lost = [max(0, length - limit) for length in lengths]
    arguments = [*arguments_of(tmp_path, rows, validation=False), "--max_source_length", str(limit)]
    finetune_seq2seq.main([*arguments, "--max_target_length", "2", "--dry_run", "true"])
    # the first says that there are no rows for evaluation
    inputs, targets = said[1:]
    cut = sum(number > 0 for number in lost)
    assert inputs == (
        f"train: {cut} of 4 inputs were cut, and {sum(lost):,} tokens of {sum(lengths):,} lost; the longest lost "
        f"{max(lost):,}"
    )
    assert targets.startswith("train: 4 of 4 targets were cut")
    said.clear()
    finetune_seq2seq.main([*arguments_of(tmp_path, ROWS), "--dry_run", "true"])
    assert said == []


@pytest.mark.parametrize("script", SCRIPTS[1:], ids=lambda script: script.__name__)
def test_without_a_model_it_is_said_what_to_name(tmp_path, script):
    options = ["--train_file", "rows.jsonl", "--output_dir", str(tmp_path / "out"), *FAST]
    with pytest.raises(ValueError, match="name the model to begin with: --model_name_or_path"):
        script.prepare(options)
    with pytest.raises(ValueError, match="give either --model_name_or_path, or --size"):
        script.prepare([*options, *NEW_MODEL, "--model_name_or_path", str(tmp_path)])


def test_budgets_may_be_fractions(tmp_path):
    start = finetune_classification.prepare([*arguments_of(tmp_path, LABELLED), "--query_fraction", "1/8"])
    config = start.args[0].model.config
    assert (config.routed_query_fraction, config.routed_feed_forward_fraction) == (1 / 8, 1 / 16)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS[1:], ids=lambda script: script.__name__)
def test_rows_are_held_out(tmp_path, script):
    """A quarter of the training rows, the same in each run; the rest is trained on, and no row is in both."""
    rows = [
        {"document": f"x = {i}", "text": f"x = {i}", "summary": "s", "label": i % 2, "tokens": [f"{i}"], "tags": [0]}
        for i in range(16)
    ]
    options = [*arguments_of(tmp_path, rows, validation=False), "--validation_share", "0.25"]
    first, second = (script.prepare(options).args[0] for _ in range(2))
    parts = [
        [tuple(ids) for ids in part["input_ids"]]
        for part in (first.train_dataset, first.eval_dataset, second.eval_dataset)
    ]
    assert [len(part) for part in parts] == [12, 4, 4] and parts[1] == parts[2]
    assert len({*parts[0], *parts[1]}) == 16 and first.args.load_best_model_at_end
    with pytest.raises(ValueError, match="leave it out where validation rows are given"):
        script.prepare([*options, "--validation_file", str(tmp_path / "rows.jsonl")])
    options[-1] = "1.5"
    with pytest.raises(ValueError, match=r"validation_share is 1.5; it must be"):
        script.prepare(options)


@pytest.mark.parametrize("script", SCRIPTS[2:], ids=lambda script: script.__name__)
def test_rows_are_held_out_after_their_labels_are_read(tmp_path, script):
    """A label of one row has its number also where that row is held out, and a bad one is named by its file's row."""
    rows = [{"text": f"x = {i}", "label": f"n{i}", "tokens": [f"{i}"], "tags": [f"n{i}"]} for i in range(6)]
    options = [*arguments_of(tmp_path, rows, validation=False), "--validation_share", "0.5"]
    trainer = script.prepare(options).args[0]
    assert trainer.model.config.label2id == {f"n{i}": i for i in range(6)}
    assert len(trainer.train_dataset) == len(trainer.eval_dataset) == 3
    write_rows(tmp_path / "rows.jsonl", [*rows, {"text": "y", "label": " ", "tokens": ["y"], "tags": []}])
    with pytest.raises(ValueError, match=r"train has bad rows:\nrow 6: (label|tags) is empty$"):
        script.prepare(options)
    write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match="validation_share is 0.99, which holds out all of the 6 training rows"):
        script.prepare([*options[:-1], "0.99"])


def test_rows_without_any_label_are_refused(tmp_path):
    options = arguments_of(tmp_path, [{"text": "x", "label": []}] * 2)
    with pytest.raises(ValueError, match="no training row has a label: label is an empty list in each"):
        finetune_classification.prepare(options)
    assert not (tmp_path / "out").exists()


def test_what_a_short_run_without_evaluation_says(tmp_path, monkeypatch):
    said: list[str] = []
    for module in (data, run_costs):
        monkeypatch.setattr(module.logger, "warning", said.append)
    options = [*arguments_of(tmp_path, LABELLED, validation=False), "--gradient_accumulation_steps", "2"]
    finetune_classification.prepare(options)
    assert "nothing is evaluated" in said[0] and "The run has 3 steps, which are few" in said[1] and len(said) == 2
    said.clear()
    finetune_classification.prepare([*arguments_of(tmp_path, LABELLED), "--max_steps", "3"])
    assert said == []


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 3])
def test_generated_texts_are_as_long_as_the_targets_may_be(tmp_path, limit):
    """Whatever limit the model came with; the limit is saved with the model."""
    model = tiny_model(CoLT5ForConditionalGeneration, vocab_size=8192)
    # longer than any target, and no end of a text before that
    model.generation_config.update(max_new_tokens=30, suppress_tokens=[1])
    model.save_pretrained(tmp_path / "model")
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    options = ["--model_name_or_path", str(tmp_path / "model"), "--tokenizer_name", str(TOKENIZER), *FAST]
    options += ["--train_file", file, "--validation_file", file, "--output_dir", str(tmp_path / "out")]
    options += ["--max_target_length", "5", "--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "no"]
    if limit is not None:
        options += ["--generation_max_length", str(limit)]
    start = finetune_seq2seq.prepare(options)
    # with the token that decoding starts with
    expected = limit or 6
    assert start.args[0].predict(start.args[0].eval_dataset).predictions.shape[1] == expected
    start()
    trained = CoLT5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert trained.generate(torch.tensor([[5, 6, 1]])).shape[1] == expected


def splits(*labels: Any) -> DatasetDict:
    return DatasetDict({"train": Dataset.from_dict({"label": list(labels)})})


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (["a", "b"], data.SINGLE),
        ([0, 1], data.SINGLE),
        ([True, False], data.SINGLE),
        ([[True], [False]], data.SEVERAL),
        ([["a"], [], ["a", "b"]], data.SEVERAL),
        ([[], ["b"]], data.SEVERAL),
        ([[0], [1, 2]], data.SEVERAL),
        ([[], [3]], data.SEVERAL),
        ([0.5, 1.0], data.NUMBERS),
        ([[0.5, 1.0], [0.0, 2.0]], data.NUMBERS),
    ],
)
def test_kinds_of_labels(labels, kind):
    assert data.label_kind(splits(*labels), "label", None) == kind


def test_labels_of_a_wanted_kind():
    assert data.label_kind(splits(1, 2), "label", data.NUMBERS) == data.NUMBERS
    for labels, wanted, message in (
        ([True], data.NUMBERS, "row 0: label is bool, must be float"),
        ([[], [0.5]], None, "row 1: label has 1 numbers, the first row has 0"),
        (["a"], data.NUMBERS, "row 0: label is str, must be float"),
        ([0.5], data.SINGLE, "row 0: label is float, must be"),
        (["a"], data.SEVERAL, "row 0: label is str, must be a list, each of it str"),
        ([[0.5], [0.5, 1.0]], None, "row 1: label has 2 numbers, the first row has 1"),
        ([0.5, float("nan")], None, "row 1: label is nan, must be finite"),
        ([0.5, None], None, "row 1: label is NoneType, must be float"),
        ([["a"], [" "]], None, "row 1: label is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            data.label_kind(splits(*labels), "label", wanted)


@pytest.mark.slow
def test_several_labels_are_learned(tmp_path):
    """Four documents by heart, of which one has no label and one has both; evaluation alone gives the same."""
    texts = ["import os\n", "x = 1\n", "def f(): pass\n", "class A: pass\n"]
    rows = [
        {"text": text * 5, "label": labels} for text, labels in zip(texts, [["a"], ["b"], [], ["a", "b"]], strict=True)
    ]
    arguments = [*arguments_of(tmp_path, rows), "--save_strategy", "no", "--max_steps", "60", "--eval_strategy", "no"]
    metrics = finetune_classification.main([*arguments, "--learning_rate", "1e-2", "--seed", "1"])
    assert metrics["eval_accuracy"] == metrics["eval_f1"] == metrics["eval_f1_micro"] == 1
    model = CoLT5ForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.problem_type == data.SEVERAL and model.config.label2id == {"a": 0, "b": 1}
    again = ["--model_name_or_path", str(tmp_path / "out"), *FAST, "--validation_file", str(tmp_path / "rows.jsonl")]
    assert finetune_classification.main([*again, "--output_dir", str(tmp_path / "evaluated")])["eval_accuracy"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [1, 2])
def test_regression_is_learned(tmp_path, numbers):
    texts = ["import os\n", "x = 1\n", "def f(): pass\n", "class A: pass\n"]
    rows = [{"text": text * 5, "label": i / 2 if numbers == 1 else [i / 2, 1 - i / 2]} for i, text in enumerate(texts)]
    arguments = [*arguments_of(tmp_path, rows), "--save_strategy", "no", "--max_steps", "60", "--eval_strategy", "no"]
    metrics = finetune_classification.main([*arguments, "--learning_rate", "1e-2", "--seed", "1"])
    assert metrics["eval_r2"] > 0.8
    model = CoLT5ForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.problem_type == data.NUMBERS and model.config.num_labels == numbers


def test_scores_of_classes_labels_and_numbers():
    """By their definitions, on counts made by hand."""
    scores = class_metrics.class_scores(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]))
    # F1 of class 0: 2 right of 3 guessed and 2 there; of class 1: 1 right of 1 guessed and 2 there
    assert scores == pytest.approx({"accuracy": 0.75, "f1": (0.8 + 2 / 3) / 2})
    scores = class_metrics.label_scores(np.array([[1, 0], [1, 1]]), np.array([[1, 0], [0, 1]]))
    assert scores == pytest.approx({"accuracy": 0.5, "f1": (2 / 3 + 1) / 2, "f1_micro": 0.8})
    scores = class_metrics.number_scores(np.array([[1.0], [3.0]]), np.array([1.0, 2.0]))
    assert scores == pytest.approx({"mse": 0.5, "mae": 0.5, "r2": -1.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train_file", "nowhere.jsonl"], "nowhere.jsonl is missing or empty"),
        (["--train_file", "rows.jsonl", "--model_name_or_path", "no/where"], "error: "),
        (["--train_file", "rows.jsonl", "--label_column", "class"], "train has no column class"),
        (
            ["--train_file", "rows.jsonl", "--model_name_or_path", "../t5/small"],
            "no folder is, and which is no Hub id",
        ),
        (["--train_file", "rows.txt"], "given as the folder that they are in"),
        (["--train_file", "rows.jsonl", "--max_train_samples", "1"], "all training rows have the label 'a'"),
        (["--train_file", "rows.jsonl", "--eval_steps", "1.5"], "eval_steps"),
        (["--train_file", "rows.jsonl", "--nonsense", "1"], "nonsense"),
        (["--train_file", "rows.jsonl", "--config_overrides", "d_model=-1"], "d_model"),
    ],
)
def test_errors_of_the_input_are_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", LABELLED)
    (tmp_path / "rows.txt").write_text("a text")
    model = ["--output_dir", "out", *FAST] + ([] if "--model_name_or_path" in options else NEW_MODEL)
    monkeypatch.setattr(sys, "argv", ["finetune_classification.py", *model, *options])
    with pytest.raises(SystemExit) as stop:
        training_defaults.run_script(finetune_classification.prepare)
    said = str(stop.value.code)
    assert message in said and said.startswith("finetune_classification.py: error: ") and "\n" not in said
    assert not (tmp_path / "out").exists()


# what would fail in the middle of a run, or be read as no limit at all
TOO_SMALL = {
    "per_device_train_batch_size": ("0", 1),
    "per_device_eval_batch_size": ("-1", 1),
    "gradient_accumulation_steps": ("0", 1),
    "evaluations_per_epoch": ("0", 1),
    "router_health_steps": ("-1", 0),
    "lora_rank": ("0", 1),
    "max_eval_samples": ("-3", 1),
    "max_length": ("0", 2),
    "max_source_length": ("1", 2),
    "max_target_length": ("-1", 2),
    "generation_max_length": ("0", 2),
    "generation_num_beams": ("0", 1),
    "pad_to_multiple_of": ("0", 1),
    "max_eval_chunks": ("0", 1),
}


def test_numbers_that_are_too_small_are_refused_by_name(tmp_path):
    refused = set()
    for script in SCRIPTS:
        kinds = [getattr(script, name) for name in ("TaskArguments", "CorpusArguments", "RunArguments")
                 if hasattr(script, name)]  # fmt: skip
        model = "ModelArguments" if script is pretrain else "FineTunedModelArguments"
        kinds += [model_arguments.RouterArguments, getattr(model_arguments, model)]
        fields = {name for kind in kinds for name in kind.__dataclass_fields__}
        for name in fields & TOO_SMALL.keys():
            value, least = TOO_SMALL[name]
            options = [
                *NEW_MODEL,
                *FAST,
                "--max_steps",
                "1",
                "--output_dir",
                str(tmp_path / "out"),
                f"--{name}",
                value,
            ]
            with pytest.raises(ValueError, match=f"^{name} is {value}; it must be at least {least}$"):
                script.prepare(options)
            refused.add(name)
    assert refused == TOO_SMALL.keys() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "value"), [("closed", "1.0"), ("opening", "0"), ("input_share", "2")])
def test_shares_of_a_dense_start_are_refused_by_the_names_of_their_options(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"^dense_start_{name} is {float(value)}; it must be"):
        finetune_classification.prepare([*arguments_of(tmp_path, LABELLED), f"--dense_start_{name}", value])
    assert not (tmp_path / "out").exists()


def test_a_run_that_ended_while_it_saved_goes_on_from_the_checkpoint_before(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(training_defaults.logger, "warning", said.append)
    options = [*arguments_of(tmp_path, LABELLED), "--max_steps", "3", "--save_steps", "1", "--save_total_limit", "5"]
    finetune_classification.main(options)
    out = tmp_path / "out"
    # Trainer writes this file last
    (out / "checkpoint-3" / "trainer_state.json").unlink()
    resume = ["--resume_from_checkpoint", "true"]
    start = finetune_classification.prepare([*options, *resume])
    assert start.args[0].args.resume_from_checkpoint == str(out / "checkpoint-2")
    assert len(said) == 1 and f"{out / 'checkpoint-3'} is not whole" in said[0]
    start()
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    # the losses of the steps before come from the checkpoint: each is there once
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3]
    for step in (1, 2, 3):
        (out / f"checkpoint-{step}" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=f"true, and {out} has no whole checkpoint; leave it out to begin anew"):
        finetune_classification.prepare([*options, *resume])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_checkpoint_to_resume_is_looked_for_before_anything_is_read(tmp_path, script):
    options = [*FAST, "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--resume_from_checkpoint"]
    for given in (str(tmp_path / "checkpoint-3"), str(tmp_path)):
        with pytest.raises(ValueError, match=f"resume_from_checkpoint is '{given}', which has no trainer_state.json"):
            script.prepare([*options, given])
    with pytest.raises(ValueError, match="out has no whole checkpoint"):
        script.prepare([*options, "True"])
    # a run from the beginning, which lacks its model
    with pytest.raises(ValueError, match="name the model to begin with"):
        script.prepare([*options, "false"])
    assert not (tmp_path / "out").exists()


def test_errors_of_the_run_keep_their_traceback(monkeypatch):
    def prepare(argv: list[str] | None) -> Any:
        def start() -> None:
            raise ValueError("in the middle of the run")

        return start

    with pytest.raises(ValueError, match="in the middle of the run"):
        training_defaults.run_script(prepare)


def test_a_script_leaves_the_other_processes_at_its_end(tmp_path):
    def prepare(argv: list[str] | None) -> Any:
        group = {"backend": "gloo", "init_method": f"file://{tmp_path}/group", "rank": 0, "world_size": 1}
        return lambda: torch.distributed.init_process_group(**group)

    training_defaults.run_script(prepare)
    assert not torch.distributed.is_initialized()


# a process of its own, which imports everything
@pytest.mark.slow
def test_a_script_fails_without_a_traceback(tmp_path):
    command = [sys.executable, "examples/finetune_seq2seq.py", *NEW_MODEL, "--train_file", "nowhere.jsonl"]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "out")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith("error: nowhere.jsonl is missing or empty")
