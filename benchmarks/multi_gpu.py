"""Training base-size CoLT5 at 16,384 tokens on one GPU and on two, side by side: DDP and FSDP2 through Trainer.

python benchmarks/multi_gpu.py

Every run is `accelerate launch` with a file of configuration/launch. The runs on two GPUs save a checkpoint, which one
GPU then resumes with the same inputs a step: it must come to the losses that two GPUs came to.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import make_parser, parse
from peers import BASE, TINY, colt5_config
from results import Row, Table
from training import RandomDocuments, StepTimes
from transformers import Trainer, TrainingArguments, set_seed

from modeling_colt5 import CoLT5ForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
TITLE = (
    "Training base-size CoLT5 through Trainer on one GPU and on two, bf16, AdamW, no dropout: documents of 16,384 "
    "tokens, 512 tokens of output; medians. Losses of the same steps on the same inputs"
)
BATCH = 2
STEPS, SAVED = 12, 10
# bf16 has 8 bits, and FSDP2 gives the loss itself in bf16: steps of 2^-5 between 4 and 8, of 2^-4 above
TOLERANCE = 0.1
# each kind on two GPUs: its launch file, and the one that resumes it on one
KINDS = {"DDP": ("ddp.yaml", "one_gpu.yaml"), "FSDP2": ("fsdp2.yaml", "fsdp2.yaml")}


def train(options: argparse.Namespace) -> None:
    """One process of a run; the first one writes what was measured to `options.report`."""
    set_seed(0)
    on_gpu = torch.cuda.is_available()
    with torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu"):
        model = CoLT5ForConditionalGeneration(colt5_config(options.tiny))
    arguments = TrainingArguments(
        str(options.report.with_suffix("")),
        per_device_train_batch_size=options.batch,
        max_steps=STEPS,
        save_strategy="steps" if options.save else "no",
        save_steps=SAVED,
        learning_rate=1e-2 if options.tiny else 3e-4,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        # every weight has a gradient at every step
        ddp_find_unused_parameters=False,
        logging_steps=1,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        report_to=[],
        disable_tqdm=True,
    )
    length, target_length = (64, 8) if options.tiny else (16_384, 512)
    vocab_size = (TINY if options.tiny else BASE)["vocab_size"]
    documents = RandomDocuments(STEPS * options.batch * arguments.world_size, length, target_length, vocab_size)
    # targets of few tokens: the loss falls from the first steps on, so that losses tell one step from another
    documents.labels = documents.labels % 8 + 2
    times = StepTimes()
    trainer = Trainer(model, arguments, train_dataset=documents, callbacks=[times])
    trainer.train(resume_from_checkpoint=options.resume)
    peak = torch.tensor(torch.cuda.max_memory_allocated() / 2**20 if on_gpu else 0.0)
    peak = trainer.accelerator.gather(peak.to(trainer.accelerator.device)).max()
    if trainer.is_world_process_zero():
        losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        # without the first steps, which compile, and those after the checkpoint, which wait for it
        gaps = [after - before for before, after in itertools.pairwise(times.times[2:SAVED])]
        report = {"length": length, "step": statistics.median(gaps) if gaps else None, "losses": losses}
        options.report.write_text(json.dumps(report | {"peak": peak.item() if on_gpu else None}))


def launch(report: Path, file: str, processes: int, batch: int, tiny: bool, *more: str) -> dict[str, Any]:
    """Start a run whose checkpoints go beside its report; gives what its first process reported."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    command += [str(ROOT / "configuration" / "launch" / file), "--num_processes", str(processes)]
    command += ["--main_process_port", "0", __file__, "--report", str(report), "--batch", str(batch), *more]
    # the launched script finds the package wherever this one does
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    start = time.perf_counter()
    done = subprocess.run([*command, *(["--tiny"] if tiny else [])], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{report.stem} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    print(f"{report.stem}: {time.perf_counter() - start:.0f} s with starting", flush=True)
    return json.loads(report.read_text())


def make_row(run: str, gpus: int, batch: int, report: dict[str, Any]) -> Row:
    """A row of the table; the resumed runs have too few steps for a time."""
    step = report["step"]
    timed = step is not None
    return {
        "run": run,
        "GPUs": gpus,
        "batch a GPU": batch,
        "step ms": 1e3 * step if timed else None,
        "input tokens/s": gpus * batch * report["length"] / step if timed else None,
        "peak MiB a GPU": report["peak"],
        **{f"loss at step {number}": report["losses"][str(number)] for number in range(SAVED + 1, STEPS + 1)},
    }


def check(kind: str, two: dict[str, Any], one: dict[str, Any]) -> None:
    """One GPU came to the losses of two.

    Raises:
        RuntimeError: where it did not, or where the losses fell too little to tell.
    """
    fall = two["losses"]["1"] - two["losses"][str(SAVED + 1)]
    if fall < 5 * TOLERANCE:
        raise RuntimeError(f"{kind}: the loss fell by {fall} only: a lost checkpoint would not show")
    for step in range(SAVED + 1, STEPS + 1):
        there, here = two["losses"][str(step)], one["losses"][str(step)]
        if abs(there - here) > TOLERANCE:
            raise RuntimeError(f"{kind}: the loss at step {step} is {there} on two GPUs, {here} resumed on one")


def main(arguments: Sequence[str] | None = None) -> None:
    """Every run, the comparison of the losses, the table; or one process of one of the runs."""
    parser = make_parser(__doc__)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="the runs on two GPUs")
    # what a run is started with
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--resume", help=argparse.SUPPRESS)
    if "--report" in (sys.argv if arguments is None else arguments):
        train(parser.parse_args(arguments))
        return
    options = parse(parser, arguments)
    if not options.tiny and torch.cuda.device_count() < 2:
        parser.error("needs two CUDA devices; --tiny --kinds DDP runs on the CPU")
    table = Table("multi_gpu", TITLE, options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone = launch(folder / "one.json", "one_gpu.yaml", 1, BATCH, options.tiny)
        table.add(make_row("one GPU", 1, BATCH, alone))
        for kind in options.kinds:
            if time.perf_counter() > options.deadline:
                table.note(f"Not measured for lack of time: {kind}.")
                continue
            file, file_for_one = KINDS[kind]
            two = launch(folder / f"{kind}.json", file, 2, BATCH, options.tiny, "--save")
            table.add(make_row(kind, 2, BATCH, two))
            checkpoint = str(folder / kind / f"checkpoint-{SAVED}")
            one = launch(
                folder / f"{kind}_on_one.json", file_for_one, 1, 2 * BATCH, options.tiny, "--resume", checkpoint
            )
            table.add(make_row(f"{kind}'s checkpoint, resumed on one GPU", 1, 2 * BATCH, one))
            check(kind, two, one)
    table.finish()


if __name__ == "__main__":
    main()
