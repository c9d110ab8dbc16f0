"""The launch configurations, and training on two processes: the losses and weights of one, and checkpoints for one."""

import json
import os
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from example_runs import REPOSITORY, TINY, TOKENIZER, run_processes, write_rows
from safetensors.torch import load_file

import modeling_colt5

LAUNCH = REPOSITORY / "configuration" / "launch"
# twice the encoder's layers, and no chance
DEEPER = f"{TINY},num_layers=2,dropout_rate=0.0"


def run(*command: object) -> str:
    """Run a command to its end; what it printed."""
    return run_processes([*command], env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"})


def pretrain(tmp_path: Path, name: str, *launcher: str, batch: int, more: tuple[str, ...] = ()) -> tuple[Path, str]:
    """Pre-train for six steps on two inputs a step, with plain descent and UL2, whose targets differ in length; the
    first four are a dense start.

    Args:
        tmp_path: the folder of the text and of the output.
        name: the output's folder in it.
        launcher: what starts `examples/pretrain.py`.
        batch: inputs of each process.
        more: further arguments.

    Returns:
        The output's folder and what was printed.
    """
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x, y={i * i}):\n    return x * {i} + y\n" for i in range(400)))
    arguments = ["--size", "base", "--config_overrides", DEEPER, "--tokenizer_name", TOKENIZER]
    arguments += ["--train_files", text, "--input_length", 96, "--target_length", 64, "--max_steps", 6]
    arguments += ["--optim", "sgd", "--learning_rate", 0.3, "--max_grad_norm", 0, "--lr_scheduler_type", "constant"]
    arguments += ["--logging_steps", 1, "--save_steps", 3, "--report_to", "none", "--disable_tqdm", "true"]
    arguments += ["--router_health_steps", 3]
    arguments += ["--use_cpu", "true", "--per_device_train_batch_size", batch, "--output_dir", tmp_path / name]
    return tmp_path / name, run(*launcher, REPOSITORY / "examples/pretrain.py", *arguments, *more)


def launcher(file: str, processes: int, *script: object) -> list[object]:
    """The command of a launch configuration, without its half precision, which would blur the comparison."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", LAUNCH / file]
    return [*command, "--num_processes", processes, "--mixed_precision", "no", "--main_process_port", 0, *script]


def losses(folder: Path) -> list[float]:
    """The training loss of each step."""
    history = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def gradient_norms(folder: Path) -> list[float]:
    """Of the routers, at each measurement of their health."""
    history = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    return [value for entry in history for name, value in entry.items() if name.endswith("/gradient_norm")]


def assert_same_weights(folder: Path, reference: Path) -> None:
    weights, expected = (load_file(path / "model.safetensors") for path in (folder, reference))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        # fp32, six steps of size 0.3 with gradients up to a few units: sums in another order
        assert (weight - expected[name]).abs().max() < 2e-5, name


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process with both inputs of a step."""
    return pretrain(tmp_path_factory.mktemp("one"), "out", sys.executable, batch=2)[0]


# each process starts Python and imports Transformers anew: some ten seconds a run
@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "script"), [("ddp.yaml", []), ("fsdp2.yaml", [REPOSITORY / "tests/fsdp_on_cpu.py"])], ids=["ddp", "fsdp2"]
)
def test_two_processes_train_like_one_and_one_resumes_them(file, script, one_process, tmp_path):
    two, printed = pretrain(tmp_path, "two", *launcher(file, 2, *script), batch=1)
    # fp32 sums in another order; were a process's loss not weighted by its share of the labels, the difference would
    # be of 1e-2 from the first step on
    assert losses(two) == pytest.approx(losses(one_process), abs=2e-5)
    # within the dense start, on the same short inputs
    assert losses(two)[3] < losses(two)[1] - 1, "nothing was learned: nothing was compared"
    assert_same_weights(two, one_process)
    # two layers of three routers, in two measurements, the first in the closed part of the dense start
    assert len(gradient_norms(two)) == 12 and not any(gradient_norms(two)[:6]) and all(gradient_norms(two)[6:])
    assert gradient_norms(two) == pytest.approx(gradient_norms(one_process), rel=1e-2)
    if script:
        (line,) = (line for line in printed.splitlines() if line.startswith("sharded:"))
        # PyTorch puts FSDP before a sharded module's class
        assert line.split().count("FSDPCoLT5EncoderBlock") == 2 and line.split().count("FSDPCoLT5DecoderBlock") == 1

    resume = ("--resume_from_checkpoint", str(two / "checkpoint-3"))
    start = launcher(file, 1, *script) if script else [sys.executable]
    resumed, _ = pretrain(tmp_path, "resumed", *start, batch=2, more=resume)
    assert losses(resumed)[3:] == pytest.approx(losses(two)[3:], abs=2e-5)
    assert_same_weights(resumed, two)
    modeling_colt5.CoLT5ForConditionalGeneration.from_pretrained(resumed)


