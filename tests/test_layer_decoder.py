"""One new token of the decoder as straight lines: against recomputation at every step, and who gets modules."""

import copy
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from launch_lists import interpreting_launcher
from models import pad, random_ids, read_plain, tiny_model
from rounding import assert_same_but_for_rounding
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

pytest.importorskip("triton")

from modeling_colt5 import (  # noqa: E402
    CoLT5ForCausalLM,
    CoLT5ForConditionalGeneration,
    kernel_backend,
    layer_decoder,
    layer_plain,
    op_step_attention_triton,
    run_growing_cache,
    run_launch_list_triton,
)
from modeling_colt5.kernel_backend import Mode  # noqa: E402
from modeling_colt5.layer_decoder import StepBuffers, StraightStep  # noqa: E402
from modeling_colt5.layer_plain import PlainStack  # noqa: E402
from modeling_colt5.model_decoder_layer import PLAIN  # noqa: E402
from modeling_colt5.run_release import CACHE  # noqa: E402

# over an end of blocks of four tokens, from a start alone or behind a prompt
NEW_TOKENS = 6
# fp32 sums taken in another order over logits of size 1
TOLERANCE = 1e-5
SETTINGS = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
RETURNED = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that often grow."""
    monkeypatch.setattr(run_growing_cache, "BLOCK", 4)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[StraightStep]:
    """The tokens that were straight lines."""
    ran: list[StraightStep] = []
    run = StraightStep.run
    monkeypatch.setattr(StraightStep, "run", lambda step: ran.append(step) or run(step))
    return ran


def make_model(device: torch.device, model_class: Any = CoLT5ForConditionalGeneration, **fields: Any) -> Any:
    """A tiny model whose next tokens depend on those before. Its encoder is small, as kernels may be interpreted."""
    torch.manual_seed(0)
    model = tiny_model(model_class, kernel_backend="triton", **{"num_layers": 1, "num_decoder_layers": 2} | fields)
    with torch.no_grad():
        for block in model.decoder.block:
            block.layer[0].SelfAttention.q.weight.mul_(4)
    return model.to(device)


def documents(device: torch.device) -> dict[str, torch.Tensor]:
    batch = pad([random_ids(length) for length in (13, 7)])
    return {name: part.to(device) for name, part in batch.items()}


def with_decoder_prompt(device: torch.device) -> dict[str, torch.Tensor]:
    """Documents, and prompts of the decoder of two lengths, padded on the left."""
    start = torch.zeros(1, dtype=torch.int64)
    prompt = pad([torch.cat([start, random_ids(length)]) for length in (4, 2)], "left")
    return documents(device) | {f"decoder_{name}": part.to(device) for name, part in prompt.items()}


def texts(device: torch.device) -> dict[str, torch.Tensor]:
    return {name: part.to(device) for name, part in pad([random_ids(n) for n in (6, 4)], "left").items()}


KINDS: dict[str, tuple[Any, Callable[[torch.device], dict[str, torch.Tensor]], dict[str, Any]]] = {
    "encoder-decoder": (CoLT5ForConditionalGeneration, documents, {}),
    "decoder prompt": (CoLT5ForConditionalGeneration, with_decoder_prompt, {}),
    "language model": (CoLT5ForCausalLM, texts, {}),
    "routed memory": (CoLT5ForConditionalGeneration, documents, {"routed_cross_key_values": 6}),
    "routers of heads": (
        CoLT5ForConditionalGeneration, documents,
        {"routed_cross_key_values": 6, "num_cross_routers": 2, "num_cross_key_value_heads": 2},
    ),
}  # fmt: skip


def as_torch(model: Any, call: Callable[[], Any]) -> Any:
    """What a call gives in plain PyTorch."""
    before, model.config.kernel_backend = model.config.kernel_backend, "torch"
    try:
        return call()
    finally:
        model.config.kernel_backend = before


@torch.no_grad()
def recomputed(model: Any, inputs: dict[str, torch.Tensor], sequences: torch.Tensor) -> torch.Tensor:
    """Logits [steps, rows, vocabulary] before each new token: of the whole sequence at once, without a cache, in
    plain PyTorch. What is before a token does not depend on what comes behind it."""
    is_encoder_decoder = model.config.is_encoder_decoder
    prefix = "decoder_" if is_encoder_decoder else ""
    mask = inputs.get(f"{prefix}attention_mask")
    repeats = len(sequences) // len(inputs["input_ids"])
    given = {f"{prefix}input_ids": sequences[:, :-1]}
    if is_encoder_decoder:
        given |= {name: inputs[name].repeat_interleave(repeats, 0) for name in ("input_ids", "attention_mask")}
    if mask is not None:
        longer = nn.functional.pad(mask, (0, sequences.shape[1] - 1 - mask.shape[1]), value=1)
        given[f"{prefix}attention_mask"] = longer.repeat_interleave(repeats, 0)
    logits = as_torch(model, lambda: model(**given, use_cache=False).logits)
    return logits[:, -NEW_TOKENS:].transpose(0, 1)


def encoded(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The inputs with the encoder's output in the place of the document, as interpreted kernels take long for it."""
    if not model.config.is_encoder_decoder:
        return inputs
    rest = {name: part for name, part in inputs.items() if name != "input_ids"}
    with torch.no_grad():
        document = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return rest | {"encoder_outputs": as_torch(model, lambda: model.encoder(**document))}


