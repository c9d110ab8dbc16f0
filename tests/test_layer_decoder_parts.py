"""T5 decoder layers whose attentions stand between straight lines: they give what the modules give."""

from functools import partial
from typing import Any

import pytest
import torch
from decoder_layers import as_modules, batch_of, gradients_of, model_of, repeats
from launch_lists import interpreting_launcher
from models import checkpoint_activations, random_ids
from rounding import assert_same_but_for_rounding, assert_same_gradients
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from modeling_colt5 import (  # noqa: E402
    CoLT5ForCausalLM,
    layer_decoder_parts,
    layer_program,
    model_decoder,
    run_launch_list_triton,
    run_plan,
)
from modeling_colt5.kernel_backend import Mode  # noqa: E402
from modeling_colt5.layer_decoder_parts import DecoderPass, StraightParts  # noqa: E402
from modeling_colt5.run_release import CACHE  # noqa: E402


@pytest.fixture(autouse=True)
def attended_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all texts were too long for attention by kernels, with which layers are whole."""
    for limit in ("MOST_PAIRS_OF_KERNELS", "MOST_PAIRS_IN_FLOAT32", "LONGEST_MEMORY_OF_KERNELS"):
        monkeypatch.setattr(run_plan, limit, -1)


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[StraightParts]:
    """The layers that ran as straight lines."""
    ran = []
    of = StraightParts.of.__func__

    def counted(cls: type[StraightParts], *arguments: Any) -> StraightParts | None:
        parts = of(cls, *arguments)
        ran.extend([] if parts is None else [parts])
        return parts

    monkeypatch.setattr(StraightParts, "of", classmethod(counted))
    return ran


CASES = {
    "padded": (torch.float32, (11, 6), True, {}),
    "no mask": (torch.float32, (8, 8), False, {}),
    "bf16": (torch.bfloat16, (9,), True, {"num_decoder_layers": 1}),
    "one token": (torch.float32, (1,), False, {"num_decoder_layers": 1}),
    "dropout": (torch.float32, (9, 5), True, {"dropout_rate": 0.3}),
    "key/value heads": (torch.float32, (7,), True, {"num_cross_key_value_heads": 2}),
    "routed memory": (torch.float32, (12,), True, {"routing": "learned", "routed_cross_key_values": 4}),
    "other sizes": (torch.float32, (7,), True, {"num_heads": 3, "d_kv": 4, "d_ff": 20}),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_modules(case: str, device: torch.device, layers: list) -> None:
    dtype, lengths, masked, fields = CASES[case]
    model = model_of(device, dtype, **fields).train()
    batch = batch_of(device, *lengths, masked=masked)
    expected = as_modules(lambda: gradients_of(model, batch))
    assert not layers
    for _ in repeats(device):
        assert_same_gradients(gradients_of(model, batch), expected)
    assert len(layers) == len(model.decoder.block) * len(repeats(device))


@pytest.fixture
def one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers' keys and values of the memory are one product, which is otherwise so where it pays."""
    monkeypatch.setattr(model_decoder, "is_one_product", lambda *sizes: True)


