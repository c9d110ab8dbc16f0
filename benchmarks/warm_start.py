"""Warm start, measured: a T5 and a LongT5 trained here on real text, converted, their budgets shrunk, trained further.

python benchmarks/warm_start.py --work FOLDER [--seconds 80]

The text is your Python's standard library, every twentieth module held out. A run that was stopped, or that came to
its time, goes on with the same `--work`: what is trained is kept there, the rest resumes at its last checkpoint. The
tables are written when everything is trained.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from measure import make_parser, parse
from results import Table
from transformers import (
    LongT5Config,
    LongT5ForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from modeling_colt5 import CoLT5ForConditionalGeneration, CoLT5Tokenizer
from modeling_colt5.conversion import convert
from modeling_colt5.denoising import DataCollatorForDenoising, chunk_documents

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from demo import VOCABULARY, read, standard_library  # noqa: E402

TITLE = "Warm start: held-out loss of what was trained here, and of what it was converted to, before any further step"
STEPS_TITLE = "Further training at the paper's budgets: held-out loss of the converted model and of a fresh one"
INPUT_LENGTH, BATCH, EVALUATIONS = 512, 32, 20
SIZES = {
    "vocab_size": 8192,
    "d_model": 256,
    "d_kv": 32,
    "d_ff": 512,
    "num_layers": 3,
    "num_decoder_layers": 3,
    "num_heads": 8,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}
TINY = SIZES | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4}
CURVE = "curve.json"
PAPER = {"feed_forward": 1 / 16, "query": 1 / 16, "key_value": 1 / 8}


class OutOfTime(Exception):
    """Training stopped before its end; what it came to is kept."""


class Deadline(TrainerCallback):
    """Saves and stops when the time is over."""

    def __init__(self, deadline: float):
        self.deadline = deadline

    def on_step_end(self, arguments: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.perf_counter() > self.deadline:
            control.should_save = control.should_training_stop = True


class Experiment:
    """The text, and the models trained on it, each kept in a folder of its own."""

    def __init__(self, options: argparse.Namespace):
        self.work, self.tiny, self.deadline = options.work, options.tiny, options.deadline
        tokenizer = CoLT5Tokenizer.from_pretrained(VOCABULARY)
        self.collator = DataCollatorForDenoising(tokenizer, 64 if self.tiny else INPUT_LENGTH)
        modules = standard_library()[: 40 if self.tiny else None]
        order = torch.randperm(len(modules), generator=torch.Generator().manual_seed(0)).tolist()
        self.training = [modules[i] for i in order if i % 20]
        self.held_out = self.chunks([path for i, path in enumerate(modules) if i % 20 == 0], 4 if self.tiny else 128)

    def chunks(self, modules: list[Path], count: int, skip: int = 0) -> list[dict[str, Any]]:
        """Inputs of the text of modules, read once more from the beginning where it ends."""
        stream = chunk_documents([read(path) for path in modules], self.collator, repeat=True)
        return list(islice(stream, skip, skip + count))

    def trainer(self, model: PreTrainedModel, name: str, steps: int, rows: list[Any]) -> Trainer:
        """A Trainer for a number of steps."""
        on_gpu = torch.cuda.is_available()
        arguments = TrainingArguments(
            str(self.work / name),
            max_steps=steps,
            per_device_train_batch_size=4 if self.tiny else BATCH,
            per_device_eval_batch_size=BATCH,
            learning_rate=2e-3,
            warmup_steps=min(100, steps // 4),
            lr_scheduler_type="constant_with_warmup",
            train_sampling_strategy="sequential",
            eval_strategy="steps",
            eval_steps=max(1, steps // EVALUATIONS),
            save_steps=max(1, steps // EVALUATIONS),
            save_total_limit=1,
            logging_strategy="no",
            bf16=on_gpu,
            use_cpu=not on_gpu,
            dataloader_pin_memory=on_gpu,
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
        )
        callbacks = [Deadline(self.deadline)]
        data = {"train_dataset": rows, "eval_dataset": self.held_out, "data_collator": self.collator}
        return Trainer(model, arguments, callbacks=callbacks, **data)

    def loss(self, model: PreTrainedModel) -> float:
        """The loss on the held-out inputs."""
        return self.trainer(model, "evaluation", 1, []).evaluate()["eval_loss"]

    def train(self, name: str, make: Callable[[], PreTrainedModel], steps: int, skip: int = 0) -> PreTrainedModel:
        """A model trained for so many steps, in this run or, wholly or in part, in an earlier one.

        Raises:
            OutOfTime: where the time was over first.
        """
        folder = self.work / name
        model = make()
        if not (folder / CURVE).exists():
            print(f"training {name}", flush=True)
            rows = self.chunks(self.training, steps * (4 if self.tiny else BATCH), skip)
            trainer = self.trainer(model, name, steps, rows)
            trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)
            if trainer.state.global_step < steps:
                raise OutOfTime(f"{name}: {trainer.state.global_step} of {steps} steps")
            trainer.save_model()
            losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
            (folder / CURVE).write_text(json.dumps(losses))
        return type(model).from_pretrained(folder)

    def curve(self, name: str) -> dict[int, float]:
        """The held-out loss of a trained model by step."""
        return {int(step): loss for step, loss in json.loads((self.work / name / CURVE).read_text()).items()}


def small_embedding(model: PreTrainedModel) -> PreTrainedModel:
    """The model with embeddings of a size that AdamW's steps can change: T5's start with 1, for Adafactor's."""
    with torch.no_grad():
        model.shared.weight.mul_(0.05)
    return model


