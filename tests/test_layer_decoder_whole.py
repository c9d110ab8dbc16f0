"""T5 decoder layers with their attentions as one straight line: they give what PyTorch and the modules give."""

from functools import partial
from typing import Any

import pytest
import torch
from decoder_layers import as_modules, batch_of, gradients_of, in_pytorch, model_of, repeats
from launch_lists import interpreting_launcher, noted_launches
from models import checkpoint_activations, pad, random_ids
from rounding import assert_same_but_for_rounding, assert_same_gradients
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from modeling_colt5 import (  # noqa: E402
    CoLT5ForCausalLM,
    layer_decoder_parts,
    model_decoder,
    op_attention,
    run_launch_list_triton,
    run_plan,
)
from modeling_colt5.kernel_backend import Mode  # noqa: E402
from modeling_colt5.layer_decoder_parts import StraightParts  # noqa: E402
from modeling_colt5.layer_decoder_whole import LayerProgram, StraightDecoderLayer  # noqa: E402
from modeling_colt5.run_launch_graphs import LaunchGraphs  # noqa: E402
from modeling_colt5.run_plan import Implementation, kernels_attend  # noqa: E402


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[LayerProgram]:
    """Of each layer that ran as one straight line its program, which holds none of its tensors: the next call may then
    have their addresses."""
    ran = []
    of = StraightDecoderLayer.of.__func__

    def counted(cls: type[StraightDecoderLayer], *arguments: Any) -> StraightDecoderLayer | None:
        line = of(cls, *arguments)
        ran.extend([] if line is None else [line.program])
        return line

    monkeypatch.setattr(StraightDecoderLayer, "of", classmethod(counted))
    return ran


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layers that were asked to run in parts."""
    asked = []
    of = StraightParts.of.__func__
    counted = classmethod(lambda cls, *arguments: asked.append(arguments) or of(cls, *arguments))
    monkeypatch.setattr(StraightParts, "of", counted)
    return asked


@pytest.fixture
def one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers' keys and values of the memory are parts of one product, which is otherwise so where it pays."""
    monkeypatch.setattr(model_decoder, "is_one_product", lambda *sizes: True)


def padded_batch(
    device: torch.device, lengths: tuple[int, ...], targets: tuple[int, ...], side: str = "right"
) -> dict[str, torch.Tensor]:
    """Inputs and labels of such lengths, with masks of both."""
    inputs, labels = (pad([random_ids(length) for length in each], side) for each in (lengths, targets))
    own = pad([random_ids(length) for length in targets], side)
    batch = inputs | {f"decoder_{name}": tensor for name, tensor in own.items()}
    batch["labels"] = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def at_real_tokens(found: dict[str, Any], batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The same with the scores of the decoder's real tokens alone."""
    mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
    return found | {"scores": found["scores"][mask.bool()]}


CASES = {
    "padded on the right": (torch.float32, (11, 6), (9, 4), "right", {}),
    "padded on the left": (torch.float32, (11, 6), (9, 4), "left", {}),
    "more queries than keys": (torch.float32, (3, 5), (14, 11), "right", {}),
    "bf16": (torch.bfloat16, (9,), (6,), "right", {"num_decoder_layers": 1}),
    "one token": (torch.float32, (1,), (1,), "right", {"num_decoder_layers": 1}),
    "key/value heads": (torch.float32, (7,), (5,), "right", {"num_cross_key_value_heads": 2}),
    "routed memory": (torch.float32, (12, 7), (5, 3), "left", {"routing": "learned", "routed_cross_key_values": 4}),
    "other sizes": (torch.float32, (7,), (5,), "right", {"num_heads": 3, "d_kv": 4, "d_ff": 20}),
    "a short reach": (
        torch.float32,
        (5,),
        (12,),
        "right",
        {"relative_attention_max_distance": 4, "relative_attention_num_buckets": 6},
    ),
    "several tiles": (torch.float32, (75, 40), (70, 35), "left", {"num_decoder_layers": 1}),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case == "several tiles" else ()) for case in CASES]
)
def test_gradients_are_those_of_pytorch(case: str, device: torch.device, layers: list, parts: list) -> None:
    dtype, lengths, targets, side, fields = CASES[case]
    model = model_of(device, dtype, **fields).train()
    batch = padded_batch(device, lengths, targets, side)
    expected = at_real_tokens(in_pytorch(lambda: gradients_of(model, batch)), batch)
    assert not layers
    for _ in repeats(device):
        assert_same_gradients(at_real_tokens(gradients_of(model, batch), batch), expected)
    assert len(layers) == len(model.decoder.block) * len(repeats(device)) and not parts


