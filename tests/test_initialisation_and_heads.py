"""How models begin and load: initialisation, checkpoints of other heads, tied embeddings; heads and losses."""

import math
from pathlib import Path

import pytest
import torch
from models import ENCODER_HEADS, pad, random_ids, tiny_config, tiny_model
from rounding import assert_all_same_but_for_rounding, assert_same_but_for_rounding
from safetensors.torch import load_file, save_file
from torch import nn

from modeling_colt5 import (
    CoLT5EncoderModel,
    CoLT5ForCausalLM,
    CoLT5ForConditionalGeneration,
    CoLT5ForQuestionAnswering,
    CoLT5ForSequenceClassification,
    CoLT5ForTokenClassification,
    CoLT5Model,
)
from modeling_colt5.model_encoder import CoLT5Encoder

ENCODER_MODELS = [CoLT5EncoderModel, *ENCODER_HEADS]
ALL_MODELS = [CoLT5Model, CoLT5ForConditionalGeneration, *ENCODER_MODELS]
HEADS_OWN = {
    CoLT5EncoderModel: set(),
    CoLT5ForSequenceClassification: {
        f"classification_head.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")
    },
    CoLT5ForTokenClassification: {"classifier.weight", "classifier.bias"},
    CoLT5ForQuestionAnswering: {"qa_outputs.weight", "qa_outputs.bias"},
}


# what `_init_weights` documents, by the names of parameters, for d_model 64, d_kv 16, 2 + 3 heads and 4 in the decoder
STANDARD_DEVIATIONS = {
    r"shared.weight": 1.0,
    r"lm_head.weight": 64**-0.5,
    r"relative_attention_bias.weight": 64**-0.5,
    r"router.weight": 64**-0.5,
    r".q.weight": (64 * 16) ** -0.5,
    r".k.weight": 64**-0.5,
    r".v.weight": 64**-0.5,
    r"light_attention.o.weight": (2 * 16) ** -0.5,
    r"heavy_attention.o.weight": (3 * 16) ** -0.5,
    r"SelfAttention.o.weight": (4 * 16) ** -0.5,
    r"EncDecAttention.o.weight": (4 * 16) ** -0.5,
    r".wi_0.weight": 64**-0.5,
    r".wi_1.weight": 64**-0.5,
    r".wi.weight": 64**-0.5,
    r"light_feed_forward.wo.weight": 40**-0.5,
    r"heavy_feed_forward.wo.weight": 96**-0.5,
    r"DenseReluDense.wo.weight": 80**-0.5,
    r"classification_head.dense.weight": 64**-0.5,
    r"classification_head.out_proj.weight": 64**-0.5,
    r"classifier.weight": 64**-0.5,
    r"qa_outputs.weight": 64**-0.5,
}
INITIALISED = {
    "d_model": 64, "d_kv": 16, "num_layers": 4, "num_decoder_layers": 2, "light_d_ff": 40, "heavy_d_ff": 96,
    "d_ff": 80, "vocab_size": 200, "num_labels": 30,
}  # fmt: skip


def assert_initialised(parameters: dict[str, torch.Tensor], factor: float = 1.0, only: set[str] | None = None) -> None:
    """Compare the standard deviation of all entries of each kind of matrix, and norms and biases."""
    kinds: dict[str, list[torch.Tensor]] = {}
    for name, parameter in parameters.items():
        if only is not None and name not in only:
            continue
        if "layer_norm" in name:
            assert (parameter == factor).all(), name
        elif name.endswith(".bias"):
            assert (parameter == 0).all(), name
        else:
            (kind,) = [suffix for suffix in STANDARD_DEVIATIONS if name.endswith(suffix)]
            kinds.setdefault(kind, []).append(parameter.detach().flatten())
    assert kinds
    for kind, entries in kinds.items():
        entries = torch.cat(entries)
        expected = factor * STANDARD_DEVIATIONS[kind]
        # of N normal numbers the standard deviation has the relative error (2 N)^-1/2, the mean N^-1/2; five of them
        assert abs(entries.std() / expected - 1) < 5 / math.sqrt(2 * len(entries)), kind
        assert abs(entries.mean()) < 5 * expected / math.sqrt(len(entries)), kind
        # normal, not uniform, whose fourth moment is 1.8: sampling error (24 / N)^1/2
        fourth = (entries / entries.std()).pow(4).mean()
        assert abs(fourth - 3) < 0.2 + 8 * math.sqrt(24 / len(entries)), kind


