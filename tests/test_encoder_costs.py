"""The costs of an encoder by formula: what PyTorch counts, and what autograd keeps."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_colt5 import CoLT5Config, CoLT5EncoderModel, CoLT5ForConditionalGeneration, CoLT5PreTrainedModel
from modeling_colt5.dense_start import MEMORY_LIMIT, DenseStartCosts
from modeling_colt5.encoder_costs import band_pairs, encoder_flops, kept_values


def encoder(attn_implementation: str = "sdpa", **fields: object) -> CoLT5EncoderModel:
    """Two layers with the base size's ratios between their parts, an eighth as wide."""
    ratios = {"d_model": 96, "d_kv": 8, "light_d_ff": 128, "heavy_d_ff": 1024, "num_layers": 2, "vocab_size": 96}
    config = CoLT5Config(**(ratios | {"dropout_rate": 0.0, "kernel_backend": "torch"} | fields))
    return CoLT5EncoderModel._from_config(config, attn_implementation=attn_implementation)


@pytest.mark.parametrize("n", [96, 300])
@pytest.mark.parametrize("dense", [False, True])
def test_flops_are_those_that_pytorch_counts(n: int, dense: bool) -> None:
    """The reference path takes blocks of 128 tokens with the radius to each side, and the routers' scores as sums of
    products, which PyTorch counts as no FLOPs; all else is the formula's."""
    model = encoder("eager", local_radius=20).train()
    model.set_dense_start(0.0 if dense else None)
    config, blocks = model.config, n // 128 + 1
    pairs = blocks * 128 * (128 + 2 * 20)
    expected = encoder_flops(config, n, light_pairs=pairs, dense=dense)
    expected -= model.config.num_layers * 3 * 2 * n * model.config.d_model
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(2, 96, (1, n)))
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize(("n", "radius"), [(1, 5), (7, 3), (7, 9), (40, 0), (40, 11)])
def test_pairs_within_the_band(n: int, radius: int) -> None:
    position = torch.arange(n)
    assert band_pairs(n, radius) == ((position[:, None] - position[None, :]).abs() <= radius).sum()


def kept(model: CoLT5PreTrainedModel, dense: bool, **inputs: torch.Tensor) -> int:
    """Bytes that autograd keeps of a call, each memory once and without the weights and the inputs."""
    model.set_dense_start(0.0 if dense else None)
    not_counted = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *inputs.values())}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # held, so that no address is used twice
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return sum(storage.nbytes() for address, storage in storages.items() if address not in not_counted)


@pytest.mark.parametrize(
    ("n", "fields"),
    [
        (2048, {}),
        (512, {"dropout_rate": 0.1}),
        # the kernels in Triton's interpreter, which takes ten seconds for so few tokens
        pytest.param(128, {"kernel_backend": "triton"}, marks=pytest.mark.slow),
    ],
    ids=["torch", "torch, dropout", "triton"],
)
def test_memory_of_a_dense_start_is_what_autograd_keeps(n: int, fields: dict[str, object]) -> None:
    """On the CPU: of so few tokens a GPU keeps as much beside the large tensors."""
    model = encoder(**fields).train()
    fused = fields.get("kernel_backend") == "triton"
    costs = DenseStartCosts.of(model.config, n, 0.25, fused_attention=fused)
    ids = torch.randint(2, 96, (1, n))
    measured = kept(model, True, input_ids=ids[:, : n // 4]) / kept(model, False, input_ids=ids)
    # the formula has the large tensors alone
    assert costs.memory == pytest.approx(measured, rel=0.15)


@pytest.mark.gpu
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_memory_of_a_dense_start_is_what_a_gpu_keeps(rate: float) -> None:
    n = 16_384
    model = encoder(kernel_backend="auto", d_model=384, d_kv=32, light_d_ff=512, heavy_d_ff=4096, dropout_rate=rate)
    model = model.train().to("cuda")
    ids = torch.randint(2, 96, (1, n), device="cuda")

    def allocated(dense: bool, inputs: torch.Tensor) -> int:
        model.set_dense_start(0.0 if dense else None)
        # the first call makes what later ones use again
        model(input_ids=inputs)
        before = torch.cuda.memory_allocated()
        states = model(input_ids=inputs).last_hidden_state
        assert states.requires_grad
        return torch.cuda.memory_allocated() - before

    measured = allocated(True, ids[:, : n // 4]) / allocated(False, ids)
    # the formula has the large tensors alone
    assert DenseStartCosts.of(model.config, n, 0.25).memory == pytest.approx(measured, rel=0.15)


# more routers are the same kernel, which the interpreter takes seconds for
@pytest.mark.slow
@pytest.mark.parametrize(("backend", "routers"), [("torch", 1), ("torch", 2), ("triton", 1)])
def test_memory_of_routed_cross_attention_is_what_autograd_keeps(backend: str, routers: int) -> None:
    """The difference between one decoder layer and two: of a target of one token, a layer's own tensors are small. On
    the CPU: of so few tokens a GPU keeps as much beside the large tensors."""
    sizes = {}
    for layers in (1, 2):
        config = CoLT5Config(
            vocab_size=96, d_model=96, d_kv=8, d_ff=96, num_layers=1, num_decoder_layers=layers, dropout_rate=0.0,
            kernel_backend=backend, routed_cross_key_values=256, num_cross_routers=routers,
            num_cross_key_value_heads=routers, use_cache=False,
        )  # fmt: skip
        model = CoLT5ForConditionalGeneration(config).train()
        # encoded already, as the interpreter takes long for an encoder
        inputs = {"decoder_input_ids": torch.ones(1, 1, dtype=torch.int64)}
        for dense, length in ((False, 384), (True, 192)):
            expected = kept_values(config, length, dense=dense, fused_attention=backend == "triton")
            inputs["encoder_outputs"] = torch.randn(1, length, 96)
            sizes[layers, dense] = (kept(model, dense, **inputs), 4 * expected)
    for dense in (False, True):
        measured, expected = (more - less for more, less in zip(sizes[2, dense], sizes[1, dense], strict=True))
        # the formula has the large tensors alone, and so few rows are not much larger than the layer's weights
        assert expected == pytest.approx(measured, rel=0.3), dense


def test_largest_share_is_the_largest_that_the_limit_allows() -> None:
    config = CoLT5Config()
    for length, fused, checkpointed in itertools.product((2048, 16_384), (True, False), (True, False)):
        how = {"fused_attention": fused, "checkpointed": checkpointed}
        share = DenseStartCosts.of(config, length, 1.0, **how).largest_share
        assert share is not None
        later = kept_values(config, length, **how)
        lengths = [-(-length * hundredth // 100) for hundredth in range(1, 101)]
        ratios = [kept_values(config, short, dense=True, **how) / later for short in lengths]
        assert round(100 * share) == sum(ratio <= MEMORY_LIMIT for ratio in ratios)
        if fused and not checkpointed:
            # the schedule's default on the device that trains
            assert DenseStartCosts.of(config, length, 0.25, **how).memory <= MEMORY_LIMIT
