"""`generate` that goes on with a filled cache: what it writes is what it writes without one."""

import pytest
import torch
from models import random_ids, shallow_model
from transformers import EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput

from modeling_colt5 import CoLT5ForConditionalGeneration
from modeling_colt5.run_release import CACHE

KINDS = {
    "full": {},
    "routed": {"causal_attention": "routed", "causal_feed_forward": "routed", "causal_window": 4},
    "routed memory": {"routed_cross_key_values": 6},
}
SETTINGS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "disable_compile": True}
SETTINGS |= {"output_logits": True, "return_dict_in_generate": True}


def static_cache(model: CoLT5ForConditionalGeneration) -> EncoderDecoderCache:
    config = model.config.get_text_config(decoder=True)
    return EncoderDecoderCache(StaticCache(config, max_cache_len=20), StaticCache(config, max_cache_len=12))


def filled_cache(model, ids, decoder_ids, is_static):
    given = {"cache": static_cache(model)} if is_static else {}
    with torch.no_grad():
        return model(input_ids=ids, decoder_input_ids=decoder_ids, use_cache=True, **given)[CACHE]


GIVEN = ["whole", "whole and mask", "padded and mask", "encoder_outputs"]


# each two of the settings meet
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "is_static", "given"),
    [
        pytest.param(kind, (row + column) % 2 == 1, given, id=f"{kind}-{given}")
        for row, kind in enumerate(KINDS)
        for column, given in enumerate(GIVEN)
    ],
)
def test_tokens_that_the_cache_has_are_not_read_again(kind, is_static, given):
    torch.manual_seed(0)
    model, ids = shallow_model(**KINDS[kind]), random_ids(2, 12)
    start = torch.cat([torch.zeros(2, 1, dtype=torch.int64), random_ids(2, 7)], 1)
    # what is left to read does not depend on the cache's kind: of a static one, a single length
    for past in (5,) if is_static or given == "encoder_outputs" else (1, 5, 7):
        inputs = {"input_ids": ids, "decoder_input_ids": start}
        if given.endswith("mask"):
            inputs["decoder_attention_mask"] = torch.ones_like(start)
        mask = None
        if given == "padded and mask":
            # of the second row, which has one token fewer before its start
            inputs["decoder_attention_mask"][1, 0] = 0
            mask = inputs["decoder_attention_mask"][:, :past].clone()
            if past == 1:
                continue
        if given == "encoder_outputs":
            inputs["encoder_outputs"] = BaseModelOutput(model.encoder(inputs.pop("input_ids")).last_hidden_state)
        extra = {"cache": static_cache(model)} if is_static else {}
        with torch.no_grad():
            begun = model(
                input_ids=ids, decoder_input_ids=start[:, :past], decoder_attention_mask=mask, use_cache=True, **extra
            )
        expected = model.generate(**inputs, **SETTINGS, use_cache=False)
        longer = model.generate(**inputs, **SETTINGS, **{CACHE: begun[CACHE]})
        for one, other in zip(longer.logits, expected.logits, strict=True):
            # fp32, the same sums in another order
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert torch.equal(longer.sequences, expected.sequences)
        assert int(begun[CACHE].get_seq_length()) == start.shape[1] + 4


@pytest.mark.parametrize("kind", KINDS)
def test_beams_go_on_with_a_cache_of_as_many_rows(kind):
    torch.manual_seed(0)
    model, ids = shallow_model(**KINDS[kind]), random_ids(2, 12)
    start = torch.cat([torch.zeros(2, 1, dtype=torch.int64), random_ids(2, 5)], 1)
    cache = filled_cache(model, ids.repeat_interleave(3, 0), start[:, :4].repeat_interleave(3, 0), is_static=False)
    inputs = {"decoder_input_ids": start, "num_beams": 3, **SETTINGS}
    expected = model.generate(ids, **inputs, use_cache=False)
    assert torch.equal(model.generate(ids, **inputs, **{CACHE: cache}).sequences, expected.sequences)


@pytest.mark.parametrize("kind", KINDS)
def test_an_assistant_goes_on_with_its_cache(kind):
    """All that a model proposes to itself is right, so that its decoder runs once for each new token."""
    torch.manual_seed(0)
    model, ids = shallow_model(**KINDS[kind]), random_ids(1, 12)
    model.generation_config.update(
        num_assistant_tokens=4, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    settings = {"max_new_tokens": 15, "min_new_tokens": 15, "do_sample": False}
    expected = model.generate(ids, **settings, use_cache=False)
    read = []
    model.decoder.register_forward_pre_hook(
        lambda _, args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    assert torch.equal(model.generate(ids, **settings, assistant_model=model), expected)
    # three rounds of four proposals. Each round reads the five, and its assistant the last that it has not read, which
    # are two after a round that was right
    assert read == [1, 1, 1, 1, 5, 2, 1, 1, 1, 5, 2, 1, 1, 1, 5]
