"""Learning rates relative to the parameters' sizes, against the first step of Transformers' Adafactor."""

import copy
import math

import pytest
import torch
from models import tiny_config
from transformers.optimization import Adafactor

from modeling_colt5 import CoLT5Model
from modeling_colt5.parameter_groups import size_scaled_groups


def test_rates_are_adafactors() -> None:
    model = CoLT5Model(tiny_config())
    with torch.no_grad():
        model.encoder.block[0].layer[0].layer_norm.weight.zero_()
    peer = copy.deepcopy(model)
    # a gradient of equal entries is normalised to ones: the update is the rate itself
    for parameter in peer.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer = Adafactor(
        peer.parameters(), lr=0.01, scale_parameter=True, relative_step=False, clip_threshold=1e9, eps=(1e-30, 1e-3)
    )
    before = [parameter.detach().clone() for parameter in peer.parameters()]
    optimizer.step()
    rates = {id(p): group["lr"] for group in size_scaled_groups(model, 0.01) for p in group["params"]}
    parameters = list(model.parameters())
    assert len(rates) == len(parameters)
    for parameter, start, after in zip(parameters, before, peer.parameters(), strict=True):
        update = (start - after.detach()).mean().item()
        # sizes are rounded to two digits
        assert rates[id(parameter)] == pytest.approx(update, rel=0.055)


def test_frozen_parameters_are_left_out() -> None:
    model = CoLT5Model(tiny_config())
    model.shared.requires_grad_(False)
    grouped = [id(parameter) for group in size_scaled_groups(model, 0.01) for parameter in group["params"]]
    # each of the others is in one group
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p is not model.shared.weight)


def test_what_cannot_be_trained_is_refused() -> None:
    model = torch.nn.Linear(2, 2)
    for rate in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"learning_rate is {rate}; it must be above 0 and finite"):
            size_scaled_groups(model, rate)
    for number in (math.nan, math.inf, -math.inf):
        with torch.no_grad():
            model.bias[0] = number
        with pytest.raises(ValueError, match=f"bias has a size of {abs(number)}"):
            size_scaled_groups(model, 0.1)
    with pytest.raises(ValueError, match="no parameter"):
        size_scaled_groups(model.requires_grad_(False), 0.1)


def test_a_parameter_without_numbers_has_a_rate() -> None:
    """As a rank's share of a sharded parameter may be."""
    model = torch.nn.ParameterList([torch.ones(3), torch.empty(0)])
    rates = {group["params"][0].numel(): group["lr"] for group in size_scaled_groups(model, 0.1)}
    assert rates == {3: 0.1, 0: pytest.approx(1e-4)}
