"""Does it learn: held-out loss of CoLT5, its controls and LongT5, equal but for the encoder, against steps and time.

    python benchmarks/learning.py --prepare folder/with/proposals   # once: tokens of the corpus, one small file
    python benchmarks/learning.py --seconds 420                     # the runs that are not there yet; again: the rest
    python docs/learning_picture.py                                 # pictures and table from what is there

`--prepare` takes a folder with train.jsonl.gz and validation.jsonl.gz, rows with a text `document`.

A run is one variant and one seed. Each device takes the next run that no other has, so that no two share a card. A run
that is complete is never done again; one that the budget cuts off leaves nothing, and begins anew.
"""

import gzip
import json
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captured_step import TrainingStep
from measure import RESULTS, describe_device
from torch import nn
from transformers import HfArgumentParser, LongT5Config, LongT5ForConditionalGeneration, PreTrainedModel

from modeling_colt5 import CoLT5Config, CoLT5ForConditionalGeneration, CoLT5Tokenizer
from modeling_colt5.denoising import DataCollatorForDenoising, SpanCorruption, chunk_documents
from modeling_colt5.parameter_groups import size_scaled_groups
from modeling_colt5.router_colt5 import CoLT5Router

ROOT = Path(__file__).resolve().parents[1]
# with T5's own vocabulary, such small models would be embeddings more than layers, and the head most of their time
VOCABULARY = ROOT / "tokenization/python_stdlib"
# spans of T5's 3 tokens need more sentinels than T5's 100 at this length
NUM_SENTINELS = 256
VOCAB_SIZE = 8320

# what a variant changes
COLT5 = {
    "colt5-learned": {"routing": "learned"},
    "colt5-random": {"routing": "random"},
    "colt5-even": {"routing": "even"},
    "colt5-none": {"routing": "none"},
}
LONGT5 = {"longt5-local": "local", "longt5-transient-global": "transient-global"}
# in the order of work
VARIANTS = (*COLT5, *LONGT5)
# further learned models that tell choice, strength and training of the routers apart
DIAGNOSIS = {
    # another choice at every step, with weights that learned routers start with
    "colt5-random-soft": {"routing": "learned"},
    # the choice of router vectors that stay as they were drawn, with the controls' weights of 1
    "colt5-untrained": {"routing": "learned"},
    "colt5-epsilon": {"routing": "learned", "routing_epsilon": 0.1},
    "colt5-router-rate": {"routing": "learned"},
    # AdamW as it is, at one learning rate for all parameters
    "colt5-one-rate": {"routing": "learned"},
    "colt5-descent": {"routing": "learned", "soft_topk_solver": "coordinate_descent", "num_soft_topk_iterations": 50},
}
ROUTER_RATE = 10.0
ONE_RATE = 2e-3


@dataclass(frozen=True)
class Settings:
    """What all variants share; a result belongs to its settings."""

    d_model: int = field(default=384, metadata={"help": "width"})
    d_kv: int = field(default=64, metadata={"help": "width of a head; there are d_model / d_kv heads"})
    num_layers: int = field(default=4, metadata={"help": "encoder layers"})
    num_decoder_layers: int = field(default=2, metadata={"help": "decoder layers"})
    length: int = field(default=4096, metadata={"help": "tokens of every input"})
    batch: int = field(default=4, metadata={"help": "inputs in a step"})
    steps: int = field(default=2400, metadata={"help": "steps of a run, at most"})
    most_seconds: float = field(default=75.0, metadata={"help": "seconds of training of a run, at most"})
    warmup_steps: int = field(default=200, metadata={"help": "steps of rising learning rate; then as 1 / √step"})
    learning_rate: float = field(default=2e-2, metadata={"help": "the highest, relative to each parameter's size"})
    eval_every: int = field(default=200, metadata={"help": "steps between evaluations"})
    eval_rows: int = field(default=32, metadata={"help": "held-out inputs"})


@dataclass
class Arguments:
    """What to do."""

    prepare: Path | None = field(default=None, metadata={"help": "tokenise the corpus in this folder, and stop"})
    tokens: Path = field(
        default=ROOT / "build/learning_tokens.npz", metadata={"help": "the tokens that --prepare makes"}
    )
    out: Path = field(default=RESULTS / "learning", metadata={"help": "folder of the results, one file a run"})
    seconds: float = field(default=float("inf"), metadata={"help": "budget of this invocation, start included"})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "all variants with each in turn"})
    variants: list[str] = field(
        default_factory=lambda: list(VARIANTS), metadata={"help": " ".join((*VARIANTS, *DIAGNOSIS))}
    )
    devices: list[str] | None = field(default=None, metadata={"help": "such as cuda:0 cuda:1; default: all there are"})