def logit_difference(source: PreTrainedModel, model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> float:
    """The largest difference of two models' logits on a batch, on the CPU in fp32."""
    with torch.no_grad():
        logits = [m.cpu().float().eval()(**batch).logits for m in (source, model)]
    return float((logits[0] - logits[1]).abs().max())


def steps_to(curve: dict[int, float], loss: float) -> int | None:
    """The first evaluated step with at most this loss."""
    return next((step for step, value in curve.items() if value <= loss), None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the sources, convert, train further; then shrink the budgets and write the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of what is trained, to go on with")
    parser.add_argument("--steps", type=int, default=3000, help="steps of the sources")
    parser.add_argument("--further-steps", type=int, default=600, help="steps after the conversion")
    options = parse(parser, arguments, needs_gpu=False)
    steps, further = (8, 8) if options.tiny else (options.steps, options.further_steps)
    experiment = Experiment(options)
    sizes = TINY if options.tiny else SIZES
    # blocks of 32 tokens and their summaries: an input of 512 has many of each
    long = LongT5Config(**sizes, local_radius=31, encoder_attention_type="transient-global")
    batch = experiment.collator(experiment.held_out[:4])
    measured = experiment.collator(experiment.chunks(experiment.training, 4))
    sample = [{"input_ids": measured["input_ids"], "attention_mask": measured["attention_mask"]}]
    full = {f"routed_{name}_fraction": 1.0 for name in PAPER}

    try:
        set_seed(0)
        source = experiment.train("t5", lambda: small_embedding(T5ForConditionalGeneration(T5Config(**sizes))), steps)
        converted = convert(source, samples=sample)
        set_seed(0)
        fresh = small_embedding(CoLT5ForConditionalGeneration(converted.config))
        begin = {"converted": experiment.loss(converted), "fresh": experiment.loss(fresh)}
        # text that the source has not seen, as far as the corpus goes
        skip = steps * (4 if options.tiny else BATCH)
        experiment.train("converted", lambda: convert(source, samples=sample), further, skip)
        experiment.train("fresh", lambda: fresh, further, skip)
        set_seed(0)
        long_source = experiment.train(
            "longt5_global", lambda: small_embedding(LongT5ForConditionalGeneration(long)), steps
        )
    except OutOfTime as stopped:
        print(f"out of time at {stopped}; go on with the same --work", flush=True)
        return

    table = Table("warm_start", TITLE, options)

    def note(what: str, model: PreTrainedModel, difference: float | None = None) -> None:
        table.add({"model": what, "held-out loss": experiment.loss(model), "largest logit difference": difference})

    note(f"T5, trained for {steps} steps", source)
    exact = convert(source.cpu(), samples=sample, local_radius=experiment.collator.input_length, **full)
    note("converted, every budget 1, radius over the whole input", exact, logit_difference(source, exact, batch))
    model = convert(source, samples=sample, **full)
    note("converted, every budget 1, radius 127", model)
    for fraction in (1 / 2, 1 / 4, 1 / 8):
        model.set_routing_budget(**dict.fromkeys(PAPER, fraction))
        note(f"converted, every budget 1/{round(1 / fraction)}", model)
    model.set_routing_budget(**PAPER)
    note("converted, the paper's budgets: 1/16, 1/16, 1/8", model)
    note("the same, heads and units chosen by the weights, without a sample", convert(source))
    one_head = convert(source, samples=sample, num_cross_key_value_heads=1, **full)
    note("converted, every budget 1, cross-attention's keys and values averaged to one head", one_head)
    note(f"LongT5 transient-global of radius 31, trained for {steps} steps", long_source)
    lost = convert(long_source.cpu(), samples=sample, **full)
    note("converted, every budget 1: without its global tokens", lost)
    table.finish()

    table = Table("warm_start_steps", STEPS_TITLE, options)
    curves = {name: {0: begin[name]} | experiment.curve(name) for name in begin}
    for step in curves["fresh"]:
        table.add({"steps": step} | {name: curve[step] for name, curve in curves.items()})
    halfway, last = (list(curves["fresh"].values())[index] for index in (len(curves["fresh"]) // 2, -1))
    for loss in (halfway, last):
        converted_step, fresh_step = (steps_to(curve, loss) for curve in curves.values())
        table.note(f"A loss of {loss:.2f}: the converted model by step {converted_step}, the fresh by {fresh_step}.")
    table.finish()


if __name__ == "__main__":
    main()
