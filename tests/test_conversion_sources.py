"""What can be converted, what is refused, and what a conversion says that it lost."""

import re
from pathlib import Path
from typing import Any

import convert_t5
import finetune_seq2seq
import pytest
import torch
from example_runs import TINY_T5, TOKENIZER
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    LongT5Config,
    LongT5ForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
    T5ForTokenClassification,
    T5Model,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from modeling_colt5 import CoLT5Tokenizer
from modeling_colt5.conversion import convert, differences, load_source

TINY = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
TINY |= {"decoder_start_token_id": 0, "initializer_factor": 2.0}
FULL = {f"routed_{name}_fraction": 1.0 for name in ("feed_forward", "query", "key_value")}
WHOLE = {**FULL, "local_radius": 127}


def logits(model: PreTrainedModel) -> torch.Tensor:
    """The logits of fixed random inputs, one row partly padded."""
    generator = torch.Generator().manual_seed(0)
    ids, targets = (torch.randint(2, 64, (2, length), generator=generator) for length in (50, 9))
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, decoder_input_ids=targets).logits


def assert_same_function(model: PreTrainedModel, source: PreTrainedModel) -> None:
    """In float64: only the order of sums differs."""
    expected = logits(source)
    assert (logits(model) - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize("own_head", [False, True], ids=["tied", "own head"])
@pytest.mark.parametrize("measured", [False, True], ids=["by weights", "by sample"])
def test_mt5_is_the_same_function_at_full_budgets(own_head, measured):
    torch.manual_seed(0)
    source = MT5ForConditionalGeneration(MT5Config(**TINY)).eval().double()
    if own_head:
        source.lm_head.weight = torch.nn.Parameter(torch.randn_like(source.lm_head.weight))
    samples = [{"input_ids": torch.randint(2, 64, (2, 30))}] if measured else None
    model = convert(source, samples=samples, **WHOLE)
    assert_same_function(model, source)
    assert model.config.tie_word_embeddings is not own_head


@pytest.mark.parametrize("measured", [False, True], ids=["by weights", "by sample"])
def test_umt5_is_the_same_function_where_its_layers_share_their_biases(measured):
    torch.manual_seed(0)
    source = UMT5ForConditionalGeneration(UMT5Config(**TINY)).eval().double()
    if not getattr(source.decoder.block[0].layer[0].SelfAttention, "is_causal", False):
        pytest.skip("the decoder of umT5 sees later tokens in this release of Transformers")
    for stack in (source.encoder, source.decoder):
        first, *others = (block.layer[0].SelfAttention.relative_attention_bias for block in stack.block)
        for other in others:
            other.weight.data.copy_(first.weight)
    samples = [{"input_ids": torch.randint(2, 64, (2, 30))}] if measured else None
    model = convert(source, samples=samples, **WHOLE)
    assert_same_function(model, source)
    assert any("mean" in line for line in differences(source, model))


def test_the_tables_of_umt5_become_their_mean():
    torch.manual_seed(0)
    source = UMT5ForConditionalGeneration(UMT5Config(**TINY)).eval()
    model = convert(source, num_light_heads=4, num_heavy_heads=1, **WHOLE)
    for old, new in (
        (source.encoder, model.encoder.light_relative_attention_bias),
        (source.decoder, model.decoder.relative_attention_bias),
    ):
        one, other = (block.layer[0].SelfAttention.relative_attention_bias.weight for block in old.block)
        torch.testing.assert_close(new.weight, (one + other) / 2)


def test_differences_say_what_changed_and_nothing_else():
    source = T5ForConditionalGeneration(T5Config(**TINY))
    said = differences(source, convert(source, **WHOLE))
    assert said == ["1 of 4 heads see only the 127 nearest tokens to each side."]
    said = differences(source, convert(source, num_cross_key_value_heads=2, routed_query_fraction=0.25))
    assert said[0].startswith("The heavy branches take") and "0.25 of the queries" in said[0]
    assert said[2] == "Cross-attention's 4 heads of keys and values are 2 means."
    kinds = {"local": [], "transient-global": ["The global tokens of its attention are left out."]}
    for kind, expected in kinds.items():
        config = LongT5Config(**TINY, local_radius=7, encoder_attention_type=kind, feed_forward_proj="gated-gelu")
        source = LongT5ForConditionalGeneration(config)
        assert differences(source, convert(source, **FULL)) == expected
    said = differences(source, convert(source, num_light_heads=3, local_radius=5, **FULL))
    assert said[1:] == [
        "1 of 4 heads see all routed tokens, not the nearest 7 to each side.",
        "Light heads see 5 tokens to each side, where it has 7.",
    ]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        # the heavy branches hold nothing of the source's heads, and of its units only with their budget below 1
        ({"routed_feed_forward_fraction": 1.0}, []),
        ({}, ["feed-forward's tokens, chosen by routers that are new"]),
        ({"routing": "even"}, ["feed-forward's tokens, evenly spaced"]),
        ({"light_d_ff": TINY["d_ff"]}, []),
        ({**FULL, "routed_cross_key_values": 4}, ["reads 4 tokens of the encoder's output at most, chosen by"]),
        (
            {**FULL, "routed_cross_key_values": 4, "asking_cross_routing": True, "num_cross_key_value_heads": 1},
            ["1 means", "reads 4 tokens of the encoder's output at most, which each token chooses itself"],
        ),
    ],
)
def test_differences_are_named_where_logits_differ(fields: dict[str, Any], said: list[str]) -> None:
    torch.manual_seed(0)
    config = LongT5Config(**TINY, local_radius=7, encoder_attention_type="local", feed_forward_proj="gated-gelu")
    source = LongT5ForConditionalGeneration(config).eval()
    model = convert(source, **fields)
    found = differences(source, model)
    assert len(found) == len(said) and all(part in sentence for part, sentence in zip(said, found, strict=True))
    ids = {"input_ids": torch.randint(5, 64, (2, 40)), "decoder_input_ids": torch.randint(5, 64, (2, 6))}
    with torch.no_grad():
        difference = (model(**ids).logits - source(**ids).logits).abs().max()
    # fp32, logits of up to some tens
    assert (difference > 1e-3) == bool(said), difference


