"""Where a dense encoder is still the faster one: T5 and ModernBERT with SDPA against CoLT5, by batch and length.

python benchmarks/dense.py
"""

import itertools
import time
from collections.abc import Sequence

import torch
from encoder import BOTH, CAPTURED, EAGER, FORWARD, both_call, forward_call, release, verify
from measure import Call, captured, make_parser, median_ms, parse
from peers import COLT5, DENSE_T5, DEVICE, DTYPE, MODERNBERT, make_encoder, random_ids
from results import Row, Table

TITLE = (
    "Dense encoders of base size with SDPA (T5 1.1, 12 layers; ModernBERT, 22 layers) against CoLT5, bf16, random "
    "weights, no padding: median milliseconds of a call, eager, and captured in one CUDA graph where the eager call "
    "takes less than 100"
)
MODELS = (COLT5, DENSE_T5, MODERNBERT)
BATCHES = (1, 8)
LENGTHS = (512, 1024, 2048, 4096, 8192)
MEASURES = ((FORWARD, EAGER), (FORWARD, CAPTURED), (BOTH, EAGER), (BOTH, CAPTURED))


def measure(model: torch.nn.Module, batch: int, n: int, tiny: bool) -> Row:
    """Milliseconds by measure; None where there is none, with the reason in the note."""
    row: Row = {}
    ids = random_ids(batch, n, tiny)
    cotangent = torch.randn(batch, n, model.config.hidden_size, device=DEVICE, dtype=DTYPE)
    for name, mode in MEASURES:
        key = f"{name} {mode}"
        eager = row.get(f"{name} {EAGER}")
        # without an eager time it failed, and a long one has no gaps between its kernels to close
        if mode == CAPTURED and (eager is None or eager > 100):
            row[key] = None
            continue
        try:
            call: Call | None = forward_call(model, ids, None)
            if name == BOTH:
                call = both_call(model, ids, None, cotangent)
                call()
            if mode == CAPTURED:
                call = captured(call)
            row[key] = median_ms(call, tiny)
        except torch.cuda.OutOfMemoryError:
            row[key], row["note"] = None, f"{key}: out of memory"
        except Exception as error:  # noqa: BLE001 - whatever a peer raises belongs in the table
            row[key], row["note"] = None, f"{key}: {type(error).__name__}: {str(error)[:100]}"
        call = None
        model.zero_grad(set_to_none=True)
    release()
    return row


def verdicts(rows: list[Row]) -> list[str]:
    """For each dense model and measure, the cells of batch × length where it takes less time than CoLT5."""
    times = {(row["batch"], row["n"], row["model"]): row for row in rows}
    sentences = []
    for model, (name, mode) in itertools.product(MODELS[1:], MEASURES):
        faster, compared = [], 0
        for (batch, n, other), row in times.items():
            ours = times.get((batch, n, COLT5), {}).get(f"{name} {mode}")
            theirs = row.get(f"{name} {mode}")
            if other != model or ours is None or theirs is None:
                continue
            compared += 1
            if theirs < ours:
                faster.append(f"{batch} × {n:,} ({ours / theirs:.1f} times)")
        where = f"faster than CoLT5 at {', '.join(faster)}" if faster else "nowhere faster than CoLT5"
        sentences.append(f"{model}, {name}, {mode}: {where}; of {compared} compared.")
    return sentences


def main(arguments: Sequence[str] | None = None) -> None:
    """Verify, measure, and say where the dense models win."""
    options = parse(make_parser(__doc__), arguments)
    verify(options.tiny)
    table = Table("dense", TITLE, options)
    models = {name: make_encoder(name, options.tiny) for name in MODELS}
    cells = [(1, 32), (2, 64)] if options.tiny else [(batch, n) for n in LENGTHS for batch in BATCHES]
    for batch, n in cells:
        if time.perf_counter() > options.deadline:
            table.note(f"Not measured for lack of time: batch × length from {batch} × {n:,} on.")
            break
        for name, model in models.items():
            table.add({"batch": batch, "n": n, "model": name} | measure(model, batch, n, options.tiny))
    for sentence in verdicts(table.run["rows"]):
        table.note(sentence)
    table.finish()


if __name__ == "__main__":
    main()
