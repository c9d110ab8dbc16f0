"""Draws docs/learning_*.svg and writes tables of docs/learning.md, from the runs of benchmarks/learning.py.

python docs/learning_picture.py [--results FOLDER] [--small FOLDER] [--words FOLDER] [--page FILE]

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
    "colt5-descent": "CoLT5, coordinate descent",
    "colt5-random-soft": "CoLT5, random routing, a new router's weights",
    "colt5-untrained": "CoLT5, untrained routers' choice, weights 1",
    "colt5-epsilon": "CoLT5, learned routing, ε = 0.1",
    "colt5-router-rate": "CoLT5, learned routing, routers' learning rate × 10",
}
ROUTERS = {"query": "queries", "key_value": "keys/values", "feed_forward": "feed-forward"}
EXACT, DESCENT = "colt5-learned", "colt5-descent"
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
            losses += list(column(run, "loss")[len(run["curve"]) // 5 :])
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
    return " / ".join(f"{value(run):.3f}" for run in of_variant)


def last_loss(run: Run) -> float:
    """The loss at the last step."""
    return run["curve"][-1]["loss"]


def table(runs: dict[str, list[Run]]) -> str:
    """A row for each variant: parameters, time, loss at the last step, and when the fastest run's time was up."""
    limit = min(run["curve"][-1]["seconds"] for of_variant in runs.values() for run in of_variant)
    lines = [
        f"| | parameters, M | ms a step | held-out loss at the end, by seed | the same after {limit:.1f} s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for variant, of_variant in runs.items():
        step = np.mean([1e3 * run["curve"][-1]["seconds"] / run["curve"][-1]["step"] for run in of_variant])
        then = by_seed(of_variant, lambda run: float(np.interp(limit, column(run, "seconds"), column(run, "loss"))))
        parameters = of_variant[0]["parameters"] / 1e6
        lines.append(
            f"| {NAMES[variant]} | {parameters:.1f} | {step:.1f} | {by_seed(of_variant, last_loss)} | {then} |"
        )
    return "\n".join(lines)


def small_table(runs: dict[str, list[Run]]) -> str:
    """A row for each variant: loss at the last step, with swapped inputs, and routing weights at start and end."""

    def weight(run: Run, point: int) -> str:
        routing = run["curve"][point]["routing"]
        routers = [routing[name] for name in ROUTERS if name in routing]
        return f"{np.mean([router['weight'] for router in routers]):.2f}" if routers else ""

    lines = [
        "| | held-out loss at the end, by seed | with swapped inputs | mean weight at first | at the end |",
        "| --- | --- | --- | --- | --- |",
    ]
    for variant, of_variant in runs.items():
        losses, swapped = by_seed(of_variant, last_loss), by_seed(of_variant, lambda run: run["swapped_loss"])
        weights = f"{weight(of_variant[0], 0)} | {weight(of_variant[0], -1)}"
        lines.append(f"| {NAMES[variant]} | {losses} | {swapped} | {weights} |")
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
    """Both losses side by side, at every fourth evaluation and the last."""
    lines = ["| step | exact | coordinate descent | difference |", "| --- | --- | --- | --- |"]
    points = list(zip(exact["curve"], descent["curve"], strict=True))
    for first, second in points[:-1:4] + points[-1:]:
        losses = first["loss"], second["loss"]
        lines.append(f"| {first['step']} | {losses[0]:.4f} | {losses[1]:.4f} | {losses[1] - losses[0]:+.4f} |")
    return "\n".join(lines)


def blocks(sets: dict[str, dict[str, list[Run]]], folder: Path) -> dict[str, str]:
    """The page's blocks by name, from the sets of runs; draws the pictures that they link to into the folder."""
    parts: dict[str, list[str]] = {name: [] for name in ("results", "routing", "small", "words", "solvers")}
    compared = {
        name: {variant: of_variant for variant, of_variant in runs.items() if variant != DESCENT}
        for name, runs in sets.items()
    }
    runs = compared["results"]
    if runs:
        parts["results"] = [
            table(runs),
            draw(folder / "learning_steps.svg", "Held-out loss against steps", "step", "steps", runs),
            draw(folder / "learning_time.svg", "Held-out loss against time", "seconds", "seconds of training", runs),
        ]
    if EXACT in runs:
        parts["routing"] = [routing_table(runs[EXACT][0])]
    for name, title in (("small", "Small models on the proposals"), ("words", "Small models on made-up documents")):
        if runs := compared[name]:
            parts[name] = [small_table(runs), draw(folder / f"learning_{name}.svg", title, "step", "steps", runs)]
    for name in ("results", "small", "words"):
        if EXACT in sets[name] and DESCENT in sets[name]:
            pair = {variant: sets[name][variant][:1] for variant in (EXACT, DESCENT)}
            title = "Exact soft top-k and 50 iterations of coordinate descent"
            parts["solvers"] = [
                solver_table(*(of_variant[0] for of_variant in pair.values())),
                draw(folder / "learning_solvers.svg", title, "step", "steps", pair),
            ]
            break
    return {name: "\n\n".join(of_block) for name, of_block in parts.items()}


def main() -> None:
    """Draw what there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "learning", help="the runs of the GPU")
    parser.add_argument("--small", type=Path, default=RESULTS / "learning_cpu", help="of the CPU, on the proposals")
    parser.add_argument("--words", type=Path, default=RESULTS / "learning_own_words", help="of the CPU, --own_words")
    parser.add_argument("--page", type=Path, default=DOCS / "learning.md", help="written anew; pictures go beside it")
    arguments = parser.parse_args()
    page = arguments.page
    text = page.read_text(encoding="utf-8")
    sets = {name: load_runs(getattr(arguments, name)) for name in ("results", "small", "words")}
    for name, content in blocks(sets, page.parent).items():
        before, after = text.split(opening := f"<!-- {name} -->\n")
        text = before + opening + content + after[after.index("\n<!-- end -->") :]
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
