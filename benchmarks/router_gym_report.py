"""The router gym's table and picture, from the lines of its runs."""

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402

NAMES = {
    "learned": "learned, after a dense start",
    "as_shipped": "learned, without a dense start",
    "even": "even",
    "random": "random",
    "none": "light branches only",
    "none_wide": "light branches only, equal operations",
    "dense": "every token in the heavy branches",
    "learned_ratio_2": "learned, after a dense start, ratio 2",
    "learned_ratio_4": "learned, after a dense start, ratio 4",
    "learned_then_ratio_4": "learned, after a dense start, ratio 4 from then on",
}
Line = dict[str, Any]
# task, length, share of queries, steps, times as many inputs in a step of the dense start
Place = tuple[str, int, float, int, int]


def by_place(lines: list[Line]) -> dict[Place, dict[str, list[Line]]]:
    """The runs of each arm by task, length and budget, in the order of `NAMES` and of seeds."""
    places: dict[Place, dict[str, list[Line]]] = defaultdict(dict)
    for line in sorted(
        lines,
        key=lambda line: (line["task"], line["length"], -line["query_fraction"], line["steps"], line["seed"]),
    ):
        numbers = (line["length"], line["query_fraction"], line["steps"], line["settings"]["start_rows"])
        place = (line["task"], *numbers)
        places[place].setdefault(line["arm"], []).append(line)
    return {place: {arm: arms[arm] for arm in NAMES if arm in arms} for place, arms in places.items()}


def title(place: Place) -> str:
    """Task, length and budget in words."""
    task, length, fraction, steps, start_rows = place
    more = "" if steps == 3000 else f", {steps:,} steps"
    rows = "" if start_rows == 4 else f", {start_rows} times as many inputs at the start"
    return f"{task}, {length:,} tokens, one query among {round(1 / fraction)}{more}{rows}"


def needed_routed(line: Line, kind: str) -> str:
    """The share of needed tokens that the routers of one kind route, a number a layer, if any is needed."""
    shares = [router["needed_routed"] for router in line["routers"] if router["router"].endswith(kind)]
    return " ".join(f"{share:.2f}" for share in shares if share is not None)


