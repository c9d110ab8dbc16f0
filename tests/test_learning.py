"""The study of docs/learning.md: what its runs read, what they cost, and how they are compared."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modeling_colt5.encoder_costs import encoder_flops

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "docs")]

import learning  # noqa: E402
import learning_picture  # noqa: E402

TINY = {"d_model": 32, "d_kv": 16, "num_layers": 1, "num_decoder_layers": 1, "length": 128, "batch": 2, "steps": 2}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of random tokens."""
    path = tmp_path_factory.mktemp("corpus") / "tokens.npz"
    random = np.random.default_rng(0)
    np.savez(path, **{split: random.integers(3, 7000, 2000, np.uint16) for split in ("train", "validation")})
    return path


@pytest.fixture
def batch(tokens: Path) -> dict[str, torch.Tensor]:
    """Four whole inputs of 512 tokens with their targets."""
    settings = learning.Settings(**TINY | {"length": 512})
    return learning.rows_of(learning.corrupted(np.load(tokens)["train"], 4, settings, 0, repeat=True), slice(4))


def spans(labels: torch.Tensor) -> list[list[int]]:
    """A target's spans, each from its sentinel on, without what is not asked for."""
    sentinels, found = set(learning.sentinel_ids()), []
    for token in labels[labels != -100].tolist():
        if token in sentinels:
            found.append([])
        found[-1].append(token)
    return found


def test_the_parts_of_an_input_ask_for_all_of_its_spans_once(batch: dict[str, torch.Tensor]) -> None:
    parts = learning.in_parts(batch, 4)
    rows, sentinels = len(batch["labels"]), set(learning.sentinel_ids())
    assert parts["input_ids"].shape == (4 * rows, 128)
    for row in range(rows):
        own = range(row, 4 * rows, rows)
        assert torch.equal(torch.cat([parts["input_ids"][part] for part in own]), batch["input_ids"][row])
        asked = [spans(parts["labels"][part]) for part in own]
        assert sum(asked, []) == spans(batch["labels"][row])
        for part, found in zip(own, asked, strict=True):
            assert [span[0] for span in found] == [
                token for token in parts["input_ids"][part].tolist() if token in sentinels
            ]


def test_a_control_after_a_dense_start_routes_as_the_control_does(batch: dict[str, torch.Tensor]) -> None:
    settings = learning.Settings(**TINY | {"length": 512})
    training = learning.Training("colt5-even-16-whole", 0, settings, CPU)
    # nothing opens: there is no choice to learn
    assert [training.progress(done) for done in range(settings.steps)].count(0.0) == math.ceil(0.6 * settings.steps)
    training(batch, 0.0)
    training(batch, None)
    even = learning.make_model("colt5-even-16", settings)
    assert not even.load_state_dict(training.model.state_dict(), strict=False).missing_keys
    with torch.no_grad():
        losses = [model.eval()(**batch).loss for model in (training.model, even)]
    torch.testing.assert_close(*losses)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "dense"),
    [
        ("colt5-even-16", False),
        ("colt5-learned-16-cross", False),
        ("colt5-learned-16-cross", True),
        ("colt5-none", False),
    ],
)
@pytest.mark.parametrize("rows", [1, 3])
def test_operations_of_the_decoder_are_those_that_pytorch_counts(variant: str, dense: bool, rows: int) -> None:
    model = learning.begin(variant, 0, learning.Settings(**TINY | {"num_decoder_layers": 2}), CPU).train()
    if dense:
        model.set_dense_start(0.0)
    memory, n, m = torch.randn(rows, 128, 32), 128, 24
    # PyTorch does not count the CPU's fused attention
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(encoder_outputs=(memory,), labels=torch.randint(3, 99, (rows, m)), use_cache=False)
    config = model.config
    # a heavy branch of one token stands for none
    with_encoder = learning.step_flops(config, rows, n, m, dense) / 3
    for name in ("routed_query_fraction", "routed_key_value_fraction", "routed_feed_forward_fraction"):
        setattr(config, name, 1e-9 if variant == "colt5-none" else getattr(config, name))
    assert with_encoder - rows * encoder_flops(config, n, dense=dense) == counter.get_total_flops()


