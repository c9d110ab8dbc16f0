"""Warm start, measured: a T5 and a LongT5 trained here on real text, converted, their budgets shrunk, trained further.

python benchmarks/warm_start.py --work FOLDER [--seconds 80]

The text is your Python's standard library in characters, every twentieth module held out. A run that was stopped, or
that came to its time, goes on with the same `--work`: what is trained is kept there, the rest resumes at its last
checkpoint. The tables are written when everything is trained.
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
from small_model import read, standard_library  # noqa: E402

TITLE = (
    "Warm start: held-out loss of what was trained here, and of what it was converted to, before any further step. "
    "Span corruption of Python's source in characters, inputs of 96"
)
STEPS_TITLE = "Further training at the paper's budgets: held-out loss of the converted model and of a fresh one"
INPUT_LENGTH, BATCH, EVALUATIONS, HELD_OUT = 96, 32, 20, 512
# so small a share of the input that which heads are light, and which tokens are routed, decides something
RADIUS = 15
LEARNING_RATE = 1e-3
SIZES = {
    "vocab_size": 256,
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 8,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}
TINY = SIZES | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4}
LETTERS = [chr(code) for code in range(33, 127)]
CURVE = "curve.json"
PAPER = {"feed_forward": 1 / 16, "query": 1 / 16, "key_value": 1 / 8}


def characters() -> CoLT5Tokenizer:
    """A vocabulary of ASCII's printable characters: minutes teach a model to use its input on no larger one."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    return CoLT5Tokenizer(vocab=[*pieces, *((f"<extra_id_{i}>", 0.0) for i in reversed(range(100)))])


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
        self.collator = DataCollatorForDenoising(characters(), 64 if self.tiny else INPUT_LENGTH)
        modules = standard_library()[: 40 if self.tiny else None]
        order = torch.randperm(len(modules), generator=torch.Generator().manual_seed(0)).tolist()
        self.training = [modules[i] for i in order if i % 20]
        held_out = [path for i, path in enumerate(modules) if i % 20 == 0]
        # of all held-out modules, not of the first alone
        self.held_out = self.chunks(held_out, 4 if self.tiny else HELD_OUT, step=1 if self.tiny else 16)

    def chunks(self, modules: list[Path], count: int, skip: int = 0, step: int = 1) -> list[dict[str, Any]]:
        """Every `step`-th input of the text of modules, read once more from the beginning where it ends."""
        stream = chunk_documents([read(path) for path in modules], self.collator, repeat=True)
        return list(islice(stream, skip, skip + count * step, step))

    def trainer(self, model: PreTrainedModel, name: str, steps: int, rows: list[Any]) -> Trainer:
        """A Trainer for a number of steps."""
        on_gpu = torch.cuda.is_available()
        arguments = TrainingArguments(
            str(self.work / name),
            max_steps=steps,
            per_device_train_batch_size=4 if self.tiny else BATCH,
            per_device_eval_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
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

    def loss_on_others(self, model: PreTrainedModel) -> float:
        """The loss where each target comes with another one's input: what is left when the input says nothing."""
        batch = self.collator(self.held_out)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with torch.no_grad():
            return model.eval()(**batch | {"input_ids": batch["input_ids"].roll(1, 0)}).loss.item()

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


def reading_from_the_start(model: PreTrainedModel) -> PreTrainedModel:
    """The model with initial weights that lead it to its input, which T5's own find only after more steps than here.

    Cross-attention begins by looking at the decoder's own token (a sentinel finds its place), and the encoder's heads
    by looking one or two tokens back or on. Trained models and fresh ones begin with it alike.
    """
    with torch.no_grad():
        for block in model.decoder.block:
            attention = block.layer[1].EncDecAttention
            # ⟨q, k⟩ of a token with itself: 1 at T5's scale of q, times this
            attention.k.weight.copy_(attention.q.weight * 16)
        for name, bias in model.encoder.named_parameters():
            if name.endswith("relative_attention_bias.weight") and "global" not in name:
                later = bias.shape[0] // 2
                for head in range(bias.shape[1]):
                    bias[(1, later + 1, 2, later + 2)[head % 4], head] += 6
    return model


def with_global_tokens(source: T5ForConditionalGeneration) -> LongT5ForConditionalGeneration:
    """A transient-global LongT5 that begins with a T5's weights; only what its global tokens need is new."""
    names = {field: getattr(source.config, field) for field in SIZES}
    config = LongT5Config(**names, local_radius=RADIUS, encoder_attention_type="transient-global")
    model = LongT5ForConditionalGeneration(config)
    weights = {
        name.replace("SelfAttention", "TransientGlobalSelfAttention") if name.startswith("encoder") else name: weight
        for name, weight in source.state_dict().items()
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or any("global" not in name for name in missing):
        raise RuntimeError(f"T5's weights are not LongT5's: {missing} are missing, {unexpected} are too many")
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
    parser.add_argument("--steps", type=int, default=2400, help="steps of the T5")
    parser.add_argument(
        "--further-steps", type=int, default=400, help="steps after the conversion, and of LongT5 after T5"
    )
    options = parse(parser, arguments, needs_gpu=False)
    steps, further = (8, 8) if options.tiny else (options.steps, options.further_steps)
    experiment = Experiment(options)
    sizes = TINY if options.tiny else SIZES
    batch = experiment.collator(experiment.held_out[:4])
    measured = experiment.collator(experiment.chunks(experiment.training, 4 if options.tiny else 64))
    sample = [{"input_ids": measured["input_ids"], "attention_mask": measured["attention_mask"]}]
    full = {f"routed_{name}_fraction": 1.0 for name in PAPER}

    def converted_from(source: PreTrainedModel, **kwargs: Any) -> CoLT5ForConditionalGeneration:
        return convert(source.cpu(), **{"samples": sample, "local_radius": RADIUS} | kwargs)

    try:
        set_seed(0)
        source = experiment.train(
            "t5", lambda: reading_from_the_start(T5ForConditionalGeneration(T5Config(**sizes))), steps
        )
        converted = converted_from(source)
        set_seed(0)
        fresh = reading_from_the_start(CoLT5ForConditionalGeneration(converted.config))
        begin = {"converted": experiment.loss(converted), "fresh": experiment.loss(fresh)}
        # text that the source has not seen, as far as the corpus goes
        skip = steps * (4 if options.tiny else BATCH)
        experiment.train("converted", lambda: converted_from(source), further, skip)
        experiment.train("fresh", lambda: fresh, further, skip)
        set_seed(0)
        long_source = experiment.train("longt5_global", lambda: with_global_tokens(source.cpu()), further, skip)
    except OutOfTime as stopped:
        print(f"out of time at {stopped}; go on with the same --work", flush=True)
        return

    table = Table("warm_start", TITLE, options)

    def note(what: str, model: PreTrainedModel, difference: float | None = None) -> None:
        table.add({"model": what, "held-out loss": experiment.loss(model), "largest logit difference": difference})

    note(f"T5, trained for {steps} steps", source)
    table.add(
        {"model": "the same, reading another document's input", "held-out loss": experiment.loss_on_others(source)}
    )
    exact = converted_from(source, local_radius=experiment.collator.input_length, **full)
    note("converted, every budget 1, radius over the whole input", exact, logit_difference(source, exact, batch))
    model = converted_from(source, **full)
    note(f"converted, every budget 1, radius {RADIUS}", model)
    for fraction in (1 / 2, 1 / 4, 1 / 8):
        model.set_routing_budget(**dict.fromkeys(PAPER, fraction))
        note(f"converted, every budget 1/{round(1 / fraction)}", model)
    model.set_routing_budget(**PAPER)
    note("converted, the paper's budgets: 1/16, 1/16, 1/8", model)
    by_weights = converted_from(source, samples=None)
    note("the same, heads and units chosen by the weights, without a sample", by_weights)
    for heads in (sizes["num_heads"] // 2, 1):
        fewer = converted_from(source, num_cross_key_value_heads=heads, **full)
        note(f"converted, every budget 1, cross-attention's keys and values averaged to {heads}", fewer)
    note(f"LongT5 transient-global of radius {RADIUS}, the T5 trained for {further} more steps", long_source)
    lost = converted_from(long_source, **full)
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
