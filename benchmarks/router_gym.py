"""The router gym: do routers learn which tokens matter, where only the heavy branch can carry what is asked for?

    python benchmarks/router_gym.py --seconds 600               # the runs that are not there yet; again: the rest
    python benchmarks/router_gym.py --tasks facts --seeds 0 1   # of these alone
    python benchmarks/router_gym.py --seconds 0                 # the table and the picture from what is there

A run that is cut off goes on from its last measurement, whose state is a file in the folder of the results until the
run has ended.

A run is one task, arm, length, budget and seed: `CoLT5ForTokenClassification` of three layers, in the task "cross"
`CoLT5ForConditionalGeneration` with two layers of decoder besides, trained on inputs that are drawn anew at every
step. Its line is added to results/router_gym.jsonl; no run that has a line is done again. On a GPU a training step is
a CUDA graph, and several runs share the card (`--lanes`).

Arms: "learned", the paper's routing after a dense start (docs/routers.md); "as_shipped", the same without one; "even"
and "random", routing that cannot learn; "none", light branches only; "none_wide", the same with a light feed-forward
so wide that a step costs as many operations as learned routing; "dense", every token in the heavy branches
throughout. Made only where they are asked for: "learned_ratio_2" and "learned_ratio_4", "learned" with another
`soft_topk_ratio`, so that the weights of routed tokens are nearer to 1; and "learned_then_ratio_4", which has it from
the end of the dense start on.

In the task "cross" the budget of queries is that of `routed_cross_key_values` as well, and an arm's routing is that of
encoder and cross-attention alike. The encoder's local radius is 0: with more, evenly spaced tokens gather the facts
around them, and every choice would do. "dense" reads every token in both, and is the ceiling. Without routers
cross-attention cannot be routed: "none" and "none_wide" would read every token, as "dense" does, and have no run.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from captured_step import TrainingStep
from measure import RESULTS, describe_commit, describe_device
from router_gym_report import write
from router_tasks import TASKS, VALUES, Examples, Task
from torch import Tensor, nn
from transformers import HfArgumentParser

from modeling_colt5 import CoLT5Config, CoLT5ForConditionalGeneration, CoLT5ForTokenClassification
from modeling_colt5.dense_start import DenseStart
from modeling_colt5.encoder_costs import encoder_flops
from modeling_colt5.model_router import CoLT5Router
from modeling_colt5.parameter_groups import size_scaled_groups

ARMS = ("learned", "as_shipped", "even", "random", "none", "none_wide", "dense")
# further arms, and their `soft_topk_ratio`
RATIOS = {"learned_ratio_2": 2, "learned_ratio_4": 4}
# the same, from the end of the dense start on
LATER_RATIOS = {"learned_then_ratio_4": 4}
OTHER_ARMS = (*RATIOS, *LATER_RATIOS)
FILE = "router_gym.jsonl"
DECODER_LAYERS = 2
# inputs of the dense start, where the task fits into so few tokens; more rows make up for it
START_LENGTH = 512
RADIUS = 127
# what routers do at the very beginning decides what they come to
EARLY_STEPS = (25, 50, 100, 150)
Model = CoLT5ForTokenClassification | CoLT5ForConditionalGeneration


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        task: its name, of router_tasks.py.
        arm: of `ARMS` or `OTHER_ARMS`.
        length: tokens of an input.
        query_fraction: of queries, of the feed-forward and of what cross-attention reads; keys and values have twice
            as much.
        seed: of weights and inputs.
        steps: of training.
    """

    task: str
    arm: str
    length: int
    query_fraction: float
    seed: int
    steps: int = 3000


