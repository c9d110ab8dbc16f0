"""Greedy generation from a 16,384-token input through `generate`: time between tokens, CoLT5 beside LongT5.

python benchmarks/generation.py
"""

import statistics
import time
from collections.abc import Sequence

import torch
from encoder import release, verify
from measure import make_parser, parse, synchronize
from peers import COLT5, DTYPE, GLOBAL, make_seq2seq, random_ids
from results import Row, Table
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

TITLE = (
    "Greedy generation of 128 tokens through `generate`, base size, bf16, random weights: milliseconds between tokens "
    "(the mean of a run from the ninth token on, the median of the runs), and, apart from them, seconds to the first "
    "token and of the first call, with all that it compiles. The static cache's step is compiled by `generate` itself"
)
DYNAMIC, STATIC = "dynamic", "static"
# (model, batch, cache), the most important first
CASES = (
    (COLT5, 1, DYNAMIC),
    (GLOBAL, 1, DYNAMIC),
    (COLT5, 1, STATIC),
    (COLT5, 8, DYNAMIC),
    (COLT5, 8, STATIC),
    (GLOBAL, 8, DYNAMIC),
)
# the first ones after the prompt warm up: caches are made, graphs are recorded
SKIPPED = 8


class StepClock(LogitsProcessor):
    """Notes when each step's logits come by, and leaves them as they are."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.times.append(time.perf_counter())
        return scores


def make_model(name: str, tiny: bool) -> PreTrainedModel:
    """A model that never generates the end token, so that every run has all its tokens."""
    model = make_seq2seq(name, tiny).to(DTYPE)
    with torch.no_grad():
        # the end token's logit is then 0, and some other's is above
        model.get_output_embeddings().weight[model.config.eos_token_id] = 0
    return model


def generate(model: PreTrainedModel, ids: torch.Tensor, cache: str, tokens: int) -> tuple[torch.Tensor, float, float]:
    """The tokens [batch, tokens], the mean milliseconds between the later ones, and the seconds of the whole call."""
    clock = StepClock()
    synchronize()
    start = time.perf_counter()
    sequences = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        cache_implementation=None if cache == DYNAMIC else cache,
        logits_processor=LogitsProcessorList([clock]),
    )
    synchronize()
    seconds = time.perf_counter() - start
    assert sequences.shape[1] == tokens + 1, f"{sequences.shape[1] - 1} tokens instead of {tokens}"
    steps = clock.times[min(SKIPPED, tokens - 1) :]
    return sequences[:, 1:], 1e3 * (steps[-1] - steps[0]) / max(1, len(steps) - 1), seconds


def measure(model: PreTrainedModel, ids: torch.Tensor, cache: str, tokens: int, runs: int) -> tuple[Row, torch.Tensor]:
    """One row's times, and the tokens."""
    first_call = generate(model, ids, cache, tokens)[2]
    repeats = [generate(model, ids, cache, tokens) for _ in range(runs)]
    prefill = statistics.median(generate(model, ids, DYNAMIC, 1)[2] for _ in range(runs))
    step = statistics.median(milliseconds for _, milliseconds, _ in repeats)
    row: Row = {"ms/token": step, "first token s": prefill, "first call s": first_call}
    if not torch.equal(repeats[0][0], repeats[1][0]):
        row["note"] = "two runs gave different tokens"
    return row, repeats[0][0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Verify, then measure; the caches' first tokens must agree."""
    options = parse(make_parser(__doc__), arguments)
    length, tokens, runs = (64, 12, 2) if options.tiny else (16_384, 128, 3)
    verify(options.tiny)
    table = Table("generation", TITLE, options)
    models: dict[str, PreTrainedModel] = {}
    first_tokens: dict[tuple[str, int], torch.Tensor] = {}
    for position, (name, batch, cache) in enumerate(CASES):
        if time.perf_counter() > options.deadline:
            rest = ", ".join(f"{name} {batch} {cache}" for name, batch, cache in CASES[position:])
            table.note(f"Not measured for lack of time: {rest}.")
            break
        if name not in models:
            models[name] = make_model(name, options.tiny)
        row: Row = {"model": name, "batch": batch, "input": length, "cache": cache}
        torch.manual_seed(0)
        ids = random_ids(batch, length, options.tiny)
        try:
            times, generated = measure(models[name], ids, cache, tokens, runs)
            # rounding in bf16 may part two caches' sequences later on, not at their first token
            first = first_tokens.setdefault((name, batch), generated[:, 0])
            assert torch.equal(first, generated[:, 0]), "the caches' first tokens differ"
            row |= times
        except torch.cuda.OutOfMemoryError:
            row["note"] = "out of memory"
        except Exception as error:  # noqa: BLE001 - one case that fails must not lose the others' numbers
            row["note"] = f"{type(error).__name__}: {str(error)[:200]}"
        table.add(row)
        release()
    table.finish()


if __name__ == "__main__":
    main()