@pytest.mark.parametrize("model_class", ALL_MODELS)
@pytest.mark.parametrize("fields", [{}, {"initializer_factor": 0.3, "feed_forward_proj": "relu"}])
def test_initialisation_is_t5s(model_class, fields):
    """Trap 1: custom code's modules without parameters of their own count as initialised, and their children get a
    generic initialisation."""
    model = model_class(tiny_config(**INITIALISED, **fields))
    assert_initialised(dict(model.named_parameters()), fields.get("initializer_factor", 1.0))


def test_submodule_initialises_alone():
    """Trap 1, for a stack that somebody builds by itself."""
    encoder = CoLT5Encoder(tiny_config(**INITIALISED))
    parameters = {name.replace("embed_tokens", "shared"): p for name, p in encoder.named_parameters()}
    assert_initialised(parameters)


def test_router_scores_start_near_unit_spread():
    """The routers' standard deviation d_model^-1/2 makes scores of unit spread."""
    model = tiny_model(CoLT5EncoderModel, d_model=256)
    normed, *_ = model.encoder.block[0].layer[0].layer_norm(model.shared(random_ids(4, 200)))
    for _ in range(5):
        model.encoder.block[0].layer[0].query_router.weight.data.normal_(std=256**-0.5)
    vectors = [parameter for name, parameter in model.named_parameters() if "router" in name]
    scores = torch.stack([normed @ vector for vector in vectors])
    assert 0.7 < scores.std() < 1.4


@pytest.mark.parametrize("model_class", ENCODER_HEADS)
def test_missing_weights_are_initialised_on_loading(model_class, tmp_path):
    """Trap 1 once more: heads are new, and so is whatever else a checkpoint lacks; what it has is kept."""
    donor = CoLT5ForConditionalGeneration(tiny_config(**INITIALISED))
    donor.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    dropped = {name for name in weights if name.startswith("encoder.block.2.")}
    kept = {name: tensor for name, tensor in weights.items() if name not in dropped}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == dropped | HEADS_OWN[model_class]
    parameters = dict(model.named_parameters())
    assert_initialised(parameters, only=dropped | HEADS_OWN[model_class])
    for name in set(parameters) & set(kept):
        assert torch.equal(parameters[name], kept[name]), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_class", ENCODER_MODELS)
def test_heads_load_an_encoder_decoders_checkpoint(model_class, tied, tmp_path, messages):
    """Only the head's own weights are new, which it says; the decoder's are left aside, which it does not."""
    donor = tiny_model(tie_word_embeddings=tied)
    donor.save_pretrained(tmp_path)
    model, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == HEADS_OWN[model_class]
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert "decoder" not in messages.text and "lm_head" not in messages.text
    assert all(name.split(".")[0] in messages.text for name in HEADS_OWN[model_class])
    assert messages.text == "" or HEADS_OWN[model_class]
    ids = random_ids(2, 30)
    expected = donor.encoder(ids).last_hidden_state
    assert_same_but_for_rounding(model.eval().encoder(ids).last_hidden_state, expected)


def test_encoder_decoder_without_head_loads_the_checkpoint_of_one_with_it(tmp_path):
    donor = tiny_model()
    donor.save_pretrained(tmp_path)
    model, info = CoLT5Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    inputs = {"input_ids": random_ids(2, 30), "decoder_input_ids": random_ids(2, 4)}
    logits = donor.lm_head(model.eval()(**inputs).last_hidden_state)
    assert_same_but_for_rounding(logits, donor(**inputs).logits)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_class", ALL_MODELS)
