"""Generation on the CPU, base width, 4 + 4 layers, fp32: time between tokens, CoLT5 beside LongT5, and generate's own.

python benchmarks/generation_cpu.py [--length 4096] [--rounds 6]

Threads that wait by spinning disturb the times where other work shares the cores: OMP_WAIT_POLICY=PASSIVE.
"""

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from generation import SKIPPED, computing_nothing
from measure import make_parser, parse
from peers import COLT5, GLOBAL, TINY, colt5_config, longt5_config
from results import Table
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    LogitsProcessor,
    LogitsProcessorList,
    LongT5ForConditionalGeneration,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput

from modeling_colt5 import CoLT5ForConditionalGeneration
from modeling_colt5.run_release import CACHE

TITLE = (
    "Greedy generation on the CPU, base width, 4 + 4 layers, fp32, random weights, from one document: milliseconds "
    "between tokens, medians and lower quartiles over the steps of all rounds, the cases in turns. The last rows are "
    "what generate itself takes"
)
DEFAULT, PLAIN, NOTHING = "as generate makes it", "Transformers' dynamic", "none, the model computes nothing"


@dataclass
class Case:
    """One row: a model, the cache of its calls, a number of beams, and the times between tokens so far."""

    model: str
    cache: str
    beams: int
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


CASES = [
    (COLT5, DEFAULT, 1),
    (GLOBAL, DEFAULT, 1),
    (COLT5, PLAIN, 1),
    (COLT5, DEFAULT, 4),
    (GLOBAL, DEFAULT, 4),
    (COLT5, PLAIN, 4),
    (COLT5, NOTHING, 1),
    (GLOBAL, NOTHING, 1),
]


class StepClock(LogitsProcessor):
    """Notes the wall and CPU time at each step's logits, and leaves them as they are."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.times.append((time.perf_counter(), time.process_time()))
        return scores


def make_model(name: str, tiny: bool) -> PreTrainedModel:
    """A model with random weights, in evaluation mode."""
    torch.manual_seed(0)
    layers = TINY["num_layers"] if tiny else 4
    if name == COLT5:
        config = colt5_config(tiny, num_layers=layers, num_decoder_layers=layers)
        return CoLT5ForConditionalGeneration(config).eval()
    config = longt5_config(name, tiny)
    config.num_layers = config.num_decoder_layers = layers
    return LongT5ForConditionalGeneration(config).eval()


def generate(model: PreTrainedModel, memory: torch.Tensor, cache: str, **options: Any) -> Any:
    """A greedy call of `generate` behind an encoded document [1, n, d_model]."""
    tokens = options.pop("tokens")
    if cache == PLAIN:
        options[CACHE] = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    return model.generate(
        # its own for each call: for beams Transformers writes into it
        encoder_outputs=BaseModelOutput(memory),
        attention_mask=torch.ones(memory.shape[:2], dtype=torch.int64),
        max_new_tokens=tokens,
        # the end token is never chosen
        min_new_tokens=tokens,
        do_sample=False,
        **options,
    )


@torch.no_grad()
def verify(model: PreTrainedModel, memory: torch.Tensor, tokens: int) -> None:
    """Check each step of what is timed against recomputation without a cache.

    Raises:
        AssertionError: where logits or beams differ by more than rounding.
    """
    returned = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    for cache in (DEFAULT, PLAIN):
        output = generate(model, memory, cache, tokens=tokens, **returned)
        for step, logits in enumerate(output.logits, start=1):
            given = {"decoder_input_ids": output.sequences[:, :step], "use_cache": False}
            expected = model(encoder_outputs=BaseModelOutput(memory), **given).logits[:, -1]
            # fp32 sums in another order, through four layers
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        beams = generate(model, memory, cache, tokens=tokens, num_beams=4, **returned)
        uncached = generate(model, memory, DEFAULT, tokens=tokens, num_beams=4, use_cache=False, **returned)
        for scores, expected in zip(beams.scores, uncached.scores, strict=True):
            real = expected.isfinite()
            torch.testing.assert_close(scores[real], expected[real], rtol=0, atol=1e-4)
    print("verified: every step equals recomputation without a cache, beams too", flush=True)


def measure(model: PreTrainedModel, memory: torch.Tensor, case: Case, tokens: int) -> None:
    """Add the times between the later tokens of one call."""
    clock = StepClock()
    options = {"num_beams": case.beams, "logits_processor": LogitsProcessorList([clock])}
    with computing_nothing(model) if case.cache == NOTHING else contextlib.nullcontext():
        generate(model, memory, case.cache, tokens=tokens, **options)
    times = clock.times[min(SKIPPED, tokens - 2) :]
    for before, after in zip(times, times[1:], strict=False):
        case.wall.append(1e3 * (after[0] - before[0]))
        case.cpu.append(1e3 * (after[1] - before[1]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Verify, then measure all cases in turns, so that a change of the machine's load meets all alike."""
    parser = make_parser(__doc__)
    parser.add_argument("--length", type=int, default=4096, help="tokens of the document")
    parser.add_argument("--rounds", type=int, default=6)
    options = parse(parser, arguments, needs_gpu=False)
    length, rounds, tokens = (64, 2, 12) if options.tiny else (options.length, options.rounds, 40)
    load = os.getloadavg()[0]
    models = {name: make_model(name, options.tiny) for name in (COLT5, GLOBAL)}
    memories = {}
    with torch.no_grad():
        ids = torch.randint(2, models[COLT5].config.vocab_size, (1, length))
        for name, model in models.items():
            memories[name] = model.get_encoder()(input_ids=ids).last_hidden_state
    verify(models[COLT5], memories[COLT5], tokens=8 if options.tiny else 16)
    table = Table("generation_cpu", f"{TITLE}; {os.cpu_count()} cores, load {load:.1f} before", options)
    cases = [Case(*case) for case in CASES]
    done = 0
    while done < rounds and (done == 0 or time.perf_counter() < options.deadline):
        for case in cases:
            measure(models[case.model], memories[case.model], case, tokens)
        done += 1
    for case in cases:
        table.add(
            {
                "model": case.model,
                "document": length,
                "cache": case.cache,
                "beams": case.beams,
                "ms/token": median(case.wall),
                "lower quartile": sorted(case.wall)[len(case.wall) // 4],
                # another process on the same cores stretches the wall time, but hardly the CPU time
                "CPU ms/token": median(case.cpu),
                "steps": len(case.wall),
            }
        )
    if done < rounds:
        table.note(f"{done} of {rounds} rounds, for lack of time.")
    table.finish()


if __name__ == "__main__":
    main()
