"""One new token of a causally routed decoder as straight lines: against recomputation at every step, over the ends of
windows, and who gets modules."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from launch_lists import interpreting_launcher
from models import pad, random_ids, read_plain, tiny_config
from rounding import assert_same_but_for_rounding
from torch import nn
from transformers import DynamicCache

pytest.importorskip("triton")

from modeling_colt5 import (  # noqa: E402
    CoLT5ForCausalLM,
    CoLT5ForConditionalGeneration,
    layer_decoder,
    run_launch_list_triton,
)
from modeling_colt5.layer_causal import RoutedStep  # noqa: E402
from modeling_colt5.run_release import CACHE  # noqa: E402

# fp32 sums taken in another order over logits of size 1
TOLERANCE = 1e-5
WINDOW = 4
KINDS: dict[str, dict[str, Any]] = {
    "routed": {},
    "two routers": {"num_causal_key_value_routers": 2, "causal_routed_keys": 5},
    "local": {"causal_attention": "local"},
    "dense": {"causal_feed_forward": "dense", "local_radius": 9},
    "neither": {"causal_attention": "local", "causal_feed_forward": "dense"},
}
# interpreted kernels, some seconds a kind
SLOW = ("two routers", "local", "dense", "neither")
EVERY_KIND = [pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind in KINDS]


def make_model(device: torch.device, model_class: Any = CoLT5ForCausalLM, **fields: Any) -> Any:
    """A tiny model whose routed branches change its logits by more than any tolerance here."""
    torch.manual_seed(0)
    routed = {
        "causal_attention": "routed", "causal_feed_forward": "routed", "causal_window": WINDOW,
        "causal_routed_keys": 6, "num_heavy_heads": 4, "num_layers": 1, "num_decoder_layers": 1,
        "kernel_backend": "triton", "routed_query_fraction": 1 / 2,
    }  # fmt: skip
    model = model_class(tiny_config(**routed | fields)).eval()
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if "heavy" in name and name.endswith((".o.weight", ".wo.weight")):
                parameter.mul_(3)
    return model.to(device)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[RoutedStep]:
    """The tokens that were straight lines."""
    ran: list[RoutedStep] = []
    run = RoutedStep.run
    monkeypatch.setattr(RoutedStep, "run", lambda step: ran.append(step) or run(step))
    return ran


def as_torch(model: Any, call: Callable[[], Any]) -> Any:
    """What a call gives in plain PyTorch."""
    before, model.config.kernel_backend = model.config.kernel_backend, "torch"
    try:
        return call()
    finally:
        model.config.kernel_backend = before


def as_modules(call: Callable[[], Any]) -> Any:
    """What a call gives where all blocks run as modules."""
    layer_decoder.enabled = False
    try:
        return call()
    finally:
        layer_decoder.enabled = True


def prompts(device: torch.device, *lengths: int, side: str = "left") -> dict[str, torch.Tensor]:
    return {name: part.to(device) for name, part in pad([random_ids(n) for n in lengths], side).items()}


@torch.no_grad()
def go_on(model: Any, batch: dict[str, torch.Tensor], chunks: list[int], cache: Any = None) -> tuple[Any, Any]:
    """Logits of a batch that comes in chunks, [batch, n, vocabulary], and the cache; single tokens run on kernels and
    all others in plain PyTorch, as interpreted kernels take long for these."""
    logits, start = [], 0
    for chunk in chunks:
        given = {"input_ids": batch["input_ids"][:, start : start + chunk], "use_cache": True}
        if "attention_mask" in batch:
            given["attention_mask"] = batch["attention_mask"][:, : start + chunk]

        call = partial(model, **given, **{CACHE: cache})
        output = call() if chunk == 1 else as_torch(model, call)
        cache = output[CACHE]
        logits.append(output.logits)
        start += chunk
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("kind", EVERY_KIND)
@torch.no_grad()
def test_every_token_is_what_recomputation_gives(kind: str, device: torch.device, steps: list) -> None:
    """Behind a prompt in the third window, over two ends of windows."""
    model = make_model(device, num_decoder_layers=2, **KINDS[kind])
    ids = random_ids(2, 3 * WINDOW + 6).to(device)
    prompt = 2 * WINDOW + 1
    logits, cache = go_on(model, {"input_ids": ids}, [prompt] + [1] * (ids.shape[1] - prompt))
    torch.testing.assert_close(logits, as_torch(model, lambda: model(ids).logits), rtol=0, atol=TOLERANCE)
    assert len(steps) == ids.shape[1] - prompt
    # and the cache is what the modules' would be
    own = DynamicCache(config=model.config)
    as_torch(model, lambda: model(ids, use_cache=True, **{CACHE: own}))
    assert_same_caches(cache, own)


def assert_same_caches(cache: Any, other: Any) -> None:
    """Tensors are as many and the same, but for rings' slots that no token has reached."""
    for own, expected in zip(cache.layers, other.layers, strict=True):
        assert own.seen == expected.seen
        for kind in ("rings", "carried", "counters"):
            tensors, others = getattr(own, kind), getattr(expected, kind)
            assert tensors.keys() == others.keys()
            for name, tensor in tensors.items():
                wanted = others[name]
                if kind == "rings":
                    reached = min(tensor.shape[1], int(own.counters["lengths"].min()))
                    tensor, wanted = tensor[:, :reached], wanted[:, :reached]
                if name.startswith("pool_"):
                    used = own.carried["pool_valid"]
                    tensor, wanted = tensor[used], wanted[used]
                torch.testing.assert_close(tensor, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@torch.no_grad()
def test_from_the_first_token_on(device: torch.device, steps: list) -> None:
    model, ids = make_model(device), random_ids(1, 2 * WINDOW + 3).to(device)
    logits, _ = go_on(model, {"input_ids": ids}, [1] * ids.shape[1])
    torch.testing.assert_close(logits, as_torch(model, lambda: model(ids).logits), rtol=0, atol=TOLERANCE)
    # all but the first, which makes the cache
    assert len(steps) == ids.shape[1] - 1


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows_are_the_rows_alone(side: str, device: torch.device, steps: list) -> None:
    """Rows whose windows end at different times; on the right some tokens are no real ones."""
    model, lengths = make_model(device), (15, 12, 10)
    rows = [random_ids(n).to(device) for n in lengths]
    batch = {name: part.to(device) for name, part in pad([row.cpu() for row in rows], side).items()}
    logits, _ = go_on(model, batch, [8] + [1] * 7)
    assert len(steps) == 7
    for number, ids in enumerate(rows):
        part = slice(0, len(ids)) if side == "right" else slice(15 - len(ids), 15)
        expected = as_torch(model, lambda ids=ids: model(ids[None]).logits[0])
        torch.testing.assert_close(logits[number, part], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@torch.no_grad()
def test_tokens_and_chunks_take_turns(device: torch.device, steps: list) -> None:
    model, ids = make_model(device), random_ids(1, 22).to(device)
    logits, _ = go_on(model, {"input_ids": ids}, [5, 1, 4, 1, 1, 3, 1, 1, 2, 1, 1, 1])
    torch.testing.assert_close(logits, as_torch(model, lambda: model(ids).logits), rtol=0, atol=TOLERANCE)
    assert len(steps) == 8


@torch.no_grad()
def test_no_output_depends_on_a_later_token(device: torch.device, steps: list) -> None:
    """To the bit: what comes later is not there yet; and a copy of a cache goes on by itself."""
    model, ids = make_model(device), random_ids(2, 3 * WINDOW).to(device)
    _, cache = go_on(model, {"input_ids": ids}, [2 * WINDOW])
    other_cache = copy.deepcopy(cache)
    first, _ = go_on(model, {"input_ids": ids[:, 2 * WINDOW :]}, [1] * 3, cache)
    changed = (ids + 1) % 90 + 3
    last = torch.cat([ids[:, 2 * WINDOW : 2 * WINDOW + 2], changed[:, :1]], 1)
    second, _ = go_on(model, {"input_ids": last}, [1] * 3, other_cache)
    assert len(steps) == 6
    assert torch.equal(first[:, :2], second[:, :2]) and not torch.equal(first[:, 2], second[:, 2])


SETTINGS = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "output_scores": True}


def generate(model: Any, inputs: dict[str, torch.Tensor], new_tokens: int = 9, **options: Any) -> Any:
    torch.manual_seed(1)
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    return model.generate(**inputs, **SETTINGS | lengths | options)


@torch.no_grad()
def recomputed(model: Any, inputs: dict[str, torch.Tensor], sequences: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Logits [steps, rows, vocabulary] before each new token, of the whole sequence in plain PyTorch."""
    mask = inputs["attention_mask"].repeat_interleave(len(sequences) // len(inputs["input_ids"]), 0)
    mask = nn.functional.pad(mask, (0, sequences.shape[1] - 1 - mask.shape[1]), value=1)
    logits = as_torch(model, lambda: model(sequences[:, :-1], attention_mask=mask, use_cache=False).logits)
    return logits[:, -new_tokens:].transpose(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 20, "num_return_sequences": 2}])
def test_generation(options: dict[str, Any], device: torch.device, steps: list) -> None:
    """Greedy and sampled, behind prompts of two lengths."""
    model, inputs = make_model(device), prompts(device, 7, 4)
    output = generate(model, inputs, **options)
    assert len(steps) == 8
    expected = recomputed(model, inputs, output.sequences, 9)
    torch.testing.assert_close(torch.stack(output.logits), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_beams_change_places(device: torch.device, steps: list) -> None:
    model, inputs = make_model(device), prompts(device, 6)
    options = {"num_beams": 3, "num_return_sequences": 2}
    output = generate(model, inputs, **options)
    assert len(steps) == 8
    uncached = as_torch(model, lambda: generate(model, inputs, **options, use_cache=False))
    assert torch.equal(output.sequences, uncached.sequences)
    for scores, expected in zip(output.scores, uncached.scores, strict=True):
        torch.testing.assert_close(scores, expected, rtol=0, atol=TOLERANCE)
    assert (output.beam_indices[:, 1:9] != output.beam_indices[:, :8]).any()


@pytest.mark.slow
def test_guessed_tokens_are_taken_back(device: torch.device, steps: list) -> None:
    model = make_model(device)
    inputs = {name: part.to(device) for name, part in pad([random_ids(6).repeat(2)]).items()}
    output = generate(model, inputs, prompt_lookup_num_tokens=2)
    assert steps
    expected = as_torch(model, lambda: generate(model, inputs, use_cache=False))
    assert torch.equal(output.sequences, expected.sequences)


@torch.no_grad()
def test_tokens_are_taken_back_into_the_window_before(device: torch.device, steps: list) -> None:
    model, ids = make_model(device), random_ids(1, 3 * WINDOW).to(device)
    _, cache = go_on(model, {"input_ids": ids}, [2 * WINDOW + 1, 1])
    cache.crop(-3)
    other = random_ids(1, 3).to(device)
    logits, _ = go_on(model, {"input_ids": other}, [1] * 3, cache)
    whole = torch.cat([ids[:, : 2 * WINDOW - 1], other], 1)
    expected = as_torch(model, lambda: model(whole).logits[:, -3:])
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
    assert len(steps) == 1 + 3


@pytest.mark.slow
@torch.no_grad()
def test_rows_are_chosen_and_repeated(device: torch.device, steps: list) -> None:
    model, ids = make_model(device), random_ids(3, 2 * WINDOW + 1).to(device)
    _, cache = go_on(model, {"input_ids": ids}, [2 * WINDOW, 1])
    rows = torch.tensor([2, 0], device=device)
    cache.batch_select_indices(rows)
    cache.batch_repeat_interleave(2)
    ids = torch.cat([ids[rows].repeat_interleave(2, 0), random_ids(4, 2).to(device)], 1)
    logits, _ = go_on(model, {"input_ids": ids[:, -2:]}, [1, 1], cache)
    torch.testing.assert_close(logits, as_torch(model, lambda: model(ids).logits[:, -2:]), rtol=0, atol=TOLERANCE)
    assert len(steps) == 3


@pytest.mark.parametrize(
    "fields", [{}, pytest.param({"causal_attention": "local", "causal_feed_forward": "dense"}, marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_with_an_encoder(fields: dict[str, Any], device: torch.device, steps: list) -> None:
    model = make_model(device, CoLT5ForConditionalGeneration, **fields)
    document = {name: part.to(device) for name, part in pad([random_ids(n) for n in (9, 6)]).items()}
    encoder_outputs = as_torch(model, lambda: model.encoder(**document))
    given = {"encoder_outputs": encoder_outputs, "attention_mask": document["attention_mask"]}
    ids = random_ids(2, WINDOW + 3).to(device)
    logits, cache = [], None
    for part in ids.split([3, *[1] * WINDOW], 1):
        call = partial(model, **given, decoder_input_ids=part, use_cache=True, **{CACHE: cache})
        output = call() if part.shape[1] == 1 else as_torch(model, call)
        cache = output[CACHE]
        logits.append(output.logits)
    expected = as_torch(model, lambda: model(**given, decoder_input_ids=ids).logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=TOLERANCE)
    assert len(steps) == WINDOW


@pytest.mark.slow
@torch.no_grad()
def test_half_precision_is_that_of_the_modules(device: torch.device, steps: list) -> None:
    model, ids = make_model(device).bfloat16(), random_ids(2, 2 * WINDOW + 3).to(device)

    def call() -> torch.Tensor:
        return go_on(model, {"input_ids": ids}, [2 * WINDOW, 1, 1, 1])[0]

    expected = as_modules(call)
    assert not steps
    assert_same_but_for_rounding(call(), expected)
    assert len(steps) == 3


# who gets modules


class Session:
    """A model and a cache that goes on token by token."""

    def __init__(self, device: torch.device, steps: list):
        self.model, self.steps = make_model(device, causal_window=64), steps
        self.ids = random_ids(2, 1).to(device)
        _, self.cache = go_on(self.model, {"input_ids": random_ids(2, 66).to(device)}, [66])
        assert self.step()[1]

    @torch.no_grad()
    def step(self, **options: Any) -> tuple[Any, bool]:
        """The output, and whether it was a straight line."""
        count = len(self.steps)
        given = {"input_ids": self.ids, "use_cache": True, CACHE: self.cache} | options
        output = self.model(**given)
        return output, len(self.steps) > count


@pytest.fixture
def session(device: torch.device, steps: list) -> Session:
    return Session(device, steps)


def test_a_hook_is_obeyed(session: Session) -> None:
    attention, feed_forward = session.model.decoder.block[-1].layer
    own = (
        session.model.decoder.block[-1], attention, attention.light_attention.o, attention.query_router,
        attention.key_value_routers[0], attention.heavy_attention, feed_forward.router,
        feed_forward.heavy_feed_forward.act,
    )  # fmt: skip
    for module in own:
        called = []
        handle = module.register_forward_hook(lambda *arguments, called=called: called.append(1))
        assert read_plain(session.model.decoder.block[-1]) is None
        handle.remove()
        assert read_plain(session.model.decoder.block[-1]) is not None
    handle = attention.light_attention.o.register_forward_hook(lambda *arguments: called.append(1))
    assert not session.step()[1] and called
    handle.remove()
    assert session.step()[1]


@pytest.mark.slow
def test_who_asks_for_more_gets_it(session: Session) -> None:
    for name in ("output_routing", "output_hidden_states"):
        output, is_straight = session.step(**{name: True})
        assert not is_straight and output[name.removeprefix("output_")] is not None
    mask = torch.ones(2, session.cache.get_seq_length() + 1, device=session.ids.device)
    assert session.step(attention_mask=mask)[1]
    with torch.autocast(session.ids.device.type, torch.bfloat16):
        assert not session.step()[1]


def test_a_mask_of_another_length_is_refused(session: Session) -> None:
    with pytest.raises(ValueError, match="attention_mask"):
        session.step(attention_mask=torch.ones(2, 3, device=session.ids.device))


def test_other_blocks_are_not_plain(device: torch.device) -> None:
    def block(**fields: Any) -> Any:
        return make_model(torch.device("cpu"), **fields).decoder.block[0]

    assert read_plain(block()) is not None
    assert read_plain(block(causal_unrouted_vector=True)) is None
    assert read_plain(block(feed_forward_proj="relu")) is None
    plain = block()
    plain.layer[0].key_value_routers[0] = nn.Identity()
    assert read_plain(plain) is None
    plain = block()
    assert read_plain(plain) is not None
    plain.layer[0].key_value_routers[0] = copy.deepcopy(plain.layer[0].query_router)
    (_, weights), new = read_plain(plain), plain.layer[0].key_value_routers[0].weight
    assert any(weight is new for weight in weights)
    plain.layer[1].heavy_feed_forward.wo.bias = nn.Parameter(torch.zeros(1))
    assert read_plain(plain) is None


@torch.no_grad()
def test_a_static_cache_is_the_modules_matter(device: torch.device, steps: list) -> None:
    model = make_model(device)
    generate(model, prompts(device, 6), 2, cache_implementation="static", disable_compile=True)
    assert not steps


@torch.no_grad()
def test_settings_that_change_between_tokens_are_obeyed(
    device: torch.device, steps: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in the lists of launches, so that others are other lists."""
    # another test of this process may have made one of these kinds
    monkeypatch.setattr(layer_decoder, "lists_by_kind", {})
    model, ids = make_model(device), random_ids(1, 2 * WINDOW + 2).to(device)
    _, cache = go_on(model, {"input_ids": ids}, [2 * WINDOW, 1])
    kinds = set(layer_decoder.lists_by_kind)
    model.config.causal_capacity_ratio = 1.0
    go_on(model, {"input_ids": ids[:, -1:]}, [1], cache)
    assert len(steps) == 2 and len(set(layer_decoder.lists_by_kind) - kinds) == 1


def test_a_copied_layer_of_a_cache_goes_its_own_way(device: torch.device, steps: list) -> None:
    """A token is written in place: of a copy into its own tensors."""
    model, ids = make_model(device, **KINDS["routed"]), random_ids(1, WINDOW + 5).to(device)
    begun, *ends = ids.split([WINDOW + 1, 2, 2], 1)
    _, cache = go_on(model, {"input_ids": begun}, [WINDOW, 1])
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    for each, end in zip((cache, other), ends, strict=True):
        logits, _ = go_on(model, {"input_ids": end}, [1, 1], each)
        expected = model_logits(model, torch.cat([begun, end], 1))[:, -2:]
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
    assert len(steps) == 5
    other.layers[0].reset()
    assert cache.layers[0].has_state


# lists of launches


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the calls above are repeated from lists themselves")
@pytest.mark.parametrize("kind", ["routed", "dense"])
def test_lists_are_repeated_for_all_layers_and_tokens(kind: str, monkeypatch: pytest.MonkeyPatch, steps: list) -> None:
    repeated: list[str] = []
    monkeypatch.setattr(run_launch_list_triton, "launcher", interpreting_launcher(monkeypatch, repeated))
    monkeypatch.setattr(layer_decoder, "lists_by_kind", {})
    monkeypatch.setattr(layer_decoder, "may_repeat", lambda states: True)
    model = make_model(torch.device("cpu"), num_decoder_layers=3, **KINDS[kind])
    ids = random_ids(2, 3 * WINDOW + 2)
    logits, _ = go_on(model, {"input_ids": ids}, [2 * WINDOW, *[1] * (WINDOW + 2)])
    torch.testing.assert_close(logits, model_logits(model, ids), rtol=0, atol=TOLERANCE)
    # one run of like layers, of which the first is noted, within a window and at its end
    (((lists, first, end),),) = layer_decoder.lists_by_kind.values()
    assert (first, end) == (0, 3) and len(lists) == 2 and None not in lists.values()
    runs = 3 * len(steps) - 2
    assert len(steps) == WINDOW + 2
    assert repeated.count("pool_step_attention_kernel") == runs
    assert repeated.count("step_products_kernel") == (8 if kind == "routed" else 6) * runs
    # all tokens within windows but the first two are graphs
    graphs = repeated.count("graph")
    assert graphs == WINDOW - 1
    # all launches of a layer, and beside them those of the window's end, which two layers repeat
    assert len(repeated) - graphs == (15 * runs + 2 * 5 if kind == "routed" else 12 * runs + 2 * 4)


def model_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return as_torch(model, lambda: model(ids).logits)


# on a card


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["routed", "two routers", "local", "dense"])
@torch.no_grad()
def test_both_roads_give_the_same_on_a_card(kind: str, rows: int, steps: list) -> None:
    """Sizes of a small model, over two ends of windows of rows of different lengths; noted first, then repeated. In
    fp32, as in half precision a token at a threshold may be routed on one road alone."""
    sizes = {
        "d_model": 256, "d_kv": 64, "num_light_heads": 4, "light_d_ff": 256, "heavy_d_ff": 512, "local_radius": 20,
        "num_decoder_layers": 3, "causal_window": 32, "causal_routed_keys": 48,
    }  # fmt: skip
    model = make_model(torch.device("cuda"), **sizes | {**KINDS[kind], "local_radius": 20, "causal_routed_keys": 48})
    batch = prompts(torch.device("cuda"), *[150 - 13 * row for row in range(rows)])

    def call() -> torch.Tensor:
        return go_on(model, batch, [90, *[1] * 60])[0]

    expected = as_modules(call)
    for _ in range(2):
        assert_same_but_for_rounding(call()[:, -60:], expected[:, -60:])
    assert len(steps) == 2 * 60
