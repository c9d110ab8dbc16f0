"""Do the routers of a causal language model learn: facts that stand far before they are asked for.

    python benchmarks/causal_facts.py --seconds 3000      # the runs that are not there yet; then the table

A fact is one token that says which value a name has, a question is one token that says which name; the token after it
is the value. All else is noise. Windows are shorter than the way from a fact to its question, so that it is answered
only when a layer's pool holds the fact and the question is a query. The table has the share of answers that are right
on held-out inputs, with the paper's routing, which is 1 in 8 for guesses. Variants: "full" attention of T5, "routed"
as it is, "dense start" the same after docs/routers.md's recipe, by `DenseStart`'s own schedule.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, describe_device
from results import markdown
from torch import Tensor
from transformers import HfArgumentParser

from modeling_colt5 import CoLT5Config, CoLT5ForCausalLM
from modeling_colt5.dense_start import DenseStart
from modeling_colt5.parameter_groups import size_scaled_groups

NAMES = VALUES = 8
NOISE = 50
# facts, values, questions, noise, behind T5's three special tokens
FIRST_VALUE = 3 + NAMES * VALUES
FIRST_QUESTION = FIRST_VALUE + VALUES
FIRST_NOISE = FIRST_QUESTION + NAMES
VOCAB_SIZE = FIRST_NOISE + NOISE
VARIANTS: dict[str, dict[str, Any]] = {
    "routed": {"causal_attention": "routed"},
    "dense start": {"causal_attention": "routed"},
    "full": {"causal_attention": "full"},
}


@dataclass(frozen=True)
class Settings:
    """What all runs share; a result belongs to its settings."""

    length: int = field(default=256, metadata={"help": "tokens of an input; facts in its first half"})
    facts: int = field(default=4, metadata={"help": "of an input, each asked for once"})
    batch: int = field(default=8, metadata={"help": "inputs in a step"})
    steps: int = field(default=700, metadata={"help": "steps of a run"})
    window: int = field(default=32, metadata={"help": "causal_window"})
    pool: int = field(default=24, metadata={"help": "causal_routed_keys"})
    radius: int = field(default=7, metadata={"help": "local_radius"})
    learning_rate: float = field(default=2e-2, metadata={"help": "the highest, relative to each parameter's size"})


@dataclass
class Arguments:
    """What to do."""

    out: Path = field(default=RESULTS, metadata={"help": "folder of the results, which are added to it"})
    seconds: float = field(default=float("inf"), metadata={"help": "begin no further run after these"})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "all variants with each in turn"})
    variants: list[str] = field(default_factory=lambda: list(VARIANTS), metadata={"help": ", ".join(VARIANTS)})


def draw(settings: Settings, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and labels, int64 [batch, length]; only values that follow a question are labels, all else is -100."""
    shape, half = (settings.batch, settings.length), settings.length // 2
    ids = torch.randint(FIRST_NOISE, VOCAB_SIZE, shape, generator=generator)
    labels = torch.full(shape, -100)
    for row in range(settings.batch):
        names = torch.randperm(NAMES, generator=generator)[: settings.facts]
        values = torch.randint(VALUES, (settings.facts,), generator=generator)
        facts = torch.randperm(half - 2, generator=generator)[: settings.facts]
        questions = half + 2 * torch.randperm(half // 2 - 1, generator=generator)[: settings.facts]
        ids[row, facts] = 3 + names * VALUES + values
        ids[row, questions] = FIRST_QUESTION + names
        ids[row, questions + 1] = labels[row, questions + 1] = FIRST_VALUE + values
    return ids, labels


def make_model(variant: str, settings: Settings) -> CoLT5ForCausalLM:
    """A small model of three layers."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "d_model": 64,
        "d_kv": 16,
        "num_heads": 4,
        "num_light_heads": 2,
        "num_heavy_heads": 4,
        "light_d_ff": 64,
        "heavy_d_ff": 256,
        "d_ff": 128,
        "num_decoder_layers": 3,
        "dropout_rate": 0.0,
        "local_radius": settings.radius,
        "causal_window": settings.window,
        "causal_routed_keys": settings.pool,
    }
    return CoLT5ForCausalLM(CoLT5Config(**sizes | VARIANTS[variant]))


@torch.no_grad()
def accuracy(model: CoLT5ForCausalLM, settings: Settings) -> float:
    """The share of right answers on four held-out batches."""
    generator, right, asked = torch.Generator().manual_seed(1_000_000), 0, 0
    model.eval()
    for _ in range(4):
        ids, labels = draw(settings, generator)
        answers, labels = model(ids, use_cache=False).logits[:, :-1].argmax(-1), labels[:, 1:]
        right += int((answers == labels).sum())
        asked += int((labels != -100).sum())
    model.train()
    return right / asked


def run(variant: str, seed: int, settings: Settings) -> dict[str, float]:
    """Train a fresh model, and say how it answers."""
    torch.manual_seed(seed)
    model = make_model(variant, settings).train()
    optimizer = torch.optim.AdamW(size_scaled_groups(model, settings.learning_rate), weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    generator, schedule, loss = torch.Generator().manual_seed(seed), DenseStart(), torch.tensor(0.0)
    began = time.perf_counter()
    for step in range(settings.steps):
        # up over 50 steps, down over the last fifth
        scale = min(1.0, (step + 1) / 50, (settings.steps - step) / (0.2 * settings.steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * scale
        if variant == "dense start":
            model.set_dense_start(schedule.progress(step, settings.steps))
        ids, labels = draw(settings, generator)
        loss = model(ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.perf_counter() - began
    return {"accuracy": accuracy(model, settings), "loss": float(loss.detach()), "seconds": seconds}


def table(lines: list[dict[str, Any]], settings: Settings) -> str:
    """The runs of these settings as a table."""
    own = [line for line in lines if line["settings"] == asdict(settings)]
    rows = [
        {"variant": line["variant"], "seed": line["seed"], "right answers": line["accuracy"], "loss": line["loss"]}
        for line in sorted(own, key=lambda line: (list(VARIANTS).index(line["variant"]), line["seed"]))
    ]
    versions = sorted(
        {f"{line['device']}, torch {line['torch']}, transformers {line['transformers']}" for line in own}
    )
    head = f"{settings.steps} steps of {settings.batch} inputs of {settings.length} tokens. {'; '.join(versions)}"
    return f"# Facts in a causal language model\n\n{head}.\n\n{markdown(rows)}"


def main(argv: list[str] | None = None) -> None:
    """Do the runs that are not there yet, and write the table."""
    begin = time.time()
    settings, arguments = HfArgumentParser((Settings, Arguments), description=__doc__).parse_args_into_dataclasses(
        argv
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "causal_facts.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for seed in arguments.seeds:
        for variant in arguments.variants:
            name = {"variant": variant, "seed": seed, "settings": asdict(settings)}
            if any(name.items() <= line.items() for line in lines) or time.time() - begin > arguments.seconds:
                continue
            lines.append(name | run(variant, seed, settings) | describe_device())
            with file.open("a") as history:
                history.write(json.dumps(lines[-1]) + "\n")
            print(f"{variant}, seed {seed}: {lines[-1]['accuracy']:.3f}", flush=True)
    (arguments.out / "causal_facts.md").write_text(table(lines, settings))


if __name__ == "__main__":
    main(sys.argv[1:])
