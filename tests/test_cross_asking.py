"""Cross-attention whose routing asks first: each token of the decoder chooses its own tokens of the memory."""

import copy
from typing import Any

import pytest
import torch
from models import pad, random_ids, tiny_model
from rounding import assert_same_but_for_rounding
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

from modeling_colt5 import (
    CoLT5ConditionalCrossAttention,
    CoLT5ForConditionalGeneration,
    set_dense_start,
    soft_topk,
)
from modeling_colt5.run_plan import DecoderPlan

ASKING: dict[str, Any] = {"routed_cross_key_values": 7, "asking_cross_routing": True}


def asking_model(dtype: torch.dtype = torch.float32, **fields: Any) -> CoLT5ForConditionalGeneration:
    torch.manual_seed(0)
    return tiny_model(dtype=dtype, **ASKING | fields)


def module(budget: int = 7, **more: Any) -> CoLT5ConditionalCrossAttention:
    return CoLT5ConditionalCrossAttention(32, budget, d_kv=8, num_heads=4, asking_cross_routing=True, **more).eval()


def real(lengths: list[int], n: int) -> Tensor:
    return torch.arange(n) < torch.tensor(lengths)[:, None]


def test_it_and_its_gradients_are_the_equation(float64_statistics: None) -> None:
    """Written out in float64, token by token."""
    ours = module().double()
    with torch.no_grad():
        # scores that lie apart by far more than rounding
        ours.layer.EncDecAttention.q.weight.mul_(30)
    written = copy.deepcopy(ours)
    states, memory = (torch.randn(1, n, 32, dtype=torch.float64, requires_grad=True) for n in (5, 30))
    goal = torch.randn(1, 5, 32).double()
    output, (tokens,) = ours(states, memory, output_routing=True)
    own, read = (part.detach().clone().requires_grad_() for part in (states, memory))
    attention = written.layer.EncDecAttention
    rows = []
    for place in range(5):
        state = own[0, place]
        normed = state * (state.square().mean() + 1e-6).rsqrt() * written.layer.layer_norm.weight
        query = (attention.q.weight @ normed).view(4, 8)
        scores = (read[0] @ attention.k.weight.T) @ query.mean(0)
        chosen = scores.topk(7).indices.sort().values
        assert tokens.indices[0, place].tolist() == chosen.tolist()
        seen = soft_topk(scores, 9 / 8 * 7)[chosen, None] * read[0][chosen]
        weights = (query @ (seen @ attention.k.weight.T).T).softmax(-1)
        rows.append(state + attention.o.weight @ (weights @ (seen @ attention.v.weight.T)).flatten())
    expected = torch.stack(rows)
    # float64 throughout, sums of some hundred terms; gradients are sums of those
    torch.testing.assert_close(output[0], expected, rtol=1e-9, atol=1e-9)
    found = torch.autograd.grad((output * goal).sum(), [states, memory, *ours.parameters()])
    wanted = torch.autograd.grad((expected * goal[0]).sum(), [own, read, *written.parameters()])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