def test_all_layers_keys_and_values_of_the_memory_are_one_product(
    device: torch.device, layers: list, one_product: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(device, num_cross_key_value_heads=2).train()
    batch = batch_of(device, 11, 6)
    expected = as_modules(lambda: gradients_of(model, batch))
    seen: list[tuple[torch.Tensor, ...] | None] = []
    project = type(model.decoder).projected_memory
    monkeypatch.setattr(
        type(model.decoder), "projected_memory", lambda *inputs: seen.append(project(*inputs)) or seen[-1]
    )
    assert_same_gradients(gradients_of(model, batch), expected)
    (made,) = seen
    assert made is not None and len(made) == 2 * len(model.decoder.block)
    # where a projection is more than its product, or a block is not plain, each layer makes its own
    called: list[int] = []
    first, second = model.decoder.block
    for module in (second.layer[1].EncDecAttention.k, first.layer[-1].DenseReluDense.wo):
        handle = module.register_forward_hook(lambda *inputs: called.append(1))
        assert_same_gradients(gradients_of(model, batch), expected)
        handle.remove()
        assert seen[-1] is None
    assert called == [1, 1]
    # and where no gradient is wanted, nothing is kept for one
    model.requires_grad_(False)
    assert_same_but_for_rounding(model(**batch).logits, expected["scores"])
    assert seen[-1] is None
    assert len(layers) == 4 * len(model.decoder.block) - 1


def test_projections_of_the_memory_that_are_more_than_products_are_called(
    device: torch.device, layers: list, one_product: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(device).train()
    batch = batch_of(device, 9)
    attention = model.decoder.block[1].layer[1].EncDecAttention
    # a user's own projection, with a bias
    attention.k = nn.Linear(model.config.d_model, attention.k.out_features, device=device)
    nn.init.normal_(attention.k.bias)
    assert_same_gradients(gradients_of(model, batch), as_modules(lambda: gradients_of(model, batch)))
    with torch.no_grad():
        attention.k.bias.zero_()
    # hooks on all modules of the process, and a class that somebody has patched
    expected = gradients_of(model, batch)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *others: seen.append(module))
    assert_same_gradients(gradients_of(model, batch), expected)
    handle.remove()
    assert {attention.k, attention.v} <= set(seen)
    patched: list[nn.Module] = []
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, *inputs: patched.append(self) or forward(self, *inputs))
    assert_same_gradients(gradients_of(model, batch), expected)
    assert {attention.k, attention.v} <= set(patched)


def test_products_of_the_memory_that_are_not_one_stay_in_their_layers(device: torch.device, layers: list) -> None:
    model = model_of(device).train()
    # more results than PyTorch copies weights together for
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_decoder, "is_one_product", lambda *sizes: False)
        memory = torch.randn(1, 5, model.config.d_model, device=device, requires_grad=True)
        common = DecoderPass.of(memory, Mode.of_now(memory))
        assert common is not None and model.decoder.projected_memory(common, memory) is None


def test_gradients_of_the_one_product_go_where_they_are_wanted(
    device: torch.device, layers: list, one_product: None
) -> None:
    model = model_of(device).train()
    batch = batch_of(device, 9)
    first, second = (block.layer[1].EncDecAttention for block in model.decoder.block)
    for frozen in (
        [first.k.weight],
        [second.v.weight],
        [*model.encoder.parameters()],
        [first.k.weight, first.v.weight],
    ):
        for weight in frozen:
            weight.requires_grad_(False)
        expected = as_modules(lambda: gradients_of(model, batch))
        assert_same_gradients(gradients_of(model, batch), expected)
        model.requires_grad_(True)
    assert len(layers) == 4 * len(model.decoder.block)


def test_a_stack_without_an_encoder(device: torch.device, layers: list) -> None:
    model = model_of(
        device, model_class=CoLT5ForCausalLM, causal_attention="full", causal_feed_forward="dense"
    ).train()
    batch = batch_of(device, 9, 5)
    batch["labels"] = batch["input_ids"]
    expected = as_modules(lambda: gradients_of(model, batch))
    for _ in repeats(device):
        assert_same_gradients(gradients_of(model, batch), expected)
    assert layers


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_autocast_is_that_of_the_modules(rate: float, device: torch.device, layers: list, one_product: None) -> None:
    model = model_of(device, num_decoder_layers=1, dropout_rate=rate).train()
    batch = batch_of(device, 9)

    def call() -> dict[str, Any]:
        with torch.autocast(device.type, torch.bfloat16):
            return gradients_of(model, batch)

    expected = as_modules(call)
    for _ in repeats(device):
        actual = call()
        # products are rounded to bf16
        assert_same_gradients(actual, expected, torch.bfloat16)
        assert {part.grad.dtype for part in model.parameters()} == {torch.float32}
    assert layers


def test_a_forward_pass_with_a_cache_goes_on_as_the_modules(device: torch.device, layers: list) -> None:
    model = model_of(device).eval()
    batch = batch_of(device, 9, 6)
    ids = random_ids(5).to(device)[None].expand(2, -1)
    memory = model.encoder(batch["input_ids"], attention_mask=batch["attention_mask"])

    def call() -> list[torch.Tensor]:
        common = {"encoder_outputs": memory, "attention_mask": batch["attention_mask"], "use_cache": True}
        with torch.no_grad():
            first = model(decoder_input_ids=ids[:, :3], **common)
            second = model(decoder_input_ids=ids[:, 3:], **{CACHE: first[CACHE]}, **common)
        return [first.logits, second.logits]

    expected = as_modules(call)
    for _ in repeats(device):
        for actual, wanted in zip(call(), expected, strict=True):
            assert_same_but_for_rounding(actual, wanted)
    assert len(layers) == 4 * len(repeats(device))