def table(lines: list[Line]) -> str:
    """All runs: accuracy of each seed, operations, and what the routers of the first seed route."""
    rows = [
        "| task | arm | accuracy of each seed | least | PFLOP | uses routed, by layer | facts routed, by layer "
        "(the decoder's in the task cross) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for place, arms in by_place(lines).items():
        for arm, runs in arms.items():
            accuracies = " ".join(f"{run['accuracy']:.3f}" for run in runs)
            rows.append(
                f"| {title(place)} | {NAMES[arm]} | {accuracies} | {min(run['accuracy'] for run in runs):.3f} "
                f"| {mean(run['flops'] for run in runs) / 1e15:.2f} | {needed_routed(runs[0], '.query_router')} "
                f"| {needed_routed(runs[0], 'cross_router' if place[0] == 'cross' else 'key_value_router')} |"
            )
    return "\n".join(rows)


def draw(lines: list[Line], file: Path) -> None:
    """Accuracy against steps: a panel a task and budget, a line a run."""
    places = by_place(lines)
    # ids of the drawing in fixed order: the same picture is the same file
    matplotlib.rcParams["svg.hashsalt"] = file.stem
    columns = min(2, len(places))
    figure, panels = pyplot.subplots(
        -(-len(places) // columns), columns, figsize=(4.6 * columns, 3.2 * -(-len(places) // columns)),
        squeeze=False, layout="constrained", sharey=True,
    )  # fmt: skip
    for panel, (place, arms) in zip(panels.flat, places.items(), strict=False):
        for arm, runs in arms.items():
            for number, run in enumerate(runs):
                panel.plot(
                    [point["step"] for point in run["curve"]],
                    [point["accuracy"] for point in run["curve"]],
                    color=pyplot.get_cmap("tab10")(list(NAMES).index(arm)),
                    linewidth=1,
                    label=None if number else NAMES[arm],
                )
        panel.set_title(title(place), fontsize="small")
        panel.set_ylim(0, 1.02)
        panel.set_xlabel("step")
        panel.set_ylabel("accuracy on uses")
    for panel in list(panels.flat)[len(places) :]:
        panel.set_axis_off()
    panels.flat[0].legend(fontsize="x-small")
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def mean_over_layers(point: dict[str, Any], kind: str, name: str) -> float:
    """A number of the routers of one kind at a point of a curve; NaN where none has it."""
    values = [router[name] for router in point["routers"] if router["router"].endswith(kind)]
    values = [value for value in values if value is not None]
    return mean(values) if values else float("nan")


def draw_why(lines: list[Line], file: Path) -> None:
    """What routers do over the steps of the facts task, with a dense start and without, at the shortest inputs and
    the smallest budget that has both."""
    runs = [line for line in lines if line["task"] == "facts" and line["arm"] in ("learned", "as_shipped")]
    if not runs:
        return
    shortest = min(line["length"] for line in runs)
    runs = [line for line in runs if line["length"] == shortest and line["seed"] == 0]
    budgets = [{line["query_fraction"] for line in runs if line["arm"] == arm} for arm in ("learned", "as_shipped")]
    smallest = min(set.intersection(*budgets) or set.union(*budgets))
    runs = [line for line in runs if line["query_fraction"] == smallest]
    matplotlib.rcParams["svg.hashsalt"] = file.stem
    figure, panels = pyplot.subplots(2, 2, figsize=(9.2, 6.4), layout="constrained", sharex=True)
    for run in runs:
        steps = [point["step"] for point in run["curve"]]
        color = pyplot.get_cmap("tab10")(list(NAMES).index(run["arm"]))
        for panel, name in zip(
            panels.flat, ("needed_routed", "types_never_routed", "pull_on_needed_unrouted"), strict=False
        ):
            values = [mean_over_layers(point, ".query_router", name) for point in run["curve"]]
            panel.plot(steps, values, color=color, label=NAMES[run["arm"]])
        for name, style in (("loss", "-"), ("loss_without_heavy", ":")):
            words = f"{NAMES[run['arm']]}{', heavy branches silenced' if style == ':' else ''}"
            panels[1, 1].plot(
                steps, [point[name] for point in run["curve"]], color=color, linestyle=style, label=words
            )
    for panel, words in zip(
        panels.flat,
        (
            "uses that are routed as queries",
            "token types never routed as queries",
            "pull on the scores of uses that are not routed",
            "loss on the uses, nats",
        ),
        strict=True,
    ):
        panel.set_title(words, fontsize="small")
        panel.set_xlabel("step")
        panel.legend(fontsize="x-small")
    panels[1, 0].axhline(0, color="grey", linewidth=0.5)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def write(lines: list[Line], folder: Path) -> None:
    """router_gym.md, router_gym.svg and router_gym_why.svg of the folder."""
    if not lines:
        return
    devices = sorted({f"{line['device']}, torch {line['torch']}, triton {line['triton']}" for line in lines})
    commits = sorted({line["commit"] for line in lines})
    text = (
        "# The router gym\n\nMade by `python benchmarks/router_gym.py`, whose first lines say what task and arm mean. "
        "Accuracy is on the uses of 64 held-out inputs, by the paper's routing at the configured budgets; chance is "
        "0.125. A step of a dense start reads more inputs, four times as many unless said, of 512 tokens (2,048 where "
        "the task needs more).\n\n"
        f"Devices: {'; '.join(devices)}. Commits: {', '.join(commits)}.\n\n{table(lines)}\n\n"
        "![Accuracy against steps](router_gym.svg)\n\n![What the routers do](router_gym_why.svg)\n"
    )
    (folder / "router_gym.md").write_text(text)
    draw(lines, folder / "router_gym.svg")
    draw_why(lines, folder / "router_gym_why.svg")
