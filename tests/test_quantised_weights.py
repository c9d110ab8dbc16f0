"""Weights that are not plain tensors: called as modules, on inputs short and long enough to join projections."""

import copy

import pytest
import torch
from models import random_ids, tiny_model
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from modeling_colt5 import CoLT5ForCausalLM, CoLT5ForConditionalGeneration, CoLT5ForSequenceClassification

MODELS = [CoLT5ForConditionalGeneration, CoLT5ForCausalLM, CoLT5ForSequenceClassification]
# 4-bit weights come in groups of up to 64 inputs and 32 outputs
SIZES = {"d_model": 64, "d_kv": 32, "d_ff": 64, "light_d_ff": 64, "heavy_d_ff": 128}
SIZES |= dict.fromkeys(("num_light_heads", "num_heavy_heads", "num_heads"), 2)


def run(model, ids):
    """The logits, whichever the head."""
    extra = {"decoder_input_ids": ids[:, :7]} if isinstance(model, CoLT5ForConditionalGeneration) else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits


def assert_near(small, plain, spread):
    """A short input, and one long enough that plain weights are joined: the logits differ by less than a part of their
    standard deviation."""
    for length in (12, 300):
        ids = random_ids(2, length).to(plain.device)
        expected = run(plain, ids)
        assert (run(small, ids) - expected).std() < spread * expected.std()


def assert_rounds_weights_alone(small, plain):
    """As a plain model whose weights are rounded alike, but for fp32 products in another order."""
    rounded, weights = dict(copy.deepcopy(plain).named_modules()), 0
    for name, part in small.named_modules():
        if hasattr(getattr(part, "weight", None), "dequantize") and type(part.weight) is not nn.Parameter:
            rounded[name].weight.data = part.weight.dequantize().float()
            weights += 1
    assert weights == sum(type(part) is nn.Linear for part in plain.modules())
    assert_near(small, rounded[""], 1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("model_class", MODELS)
def test_quantize_dynamic(model_class):
    torch.manual_seed(0)
    plain = tiny_model(model_class, **SIZES)
    small = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
    # activations are rounded too, by less than a percent, and a token routed or not changes a little; a wrong product
    # would change as much as there is
    assert_near(small, plain, 0.3)


# how torchao keeps weights, and whether that rounds them alone
TORCHAO = {
    "Int8WeightOnlyConfig": True,
    "IntxWeightOnlyConfig": True,
    "Float8WeightOnlyConfig": True,
    "Int8DynamicActivationInt8WeightConfig": False,
}


def torchao_config(name):
    quantization = pytest.importorskip("torchao.quantization")
    fields = {}
    if name == "IntxWeightOnlyConfig":
        fields = {"weight_dtype": torch.int4, "granularity": quantization.granularity.PerGroup(32)}
    return getattr(quantization, name)(**fields)


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("name", TORCHAO)
def test_torchao(model_class, name):
    config = torchao_config(name)
    torch.manual_seed(0)
    plain = tiny_model(model_class, **SIZES)
    small = copy.deepcopy(plain)
    pytest.importorskip("torchao.quantization").quantize_(small, config)
    if TORCHAO[name]:
        assert_rounds_weights_alone(small, plain)
    else:
        assert_near(small, plain, 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHAO)
def test_torchao_by_transformers(name, tmp_path):
    config = TorchAoConfig(torchao_config(name))
    torch.manual_seed(0)
    plain = tiny_model(**SIZES)
    plain.save_pretrained(tmp_path)
    small = type(plain).from_pretrained(tmp_path, quantization_config=config).eval()
    # it leaves the head as it is
    assert type(small.lm_head.weight) is nn.Parameter
    assert type(small.encoder.block[0].layer[1].light_feed_forward.wi_0.weight) is not nn.Parameter
    assert_near(small, plain, 0.3)


@pytest.mark.gpu
@pytest.mark.parametrize("model_class", MODELS)
def test_products_in_float8(model_class, device):
    """Of weights and activations, on cards that have them."""
    quantization = pytest.importorskip("torchao.quantization")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("products in float8 need compute capability 8.9")
    torch.manual_seed(0)
    plain = tiny_model(model_class, **SIZES).to(device, torch.bfloat16)
    small = copy.deepcopy(plain)
    # CUDA multiplies matrices in float8 whose sizes are multiples of 16
    quantization.quantize_(
        small,
        quantization.Float8DynamicActivationFloat8WeightConfig(),
        filter_fn=lambda part, name: type(part) is nn.Linear and not any(size % 16 for size in part.weight.shape),
    )
    linear = [part for part in small.modules() if type(part) is nn.Linear]
    assert any(type(part.weight) is not nn.Parameter for part in linear)
    assert_near(small, plain, 0.5)


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("name", ["qint8", "qint4"])
def test_quanto(model_class, name):
    quanto = pytest.importorskip("optimum.quanto")
    torch.manual_seed(0)
    plain = tiny_model(model_class, **SIZES)
    small = copy.deepcopy(plain)
    quanto.quantize(small, weights=getattr(quanto, name))
    quanto.freeze(small)
    assert_rounds_weights_alone(small, plain)


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(model_class, bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    # the CPU's products in 4 bits have a multiple of 32 outputs, those of a classifier too
    plain = tiny_model(model_class, **SIZES, num_labels=32)
    plain.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    small = type(plain).from_pretrained(tmp_path, quantization_config=config, device_map="cpu").eval()
    # 4 bits round weights by some ten percent
    assert_near(small, plain, 0.3 if bits == 8 else 1.0)


@pytest.mark.parametrize("asked", [{"tp_plan": "auto"}, {"tp_size": 2}])
def test_tensor_parallelism_is_refused(asked, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no plan for tensor parallelism"):
        CoLT5ForConditionalGeneration.from_pretrained(tmp_path, **asked)
