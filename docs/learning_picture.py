"""Draws docs/learning_*.svg and writes the table of docs/learning.md, from the runs of benchmarks/learning.py.

python docs/learning_picture.py [--results FOLDER]
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
RESULTS = DOCS.parent / "benchmarks/results/learning"
NAMES = {
    "colt5-learned": "CoLT5, learned routing",
    "colt5-random": "CoLT5, random routing",
    "colt5-even": "CoLT5, even routing",
    "colt5-none": "CoLT5, light branches only",
    "longt5-local": "LongT5, local",
    "longt5-transient-global": "LongT5, transient-global",
    "colt5-descent": "CoLT5, coordinate descent",
}
Run = dict[str, Any]


def load_runs(folder: Path) -> dict[str, list[Run]]:
    """The runs of each variant, by seed, in the order of `NAMES`.

    Raises:
        ValueError: no runs, or runs that were not made alike.
    """
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    alike = {json.dumps([run["settings"], run["device"], run["torch"]]) for run in runs}
    if len(alike) != 1:
        raise ValueError(
            f"{folder} holds runs of {len(alike)} settings, devices and versions; it must be one: {alike}"
        )
    found = {name: [run for run in runs if run["variant"] == name] for name in NAMES}
    return {name: of_variant for name, of_variant in found.items() if of_variant}


def column(run: Run, name: str) -> np.ndarray:
    """One number of each point of a curve."""
    return np.array([point[name] for point in run["curve"]])


def draw(name: str, title: str, against: str, label: str, runs: dict[str, list[Run]], top: float) -> None:
    """Held-out loss of every run, a colour a variant: seeds after the first are dashed."""
    # ids of the drawing in fixed order: the same picture is the same file
    matplotlib.rcParams["svg.hashsalt"] = name
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for number, variant in enumerate(NAMES):
        for run in runs.get(variant, []):
            first = run is runs[variant][0]
            axes.plot(
                column(run, against),
                column(run, "loss"),
                color=f"C{number}",
                linestyle="-" if first else "--",
                linewidth=1.2,
                label=NAMES[variant] if first else None,
            )
    losses = [column(run, "loss") for of_variant in runs.values() for run in of_variant]
    axes.set_ylim(min(loss.min() for loss in losses) - 0.05, top)
    axes.set_xlabel(label)
    axes.set_ylabel("held-out loss, nats a token")
    axes.set_title(title)
    axes.legend()
    figure.savefig(DOCS / f"{name}.svg", metadata={"Date": None})


def table(runs: dict[str, list[Run]]) -> str:
    """A row for each variant: parameters, time, loss at the last step, and when the first variant's time was up."""
    reference = runs.get("colt5-learned") or next(iter(runs.values()))
    limit = float(np.mean([run["curve"][-1]["seconds"] for run in reference]))

    def cells(of_variant: list[Run], value: Callable[[Run], float]) -> str:
        return " / ".join(f"{value(run):.3f}" for run in of_variant)

    def at_limit(run: Run) -> float:
        return float(np.interp(limit, column(run, "seconds"), column(run, "loss")))

    lines = [
        f"| | parameters, M | ms a step | held-out loss at the end, by seed | the same after {limit:.0f} s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for variant, of_variant in runs.items():
        last = [run["curve"][-1] for run in of_variant]
        step = float(np.mean([1e3 * point["seconds"] / point["step"] for point in last]))
        faster = all(point["seconds"] < 0.98 * limit for point in last)
        lines.append(
            f"| {NAMES[variant]} | {of_variant[0]['parameters'] / 1e6:.1f} | {step:.1f} | "
            f"{cells(of_variant, lambda run: run['curve'][-1]['loss'])} | "
            f"{'done before' if faster else cells(of_variant, at_limit)} |"
        )
    return "\n".join(lines)


def routing_table(runs: dict[str, list[Run]]) -> str:
    """What the first seed's learned routers do at the end, from the first to the last layer."""
    routing = runs["colt5-learned"][0]["curve"][-1]["routing"]
    lines = ["| router | mean weight | weights at 1 | sentinels routed |", "| --- | --- | --- | --- |"]
    for router, title in (("query", "queries"), ("key_value", "keys/values"), ("feed_forward", "feed-forward")):
        parts = [" ".join(f"{share:.2f}" for share in routing[router][part]) for part in routing[router]]
        lines.append(f"| {title} | {' | '.join(parts)} |")
    return "\n".join(lines)


def main() -> None:
    """Draw what there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with a JSON file for each run")
    runs = load_runs(parser.parse_args().results)
    # what happens in the first fifth would flatten the rest
    some = next(iter(runs.values()))[0]
    top = float(column(some, "loss")[len(some["curve"]) // 5])
    solvers = ("colt5-learned", "colt5-descent")
    compared = {name: of_variant for name, of_variant in runs.items() if name != "colt5-descent"}
    draw("learning_steps", "Held-out loss against steps", "step", "steps", compared, top)
    draw("learning_time", "Held-out loss against time", "seconds", "seconds of training", compared, top)
    pair = {name: runs[name] for name in solvers if name in runs}
    draw("learning_solvers", "Exact soft top-k and 50 iterations of coordinate descent", "step", "steps", pair, top)

    page = DOCS / "learning.md"
    text = page.read_text(encoding="utf-8")
    for name, content in (("results", table(runs)), ("routing", routing_table(runs))):
        before, after = text.split(opening := f"<!-- {name} -->\n")
        text = before + opening + content + after[after.index("\n<!-- end -->") :]
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
