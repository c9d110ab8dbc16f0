"""Causal conditional attention beside full causal SDPA and the peer's class, and what a generated token costs.

python benchmarks/causal.py [--only attention | generation] [--peer FOLDER]

FOLDER holds colt5-attention 0.11.2, local-attention and hyper-connections, unpacked:

pip download --no-deps colt5-attention==0.11.2 local-attention hyper-connections && unzip -o '*.whl' -d FOLDER
"""

import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from encoder import release
from measure import gpu_ms, make_parser, median_ms, parse, peak_mib, synchronize
from peers import DEVICE, DTYPE, colt5_config, random_ids, scaled_length
from results import Row, Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LogitsProcessor, LogitsProcessorList

from modeling_colt5 import CoLT5Config, CoLT5ForCausalLM, layer_decoder
from modeling_colt5.model_causal import CoLT5LayerCausalAttention
from modeling_colt5.model_from_config import causal_settings, implementation
from modeling_colt5.model_layers import CoLT5LayerNorm
from modeling_colt5.run_causal_plan import CausalPlan
from modeling_colt5.run_release import CACHE

ATTENTION_TITLE = (
    "Causal attention of one layer (norm and projections included), base size, batch 1, forward and backward: "
    "milliseconds of wall time, eager; kernels, copies and fills that the host gives the GPU; milliseconds of the GPU "
    "alone, replaying a CUDA graph; MiB beyond input and weights. The bias tables, which all layers share, are given. "
    "CoLT5: 4 light heads of radius 127, 8 heavy heads, windows of 256, 512 routed keys/values; SDPA: 12 heads, "
    "`is_causal`, no bias; peer: colt5-attention 0.11.2, the same heads, windows and budgets, fp32 as it needs. "
    "*leak*: the largest change of an output before a token that was changed"
)
GENERATION_TITLE = (
    "Generation by `CoLT5ForCausalLM`, 12 layers of base size, causally routed, batch 1, greedy: milliseconds a token "
    "behind a context of so many tokens, and MiB of its cache. With the dynamic cache a token is a straight line of "
    "launches, or where that is said runs as modules; the static cache's step is compiled by `generate`"
)
PEER = "peer fp32"
LENGTHS = (8192, 32768, 131072)
CONTEXTS = (1024, 16384, 131072)
CACHES = ("dynamic", "dynamic, as modules", "static")
# the first ones after the prompt warm up: graphs are recorded
SKIPPED = 8


def causal_config(tiny: bool) -> CoLT5Config:
    """Base size with both kinds of causal routing; `dropout_rate` is 0."""
    small = {"causal_window": 8, "causal_routed_keys": 12, "num_heavy_heads": 2, "local_radius": 5} if tiny else {}
    return colt5_config(tiny, causal_attention="routed", causal_feed_forward="routed", **small)


class RoutedAttention(nn.Module):
    """A routed layer with bias tables of its own: [1, n, d_model] → the same shape, without the residual."""

    def __init__(self, config: CoLT5Config):
        super().__init__()
        config._attn_implementation = "sdpa"
        self.config = config
        self.layer = CoLT5LayerCausalAttention(
            config.d_model, config.d_kv, config.num_light_heads, config.num_heavy_heads
        )
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1 and "norm" not in name:
                nn.init.normal_(parameter, std=config.d_model**-0.5)
        # in fp32 whatever the layer is in, as the models have them
        distance = config.relative_attention_max_distance
        heads = (config.num_light_heads, config.num_heavy_heads)
        light, heavy = (torch.randn(number, 2 * distance + 1, device=DEVICE) for number in heads)
        light[:, distance + 1 :] = -torch.inf
        self.tables = (light.requires_grad_(), heavy.requires_grad_())

    def forward(self, states: Tensor) -> Tensor:
        plan = CausalPlan.make(causal_settings(self.config), implementation(self.config), states, None, None)
        return self.layer(states, *self.tables, plan, None)[0] - states


class FullAttention(nn.Module):
    """Norm, T5's projections and PyTorch's causal attention without a bias, which it takes only with a whole mask."""

    def __init__(self, config: CoLT5Config):
        super().__init__()
        heads = config.num_light_heads + config.num_heavy_heads
        self.d_kv = config.d_kv
        self.norm = CoLT5LayerNorm(config.d_model)
        self.qkv = nn.Linear(config.d_model, 3 * heads * config.d_kv, bias=False)
        self.o = nn.Linear(heads * config.d_kv, config.d_model, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(states)[0]).unflatten(-1, (3, -1, self.d_kv)).transpose(1, 3).unbind(2)
        output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)
        return self.o(output.transpose(1, 2).flatten(2))