def test_frozen_weights_get_no_gradients(device: torch.device, layers: list) -> None:
    model = model_of(device).train()
    frozen = ("decoder.block.0", ".q.", "wo", "EncDecAttention.o", "layer.1.layer_norm", "shared")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    batch = batch_of(device, 7)
    expected = as_modules(lambda: gradients_of(model, batch))
    assert any(gradient is not None for gradient in expected.values())
    for _ in repeats(device):
        assert_same_gradients(gradients_of(model, batch), expected)
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
    model = model_of(device, dropout_rate=0.3).train()
    batch = batch_of(device, 7, 5)
    expected = as_modules(lambda: gradients_of(model, batch))
    block = model.decoder.block[1]
    block.gradient_checkpointing = True
    block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=use_reentrant)
    assert_same_gradients(gradients_of(model, batch), expected)
    assert len(layers) == 3


def test_a_hook_inside_changes_nothing_that_is_dropped(device: torch.device, layers: list) -> None:
    model = model_of(device, dropout_rate=0.3).train()
    batch = batch_of(device, 7, 5)
    expected = gradients_of(model, batch)
    assert len(layers) == len(model.decoder.block)
    seen: list[torch.Tensor] = []
    feed_forward = model.decoder.block[0].layer[-1].DenseReluDense.wo
    handle = feed_forward.register_forward_hook(lambda module, args, output: seen.append(output))
    assert_same_gradients(gradients_of(model, batch), expected)
    assert len(seen) == 1 and len(layers) == 2 * len(model.decoder.block) - 1
    handle.remove()
    assert_same_gradients(gradients_of(model, batch), expected)
    assert len(layers) == 3 * len(model.decoder.block) - 1


def test_states_that_a_hook_has_changed_go_through_modules(device: torch.device, layers: list) -> None:
    model = model_of(device, torch.bfloat16).eval()
    batch = batch_of(device, 6)

    def steered(module: nn.Module, inputs: Any, output: Any) -> Any:
        states, *others = output
        return states.float() + 1, *others

    def call() -> torch.Tensor:
        with torch.no_grad():
            return model(**batch).logits

    call()
    model.decoder.block[0].register_forward_hook(steered)
    expected = as_modules(call)
    layers.clear()
    assert_same_but_for_rounding(call(), expected)
    # the second block got states of another dtype
    assert len(layers) == 1


def test_a_block_may_be_compiled_alone(device: torch.device, layers: list) -> None:
    model = model_of(device).train()
    batch = batch_of(device, 6)
    expected = as_modules(lambda: gradients_of(model, batch))
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

    def call() -> list[torch.Tensor | None]:
        # the states between the layers alone: nobody asks the last layer for a gradient
        states = model(**batch, output_hidden_states=True).decoder_hidden_states[1]
        return list(torch.autograd.grad(states.square().sum(), list(model.parameters()), allow_unused=True))

    expected = as_modules(call)
    for _ in repeats(device):
        named = (dict(enumerate(gradients)) for gradients in (call(), expected))
        assert_same_gradients(*named)
    assert layers


def test_second_derivatives_are_refused(device: torch.device, layers: list) -> None:
    model = model_of(device).train()
    loss = model(**batch_of(device, 5)).loss
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, list(model.decoder.block.parameters()), create_graph=True)
    assert layers


