"""Encoders as people call them, without a graph or a compiler: CoLT5 beside its modules alone, LongT5 and dense peers.

python benchmarks/called.py
"""

import time
from collections.abc import Sequence
from unittest import mock

import torch
from encoder import BOTH, CAPTURED, FORWARD, both_call, check_mode, forward_call, release, verify
from measure import Call, captured, make_parser, median_ms, parse, peak_mib
from peers import COLT5, DENSE_T5, DEVICE, DTYPE, GLOBAL, LOCAL, MODERNBERT, make_encoder, random_ids, scaled_length
from results import Row, Table

from modeling_colt5 import layer_encoder

TITLE = (
    "Encoders of base size as they are called, bf16, random weights, no dropout, one input: median milliseconds of a "
    "call, and memory beyond weights, gradients and inputs. CoLT5's plain blocks run as straight lines of launches; "
    '"modules" is the same model with each module called. "Captured" is the call replayed as one CUDA graph, which no '
    "peer needs to be compared with: it says what the card alone takes"
)
MODULES, CALLED = "modules", "called"
# the most important first, where time ends early
LENGTHS = (16_384, 512, 4_096)
WAYS = (
    (COLT5, CALLED), (COLT5, MODULES), (COLT5, CAPTURED), (LOCAL, CALLED), (GLOBAL, CALLED), (DENSE_T5, CALLED),
    (MODERNBERT, CALLED),
)  # fmt: skip


def measure(model: torch.nn.Module, way: str, n: int, tiny: bool) -> Row:
    """Milliseconds and MiB of both passes; None where there is none, with the reason in the note."""
    row: Row = {}
    torch.manual_seed(0)
    ids = random_ids(1, n, tiny)
    cotangent = torch.randn(1, n, model.config.hidden_size, device=DEVICE, dtype=DTYPE)
    for name in (FORWARD, BOTH):
        try:
            with mock.patch.object(layer_encoder, "enabled", way != MODULES):
                call: Call | None = forward_call(model, ids, None)
                if name == BOTH:
                    call = both_call(model, ids, None, cotangent)
                call()
                if way == CAPTURED:
                    call = captured(call)
                else:
                    row[f"{name} peak MiB"] = peak_mib(call)
                row[f"{name} ms"] = median_ms(call, tiny)
        except torch.cuda.OutOfMemoryError:
            row[f"{name} ms"], row["note"] = None, f"{name}: out of memory"
        except Exception as error:  # noqa: BLE001 - whatever a peer raises belongs in the table
            row[f"{name} ms"], row["note"] = None, f"{name}: {type(error).__name__}: {str(error)[:100]}"
        call = None
        model.zero_grad(set_to_none=True)
    release()
    return row


def verify_straight(model: torch.nn.Module, tiny: bool) -> None:
    """What is called gives what the modules give, in bf16."""
    ids = random_ids(1, scaled_length(4_096, tiny), tiny)
    with mock.patch.object(layer_encoder, "enabled", False):
        expected = forward_call(model, ids, None)()
    check_mode(forward_call(model, ids, None)(), expected)


def main(arguments: Sequence[str] | None = None) -> None:
    """Verify, then measure."""
    options = parse(make_parser(__doc__), arguments)
    verify(options.tiny)
    models = {name: make_encoder(name, options.tiny) for name in dict.fromkeys(name for name, _ in WAYS)}
    verify_straight(models[COLT5], options.tiny)
    table = Table("called", TITLE, options)
    cells = [(n, name, way) for n in (LENGTHS[:1] if options.tiny else LENGTHS) for name, way in WAYS]
    for position, (n, name, way) in enumerate(cells):
        if time.perf_counter() > options.deadline:
            rest = ", ".join(f"{name} {way} {n:,}" for n, name, way in cells[position:])
            table.note(f"Not measured for lack of time: {rest}.")
            break
        n = scaled_length(n, options.tiny)
        table.add({"n": n, "model": name, "way": way} | measure(models[name], way, n, options.tiny))
    table.finish()


if __name__ == "__main__":
    main()
