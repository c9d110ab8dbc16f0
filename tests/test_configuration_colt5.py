"""The configuration: what it refuses, the paper's sizes, the presets, and what saving and loading keeps."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from models import tiny_config
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from modeling_colt5 import CoLT5Config, CoLT5ForConditionalGeneration
from modeling_colt5.configuration_colt5 import CoLT5BaseConfig

ROOT = Path(__file__).resolve().parents[1]
ANNOTATIONS = CoLT5BaseConfig.__annotations__ | CoLT5Config.__annotations__

# the defaults are the paper's base model
DEFAULTS = {
    "vocab_size": 32128,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 12,
    "num_decoder_layers": 12,
    "num_heads": 12,
    "num_light_heads": 4,
    "num_heavy_heads": 8,
    "light_d_ff": 1024,
    "heavy_d_ff": 8192,
    "local_radius": 127,
    "routed_feed_forward_fraction": 1 / 16,
    "routed_query_fraction": 1 / 16,
    "routed_key_value_fraction": 1 / 8,
    "min_routed_tokens": 1,
    "routing": "learned",
    "routers_trained": False,
    "soft_topk_ratio": 9 / 8,
    "routing_epsilon": 1.0,
    "soft_topk_solver": "exact",
    "num_soft_topk_iterations": 50,
    "routing_epsilon_init": None,
    "routing_epsilon_decay": 1.0,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "num_cross_key_value_heads": 1,
    # the paper routes nothing in its decoder
    "routed_cross_key_values": None,
    "asking_cross_routing": False,
    "causal_attention": "full",
    "causal_feed_forward": "dense",
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "scale_decoder_outputs": False,
    "use_cache": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}

# the table of the paper: layers, d_model, d_ff, light and heavy feed-forward, light and heavy heads, decoder heads,
# millions of parameters
PAPER = {
    "base": (12, 768, 2048, 1024, 8192, 4, 8, 12, 433),
    "large": (24, 1024, 2816, 1408, 11264, 4, 12, 16, 1463),
    "xl": (24, 2048, 5120, 2560, 20480, 8, 24, 32, 5297),
}

POSITIVE_INTEGERS = [
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_decoder_layers",
    "num_heads",
    "num_light_heads",
    "num_heavy_heads",
    "light_d_ff",
    "heavy_d_ff",
    "min_routed_tokens",
    "num_soft_topk_iterations",
    "num_cross_key_value_heads",
    "routed_cross_key_values",
    "num_cross_routers",
    "causal_window",
    "causal_routed_keys",
    "num_causal_key_value_routers",
]
FRACTIONS = [
    "routed_feed_forward_fraction",
    "routed_query_fraction",
    "routed_key_value_fraction",
    "routing_epsilon_decay",
]
POSITIVE_NUMBERS = ["routing_epsilon", "routing_epsilon_init", "layer_norm_epsilon", "initializer_factor"]
NAMES = {
    "routing": "'learned', 'random', 'even', 'none'",
    "soft_topk_solver": "'exact', 'coordinate_descent'",
    "causal_attention": "'full', 'local', 'routed'",
    "causal_feed_forward": "'dense', 'routed'",
    "kernel_backend": "'auto', 'triton', 'torch'",
}
NOT_FINITE = (math.nan, math.inf, -math.inf)

IMPOSSIBLE = [
    *((name, value, "at least 1") for name in POSITIVE_INTEGERS for value in (0, -1)),
    *((name, value, "at least 0") for name in ("local_radius",) for value in (-1,)),
    ("relative_attention_num_buckets", 2, "at least 4"),
    ("relative_attention_max_distance", 1, "at least 2"),
    *((name, value, "above 0 and at most 1") for name in FRACTIONS for value in (0.0, -0.1, 1.001, 2, *NOT_FINITE)),
    *((name, value, "above 0") for name in POSITIVE_NUMBERS for value in (0.0, -1.0, *NOT_FINITE)),
    *(
        (name, value, "at least 1")
        for name in ("soft_topk_ratio", "causal_capacity_ratio")
        for value in (0.999, 0, -2, *NOT_FINITE)
    ),
    *(
        (name, value, "at least 0 and below 1")
        for name in ("dropout_rate", "classifier_dropout")
        for value in (-0.1, 1.0, *NOT_FINITE)
    ),
    *((name, value, rule) for name, rule in NAMES.items() for value in ("", "nonsense")),
    ("feed_forward_proj", "gated-nonsense", "activation"),
    ("feed_forward_proj", "relu-gated", "activation"),
    ("feed_forward_proj", "", "activation"),
]


@pytest.mark.parametrize(("name", "value", "rule"), IMPOSSIBLE)
def test_impossible_values_are_refused_by_field_value_and_rule(name, value, rule):
    with pytest.raises(StrictDataclassError) as refusal:
        CoLT5Config(**{name: value})
    for part in (name, repr(value), rule):
        assert part in str(refusal.value)
    config = CoLT5Config()
    with pytest.raises(StrictDataclassError, match=name):
        setattr(config, name, value)
    assert getattr(config, name) == getattr(CoLT5Config(), name)


@pytest.mark.parametrize("name", sorted(ANNOTATIONS))
def test_values_of_another_type_are_refused(name):
    declared = ANNOTATIONS[name]
    wrong = ["a string", True, 0.5, b"bytes", [0.5], {}]
    accepted = {bool: True, str: "a string", float: 0.5, float | int: 0.5, float | int | None: 0.5}.get(declared)
    for value in wrong:
        # what has the declared type is for the rules, not for this test
        if type(value) is type(accepted):
            continue
        with pytest.raises(StrictDataclassError) as refusal:
            CoLT5Config(**{name: value})
        assert name in str(refusal.value) and type(value).__name__ in str(refusal.value)


@pytest.mark.parametrize(
    ("fields", "mentioned"),
    [
        ({"num_heads": 12, "num_cross_key_value_heads": 5}, ["num_cross_key_value_heads is 5", "num_heads", "12"]),
        ({"num_heads": 12, "num_cross_routers": 5}, ["num_cross_routers is 5", "num_heads", "12"]),
        (
            {"num_heads": 12, "num_cross_routers": 2, "num_cross_key_value_heads": 3},
            ["num_cross_routers is 2", "num_cross_key_value_heads", "3"],
        ),
        ({"routed_cross_key_values": 9, "routing": "none"}, ["routed_cross_key_values is 9", "'none'", "None"]),
        ({"asking_cross_routing": True}, ["asking_cross_routing is True", "routed_cross_key_values", "None"]),
        (
            {"asking_cross_routing": True, "routed_cross_key_values": 9, "num_cross_routers": 2},
            ["asking_cross_routing is True", "num_cross_routers", "2 and 1"],
        ),
        (
            {"asking_cross_routing": True, "routed_cross_key_values": 9, "num_cross_key_value_heads": 2},
            ["asking_cross_routing is True", "num_cross_key_value_heads", "1 and 2"],
        ),
        (
            {"asking_cross_routing": True, "routed_cross_key_values": 9, "routing": "even"},
            ["asking_cross_routing", "'even'"],
        ),
        ({"num_labels": 0}, ["num_labels is 0", "at least one"]),
        ({"num_labels": -2}, ["num_labels is 0", "at least one"]),
        ({"id2label": {}}, ["num_labels is 0", "id2label {}"]),
        ({"relative_attention_num_buckets": 7}, ["relative_attention_num_buckets is 7", "even"]),
        ({"relative_attention_max_distance": 16}, ["relative_attention_max_distance is 16", "32"]),
        ({"routing_epsilon_init": 4.0}, ["routing_epsilon_init is 4.0", "coordinate_descent"]),
        ({"routing_epsilon_decay": 0.7}, ["routing_epsilon_decay is 0.7", "coordinate_descent"]),
        (
            {"soft_topk_solver": "coordinate_descent", "routing_epsilon_init": 0.5},
            ["routing_epsilon_init is 0.5", "routing_epsilon", "1.0"],
        ),
        ({"pad_token_id": -1}, ["pad_token_id is -1", "32127"]),
        ({"eos_token_id": [1, 32128]}, ["eos_token_id is [1, 32128]", "32127"]),
        ({"decoder_start_token_id": 40000}, ["decoder_start_token_id is 40000", "32127"]),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, mentioned, tmp_path):
    with pytest.raises(StrictDataclassError) as refusal:
        CoLT5Config(**fields)
    assert all(part in str(refusal.value) for part in mentioned)
    # one field can be assigned before its counterpart; a configuration that never became whole is not saved
    config = CoLT5Config()
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(StrictDataclassError):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"local_radius": 0},
        {"routed_query_fraction": 1, "routed_key_value_fraction": 1.0, "routed_feed_forward_fraction": 1e-9},
        {"soft_topk_ratio": 1},
        {"soft_topk_solver": "coordinate_descent", "routing_epsilon_init": 4.0, "routing_epsilon_decay": 0.7},
        {"num_cross_key_value_heads": 12},
        {"num_cross_key_value_heads": 3},
        {"num_layers": 1, "num_decoder_layers": 3},
        {"feed_forward_proj": "relu"},
        {"feed_forward_proj": "gated-silu"},
        {"eos_token_id": [1, 2], "pad_token_id": None},
        {"dropout_rate": 0},
        {"num_light_heads": 1, "num_heavy_heads": 1},
        *({"routing": routing} for routing in ("random", "even", "none")),
    ],
)
def test_possible_values_are_taken_and_survive_saving(fields, tmp_path):
    config = CoLT5Config(**fields)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is CoLT5Config
    assert {name: getattr(loaded, name) for name in fields} == fields
    assert _contents(loaded) == _contents(config)


def _contents(config):
    """All of a configuration but where it was loaded from and by which version."""
    contents = config.to_dict()
    for name in ("_name_or_path", "transformers_version", "architectures"):
        contents.pop(name, None)
    return contents


def test_defaults_are_the_papers_base_model():
    config = CoLT5Config()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("size", PAPER)
def test_sizes_are_the_papers(size):
    config = CoLT5Config.from_size(size)
    layers, d_model, d_ff, light_d_ff, heavy_d_ff, light_heads, heavy_heads, heads, _ = PAPER[size]
    assert (config.num_layers, config.num_decoder_layers) == (layers, layers)
    assert (config.d_model, config.d_ff, config.light_d_ff, config.heavy_d_ff) == (
        d_model,
        d_ff,
        light_d_ff,
        heavy_d_ff,
    )
    assert (config.num_light_heads, config.num_heavy_heads, config.num_heads) == (light_heads, heavy_heads, heads)
    assert (config.vocab_size, config.d_kv, config.tie_word_embeddings) == (32128, 64, False)
    assert CoLT5Config.from_size(size, dropout_rate=0.0, d_ff=8).to_diff_dict()["d_ff"] == 8


def test_unknown_size_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'small'.*'base', 'large', 'xl'"):
        CoLT5Config.from_size("small")


@pytest.mark.parametrize("size", PAPER)
def test_parameter_counts_and_layer_shapes_are_the_papers(size):
    layers, d_model, d_ff, light_d_ff, heavy_d_ff, light_heads, heavy_heads, heads, millions = PAPER[size]
    with torch.device("meta"):
        model = CoLT5ForConditionalGeneration(CoLT5Config.from_size(size))
    count = sum(parameter.numel() for parameter in model.parameters())
    # within 1 M of 432.7 M, 1462.5 M and 5296.9 M, which the matrices of the paper's sizes come to
    assert abs(count - {"base": 432.7e6, "large": 1462.5e6, "xl": 5296.9e6}[size]) < 1e6
    assert abs(count / 1e6 - millions) < 1

    light, heavy, all_heads = 64 * light_heads, 64 * heavy_heads, 64 * heads
    encoder = {
        "layer.0.layer_norm": (d_model,),
        "layer.0.query_router": (d_model,),
        "layer.0.key_value_router": (d_model,),
        **{f"layer.0.light_attention.{name}": (light, d_model) for name in "qkv"},
        "layer.0.light_attention.o": (d_model, light),
        **{f"layer.0.heavy_attention.{name}": (heavy, d_model) for name in "qkv"},
        "layer.0.heavy_attention.o": (d_model, heavy),
        "layer.1.layer_norm": (d_model,),
        "layer.1.router": (d_model,),
        **{f"layer.1.light_feed_forward.wi_{i}": (light_d_ff, d_model) for i in (0, 1)},
        "layer.1.light_feed_forward.wo": (d_model, light_d_ff),
        **{f"layer.1.heavy_feed_forward.wi_{i}": (heavy_d_ff, d_model) for i in (0, 1)},
        "layer.1.heavy_feed_forward.wo": (d_model, heavy_d_ff),
    }
    decoder = {
        **{f"layer.{i}.layer_norm": (d_model,) for i in (0, 1, 2)},
        **{f"layer.0.SelfAttention.{name}": (all_heads, d_model) for name in "qkv"},
        "layer.0.SelfAttention.o": (d_model, all_heads),
        "layer.1.EncDecAttention.q": (all_heads, d_model),
        "layer.1.EncDecAttention.k": (64, d_model),
        "layer.1.EncDecAttention.v": (64, d_model),
        "layer.1.EncDecAttention.o": (d_model, all_heads),
        **{f"layer.2.DenseReluDense.wi_{i}": (d_ff, d_model) for i in (0, 1)},
        "layer.2.DenseReluDense.wo": (d_model, d_ff),
    }
    for stack, shapes in ((model.encoder, encoder), (model.decoder, decoder)):
        assert len(stack.block) == layers
        for block in (stack.block[0], stack.block[-1]):
            found = {name.removesuffix(".weight"): tuple(p.shape) for name, p in block.named_parameters()}
            assert found == shapes


def test_presets_are_the_table_written_out(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["write_presets.py", "--folder", str(tmp_path)])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    runpy.run_path(str(ROOT / "configuration" / "write_presets.py"), run_name="__main__")
    written = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.glob("*/*")}
    committed = {
        path.relative_to(ROOT / "configuration"): path.read_text() for path in ROOT.glob("configuration/*/*.json")
    }
    assert written == committed
    assert {str(path) for path in committed} == {
        f"{size}/{name}.json" for size in PAPER for name in ("config", "generation_config")
    }


@pytest.mark.parametrize("size", PAPER)
def test_presets_load_with_the_auto_class(size):
    folder = ROOT / "configuration" / size
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is CoLT5Config
    assert _contents(config) == _contents(CoLT5Config.from_size(size))
    assert config.architectures == ["CoLT5ForConditionalGeneration"]
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.pad_token_id, generation.eos_token_id, generation.decoder_start_token_id) == (0, 1, 0)


def test_saving_keeps_every_field_and_names_every_head(tmp_path):
    """Trap 4 of TRANSFORMERS.md: `auto_map` would hold only the class that was saved."""
    config = tiny_config(num_labels=5, problem_type="regression")
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert set(saved["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForSeq2SeqLM",
        "AutoModelForCausalLM",
        "AutoModelForTextEncoding",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoModelForQuestionAnswering",
        "AutoTokenizer",
    }
    loaded = CoLT5Config.from_pretrained(tmp_path)
    assert _contents(loaded) == _contents(config) and loaded.num_labels == 5


def test_auto_map_never_points_to_the_repository_a_config_came_from(tmp_path):
    config = tiny_config()
    config.auto_map = {"AutoConfig": "someone/colt5--configuration_colt5.CoLT5Config"}
    config.save_pretrained(tmp_path)
    assert "--" not in (tmp_path / "config.json").read_text()
    loaded = CoLT5Config(auto_map={"AutoConfig": "someone/colt5--configuration_colt5.CoLT5Config"})
    assert "--" not in str(loaded.to_dict()["auto_map"])


def test_decoders_config_has_the_decoders_depth():
    """Trap 2: generation sizes its caches by this configuration's `num_hidden_layers`."""
    config = tiny_config(num_layers=1, num_decoder_layers=3)
    decoder = config.get_text_config(decoder=True)
    assert (decoder.num_hidden_layers, decoder.num_layers, config.num_layers) == (3, 3, 1)
    assert config.get_text_config() is config
    assert config.get_text_config(encoder=True).num_hidden_layers == 1


