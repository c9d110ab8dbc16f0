"""Device maps: a model whose parts wait in CPU memory or on disk computes what the whole one does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model, infer_auto_device_map
from models import pad, random_ids, tiny_model
from rounding import assert_same_but_for_rounding
from torch import nn
from transformers import AutoModelForSeq2SeqLM
from transformers.integrations.accelerate import infer_auto_device_map as infer_in_transformers

from modeling_colt5 import CoLT5ForConditionalGeneration, CoLT5ForSequenceClassification, CoLT5PreTrainedModel

# what every pass reads stays, every kind of block is away
PARTS = {
    "shared": "cpu",
    "encoder.embed_tokens": "cpu",
    "encoder.light_relative_attention_bias": "disk",
    "encoder.heavy_relative_attention_bias": "cpu",
    "encoder.block.0": "disk",
    "encoder.block.1": "cpu",
    "encoder.final_layer_norm": "disk",
    "decoder.embed_tokens": "cpu",
    "decoder.relative_attention_bias": "disk",
    "decoder.block.0": "disk",
    "decoder.block.1": "cpu",
    "decoder.block.2": "disk",
    "decoder.final_layer_norm": "disk",
    "lm_head": "disk",
}


def waiting(model: nn.Module) -> set[str]:
    """The parameters that are not in memory."""
    return {name for name, parameter in model.named_parameters() if parameter.is_meta}


@torch.no_grad()
def assert_same(model: CoLT5PreTrainedModel, whole: CoLT5PreTrainedModel) -> None:
    """Routing and generated tokens exactly, output but for rounding; afterwards what waited waits again.

    In float64: weights from a file lie elsewhere in memory, and fp32's rounding could part two scores.
    """
    batch = pad([random_ids(30), random_ids(12)])
    before = waiting(model)
    inputs = {**batch, "output_routing": True}
    if whole.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = random_ids(2, 4)
        expected = whole.generate(**batch, max_new_tokens=5)
        assert torch.equal(model.generate(**batch, max_new_tokens=5), expected)
    output, expected = model(**inputs), whole(**inputs)
    assert_same_but_for_rounding(output.logits.cpu(), expected.logits)
    field = "encoder_routing" if whole.config.is_encoder_decoder else "routing"
    for mine, theirs in zip(output[field], expected[field], strict=True):
        for router in ("query", "key_value", "feed_forward"):
            chosen = getattr(theirs, router)
            assert (chosen is None) == (whole.config.routing == "none")
            assert chosen is None or torch.equal(getattr(mine, router).indices.cpu(), chosen.indices)
    assert waiting(model) == before


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
@torch.no_grad()
def test_loading_onto_devices(device_map: str | dict[str, str], tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, device_map=device_map)
    inputs = {**pad([random_ids(30), random_ids(12)]), "decoder_input_ids": random_ids(2, 4)}
    # "auto" puts the whole model on a GPU where there is one
    there = {name: tensor.to(loaded.device) for name, tensor in inputs.items()}
    # whose sums have another order
    torch.testing.assert_close(loaded(**there).logits.cpu(), model(**inputs).logits, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["learned", "even", "none"])
@pytest.mark.usefixtures("float64_statistics")
def test_parts_on_disk_by_name(routing: str, tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.float64, routing=routing)
    model.save_pretrained(tmp_path)
    parts = {name: place for name, place in PARTS.items() if routing != "none" or "heavy" not in name}
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, device_map=parts, offload_folder=tmp_path / "offload")
    away = waiting(loaded)
    for name, place in parts.items():
        assert any(parameter.startswith(f"{name}.") for parameter in away) == (place == "disk"), name
    assert_same(loaded, model)


@pytest.mark.usefixtures("float64_statistics")
def test_parts_on_disk_by_memory(tmp_path: Path) -> None:
    """`device_map="auto"` finds the parts itself, and never splits a block."""
    model = tiny_model(dtype=torch.float64)
    model.save_pretrained(tmp_path)
    size = sum(parameter.nbytes for parameter in model.parameters())
    loaded = AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path, device_map="auto", max_memory={"cpu": size // 2}, offload_folder=tmp_path / "offload"
    )
    assert "disk" in loaded.hf_device_map.values()
    assert not any(".layer" in name and ".block" in name for name in loaded.hf_device_map)
    assert_same(loaded, model)


@pytest.mark.parametrize("model_class", [CoLT5ForConditionalGeneration, CoLT5ForSequenceClassification])
@pytest.mark.usefixtures("float64_statistics")
def test_all_parameters_wait_in_cpu_memory(model_class: type[CoLT5PreTrainedModel]) -> None:
    model, whole = (tiny_model(model_class, torch.float64) for _ in range(2))
    whole.load_state_dict(model.state_dict())
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert waiting(model) == {name for name, _ in model.named_parameters()}
    assert_same(model, whole)


@pytest.mark.usefixtures("float64_statistics")
def test_dispatching_a_model_that_is_loaded(tmp_path: Path) -> None:
    model, whole = (tiny_model(dtype=torch.float64) for _ in range(2))
    whole.load_state_dict(model.state_dict())
    parts = {name: place for name, place in PARTS.items() if not name.endswith("embed_tokens")}
    # tied weights stand together
    parts |= dict.fromkeys(("encoder.embed_tokens", "decoder.embed_tokens"), "cpu")
    dispatch_model(model, parts, offload_dir=tmp_path, main_device="cpu", force_hooks=True)
    assert waiting(model)
    assert_same(model, whole)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.7])
@pytest.mark.usefixtures("float64_statistics")
def test_a_map_that_accelerate_infers(share: float, tmp_path: Path) -> None:
    """It does not know that the stacks' embedding is `shared`, and may part a stack from it."""
    model, whole = (tiny_model(dtype=torch.float64) for _ in range(2))
    whole.load_state_dict(model.state_dict())
    room = int(share * sum(parameter.nbytes for parameter in model.parameters()))
    parts = infer_auto_device_map(model, {"cpu": room}, no_split_module_classes=model._no_split_modules)
    assert set(parts.values()) == {"cpu", "disk"}
    dispatch_model(model, parts, offload_dir=tmp_path, main_device="cpu", force_hooks=True)
    assert_same(model, whole)


