"""Draws docs/learning_*.svg and writes tables of docs/learning.md, from the runs of benchmarks/learning.py.

python docs/learning_picture.py [--results FOLDER] [--small FOLDER] [--page FILE]

What has no runs has no table and no picture: the page's blocks hold both, and are empty then.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks/results"
NAMES = {
    "colt5-learned": "CoLT5, learned routing",
    "colt5-random": "CoLT5, random routing",
    "colt5-even": "CoLT5, even routing",
    "colt5-none": "CoLT5, light branches only",
    "longt5-local": "LongT5, local",
    "longt5-transient-global": "LongT5, transient-global",
    "colt5-random-soft": "CoLT5, random routing, a new router's weights",
    "colt5-untrained": "CoLT5, untrained routers' choice, weights 1",
    "colt5-epsilon": "CoLT5, learned routing, ε = 0.1",
    "colt5-router-rate": "CoLT5, learned routing, routers' learning rate × 10",
    "colt5-one-rate": "CoLT5, learned routing, one learning rate for all parameters",
    "colt5-descent": "CoLT5, learned routing, coordinate descent",
}
ROUTERS = {"query": "queries", "key_value": "keys/values", "feed_forward": "feed-forward"}
EXACT, DESCENT, ONE_RATE = "colt5-learned", "colt5-descent", "colt5-one-rate"
# runs that ask why, drawn apart from those that compare
DIAGNOSIS = ("colt5-random-soft", "colt5-untrained", "colt5-epsilon", "colt5-router-rate")
Run = dict[str, Any]


def load_runs(folder: Path) -> dict[str, list[Run]]:
    """The runs of each variant, by seed, in the order of `NAMES`.

    Raises:
        ValueError: runs that were not made alike.
    """
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    alike = {json.dumps([run["settings"], run["device"], run["torch"]]) for run in runs}
    if len(alike) > 1:
        raise ValueError(
            f"{folder} holds runs of {len(alike)} settings, devices and versions; it must be one: {alike}"
        )
    found = {name: [run for run in runs if run["variant"] == name] for name in NAMES}
    return {name: of_variant for name, of_variant in found.items() if of_variant}


def column(run: Run, name: str) -> np.ndarray:
    """One number of each point of a curve."""
    return np.array([point[name] for point in run["curve"]])


def draw(file: Path, title: str, against: str, label: str, runs: dict[str, list[Run]]) -> str:
    """Held-out loss of every run, a colour a variant: seeds after the first are dashed. Returns the page's link."""
    # ids of the drawing in fixed order: the same picture is the same file
    matplotlib.rcParams["svg.hashsalt"] = file.stem
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    losses = []
    for variant, of_variant in runs.items():
        for run in of_variant:
            first = run is of_variant[0]
            axes.plot(
                column(run, against),
                column(run, "loss"),
                color=pyplot.get_cmap("tab20")(2 * list(NAMES).index(variant) % 19),
                linestyle="-" if first else "--",
                linewidth=1.2,
                label=NAMES[variant] if first else None,
            )
            place = column(run, against)
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


def number(value: float) -> str:
    """Three digits; adding zero takes a minus sign from what rounds to it."""
    return f"{round(value, 3) + 0:.3f}"


def by_seed(of_variant: list[Run], value: Callable[[Run], float]) -> str:
    """A cell with a number for each seed."""
    return " / ".join(number(value(run)) for run in of_variant)


def mean(of_variant: list[Run], value: Callable[[Run], float]) -> str:
    """A cell with the mean of the seeds."""
    return number(float(np.mean([value(run) for run in of_variant])))


def at(run: Run, against: str, where: float, name: str = "loss") -> float:
    """A number of a run at a step or second, on the line between two evaluations."""
    return float(np.interp(where, column(run, against), column(run, name)))