def test_without_masks(device: torch.device, layers: list, one_product: None) -> None:
    model = model_of(device).train()
    batch = batch_of(device, 8, 8, masked=False)
    expected = in_pytorch(lambda: gradients_of(model, batch))
    for _ in repeats(device):
        assert_same_gradients(gradients_of(model, batch), expected)
    assert layers


def test_a_memory_without_a_real_token_gives_nothing(device: torch.device, layers: list) -> None:
    model = model_of(device, num_decoder_layers=1).train()
    batch = padded_batch(device, (7, 5), (5, 4))
    batch["attention_mask"][1] = 0
    expected = at_real_tokens(in_pytorch(lambda: gradients_of(model, batch)), batch)
    for _ in repeats(device):
        assert_same_gradients(at_real_tokens(gradients_of(model, batch), batch), expected)
    # nor does a row of the decoder without any
    batch["decoder_attention_mask"][1] = 0
    batch["labels"][1] = -100
    actual = gradients_of(model, batch)
    assert all(part.isfinite().all() for part in actual.values() if part is not None)
    expected = at_real_tokens(in_pytorch(lambda: gradients_of(model, batch)), batch)
    assert_same_gradients(at_real_tokens(actual, batch), expected)
    assert layers


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_stack_without_an_encoder(side: str, device: torch.device, layers: list) -> None:
    model = model_of(
        device, model_class=CoLT5ForCausalLM, causal_attention="full", causal_feed_forward="dense"
    ).train()
    rows = pad([random_ids(9), random_ids(5)], side)
    batch = {name: tensor.to(device) for name, tensor in rows.items()}
    # what padding predicts, as that on the left does of the first token, is any number
    mask = batch["attention_mask"]
    batch["labels"] = batch["input_ids"].masked_fill((mask == 0) | (mask.roll(1, 1) == 0), -100)
    expected = at_real_tokens(in_pytorch(lambda: gradients_of(model, batch)), batch)
    for _ in repeats(device):
        assert_same_gradients(at_real_tokens(gradients_of(model, batch), batch), expected)
    assert layers


def test_a_forward_pass_without_gradients(device: torch.device, layers: list, monkeypatch: Any) -> None:
    model = model_of(device).eval()
    batch = padded_batch(device, (11, 6), (7, 4))

    def call() -> torch.Tensor:
        with torch.no_grad():
            return model(**batch).logits[batch["decoder_attention_mask"].bool()]

    expected = in_pytorch(call)
    # no bias of all pairs is made
    monkeypatch.setattr(model_decoder, "masked_bias", None)
    monkeypatch.setattr(model_decoder, "bias_of_sequence", None)
    for _ in repeats(device):
        assert_same_but_for_rounding(call(), expected)
    assert layers


@pytest.mark.parametrize("fields", [{}, {"num_decoder_layers": 1, "num_cross_key_value_heads": 2}], ids=str)
def test_modules_drop_what_straight_lines_drop(fields: dict[str, Any], device: torch.device, layers: list) -> None:
    model = model_of(device, dropout_rate=0.3, **fields).train()
    batch = padded_batch(device, (9, 5), (7, 4), "left")
    expected = at_real_tokens(as_modules(lambda: gradients_of(model, batch)), batch)
    assert not layers
    for _ in repeats(device):
        assert_same_gradients(at_real_tokens(gradients_of(model, batch), batch), expected)
    assert layers
    # hooks on all modules, as profilers have them, change nothing either
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *others: seen.append(module))
    assert_same_gradients(at_real_tokens(gradients_of(model, batch), batch), expected)
    handle.remove()
    assert seen and len(layers) == len(model.decoder.block) * len(repeats(device))


