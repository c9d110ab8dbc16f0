"""Generation from a 16,384-token input through `generate`: time between tokens, CoLT5 beside LongT5 and T5Gemma.

python benchmarks/generation.py
python benchmarks/generation.py --documents    # seven documents one after another, in a process of its own
"""

import argparse
import contextlib
import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from encoder import release, verify
from measure import make_parser, parse, synchronize
from peers import COLT5, DTYPE, GLOBAL, T5GEMMA, make_seq2seq, random_ids, scaled_length
from results import Row, Table
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput

from modeling_colt5.run_release import CACHE

TITLE = (
    "Generation of 128 tokens through `generate`, base size, bf16, random weights, greedy but for beams: milliseconds "
    "between tokens (the mean of a run from the ninth token on, the median of the runs), and, apart from them, "
    "seconds to the first token and of the first call, with all that it compiles. The static cache's step is compiled "
    "by `generate` itself. Without a model: the same call of a model that computes nothing"
)
DOCUMENTS_TITLE = (
    "Seven documents of different lengths, one after another, through `generate` as it is called, base size, bf16, "
    "random weights, greedy: seconds of each call, the first one of a process whose kernels are compiled included"
)
DYNAMIC, STATIC, NOTHING = "dynamic", "static", "without a model"
# (model, batch, cache, beams), the most important first
CASES = (
    (COLT5, 1, DYNAMIC, 1),
    (COLT5, 1, NOTHING, 1),
    (GLOBAL, 1, DYNAMIC, 1),
    (COLT5, 8, DYNAMIC, 1),
    (COLT5, 1, DYNAMIC, 8),
    (COLT5, 1, NOTHING, 8),
    (COLT5, 8, NOTHING, 1),
    (GLOBAL, 8, DYNAMIC, 1),
    (GLOBAL, 1, DYNAMIC, 8),
    (T5GEMMA, 1, DYNAMIC, 1),
    (T5GEMMA, 8, DYNAMIC, 1),
    (T5GEMMA, 1, DYNAMIC, 8),
    (COLT5, 1, STATIC, 1),
    (COLT5, 8, STATIC, 1),
)
# tokens of a document, and new ones
DOCUMENTS = ((16_384, 128), (9_001, 100), (12_345, 128), (3_000, 64), (700, 128), (5_120, 90), (15_000, 128))
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


@contextlib.contextmanager
def computing_nothing(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model gives the same logits whatever it is asked: what a call takes then is generate's own."""
    logits: dict[int, torch.Tensor] = {}

    @functools.wraps(model.forward)
    def forward(*args: Any, **kwargs: Any) -> Seq2SeqLMOutput:
        rows = len(kwargs["decoder_input_ids"])
        if rows not in logits:
            logits[rows] = torch.zeros(rows, 1, model.config.vocab_size, device=model.device)
            # not the end token, whose number is 1
            logits[rows][..., 2] = 1
        return Seq2SeqLMOutput(logits=logits[rows], **{CACHE: kwargs[CACHE]})

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def generate(
    model: PreTrainedModel, ids: torch.Tensor, cache: str, tokens: int, beams: int = 1
) -> tuple[torch.Tensor, float, float]:
    """The tokens [batch, tokens], the mean milliseconds between the later ones, and the seconds of the whole call."""
    clock = StepClock()
    synchronize()
    start = time.perf_counter()
    sequences = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens if beams > 1 else None,
        do_sample=False,
        num_beams=beams,
        cache_implementation=STATIC if cache == STATIC else None,
        logits_processor=LogitsProcessorList([clock]),
    )
    synchronize()
    seconds = time.perf_counter() - start
    assert sequences.shape[1] == tokens + 1, f"{sequences.shape[1] - 1} tokens instead of {tokens}"
    steps = clock.times[min(SKIPPED, tokens - 1) :]
    return sequences[:, 1:], 1e3 * (steps[-1] - steps[0]) / max(1, len(steps) - 1), seconds


def measure(
    model: PreTrainedModel, ids: torch.Tensor, cache: str, tokens: int, beams: int, runs: int
) -> tuple[Row, torch.Tensor]:
    """One row's times, and the tokens."""
    with computing_nothing(model) if cache == NOTHING else contextlib.nullcontext():
        first_call = generate(model, ids, cache, tokens, beams)[2]
        repeats = [generate(model, ids, cache, tokens, beams) for _ in range(runs)]
        prefill = statistics.median(generate(model, ids, DYNAMIC, 1, beams)[2] for _ in range(runs))
    step = statistics.median(milliseconds for _, milliseconds, _ in repeats)
    row: Row = {"ms/token": step, "first token s": prefill, "first call s": first_call}
    if not torch.equal(repeats[0][0], repeats[1][0]):
        row["note"] = "two runs gave different tokens"
    return row, repeats[0][0]


def measure_documents(options: argparse.Namespace) -> None:
    """The calls of one process after another."""
    table = Table("generation_documents", DOCUMENTS_TITLE, options)
    model = make_model(COLT5, options.tiny)
    for length, tokens in DOCUMENTS:
        length, tokens = (scaled_length(length, options.tiny), min(tokens, 4 if options.tiny else tokens))
        seconds = generate(model, random_ids(1, length, options.tiny), DYNAMIC, tokens)[2]
        table.add({"input": length, "new tokens": tokens, "s": seconds})
    table.finish()


def main(arguments: Sequence[str] | None = None) -> None:
    """Verify, then measure; the caches' first tokens must agree."""
    parser = make_parser(__doc__)
    parser.add_argument("--documents", action="store_true", help="seven documents instead, in a table of its own")
    options = parse(parser, arguments)
    length, tokens, runs = (64, 12, 2) if options.tiny else (16_384, 128, 3)
    if options.documents:
        measure_documents(options)
        return
    verify(options.tiny)
    table = Table("generation", TITLE, options)
    models: dict[str, PreTrainedModel] = {}
    first_tokens: dict[tuple[str, int], torch.Tensor] = {}
    for position, (name, batch, cache, beams) in enumerate(CASES):
        if time.perf_counter() > options.deadline:
            rest = ", ".join(f"{name} {batch} {cache} {beams}" for name, batch, cache, beams in CASES[position:])
            table.note(f"Not measured for lack of time: {rest}.")
            break
        if name not in models:
            models[name] = make_model(name, options.tiny)
        row: Row = {"model": name, "batch": batch, "input": length, "cache": cache, "beams": beams}
        torch.manual_seed(0)
        ids = random_ids(batch, length, options.tiny)
        try:
            times, generated = measure(models[name], ids, cache, tokens, beams, runs)
            if cache != NOTHING and beams == 1:
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