def save(model: Any, folder: Path) -> Path:
    """The model as a checkpoint with a tokenizer."""
    model.save_pretrained(folder)
    CoLT5Tokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


def without_weights(folder: Path, part: str) -> None:
    """Leave out of a checkpoint's weights all whose names have a part."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = {name: weight for name, weight in load_file(file).items() if part not in name}
    save_file(weights, file, metadata={"format": "pt"})


def convert_folder(source: Path, target: Path, *options: str) -> None:
    convert_t5.main([str(source), str(target), *options])


@pytest.mark.parametrize("part", ["decoder", "encoder.block.0", "layer_norm", "wo"])
def test_partial_checkpoints_are_refused(tmp_path, capsys, part):
    folder = save(T5ForConditionalGeneration(T5Config(**TINY_T5)), tmp_path / "t5")
    without_weights(folder, part)
    with pytest.raises(ValueError, match=rf"lacks \d+ of the model's weights, such as .*{part}"):
        load_source(str(folder))
    with pytest.raises(SystemExit):
        convert_folder(folder, tmp_path / "colt5")
    said = capsys.readouterr()
    assert "they would be random" in said.err and "M parameters" not in said.out
    assert not (tmp_path / "colt5").exists()


@pytest.mark.parametrize(
    "kind", [T5EncoderModel, T5Model, T5ForSequenceClassification, T5ForTokenClassification], ids=lambda k: k.__name__
)
def test_checkpoints_without_decoder_or_with_another_head_are_refused(tmp_path, capsys, kind):
    folder = save(kind(T5Config(**TINY_T5)), tmp_path / "t5")
    with pytest.raises(TypeError, match=f"holds a {kind.__name__}; a CoLT5 is made of an encoder-decoder"):
        load_source(str(folder))
    with pytest.raises(SystemExit):
        convert_folder(folder, tmp_path / "colt5")
    assert kind.__name__ in capsys.readouterr().err and not (tmp_path / "colt5").exists()
    with pytest.raises(TypeError, match=f"source is a {kind.__name__}"):
        convert(kind.from_pretrained(folder))


def test_other_sources_are_refused(tmp_path):
    t5 = T5ForConditionalGeneration(T5Config(**TINY_T5))
    folder = save(t5, tmp_path / "t5")
    colt5 = tmp_path / "colt5"
    convert_folder(folder, colt5)
    with pytest.raises(TypeError, match="holds a model of the type colt5; it must be one of"):
        load_source(str(colt5))
    adapted = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(folder), LoraConfig(task_type="SEQ_2_SEQ_LM", r=2))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds an adapter; merge it"):
        load_source(str(tmp_path / "adapter"))
    with pytest.raises(TypeError, match="source is a PeftModel"):
        convert(adapted)
    with torch.device("meta"):
        empty = T5ForConditionalGeneration(T5Config(**TINY_T5))
    with pytest.raises(ValueError, match="on disk or on the meta device"):
        convert(empty)


def test_quantised_sources_are_refused():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    source = T5ForConditionalGeneration(T5Config(**TINY_T5))
    quantize_(source, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="load it neither quantised nor sharded"):
        convert(source)
    source = T5ForConditionalGeneration(T5Config(**TINY_T5))
    source.encoder.block[0].layer[0].SelfAttention.q.weight = torch.nn.Parameter(
        torch.zeros(32, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ValueError, match=r"SelfAttention.q.weight as a Parameter of torch.int8"):
        convert(source)


@pytest.mark.parametrize("name", ["num_light_heads", "light_d_ff", "num_cross_key_value_heads"])
def test_a_size_of_nothing_is_not_the_default(name):
    with pytest.raises(StrictDataclassError, match="got 0; it must be|light and heavy"):
        convert(T5ForConditionalGeneration(T5Config(**TINY)), **{name: 0})


def test_sizes_budgets_and_radius_on_the_command_line(tmp_path, capsys):
    folder = save(T5ForConditionalGeneration(T5Config(**TINY_T5)), tmp_path / "t5")
    options = {"light-heads": 2, "heavy-heads": 3, "light-d-ff": 16, "heavy-d-ff": 64, "cross-key-value-heads": 2}
    options |= {"local-radius": 31, "feed-forward-fraction": 0.5, "query-fraction": 0.25, "key-value-fraction": 1.0}
    options |= {"routed-cross-key-values": 128}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    convert_folder(folder, tmp_path / "colt5", *words)
    config = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "colt5").config
    assert (config.num_light_heads, config.num_heavy_heads, config.light_d_ff, config.heavy_d_ff) == (2, 3, 16, 64)
    assert (config.num_cross_key_value_heads, config.local_radius, config.routed_cross_key_values) == (2, 31, 128)
    budgets = [getattr(config, f"routed_{name}_fraction") for name in ("feed_forward", "query", "key_value")]
    assert budgets == [0.5, 0.25, 1.0]
    said = capsys.readouterr().out
    assert (
        "In this it differs from its source:" in said
        and "0.5 of the feed-forward's tokens, 0.25 of the queries" in said
    )
    assert "31 nearest tokens" in said and "2 means" in said and "Train it further" in said
    no_text, blank, latin = folder / "model.safetensors", tmp_path / "blank.txt", tmp_path / "latin.txt"
    blank.write_text(" \n")
    latin.write_bytes("Überschrift".encode("latin-1"))
    with pytest.raises(SystemExit):
        convert_folder(folder, tmp_path / "other", "--sample", str(blank), "--sample-length", "0")
    assert "--sample-length is 0; it must be at least 1" in capsys.readouterr().err
    for script, option in ((convert_t5, "--query-fraction"), (finetune_seq2seq, "--query_fraction")):
        with pytest.raises(SystemExit):
            script.main([f"{option}=1/0"])
        assert "invalid Share value: '1/0'" in capsys.readouterr().err
    for name, value in (
        ("query-fraction", "2"),
        ("local-radius", "-1"),
        ("light-heads", "0"),
        ("sample", no_text),
        ("sample", blank),
        ("sample", latin),
    ):
        with pytest.raises(SystemExit):
            convert_folder(folder, tmp_path / "other", f"--{name}", str(value))
        # one line, whatever other libraries make of it
        said = capsys.readouterr().err
        assert re.fullmatch(r"\S+: error: [^\n]+\n", said), name
        assert name != "sample" or str(value) in said
        assert not (tmp_path / "other").exists()


def test_weights_without_a_place_are_named(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    folder = save(T5ForConditionalGeneration(T5Config(**TINY_T5)), tmp_path / "t5")
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"encoder.block.7.extra.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    convert_folder(folder, tmp_path / "colt5")
    assert "1 weights of the checkpoint have no place in it, such as encoder.block.7" in capsys.readouterr().out
