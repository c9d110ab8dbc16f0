"""The study: do learned routers earn their place on this task? Runs of several models, side by side, and their tables.

    cd examples
    python -m python_types.study --plan routing --tokens ../build/types --corpus ../build/python_types \
        --out /tmp/study --results ../build/types/study.jsonl --steps 6000 --lanes 5 --seconds 560
    python -m python_types.study --report --results ../build/types/study.jsonl --plan routing

The first command trains each arm of the plan (arms.py) with each seed and asks it for the types of held-out modules.
It spreads the runs over all GPUs, `--lanes` of them side by side on each, and starts none anew that `--results` has.
A run's line is written when the run ends; one that is not done after `--seconds` is ended, and leaves no line. If it
was trained by then, the same command with the same `--out` only asks for the types. The second command prints the
tables.

All runs of a plan have the same steps and read the same data. The learning rate does not depend on a run's end, and
what is evaluated is a mean of the last weights: so one run shows what it knew at any earlier step too, and the arms
are compared at equal steps and at equal time of training. Time is that of steps measured alone on a GPU, before the
runs, and "equal" is that of the last step of the fastest arm that the command has: arms that are compared at equal
time belong into one command, or into commands with one `--out`, which keeps what was timed.
"""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from python_types.arms import ARMS, Arm
from python_types.evaluate import SHARES, VOCABULARY, Question, Record, answered, question_of, tasks_of
from python_types.predict import Prediction, predict_all
from python_types.renaming import Renaming
from python_types.score import over_modules
from python_types.train import ROUTED, Processes, Size, TrainingStep, rounded
from python_types.training_rows import TASKS, Batches, load_tokens, shapes_of
from python_types.windows import windowed_question_of
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from modeling_colt5 import CoLT5Tokenizer
from modeling_colt5.dense_start import DenseStart

# the rate rises over the first steps, stays for some, and falls with the root of the step, as T5's does
WARMUP, HELD = 300, 1000
# of the steps, over which the weights are averaged
AVERAGED = 0.03
MARKS = 20
# longer modules are left out: not every arm has the memory for them
MOST_TOKENS = 32_768
# tokens that the encoder of an arm of Transformers reads at a time
ENCODED_TOKENS = 2**16
PARTS: dict[str, Callable[[Record], bool]] = {
    "all": lambda record: True,
    "far": lambda record: bool(record.is_far),
    "rare": lambda record: record.is_rare,
}
MOMENTS = {"at_steps": "equal steps", "at_time": "equal time"}


@dataclass(frozen=True)
class Plan:
    """Runs that are compared.

    Attributes:
        arms: of arms.py; the first one is compared with each of the others.
        seeds: of weights and of the order of the data.
        start_lengths, lengths, closed, opening, batch_tokens: as train.py has them.
        is_evaluated: whether the models are asked for types; else what counts is the losses of training.
    """

    arms: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    start_lengths: tuple[int, ...] = (256, 1024, 2048, 4096)
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16_384)
    closed: float = 0.4
    opening: float = 0.1
    batch_tokens: int = 16_384
    is_evaluated: bool = True


PLANS = {
    "routing": Plan(
        (
            "learned",
            "even",
            "random",
            "none",
            "longt5-local",
            "longt5-global",
            "t5-window",
            "learned-64",
            "even-64",
            "learned-cross",
            "even-cross",
            "unstarted",
            "unstarted-ratio",
            "learned-then-ratio",
        )
    ),
    "first-weights": Plan(
        ("looking", "own-weights", "looking-3e-2", "t5-looking"),
        seeds=(0,),
        start_lengths=(256,),
        lengths=(256,),
        closed=0.98,
        opening=0.01,
        batch_tokens=8192,
        is_evaluated=False,
    ),
    # to try the command, on a CPU too
    "tiny": Plan(("learned", "t5-window"), (0,), (128,), (256,), batch_tokens=256),
}


@dataclass(frozen=True)
class Phase:
    """A part of a run: how long its inputs are."""

    name: str
    lengths: tuple[int, ...]


def phases_of(plan: Plan, arm: Arm) -> list[Phase]:
    """The parts of an arm's run, in order: those of the dense start, and the one that follows, last.

    An arm with a window reads the same modules in shorter inputs.
    """

    def within(lengths: Sequence[int]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(min(length, arm.window or length) for length in lengths))

    return [
        *(Phase(str(length), within([length])) for length in plan.start_lengths),
        Phase(ROUTED, within(plan.lengths)),
    ]


