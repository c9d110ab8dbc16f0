"""Does a causally routed decoder learn: held-out loss on the standard library's source, beside local attention only.

    python benchmarks/causal_learning.py --seconds 540    # the runs that are not there yet; again: the rest
    python docs/causal_routing_picture.py                 # picture and tables from what is there

The text is this Python's own standard library without its tests, as bytes; one file in sixteen is held out. A run is
one variant and one seed. One that is complete is never done again; one that the budget cuts off leaves nothing.
"""

import functools
import hashlib
import json
import math
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captured_step import TrainingStep
from measure import RESULTS, describe_device
from torch import nn
from transformers import HfArgumentParser

from modeling_colt5 import CoLT5Config, CoLT5ForCausalLM
from modeling_colt5.dense_start import DenseStart
from modeling_colt5.parameter_groups import size_scaled_groups

# bytes come after pad, eos and unk
FIRST_BYTE, VOCAB_SIZE = 3, 264
EOS = 1
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
# what a variant changes; the order is the order of work
VARIANTS: dict[str, dict[str, Any]] = {
    "routed": {"causal_attention": "routed"},
    "routed-dense-start": {"causal_attention": "routed"},
    "local": {"causal_attention": "local"},
    # four times as many tokens get a heavy part
    "routed-queries": {"causal_attention": "routed", "routed_query_fraction": 0.25},
    # as many heads as the routed model has in both branches
    "local-wide": {"causal_attention": "local", "num_light_heads": 6},
    # what there is to gain from context
    "full": {"causal_attention": "full"},
    "routed-both": {"causal_attention": "routed", "causal_feed_forward": "routed"},
    "routed-feed-forward": {"causal_attention": "local", "causal_feed_forward": "routed"},
}
# begins with docs/routers.md's recipe, on the first quarter of each row
WITH_DENSE_START = "routed-dense-start"
TINY = {"d_model": 32, "num_layers": 2, "length": 128, "window": 16, "pool": 24, "radius": 7, "batch": 2, "steps": 6}
TINY |= {"eval_every": 3, "eval_rows": 2, "warmup_steps": 2, "cooldown_steps": 2}


@dataclass(frozen=True)
class Settings:
    """What all variants share; a result belongs to its settings."""

    d_model: int = field(default=384, metadata={"help": "width"})
    num_layers: int = field(default=4, metadata={"help": "decoder layers"})
    length: int = field(default=4096, metadata={"help": "bytes of every row"})
    window: int = field(default=256, metadata={"help": "causal_window"})
    pool: int = field(default=512, metadata={"help": "causal_routed_keys"})
    radius: int = field(default=127, metadata={"help": "local_radius"})
    batch: int = field(default=8, metadata={"help": "rows in a step"})
    steps: int = field(default=2000, metadata={"help": "steps of a run"})
    warmup_steps: int = field(default=60, metadata={"help": "steps of rising learning rate; then as 1 / √step"})
    cooldown_steps: int = field(default=500, metadata={"help": "the last ones, in which it falls to zero as well"})
    learning_rate: float = field(default=2e-2, metadata={"help": "the highest, relative to each parameter's size"})
    eval_every: int = field(default=200, metadata={"help": "steps between evaluations"})
    eval_rows: int = field(default=64, metadata={"help": "held-out rows"})


@dataclass
class Arguments:
    """What to do."""

    out: Path = field(default=RESULTS / "causal_learning", metadata={"help": "folder of the results, one file a run"})
    seconds: float = field(default=float("inf"), metadata={"help": "budget of this invocation, start included"})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "all variants with each in turn"})
    variants: list[str] = field(default_factory=lambda: list(VARIANTS), metadata={"help": " ".join(VARIANTS)})
    tiny: bool = field(default=False, metadata={"help": "toy sizes: does it run at all?"})


