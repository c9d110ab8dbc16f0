"""Memory and time of training by size, length, batch and checkpointing, beside what a dry run estimates.

python benchmarks/sizes.py [--seconds 80]

Each row is a short run of `Trainer` with the scripts' defaults and a dense start of half of its steps.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from encoder import release, verify
from measure import make_parser, parse
from peers import DEVICE, TINY, TINY_COLT5
from results import Row, Table
from training import RandomDocuments, StepTimes
from transformers import Trainer, TrainingArguments

from modeling_colt5 import CoLT5Config, CoLT5ForConditionalGeneration
from modeling_colt5.dense_start import DenseStart, DenseStartCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from run_costs import RowShape, RunCosts  # noqa: E402
from training_defaults import CHECKPOINTING, TrainingDefaults  # noqa: E402

TITLE = (
    "Training encoder–decoders through Trainer: bf16 autocast, AdamW, targets of 512 tokens, one pass a step. "
    "Peak: of PyTorch's allocator over the whole run, with weights. Estimate: what `--dry_run` of the scripts says. "
    "Dense: a step of the dense start, which reads a quarter of the input; routed: a later step; medians. Run: all "
    "steps, as measured and as estimated"
)
# size, tokens, documents of a pass, checkpointing; the most important first: a run that is short of time leaves out
# the last
CASES = (
    ("base", 16_384, 1, False),
    ("base", 16_384, 1, True),
    ("base", 4_096, 1, False),
    ("base", 4_096, 8, False),
    ("base", 65_536, 1, True),
    ("base", 16_384, 4, False),
    ("base", 16_384, 4, True),
    ("base", 65_536, 1, False),
    ("large", 16_384, 1, True),
    ("large", 16_384, 1, False),
    ("large", 4_096, 1, False),
)
TINY_CASES = (("base", 64, 1, False), ("base", 64, 2, True))
SCHEDULE = DenseStart(closed=0.5, opening=0.1)
STEPS = 10
# steps of each part that warm up
WARM = 1


@dataclass
class RunArguments(TrainingDefaults, TrainingArguments):
    """Trainer's arguments, with the defaults of the scripts."""


def measure(size: str, length: int, batch: int, checkpointed: bool, tiny: bool) -> Row:
    """One row: a run of a new model."""
    on_gpu = DEVICE.type == "cuda"
    release()
    config = CoLT5Config(**TINY, **TINY_COLT5) if tiny else CoLT5Config.from_size(size)
    targets = 8 if tiny else 512
    with torch.device(DEVICE):
        model = CoLT5ForConditionalGeneration(config)
    data = RandomDocuments(batch * STEPS, length, targets, config.vocab_size)
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        arguments = RunArguments(
            folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=1,
            max_steps=STEPS,
            use_cpu=not on_gpu,
            report_to=[],
            eval_strategy="no",
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
            **{CHECKPOINTING: checkpointed},
        )
        optimizer = arguments.make_optimizer(model, is_new=True)
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
        costs = RunCosts.of(trainer, [RowShape(length, targets)], SCHEDULE)
        trainer.add_callback(DenseStartCallback(SCHEDULE, input_length=length))
        trainer.add_callback(times)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    steps = [after - before for before, after in zip(times.times, times.times[1:], strict=False)]
    # the first step, from which no time is known, is dense; so are those after it, to the end of the opening
    dense_steps = sum(SCHEDULE.progress(step, STEPS) is not None for step in range(STEPS))
    dense = statistics.median(steps[WARM : dense_steps - 1])
    routed = statistics.median(steps[dense_steps - 1 + WARM :])
    gib = 2**30
    return {
        "peak GiB": torch.cuda.max_memory_allocated() / gib if on_gpu else None,
        "estimated GiB": costs.memory / gib,
        "dense ms": 1e3 * dense,
        "routed ms": 1e3 * routed,
        "run s": dense_steps * dense + (STEPS - dense_steps) * routed,
        "estimated s": costs.seconds,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Verify, then measure each case, and note how far the estimates were off."""
    options = parse(make_parser(__doc__), arguments)
    verify(options.tiny)
    table = Table("sizes", TITLE, options)
    ratios: dict[str, list[float]] = {"memory": [], "time": []}
    cases = TINY_CASES if options.tiny else CASES
    for position, (size, length, batch, checkpointed) in enumerate(cases):
        if time.perf_counter() > options.deadline:
            rest = ", ".join(f"{size} {length:,} x {batch}" for size, length, batch, _ in cases[position:])
            table.note(f"Not measured for lack of time: {rest}.")
            break
        row: Row = {"size": size, "tokens": length, "batch": batch, "checkpointing": "yes" if checkpointed else "no"}
        try:
            row |= measure(size, length, batch, checkpointed, options.tiny)
        except torch.cuda.OutOfMemoryError:
            row["note"] = "out of memory"
        else:
            ratios["time"].append(row["run s"] / row["estimated s"])
            if row["peak GiB"] is not None:
                ratios["memory"].append(row["peak GiB"] / row["estimated GiB"])
        table.add(row)
    for name, found in ratios.items():
        if found:
            table.note(f"Measured {name} over estimated: {min(found):.2f} to {max(found):.2f}.")
    table.finish()


if __name__ == "__main__":
    main()
