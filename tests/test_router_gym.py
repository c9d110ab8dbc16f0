"""The router gym: what its tasks ask for, what its arms cost, and that its runs are kept and not repeated."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import router_gym  # noqa: E402
from router_tasks import FIRST_TYPE, LINKS, MARK, MARKED_REACH, TASKS, VALUES, Examples, Task  # noqa: E402


def read(task: Task, token: int) -> tuple[str, int, int]:
    """What a token is: its kind, its name and its value, by the order of the vocabulary alone."""
    token -= FIRST_TYPE
    if 0 <= token < task.names * VALUES:
        return "fact", token // VALUES, token % VALUES
    token -= task.names * VALUES
    if 0 <= token < task.names:
        return "use", token, 0
    token -= task.names
    if task.name == "two_hops" and 0 <= token < task.names * LINKS:
        return "link", token // LINKS, (token // LINKS + token % LINKS) % task.names
    return "other", 0, 0


def counts(task: Task, ids: list[int], place: int) -> bool:
    """Whether a fact or use counts: always, or in the marked task if a mark stands before it, within reach."""
    return task.name != "marked" or MARK in ids[max(0, place - MARKED_REACH) : place]


@pytest.mark.parametrize("name", [name for name in TASKS if name != "cross"])
@pytest.mark.parametrize(("facts", "n"), [(8, 2048), (32, 512)])
def test_labels_follow_from_the_tokens(name: str, facts: int, n: int) -> None:
    task = Task(name, facts)
    examples = task.draw(4, n, torch.Generator().manual_seed(0))
    for row, (ids, labels, asked) in enumerate(
        zip(examples.ids.tolist(), examples.labels.tolist(), examples.asked.tolist(), strict=True)
    ):
        known = [(place, *read(task, token)) for place, token in enumerate(ids)]
        values = {j: v for place, kind, j, v in known if kind == "fact" and counts(task, ids, place)}
        links = {j: target for _, kind, j, target in known if kind == "link"}
        assert sum(asked) == facts
        for place, kind, j, target in known:
            if kind == "use" and counts(task, ids, place):
                assert asked[place] and examples.needed_queries[row, place]
                assert labels[place] == values[links[j] if name == "two_hops" else j]
            elif kind == "link":
                assert labels[place] == values[target] and not asked[place]
            else:
                assert labels[place] == -100 and not asked[place]
            needed = kind == "link" or kind == "fact" and counts(task, ids, place)
            assert bool(examples.needed_keys[row, place]) is needed


def test_decoder_asks_for_the_encoders_facts() -> None:
    task = Task("cross", 8)
    examples = task.draw(4, 64, torch.Generator().manual_seed(0))
    assert examples.inputs().keys() == {"input_ids", "labels", "decoder_input_ids"}
    assert examples.asked.all() and not examples.needed_queries.any() and not examples.needed_keys.any()
    orders = set()
    for ids, uses, labels, needed in zip(
        *(part.tolist() for part in (examples.ids, examples.decoder_ids, examples.labels, examples.needed_memory)),
        strict=True,
    ):
        known = [read(task, token) for token in ids]
        assert [kind == "fact" for kind, _, _ in known] == needed
        assert {kind for kind, _, _ in known} == {"fact", "other"}
        values = {j: v for kind, j, v in known if kind == "fact"}
        asked = [read(task, token) for token in uses]
        assert {kind for kind, _, _ in asked} == {"use"} and sorted(j for _, j, _ in asked) == list(range(8))
        # the tokens of values follow those of uses, and nothing else has them
        first = FIRST_TYPE + 8 * VALUES + 8
        assert labels == [first + values[j] for _, j, _ in asked]
        assert not set(range(first, first + VALUES)) & {*ids, *uses}
        orders.add(tuple(j for _, j, _ in asked))
    assert len(orders) == 4


def test_marked_task_is_not_solved_by_types() -> None:
    """Facts and uses that do not count outnumber a budget, and every name has a fact that does not count."""
    task = Task("marked", 8)
    examples: Examples = task.draw(8, 2048, torch.Generator().manual_seed(0))
    for ids, keys in zip(examples.ids.tolist(), examples.needed_keys.tolist(), strict=True):
        known = [(place, *read(task, token)) for place, token in enumerate(ids)]
        facts = [(j, keys[place]) for place, kind, j, _ in known if kind == "fact"]
        specials = [kind for _, kind, _, _ in known if kind in ("fact", "use")]
        # one query among 64 of 2,048 tokens, one key among 32
        assert len(specials) > 32 + 64
        for j in {j for j, counting in facts if counting}:
            assert (j, False) in facts


def test_cluster_is_one_place() -> None:
    examples = Task("cluster", 8).draw(8, 2048, torch.Generator().manual_seed(0))
    for keys in examples.needed_keys:
        places = keys.nonzero()
        assert places.max() - places.min() < 16


def test_bad_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="task is 'riddles'"):
        Task("riddles", 8)
    with pytest.raises(ValueError, match="facts is 40"):
        Task("marked", 40)
    with pytest.raises(ValueError, match="n is 256"):
        Task("marked", 8).draw(1, 256, torch.Generator())


def test_wide_light_branches_cost_what_learned_routing_costs() -> None:
    settings = router_gym.Settings()
    flops = {}
    for arm in ("as_shipped", "none_wide"):
        run = router_gym.Run("facts", arm, 2048, 1 / 16, 0)
        torch.manual_seed(0)
        # PyTorch counts no operations of its fused attention on a CPU
        config = router_gym.make_config(run, settings)
        model = router_gym.CoLT5ForTokenClassification._from_config(config, attn_implementation="eager")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=router_gym.task_of(run).draw(1, 2048, torch.Generator()).ids)
        flops[arm] = counter.get_total_flops()
    assert abs(flops["none_wide"] / flops["as_shipped"] - 1) < 0.02


# four trainings
@pytest.mark.slow
def test_runs_are_kept_and_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = dataclasses.replace(router_gym.Settings(), batch=2, eval_rows=2, eval_every=2)
    arguments = [
        "--tasks",
        "facts",
        "--arms",
        "learned",
        "even",
        "--lengths",
        "128",
        "--budgets",
        "16",
        "--steps",
        "3",
    ]
    arguments += ["--out", str(tmp_path)]
    router_gym.main([*arguments, "--seeds", "0"], settings)
    first = router_gym.read_lines(tmp_path)
    assert [(line["arm"], line["seed"]) for line in first] == [("learned", 0), ("even", 0)]
    assert [point["step"] for point in first[0]["curve"]] == [0, 2, 3]
    assert {len(line["routers"]) for line in first} == {9}
    # every curve has what the routers do, and what the heavy branches are worth
    for point in first[0]["curve"]:
        assert len(point["routers"]) == 9 and point["loss_without_heavy"] > 0
    router_gym.main([*arguments, "--seeds", "0", "1"], settings)
    lines = router_gym.read_lines(tmp_path)
    assert lines[:2] == first and [(line["arm"], line["seed"]) for line in lines[2:]] == [("learned", 1), ("even", 1)]
    page = (tmp_path / "router_gym.md").read_text()
    for line in lines:
        assert f"{line['accuracy']:.3f}" in page
    assert (tmp_path / "router_gym.svg").exists()
    json.dumps(lines, allow_nan=False)


# two trainings
@pytest.mark.slow
@pytest.mark.parametrize("arm", ["learned", "random"])
def test_a_run_that_is_cut_off_goes_on(arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its line is that of a run that was not; the state of a run with other settings is not taken."""
    # large steps, so that what a step sees makes a difference
    own = {"batch": 2, "eval_rows": 2, "eval_every": 2, "learning_rate": 0.1, "warmup_steps": 1}
    settings = dataclasses.replace(router_gym.Settings(), **own)
    arguments = ["--tasks", "facts", "--lengths", "128", "--budgets", "16", "--steps", "5", "--seeds", "0"]
    arguments += ["--arms", arm, "--out"]
    router_gym.main([*arguments, f"{tmp_path}/whole"], settings)
    measure, measured = router_gym.measure_point, []

    def until_step_4(*given: Any) -> dict[str, Any]:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(measure(*given))
        return measured[-1]

    monkeypatch.setattr(router_gym, "measure_point", until_step_4)
    with pytest.raises(KeyboardInterrupt):
        router_gym.main([*arguments, f"{tmp_path}/cut"], settings)
    monkeypatch.setattr(router_gym, "measure_point", measure)
    (state,) = (tmp_path / "cut").glob("*.state")
    (tmp_path / "other").mkdir()
    shutil.copy(state, tmp_path / "other")
    router_gym.main([*arguments, f"{tmp_path}/cut"], settings)
    router_gym.main([*arguments, f"{tmp_path}/other"], dataclasses.replace(settings, eval_rows=4))
    (whole,), (cut,), (other,) = (router_gym.read_lines(tmp_path / name) for name in ("whole", "cut", "other"))
    assert [point["step"] for point in cut["curve"]] == [0, 2, 4, 5]
    assert [point["step"] for point in other["curve"]] == [0, 2, 4, 5]
    for point, expected in zip(cut["curve"], whole["curve"], strict=True):
        assert point["flops"] == expected["flops"]
        # four digits are kept of what sums in another order may change
        assert point["loss"] == pytest.approx(expected["loss"], rel=2e-3)
    assert cut["curve"][-1]["loss"] != cut["curve"][0]["loss"] != other["curve"][0]["loss"]
    assert not list(tmp_path.glob("*/*.state"))


