"""Generation with every cache and search, against recomputing everything at every step without a cache."""

import json
from typing import Any

import pytest
import torch
from models import pad, random_ids, shallow_model
from rounding import assert_same_but_for_rounding
from transformers.generation import GenerateBeamEncoderDecoderOutput, GenerateEncoderDecoderOutput

from modeling_colt5 import CoLT5EncoderModel, CoLT5ForConditionalGeneration
from modeling_colt5.run_release import CACHE

LENGTHS = (40, 23, 9)
NEW_TOKENS = 7
# fp32 sums taken in another order over logits of size 1
TOLERANCE = 1e-5


def make_model(**fields: Any) -> CoLT5ForConditionalGeneration:
    """A tiny model whose next tokens depend on the document."""
    model = shallow_model(**fields)
    with torch.no_grad():
        # cross-attention that is near uniform gives all rows the same states
        for block in model.decoder.block:
            block.layer[1].EncDecAttention.q.weight.mul_(4)
    return model


def padded_batch(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of three lengths, the same ones at every call, padded on one side: ids and mask [3, 40]."""
    generator = torch.Generator().manual_seed(1)
    batch = pad([torch.randint(3, 96, (length,), generator=generator) for length in LENGTHS], side)
    return batch["input_ids"], batch["attention_mask"]


def generate(model: CoLT5ForConditionalGeneration, **kwargs: Any) -> GenerateEncoderDecoderOutput:
    """A few new tokens, none of them the end, with the logits of every step."""
    torch.manual_seed(0)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    return model.generate(**options | kwargs, return_dict_in_generate=True, output_logits=True, output_scores=True)


@torch.no_grad()
def recomputed_logits(
    model: CoLT5ForConditionalGeneration, ids: torch.Tensor, mask: torch.Tensor, sequences: torch.Tensor
) -> torch.Tensor:
    """Logits [rows, steps, vocabulary] before each token but the first, each step from the documents' ids anew."""
    steps = [
        model(ids, mask, decoder_input_ids=sequences[:, :step], use_cache=False).logits[:, -1]
        for step in range(1, sequences.shape[1])
    ]
    return torch.stack(steps, dim=1)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("num_layers", "num_decoder_layers"), [(2, 3), (3, 1)])
def test_greedy(cache: str, side: str, num_layers: int, num_decoder_layers: int) -> None:
    model = make_model(num_layers=num_layers, num_decoder_layers=num_decoder_layers)
    ids, mask = padded_batch(side)
    output = generate(model, input_ids=ids, attention_mask=mask, cache_implementation=cache)
    expected = recomputed_logits(model, ids, mask, output.sequences)
    assert_close(torch.stack(output.logits, dim=1), expected)
    # the end token is forbidden up to `min_new_tokens`
    expected[..., model.config.eos_token_id] = -torch.inf
    assert torch.equal(output.sequences[:, 1:], expected.argmax(-1))
    # rows that say the same could not tell one from another's
    assert len({tuple(row.tolist()) for row in output.sequences}) == len(LENGTHS)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_sampling(cache: str) -> None:
    model = make_model()
    ids, mask = padded_batch("left")
    options = {"do_sample": True, "top_k": 20, "temperature": 0.3, "num_return_sequences": 2}
    output = generate(model, input_ids=ids, attention_mask=mask, cache_implementation=cache, **options)
    rows = (part.repeat_interleave(2, 0) for part in (ids, mask))
    assert_close(torch.stack(output.logits, dim=1), recomputed_logits(model, *rows, output.sequences))
    uncached = generate(model, input_ids=ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(output.sequences, uncached.sequences)
    assert not torch.equal(output.sequences[0::2], output.sequences[1::2])


def check_beams(
    model: CoLT5ForConditionalGeneration,
    ids: torch.Tensor,
    mask: torch.Tensor,
    output: GenerateBeamEncoderDecoderOutput,
    per_row: int,
) -> None:
    """A beam's score is the mean log-probability of its tokens, recomputed."""
    ids, mask = (part.repeat_interleave(per_row, 0) for part in (ids, mask))
    logprobs = recomputed_logits(model, ids, mask, output.sequences).log_softmax(-1)
    scores = logprobs.gather(-1, output.sequences[:, 1:, None])[..., 0].mean(-1)
    assert_close(output.sequences_scores, scores)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("num_layers", "num_decoder_layers"), [(2, 3), (3, 1)])
