"""Warm start, measured: a T5 and a LongT5 trained here on real text, converted, their budgets shrunk, trained further.

python benchmarks/warm_start.py --work FOLDER

The text is your Python's standard library, every twentieth module held out; the sizes are those of a CPU. A run that
was stopped goes on with the same `--work`: what is trained is kept there, the rest resumes at its last checkpoint.
"""

import json
import sys
import time
from collections.abc import Sequence
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
INPUT_LENGTH, BATCH, EVERY = 512, 8, 20
SIZES = {
    "vocab_size": 8192,
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}
TINY = SIZES | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1}
PAPER = {"feed_forward": 1 / 16, "query": 1 / 16, "key_value": 1 / 8}


class Experiment:
    """The text, and the models trained on it, each kept in a folder of its own."""

    def __init__(self, work: Path, tiny: bool):
        self.work, self.tiny = work, tiny
        tokenizer = CoLT5Tokenizer.from_pretrained(VOCABULARY)
        self.collator = DataCollatorForDenoising(tokenizer, 64 if tiny else INPUT_LENGTH)
        modules = standard_library()
        order = torch.randperm(len(modules), generator=torch.Generator().manual_seed(0)).tolist()
        self.training = [modules[i] for i in order if i % 20]
        self.held_out = self.chunks([path for i, path in enumerate(modules) if i % 20 == 0], 4 if tiny else 32)

    def chunks(self, modules: list[Path], count: int, skip: int = 0) -> list[dict[str, Any]]:
        """Inputs of the text of modules, read once more from the beginning where it ends."""
        stream = chunk_documents(
            [read(path) for path in modules[: 20 if self.tiny else None]], self.collator, repeat=True
        )
        return list(islice(stream, skip, skip + count))

    def trainer(self, model: PreTrainedModel, folder: Path, steps: int, rows: list[Any]) -> Trainer:
        """A Trainer for a number of steps, evaluated every few."""
        arguments = TrainingArguments(
            str(folder),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            learning_rate=3e-3,
            warmup_steps=10,
            lr_scheduler_type="constant_with_warmup",
            train_sampling_strategy="sequential",
            eval_strategy="steps",
            eval_steps=EVERY,
            save_steps=EVERY,
            dataloader_pin_memory=torch.cuda.is_available(),
            save_total_limit=1,
            logging_strategy="no",
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
        )
        return Trainer(model, arguments, train_dataset=rows, eval_dataset=self.held_out, data_collator=self.collator)

    def loss(self, model: PreTrainedModel) -> float:
        """The loss on the held-out inputs."""
        return self.trainer(model, self.work / "evaluation", 1, []).evaluate()["eval_loss"]

    def train(self, name: str, model: PreTrainedModel, steps: int, skip: int = 0) -> dict[str, float]:
        """Train a model, or finish its training, or load it trained; gives its held-out loss by step."""
        folder = self.work / name
        curve = folder / "curve.json"
        if not curve.exists():
            trainer = self.trainer(model, folder, steps, self.chunks(self.training, steps * BATCH, skip))
            trainer.train(resume_from_checkpoint=folder.exists() and get_last_checkpoint(str(folder)))
            trainer.save_model()
            losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
            curve.write_text(json.dumps(losses))
        trained = type(model).from_pretrained(folder)
        model.load_state_dict(trained.state_dict())
        return json.loads(curve.read_text())