@pytest.mark.slow
def test_arms_with_another_ratio_have_a_dense_start(tmp_path: Path) -> None:
    settings = dataclasses.replace(router_gym.Settings(), batch=2, eval_rows=2, eval_every=2)
    arguments = ["--tasks", "facts", "--lengths", "128", "--budgets", "16", "--steps", "3", "--seeds", "0"]
    arms = ["learned", "learned_ratio_4", "learned_then_ratio_4"]
    router_gym.main([*arguments, "--out", str(tmp_path), "--arms", *arms], settings)
    plain, other, later = router_gym.read_lines(tmp_path)
    assert plain["flops"] == other["flops"] == later["flops"] and plain["curve"][0] != other["curve"][0]
    # of three steps two are the dense start's
    losses = [[point["loss"] for point in line["curve"]] for line in (plain, later)]
    assert losses[0][:2] == losses[1][:2] and losses[0][2] != losses[1][2]
    assert "ratio 4" in (tmp_path / "router_gym.md").read_text()
    run = router_gym.Run("facts", "learned_ratio_4", 128, 1 / 16, 0)
    assert router_gym.make_config(run, settings).soft_topk_ratio == 4


@pytest.mark.slow
def test_cross_attentions_routers_are_described(tmp_path: Path) -> None:
    settings = dataclasses.replace(router_gym.Settings(), batch=2, eval_rows=2, eval_every=2)
    arguments = ["--tasks", "cross", "--lengths", "128", "--budgets", "16", "--steps", "3", "--seeds", "0"]
    arms = ["learned", "even", "none", "none_wide", "dense"]
    router_gym.main([*arguments, "--out", str(tmp_path), "--arms", *arms], settings)
    lines = router_gym.read_lines(tmp_path)
    # without routers there is nothing that cross-attention could be told to read
    assert [line["arm"] for line in lines] == ["learned", "even", "dense"]
    for line in lines:
        shares = {router["router"]: router["needed_routed"] for router in line["routers"]}
        cross = [shares.pop(f"{layer}.cross_router", None) for layer in (0, 1)]
        assert set(shares.values()) == {None} and len(shares) == 9
        assert all(share is None if line["arm"] == "dense" else 0 <= share <= 1 for share in cross)
    # a quarter of the budget, as in the other tasks
    assert {line["facts"] for line in lines} == {2}
    json.dumps(lines, allow_nan=False)


