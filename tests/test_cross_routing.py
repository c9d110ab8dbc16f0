"""Routed cross-attention: against dense attention, full cross-attention, finite differences; caches, beams, memory."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from models import checkpoint_activations, pad, random_ids, tiny_config, tiny_model
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from rounding import assert_same_but_for_rounding
from test_generation import LENGTHS, NEW_TOKENS, assert_close, check_beams, generate, padded_batch, recomputed_logits
from test_generation import make_model as make_generator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

from modeling_colt5 import CoLT5ForConditionalGeneration, soft_topk
from modeling_colt5.model_decoder_layer import CoLT5CrossAttention
from modeling_colt5.run_release import CACHE

# fp32 sums taken in another order over logits of size 1
TOLERANCE = 1e-5
# routers and key/value heads of the four heads: one of either, more of one, more of the other, as many
GROUPS = [(1, 1), (2, 1), (4, 1), (1, 4), (2, 4), (4, 2), (2, 2)]


def routed_model(budget: int = 8, **fields: Any) -> CoLT5ForConditionalGeneration:
    """A tiny model whose cross-attention is far from uniform, so that what it reads matters."""
    model = tiny_model(routed_cross_key_values=budget, **fields)
    with torch.no_grad():
        for block in model.decoder.block:
            block.layer[1].EncDecAttention.q.weight.mul_(4)
    return model


def inputs_of(*lengths: int, side: str = "left", target: int = 7) -> dict[str, torch.Tensor]:
    return {**pad([random_ids(n) for n in lengths], side), "decoder_input_ids": random_ids(len(lengths), target)}


def cross_routers(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if "cross_routing" in name}


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("num_routers", "num_heads"), GROUPS)
@torch.no_grad()
def test_a_budget_that_covers_the_input_is_full_cross_attention(num_routers, num_heads, attn_implementation):
    fields = {"num_cross_key_value_heads": num_heads, "attn_implementation": attn_implementation}
    model = routed_model(40, num_cross_routers=num_routers, **fields)
    full = tiny_model(**fields)
    missing, unexpected = full.load_state_dict(model.state_dict(), strict=False)
    assert missing == [] and set(unexpected) == set(cross_routers(model))
    # the longest row uses its budget to the last token, the others have room
    inputs = inputs_of(40, 23, 1)
    output = model(**inputs, output_routing=True)
    torch.testing.assert_close(output.logits, full(**inputs).logits, atol=TOLERANCE, rtol=0)
    for tokens in [tokens for layer in output.cross_routing for tokens in layer]:
        assert torch.equal(tokens.weights, tokens.valid.float())
        assert tokens.valid.sum(1).tolist() == [40, 23, 1]
    # otherwise the budget never bound, and the comparison above said nothing
    model.set_routing_budget(cross_key_values=8)
    assert (model(**inputs).logits[0] - output.logits[0]).abs().max() > 0.1


@torch.no_grad()
def dense_cross_attention(model, layer: int, states: torch.Tensor, memory: torch.Tensor, budget: int) -> torch.Tensor:
    """One layer's cross-attention of queries [m, d_model] to a memory [n, d_model], head by head over all of it."""
    attention = model.decoder.block[layer].layer[1].EncDecAttention
    routers, heads = attention.num_routers, attention.num_heads
    shared = heads // attention.num_key_value_heads
    part = [slice(8 * head, 8 * (head + 1)) for head in range(heads)]
    outputs = []
    for head in range(heads):
        router = model.decoder.cross_routing.routers[layer * routers + head // (heads // routers)].weight
        scores = memory @ router
        chosen = scores.argsort(descending=True, stable=True)[:budget]
        rows = soft_topk(scores, budget * 9 / 8)[:, None] * memory
        key, value = (rows @ linear.weight[part[head // shared]].T for linear in (attention.k, attention.v))
        logits = (states @ attention.q.weight[part[head]].T) @ key.T
        hidden = torch.full_like(logits, -math.inf)
        hidden[:, chosen] = logits[:, chosen]
        outputs.append(hidden.softmax(-1) @ value)
    return torch.cat(outputs, -1) @ attention.o.weight.T


@pytest.mark.parametrize(("num_routers", "num_heads"), GROUPS)
@torch.no_grad()
def test_each_group_of_heads_reads_its_routers_tokens(num_routers, num_heads):
    model = routed_model(9, dtype=torch.float64, num_cross_routers=num_routers, num_cross_key_value_heads=num_heads)
    memory, mask = torch.randn(2, 50, 32, dtype=torch.float64), torch.ones(2, 50, dtype=torch.bool)
    mask[0, :17] = False
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer, block in enumerate(model.decoder.block):
        block.layer[1].EncDecAttention.register_forward_hook(
            lambda _, args, output, layer=layer: seen.update({layer: (args[0], output[0])})
        )
    model.decoder(random_ids(2, 6), encoder_hidden_states=memory, encoder_attention_mask=mask)
    assert len(seen) == 3
    for layer, (states, output) in seen.items():
        for row in range(2):
            expected = dense_cross_attention(model, layer, states[row], memory[row, mask[row]], 9)
            # float64 throughout
            torch.testing.assert_close(output[row], expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("budget", [6, 30])
@torch.no_grad()
def test_padding_of_the_memory_changes_nothing(budget):
    """Not where it stands, not how much there is, not what it holds; as fits the budget and as exceeds it."""
    model = routed_model(budget, num_cross_routers=2)
    rows, targets = [torch.randn(n, 32) for n in (45, 17, 5)], random_ids(3, 6)
    expected = torch.cat(
        [model.decoder(ids[None], encoder_hidden_states=row[None])[0] for ids, row in zip(targets, rows, strict=True)]
    )
    for side, length in (("left", 45), ("right", 45), ("left", 70), ("right", 70)):
        memory, mask = torch.full((3, length, 32), math.nan), torch.zeros(3, length)
        for i, row in enumerate(rows):
            part = slice(length - len(row), None) if side == "left" else slice(0, len(row))
            memory[i, part], mask[i, part] = row, 1
        output = model.decoder(targets, encoder_hidden_states=memory, encoder_attention_mask=mask)[0]
        torch.testing.assert_close(output, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("num_routers", [1, 2])
@pytest.mark.usefixtures("float64_statistics")
def test_every_cross_router_gets_the_gradient_of_finite_differences(num_routers):
    model = routed_model(8, dtype=torch.float64, num_cross_routers=num_routers)
    inputs = {**pad([random_ids(50), random_ids(23)]), "labels": random_ids(2, 6)}

    def loss_and_routing():
        output = model(**inputs, output_routing=True)
        return output.loss, torch.cat([tokens.indices for layer in output.cross_routing for tokens in layer])

    loss, chosen = loss_and_routing()
    loss.backward()
    assert len(cross_routers(model)) == 3 * num_routers
    step = 1e-6
    for name, router in cross_routers(model).items():
        direction, losses = torch.randn_like(router), []
        with torch.no_grad():
            for sign in (1, -1):
                router += sign * step * direction
                loss, again = loss_and_routing()
                losses.append(loss.item())
                # a step over a change of the selection would not be a derivative
                assert torch.equal(chosen, again)
                router -= sign * step * direction
        difference = (losses[0] - losses[1]) / (2 * step)
        gradient = (router.grad * direction).sum().item()
        assert abs(gradient) > 1e-6, name
        # the loss is about 5, so that float64 leaves 5 * 2e-16 / 1e-6; truncation is of order 1e-12
        assert abs(gradient - difference) < 2e-9 + 1e-6 * abs(gradient), name


def gradients(model, inputs, **flags) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    model(**inputs, **flags).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_every_parameter_gets_a_gradient():
    model = routed_model(8, num_cross_routers=2)
    found = gradients(model, {**pad([random_ids(50), random_ids(23)]), "labels": random_ids(2, 6)})
    for name, gradient in found.items():
        assert gradient.abs().max() > 0, name


def test_triton_kernels_give_the_references_values_and_gradients(device: torch.device) -> None:
    # small: the interpreter takes seconds a layer
    model = routed_model(8, num_layers=1, num_decoder_layers=1, num_cross_routers=2, kernel_backend="torch").to(device)
    inputs = {**pad([random_ids(24), random_ids(5)]), "labels": random_ids(2, 6)}
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    logits: list[torch.Tensor] = []
    model.register_forward_hook(lambda module, args, output: logits.append(output.logits.detach()))
    expected = gradients(model, inputs)
    model.config.kernel_backend = "triton"
    found = gradients(model, inputs)
    torch.testing.assert_close(logits[1], logits[0], atol=TOLERANCE, rtol=0)
    for name, gradient in found.items():
        # fp32 sums in another order
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


# what is returned, and what can be set


@torch.no_grad()
def test_routing_is_returned_on_request():
    model = routed_model(8, num_cross_routers=2, attn_implementation="eager")
    inputs = inputs_of(40, 5)
    assert model(**inputs).cross_routing is None
    output = model(**inputs, output_routing=True, output_attentions=True, use_cache=True)
    memory = output.encoder_last_hidden_state
    assert len(output.cross_routing) == 3
    for i, (layer, weights) in enumerate(zip(output.cross_routing, output.cross_attentions, strict=True)):
        assert len(layer) == 2 and weights.shape == (2, 4, 7, 8)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7))
        for j, tokens in enumerate(layer):
            assert tokens.valid.sum(1).tolist() == [8, 5]
            assert (weights[1, :, :, 5:] == 0).all()
            scores = memory[0].double() @ model.decoder.cross_routing.routers[2 * i + j].weight.double()
            largest = scores.argsort(descending=True, stable=True)[:8].sort().values
            assert torch.equal(tokens.indices[0], largest)
    # keys and values of the cache were routed earlier
    inputs |= {"decoder_input_ids": random_ids(2, 1), "cache": output.cache}
    assert model(**inputs, output_routing=True).cross_routing is None
    assert tiny_model()(**inputs_of(9), output_routing=True).cross_routing is None


@torch.no_grad()
def test_budget_can_be_set_on_a_loaded_model(tmp_path):
    routed_model(8).save_pretrained(tmp_path)
    model = CoLT5ForConditionalGeneration.from_pretrained(tmp_path)
    inputs = inputs_of(40)
    model.set_routing_budget(cross_key_values=13, query=1 / 2)
    output = model(**inputs, output_routing=True)
    assert output.cross_routing[0][0].indices.shape == (1, 13)
    assert output.encoder_routing[0].query.indices.shape == (1, 20)
    with pytest.raises(ValueError, match="cross_key_values is 13"):
        tiny_model().set_routing_budget(cross_key_values=13)
    with pytest.raises(StrictDataclassError, match="routed_cross_key_values"):
        model.set_routing_budget(cross_key_values=0)
    assert model.config.routed_cross_key_values == 13


@torch.no_grad()
def test_checkpoint_without_routers_gets_new_ones_and_keeps_its_function(tmp_path):
    full = tiny_model(d_model=64)
    full.save_pretrained(tmp_path)
    model = CoLT5ForConditionalGeneration.from_pretrained(tmp_path, routed_cross_key_values=30, num_cross_routers=4)
    inputs = inputs_of(30, 12)
    torch.testing.assert_close(model(**inputs).logits, full(**inputs).logits, atol=TOLERANCE, rtol=0)
    drawn = torch.stack(list(cross_routers(model).values()))
    assert drawn.shape == (3 * 4, 64)
    # d_model^-½, as every router's; 768 draws have a standard deviation within 1 / sqrt(2 * 768) = 2.6 %, four times
    assert abs(drawn.std() * 8 - 1) < 0.11


@pytest.mark.parametrize("routing", ["random", "even"])
@torch.no_grad()
def test_controls_route_as_many_tokens_with_weights_of_one(routing):
    model = routed_model(8, routing=routing, num_cross_routers=2)
    assert cross_routers(model) == {}
    layers = model(**inputs_of(40, 5), output_routing=True).cross_routing
    for tokens in [tokens for layer in layers for tokens in layer]:
        assert tokens.valid.sum(1).tolist() == [8, 5]
        assert torch.equal(tokens.weights, tokens.valid.float())
    first, second = (layer[0].indices[0] for layer in layers[:2])
    assert torch.equal(first, second) == (routing == "even")


@torch.no_grad()
def test_routing_is_the_same_under_autocast():
    model = routed_model(8)
    ids, memory = random_ids(2, 6), torch.randn(2, 60, 32)
    expected = model.decoder(ids, encoder_hidden_states=memory, output_routing=True).cross_routing
    with torch.autocast("cpu", torch.bfloat16):
        layers = model.decoder(ids, encoder_hidden_states=memory, output_routing=True).cross_routing
    for (tokens,), (other,) in zip(layers, expected, strict=True):
        assert torch.equal(tokens.indices, other.indices)
        assert_same_but_for_rounding(tokens.weights, other.weights)


# caches and searches


def routed_generator(**fields: Any) -> CoLT5ForConditionalGeneration:
    """Budgets that the longest row exceeds and the shortest does not."""
    return make_generator(routed_cross_key_values=12, num_cross_routers=2, **fields)


def assert_cache_is_short(cache: EncoderDecoderCache, rows: int) -> None:
    """Two routers' keys and values, of 12 tokens each, not of the input's 40."""
    for layer in cache.cross_attention_cache.layers:
        assert layer.keys.shape == layer.values.shape == (rows, 2, 12, 8)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_greedy(cache: str, side: str) -> None:
    model = routed_generator()
    ids, mask = padded_batch(side)
    output = generate(model, input_ids=ids, attention_mask=mask, cache_implementation=cache)
    expected = recomputed_logits(model, ids, mask, output.sequences)
    assert_close(torch.stack(output.logits, dim=1), expected)
    assert_cache_is_short(output[CACHE], len(LENGTHS))
    assert len({tuple(row.tolist()) for row in output.sequences}) == len(LENGTHS)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beam_search(cache: str) -> None:
    model = routed_generator()
    ids, mask = padded_batch("left")
    options = {"num_beams": 4, "num_return_sequences": 2}
    output = generate(model, input_ids=ids, attention_mask=mask, cache_implementation=cache, **options)
    check_beams(model, ids, mask, output, per_row=2)
    assert_cache_is_short(output[CACHE], 4 * len(LENGTHS))
    assert (output.beam_indices[:, 1:NEW_TOKENS] != output.beam_indices[:, : NEW_TOKENS - 1]).any()


def test_routes_once_for_a_generated_text() -> None:
    model = routed_generator()
    calls = []
    model.decoder.cross_routing.register_forward_hook(lambda *_: calls.append(1))
    ids, mask = padded_batch("left")
    generate(model, input_ids=ids, attention_mask=mask, num_beams=3)
    assert len(calls) == 1


@torch.no_grad()
def test_reordered_rows_of_a_cache() -> None:
    """Across rows of different lengths, whose used slots differ: the mask goes with the rows."""
    model = routed_model(12)
    inputs = inputs_of(40, 23, 4)
    output = model(**inputs, use_cache=True)
    order = torch.tensor([2, 2, 0, 1])
    output.cache.reorder_cache(order)
    prefix, last, mask = inputs["decoder_input_ids"][order], random_ids(4, 1), inputs["attention_mask"][order]
    memory = (output.encoder_last_hidden_state[order],)
    actual = model(attention_mask=mask, encoder_outputs=memory, decoder_input_ids=last, cache=output.cache).logits
    expected = model(
        attention_mask=mask, encoder_outputs=memory, decoder_input_ids=torch.cat([prefix, last], 1), use_cache=False
    ).logits[:, -1:]
    assert_close(actual, expected)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("initialised", [True, False])
@torch.no_grad()
def test_static_cache_longer_than_the_memory(initialised: bool, masked: bool) -> None:
    """Used for a second memory too, longer than the first and than the budget."""
    model = routed_model(30)
    self_cache, cross_cache = (StaticCache(config=model.config, max_cache_len=length) for length in (20, 64))
    if initialised:
        cross_cache.early_initialization(2, 1, 8, torch.float32, torch.device("cpu"))
    cache = EncoderDecoderCache(self_cache, cross_cache)
    for length in (17, 50):
        cache.reset()
        ids = random_ids(2, 6)
        memory = {"encoder_hidden_states": torch.randn(2, length, 32)}
        if masked:
            memory["encoder_attention_mask"] = torch.arange(length) < torch.tensor([[length], [9]])
        expected = model.decoder(ids, **memory, use_cache=False)[0]
        first = model.decoder(ids[:, :4], **memory, cache=cache)[0]
        rest = [model.decoder(ids[:, i : i + 1], **memory, cache=cache)[0] for i in (4, 5)]
        assert_close(torch.cat([first, *rest], 1), expected)
        assert cross_cache.layers[0].keys.shape[2] == (64 if initialised else 30)


@pytest.mark.slow
@torch.no_grad()
def test_step_with_static_caches_compiles_without_a_break() -> None:
    model = routed_model(12, num_decoder_layers=2, num_cross_routers=2)
    memory = {"encoder_hidden_states": torch.randn(2, 40, 32), "encoder_attention_mask": torch.ones(2, 40)}
    memory["encoder_attention_mask"][1, 7:] = 0
    ids = random_ids(2, 7)
    cache = EncoderDecoderCache(*(StaticCache(config=model.config, max_cache_len=length) for length in (10, 40)))
    expected = model.decoder(ids, **memory, use_cache=False)[0]
    model.decoder(ids[:, :4], **memory, cache=cache)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    step = torch.compile(model.decoder, fullgraph=True, dynamic=False, backend=backend)
    for i in (4, 5, 6):
        assert_close(step(ids[:, i : i + 1], **memory, cache=cache)[0], expected[:, i : i + 1])
    # one program for all steps, and it does not route
    assert len(graphs) == 1
    assert "route" not in graphs[0].code


# memory


class NewTensors(TorchDispatchMode):
    """Records the most elements of a tensor that an operation makes: views of what was there are none."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, leaf.numel())
        return result


def test_only_routed_tokens_are_projected() -> None:
    """The largest thing of the memory's length that the forward makes are the layers' scores, one number a token; the
    backward makes the memory's gradient besides. Full cross-attention makes keys and values of each token."""
    n, target = 3000, 5
    memory, ids = torch.randn(1, n, 32), random_ids(1, target)
    options = {"encoder_hidden_states": memory, "use_cache": False}
    for model, tokens, numbers in ((routed_model(16), n, 3), (tiny_model(), n, 8)):
        with torch.no_grad(), NewTensors() as new:
            model.decoder(ids, **options)
        assert new.largest == tokens * numbers
    model = routed_model(16)
    with NewTensors() as new:
        model.decoder(ids, encoder_hidden_states=memory.requires_grad_())[0].sum().backward()
    assert new.largest == memory.numel() == memory.grad.numel()


@torch.no_grad()
def test_a_million_tokens_of_memory() -> None:
    """Through one layer, with what is to be found near the end."""
    n, budget = 2**20, 64
    model = routed_model(budget, d_model=16, num_decoder_layers=1)
    memory = 0.1 * torch.randn(1, n, 16)
    wanted = torch.randperm(n)[:budget].sort().values
    memory[0, wanted] += 3 * torch.nn.functional.normalize(model.decoder.cross_routing.routers[0].weight, dim=0)
    with NewTensors() as new:
        output = model.decoder(random_ids(1, 3), encoder_hidden_states=memory, use_cache=True, output_routing=True)
    assert torch.equal(output.cross_routing[0][0].indices[0], wanted)
    assert output.cache.cross_attention_cache.layers[0].keys.shape[2] == budget
    assert new.largest == n


# what training and tracing bring


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = routed_model(8, num_cross_routers=2, dropout_rate=0.1).train()
    inputs = {**pad([random_ids(50), random_ids(23)]), "labels": random_ids(2, 6)}
    expected = gradients(model, inputs)
    checkpoint_activations(model, use_reentrant)
    calls = []
    model.decoder.block[0].layer[1].EncDecAttention.register_forward_hook(lambda *_: calls.append(1))
    found = gradients(model, inputs)
    assert len(calls) == 2
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=TOLERANCE, msg=name)


def test_lora_with_trained_routers(tmp_path: Path) -> None:
    """Adapters on the projections of routed tokens, and the routers themselves saved with them."""
    routed_model(8, num_cross_routers=2).save_pretrained(tmp_path / "base")
    base = CoLT5ForConditionalGeneration.from_pretrained(tmp_path / "base")
    lora = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM,
        r=2,
        target_modules=r".*EncDecAttention\.(k|v)",
        modules_to_save=["cross_routing"],
    )
    model = get_peft_model(base, lora).train()
    inputs = {**pad([random_ids(50), random_ids(23)]), "labels": random_ids(2, 6)}
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    moved = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert all(any(part in name for name in moved) for part in ("k.lora_A", "v.lora_B", "cross_routing"))
    model.save_pretrained(tmp_path / "adapter")
    base = CoLT5ForConditionalGeneration.from_pretrained(tmp_path / "base")
    # PEFT puts what it loads on a GPU where there is one
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", torch_device="cpu").eval()
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=TOLERANCE)


# each of these traces a model in some ten seconds; test_compile_export.py has the model without routed cross-attention
@pytest.mark.slow
def test_training_step_compiles_without_a_break() -> None:
    model = routed_model(8, num_layers=1, num_decoder_layers=1, num_cross_routers=2).train()
    inputs = {**pad([random_ids(60), random_ids(35)]), "labels": random_ids(2, 7)}
    expected = gradients(model, inputs)
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="eager")(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        # fp32 sums in another order
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kernel_backend", ["torch", "triton"])
@torch.no_grad()
def test_decoder_compiles_without_a_break(kernel_backend: str, device: torch.device) -> None:
    model = routed_model(8, num_decoder_layers=1, num_cross_routers=2, kernel_backend=kernel_backend).to(device)
    compiled = torch.compile(model.decoder, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (50, 71):
        states, mask = torch.randn(2, length, 32, device=device), torch.ones(2, length, device=device)
        memory = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        ids = random_ids(2, 5).to(device)
        expected = model.decoder(ids, **memory, use_cache=False)[0]
        torch.testing.assert_close(compiled(ids, **memory, use_cache=False)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_one_exported_model_serves_memories_below_and_above_the_budget() -> None:
    class States(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = routed_model(100, num_decoder_layers=1, num_cross_routers=2).decoder

        def forward(self, ids, memory, mask):
            return self.decoder(
                ids, encoder_hidden_states=memory, encoder_attention_mask=mask, use_cache=False
            ).last_hidden_state

    def inputs(rows: int, length: int, target: int) -> tuple[torch.Tensor, ...]:
        mask = torch.arange(length) < torch.randint(1, length, (rows, 1))
        return random_ids(rows, target), torch.randn(rows, length, 32), mask.long()

    model = States()
    auto = torch.export.Dim.AUTO
    shapes = {"ids": {0: auto, 1: auto}, "memory": {0: auto, 1: auto}, "mask": {0: auto, 1: auto}}
    program = torch.export.export(model, inputs(2, 130, 12), dynamic_shapes=shapes).module()
    for sizes in ((1, 60, 5), (3, 100, 9), (2, 300, 20)):
        arguments = inputs(*sizes)
        torch.testing.assert_close(program(*arguments), model(*arguments), rtol=1e-5, atol=1e-5)


def test_default_is_the_papers_decoder() -> None:
    model = tiny_model(num_cross_routers=2)
    assert not hasattr(model.decoder, "cross_routing")
    attention = model.decoder.block[0].layer[1].EncDecAttention
    assert isinstance(attention, CoLT5CrossAttention) and attention.num_routers == 1
    assert tiny_config().routed_cross_key_values is None
    assert isinstance(model(**inputs_of(9), use_cache=True).cache.cross_attention_cache, DynamicCache)