@pytest.mark.parametrize("place", ["self", "cross"])
def test_attention_alone_may_drop(place: str, device: torch.device, layers: list) -> None:
    model = model_of(device, num_decoder_layers=1).train()
    batch = batch_of(device, 9)
    whole = gradients_of(model, batch)
    block = model.decoder.block[0]
    attention = block.layer[0].SelfAttention if place == "self" else block.layer[1].EncDecAttention
    attention.dropout = 0.4
    expected = as_modules(lambda: gradients_of(model, batch))
    assert not torch.allclose(expected["scores"], whole["scores"])
    for _ in repeats(device):
        assert_same_gradients(gradients_of(model, batch), expected)
    assert len(layers) == 1 + len(repeats(device))


def test_hooks_come_and_go_and_change_nothing_that_is_dropped(device: torch.device, layers: list) -> None:
    model = model_of(device, dropout_rate=0.3).train()
    batch = batch_of(device, 5)
    expected = gradients_of(model, batch)
    count = len(model.decoder.block)
    assert len(layers) == count
    for name in ("layer.0.SelfAttention", "layer.1.EncDecAttention.o"):
        seen: list[Any] = []
        module = model.decoder.block[0].get_submodule(name)
        handle = module.register_forward_hook(lambda module, inputs, output, at=seen: at.append(output))
        layers.clear()
        assert_same_gradients(gradients_of(model, batch), expected)
        assert len(seen) == 1 and len(layers) == count - 1
        handle.remove()
    layers.clear()
    assert_same_gradients(gradients_of(model, batch), expected)
    assert len(layers) == count


def test_projections_of_the_memory_that_are_more_than_products_are_called(
    device: torch.device, layers: list, one_product: None
) -> None:
    model = model_of(device).train()
    batch = batch_of(device, 9)
    attention = model.decoder.block[1].layer[1].EncDecAttention
    attention.k = nn.Linear(model.config.d_model, attention.k.out_features, device=device)
    nn.init.normal_(attention.k.bias)
    expected = in_pytorch(lambda: gradients_of(model, batch))
    assert_same_gradients(gradients_of(model, batch), expected)
    assert len(layers) == len(model.decoder.block)


def test_projections_may_differ_in_dtype(device: torch.device, layers: list) -> None:
    model = model_of(device, torch.bfloat16, num_decoder_layers=1).eval()
    batch = batch_of(device, 6)
    layer = model.decoder.block[0].layer

    def call() -> torch.Tensor:
        with torch.no_grad():
            return model(**batch).logits

    for attention in (layer[0].SelfAttention, layer[1].EncDecAttention):
        for projection in (attention.k, attention.v):
            projection.register_forward_hook(lambda module, inputs, output: output.float())
        assert_same_but_for_rounding(call(), in_pytorch(call))
    # hooks on the projections of the memory leave a block plain
    layer[0].SelfAttention.k._forward_hooks.clear()
    layer[0].SelfAttention.v._forward_hooks.clear()
    assert_same_but_for_rounding(call(), in_pytorch(call))
    assert len(layers) == 1


def test_adapters_of_the_memory_drop_after_the_seeds_are_drawn(device: torch.device, layers: list) -> None:
    """As in modules, so that a hook changes nothing that is dropped."""
    model = model_of(device, num_decoder_layers=1, dropout_rate=0.3).train()
    batch = batch_of(device, 6)
    projection = model.decoder.block[0].layer[1].EncDecAttention.k
    # as an adapter's dropout
    projection.register_forward_hook(lambda module, inputs, output: nn.functional.dropout(output, 0.4))
    expected = as_modules(lambda: gradients_of(model, batch))
    assert_same_gradients(gradients_of(model, batch), expected)
    assert len(layers) == 1


def test_a_memory_is_projected_once_where_a_layer_runs_as_modules(device: torch.device, layers: list) -> None:
    model = model_of(device, num_decoder_layers=1).eval()
    layer = model.decoder.block[0].layer
    # no straight line takes such a weight
    weight = layer[2].DenseReluDense.wo.weight
    weight.data = weight.data.t().contiguous().t()
    seen: list[torch.Tensor] = []
    layer[1].EncDecAttention.k.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(**batch_of(device, 6))
    assert len(seen) == 1 and not layers


