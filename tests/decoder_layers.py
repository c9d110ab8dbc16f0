"""Models, batches and calls for the tests of a T5 decoder's straight lines: in parts, and as a whole."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import pad, random_ids, tiny_model
from torch import nn

from modeling_colt5 import CoLT5ForConditionalGeneration, kernel_backend, layer_decoder_parts


def model_of(device: torch.device, dtype: torch.dtype = torch.float32, model_class: Any = None, **fields: Any) -> Any:
    """A model whose encoder takes no part: "none" has light branches alone, which are the quickest."""
    fields = {"routing": "none", "num_layers": 1, "num_decoder_layers": 2} | fields
    return tiny_model(model_class or CoLT5ForConditionalGeneration, dtype, kernel_backend="triton", **fields).to(
        device
    )


def batch_of(device: torch.device, *lengths: int, masked: bool = True) -> dict[str, torch.Tensor]:
    """Inputs and labels of such lengths; those of the labels are half as many."""
    batch = pad([random_ids(length) for length in lengths])
    labels = pad([random_ids(1 + length // 2) for length in lengths])
    batch["labels"] = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
    if not masked:
        del batch["attention_mask"]
    return {name: tensor.to(device) for name, tensor in batch.items()}


def as_modules(call: Callable[[], Any]) -> Any:
    """What a call gives where all decoder blocks run as modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_decoder_parts, "enabled", False)
        return call()


def in_pytorch(call: Callable[[], Any]) -> Any:
    """What a call gives where PyTorch computes everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_backend, "FORCED_BACKEND", "torch")
        return call()


def gradients_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """The scores, and the gradients of all parameters for the loss."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    output = model(**batch)
    output.loss.backward()
    return {"scores": output.logits.detach(), **{name: part.grad for name, part in model.named_parameters()}}


def repeats(device: torch.device) -> range:
    """On a GPU the first call notes the launches that the others repeat."""
    return range(1 if device.type == "cpu" else 3)
