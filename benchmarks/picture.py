"""Draws `encoder.svg` from the encoder's history: time and memory against length, CoLT5 beside LongT5."""

from pathlib import Path
from typing import Any

import matplotlib
from peers import COLT5, GLOBAL, LOCAL
from results import Row, fullest_run

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

# read on white and on black alike
INK = "#7a828c"
# (model, mode, label, colour)
CURVES = (
    (GLOBAL, "eager", GLOBAL, "#d1495b"),
    (LOCAL, "eager", LOCAL, "#d9902f"),
    (COLT5, "eager", "CoLT5, called eagerly", "#3d8fd6"),
    (COLT5, "captured", "CoLT5, CUDA graph", "#2ca58d"),
)


def style_of(name: str) -> dict[str, Any]:
    """Matplotlib's settings for the picture of that name."""
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    # ids of the drawing in fixed order: the same picture is the same file
    return {"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9, **colours}


def draw_curves(axes: pyplot.Axes, rows: list[Row], unit: str, factor: float = 1.0) -> None:
    """Forward as a line, forward and backward dashed, and a cross at the top where forward ran out of memory."""
    for model, mode, _, colour in CURVES:
        for name, style in (("forward", "-"), ("fwd+bwd", "--")):
            points = sorted(
                (row["n"], row[f"{name} {unit}"] * factor)
                for row in rows
                if (row["model"], row["mode"], row["batch"]) == (model, mode, 1) and row.get(f"{name} {unit}")
            )
            if points:
                axes.plot(*zip(*points, strict=True), style, color=colour, marker="o", markersize=3.5, linewidth=1.6)
        for row in rows:
            failed = "out of memory" in row.get("note", "") and row.get("forward ms") is None
            if failed and (row["model"], row["mode"], row["batch"]) == (model, mode, 1):
                axes.plot(row["n"], 0.96, "x", color=colour, transform=axes.get_xaxis_transform())


def draw(folder: Path) -> None:
    """Draw the fullest run of the encoder's history in the folder, where there is one."""
    run = fullest_run("encoder", folder)
    if run is None:
        return
    with matplotlib.rc_context(style_of("encoder")):
        figure, (time, memory) = pyplot.subplots(1, 2, figsize=(9, 3.9), layout="constrained")
        draw_curves(time, run["rows"], "ms")
        draw_curves(memory, run["rows"], "peak MiB", 1 / 1024)
        lengths = sorted({row["n"] for row in run["rows"] if row["batch"] == 1})
        for axes, title in ((time, "milliseconds"), (memory, "peak memory beyond weights and gradients, GiB")):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(lengths, [f"{n // 1024}k" if n < 2**20 else f"{n >> 20}M" for n in lengths])
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set_xlabel("tokens")
            axes.set_title(title)
            axes.grid(color=INK, alpha=0.25, linewidth=0.6)
            axes.set_facecolor("none")
            axes.spines[["top", "right"]].set_visible(False)
        lines = [
            Line2D([], [], color=colour, marker="o", markersize=3.5, label=label) for _, _, label, colour in CURVES
        ]
        lines += [Line2D([], [], color=INK, linestyle="-", label="forward")]
        lines += [Line2D([], [], color=INK, linestyle="--", label="forward + backward")]
        lines += [Line2D([], [], color=INK, linestyle="", marker="x", label="out of memory")]
        figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(f"Base-size encoders, bf16, batch 1, one {run['device']}")
        figure.savefig(folder / "encoder.svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
