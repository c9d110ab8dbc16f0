"""Routed against full cross-attention, by the memory's length: a decoder of base size, all its layers; verified first.

python benchmarks/cross_attention.py
"""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measure import Call, gpu_ms, make_parser, median_ms, parse, peak_mib
from peers import DEVICE, DTYPE, colt5_config, random_ids, scaled_length
from results import Row, Table
from transformers.cache_utils import EncoderDecoderCache, StaticCache

from modeling_colt5.model_decoder import CoLT5Decoder

LENGTHS = (16_384, 131_072, 1_048_576)
BUDGET, TARGET = 4096, 512
# of the static self-attention cache: every call that is timed adds a token
STEPS = 256
FULL, ROUTED, ASKING = "full", "routed", "asking"
# of what each token of the decoder chooses itself
OWN_BUDGET = 64
# bf16 rounds by 2^-9 at most, in each of the layers a few times
TOLERANCE = 2e-2
TITLE = (
    f"Cross-attention of a base-size decoder (12 layers, one key/value head, bf16, batch 1) to a memory of n tokens: "
    f"full; routed with a budget of {BUDGET:,} tokens a layer; asking, where each token of the decoder chooses "
    f"{OWN_BUDGET} by its queries and their keys. Decoding {TARGET} tokens, and their gradients to "
    "the memory and all weights, eager: median milliseconds, and peak MiB beyond weights and memory; one more token "
    "with static caches: eager, and GPU time of a CUDA graph; MiB of all cross-attention caches"
)


def make_decoder(kind: str, tiny: bool, budget: int = BUDGET, **fields: Any) -> CoLT5Decoder:
    """A decoder with random weights."""
    if kind == ROUTED:
        fields["routed_cross_key_values"] = scaled_length(budget, tiny)
    if kind == ASKING:
        fields |= {"routed_cross_key_values": 4 if tiny else OWN_BUDGET, "asking_cross_routing": True}
    torch.manual_seed(0)
    with DEVICE:
        return CoLT5Decoder(colt5_config(tiny, **fields)).to(DTYPE).eval()


def make_memory(n: int, d_model: int) -> torch.Tensor:
    """Normalised states [1, n, d_model]."""
    return torch.randn(1, n, d_model, device=DEVICE, dtype=DTYPE)


def both(decoder: CoLT5Decoder, ids: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The decoder's states and the memory's gradient; the weights' gradients are taken as well."""
    memory = memory.detach().requires_grad_()
    decoder.zero_grad(set_to_none=True)
    states = decoder(ids, encoder_hidden_states=memory, use_cache=False)[0]
    # not all ones: they would leave little of the gradient behind a norm
    states.backward(torch.linspace(-1, 1, states.shape[-1], device=DEVICE).to(DTYPE).expand_as(states))
    return states, memory.grad


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def verify(tiny: bool) -> None:
    """Raise where a budget that covers the memory is not full cross-attention, or kernels and references differ."""
    n = scaled_length(8192, tiny)
    ids = random_ids(1, 32, tiny)
    full, covered = make_decoder(FULL, tiny), make_decoder(ROUTED, tiny, 8192)
    covered.load_state_dict(full.state_dict(), strict=False)
    bound, reference = (make_decoder(ROUTED, tiny, 2048, kernel_backend=kind) for kind in ("auto", "torch"))
    memory = make_memory(n, full.config.d_model)
    for what, ours, theirs in (("covering budget", covered, full), ("kernels", bound, reference)):
        for part, actual, expected in zip(
            ("states", "gradient"), both(ours, ids, memory), both(theirs, ids, memory), strict=True
        ):
            error = relative_error(actual, expected)
            if not error < TOLERANCE:
                raise AssertionError(f"{what}, {part}: relative error {error:.1e}")


@torch.no_grad()
def verify_choice(decoder: CoLT5Decoder, memory: torch.Tensor) -> None:
    """Raise where a layer did not choose the largest scores of the whole memory, up to rounding."""
    layers = decoder(
        random_ids(1, 1, True), encoder_hidden_states=memory, use_cache=False, output_routing=True
    ).cross_routing
    for i, (tokens,) in enumerate(layers):
        router = decoder.cross_routing.routers[i].weight.float()
        scores = torch.cat([part.float() @ router for part in memory[0].split(65_536)])
        chosen = scores[tokens.indices[0]]
        if not chosen.min() >= scores.topk(len(chosen)).values[-1] - 1e-3:
            raise AssertionError(f"layer {i}: a score of {chosen.min():.3f} was chosen before larger ones")


def step_call(decoder: CoLT5Decoder, memory: torch.Tensor, tiny: bool) -> tuple[Call, float]:
    """A call that decodes one more token with static caches, and the size of the cross-attention caches in MiB."""
    caches = [StaticCache(config=decoder.config, max_cache_len=length) for length in (STEPS, memory.shape[1])]
    inputs = {"encoder_hidden_states": memory, "cache": EncoderDecoderCache(*caches)}
    decoder(random_ids(1, 16, tiny), **inputs)
    held = sum(part.nbytes for layer in caches[1].layers for part in (layer.keys, layer.values))
    ids = random_ids(1, 1, tiny)
    return lambda: decoder(ids, **inputs)[0], held / 2**20


def measure(decoder: CoLT5Decoder, memory: torch.Tensor, tiny: bool) -> Row:
    """The columns of one row; None where there is none, with the reason in the note."""
    row: Row = {}
    ids = random_ids(1, TARGET // 64 if tiny else TARGET, tiny)

    def attempt(name: str, value: Callable[[], float | None]) -> None:
        try:
            row[name] = value()
        except Exception as error:  # noqa: BLE001 - what does not fit belongs in the table
            row[name], row["note"] = None, f"{name}: {type(error).__name__}: {str(error)[:100]}"

    def forward() -> object:
        with torch.no_grad():
            return decoder(ids, encoder_hidden_states=memory, use_cache=False)

    for name, call in (("forward", forward), ("fwd+bwd", lambda: both(decoder, ids, memory))):
        attempt(f"{name} ms", lambda call=call: median_ms(call, tiny))
        decoder.zero_grad(set_to_none=True)
        attempt(f"{name} peak MiB", lambda call=call: peak_mib(call))
        decoder.zero_grad(set_to_none=True)
    with torch.no_grad():
        step, row["cross cache MiB"] = step_call(decoder, memory, tiny)
        attempt("step ms", lambda: median_ms(step, tiny))
        attempt("step GPU ms", lambda: gpu_ms(step, tiny=tiny))
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Verify, then measure the lengths, each with all kinds."""
    options = parse(make_parser(__doc__), arguments)
    verify(options.tiny)
    table = Table("cross_attention", TITLE, options)
    for n, kind in itertools.product(LENGTHS, (FULL, ROUTED, ASKING)):
        if time.perf_counter() > options.deadline:
            table.note(f"Not measured for lack of time: {kind} at {n:,} tokens, and what follows.")
            break
        decoder = make_decoder(kind, options.tiny)
        memory = make_memory(scaled_length(n, options.tiny), decoder.config.d_model)
        if kind == ROUTED:
            verify_choice(decoder, memory)
        table.add({"cross-attention": kind, "n": memory.shape[1], **measure(decoder, memory, options.tiny)})
    table.finish()


if __name__ == "__main__":
    main()