def table(runs: dict[str, list[Run]]) -> str:
    """A row for each variant: parameters, time, and mean losses: at the last step and the last second that all runs
    have, at each one's own end with every seed's, and there with swapped inputs."""
    every = [run for of_variant in runs.values() for run in of_variant]
    last_step = min(run["curve"][-1]["step"] for run in every)
    last_second = min(run["curve"][-1]["seconds"] for run in every)
    lines = [
        f"| | parameters, M | ms a step | loss at step {last_step} | after {last_second:.0f} s | at the end | "
        "for each seed | step there | swapping inputs costs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant, of_variant in runs.items():
        ends = [run["curve"][-1] for run in of_variant]
        cells = [
            NAMES[variant],
            f"{of_variant[0]['parameters'] / 1e6:.1f}",
            f"{np.mean([1e3 * end['seconds'] / end['step'] for end in ends]):.1f}",
            mean(of_variant, lambda run: at(run, "step", last_step)),
            mean(of_variant, lambda run: at(run, "seconds", last_second)),
            mean(of_variant, lambda run: run["curve"][-1]["loss"]),
            by_seed(of_variant, lambda run: run["curve"][-1]["loss"]),
            " / ".join(dict.fromkeys(f"{end['step']:,}" for end in ends)),
            mean(of_variant, lambda run: run["curve"][-1]["swapped_loss"] - run["curve"][-1]["loss"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def diagnosis_table(runs: dict[str, list[Run]]) -> str:
    """A row for each variant that asks why, at the last step of all: loss, what swapping costs, routing weights."""

    def weight(run: Run, point: int) -> str:
        routing = run["curve"][point]["routing"]
        routers = [routing[name] for name in ROUTERS if name in routing]
        return f"{np.mean([router['weight'] for router in routers]):.2f}" if routers else ""

    step = min(run["curve"][-1]["step"] for of_variant in runs.values() for run in of_variant)
    lines = [
        f"| | loss at step {step} | for each seed | swapping inputs costs | mean weight at first | at the end |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for variant, of_variant in runs.items():
        cells = [
            NAMES[variant],
            mean(of_variant, lambda run: at(run, "step", step)),
            by_seed(of_variant, lambda run: at(run, "step", step)),
            mean(of_variant, lambda run: at(run, "step", step, "swapped_loss") - at(run, "step", step)),
            weight(of_variant[0], 0),
            weight(of_variant[0], -1),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def routing_table(run: Run) -> str:
    """What the learned routers do at the end, from the first to the last layer."""
    routing = run["curve"][-1]["routing"]
    lines = ["| router | mean weight | weights at 1 | sentinels routed |", "| --- | --- | --- | --- |"]
    for router, title in ROUTERS.items():
        parts = [" ".join(f"{share:.2f}" for share in routing[router][part]) for part in routing[router]]
        lines.append(f"| {title} | {' | '.join(parts)} |")
    return "\n".join(lines)


def solver_table(exact: Run, descent: Run) -> str:
    """Both losses side by side, as far as both went."""
    lines = ["| step | exact | coordinate descent | difference |", "| --- | --- | --- | --- |"]
    for first, second in zip(exact["curve"], descent["curve"], strict=False):
        losses = first["loss"], second["loss"]
        lines.append(f"| {first['step']} | {losses[0]:.4f} | {losses[1]:.4f} | {losses[1] - losses[0]:+.4f} |")
    return "\n".join(lines)


def blocks(runs: dict[str, list[Run]], small: dict[str, list[Run]], folder: Path) -> dict[str, str]:
    """The page's blocks by name, of the runs and of those at a small size; draws their pictures into the folder."""
    parts: dict[str, list[str]] = {name: [] for name in ("results", "routing", "rates", "diagnosis", "solvers")}
    compared = {variant: runs[variant] for variant in runs if variant not in (*DIAGNOSIS, DESCENT, ONE_RATE)}
    if compared:
        parts["results"] = [
            table(compared),
            draw(folder / "learning_steps.svg", "Held-out loss against steps", "step", "steps", compared),
            draw(
                folder / "learning_time.svg", "Held-out loss against time", "seconds", "seconds of training", compared
            ),
        ]
    if EXACT in runs:
        parts["routing"] = [routing_table(runs[EXACT][0])]
    asked = [variant for variant in DIAGNOSIS if variant in runs]
    if asked:
        why = {variant: runs[variant] for variant in ("colt5-learned", "colt5-random", *asked) if variant in runs}
        parts["diagnosis"] = [
            diagnosis_table(why),
            draw(folder / "learning_diagnosis.svg", "Strength or choice", "step", "steps", why),
        ]
    if EXACT in small and ONE_RATE in small:
        parts["rates"] = [diagnosis_table({variant: small[variant] for variant in (EXACT, ONE_RATE)})]
    if EXACT in small and DESCENT in small:
        pair = {variant: small[variant][:1] for variant in (EXACT, DESCENT)}
        title = "Exact soft top-k and 50 iterations of coordinate descent"
        parts["solvers"] = [
            solver_table(*(of_variant[0] for of_variant in pair.values())),
            draw(folder / "learning_solvers.svg", title, "step", "steps", pair),
        ]
    return {name: "\n\n".join(of_block) for name, of_block in parts.items()}


def main() -> None:
    """Draw what there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "learning", help="the runs")
    parser.add_argument("--small", type=Path, default=RESULTS / "learning_small", help="the runs at a small size")
    parser.add_argument("--page", type=Path, default=DOCS / "learning.md", help="written anew; pictures go beside it")
    arguments = parser.parse_args()
    page = arguments.page
    text = page.read_text(encoding="utf-8")
    for name, content in blocks(load_runs(arguments.results), load_runs(arguments.small), page.parent).items():
        before, after = text.split(opening := f"<!-- {name} -->\n")
        text = before + opening + content + after[after.index("\n<!-- end -->") :]
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