def test_embeddings_are_one_and_survive_reload_and_resize(model_class, tied, tmp_path):
    """Trap 9: stacks with embeddings of their own come apart when `tie_word_embeddings` is False."""
    model = tiny_model(model_class, tie_word_embeddings=tied)
    with_head = model_class is CoLT5ForConditionalGeneration

    def check(model, vocabulary):
        stacks = [stack for stack in (model.encoder, getattr(model, "decoder", None)) if stack is not None]
        assert all(stack.embed_tokens.weight is model.shared.weight for stack in stacks)
        assert model.get_input_embeddings().weight is model.shared.weight
        assert model.shared.weight.shape == (vocabulary, 32)
        large = [p for p in model.parameters() if vocabulary in p.shape]
        assert len(large) == 1 + (with_head and not tied)
        if with_head:
            assert (model.lm_head.weight is model.shared.weight) == tied
            assert model.lm_head.weight.shape == (vocabulary, 32)

    check(model, 96)
    model.save_pretrained(tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == sum(p.numel() for p in model.parameters())
    loaded, info = model_class.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    check(loaded, 96)
    for (name, one), (_, other) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(one, other), name

    old = loaded.shared.weight[:96].clone()
    loaded.resize_token_embeddings(103)
    check(loaded, 103)
    assert torch.equal(loaded.shared.weight[:96], old) and loaded.config.vocab_size == 103
    loaded.save_pretrained(tmp_path / "resized")
    check(model_class.from_pretrained(tmp_path / "resized"), 103)
    # a gradient reaches the one embedding from both stacks
    replaced = nn.Embedding(50, 32)
    loaded.set_input_embeddings(replaced)
    assert loaded.encoder.embed_tokens is replaced


def test_own_configuration_is_not_changed_by_a_model():
    config = tiny_config()
    before = config.to_dict()
    for model_class in ALL_MODELS:
        model = model_class(config)
        assert model.config.is_encoder_decoder == (model_class in (CoLT5Model, CoLT5ForConditionalGeneration))
    after = config.to_dict()
    assert {name for name in after if after[name] != before.get(name)} <= {"dtype"}


@torch.no_grad()
def test_sequence_classification_pools_the_mean_of_real_tokens():
    model = tiny_model(CoLT5ForSequenceClassification, num_labels=4)
    batch = pad([random_ids(40), random_ids(11)], "left")
    states = model.encoder(**batch).last_hidden_state
    pooled = torch.stack([states[0].mean(0), states[1, 29:].mean(0)])
    head = model.classification_head
    expected = head.out_proj(torch.tanh(head.dense(pooled)))
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-6, rtol=1e-5)
    assert model(random_ids(3, 12)).logits.shape == (3, 4)


@torch.no_grad()
def test_token_classification_and_question_answering_read_the_encoders_states():
    batch = pad([random_ids(40), random_ids(11)], "left")
    model = tiny_model(CoLT5ForTokenClassification, num_labels=5)
    states = model.encoder(**batch).last_hidden_state
    expected = states @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(**batch).logits, expected)
    model = tiny_model(CoLT5ForQuestionAnswering)
    states = model.encoder(**batch).last_hidden_state
    expected = states @ model.qa_outputs.weight.T + model.qa_outputs.bias
    output = model(**batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(output.start_logits[real], expected[..., 0][real])
    torch.testing.assert_close(output.end_logits[real], expected[..., 1][real])
    # an answer is never padding
    assert (output.start_logits.softmax(-1)[~real] == 0).all() and (output.end_logits.softmax(-1)[~real] == 0).all()


def head_logits(output) -> list[torch.Tensor]:
    return [value for name, value in output.items() if name.endswith("logits")]


@pytest.mark.parametrize("model_class", ENCODER_HEADS)
@torch.no_grad()
def test_heads_do_not_see_padding_and_take_embeddings(model_class):
    model = tiny_model(model_class, num_labels=3)
    rows = [random_ids(n) for n in (40, 11, 1)]
    alone = [head_logits(model(row[None])) for row in rows]
    for side, length in (("left", None), ("right", 140)):
        batch = pad(rows, side, length)
        logits = head_logits(model(**batch))
        embeds = {"inputs_embeds": model.shared(batch["input_ids"]), "attention_mask": batch["attention_mask"]}
        assert_all_same_but_for_rounding(head_logits(model(**embeds)), logits)
        for row in range(3):
            for batched, single in zip(logits, alone[row], strict=True):
                real = batched[row]
                if model_class is not CoLT5ForSequenceClassification:
                    real = real[batch["attention_mask"][row].bool()]
                torch.testing.assert_close(real, single[0], atol=1e-5, rtol=0)


def test_head_losses_are_cross_entropy():
    batch = pad([random_ids(12), random_ids(9)])
    model = tiny_model(CoLT5ForSequenceClassification, num_labels=3)
    labels = torch.tensor([2, 0])
    output = model(**batch, labels=labels)
    torch.testing.assert_close(output.loss, -output.logits.log_softmax(-1)[range(2), labels].mean())
    model = tiny_model(CoLT5ForTokenClassification, num_labels=3)
    labels = torch.randint(0, 3, (2, 12))
    labels[1, 9:] = -100
    output = model(**batch, labels=labels)
    chosen = -output.logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[labels >= 0]
    torch.testing.assert_close(output.loss, chosen.mean())
    torch.testing.assert_close(model(**batch, labels=labels, num_items_in_batch=50).loss, chosen.sum() / 50)
    model = tiny_model(CoLT5ForQuestionAnswering)
    start, end = torch.tensor([1, 4]), torch.tensor([3, 8])
    output = model(**batch, start_positions=start, end_positions=end)
    losses = [-output.start_logits.log_softmax(-1)[range(2), start], -output.end_logits.log_softmax(-1)[range(2), end]]
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())


