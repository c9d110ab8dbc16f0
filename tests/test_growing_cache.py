"""The plain decoder's cache, which grows in blocks: every way to generate against recomputation at every step."""

import copy
import gc
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import pad, random_ids, shallow_model, tiny_model
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from modeling_colt5 import (
    CoLT5ForCausalLM,
    CoLT5ForConditionalGeneration,
    model_layers,
    run_growing_cache,
    run_release,
)
from modeling_colt5.run_growing_cache import CoLT5GrowingLayer
from modeling_colt5.run_release import CACHE

BLOCK = 4
# from a start or a prompt over several ends of such blocks
NEW_TOKENS = 11
# fp32 sums taken in another order over logits of size 1
TOLERANCE = 1e-5
SETTINGS = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
RETURNED = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.5},
    "several sequences": {"do_sample": True, "top_k": 20, "num_return_sequences": 3},
    "prompt in chunks": {"prefill_chunk_size": 3},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {"assistant_model": None},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_growing_cache, "BLOCK", BLOCK)


def make_model(model_class: Any = CoLT5ForConditionalGeneration, **fields: Any) -> Any:
    """A tiny model whose next tokens depend on those before."""
    torch.manual_seed(0)
    model = shallow_model(model_class, **fields)
    with torch.no_grad():
        for block in model.decoder.block:
            block.layer[0].SelfAttention.q.weight.mul_(4)
    return model


def self_layers(cache: Cache) -> list[Any]:
    return (cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache).layers


@torch.no_grad()
def recomputed(model: Any, inputs: dict[str, torch.Tensor], sequences: torch.Tensor) -> torch.Tensor:
    """Logits [rows, vocabulary] before each new token, each step from the whole sequence anew, without a cache."""
    is_encoder_decoder = model.config.is_encoder_decoder
    prefix = "decoder_" if is_encoder_decoder else ""
    mask = inputs.get(f"{prefix}attention_mask")
    repeats = len(sequences) // len(inputs["input_ids"])
    fixed = {}
    if is_encoder_decoder:
        fixed = {name: inputs[name].repeat_interleave(repeats, 0) for name in ("input_ids", "attention_mask")}
    first = sequences.shape[1] - NEW_TOKENS
    steps = []
    for length in range(first, sequences.shape[1]):
        given = {f"{prefix}input_ids": sequences[:, :length]}
        if mask is not None:
            longer = torch.nn.functional.pad(mask, (0, length - mask.shape[1]), value=1)
            given[f"{prefix}attention_mask"] = longer.repeat_interleave(repeats, 0)
        steps.append(model(**fixed, **given, use_cache=False).logits[:, -1])
    return torch.stack(steps)


def documents() -> dict[str, torch.Tensor]:
    batch = pad([random_ids(length) for length in (20, 13, 7)])
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def with_decoder_prompt() -> dict[str, torch.Tensor]:
    """Documents, and prompts of the decoder of three lengths, padded on the left."""
    start = torch.zeros(1, dtype=torch.int64)
    prompt = pad([torch.cat([start, random_ids(length)]) for length in (6, 2, 4)], "left")
    names = ("input_ids", "attention_mask")
    return documents() | {f"decoder_{name}": prompt[name] for name in names}


def one_text() -> dict[str, torch.Tensor]:
    return pad([random_ids(9).repeat(2)])


KINDS: dict[str, tuple[Any, Callable[[], dict[str, torch.Tensor]]]] = {
    "encoder-decoder": (CoLT5ForConditionalGeneration, documents),
    "decoder prompt": (CoLT5ForConditionalGeneration, with_decoder_prompt),
    "language model": (CoLT5ForCausalLM, lambda: pad([random_ids(length) for length in (9, 4, 6)], "left")),
}


