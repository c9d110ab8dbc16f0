"""The costs of a causally routed decoder by formula: what PyTorch counts, and what autograd keeps."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_colt5 import CoLT5Config, CoLT5ForCausalLM
from modeling_colt5.causal_costs import causal_flops, causal_kept_values
from modeling_colt5.encoder_costs import encoder_flops, kept_values


def decoder(**fields: Any) -> CoLT5ForCausalLM:
    """One layer with the base size's ratios between its parts, an eighth as wide, and small windows."""
    sizes: dict[str, Any] = {"d_model": 96, "d_kv": 8, "light_d_ff": 128, "heavy_d_ff": 1024, "d_ff": 256}
    sizes |= {"num_decoder_layers": 1, "vocab_size": 96, "local_radius": 20, "dropout_rate": 0.0, "use_cache": False}
    sizes |= {"causal_window": 64, "causal_routed_keys": 128, "kernel_backend": "torch"}
    config = CoLT5Config(**sizes | {"causal_attention": "routed", "causal_feed_forward": "routed"} | fields)
    return CoLT5ForCausalLM._from_config(config, attn_implementation="eager").train()


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("fields", [{}, {"causal_attention": "local"}])
def test_flops_are_those_that_pytorch_counts(fields: dict[str, Any], dense: bool) -> None:
    """All windows have slots for twice the tokens that they route on average, and the light attention takes blocks of
    128 tokens with the radius to each side: what that adds is added here, and all else is the formula's."""
    n, model = 512, decoder(**fields)
    model.set_dense_start(0.0 if dense else None)
    config = model.config
    expected = causal_flops(config, n, dense)
    if not dense:
        spare, pool = n // 16, config.causal_routed_keys
        heavy = config.num_heavy_heads * config.d_kv
        if config.causal_attention == "routed":
            expected += 2 * spare * (2 * config.d_model * heavy + 2 * pool * heavy)
        expected += 2 * 3 * spare * config.d_model * config.heavy_d_ff
    pairs = n * 21 - 20 * 21 // 2
    taken = (n // 128 + 1) * 128 * (128 + 2 * 20)
    expected += 2 * 2 * (taken - pairs) * config.num_light_heads * config.d_kv
    # the head
    expected += 2 * n * config.d_model * config.vocab_size
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(2, 96, (1, n)))
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("fields", [{}, {"dropout_rate": 0.1}])
def test_memory_of_a_dense_start_is_what_autograd_keeps(fields: dict[str, Any]) -> None:
    n, sizes = 1024, {}
    for dense, length in ((False, n), (True, n // 4)):
        model = decoder(**fields)
        model.set_dense_start(0.0 if dense else None)
        ids = torch.randint(2, 96, (1, length))
        held: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor, held: dict[int, torch.UntypedStorage] = held) -> torch.Tensor:
            # held, so that no address is used twice
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), ids)}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.decoder(input_ids=ids)
        sizes[dense] = sum(part.nbytes() for address, part in held.items() if address not in own)
    expected = [causal_kept_values(model.config, n, fused_attention=False)]
    expected.append(causal_kept_values(model.config, n // 4, dense=True, fused_attention=False))
    # the formula has the large tensors alone
    assert expected[1] / expected[0] == pytest.approx(sizes[True] / sizes[False], rel=0.15)


def test_costs_that_no_formula_describes_are_refused() -> None:
    config = decoder().config
    with pytest.raises(ValueError, match="causal_attention is 'full'"):
        causal_flops(CoLT5Config(), 64)
    for cost in (causal_flops, causal_kept_values, encoder_flops, kept_values):
        with pytest.raises(ValueError, match="n is 0; it must be at least 1"):
            cost(config, 0)
