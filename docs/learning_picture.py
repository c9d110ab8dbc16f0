"""Draws docs/learning_*.svg and writes tables of docs/learning.md, from the runs of benchmarks/learning.py.

python docs/learning_picture.py [--results FOLDER] [--equal FOLDER] [--first FOLDER] [--small FOLDER] [--page FILE]

What has no runs has no table and no picture: the page's blocks hold both, and are empty then.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks/results"
NAMES = {
    "colt5-learned-16": "learned, 1/16",
    "colt5-learned-64": "learned, 1/64",
    "colt5-even-16": "even, 1/16",
    "colt5-even-64": "even, 1/64",
    "colt5-none": "light branches only",
    "colt5-learned-16-cross": "learned, 1/16, routed cross-attention",
    "colt5-even-16-cross": "even, 1/16, routed cross-attention",
    "colt5-learned-16-whole": "learned, 1/16, dense start on whole inputs",
    "colt5-learned-64-whole": "learned, 1/64, dense start on whole inputs",
    "colt5-even-16-whole": "even, 1/16, after a dense start on whole inputs",
    "colt5-even-64-whole": "even, 1/64, after a dense start on whole inputs",
    "colt5-learned-16-drawn": "learned, 1/16, dense start on stretches anywhere",
    "colt5-learned-64-drawn": "learned, 1/64, dense start on stretches anywhere",
    "colt5-as-shipped-16": "learned, 1/16, no dense start",
    "colt5-as-shipped-64": "learned, 1/64, no dense start",
    "colt5-random-16": "random, 1/16",
    "colt5-epsilon-16": "learned, 1/16, no dense start, ε = 0.1",
    "colt5-one-rate-16": "learned, 1/16, no dense start, one learning rate for all parameters",
    "colt5-descent-16": "learned, 1/16, no dense start, coordinate descent",
    "longt5-local": "LongT5, local",
    "longt5-transient-global": "LongT5, transient-global",
    "colt5-ratio-2-16": "learned, 1/16, no dense start, ratio 2",
    "colt5-ratio-4-16": "learned, 1/16, no dense start, ratio 4",
    "colt5-learned-16-brief": "learned, 1/16, brief dense start on whole inputs",
    "colt5-learned-16-brief-then-ratio-4": "learned, 1/16, brief dense start on whole inputs, then ratio 4",
    "colt5-even-16-brief": "even, 1/16, after a brief dense start on whole inputs",
    "colt5-learned-16-whole-then-ratio-4": "learned, 1/16, dense start on whole inputs, then ratio 4",
    "colt5-learned-16-cross-whole": "learned, 1/16, routed cross-attention, dense start on whole inputs",
    "colt5-even-16-cross-whole": "even, 1/16, routed cross-attention, after a dense start on whole inputs",
}
ROUTERS = {
    "query": "queries",
    "key_value": "keys/values",
    "feed_forward": "feed-forward",
    "cross": "cross-attention, of the decoder's layers",
}
# what is predicted to be at least level with what
PREDICTION = ("colt5-learned-64", "colt5-even-16")
PAIRS = (
    PREDICTION,
    ("colt5-learned-16", "colt5-even-16"),
    ("colt5-learned-64", "colt5-even-64"),
    ("colt5-learned-16", "colt5-none"),
    ("colt5-learned-64", "colt5-none"),
)
CROSS_PAIRS = (
    ("colt5-learned-16-cross", "colt5-even-16-cross"),
    ("colt5-learned-16-cross", "colt5-learned-16"),
    ("colt5-even-16-cross", "colt5-even-16"),
    ("colt5-learned-16-cross-whole", "colt5-even-16-cross-whole"),
)
START_PAIRS = (
    ("colt5-learned-16", "colt5-as-shipped-16"),
    ("colt5-learned-64", "colt5-as-shipped-64"),
    ("colt5-learned-16-whole", "colt5-learned-16"),
    ("colt5-learned-64-whole", "colt5-learned-64"),
    ("colt5-learned-16-whole", "colt5-even-16"),
    ("colt5-learned-64-whole", "colt5-even-16"),
    ("colt5-learned-16-whole", "colt5-even-16-whole"),
    ("colt5-learned-64-whole", "colt5-even-64-whole"),
    ("colt5-learned-64-whole", "colt5-even-16-whole"),
    ("colt5-learned-16-drawn", "colt5-learned-16"),
    ("colt5-learned-64-drawn", "colt5-learned-64"),
)
# at equal operations: some of these runs have more steps
EQUAL_PAIRS = (
    ("colt5-as-shipped-16", "colt5-even-16"),
    ("colt5-ratio-2-16", "colt5-even-16"),
    ("colt5-ratio-4-16", "colt5-even-16"),
    ("colt5-ratio-2-16", "colt5-as-shipped-16"),
    ("colt5-ratio-4-16", "colt5-as-shipped-16"),
    ("colt5-learned-16-brief", "colt5-even-16"),
    ("colt5-learned-16-whole", "colt5-even-16"),
    ("colt5-even-16-brief", "colt5-even-16"),
    ("colt5-even-16-whole", "colt5-even-16"),
    ("colt5-learned-16-brief", "colt5-even-16-brief"),
    ("colt5-learned-16-brief", "colt5-as-shipped-16"),
    ("colt5-learned-16-brief-then-ratio-4", "colt5-learned-16-brief"),
    ("colt5-learned-16-brief-then-ratio-4", "colt5-even-16-brief"),
    ("colt5-learned-16-whole-then-ratio-4", "colt5-learned-16-whole"),
    ("colt5-learned-16-whole-then-ratio-4", "colt5-even-16-whole"),
)
# of the study's own runs, those that cost as many operations as the runs with more steps
AS_MANY_OPERATIONS = ("colt5-learned-16-whole", "colt5-learned-16-whole-then-ratio-4", "colt5-even-16-whole")
STUDY = tuple(dict.fromkeys(variant for pair in PAIRS for variant in pair))
EXACT, DESCENT, ONE_RATE = "colt5-as-shipped-16", "colt5-descent-16", "colt5-one-rate-16"
# differences of loss up to this are level, decided before any run
LEVEL = 0.02
# Student's t for an interval of 95 %, by degrees of freedom from 1 on
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)
Run = dict[str, Any]
Runs = dict[str, list[Run]]


def load_runs(folder: Path, same: tuple[str, ...] = ("settings", "torch"), free: tuple[str, ...] = ()) -> Runs:
    """The runs of each variant, by seed, in the order of `NAMES`.

    Args:
        folder: with one file a run.
        same: what all runs have to have alike.
        free: the settings in which they may differ all the same.

    Raises:
        ValueError: runs that were not made alike in what `same` names.
    """
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    fixed = [run | {"settings": {k: v for k, v in run["settings"].items() if k not in free}} for run in runs]
    alike = {json.dumps([run[name] for name in same]) for run in fixed}
    if len(alike) > 1:
        raise ValueError(f"{folder} holds runs that differ in {', '.join(same)}; they must be the same: {alike}")
    found = {name: [run for run in runs if run["variant"] == name] for name in NAMES}
    return {name: of_variant for name, of_variant in found.items() if of_variant}


def of_these(runs: Runs, variants: tuple[str, ...]) -> Runs:
    """The runs of some variants, in their order."""
    return {variant: runs[variant] for variant in variants if variant in runs}


def column(run: Run, name: str) -> np.ndarray:
    """One number of each point of a curve."""
    return np.array([point[name] for point in run["curve"]])


def at(run: Run, against: str, where: float, name: str = "loss") -> float:
    """A number of a run at a step, second or operation, on the line between two evaluations."""
    return float(np.interp(where, column(run, against), column(run, name)))


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and how far an interval of 95 % reaches to each side of it by Student's t: without bound for a single
    value.

    Raises:
        ValueError: more values than the table of t goes to.
    """
    if len(values) == 1:
        return values[0], float("inf")
    if len(values) > len(STUDENT) + 1:
        raise ValueError(f"there are {len(values)} values; the table of Student's t goes to {len(STUDENT) + 1}")
    return mean(values), STUDENT[len(values) - 2] * stdev(values) / len(values) ** 0.5


