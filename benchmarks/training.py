"""A training step of base-size encoder–decoders through `Trainer` at 16,384 tokens: CoLT5 beside LongT5.

python benchmarks/training.py
"""

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from encoder import release, verify
from measure import make_parser, parse, synchronize
from peers import BASE, COLT5, DEVICE, GLOBAL, LOCAL, TINY, make_seq2seq
from results import Row, Table
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_colt5.router_health import RouterHealthCallback

TITLE = (
    "A training step through Trainer, base size, bf16 autocast, AdamW, no dropout: two documents of 16,384 tokens, "
    "512 tokens of output; medians of the time from one step's end to the next's. Accumulated: documents a step that "
    "had to be taken one by one. Compiled: `torch_compile=True`; with graphs: "
    '`torch_compile_mode="reduce-overhead"` too. One thread: with '
    "`torch.autograd.set_multithreading_enabled(False)`. Health: the routers' health is measured at every tenth step, "
    "which is otherwise done at every hundredth; a measurement is the time of ten steps beyond ten medians, the mean "
    "of several tens. GPU: what its kernels take in one step, which PyTorch's profiler looks at. "
    "Compilation: what the first three steps took beyond three others"
)
BATCH = 2
# Of a run's steps the last ones are counted. CoLT5's launches become graphs in the course of more steps, whenever
# PyTorch gives their tensors the memory of an earlier step.
COUNTED, STEPS, STEPS_OF_COLT5, TINY_STEPS = 8, 12, 48, 6
# steps between measurements of health, and how many measurements are counted
INTERVAL, MEASUREMENTS = 10, 5
EAGER, ONE_THREAD, COMPILED, WITH_GRAPHS = "eager", "eager, one thread", "compiled", "compiled with graphs"
HEALTH = "eager, health"
NOT_COMPILED = EAGER, ONE_THREAD, HEALTH
# the most important first: a run that is short of time leaves out the last
CASES = (
    (COLT5, EAGER),
    (COLT5, HEALTH),
    (COLT5, ONE_THREAD),
    (COLT5, COMPILED),
    (GLOBAL, EAGER),
    (LOCAL, EAGER),
    (GLOBAL, ONE_THREAD),
    (LOCAL, ONE_THREAD),
    (COLT5, WITH_GRAPHS),
    (LOCAL, COMPILED),
    (GLOBAL, COMPILED),
    (GLOBAL, WITH_GRAPHS),
    (LOCAL, WITH_GRAPHS),
)


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
    """Wall time at the end of each step but the last; and milliseconds of kernels in the last, which a profiler makes
    slower. The device is not waited for here: Trainer does that in each step, for its loss."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.gpu_ms: float | None = None
        self._profiler: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps - 1 and DEVICE.type == "cuda":
            self._profiler = profile(activities=[ProfilerActivity.CUDA])
            self._profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < state.max_steps:
            self.times.append(time.perf_counter())
        elif self._profiler is not None:
            synchronize()
            self._profiler.stop()
            on_gpu = torch.autograd.DeviceType.CUDA
            events = [event for event in self._profiler.events() if event.device_type == on_gpu]
            self.gpu_ms = 1e-3 * sum(event.time_range.elapsed_us() for event in events)


def compile_options(mode: str, tiny: bool) -> dict[str, Any]:
    """The arguments of Trainer that a mode is."""
    if mode in NOT_COMPILED:
        return {}
    backend = {"torch_compile_backend": "eager"} if tiny else {}
    graphs = {"torch_compile_mode": "reduce-overhead"} if mode == WITH_GRAPHS else {}
    return {"torch_compile": True, **backend, **graphs}


def measure(name: str, mode: str, data: RandomDocuments, accumulated: int, steps: int, tiny: bool) -> Row:
    """One row: a model trained a few steps, of which the last eight before the profiled one are counted."""
    on_gpu = DEVICE.type == "cuda"
    torch.compiler.reset()
    release()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = StepTimes()
    # Trainer tells Accelerate about compilation in the environment, where the next row would find it
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ):
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
            **compile_options(mode, tiny),
        )
        trainer = Trainer(make_seq2seq(name, tiny), training_arguments, train_dataset=data, callbacks=[times])
        if mode == HEALTH:
            trainer.add_callback(RouterHealthCallback(trainer.log, interval=INTERVAL))
        start = time.perf_counter()
        with torch.autograd.set_multithreading_enabled(mode != ONE_THREAD):
            loss = trainer.train().training_loss
    assert 0 < loss < 1000, f"the loss is {loss}"
    step = statistics.median(b - a for a, b in pairwise(times.times[-COUNTED - 1 :]))
    health = {"measurement ms": 1e3 * measurement_time(times.times)} if mode == HEALTH else {}
    compilation = {} if mode in NOT_COMPILED else {"compilation s": times.times[2] - start - 3 * step}
    return {
        "step ms": 1e3 * step,
        "GPU ms": times.gpu_ms,
        "input tokens/s": data.inputs.shape[1] * BATCH / step,
        "peak MiB": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None,
        **compilation,
        **health,
    }


def measurement_time(ends: Sequence[float]) -> float:
    """Seconds of a measurement of health, and of what it makes other steps take: a mean, by the steps' ends."""
    # a step's end is noted before its measurement, which is counted in the next one's time
    last = len(ends) // INTERVAL * INTERVAL - 1
    steps = [after - before for before, after in pairwise(ends[last - MEASUREMENTS * INTERVAL : last + 1])]
    return (sum(steps) - len(steps) * statistics.median(steps)) / MEASUREMENTS