def bytes_by_place(model: nn.Module, parts: dict[str, Any]) -> dict[Any, int]:
    """How much of a model each place gets: of a module with several names the last one says where it stands."""
    places: dict[nn.Parameter, Any] = {}

    def walk(module: nn.Module, prefix: str, place: Any) -> None:
        place = parts.get(prefix, place)
        places.update(dict.fromkeys(module.parameters(recurse=False), place))
        for name, child in module.named_children():
            walk(child, f"{prefix}.{name}" if prefix else name, place)

    walk(model, "", None)
    return {place: sum(p.nbytes for p, at in places.items() if at == place) for place in set(places.values())}


def test_the_embedding_counts_where_it_stands() -> None:
    """By the map of `from_pretrained`. Accelerate's own counts it at `shared`: it is off by the embedding at most."""
    model = tiny_model(vocab_size=2000)
    size, embedding = sum(parameter.nbytes for parameter in model.parameters()), model.shared.weight.nbytes
    most = {"Transformers": 0, "Accelerate": 0}
    for percent in range(30, 100, 5):
        room = {0: percent * size // 100, 1: percent * size // 100, "cpu": size}
        for whose, infer in (("Transformers", infer_in_transformers), ("Accelerate", infer_auto_device_map)):
            placed = bytes_by_place(model, infer(model, room, no_split_module_classes=model._no_split_modules))
            assert sum(placed.values()) == size
            most[whose] = max(most[whose], *(placed[place] - room[place] for place in placed))
    assert most["Transformers"] <= 0 < most["Accelerate"] <= embedding


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_blocks_that_wait_while_the_gpu_computes(place: str, tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    parts = {name: place if "block" in name else 0 for name in PARTS}
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, device_map=parts, offload_folder=tmp_path / "offload")
    assert all("block" in name for name in waiting(loaded)) and waiting(loaded)
    inputs = {**pad([random_ids(30), random_ids(12)]), "decoder_input_ids": random_ids(2, 4)}
    with torch.no_grad():
        # sums in another order
        torch.testing.assert_close(loaded(**inputs).logits.cpu(), model(**inputs).logits, rtol=0, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("how", ["by name", "auto"])
def test_blocks_on_two_cards(how: str, tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    if how == "by name":
        given = {"device_map": {name: int(name.endswith(".1") or name == "decoder.block.2") for name in PARTS}}
    else:
        # too little on one card
        most = 0.7 * sum(parameter.nbytes for parameter in model.parameters())
        given = {"device_map": "auto", "max_memory": {0: int(most), 1: int(2 * most)}}
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, **given)
    assert {parameter.device.index for parameter in loaded.parameters()} == {0, 1}
    batch = pad([random_ids(30), random_ids(12)])
    inputs = {**batch, "decoder_input_ids": random_ids(2, 4)}
    with torch.no_grad():
        # sums in another order
        torch.testing.assert_close(loaded(**inputs).logits.cpu(), model(**inputs).logits, rtol=0, atol=2e-5)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    mine, theirs = (part.generate(**batch, **settings) for part in (loaded, model))
    for one, other in zip(mine.logits, theirs.logits, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=2e-5)
