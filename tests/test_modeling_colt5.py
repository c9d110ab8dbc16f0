"""The models: T5 as the limit, padding, gradients of the routers, outputs, memory, errors."""

import math
import weakref

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from models import ENCODER_HEADS, pad, random_ids, tiny_config, tiny_model
from rounding import assert_same_but_for_rounding
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from modeling_colt5 import (
    CoLT5EncoderModel,
    CoLT5ForCausalLM,
    CoLT5ForConditionalGeneration,
    CoLT5ForQuestionAnswering,
    CoLT5ForSequenceClassification,
    CoLT5ForTokenClassification,
    CoLT5Model,
)
from modeling_colt5.model_encoder_layer import CoLT5EncoderBlock, CoLT5LocalAttention
from modeling_colt5.model_from_config import encoder_settings
from modeling_colt5.model_layers import CoLT5DenseActDense
from modeling_colt5.run_plan import EncoderPlan


@torch.no_grad()
def deal_out(t5: T5ForConditionalGeneration, model: CoLT5ForConditionalGeneration) -> None:
    """Copy T5's weights into a CoLT5: heads and feed-forward units of the encoder go to light and heavy branches."""
    config = model.config
    light_heads, light_units = config.num_light_heads, config.light_d_ff
    light_width = light_heads * config.d_kv
    model.shared.weight.copy_(t5.shared.weight)
    model.lm_head.weight.copy_(t5.lm_head.weight)
    bias = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    model.encoder.light_relative_attention_bias.weight.copy_(bias[:, :light_heads])
    model.encoder.heavy_relative_attention_bias.weight.copy_(bias[:, light_heads:])
    for ours, theirs in zip(model.encoder.block, t5.encoder.block, strict=True):
        attention, feed_forward = ours.layer
        attention.layer_norm.weight.copy_(theirs.layer[0].layer_norm.weight)
        feed_forward.layer_norm.weight.copy_(theirs.layer[1].layer_norm.weight)
        source = theirs.layer[0].SelfAttention
        for branch, part in (
            (attention.light_attention, slice(0, light_width)),
            (attention.heavy_attention, slice(light_width, None)),
        ):
            for name in "qkv":
                getattr(branch, name).weight.copy_(getattr(source, name).weight[part])
            branch.o.weight.copy_(source.o.weight[:, part])
        source = theirs.layer[1].DenseReluDense
        for branch, part in (
            (feed_forward.light_feed_forward, slice(0, light_units)),
            (feed_forward.heavy_feed_forward, slice(light_units, None)),
        ):
            for name in ("wi_0", "wi_1") if config.is_gated_act else ("wi",):
                getattr(branch, name).weight.copy_(getattr(source, name).weight[part])
            branch.wo.weight.copy_(source.wo.weight[:, part])
    model.encoder.final_layer_norm.weight.copy_(t5.encoder.final_layer_norm.weight)
    decoder = t5.decoder.state_dict()
    first = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    decoder["relative_attention_bias.weight"] = decoder.pop(first)
    model.decoder.load_state_dict(decoder, strict=True)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@torch.no_grad()
def test_t5_is_the_limit(version, dtype, attn_implementation):
    """Budgets of 1, a band over the whole input, all key/value heads: T5 1.1 (gated, untied) and T5 1.0 (relu, tied,
    scaled) are the same function. Longer than a block and than the largest distance, with padding on both sides."""
    old = version == "1.0"
    projection = "relu" if old else "gated-gelu"
    t5_config = T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4,
        feed_forward_proj=projection, dropout_rate=0.0, tie_word_embeddings=old, decoder_start_token_id=0,
        attn_implementation=attn_implementation,
    )  # fmt: skip
    t5 = T5ForConditionalGeneration(t5_config)
    assert t5_config.scale_decoder_outputs == old
    if not old:
        # transformers ties the head of a T5 1.1 that was not loaded
        t5.lm_head.weight = nn.Parameter(torch.randn_like(t5.lm_head.weight))
    for parameter in t5.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    model = tiny_model(
        attn_implementation=attn_implementation,
        num_light_heads=1, num_heavy_heads=3, light_d_ff=20, heavy_d_ff=28, local_radius=200,
        routed_feed_forward_fraction=1, routed_query_fraction=1, routed_key_value_fraction=1,
        num_cross_key_value_heads=4, feed_forward_proj=projection, tie_word_embeddings=old, scale_decoder_outputs=old,
    )  # fmt: skip
    deal_out(t5, model)
    t5, model = t5.to(dtype).eval(), model.to(dtype)
    batch = pad([random_ids(180), random_ids(30), random_ids(1)], "left", 190)
    batch["attention_mask"][0, 150:] = 0
    decoder_ids = random_ids(3, 17)
    decoder_mask = torch.ones_like(decoder_ids)
    decoder_mask[2, 9:] = 0
    inputs = {**batch, "decoder_input_ids": decoder_ids, "decoder_attention_mask": decoder_mask}
    expected = t5(**inputs).logits
    logits = model(**inputs).logits
    # sums of another order: 1e-9 in float64, 1e-5 of the largest logit in fp32
    limit = 1e-9 if dtype == torch.float64 else 1e-5 * expected.abs().max()
    assert (logits - expected).abs().max() <= limit
    labels = random_ids(3, 17)
    loss, t5_loss = model(**batch, labels=labels).loss, t5(**batch, labels=labels).loss
    assert abs(loss - t5_loss) < 1e-5


