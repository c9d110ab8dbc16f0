"""Encoder layers as straight lines of launches: they give what the modules give, where nobody looks inside."""

import copy
import io
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from launch_lists import interpreting_launcher, noted_launches
from models import checkpoint_activations, pad, random_ids, tiny_config, tiny_model
from rounding import assert_same_but_for_rounding, assert_same_gradients
from torch import nn
from vision import pad_pictures, tiny_vision_model

pytest.importorskip("triton")

from modeling_colt5 import (  # noqa: E402
    CoLT5EncoderModel,
    CoLT5VisionModel,
    kernel_backend,
    layer_encoder,
    layer_program,
    run_launch_list_triton,
)
from modeling_colt5.layer_encoder import StraightLayer  # noqa: E402
from modeling_colt5.model_encoder_layer import PLAIN, CoLT5EncoderBlock  # noqa: E402
from modeling_colt5.model_from_config import encoder_settings  # noqa: E402
from modeling_colt5.run_launch_graphs import LaunchGraphs  # noqa: E402
from modeling_colt5.run_plan import EncoderPlan  # noqa: E402


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[StraightLayer]:
    """The layers that ran as straight lines."""
    ran = []
    of = StraightLayer.of.__func__

    def counted(cls: type[StraightLayer], *arguments: Any) -> StraightLayer | None:
        line = of(cls, *arguments)
        ran.extend([] if line is None else [line])
        return line

    monkeypatch.setattr(StraightLayer, "of", classmethod(counted))
    return ran


def encoder(device: torch.device, dtype: torch.dtype = torch.float32, **fields: Any) -> CoLT5EncoderModel:
    return tiny_model(CoLT5EncoderModel, dtype, kernel_backend="triton", **fields).to(device)


def batch_of(device: torch.device, *lengths: int, masked: bool = True) -> dict[str, torch.Tensor]:
    batch = pad([random_ids(length) for length in lengths])
    return {name: tensor.to(device) for name, tensor in batch.items() if masked or name == "input_ids"}


def as_modules(call: Callable[[], Any], by_kernels: bool = False) -> Any:
    """What a call gives where all blocks run as modules: with kernels on a GPU; where those are interpreted in plain
    PyTorch, which is independent of them and takes a tenth of the time.

    Args:
        call: the call.
        by_kernels: with kernels there too: they have random numbers of their own for dropout, and other numbers in a
            row of padding alone.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_encoder, "enabled", False)
        if not (by_kernels or torch.cuda.is_available()):
            patch.setattr(kernel_backend, "FORCED_BACKEND", "torch")
        return call()


# one layer where nothing is left to the next one's first norm that another case has not
CASES = {
    "padded": (torch.float32, (11, 6), True, {"num_layers": 2}),
    "one row": (torch.float32, (13,), True, {}),
    "no mask": (torch.float32, (7, 7), False, {}),
    "bf16": (torch.bfloat16, (9, 4), True, {}),
    "fp16": (torch.float16, (9,), False, {"num_layers": 2}),
    "one token": (torch.float32, (1,), False, {}),
    "coordinate descent": (torch.float32, (8,), True, {"soft_topk_solver": "coordinate_descent"}),
}


# a training pass compares its output too
@pytest.mark.parametrize("case", ["padded", "no mask", "fp16", "one token"])
def test_a_forward_pass_is_that_of_the_modules(case: str, device: torch.device, layers: list) -> None:
    dtype, lengths, masked, fields = CASES[case]
    model = encoder(device, dtype, **{"num_layers": 1} | fields)
    batch = batch_of(device, *lengths, masked=masked)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return model(**batch).last_hidden_state

    expected = as_modules(call)
    assert not layers
    # on a GPU the first call binds the launches that the second repeats
    for _ in range(1 if device.type == "cpu" else 3):
        assert_same_but_for_rounding(call(), expected)
    assert len(layers) >= model.config.num_layers


def test_rows_of_padding_alone(device: torch.device, layers: list) -> None:
    model = encoder(device, num_layers=1)
    batch = batch_of(device, 9, 5)
    batch["attention_mask"][1] = 0

    def call() -> torch.Tensor:
        with torch.no_grad():
            return model(**batch).last_hidden_state

    assert_same_but_for_rounding(call(), as_modules(call, by_kernels=True))
    assert len(layers) == 1


def test_a_hook_on_a_block_sees_what_the_modules_give(device: torch.device, layers: list) -> None:
    model = encoder(device)
    batch = batch_of(device, 8)
    seen, given = [], []
    blocks = model.encoder.block
    handles = [
        blocks[0].register_forward_hook(lambda module, args, output: seen.append(output)),
        # those that see no result leave a straight line as it is
        blocks[1].register_forward_pre_hook(lambda module, args: given.append(args[0])),
    ]
    with torch.no_grad():
        model(**batch)
        for handle in handles:
            handle.remove()
        assert len(layers) == len(blocks) - 1
        expected = as_modules(lambda: model(**batch, output_hidden_states=True, output_routing=True))
        model(**batch)
    assert len(layers) == 2 * len(blocks) - 1
    ((states, _, _, routing),) = seen
    assert_same_but_for_rounding(states, expected.hidden_states[1])
    assert_same_but_for_rounding(given[0], expected.hidden_states[1])
    assert torch.equal(routing.query.indices, expected.routing[0].query.indices)


def test_states_that_a_hook_has_changed_go_through_modules(device: torch.device, layers: list) -> None:
    model = encoder(device, torch.bfloat16)
    batch = batch_of(device, 8)

    def call() -> torch.Tensor:
        return model(**batch).last_hidden_state

    _, second = model.encoder.block
    second.register_forward_pre_hook(lambda module, inputs: (inputs[0].float() + 1, *inputs[1:]))
    expected = as_modules(call, by_kernels=True)
    assert_same_but_for_rounding(call(), expected)
    assert len(layers) == 1


def test_a_block_may_be_compiled_alone(device: torch.device, layers: list) -> None:
    model = encoder(device)
    batch = batch_of(device, 8)
    expected = as_modules(lambda: gradients_of(model, batch))
    model.encoder.block[1].compile(backend="eager", fullgraph=True)
    assert_same_gradients(gradients_of(model, batch), expected)
    assert len(layers) == 1


def test_who_asks_for_what_was_routed_gets_the_modules(device: torch.device, layers: list) -> None:
    model = encoder(device, num_layers=1)
    with torch.no_grad():
        assert model(**batch_of(device, 6), output_routing=True).routing[0].query.indices.shape == (1, 2)
    assert not layers


# whether a block is plain: looked at without running it


def block_of(model: CoLT5EncoderModel) -> CoLT5EncoderBlock:
    return model.encoder.block[0]


def is_plain(block: CoLT5EncoderBlock) -> bool:
    return block.plain.read(block, PLAIN) is not None


def hooked(name: str, register: str) -> Callable[[nn.Module], Callable[[], None]]:
    def change(block: nn.Module) -> Callable[[], None]:
        return getattr(block.get_submodule(name), register)(lambda *arguments: None).remove

    return change


def hooked_anew(block: nn.Module) -> Callable[[], None]:
    """A hook in a dictionary that took the place of the module's own."""
    module = block.layer[1].router
    module._forward_hooks = OrderedDict()
    assert is_plain(block)
    return module.register_forward_hook(lambda *arguments: None).remove


