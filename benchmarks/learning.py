"""Does it learn: held-out loss of CoLT5, its controls and LongT5, equal but for the encoder, against steps and cost.

    python benchmarks/learning.py --prepare folder/with/proposals   # once: tokens of the corpus, one small file
    python benchmarks/learning.py --seconds 420                     # the runs that are not there yet; again: the rest
    python docs/learning_picture.py                                 # pictures and tables from what is there

`--prepare` takes a folder with train.jsonl.gz and validation.jsonl.gz, rows with a text `document`.

A run is one variant and one seed. Cost is counted in operations, by formula, so that several runs may share a card
(`--lanes`); only where seconds are compared, as with LongT5, each needs a card for itself (`--lanes 1`). A run that is
complete is never done again; one that is broken off leaves nothing, and begins anew.
"""

import gc
import gzip
import json
import math
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
from measure import RESULTS, describe_commit, describe_device
from transformers import HfArgumentParser, LongT5Config, LongT5ForConditionalGeneration, PreTrainedModel

from modeling_colt5 import CoLT5Config, CoLT5ForConditionalGeneration, CoLT5Tokenizer
from modeling_colt5.denoising import DataCollatorForDenoising, SpanCorruption, chunk_documents
from modeling_colt5.dense_start import DenseStart, ShortenDenoising, learned_routers
from modeling_colt5.encoder_costs import encoder_flops
from modeling_colt5.parameter_groups import size_scaled_groups

ROOT = Path(__file__).resolve().parents[1]
# with T5's own vocabulary, such small models would be embeddings more than layers, and the head most of their time
VOCABULARY = ROOT / "tokenization/python_stdlib"
# spans of T5's 3 tokens need more sentinels than T5's 100 at this length
NUM_SENTINELS = 256
VOCAB_SIZE = 8320

START = DenseStart()
# a quarter of the steps that START takes, for runs that are compared at equal operations
BRIEF_START = DenseStart(closed=0.1, opening=0.05)


@dataclass(frozen=True)
class Variant:
    """What sets a variant of CoLT5 apart.

    Attributes:
        routing: the configuration's.
        budget: one query, and one token of the feed-forward, among so many tokens; keys and values are twice as many.
        parts: how many parts of each input the dense start reads, each as an input of its own: 1 is the beginning
            alone, 4 the whole input; 0 for no dense start.
        drawn: whether the one part lies anywhere in the input, as in pre-training.
        after: the routing after the dense start, where it is another one: a control that has had the same start, but
            that nothing opens, as it has no choice to learn.
        start: the dense start's schedule.
        later_ratio: `soft_topk_ratio` from the end of the dense start on, where it is another one.
        cross: whether the decoder reads the encoder's output through routed cross-attention.
        fields: more of the configuration.
    """

    routing: str = "learned"
    budget: int = 16
    parts: int = 0
    drawn: bool = False
    after: str | None = None
    start: DenseStart = START
    later_ratio: float | None = None
    cross: bool = False
    fields: dict[str, Any] = field(default_factory=dict)


