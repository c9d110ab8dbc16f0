"""The causally routed decoder as a model: causality, caches, generation, padding, training, saving."""

import copy
from typing import Any

import pytest
import torch
from models import checkpoint_activations, pad, random_ids, tiny_config
from rounding import assert_all_same_but_for_rounding, assert_same_but_for_rounding
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, StaticCache, Trainer, TrainingArguments

from modeling_colt5 import CoLT5ForCausalLM, CoLT5ForConditionalGeneration
from modeling_colt5.configuration_colt5 import CoLT5Config

# fp32 sums taken in another order over logits of size 1
TOLERANCE = 1e-5
WINDOW = 5
KINDS = {
    "routed": {},
    "two routers": {"num_causal_key_value_routers": 2, "causal_unrouted_vector": True, "causal_routed_keys": 5},
    "local": {"causal_attention": "local"},
    "wide radius": {"causal_feed_forward": "dense", "local_radius": 21, "causal_window": 3},
    "full": {"causal_attention": "full", "causal_feed_forward": "dense"},
}


def causal_config(**fields: Any) -> CoLT5Config:
    causal = {
        "causal_attention": "routed",
        "causal_feed_forward": "routed",
        "causal_window": WINDOW,
        "causal_routed_keys": 12,
        "num_heavy_heads": 4,
        "num_layers": 1,
        "num_decoder_layers": 2,
    }
    return tiny_config(**(causal | fields))