def placements(rows: list[torch.Tensor]):
    """The same rows alone, padded to either side, in batches of several sizes, at several padded lengths; with each
    batch the rows that it holds."""
    for i in range(len(rows)):
        yield pad([rows[i]]), [i]
        yield pad([rows[i]], "left", len(rows[i]) + 13), [i]
        yield pad([rows[i]], "right", 384), [i]
    everything = list(range(len(rows)))
    yield pad(rows, "right"), everything
    yield pad(rows, "left", 301), everything
    yield pad(rows[1:], "left"), everything[1:]
    yield pad([*rows, random_ids(256)], "right"), [*everything, None]


@pytest.mark.parametrize("routing", ["learned", "even", "random", "none"])
@torch.no_grad()
def test_padding_never_changes_the_encoders_output(routing):
    model = tiny_model(CoLT5EncoderModel, routing=routing)
    rows = [random_ids(n) for n in (150, 31, 1, 128, 7)]
    alone = [model(row[None]).last_hidden_state[0] for row in rows]
    for batch, members in placements(rows):
        states = model(**batch).last_hidden_state
        for row, i in enumerate(members):
            if i is not None:
                real = states[row, batch["attention_mask"][row].bool()]
                # sums of another order, in fp32
                torch.testing.assert_close(real, alone[i], atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_stands_under_the_padding_never_matters():
    """Holes too; and the states there may be anything for `inputs_embeds`."""
    model = tiny_model(CoLT5EncoderModel)
    mask = torch.ones(2, 60, dtype=torch.int64)
    mask[0, 20:33], mask[1, :9] = 0, 0
    embeds = torch.randn(2, 60, 32)
    expected = model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state[mask.bool()]
    for filling in (torch.randn(2, 60, 32), torch.tensor(1e4), torch.tensor(0.0)):
        other = torch.where(mask[..., None].bool(), embeds, filling)
        states = model(inputs_embeds=other, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(states[mask.bool()], expected, atol=1e-5, rtol=0)
    for kind in (torch.bool, torch.float32, torch.int32):
        states = model(inputs_embeds=embeds, attention_mask=mask.to(kind)).last_hidden_state
        assert_same_but_for_rounding(states[mask.bool()], expected)


def seq2seq_loss_gradients(model, batch, labels) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch, labels=labels).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("float64_statistics")
def test_padding_never_changes_the_gradients(dtype):
    model = tiny_model(dtype=dtype)
    rows, labels = [random_ids(n) for n in (40, 17, 9)], random_ids(3, 6)
    # the loss is the mean over all labels, as many in each row: the rows' own gradients add up
    alone = [seq2seq_loss_gradients(model, pad([row]), label[None]) for row, label in zip(rows, labels, strict=True)]
    expected = {name: sum(gradients[name] for gradients in alone) / 3 for name in alone[0]}
    for side, length in (("right", None), ("left", 61), ("right", 140)):
        gradients = seq2seq_loss_gradients(model, pad(rows, side, length), labels)
        for name, gradient in gradients.items():
            # sums of another order; in fp32 1e-5 of the largest entry
            limit = (1e-5 if dtype == torch.float32 else 1e-12) * max(1, expected[name].abs().max())
            assert (gradient - expected[name]).abs().max() <= limit, name


def test_padding_gets_no_gradient():
    model = tiny_model(CoLT5EncoderModel)
    mask = torch.ones(2, 50)
    mask[0, 30:], mask[1, 10:20] = 0, 0
    embeds = torch.randn(2, 50, 32, requires_grad=True)
    states = model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    (states * torch.randn_like(states))[mask.bool()].sum().backward()
    assert (embeds.grad[~mask.bool()] == 0).all()
    assert (embeds.grad[mask.bool()].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_and_rows_of_padding_are_finite(dtype, attn_implementation):
    """Rows partly and wholly padded, forward and backward; LongT5 is not finite in fp16 here."""
    model = tiny_model(dtype=dtype, attn_implementation=attn_implementation)
    batch = pad([random_ids(150), random_ids(20), random_ids(1)], "left")
    batch["attention_mask"][2] = 0
    output = model(**batch, labels=random_ids(3, 5), output_hidden_states=True)
    assert output.encoder_last_hidden_state.dtype == dtype
    assert output.logits.isfinite().all() and output.loss.isfinite()
    assert all(states.isfinite().all() for states in output.encoder_hidden_states)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("model_class", ENCODER_HEADS)
def test_heads_are_finite_for_a_row_of_padding(model_class):
    model = tiny_model(model_class)
    batch = pad([random_ids(20), random_ids(1)])
    batch["attention_mask"][1] = 0
    labels = {
        CoLT5ForSequenceClassification: {"labels": torch.tensor([0, 1])},
        CoLT5ForTokenClassification: {"labels": torch.randint(0, 2, (2, 20))},
        CoLT5ForQuestionAnswering: {"start_positions": torch.tensor([3, 0]), "end_positions": torch.tensor([5, 0])},
    }[model_class]
    output = model(**batch, **labels)
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def routers(model) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "router" in name}


@pytest.mark.parametrize(
    "solver",
    [{}, {"soft_topk_solver": "coordinate_descent", "routing_epsilon_init": 4.0, "routing_epsilon_decay": 0.7}],
)
@pytest.mark.usefixtures("float64_statistics")
def test_every_router_gets_the_gradient_of_finite_differences(solver):
    model = tiny_model(dtype=torch.float64, num_layers=3, **solver)
    inputs = {**pad([random_ids(50), random_ids(23)], "left"), "labels": random_ids(2, 6)}

    def loss_and_routing():
        output = model(**inputs, output_routing=True)
        kinds = [
            kind for layer in output.encoder_routing for kind in (layer.query, layer.key_value, layer.feed_forward)
        ]
        return output.loss, torch.cat([kind.indices.flatten() for kind in kinds])

    loss, chosen = loss_and_routing()
    loss.backward()
    assert len(routers(model)) == 3 * 3
    step = 1e-6
    for name, router in routers(model).items():
        direction = torch.randn_like(router)
        with torch.no_grad():
            losses = []
            for sign in (1, -1):
                router += sign * step * direction
                loss, again = loss_and_routing()
                losses.append(loss.item())
                # a step over a change of the selection would not be a derivative
                assert torch.equal(chosen, again)
                router -= sign * step * direction
        difference = (losses[0] - losses[1]) / (2 * step)
        gradient = (router.grad * direction).sum().item()
        assert abs(gradient) > 1e-6, name
        # the loss is about 5, so that float64 leaves 5 * 2e-16 / 1e-6; truncation is of order 1e-12
        assert abs(gradient - difference) < 2e-9 + 1e-6 * abs(gradient), name


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_every_parameter_gets_a_gradient(attn_implementation):
    model = tiny_model(attn_implementation=attn_implementation)
    gradients = seq2seq_loss_gradients(model, pad([random_ids(50), random_ids(23)]), random_ids(2, 6))
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name


@torch.no_grad()
def test_eager_and_sdpa_agree_and_only_eager_has_weights():
    model = tiny_model()
    inputs = {**pad([random_ids(150), random_ids(40)], "left"), "decoder_input_ids": random_ids(2, 9)}
    sdpa = model(**inputs).logits
    model.set_attn_implementation("eager")
    # fp32, three layers a stack
    torch.testing.assert_close(model(**inputs).logits, sdpa, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="(?i)flash"):
        tiny_model(attn_implementation="flash_attention_2")


@torch.no_grad()
def test_attentions_have_the_documented_shapes_and_sum_to_one():
    model = tiny_model(attn_implementation="eager", local_radius=5)
    batch = pad([random_ids(40), random_ids(22)], "left")
    output = model(**batch, decoder_input_ids=random_ids(2, 7), output_attentions=True, output_routing=True)
    real = batch["attention_mask"].bool()
    assert len(output.encoder_attentions) == len(output.encoder_heavy_attentions) == 2
    for light, heavy, routing in zip(
        output.encoder_attentions, output.encoder_heavy_attentions, output.encoder_routing, strict=True
    ):
        assert light.shape == (2, 2, 40, 11)
        # 40 / 4 queries, 40 / 3 keys
        assert heavy.shape == (2, 3, 10, 14)
        torch.testing.assert_close(light.sum(-1)[:, 0][real], torch.ones(62))
        torch.testing.assert_close(heavy.sum(-1), torch.ones(2, 3, 10))
        # entry r + d is token i's weight on token i + d: none outside of the sequence, none on padding
        for row in range(2):
            for i in range(40):
                for offset in range(-5, 6):
                    if real[row, i] and not (0 <= i + offset < 40 and real[row, i + offset]):
                        assert (light[row, :, i, 5 + offset] == 0).all()
        assert (heavy.masked_select(~routing.key_value.valid[:, None, None, :]) == 0).all()
    assert [tuple(weights.shape) for weights in output.decoder_attentions] == [(2, 4, 7, 7)] * 3
    assert [tuple(weights.shape) for weights in output.cross_attentions] == [(2, 4, 7, 40)] * 3
    for weights in output.cross_attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7))
        assert (weights.masked_select(~real[:, None, None, :]) == 0).all()
    assert (output.decoder_attentions[0].triu(1) == 0).all()