@functools.cache
def load_text() -> tuple[np.ndarray, np.ndarray, str]:
    """The training and the held-out ids, each file closed by eos, and a hash of both."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(root.rglob("*.py")) if not SKIPPED_FOLDERS & set(file.relative_to(root).parts)]
    # in an order that mixes packages, the same wherever the library lies
    names = sorted((zlib.crc32(file.relative_to(root).as_posix().encode()), file) for file in files)
    streams: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for number, file in names:
        text = np.frombuffer(file.read_bytes(), dtype=np.uint8).astype(np.int16) + FIRST_BYTE
        streams[number % 16 == 0].extend((text, np.array([EOS], dtype=np.int16)))
    train, held_out = (np.concatenate(parts) for parts in streams)
    return train, held_out, hashlib.sha256(train.tobytes() + held_out.tobytes()).hexdigest()[:16]


def make_model(variant: str, settings: Settings) -> CoLT5ForCausalLM:
    """A fresh model. The sizes of branches and feed-forwards are to the width as in the base size."""
    d_ff = 8 * settings.d_model // 3
    shared: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "d_model": settings.d_model,
        "d_kv": settings.d_model // 6,
        "num_heads": 6,
        "num_light_heads": 2,
        "num_heavy_heads": 4,
        "light_d_ff": d_ff // 2,
        "heavy_d_ff": 4 * d_ff,
        "d_ff": d_ff,
        "num_decoder_layers": settings.num_layers,
        "local_radius": settings.radius,
        "causal_window": settings.window,
        "causal_routed_keys": settings.pool,
        "dropout_rate": 0.0,
    }
    return CoLT5ForCausalLM(CoLT5Config(**(shared | VARIANTS[variant])))


def autocast(device: torch.device) -> AbstractContextManager:
    """bf16 on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def rows_of(ids: np.ndarray, starts: list[int], length: int, device: torch.device) -> torch.Tensor:
    """int64 [rows, length], rows that begin at `starts`."""
    return torch.from_numpy(np.stack([ids[start : start + length] for start in starts])).long().to(device)


@torch.no_grad()
def token_losses(model: CoLT5ForCausalLM, rows: torch.Tensor, batch: int) -> torch.Tensor:
    """The loss of predicting each byte after the first, in nats, fp32 [rows, length - 1]."""
    model.eval()
    losses = []
    for part in rows.split(batch):
        with autocast(rows.device):
            logits = model(part, use_cache=False).logits[:, :-1]
        losses.append(nn.functional.cross_entropy(logits.float().transpose(1, 2), part[:, 1:], reduction="none"))
    model.train()
    return torch.cat(losses)


@torch.no_grad()
def describe_routing(model: CoLT5ForCausalLM, rows: torch.Tensor, batch: int) -> dict[str, Any]:
    """What is routed on held-out text, a list over layers for each: tokens over their target, mean weight, mean age of
    the pools' tokens in tokens; and the loss with and without the heavy attention, of all tokens and of those of the
    first batch that are queries in some layer (their share, too)."""
    config = model.config
    model.eval()
    with autocast(rows.device):
        layers = model(rows[:batch], output_routing=True, use_cache=False).routing
    description: dict[str, Any] = {}
    window = config.causal_window
    for name, fraction in (
        ("query", config.routed_query_fraction),
        ("feed_forward", config.routed_feed_forward_fraction),
    ):
        # the first window has a rule of its own
        weights = [getattr(layer, name)[:, window:] for layer in layers if getattr(layer, name) is not None]
        if weights:
            target = max(1, round(fraction * window)) / window
            description[name] = {
                "budget": [float((part > 0).float().mean() / target) for part in weights],
                "weight": [float(part.sum() / (part > 0).sum().clamp(min=1)) for part in weights],
            }
    if config.causal_attention == "routed":
        ages = []
        for layer in layers:
            pools = layer.key_value
            start = window * torch.arange(pools.indices.shape[2], device=rows.device)[:, None]
            ages.append(float((start - pools.indices)[pools.valid].float().mean()))
        description["pool_age"] = ages
        queries = torch.stack([layer.query for layer in layers]).amax(0)[:, :-1] > 0
        heavy = [block.layer[0].heavy_attention.o.weight for block in model.decoder.block]
        kept = [weight.clone() for weight in heavy]
        losses = {"with": token_losses(model, rows, batch)}
        for weight in heavy:
            weight.zero_()
        losses["without"] = token_losses(model, rows, batch)
        for weight, before in zip(heavy, kept, strict=True):
            weight.copy_(before)
        description["loss_without_heavy"] = float(losses["without"].mean())
        description["queries"] = {"share": float(queries.float().mean())}
        description["queries"] |= {name: float(part[: len(queries)][queries].mean()) for name, part in losses.items()}
    model.train()
    return description