def classify(tmp_path: Path, name: str, *launcher: object, batch: int) -> dict[str, float]:
    """Two steps of classification, and its evaluation on one row, which the second process has not; the metrics."""
    rows = [{"text": f"def f{i}(x): return x" * (i + 1), "label": "ab"[i % 2]} for i in range(4)]
    train, one = write_rows(tmp_path / "rows.jsonl", rows), write_rows(tmp_path / "one.jsonl", rows[:1])
    arguments = ["--size", "base", "--config_overrides", f"{TINY},dropout_rate=0.0", "--tokenizer_name", TOKENIZER]
    arguments += ["--train_file", train, "--validation_file", one, "--max_steps", 2, "--save_strategy", "no"]
    arguments += ["--optim", "sgd", "--learning_rate", 0.3, "--gradient_accumulation_steps", 1, "--use_cpu", "true"]
    arguments += ["--report_to", "none", "--per_device_train_batch_size", batch, "--output_dir", tmp_path / name]
    run(*launcher, REPOSITORY / "examples/finetune_classification.py", *arguments)
    return json.loads((tmp_path / name / "all_results.json").read_text())


# a script for one of two processes starts Python twice
@pytest.mark.slow
def test_an_encoder_alone_is_sharded_by_the_same_file(tmp_path):
    """Two processes have the losses of one; the blocks to shard are those that the model has."""
    one = classify(tmp_path, "one", sys.executable, batch=2)
    two = classify(tmp_path, "two", *launcher("fsdp2.yaml", 2, REPOSITORY / "tests/fsdp_on_cpu.py"), batch=1)
    assert one["train_loss"] != one["eval_loss"]
    for name in ("train_loss", "eval_loss"):
        # fp32 sums in another order
        assert two[name] == pytest.approx(one[name], abs=2e-5), name


@pytest.mark.slow
def test_embeddings_are_trained_by_two_processes(tmp_path):
    """Both score what one process scores before the first step, and the first one saves."""
    pytest.importorskip("sentence_transformers")
    rows = [{"query": f"where is number {i}", "document": f"def find_{i}(x): return {i}"} for i in range(10)]
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    arguments = ["--size", "base", "--config_overrides", TINY, "--tokenizer_name", TOKENIZER, "--train_file", file]
    arguments += ["--validation_share", 0.4, "--use_cpu", "true", "--report_to", "none", "--save_strategy", "no"]
    arguments += ["--per_device_train_batch_size", 2, "--max_steps", 1, "--output_dir"]
    scores = {}
    for name, start in (("one", [sys.executable]), ("two", launcher("ddp.yaml", 2))):
        run(*start, REPOSITORY / "examples/embeddings.py", *arguments, tmp_path / name)
        scores[name] = json.loads((tmp_path / name / "all_results.json").read_text())
    assert scores["two"]["before_mrr@10"] == scores["one"]["before_mrr@10"] > 0
    assert (
        load_file(tmp_path / "two" / "model.safetensors").keys()
        == load_file(tmp_path / "one" / "model.safetensors").keys()
    )


@pytest.mark.parametrize("file", sorted(path.name for path in LAUNCH.glob("*.yaml")))
def test_launch_configurations_name_what_there_is(file):
    """Accelerate reads every file, and refuses keys that it does not know; a model says itself what to shard."""
    config = ClusterConfig.from_yaml_file(LAUNCH / file)
    assert config.mixed_precision == "bf16"
    assert "fsdp_transformer_layer_cls_to_wrap" not in (config.fsdp_config or {})