def generate(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    torch.manual_seed(1)
    if "assistant_model" in options:
        options["assistant_model"] = make_model(type(model), num_decoder_layers=1)
    return model.generate(**inputs, **SETTINGS | RETURNED | options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_what_recomputation_gives(kind: str, way: str) -> None:
    model_class, make_inputs = KINDS[kind]
    model, inputs = make_model(model_class), make_inputs()
    if way == "prompt in chunks" and model.config.is_encoder_decoder:
        pytest.skip("Transformers cuts the prompts of language models alone")
    if way in ("lookup", "assisted"):
        # these generate for one row, of which the last has no padding here
        row = 0 if kind == "encoder-decoder" else inputs[next(reversed(inputs))].sum(1).argmax()
        inputs = {name: part[row : row + 1] for name, part in inputs.items()}
    output = generate(model, inputs, **WAYS[way])
    assert all(type(layer) is CoLT5GrowingLayer for layer in self_layers(output[CACHE]))
    logits = torch.stack(output.logits)
    assert len(logits) == NEW_TOKENS
    torch.testing.assert_close(logits, recomputed(model, inputs, output.sequences), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_beams_are_what_recomputation_gives(kind: str) -> None:
    model_class, make_inputs = KINDS[kind]
    model, inputs = make_model(model_class), make_inputs()
    options = {"num_beams": 4, "num_return_sequences": 2}
    output = generate(model, inputs, **options)
    uncached = generate(model, inputs, **options, use_cache=False)
    assert torch.equal(output.sequences, uncached.sequences)
    # of all beams at every step, and in every vocabulary entry
    for scores, expected in zip(output.scores, uncached.scores, strict=True):
        torch.testing.assert_close(scores, expected, rtol=0, atol=TOLERANCE)
    # otherwise no beam ever changed its place
    assert (output.beam_indices[:, 1:NEW_TOKENS] != output.beam_indices[:, : NEW_TOKENS - 1]).any()


def test_beams_leave_their_documents_keys_where_they_are() -> None:
    """All beams of a document read the same keys and values of it."""
    model, inputs, moved = make_model(), documents(), []
    cross = DynamicLayer.reorder_cache
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DynamicLayer, "reorder_cache", lambda layer, rows: moved.append(layer) or cross(layer, rows))
        output = generate(model, inputs, num_beams=3)
        cross_layers = output[CACHE].cross_attention_cache.layers
        assert not set(map(id, cross_layers)) & set(map(id, moved))
        # the rows of a cache that the caller filled may be anybody's
        rows = {name: part.repeat_interleave(2, 0)[:2] for name, part in inputs.items()}
        with torch.no_grad():
            filled = model(**rows, decoder_input_ids=torch.zeros(2, 1, dtype=torch.int64), use_cache=True)[CACHE]
        one = {name: part[:1] for name, part in inputs.items()}
        start = torch.tensor([[0, 5]])
        output = generate(model, one, num_beams=2, decoder_input_ids=start, **{CACHE: filled})
        assert set(map(id, filled.cross_attention_cache.layers)) <= set(map(id, moved))


def test_rows_that_end_at_different_times() -> None:
    model, inputs = make_model(), documents()
    free = generate(model, inputs).sequences
    # the first row's third and the last row's seventh new token
    ends = [int(free[0, 3]), int(free[2, 7])]
    options = {"min_new_tokens": 0, "eos_token_id": ends}
    ended, uncached = generate(model, inputs, **options), generate(model, inputs, **options, use_cache=False)
    assert torch.equal(ended.sequences, uncached.sequences)
    for one, other in zip(ended.logits, uncached.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("length", [253, 255, 256, 257, 510])
def test_ends_of_whole_blocks(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_growing_cache, "BLOCK", 256)
    model, inputs = make_model(CoLT5ForCausalLM), {"input_ids": random_ids(1, length)}
    output = generate(model, inputs)
    expected = recomputed(model, inputs, output.sequences)
    torch.testing.assert_close(torch.stack(output.logits), expected, rtol=0, atol=TOLERANCE)
    room = self_layers(output[CACHE])[0].rooms.keys
    assert room.shape[2] == -(-(length + NEW_TOKENS - 1) // 256) * 256


@torch.no_grad()
def test_chunks_of_every_length_over_the_ends_of_blocks() -> None:
    model, ids = make_model(CoLT5ForCausalLM), random_ids(2, 24)
    expected = model(ids, use_cache=False).logits
    for chunks in ([1] * 24, [3, 1, 4, 8, 8], [4, 4, 1, 7, 8], [24], [23, 1], [5, 19]):
        cache, logits = None, []
        for part in ids.split(chunks, 1):
            output = model(part, use_cache=True, **{CACHE: cache})
            cache = output[CACHE]
            logits.append(output.logits)
        torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=TOLERANCE)


def test_steps_write_in_place_and_the_memory_goes_with_the_call() -> None:
    model, inputs = make_model(), documents()
    # what another test of this process has left is none of this call's
    earlier = [thing for thing in gc.get_objects() if type(thing) is CoLT5GrowingLayer]
    model.generate(**inputs, **SETTINGS)
    gc.collect()
    assert sum(type(thing) is CoLT5GrowingLayer for thing in gc.get_objects()) <= len(earlier)
    cache, places = None, []
    with torch.no_grad():
        for _ in range(12):
            output = model(**inputs, decoder_input_ids=random_ids(3, 1), use_cache=True, **{CACHE: cache})
            cache = output[CACHE]
            places.append(self_layers(cache)[0].keys.data_ptr())
    # the first token is kept alone; then there are rooms for 4, 8 and 12
    assert [len(set(places[first:last])) for first, last in ((1, 4), (4, 8), (8, 12))] == [1, 1, 1]
    # the old room is read while the new one is filled; one before it may be where a later one comes to lie
    assert places[3] != places[4] and places[7] != places[8]
    assert all(layer.rooms.keys.shape[2] == 12 for layer in self_layers(cache))
    assert all(type(layer) is DynamicLayer for layer in cache.cross_attention_cache.layers)


@pytest.mark.parametrize("way", ["lookup", "assisted"])
def test_tokens_that_were_guessed_wrong_are_written_over(way: str) -> None:
    model, inputs, cropped = make_model(CoLT5ForCausalLM), one_text(), []
    crop = DynamicLayer.crop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DynamicLayer, "crop", lambda layer, count: cropped.append(count) or crop(layer, count))
        output = generate(model, inputs, **WAYS[way])
    assert any(cropped)
    assert torch.equal(output.sequences, generate(model, inputs, use_cache=False).sequences)


@pytest.mark.parametrize("modes", [(True, False), (False, True)], ids=["inference first", "inference second"])
def test_generation_goes_on_from_one_mode_in_the_other(modes: tuple[bool, bool]) -> None:
    """What inference mode made may not be written outside of it."""
    model, inputs = make_model(CoLT5ForCausalLM), {"input_ids": random_ids(1, 6)}
    expected = generate(model, inputs, max_new_tokens=10, min_new_tokens=10).sequences
    cache, ids = None, inputs["input_ids"]
    for is_inference, new_tokens in zip(modes, (4, 6), strict=True):
        given = {} if cache is None else {CACHE: cache}
        with torch.inference_mode(is_inference):
            options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
            output = generate(model, {"input_ids": ids.clone()}, **options, **given)
        cache, ids = output[CACHE], output.sequences
    assert torch.equal(ids, expected)
    assert type(self_layers(cache)[0]) is CoLT5GrowingLayer


@pytest.mark.parametrize("make", [DynamicCache, None, "static"])
def test_caches_of_the_callers_own_stay_theirs(make: Any) -> None:
    model, inputs = make_model(), documents()
    config = model.config.get_text_config(decoder=True)
    expected = generate(model, inputs)
    if make == "static":
        caches = StaticCache(config, max_cache_len=NEW_TOKENS + 1), StaticCache(config, max_cache_len=20)
    elif make is None:
        caches = DynamicCache(config=config), DynamicCache(config=config)
    else:
        caches = make(), make()
    kinds = [type(layer) for layer in caches[0].layers] or [DynamicLayer] * config.num_layers
    cache = EncoderDecoderCache(*caches)
    output = generate(model, inputs, disable_compile=True, **{CACHE: cache})
    assert output[CACHE] is cache and [type(layer) for layer in caches[0].layers] == kinds
    for one, other in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)


def test_routed_decoders_keep_their_own_layers() -> None:
    routed = {"causal_attention": "routed", "causal_feed_forward": "routed", "causal_window": 4}
    model = tiny_model(CoLT5ForCausalLM, **routed)
    output = model.generate(random_ids(1, 5), max_new_tokens=3, return_dict_in_generate=True)
    assert not any(isinstance(layer, CoLT5GrowingLayer) for layer in output[CACHE].layers)


def test_another_way_to_prepare_caches_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, said = make_model(), documents(), []
    expected = generate(model, inputs).sequences
    monkeypatch.setattr(run_release.logger, "warning_once", said.append)
    own = GenerationMixin._prepare_cache_for_generation

    def prepare(self: Any, settings: Any, model_inputs: Any, *others: Any) -> Any:
        return own(self, settings, model_inputs, *others)

    monkeypatch.setattr(GenerationMixin, "_prepare_cache_for_generation", prepare)
    output = generate(model, inputs)
    assert torch.equal(output.sequences, expected)
    assert all(type(layer) is DynamicLayer for layer in self_layers(output[CACHE]))
    assert len(said) == 1 and "plain dynamic cache" in said[0]


@pytest.mark.parametrize("frozen", ["", "k", "q"])
def test_gradients_through_steps(frozen: str) -> None:
    """Where autograd records, no step may change what an earlier one keeps for its backward pass."""
    model, ids = make_model(CoLT5ForCausalLM), random_ids(2, 9)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or "SelfAttention" not in name or f"SelfAttention.{frozen}" in name)
        if frozen == "k":
            # then keys and values need no gradient, what reads them does
            parameter.requires_grad_("SelfAttention.o" in name or "SelfAttention.q" in name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(model(ids, use_cache=False).logits.square().sum(), trained)
    cache, logits = None, []
    for token in ids.split(1, 1):
        output = model(token, use_cache=True, **{CACHE: cache})
        cache = output[CACHE]
        logits.append(output.logits)
    actual = torch.autograd.grad(torch.cat(logits, 1).square().sum(), trained)
    for one, other in zip(actual, expected, strict=True):
        # sums over two rows of nine tokens, in another order
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


@pytest.mark.slow
def test_compiled_steps_go_on_and_back() -> None:
    model, ids = make_model(CoLT5ForCausalLM), random_ids(1, 12)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), warnings.catch_warnings():
        # Dynamo itself warns of what Transformers' decorators do
        warnings.simplefilter("ignore")
        expected = model(ids, use_cache=False).logits
        cache, logits = None, []
        for step, token in enumerate(ids.split(1, 1)):
            run = compiled if 3 <= step < 7 else model
            output = run(token, use_cache=True, **{CACHE: cache})
            cache = output[CACHE]
            logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=TOLERANCE)