def test_variants_of_a_seed_begin_with_the_same_weights() -> None:
    settings = learning.Settings(**TINY)
    learned = learning.begin("colt5-learned-64", 3, settings, CPU).state_dict()
    for variant in ("colt5-even-16", "colt5-none", "colt5-learned-16-cross"):
        own = learning.begin(variant, 3, settings, CPU).state_dict()
        shared = own.keys() & learned.keys()
        assert len(shared) > 20 and all(torch.equal(own[name], learned[name]) for name in shared)
        assert not {name for name in own.keys() - learned.keys() if "cross" not in name}


@pytest.mark.parametrize("freedom", range(1, 12))
def test_student_is_the_distributions_quantile(freedom: int) -> None:
    t = torch.linspace(0, learning_picture.STUDENT[freedom - 1], 200_001, dtype=torch.float64)
    half = torch.tensor(freedom / 2, dtype=torch.float64)
    scale = torch.exp(torch.lgamma(half + 0.5) - torch.lgamma(half)) / (freedom * torch.pi) ** 0.5
    inside = 2 * torch.trapezoid(scale * (1 + t * t / freedom) ** (-half - 0.5), t)
    # the table has three digits behind the point
    assert float(inside) == pytest.approx(0.95, abs=1e-4)


def test_an_interval_is_students() -> None:
    # of two values the deviation is |b - a| / √2, so the mean's error is half of |b - a|
    assert learning_picture.interval([1.0, 3.0]) == pytest.approx((2.0, 12.706))
    middle, reach = learning_picture.interval([0.1, 0.1, 0.3, 0.3])
    assert (middle, reach) == pytest.approx((0.2, 3.182 * (4 * 0.01 / 3) ** 0.5 / 2))
    assert learning_picture.interval([0.5]) == (0.5, float("inf"))
    with pytest.raises(ValueError, match="there are 13 values"):
        learning_picture.interval([0.0] * 13)


def curve(losses: list[float], flops: list[float], seed: int = 0, start_ends: int = 0) -> dict:
    """A run that was evaluated every 10 steps."""
    points = zip(losses, flops, strict=True)
    return {
        "seed": seed,
        "start_ends": start_ends,
        "curve": [{"step": 10 * i, "loss": loss, "flops": cost} for i, (loss, cost) in enumerate(points)],
    }


def test_losses_are_compared_seed_by_seed_at_equal_steps_and_cost() -> None:
    cheap = [curve([9, 5, 4], [0, 1, 2], seed) for seed in (0, 1)]
    dear = [curve([9, 6, 2], [0, 2, 4], seed) for seed in (1, 2)]
    assert learning_picture.differences(cheap, dear, "step") == [4 - 2]
    # the dear one has cost 2 at its second point
    assert learning_picture.differences(cheap, dear, "flops") == [4 - 6]
    assert learning_picture.differences(dear, cheap, "flops") == [6 - 4]
    starting = [curve([9, 6, 2], [0, 2, 4], 1, start_ends=11)]
    assert learning_picture.differences(starting, cheap, "flops") is None
    assert learning_picture.differences(starting, cheap, "step") == [2 - 4]


@pytest.mark.parametrize(
    ("above", "said"),
    [((-0.3, -0.1), "is not decided"), ((0.01, 0.0101), "holds"), ((0.3, 0.301), "fails"), ((0.1,), "cannot be")],
)
def test_the_prediction_is_judged_by_its_rule(above: tuple[float, ...], said: str) -> None:
    first, second = learning_picture.PREDICTION
    runs = {
        first: [curve([9, 4 + by], [0, 1], seed) for seed, by in enumerate(above)],
        second: [curve([9, 4], [0, 1], seed) for seed in range(len(above))],
    }
    assert learning_picture.verdict(runs).count(f"**{said}") == 2


