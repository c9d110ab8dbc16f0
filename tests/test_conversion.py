"""Warm start: a converted model computes what its source computes, wherever that is promised."""

import pytest
import torch
from transformers import (
    LongT5Config,
    LongT5ForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from modeling_colt5.conversion import _measure, convert

TINY = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    # none of these is CoLT5's own
    "pad_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 4,
}
FULL = {
    "routed_feed_forward_fraction": 1.0,
    "routed_query_fraction": 1.0,
    "routed_key_value_fraction": 1.0,
}


def make_t5(feed_forward_proj: str, scale_decoder_outputs: bool, own_head: bool) -> T5ForConditionalGeneration:
    """A T5 with random weights, large enough that every path matters."""
    model = T5ForConditionalGeneration(T5Config(**TINY, feed_forward_proj=feed_forward_proj))
    model.config.scale_decoder_outputs = scale_decoder_outputs
    if own_head:
        # version 5 ties the head silently
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model.eval().double()


def make_longt5(kind: str) -> LongT5ForConditionalGeneration:
    """A LongT5 with random weights and a small radius."""
    config = LongT5Config(**TINY, local_radius=7, encoder_attention_type=kind, feed_forward_proj="gated-gelu")
    return LongT5ForConditionalGeneration(config).eval()


def logits(model: PreTrainedModel, length: int) -> torch.Tensor:
    """The logits of fixed random inputs, one row partly padded."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(2, 64, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length * 2 // 3 :] = 0
    targets = torch.randint(2, 64, (2, 9), generator=generator)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, decoder_input_ids=targets).logits


@pytest.mark.parametrize(
    ("feed_forward_proj", "scale_decoder_outputs", "own_head"),
    [("relu", True, False), ("gated-gelu", False, True), ("gated-silu", False, True)],
    ids=["t5-1.0", "t5-1.1", "ul2"],
)
@pytest.mark.parametrize("measured", [False, True], ids=["by weights", "by sample"])
def test_t5_is_the_same_function_at_full_budgets(feed_forward_proj, scale_decoder_outputs, own_head, measured):
    source = make_t5(feed_forward_proj, scale_decoder_outputs, own_head)
    batch = {"input_ids": torch.randint(2, 64, (2, 30)), "attention_mask": torch.ones(2, 30, dtype=torch.long)}
    model = convert(source, samples=[batch] if measured else None, local_radius=127, **FULL)
    expected = logits(source, 50)
    # float64: only the order of sums differs
    assert (logits(model, 50) - expected).abs().max() < 1e-9 * expected.abs().max()
    assert model.config.tie_word_embeddings != own_head
    for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
        assert getattr(model.config, name) == getattr(source.config, name), name


def test_longt5_local_is_the_same_function_at_any_length_and_budget():
    source = make_longt5("local")
    model = convert(source)
    assert model.config.num_light_heads == 4 and model.config.local_radius == 7
    # the heavy feed-forward holds units of the source: it must see every token
    model.set_routing_budget(feed_forward=1.0)
    for length in (5, 16, 70):
        expected = logits(source, length)
        # fp32, logits of up to some tens
        assert (logits(model, length) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_longt5_with_heavy_heads_is_the_same_up_to_its_radius():
    source = make_longt5("local")
    model = convert(source, num_light_heads=1, num_heavy_heads=3, **FULL)
    expected = logits(source, 8)
    assert (logits(model, 8) - expected).abs().max() < 1e-5 * expected.abs().max()
    # beyond it heavy heads see more than LongT5's did: were they equal, the heads would not be heavy
    assert (logits(model, 40) - logits(source, 40)).abs().max() > 1e-3


def test_fewer_cross_heads_are_means_of_neighbours():
    source = make_t5("gated-gelu", False, True)
    model = convert(source, num_cross_key_value_heads=2, **FULL)
    old = source.decoder.block[1].layer[1].EncDecAttention.k.weight.view(4, 8, 32)
    new = model.decoder.block[1].layer[1].EncDecAttention.k.weight.view(2, 8, 32)
    torch.testing.assert_close(new, torch.stack([(old[0] + old[1]) / 2, (old[2] + old[3]) / 2]))
    assert logits(model, 20).isfinite().all()


def test_a_near_head_and_a_large_unit_become_light():
    source = make_t5("relu", True, False)
    with torch.no_grad():
        # head 2 looks at itself and nowhere else
        source.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight[:, 2] = -30.0
        source.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight[0, 2] = 30.0
        source.encoder.block[1].layer[1].DenseReluDense.wo.weight[:, 5] = 100.0
    batch = {"input_ids": torch.randint(2, 64, (1, 40))}
    for samples in (None, [batch]):
        model = convert(source, samples=samples, num_light_heads=1, light_d_ff=1, local_radius=3)
        attention = model.encoder.block[1].layer[0]
        q = source.encoder.block[1].layer[0].SelfAttention.q.weight
        torch.testing.assert_close(attention.light_attention.q.weight, q[16:24])
        wo = model.encoder.block[1].layer[1].light_feed_forward.wo.weight
        torch.testing.assert_close(wo, torch.full_like(wo, 100.0))


def test_light_heads_are_near_and_add_much():
    """Head 3 looks at itself and adds most, head 1 looks at itself, head 0 adds as much as 3, but from far away."""
    source = make_t5("relu", True, False)
    with torch.no_grad():
        bias = source.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        bias[:, [1, 3]] = -30.0
        bias[0, [1, 3]] = 30.0
        # distances of at least 8, to both sides
        bias[:, 0] = -30.0
        bias[8:16, 0] = bias[24:32, 0] = 30.0
        for block in source.encoder.block:
            for head in (0, 3):
                block.layer[0].SelfAttention.o.weight[:, 8 * head : 8 * head + 8] *= 5
    batch = {"input_ids": torch.randint(2, 64, (1, 40))}
    for samples in (None, [batch]):
        for heads in ([3], [1, 3]):
            model = convert(source, samples=samples, num_light_heads=len(heads), local_radius=3)
            for old, new in zip(source.encoder.block, model.encoder.block, strict=True):
                expected = torch.cat([old.layer[0].SelfAttention.q.weight[8 * head : 8 * head + 8] for head in heads])
                torch.testing.assert_close(new.layer[0].light_attention.q.weight, expected)


def test_what_heads_add_is_measured_on_real_tokens_within_the_radius():
    """Against the sum written out, token by token, for T5's own weights and values."""
    source = make_t5("relu", True, False)
    source.encoder.set_attn_implementation("eager")
    batch = {"input_ids": torch.randint(2, 64, (2, 20)), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
    batch["attention_mask"][1, 13:] = 0
    expected = torch.zeros(4)
    with torch.no_grad():
        output = source.encoder(**batch, output_attentions=True, output_hidden_states=True)
        for block, states, weights in zip(source.encoder.block, output.hidden_states, output.attentions, strict=False):
            attention = block.layer[0].SelfAttention
            values = attention.v(block.layer[0].layer_norm(states)).view(2, 20, 4, 8)
            for row, length in enumerate((20, 13)):
                for i in range(length):
                    for head in range(4):
                        near = range(max(0, i - 3), min(20, i + 4))
                        state = sum(weights[row, head, i, j] * values[row, j, head] for j in near)
                        expected[head] += (attention.o.weight[:, 8 * head : 8 * head + 8] @ state).norm()
    config = convert(source, local_radius=3).config
    found, _ = _measure(source, config, [batch])
    # computed in fp32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_samples_that_nothing_can_be_measured_on_are_refused():
    """Without a batch, heads and units would be chosen by their numbers."""
    source, ids = make_t5("relu", True, False), torch.randint(2, 64, (1, 12))
    read_before = iter([{"input_ids": ids}])
    convert(source, samples=read_before)
    for samples in ([], read_before):
        with pytest.raises(ValueError, match="samples has no batch"):
            convert(source, samples=samples)
    for samples, kind in (([ids], "Tensor"), ({"input_ids": ids}, "str")):
        with pytest.raises(TypeError, match=f"samples holds a {kind}; each must be a batch"):
            convert(source, samples=samples)


def test_the_source_is_left_as_it_was():
    source = make_t5("relu", True, False).train()
    before = {name: weight.clone() for name, weight in source.state_dict().items()}
    implementation = source.encoder.config._attn_implementation
    assert implementation == source.config._attn_implementation == "sdpa"
    convert(source, samples=[{"input_ids": torch.randint(2, 64, (1, 12))}])
    assert source.training
    for model in (source, source.encoder, source.decoder):
        assert model.config._attn_implementation == implementation
    for name, weight in source.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_bad_sources_and_sizes_are_refused():
    with pytest.raises(TypeError, match="source is a T5EncoderModel"):
        convert(T5EncoderModel(T5Config(**TINY)))
    with pytest.raises(ValueError, match="light and heavy heads are 5 and 3; the source's 4"):
        convert(make_t5("relu", True, False), num_light_heads=5, num_heavy_heads=3)
    with pytest.raises(ValueError, match="light and heavy d_ff are 8 and 16; the source's 48"):
        convert(make_t5("relu", True, False), light_d_ff=8, heavy_d_ff=16)
    for fields in ({"causal_attention": "local"}, {"routing": "none"}, {"causal_feed_forward": "routed"}):
        (name,) = fields
        with pytest.raises(ValueError, match=f"{name} is '.*'; it must be "):
            convert(make_t5("relu", True, False), **fields)
    with pytest.raises(ValueError, match="d_model is given as 16; it must be left out"):
        convert(make_t5("relu", True, False), d_model=16)