@dataclass
class Arguments:
    """What to do."""

    tasks: list[str] = field(default_factory=lambda: list(TASKS[:2]), metadata={"help": " ".join(TASKS)})
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": " ".join((*ARMS, *OTHER_ARMS))})
    lengths: list[int] = field(default_factory=lambda: [2048], metadata={"help": "tokens of an input"})
    budgets: list[int] = field(default_factory=lambda: [16, 64], metadata={"help": "one query among so many tokens"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "all arms with each in turn"})
    steps: int = field(default=3000, metadata={"help": "steps of a run"})
    start_rows: int = field(
        default=4, metadata={"help": "times as many inputs in a step of the dense start, which are shorter"}
    )
    seconds: float = field(default=float("inf"), metadata={"help": "begin no further run after these"})
    lanes: int = field(default=4, metadata={"help": "runs at a time on each GPU; on a CPU one"})
    out: Path = field(default=RESULTS, metadata={"help": "folder of the results"})


@dataclass(frozen=True)
class Settings:
    """What all runs share; a result belongs to its settings."""

    d_model: int = 128
    d_kv: int = 32
    num_layers: int = 3
    batch: int = 16
    learning_rate: float = 1e-2
    warmup_steps: int = 200
    eval_every: int = 250
    eval_rows: int = 64
    start: DenseStart = DenseStart(input_share=1.0)
    start_rows: int = 4


def task_of(run: Run) -> Task:
    """A quarter of the queries' budget for uses: budgets have room, but for few of the useless tokens."""
    return Task(run.task, max(2, round(run.length * run.query_fraction / 4)))


def make_config(run: Run, settings: Settings) -> CoLT5Config:
    """The configuration of a run's model."""
    dense = run.arm == "dense"
    query = 1.0 if dense else run.query_fraction
    heads = settings.d_model // settings.d_kv
    fields: dict[str, Any] = {
        "vocab_size": task_of(run).vocab_size,
        "d_model": settings.d_model,
        "d_kv": settings.d_kv,
        "d_ff": 2 * settings.d_model,
        "num_layers": settings.num_layers,
        "num_decoder_layers": 1,
        "num_heads": heads,
        "num_light_heads": 1,
        "num_heavy_heads": heads - 1,
        "light_d_ff": settings.d_model,
        "heavy_d_ff": 4 * settings.d_model,
        "local_radius": RADIUS,
        "routed_query_fraction": query,
        "routed_key_value_fraction": min(1.0, 2 * query),
        "routed_feed_forward_fraction": query,
        "dropout_rate": 0.0,
        "num_labels": VALUES,
    }
    if run.arm in RATIOS:
        fields["soft_topk_ratio"] = RATIOS[run.arm]
    if run.task == "cross":
        budget = None if dense else max(1, round(run.length * query))
        fields |= {"num_decoder_layers": DECODER_LAYERS, "routed_cross_key_values": budget, "use_cache": False}
        # local attention would bring facts to whatever token is chosen, so that the choice would not matter
        fields["local_radius"] = 0
    routing = {"even": "even", "random": "random", "none": "none", "none_wide": "none"}.get(run.arm, "learned")
    config = CoLT5Config(**fields, routing=routing)
    if run.arm == "none_wide":
        light = CoLT5Config(**fields | dict.fromkeys(
            ("routed_query_fraction", "routed_key_value_fraction", "routed_feed_forward_fraction"), 1e-9
        ))  # fmt: skip
        saved = encoder_flops(config, run.length) - encoder_flops(light, run.length)
        matrices = 3 if config.is_gated_act else 2
        config.light_d_ff += round(saved / (2 * config.num_layers * matrices * run.length * config.d_model))
    return config


def training_flops(config: CoLT5Config, routing: str, dense: bool, rows: int, n: int) -> int:
    """Of the encoder's matrix products in one training step: a forward pass, and a backward that costs two."""
    fractions = ("routed_query_fraction", "routed_key_value_fraction", "routed_feed_forward_fraction")
    share = 1.0 if dense else 1e-9 if routing == "none" else None
    if share is not None:
        config = CoLT5Config.from_dict(config.to_dict() | dict.fromkeys(fractions, share))
    return 3 * rows * encoder_flops(config, n)


