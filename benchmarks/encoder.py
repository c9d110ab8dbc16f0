"""Base-size encoders: time and memory against length, CoLT5 beside LongT5 of the installed Transformers.

python benchmarks/encoder.py
"""

import copy
import functools
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from measure import Call, captured, gpu_ms, make_parser, matrix_rate, median_ms, parse, peak_mib
from peers import COLT5, DEVICE, DTYPE, GLOBAL, LOCAL, colt5_config, make_encoder, random_ids, scaled_length
from results import Row, Table

from modeling_colt5 import CoLT5EncoderModel, layer_encoder, model_router
from modeling_colt5.encoder_costs import encoder_flops

EAGER = "eager"
CAPTURED, COMPILED, COMPILED_CAPTURED = "captured", "compiled", "compiled, captured"
FORWARD, BOTH = "forward", "fwd+bwd"

TITLE = (
    "Base-size encoders, bf16, random weights, no dropout: median milliseconds of a call. Eager: as it is called; "
    "captured: the eager call's kernels replayed as one CUDA graph; compiled: `torch.compile(mode="
    '"reduce-overhead")`; compiled, captured: what `torch.compile` makes, replayed as one graph. '
    "The backward pass makes new gradients. Memory: peak beyond weights, gradients and inputs. Share: the rate of the "
    "forward pass (arithmetic over time) as a part of the rate of a large product of bf16 matrices"
)


@dataclass(frozen=True)
class Case:
    """A row: which model at which batch and length, how it is run, and which of its passes are timed."""

    model: str
    batch: int
    n: int
    mode: str = EAGER
    passes: tuple[str, ...] = (FORWARD, BOTH)


# the most important first: a run that is short of time leaves out the last
CASES = (
    Case(COLT5, 1, 16_384),
    Case(COLT5, 1, 16_384, CAPTURED),
    Case(COLT5, 1, 65_536),
    Case(COLT5, 1, 65_536, CAPTURED),
    Case(GLOBAL, 1, 16_384),
    Case(LOCAL, 1, 16_384),
    Case(LOCAL, 1, 65_536),
    Case(COLT5, 1, 1_048_576, EAGER, (FORWARD,)),
    Case(COLT5, 1, 16_384, COMPILED, (FORWARD,)),
    Case(COLT5, 1, 4096),
    Case(COLT5, 1, 4096, CAPTURED),
    Case(COLT5, 8, 4096),
    Case(COLT5, 8, 4096, CAPTURED),
    Case(COLT5, 1, 262_144, EAGER, (FORWARD,)),
    Case(GLOBAL, 1, 4096),
    Case(LOCAL, 1, 4096),
    Case(GLOBAL, 8, 4096),
    Case(LOCAL, 8, 4096),
    Case(GLOBAL, 1, 32_768),
    Case(GLOBAL, 1, 65_536),
    Case(LOCAL, 1, 262_144, EAGER, (FORWARD,)),
    Case(LOCAL, 1, 1_048_576, EAGER, (FORWARD,)),
    Case(COLT5, 1, 16_384, COMPILED, (BOTH,)),
    Case(COLT5, 1, 16_384, COMPILED_CAPTURED),
)


@functools.cache
def verify(tiny: bool) -> None:
    """What is timed gives what PyTorch's written-out attention and operations give, in fp32; once a process.

    Raises:
        AssertionError: where the output or a gradient differs by more than rounding.
    """
    torch.manual_seed(0)
    n, short = (90, 61) if tiny else (3000, 2210)
    with DEVICE:
        model = CoLT5EncoderModel(colt5_config(tiny, num_layers=2 if tiny else 3, vocab_size=512)).eval()
        ids = torch.randint(2, 512, (2, n))
        mask = (torch.arange(n) < torch.tensor([[n], [short]])).long()
        cotangent = torch.randn(2, n, model.config.d_model) * mask[..., None]
    results = []
    for backend, attention in (("torch", "eager"), ("auto", "sdpa")):
        model.config.kernel_backend = backend
        model.set_attn_implementation(attention)
        model.zero_grad()
        output = model(input_ids=ids, attention_mask=mask).last_hidden_state
        (output * cotangent).sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        results.append({"output": output.detach() * mask[..., None], **gradients})
    for name, expected in results[0].items():
        error = ((results[1][name] - expected).norm() / expected.norm()).item()
        # a token whose score is within rounding of the last routed one may change places: rare, and then visible here
        assert error < 1e-3, f"{name}: relative error {error:.2e} between what is timed and the reference"
    print("verified: outputs and all gradients are those of the PyTorch reference, in fp32", flush=True)


def forward_call(model: Callable, ids: torch.Tensor, mask: torch.Tensor | None) -> Call:
    """The forward pass without gradients."""

    def call() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask).last_hidden_state

    return call


def both_call(model: Callable, ids: torch.Tensor, mask: torch.Tensor | None, cotangent: torch.Tensor) -> Call:
    """Forward and backward; gradients are added to what is there."""

    def call() -> None:
        model(input_ids=ids, attention_mask=mask).last_hidden_state.backward(cotangent)

    return call