def make_model(**fields: Any) -> CoLT5ForCausalLM:
    """A tiny model whose routed branches change its logits by more than any tolerance here."""
    torch.manual_seed(0)
    model = CoLT5ForCausalLM(causal_config(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "heavy" in name and name.endswith((".o.weight", ".wo.weight")):
                parameter.mul_(3)
            if "unrouted" in name:
                parameter.normal_()
    return model


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def model(request: pytest.FixtureRequest) -> CoLT5ForCausalLM:
    return make_model(**request.param)


def make_cache(model: CoLT5ForCausalLM, kind: str, length: int) -> DynamicCache | StaticCache:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=length)


@torch.no_grad()
def decode(
    model: CoLT5ForCausalLM, batch: dict[str, torch.Tensor], chunks: list[int], cache: DynamicCache | StaticCache
) -> torch.Tensor:
    """Logits [batch, n, vocabulary] of a batch that comes in chunks."""
    logits, start = [], 0
    for chunk in chunks:
        ids, mask = batch["input_ids"][:, start : start + chunk], batch["attention_mask"][:, : start + chunk]
        logits.append(model(ids, attention_mask=mask, cache=cache, use_cache=True).logits)
        start += chunk
    return torch.cat(logits, 1)


@torch.no_grad()
@pytest.mark.usefixtures("float64_statistics")
def test_no_output_depends_on_a_later_token(model: CoLT5ForCausalLM) -> None:
    """In float64: its rounding is far below anything that a later token could add."""
    model.double()
    ids = random_ids(2, 5 * WINDOW + 3)
    logits = model(ids).logits
    for token in (1, WINDOW - 1, WINDOW, 2 * WINDOW + 3, 5 * WINDOW - 1, 5 * WINDOW + 2):
        changed = ids.clone()
        changed[:, token:] = random_ids(2, ids.shape[1] - token)
        changed[:, token] = (ids[:, token] + 1) % 90 + 3
        other = model(changed).logits
        assert_same_but_for_rounding(other[:, :token], logits[:, :token])
        assert (other[:, token] - logits[:, token]).abs().max() > 1e-3


@torch.no_grad()
def test_every_branch_takes_part() -> None:
    """A heavy branch that did nothing would make every other test here easy."""
    model = make_model()
    ids = random_ids(2, 5 * WINDOW)
    logits, routing = model(ids).logits, model(ids, output_routing=True).routing
    assert len(routing) == model.config.num_decoder_layers
    for layer, block in enumerate(model.decoder.block):
        assert (routing[layer].query[:, WINDOW:] > 0).any() and not (routing[layer].query[:, :WINDOW] > 0).any()
        assert (routing[layer].feed_forward > 0).any()
        for heavy in (block.layer[0].heavy_attention.o, block.layer[1].heavy_feed_forward.wo):
            kept = heavy.weight.clone()
            heavy.weight.zero_()
            assert (model(ids).logits - logits).abs().max() > 100 * TOLERANCE
            heavy.weight.copy_(kept)


# half a second each: every kind of model meets every prompt, and both kinds of caches
@pytest.mark.parametrize(
    ("model", "prompt", "cache"),
    [
        pytest.param(
            fields, prompt, ("dynamic", "static")[(row + column) % 2], id=f"{kind}-{prompt}",
            marks=pytest.mark.slow if (row + column) % 3 else (),
        )
        for row, (kind, fields) in enumerate(KINDS.items())
        for column, prompt in enumerate((1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW))
    ],
    indirect=["model"],
)  # fmt: skip
def test_token_by_token_is_the_parallel_forward(model: CoLT5ForCausalLM, prompt: int, cache: str) -> None:
    ids = random_ids(2, 5 * WINDOW + 3)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rest = ids.shape[1] - prompt
    logits = decode(model, batch, [prompt, *[1] * rest], make_cache(model, cache, ids.shape[1]))
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
# token by token has a test of its own
@pytest.mark.parametrize("chunks", [[44], [7, 1, 9, 1, 1, 20, 5], pytest.param([30, 14], marks=pytest.mark.slow)])
def test_padded_rows_are_the_rows_alone(model: CoLT5ForCausalLM, side: str, chunks: list[int]) -> None:
    rows = [random_ids(n) for n in (44, 31, 3)]
    batch = pad(rows, side)
    logits = decode(model, batch, chunks, make_cache(model, "dynamic", 44))
    for row, ids in enumerate(rows):
        part = slice(0, len(ids)) if side == "right" else slice(44 - len(ids), 44)
        torch.testing.assert_close(logits[row, part], model(ids[None]).logits[0], rtol=0, atol=TOLERANCE)


def test_padding_between_prompt_and_continuation() -> None:
    """As after prompts padded on the right: the continuation stands at later positions and at the next ranks."""
    model = make_model()
    prompts = [random_ids(n) for n in (20, 13)]
    batch = pad(prompts, "right")
    more = random_ids(2, 14)
    batch = {
        "input_ids": torch.cat([batch["input_ids"], more], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(more)], 1),
    }
    logits = decode(model, batch, [20, *[1] * 14], make_cache(model, "dynamic", 34))
    for row, prompt in enumerate(prompts):
        alone = model(torch.cat([prompt, more[row]])[None]).logits[0]
        torch.testing.assert_close(logits[row, 20:], alone[len(prompt) :], rtol=0, atol=TOLERANCE)


def generate(model: CoLT5ForCausalLM, batch: dict[str, torch.Tensor], **options: Any) -> Any:
    torch.manual_seed(0)
    fixed = {"max_new_tokens": 3 * WINDOW, "min_new_tokens": 3 * WINDOW, "do_sample": False}
    return model.generate(**batch, **(fixed | options), return_dict_in_generate=True, output_logits=True)


@torch.no_grad()
def recomputed(
    model: CoLT5ForCausalLM, sequences: torch.Tensor, prompts: list[torch.Tensor], start: int
) -> torch.Tensor:
    """Logits before each new token, each row without padding and without a cache."""
    rows = []
    for row, prompt in zip(sequences, prompts, strict=True):
        ids = torch.cat([prompt, row[start:]])
        rows.append(model(ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1])
    return torch.stack(rows)