# the budget of cross-attention's routers at the full length: room for the 228 sentinels that an input has
CROSS_BUDGET = 16
STUDY = {
    "colt5-learned-64": Variant(budget=64, parts=1),
    "colt5-even-16": Variant("even"),
    "colt5-learned-16": Variant(parts=1),
    "colt5-even-64": Variant("even", budget=64),
    "colt5-none": Variant("none"),
}
CROSS = {
    "colt5-learned-16-cross": Variant(parts=1, cross=True),
    "colt5-even-16-cross": Variant("even", cross=True),
}
# what the dense start is worth, and reading whole inputs in it
STARTS = {
    "colt5-learned-64-whole": Variant(budget=64, parts=4),
    "colt5-learned-16-whole": Variant(parts=4),
    "colt5-even-64-whole": Variant(budget=64, parts=4, after="even"),
    "colt5-even-16-whole": Variant(parts=4, after="even"),
    "colt5-learned-16-cross-whole": Variant(parts=4, cross=True),
    "colt5-even-16-cross-whole": Variant(parts=4, after="even", cross=True),
    "colt5-learned-16-brief": Variant(parts=4, start=BRIEF_START),
    "colt5-even-16-brief": Variant(parts=4, after="even", start=BRIEF_START),
    "colt5-learned-64-drawn": Variant(budget=64, parts=1, drawn=True),
    "colt5-learned-16-drawn": Variant(parts=1, drawn=True),
    "colt5-as-shipped-64": Variant(budget=64),
    "colt5-as-shipped-16": Variant(),
}
OTHERS = {
    "colt5-random-16": Variant("random"),
    "colt5-epsilon-16": Variant(fields={"routing_epsilon": 0.1}),
    # more of the chosen tokens have a weight near 1
    "colt5-ratio-2-16": Variant(fields={"soft_topk_ratio": 2}),
    "colt5-ratio-4-16": Variant(fields={"soft_topk_ratio": 4}),
    "colt5-learned-16-whole-then-ratio-4": Variant(parts=4, later_ratio=4),
    "colt5-learned-16-brief-then-ratio-4": Variant(parts=4, start=BRIEF_START, later_ratio=4),
    # AdamW as it is, at one learning rate for all parameters
    "colt5-one-rate-16": Variant(),
    "colt5-descent-16": Variant(fields={"soft_topk_solver": "coordinate_descent", "num_soft_topk_iterations": 50}),
}
COLT5 = STUDY | CROSS | STARTS | OTHERS
LONGT5 = {"longt5-local": "local", "longt5-transient-global": "transient-global"}
# in the order of work: all seeds of one group come before the next group
GROUPS = (STUDY, CROSS, STARTS, OTHERS, LONGT5)
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
    most_seconds: float | None = field(
        default=None, metadata={"help": "seconds of training of a run, at most, where seconds are compared"}
    )
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
    seconds: float = field(default=float("inf"), metadata={"help": "begin no further run after these"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3], metadata={"help": "all variants with each in turn"})
    variants: list[str] = field(
        default_factory=lambda: [*STUDY, *CROSS, *STARTS], metadata={"help": " ".join((*COLT5, *LONGT5))}
    )
    devices: list[str] | None = field(default=None, metadata={"help": "such as cuda:0 cuda:1; default: all there are"})
    lanes: int = field(default=4, metadata={"help": "runs at a time on each GPU; on a CPU one"})


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


@lru_cache(maxsize=1)
def load_tokenizer() -> CoLT5Tokenizer:
    """The vocabulary with more sentinels, which come after all other tokens."""
    tokenizer = CoLT5Tokenizer.from_pretrained(VOCABULARY)
    sentinels = [f"<extra_id_{number}>" for number in range(NUM_SENTINELS)]
    tokenizer.add_tokens(sentinels, special_tokens=True)
    return tokenizer


def sentinel_ids() -> tuple[int, ...]:
    """The ids of the sentinels, from <extra_id_0> on."""
    return tuple(load_tokenizer().convert_tokens_to_ids([f"<extra_id_{number}>" for number in range(NUM_SENTINELS)]))


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