def phase_at(plan: Plan, step: int, steps: int) -> int:
    """Which of the phases a step is in, counted from 0."""
    ends, count = plan.closed + plan.opening, len(plan.start_lengths)
    return min(count, int(step / steps / ends * count)) if step < ends * steps else count


def rate_share(step: int) -> float:
    """Of the highest learning rate."""
    return min(1.0, (step + 1) / WARMUP) * (HELD / max(HELD, step)) ** 0.5


@dataclass
class Arguments:
    """What to run."""

    plan: str = field(metadata={"help": f"one of {', '.join(PLANS)}"})
    results: Path = field(metadata={"help": "one JSON line for each run; what is there is not run again"})
    tokens: Path | None = field(default=None, metadata={"help": "folder of tokens.npz.xz and baselines.json"})
    corpus: Path | None = field(default=None, metadata={"help": "the folder that corpus.py wrote"})
    out: Path = field(default=Path("study"), metadata={"help": "folder of what the runs share, and of their logs"})
    steps: int = field(default=6000, metadata={"help": "of each run"})
    arms: list[str] | None = field(default=None, metadata={"help": "some of the plan's; default: all"})
    seeds: list[int] | None = field(default=None, metadata={"help": "some of the plan's; default: all"})
    modules: int = field(default=100, metadata={"help": "held-out modules that are asked for, at most"})
    lanes: int = field(default=4, metadata={"help": "runs side by side on a GPU"})
    seconds: float = field(default=1e9, metadata={"help": "of the whole command"})
    paced: int = field(default=20, metadata={"help": "steps of each phase that are timed"})
    report: bool = field(default=False, metadata={"help": "print the tables of --results, and stop"})
    against: str | None = field(
        default=None, metadata={"help": "arm that the tables compare with the others; default: the plan's first"}
    )
    run: str | None = field(default=None, metadata={"help": "ARM:SEED, one run in this process"})
    pace: str | None = field(default=None, metadata={"help": "ARM, whose steps are timed in this process"})


