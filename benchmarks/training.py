"""A training step of base-size encoder–decoders through `Trainer` at 16,384 tokens: CoLT5 beside LongT5.

python benchmarks/training.py
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from encoder import release, verify
from measure import make_parser, parse, synchronize
from peers import BASE, COLT5, DEVICE, GLOBAL, LOCAL, TINY, make_seq2seq
from results import Row, Table
from transformers import Trainer, TrainerCallback, TrainingArguments

TITLE = (
    "A training step through Trainer, base size, bf16 autocast, AdamW, no dropout: two documents of 16,384 tokens, "
    "512 tokens of output; medians. Accumulated: documents a step that had to be taken one by one"
)
BATCH = 2


class RandomDocuments(torch.utils.data.Dataset):
    """Documents of random tokens."""

    def __init__(self, count: int, length: int, target_length: int, vocab_size: int):
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randint(2, vocab_size, (count, length), generator=generator)
        self.labels = torch.randint(2, vocab_size, (count, target_length), generator=generator)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.inputs[index]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": self.labels[index]}


class StepTimes(TrainerCallback):
    """Wall time at the end of each step, the device waited for."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize()
        self.times.append(time.perf_counter())


def measure(name: str, data: RandomDocuments, accumulated: int, steps: int, tiny: bool) -> Row:
    """One row: a model trained a few steps, of which the first three warm up."""
    on_gpu = DEVICE.type == "cuda"
    release()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        training_arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH // accumulated,
            gradient_accumulation_steps=accumulated,
            max_steps=steps,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            report_to=[],
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
        )
        trainer = Trainer(make_seq2seq(name, tiny), training_arguments, train_dataset=data, callbacks=[times])
        loss = trainer.train().training_loss
    assert 0 < loss < 1000, f"the loss is {loss}"
    step = statistics.median(b - a for a, b in zip(times.times[2:-1], times.times[3:], strict=True))
    return {
        "step ms": 1e3 * step,
        "input tokens/s": data.inputs.shape[1] * BATCH / step,
        "peak MiB": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Verify, then train a few steps of each model; one that does not fit takes its documents one by one."""
    options = parse(make_parser(__doc__), arguments)
    length, target_length, steps = (64, 8, 6) if options.tiny else (16_384, 512, 12)
    vocab_size = (TINY if options.tiny else BASE)["vocab_size"]
    data = RandomDocuments(BATCH * steps, length, target_length, vocab_size)
    verify(options.tiny)
    table = Table("training", TITLE, options)
    for name in (COLT5, GLOBAL, LOCAL):
        if time.perf_counter() > options.deadline:
            table.note(f"Not measured for lack of time: {name}.")
            continue
        for accumulated in (1, 2):
            row: Row = {"model": name, "batch": BATCH, "accumulated": accumulated, "input": length}
            try:
                row |= measure(name, data, accumulated, steps, options.tiny)
            except torch.cuda.OutOfMemoryError:
                row["note"] = "out of memory"
            table.add(row)
            if "note" not in row:
                break
    table.finish()


if __name__ == "__main__":
    main()
