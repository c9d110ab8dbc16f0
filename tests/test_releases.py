"""One code base under every release of Transformers: the cache by both its names, all caches, all ways to generate."""

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from models import checkpoint_activations, random_ids, shallow_model
from transformers import DynamicCache, EncoderDecoderCache, StaticCache, T5ForConditionalGeneration, cache_utils

from modeling_colt5 import (
    CoLT5ForCausalLM,
    CoLT5ForConditionalGeneration,
    CoLT5Model,
    run_causal_cache,
    run_release,
)
from modeling_colt5.run_release import CACHE

ROUTED = {"causal_attention": "routed", "causal_feed_forward": "routed"}
NAMES = ("cache", "past_key_values")


def cache_of(output: Any, name: str) -> Any:
    """The cache by one of its names, as an attribute and as an entry."""
    assert getattr(output, name) is output[name] is not None
    return output[name]


@contextlib.contextmanager
def says_what_t5_says(name: str) -> Iterator[None]:
    """Of a cache given under the older name, every forward warns where T5's warns; otherwise nobody does."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    is_deprecated = name == "past_key_values" and "cache" in signature(T5ForConditionalGeneration.forward).parameters
    expected = [FutureWarning] if is_deprecated else []
    assert [warning.category for warning in said] == expected, list(map(str, said))
    for warning in said:
        assert "`past_key_values` is deprecated" in str(warning.message)
        # who looks for his own mistakes by module is not pointed to ours
        assert "modeling_colt5" not in Path(warning.filename).parts[-2:]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model_class", [CoLT5Model, CoLT5ForConditionalGeneration])
@torch.no_grad()
def test_encoder_decoder_goes_on_with_a_cache_under_either_name(model_class: Any, name: str) -> None:
    model = shallow_model(model_class)
    ids, first, second = random_ids(2, 12), random_ids(2, 3), random_ids(2, 1)
    output = model(input_ids=ids, decoder_input_ids=first, use_cache=True)
    encoded = (output.encoder_last_hidden_state,)
    for inputs in ({"input_ids": ids}, {"encoder_outputs": encoded}):
        cache = cache_of(model(input_ids=ids, decoder_input_ids=first, use_cache=True), name)
        with says_what_t5_says(name):
            step = model(**inputs, decoder_input_ids=second, **{name: cache})[0]
        whole = model(input_ids=ids, decoder_input_ids=torch.cat([first, second], 1))[0][:, -1:]
        # the same sums in another order
        torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fields", [{}, ROUTED], ids=["full", "routed"])
@torch.no_grad()
def test_causal_model_and_its_stack_go_on_likewise(fields: dict[str, str], name: str) -> None:
    model = shallow_model(CoLT5ForCausalLM, **fields)
    first, second = random_ids(2, 9), random_ids(2, 1)
    for part in (model, model.decoder):
        cache = cache_of(part(first, use_cache=True), name)
        with says_what_t5_says(name):
            step = part(second, **{name: cache})[0]
        whole = part(torch.cat([first, second], 1))[0][:, -1:]
        torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-5)


def test_both_names_at_once_are_refused() -> None:
    model, causal = shallow_model(), shallow_model(CoLT5ForCausalLM)
    ids = random_ids(1, 5)
    for part, inputs in ((model, {"input_ids": ids, "decoder_input_ids": ids}), (causal, {"input_ids": ids})):
        cache = DynamicCache(config=part.config.get_text_config(decoder=True))
        with pytest.raises(TypeError, match="cache and past_key_values are both given"):
            part(**inputs, cache=cache, past_key_values=cache)
        with says_what_t5_says("cache"):
            part(**inputs, cache=None, past_key_values=None)


def test_no_step_of_evaluation_keeps_the_cache() -> None:
    assert set(NAMES) <= set(shallow_model().config.keys_to_ignore_at_inference)


def test_checkpointed_layers_leave_a_cache_alone() -> None:
    """Recomputed, a layer would write its keys twice."""
    for fields in ({}, ROUTED):
        model = shallow_model(CoLT5ForConditionalGeneration, **fields)
        inputs = {"input_ids": random_ids(2, 12), "labels": random_ids(2, 4)}
        model.train()(**inputs).loss.backward()
        expected = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        checkpoint_activations(model)
        model(**inputs, use_cache=True).loss.backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, ROUTED], ids=["full", "routed"])
@pytest.mark.parametrize("is_encoder_decoder", [True, False])
def test_every_way_to_generate_is_greedy_where_it_should_be(fields: dict[str, str], is_encoder_decoder: bool) -> None:
    torch.manual_seed(0)
    model = shallow_model(CoLT5ForConditionalGeneration if is_encoder_decoder else CoLT5ForCausalLM, **fields)
    ids = random_ids(1, 12)
    # no end before its time
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    greedy = model.generate(ids, **settings)
    for way in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 2}, {"num_beams": 1, "use_cache": False}):
        assert torch.equal(model.generate(ids, **settings, **way), greedy), way
    beams = model.generate(ids.repeat(2, 1), **settings, num_beams=3)
    assert torch.equal(beams[0], beams[1])
    output = model.generate(ids, **settings, return_dict_in_generate=True)
    assert cache_of(output, CACHE) is not None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fields", [{}, ROUTED], ids=["full", "routed"])
@pytest.mark.parametrize("is_encoder_decoder", [True, False])
def test_generation_goes_on_with_a_cache_under_either_name(
    fields: dict[str, str], is_encoder_decoder: bool, name: str
) -> None:
    model = shallow_model(CoLT5ForConditionalGeneration if is_encoder_decoder else CoLT5ForCausalLM, **fields)
    ids = random_ids(1, 12)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    output = model.generate(ids, **settings, return_dict_in_generate=True)
    inputs = {"input_ids": output.sequences}
    if is_encoder_decoder:
        # Transformers tells by the mask that the cache has the first of these tokens already
        mask = torch.ones_like(output.sequences)
        inputs = {"input_ids": ids, "decoder_input_ids": output.sequences, "decoder_attention_mask": mask}
    longer = model.generate(**inputs, **settings, **{name: output[CACHE]})
    assert torch.equal(longer, model.generate(**inputs, **settings))
    with pytest.raises(TypeError, match="cache and past_key_values are both given"):
        model.generate(**inputs, cache=output[CACHE], past_key_values=output[CACHE])


def test_static_cache_of_a_routed_decoder_cannot_be_cropped() -> None:
    """Its length could be taken back, its rings and carried states could not: later tokens would be other ones."""
    model = shallow_model(CoLT5ForCausalLM, **ROUTED)
    config = model.config.get_text_config(decoder=True)
    cache = StaticCache(config=config, max_cache_len=32)
    with torch.no_grad():
        model(random_ids(1, 9), cache=cache)
    assert not cache.layers[0].is_croppable
    with pytest.raises(ValueError, match="tokens_to_remove is -2"):
        cache.layers[0].crop(-2)
    cache.layers[0].crop(0)
    ids = random_ids(1, 9)
    with pytest.raises(ValueError, match="(?i)cache"):
        model.generate(ids, max_new_tokens=4, assistant_model=model, cache_implementation="static")


@torch.no_grad()
def test_caches_of_the_users_own_are_filled_and_read() -> None:
    model = shallow_model()
    ids, first, second = random_ids(2, 12), random_ids(2, 3), random_ids(2, 1)
    config = model.config.get_text_config(decoder=True)
    whole = model(input_ids=ids, decoder_input_ids=torch.cat([first, second], 1)).logits[:, -1:]
    for make in (
        lambda: EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config)),
        lambda: EncoderDecoderCache(
            StaticCache(config=config, max_cache_len=8), StaticCache(config=config, max_cache_len=12)
        ),
    ):
        cache = make()
        model(input_ids=ids, decoder_input_ids=first, cache=cache)
        step = model(input_ids=ids, decoder_input_ids=second, cache=cache).logits
        torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-5)


def test_release_newer_than_tested_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(run_release.logger, "warning_once", said.append)
    major, minor = run_release.NEWEST_TESTED
    tested, newer = (f"{major}.{minor}.3", f"{major}.17.0"), (f"{major}.{minor + 1}.0.dev0", f"{major + 1}.0.0")
    for version, warns in [(version, False) for version in tested] + [(version, True) for version in newer]:
        said.clear()
        monkeypatch.setattr(run_release.transformers, "__version__", version)
        run_release.warn_of_untested_release()
        assert bool(said) is warns, version
        if warns:
            assert f"5.17 to {major}.{minor}" in said[0] and version in said[0]


def test_copies_of_the_code_warn_of_a_release_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(run_release.logger, "handle", lambda record: said.append(record.getMessage()))
    # a release that no other test asks about
    monkeypatch.setattr(run_release.transformers, "__version__", "99.1.0")
    for _ in range(2):
        run_release.warn_of_untested_release()
    spec = importlib.util.spec_from_file_location("another_copy", run_release.__file__)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert len(said) == 1 and "99.1.0" in said[0]


def test_caches_of_another_copy_of_the_code_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers makes cache layers by the name of their type, of the copy that was imported last: a model from the
    Hub beside the package brings such a copy."""
    ids = random_ids(2, 9)
    model = shallow_model(CoLT5ForCausalLM, **ROUTED)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    for mapping in (cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, cache_utils.STATIC_LAYER_TYPE_MAPPING):
        # to be put back afterwards
        monkeypatch.setitem(mapping, run_causal_cache.LAYER_TYPE, mapping[run_causal_cache.LAYER_TYPE])
    spec = importlib.util.spec_from_file_location("another_copy", run_causal_cache.__file__)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    assert not isinstance(layers[0], run_causal_cache.CoLT5DynamicRoutedLayer)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