FROZEN = {
    "weights": ("decoder.block.0", ".q.", "wo", "EncDecAttention.o", "layer.1.layer_norm", "shared"),
    "biases": ("relative_attention_bias",),
    "the memory": ("encoder.", "EncDecAttention.k", "EncDecAttention.v"),
    "a projection of the memory": ("block.0.layer.1.EncDecAttention.k",),
}


@pytest.mark.parametrize("what", FROZEN)
@pytest.mark.parametrize("is_one", [False, True])
def test_what_is_frozen_gets_no_gradient(
    what: str, is_one: bool, device: torch.device, layers: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_decoder, "is_one_product", lambda *sizes: is_one)
    model = model_of(device).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in FROZEN[what]))
    batch = batch_of(device, 7)
    expected = in_pytorch(lambda: gradients_of(model, batch))
    assert any(gradient is None for gradient in expected.values())
    for _ in repeats(device):
        assert_same_gradients(gradients_of(model, batch), expected)
    assert layers


def test_the_bias_alone_may_be_trained(device: torch.device, layers: list) -> None:
    model = model_of(device).train().requires_grad_(False)
    model.decoder.relative_attention_bias.requires_grad_(True)
    batch = batch_of(device, 7, 5)
    expected = in_pytorch(lambda: gradients_of(model, batch))
    assert_same_gradients(gradients_of(model, batch), expected)
    assert layers


@pytest.mark.parametrize("rate", [0.0, pytest.param(0.3, marks=pytest.mark.slow)])
def test_autocast_is_that_of_the_modules(rate: float, device: torch.device, layers: list, one_product: None) -> None:
    model = model_of(device, num_decoder_layers=1, dropout_rate=rate).train()
    batch = batch_of(device, 9)

    def call() -> dict[str, Any]:
        with torch.autocast(device.type, torch.bfloat16):
            return gradients_of(model, batch)

    expected = as_modules(call) if rate else in_pytorch(call)
    for _ in repeats(device):
        actual = call()
        # products are rounded to bf16
        assert_same_gradients(actual, expected, torch.bfloat16)
        assert {part.grad.dtype for part in model.parameters()} == {torch.float32}
    assert layers


@pytest.mark.parametrize("use_reentrant", [pytest.param(True, marks=pytest.mark.slow), False])
def test_checkpointed_layers_drop_the_same_again(use_reentrant: bool, device: torch.device, layers: list) -> None:
    model = model_of(device, dropout_rate=0.3).train()
    batch = batch_of(device, 7, 5)
    expected = as_modules(lambda: gradients_of(model, batch))
    checkpoint_activations(model, use_reentrant)
    assert_same_gradients(gradients_of(model, batch), expected)
    assert len(layers) == 2 * len(model.decoder.block)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_single_layer_may_be_checkpointed(
    use_reentrant: bool, device: torch.device, layers: list, one_product: None
) -> None:
    model = model_of(device).train()
    batch = batch_of(device, 7, 5)
    expected = in_pytorch(lambda: gradients_of(model, batch))
    block = model.decoder.block[1]
    block.gradient_checkpointing = True
    block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=use_reentrant)
    assert_same_gradients(gradients_of(model, batch), expected)
    assert len(layers) == 3


def test_saved_tensors_may_lie_elsewhere(device: torch.device, layers: list, one_product: None) -> None:
    model = model_of(device, num_cross_key_value_heads=2).train()
    batch = batch_of(device, 7, 5)
    expected = in_pytorch(lambda: gradients_of(model, batch))
    with torch.autograd.graph.save_on_cpu():
        assert_same_gradients(gradients_of(model, batch), expected)
    assert layers


def test_a_block_may_be_compiled_alone(device: torch.device, layers: list) -> None:
    model = model_of(device).train()
    batch = batch_of(device, 6)
    expected = in_pytorch(lambda: gradients_of(model, batch))
    model.decoder.block[1].compile(backend="eager", fullgraph=True)
    assert_same_gradients(gradients_of(model, batch), expected)
    assert len(layers) == 1


