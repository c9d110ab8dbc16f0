"""What first calls cost, of base size: kernels compiled with an empty cache, loaded from a full one, and new lengths.

python benchmarks/first_calls.py
"""

import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from encoder import verify
from measure import make_parser, parse, synchronize
from peers import DEVICE, DTYPE, colt5_config, random_ids, scaled_length
from results import Row, Table

from modeling_colt5 import CoLT5EncoderModel, CoLT5ForConditionalGeneration

TOKENS, TARGET, LONGEST = 16_384, 512, 65_536
# calls of random lengths: the first ones may compile, and a later one that takes so many seconds was a pause
FIRST, LATER, PAUSE = 10, 150, 0.3
FORWARD, STEP, LENGTHS = "encoder forward", "training step", "encoder forward, random lengths"
EMPTY, FULL = "empty", "full"
# the most important first: a run that is short of time leaves out the last
CASES = ((FORWARD, EMPTY), (STEP, EMPTY), (LENGTHS, EMPTY), (FORWARD, FULL), (STEP, FULL))
TITLE = (
    f"First calls, base size, batch 1, each case in a process of its own that has already multiplied two matrices. "
    f"Encoder forward: {TOKENS:,} tokens, bf16 weights. Training step: {TOKENS:,} tokens to {TARGET}, fp32 weights "
    "under bf16 autocast, dropout 0.1, the loss and all gradients. Cache: Triton's folder of compiled kernels, empty "
    "or as the same case left it. Kernels: how many are in that folder afterwards, and of the kernel with the most "
    f"variants how many. Random lengths: {FIRST + LATER} calls of up to {LONGEST:,} tokens; a pause is a call of more "
    f"than {PAUSE} s"
)


def seconds_of_encoder(lengths: Sequence[int], tiny: bool) -> list[float]:
    """How long each call of an encoder takes, one length after another."""
    model = CoLT5EncoderModel(colt5_config(tiny)).to(DEVICE, DTYPE).eval()
    seconds = []
    for n in lengths:
        ids = random_ids(1, n, tiny)
        synchronize()
        began = time.perf_counter()
        with torch.no_grad():
            model(ids)
        synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds


def seconds_of_steps(count: int, tiny: bool) -> list[float]:
    """How long each training step takes."""
    model = CoLT5ForConditionalGeneration(colt5_config(tiny, dropout_rate=0.1)).to(DEVICE).train()
    ids, labels = (random_ids(1, scaled_length(n, tiny), tiny) for n in (TOKENS, TARGET))
    seconds = []
    for _ in range(count):
        model.zero_grad(set_to_none=True)
        synchronize()
        began = time.perf_counter()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds


def seconds_of(call: str, cache: Path, tiny: bool) -> list[float]:
    """The times of a case's calls, in a process that has made no call before, with Triton's cache in a folder."""
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    ready = torch.ones(64, 64, device=DEVICE, dtype=DTYPE)
    torch.mm(ready, ready)
    if call == STEP:
        return seconds_of_steps(2, tiny)
    if call == FORWARD:
        return seconds_of_encoder([scaled_length(TOKENS, tiny)] * 2, tiny)
    drawn = random.Random(0)
    # short and long ones alike
    lengths = [round(2 ** drawn.uniform(4, LONGEST.bit_length() - 1)) for _ in range(FIRST + LATER)]
    return seconds_of_encoder([max(1, scaled_length(n, tiny)) for n in lengths], tiny)


def describe(call: str, cache: str, seconds: Sequence[float], folder: Path) -> Row:
    """A row of the table."""
    row: Row = {"call": call, "cache": cache, "first s": seconds[0]}
    if call == LENGTHS:
        early, late = ([each for each in part if each > PAUSE] for part in (seconds[:FIRST], seconds[FIRST:]))
        row["pauses"] = f"{len(early)} in the first {FIRST} calls, {len(late)} in the next {LATER}"
        row["longest after the first s"] = max(seconds[1:])
    else:
        row["second s"] = seconds[1]
    kernels = Counter(file.stem for file in folder.glob("*/*.cubin"))
    if kernels:
        row |= {"kernels": kernels.total(), "most variants": max(kernels.values())}
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Verify, then measure each case in a new process."""
    options = parse(make_parser(__doc__), arguments)
    verify(options.tiny)
    table = Table("first_calls", TITLE, options)
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for call, cache in CASES:
            if time.perf_counter() > options.deadline:
                table.note(f"Not measured for lack of time: {call} with a cache that is {cache}, and what follows.")
                break
            own = Path(folder) / call
            with ProcessPoolExecutor(1, context) as process:
                seconds = process.submit(seconds_of, call, own, options.tiny).result()
            table.add(describe(call, cache, seconds, own))
    table.finish()


if __name__ == "__main__":
    main()
