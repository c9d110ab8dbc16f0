"""Weights that are not plain tensors: called as modules, on inputs short and long enough to join projections."""

import copy

import pytest
import torch
from models import random_ids, tiny_model
from torch import nn
from transformers import BitsAndBytesConfig

from modeling_colt5 import CoLT5ForCausalLM, CoLT5ForConditionalGeneration, CoLT5ForSequenceClassification

MODELS = [CoLT5ForConditionalGeneration, CoLT5ForCausalLM, CoLT5ForSequenceClassification]
# 4-bit weights come in groups of up to 64 inputs
SIZES = {"d_model": 64, "d_kv": 16, "d_ff": 64, "light_d_ff": 64, "heavy_d_ff": 128}
SIZES |= dict.fromkeys(("num_light_heads", "num_heavy_heads", "num_heads"), 4)
# by bits, of the logits' spread: int8 rounds weights by less than a percent, int4 by some ten, and a token routed or not
# changes a little; a wrong product changes as much as there is
SPREAD = {8: 0.25, 4: 0.9}


def run(model, ids):
    """The logits, whichever the head."""
    extra = {"decoder_input_ids": ids[:, :7]} if isinstance(model, CoLT5ForConditionalGeneration) else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits


def assert_near(small, plain, bits):
    """A short input, and one long enough that plain weights are joined."""
    for length in (12, 300):
        ids = random_ids(2, length)
        expected = run(plain, ids)
        assert (run(small, ids) - expected).std() < SPREAD[bits] * expected.std()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("model_class", MODELS)
def test_quantize_dynamic(model_class):
    torch.manual_seed(0)
    plain = tiny_model(model_class, **SIZES)
    small = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
    assert_near(small, plain, 8)


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize(
    ("name", "bits"),
    [("Int8WeightOnlyConfig", 8), ("Int8DynamicActivationInt8WeightConfig", 8), ("IntxWeightOnlyConfig", 4)],
)
def test_torchao(model_class, name, bits):
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    plain = tiny_model(model_class, **SIZES)
    fields = {}
    if bits == 4:
        fields = {"weight_dtype": torch.int4, "granularity": quantization.granularity.PerGroup(32)}
    small = copy.deepcopy(plain)
    quantization.quantize_(small, getattr(quantization, name)(**fields))
    weights = [part.weight for part in small.modules() if type(part) is nn.Linear]
    assert weights and not any(type(weight) is nn.Parameter for weight in weights)
    assert_near(small, plain, bits)


@pytest.mark.parametrize(("name", "bits"), [("qint8", 8), ("qint4", 4)])
def test_quanto(name, bits):
    quanto = pytest.importorskip("optimum.quanto")
    torch.manual_seed(0)
    plain = tiny_model(**SIZES)
    small = copy.deepcopy(plain)
    quanto.quantize(small, weights=getattr(quanto, name))
    quanto.freeze(small)
    assert_near(small, plain, bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = tiny_model(**SIZES)
    plain.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    small = type(plain).from_pretrained(tmp_path, quantization_config=config, device_map="cpu").eval()
    assert_near(small, plain, bits)


@pytest.mark.parametrize("asked", [{"tp_plan": "auto"}, {"tp_size": 2}])
def test_tensor_parallelism_is_refused(asked, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no plan for tensor parallelism"):
        CoLT5ForConditionalGeneration.from_pretrained(tmp_path, **asked)