def test_beam_search(cache: str, side: str, num_layers: int, num_decoder_layers: int) -> None:
    model = make_model(num_layers=num_layers, num_decoder_layers=num_decoder_layers)
    ids, mask = padded_batch(side)
    options = {"num_beams": 4, "num_return_sequences": 2}
    output = generate(model, input_ids=ids, attention_mask=mask, cache_implementation=cache, **options)
    check_beams(model, ids, mask, output, per_row=2)
    uncached = generate(model, input_ids=ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(output.sequences, uncached.sequences)
    # otherwise no beam was ever reordered, and its cache was never put to the test
    assert (output.beam_indices[:, 1:NEW_TOKENS] != output.beam_indices[:, : NEW_TOKENS - 1]).any()


@pytest.mark.parametrize("num_beams", [1, 3])
def test_row_is_the_same_alone_and_padded(num_beams: int) -> None:
    model = make_model()
    alone = []
    ids, mask = padded_batch("right")
    for row, length in enumerate(LENGTHS):
        alone.append(generate(model, input_ids=ids[row : row + 1, :length], num_beams=num_beams).sequences)
    for side in ("right", "left"):
        ids, mask = padded_batch(side)
        together = generate(model, input_ids=ids, attention_mask=mask, num_beams=num_beams).sequences
        assert torch.equal(together, torch.cat(alone))


def test_rows_end_at_their_own_time() -> None:
    model = make_model()
    ids, mask = padded_batch("left")
    free = generate(model, input_ids=ids, attention_mask=mask).sequences
    # end tokens are the first row's third one and the last row's fifth one
    ends = [int(free[0, 3]), int(free[2, 5])]
    output = generate(model, input_ids=ids, attention_mask=mask, min_new_tokens=0, eos_token_id=ends)
    for ended, row in zip(output.sequences, free, strict=True):
        last = next((step for step, token in enumerate(row.tolist()) if token in ends), NEW_TOKENS)
        assert torch.equal(ended[: last + 1], row[: last + 1])
        assert (ended[last + 1 :] == model.config.pad_token_id).all()


def count_encoder_batches(model: CoLT5ForConditionalGeneration) -> list[int]:
    """A list that grows by the batch size of each call of the encoder."""
    batches: list[int] = []
    model.encoder.register_forward_hook(
        lambda module, args, kwargs, output: batches.append(len(output.last_hidden_state)), with_kwargs=True
    )
    return batches


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"do_sample": True, "num_return_sequences": 3}])
def test_encodes_once_and_before_it_expands(options: dict[str, Any]) -> None:
    model = make_model()
    batches = count_encoder_batches(model)
    ids, mask = padded_batch("right")
    generate(model, input_ids=ids, attention_mask=mask, **options)
    assert batches == [len(ids)]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_from_encoder_outputs_with_routing(num_beams: int) -> None:
    """The documented way to see what was routed for a generated text."""
    model = make_model()
    ids, mask = padded_batch("left")
    expected = generate(model, input_ids=ids, attention_mask=mask, num_beams=num_beams)
    encoded = model.get_encoder()(input_ids=ids, attention_mask=mask, output_routing=True, output_hidden_states=True)
    assert len(encoded.routing) == model.config.num_layers
    routed = mask.gather(1, encoded.routing[0].query.indices)[encoded.routing[0].query.valid]
    assert routed.all() and len(routed) == sum(-(-length // 4) for length in LENGTHS)
    batches = count_encoder_batches(model)
    output = generate(model, encoder_outputs=encoded, attention_mask=mask, num_beams=num_beams)
    assert batches == []
    assert torch.equal(output.sequences, expected.sequences)
    assert_close(torch.stack(output.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_from_inputs_embeds(num_beams: int) -> None:
    model = make_model()
    ids, mask = padded_batch("left")
    expected = generate(model, input_ids=ids, attention_mask=mask, num_beams=num_beams).sequences
    embeds = model.get_input_embeddings()(ids)
    output = generate(model, inputs_embeds=embeds, attention_mask=mask, num_beams=num_beams).sequences
    assert torch.equal(output, expected)


def test_forward_from_embeddings_of_both_sides() -> None:
    model = make_model()
    ids, mask = padded_batch("left")
    embed = model.get_input_embeddings()
    targets = torch.randint(2, 96, (len(LENGTHS), 6))
    expected = model(ids, mask, decoder_input_ids=targets).logits
    output = model(inputs_embeds=embed(ids), attention_mask=mask, decoder_inputs_embeds=embed(targets)).logits
    assert_same_but_for_rounding(output, expected)
    encoder = CoLT5EncoderModel(model.config).eval()
    embeds = encoder.get_input_embeddings()(ids)
    assert_same_but_for_rounding(encoder(inputs_embeds=embeds, attention_mask=mask)[0], encoder(ids, mask)[0])


def test_prompt_for_the_decoder() -> None:
    """A prompt is decoded in one call, into an empty cache, and the rest token by token."""
    model = make_model()
    ids, mask = padded_batch("right")
    prompt = torch.cat([torch.zeros(3, 1, dtype=torch.long), torch.randint(2, 96, (3, 4))], dim=1)
    for cache in ("dynamic", "static"):
        output = generate(
            model, input_ids=ids, attention_mask=mask, decoder_input_ids=prompt, cache_implementation=cache
        )
        expected = recomputed_logits(model, ids, mask, output.sequences)[:, prompt.shape[1] - 1 :]
        assert_close(torch.stack(output.logits, dim=1), expected)


def test_routing_flags_do_not_disturb_generation() -> None:
    model = make_model()
    ids, mask = padded_batch("right")
    expected = generate(model, input_ids=ids, attention_mask=mask).sequences
    model.config.output_routing = True
    assert torch.equal(generate(model, input_ids=ids, attention_mask=mask).sequences, expected)


def test_generation_parameters_are_not_in_the_config(tmp_path) -> None:
    model = make_model()
    model.generation_config.num_beams = 3
    model.generation_config.max_new_tokens = 11
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert not {"num_beams", "max_new_tokens", "max_length", "do_sample", "early_stopping"} & config.keys()
    assert {name: generation[name] for name in ("num_beams", "max_new_tokens", "decoder_start_token_id")} == {
        "num_beams": 3,
        "max_new_tokens": 11,
        "decoder_start_token_id": 0,
    }
    loaded = CoLT5ForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.num_beams == 3 and loaded.generation_config.eos_token_id == 1


@pytest.mark.parametrize("asked", [None, True, False])
def test_labels_need_no_cache(asked: bool | None) -> None:
    model = make_model()
    ids, labels = random_ids(1, 6), random_ids(1, 4)
    decoder_ids = model.prepare_decoder_input_ids_from_labels(labels)
    with torch.no_grad():
        scored = model(ids, labels=labels, use_cache=asked)
        read = model(ids, decoder_input_ids=decoder_ids, use_cache=asked)
    # who reads on wants the cache, unless it is refused; who scores gets one where it is asked for
    assert (getattr(scored, CACHE) is not None) == (asked is True)
    assert (getattr(read, CACHE) is not None) == (asked is not False)
    assert_same_but_for_rounding(scored.logits, read.logits)
