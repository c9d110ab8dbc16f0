"""docs/blocks.md: its blocks run, and its tables have every class and option of colt5-attention 0.11.2."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import assert_same_but_for_rounding

import modeling_colt5
from modeling_colt5 import (
    CoLT5ConditionalAttention,
    CoLT5ConditionalBlock,
    CoLT5ConditionalFeedForward,
    CoLT5Config,
    CoLT5VisionConfig,
)

PAGE = Path(__file__).resolve().parents[1] / "docs/blocks.md"
# what `colt5_attention/__init__.py` names
PEER_NAMES = """
    ConditionalRoutedFeedForward ConditionalRoutedAttention ConditionalRoutedImageAttention
    ConditionalRoutedAutoregressiveAttention ConditionalRoutedCrossAttention ConditionalRoutedTransformerBlock
    CoordinateDescentRouter coor_descent topk ConditionalRoutedViT
"""
# arguments of these classes and functions and of their calls, without the states that go in. The ViT's that begin with
# attn_ or ff_ are the others' under another name.
PEER_OPTIONS = """
    dim num_heavy_tokens light_ff_mult heavy_ff_mult router_straight_through router_kwargs use_triton mask
    num_heavy_tokens_q num_heavy_tokens_kv num_routed_kv has_light_attn light_dim_head light_heads light_window_size
    heavy_dim_head heavy_heads multiply_keys_by_score multiply_queries_by_score use_null_q_tokens use_flash_attn
    rotary_emb channel_first heavy_window_size random_route num_tokens_q num_tokens_kv num_sets_kv dim_head heads
    kv_routing_tokens route_block_size context context_mask num_heavy_attn_tokens_q num_heavy_attn_tokens_kv
    num_heavy_ff_tokens n_iters fetch_k_ratio eps eps_decay eps_init num_routing_tokens learned_routing_tokens
    cosine_sim_routing cosine_sim_scale triton_checkpoint_segments routing_tokens keep_one_route_dim
    coor_descent_k_ratio fused non_differentiable image_size patch_size num_classes depth channels router_use_triton
    flash_attn default_coor_descent_eps
"""


def rows(first_heading: str) -> list[list[str]]:
    """The cells of a table of the page, whose first heading this is, row by row."""
    _, _, behind = PAGE.read_text(encoding="utf-8").partition(f"| {first_heading} | here |")
    lines = behind.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.mark.parametrize(("heading", "names"), [("there", PEER_NAMES), ("option there", PEER_OPTIONS)])
def test_the_peers_names_are_all_there(heading: str, names: str) -> None:
    said = re.findall(r"\w+", " ".join(row[0] for row in rows(heading)))
    assert set(names.split()) <= set(said), set(names.split()) - set(said)


def test_what_stands_for_them_exists() -> None:
    ours = set(modeling_colt5.__all__) | {"SoftTopK", "soft_topk"}
    for name in modeling_colt5.__all__:
        member = getattr(modeling_colt5, name)
        if inspect.isclass(member) and "Conditional" in name:
            ours |= set(inspect.signature(member).parameters) | set(inspect.signature(member.forward).parameters)
    for own in (CoLT5Config, CoLT5VisionConfig, modeling_colt5.SoftTopK):
        ours |= {field.name for field in dataclasses.fields(own)}
    ours |= {"num_labels"}  # of every configuration of Transformers
    for heading in ("there", "option there"):
        for row in rows(heading):
            for code in re.findall(r"`([^`]+)`", row[1]):
                used = re.findall(r'(?<!["\w])[A-Za-z_]\w*(?!["\w])', code)
                assert set(used) <= ours, (code, set(used) - ours)


def run_block(number: int, **namespace: Any) -> dict[str, Any]:
    """Run a Python block of the page, with these names; gives all names that there are then."""
    block = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)[number]
    exec(compile(block, str(PAGE), "exec"), namespace)
    return namespace


def test_the_pages_block_runs(capsys: pytest.CaptureFixture) -> None:
    namespace = run_block(0)
    assert capsys.readouterr().out == "torch.Size([2, 64])\n"
    parts = torch.cat([namespace["first"], namespace["second"]], 1)
    # a cache is the whole, to rounding
    torch.testing.assert_close(parts, namespace["whole"], rtol=1e-4, atol=1e-4)
    assert namespace["read"].shape == (2, 8, 256)
    assert namespace["grids"].shape == (2, 24, 32, 256)


@torch.no_grad()
def test_with_the_weights_that_the_page_loads_modules_are_a_models_layer() -> None:
    block = CoLT5ConditionalBlock(256, light_d_ff=128, heavy_d_ff=1024, d_kv=32).eval()
    loaded = run_block(1, block=block)
    encoder = loaded["model"].eval().encoder
    states = torch.randn(2, 96, 256)
    expected = encoder(inputs_embeds=states).last_hidden_state
    assert_same_but_for_rounding(encoder.final_layer_norm(block(states))[0], expected)
    # sublayer by sublayer
    attention = CoLT5ConditionalAttention(256, d_kv=32).eval()
    feed_forward = CoLT5ConditionalFeedForward(256, light_d_ff=128, heavy_d_ff=1024).eval()
    attention.layer.load_state_dict(encoder.block[0].layer[0].state_dict())
    feed_forward.layer.load_state_dict(encoder.block[0].layer[1].state_dict())
    assert not torch.allclose(feed_forward(attention(states)), block(states), atol=1e-3), (
        "the biases are still to come"
    )
    for name in ("light_relative_attention_bias", "heavy_relative_attention_bias"):
        getattr(attention, name).load_state_dict(getattr(encoder, name).state_dict())
    assert_same_but_for_rounding(encoder.final_layer_norm(feed_forward(attention(states)))[0], expected)
