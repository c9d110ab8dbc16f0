"""How many tokens are routed: the budgets' one formula against exact fractions, at every length that models have."""

from fractions import Fraction

import numpy
import pytest
import torch

from modeling_colt5 import CoLT5Config
from modeling_colt5.model_from_config import causal_settings
from modeling_colt5.run_budgets import routed_budget, routed_capacity, share_of

LENGTHS = 2**20
# the configuration's defaults, and those whose product with a length is most often close to an integer
SOME = (1 / 16, 1 / 8, 0.07, 0.3, 1 / 3, 0.1, 0.999999, 1 - 1e-12, 1e-9, 1.0)
ALL = sorted({p / q for q in (1, 2, 3, 7, 10, 16, 48, 100) for p in range(1, q + 1)})


def exact(length: int, fraction: float) -> int:
    """ceil(fraction · length - 1e-6) by Python's fractions."""
    return -(-(Fraction(fraction) * length - Fraction(1, 10**6)) // 1)


def check_every_length(fraction: float) -> None:
    shares = share_of(torch.arange(LENGTHS + 1), fraction)
    assert shares.dtype == torch.int64
    real = numpy.arange(LENGTHS + 1) * numpy.float64(fraction) - 1e-6
    nearest = numpy.rint(real)
    # float64 errs by at most 2^20 · 2^-52 here: only next to an integer can it be in doubt
    is_clear = abs(real - nearest) > 1e-9
    assert (shares.numpy() == numpy.ceil(real))[is_clear].all()
    doubtful = numpy.flatnonzero(~is_clear).tolist()
    assert [int(shares[length]) for length in doubtful] == [exact(length, fraction) for length in doubtful]
    for length in (1, 2, 3, 4095, 16384, 16385, 65536, LENGTHS - 1, LENGTHS):
        assert share_of(length, fraction) == shares[length] == exact(length, fraction)


@pytest.mark.parametrize("fraction", SOME)
def test_budgets_are_exact_at_every_length(fraction):
    check_every_length(fraction)


@pytest.mark.slow
def test_budgets_are_exact_at_every_length_for_many_fractions():
    for fraction in ALL:
        check_every_length(fraction)


@pytest.mark.parametrize("fraction", (1 / 16, 0.3, 1e-9, 1 - 2**-53, 2**-40, 1.0, 1.25, 7.3))
def test_budgets_are_exact_up_to_the_longest_length(fraction):
    lengths = [2**31 - 1, 2**31 - 16, 10**9, 999_999_937, 0]
    expected = [exact(length, fraction) for length in lengths]
    assert share_of(torch.tensor(lengths), fraction).tolist() == expected
    assert [share_of(length, fraction) for length in lengths] == expected


def test_a_slack_of_a_millionth_lies_where_it_should():
    """A product that is more than 1e-6 above an integer counts as one more, one at or below 1e-6 does not."""
    for beyond, expected in ((0.9e-6, 5), (1.1e-6, 6)):
        fraction = (5 + beyond) / 80
        assert share_of(80, fraction) == share_of(torch.tensor(80), fraction) == expected
        assert routed_capacity(80, fraction, 1) == routed_budget(torch.tensor([80]), fraction, 1) == expected


def test_budgets_take_lengths_of_any_integer_dtype():
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        budget = routed_budget(torch.tensor([0, 1, 100, 255 if dtype == torch.uint8 else 300], dtype=dtype), 0.3, 2)
        assert budget.tolist() == [0, 1, 30, 77 if dtype == torch.uint8 else 90]
        assert budget.dtype == torch.int64


def test_causal_windows_have_the_same_budgets():
    for window, fraction, ratio in ((48, 0.25, 1.25), (100, 0.07, 1.1), (10, 0.1, 3), (30, 1.0, 2.0)):
        config = CoLT5Config(
            causal_window=window, routed_query_fraction=fraction, causal_capacity_ratio=ratio, d_model=16, d_kv=4
        )
        settings = causal_settings(config)
        assert settings.num_queries == max(1, min(window, exact(window, fraction)))
        target = settings.num_queries
        assert settings.capacity(target) == min(window, exact(target, ratio))


def test_lengths_that_a_compiler_leaves_open_have_the_same_budgets():
    def capacities(states):
        n = states.shape[1]
        return [states.new_empty(routed_capacity(n, fraction, 1)) for fraction in (1 / 16, 0.3)]

    compiled = torch.compile(capacities, fullgraph=True, dynamic=True, backend="eager")
    for n in (100, 333, 1000, 4111):
        shapes = [tensor.shape[0] for tensor in compiled(torch.zeros(2, n))]
        assert shapes == [exact(n, fraction) for fraction in (1 / 16, 0.3)]