def make_peer(folder: Path, config: CoLT5Config) -> nn.Module:
    """The peer's class with the same sizes."""
    sys.path.insert(0, str(folder))
    window = config.causal_window
    return importlib.import_module("colt5_attention").ConditionalRoutedAutoregressiveAttention(
        config.d_model,
        num_heavy_tokens_q=max(1, int(window * config.routed_query_fraction)),
        num_heavy_tokens_kv=config.causal_routed_keys,
        light_dim_head=config.d_kv,
        light_heads=config.num_light_heads,
        light_window_size=config.local_radius + 1,
        heavy_window_size=window,
        heavy_dim_head=config.d_kv,
        heavy_heads=config.num_heavy_heads,
    )


@torch.no_grad()
def leak(module: nn.Module, config: CoLT5Config, dtype: torch.dtype) -> float:
    """The largest change of an output before a token from which on all changes, for tokens all over a window."""
    length = 8 * config.causal_window
    largest = 0.0
    for eighth in range(1, 8):
        first = length // 2 + eighth * config.causal_window // 8
        states = torch.randn(1, length, config.d_model, device=DEVICE, dtype=dtype)
        other = states.clone()
        other[:, first:] = torch.randn_like(other[:, first:])
        largest = max(largest, float((module(states) - module(other))[:, :first].abs().max()))
    return largest


def forward_and_backward(module: nn.Module, states: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A call that runs the module and the gradients of its input, parameters and bias tables."""
    inputs = [states, *module.parameters(), *getattr(module, "tables", ())]
    cotangent = torch.randn_like(states)
    return lambda: torch.autograd.grad(module(states), inputs, cotangent)


def verify(config: CoLT5Config) -> None:
    """The kernels' layer is the PyTorch layer, but for tokens whose score is within rounding of a threshold; no output
    depends on a later token; and gradients are the same bits each time."""
    torch.manual_seed(0)
    layer = RoutedAttention(config).to(DEVICE)
    states = torch.randn(2, 9 * config.causal_window + 3, config.d_model, device=DEVICE)
    outputs = []
    for backend in ("auto", "torch"):
        config.kernel_backend = backend
        outputs.append(layer(states).detach())
    config.kernel_backend = "auto"
    # sums of d_model fp32 products in another order, the kernels' in TF32 where the device has it
    wrong = ((outputs[0] - outputs[1]).abs().amax(-1) > 5e-3 * outputs[1].abs().max()).float().mean()
    assert wrong < 0.01, f"{wrong:.2%} of the tokens differ"
    # outputs of unit size; most machines round a row of a product alike whatever the others hold, but not all
    assert leak(layer, config, torch.float32) < 1e-5, "an output depends on a later token"
    call = forward_and_backward(layer, states.requires_grad_())
    for first, second in zip(call(), call(), strict=True):
        assert torch.equal(first, second), "a gradient is not the same twice"


def launches(call: Callable[[], object]) -> int | None:
    """Kernels, copies and fills that a call gives the GPU; None where the profiler sees none."""
    if not torch.cuda.is_available():
        return None
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events()) or None


def measure_attention(table: Table, config: CoLT5Config, peer: Path | None, tiny: bool, deadline: float) -> None:
    """Rows of all lengths, each with all classes."""
    makers: dict[str, tuple[Callable[[], nn.Module], torch.dtype]] = {
        "CoLT5": (lambda: RoutedAttention(config), DTYPE),
        "SDPA, causal": (lambda: FullAttention(config), DTYPE),
        "CoLT5 fp32": (lambda: RoutedAttention(config), torch.float32),
    }
    if peer is None:
        table.note("The peer was not measured: no --peer.")
    else:
        makers[PEER] = (lambda: make_peer(peer, config), torch.float32)
    for length in LENGTHS:
        for name, (make, dtype) in makers.items():
            if time.perf_counter() > deadline:
                table.note(f"Not measured for lack of time: {name} at {length} tokens, and what follows.")
                return
            torch.manual_seed(0)
            length_here = scaled_length(length, tiny)
            row: Row = {"class": name, "tokens": length_here}
            try:
                module = make().to(DEVICE, dtype)
                row["leak"] = f"{leak(module, config, dtype):.2g}"
                states = torch.randn(1, length_here, config.d_model, device=DEVICE, dtype=dtype, requires_grad=True)
                call = forward_and_backward(module, states)
                row["MiB"] = peak_mib(call)
                row["ms"] = median_ms(call, tiny)
                row["launches"] = launches(call)
                if name != PEER:
                    # the peer is not made to be recorded
                    row["GPU ms"] = gpu_ms(call, tiny=tiny)
                row = {column: value for column, value in row.items() if value is not None}
            except torch.cuda.OutOfMemoryError:
                row["remark"] = "out of memory"
            table.add(row)
            module = states = call = None
            release()


class StepClock(LogitsProcessor):
    """Notes when each step's logits come by, and leaves them as they are."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.times.append(time.perf_counter())
        return scores


def measure_generation(table: Table, config: CoLT5Config, tiny: bool, deadline: float) -> None:
    """Rows of both caches and all contexts."""
    torch.manual_seed(0)
    with DEVICE:
        model = CoLT5ForCausalLM(config).to(DTYPE).eval()
    with torch.no_grad():
        # the end token's logit is then 0, and some other's is above
        model.lm_head.weight[config.eos_token_id] = 0
    tokens, runs = (12, 1) if tiny else (40, 2)
    for cache in CACHES:
        for context in CONTEXTS:
            if time.perf_counter() > deadline:
                table.note(f"Not measured for lack of time: {cache} cache at {context} tokens, and what follows.")
                return
            ids = random_ids(1, scaled_length(context, tiny), tiny)
            row: Row = {"cache": cache, "context": ids.shape[1]}
            times = []
            layer_decoder.enabled = cache != "dynamic, as modules"
            for _ in range(runs + 1):
                clock = StepClock()
                output = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                    cache_implementation=cache if cache == "static" else None, disable_compile=tiny,
                    logits_processor=LogitsProcessorList([clock]), return_dict_in_generate=True,
                )  # fmt: skip
                synchronize()
                assert output.sequences.shape[1] == ids.shape[1] + tokens
                steps = clock.times[min(SKIPPED, tokens - 2) :]
                times.append(1e3 * (steps[-1] - steps[0]) / (len(steps) - 1))
            row["ms/token"] = statistics.median(times[1:])
            layers = output[CACHE].layers
            tensors = [
                tensor
                for part in layers
                for kind in (part.rings, part.carried, part.counters)
                for tensor in kind.values()
            ]
            row["cache MiB"] = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20
            table.add(row)
            del output
            release()
    layer_decoder.enabled = True