def steps_of(layers: list[DynamicLayer], rng: torch.Generator) -> Iterator[str]:
    """The same random operations on a growing and a plain layer, one after the other."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=rng))

    for layer in layers:
        layer.update(*torch.randn(2, 2, 3, 2, 5, generator=torch.Generator().manual_seed(3)).unbind(0))
    for _ in range(120):
        kind, length, rows = draw(0, 12), layers[1].get_seq_length(), len(layers[1].keys)
        if kind == 0 and length > 1:
            count = draw(1, min(length, 6))
            for layer in layers:
                layer.crop(-count)
        elif kind == 1:
            places = torch.randint(rows, (rows,), generator=rng)
            for layer in layers:
                layer.reorder_cache(places)
        elif kind == 2 and rows < 4:
            for layer in layers:
                layer.batch_repeat_interleave(2)
        elif kind == 3 and rows > 1:
            places = torch.randperm(rows, generator=rng)[:2]
            for layer in layers:
                layer.batch_select_indices(places)
        elif kind == 4:
            layers[:] = [copy.deepcopy(layer) for layer in layers]
        elif kind == 5:
            for layer in layers:
                layer.keys, layer.values = layer.keys[:1], layer.values[:1]
        else:
            count = draw(1, 4)
            new = torch.randn(2, rows, 3, count, 5, generator=rng)
            if kind == 6:
                new = new.double()
            for layer in layers:
                layer.update(*new.unbind(0))
        yield str(kind)


@pytest.mark.parametrize("seed", range(5))
@torch.no_grad()
def test_a_growing_layer_is_a_dynamic_layer_whatever_is_done_to_it(seed: int) -> None:
    layers: list[DynamicLayer] = [CoLT5GrowingLayer(), DynamicLayer()]
    steps = []
    for step in steps_of(layers, torch.Generator().manual_seed(seed)):
        steps.append(step)
        growing, plain = layers
        for one, other in ((growing.keys, plain.keys), (growing.values, plain.values)):
            assert one.dtype == other.dtype and torch.equal(one, other), steps
        assert growing.get_seq_length() == plain.get_seq_length()
    rows = len(layers[1].keys)
    for layer in layers:
        layer.reset()
        for count in (2, 1):
            layer.update(*torch.ones(2, rows, 3, count, 5).unbind(0))
    assert torch.equal(layers[0].keys, layers[1].keys)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_cache_that_was_filled_before_autocast_was_on(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's attention is called with one dtype then, as it asks for on a GPU."""
    interface, dtypes = model_layers.attention_interface, []

    def watched(name: str) -> Any:
        def attend(module: Any, query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> Any:
            dtypes.append({part.dtype for part in (query, key, value)})
            return interface(name)(module, query, key, value, *rest, **more)

        return attend

    model_class, make_inputs = KINDS[kind]
    model, inputs = make_model(model_class), make_inputs()
    prefix = "decoder_" if model.config.is_encoder_decoder else ""
    fixed = {name: part for name, part in inputs.items() if prefix and not name.startswith(prefix)}
    ids = random_ids(3, 5)
    expected = model(**fixed, **{f"{prefix}input_ids": ids}).logits[:, 4:]
    cache = model(**fixed, **{f"{prefix}input_ids": ids[:, :4]}, use_cache=True)[CACHE]
    monkeypatch.setattr(model_layers, "attention_interface", watched)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**fixed, **{f"{prefix}input_ids": ids[:, 4:], CACHE: cache}).logits
    assert {torch.bfloat16} in dtypes and all(len(each) == 1 for each in dtypes)
    # products in bf16, of logits of size 1
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.1)