def train_steps(
    model: CoLT5ForCausalLM,
    ids: np.ndarray,
    settings: Settings,
    seed: int,
    device: torch.device,
    schedule: DenseStart | None,
) -> Iterator[int]:
    """Train in place, with a dense start where there is a schedule. Yields the number of steps done: 0 first, before
    each step, and at the end."""

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with autocast(device):
            return model(batch["rows"], labels=batch["rows"], use_cache=False).loss

    groups = size_scaled_groups(model, settings.learning_rate)
    cooldown = (settings.steps - settings.cooldown_steps + 1, settings.steps) if settings.cooldown_steps else None
    train_step = TrainingStep(model, loss_of, groups, settings.warmup_steps, cooldown)
    draws = np.random.default_rng(seed)
    for step in range(settings.steps):
        yield step
        starts = draws.integers(len(ids) - settings.length, size=settings.batch).tolist()
        length, progress = settings.length, None
        if schedule is not None:
            progress = schedule.progress(step, settings.steps)
            model.set_dense_start(progress)
            length = length if progress is None else math.ceil(schedule.input_share * length)
        train_step({"rows": rows_of(ids, starts, length, device)}, phase=progress is None)
    yield settings.steps


def run(variant: str, seed: int, settings: Settings, device: torch.device, deadline: float) -> dict[str, Any] | None:
    """One run: its curve, with the seconds of training alone; `None` where the deadline came first."""
    train, held_out, text = load_text()
    starts = list(range(0, len(held_out) - settings.length, settings.length))[: settings.eval_rows]
    rows = rows_of(held_out, starts, settings.length, device)

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def fresh() -> CoLT5ForCausalLM:
        torch.manual_seed(seed)
        with device:
            return make_model(variant, settings)

    schedule = DenseStart() if variant == WITH_DENSE_START else None
    # kernels are compiled and chosen before the clock starts, on a model that is thrown away
    for step in train_steps(model := fresh(), train, settings, seed, device, schedule):
        if step == min(3, settings.steps):
            break
    token_losses(model, rows, settings.batch)

    model = fresh()
    curve, seconds, started = [], 0.0, wait()
    for step in train_steps(model, train, settings, seed, device, schedule):
        if step % settings.eval_every and step != settings.steps:
            continue
        seconds += wait() - started
        if time.time() > deadline:
            return None
        loss = float(token_losses(model, rows, settings.batch).mean())
        curve.append({"step": step, "seconds": seconds, "loss": loss})
        started = wait()
    return {
        "text": text,
        "bytes": [len(train), len(held_out)],
        "parameters": model.num_parameters(),
        "routing": describe_routing(model, rows, settings.batch),
        "curve": curve,
    }


def is_complete(path: Path, settings: Settings) -> bool:
    """Whether the file holds a run of these settings."""
    return path.exists() and json.loads(path.read_text())["settings"] == asdict(settings)


def main(argv: list[str] | None = None) -> None:
    """Do the runs that are not there yet, one after the other."""
    begin = time.time()
    parser = HfArgumentParser((Settings, Arguments), description=__doc__)
    settings, arguments = parser.parse_args_into_dataclasses(argv)
    if arguments.tiny:
        settings = Settings(**TINY)
        if arguments.out.resolve() == (RESULTS / "causal_learning").resolve():
            parser.error("--tiny needs a folder of its own (--out): its numbers say nothing")
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    deadline = begin + arguments.seconds
    for seed in arguments.seeds:
        for variant in arguments.variants:
            path = arguments.out / f"{variant}-{seed}.json"
            if is_complete(path, settings) or time.time() > deadline:
                continue
            result = run(variant, seed, settings, device, deadline)
            if result is None:
                print(f"{variant}, seed {seed}: no time left", flush=True)
                continue
            heading = {"variant": variant, "seed": seed, "settings": asdict(settings)} | describe_device()
            text = json.dumps(json.loads(json.dumps(heading | result), parse_float=lambda x: float(f"{float(x):.5g}")))
            path.write_text(text.replace('{"step"', '\n{"step"') + "\n")
            last = result["curve"][-1]
            done = f"loss {last['loss']:.4f} after {last['step']} steps, {last['seconds']:.1f} s"
            print(f"{variant}, seed {seed}: {done}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