def logit_difference(source: PreTrainedModel, model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> float:
    """The largest difference of two models' logits on a batch."""
    source.eval(), model.eval()
    with torch.no_grad():
        logits = [m(**{k: v.to(m.device) for k, v in batch.items()}).logits for m in (source, model)]
    return float((logits[0] - logits[1]).abs().max())


def steps_to(curve: dict[str, float], loss: float) -> int | None:
    """The first evaluated step with at most this loss."""
    return next((int(step) for step, value in curve.items() if value <= loss), None)


def measure_conversion(experiment: Experiment, table: Table, steps: int) -> CoLT5ForConditionalGeneration:
    """Train the sources, convert them, and note the losses; gives the converted T5 at the paper's budgets."""
    tiny = experiment.tiny
    sizes = TINY if tiny else SIZES
    full = {f"routed_{name}_fraction": 1.0 for name in PAPER}
    batch = experiment.collator(experiment.held_out[:4])
    sample = [{"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}]

    def note(what: str, model: PreTrainedModel, difference: float | None = None) -> None:
        table.add({"model": what, "held-out loss": experiment.loss(model), "largest logit difference": difference})

    set_seed(0)
    source = T5ForConditionalGeneration(T5Config(**sizes))
    experiment.train("t5", source, steps)
    note(f"T5, trained for {steps} steps", source)
    exact = convert(source, samples=sample, local_radius=experiment.collator.input_length, **full)
    note("converted, every budget 1, radius over the whole input", exact, logit_difference(source, exact, batch))
    model = convert(source, samples=sample, **full)
    note("converted, every budget 1, radius 127", model)
    for fraction in (1 / 2, 1 / 4, 1 / 8):
        model.set_routing_budget(**dict.fromkeys(PAPER, fraction))
        note(f"converted, every budget 1/{round(1 / fraction)}", model)
    model.set_routing_budget(**PAPER)
    note("converted, the paper's budgets: 1/16, 1/16, 1/8", model)
    by_weights = convert(source)
    note("the same, heads and units chosen by the weights, without a sample", by_weights)
    one_head = convert(source, samples=sample, num_cross_key_value_heads=1, **full)
    note("converted, every budget 1, cross-attention's keys and values averaged to one head", one_head)

    set_seed(0)
    # blocks of 32 tokens and their summaries: an input of 512 has more than one of each
    long = LongT5Config(**sizes, local_radius=31, encoder_attention_type="transient-global")
    long_source = LongT5ForConditionalGeneration(long)
    experiment.train("longt5_global", long_source, steps)
    note(f"LongT5 transient-global of radius 31, trained for {steps} steps", long_source)
    note("converted, every budget 1: without its global tokens", convert(long_source, samples=sample, **full))
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, convert, shrink the budgets, train further, write the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of what is trained, to go on with")
    parser.add_argument("--steps", type=int, default=300, help="steps of the sources")
    parser.add_argument("--further-steps", type=int, default=160, help="steps after the conversion")
    options = parse(parser, arguments, needs_gpu=False)
    steps, further = (EVERY, EVERY) if options.tiny else (options.steps, options.further_steps)
    start = time.perf_counter()
    experiment = Experiment(options.work, options.tiny)
    table = Table("warm_start", TITLE, options)
    converted = measure_conversion(experiment, table, steps)
    table.finish()

    table = Table("warm_start_steps", STEPS_TITLE, options)
    set_seed(0)
    fresh = CoLT5ForConditionalGeneration(converted.config)
    before = {"converted": experiment.loss(converted), "fresh": experiment.loss(fresh)}
    # text that the source has not seen
    curves = {
        "converted": experiment.train("converted", converted, further, steps * BATCH),
        "fresh": experiment.train("fresh", fresh, further, steps * BATCH),
    }
    table.add({"steps": 0, **before})
    for step in curves["fresh"]:
        table.add({"steps": int(step), **{name: curve[step] for name, curve in curves.items()}})
    halfway, last = (list(curves["fresh"].values())[index] for index in (len(curves["fresh"]) // 2 - 1, -1))
    for loss in (halfway, last):
        converted_step, fresh_step = (steps_to(curve, loss) for curve in curves.values())
        table.note(f"A loss of {loss:.2f}: the converted model by step {converted_step}, the fresh by {fresh_step}.")
    table.note(f"{time.perf_counter() - start:.0f} s, of which what an earlier run had trained took nothing.")
    table.finish()


if __name__ == "__main__":
    main()
