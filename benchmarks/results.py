"""The history of each benchmark, `<name>.jsonl` with a line for each run, and the newest run's table, `<name>.md`."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from measure import describe_commit, describe_device

# what a line says of a run besides its rows
Run = dict[str, Any]
Row = dict[str, Any]


def names_of_tables(folder: Path) -> list[str]:
    """The benchmarks whose history is kept by `Table`; scripts of their own write other lines."""
    histories = sorted(folder.glob("*.jsonl"))
    return [history.stem for history in histories if all("rows" in run for run in read_runs(history.stem, folder))]


def read_runs(name: str, folder: Path) -> list[Run]:
    """All runs of a benchmark, oldest first."""
    file = folder / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write_runs(name: str, folder: Path, runs: list[Run]) -> None:
    """Write all runs of a benchmark, oldest first."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(run, ensure_ascii=False) + "\n" for run in runs]
    (folder / f"{name}.jsonl").write_text("".join(lines))


def newest_run(name: str, folder: Path) -> Run | None:
    """The newest run that came to its end, or else the newest; None where there is none."""
    runs = read_runs(name, folder)
    return next((run for run in reversed(runs) if run["complete"]), runs[-1] if runs else None)


def fullest_run(name: str, folder: Path) -> Run | None:
    """The run with the most rows, the newest of those: what shows how something grows; None where there is none."""
    return max(reversed(read_runs(name, folder)), key=lambda run: len(run["rows"]), default=None)


def markdown(rows: list[Row]) -> str:
    """Rows as a table; the columns are the rows' keys."""

    def cell(value: object) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([cell(row.get(column)) for column in columns] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def describe_run(run: Run) -> str:
    """The device, the date, the commit and the versions of a run, on one line."""
    return ", ".join(
        f"{key} {run[key]}" for key in ("device", "date", "commit", "python", "torch", "triton", "transformers")
    )


class Table:
    """The rows of one run of a benchmark, kept as they come: a run that is killed leaves what it had."""

    def __init__(self, name: str, title: str, options: argparse.Namespace):
        """Begin a run.

        Args:
            name: the benchmark's.
            title: says what was measured and how.
            options: the benchmark's, from `measure.parse`.
        """
        self.name, self.folder = name, options.out
        self.earlier = read_runs(name, options.out)
        about = {"date": time.strftime("%Y-%m-%d %H:%M"), "commit": options.commit or describe_commit()}
        self.run: Run = {**about, **describe_device(), "title": title, "complete": False, "notes": [], "rows": []}

    def add(self, row: Row) -> None:
        """Add a row, and print it."""
        print(self.name, {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()},
              flush=True)  # fmt: skip
        self.run["rows"].append(row)
        self.save()

    def note(self, text: str) -> None:
        """Add a sentence that belongs to the table."""
        print(f"{self.name}: {text}", flush=True)
        self.run["notes"].append(text)
        self.save()

    def save(self) -> None:
        """Write the history with this run at its end."""
        write_runs(self.name, self.folder, [*self.earlier, self.run])

    def finish(self) -> None:
        """Say that the run came to its end, and write the table."""
        self.run["complete"] = True
        self.save()
        render(self.name, self.folder)


def render(name: str, folder: Path) -> None:
    """Write `<name>.md` from the newest run."""
    run = newest_run(name, folder)
    if run is not None:
        notes = "".join(f"\n{note}\n" for note in run["notes"])
        text = f"# {run['title']}\n\n{describe_run(run)}\n\n{markdown(run['rows'])}{notes}"
        (folder / f"{name}.md").write_text(text)
