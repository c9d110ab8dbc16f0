"""What was aimed for and what was reached, from the newest run that measured it: `targets.md`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from peers import COLT5, GLOBAL, LOCAL
from results import Row, Run, fullest_run, markdown, newest_run, read_runs

# of most targets; a run at another length does not count
LENGTH = 16_384


@dataclass
class Reached:
    """A value of one run, and how it was reached.

    Args:
        value: in the target's unit.
        how: the mode, where there are several.
        peers: what the peers took in the same run.
    """

    value: float
    how: str = ""
    peers: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A row of the table.

    Args:
        work: what is measured.
        benchmark: whose history has it.
        limit: the value aimed for.
        unit: of the value.
        find: the value in a run, None where the run has none.
        at_least: whether the value should be at least the limit, not at most.
    """

    work: str
    benchmark: str
    limit: float
    unit: str
    find: Callable[[Run], Reached | None]
    at_least: bool = False

    def is_met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


def find_row(run: Run, **wanted: object) -> Row:
    """The first row with these values; empty where there is none."""
    return next((row for row in run["rows"] if all(row.get(key) == value for key, value in wanted.items())), {})


def encoder_value(
    n: int, key: str, modes: Iterable[str], factor: float = 1.0, batch: int = 1
) -> Callable[[Run], Reached | None]:
    """The least value of a column among modes, with the peers' at the same length."""

    def find(run: Run) -> Reached | None:
        found = [(find_row(run, model=COLT5, batch=batch, n=n, mode=mode).get(key), mode) for mode in modes]
        values = [(value * factor, mode) for value, mode in found if value is not None]
        if not values:
            return None
        peers = {name: find_row(run, model=name, batch=batch, n=n).get(key) for name in (GLOBAL, LOCAL)}
        return Reached(*min(values), {name: value * factor for name, value in peers.items() if value is not None})

    return find


def called_value(n: int, key: str, setting: str = "") -> Callable[[Run], Reached | None]:
    """A column of called.py, of models as they are called, with the peers' at the same length."""

    def find(run: Run) -> Reached | None:
        values = {
            name: find_row(run, model=name, n=n, way="called", setting=setting).get(key)
            for name in (COLT5, GLOBAL, LOCAL)
        }
        value = values.pop(COLT5)
        return None if value is None else Reached(value, "as called", values)

    return find


def trainer_step(run: Run) -> Reached | None:
    """A step of `Trainer` that is not compiled."""
    value = find_row(run, model=COLT5, mode="eager", batch=2, input=LENGTH).get("step ms")
    return None if value is None else Reached(value, "eager")


def first_call(call: str) -> Callable[[Run], Reached | None]:
    """A first call's time in seconds, all kernels compiled."""

    def find(run: Run) -> Reached | None:
        value = find_row(run, call=call, cache="empty").get("first s")
        return None if value is None else Reached(value, "as called")

    return find


def faster_as_called(run: Run) -> list[str]:
    """Where a peer takes less time than CoLT5, both as they are called; one line for each that was measured."""
    rows = [row for row in run["rows"] if row["way"] == "called" and not row["setting"]]
    lines = []
    for name in dict.fromkeys(row["model"] for row in rows if row["model"] != COLT5):
        faster, compared = [], 0
        for row in (row for row in rows if row["model"] == name):
            ours = find_row(run, model=COLT5, n=row["n"], way="called", setting="")
            for key in ("forward ms", "fwd+bwd ms"):
                if row.get(key) and ours.get(key):
                    compared += 1
                    if row[key] < ours[key]:
                        faster.append(f"{key.removesuffix(' ms')} at {row['n']:,} ({ours[key] / row[key]:.1f} times)")
        lines.append(f"{name}: {', '.join(faster) or 'nowhere'}; {compared} compared.")
    return lines


def routing_share(run: Run) -> Reached | None:
    share = find_row(run, model=f"{COLT5}, routing alone", n=LENGTH).get("of the forward")
    return None if share is None else Reached(100 * share)


