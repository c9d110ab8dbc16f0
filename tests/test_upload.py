"""A finished run becomes a repository of the Hub whose card says what the run did and loads what it left."""

import json
import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import finetune_classification
import finetune_seq2seq
import pytest
import torch
import upload
from example_runs import FAST, REPOSITORY, ROWS, TINY_T5, TOKENIZER, seq2seq_arguments, write_rows
from huggingface_hub import ModelCard
from models import tiny_config
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from modeling_colt5 import CoLT5ForConditionalGeneration


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small fine-tuning run."""
    folder = tmp_path_factory.mktemp("run")
    arguments = [*seq2seq_arguments(folder, ROWS), "--max_steps", "2", "--max_target_length", "8", "--save_steps", "1"]
    finetune_seq2seq.main([*arguments, "--query_column", "query", "--feed_forward_fraction", "0.25"])
    return folder / "out"


@pytest.mark.slow
def test_the_model_card_says_what_the_run_did(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    upload.main([str(run), "someone/reader", "--dry-run", "--license", "apache-2.0"])
    card = ModelCard.load(run / "README.md")
    results = json.loads((run / "all_results.json").read_text())
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "question-answering"
    assert {result.metric_name: result.metric_value for result in card.data.eval_results} == {
        name: round(results[f"eval_{name}"], 4)
        for name in ("rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match", "f1")
    }
    for text in (
        "rows.jsonl",
        "from scratch",
        # a quarter of 16,384
        "| tokens through the heavy feed-forward | 0.25 | 4,096 |",
        f"| loss | {results['eval_loss']:.4f} |",
        "| steps | 2 |",
        "`modeling_colt5.py`",
        'AutoModelForSeq2SeqLM.from_pretrained("someone/reader", trust_remote_code=True)',
    ):
        assert text in card.text, text

    (run / "README.md").write_text("mine")
    upload.main([str(run), "someone/reader", "--dry-run", "--keep-card"])
    assert (run / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("file", "message"),
    [("model.safetensors", "has not weights"), ("run.json", "finished"), ("modeling_colt5.py", "model's code")],
)
def test_an_unfinished_run_is_not_uploaded(file, message, finished_run, tmp_path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / file).unlink()
    with pytest.raises(SystemExit):
        upload.main([str(run), "someone/reader"])
    assert message in capsys.readouterr().err
    assert not (run / "README.md").exists()


@pytest.mark.parametrize(
    ("names", "wrong"),
    [(["someone//reader"], "someone//reader"), (["someone/reader", "--base-model", "../base"], "../base")],
)
def test_a_wrong_name_changes_nothing_of_the_run(names, wrong, finished_run, tmp_path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "README.md").write_text("mine")
    # as an adapter's folder has
    (run / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    with pytest.raises(SystemExit):
        upload.main([str(run), *names])
    assert wrong in capsys.readouterr().err
    assert (run / "README.md").read_text() == "mine"
    assert json.loads((run / "adapter_config.json").read_text()) == {"base_model_name_or_path": "someone/base"}


def test_a_broken_record_is_named(finished_run, tmp_path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "run.json").write_text("{}")
    with pytest.raises(SystemExit):
        upload.main([str(run), "someone/reader", "--dry-run"])
    assert "run.json is no record of a training script" in capsys.readouterr().err


# each of them loads and saves a model several times
@pytest.mark.slow
@pytest.mark.parametrize("labels", [pytest.param(None, id="summaries"), pytest.param(3, id="classes")])
def test_an_adapters_card_loads_it_with_peft(labels, tmp_path, capsys):
    """A classifier's labels too, which its base model does not know."""
    CoLT5ForConditionalGeneration(tiny_config(vocab_size=8192)).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "base")
    rows = ROWS if labels is None else [row | {"label": "xyz"[i % labels]} for i, row in enumerate(ROWS)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    arguments = [*FAST, "--model_name_or_path", str(tmp_path / "base"), "--train_file", file, "--lora", "true"]
    arguments += ["--max_steps", "1", "--output_dir", str(tmp_path / "out")]
    if labels is None:
        finetune_seq2seq.main(arguments)
    else:
        finetune_classification.main([*arguments, "--text_column", "document"])
    upload.main([str(tmp_path / "out"), str(tmp_path / "out"), "--dry-run"])
    # nobody else has the base model
    with pytest.raises(SystemExit):
        upload.main([str(tmp_path / "out"), "someone/reader"])
    assert "upload that first, and give --base-model someone/base" in capsys.readouterr().err
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "peft" and "Not evaluated" in card.text
    # the repository's name here is the folder's, so that the card's own lines load it
    namespace = {}
    exec(code_block(card.text), namespace)
    if labels is not None:
        assert namespace["model"].config.id2label == {0: "x", 1: "y", 2: "z"}
        # evaluation alone, of the second label, knows it too
        write_rows(tmp_path / "rows.jsonl", [rows[1]])
        arguments = [*FAST, "--model_name_or_path", str(tmp_path / "out"), "--validation_file", file]
        arguments += ["--text_column", "document", "--output_dir", str(tmp_path / "evaluated")]
        with torch.no_grad():
            logits = (
                namespace["model"].eval()(**namespace["tokenizer"](rows[1]["document"], return_tensors="pt")).logits
            )
        # fp32, the row padded to a multiple of 128
        expected = -logits.log_softmax(-1)[0, 1].item()
        assert finetune_classification.main(arguments)["eval_loss"] == pytest.approx(expected, rel=1e-4)


def code_block(text: str) -> str:
    """The first block of Python in a page."""
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


# seven processes that import Transformers anew: twenty seconds
@pytest.mark.slow
def test_upload_to_the_hub_and_the_cards_own_lines(hub_environment, finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    environment = hub_environment | {"PYTHONPATH": str(REPOSITORY)}

    def python(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    owner = python("-c", "import huggingface_hub as h; print(h.whoami()['name'])").strip()
    repository = f"{owner}/reader-{uuid.uuid4().hex[:8]}"
    assert "uploaded to" in python(str(REPOSITORY / "examples" / "upload.py"), str(run), repository, "--private")
    listing = f"import huggingface_hub as h; print(*h.list_repo_files({repository!r}), sep='\\n')"
    files = set(python("-c", listing).split())
    assert {
        "README.md",
        "model.safetensors",
        "tokenizer.json",
        "run.json",
        "modeling_colt5.py",
        "op_routing.py",
    } <= files
    assert not [file for file in files if file.startswith("checkpoint-") or file == "training_args.bin"]
    # as somebody without the package
    hidden = f"import sys; sys.path.insert(0, {str(REPOSITORY / 'tests')!r})\n"
    hidden += "import hub_steps; hub_steps.Hidden(['modeling_colt5'])\n"
    python("-c", hidden + code_block((run / "README.md").read_text()))

    # an adapter for it, trained on the folder, loaded from the Hub
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    arguments = [*FAST, "--model_name_or_path", str(run), "--train_file", rows, "--lora", "true", "--max_steps", "1"]
    finetune_seq2seq.main([*arguments, "--output_dir", str(tmp_path / "adapter")])
    command = [str(REPOSITORY / "examples" / "upload.py"), str(tmp_path / "adapter"), f"{repository}-adapter"]
    python(*command, "--base-model", repository)
    shutil.rmtree(run)
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.base_model == repository and f"from `{repository}`" in card.text
    python("-c", hidden + code_block(card.text))


@pytest.mark.slow
def test_conversion_by_hub_id(hub_environment, tmp_path):
    """As somebody who knows a T5 by its name only."""
    source = T5ForConditionalGeneration(T5Config(**TINY_T5))
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    environment = hub_environment | {"PYTHONPATH": str(REPOSITORY)}
    for part in (source, tokenizer):
        part.save_pretrained(tmp_path / "t5")
    push = "import sys, huggingface_hub as h; api = h.HfApi(); name = api.whoami()['name'] + '/' + sys.argv[2]; "
    push += "api.create_repo(name); api.upload_folder(repo_id=name, folder_path=sys.argv[1]); print(name)"
    command = [sys.executable, "-c", push, str(tmp_path / "t5"), f"t5-{uuid.uuid4().hex[:8]}"]
    name = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    shutil.rmtree(tmp_path / "t5")
    command = [sys.executable, str(REPOSITORY / "examples" / "convert_t5.py"), name, str(tmp_path / "colt5")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = CoLT5ForConditionalGeneration.from_pretrained(tmp_path / "colt5")
    assert torch.equal(model.shared.weight, source.shared.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "colt5").get_vocab() == tokenizer.get_vocab()
