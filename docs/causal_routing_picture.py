"""Draws docs/causal_routing.svg and writes tables of docs/causal_routing.md, from benchmarks/causal_learning.py.

python docs/causal_routing_picture.py [--results FOLDER] [--page FILE]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks/results/causal_learning"
NAMES = {
    "routed": "light and heavy branch",
    "routed-dense-start": "the same, after a dense start",
    "routed-queries": "the same, a quarter of the tokens as queries",
    "local": "light branch only",
    "local-wide": "light branch only, with all 6 heads",
    "full": "T5's full attention",
    "routed-both": "light and heavy branch, routed feed-forward",
    "routed-feed-forward": "light branch only, routed feed-forward",
}
Run = dict[str, Any]


def load_runs(folder: Path) -> dict[str, list[Run]]:
    """The runs of each variant, by seed, in the order of `NAMES`. The device may differ, as losses can be compared.

    Raises:
        ValueError: no runs, or runs that were not made alike.
    """
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    alike = {json.dumps([run["settings"], run["torch"], run["text"]]) for run in runs}
    if len(alike) != 1:
        raise ValueError(f"{folder} holds runs of {len(alike)} settings, releases or texts; it must be one: {alike}")
    found = {name: [run for run in runs if run["variant"] == name] for name in NAMES}
    return {name: of_variant for name, of_variant in found.items() if of_variant}


def draw(runs: dict[str, list[Run]], file: Path) -> None:
    """Held-out loss of every run, a colour a variant: seeds after the first are dashed."""
    # ids of the drawing in fixed order: the same picture is the same file
    matplotlib.rcParams["svg.hashsalt"] = "causal_routing"
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    settings = next(iter(runs.values()))[0]["settings"]
    tokens = settings["batch"] * settings["length"] / 1e6
    losses = []
    for number, (variant, of_variant) in enumerate(runs.items()):
        for position, run in enumerate(of_variant):
            points = run["curve"]
            axes.plot(
                [tokens * point["step"] for point in points],
                [point["loss"] for point in points],
                color=f"C{number}",
                linestyle="--" if position else "-",
                linewidth=1.2,
                label=None if position else NAMES[variant],
            )
            losses += [point["loss"] for point in points[len(points) // 5 :]]
    # what happens in the first fifth would flatten the rest
    axes.set_ylim(min(losses) - 0.03, max(losses))
    axes.set_xlabel("million bytes of training")
    axes.set_ylabel("held-out loss, nats a byte")
    axes.set_title("Causal language models on the standard library's source")
    axes.legend()
    figure.savefig(file, metadata={"Date": None})


def loss_table(runs: dict[str, list[Run]]) -> str:
    """A row for each variant, with the time of those that were trained on the first one's device."""
    device = next(iter(runs.values()))[0]["device"]
    lines = [
        "| attention | parameters, M | ms a step | held-out loss at the end, mean | by seed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for variant, of_variant in runs.items():
        last = [run["curve"][-1] for run in of_variant]
        step = f"{sum(1e3 * point['seconds'] / point['step'] for point in last) / len(last):.1f}"
        if of_variant[0]["device"] != device:
            step = "–"
        losses = [point["loss"] for point in last]
        mean, each = sum(losses) / len(losses), " / ".join(f"{loss:.4f}" for loss in losses)
        parameters = of_variant[0]["parameters"] / 1e6
        lines.append(f"| {NAMES[variant]} | {parameters:.1f} | {step} | {mean:.4f} | {each} |")
    return "\n".join(lines)


def use_table(runs: dict[str, list[Run]]) -> str:
    """What taking the heavy attention out after training costs, a row for each variant that has it."""
    lines = [
        "| attention | all tokens | tokens that are queries in some layer | their share |",
        "| --- | --- | --- | --- |",
    ]
    for variant, of_variant in runs.items():
        if "queries" not in of_variant[0]["routing"]:
            continue
        costs = [run["routing"]["loss_without_heavy"] - run["curve"][-1]["loss"] for run in of_variant]
        queries = [run["routing"]["queries"] for run in of_variant]
        of_queries = [part["without"] - part["with"] for part in queries]
        share = sum(part["share"] for part in queries) / len(queries)
        columns = [" / ".join(f"{cost:.4f}" for cost in column) for column in (costs, of_queries)]
        lines.append(f"| {NAMES[variant]} | {' | '.join(columns)} | {share:.0%} |")
    return "\n".join(lines)


def routing_table(runs: dict[str, list[Run]]) -> str:
    """What the first seeds' models do on held-out text, from the first to the last layer."""
    lines = [
        "| attention | what is routed | tokens, of the target | mean weight | mean age of the pools' tokens, bytes |",
        "| --- | --- | --- | --- | --- |",
    ]
    for variant, of_variant in runs.items():
        routing = of_variant[0]["routing"]
        ages = " ".join(f"{age:.0f}" for age in routing.get("pool_age", []))
        for name, title in (("query", "queries"), ("feed_forward", "feed-forward")):
            if name in routing:
                parts = [" ".join(f"{value:.2f}" for value in routing[name][part]) for part in ("budget", "weight")]
                age = ages if name == "query" else ""
                lines.append(f"| {NAMES[variant]} | {title} | {' | '.join(parts)} | {age} |")
    return "\n".join(lines)


def main() -> None:
    """Draw and write what there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with a JSON file for each run")
    parser.add_argument("--page", type=Path, default=DOCS / "causal_routing.md", help="page whose tables are written")
    arguments = parser.parse_args()
    runs = load_runs(arguments.results)
    draw(runs, arguments.page.with_suffix(".svg"))
    text = arguments.page.read_text(encoding="utf-8")
    tables = {"losses": loss_table(runs), "use": use_table(runs), "routing": routing_table(runs)}
    for name, content in tables.items():
        before, after = text.split(opening := f"<!-- {name} -->\n")
        text = before + opening + content + after[after.index("\n<!-- end -->") :]
    arguments.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