def generate(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    inputs = encoded(model, inputs)
    torch.manual_seed(1)
    return model.generate(**inputs, **SETTINGS | RETURNED | options)


# interpreted kernels, some seconds a kind
SLOW = ("decoder prompt", "routed memory", "routers of heads")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind in KINDS]
)
def test_every_step_is_what_recomputation_gives(kind: str, device: torch.device, steps: list) -> None:
    model_class, make_inputs, fields = KINDS[kind]
    model, inputs = make_model(device, model_class, **fields), make_inputs(device)
    output = generate(model, inputs)
    assert len(steps) == NEW_TOKENS - 1
    logits = torch.stack(output.logits)
    torch.testing.assert_close(logits, recomputed(model, inputs, output.sequences), rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder prompt", "language model"])
def test_sampling_of_several_sequences(kind: str, device: torch.device, steps: list) -> None:
    model_class, make_inputs, fields = KINDS[kind]
    model, inputs = make_model(device, model_class, **fields), make_inputs(device)
    output = generate(model, inputs, do_sample=True, top_k=20, num_return_sequences=2)
    assert len(steps) == NEW_TOKENS - 1
    logits = torch.stack(output.logits)
    torch.testing.assert_close(logits, recomputed(model, inputs, output.sequences), rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder-decoder", "language model"])
def test_beams_change_places(kind: str, device: torch.device, steps: list) -> None:
    model_class, make_inputs, fields = KINDS[kind]
    model, inputs = make_model(device, model_class, **fields), make_inputs(device)
    # the document or text without padding
    row = 0 if kind == "encoder-decoder" else inputs["attention_mask"].sum(1).argmax()
    inputs = {name: part[row : row + 1] for name, part in inputs.items()}
    options = {"num_beams": 3, "num_return_sequences": 2}
    output = generate(model, inputs, **options)
    assert len(steps) == NEW_TOKENS - 1
    uncached = as_torch(model, lambda: generate(model, inputs, **options, use_cache=False))
    assert torch.equal(output.sequences, uncached.sequences)
    for scores, expected in zip(output.scores, uncached.scores, strict=True):
        torch.testing.assert_close(scores, expected, rtol=0, atol=TOLERANCE)
    assert (output.beam_indices[:, 1:NEW_TOKENS] != output.beam_indices[:, : NEW_TOKENS - 1]).any()


@pytest.mark.slow
def test_guessed_tokens_are_written_over(device: torch.device, steps: list) -> None:
    """Steps of several tokens are modules', and take tokens back; those of one are not."""
    model = make_model(device, CoLT5ForCausalLM)
    inputs = {name: part.to(device) for name, part in pad([random_ids(6).repeat(2)]).items()}
    output = generate(model, inputs, prompt_lookup_num_tokens=2)
    assert steps
    expected = as_torch(model, lambda: generate(model, inputs, use_cache=False))
    assert torch.equal(output.sequences, expected.sequences)


@pytest.mark.slow
def test_rows_that_end_at_different_times(device: torch.device, steps: list) -> None:
    model, inputs = make_model(device), documents(device)
    free = as_torch(model, lambda: generate(model, inputs).sequences)
    # the first row's second and the last row's fourth new token
    options = {"min_new_tokens": 0, "eos_token_id": [int(free[0, 2]), int(free[1, 4])]}
    ended = generate(model, inputs, **options)
    assert steps
    uncached = as_torch(model, lambda: generate(model, inputs, **options, use_cache=False))
    assert torch.equal(ended.sequences, uncached.sequences)


@pytest.mark.slow
def test_long_caches_and_memories_are_split(
    device: torch.device, steps: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op_step_attention_triton, "LEAST_KEYS", 4)
    model, inputs = make_model(device), documents(device)
    output = generate(model, inputs)
    assert steps
    torch.testing.assert_close(
        torch.stack(output.logits), recomputed(model, inputs, output.sequences), rtol=0, atol=TOLERANCE
    )


@torch.no_grad()
def test_steps_and_chunks_take_turns(device: torch.device, steps: list) -> None:
    model, ids = make_model(device, CoLT5ForCausalLM), random_ids(2, 18).to(device)
    expected = as_torch(model, lambda: model(ids, use_cache=False).logits)
    cache, logits = None, []
    for part in ids.split([3, 1, 1, 4, 1, 2, 1, 1, 1, 3], 1):
        output = model(part, use_cache=True, **{CACHE: cache})
        cache = output[CACHE]
        logits.append(output.logits)
    assert len(steps) == 6
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=TOLERANCE)
    # and the cache is what Transformers' would be
    own = DynamicCache(config=model.config)
    as_torch(model, lambda: model(ids, use_cache=True, **{CACHE: own}))
    for layer, other in zip(cache.layers, own.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(layer.values, other.values, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_what_the_caller_gives_stays_as_it_is(device: torch.device, steps: list) -> None:
    model = make_model(device, CoLT5ForCausalLM)
    embeddings = torch.randn(2, 4, model.config.d_model, device=device)
    before, cache = embeddings.clone(), None
    for part in embeddings.split(1, 1):
        cache = model(inputs_embeds=part, use_cache=True, **{CACHE: cache})[CACHE]
    assert len(steps) == 3 and torch.equal(embeddings, before)


def test_half_precision_is_that_of_the_modules(device: torch.device, steps: list) -> None:
    model, ids = make_model(device).bfloat16(), torch.zeros(2, 4, dtype=torch.int64, device=device)
    inputs = encoded(model, documents(device))

    @torch.no_grad()
    def call() -> torch.Tensor:
        cache, logits = None, []
        for part in ids.split(1, 1):
            output = model(**inputs, decoder_input_ids=part, use_cache=True, **{CACHE: cache})
            cache = output[CACHE]
            logits.append(output.logits)
        return torch.cat(logits, 1)

    expected = as_modules(call)
    assert not steps
    assert_same_but_for_rounding(call(), expected)
    assert len(steps) == 3


def as_modules(call: Callable[[], Any]) -> Any:
    """What a call gives where all blocks run as modules: with kernels on a GPU; where those are interpreted in plain
    PyTorch, which is independent of them and takes a tenth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_decoder, "enabled", False)
        if not torch.cuda.is_available():
            patch.setattr(kernel_backend, "FORCED_BACKEND", "torch")
        return call()


# who gets modules


class Session:
    """A model and a cache that goes on token by token."""

    def __init__(self, device: torch.device, steps: list):
        self.model, self.steps, self.cache = make_model(device), steps, None
        self.inputs = documents(device) if self.model.config.is_encoder_decoder else {}
        self.prefix = "decoder_" if self.model.config.is_encoder_decoder else ""
        self.ids = torch.full((2, 1), 5, device=device)
        self.inputs = encoded(self.model, self.inputs)
        # modules, which make the cache
        as_torch(self.model, self.step)
        assert self.step()[1]

    @torch.no_grad()
    def step(self, **options: Any) -> tuple[Any, bool]:
        """The output, and whether it was a straight line."""
        count = len(self.steps)
        given = self.inputs | {f"{self.prefix}input_ids": self.ids, "use_cache": True, CACHE: self.cache} | options
        output = self.model(**given)
        self.cache = output.get(CACHE, self.cache)
        return output, len(self.steps) > count


@pytest.fixture
def session(device: torch.device, steps: list) -> Session:
    return Session(device, steps)


def test_a_hook_set_after_a_step_is_obeyed(session: Session) -> None:
    block = session.model.decoder.block[-1]
    own = {
        "block": block,
        "projection": block.layer[0].SelfAttention.o,
        "cross-attention": block.layer[1].EncDecAttention,
        "activation": block.layer[2].DenseReluDense.act,
    }
    for module in own.values():
        called = []
        handle = module.register_forward_hook(lambda *arguments, called=called: called.append(1))
        _, is_straight = session.step()
        assert called and not is_straight
        handle.remove()
        assert session.step()[1]
    called = []
    handle = session.model.decoder.final_layer_norm.register_forward_hook(lambda *arguments: called.append(1))
    assert session.step()[1] and called
    handle.remove()
    handle = nn.modules.module.register_module_forward_pre_hook(lambda *arguments: None)
    try:
        assert not session.step()[1]
    finally:
        handle.remove()


def test_a_hook_changes_what_comes_out(session: Session) -> None:
    before = session.step()[0].logits
    handle = (
        session.model.decoder.block[0]
        .layer[2]
        .DenseReluDense.wo.register_forward_hook(lambda module, inputs, output: output * 50)
    )
    assert (session.step()[0].logits - before).abs().max() > 1e-2
    handle.remove()


def test_who_asks_for_more_gets_it(session: Session) -> None:
    output, is_straight = session.step(output_hidden_states=True)
    assert not is_straight and len(output.decoder_hidden_states) == 1 + len(session.model.decoder.block)
    # the number 0 asks for the states that go into the first layer
    assert not session.step(output_hidden_states=0)[1]
    assert session.step()[1]
    session.model.set_attn_implementation("eager")
    output, is_straight = session.step(output_attentions=True)
    assert not is_straight
    assert len(output.decoder_attentions) == len(output.cross_attentions) == len(session.model.decoder.block)


def test_other_calls_are_modules(session: Session) -> None:
    model, mask = session.model, torch.ones(2, 1, session.cache.get_seq_length() + 1, dtype=torch.bool)
    assert not session.step(decoder_attention_mask=mask[:, None].to(session.ids.device))[1]
    assert not session.step(decoder_input_ids=session.ids.expand(2, 2))[1]
    assert not as_torch(model, session.step)[1]
    assert not session.step(use_cache=False, **{CACHE: None})[1]
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        assert session.step()[1] == (attention == "sdpa")
    with torch.autocast(session.ids.device.type, torch.bfloat16):
        assert not session.step()[1]


def test_hooks_around_the_layers_see_each_token_once(device: torch.device, steps: list) -> None:
    session = Session(device, steps)
    decoder, seen = session.model.decoder, []
    for module, stays in ((decoder, True), (decoder.final_layer_norm, True), (decoder.embed_tokens, False)):
        handle = module.register_forward_hook(lambda module, *given: seen.append(module))
        output, is_straight = session.step()
        handle.remove()
        assert seen == [module] and is_straight == stays
        seen.clear()
    assert session.step()[1] and not seen


def test_a_memory_is_routed_once_a_call(device: torch.device, steps: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the first token, which modules make, for later ones, and where a hook takes them to the modules."""
    session, calls = Session(device, steps), []
    decoder, route = session.model.decoder, session.model.decoder.route_memory
    monkeypatch.setattr(decoder, "route_memory", lambda *given: calls.append(1) or route(*given))
    filled = session.cache
    empty = DynamicCache(config=session.model.config), DynamicCache(config=session.model.config)
    assert not session.step(**{CACHE: EncoderDecoderCache(*empty)})[1] and calls == [1]
    session.cache = filled
    assert session.step()[1] and calls == [1, 1]
    decoder.block[0].register_forward_hook(lambda *given: None)
    assert not session.step()[1] and calls == [1, 1, 1]


def test_another_forward_of_the_decoder_is_called(
    device: torch.device, steps: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(device, steps)
    kind, before, calls = type(session.model.decoder), type(session.model.decoder).forward, []

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return before(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", forward)
        session.step()
        assert calls == [1]
    session.model.decoder.forward = lambda *arguments, **named: forward(session.model.decoder, *arguments, **named)
    session.step()
    assert calls == [1, 1]
    del session.model.decoder.forward
    session.step()
    assert calls == [1, 1]


def test_gradients_are_the_modules_matter(session: Session, steps: list) -> None:
    count = len(steps)
    with torch.enable_grad():
        output = session.model(
            **session.inputs, decoder_input_ids=session.ids, use_cache=True, **{CACHE: session.cache}
        )
    assert output.logits.requires_grad and len(steps) == count


def test_dropout_is_the_modules_matter(device: torch.device, steps: list) -> None:
    session = Session(device, steps)
    for module in session.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    assert session.step()[1]
    session.model.decoder.block[0].layer[2].dropout.train()
    assert not session.step()[1]


def test_other_caches_are_the_modules_matter(device: torch.device, steps: list) -> None:
    model, inputs = make_model(device), documents(device)
    config = model.config.get_text_config(decoder=True)
    caches = {
        "of Transformers": {CACHE: EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))},
        "static": {"cache_implementation": "static", "disable_compile": True},
    }
    for options in caches.values():
        generate(model, inputs, max_new_tokens=3, min_new_tokens=3, **options)
    assert not steps


def test_a_mask_of_another_length_is_refused(session: Session) -> None:
    with pytest.raises(ValueError, match="decoder_attention_mask"):
        session.step(decoder_attention_mask=torch.ones(2, 1, device=session.ids.device))


@pytest.fixture(params=["in C", "in Python"])
def look(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How plain blocks are looked at: both ways must see the same."""
    if request.param == "in Python":
        monkeypatch.setattr(layer_plain, "weights_as_seen", lambda: None)
    elif layer_plain.weights_as_seen() is None:
        pytest.skip("there is no compiler of C")


@pytest.fixture
def block(look: None) -> Iterator[nn.Module]:
    yield tiny_model(num_layers=1, num_decoder_layers=1).decoder.block[0]


class OtherLinear(nn.Linear):
    pass


def test_a_block_is_plain_until_it_is_changed_and_after(block: nn.Module) -> None:
    attention, cross, feed_forward = block.layer
    assert read_plain(block) is not None

    def reads_as_modules(module: Any, name: str, value: Any) -> None:
        is_own = name in module.__dict__ or name in module._modules or name in module._parameters
        before = getattr(module, name)
        setattr(module, name, value)
        assert read_plain(block) is None, name
        if is_own:
            setattr(module, name, before)
        else:
            delattr(module, name)
        assert read_plain(block) is not None, name

    reads_as_modules(attention.SelfAttention.o, "forward", lambda states: states)
    reads_as_modules(block, "forward", lambda states: states)
    linear = attention.SelfAttention.q
    reads_as_modules(attention.SelfAttention, "q", OtherLinear(linear.in_features, linear.out_features, bias=False))
    reads_as_modules(cross.EncDecAttention, "o", nn.Identity())
    reads_as_modules(feed_forward.DenseReluDense, "act", nn.ReLU())
    reads_as_modules(feed_forward.DenseReluDense.wo, "bias", nn.Parameter(torch.zeros(1)))
    # other numbers are other numbers of the same line
    cross.layer_norm.eps = 0.5
    plain, _ = read_plain(block)
    assert plain.eps[1] == 0.5


def test_a_patched_class_is_not_plain(block: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_plain(block) is not None
    for module in (block, block.layer[0].SelfAttention, block.layer[1], block.layer[2].DenseReluDense):
        kind, before = type(module), type(module).forward
        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", lambda self, *arguments, before=before: before(self, *arguments))
            assert read_plain(block) is None
        assert read_plain(block) is not None


def test_blocks_that_were_never_plain_are_not() -> None:
    for fields in (
        {"feed_forward_proj": "relu"},
        {"routed_cross_key_values": 4, "asking_cross_routing": True, "num_cross_key_value_heads": 1},
    ):
        model = tiny_model(num_layers=1, num_decoder_layers=1, **fields)
        assert read_plain(model.decoder.block[0]) is None


def test_adapters_are_not_plain_and_merged_ones_are(look: None) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model(num_layers=1, num_decoder_layers=1)
    block = model.decoder.block[0]
    assert read_plain(block) is not None
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q", "v"]))
    assert read_plain(block) is None
    adapted.merge_and_unload()
    assert read_plain(block) is not None


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
     "register_full_backward_pre_hook"],
)  # fmt: skip
def test_a_hook_on_any_module_is_seen(block: nn.Module, register: str) -> None:
    cross = block.layer[1].EncDecAttention
    # nobody calls a list, and the memory's keys and values are made by modules
    others = {part for part in block.modules() if isinstance(part, nn.ModuleList)} | {cross.k, cross.v}
    for module in set(block.modules()) - others:
        handle = getattr(module, register)(lambda *given: None)
        assert read_plain(block) is None, module
        handle.remove()
        assert read_plain(block) is not None, module


def test_numbers_are_compared_by_value(block: nn.Module) -> None:
    layer, _ = read_plain(block)
    norm = block.layer[2].layer_norm
    # another object of the same value is no change
    norm.eps = float(repr(norm.eps))
    assert read_plain(block)[0] is layer
    norm.eps *= 2
    assert read_plain(block)[0].named["ff.layer_norm", "eps"] == norm.eps


def test_a_stack_follows_its_blocks(look: None) -> None:
    """Other blocks, another order, other sublayers: what was read before does not stand for them."""
    blocks = tiny_model(num_layers=1, num_decoder_layers=3).decoder.block
    stack = PlainStack()

    def assert_read() -> None:
        for _ in range(2):
            read = stack.read(blocks, PLAIN)
            assert read is not None and len(read) == len(blocks)
            for block, (layer, weights) in zip(blocks, read, strict=True):
                by_name = dict(zip(layer.weighted, weights, strict=True))
                assert by_name["self.q"] is block.layer[0].SelfAttention.q.weight
                assert by_name["cross.o"] is block.layer[1].EncDecAttention.o.weight
                assert by_name["dense.wo"] is block.layer[2].DenseReluDense.wo.weight

    assert_read()
    blocks[0], blocks[2] = blocks[2], blocks[0]
    assert_read()
    blocks[1].layer, blocks[2].layer = blocks[2].layer, blocks[1].layer
    assert_read()
    blocks[1].layer[0].SelfAttention.q.weight = nn.Parameter(torch.zeros(32, 32))
    assert_read()
    del blocks[1]
    assert_read()
    handle = blocks[0].register_forward_hook(lambda *given: None)
    assert stack.read(blocks, PLAIN) is None
    handle.remove()
    assert_read()
    blocks.append(nn.Identity())
    assert stack.read(blocks, PLAIN) is None
    other = copy.deepcopy(stack)
    del blocks[2]
    assert other.read(blocks, PLAIN) is not None
    assert_read()


def test_threads_read_a_stack_at_the_same_time() -> None:
    fields = {"num_layers": 1, "num_decoder_layers": 2}
    stacks = {eps: tiny_model(**fields, layer_norm_epsilon=eps).decoder.block for eps in (1e-6, 1e-3)}
    stack = PlainStack()

    def read_often(eps: float) -> bool:
        """Whether all that was read was of the blocks that were asked for."""
        blocks = stacks[eps]
        for _ in range(3000):
            read = stack.read(blocks, PLAIN)
            assert read is not None
            if {eps for layer, _ in read for eps in layer.eps} != {eps}:
                return False
            if any(
                weights[0] is not block.layer[0].layer_norm.weight
                for block, (_, weights) in zip(blocks, read, strict=True)
            ):
                return False
        return True

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(read_often, [1e-6, 1e-3, 1e-6]))
    finally:
        sys.setswitchinterval(interval)


def test_modes_that_take_the_modules() -> None:
    states = torch.zeros(2, 1, 8)

    def may_run(states: torch.Tensor) -> bool:
        return layer_decoder.may_run_straight(states, Mode.of_now(states))

    with torch.no_grad():
        assert may_run(states)
        assert not may_run(states.half()) and not may_run(states.double())
        torch.use_deterministic_algorithms(True)
        try:
            assert not may_run(states)
        finally:
            torch.use_deterministic_algorithms(False)
        with torch.autograd.forward_ad.dual_level():
            assert not may_run(states)
        with torch._subclasses.FakeTensorMode():
            assert not may_run(states)
    assert not may_run(states)


# tensors that tokens share


def test_tensors_of_a_step_stay_while_they_fit() -> None:
    buffers, cpu = StepBuffers(), torch.device("cpu")
    first = buffers.empty("mask", (2, 6), torch.bool, cpu)
    assert first.shape == (2, 6) and first.is_contiguous()
    # a mask that grows, and fewer rows
    for shape in ((2, 7), (2, 12), (1, 3)):
        assert buffers.empty("mask", shape, torch.bool, cpu).data_ptr() == first.data_ptr()
    source = torch.arange(6.0).view(3, 2).t()
    copied = buffers.copy("states", source)
    assert torch.equal(copied, source) and copied.is_contiguous()
    for shape, dtype in (((2, 13), torch.bool), ((2, 6), torch.float32)):
        other = buffers.empty("mask", shape, dtype, cpu)
        assert other.data_ptr() != first.data_ptr() and other.dtype == dtype and other.shape == shape
    with torch.inference_mode():
        inside = buffers.copy("states", source)
        assert inside.is_inference()
    assert not buffers.copy("states", source + 1).is_inference()


@pytest.mark.parametrize("way", ["inference mode first", "deep copy", "shallow copy", "fewer rows"])
@torch.no_grad()
def test_a_cache_goes_on_whatever_was_done_with_it(way: str, device: torch.device, steps: list) -> None:
    """Its tensors for a step were made by the tokens before."""
    model, ids = make_model(device, CoLT5ForCausalLM), random_ids(2, 8).to(device)
    # PyTorch's `inference_mode(False)` would turn gradients on
    with torch.inference_mode() if way == "inference mode first" else nullcontext():
        cache = model(ids[:, :4], use_cache=True)[CACHE]
        model(ids[:, 4:5], use_cache=True, **{CACHE: cache})
    other = None
    if way == "deep copy":
        other = copy.deepcopy(cache)
    elif way == "shallow copy":
        other = copy.copy(cache)
        other.layers = [copy.copy(layer) for layer in cache.layers]
    elif way == "fewer rows":
        cache.batch_select_indices(torch.tensor([1], device=device))
        ids = ids[1:]
    expected = as_torch(model, lambda: model(ids).logits)
    for place in (5, 6):
        logits = model(ids[:, place : place + 1], use_cache=True, **{CACHE: cache}).logits
        torch.testing.assert_close(logits, expected[:, place : place + 1], rtol=0, atol=TOLERANCE)
        if other is not None:
            logits = model(ids[:, 7:8], use_cache=True, **{CACHE: other}).logits
            skipped = torch.cat([ids[:, :5], *[ids[:, 7:8]] * (place - 4)], 1)
            alone = as_torch(model, lambda skipped=skipped: model(skipped).logits[:, -1:])
            torch.testing.assert_close(logits, alone, rtol=0, atol=TOLERANCE)
    # all single tokens, with either cache
    assert len(steps) == (5 if other is not None else 3)


# lists of launches


class ClearedAtOnce(dict):
    """As if another thread, for which there are too many kinds, cleared them after each look and each change."""

    def __contains__(self, key: object) -> bool:
        found = super().__contains__(key)
        self.clear()
        return found

    def __setitem__(self, key: object, value: object) -> None:
        self.clear()


def test_another_thread_may_clear_the_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_decoder, "lists_by_kind", ClearedAtOnce())
    assert [layer_decoder.lists_of("kind", lambda: ["made"]) for _ in range(2)] == [["made"]] * 2


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the calls above are repeated from lists themselves")
@pytest.mark.parametrize("kind", ["decoder prompt", "language model"])
def test_lists_are_repeated_for_all_layers_and_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    repeated: list[str] = []
    monkeypatch.setattr(run_launch_list_triton, "launcher", interpreting_launcher(monkeypatch, repeated))
    monkeypatch.setattr(layer_decoder, "lists_by_kind", {})
    monkeypatch.setattr(layer_decoder, "may_repeat", lambda states: True)
    model_class, make_inputs, fields = KINDS[kind]
    device = torch.device("cpu")
    model, inputs = make_model(device, model_class, num_decoder_layers=3, **fields), make_inputs(device)
    monkeypatch.setattr(run_growing_cache, "BLOCK", 8)
    output = generate(model, inputs)
    logits = torch.stack(output.logits)
    torch.testing.assert_close(logits, recomputed(model, inputs, output.sequences), rtol=0, atol=TOLERANCE)
    # one run of like layers: of each room of the cache the first layer is noted
    runs = [run for runs in layer_decoder.lists_by_kind.values() for run in runs]
    noted = len(runs)
    assert noted == 2 and all((first, end) == (0, 3) and lists[None] is not None for lists, first, end in runs)
    has_memory = model.config.is_encoder_decoder
    assert repeated.count("step_attention_kernel") == (3 * (NEW_TOKENS - 1) - noted) * (2 if has_memory else 1)
    assert repeated.count("step_products_kernel") == (3 * (NEW_TOKENS - 1) - noted) * (6 if has_memory else 4)
    # one room has three tokens: the launches of the third come again as they were, and are a graph
    assert repeated.count("graph") == 1
    # all launches of a layer, where keys are not split
    assert len(repeated) - 1 == (3 * (NEW_TOKENS - 1) - noted) * (8 if has_memory else 5)


# on a card


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_both_roads_give_the_same_on_a_card(dtype: torch.dtype, rows: int, steps: list, monkeypatch: Any) -> None:
    """Sizes of a small model, over the end of a block and a memory that is split."""
    monkeypatch.setattr(run_growing_cache, "BLOCK", 16)
    sizes = {"d_model": 256, "d_kv": 64, "num_heads": 4, "d_ff": 512, "num_decoder_layers": 3}
    model = make_model(torch.device("cuda"), **sizes).to(dtype)
    document = {"input_ids": random_ids(rows, 3000).cuda(), "attention_mask": torch.ones(rows, 3000).long().cuda()}
    document["attention_mask"][-1, 2900:] = 0
    inputs = encoded(model, document)
    ids = random_ids(rows, 24).cuda()

    def call() -> torch.Tensor:
        cache, logits = None, []
        for part in ids.split(1, 1):
            output = model(**inputs, decoder_input_ids=part, use_cache=True, **{CACHE: cache})
            cache = output[CACHE]
            logits.append(output.logits)
        return torch.cat(logits, 1)

    expected = as_modules(call)
    for _ in range(2):
        assert_same_but_for_rounding(call(), expected)
    assert len(steps) == 2 * 23