def in_parts(inputs: dict[str, torch.Tensor], parts: int, drawn: bool = False) -> dict[str, torch.Tensor]:
    """What a step of a dense start reads: the first `parts` stretches of every input, each as a row of its own.

    Args:
        inputs: `input_ids` [batch, n] and `labels` [batch, m], nothing padded.
        parts: how many stretches of ceil(`START.input_share` · n) tokens.
        drawn: whether they lie anywhere.

    Returns:
        `input_ids` [parts · batch, ceil(share · n)], and `labels` [parts · batch, ceil(2 · share · m)] with the spans
        of each stretch's own sentinels and -100 behind them. Of more than twice the average, the last are cut.
    """
    ids, labels = inputs["input_ids"], inputs["labels"]
    share = START.input_share
    shorten, stretch = ShortenDenoising(sentinel_ids()), math.ceil(share * ids.shape[1])
    rows = [
        shorten(inputs, share)
        if drawn
        else shorten.stretch(inputs, share, torch.full((len(ids),), start, device=ids.device))
        for start in range(0, parts * stretch, stretch)
    ]
    width = math.ceil(2 * share * labels.shape[1])
    return {
        "input_ids": torch.cat([row["input_ids"] for row in rows]),
        "labels": torch.cat([row["labels"][:, :width] for row in rows]),
    }


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
    if variant in LONGT5:
        return LongT5ForConditionalGeneration(LongT5Config(**shared, encoder_attention_type=LONGT5[variant]))
    own, light = COLT5[variant], max(heads // 3, 1)
    fields: dict[str, Any] = {
        "routing": own.routing,
        "num_light_heads": light,
        "num_heavy_heads": heads - light,
        "light_d_ff": d_ff // 2,
        "heavy_d_ff": 4 * d_ff,
        "routed_query_fraction": 1 / own.budget,
        "routed_key_value_fraction": 2 / own.budget,
        "routed_feed_forward_fraction": 1 / own.budget,
        "routed_cross_key_values": settings.length // CROSS_BUDGET if own.cross else None,
    }
    return CoLT5ForConditionalGeneration(CoLT5Config(**shared | fields | own.fields))


def begin(variant: str, seed: int, settings: Settings, device: torch.device) -> PreTrainedModel:
    """A model at the start of a seed's run: all variants of CoLT5 have the same weights, as far as they have them."""
    torch.manual_seed(seed)
    with device:
        model = make_model(variant, settings)
        if variant in COLT5:
            torch.manual_seed(seed)
            # it has all the weights that any of them has
            model.load_state_dict(make_model("colt5-learned-16-cross", settings).state_dict(), strict=False)
    return model


def step_flops(config: CoLT5Config, rows: int, n: int, m: int, dense: bool) -> int:
    """FLOP of the matrix products of a training step: a forward pass, and a backward of twice as many.

    Args:
        config: the model's.
        rows: inputs.
        n: tokens of each.
        m: tokens of each target; the decoder's attention to itself is counted without regard to what is masked.
        dense: whether all tokens take the heavy branches, and routed cross-attention reads them all.
    """
    width, inner, matrices = config.d_model, config.num_heads * config.d_kv, 3 if config.is_gated_act else 2
    read, scored = n, 0
    if config.routed_cross_key_values is not None:
        read, scored = n if dense else min(n, config.routed_cross_key_values), n * config.num_cross_routers
    multiplications = (
        # queries, keys, values and output; then scores and the weighted sum of values
        4 * m * width * inner
        + 2 * m * m * inner
        + 2 * m * width * inner
        + 2 * read * width * config.num_cross_key_value_heads * config.d_kv
        + 2 * m * read * inner
        + scored * width
        + matrices * m * width * config.d_ff
    )
    decoder = 2 * (config.num_decoder_layers * multiplications + m * width * config.vocab_size)
    if config.routing == "none":
        # a heavy branch of one token instead of none
        fractions = ("routed_query_fraction", "routed_key_value_fraction", "routed_feed_forward_fraction")
        config = CoLT5Config.from_dict(config.to_dict() | dict.fromkeys(fractions, 1e-9))
    return 3 * rows * (encoder_flops(config, n, dense=dense) + decoder)


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
    sentinels = torch.isin(inputs["input_ids"], torch.tensor(sentinel_ids(), device=inputs["input_ids"].device))
    model.eval()
    with autocast(inputs["input_ids"].device):
        outputs = model(**inputs, use_cache=False, output_routing=True)
    model.train()
    choices = {
        name: [getattr(layer, name) for layer in outputs.encoder_routing]
        for name in ("query", "key_value", "feed_forward")
    }
    if outputs.cross_routing is not None:
        choices["cross"] = [routed for layer in outputs.cross_routing for routed in layer]
    description: dict[str, Any] = {}
    for name, routed in choices.items():
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


class Training:
    """A run's model and its steps: a plain loop's, for Trainer's clock would hold the evaluations."""

    def __init__(self, variant: str, seed: int, settings: Settings, device: torch.device):
        self.settings = settings
        self.model = begin(variant, seed, settings, device)
        self.own = COLT5.get(variant, Variant())
        groups = size_scaled_groups(self.model, settings.learning_rate)
        if variant == "colt5-one-rate-16":
            groups = [{"params": list(self.model.parameters()), "lr": ONE_RATE}]
        model = self.model

        def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            with autocast(device):
                return model(**batch, use_cache=False).loss

        self.step = TrainingStep(model, loss_of, groups, settings.warmup_steps)
        self.flops = 0
        self.has_dense_start = False

    def progress(self, done: int) -> float | None:
        """How far the dense start has come before a step; None without one and behind it."""
        progress = self.own.start.progress(done, self.settings.steps) if self.own.parts else None
        return 0.0 if progress is not None and self.own.after else progress

    def __call__(self, batch: dict[str, torch.Tensor], progress: float | None) -> torch.Tensor:
        """Do a step, and give its loss; its operations are added where the model is CoLT5."""
        is_dense = progress is not None
        if is_dense:
            self.model.set_dense_start(progress)
            batch = in_parts(batch, self.own.parts, self.own.drawn)
        elif self.has_dense_start:
            self.model.set_dense_start(None)
            if self.own.later_ratio is not None:
                self.model.config.soft_topk_ratio = self.own.later_ratio
            if self.own.after:
                for router in learned_routers(self.model):
                    router.routing = self.own.after
        self.has_dense_start = is_dense
        if isinstance(self.model, CoLT5ForConditionalGeneration):
            (rows, n), m = batch["input_ids"].shape, batch["labels"].shape[1]
            self.flops += step_flops(self.model.config, rows, n, m, is_dense)
        return self.step(batch, phase=is_dense)


def free_memory() -> None:
    """Give back what is no longer used, for other lanes; and no graph may be destroyed while another is captured."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(variant: str, seed: int, settings: Settings, tokens: Path, device: torch.device) -> dict[str, Any]:
    """One run: its curve, with the operations so far and the seconds of training alone."""
    free_memory()
    train, held_out = load_examples(tokens, settings, seed, device)
    # each held-out target with another's input: what the decoder knows without the encoder
    swapped = held_out | {"input_ids": held_out["input_ids"].roll(1, 0)}

    def batch_of(done: int) -> dict[str, torch.Tensor]:
        return rows_of(train, slice(done * settings.batch, (done + 1) * settings.batch))

    # kernels are compiled and chosen before the clock starts, on a model that is thrown away
    training = Training(variant, seed, settings, device)
    for progress in (0.0, None) if training.own.parts else (None,):
        for done in range(min(5, settings.steps)):
            training(batch_of(done), progress)
    held_out_loss(training.model, held_out, settings.batch)
    describe_routing(training.model, held_out, settings.batch)
    del training
    free_memory()

    training = Training(variant, seed, settings, device)
    model = training.model
    curve, seconds, loss = [], 0.0, None
    started = time.perf_counter()
    for done in range(settings.steps + 1):
        if done % settings.eval_every == 0 or done == settings.steps:
            synchronize(device)
            seconds += time.perf_counter() - started
            point: dict[str, Any] = {"step": done, "seconds": seconds}
            if variant in COLT5:
                point["flops"] = training.flops
            if loss is not None:
                point["training_loss"] = float(loss)
            point["loss"] = held_out_loss(model, held_out, settings.batch)
            point["swapped_loss"] = held_out_loss(model, swapped, settings.batch)
            point["routing"] = describe_routing(model, held_out, settings.batch)
            curve.append(point)
            if settings.most_seconds is not None and seconds > settings.most_seconds:
                break
            synchronize(device)
            started = time.perf_counter()
        if done < settings.steps:
            loss = training(batch_of(done), training.progress(done))
    # the first step with the paper's routing
    start_ends = next(done for done in range(settings.steps + 1) if training.progress(done) is None)
    return {
        "parameters": model.num_parameters(),
        "captured": training.step.captured,
        "start_ends": start_ends,
        "curve": curve,
    }


def rounded(value: Any) -> Any:
    """The same with floats of five digits, for smaller files."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def work(
    lane: int, devices: list[str], runs: list[tuple[str, int]], taken: Any, settings: Settings, arguments: Arguments,
    deadline: float,
) -> None:  # fmt: skip
    """One lane's process: take the next run until there is none, or no time."""
    device = torch.device(devices[lane % len(devices)])
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
        result = run(variant, seed, settings, arguments.tokens, device)
        heading = {"variant": variant, "seed": seed, "settings": asdict(settings), "lanes": arguments.lanes}
        text = json.dumps(rounded(heading | describe_device() | {"commit": describe_commit()} | result))
        # whole or not at all, also where the process is killed
        unfinished = arguments.out / f"{variant}-{seed}.tmp"
        unfinished.write_text(text.replace('{"step"', '\n{"step"') + "\n")
        unfinished.replace(unfinished.with_suffix(".json"))
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
    if unknown := set(arguments.variants) - {*COLT5, *LONGT5}:
        known = ", ".join((*COLT5, *LONGT5))
        raise ValueError(f"variants has {', '.join(sorted(unknown))}; there are {known}")
    if arguments.lanes < 1:
        raise ValueError(f"lanes is {arguments.lanes}; it must be at least 1")
    if not arguments.tokens.exists():
        raise ValueError(f"tokens is {arguments.tokens}, which is not there; --prepare makes it")
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = [
        (variant, seed)
        for group in GROUPS
        for seed in arguments.seeds
        for variant in group
        if variant in arguments.variants and not is_complete(arguments.out / f"{variant}-{seed}.json", settings)
    ]
    devices = arguments.devices or [f"cuda:{n}" for n in range(torch.cuda.device_count())] or ["cpu"]
    lanes = len(devices) * (1 if devices == ["cpu"] else arguments.lanes)
    taken = torch.multiprocessing.get_context("spawn").Value("i", 0)
    shared = (devices, runs, taken, settings, arguments, deadline)
    if lanes == 1:
        work(0, *shared)
    else:
        torch.multiprocessing.spawn(work, shared, nprocs=min(lanes, max(1, len(runs))))


if __name__ == "__main__":
    main(sys.argv[1:])