def replaced(parent: str, name: str, make: Callable[[nn.Module], nn.Module]) -> Callable:
    def change(block: nn.Module) -> Callable[[], None]:
        module = block.get_submodule(parent)
        before = getattr(module, name)
        setattr(module, name, make(before))
        return lambda: setattr(module, name, before)

    return change


class OtherLinear(nn.Linear):
    pass


class Quantised(torch.Tensor):
    pass


def other_class(linear: nn.Linear) -> nn.Module:
    return OtherLinear(linear.in_features, linear.out_features, bias=False)


def with_bias(linear: nn.Linear) -> nn.Module:
    return nn.Linear(linear.in_features, linear.out_features)


def patched(block: nn.Module) -> Callable[[], None]:
    module = block.layer[0].light_attention.o
    module.forward = lambda states: states
    return lambda: module.__dict__.pop("forward")


def patched_class(block: nn.Module) -> Callable[[], None]:
    kind = type(block.layer[0].light_attention)
    before = kind.forward
    kind.forward = lambda self, *arguments: before(self, *arguments)
    return lambda: setattr(kind, "forward", before)


def reclassed(block: nn.Module) -> Callable[[], None]:
    module = block.layer[1].heavy_feed_forward.wo
    module.__class__ = OtherLinear
    return lambda: setattr(module, "__class__", nn.Linear)


def quantised(block: nn.Module) -> Callable[[], None]:
    module = block.layer[0].heavy_attention.k
    before = module.weight
    module.weight = nn.Parameter(before.detach().as_subclass(Quantised))
    return lambda: setattr(module, "weight", before)


def biased(block: nn.Module) -> Callable[[], None]:
    module = block.layer[0].heavy_attention.k
    module.bias = nn.Parameter(torch.zeros(module.out_features))
    return lambda: setattr(module, "bias", None)


def parametrized(block: nn.Module) -> Callable[[], None]:
    module = block.layer[0].light_attention.q
    torch.nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())
    return lambda: torch.nn.utils.parametrize.remove_parametrizations(module, "weight")


def other_activation(block: nn.Module) -> Callable[[], None]:
    module = block.layer[1].light_feed_forward
    before = module.act
    module.act = nn.ReLU()
    return lambda: setattr(module, "act", before)