@torch.no_grad()
def verify_generation(config: CoLT5Config) -> None:
    """Check in fp32, with two layers, that tokens over a window's end are what recomputation gives."""
    torch.manual_seed(0)
    small = {"num_decoder_layers": 2, "causal_window": min(config.causal_window, 32)}
    model = CoLT5ForCausalLM(type(config)(**config.to_dict() | small)).to(DEVICE).eval()
    window = small["causal_window"]
    ids = torch.randint(3, config.vocab_size, (1, 3 * window + 5), device=DEVICE)
    cache, logits = None, []
    for part in ids.split([2 * window + 2, *[1] * (window + 3)], 1):
        output = model(part, use_cache=True, **{CACHE: cache})
        cache = output[CACHE]
        logits.append(output.logits)
    expected = model(ids, use_cache=False).logits
    error = (torch.cat(logits, 1) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f"tokens of a cache differ from recomputation by {error:.1e} of the largest logit"


def main(arguments: Sequence[str] | None = None) -> None:
    """Verify, then measure."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", choices=("attention", "generation"), help="one of the two tables")
    parser.add_argument("--peer", type=Path, help="folder with the peer's packages")
    options = parse(parser, arguments)
    config = causal_config(options.tiny)
    begin = time.perf_counter()
    if options.only != "generation":
        verify(config)
        table = Table("causal", ATTENTION_TITLE, options)
        # the second table has half of the time
        deadline = options.deadline if options.only else begin + (options.deadline - begin) / 2
        measure_attention(table, config, options.peer, options.tiny, deadline)
        table.finish()
    if options.only != "attention":
        verify_generation(config)
        table = Table("causal_generation", GENERATION_TITLE, options)
        measure_generation(table, config, options.tiny, options.deadline)
        table.finish()


if __name__ == "__main__":
    main()
