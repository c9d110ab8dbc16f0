"""Nothing makes float64 tensors, which some devices (Apple's) do not have; models in float64 excepted."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_colt5 import CoLT5EncoderModel, CoLT5ForCausalLM, CoLT5ForConditionalGeneration, CoLT5Model
from modeling_colt5.op_routing import route
from modeling_colt5.op_soft_topk import soft_topk
from modeling_colt5.run_budgets import routed_budget, routed_capacity
from tests.models import ENCODER_HEADS, random_ids, shallow_model

CAUSAL = {
    "causal_attention": "routed",
    "causal_feed_forward": "routed",
    "causal_window": 8,
    "causal_routed_keys": 6,
    "num_heavy_heads": 4,
}
HEADS = [CoLT5EncoderModel, *ENCODER_HEADS, CoLT5Model, CoLT5ForConditionalGeneration, CoLT5ForCausalLM]


class RefuseFloat64(TorchDispatchMode):
    """Raises for any operation with a float64 tensor among what it takes or gives, as such a device does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{func} has a tensor of {tensor.dtype}")
        return result


def padded_batch() -> dict[str, torch.Tensor]:
    ids, mask = random_ids(2, 23), torch.ones(2, 23, dtype=torch.int64)
    mask[0, 17:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def labels_of(model_class: type, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What each head learns from; nothing for those that have no loss."""
    tokens = batch["input_ids"]
    return {
        "CoLT5Model": {"decoder_input_ids": tokens[:, :7]},
        "CoLT5ForConditionalGeneration": {"labels": tokens[:, :7]},
        "CoLT5ForCausalLM": {"labels": tokens},
        "CoLT5ForSequenceClassification": {"labels": torch.tensor([0, 1])},
        "CoLT5ForTokenClassification": {"labels": tokens % 2},
        "CoLT5ForQuestionAnswering": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
    }.get(model_class.__name__, {})


def test_the_mode_refuses():
    with RefuseFloat64():
        torch.ones(2).sum()
        for make in (lambda: torch.ones(2, dtype=torch.float64), lambda: torch.arange(3).double()):
            with pytest.raises(TypeError, match="float64"):
                make()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("model_class", HEADS, ids=lambda model_class: model_class.__name__)
def test_heads_train(model_class, dtype):
    model = shallow_model(model_class, dtype, dropout_rate=0.1, routed_cross_key_values=9, **CAUSAL).train()
    optimizer = torch.optim.AdamW(model.parameters())
    batch = padded_batch()
    with RefuseFloat64():
        outputs = model(**batch, **labels_of(model_class, batch), return_dict=True)
        loss = outputs.get("loss")
        loss = outputs[0].float().square().mean() if loss is None else loss
        loss.backward()
        optimizer.step()
    assert loss.isfinite()


@pytest.mark.slow
@pytest.mark.parametrize("options", ({}, {"num_beams": 2}, {"do_sample": True, "top_p": 0.9}), ids=str)
@pytest.mark.parametrize("model_class", HEADS[-2:], ids=lambda model_class: model_class.__name__)
def test_heads_generate(model_class, options):
    model = shallow_model(model_class, **CAUSAL)
    ids = random_ids(2, 23)
    mask = torch.ones_like(ids)
    # a causal model continues at the right end
    mask[0, :6] = 0
    with RefuseFloat64():
        generated = model.generate(ids, attention_mask=mask, max_new_tokens=4, **options)
    assert generated.shape[0] == 2


@pytest.mark.parametrize("solver", ("exact", "coordinate_descent"))
def test_routing(solver):
    scores = torch.randn(3, 40, requires_grad=True)
    lengths = torch.tensor([40, 17, 1])
    with RefuseFloat64():
        budget = routed_budget(lengths, 0.3, 1)
        routed = route(scores, budget, routed_capacity(40, 0.3, 1), lengths=lengths, solver=solver, num_iterations=5)
        weights = soft_topk(scores, 4.5, solver=solver, num_iterations=5)
        (routed.weights.sum() + weights.square().sum()).backward()
    assert scores.grad.isfinite().all()


def test_models_in_float64_stay_in_float64():
    model = shallow_model(CoLT5EncoderModel, torch.float64)
    states = model(**padded_batch()).last_hidden_state
    assert states.dtype == torch.float64
