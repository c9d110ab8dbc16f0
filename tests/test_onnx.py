"""torch.onnx.export of the encoder and its heads, run by onnxruntime at other batches and lengths; torch.jit.trace."""

from pathlib import Path

import pytest
import torch
from models import ENCODER_HEADS, pad, random_ids, tiny_model
from transformers import DynamicCache, EncoderDecoderCache

from modeling_colt5 import CoLT5EncoderModel, CoLT5ForConditionalGeneration

# whatever of these a model gives
OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")
# of PyTorch's exporter: what it calls itself, and that ids and mask share the names of their sizes
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:# The axis name:UserWarning"
)


class Exportable(torch.nn.Module):
    """Tensors in, tensors out."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return tuple(outputs[name] for name in OUTPUTS if name in outputs)


def check_exported(model: torch.nn.Module, folder: Path) -> None:
    """Export for any batch and length, with padding; compare where lengths pass those of a block and of a bucket."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    exportable = Exportable(model).eval()
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=1 << 14)
    example = tuple(pad([random_ids(64), random_ids(50)]).values())
    torch.onnx.export(
        exportable, example, folder / "model.onnx", dynamo=True, dynamic_shapes=({0: batch, 1: length},) * 2,
        verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [given.name for given in session.get_inputs()]
    for lengths in ((64, 50), (2,), (17,), (129, 127, 128), (1000, 400)):
        inputs = tuple(pad([random_ids(length) for length in lengths]).values())
        with torch.no_grad():
            expected = exportable(*inputs)
        found = session.run(None, {name: given.numpy() for name, given in zip(names, inputs, strict=True)})
        for ours, theirs in zip(map(torch.from_numpy, found), expected, strict=True):
            if ours.shape[:2] == inputs[1].shape:
                ours, theirs = ours[inputs[1].bool()], theirs[inputs[1].bool()]
            # fp32 sums in another order
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_one_onnx_encoder_serves_every_length_and_batch(tmp_path):
    """PyTorch traces in symbols, and translates some hundred operations of a layer."""
    check_exported(tiny_model(CoLT5EncoderModel, attn_implementation="eager", num_layers=1), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_class", ENCODER_HEADS)
def test_heads_in_onnx(model_class, tmp_path):
    """With "eager" attention: "sdpa" is not exported to ONNX yet."""
    check_exported(tiny_model(model_class, attn_implementation="eager"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    (
        {"routing": "even"},
        {"routing": "none"},
        {"soft_topk_solver": "coordinate_descent", "num_soft_topk_iterations": 4},
        {"feed_forward_proj": "relu"},
        {"min_routed_tokens": 7, "soft_topk_ratio": 1.3},
    ),
    ids=("even", "none", "coordinate descent", "relu", "minimum"),
)
def test_configurations_in_onnx(fields, tmp_path):
    check_exported(tiny_model(CoLT5EncoderModel, attn_implementation="eager", num_layers=1, **fields), tmp_path)


class WholeTarget(torch.nn.Module):
    """The logits of a target, without a cache."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, states: torch.Tensor, mask: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.model(
            encoder_outputs=(states,), attention_mask=mask, decoder_input_ids=target, use_cache=False
        ).logits


class NextToken(WholeTarget):
    """The logits of one token behind a cache, and the cache's self-attention with that token. A layer has four tensors
    in the cache: keys and values of self-attention, then of cross-attention."""

    def forward(
        self, states: torch.Tensor, mask: torch.Tensor, token: torch.Tensor, *cached: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        own, cross = DynamicCache(), DynamicCache()
        for layer in range(len(cached) // 4):
            own.update(*cached[4 * layer : 4 * layer + 2], layer)
            cross.update(*cached[4 * layer + 2 : 4 * layer + 4], layer)
        output = self.model(
            encoder_outputs=(states,),
            attention_mask=mask,
            decoder_input_ids=token,
            past_key_values=EncoderDecoderCache(own, cross),
            use_cache=True,
        )
        return output.logits, *(tensor for layer in own.layers for tensor in (layer.keys, layer.values))


def cached_tensors(cache: EncoderDecoderCache) -> list[torch.Tensor]:
    pairs = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
    return [tensor for pair in pairs for layer in pair for tensor in (layer.keys, layer.values)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
@pytest.mark.parametrize("is_step", [pytest.param(False, id="whole target"), pytest.param(True, id="token")])
@torch.no_grad()
def test_the_decoder_in_onnx(is_step, tmp_path):
    """One program for every batch, input and target gives PyTorch's logits of the whole target, computed anew. A token
    goes behind the tensors that the program gave for the token before."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = tiny_model(CoLT5ForConditionalGeneration, attn_implementation="eager", num_decoder_layers=2).eval()

    def document(lengths: tuple[int, ...], target: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch = pad([random_ids(length) for length in lengths])
        states = model.get_encoder()(**batch).last_hidden_state
        return states, batch["attention_mask"], random_ids(len(lengths), target)

    def cache_of(states: torch.Tensor, mask: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        given = {"encoder_outputs": (states,), "attention_mask": mask, "decoder_input_ids": target}
        return cached_tensors(model(**given, past_key_values=cache, use_cache=True).past_key_values)

    batch = torch.export.Dim("batch", min=1, max=64)
    length, past = (torch.export.Dim(name, min=2, max=4096) for name in ("length", "past"))
    states, mask, target = document((20, 16), 7)
    shapes: tuple = ({0: batch, 1: length},) * 2
    if is_step:
        cached = cache_of(states, mask, target[:, :-1])
        example = (states, mask, target[:, -1:], *cached)
        shapes += ({0: batch}, tuple({0: batch, 2: past if i % 4 < 2 else length} for i in range(len(cached))))
    else:
        example, shapes = (states, mask, target), (*shapes, {0: batch, 1: past})
    exportable = (NextToken if is_step else WholeTarget)(model).eval()
    torch.onnx.export(
        exportable, example, tmp_path / "model.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False
    )  # fmt: skip
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")

    def run(*inputs: torch.Tensor) -> list[torch.Tensor]:
        names = [given.name for given in session.get_inputs()]
        found = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
        return [torch.from_numpy(array) for array in found]

    for lengths, count in (((20, 16), 7), ((3, 130, 17), 40), ((9,), 12)):
        states, mask, target = document(lengths, count)
        expected = WholeTarget(model)(states, mask, target)
        if not is_step:
            (logits,) = run(states, mask, target)
        else:
            cached, steps = cache_of(states, mask, target[:, :-3]), []
            for place in range(count - 3, count):
                step, *own = run(states, mask, target[:, place : place + 1], *cached)
                steps.append(step)
                cached = [own[i // 4 * 2 + i % 4] if i % 4 < 2 else tensor for i, tensor in enumerate(cached)]
            logits, expected = torch.cat(steps, 1), expected[:, -3:]
        # fp32 sums in another order
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_class", (CoLT5EncoderModel, CoLT5ForConditionalGeneration))
def test_jit_trace_names_what_works(model_class):
    model = tiny_model(model_class)
    model.config.return_dict = False
    ids = random_ids(1, 20)
    inputs = (ids, torch.ones_like(ids), ids[:, :3])[: 2 if model_class is CoLT5EncoderModel else 3]
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"torch\.export"):
        torch.jit.trace(model, inputs, strict=False)