@pytest.mark.parametrize("variant", ["colt5-even-16-brief", "colt5-even-16-cross-whole", "colt5-learned-16-whole"])
def test_a_start_ends_before_a_controls_routers_change(variant: str, batch: dict[str, torch.Tensor]) -> None:
    """A model whose routers cannot learn refuses a dense start, and to be told of its end."""
    settings = learning.Settings(**TINY | {"length": 512})
    training = learning.Training(variant, 0, settings, CPU)
    for progress in (0.0, None, None):
        assert torch.isfinite(training(batch, progress))
    stacks = [part for part in training.model.modules() if hasattr(part, "dense_start")]
    assert stacks and all(stack.dense_start is None for stack in stacks)
    kinds = {part.routing for part in training.model.modules() if type(part).__name__ == "CoLT5Router"}
    assert kinds == {learning.COLT5[variant].after or "learned"}


def test_a_later_ratio_is_in_force_after_the_start(batch: dict[str, torch.Tensor]) -> None:
    settings = learning.Settings(**TINY | {"length": 512})
    training = learning.Training("colt5-learned-16-whole-then-ratio-4", 0, settings, CPU)
    losses = []
    for progress in (0.0, None):
        training(batch, progress)
        for variant in ("colt5-as-shipped-16", "colt5-ratio-4-16"):
            other = learning.make_model(variant, settings)
            assert not other.load_state_dict(training.model.state_dict(), strict=False).missing_keys
            with torch.no_grad():
                losses.append((training.model.eval()(**batch).loss - other.eval()(**batch).loss).abs().item())
        training.model.train()
    during, after = losses[:2], losses[2:]
    # a model with these weights and this ratio gives the same, one with the other ratio does not
    assert during[0] == pytest.approx(0, abs=1e-5) and during[1] > 1e-4
    assert after[1] == pytest.approx(0, abs=1e-5) and after[0] > 1e-4


# seven runs of two steps: ten seconds, most of them for the head over the vocabulary
@pytest.mark.slow
def test_learning_is_drawn_from_the_runs_there_are(tokens: Path, tmp_path: Path) -> None:
    runs, page = tmp_path / "runs", tmp_path / "learning.md"
    sizes = " ".join(f"--{name} {value}" for name, value in TINY.items())
    arguments = f"{sizes} --eval_every 1 --eval_rows 2 --tokens {tokens} --out {runs} --devices cpu".split()
    learning.main([*arguments, "--seconds", "0"])
    assert list(runs.iterdir()) == []
    learning.main([*arguments, "--seeds", "0", "1", "--variants", *learning_picture.PREDICTION])
    written = {path: path.stat().st_mtime_ns for path in runs.iterdir()}
    assert {path.name for path in written} == {f"{v}-{s}.json" for v in learning_picture.PREDICTION for s in (0, 1)}
    small = ("colt5-as-shipped-16", "colt5-descent-16", "colt5-one-rate-16", "colt5-learned-16-cross")
    learning.main([*arguments, "--seeds", "0", "--variants", *learning_picture.PREDICTION, *small])
    # what is complete is not done again
    assert {path: path.stat().st_mtime_ns for path in written} == written
    learned = json.loads((runs / "colt5-learned-64-0.json").read_text())
    assert learned["start_ends"] == 2 and learned["curve"][-1]["flops"] > 0
    assert set(learned["curve"][-1]["routing"]["query"]) == {"weight", "saturated", "sentinels"}

    page.write_text((ROOT / "docs/learning.md").read_text(encoding="utf-8"), encoding="utf-8")
    draw = [sys.executable, str(ROOT / "docs/learning_picture.py"), "--page", str(page)]
    subprocess.run(
        [*draw, *(word for name in ("results", "first", "small") for word in (f"--{name}", str(runs)))], check=True
    )
    drawn = page.read_text(encoding="utf-8")
    exact = json.loads((runs / "colt5-as-shipped-16-0.json").read_text())["curve"][-1]["loss"]
    assert f"{learned['curve'][-1]['loss']:.3f}" in drawn and f"{exact:.4f}" in drawn
    assert "At equal steps the prediction" in drawn
    # links to the pictures that were drawn, and to no other
    links = set(re.findall(r"\((learning_\w+\.svg)\)", drawn))
    assert links == {path.name for path in tmp_path.glob("*.svg")} and len(links) == 4
    nothing = str(tmp_path / "nothing")
    subprocess.run([*draw, "--results", nothing, "--first", nothing], check=True)
    assert "learning_time.svg" not in page.read_text(encoding="utf-8")