def filled_layer(rows: int = 1) -> CoLT5GrowingLayer:
    """A layer with three tokens, and room for a fourth."""
    layer = CoLT5GrowingLayer()
    for token in torch.arange(3.0):
        layer.update(*token.expand(2, rows, 3, 1, 5).unbind(0))
    return layer


@torch.no_grad()
def test_states_that_somebody_else_put_there_are_read() -> None:
    """Also where they lie as those in the room do."""
    for of_room in (
        lambda room: torch.full_like(room, 7.0)[:, :, :3],
        lambda room: room.view(-1)[:45].view(1, 3, 3, 5),
    ):
        layer = filled_layer()
        layer.keys = of_room(layer.rooms.keys)
        expected = layer.keys.clone()
        keys, _ = layer.update(*torch.zeros(2, 1, 3, 1, 5).unbind(0))
        assert torch.equal(keys[:, :, :3], expected) and not keys[:, :, 3].any()


@torch.no_grad()
def test_transforms_do_not_write_into_the_room() -> None:
    new = torch.arange(2.0).view(2, 1, 1, 1, 1).expand(2, 1, 3, 1, 5)
    layer = filled_layer()
    keys = torch.func.vmap(lambda token: copy.deepcopy(layer).update(token, token)[0])(new)
    assert keys.shape == (2, 1, 3, 4, 5) and keys[1, 0, 0, 3, 0] == 1
    assert layer.get_seq_length() == 3