@torch.no_grad()
def test_light_attentions_are_the_branchs_weights():
    """The light branch's output recomputed from the weights that `output_attentions` returns."""
    model = tiny_model(CoLT5EncoderModel, attn_implementation="eager", num_layers=1)
    branch, seen = model.encoder.block[0].layer[0].light_attention, []
    branch.register_forward_hook(lambda module, inputs, outputs: seen.append((inputs[0], outputs[0])))
    weights = model(random_ids(1, 20), output_attentions=True).attentions[0][0]
    ((states, output),) = seen
    dense = torch.zeros(2, 20, 20)
    for i in range(20):
        for offset in range(-5, 6):
            if 0 <= i + offset < 20:
                dense[:, i, i + offset] = weights[:, i, 5 + offset]
    values = branch.v(states[0]).view(20, 2, 8)
    expected = branch.o(torch.einsum("hij,jhd->ihd", dense, values).flatten(1))
    torch.testing.assert_close(output[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("by", ["call", "config"])
@torch.no_grad()
def test_routing_is_returned_on_request(by):
    model = tiny_model(routed_query_fraction=1 / 16, routed_key_value_fraction=1 / 8)
    batch = pad([random_ids(100), random_ids(33), random_ids(2)], "left")
    inputs = {**batch, "decoder_input_ids": random_ids(3, 4)}
    assert model(**inputs).encoder_routing is None
    assert model.get_encoder()(**batch).routing is None
    flags = {"output_routing": True} if by == "call" else {}
    model.config.output_routing = by == "config"
    routing = model(**inputs, **flags).encoder_routing
    from_encoder = model.get_encoder()(**batch, **flags).routing
    assert len(routing) == len(from_encoder) == model.config.num_layers
    budgets = {"query": [7, 3, 1], "key_value": [13, 5, 1], "feed_forward": [20, 7, 1]}
    real = batch["attention_mask"].bool()
    for layer, other in zip(routing, from_encoder, strict=True):
        for kind, budget in budgets.items():
            routed = layer[kind]
            assert routed.indices.dtype == torch.int64 and routed.weights.dtype == torch.float32
            assert routed.indices.shape == routed.weights.shape == routed.valid.shape == (3, max(budget))
            assert routed.valid.sum(-1).tolist() == budget
            assert torch.equal(routed.indices, other[kind].indices)
            for row in range(3):
                valid = routed.valid[row]
                used = routed.indices[row, valid]
                assert valid[: budget[row]].all()
                assert real[row, used].all() and (used.diff() > 0).all()
                weights = routed.weights[row, valid]
                assert (weights > 0).all() and (weights <= 1).all()
                assert (routed.weights[row, ~valid] == 0).all() and (routed.indices[row, ~valid] == 99).all()


@torch.no_grad()
def test_routing_of_the_first_layer_is_the_largest_scores():
    model = tiny_model(CoLT5EncoderModel)
    ids = random_ids(1, 60)
    routing = model(ids, output_routing=True).routing[0]
    layer = model.encoder.block[0].layer[0]
    normed, *_ = layer.layer_norm(model.shared(ids))
    for kind, router, budget in (("query", layer.query_router, 15), ("key_value", layer.key_value_router, 20)):
        # a token that occurs twice has one score twice: the earlier one goes first
        # in float64, summed row by row: a matrix product may round equal rows in two ways
        order = (normed[0].double() * router.weight.double()).sum(-1).argsort(descending=True, stable=True)
        largest = order[:budget].sort().values
        assert torch.equal(routing[kind].indices[0], largest)


@torch.no_grad()
def test_no_routing_returns_none_for_each_router():
    model = tiny_model(CoLT5EncoderModel, routing="none", attn_implementation="eager")
    output = model(random_ids(2, 9), output_routing=True, output_attentions=True)
    assert [layer.query for layer in output.routing] == [None, None]
    assert output.attentions[0].shape == (2, 2, 9, 11)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_first_layers_routing_is_the_same_under_autocast(autocast):
    """Scores, soft top-k and norms are in fp32 under autocast: what the first layer routes by is the embeddings."""
    model = tiny_model(CoLT5EncoderModel)
    ids = random_ids(2, 90)
    expected = model(ids, output_routing=True).routing[0]
    with torch.autocast("cpu", autocast):
        output = model(ids, output_routing=True)
    for kind in ("query", "key_value"):
        assert torch.equal(output.routing[0][kind].indices, expected[kind].indices)
        assert_same_but_for_rounding(output.routing[0][kind].weights, expected[kind].weights)
    assert all(layer.feed_forward.weights.dtype == torch.float32 for layer in output.routing)
    assert output.last_hidden_state.isfinite().all()


@pytest.mark.parametrize("model_class", [CoLT5ForConditionalGeneration, CoLT5EncoderModel])
@torch.no_grad()
def test_routing_budget_can_be_set_on_a_loaded_model(model_class, tmp_path):
    model = tiny_model(model_class)
    ids = random_ids(1, 64)

    def budgets():
        routing = model.get_encoder()(ids, output_routing=True).routing
        return {tuple(r[k].indices.shape[1] for k in ("feed_forward", "query", "key_value")) for r in routing}

    assert budgets() == {(13, 16, 22)}
    model.set_routing_budget(feed_forward=1 / 2)
    assert budgets() == {(32, 16, 22)}
    model.set_routing_budget(query=1 / 64, key_value=1)
    assert budgets() == {(32, 1, 64)}
    # it is the model's configuration that says so: a copy made with those fractions, and a saved one, are the same
    expected = model.get_encoder()(ids).last_hidden_state
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.get_encoder()(ids).last_hidden_state, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bad", [0, -0.5, 1.5, math.nan, "half", True])
def test_refused_budget_leaves_all_as_it_was(bad):
    model = tiny_model(CoLT5EncoderModel)
    before = model.config.to_dict()
    for good in ({"query": 0.5}, {"feed_forward": 0.5}):
        with pytest.raises(StrictDataclassError, match="routed_key_value_fraction"):
            model.set_routing_budget(**good, key_value=bad)
        assert model.config.to_dict() == before


CAUSAL = {"causal_attention": "routed", "causal_window": 8, "causal_routed_keys": 6}


@pytest.mark.parametrize(
    ("model_class", "fields", "there"),
    [
        (CoLT5EncoderModel, {}, {"feed_forward", "query", "key_value"}),
        (CoLT5EncoderModel, {"routing": "even"}, {"feed_forward", "query", "key_value"}),
        (CoLT5EncoderModel, {"routing": "none"}, set()),
        (CoLT5ForCausalLM, {}, set()),
        (CoLT5ForCausalLM, {"causal_attention": "local", "causal_window": 8}, set()),
        (CoLT5ForCausalLM, CAUSAL, {"query", "causal_routed_keys"}),
        (
            CoLT5ForCausalLM,
            CAUSAL | {"causal_feed_forward": "routed"},
            {"query", "causal_routed_keys", "feed_forward"},
        ),
        (CoLT5Model, CAUSAL, {"feed_forward", "query", "key_value", "causal_routed_keys"}),
        (CoLT5Model, {"routed_cross_key_values": 9}, {"feed_forward", "query", "key_value", "cross_key_values"}),
    ],
)
@torch.no_grad()
def test_a_budget_that_is_set_changes_something(model_class, fields, there):
    """And one that nothing reads is refused."""
    model, ids = tiny_model(model_class, **fields), random_ids(1, 64)

    def states():
        inputs = {"decoder_input_ids": ids} if model_class is CoLT5Model else {}
        return model(ids, **inputs)[0]

    before = states()
    for name in ("feed_forward", "query", "key_value", "cross_key_values", "causal_routed_keys"):
        budget = 2 if name in ("cross_key_values", "causal_routed_keys") else 1 / 32
        if name in there:
            model.set_routing_budget(**{name: budget})
            after = states()
            assert not torch.equal(after, before), name
            before = after
        else:
            with pytest.raises(ValueError, match=f"{name} is .*; it must be None"):
                model.set_routing_budget(**{name: budget})


@pytest.mark.parametrize("routing", ["random", "even"])
@torch.no_grad()
def test_controls_are_deterministic_in_evaluation(routing):
    model = tiny_model(CoLT5EncoderModel, routing=routing)
    ids = random_ids(2, 70)
    first, second = (model(ids, output_routing=True) for _ in range(2))
    assert_same_but_for_rounding(first.last_hidden_state, second.last_hidden_state)
    # three routers a layer, and the layers, choose by themselves at random
    kinds = [layer[kind].indices for layer in first.routing for kind in ("query", "key_value", "feed_forward")]
    assert all(torch.equal(kind[0], kind[1]) for kind in kinds)
    assert torch.equal(first.routing[0].query.indices, first.routing[1].query.indices) == (routing == "even")


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_decoder_is_causal_and_its_padding_masked(attn_implementation):
    """Trap 6: where the attention in use has no mask function, mask and causality are lost silently."""
    model = tiny_model(attn_implementation=attn_implementation)
    ids, decoder_ids = random_ids(1, 30), random_ids(1, 12)
    logits = model(ids, decoder_input_ids=decoder_ids).logits
    shorter = model(ids, decoder_input_ids=decoder_ids[:, :8]).logits
    torch.testing.assert_close(logits[:, :8], shorter, atol=1e-5, rtol=0)
    padded, mask = torch.cat([random_ids(1, 4), decoder_ids], 1), torch.ones(1, 16)
    mask[:, :4] = 0
    padded_logits = model(ids, decoder_input_ids=padded, decoder_attention_mask=mask).logits
    torch.testing.assert_close(padded_logits[:, 4:], logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_embeddings_and_encoder_outputs_stand_in_for_ids():
    model = tiny_model()
    batch, decoder_ids = pad([random_ids(30), random_ids(12)]), random_ids(2, 6)
    logits = model(**batch, decoder_input_ids=decoder_ids).logits
    embeds, mask = model.shared(batch["input_ids"]), batch["attention_mask"]
    by_embeds = model(
        inputs_embeds=embeds, attention_mask=mask, decoder_inputs_embeds=model.shared(decoder_ids)
    ).logits
    assert_same_but_for_rounding(by_embeds, logits)
    encoded = model.get_encoder()(**batch, output_routing=True)
    for outputs in (encoded, (encoded.last_hidden_state,), encoded.to_tuple()):
        given = model(encoder_outputs=outputs, attention_mask=mask, decoder_input_ids=decoder_ids)
        assert_same_but_for_rounding(given.logits, logits)
    assert (
        model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=decoder_ids).encoder_routing is not None
    )


def test_return_dict_false_gives_a_tuple():
    model = tiny_model()
    ids, decoder_ids = random_ids(1, 9), random_ids(1, 3)
    output = model(ids, decoder_input_ids=decoder_ids)
    as_tuple = model(ids, decoder_input_ids=decoder_ids, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert_same_but_for_rounding(as_tuple[0], output.logits)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "neither of input_ids and inputs_embeds"),
        ({"input_ids": (1, 5), "inputs_embeds": (1, 5, 32)}, "both of input_ids and inputs_embeds"),
        ({"input_ids": (1, 5), "attention_mask": (1, 4)}, r"attention_mask has shape \(1, 4\).*\(1, 5\)"),
        ({"input_ids": (2, 5), "attention_mask": (2, 1, 1, 5)}, r"attention_mask has shape \(2, 1, 1, 5\).*\(2, 5\)"),
        (
            {"input_ids": (1, 5), "decoder_input_ids": None},
            "neither of decoder_input_ids and decoder_inputs_embeds.*DataCollatorForSeq2Seq",
        ),
        ({"input_ids": (1, 5), "decoder_inputs_embeds": (1, 2, 32)}, "both of decoder_input_ids"),
        ({"encoder_outputs": (1, 5, 32), "attention_mask": (1, 6)}, r"attention_mask has shape \(1, 6\).*\(1, 5\)"),
    ],
)
def test_bad_input_is_refused_by_name(inputs, message):
    model = tiny_model()
    arguments = {"decoder_input_ids": random_ids(1, 2)}
    for name, shape in inputs.items():
        if shape is None:
            del arguments[name]
        elif name == "encoder_outputs":
            arguments[name] = (torch.randn(shape),)
        else:
            arguments[name] = torch.randn(shape) if name.endswith("embeds") else torch.ones(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        model(**arguments)


def test_padding_without_a_mask_is_warned_of(messages):
    model = tiny_model(CoLT5EncoderModel)
    ids = random_ids(1, 9)
    ids[0, 6:] = 0
    model(ids, attention_mask=ids.ne(0))
    assert "attention_mask" not in messages.text
    model(ids)
    assert "attention_mask" in messages.text


def largest_allocations(model, n: int) -> tuple[int, int]:
    """Bytes of the largest allocation in a forward and backward pass over n tokens, and of all allocations."""
    ids = random_ids(1, n)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state.sum().backward()
    events = profile.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]
    return max(sizes), sum(sizes)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_memory_grows_linearly_in_the_input(attn_implementation):
    """With as many routed tokens at both lengths nothing grows faster than n, and nothing is as large as n x n bits of
    a byte each."""
    lengths, sizes = (2048, 4096), []
    for n in lengths:
        model = tiny_model(
            CoLT5EncoderModel, attn_implementation=attn_implementation, num_layers=1, local_radius=16,
            routed_feed_forward_fraction=32 / n, routed_query_fraction=32 / n, routed_key_value_fraction=64 / n,
        )  # fmt: skip
        sizes.append(largest_allocations(model, n))
    (largest, total), (largest_double, total_double) = sizes
    # the kernel of 2n is not a different one: twice the bytes, less the parameters' and the block that is always added
    assert largest_double <= 2.02 * largest and total_double <= 2.1 * total
    assert largest_double < lengths[1] ** 2


