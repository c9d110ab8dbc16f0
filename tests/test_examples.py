"""The scripts of examples/, each run on a few rows: they train, resume, and refuse bad rows before any work."""

import json

import convert_t5
import data
import finetune_classification
import finetune_seq2seq
import finetune_token_classification
import pretrain
import pytest
import torch
from example_runs import FAST, NEW_MODEL, ROWS, TOKENIZER, seq2seq_arguments, write_rows
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_summarisation_and_questions(tmp_path, lora):
    arguments = [*seq2seq_arguments(tmp_path, ROWS), "--max_steps", "2", "--max_target_length", "8"]
    arguments += ["--train_sampling_strategy", "group_by_length", "--save_strategy", "no"]
    arguments += ["--lora", "true"] if lora else ["--query_column", "query"]
    metrics = finetune_seq2seq.main(arguments)
    assert {"eval_rouge1", "eval_rouge2", "eval_rougeLsum", "train_loss", "eval_loss"} <= metrics.keys()
    assert ("eval_f1" in metrics) != lora
    assert (tmp_path / "out" / ("adapter_config.json" if lora else "model.safetensors")).exists()
    if not lora:
        assert (tmp_path / "out" / "modeling_colt5.py").exists()
        assert AutoTokenizer.from_pretrained(tmp_path / "out")("x").input_ids[-1] == 1
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")


def test_bad_rows_are_named_before_anything_is_written(tmp_path):
    bad = [*ROWS, {"document": " ", "summary": "x", "query": "x"}, {"document": "x", "summary": None, "query": "x"}]
    with pytest.raises(ValueError, match=r"row 4: document is empty\nrow 5: summary is NoneType, must be str"):
        finetune_seq2seq.main(seq2seq_arguments(tmp_path, bad))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="train has no column abstract; its columns are document, summary, query"):
        finetune_seq2seq.main([*seq2seq_arguments(tmp_path, ROWS), "--target_column", "abstract"])
    assert not (tmp_path / "out").exists()


def test_classification_of_documents(tmp_path):
    rows = [{"text": row["document"], "label": "ab"[i % 2]} for i, row in enumerate(ROWS)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    arguments = [*NEW_MODEL, *FAST, "--train_file", file, "--validation_file", file]
    metrics = finetune_classification.main(
        [*arguments, "--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--save_strategy", "no"]
    )
    assert 0 <= metrics["eval_accuracy"] <= 1
    labels = json.loads((tmp_path / "out" / "config.json").read_text())["label2id"]
    assert labels == {"a": 0, "b": 1}


def test_classification_of_words(tmp_path):
    rows = [{"tokens": ["x", "returns", "argument"], "tags": [0, 1, 0]} for _ in range(3)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    arguments = [*NEW_MODEL, *FAST, "--train_file", file, "--validation_file", file, "--max_steps", "2"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--save_strategy", "no"]
    assert 0 <= finetune_token_classification.main(arguments)["eval_accuracy"] <= 1
    write_rows(tmp_path / "rows.jsonl", [*rows, {"tokens": ["x"], "tags": [0, 1]}])
    with pytest.raises(ValueError, match="row 3 has 1 tokens and 2 tags"):
        finetune_token_classification.main(arguments)
    write_rows(tmp_path / "rows.jsonl", [*rows, {"tokens": ["x", "y"], "tags": [0, None]}])
    with pytest.raises(ValueError, match="row 3 has None among its tags"):
        finetune_token_classification.main(arguments)


@pytest.mark.parametrize("objective", ["ul2", "span_corruption"])
def test_pretraining_resumes_to_the_same_weights(tmp_path, objective):
    text = tmp_path / "text.txt"
    text.write_text("".join(row["document"] for row in ROWS) * 8)
    arguments = [*NEW_MODEL, *FAST, "--train_files", str(text), "--validation_files", str(text)]
    arguments += ["--objective", objective, "--input_length", "128", "--target_length", "48", "--max_eval_chunks", "2"]
    arguments += ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "1"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    metrics = pretrain.main([*arguments, "--output_dir", str(whole)])
    assert metrics["eval_loss"] > 0
    checkpoint = str(whole / "checkpoint-2")
    pretrain.main([*arguments, "--output_dir", str(resumed), "--resume_from_checkpoint", checkpoint])
    one, two = (AutoModelForSeq2SeqLM.from_pretrained(folder).state_dict() for folder in (whole, resumed))
    for name, weight in one.items():
        assert torch.equal(weight, two[name]), name


def test_pretraining_is_the_same_for_any_number_of_workers(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(row["document"] for row in ROWS) * 8)
    arguments = [*NEW_MODEL, *FAST, "--train_files", str(text), "--input_length", "64", "--target_length", "32"]
    arguments += ["--max_steps", "3", "--save_strategy", "no"]
    weights = []
    for workers in ("0", "2"):
        folder = tmp_path / workers
        pretrain.main([*arguments, "--dataloader_num_workers", workers, "--output_dir", str(folder)])
        weights.append(AutoModelForSeq2SeqLM.from_pretrained(folder).state_dict())
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


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


def test_conversion_from_a_folder(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    source = T5ForConditionalGeneration(
        T5Config(vocab_size=8192, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    )
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
    # issue 6: 1e-4
    assert (model(**batch, decoder_input_ids=target).logits - expected).abs().max() < 1e-4


def test_metrics_are_squads_and_rouges():
    assert data.exact_match_and_f1(["The cat!", "a dog"], ["cat", "dogs"]) == {"exact_match": 50.0, "f1": 50.0}
    # two of three words, in both directions
    assert data.exact_match_and_f1(["big red dog"], ["big red cat"])["f1"] == pytest.approx(100 * 2 / 3)
    assert data.exact_match_and_f1([""], [""]) == {"exact_match": 100.0, "f1": 100.0}
    scores = data.rouge(["the cat sat"], ["the cat sat"])
    assert scores == pytest.approx({"rouge1": 100.0, "rouge2": 100.0, "rougeLsum": 100.0})
    # one common word of two and two; no common pair
    assert data.rouge(["one two"], ["two three"]) == pytest.approx({"rouge1": 50.0, "rouge2": 0.0, "rougeLsum": 50.0})