@torch.no_grad()
def test_a_budget_that_covers_everything_is_full_cross_attention() -> None:
    asking, full = (
        asking_model(routed_cross_key_values=40),
        asking_model(routed_cross_key_values=None, asking_cross_routing=False),
    )
    # a choice by queries and keys has no parameters
    full.load_state_dict(asking.state_dict())
    inputs = {**pad([random_ids(40), random_ids(9)]), "decoder_input_ids": random_ids(2, 6)}
    assert_same_but_for_rounding(asking(**inputs).logits, full(**inputs).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(side: str) -> None:
    model = asking_model()
    rows, targets = [random_ids(17), random_ids(40), random_ids(3)], random_ids(3, 5)
    together = model(**pad(rows, side=side), decoder_input_ids=targets).logits
    for row, target, logits in zip(rows, targets, together, strict=True):
        assert_same_but_for_rounding(model(row[None], decoder_input_ids=target[None]).logits[0], logits)


@torch.no_grad()
def test_no_token_depends_on_a_later_one_and_each_chooses_for_itself() -> None:
    model = asking_model()
    ids, targets = random_ids(1, 40), random_ids(1, 9)
    before = model(input_ids=ids, decoder_input_ids=targets, output_routing=True)
    other = torch.cat([targets[:, :5], random_ids(1, 4)], 1)
    after = model(input_ids=ids, decoder_input_ids=other).logits
    assert_same_but_for_rounding(after[:, :5], before.logits[:, :5])
    for (tokens,) in before.cross_routing:
        assert tokens.indices.shape == tokens.weights.shape == tokens.valid.shape == (1, 9, 7)
        assert len({tuple(row) for row in tokens.indices[0].tolist()}) > 1


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_with_a_cache_it_is_the_whole(kind: str, masked: bool) -> None:
    model = asking_model()
    inputs = pad([random_ids(40), random_ids(4)]) if masked else {"input_ids": random_ids(2, 40)}
    targets = random_ids(2, 8)
    whole = model(**inputs, decoder_input_ids=targets).logits
    config = model.config.get_text_config(decoder=True)
    if kind == "static":
        # longer than the memory
        parts = [StaticCache(config=config, max_cache_len=length) for length in (8, 50)]
    else:
        parts = [DynamicCache(config=config), DynamicCache(config=config)]
    cache, states = EncoderDecoderCache(*parts), model.get_encoder()(**inputs)
    steps = [
        model(
            encoder_outputs=states, attention_mask=inputs.get("attention_mask"), decoder_input_ids=part, cache=cache
        ).logits
        for part in targets.split((3, 1, 1, 3), 1)
    ]
    assert_same_but_for_rounding(torch.cat(steps, 1), whole)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generation(options: dict[str, Any]) -> None:
    model = asking_model()
    batch = pad([random_ids(40), random_ids(11)], side="left")
    plain = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**batch, **plain, use_cache=False, **{k: v for k, v in options.items() if "beams" in k})
    assert torch.equal(model.generate(**batch, **plain, disable_compile=True, **options), expected)


@torch.no_grad()
def test_a_memory_is_projected_once() -> None:
    asking, states, memory = module(), torch.randn(2, 4, 32), torch.randn(2, 30, 32)
    cache, calls = asking.make_cache(), []
    asking.layer.EncDecAttention.k.register_forward_hook(lambda *_: calls.append(1))
    expected = asking(states, memory)
    parts = [asking(part, memory, cache=cache) for part in states.split(1, 1)]
    assert_same_but_for_rounding(torch.cat(parts, 1), expected)
    assert len(calls) == 2


def test_kernels_agree_with_pytorch(device: torch.device) -> None:
    pytest.importorskip("triton")
    found = []
    asking = module().to(device)
    states, memory = (torch.randn(2, n, 32, device=device, requires_grad=True) for n in (3, 24))
    leaves = [states, memory, *asking.parameters()]
    for backend in ("torch", "triton"):
        other = module(kernel_backend=backend)
        other.load_state_dict(asking.state_dict())
        asking.implementation = other.implementation
        output = asking(states, memory, real([24, 5], 24).to(device))
        found.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for expected, ours in zip(*found, strict=True):
        # sums in another order
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_a_dense_start_reads_every_token_with_a_weight(progress: float) -> None:
    asking, memory = module().train(), torch.randn(1, 20, 32)
    set_dense_start(asking, progress)
    output, (tokens,) = asking(torch.randn(1, 3, 32), memory, output_routing=True)
    first, last = 0.9 * 20, 9 / 8 * 7
    torch.testing.assert_close(tokens.weights.sum(-1), torch.full((1, 3), first * (last / first) ** progress))
    # of the weights alone: queries and keys get the attention's gradient in any case
    attention, goal = asking.layer.EncDecAttention, torch.randn_like(tokens.weights)
    for linear in (attention.q, attention.k):
        (gradient,) = torch.autograd.grad(
            (tokens.weights * goal).sum() + 0 * output.sum(), linear.weight, retain_graph=True
        )
        assert bool(gradient.any()) is (progress > 0)
    asking.eval()
    assert asking(torch.randn(1, 3, 32), memory, output_routing=True)[1][0].valid.sum() == 3 * 7