CHANGES = {
    "forward hook": hooked("layer.0.light_attention.q", "register_forward_hook"),
    "forward pre-hook": hooked("layer.1.light_feed_forward", "register_forward_pre_hook"),
    "backward hook": hooked("layer.0.layer_norm", "register_full_backward_hook"),
    "backward pre-hook": hooked("layer.0.query_router", "register_full_backward_pre_hook"),
    "hook on a sublayer": hooked("layer.1", "register_forward_hook"),
    "hook on dropout": hooked("layer.0.dropout", "register_forward_hook"),
    "hook on routing": hooked("layer.1.router.select", "register_forward_hook"),
    "hook on an activation": hooked("layer.1.heavy_feed_forward.act", "register_forward_hook"),
    "hook in another dictionary": hooked_anew,
    "another class": replaced("layer.0.heavy_attention", "q", other_class),
    "a bias": replaced("layer.1.heavy_feed_forward", "wi_0", with_bias),
    "a bias later": biased,
    "another sublayer": replaced("layer", "1", lambda module: nn.Identity()),
    "another router": replaced("layer.1", "router", lambda module: nn.Identity()),
    "a patched forward": patched,
    "a patched class": patched_class,
    "a module's class": reclassed,
    "a quantised weight": quantised,
    "a parametrized weight": parametrized,
    "another activation": other_activation,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_block_is_plain_until_it_is_changed_and_after(change: str) -> None:
    block = block_of(tiny_model(CoLT5EncoderModel, num_layers=1))
    assert is_plain(block)
    undo = CHANGES[change](block)
    try:
        assert not is_plain(block)
        assert not is_plain(block)
    finally:
        undo()
    assert is_plain(block)


def test_a_block_that_was_never_plain_is_not() -> None:
    for fields in ({"routing": "even"}, {"routing": "none"}, {"feed_forward_proj": "relu"}):
        assert not is_plain(block_of(tiny_model(CoLT5EncoderModel, num_layers=1, **fields)))


def test_adapters_are_not_plain_and_merged_ones_are() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model(CoLT5EncoderModel, num_layers=1)
    block = block_of(model)
    assert is_plain(block)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q", "v"]))
    assert not is_plain(block)
    adapted.merge_and_unload()
    assert is_plain(block)


def test_weights_are_those_of_now() -> None:
    block = block_of(tiny_model(CoLT5EncoderModel, num_layers=1))
    _, weights = block.plain.read(block, PLAIN)
    attention = block.layer[0].light_attention
    assert weights[2] is attention.k.weight
    # tied anew, and taken back
    attention.k.weight = attention.v.weight
    _, tied = block.plain.read(block, PLAIN)
    assert tied[2] is tied[3] is attention.v.weight
    attention.k.weight = weights[2]
    _, untied = block.plain.read(block, PLAIN)
    assert all(one is other for one, other in zip(untied, weights, strict=True))


def test_numbers_are_those_of_now() -> None:
    block = block_of(tiny_model(CoLT5EncoderModel, num_layers=1, dropout_rate=0.25))
    layer, _ = block.plain.read(block, PLAIN)
    assert (layer.radius, layer.drops) == (5, (0.0,) * 6)
    block.layer[0].light_attention.radius = 3
    block.layer[1].layer_norm.eps = 0.5
    # dropout alone in training mode, as for samples of a model's uncertainty
    block.layer[0].dropout.train()
    layer, _ = block.plain.read(block, PLAIN)
    assert (layer.radius, layer.eps[1], layer.drops) == (3, 0.5, (0.0, 0.0, 0.25, 0.0, 0.0, 0.0))
    block.train()
    assert block.plain.read(block, PLAIN)[0].drops == (0.25,) * 6


def test_copies_and_files_of_a_block_look_at_their_own_modules() -> None:
    block = block_of(tiny_model(CoLT5EncoderModel, num_layers=1))
    assert is_plain(block)
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    for other in (copy.deepcopy(block), torch.load(file, weights_only=False)):
        _, weights = other.plain.read(other, PLAIN)
        assert weights[1] is other.layer[0].light_attention.q.weight
        other.layer[0].register_forward_hook(lambda *arguments: None)
        assert not is_plain(other)
    assert is_plain(block)


# the road of a whole pass


def may_run(states: torch.Tensor, solver: str) -> bool:
    """Whether a pass that begins now may run straight lines."""
    settings = encoder_settings(
        tiny_config(kernel_backend="triton", attn_implementation="sdpa", soft_topk_solver=solver)
    )
    plan = EncoderPlan.make(settings, states, None)
    return layer_encoder.straight_pass(states, settings, plan) is not None


def test_modes_that_take_the_modules(device: torch.device) -> None:
    states = torch.zeros(1, 4, 8, device=device)
    assert may_run(states, "exact")
    hook = nn.modules.module.register_module_forward_hook(lambda *arguments: None)
    assert not may_run(states, "exact")
    hook.remove()
    torch.use_deterministic_algorithms(True)
    try:
        assert not may_run(states, "exact")
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.autograd.forward_ad.dual_level():
        assert not may_run(states, "exact")
    with torch._subclasses.FakeTensorMode():
        assert not may_run(states, "exact")
    # more tokens than coordinate descent has a kernel for
    assert not may_run(torch.zeros(1, 20_000, 1, device=device), "coordinate_descent")
    asked = []
    torch.func.grad(lambda x: asked.append(may_run(x, "exact")) or x.sum())(states)
    assert asked == [False]


# gradients


def gradients_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """The output, and the gradients of all parameters, and of inputs that want one, for a fixed cotangent."""
    model.zero_grad(set_to_none=True)
    for part in batch.values():
        part.grad = None
    torch.manual_seed(3)
    output = model(**batch).last_hidden_state
    generator = torch.Generator().manual_seed(5)
    cotangent = torch.randn(output.shape, generator=generator).to(output)
    output.backward(cotangent)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradients |= {name: part.grad for name, part in batch.items() if part.requires_grad}
    return {"output": output.detach(), **gradients}


TRAINED = {name: CASES[name] for name in ("one row", "bf16", "coordinate descent", "one token")}
TRAINED["dropout"] = (torch.float32, (11, 6), True, {"dropout_rate": 0.3})


# interpreted kernels, some seconds a case; the others are those of operations that have tests of their own
SLOW = ("bf16", "coordinate descent", "dropout")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in TRAINED]
)
def test_gradients_are_those_of_the_modules(case: str, device: torch.device, layers: list) -> None:
    dtype, lengths, masked, fields = TRAINED[case]
    model = encoder(device, dtype, **fields | {"num_layers": 1})
    model.train()
    batch = batch_of(device, *lengths, masked=masked)
    expected = as_modules(lambda: gradients_of(model, batch), "dropout_rate" in fields)
    assert not layers
    # the sums of products that the modules leave to autograd are rounded in another order
    for _ in range(1 if device.type == "cpu" else 3):
        assert_same_gradients(gradients_of(model, batch), expected)
    assert layers


