"""Decoder layers that a user takes out, moves or repeats: the model is the one that is built so, with every cache."""

import copy
import re
from typing import Any

import pytest
import torch
from models import pad, random_ids, tiny_config
from torch import nn

from modeling_colt5 import CoLT5ForCausalLM, CoLT5ForConditionalGeneration

ROUTED = {"causal_attention": "routed", "causal_window": 4, "causal_routed_keys": 6, "num_heavy_heads": 4}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "causal, full": (CoLT5ForCausalLM, {}),
    "causal, routed": (CoLT5ForCausalLM, ROUTED | {"causal_feed_forward": "routed"}),
    "causal, local": (CoLT5ForCausalLM, ROUTED | {"causal_attention": "local"}),
    "with an encoder": (CoLT5ForConditionalGeneration, {}),
    "with an encoder, routed": (CoLT5ForConditionalGeneration, ROUTED),
    "cross-routed": (CoLT5ForConditionalGeneration, {"routed_cross_key_values": 6, "num_cross_routers": 2}),
    "asking": (CoLT5ForConditionalGeneration, {"routed_cross_key_values": 6, "asking_cross_routing": True}),
}
# fp32 sums taken in another order over logits of size 1
TOLERANCE = 1e-5


def with_layers(model: Any, places: list[int], depth: int | None) -> Any:
    """The model with these of its decoder's layers, which may come twice; `depth` is what the configuration then says,
    None for what it said before."""
    model = copy.deepcopy(model)
    decoder = model.decoder
    decoder.block = nn.ModuleList(decoder.block[place] for place in places)
    if decoder.is_cross_routed:
        routing = decoder.cross_routing
        groups = [routing.routers[place * routing.num_routers :][: routing.num_routers] for place in places]
        routing.routers = nn.ModuleList(router for group in groups for router in group)
    if depth is not None:
        model.config.num_decoder_layers = depth
    return model


def rebuilt(model: Any, places: list[int]) -> Any:
    """A model that was built with as many layers, and has copies of these."""
    model_class, config = type(model), copy.deepcopy(model.config)
    config.num_decoder_layers = len(places)
    built = model_class(config).eval()
    built.load_state_dict(with_layers(model, places, len(places)).state_dict())
    return built


def generate(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    fixed = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}
    output = model.generate(**batch, **fixed | options, return_dict_in_generate=True)
    return output.sequences, torch.stack(output.logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("places", "depth"),
    [
        pytest.param([1, 2], None, id="first out, the configuration as it was"),
        pytest.param([2, 0, 0, 1], 4, id="moved, and one twice"),
    ],
)
def test_changed_decoders_are_those_built_so(kind: str, places: list[int], depth: int | None) -> None:
    model_class, fields = KINDS[kind]
    model = model_class(tiny_config(**fields)).eval()
    batch = pad([random_ids(9), random_ids(5)], "left")
    changed = with_layers(model, places, depth)
    ids, logits = generate(rebuilt(model, places), batch, use_cache=False)
    for options in ({}, {"cache_implementation": "static"}):
        found, found_logits = generate(changed, batch, **options)
        assert torch.equal(found, ids)
        torch.testing.assert_close(found_logits, logits, rtol=0, atol=TOLERANCE)


def test_layers_without_their_routers_are_refused() -> None:
    model = CoLT5ForConditionalGeneration(tiny_config(**KINDS["cross-routed"][1])).eval()
    del model.decoder.block[1]
    message = "cross_routing.routers has 6 routers; it must have 4 for the decoder's 2 layers"
    with pytest.raises(ValueError, match=re.escape(message)):
        model(random_ids(1, 9), decoder_input_ids=random_ids(1, 3))