# half a second each: a kind of model meets both caches, both sides and both choices; the other two pairs are slow
@pytest.mark.parametrize(
    ("cache", "side", "choice"),
    [
        ("dynamic", "left", "greedy"),
        ("static", "right", "sample"),
        pytest.param("dynamic", "right", "sample", marks=pytest.mark.slow),
        pytest.param("static", "left", "greedy", marks=pytest.mark.slow),
    ],
)
def test_generation(model: CoLT5ForCausalLM, cache: str, side: str, choice: str) -> None:
    if side == "right" and model.config.causal_attention == "full":
        pytest.skip("full attention counts positions, and a decoder-only prompt has to be padded on the left")
    options = {"do_sample": True, "top_k": 20} if choice == "sample" else {}
    prompts = [random_ids(n) for n in (21, 9, 2)]
    output = generate(model, pad(prompts, side), cache_implementation=cache, disable_compile=True, **options)
    logits = torch.stack(output.logits, 1)
    # the first new token of a prompt padded on the right comes from the padding's logits, in any model
    first = 1 if side == "right" else 0
    expected = recomputed(model, output.sequences, prompts, 21)
    torch.testing.assert_close(logits[:, first:], expected[:, first:], rtol=0, atol=TOLERANCE)


# a static cache's rows are reordered in test_inside_the_encoder_decoder too
@pytest.mark.parametrize("cache", ["dynamic", pytest.param("static", marks=pytest.mark.slow)])
def test_beam_search(model: CoLT5ForCausalLM, cache: str) -> None:
    batch = pad([random_ids(n) for n in (21, 9, 2)], "left")
    # over the ends of at least one window
    lengths = {"max_new_tokens": WINDOW + 3, "min_new_tokens": WINDOW + 3}
    options = {"num_beams": 3, "num_return_sequences": 2, "disable_compile": True, **lengths}
    output = generate(model, batch, cache_implementation=cache, **options)
    uncached = generate(model, batch, use_cache=False, **options)
    assert torch.equal(output.sequences, uncached.sequences)
    # otherwise no beam was ever reordered
    assert (output.beam_indices[:, 1:] != output.beam_indices[:, :-1]).any()


# seven seconds each; a compiled step of routed cross-attention is in test_cross_routing.py
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "lengths"),
    [
        pytest.param({"routed_cross_key_values": 8}, (7, 3), id="encoder-decoder-rows"),
        pytest.param({"routed_cross_key_values": 8}, (7,), id="encoder-decoder-row"),
        pytest.param({}, (7, 3), id="causal-rows"),
        pytest.param({}, (7,), id="causal-row"),
    ],
)
def test_generate_compiles_one_step_for_all_tokens(fields: dict[str, int], lengths: tuple[int, ...]) -> None:
    """One graph, across windows and calls, of which only ids and mask are new tensors at every token. A CUDA graph for
    each token is what an integer that changes would cost; none at all, what one more tensor that is written to."""
    torch.manual_seed(0)
    model = make_model(num_decoder_layers=2)
    if fields:
        model = CoLT5ForConditionalGeneration(causal_config(num_decoder_layers=2, **fields)).eval()
    batch = pad([random_ids(n) for n in lengths], "left", length=9)
    compiled: list[list[Any]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiled.append(inputs)
        return graph.forward

    torch._dynamo.reset()
    settings = CompileConfig(backend=backend, mode=None, fullgraph=True)
    # for tests alone: `generate` compiles on accelerators
    settings._compile_all_devices = True
    for _ in range(2):
        output = generate(model, batch, cache_implementation="static", compile_config=settings)
        expected = generate(model, batch)
        torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), rtol=0, atol=TOLERANCE)
    assert len(compiled) == 1
    new = [part for part in compiled[0] if not getattr(part, "_dynamo_static_input_type", None)]
    mask = batch["attention_mask"].shape if fields else (len(lengths), 1)
    # an integer has no shape
    assert [getattr(part, "shape", part) for part in new] == [(len(lengths), 1), mask]


