"""The launch configurations, and training on two processes: the losses and weights of one, and checkpoints for one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from example_runs import REPOSITORY, TINY, TOKENIZER
from models import tiny_model
from safetensors.torch import load_file

import modeling_colt5

LAUNCH = REPOSITORY / "configuration" / "launch"
# twice the encoder's layers, and no chance
DEEPER = f"{TINY},num_layers=2,dropout_rate=0.0"


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
    done = subprocess.run(
        [str(part) for part in (*launcher, REPOSITORY / "examples/pretrain.py", *arguments, *more)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return tmp_path / name, done.stdout


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


@pytest.mark.parametrize("file", sorted(path.name for path in LAUNCH.glob("*.yaml")))
def test_launch_configurations_name_what_there_is(file):
    """Accelerate reads every file, and refuses keys that it does not know; the blocks to shard are the model's."""
    config = ClusterConfig.from_yaml_file(LAUNCH / file)
    assert config.mixed_precision == "bf16"
    names = yaml.safe_load((LAUNCH / file).read_text()).get("fsdp_config", {})
    if names:
        blocks = set(names["fsdp_transformer_layer_cls_to_wrap"].split(","))
        model = tiny_model()
        assert blocks == {type(stack.block[0]).__name__ for stack in (model.encoder, model.decoder)}