def token_time(batch: int) -> Callable[[Run], Reached | None]:
    """The least time between tokens among the caches."""

    def find(run: Run) -> Reached | None:
        rows = [row for row in run["rows"] if (row["batch"], row["input"]) == (batch, LENGTH) and row.get("ms/token")]
        # of one sequence a document, and of models that compute
        rows = [row for row in rows if row.get("beams", 1) == 1 and row["cache"] in ("dynamic", "static")]
        values = [(row["ms/token"], f"{row['cache']} cache") for row in rows if row["model"] == COLT5]
        peers = {row["model"]: row["ms/token"] for row in rows if row["model"] != COLT5}
        return Reached(*min(values), peers) if values else None

    return find


def training_ratio(run: Run) -> Reached | None:
    """CoLT5's tokens a second over LongT5 transient-global's, each in its best mode."""
    rows = [row for row in run["rows"] if row["input"] == LENGTH and row.get("input tokens/s")]
    # runs before there were modes were eager
    rates = {
        name: max(
            ((row["input tokens/s"], row.get("mode", "eager")) for row in rows if row["model"] == name), default=None
        )
        for name in (COLT5, GLOBAL)
    }
    if rates[COLT5] is None or rates[GLOBAL] is None:
        return None
    (ours, our_mode), (theirs, their_mode) = rates[COLT5], rates[GLOBAL]
    return Reached(ours / theirs, f"{our_mode}, {ours:,.0f} tokens/s; LongT5 {their_mode}, {theirs:,.0f}")


ALL_MODES = ("eager", "captured", "compiled", "compiled, captured")
GIB = 1 / 1024
TARGETS = (
    *(
        Target(f"{work}, {n:,} tokens", "called", limit, "ms", called_value(n, key))
        for work, key, limits in (
            ("forward", "forward ms", {512: 2.5, 4096: 2.8, LENGTH: 6.5}),
            ("forward + backward", "fwd+bwd ms", {512: 8, 4096: 9, LENGTH: 21}),
        )
        for n, limit in limits.items()
    ),
    Target(
        "forward + backward, 16,384 tokens, dropout", "called", 23, "ms",
        called_value(LENGTH, "fwd+bwd ms", "dropout 0.1"),
    ),
    Target(
        "the same with fp32 weights under bf16 autocast", "called", 25, "ms",
        called_value(LENGTH, "fwd+bwd ms", "dropout 0.1, fp32 under bf16 autocast"),
    ),
    Target("a step of Trainer, 2 × 16,384 tokens to 512", "training", 80, "ms", trainer_step),
    Target("first forward, 16,384 tokens, kernels compiled", "first_calls", 4, "s", first_call("encoder forward")),
    Target("first training step, 16,384 tokens to 512, likewise", "first_calls", 6, "s", first_call("training step")),
    Target(
        "forward, 16,384 tokens, torch.compile or CUDA graph", "encoder", 6, "ms",
        encoder_value(LENGTH, "forward ms", ALL_MODES[1:]),
    ),
    Target(
        "forward + backward, 16,384 tokens, best mode", "encoder", 22, "ms",
        encoder_value(LENGTH, "fwd+bwd ms", ALL_MODES),
    ),
    Target(
        "its peak memory above weights and gradients", "encoder", 4, "GiB",
        encoder_value(LENGTH, "fwd+bwd peak MiB", ["eager"], GIB),
    ),
    Target("forward, 65,536 tokens", "encoder", 32, "ms", encoder_value(65_536, "forward ms", ALL_MODES)),
    Target("forward + backward, 65,536 tokens", "encoder", 100, "ms", encoder_value(65_536, "fwd+bwd ms", ALL_MODES)),
    Target(
        "its peak memory above weights and gradients", "encoder", 12, "GiB",
        encoder_value(65_536, "fwd+bwd peak MiB", ["eager"], GIB),
    ),
    Target("forward, 1,048,576 tokens", "encoder", 2000, "ms", encoder_value(1_048_576, "forward ms", ALL_MODES)),
    Target(
        "its peak memory above weights", "encoder", 24, "GiB",
        encoder_value(1_048_576, "forward peak MiB", ["eager"], GIB),
    ),
    Target("routers' share of the forward's GPU time, 16,384 tokens", "encoder", 10, "%", routing_share),
    Target("between tokens, greedy, 16,384 tokens of input, batch 1", "generation", 2.5, "ms", token_time(1)),
    Target("between tokens, greedy, 16,384 tokens of input, batch 8", "generation", 2.5, "ms", token_time(8)),
    Target(
        "training step, 16,384 and 512 tokens, batch 2, against transient-global", "training", 5, "times",
        training_ratio, at_least=True,
    ),
)  # fmt: skip