@dataclass
class Choice:
    """What one router did in a call.

    Attributes:
        scores: [rows, n] as the routing operation read them, other routers' rows among them.
        own: this router's rows.
        indices, valid: [batch, slots], what it chose.
    """

    scores: Tensor
    own: slice
    indices: Tensor
    valid: Tensor


class Watched:
    """The choices of every router in the one call that is made while it is open."""

    def __init__(self, model: nn.Module):
        self.choices: dict[str, Choice] = {}
        self._hooks = [
            module.select.register_forward_hook(self._note(name))
            for name, module in model.named_modules()
            if isinstance(module, CoLT5Router)
        ]

    def _note(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
            scores, (indices, _, valid) = args[0], outputs
            names = [name]
            # one operation for the routers of a layer's attention, queries first, then keys and values; and one for
            # those of all decoder layers
            if "query_router" in name:
                names = [name, name.replace("query_router", "key_value_router")]
            elif "cross_routing" in name:
                names = [f"{layer}.cross_router" for layer in range(DECODER_LAYERS)]
            rows = len(scores) // len(names)
            for number, part in enumerate(names):
                own = slice(number * rows, (number + 1) * rows)
                self.choices[part] = Choice(scores, own, indices[own], valid[own])

        return hook

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()


def describe_routers(model: Model, examples: Examples, vocab_size: int) -> list[dict[str, Any]]:
    """What the routers choose, and where the loss pulls their scores, under the paper's routing.

    Of every router: the share of needed tokens that it routes (None where it has to route none); the share of the
    token types in the input that it never routes; the spread of its scores; and the mean pull on the score of needed
    tokens that are routed and that are not, in units of the root mean square over all tokens, above 0 where a step
    would raise the score (None without a gradient, or without such tokens).

    Args:
        model: in training mode; it is left so.
        examples: held-out inputs.
        vocab_size: of the task.
    """
    watched = Watched(model)
    model.eval()
    with autocast(examples.ids.device):
        loss = model(**examples.inputs()).loss
    model.train()
    watched.close()
    choices = watched.choices
    read = [choice.scores for choice in choices.values()]
    pulls: Sequence[Tensor | None] = [None] * len(read)
    if model.config.routing == "learned":
        pulls = torch.autograd.grad(-loss, read, allow_unused=True)
    present = torch.bincount(examples.ids.flatten(), minlength=vocab_size) > 0
    described = []
    for (name, choice), pull in zip(choices.items(), pulls, strict=True):
        own_pull = None if pull is None else pull[choice.own]
        chosen = torch.zeros_like(examples.ids).scatter_add_(1, choice.indices, choice.valid.long()).bool()
        needed = examples.needed_queries
        if "key_value" in name:
            needed = examples.needed_keys
        elif "cross" in name:
            needed = examples.needed_memory
        tried = torch.bincount(examples.ids[chosen], minlength=vocab_size) > 0

        def mean_pull(places: Tensor, pull: Tensor | None = own_pull) -> float | None:
            if pull is None or not places.any():
                return None
            return float(pull[places].mean() / pull.square().mean().sqrt().clamp(min=1e-30))

        described.append(
            {
                "router": ".".join(part for part in name.split(".") if part.isdigit() or "router" in part),
                "needed_routed": float((chosen & needed).sum() / needed.sum()) if needed.any() else None,
                "types_never_routed": float((present & ~tried).sum() / present.sum()),
                "spread": float(choice.scores[choice.own].detach().float().std(-1).mean()),
                "pull_on_needed_routed": mean_pull(needed & chosen),
                "pull_on_needed_unrouted": mean_pull(needed & ~chosen),
            }
        )
    return described


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def answers(model: Model, examples: Examples, batch: int) -> tuple[float, float]:
    """The share of uses that are answered right, by the paper's routing at the configured budgets, and their loss."""
    model.eval()
    right, losses = [], []
    inputs = examples.inputs()
    for start in range(0, len(examples.ids), batch):
        rows = slice(start, start + batch)
        own = {name: part[rows] for name, part in inputs.items()}
        labels, asked = own.pop("labels"), examples.asked[rows]
        with autocast(labels.device):
            logits = model(**own).logits.float()
        right.append((logits.argmax(-1) == labels)[asked].float().mean())
        losses.append(nn.functional.cross_entropy(logits[asked], labels[asked]))
    model.train()
    return float(torch.stack(right).mean()), float(torch.stack(losses).mean())


def without_heavy_branches(model: Model) -> list[Any]:
    """Hooks under which every token that the encoder routes has weight 0; to be removed."""

    def silence(module: nn.Module, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        indices, weights, valid = outputs
        return indices, torch.zeros_like(weights), valid

    routers = [module for module in model.encoder.modules() if isinstance(module, CoLT5Router)]
    return [router.select.register_forward_hook(silence) for router in routers]


def measure_point(
    model: Model, examples: Examples, probe: Examples, settings: Settings, vocab_size: int
) -> dict[str, Any]:
    """A point of a run's curve: accuracy and loss on the uses, the loss without heavy branches, and the routers."""
    right, loss = answers(model, examples, settings.batch)
    point: dict[str, Any] = {"accuracy": right, "loss": loss}
    if model.config.routing != "none":
        hooks = without_heavy_branches(model)
        _, point["loss_without_heavy"] = answers(model, examples, settings.batch)
        for hook in hooks:
            hook.remove()
        point["routers"] = describe_routers(model, probe, vocab_size)
    return point


def state_file(run: Run, folder: Path) -> Path:
    """Where a run leaves what it needs to go on."""
    return folder / f"router_gym-{'-'.join(map(str, asdict(run).values()))}.state"


def train(run: Run, settings: Settings, device: torch.device, folder: Path | None = None) -> dict[str, Any]:
    """Do a run, or what is left of one that was cut off; its line of the results.

    Args:
        run, settings: what to do.
        device: where.
        folder: of the run's state; None for a run that keeps none.
    """
    began = time.perf_counter()
    task, config = task_of(run), make_config(run, settings)
    torch.manual_seed(run.seed)
    model_class = CoLT5ForConditionalGeneration if run.task == "cross" else CoLT5ForTokenClassification
    with device:
        model: Model = model_class(config)
    model.train()

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        with autocast(device):
            return model(**batch).loss

    step_of = TrainingStep(model, loss_of, size_scaled_groups(model, settings.learning_rate), settings.warmup_steps)
    random: Any = torch.cuda if device.type == "cuda" else torch
    generator = torch.Generator(device).manual_seed(1000 + run.seed)
    held_out = task.draw(settings.eval_rows, run.length, torch.Generator(device).manual_seed(7))
    probe = task.draw(settings.batch, run.length, torch.Generator(device).manual_seed(8))
    start = settings.start if run.arm in ("learned", *OTHER_ARMS) else None
    start_length = min(run.length, max(START_LENGTH, task.shortest))
    curve: list[dict[str, Any]] = []
    flops = 0
    own = str((run, settings))
    state = None if folder is None else state_file(run, folder)
    saved = None
    if state is not None and state.exists():
        saved = torch.load(state, map_location="cpu", weights_only=True)
    if saved is not None and saved["own"] == own:
        model.load_state_dict(saved["model"])
        step_of.load_state_dict(saved["step"])
        generator.set_state(saved["examples"])
        random.set_rng_state(saved["random"])
        curve, flops, began = saved["curve"], saved["flops"], began - saved["seconds"]
    first = step_of.steps
    for step in range(first, run.steps + 1):
        is_measured = bool(curve) and step == first
        if not is_measured and (step % settings.eval_every == 0 or step == run.steps or step in EARLY_STEPS):
            point = measure_point(model, held_out, probe, settings, task.vocab_size)
            curve.append({"step": step, "flops": flops} | point)
            if state is not None:
                states = {"model": model.state_dict(), "step": step_of.state_dict()}
                states |= {"examples": generator.get_state(), "random": random.get_rng_state()}
                seconds = time.perf_counter() - began
                unfinished = state.with_suffix(".unfinished")
                torch.save({"own": own, "curve": curve, "flops": flops, "seconds": seconds} | states, unfinished)
                unfinished.replace(state)
        if step == run.steps:
            break
        progress = start.progress(step, run.steps) if start is not None else None
        if start is not None:
            model.set_dense_start(progress)
        starting = progress is not None
        if not starting and run.arm in LATER_RATIOS:
            # graphs of the third part are recorded from here on
            model.config.soft_topk_ratio = LATER_RATIOS[run.arm]
        rows, n = (settings.start_rows * settings.batch, start_length) if starting else (settings.batch, run.length)
        flops += training_flops(config, config.routing, starting, rows, n)
        examples = task.draw(rows, n, generator)
        step_of(examples.inputs(), phase=starting)
    return {
        **asdict(run),
        "flops": flops,
        "accuracy": curve[-1]["accuracy"],
        "routers": curve[-1].get("routers", []),
        "curve": curve,
        "facts": task.facts,
        "captured": step_of.captured,
        "seconds": time.perf_counter() - began,
        "settings": asdict(settings),
        **describe_device(),
        "commit": describe_commit(),
    }


def rounded(value: Any) -> Any:
    """The same with floats of four digits, for a smaller file."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The results of a folder."""
    path = folder / FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def missing_runs(arguments: Arguments, settings: Settings) -> list[Run]:
    """The runs that are asked for and have no line, seed by seed."""
    names = list(Run.__dataclass_fields__)
    same = json.loads(json.dumps(asdict(settings)))
    done = {tuple(line[name] for name in names) for line in read_lines(arguments.out) if line["settings"] == same}
    runs = [
        Run(task, arm, length, 1 / budget, seed, arguments.steps)
        for seed in arguments.seeds
        for length in arguments.lengths
        for task in arguments.tasks
        for budget in arguments.budgets
        for arm in arguments.arms
        if not (task == "cross" and arm in ("none", "none_wide"))
    ]
    return [run for run in runs if tuple(rounded(asdict(run)).values()) not in done]


def work(
    lane: int, devices: list[str], runs: list[Run], taken: Any, settings: Settings, out: Path, deadline: float
) -> None:
    """One lane's process: take the next run until there is none, or no time."""
    torch.set_num_threads(1)
    device = torch.device(devices[lane % len(devices)])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    while time.time() < deadline:
        with taken.get_lock():
            number = taken.value
            taken.value += 1
        if number >= len(runs):
            return
        line = rounded(train(runs[number], settings, device, out))
        with taken.get_lock(), (out / FILE).open("a") as file:
            file.write(json.dumps(line) + "\n")
        state_file(runs[number], out).unlink()
        print(f"{runs[number]}: {line['accuracy']:.3f} in {line['seconds']:.0f} s", flush=True)


def main(argv: list[str] | None = None, settings: Settings | None = None) -> None:
    """Do the runs that are missing, then write the table and the picture."""
    (arguments,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses(argv)
    settings = replace(settings or Settings(), start_rows=arguments.start_rows)
    for name, known in (("tasks", TASKS), ("arms", (*ARMS, *OTHER_ARMS))):
        if unknown := set(getattr(arguments, name)) - set(known):
            raise ValueError(f"{name} has {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    deadline = time.time() + arguments.seconds
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = missing_runs(arguments, settings)
    if runs and arguments.seconds > 0:
        devices = [f"cuda:{n}" for n in range(torch.cuda.device_count())] or ["cpu"]
        lanes = min(len(runs), arguments.lanes * len(devices) if torch.cuda.is_available() else 1)
        taken = torch.multiprocessing.get_context("spawn").Value("i", 0)
        shared = (devices, runs, taken, settings, arguments.out, deadline)
        if lanes == 1:
            work(0, *shared)
        else:
            torch.multiprocessing.spawn(work, shared, nprocs=lanes)
    write(read_lines(arguments.out), arguments.out)


if __name__ == "__main__":
    main(sys.argv[1:])
