"""torch.onnx.export of the encoder and its heads, run by onnxruntime at other batches and lengths; torch.jit.trace."""

from pathlib import Path

import pytest
import torch
from models import ENCODER_HEADS, pad, random_ids, tiny_model

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


@pytest.mark.parametrize("model_class", (CoLT5EncoderModel, CoLT5ForConditionalGeneration))
def test_jit_trace_names_what_works(model_class):
    model = tiny_model(model_class)
    model.config.return_dict = False
    ids = random_ids(1, 20)
    inputs = (ids, torch.ones_like(ids), ids[:, :3])[: 2 if model_class is CoLT5EncoderModel else 3]
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"torch\.export"):
        torch.jit.trace(model, inputs, strict=False)