def judge(target: Target, runs: list[Run]) -> Row:
    """The target's row, by the newest run that measured it."""
    row: Row = {"work": target.work, "target": f"{'≥' if target.at_least else '≤'} {target.limit:g} {target.unit}"}
    for run in reversed(runs):
        reached = target.find(run)
        if reached is not None:
            value = reached.value
            peers = [f"{name} {peer:.3g} ({peer / value:.1f} ×)" for name, peer in reached.peers.items() if peer]
            return row | {
                "reached": f"{value:.3g} {target.unit}" if value < 1000 else f"{value:,.0f} {target.unit}",
                "met": "yes" if target.is_met(value) else "no",
                "how": reached.how or None,
                "LongT5 in the same run": "; ".join(peers) or None,
                "where and when": f"{run['device']}, {run['date']}, {run['commit']}",
            }
    return row | {"reached": None, "met": "not measured"}


def growth(run: Run) -> list[Row]:
    """How time and memory of the forward pass grow: a row for each batch and length, by the faster mode."""
    rows = []
    for batch, n in sorted({(row["batch"], row["n"]) for row in run["rows"] if row["model"] == COLT5}):
        reached = encoder_value(n, "forward ms", ALL_MODES, batch=batch)(run)
        if reached is None:
            continue
        eager = find_row(run, model=COLT5, batch=batch, n=n, mode="eager")
        best = find_row(run, model=COLT5, batch=batch, n=n, mode=reached.how)
        rows.append(
            {
                "batch": batch,
                "n": n,
                "forward ms": reached.value,
                "mode": reached.how,
                "µs a token": 1e3 * reached.value / (batch * n),
                "of the matrix rate": f"{best['share']:.0%}" if "share" in best else None,
                "peak MiB": eager.get("forward peak MiB"),
                **{name: reached.peers.get(name) for name in (LOCAL, GLOBAL)},
            }
        )
    return rows


def write(folder: Path) -> None:
    """Write `targets.md` from the histories in the folder."""
    text = (
        "# Targets: bf16, base size, batch 1 unless said, random weights\n\n"
        "They were set for one H100. The last column says which card the newest measurement was made on.\n\n"
    )
    text += markdown([judge(target, read_runs(target.benchmark, folder)) for target in TARGETS])
    if run := fullest_run("encoder", folder):
        text += f"\nForward time against length, milliseconds ({run['device']}, {run['date']}, {run['commit']}):\n\n"
        text += markdown(growth(run))
    if run := fullest_run("called", folder):
        text += f"\nWhere peers are faster as called, by tokens ({run['device']}, {run['date']}, {run['commit']}):\n\n"
        text += "".join(f"- {line}\n" for line in faster_as_called(run))
    if run := newest_run("dense", folder):
        text += f"\nWhere dense encoders are faster in CUDA graphs, batch × length ({run['device']}, {run['date']}, "
        text += f"{run['commit']}):\n\n"
        text += "".join(f"- {note}\n" for note in run["notes"] if ", captured:" in note)
    (folder / "targets.md").write_text(text)
