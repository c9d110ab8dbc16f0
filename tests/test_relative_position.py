"""T5's buckets and the bias tables by distance, against T5's own attention layer."""

import pytest
import torch
from models import random_ids, tiny_model
from rounding import assert_same_but_for_rounding
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from modeling_colt5 import CoLT5EncoderModel, CoLT5ForCausalLM, CoLT5ForConditionalGeneration
from modeling_colt5.model_layers import (
    CoLT5RelativePositionBias,
    bias_by_distance,
    masked_bias,
    relative_position_bucket,
)
from modeling_colt5.op_attention import bias_by_position, bias_of_sequence

BUCKETS = [(32, 128), (32, 17), (8, 20), (4, 3), (4, 128), (64, 1000)]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), BUCKETS)
def test_buckets_are_t5s(num_buckets, max_distance, bidirectional):
    distance = torch.arange(-1500, 1501)
    bucket = relative_position_bucket(distance, bidirectional, num_buckets, max_distance)
    expected = T5Attention._relative_position_bucket(distance, bidirectional, num_buckets, max_distance)
    assert torch.equal(bucket, expected)
    assert bucket.dtype == torch.int64


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), BUCKETS)
def test_a_table_up_to_the_largest_distance_loses_nothing(num_buckets, max_distance, bidirectional):
    """All distances from max_distance on share one bucket in each direction: what makes clamped distances exact."""
    for sign in (-1, 1):
        beyond = sign * torch.arange(max_distance, 40 * max_distance)
        bucket = relative_position_bucket(beyond, bidirectional, num_buckets, max_distance)
        assert bucket.unique().numel() == 1


@pytest.mark.parametrize("bidirectional", [True, False])
def test_bias_is_t5s_for_every_pair_of_positions(bidirectional):
    heads, length = 3, 300
    config = T5Config(num_heads=heads, d_kv=4, d_model=12, is_decoder=not bidirectional)
    attention = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    bias = CoLT5RelativePositionBias(heads, 32, 128, bidirectional)
    with torch.no_grad():
        bias.weight.copy_(attention.relative_attention_bias.weight.normal_())
        expected = attention.compute_bias(length, length)
        positions = torch.arange(length)
        assert torch.equal(bias_by_position(bias_by_distance(bias), positions, positions)[None], expected)