def test_decoders_config_keeps_every_field_under_its_name():
    """Trap 3: the inherited method renames fields that start with "decoder" or "encoder"."""
    config = tiny_config(decoder_start_token_id=7)
    for part in ({"decoder": True}, {"encoder": True}, {"decoder": True, "encoder": True}):
        text_config = config.get_text_config(**part)
        assert text_config.decoder_start_token_id == 7
        assert not hasattr(text_config, "start_token_id")
        differing = {name for name, value in text_config.to_dict().items() if config.to_dict().get(name, "") != value}
        assert differing <= {"num_layers"}
    assert not any(name.startswith("encoder") for name in ANNOTATIONS)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_tying_and_scaling_are_two_fields(tied, scaled, tmp_path):
    """T5's configuration turns an untied head into a tied one that is not scaled; here each says what it means."""
    CoLT5Config(tie_word_embeddings=tied, scale_decoder_outputs=scaled).save_pretrained(tmp_path)
    config = CoLT5Config.from_pretrained(tmp_path)
    assert (config.tie_word_embeddings, config.scale_decoder_outputs) == (tied, scaled)


def test_common_names_reach_the_fields():
    config = tiny_config()
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers, config.head_dim) == (32, 4, 2, 8)
    config.hidden_size = 40
    assert config.d_model == 40
    assert isinstance(config, PreTrainedConfig) and config.model_type == "colt5"


def test_activation_names():
    gated = CoLT5Config(feed_forward_proj="gated-gelu")
    # T5's "gated-gelu" has always meant the tanh form
    assert (gated.is_gated_act, gated.dense_act_fn) == (True, "gelu_new")
    plain = CoLT5Config(feed_forward_proj="relu")
    assert (plain.is_gated_act, plain.dense_act_fn) == (False, "relu")
