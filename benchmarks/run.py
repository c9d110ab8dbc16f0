"""All benchmarks by one command: each verified before it is timed, peers in the same run, results added to a history.

python benchmarks/run.py                                   called, encoder, generation, training, dense
python benchmarks/run.py encoder training --seconds 480    some of them, within a time
python benchmarks/run.py tables                            only render tables, targets and pictures from the history

Each benchmark is a script of its own as well, with more options. Results go to benchmarks/results: <name>.jsonl has a
line for every run, <name>.md the newest run, targets.md what was aimed for and reached, encoder.svg and digits_*.svg
the pictures.
"""

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import targets
from measure import make_parser, parse
from results import names_of_tables, render

# what a benchmark's share of the time is
SHARES = {
    "called": 2,
    "encoder": 4,
    "encoder_kernels": 1,
    "generation": 3,
    "training": 4,
    "dense": 1,
    "cross_attention": 1,
    "attention": 2,
    "token_ops": 1,
    "router": 1,
    "encoder_cpu": 4,
    "generation_cpu": 2,
    "causal": 4,
    "blocks": 2,
    "sizes": 2,
    "first_calls": 2,
}
DEFAULT = ("called", "encoder", "generation", "training", "dense")
TABLES = "tables"


def write_tables(folder: Path) -> None:
    """Tables, targets and pictures from the history."""
    for name in names_of_tables(folder):
        render(name, folder)
    targets.write(folder)
    try:
        import digits_report
        import picture
    except ImportError:
        print("no picture drawn: matplotlib is not installed", flush=True)
    else:
        picture.draw(folder)
        digits_report.draw(folder)


def run(name: str, options: argparse.Namespace, seconds: float) -> bool:
    """Run one benchmark; whether it came to its end."""
    print(f"== {name}, {seconds:.0f} s", flush=True)
    arguments = ["--out", str(options.out), "--seconds", str(seconds), *(["--tiny"] if options.tiny else [])]
    arguments += ["--commit", options.commit] if options.commit else []
    try:
        importlib.import_module(name).main(arguments)
    except Exception:  # noqa: BLE001 - one that fails must not lose the others' numbers
        traceback.print_exc()
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmarks in the order given, and write what follows from their results after each.

    Raises:
        SystemExit: where one of them failed, after the others have run.
    """
    parser = make_parser(__doc__)
    parser.add_argument("names", nargs="*", default=DEFAULT, metavar="name", help=f"{', '.join(SHARES)}, or {TABLES}")
    options = parse(parser, arguments, needs_gpu=False)
    names = list(options.names)
    for name in names:
        if name not in (*SHARES, TABLES):
            parser.error(f"{name!r} is no benchmark; there are {', '.join(SHARES)}, and {TABLES}")
    failed = []
    for position, name in enumerate(names):
        if name != TABLES:
            # what one leaves of its share, the later ones have
            left = options.deadline - time.perf_counter()
            share = SHARES[name] / sum(SHARES.get(later, 0) for later in names[position:])
            if not run(name, options, max(0.0, left * share)):
                failed.append(name)
        write_tables(options.out)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
