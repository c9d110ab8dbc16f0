"""Encoders as people call them, without a graph or a compiler: CoLT5 beside its modules alone, and beside its peers.

python benchmarks/called.py
python benchmarks/called.py --lengths 65536    # of these lengths alone
python benchmarks/called.py --models CoLT5 "Gated DeltaNet"    # of these models alone

Gated DeltaNet is measured where the package flash-linear-attention is installed.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from encoder import BOTH, CAPTURED, FORWARD, both_call, check_mode, forward_call, new_step, release, verify
from measure import Call, captured, make_parser, median_ms, parse, peak_mib
from peers import (
    BASE,
    COLT5,
    DENSE_T5,
    DEVICE,
    EUROBERT,
    GATED_DELTANET,
    GLOBAL,
    HAS_GATED_DELTANET,
    LED,
    LOCAL,
    MODERNBERT,
    MODERNBERT_FLEX,
    PEGASUS_X,
    T5GEMMA,
    TINY,
    make_encoder,
    random_ids,
    scaled_length,
)
from results import Row, Table

from modeling_colt5 import layer_encoder

TITLE = (
    "Encoders of base size as they are called, bf16, random weights, one input: median milliseconds of a call, and "
    "memory beyond weights, gradients and inputs. The backward pass makes new gradients. CoLT5's plain blocks run as "
    'straight lines of launches; "modules" is the same model with each module called. "Captured" is the call replayed '
    "as one CUDA graph, which no peer needs to be compared with: it says what the card alone takes. Without dropout, "
    "unless a row says otherwise"
)
MODULES, CALLED = "modules", "called"


@dataclass(frozen=True)
class Setting:
    """How an encoder is trained.

    Args:
        dropout_rate: of the model, in training mode where it is not 0.
        under_autocast: weights in fp32, and products in bf16 by autocast; else weights in bf16.
    """

    dropout_rate: float = 0.0
    under_autocast: bool = False

    def __str__(self) -> str:
        parts = [f"dropout {self.dropout_rate}"] if self.dropout_rate else []
        return ", ".join(parts + ["fp32 under bf16 autocast"] * self.under_autocast)


PLAIN = Setting()
# the most important first, where time ends early
LENGTHS = (16_384, 512, 4_096, 1_024, 65_536)
PEERS = (
    EUROBERT, MODERNBERT, GLOBAL, LOCAL, DENSE_T5, T5GEMMA, PEGASUS_X, LED, *[GATED_DELTANET] * HAS_GATED_DELTANET,
    MODERNBERT_FLEX,
)  # fmt: skip
WAYS = ((COLT5, CALLED), (COLT5, MODULES), (COLT5, CAPTURED), *((peer, CALLED) for peer in PEERS))
# of the first length alone
TRAINED = (Setting(dropout_rate=0.1), Setting(dropout_rate=0.1, under_autocast=True))


@dataclass(frozen=True)
class Cell:
    """A row: which model at which length, how it is called, and how it is trained."""

    n: int
    model: str
    way: str
    setting: Setting = PLAIN

    def __str__(self) -> str:
        return " ".join(filter(None, (self.model, self.way, f"{self.n:,}", str(self.setting))))


def cells(lengths: Sequence[int], models: Sequence[str]) -> list[Cell]:
    """All rows of these lengths and models; of the first length those of training as well."""
    first, *others = lengths
    rows = [Cell(first, *way) for way in WAYS]
    rows += [Cell(first, COLT5, way, setting) for setting in TRAINED for way in (CALLED, MODULES)]
    rows += [Cell(n, *way) for n in others for way in WAYS]
    # flex_attention has no backward pass on a CPU, and compiles for each length, for up to a minute
    wanted = [
        cell for cell in rows if cell.model in models and (cell.model != MODERNBERT_FLEX or DEVICE.type == "cuda")
    ]
    return sorted(wanted, key=lambda cell: cell.model == MODERNBERT_FLEX)


def measure(cell: Cell, model: torch.nn.Module, tiny: bool) -> Row:
    """Milliseconds and MiB of the passes; None where there is none, with the reason in the note."""
    n, setting = scaled_length(cell.n, tiny), cell.setting
    row: Row = {"n": n, "model": cell.model, "way": cell.way, "setting": str(setting)}
    torch.manual_seed(0)
    ids = random_ids(1, n, tiny)
    cotangent = torch.randn(1, n, (TINY if tiny else BASE)["d_model"], device=DEVICE, dtype=model.dtype)
    for name in (FORWARD, BOTH) if setting == PLAIN else (BOTH,):
        try:
            with (
                mock.patch.object(layer_encoder, "enabled", cell.way != MODULES),
                torch.autocast(DEVICE.type, torch.bfloat16, enabled=setting.under_autocast),
            ):
                call: Call | None = forward_call(model, ids, None)
                if name == BOTH:
                    call = both_call(model, ids, None, cotangent)
                call()
                if cell.way == CAPTURED:
                    call = captured(call)
                else:
                    row[f"{name} peak MiB"] = peak_mib(call)
                    call = new_step(call, model) if name == BOTH else call
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
    parser = make_parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of the inputs")
    parser.add_argument("--models", nargs="+", choices=(COLT5, *PEERS), default=(COLT5, *PEERS), help="these alone")
    options = parse(parser, arguments)
    verify(options.tiny)
    names = dict.fromkeys([COLT5, *options.models])
    models = {(name, PLAIN): make_encoder(name, options.tiny) for name in names}
    for setting in TRAINED:
        model = make_encoder(COLT5, options.tiny, dropout_rate=setting.dropout_rate).train()
        models[COLT5, setting] = model.float() if setting.under_autocast else model
    verify_straight(models[COLT5, PLAIN], options.tiny)
    table = Table("called", TITLE, options)
    # of a toy every length is the same
    rows = cells(options.lengths[:1] if options.tiny else options.lengths, options.models)
    for position, cell in enumerate(rows):
        if time.perf_counter() > options.deadline:
            table.note(f"Not measured for lack of time: {'; '.join(map(str, rows[position:]))}.")
            break
        table.add(measure(cell, models[cell.model, cell.setting], options.tiny))
    table.finish()


if __name__ == "__main__":
    main()
