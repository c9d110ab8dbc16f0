"""Sources that somebody changed: other activations, layers taken out, weights computed of others, other tokenizers.
What a CoLT5 has no place for is refused."""

import copy
from pathlib import Path
from typing import Any

import convert_t5
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    LongT5ForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from modeling_colt5 import CoLT5ForConditionalGeneration, CoLT5Tokenizer
from modeling_colt5.conversion import convert, load_source

TINY = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
TINY |= {"decoder_start_token_id": 0, "initializer_factor": 2.0}
WHOLE = {f"routed_{name}_fraction": 1.0 for name in ("feed_forward", "query", "key_value")} | {"local_radius": 127}


def make(**fields: Any) -> T5ForConditionalGeneration:
    """In float64, where the same function differs by the order of sums alone."""
    return T5ForConditionalGeneration(T5Config(**(TINY | fields))).eval().double()


def logits(model: PreTrainedModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids, targets = (torch.randint(2, 64, (2, length), generator=generator) for length in (30, 9))
    with torch.no_grad():
        return model(input_ids=ids, decoder_input_ids=targets).logits


def assert_same_function(model: PreTrainedModel, source: PreTrainedModel) -> None:
    expected = logits(source)
    # float64: the order of sums alone differs
    assert (logits(model) - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
def test_the_activation_is_the_one_that_the_source_computes(kind: str, activation: str, tmp_path: Path) -> None:
    """A configuration's `dense_act_fn` may be another than its `feed_forward_proj` says, and stays so when loaded."""
    config = T5Config(**TINY, feed_forward_proj=kind)
    config.dense_act_fn = activation
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    source = load_source(tmp_path / "t5")[0].eval().double()
    convert(source, **WHOLE).save_pretrained(tmp_path / "colt5")
    assert_same_function(CoLT5ForConditionalGeneration.from_pretrained(tmp_path / "colt5"), source)


def test_layers_that_were_taken_out_are_not_asked_for() -> None:
    source = make(num_layers=3, num_decoder_layers=4)
    del source.encoder.block[1]
    source.decoder.block = nn.ModuleList([source.decoder.block[0], source.decoder.block[3]])
    model = convert(source, **WHOLE)
    assert (model.config.num_layers, model.config.num_decoder_layers) == (2, 2)
    assert_same_function(model, source)
    del source.decoder.block[0]
    with pytest.raises(ValueError, match=r"source has no decoder\.block\.0\.\S*relative_attention_bias\.weight"):
        convert(source)


def test_weights_that_are_computed_of_others_are_read_as_they_are() -> None:
    source = make()
    parametrizations.weight_norm(source.encoder.block[0].layer[0].SelfAttention.q)
    parametrizations.weight_norm(source.lm_head)
    prune.random_unstructured(source.decoder.block[1].layer[1].EncDecAttention.v, "weight", 0.5)
    assert_same_function(convert(source, **WHOLE), source)


def test_equal_copies_of_the_embedding_are_the_embedding() -> None:
    source = make()
    source.encoder.embed_tokens = copy.deepcopy(source.shared)
    assert_same_function(convert(source, **WHOLE), source)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_stack_with_its_own_embedding_is_refused(stack: str, tmp_path: Path) -> None:
    """Transformers leaves them apart where a checkpoint has both."""
    source = make()
    weights = {name: weight.clone() for name, weight in source.state_dict().items()}
    weights[f"{stack}.embed_tokens.weight"] *= 0.5
    source.save_pretrained(tmp_path, state_dict=weights)
    source = load_source(tmp_path)[0]
    assert not torch.equal(getattr(source, stack).embed_tokens.weight, source.shared.weight)
    with pytest.raises(ValueError, match=rf"{stack}\.embed_tokens that is not equal to its shared embedding"):
        convert(source)


def change_head_bias(source: PreTrainedModel) -> None:
    source.lm_head = nn.Linear(32, 64)


def change_head_rows(source: PreTrainedModel) -> None:
    source.lm_head = nn.Linear(32, 80, bias=False)


def change_projection(source: PreTrainedModel) -> None:
    source.encoder.block[1].layer[0].SelfAttention.o = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))