def test_batches_of_gradients_are_refused(device: torch.device, layers: list, one_product: None) -> None:
    model = model_of(device).train()
    batch = batch_of(device, 5)
    # between a layer's parts, at their end, and at what they read of the memory
    attention = model.decoder.block[1].layer[0].SelfAttention
    seen: list[torch.Tensor] = []
    attend = attention.attend_projected
    attention.attend_projected = lambda query, *others: seen.append(query) or attend(query, *others)
    states = model(**batch, output_hidden_states=True).decoder_hidden_states[1]
    memory = torch.randn(1, 5, model.config.d_model, device=device, requires_grad=True)
    common = DecoderPass.of(memory, Mode.of_now(memory))
    assert common is not None
    projected = model.decoder.projected_memory(common, memory)
    assert len(layers) == 2 and len(seen) == 1 and projected is not None
    weights = list(model.parameters())
    for result in (*seen, states, projected[0]):
        with pytest.raises(RuntimeError, match="takes no batch of gradients"):
            grads = torch.ones(2, *result.shape, device=device)
            torch.autograd.grad(result, weights, grads, is_grads_batched=True, allow_unused=True)


def test_weights_that_changed_before_the_backward_pass_are_noticed(device: torch.device, layers: list) -> None:
    model = model_of(device).train()
    loss = model(**batch_of(device, 5)).loss
    with torch.no_grad():
        model.decoder.block[0].layer[0].SelfAttention.q.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert layers


def test_weights_are_those_of_now(device: torch.device, layers: list) -> None:
    model = model_of(device).eval()
    batch = batch_of(device, 6)
    with torch.no_grad():
        before = model(**batch).logits
        model.decoder.block[1].layer[-1].DenseReluDense.wo.weight.mul_(-2)
        expected = as_modules(lambda: model(**batch).logits)
        assert not torch.allclose(before, expected)
        assert_same_but_for_rounding(model(**batch).logits, expected)
    assert len(layers) == 2 * len(model.decoder.block)


class ClearedAfterEachLook(dict):
    """As if another thread, for which there are too many programs, cleared them after each look."""

    def __contains__(self, key: object) -> bool:
        found = super().__contains__(key)
        self.clear()
        return found


def test_another_thread_may_clear_the_programs(
    device: torch.device, layers: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (layer_decoder_parts, layer_program):
        monkeypatch.setattr(module, "programs", ClearedAfterEachLook())
    model = model_of(device, routing="learned").eval()
    with torch.no_grad():
        first, second = (model(**batch_of(device, 12, masked=False)).loss for _ in range(2))
    assert first.isfinite() and second.isfinite()
    assert len(layers) == 2 * len(model.decoder.block)
    assert layer_decoder_parts.programs and layer_program.programs


@pytest.mark.parametrize("fields", [{"attn_implementation": "eager"}, {"kernel_backend": "torch"}], ids=str)
def test_other_ways_to_compute_run_modules(fields: dict[str, Any], device: torch.device, layers: list) -> None:
    model = model_of(device).eval()
    if "attn_implementation" in fields:
        model.set_attn_implementation(fields["attn_implementation"])
    else:
        model.config.kernel_backend = fields["kernel_backend"]
    with torch.no_grad():
        model(**batch_of(device, 5))
    assert not layers


# lists of launches


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As on a GPU the first call of a kind notes its launches, and the next ones repeat them; what was repeated."""
    repeated: list[str] = []
    monkeypatch.setattr(run_launch_list_triton, "launcher", interpreting_launcher(monkeypatch, repeated))
    monkeypatch.setattr(layer_decoder_parts, "programs", {})
    monkeypatch.setattr(layer_decoder_parts, "may_repeat", lambda states: True)
    return repeated


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the calls above are repeated from lists themselves")
@pytest.mark.parametrize(
    ("rate", "is_cast"), [(0.0, True), (0.3, False), pytest.param(0.3, True, marks=pytest.mark.slow)]
)
def test_lists_read_and_write_what_they_should(rate: float, is_cast: bool, lists: list[str]) -> None:
    device = torch.device("cpu")
    model = model_of(device, dropout_rate=rate).train()
    first, second = batch_of(device, 9, 5), batch_of(device, 9, 5)

    def call(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        # the interpreting launcher has no products in bf16
        with torch.autocast("cpu", torch.float16, enabled=is_cast):
            return gradients_of(model, batch)

    # the first calls of each kind; both layers are of one kind, so that the second repeats the first
    call(first)
    assert lists
    expected = as_modules(lambda: call(second))
    lists.clear()
    assert_same_gradients(call(second), expected, torch.bfloat16 if is_cast else None)
    # of each layer 14 launches and products forward, and 25 backward, at least
    assert len(lists) >= 2 * 39