def check_mode(output: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise where the output is not the eager call's."""
    error = ((output.float() - expected.float()).norm() / expected.float().norm()).item()
    # in bf16 a compiler rounds in other places, which changes some of the tokens routed in later layers; outputs that
    # have nothing to do with each other differ by 1.4
    assert error < 0.3, f"the output differs from the eager call's by {error:.2f}"


def release() -> None:
    """Give back what is not used any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compiled(model: torch.nn.Module, mode: str, tiny: bool) -> torch.nn.Module:
    """A compiled copy: compiling leaves its marks on a module, and code for other lengths behind."""
    torch.compiler.reset()
    options = {"mode": "reduce-overhead"} if mode == COMPILED else {}
    return torch.compile(copy.deepcopy(model), dynamic=False, **({"backend": "eager"} if tiny else options))


def new_step(call: Call, module: torch.nn.Module) -> Call:
    """A call that begins as a training loop's step does: nothing of the last one is needed any more."""
    # as an optimizer knows them: the module would look for them at each call
    parameters = list(module.parameters())

    def step() -> object:
        torch.compiler.cudagraph_mark_step_begin()
        for parameter in parameters:
            parameter.grad = None
        return call()

    return step


def measure(case: Case, model: torch.nn.Module, tiny: bool) -> Row:
    """One row; a pass that fails (out of memory, does not compile) says so in the row's note."""
    n = scaled_length(case.n, tiny)
    row: Row = {"model": case.model, "batch": case.batch, "n": n, "mode": case.mode}
    torch.manual_seed(0)
    ids = random_ids(case.batch, n, tiny)
    mask = torch.ones_like(ids)
    cotangent = torch.randn(case.batch, n, model.config.d_model, device=DEVICE, dtype=DTYPE)
    for name in case.passes:
        try:
            module = compiled(model, case.mode, tiny) if "compiled" in case.mode else model
            forward = forward_call(module, ids, mask)
            both = both_call(module, ids, mask, cotangent)
            call = forward if name == FORWARD else new_step(both, module)
            call()
            if "captured" in case.mode:
                call = captured(call)
            if case.mode != EAGER and name == FORWARD:
                output = call()
                check_mode(output[0] if isinstance(output, list) else output, forward_call(model, ids, mask)())
                del output
            # the gradients are there already: they are not activations
            if case.mode == EAGER:
                row[f"{name} peak MiB"] = peak_mib(forward if name == FORWARD else both)
            row[f"{name} ms"] = median_ms(call, tiny)
        except torch.cuda.OutOfMemoryError:
            row["note"] = f"{name}: out of memory"
        except Exception as error:  # noqa: BLE001 - one mode that fails must not lose the others' numbers
            row["note"] = f"{name}: {type(error).__name__}: {str(error)[:200]}"
        # the graph and its memory go with the call
        call = module = forward = both = None
        model.zero_grad(set_to_none=True)
    release()
    return row


def routing_row(model: torch.nn.Module, tiny: bool) -> Row:
    """GPU time of a forward pass's routing alone: its own calls, with their own scores, in a CUDA graph."""
    n = scaled_length(16_384, tiny)
    ids = random_ids(1, n, tiny)
    calls: list[Call] = []
    route = model_router.route

    def recording(*args: object, **kwargs: object) -> object:
        calls.append(lambda: route(*args, **kwargs))
        return route(*args, **kwargs)

    forward = forward_call(model, ids, torch.ones_like(ids))
    # a straight line would not call it
    with mock.patch.object(model_router, "route", recording), mock.patch.object(layer_encoder, "enabled", False):
        forward()
    assert len(calls) >= model.config.num_layers, "the encoder does not route through model_router.route any more"
    with torch.no_grad():
        routing = gpu_ms(lambda: [call() for call in calls], tiny=tiny)
    return {
        "model": f"{COLT5}, routing alone",
        "batch": 1,
        "n": n,
        "mode": CAPTURED,
        "forward ms": routing,
        "of the forward": routing / gpu_ms(forward, tiny=tiny),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Verify, then measure."""
    options = parse(make_parser(__doc__), arguments)
    verify(options.tiny)
    table = Table("encoder", TITLE, options)
    rate = matrix_rate(options.tiny)
    table.note(f"A product of two bf16 matrices of 8,192 × 8,192 runs at {rate / 1e12:.0f} TFLOP/s.")
    models: dict[str, torch.nn.Module] = {}
    # of tiny cases, one of each kind
    kinds = {(case.model, case.mode, case.passes): case for case in reversed(CASES)}
    cases = [case for case in CASES if not options.tiny or case in kinds.values()]
    for position, case in enumerate(cases):
        if time.perf_counter() > options.deadline:
            rest = ", ".join(f"{c.model} {c.batch} × {c.n:,} {c.mode}" for c in cases[position:])
            table.note(f"Not measured for lack of time: {rest}.")
            break
        if case.model not in models:
            models[case.model] = make_encoder(case.model, options.tiny)
        model = models[case.model]
        row = measure(case, model, options.tiny)
        if case.model == COLT5 and row.get("forward ms"):
            flops = case.batch * encoder_flops(model.config, row["n"])
            row["share"] = flops / rate / (1e-3 * row["forward ms"])
        table.add(row)
        if case == cases[1]:
            table.add(routing_row(model, options.tiny))
    table.finish()


if __name__ == "__main__":
    main()