@pytest.mark.parametrize("model_class", [CoLT5ForSequenceClassification])
def test_classification_losses_by_kind_of_problem(model_class):
    ids = random_ids(4, 10)
    regression = tiny_model(model_class, num_labels=1, problem_type="regression")
    targets = torch.randn(4)
    output = regression(ids, labels=targets)
    torch.testing.assert_close(output.loss, (output.logits.squeeze(-1) - targets).pow(2).mean())
    several = tiny_model(model_class, num_labels=3, problem_type="multi_label_classification")
    targets = torch.randint(0, 2, (4, 3)).float()
    output = several(ids, labels=targets)
    expected = nn.functional.binary_cross_entropy(output.logits.sigmoid(), targets)
    torch.testing.assert_close(output.loss, expected)


def test_labels_are_shifted_once_and_normalised_by_the_count_given():
    """Trap 5: `Trainer` leaves the normalisation over accumulated batches to the model, and the library's loss for
    generation would shift the labels a second time."""
    model = tiny_model()
    ids, labels = random_ids(2, 30), random_ids(2, 7)
    labels[1, 5:] = -100
    output = model(ids, labels=labels)
    shifted = torch.zeros_like(labels)
    shifted[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == -100, 0)
    logits = model(ids, decoder_input_ids=shifted).logits
    torch.testing.assert_close(output.logits, logits)
    losses = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[labels >= 0]
    torch.testing.assert_close(output.loss, losses.mean())
    for count in (24, torch.tensor(24)):
        torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=count).loss, losses.sum() / 24)
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(labels), shifted)
    # T5's documentation calls this for the model without a head
    assert torch.equal(tiny_model(CoLT5Model)._shift_right(labels), shifted)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_an_answer_in_padding_is_left_out_of_the_loss(side, shape):
    """As one beyond the input is; the least number of a dtype would be its loss else."""
    model = tiny_model(CoLT5ForQuestionAnswering)
    batch = pad([random_ids(12), random_ids(12), random_ids(7)], side)
    inside, padded = 7, {"left": 2, "right": 9}[side]
    positions = torch.tensor([inside, inside, padded]).reshape(shape)
    given = {"start_positions": positions, "end_positions": positions}
    whole = model(**batch, **given)
    others = model(
        **{name: part[:2] for name, part in batch.items()}, **{name: part[:2] for name, part in given.items()}
    )
    torch.testing.assert_close(whole.loss, others.loss)
    beyond = positions.clone()
    beyond[2] = 12
    torch.testing.assert_close(whole.loss, model(**batch, start_positions=beyond, end_positions=beyond).loss)


def test_a_causal_models_configuration_has_its_own_depth(tmp_path: Path) -> None:
    """As Transformers and PEFT ask for `num_hidden_layers`; the caller's configuration is left as it is."""
    config = tiny_config(num_layers=1, num_decoder_layers=3)
    model = CoLT5ForCausalLM(config)
    assert len(model.decoder.block) == model.config.num_hidden_layers == 3 and config.num_hidden_layers == 1
    model.save_pretrained(tmp_path)
    assert CoLT5ForCausalLM.from_pretrained(tmp_path).config.num_hidden_layers == 3