def test_frozen_weights_get_no_gradients(device: torch.device, layers: list) -> None:
    model = encoder(device, num_layers=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("block.0" not in name and ".k." not in name and "wo" not in name)
    model.shared.requires_grad_(False)
    model.encoder.light_relative_attention_bias.requires_grad_(False)
    batch = batch_of(device, 7)
    expected = as_modules(lambda: gradients_of(model, batch))
    assert_same_gradients(gradients_of(model, batch), expected)
    assert len(layers) == 2


# lists of launches


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As on a GPU the first call of a kind notes its launches, and the next ones repeat them; what was repeated."""
    repeated: list[str] = []
    monkeypatch.setattr(run_launch_list_triton, "launcher", interpreting_launcher(monkeypatch, repeated))
    monkeypatch.setattr(layer_program, "programs", {})
    monkeypatch.setattr(layer_program, "may_repeat", lambda states: True)
    # and weights of products with the same states are joined
    monkeypatch.setattr(layer_program, "is_one_product", lambda *sizes: True)
    return repeated


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the calls above are repeated from lists themselves")
@pytest.mark.parametrize(("lengths", "rate"), [((6,), 0.0), pytest.param((9, 5), 0.3, marks=pytest.mark.slow)])
def test_lists_read_and_write_what_they_should(lengths: tuple[int, ...], rate: float, lists: list[str]) -> None:
    device = torch.device("cpu")
    model = encoder(device, num_layers=2, dropout_rate=rate).train(rate > 0)
    first, second = batch_of(device, *lengths), batch_of(device, *lengths)
    # the first calls of each kind
    gradients_of(model, first)
    expected = as_modules(lambda: gradients_of(model, second), rate > 0)
    count = len(lists)
    assert_same_gradients(gradients_of(model, second), expected)
    assert len(lists) - count > 2 * 60
    if rate > 0:
        return
    with torch.no_grad():
        model(**first)
        count = len(lists)
        assert_same_but_for_rounding(model(**second).last_hidden_state, expected["output"])
    assert len(lists) - count >= 2 * 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the calls above are repeated from lists themselves")
@pytest.mark.parametrize("rate", [0.3, 0.0])
def test_the_gradient_of_a_layer_that_drops_is_rehearsed_with_it(
    rate: float, lists: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that its kernels are compiled with the others. Who trains has dropout; who has none may want no gradient."""
    device = torch.device("cpu")
    model, batch = encoder(device, num_layers=1, dropout_rate=rate).train(), batch_of(device, 6)
    rehearsed, launched = noted_launches(monkeypatch)
    states = model(**batch).last_hidden_state
    early = [*rehearsed]
    launched.clear()
    states.sum().backward()
    # without what modules launch beside the layers
    of_layers = [launch for launch in launched if launch in rehearsed]
    assert {name for name, *_ in of_layers} >= {
        "attention_backward_query_kernel",
        "norm_backward_kernel",
        "route_backward_kernel",
    }
    assert all(launch in early for launch in of_layers) == (rate > 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the calls above are repeated from lists themselves")
@pytest.mark.parametrize(("lengths", "rate"), [((7,), 0.0), pytest.param((9, 5), 0.3, marks=pytest.mark.slow)])
def test_graphs_run_heavy_branches_beside_light_ones(
    lengths: tuple[int, ...], rate: float, lists: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call is a graph, in which what may run beside other launches runs behind them."""
    monkeypatch.setattr(LaunchGraphs, "_is_due", lambda *call: True)
    device = torch.device("cpu")
    model = encoder(device, num_layers=2, dropout_rate=rate).train(rate > 0)
    first, second = batch_of(device, *lengths), batch_of(device, *lengths)
    gradients_of(model, first)
    expected = as_modules(lambda: gradients_of(model, second), rate > 0)
    lists.clear()
    assert_same_gradients(gradients_of(model, second), expected)
    assert lists.count("graph") == 2 * 2
    if rate > 0:
        return
    with torch.no_grad():
        model(**first)
        lists.clear()
        assert_same_but_for_rounding(model(**second).last_hidden_state, expected["output"])
    # the first layer, the second one, and its sum
    assert lists.count("graph") == 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_calls_that_come_again_on_a_card_are_graphs(dtype: torch.dtype, rate: float, monkeypatch: Any) -> None:
    graphs = LaunchGraphs()
    monkeypatch.setattr(run_launch_list_triton, "launch_graphs", graphs)
    device = torch.device("cuda")
    model = encoder(device, dtype, num_layers=2, dropout_rate=rate).train(rate > 0)
    batch = batch_of(device, 700, 300)
    expected = gradients_of(model, batch)
    # in bf16 the two roads round too differently to be compared element by element
    if dtype == torch.float32:
        assert_same_gradients(expected, as_modules(lambda: gradients_of(model, batch), rate > 0))
    # gradients of one call are held until the next one is done, so that two sets of addresses come in turn
    for _ in range(10):
        assert_same_gradients(gradients_of(model, batch), expected, dtype)
    # each of two layers, forward and backward, in the last calls at least
    assert graphs.replays >= 2 * 2 * 2
    model.eval()
    with torch.no_grad():
        expected = as_modules(lambda: model(**batch).last_hidden_state)
        before = graphs.replays
        for _ in range(10):
            assert_same_but_for_rounding(model(**batch).last_hidden_state, expected)
    # the first layer, the second one, and its sum
    assert graphs.replays >= before + 2 * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the calls above are repeated from lists themselves")
def test_without_gradients_all_layers_are_one_call(lists: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    model = encoder(device, num_layers=3)
    first, second = batch_of(device, 6), batch_of(device, 6)
    run, calls = run_launch_list_triton.LaunchList.__call__, []

    def counted(launches: Any, each: Any, *others: Any) -> bool:
        calls.append(len(each))
        return run(launches, each, *others)

    monkeypatch.setattr(run_launch_list_triton.LaunchList, "__call__", counted)
    with torch.no_grad():
        expected = as_modules(lambda: model(**second).last_hidden_state)
        model(**first)
        calls.clear()
        assert_same_but_for_rounding(model(**second).last_hidden_state, expected)
        # the first layer, the others, and the last one's sum
        assert calls == [1, 2, 1]
        # a block that somebody looks into, and one with other numbers, each by itself
        handle = model.encoder.block[1].layer[1].layer_norm.register_forward_hook(lambda *inputs: None)
        assert_same_but_for_rounding(model(**second).last_hidden_state, expected)
        handle.remove()
        model.encoder.block[2].layer[0].layer_norm.eps = 1e-3
        expected = as_modules(lambda: model(**second).last_hidden_state)
        calls.clear()
        assert_same_but_for_rounding(model(**second).last_hidden_state, expected)
    assert calls and set(calls) == {1}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the calls above are repeated from lists themselves")
@pytest.mark.parametrize("recorded", [False, True])
def test_lists_of_frozen_weights_and_of_autocast(
    recorded: bool, lists: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are, and as graphs that run heavy branches last."""
    monkeypatch.setattr(LaunchGraphs, "_is_due", lambda *call: recorded)
    device = torch.device("cpu")
    model = encoder(device, num_layers=1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("light_attention.k" in name or "router" in name or "heavy_feed_forward" in name)
    batch = batch_of(device, 8)

    def call() -> dict[str, Any]:
        with torch.autocast("cpu", torch.float16):
            return gradients_of(model, batch)

    expected = as_modules(call)
    call()
    count = len(lists)
    assert_same_gradients(call(), expected, torch.bfloat16)
    assert len(lists) - count > 50
    assert lists.count("graph") == 2 * recorded


@pytest.mark.parametrize("rate", [0.0, pytest.param(0.3, marks=pytest.mark.slow)])
def test_autocast_is_that_of_the_modules(rate: float, device: torch.device, layers: list) -> None:
    model = encoder(device, num_layers=1, dropout_rate=rate)
    model.train(rate > 0)
    batch = batch_of(device, 9)

    def call() -> dict[str, Any]:
        with torch.autocast(device.type, torch.bfloat16):
            return gradients_of(model, batch)

    expected = as_modules(call, rate > 0)
    assert not layers
    for _ in range(1 if device.type == "cpu" else 3):
        actual = call()
        assert {gradient.dtype for gradient in actual.values()} == {torch.float32}
        # products are rounded to bf16
        assert_same_gradients(actual, expected, torch.bfloat16)
    assert layers


# what else trains and runs models


@pytest.fixture(scope="module")
def trained_by_modules() -> tuple[CoLT5EncoderModel, dict[str, torch.Tensor], dict[str, Any]]:
    """A model of one layer with dropout in training mode, a batch, and what the modules give for it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = encoder(device, num_layers=1, dropout_rate=0.3).train()
    batch = batch_of(device, 6)
    expected = as_modules(lambda: gradients_of(model, batch), by_kernels=True)
    model.zero_grad(set_to_none=True)
    return model, batch, expected


@pytest.fixture
def trained(trained_by_modules: tuple) -> tuple[CoLT5EncoderModel, dict[str, torch.Tensor], dict[str, Any]]:
    """The same, for a test to change the model."""
    model, batch, expected = trained_by_modules
    return copy.deepcopy(model), batch, expected


@pytest.mark.parametrize("use_reentrant", [pytest.param(True, marks=pytest.mark.slow), False])
def test_checkpointed_layers_drop_the_same_again(use_reentrant: bool, trained: tuple, layers: list) -> None:
    model, batch, expected = trained
    checkpoint_activations(model, use_reentrant)
    assert_same_gradients(gradients_of(model, batch), expected)
    # the reentrant kind runs without gradients first, and what drops then are modules
    assert len(layers) == (1 if use_reentrant else 2)


@pytest.mark.slow
def test_saved_tensors_may_lie_elsewhere(trained: tuple, layers: list) -> None:
    model, batch, expected = trained
    with torch.autograd.graph.save_on_cpu():
        assert_same_gradients(gradients_of(model, batch), expected)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.numpy(force=True), torch.from_numpy):
        if not batch["input_ids"].is_cuda:
            assert_same_gradients(gradients_of(model, batch), expected)
    assert layers


def test_gradients_add_up_and_are_each_others_neighbours_at_most(trained: tuple, layers: list) -> None:
    model, batch, expected = trained
    gradients_of(model, batch)
    torch.manual_seed(3)
    output = model(**batch).last_hidden_state
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(output))
    doubled = {name: parameter.grad / 2 for name, parameter in model.named_parameters()}
    assert_same_gradients({"output": output.detach(), **doubled}, expected)
    # those of one product are parts of one tensor: to change one in place changes no other
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad.mul_(-1)
    assert all(torch.equal(parameter.grad, -before[name]) for name, parameter in model.named_parameters())
    assert len(layers) == 2


def test_an_optimizer_may_step_within_the_backward_pass(trained: tuple, layers: list) -> None:
    model, batch, expected = trained
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def step(parameter: nn.Parameter) -> None:
        with torch.no_grad():
            parameter -= 0.5 * parameter.grad
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    output = gradients_of(model, batch)["output"]
    moved = {name: (before[name] - parameter).detach() * 2 for name, parameter in model.named_parameters()}
    assert_same_gradients({"output": output, **moved}, expected, torch.float16)
    assert layers


def test_second_derivatives_are_refused(trained: tuple, layers: list) -> None:
    model, batch, _ = trained
    output = model(**batch).last_hidden_state
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(output.sum(), list(model.parameters()), create_graph=True)
    assert layers


def test_weights_that_changed_before_the_backward_pass_are_noticed(trained: tuple, layers: list) -> None:
    model, batch, _ = trained
    output = model(**batch).last_hidden_state
    with torch.no_grad():
        model.encoder.block[0].layer[0].light_attention.q.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    assert layers


def test_copies_and_files_after_a_call_and_weights_after_loading(device: torch.device, layers: list) -> None:
    model = encoder(device, num_layers=1)
    batch = batch_of(device, 5)
    with torch.inference_mode():
        first = model(**batch).last_hidden_state.clone()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = encoder(device, num_layers=1)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        assert not torch.equal(other(**batch).last_hidden_state, first)
        other.load_state_dict(torch.load(file))
        for one in (other, copied):
            assert_same_but_for_rounding(one(**batch).last_hidden_state, first)
        # other memory, another dtype, and values that change behind PyTorch's back
        copied.to(torch.float64).to(torch.bfloat16).float()
        copied.load_state_dict(model.state_dict())
        query = copied.encoder.block[0].layer[0].light_attention.q.weight
        query.data = query.data.clone().mul_(0.5)
        query.data.mul_(2)
        assert_same_but_for_rounding(copied(**batch).last_hidden_state, first)
    assert len(layers) == 5


@pytest.mark.slow
def test_distributed_data_parallel_averages_the_same_gradients(trained: tuple, layers: list, tmp_path: Any) -> None:
    model, batch, expected = trained
    if batch["input_ids"].is_cuda:
        pytest.skip("the processes of this test talk by gloo")
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model.zero_grad(set_to_none=True)
        parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        torch.manual_seed(3)
        output = parallel(**batch).last_hidden_state
        output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(5)))
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert_same_gradients({"output": output.detach(), **gradients}, expected)
        assert layers
        # sharded weights are another class's, and a sharded block is of another class too
        block = block_of(tiny_model(CoLT5EncoderModel, num_layers=1))
        assert is_plain(block)
        torch.distributed.fsdp.fully_shard(block, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        assert not is_plain(block)
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------ pictures, whose tokens are places of a grid


PICTURES = {
    "padded": (torch.float32, [(6, 19), (13, 10)], {"num_layers": 1}),
    "one picture": (torch.float32, [(9, 21)], {"num_layers": 1}),
    "one patch": (torch.float32, [(4, 3)], {"num_layers": 1}),
    "window wider than the table": (
        torch.float32, [(29, 28)],
        {
            "num_layers": 1, "local_radius": 6, "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 5,
        },
    ),
    "bf16": (torch.bfloat16, [(17, 22)], {"num_layers": 1}),
    "fp16": (torch.float16, [(11, 18)], {"num_layers": 2}),
}  # fmt: skip


def picture_model(case: str, device: torch.device, **changes: Any) -> CoLT5VisionModel:
    """A model over pictures with the case's fields, but for what is changed."""
    dtype, _, fields = PICTURES[case]
    torch.manual_seed(0)
    return tiny_vision_model(CoLT5VisionModel, dtype, kernel_backend="triton", **fields | changes).to(device)


def pictures_of(case: str, device: torch.device) -> dict[str, torch.Tensor]:
    """New pictures of the case's sizes, and their mask."""
    dtype, sizes, _ = PICTURES[case]
    height, width = (max(lengths) for lengths in zip(*sizes, strict=True))
    batch = pad_pictures([torch.randn(3, *size, dtype=dtype) for size in sizes], height, width)
    return {name: part.to(device) for name, part in batch.items()}


def picture_call(case: str, device: torch.device) -> tuple[CoLT5VisionModel, Callable[[], torch.Tensor]]:
    """A model over pictures, and its pass over new ones of the case's sizes without gradients."""
    model = picture_model(case, device)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return model(**pictures_of(case, device)).last_hidden_state

    return model, call


def seeded(call: Callable[[], torch.Tensor], seed: int) -> Callable[[], torch.Tensor]:
    """The call with a generator of its own."""

    def run() -> torch.Tensor:
        torch.manual_seed(seed)
        return call()

    return run


@pytest.mark.parametrize("case", PICTURES)
def test_pictures_are_those_of_the_modules(case: str, device: torch.device, layers: list) -> None:
    model, call = picture_call(case, device)
    expected = as_modules(seeded(call, 1))
    assert not layers
    for _ in range(1 if device.type == "cpu" else 3):
        assert_same_but_for_rounding(seeded(call, 1)(), expected)
    assert len(layers) >= model.config.num_layers


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the calls above are repeated from lists themselves")
@pytest.mark.parametrize("case", ["padded", pytest.param("one picture", marks=pytest.mark.slow)])
def test_lists_of_pictures_read_and_write_what_they_should(case: str, lists: list[str]) -> None:
    _, call = picture_call(case, torch.device("cpu"))
    seeded(call, 1)()
    expected = as_modules(seeded(call, 2))
    lists.clear()
    assert_same_but_for_rounding(seeded(call, 2)(), expected)
    assert {"grid_attention_forward_kernel", "route_kernel", "combine_norm_kernel"} <= set(lists)


def test_a_grid_of_another_width_is_another_line(device: torch.device, layers: list) -> None:
    """As many patches in rows of another length: what is noted for one grid does not stand for the other."""
    torch.manual_seed(0)
    model = tiny_vision_model(CoLT5VisionModel, kernel_backend="triton", num_layers=1).to(device)
    pictures = [torch.randn(1, 3, 8, 24, device=device), torch.randn(1, 3, 16, 12, device=device)]
    with torch.no_grad():
        expected = as_modules(lambda: [model(picture).last_hidden_state for picture in pictures])
        assert not layers
        for picture, states in zip(pictures, expected, strict=True):
            assert_same_but_for_rounding(model(picture).last_hidden_state, states)
    assert len(layers) == 2 and layers[0].program is not layers[1].program


def test_pictures_with_results_are_modules(device: torch.device, layers: list) -> None:
    model, _ = picture_call("one picture", device)
    picture = torch.randn(1, 3, 9, 21, device=device)
    with torch.no_grad():
        assert model(picture, output_routing=True).routing[0].query.indices.shape[0] == 1
        assert len(model(picture, output_hidden_states=True).hidden_states) == 2
    assert not layers


def pictures_with_gradients(case: str, device: torch.device) -> dict[str, torch.Tensor]:
    """New pictures of the case's sizes, whose own gradient is wanted too."""
    batch = pictures_of(case, device)
    batch["pixel_values"].requires_grad_()
    return batch


@pytest.mark.parametrize(
    ("case", "rate"),
    [
        ("padded", 0.0),
        ("one patch", 0.0),
        *[
            # some four seconds each
            pytest.param(case, rate, marks=pytest.mark.slow)
            for case, rate in [
                ("one picture", 0.0),
                ("window wider than the table", 0.0),
                ("bf16", 0.0),
                ("padded", 0.3),
            ]
        ],
    ],
)
def test_gradients_of_pictures_are_those_of_the_modules(
    case: str, rate: float, device: torch.device, layers: list
) -> None:
    model = picture_model(case, device, num_layers=1, dropout_rate=rate).train()
    batch = pictures_with_gradients(case, device)
    expected = as_modules(lambda: gradients_of(model, batch), rate > 0)
    assert not layers
    for _ in range(1 if device.type == "cpu" else 3):
        assert_same_gradients(gradients_of(model, batch), expected)
    assert layers


def test_pictures_of_a_model_in_fp16_with_gradients_are_modules(device: torch.device, layers: list) -> None:
    model = picture_model("fp16", device, num_layers=1)
    assert model(**pictures_of("fp16", device)).last_hidden_state.requires_grad
    assert not layers


@pytest.mark.slow
def test_frozen_weights_of_pictures_get_no_gradients(device: torch.device, layers: list) -> None:
    model = picture_model("one picture", device, num_layers=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("block.0" not in name and ".k." not in name and "wo" not in name)
    model.encoder.light_relative_attention_bias.requires_grad_(False)
    batch = pictures_of("one picture", device)
    expected = as_modules(lambda: gradients_of(model, batch))
    assert expected["encoder.block.1.layer.0.light_attention.q.weight"] is not None
    assert_same_gradients(gradients_of(model, batch), expected)
    assert layers


@pytest.mark.slow
def test_checkpointed_layers_of_pictures_drop_the_same_again(device: torch.device, layers: list) -> None:
    model = picture_model("one picture", device, dropout_rate=0.3).train()
    batch = pictures_with_gradients("one picture", device)
    expected = as_modules(lambda: gradients_of(model, batch), by_kernels=True)
    checkpoint_activations(model, use_reentrant=False)
    assert_same_gradients(gradients_of(model, batch), expected)
    assert len(layers) == 2


@pytest.mark.slow
def test_autocast_of_pictures_is_that_of_the_modules(device: torch.device, layers: list) -> None:
    model = picture_model("one picture", device)
    batch = pictures_with_gradients("one picture", device)

    def call() -> dict[str, Any]:
        with torch.autocast(device.type, torch.bfloat16):
            return gradients_of(model, batch)

    expected = as_modules(call)
    assert_same_gradients(call(), expected, torch.bfloat16)
    assert layers


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the calls above are repeated from lists themselves")
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(("case", "rate"), [("one picture", 0.0), ("padded", 0.3)])
def test_lists_of_pictures_with_gradients(
    case: str, rate: float, recorded: bool, lists: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are, and as graphs that run heavy branches last."""
    monkeypatch.setattr(LaunchGraphs, "_is_due", lambda *call: recorded)
    device = torch.device("cpu")
    model = picture_model(case, device, num_layers=1, dropout_rate=rate).train(rate > 0)
    first, second = pictures_with_gradients(case, device), pictures_with_gradients(case, device)
    gradients_of(model, first)
    expected = as_modules(lambda: gradients_of(model, second), rate > 0)
    lists.clear()
    assert_same_gradients(gradients_of(model, second), expected)
    # light and heavy attention: each table's gradient is summed up in zeros and handed on
    for kernel in ("table_unit", "attention_backward_query", "attention_backward_key", "table_sums"):
        assert lists.count(f"grid_{kernel}_kernel") == 2
    assert lists.count("graph") == 2 * recorded