def prepare(folder: Path, out: Path) -> None:
    """Tokenise both splits, each into one row of ids in which eos closes every document."""
    tokenizer = CoLT5Tokenizer.from_pretrained(VOCABULARY)
    streams = {}
    for split in ("train", "validation"):
        with gzip.open(folder / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["document"].replace("<extra_id_", "<extra_id _") for line in lines]
        streams[split] = np.concatenate([tokenizer(text, verbose=False)["input_ids"] for text in texts])
        print(f"{split}: {len(texts)} documents, {len(streams[split])} tokens")
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, **{split: tokens.astype(np.uint16) for split, tokens in streams.items()})


def load_tokenizer() -> CoLT5Tokenizer:
    """The vocabulary with more sentinels, which come after all other tokens."""
    tokenizer = CoLT5Tokenizer.from_pretrained(VOCABULARY)
    sentinels = [f"<extra_id_{number}>" for number in range(NUM_SENTINELS)]
    tokenizer.add_tokens(sentinels, special_tokens=True)
    return tokenizer


def corrupted(tokens: np.ndarray, rows: int, settings: Settings, seed: int, repeat: bool) -> dict[str, torch.Tensor]:
    """The first `rows` examples of span corruption: int16 `input_ids` [rows, length] and `labels`, nothing padded."""
    collator = DataCollatorForDenoising(load_tokenizer(), settings.length, denoiser=SpanCorruption(), seed=seed)
    chunks = chunk_documents([{"input_ids": tokens}], collator, repeat=repeat)
    batch = collator([chunk for _, chunk in zip(range(rows), chunks, strict=False)])
    if len(batch["input_ids"]) < rows or not batch["attention_mask"].all() or (batch["labels"] < 0).any():
        raise ValueError(f"the held-out text does not fill {rows} inputs of {settings.length} tokens")
    return {name: batch[name].to(torch.int16) for name in ("input_ids", "labels")}