@pytest.mark.slow
@pytest.mark.parametrize(("window", "candidates"), [(3, 8), (WINDOW, 5)])
def test_prompt_lookup_and_assisted_decoding_are_greedy_decoding(window: int, candidates: int) -> None:
    """Wrong candidates are taken back, by the model and by the assistant that proposed them, also where there are more
    than a cache can take back."""
    model, options = make_model(causal_window=window), {"min_new_tokens": 10, "max_new_tokens": 10}
    # a prompt that repeats itself gives candidates, some of which are wrong
    batch = pad([random_ids(7).repeat(3)])
    greedy = generate(model, batch, **options).sequences
    assert torch.equal(generate(model, batch, **options, prompt_lookup_num_tokens=candidates).sequences, greedy)
    assistant, full = make_model(num_decoder_layers=1, causal_window=window), make_model(**KINDS["full"])
    assistant.generation_config.update(num_assistant_tokens=candidates, assistant_confidence_threshold=0.0)
    for main in (model, full):
        expected = generate(main, batch, **options).sequences
        assert torch.equal(generate(main, batch, **options, assistant_model=assistant).sequences, expected)


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 2 * WINDOW, 3 * WINDOW + 5])
def test_cropped_cache_goes_on_as_if_nothing_had_been(length: int) -> None:
    model = make_model()
    ids, others = random_ids(2, length + 2 * WINDOW)[:, : length + WINDOW], random_ids(2, length)
    expected = model(ids).logits
    reach = length if length < 2 * WINDOW else length - (length // WINDOW - 1) * WINDOW
    for removed in range(1, reach + 1):
        cache = make_cache(model, "dynamic", 0)
        kept = length - removed
        wrong = torch.cat([ids[:, :kept], others[:, kept:]], 1)
        model(wrong, cache=cache, use_cache=True)
        cache.crop(-removed)
        assert cache.get_seq_length() == kept
        logits = model(ids[:, kept:], cache=cache, use_cache=True).logits
        torch.testing.assert_close(logits, expected[:, kept:], rtol=0, atol=TOLERANCE)
    if reach < length:
        model(ids[:, :length], cache=(cache := make_cache(model, "dynamic", 0)), use_cache=True)
        with pytest.raises(ValueError, match=rf"at most {reach} tokens"):
            cache.crop(-(reach + 1))
        # and an error changes nothing
        logits = model(ids[:, length:], cache=cache, use_cache=True).logits
        torch.testing.assert_close(logits, expected[:, length:], rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_crop_again_and_again() -> None:
    model = make_model()
    ids = random_ids(1, 6 * WINDOW)
    expected = model(ids).logits
    cache = make_cache(model, "dynamic", 0)
    generator, start = torch.Generator().manual_seed(0), 0
    while start < ids.shape[1]:
        draw = int(torch.randint(1, WINDOW + 1, (), generator=generator))
        right = min(draw, ids.shape[1] - start)
        wrong = int(torch.randint(0, WINDOW - 1, (), generator=generator))
        chunk = torch.cat([ids[:, start : start + right], random_ids(1, wrong)], 1)
        logits = model(chunk, cache=cache, use_cache=True).logits
        torch.testing.assert_close(logits[:, :right], expected[:, start : start + right], rtol=0, atol=TOLERANCE)
        cache.crop(-wrong)
        start += right


@torch.no_grad()
def test_rows_of_the_cache_move() -> None:
    model = make_model()
    ids = random_ids(3, 2 * WINDOW + 5)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    more = random_ids(6, WINDOW)
    cases = {
        "reorder_cache": (torch.tensor([2, 0, 0]), torch.tensor([2, 0, 0])),
        "batch_repeat_interleave": (2, torch.tensor([0, 0, 1, 1, 2, 2])),
        "batch_select_indices": (torch.tensor([2, 1]), torch.tensor([2, 1])),
    }
    for name, (argument, rows) in cases.items():
        cache = make_cache(model, "dynamic", 0)
        decode(model, batch, [WINDOW + 3, *[1] * (WINDOW + 2)], cache)
        getattr(cache, name)(argument)
        after = more[: len(rows)]
        logits = model(after, cache=cache, use_cache=True).logits
        expected = model(torch.cat([ids[rows], after], 1)).logits[:, ids.shape[1] :]
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_reset_cache_is_as_new(kind: str) -> None:
    model = make_model()
    ids = random_ids(2, 3 * WINDOW)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    cache = make_cache(model, kind, ids.shape[1])
    decode(model, {name: part.flip(1) for name, part in batch.items()}, [ids.shape[1]], cache)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    logits = decode(model, batch, [WINDOW + 1, *[1] * (2 * WINDOW - 1)], cache)
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_size_of_the_cache_does_not_grow() -> None:
    model = make_model()

    def size(length: int) -> int:
        cache = make_cache(model, "dynamic", 0)
        model(random_ids(1, length), cache=cache, use_cache=True)
        layers = [[*layer.rings.values(), *layer.carried.values(), *layer.counters.values()] for layer in cache.layers]
        return sum(tensor.numel() for tensors in layers for tensor in tensors)

    assert size(1) == size(3 * WINDOW) == size(40 * WINDOW + 1) > 0


def test_cache_of_another_model_is_refused() -> None:
    model = make_model()
    with pytest.raises(TypeError, match=r"DynamicCache\(config=model.config\)"):
        model(random_ids(1, 3), cache=DynamicCache(), use_cache=True)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 2\)"):
        model(random_ids(1, 3), attention_mask=torch.ones(1, 2))


def test_layer_types_are_on_the_caches_copy_alone(tmp_path) -> None:
    config = causal_config()
    assert config.get_text_config(decoder=True).layer_types == ["colt5_routed"] * config.num_decoder_layers
    assert getattr(config, "layer_types", None) is None
    config.save_pretrained(tmp_path)
    assert CoLT5Config.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_causal_key_value_routers": 3}, "num_causal_key_value_routers is 3; it must divide num_heavy_heads"),
        ({"causal_attention": "full"}, "causal_feed_forward is 'routed' and causal_attention is 'full'"),
        ({"routing": "even"}, "routing is 'even' and soft_topk_solver is 'exact'; causal routing needs"),
        ({"causal_window": 0}, "causal_window"),
        ({"causal_capacity_ratio": 0.5}, "causal_capacity_ratio"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        causal_config(**fields)


def test_saved_and_loaded_by_the_auto_class(tmp_path) -> None:
    model = make_model(tie_word_embeddings=True)
    given = tiny_config(causal_attention="local")
    assert CoLT5ForCausalLM(given).config.is_encoder_decoder is False and given.is_encoder_decoder
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is CoLT5ForCausalLM and loaded.config.is_encoder_decoder is False
    ids = random_ids(2, 20)
    assert_same_but_for_rounding(loaded(ids).logits, model(ids).logits)
    assert loaded.lm_head.weight is loaded.shared.weight is loaded.decoder.embed_tokens.weight


def test_loss_is_the_next_tokens_and_keeps_what_is_asked() -> None:
    model = make_model()
    ids = random_ids(2, 20)
    labels = ids.clone()
    labels[0, :7] = -100
    output = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, output.logits[:, -3:])
    embeds = model.get_input_embeddings()(ids)
    assert_same_but_for_rounding(model(inputs_embeds=embeds).logits, output.logits)


@pytest.mark.slow
def test_trainer_learns_a_text_by_heart(tmp_path) -> None:
    torch.manual_seed(0)
    model = CoLT5ForCausalLM(causal_config(num_decoder_layers=2))
    text = random_ids(4, 3 * WINDOW)
    rows = [{"input_ids": row, "labels": row} for row in text for _ in range(8)]
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=20, learning_rate=2e-2, per_device_train_batch_size=4, report_to=[],
        gradient_accumulation_steps=2, use_cpu=True, disable_tqdm=True,
        save_strategy="no", logging_steps=20,
    )  # fmt: skip
    before = model(text, labels=text).loss.item()
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    # ln 96 = 4.6 before, and a text that is known by heart costs little
    assert before > 4 and model.eval()(text, labels=text).loss.item() < 0.5 * before