@pytest.mark.parametrize("is_one", [False, True])
def test_an_unused_result_has_no_part_in_the_gradient(
    is_one: bool, device: torch.device, layers: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_decoder, "is_one_product", lambda *sizes: is_one)
    model = model_of(device).train()
    batch = batch_of(device, 7)

    def call() -> dict[int, torch.Tensor | None]:
        # the states between the layers alone: nobody asks the last layer for a gradient
        states = model(**batch, output_hidden_states=True).decoder_hidden_states[1]
        found = torch.autograd.grad(states.square().sum(), list(model.parameters()), allow_unused=True)
        return dict(enumerate(found))

    expected = in_pytorch(call)
    for _ in repeats(device):
        assert_same_gradients(call(), expected)
    assert layers


def test_second_derivatives_and_batches_of_gradients_are_refused(device: torch.device, layers: list) -> None:
    model = model_of(device).train()
    batch = batch_of(device, 5)
    weights = list(model.decoder.block.parameters())
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(model(**batch).loss, weights, create_graph=True)
    states = model(**batch, output_hidden_states=True).decoder_hidden_states[1]
    with pytest.raises(RuntimeError, match="takes no batch of gradients"):
        grads = torch.ones(2, *states.shape, device=device)
        torch.autograd.grad(states, weights, grads, is_grads_batched=True, allow_unused=True)
    assert layers


def test_what_changed_before_the_backward_pass_is_noticed(device: torch.device, layers: list) -> None:
    model = model_of(device).train()
    batch = padded_batch(device, (6,), (5,))
    batch["decoder_attention_mask"] = batch["decoder_attention_mask"].bool()
    weight = model.decoder.block[0].layer[0].SelfAttention.q.weight
    for changed in (weight, batch["decoder_attention_mask"]):
        loss = model(**batch).loss
        with torch.no_grad():
            changed.copy_(changed.clone())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    assert layers


# which passes kernels attend in