def test_routed_facts_are_counted_by_hand() -> None:
    run, settings = router_gym.Run("cross", "as_shipped", 128, 1 / 16, 0), router_gym.Settings()
    torch.manual_seed(0)
    model = router_gym.CoLT5ForConditionalGeneration(router_gym.make_config(run, settings)).train()
    task = router_gym.task_of(run)
    examples = task.draw(4, 128, torch.Generator().manual_seed(0))
    described = router_gym.describe_routers(model, examples, task.vocab_size)
    shares = [router["needed_routed"] for router in described if "cross" in router["router"]]
    layers = model.eval()(**examples.inputs(), output_routing=True).cross_routing
    for share, (tokens,) in zip(shares, layers, strict=True):
        assert tokens.indices.shape == (4, 8)
        hits = [
            sum(examples.needed_memory[row, place].item() for place in places)
            for row, places in enumerate(tokens.indices.tolist())
        ]
        assert share == sum(hits) / (4 * task.facts)


@pytest.mark.slow
def test_pull_is_the_losss_derivative() -> None:
    """A needed token's score is pulled up where raising it alone lowers the loss."""
    run = router_gym.Run("facts", "as_shipped", 64, 1 / 4, 0)
    settings = router_gym.Settings()
    torch.manual_seed(0)
    model = router_gym.CoLT5ForTokenClassification(router_gym.make_config(run, settings)).double().train()
    task = router_gym.task_of(run)
    examples = task.draw(1, 64, torch.Generator().manual_seed(0))
    first = router_gym.describe_routers(model, examples, task.vocab_size)[2]
    assert first["router"] == "0.1.router"
    place = examples.needed_queries[0].nonzero()[:, 0]
    # the norms take their statistics in fp32, whose rounding a smaller step would not stand out from
    step = 2e-3

    def loss(move: float, places: torch.Tensor) -> float:
        router = model.get_submodule("encoder.block.0.layer.1.router")

        def moved(module: torch.nn.Module, args: tuple) -> tuple:
            scores = args[0].clone()
            scores[0, places] += move
            return scores, *args[1:]

        hook = router.select.register_forward_pre_hook(moved)
        with torch.no_grad():
            value = float(model.eval()(input_ids=examples.ids, labels=examples.labels).loss)
        model.train()
        hook.remove()
        return value

    def pull(places: torch.Tensor) -> float:
        return -(loss(step, places) - loss(-step, places)) / (2 * step)

    everywhere = torch.tensor([pull(torch.tensor([at])) for at in range(64)])
    size = everywhere.square().mean().sqrt()
    model.eval()
    chosen = torch.zeros(64, dtype=torch.bool)
    routing = model.encoder(examples.ids, output_routing=True).routing[0].feed_forward
    chosen[routing.indices[0][routing.valid[0]]] = True
    model.train()
    for name, places in (("routed", place[chosen[place]]), ("unrouted", place[~chosen[place]])):
        expected = float(everywhere[places].mean() / size) if len(places) else None
        if expected is None:
            assert first[f"pull_on_needed_{name}"] is None
        else:
            assert abs(first[f"pull_on_needed_{name}"] - expected) < 0.05 * (1 + abs(expected))