class Run:
    """One arm's training.

    Args:
        arguments: of the study.
        arm: the arm.
        seed: the seed.
        size: of all arms.
    """

    def __init__(self, arguments: Arguments, arm: Arm, seed: int, size: Size):
        self.arguments, self.plan, self.arm, self.seed = arguments, PLANS[arguments.plan], arm, seed
        self.processes = Processes.join()
        self.device = self.processes.device
        torch.manual_seed(seed)
        self.model = arm.model(size, self.device)
        self.tokenizer = CoLT5Tokenizer.from_pretrained(VOCABULARY)
        self.sentinels = torch.tensor(self.tokenizer.get_sentinel_token_ids(), device=self.device)
        self.step = TrainingStep(
            self.model, arm.learning_rate, self.processes, self.sentinels, 1.0, graphs=arm.is_captured
        )
        self.parameters = [parameter.detach() for parameter in self.model.parameters()]
        self.mean = [parameter.clone() for parameter in self.parameters]
        self.phases = phases_of(self.plan, arm)
        self.schedule = DenseStart(self.plan.closed, self.plan.opening)
        self.tokens = load_tokens(arguments.tokens / "tokens.npz.xz")["train"]
        self.loaded, self.batches = -1, iter(())

    def loader(self, number: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """A phase's batches: the same for all arms of a seed that read inputs of these lengths."""
        is_start = number < len(self.plan.start_lengths)
        batches = Batches(
            self.tokens,
            shapes_of(self.phases[number].lengths, self.plan.batch_tokens),
            0.5 if is_start else 0.75,
            self.sentinels.tolist(),
            100 * self.seed + number,
            renaming=Renaming(self.tokenizer),
            renamed=0.5,
        )
        return iter(
            DataLoader(batches, batch_size=None, sampler=range(len(batches)), num_workers=1, prefetch_factor=8)
        )

    def one(self, number: int, steps: int) -> tuple[str, Tensor]:
        """A step: its task, and its two losses on the device."""
        phase = phase_at(self.plan, number, steps)
        if phase != self.loaded:
            self.loaded, self.batches = phase, self.loader(phase)
        if self.arm.has_dense_start:
            start = self.schedule.progress(number, steps)
            self.model.set_dense_start(start)
            self.model.config.routers_trained = start is None
            if start is None and self.arm.later_ratio is not None:
                self.model.config.soft_topk_ratio = self.arm.later_ratio
        task, batch = next(self.batches)
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        losses = self.step(batch, self.phases[phase].name, rate_share(number))
        # a mean of all steps until there are enough
        weight = max(1 / (number + 1), 1 / max(1.0, AVERAGED * steps))
        torch._foreach_lerp_(self.mean, self.parameters, weight)
        return task, losses

    def train(self, steps: int, also: int) -> tuple[list[dict[str, Any]], list[Tensor]]:
        """Train; gives the curve of the losses, and the mean weights after `also` steps."""
        curve: list[dict[str, Any]] = []
        earlier = self.mean
        sums = torch.zeros(len(TASKS), 3, device=self.device)
        for number in range(steps):
            task, losses = self.one(number, steps)
            sums[TASKS.index(task)] += torch.cat([losses, torch.ones_like(losses[:1])])
            if number + 1 == also:
                earlier = [mean.clone() for mean in self.mean]
            if (number + 1) * MARKS // steps > number * MARKS // steps:
                point: dict[str, Any] = {"step": number + 1}
                for name, (decoder, encoder, count) in zip(TASKS, sums.tolist(), strict=True):
                    if count:
                        point |= {f"loss_{name}": decoder / count, f"encoder_{name}": encoder / count}
                sums.zero_()
                curve.append(rounded(point))
                print(json.dumps(curve[-1]), flush=True)
        return curve, earlier

    def pace(self) -> dict[str, float]:
        """Seconds of a step in each phase, of steps that are compiled and captured."""
        seconds = {}
        steps = 1_000_000
        for number, phase in enumerate(self.phases):
            batches: dict[tuple[int, ...], list[dict[str, Tensor]]] = {}
            loader = self.loader(number)
            drawn = [next(loader)[1] for _ in range(self.arguments.paced)]
            for batch in drawn:
                moved = {name: tensor.to(self.device) for name, tensor in batch.items()}
                batches.setdefault(tuple(batch["input_ids"].shape), []).append(moved)
            if self.arm.has_dense_start:
                self.model.set_dense_start(None if phase.name == ROUTED else 0.0)
                self.model.config.routers_trained = phase.name == ROUTED

            def do(each: list[dict[str, Tensor]], name: str = phase.name) -> None:
                for batch in each:
                    self.step(batch, name, rate_share(steps))
                    torch._foreach_lerp_(self.mean, self.parameters, 0.5)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()

            for each in batches.values():
                do(each[:1] * 5)
            started = time.perf_counter()
            for each in batches.values():
                do(each)
            seconds[phase.name] = (time.perf_counter() - started) / len(drawn)
        return seconds

    def ask(self, weights: list[Tensor], questions: Sequence[Question], common: Sequence[str]) -> list[Record]:
        """The answers of the model with other weights."""
        kept = [parameter.clone() for parameter in self.parameters]
        torch._foreach_copy_(self.parameters, weights)
        self.model.eval()
        records = [record for module in answered(self._answers, questions, common) for record in module]
        self.model.train()
        torch._foreach_copy_(self.parameters, kept)
        return records

    def _answers(self, rows: Sequence[Sequence[int]], counts: Sequence[int]) -> Iterator[dict[int, list[Prediction]]]:
        most = None if self.arm.kind == "colt5" else ENCODED_TOKENS
        for batch in predict_all(self.model, self.tokenizer, rows, counts, most):
            yield batch if self.arm.window is None else {number: each[-1:] for number, each in batch.items()}


def counted(records: Sequence[Record]) -> dict[str, dict[str, dict[str, list[int]]]]:
    """For each share and part: of each module, how many types are right, and how many there are."""
    shares: dict[str, dict[str, dict[str, list[int]]]] = {}
    for record in records:
        for part, belongs in PARTS.items():
            if belongs(record):
                modules = shares.setdefault(f"{record.share:.0%}", {}).setdefault(part, {})
                right, count = modules.get(record.module, [0, 0])
                modules[record.module] = [right + record.answer().is_right, count + 1]
    return shares


def seconds_at(plan: Plan, paces: dict[str, float], steps: int) -> list[float]:
    """The time of training after each of an arm's steps, by its seconds of a step in each phase."""
    names = [*map(str, plan.start_lengths), ROUTED]
    return list(accumulate(paces[names[phase_at(plan, number, steps)]] for number in range(steps)))


def paces_of(arguments: Arguments, arms: Sequence[str]) -> dict[str, dict[str, float]]:
    """What was measured of each arm; an arm whose measuring failed has nothing."""
    files = {arm: arguments.out / f"pace-{arm}.json" for arm in arms}
    return {arm: json.loads(file.read_text()) for arm, file in files.items() if file.exists()}


def trained(run: Run, file: Path, steps: int, also: int) -> tuple[list[dict[str, Any]], list[Tensor], list[Tensor]]:
    """The curve of a run, and its mean weights at the end and after `also` steps.

    They are kept in a file, and come from there where it exists: a run that was broken off while its model was asked
    for types is not trained again.
    """
    if not file.exists():
        curve, earlier = run.train(steps, also)
        unfinished = file.with_suffix(".unfinished")
        torch.save({"curve": curve, "mean": run.mean, "earlier": earlier}, unfinished)
        unfinished.replace(file)
    kept = torch.load(file, map_location=run.device)
    return kept["curve"], kept["mean"], kept["earlier"]


def train_one(arguments: Arguments, size: Size, name: str, seed: int) -> None:
    """Train, ask, and leave the result in a file of its own."""
    plan, arm = PLANS[arguments.plan], ARMS[name]
    paces = paces_of(arguments, plan.arms)
    times = {each: seconds_at(plan, paces[each], arguments.steps) for each in paces}
    least = min(seconds[-1] for seconds in times.values())
    also = max(1, int(np.searchsorted(times[name], least, side="right")))
    run = Run(arguments, arm, seed, size)
    file = arguments.out / f"{name}-{seed}-{arguments.steps}-{also}.pt"
    curve, mean, earlier = trained(run, file, arguments.steps, also)
    for point in curve:
        point["seconds"] = round(times[name][point["step"] - 1], 2)
    line: dict[str, Any] = {
        "plan": arguments.plan,
        "arm": name,
        "seed": seed,
        "steps": arguments.steps,
        "steps_of_equal_time": also,
        "seconds": round(times[name][-1], 2),
        "milliseconds": {phase: round(1000 * pace, 2) for phase, pace in paces[name].items()},
        "parameters": run.model.num_parameters(),
        "data": data_of(arguments.tokens),
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu",
        "curve": curve,
    }
    if plan.is_evaluated:
        common = json.loads((arguments.tokens / "baselines.json").read_text())["common"]
        questions = pickle.loads((arguments.out / f"questions-{arm.window}.pkl").read_bytes())
        line["at_steps"] = counted(run.ask(mean, questions, common))
        line["at_time"] = line["at_steps"] if also == arguments.steps else counted(run.ask(earlier, questions, common))
    unfinished = arguments.out / f"{name}-{seed}.unfinished"
    unfinished.write_text(json.dumps(line) + "\n")
    unfinished.replace(arguments.out / f"{name}-{seed}.json")


def prepare(arguments: Arguments, arms: Sequence[str]) -> None:
    """Hide and tokenise what all runs are asked for, once."""
    tasks = [task for task in tasks_of(arguments.corpus, SHARES) if task[0]["n_tokens"] <= MOST_TOKENS]
    names = list(dict.fromkeys((row["package"], row["path"]) for row, _ in tasks))[: arguments.modules]
    tasks = [task for task in tasks if (task[0]["package"], task[0]["path"]) in set(names)]
    baselines = arguments.tokens / "baselines.json"
    with Pool() as pool:
        for window in dict.fromkeys(ARMS[arm].window for arm in arms):
            make = (
                partial(question_of, baselines, VOCABULARY)
                if window is None
                else partial(windowed_question_of, baselines, VOCABULARY, window)
            )
            questions = pool.map(make, tasks, chunksize=1)
            (arguments.out / f"questions-{window}.pkl").write_bytes(pickle.dumps(questions))


def gpus_of(environment: Mapping[str, str], count: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each of the GPUs that this process sees, which may be some of the machine's."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(gpu) for gpu in range(count)])[:count]


def in_lanes(
    commands: dict[str, list[str]], lanes: int, out: Path, ends: float, done: Callable[[str], None] = lambda name: None
) -> None:
    """Run commands side by side, so many on each GPU, until all are done or the time is over.

    Args:
        commands: by the name of each one's log.
        lanes: on a GPU.
        out: the folder of the logs.
        ends: of `time.monotonic`.
        done: is given the name of each command that has ended well, at once.
    """
    gpus = gpus_of(os.environ, torch.cuda.device_count())
    free = [gpu for _ in range(lanes) for gpu in gpus or [""]]
    waiting = list(commands.items())
    working: list[tuple[str, subprocess.Popen[bytes], str]] = []
    while (waiting or working) and time.monotonic() < ends:
        while waiting and free:
            (name, command), gpu = waiting.pop(0), free.pop(0)
            environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpus else {})
            with (out / f"{name}.log").open("w") as log:
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            working.append((name, process, gpu))
        for entry in list(working):
            name, process, gpu = entry
            if process.poll() is not None:
                working.remove(entry)
                free.append(gpu)
                if process.returncode:
                    tail = (out / f"{name}.log").read_text(errors="replace").splitlines()[-3:]
                    print(f"{name} failed: {' / '.join(tail)}", flush=True)
                else:
                    done(name)
        time.sleep(0.2)
    for name, process, _ in working:
        process.kill()
        process.wait()
        print(f"{name} was not done in time", flush=True)
    for name, _ in waiting:
        print(f"{name} was not begun in time", flush=True)


def conduct(arguments: Arguments, argv: Sequence[str]) -> None:
    """All runs of the plan that have no line yet, and a line for each that is done."""
    ends = time.monotonic() + arguments.seconds
    plan = PLANS[arguments.plan]
    there = lines_of(arguments.results, arguments.plan)
    data = data_of(arguments.tokens)
    if others := {line.get("data", "without a name") for line in there} - {data}:
        raise ValueError(
            f"results is {arguments.results}, whose runs were trained on other data ({', '.join(sorted(others))}) "
            f"than what is in {arguments.tokens} ({data}); must be another file, as such runs cannot be compared"
        )
    done = {(line["arm"], line["seed"]) for line in there}
    runs = [
        (arm, seed)
        # all arms with the first seed before any with the next, so that what there is can be compared
        for seed in arguments.seeds or plan.seeds
        for arm in arguments.arms or plan.arms
        if (arm, seed) not in done
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not runs:
        return
    this = [sys.executable, "-m", "python_types.study", *argv]
    paced = [arm for arm in dict.fromkeys(arm for arm, _ in runs) if not (arguments.out / f"pace-{arm}.json").exists()]
    # one on each GPU: side by side they would be slower
    in_lanes({f"pace-{arm}": [*this, "--pace", arm] for arm in paced}, 1, arguments.out, ends)
    known = paces_of(arguments, plan.arms)
    runs = [(arm, seed) for arm, seed in runs if arm in known]
    if plan.is_evaluated:
        prepare(arguments, [arm for arm, _ in runs])
    commands = {f"{arm}-{seed}": [*this, "--run", f"{arm}:{seed}"] for arm, seed in runs}
    for name in commands:
        (arguments.out / f"{name}.json").unlink(missing_ok=True)
    arguments.results.parent.mkdir(parents=True, exist_ok=True)

    def keep(name: str) -> None:
        with arguments.results.open("a") as results:
            results.write((arguments.out / f"{name}.json").read_text())

    in_lanes(commands, arguments.lanes, arguments.out, ends, keep)


def lines_of(results: Path, plan: str) -> list[dict[str, Any]]:
    """The plan's lines in a file of results; none where there is no file."""
    if not results.exists():
        return []
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    return [line for line in lines if line["plan"] == plan]


def data_of(tokens: Path) -> str:
    """What tells the training data in a folder apart from other data."""
    return hashlib.sha256((tokens / "tokens.npz.xz").read_bytes()).hexdigest()[:12]


def in_common(runs: Sequence[dict[str, list[int]]]) -> set[str]:
    """The modules that all runs were asked about: `--modules` may differ, and takes the first of one list.

    Args:
        runs: of each, every module's right types and all.
    """
    modules = set(runs[0]).intersection(*runs)
    if not modules:
        raise ValueError("there is no module that all runs were asked about; must have one at least")
    return modules


def difference(
    ours: Sequence[dict[str, list[int]]], theirs: Sequence[dict[str, list[int]]]
) -> tuple[float, float, float]:
    """How many points one arm is above another, each the mean of its seeds, and the 95 % interval over modules.

    Args:
        ours: for each seed, each module's right types and all.
        theirs: the other's, of the same modules.
    """
    modules = list(ours[0])
    gains = [
        np.mean([seed[module][0] for seed in ours]) - np.mean([seed[module][0] for seed in theirs])
        for module in modules
    ]
    return over_modules(np.array(gains), np.array([ours[0][module][1] for module in modules], dtype=float), 2000)


def percent(seeds: Sequence[dict[str, list[int]]]) -> list[float]:
    """Exact match of each seed."""
    return [
        100 * sum(right for right, _ in seed.values()) / sum(count for _, count in seed.values()) for seed in seeds
    ]


def head(*cells: str) -> str:
    """The first two lines of a table in Markdown."""
    return f"| {' | '.join(cells)} |\n| {' | '.join(['---'] * len(cells))} |"


def report(lines: Sequence[dict[str, Any]], plan: Plan, against: str | None = None) -> str:
    """The tables, in Markdown: of each arm the mean of the seeds, their range, and one arm's lead over it.

    They count the modules that all runs were asked about.

    Args:
        lines: of the runs.
        plan: what they belong to.
        against: the arm with which all others are compared; None for the plan's first.

    Raises:
        ValueError: where there is no line of that arm, or no module that all runs were asked about, or where they were
            trained on different data.
    """
    data = sorted({line.get("data", "without a name") for line in lines})
    if len(data) > 1:
        raise ValueError(f"the runs were trained on different data ({', '.join(data)}); must be the same for all")
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_arm.setdefault(line["arm"], []).append(line)
    arms = {arm: by_arm[arm] for arm in plan.arms if arm in by_arm}
    first = against or plan.arms[0]
    if first not in arms:
        raise ValueError(
            f"there is no line of {first}, with which the others are compared; there are lines of "
            f"{', '.join(arms) or 'no arm'}"
        )
    texts = [head("arm", "parameters", "seeds", "steps", "seconds of training", "steps in equal time")]
    for arm, runs in arms.items():
        one = runs[0]
        texts[-1] += (
            f"\n| {arm} | {one['parameters'] / 1e6:.1f} M | {len(runs)} | {one['steps']:,} | {one['seconds']:.0f} | "
            f"{one['steps_of_equal_time']:,} |"
        )
    if not plan.is_evaluated:
        texts.append(head("arm", "learning rate", "steps", "decoder, masked spans", "encoder, masked spans"))
        for arm, runs in arms.items():
            last = runs[0]["curve"][-1]
            texts[-1] += (
                f"\n| {arm} | {ARMS[arm].learning_rate:g} | {last['step']:,} | {last['loss_spans']:.2f} | "
                f"{last['encoder_spans']:.2f} |"
            )
        return "\n\n".join(texts)
    for moment, title in MOMENTS.items():
        for share in arms[first][0][moment]:
            asked = in_common([run[moment][share]["all"] for runs in arms.values() for run in runs])
            for part in arms[first][0][moment][share]:
                seeds = {
                    arm: [
                        {
                            module: counts
                            for module, counts in run[moment][share].get(part, {}).items()
                            if module in asked
                        }
                        for run in runs
                    ]
                    for arm, runs in arms.items()
                }
                ours = seeds[first]
                # of the modules in common none may have a far type
                if not ours[0]:
                    continue
                heads = head("arm", "right", "seeds from, to", f"{first} above it")
                types, modules = sum(count for _, count in ours[0].values()), len(ours[0])
                asked_of = f"{types:,} types of {modules} modules that all runs were asked about"
                texts.append(f"{share} hidden, {part}, {title}: {asked_of}\n\n{heads}")
                for arm, theirs in seeds.items():
                    each = percent(theirs)
                    lead, low, high = difference(ours, theirs)
                    above = "" if arm == first else f"{lead:+.1f} ({low:+.1f} to {high:+.1f})"
                    texts[-1] += f"\n| {arm} | {np.mean(each):.1f} % | {min(each):.1f}, {max(each):.1f} | {above} |"
    return "\n\n".join(texts)


def main(argv: list[str] | None = None) -> None:
    """Conduct, or do one run of it, or report."""
    argv = sys.argv[1:] if argv is None else argv
    size, arguments = HfArgumentParser((Size, Arguments), description=__doc__).parse_args_into_dataclasses(argv)
    if arguments.plan not in PLANS:
        raise ValueError(f"plan is {arguments.plan!r}; must be one of {', '.join(PLANS)}")
    if arguments.report:
        print(report(lines_of(arguments.results, arguments.plan), PLANS[arguments.plan], arguments.against))
    elif arguments.run is not None:
        name, seed = arguments.run.split(":")
        train_one(arguments, size, name, int(seed))
    elif arguments.pace is not None:
        paces = Run(arguments, ARMS[arguments.pace], 0, size).pace()
        (arguments.out / f"pace-{arguments.pace}.json").write_text(json.dumps(paces))
    else:
        conduct(arguments, argv)


if __name__ == "__main__":
    main()
