"""The runs of `digits.py` that several processes made, as one run; and the picture of their curves.

python benchmarks/digits_report.py FOLDER [FOLDER ...] --name digits_256 --note "Nine processes shared the card."

Each folder has the history that one process wrote. Their newest runs must have one title.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from results import Run, newest_run, read_runs, render, write_runs

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from picture import INK, style_of  # noqa: E402

# (arm, label, colour), in the order of tables
ARMS = (
    ("learned", "learned routing, after a dense start", "#3d8fd6"),
    ("even", "evenly spaced patches, equal budgets", "#d9902f"),
    ("vit", "ViT of Transformers, equal width and depth", "#2ca58d"),
)
CHANCE = 1 / 45


def join(runs: Sequence[Run], notes: Sequence[str]) -> Run:
    """One run with all rows and curves.

    Raises:
        ValueError: for runs that differ in more than their time.
    """
    for key in ("title", "commit", "device", "torch", "complete"):
        if len({run[key] for run in runs}) > 1:
            raise ValueError(f"runs differ in {key}: {sorted({str(run[key]) for run in runs})}")
    order = [arm for arm, _, _ in ARMS]

    def place(part: dict[str, Any]) -> tuple[int, int]:
        return order.index(part["arm"]), part["seed"]

    rows = sorted((row for run in runs for row in run["rows"]), key=place)
    curves = sorted((curve for run in runs for curve in run.get("curves", ())), key=place)
    # in the order in which they came
    own = list(dict.fromkeys(note for run in runs for note in run["notes"]))
    return min(runs, key=lambda run: run["date"]) | {"notes": [*own, *notes], "rows": rows, "curves": curves}


def draw_run(run: Run, file: Path) -> None:
    """Pictures with both digits right against steps, and against seconds: a line a run."""
    with matplotlib.rc_context(style_of(file.stem)):
        figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
        for panel, unit in zip(panels, ("step", "seconds"), strict=True):
            for arm, _, colour in ARMS:
                for curve in run["curves"]:
                    if curve["arm"] == arm:
                        panel.plot(curve[unit], curve["both found"], color=colour, linewidth=1.4)
            panel.axhline(CHANCE, color=INK, linewidth=0.8, linestyle=":")
            panel.set_ylim(0, 1)
            panel.set_xlabel({"step": "steps", "seconds": "seconds of training"}[unit])
            panel.grid(color=INK, alpha=0.25, linewidth=0.6)
            panel.set_facecolor("none")
            panel.spines[["top", "right"]].set_visible(False)
        first = run["curves"][0]
        for step, before, side in zip(first["step"], first["side"], first["side"][1:], strict=False):
            if before != side:
                panels[0].axvline(step, color=INK, linewidth=0.8, linestyle="--")
                panels[0].text(step, 1.0, f" {side} × {side}", va="bottom", fontsize=7)
        panels[0].text(0, 1.0, f"pictures of {first['side'][0]} × {first['side'][0]}", va="bottom", fontsize=7)
        panels[0].set_ylabel("both framed digits right")
        lines = [Line2D([], [], color=colour, label=label) for _, label, colour in ARMS]
        lines += [Line2D([], [], color=INK, linestyle=":", label="chance")]
        figure.legend(handles=lines, loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(file, transparent=True, metadata={"Date": None})
        pyplot.close(figure)


def draw(folder: Path) -> None:
    """Draw the newest run of each size in the folder that has curves."""
    for history in sorted(folder.glob("digits_*.jsonl")):
        run = newest_run(history.stem, folder)
        if run is not None and run.get("curves"):
            draw_run(run, folder / f"{history.stem}.svg")


def main(arguments: Sequence[str] | None = None) -> None:
    """Add the joined run to the history, and write its table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="--out of one process")
    parser.add_argument("--name", required=True, help="the history's, such as digits_256")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="folder of the history")
    parser.add_argument("--note", action="append", default=[], help="a sentence that belongs to the table")
    options = parser.parse_args(arguments)
    runs = [run for folder in options.folders if (run := newest_run(options.name, folder)) is not None]
    try:
        joined = join(runs, options.note)
    except ValueError as error:
        parser.error(str(error))
    write_runs(options.name, options.out, [*read_runs(options.name, options.out), joined])
    render(options.name, options.out)
    draw(options.out)


if __name__ == "__main__":
    main()