def test_checkpointing_changes_no_gradient() -> None:
    ids = random_ids(2, 3 * WINDOW + 1)
    gradients = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            checkpoint_activations(model)
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert_all_same_but_for_rounding(*gradients)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_near(dtype: torch.dtype, attn_implementation: str) -> None:
    model = make_model()
    model.set_attn_implementation(attn_implementation)
    batch = pad([random_ids(n) for n in (40, 11)], "left")
    expected = model(**batch).logits
    half = copy.deepcopy(model).to(dtype)
    logits = half(**batch).logits
    assert logits.isfinite().all()
    # a token whose score is within rounding of the threshold is routed in one and not in the other: most are not
    close = (logits - expected).abs().amax(-1) < 0.05 * expected.abs().max()
    assert close[batch["attention_mask"].bool()].double().mean() > 0.8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cache", "num_beams", "cross"),
    [
        ("static", 1, None),
        ("dynamic", 3, None),
        ("static", 3, 8),
        ("dynamic", 1, None),
        ("static", 3, None),
        ("dynamic", 3, 8),
    ],
)
def test_inside_the_encoder_decoder(cache: str, num_beams: int, cross: int | None) -> None:
    """Beside cross-attention to all of the encoder's output, and to routed tokens of it."""
    torch.manual_seed(0)
    config = causal_config(num_causal_key_value_routers=2, routed_cross_key_values=cross)
    model = CoLT5ForConditionalGeneration(config).eval()
    batch = pad([random_ids(n) for n in (30, 12)], "right")
    options = {"max_new_tokens": 3 * WINDOW, "min_new_tokens": 3 * WINDOW, "num_beams": num_beams, "do_sample": False}
    output = model.generate(**batch, **options, cache_implementation=cache, disable_compile=True)
    assert torch.equal(output, model.generate(**batch, **options, use_cache=False))
    with torch.no_grad():
        logits = model(**batch, decoder_input_ids=output, output_routing=True)
    assert len(logits.decoder_routing) == model.config.num_decoder_layers
    assert (logits.decoder_routing[0].query > 0).any()
    # both stacks learn, through both branches
    model.train()(**batch, labels=output).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.slow