# the interpreter takes some three seconds a layer
@pytest.mark.parametrize(("kernel_backend", "num_layers"), [("torch", 2), ("triton", 1)])
@torch.no_grad()
def test_blocks_that_leave_their_sum_to_the_next_norm_give_the_same(kernel_backend, num_layers, device):
    model = tiny_model(CoLT5EncoderModel, kernel_backend=kernel_backend, num_layers=num_layers).to(device)
    batch = pad([random_ids(11), random_ids(7)], "right")
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    left_in_parts = model(**batch).last_hidden_state
    # whoever reads the blocks' outputs gets tensors, summed
    read = model(**batch, output_hidden_states=True)
    assert [states.shape for states in read.hidden_states] == (num_layers + 1) * [(2, 11, 32)]
    assert_same_but_for_rounding(left_in_parts, read.last_hidden_state)


@torch.no_grad()
def test_a_sum_takes_its_parts_memory_with_it(monkeypatch):
    model, lights, alive = tiny_model(CoLT5EncoderModel), {}, []
    attend, feed = CoLT5LocalAttention.forward, CoLT5DenseActDense.forward

    def look(name: str) -> None:
        alive.append(name in lights and lights[name]() is not None)

    def attending(*inputs):
        look("feed-forward")
        output = attend(*inputs)
        lights["attention"] = weakref.ref(output[0])
        return output

    def feeding(*inputs):
        look("attention")
        # the light one comes second
        output = feed(*inputs)
        lights["feed-forward"] = weakref.ref(output)
        return output

    monkeypatch.setattr(CoLT5LocalAttention, "forward", attending)
    monkeypatch.setattr(CoLT5DenseActDense, "forward", feeding)
    model(random_ids(1, 60))
    assert alive == 2 * 3 * [False]