def differences(first: list[Run], second: list[Run], against: str) -> list[float] | None:
    """By how much the loss of one variant is above another's with each seed that both have, where the first of the two
    runs ends: at equal steps or, against "flops", at equal cost. None where a run is in its dense start there."""
    other = {run["seed"]: run for run in second}
    found = []
    for run in first:
        if run["seed"] not in other:
            continue
        pair = run, other[run["seed"]]
        where = min(one["curve"][-1][against] for one in pair)
        if any(at(one, against, where, "step") < one["start_ends"] for one in pair):
            return None
        found.append(at(pair[0], against, where) - at(pair[1], against, where))
    return found or None


def number(value: float) -> str:
    """Three digits; adding zero takes a minus sign from what rounds to it."""
    return f"{round(value, 3) + 0:.3f}"


def signed(value: float) -> str:
    """The same with its sign."""
    return f"{round(value, 3) + 0:+.3f}"


def pair_table(runs: Runs, pairs: tuple[tuple[str, str], ...]) -> str:
    """A row for each pair of variants: the differences by seed, their mean and its interval."""
    lines = [
        "| loss of the first less that of the second | equal steps: mean, 95 % interval | for each seed | "
        "equal cost: mean, 95 % interval | for each seed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for first, second in pairs:
        if first not in runs or second not in runs:
            continue
        cells = [f"{NAMES[first]} − {NAMES[second]}"]
        for against in ("step", "flops"):
            found = differences(runs[first], runs[second], against)
            if found is None:
                cells += ["in a dense start then", ""]
                continue
            middle, reach = interval(found)
            bounds = "" if len(found) == 1 else f", {signed(middle - reach)} to {signed(middle + reach)}"
            cells += [signed(middle) + bounds, " / ".join(map(signed, found))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def verdict(runs: Runs) -> str:
    """What the rule of the page says of the prediction."""
    sentences = []
    for against, where in (("step", "At equal steps"), ("flops", "At equal cost")):
        found = differences(*(runs[variant] for variant in PREDICTION), against)
        if found is None or len(found) < 2:
            said = "cannot be judged"
        else:
            middle, reach = interval(found)
            said = "holds" if middle + reach <= LEVEL else "fails" if middle - reach > 0 else "is not decided"
        sentences.append(f"{where} the prediction **{said}**.")
    return " ".join(sentences)


def draw(file: Path, title: str, against: str, label: str, runs: Runs, unit: float = 1.0) -> str:
    """Held-out loss of every run, a colour a variant: seeds after the first are dashed. Returns the page's link."""
    # ids of the drawing in fixed order: the same picture is the same file
    matplotlib.rcParams["svg.hashsalt"] = file.stem
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    losses = []
    for variant, of_variant in runs.items():
        for run in of_variant:
            first = run is of_variant[0]
            place = column(run, against) / unit
            axes.plot(
                place,
                column(run, "loss"),
                color=pyplot.get_cmap("tab20")(2 * list(NAMES).index(variant) % 19),
                linestyle="-" if first else "--",
                linewidth=1.2,
                label=NAMES[variant] if first else None,
            )
            losses += list(column(run, "loss")[place >= place[-1] / 5])
    # what happens in the first fifth would flatten the rest
    axes.set_ylim(min(losses) - 0.05, max(losses))
    axes.set_xlabel(label)
    axes.set_ylabel("held-out loss, nats a token")
    axes.set_title(title)
    axes.legend(fontsize="small")
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
    return f"![{title}]({file.name})"


def by_seed(of_variant: list[Run], value: Callable[[Run], float]) -> str:
    """A cell with a number for each seed."""
    return " / ".join(number(value(run)) for run in of_variant)


def of_seeds(of_variant: list[Run], value: Callable[[Run], float]) -> str:
    """A cell with the mean of the seeds."""
    return number(mean(value(run) for run in of_variant))


def swapping(run: Run) -> float:
    """What it costs to read another input, at the end."""
    return run["curve"][-1]["swapped_loss"] - run["curve"][-1]["loss"]


def mean_weight(run: Run, point: int) -> float | None:
    """The mean of what all routers of the encoder weigh their tokens by; None without routers."""
    routing = run["curve"][point]["routing"]
    routers = [routing[name]["weight"] for name in ROUTERS if name in routing and name != "cross"]
    return float(np.mean(routers)) if routers else None


def weight_cell(of_variant: list[Run], point: int) -> str:
    """A cell with the mean of the seeds' mean weights."""
    weights = [weight for run in of_variant if (weight := mean_weight(run, point)) is not None]
    return f"{mean(weights):.2f}" if weights else ""


def table(runs: Runs) -> str:
    """A row for each variant: loss at the end and where the cheapest ends, operations, swapping, weights."""
    ends = [run["curve"][-1] for of_variant in runs.values() for run in of_variant]
    cheapest, step = min(end["flops"] for end in ends), min(end["step"] for end in ends)
    lines = [
        f"| | loss at step {step:,} | for each seed | PFLOP a run | loss at {cheapest / 1e15:.2f} PFLOP | "
        "swapping inputs costs | mean weight |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant, of_variant in runs.items():
        early = at(of_variant[0], "flops", cheapest, "step") < of_variant[0]["start_ends"]
        cells = [
            NAMES[variant],
            of_seeds(of_variant, lambda run: at(run, "step", step)),
            by_seed(of_variant, lambda run: at(run, "step", step)),
            f"{of_variant[0]['curve'][-1]['flops'] / 1e15:.2f}",
            "in its dense start" if early else of_seeds(of_variant, lambda run: at(run, "flops", cheapest)),
            of_seeds(of_variant, swapping),
            weight_cell(of_variant, -1),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def equal_table(runs: Runs) -> str:
    """A row for each variant: its steps and operations, the loss at its end, and what swapping costs there."""
    lines = [
        "| | steps | of them dense | PFLOP a run | loss at the end | for each seed | swapping inputs costs |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant, of_variant in runs.items():
        last = of_variant[0]["curve"][-1]
        cells = [
            NAMES[variant],
            f"{last['step']:,}",
            f"{of_variant[0]['start_ends']:,}",
            f"{last['flops'] / 1e15:.2f}",
            of_seeds(of_variant, lambda run: run["curve"][-1]["loss"]),
            by_seed(of_variant, lambda run: run["curve"][-1]["loss"]),
            of_seeds(of_variant, swapping),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def time_table(runs: Runs) -> str:
    """A row for each variant: parameters, time, and mean losses: at the last step and the last second that all runs
    have, at each one's own end with every seed's, and there with swapped inputs."""
    every = [run for of_variant in runs.values() for run in of_variant]
    last_step = min(run["curve"][-1]["step"] for run in every)
    last_second = min(run["curve"][-1]["seconds"] for run in every)
    lines = [
        f"| | parameters, M | ms a step | loss at step {last_step} | after {last_second:.0f} s | at the end | "
        "for each seed | step there | swapping inputs costs | mean weight |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant, of_variant in runs.items():
        ends = [run["curve"][-1] for run in of_variant]
        cells = [
            NAMES[variant],
            f"{of_variant[0]['parameters'] / 1e6:.1f}",
            f"{mean(1e3 * end['seconds'] / end['step'] for end in ends):.1f}",
            of_seeds(of_variant, lambda run: at(run, "step", last_step)),
            of_seeds(of_variant, lambda run: at(run, "seconds", last_second)),
            of_seeds(of_variant, lambda run: run["curve"][-1]["loss"]),
            by_seed(of_variant, lambda run: run["curve"][-1]["loss"]),
            " / ".join(dict.fromkeys(f"{end['step']:,}" for end in ends)),
            of_seeds(of_variant, swapping),
            weight_cell(of_variant, -1),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rates_table(runs: Runs) -> str:
    """A row for each variant: loss at the end, what swapping costs, routing weights."""
    lines = [
        "| | loss at the end | swapping inputs costs | mean weight at first | at the end |",
        "| --- | --- | --- | --- | --- |",
    ]
    for variant, of_variant in runs.items():
        cells = [
            NAMES[variant],
            by_seed(of_variant, lambda run: run["curve"][-1]["loss"]),
            of_seeds(of_variant, swapping),
            weight_cell(of_variant, 0),
            weight_cell(of_variant, -1),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def routing_table(runs: Runs) -> str:
    """What learned routers do at the end, from the first to the last layer, in the mean of the seeds."""
    lines = ["| | router | mean weight | weights at 1 | sentinels routed |", "| --- | --- | --- | --- | --- |"]
    for variant, of_variant in runs.items():
        ends = [run["curve"][-1]["routing"] for run in of_variant]
        for router, title in ROUTERS.items():
            if router not in ends[0]:
                continue
            numbers = {part: np.mean([end[router][part] for end in ends], axis=0) for part in ends[0][router]}
            cells = [" ".join(f"{value:.2f}" for value in layers) for layers in numbers.values()]
            lines.append(f"| {NAMES[variant]} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def solver_table(exact: Run, descent: Run) -> str:
    """Both losses side by side, as far as both went."""
    lines = ["| step | exact | coordinate descent | difference |", "| --- | --- | --- | --- |"]
    for first, second in zip(exact["curve"], descent["curve"], strict=False):
        losses = first["loss"], second["loss"]
        lines.append(f"| {first['step']} | {losses[0]:.4f} | {losses[1]:.4f} | {losses[1] - losses[0]:+.4f} |")
    return "\n".join(lines)


def blocks(runs: Runs, equal: Runs, first: Runs, small: Runs, folder: Path) -> dict[str, str]:
    """The page's blocks by name, of the study's runs, of those at equal operations, of the first study's and of those
    at a small size; draws their pictures into the folder."""
    names = ("prediction", "results", "routing", "starts", "equal", "cross", "first", "rates", "solvers")
    parts: dict[str, list[str]] = {name: [] for name in names}
    if all(variant in runs for variant in PREDICTION):
        parts["prediction"] = [verdict(runs), pair_table(runs, PAIRS)]
    if study := of_these(runs, STUDY):
        parts["results"] = [
            table(study),
            draw(folder / "learning_steps.svg", "Held-out loss against steps", "step", "steps", study),
            draw(
                folder / "learning_cost.svg",
                "Held-out loss against operations",
                "flops",
                "operations of encoder and decoder, PFLOP",
                study,
                unit=1e15,
            ),
        ]
    if learned := of_these(runs, ("colt5-learned-16", "colt5-learned-64")):
        parts["routing"] = [routing_table(learned)]
    for name, pairs in (("starts", START_PAIRS), ("cross", CROSS_PAIRS)):
        new = [variant for pair in pairs for variant in pair if variant in runs and variant not in STUDY]
        if own := of_these(runs, tuple(dict.fromkeys(new))):
            parts[name] = [table(own), pair_table(runs, pairs)]
    if equal:
        equal = equal | of_these(runs, AS_MANY_OPERATIONS)
        parts["equal"] = [equal_table(equal), pair_table(equal, EQUAL_PAIRS)]
    if crossed := of_these(runs, CROSS_PAIRS[0][:1]):
        parts["cross"].append(routing_table(crossed))
    if first:
        title = "Held-out loss against time, without a dense start"
        parts["first"] = [
            time_table(first),
            draw(folder / "learning_time.svg", title, "seconds", "seconds of training", first),
        ]
    if EXACT in small and ONE_RATE in small:
        parts["rates"] = [rates_table(of_these(small, (EXACT, ONE_RATE)))]
    if EXACT in small and DESCENT in small:
        pair = {variant: small[variant][:1] for variant in (EXACT, DESCENT)}
        title = "Exact soft top-k and 50 iterations of coordinate descent"
        parts["solvers"] = [
            solver_table(*(of_variant[0] for of_variant in pair.values())),
            draw(folder / "learning_solvers.svg", title, "step", "steps", pair),
        ]
    return {name: "\n\n".join(part for part in of_block if part) for name, of_block in parts.items()}


def main() -> None:
    """Draw what there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "learning", help="the runs")
    parser.add_argument("--equal", type=Path, default=RESULTS / "learning_equal", help="those at equal operations")
    parser.add_argument("--first", type=Path, default=RESULTS / "learning_first", help="those of the first study")
    parser.add_argument("--small", type=Path, default=RESULTS / "learning_small", help="those at a small size")
    parser.add_argument("--page", type=Path, default=DOCS / "learning.md", help="written anew; pictures go beside it")
    arguments = parser.parse_args()
    page = arguments.page
    text = page.read_text(encoding="utf-8")
    timed = ("settings", "device", "torch")
    parts = blocks(
        load_runs(arguments.results),
        load_runs(arguments.equal, free=("steps", "eval_every")),
        load_runs(arguments.first, timed),
        load_runs(arguments.small, timed),
        page.parent,
    )
    for name, content in parts.items():
        before, after = text.split(opening := f"<!-- {name} -->\n")
        text = before + opening + content + after[after.index("\n<!-- end -->") :]
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