@lru_cache(maxsize=1)
def load_examples(
    tokens: Path, settings: Settings, seed: int, device: torch.device
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """All examples of a seed's runs, in their order, and the held-out ones, which are the same for every run."""
    streams = np.load(tokens)
    train = corrupted(streams["train"], settings.batch * settings.steps, settings, seed, repeat=True)
    held_out = corrupted(streams["validation"], settings.eval_rows, settings, 12345, repeat=False)
    order = torch.randperm(len(train["labels"]), generator=torch.Generator().manual_seed(seed))
    train = {name: ids[order] for name, ids in train.items()}
    first, second = ({name: ids.to(device) for name, ids in part.items()} for part in (train, held_out))
    return first, second


class RandomScores(nn.Module):
    """A router's routing operation, with normal scores for its own: in evaluation the same at every call."""

    def __init__(self, routing: nn.Module):
        super().__init__()
        self.routing = routing

    def forward(self, scores: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As the operation's."""
        generator = None if self.training else torch.Generator(scores.device).manual_seed(0)
        random = torch.empty_like(scores).normal_(generator=generator)
        return self.routing(random, *arguments)


class FullWeights(nn.Module):
    """A router's routing operation, with weights of 1 for what it chooses: nothing trains the scores."""

    def __init__(self, routing: nn.Module):
        super().__init__()
        self.routing = routing

    def forward(self, scores: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As the operation's."""
        indices, weights, valid = self.routing(scores, *arguments)
        return indices, valid.to(weights.dtype), valid


ROUTING_OF = {"colt5-random-soft": RandomScores, "colt5-untrained": FullWeights}


def make_model(variant: str, settings: Settings) -> PreTrainedModel:
    """A fresh model of a variant. The sizes of branches and feed-forwards are to the width as in the base size."""
    heads, d_ff = settings.d_model // settings.d_kv, 8 * settings.d_model // 3
    shared: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "d_model": settings.d_model,
        "d_kv": settings.d_kv,
        "d_ff": d_ff,
        "num_layers": settings.num_layers,
        "num_decoder_layers": settings.num_decoder_layers,
        "num_heads": heads,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        # T5 1.0's head in all: LongT5 in Transformers has no other, whatever its configuration says
        "tie_word_embeddings": True,
        "scale_decoder_outputs": True,
        "decoder_start_token_id": 0,
    }
    if variant not in LONGT5:
        light = max(heads // 3, 1)
        branches = {
            "num_light_heads": light,
            "num_heavy_heads": heads - light,
            "light_d_ff": d_ff // 2,
            "heavy_d_ff": 4 * d_ff,
        }
        own = (COLT5 | DIAGNOSIS)[variant]
        model = CoLT5ForConditionalGeneration(CoLT5Config(**shared, **branches, **own))
        if variant in ROUTING_OF:
            for module in model.modules():
                if isinstance(module, CoLT5Router):
                    module.select = ROUTING_OF[variant](module.select)
        return model
    return LongT5ForConditionalGeneration(LongT5Config(**shared, encoder_attention_type=LONGT5[variant]))


def rows_of(data: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    """A batch as the models take it; nothing in it is padded."""
    return {name: ids[rows].long() for name, ids in data.items()}


def autocast(device: torch.device) -> AbstractContextManager:
    """bf16 on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, where it is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, data: dict[str, torch.Tensor], batch: int) -> float:
    """The mean loss a token."""
    model.eval()
    device = data["labels"].device
    losses = []
    for start in range(0, len(data["labels"]), batch):
        with autocast(device):
            part = rows_of(data, slice(start, start + batch))
            losses.append(model(**part, use_cache=False).loss * len(part["labels"]))
    model.train()
    return float(torch.stack(losses).sum()) / len(data["labels"])


@torch.no_grad()
def describe_routing(model: PreTrainedModel, data: dict[str, torch.Tensor], batch: int) -> dict[str, Any]:
    """What the routers do, a list over layers for each: mean weight, share of weights at 1, share of the inputs'
    sentinels that are routed, length of the learned vectors, and their gradients' part of the whole gradient's length.
    """
    if not isinstance(model, CoLT5ForConditionalGeneration) or model.config.routing == "none":
        return {}
    inputs = rows_of(data, slice(batch))
    tokenizer = load_tokenizer()
    ids = tokenizer.convert_tokens_to_ids([f"<extra_id_{number}>" for number in range(NUM_SENTINELS)])
    sentinels = torch.isin(inputs["input_ids"], torch.tensor(ids, device=inputs["input_ids"].device))
    model.eval()
    with autocast(inputs["input_ids"].device):
        layers = model.encoder(inputs["input_ids"], output_routing=True).routing
    model.train()
    description: dict[str, Any] = {}
    for name in ("query", "key_value", "feed_forward"):
        routed = [getattr(layer, name) for layer in layers]
        description[name] = {
            "weight": [float(tokens.weights.mean()) for tokens in routed],
            "saturated": [float((tokens.weights >= 1).float().mean()) for tokens in routed],
            "sentinels": [float(sentinels.gather(1, tokens.indices).sum() / sentinels.sum()) for tokens in routed],
        }
    routers = [parameter for name, parameter in model.named_parameters() if name.endswith("router.weight")]
    if routers and routers[0].grad is not None:
        whole = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        description["vector_norm"] = [float(router.norm()) for router in routers]
        description["gradient_part"] = [float(router.grad.norm() / whole) for router in routers]
    return description


def make_step(variant: str, model: PreTrainedModel, settings: Settings) -> TrainingStep:
    """A variant's training step: a plain loop's, for Trainer's clock would hold the evaluations."""

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with autocast(batch["labels"].device):
            return model(**batch, use_cache=False).loss

    def factor(name: str) -> float:
        return ROUTER_RATE if variant == "colt5-router-rate" and name.endswith("router.weight") else 1.0

    groups = size_scaled_groups(model, settings.learning_rate, factor)
    if variant == "colt5-one-rate":
        groups = [{"params": list(model.parameters()), "lr": ONE_RATE}]
    return TrainingStep(model, loss_of, groups, settings.warmup_steps)


def run(
    variant: str, seed: int, settings: Settings, tokens: Path, device: torch.device, deadline: float
) -> dict[str, Any] | None:
    """One run: its curve, with the seconds of training alone; `None` where the deadline came first."""
    train, held_out = load_examples(tokens, settings, seed, device)
    # each held-out target with another's input: what the decoder knows without the encoder
    swapped = held_out | {"input_ids": held_out["input_ids"].roll(1, 0)}

    def batch_of(done: int) -> dict[str, torch.Tensor]:
        return rows_of(train, slice(done * settings.batch, (done + 1) * settings.batch))

    # kernels are compiled and chosen before the clock starts, on a model that is thrown away
    with device:
        model = make_model(variant, settings)
    step = make_step(variant, model, settings)
    for done in range(min(5, settings.steps)):
        step(batch_of(done))
    held_out_loss(model, held_out, settings.batch)
    describe_routing(model, held_out, settings.batch)
    del model, step

    torch.manual_seed(seed)
    with device:
        model = make_model(variant, settings)
    step = make_step(variant, model, settings)
    curve, seconds, loss = [], 0.0, None
    started = time.perf_counter()
    for done in range(settings.steps + 1):
        if done % settings.eval_every == 0 or done == settings.steps:
            synchronize(device)
            seconds += time.perf_counter() - started
            if time.time() > deadline:
                return None
            point: dict[str, Any] = {"step": done, "seconds": seconds}
            if loss is not None:
                point["training_loss"] = float(loss)
            point["loss"] = held_out_loss(model, held_out, settings.batch)
            point["swapped_loss"] = held_out_loss(model, swapped, settings.batch)
            point["routing"] = describe_routing(model, held_out, settings.batch)
            curve.append(point)
            if seconds > settings.most_seconds:
                break
            synchronize(device)
            started = time.perf_counter()
        if done < settings.steps:
            loss = step(batch_of(done))
    return {"parameters": model.num_parameters(), "captured": step.captured, "curve": curve}


def rounded(value: Any) -> Any:
    """The same with floats of five digits, for smaller files."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def work(
    rank: int, devices: list[str], runs: list[tuple[str, int]], taken: Any, settings: Settings, arguments: Arguments,
    deadline: float,
) -> None:  # fmt: skip
    """One device's process: take the next run until there is none, or no time."""
    device = torch.device(devices[rank])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    while time.time() < deadline:
        with taken.get_lock():
            number = taken.value
            taken.value += 1
        if number >= len(runs):
            return
        variant, seed = runs[number]
        started = time.perf_counter()
        result = run(variant, seed, settings, arguments.tokens, device, deadline)
        if result is None:
            print(f"{variant}, seed {seed}: no time left", flush=True)
            return
        heading = {"variant": variant, "seed": seed, "settings": asdict(settings)} | describe_device()
        text = json.dumps(rounded(heading | result))
        (arguments.out / f"{variant}-{seed}.json").write_text(text.replace('{"step"', '\n{"step"') + "\n")
        last = result["curve"][-1]
        how = "captured" if result["captured"] else "eager"
        print(
            f"{variant}, seed {seed}, {device}, {how}: loss {last['loss']:.4f} after {last['step']} steps in "
            f"{last['seconds']:.1f} s of training, {time.perf_counter() - started:.0f} s in all",
            flush=True,
        )


def is_complete(path: Path, settings: Settings) -> bool:
    """Whether the file holds a run of these settings."""
    return path.exists() and json.loads(path.read_text())["settings"] == asdict(settings)


def main(argv: list[str] | None = None) -> None:
    """Prepare, or do the runs that are not there yet."""
    deadline = time.time()
    settings, arguments = HfArgumentParser((Settings, Arguments), description=__doc__).parse_args_into_dataclasses(
        argv
    )
    deadline += arguments.seconds
    if arguments.prepare is not None:
        prepare(arguments.prepare, arguments.tokens)
        return
    if unknown := set(arguments.variants) - {*VARIANTS, *DIAGNOSIS}:
        known = ", ".join((*VARIANTS, *DIAGNOSIS))
        raise ValueError(f"variants has {', '.join(sorted(unknown))}; there are {known}")
    if not arguments.tokens.exists():
        raise ValueError(f"tokens is {arguments.tokens}, which is not there; --prepare makes it")
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = [
        (variant, seed)
        for seed in arguments.seeds
        for variant in arguments.variants
        if not is_complete(arguments.out / f"{variant}-{seed}.json", settings)
    ]
    devices = arguments.devices or [f"cuda:{n}" for n in range(torch.cuda.device_count())] or ["cpu"]
    taken = torch.multiprocessing.get_context("spawn").Value("i", 0)
    shared = (devices, runs, taken, settings, arguments, deadline)
    if len(devices) == 1:
        work(0, *shared)
    else:
        torch.multiprocessing.spawn(work, shared, nprocs=len(devices))


if __name__ == "__main__":
    main(sys.argv[1:])