def test_longer_inputs_and_other_passes_run_in_parts(
    device: torch.device, layers: list, parts: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(device, num_decoder_layers=1).eval()
    batch = padded_batch(device, (8, 6), (6, 4))
    causal = torch.ones(6, 6, dtype=torch.bool, device=device).tril() & batch["decoder_attention_mask"].bool()[:, None]
    real = batch["decoder_attention_mask"].bool()

    def call(**changed: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(**batch | changed).logits[real]

    expected = in_pytorch(call)
    # two rows of six tokens on eight
    monkeypatch.setattr(run_plan, "MOST_PAIRS_IN_FLOAT32", 96)
    assert_same_but_for_rounding(call(), expected)
    assert (len(layers), len(parts)) == (1, 0)
    for changed in ({"use_cache": True}, {"decoder_attention_mask": causal[:, None]}):
        assert_same_but_for_rounding(call(**changed), expected)
    monkeypatch.setattr(run_plan, "MOST_PAIRS_IN_FLOAT32", 95)
    assert_same_but_for_rounding(call(), expected)
    assert (len(layers), len(parts)) == (1, 3)


@pytest.mark.parametrize(
    ("dtype", "shape", "memory", "attends"),
    [
        (torch.bfloat16, (1, 512), 131_072, True),
        (torch.bfloat16, (2, 512), 131_072, False),
        (torch.bfloat16, (1, 4096), 131_072, True),
        (torch.float16, (1, 65_536), 0, True),
        (torch.float32, (1, 256), 256, True),
        (torch.float32, (1, 256), 257, False),
        (torch.float32, (1, 257), 0, False),
        (torch.float32, (2, 256), 256, False),
    ],
)
def test_who_attends(dtype: torch.dtype, shape: tuple[int, int], memory: int, attends: bool) -> None:
    states = torch.empty(*shape, 1, dtype=dtype)
    who, mode = Implementation("triton", "sdpa"), Mode.of_now(states)
    assert kernels_attend(who, mode, states, memory, 128) == attends
    assert not kernels_attend(Implementation("torch", "sdpa"), mode, states, memory, 128)
    assert not kernels_attend(who, mode, states, memory, 129)
    if dtype == torch.float32:
        with torch.autocast("cpu", torch.bfloat16):
            assert kernels_attend(who, Mode.of_now(states), states, memory, 128)


OTHERS = {
    "large heads": {"d_kv": 136},
    "eager": {"attn_implementation": "eager"},
    "torch": {"kernel_backend": "torch"},
    "asking": {"routed_cross_key_values": 2, "asking_cross_routing": True, "routing": "learned"},
    "two routers": {"routed_cross_key_values": 2, "num_cross_routers": 2, "routing": "learned"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_attentions_are_not_kernels(name: str, device: torch.device, layers: list, monkeypatch: Any) -> None:
    fields = dict(OTHERS[name])
    implementation, backend = fields.pop("attn_implementation", None), fields.pop("kernel_backend", None)
    model = model_of(device, num_decoder_layers=1, **fields).eval()
    if implementation is not None:
        model.set_attn_implementation(implementation)
    if backend is not None:
        model.config.kernel_backend = backend
    monkeypatch.setattr("modeling_colt5.model_decoder_layer.full_attention", None)
    with torch.no_grad():
        assert model(**batch_of(device, 12)).logits.isfinite().all()
    assert not layers


def test_modules_in_fp16_attend_by_kernels(device: torch.device, layers: list, monkeypatch: Any) -> None:
    model = model_of(device, torch.float16, num_decoder_layers=1).eval()
    batch = batch_of(device, 9, masked=False)
    called: list[torch.dtype] = []
    attend = op_attention.full_attention
    monkeypatch.setattr(
        "modeling_colt5.model_decoder_layer.full_attention",
        lambda query, *others: called.append(query.dtype) or attend(query, *others),
    )
    with torch.no_grad():
        actual = model(**batch).logits
        expected = in_pytorch(lambda: model(**batch).logits)
    assert_same_but_for_rounding(actual, expected)
    assert called == [torch.float16] * 2 and not layers


def test_traced_passes_leave_attention_to_pytorch(device: torch.device, monkeypatch: Any) -> None:
    model = model_of(device, num_decoder_layers=1).eval()
    batch = {**batch_of(device, 9, masked=False), "use_cache": False}
    expected = model(**batch).logits
    monkeypatch.setattr("modeling_colt5.model_decoder_layer.full_attention", None)
    # a dispatch mode, as tracers have it
    with FlopCounterMode(display=False):
        assert_same_but_for_rounding(model(**batch).logits, expected)


# lists of launches


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As on a GPU the first call of a kind notes its launches, and the next ones repeat them; what was repeated."""
    repeated: list[str] = []
    monkeypatch.setattr(run_launch_list_triton, "launcher", interpreting_launcher(monkeypatch, repeated))
    monkeypatch.setattr(layer_decoder_parts, "programs", {})
    monkeypatch.setattr(layer_decoder_parts, "may_repeat", lambda states: True)
    return repeated


on_cpus = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there the calls above are repeated from lists themselves"
)
# launches and products of a layer, forward and backward, in fp32 without dropout
FORWARD, BACKWARD = 16, 31


@on_cpus
@pytest.mark.parametrize("is_one", [False, True])
def test_a_layer_is_one_list_each_way(is_one: bool, lists: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_decoder, "is_one_product", lambda *sizes: is_one)
    device = torch.device("cpu")
    model = model_of(device).train()
    first, second = (padded_batch(device, (9, 5), (7, 4)) for _ in range(2))
    run, calls = run_launch_list_triton.LaunchList.__call__, []

    def counted(launches: Any, *others: Any) -> bool:
        calls.append(launches.count)
        return run(launches, *others)

    monkeypatch.setattr(run_launch_list_triton.LaunchList, "__call__", counted)
    # both layers are of one kind, so that the second repeats the first
    gradients_of(model, first)
    assert calls == [FORWARD, BACKWARD]
    expected = at_real_tokens(in_pytorch(lambda: gradients_of(model, second)), second)
    calls.clear()
    lists.clear()
    assert_same_gradients(at_real_tokens(gradients_of(model, second), second), expected)
    assert calls == [FORWARD, FORWARD, BACKWARD, BACKWARD]
    assert lists.count("attention_forward_kernel") == 2 * 2
    real = second["decoder_attention_mask"].bool()
    with torch.no_grad():
        model(**first)
        calls.clear()
        assert_same_but_for_rounding(model(**second).logits[real], expected["scores"])
    assert calls == [FORWARD, FORWARD]


@on_cpus
@pytest.mark.parametrize("rate", [0.3, 0.0])
def test_the_gradient_of_a_layer_that_drops_is_rehearsed_with_it(
    rate: float, lists: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that its kernels are compiled with the others. Who trains has dropout; who has none may want no gradient."""
    device = torch.device("cpu")
    model, batch = model_of(device, dropout_rate=rate).train(), batch_of(device, 9, 5)
    rehearsed, launched = noted_launches(monkeypatch)
    loss = model(**batch).loss
    early = [*rehearsed]
    launched.clear()
    loss.backward()
    # without what modules launch beside the layers
    of_layers = [launch for launch in launched if launch in rehearsed]
    assert {name for name, *_ in of_layers} >= {
        "attention_backward_query_kernel",
        "attention_backward_key_kernel",
        "norm_backward_kernel",
    }
    assert all(launch in early for launch in of_layers) == (rate > 0)


@on_cpus
@pytest.mark.parametrize(
    ("rate", "is_cast"),
    [(0.3, True), pytest.param(0.3, False, marks=pytest.mark.slow), pytest.param(0.0, True, marks=pytest.mark.slow)],
)
def test_lists_read_and_write_what_they_should(
    rate: float, is_cast: bool, lists: list[str], one_product: None
) -> None:
    device = torch.device("cpu")
    model = model_of(device, dropout_rate=rate).train()
    first, second = batch_of(device, 9, 5), batch_of(device, 9, 5)

    def call(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        # the interpreting launcher has no products in bf16
        with torch.autocast("cpu", torch.float16, enabled=is_cast):
            return gradients_of(model, batch)

    call(first)
    assert lists
    expected = as_modules(lambda: call(second))
    lists.clear()
    assert_same_gradients(call(second), expected, torch.bfloat16 if is_cast else None)
    assert len(lists) >= 2 * (FORWARD + BACKWARD)


@on_cpus
def test_masks_may_lie_anywhere_in_memory(lists: list[str]) -> None:
    """A list has of each memory the beginning alone, and would read what stands behind a row of a wider mask."""
    device = torch.device("cpu")
    model = model_of(device, num_decoder_layers=1).train()
    first, second = (padded_batch(device, (9, 5), (7, 4), side) for side in ("left", "right"))
    for batch in (first, second):
        for name in ("attention_mask", "decoder_attention_mask"):
            batch[name] = batch[name].bool()
    gradients_of(model, first)
    expected = at_real_tokens(in_pytorch(lambda: gradients_of(model, second)), second)
    lists.clear()
    for name in ("attention_mask", "decoder_attention_mask"):
        wide = torch.cat([second[name], ~second[name]], 1)
        second[name] = wide[:, : second[name].shape[1]]
    assert_same_gradients(at_real_tokens(gradients_of(model, second), second), expected)

    def elsewhere(saved: torch.Tensor) -> torch.Tensor:
        return saved.t().contiguous().t() if saved.dtype == torch.bool and saved.dim() == 2 else saved

    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, elsewhere):
        assert_same_gradients(at_real_tokens(gradients_of(model, second), second), expected)
    assert lists.count("attention_forward_kernel") == lists.count("attention_backward_query_kernel") == 2 * 2


@on_cpus
def test_lists_of_a_stack_without_an_encoder_and_of_frozen_weights(lists: list[str]) -> None:
    device = torch.device("cpu")
    model = model_of(
        device, model_class=CoLT5ForCausalLM, causal_attention="full", causal_feed_forward="dense"
    ).train()
    model.decoder.block[1].layer[0].SelfAttention.k.weight.requires_grad_(False)
    model.decoder.relative_attention_bias.requires_grad_(False)
    first, second = (pad([random_ids(9), random_ids(5)]) for _ in range(2))
    for batch in (first, second):
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    gradients_of(model, first)
    expected = at_real_tokens(in_pytorch(lambda: gradients_of(model, second)), second)
    lists.clear()
    assert_same_gradients(at_real_tokens(gradients_of(model, second), second), expected)
    assert lists.count("attention_backward_query_kernel") == lists.count("attention_forward_kernel") == 2
    assert "table_sums_kernel" not in lists


@on_cpus
@pytest.mark.parametrize("rate", [0.0, pytest.param(0.3, marks=pytest.mark.slow)])
def test_each_call_may_be_a_graph(
    rate: float, lists: list[str], one_product: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LaunchGraphs, "_is_due", lambda *call: True)
    device = torch.device("cpu")
    model = model_of(device, dropout_rate=rate).train()
    first, second = batch_of(device, 9, 5), batch_of(device, 9, 5)
    gradients_of(model, first)
    expected = as_modules(lambda: gradients_of(model, second))
    lists.clear()
    assert_same_gradients(gradients_of(model, second), expected)
    assert lists.count("graph") == 2 * 2


# on a card


@pytest.fixture
def long_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long texts in fp32 too, whose kernels are right but slow."""
    monkeypatch.setattr(run_plan, "MOST_PAIRS_IN_FLOAT32", 2**40)


@pytest.mark.gpu
@pytest.mark.usefixtures("long_in_float32")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("targets", [(200, 130), (900, 1100)])
def test_calls_that_come_again_on_a_card_are_graphs(
    dtype: torch.dtype, rate: float, targets: tuple[int, int], layers: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = LaunchGraphs()
    monkeypatch.setattr(run_launch_list_triton, "launch_graphs", graphs)
    device = torch.device("cuda")
    model = model_of(device, dtype, dropout_rate=rate).train()
    batch = padded_batch(device, (700, 300), targets, "left")
    call = partial(gradients_of, model, batch)
    expected = at_real_tokens(as_modules(call) if rate else in_pytorch(call), batch)
    for _ in range(10):
        assert_same_gradients(at_real_tokens(call(), batch), expected, dtype)
    # each of two layers, forward and backward, in the last calls at least
    assert graphs.replays >= 2 * 2 * 2
    assert layers


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [{}, {"d_kv": 64, "num_heads": 12, "d_model": 768}, {"d_kv": 128}], ids=str)
@pytest.mark.parametrize("is_cast", [False, True])
@pytest.mark.usefixtures("long_in_float32")
def test_larger_heads_and_memories_on_a_card(fields: dict[str, Any], is_cast: bool, layers: list) -> None:
    device = torch.device("cuda")
    model = model_of(device, **fields).train()
    batch = padded_batch(device, (5000, 3000), (300, 512))

    def call() -> dict[str, Any]:
        with torch.autocast("cuda", torch.bfloat16, enabled=is_cast):
            return at_real_tokens(gradients_of(model, batch), batch)

    expected = in_pytorch(call)
    for _ in range(3):
        assert_same_gradients(call(), expected, torch.bfloat16 if is_cast else None)
    assert layers


@pytest.mark.gpu
def test_gradients_have_the_same_bits_again_on_a_card(layers: list) -> None:
    device = torch.device("cuda")
    model = model_of(device, torch.bfloat16, dropout_rate=0.1).train()
    batch = padded_batch(device, (2000, 1500), (300, 512))
    first, second = ({name: part.clone() for name, part in gradients_of(model, batch).items()} for _ in range(2))
    # those of the embeddings add up in any order
    of_layers = [name for name in first if "block" in name and "decoder" in name]
    assert all(torch.equal(first[name], second[name]) for name in of_layers)
    assert layers


@pytest.mark.gpu
def test_a_pass_may_be_captured(layers: list) -> None:
    device = torch.device("cuda")
    model = model_of(device, torch.bfloat16).eval()
    batch = {**padded_batch(device, (700, 300), (90, 60)), "use_cache": False}
    del batch["labels"]
    with torch.no_grad():
        expected = model(**batch).logits
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model(**batch)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(**batch).logits
        graph.replay()
    assert_same_but_for_rounding(captured, expected)
    assert layers