def steps_of(name: str, mode: str, tiny: bool) -> int:
    """How many steps a row's run has."""
    if mode == HEALTH:
        # as many are made before those that count
        return 2 * MEASUREMENTS * INTERVAL
    if tiny:
        return TINY_STEPS
    return STEPS_OF_COLT5 if name == COLT5 and mode in NOT_COMPILED else STEPS


def measure_fitting(name: str, mode: str, data: RandomDocuments, table: Table, steps: int, tiny: bool) -> None:
    """The rows of one model in one mode: with the whole batch, and with its documents one by one where that is too
    much. A mode that fails otherwise says so."""
    for accumulated in (1, 2):
        row: Row = {"model": name, "mode": mode, "batch": BATCH, "accumulated": accumulated}
        row["input"] = data.inputs.shape[1]
        try:
            row |= measure(name, mode, data, accumulated, steps, tiny)
        except torch.cuda.OutOfMemoryError:
            row["note"] = "out of memory"
        except Exception as error:  # noqa: BLE001 - one that does not compile must not lose the others' numbers
            row["note"] = f"{type(error).__name__}: {str(error)[:200]}"
        table.add(row)
        # a replay of the second document's gradients would write over the first one's
        if row.get("note") != "out of memory" or mode == WITH_GRAPHS:
            return


def main(arguments: Sequence[str] | None = None) -> None:
    """Verify, then train a few steps of each model in each mode."""
    options = parse(make_parser(__doc__), arguments)
    length, target_length = (64, 8) if options.tiny else (16_384, 512)
    vocab_size = (TINY if options.tiny else BASE)["vocab_size"]
    data = RandomDocuments(BATCH * STEPS, length, target_length, vocab_size)
    verify(options.tiny)
    table = Table("training", TITLE, options)
    cases = [case for case in CASES if not options.tiny or case[1] != WITH_GRAPHS]
    for position, (name, mode) in enumerate(cases):
        if time.perf_counter() > options.deadline:
            rest = ", ".join(f"{name} {mode}" for name, mode in cases[position:])
            table.note(f"Not measured for lack of time: {rest}.")
            break
        measure_fitting(name, mode, data, table, steps_of(name, mode, options.tiny), options.tiny)
    table.finish()


if __name__ == "__main__":
    main()