@torch.no_grad()
def test_a_copy_goes_its_own_way() -> None:
    for make in (copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))):
        layer = filled_layer()
        other = make(layer)
        layer.crop(-1)
        layer.update(*torch.full((2, 1, 3, 2, 5), 5.0).unbind(0))
        other.update(*torch.full((2, 1, 3, 1, 5), 6.0).unbind(0))
        assert layer.keys[0, 0, :, 0].tolist() == [0, 1, 5, 5]
        assert other.keys[0, 0, :, 0].tolist() == [0, 1, 2, 6]


@torch.no_grad()
@pytest.mark.parametrize("copied", [None, "deepcopy", "pickle"])
def test_rows_change_their_places_where_they_are_unless_somebody_holds_them(copied: str | None) -> None:
    """A step of beams then finds its keys at the same addresses, and a view of the keys stays as it was."""
    states = torch.randn(2, 3, 2, 3, 5)
    layer, plain = CoLT5GrowingLayer(), DynamicLayer()
    for each in (layer, plain):
        each.update(*states.unbind(0))
    for places, is_held in (([1, 0, 0], False), ([2, 2, 1], False), ([0, 2, 1], True), ([1, 1, 0], False)):
        new = torch.randn(2, 3, 2, 1, 5)
        length = layer.get_seq_length()
        rooms = layer.room_for_token(length)
        assert rooms is not None
        for room, token in zip(rooms, new, strict=True):
            room[:, :, length : length + 1] = token
        layer.count_token()
        plain.update(*new.unbind(0))
        if copied is not None:
            layer = copy.deepcopy(layer) if copied == "deepcopy" else pickle.loads(pickle.dumps(layer))
        held, address = (layer.keys, layer.values) if is_held else None, layer.rooms.keys.data_ptr()
        kept = held and [part.clone() for part in held]
        for each in (layer, plain):
            each.reorder_cache(torch.tensor(places))
        assert (layer.rooms.keys.data_ptr() == address) == (not is_held)
        if held:
            assert all(map(torch.equal, held, kept))
        # a look at the layer itself would be a view that somebody holds
        other = copy.deepcopy(layer)
        assert torch.equal(other.keys, plain.keys) and torch.equal(other.values, plain.values)
    # other numbers of rows have a memory of their own
    for each in (layer, plain):
        each.reorder_cache(torch.tensor([1, 2]))
    assert torch.equal(layer.keys, plain.keys) and torch.equal(layer.values, plain.values)