# four seconds of training
@pytest.mark.slow
def test_it_learns_what_a_shared_choice_cannot() -> None:
    """Each token of the decoder needs one token of the memory; together they need more than the budget."""
    torch.manual_seed(0)
    asking = CoLT5ConditionalCrossAttention(32, 2, d_kv=16, num_heads=2, asking_cross_routing=True)
    shared = CoLT5ConditionalCrossAttention(32, 2, d_kv=16, num_heads=2)
    names, values = nn.functional.normalize(torch.randn(8, 16), dim=-1) * 4, torch.randn(64, 8, 16)
    losses = []
    for network in (asking.train(), shared.train()):
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        for step in range(200):
            set_dense_start(network, None if step >= 120 else max(0.0, (step - 20) / 100))
            memory = torch.cat([names.expand(64, -1, -1), values], -1)
            queries = nn.functional.pad(names, (0, 16)).expand(64, -1, -1)
            loss = (network(queries, memory) - queries)[..., 16:].sub(values).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    # without asking two of the eight tokens are read at best: a quarter of the variance
    assert losses[0] < 0.6 * losses[1], losses


@pytest.mark.slow
def test_compilers_take_it_whole() -> None:
    asking, mask = module(), real([21, 13], 21)
    compiled = torch.compile(asking, fullgraph=True, dynamic=False, backend="aot_eager")
    states, memory = torch.randn(2, 4, 32, requires_grad=True), torch.randn(2, 21, 32)
    results = []
    for one in (asking, compiled):
        output = one(states, memory, mask)
        results.append([output, *torch.autograd.grad(output.square().sum(), [states, *asking.parameters()])])
    for ours, expected in zip(*results, strict=True):
        # the compiler takes fp32 sums in another order
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_weights_are_of_the_slots_that_each_token_chose() -> None:
    model = asking_model(attn_implementation="eager")
    output = model(
        input_ids=random_ids(2, 40), decoder_input_ids=random_ids(2, 5), output_attentions=True, output_routing=True
    )
    for weights, (tokens,) in zip(output.cross_attentions, output.cross_routing, strict=True):
        assert weights.shape == (2, 4, 5, 7) and tokens.valid.all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5))


def test_it_is_saved_and_a_checkpoint_without_it_has_all_it_needs(tmp_path: Any) -> None:
    model = asking_model()
    model.save_pretrained(tmp_path / "asking")
    again = CoLT5ForConditionalGeneration.from_pretrained(tmp_path / "asking").eval()
    inputs = {"input_ids": random_ids(1, 30), "decoder_input_ids": random_ids(1, 4)}
    expected = model(**inputs).logits
    assert_same_but_for_rounding(again(**inputs).logits, expected)
    plain = asking_model(routed_cross_key_values=None, asking_cross_routing=False)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(tmp_path / "plain")
    found, info = CoLT5ForConditionalGeneration.from_pretrained(tmp_path / "plain", **ASKING, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_but_for_rounding(found.eval()(**inputs).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_are_never_of_half_precision(dtype: torch.dtype) -> None:
    """Two keys whose scores differ by less than bfloat16 could tell: the larger one is chosen under autocast too."""
    attention = module(1).to(dtype).layer.EncDecAttention
    keys = torch.ones(1, 3, 8, dtype=dtype)
    keys[0, 1] += 2**-12
    query, plan = torch.ones(1, 2, 4, 8, dtype=dtype), DecoderPlan(module(1).implementation, asking=module(1).settings)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = attention.choose(query, keys, plan)
    assert tokens.indices.tolist() == [[1], [1]] and tokens.weights.dtype == dtype