def change_extra(source: PreTrainedModel) -> None:
    source.decoder.block[0].prompt = nn.Parameter(torch.zeros(3, 32))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_head_bias, r"source has lm_head\.bias"),
        (change_head_rows, r"lm_head\.weight of shape \[80, 32\].*\[64, 32\]"),
        (change_projection, r"source has no encoder\.block\.1\.layer\.0\.SelfAttention\.o\.weight"),
        (change_extra, r"source has decoder\.block\.0\.prompt"),
    ],
)
@pytest.mark.parametrize("kind", [T5ForConditionalGeneration, MT5ForConditionalGeneration])
def test_weights_that_have_no_place_are_refused(kind: type[PreTrainedModel], change: Any, said: str) -> None:
    source = kind({T5ForConditionalGeneration: T5Config}.get(kind, MT5Config)(**TINY))
    change(source)
    with pytest.raises(ValueError, match=said):
        convert(source)


def test_settings_of_generate_go_along(tmp_path: Path) -> None:
    source = make()
    source.generation_config.update(num_beams=3, max_new_tokens=7, no_repeat_ngram_size=2, forced_bos_token_id=5)
    source.generation_config.eos_token_id = [1, 9]
    model = convert(source, **WHOLE)
    ids = torch.randint(2, 64, (2, 20))
    expected = source.generate(ids)
    assert expected.shape[1] <= 8 and (expected[:, 1] == 5).all()
    # the same tokens: random float64 scores are not close to each other
    assert torch.equal(model.generate(ids), expected)
    model.save_pretrained(tmp_path)
    assert CoLT5ForConditionalGeneration.from_pretrained(tmp_path).generation_config.eos_token_id == [1, 9]
    assert source.generation_config is not model.generation_config


@pytest.mark.parametrize("named", [None, 5], ids=["nowhere", "in the settings of generate"])
@pytest.mark.parametrize("kind", [T5ForConditionalGeneration, LongT5ForConditionalGeneration])
def test_a_source_whose_configuration_names_no_start(kind: type[PreTrainedModel], named: int | None) -> None:
    """As one is that was made in code: decoding begins with padding, as in T5, unless its settings say otherwise."""
    fields = {name: value for name, value in TINY.items() if name != "decoder_start_token_id"}
    source = kind(kind.config_class(**fields, pad_token_id=2))
    source.generation_config.decoder_start_token_id = named
    model = convert(source)
    start = 2 if named is None else named
    assert model.config.decoder_start_token_id == model.generation_config.decoder_start_token_id == start
    ids = torch.randint(3, 64, (1, 9))
    assert model.generate(ids, max_new_tokens=1)[0, 0] == start
    assert model(input_ids=ids, labels=ids).loss.isfinite()


def words_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(
        models.WordLevel({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "plain": 4}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>"
    )


def pieces_tokenizer() -> PreTrainedTokenizerFast:
    pieces = [(piece, 0.0) for piece in ("<s>", "<pad>", "</s>", "<unk>")] + [("▁", -2.0), ("▁plain", -3.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>"
    )


@pytest.mark.parametrize("make_tokenizer", [ByT5Tokenizer, words_tokenizer, pieces_tokenizer])
def test_another_tokenizer_than_t5s_goes_along_as_it_is(make_tokenizer: Any, tmp_path: Path) -> None:
    """Code and byte models of T5's architecture have other tokenizers; CoLT5's own would give other ids."""
    T5ForConditionalGeneration(T5Config(**TINY)).save_pretrained(tmp_path / "t5")
    source = make_tokenizer()
    source.save_pretrained(tmp_path / "t5")
    convert_t5.main([str(tmp_path / "t5"), str(tmp_path / "colt5")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "colt5")
    assert not isinstance(tokenizer, CoLT5Tokenizer)
    for text in ("plain words", "Ünïcode"):
        assert tokenizer(text)["input_ids"] == source(text)["input_ids"]


def test_the_tokenizer_refuses_vocabularies_that_it_would_read_as_others(tmp_path: Path) -> None:
    words_tokenizer().save_pretrained(tmp_path / "words")
    with pytest.raises(TypeError, match="vocab is a dict.*AutoTokenizer"):
        CoLT5Tokenizer.from_pretrained(tmp_path / "words")
    pieces_tokenizer().save_pretrained(tmp_path / "pieces")
    with pytest.raises(ValueError, match=r"\['<s>', '<pad>', '</s>'\] as its first pieces; the third must be"):
        CoLT5Tokenizer.from_pretrained(tmp_path / "pieces")