@torch.no_grad()
def test_branches_of_a_search_that_are_put_back_keep_their_tokens() -> None:
    layer = filled_layer()
    trunk = layer.keys, layer.values
    layer.update(*torch.full((2, 1, 3, 1, 5), 5.0).unbind(0))
    branch = layer.keys
    layer.keys, layer.values = trunk
    layer.update(*torch.full((2, 1, 3, 1, 5), 6.0).unbind(0))
    assert branch[0, 0, :, 0].tolist() == [0, 1, 2, 5]
    assert layer.keys[0, 0, :, 0].tolist() == [0, 1, 2, 6]


@torch.no_grad()
def test_states_that_do_not_go_on_are_refused() -> None:
    """A copy into the room would spread one row over all."""
    layer = filled_layer(rows=2)
    for shape in ((2, 1, 3, 1, 5), (2, 2, 1, 1, 5), (2, 2, 3, 1, 1)):
        with pytest.raises(RuntimeError, match="(?i)size"):
            copy.deepcopy(layer).update(*torch.zeros(shape).unbind(0))


@torch.no_grad()
def test_offloading_gives_the_room_back() -> None:
    layer = filled_layer()
    layer.offload()
    assert layer.rooms is None
    layer.prefetch()
    assert layer.update(*torch.zeros(2, 1, 3, 1, 5).unbind(0))[0].shape[2] == 4
