"""Other ways of routing in the gym: each runs, differs from the package's, and leaves the package as it was."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import router_gym  # noqa: E402
import router_variants  # noqa: E402
from router_gym import Run, Settings  # noqa: E402
from router_variants import NullLayer, Variant, selecting  # noqa: E402

from modeling_colt5 import model_from_config  # noqa: E402
from modeling_colt5.model_router import CoLT5Routing  # noqa: E402

SETTINGS = Settings(d_model=32, d_kv=8, batch=2, eval_every=2, eval_rows=4, start_rows=2)


# seven trainings of toys
@pytest.mark.slow
def test_every_variant_runs_and_none_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_variants, "FACTS", 8)
    arguments = ["--out", str(tmp_path), "--length", "512", "--steps", "3", "--seeds", "0", "--budgets", "16"]
    for _ in range(2):
        router_variants.main(arguments, SETTINGS)
    lines = [json.loads(line) for line in (tmp_path / router_variants.FILE).read_text().splitlines()]
    assert [line["variant"] for line in lines] == [
        "base", "straight_through", "line", "gumbel", "nulls", "shared", "asking",
    ]  # fmt: skip
    assert all(0 <= line["accuracy"] <= 1 for line in lines)


def test_a_run_leaves_the_package_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, make_layer = CoLT5Routing.forward, model_from_config.encoder_attention
    seen = []

    def trained(run: Run, settings: Settings, device: torch.device) -> dict:
        config = router_gym.make_config(run, settings)
        seen.append((CoLT5Routing.forward, model_from_config.encoder_block(config, 0).layer[0], config))
        return {"curve": []}

    monkeypatch.setattr(router_gym, "train", trained)
    run = Run("facts", "as_shipped", 128, 1 / 16, 0, 1)
    for name in ("nulls", "line"):
        router_variants.train(name, run, SETTINGS, torch.device("cpu"))
    (own_forward, attention, _), (_, _, config) = seen
    assert own_forward is not forward and isinstance(attention, NullLayer) and attention.heavy_attention.null.any()
    assert (config.soft_topk_solver, config.routing_epsilon_init) == ("coordinate_descent", 4.0)
    assert CoLT5Routing.forward is forward and model_from_config.encoder_attention is make_layer


def test_straight_through_weights_are_one_with_the_soft_top_ks_gradient() -> None:
    scores, budget = torch.randn(2, 30, requires_grad=True), torch.tensor([5, 3])
    routing = CoLT5Routing()
    _, weights, valid = routing(scores, budget, 5, None, {})
    _, ones, _ = selecting(Variant(straight_through=True))(routing, scores, budget, 5, None, {})
    torch.testing.assert_close(ones, valid.float())
    goal = torch.randn(2, 5)
    expected, ours = (torch.autograd.grad((part * goal * valid).sum(), scores)[0] for part in (weights, ones))
    torch.testing.assert_close(ours, expected)


def test_noise_is_of_training_alone() -> None:
    scores, budget, routing = torch.randn(1, 200), torch.tensor([20]), CoLT5Routing()
    noisy = selecting(Variant(noise=True))
    chosen = [noisy(routing.train(mode), scores, budget, 20, None, {})[0] for mode in (False, False, True)]
    assert torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[0], chosen[2])