def test_kernels_are_the_reference(device: torch.device) -> None:
    """The same gradients through the Triton kernels, interpreted on the CPU, as through PyTorch."""
    results = []
    for backend in ("torch", "triton"):
        model = make_model(kernel_backend=backend, num_decoder_layers=1, num_causal_key_value_routers=2).to(device)
        # what padding predicts is nobody's, so it stands where it predicts no real token
        batch = pad([random_ids(n) for n in (19, 10)])
        batch = {name: part.to(device) for name, part in batch.items()}
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        output = model(**batch, labels=labels)
        output.loss.backward()
        logits = output.logits.detach()[batch["attention_mask"].bool()]
        results.append([logits, *(parameter.grad for parameter in model.parameters())])
    for expected, actual in zip(*results, strict=True):
        # products of fp32 in another order, or TF32 on a GPU
        tolerance = (3e-2 if device.type == "cuda" else 1e-4) * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradients_of_a_chunk_behind_a_static_cache(backend: str, device: torch.device) -> None:
    """The cache is written in place in the call whose gradients are asked for; a dynamic one makes new tensors."""
    ids = random_ids(1, 3 * WINDOW).to(device)
    gradients = []
    for kind, of in (("dynamic", "torch"), ("static", backend)):
        model = make_model(kernel_backend=of, num_decoder_layers=1).to(device)
        cache = make_cache(model, kind, ids.shape[1])
        with torch.no_grad():
            model(ids[:, : 2 * WINDOW], cache=cache, use_cache=True)
        model(ids[:, 2 * WINDOW :], cache=cache, use_cache=True).logits.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        # products of fp32 in another order, or TF32 on a GPU
        tolerance = (3e-2 if device.type == "cuda" else 1e-4) * expected.abs().max().item()
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=tolerance, msg=name)