@pytest.mark.parametrize(("length", "key_length", "past"), [(1, 1, 0), (7, 7, 0), (40, 40, 0), (1, 9, 4), (3, 30, 27)])
def test_bias_of_a_sequence_is_that_of_its_positions(length, key_length, past):
    table = torch.randn(2, 2 * 9 + 1, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(past, past + length), torch.arange(key_length)
    cotangent = torch.randn(2, length, key_length, dtype=torch.float64)
    expected = bias_by_position(table, *positions)
    (expected_gradient,) = torch.autograd.grad(expected, table, cotangent)
    for start in (past, torch.tensor(past)):
        bias = bias_of_sequence(table, length, key_length, start)
        assert torch.equal(bias, expected)
        # the sums are of the same terms in another order
        torch.testing.assert_close(
            *torch.autograd.grad(bias, table, cotangent), expected_gradient, rtol=1e-12, atol=1e-12
        )


def test_bias_of_scattered_positions_is_the_dense_ones_entry():
    """Routed tokens keep the positions that they were routed out of; leading dimensions are independent rows."""
    table = torch.randn(2, 2 * 9 + 1)
    queries, keys = torch.randint(0, 60, (4, 5)), torch.randint(0, 60, (4, 7))
    bias = bias_by_position(table, queries, keys)
    assert bias.shape == (4, 2, 5, 7)
    for row in range(4):
        for head in range(2):
            for i, query in enumerate(queries[row].tolist()):
                for j, key in enumerate(keys[row].tolist()):
                    assert bias[row, head, i, j] == table[head, 9 + max(-9, min(9, key - query))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_table_is_fp32_or_better_and_differentiable(dtype):
    bias = CoLT5RelativePositionBias(2, 8, 20, True).to(dtype)
    table = bias_by_distance(bias)
    assert table.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert table.shape == (2, 41)
    table.sum().backward()
    # each bucket's gradient is the number of distances that read it
    bucket = T5Attention._relative_position_bucket(torch.arange(-20, 21), True, 8, 20)
    counts = torch.bincount(bucket, minlength=8).to(dtype)
    assert torch.equal(bias.weight.grad, counts[:, None].expand(8, 2))


def test_a_loaded_models_buckets_are_its_own(tmp_path):
    model = tiny_model(CoLT5EncoderModel)
    model.save_pretrained(tmp_path)
    assert not [name for name in model.state_dict() if "bucket" in name]
    bias = CoLT5EncoderModel.from_pretrained(tmp_path).encoder.light_relative_attention_bias
    distance = torch.arange(-bias.max_distance, bias.max_distance + 1)
    config = model.config
    sizes = (config.relative_attention_num_buckets, config.relative_attention_max_distance)
    assert torch.equal(bias.bucket, T5Attention._relative_position_bucket(distance, True, *sizes))


ADAPTERS = {
    "low rank": {"target_modules": r".*relative_attention_bias"},
    "low rank and size": {"target_modules": r".*relative_attention_bias", "use_dora": True},
    "some buckets": {
        "target_modules": ["q"],
        "trainable_token_indices": {f"{kind}relative_attention_bias": [0, 3] for kind in ("", "light_", "heavy_")},
    },
    "saved": {
        "target_modules": ["q"],
        "modules_to_save": [f"{kind}relative_attention_bias" for kind in ("", "light_", "heavy_")],
    },
}
ROUTED = {"causal_attention": "routed", "causal_window": 8, "causal_routed_keys": 12}


@pytest.mark.slow
@pytest.mark.parametrize("way", ADAPTERS)
@pytest.mark.parametrize(("model_class", "fields"), [(CoLT5ForConditionalGeneration, {}), (CoLT5ForCausalLM, ROUTED)])
def test_adapters_of_a_bias_train_it_and_merge_into_it(model_class, fields, way):
    peft = pytest.importorskip("peft")
    options = dict(ADAPTERS[way])
    plain = tiny_model(model_class, **fields)
    biases = [name for name, part in plain.named_modules() if isinstance(part, CoLT5RelativePositionBias)]
    for option in ("trainable_token_indices", "modules_to_save"):
        # PEFT wants every name that it is given to be there
        if option in options:
            there = {name.rpartition(".")[2] for name in biases}
            given = options[option]
            options[option] = {n: given[n] for n in there} if isinstance(given, dict) else sorted(there)
    model = peft.get_peft_model(plain, peft.LoraConfig(r=2, **options))
    inputs = {"input_ids": random_ids(2, 20)}
    if model_class is CoLT5ForConditionalGeneration:
        inputs["decoder_input_ids"] = random_ids(2, 9)
    with torch.no_grad():
        before = model(**inputs).logits
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "relative_attention_bias" in n}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter))
    adapted = model(**inputs).logits
    adapted.square().mean().backward()
    for name in biases:
        gradients = [parameter.grad for key, parameter in trained.items() if f"{name}." in key]
        assert gradients and all(gradient.any() for gradient in gradients), name
    assert (adapted - before).abs().max() > 0.01
    merged = model.merge_and_unload()
    assert type(merged.get_submodule(biases[0])) is CoLT5RelativePositionBias
    with torch.no_grad():
        assert_same_but_for_rounding(merged(**inputs).logits, adapted)


@pytest.mark.parametrize("mask_kind", [None, "bool", "additive"])
@pytest.mark.parametrize(("queries", "keys", "past"), [(5, 5, 0), (3, 7, 4), (3, 7, 0), (1, 4, 3)])
def test_bias_and_mask_are_one_tensor_entry_by_entry(queries, keys, past, mask_kind):
    """Of a static cache the keys behind the queries are empty."""
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(1, 2, queries, keys, generator=generator)
    sees = torch.rand(3, 1, queries, keys, generator=generator) < 0.6
    added = torch.randn(3, 1, queries, keys, generator=generator)
    mask = {None: None, "bool": sees, "additive": added}[mask_kind]
    made = masked_bias(bias, mask, past, torch.float64)
    rows = 1 if mask is None else 3
    assert made.shape == (rows, 2, queries, keys) and made.dtype == torch.float64
    for row in range(rows):
        for query in range(queries):
            for key in range(keys):
                number = bias[0, :, query, key].double()
                if mask_kind == "additive":
                    number = number + added[row, 0, query, key].double()
                elif not (key <= past + query if mask is None else sees[row, 0, query, key]):
                    number = torch.full_like(number, torch.finfo(torch.float64).min)
                assert torch.equal(made[row, :, query, key], number)


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("under_autocast", [False, True])
def test_layers_share_the_bias_with_the_mask_in_it(has_mask, under_autocast, monkeypatch):
    """Kept once for the backward pass, of n² numbers a head, whatever the number of layers."""
    model = tiny_model(CoLT5ForCausalLM, num_decoder_layers=3).train()
    ids = random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def noting(*args, attn_mask=None, **kwargs):
        seen.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
        loss = model(ids, attention_mask=mask if has_mask else None, labels=ids).loss
    loss.backward()
    assert len(seen) == 3 and len({id(given) for given in seen}) == 1
    assert seen[0].dtype == (torch.bfloat16 if under_autocast else torch.float32)
    assert model.decoder.relative_attention_bias.weight.grad.any()