@pytest.fixture
def returned(monkeypatch):
    """The classes of what the encoder's blocks return in place of hidden states."""
    classes, forward = set(), CoLT5EncoderBlock.forward

    def recording(*inputs, **more):
        output = forward(*inputs, **more)
        classes.add(type(output[0]))
        return output

    monkeypatch.setattr(CoLT5EncoderBlock, "forward", recording)
    return classes


# "sdpa" gives no weights, and says so; here it is asked for them all the same
@pytest.mark.filterwarnings("ignore:.*does not give the weights that output_attentions=True asks for")
@pytest.mark.parametrize("fields", [{}, {"routing": "none"}, {"routing": "even"}, {"dropout_rate": 0.5}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_blocks_return_their_sum_and_the_same_whoever_reads_it(fields, dtype, returned):
    model = tiny_model(CoLT5EncoderModel, dtype, **fields).train()
    ids = random_ids(1, 40)

    def call(**more) -> torch.Tensor:
        torch.manual_seed(0)
        returned.clear()
        return model(ids, **more).last_hidden_state

    plain = call()
    assert returned == {torch.Tensor}
    for name in ("hidden_states", "attentions", "routing"):
        assert_same_but_for_rounding(call(**{f"output_{name}": True}), plain)
        assert returned == {torch.Tensor}
    block = model.encoder.block[1]
    for part in (block, *block.layer, model.encoder.final_layer_norm):
        for register in (part.register_forward_hook, part.register_forward_pre_hook, part.register_full_backward_hook):
            handle = register(lambda *_: None)
            assert_same_but_for_rounding(call(), plain)
            assert returned == {torch.Tensor}
            handle.remove()
    with torch.enable_grad():
        call()
        assert returned == {torch.Tensor}
    call()
    assert returned == {torch.Tensor}


def test_hooks_on_sublayers_and_norms_see_tensors_and_gradients():
    model, seen = tiny_model(CoLT5EncoderModel), {}
    layer, norm = model.encoder.block[0].layer[1], model.encoder.final_layer_norm
    layer.register_forward_hook(lambda module, inputs, output: seen.update(states=output[0]))
    layer.register_full_backward_hook(lambda module, inputs, output: seen.update(gradient=output[0]))
    norm.register_forward_hook(lambda module, inputs, output: seen.update(given=inputs[0], normed=output[0]))
    output = model(random_ids(1, 40), output_hidden_states=True)
    output.last_hidden_state.sum().backward()
    assert torch.equal(seen["states"], output.hidden_states[1]) and seen["gradient"].shape == (1, 40, 32)
    assert torch.equal(seen["normed"], output.last_hidden_state)
    expected = seen["given"] * seen["given"].square().mean(-1, keepdim=True).add(1e-6).rsqrt() * norm.weight
    torch.testing.assert_close(seen["normed"], expected)


@torch.no_grad()
def test_a_hook_on_a_block_reads_and_changes_the_hidden_states():
    model = tiny_model(CoLT5EncoderModel, num_layers=3)
    ids, seen = random_ids(1, 40), []
    plain = model(ids, output_hidden_states=True)

    class Steer:
        """A hook that is no function has no name."""

        def __call__(self, module, inputs, output):
            seen.append(output[0])
            return (output[0] + 1.0, *output[1:])

    handle = model.encoder.block[0].register_forward_hook(Steer())
    steered = model(ids).last_hidden_state
    handle.remove()
    assert_same_but_for_rounding(seen[0], plain.hidden_states[1])
    states = seen[0] + 1.0
    blocks, model.encoder.block = model.encoder.block, model.encoder.block[1:]
    assert_same_but_for_rounding(model.encoder.run_blocks(states, None, records_blocks=False), steered)
    model.encoder.block = blocks
    assert_same_but_for_rounding(model(ids).last_hidden_state, plain.last_hidden_state)


@pytest.mark.parametrize("length", [1, 15, 40, 333])
def test_budgets_of_whole_rows_are_those_of_a_full_mask(length):
    config, states = tiny_config(), torch.zeros(2, length, 32)
    whole = EncoderPlan.make(encoder_settings(config), states, None)
    masked = EncoderPlan.make(encoder_settings(config), states, torch.ones(2, length, dtype=torch.bool))
    for ours, theirs in ((whole.attention, masked.attention), (whole.feed_forward, masked.feed_forward)):
        assert torch.equal(ours.budget, theirs.budget) and ours.capacities == theirs.capacities


@torch.no_grad()
def test_padding_without_a_mask_is_looked_for_once_where_it_waits_for_the_device(device, monkeypatch):
    model = tiny_model(CoLT5EncoderModel).to(device)
    ids, looks = random_ids(1, 20).to(device), []
    monkeypatch.setattr(model.encoder, "warn_if_padding_and_no_attention_mask", lambda *given: looks.append(given))
    model(ids, attention_mask=torch.ones_like(ids))
    assert not looks
    for _ in range(3):
        model(ids)
    assert len(looks) == (1 if device.type == "cuda" else 3)
