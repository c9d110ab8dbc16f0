"""The study: each arm learns, reads what it should and answers; runs are compared at the right steps and counted."""

import json
import lzma
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from example_runs import run_processes
from python_types import ablation, study, train
from python_types.arms import ARMS, EQUAL_AT, WINDOW, equal_width
from python_types.evaluate import VOCABULARY, Record, hidden_in, question_of
from python_types.study import (
    PLANS,
    Plan,
    counted,
    difference,
    percent,
    phase_at,
    phases_of,
    rate_share,
    report,
    seconds_at,
)
from python_types.train import Size
from python_types.windows import window_around, windowed_question_of
from transformers import LongT5ForConditionalGeneration, T5ForConditionalGeneration

from modeling_colt5 import CoLT5Config, CoLT5ForConditionalGeneration, CoLT5Tokenizer
from modeling_colt5.dense_start import learned_routers
from modeling_colt5.encoder_costs import encoder_flops

SIZE = {"d_model": 32, "d_kv": 8, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4, "num_light_heads": 1}
SIZE |= {"light_d_ff": 32, "heavy_d_ff": 64, "d_ff": 32, "budget": 4}
CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
FUNCTION = """def function{0}(first: int, second: str = "x", *rest: Name{0}) -> list[int]:
    return [first + {0}, second, rest]


"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    for split in ("train", "held"):
        rows = [
            {"package": split, "path": f"{n}.py", "split": split, "n_tokens": 900,
             "text": "".join(FUNCTION.format(10 * n + each) for each in range(8 + n))}
            for n in range(3)
        ]  # fmt: skip
        with lzma.open(folder / f"{split}.jsonl.xz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    train.main(["--prepare", str(folder), "--tokens", str(folder / "tokens"), "--processes", "1"])
    return folder


def test_the_arms_are_what_they_are_called():
    classes = {"colt5": CoLT5ForConditionalGeneration, "t5": T5ForConditionalGeneration}
    with torch.device("meta"):
        made = {name: arm._model(Size()) for name, arm in ARMS.items()}
    for name, model in made.items():
        assert type(model) is classes.get(ARMS[name].kind, LongT5ForConditionalGeneration)
        assert (model.config.d_model, model.config.num_layers, model.config.num_decoder_layers) == (256, 6, 2)
    assert [made[name].config.routing for name in ("learned", "even", "random", "none")] == [
        "learned", "even", "random", "none"
    ]  # fmt: skip
    assert made["learned-64"].config.routed_query_fraction == 1 / 64
    crossed = {name: made[name].config for name in ("learned-cross", "even-cross")}
    assert [(config.routing, config.routed_cross_key_values) for config in crossed.values()] == [
        ("learned", 256), ("even", 256)
    ]  # fmt: skip
    started = {"learned", "learned-64", "learned-cross", "learned-then-ratio"}
    assert {name for name in PLANS["routing"].arms if ARMS[name].has_dense_start} == started
    ratios = {name: made[name].config.soft_topk_ratio for name in started | {"unstarted", "unstarted-ratio"}}
    assert ratios == {**dict.fromkeys(ratios, 9 / 8), "unstarted-ratio": 4}
    assert made["longt5-global"].config.encoder_attention_type == "transient-global"
    sizes = {name: model.num_parameters() for name, model in made.items()}
    # T5 and LongT5 have one width for the feed-forwards of encoder and decoder, and so a larger decoder
    assert all(abs(size / sizes["learned"] - 1) < 0.15 for name, size in sizes.items() if name != "none")


def test_without_routing_the_encoder_costs_as_much():
    config = Size().config()
    paper = encoder_flops(config, EQUAL_AT)
    wide = Size(light_d_ff=config.light_d_ff + equal_width(config, EQUAL_AT)).config()
    # what its formula counts of branches that the model without routing lacks
    without = 2 * wide.num_layers * 3 * EQUAL_AT * wide.d_model * equal_width(config, EQUAL_AT)
    heavy = encoder_flops(wide, EQUAL_AT) - paper
    assert without == pytest.approx(heavy) and 0.2 * paper < without < 0.8 * paper
    assert ARMS["none"].model(Size(**SIZE), CPU).config.light_d_ff > SIZE["light_d_ff"]


# one of each kind of model and of inputs; the others are these with another number
@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "longt5-global", "t5-window", "even-cross", "unstarted-ratio"])
def test_an_arm_trains_and_answers(name, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("python_types.predict.LONGEST_ANSWER", 2)
    monkeypatch.setattr("python_types.predict.MEAN_ANSWER", 2)
    monkeypatch.setitem(PLANS, "tiny", Plan((name,), (0,), (128,), (256,), batch_tokens=256))
    arguments = ["--plan", "tiny", "--results", str(tmp_path / "results.jsonl"), "--corpus", str(corpus)]
    arguments += ["--tokens", str(corpus / "tokens"), "--out", str(tmp_path), "--steps", "6", "--paced", "1"]
    arguments += [part for field, value in SIZE.items() for part in (f"--{field}", str(value))]
    study.main([*arguments, "--pace", name])
    assert set(json.loads((tmp_path / f"pace-{name}.json").read_text())) == {"128", "routed"}
    arm = ARMS[name]
    make = question_of if arm.window is None else lambda *given: windowed_question_of(*given[:2], arm.window, given[2])
    tasks = [task for task in study.tasks_of(corpus, [0.3, 1.0])][:2]
    questions = [make(corpus / "tokens/baselines.json", VOCABULARY, task) for task in tasks]
    (tmp_path / f"questions-{arm.window}.pkl").write_bytes(study.pickle.dumps(questions))
    study.main([*arguments, "--run", f"{name}:0"])
    line = json.loads((tmp_path / f"{name}-0.json").read_text())
    assert (line["arm"], line["steps"], line["curve"][-1]["step"]) == (name, 6, 6)
    assert all(np.isfinite(value) for point in line["curve"] for value in point.values())
    asked = sum(len(question.keys) for question in questions)
    assert sum(count for share in line["at_steps"].values() for _, count in share["all"].values()) == asked
    tables = report([line], PLANS["tiny"])
    assert f"| {name} |" in tables and "equal time" in tables


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learned-then-ratio", "longt5-local"])
def test_a_run_learns_and_knows_what_it_knew_before(name, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "WARMUP", 1)
    monkeypatch.setattr("python_types.predict.LONGEST_ANSWER", 2)
    monkeypatch.setattr("python_types.predict.MEAN_ANSWER", 2)
    monkeypatch.setitem(PLANS, "tiny", Plan((name,), (0,), (128,), (128,), batch_tokens=256))
    arguments = study.Arguments("tiny", tmp_path, tokens=corpus / "tokens", corpus=corpus)
    run = study.Run(arguments, ARMS[name], 0, Size(**SIZE))
    curve, mean_weights, earlier = study.trained(run, tmp_path / "run.pt", 40, 20)
    assert all(map(torch.equal, mean_weights, run.mean))
    assert getattr(run.model.config, "soft_topk_ratio", None) == ARMS[name].later_ratio
    # what was trained is there for the next try
    monkeypatch.setattr(run, "train", None)
    again = study.trained(run, tmp_path / "run.pt", 40, 20)
    assert again[0] == curve and all(map(torch.equal, again[2], earlier))
    # a new model's loss is that of a guess among all tokens or more; these modules have few
    assert curve[0]["step"] == 2 and len(curve) == study.MARKS
    losses = [
        [point[loss] for point in part for loss in point if loss.startswith("loss")]
        for part in (curve[:4], curve[-4:])
    ]
    assert np.mean(losses[0]) > 8 and np.mean(losses[1]) < np.mean(losses[0]) - 1
    # 3 % of 40 steps is a mean of the last one or two
    now, mean, before = (torch.cat([each.flatten() for each in part]) for part in (run.parameters, run.mean, earlier))
    assert 0 < (mean - now).norm() < 0.5 * (before - now).norm()
    question = question_of(corpus / "tokens/baselines.json", VOCABULARY, study.tasks_of(corpus, [0.3])[0])
    records = [run.ask(weights, [question], []) for weights in (run.mean, earlier)]
    assert [record.probability for record in records[0]] != [record.probability for record in records[1]]
    assert torch.equal(now, torch.cat([each.flatten() for each in run.parameters])) and run.model.training


def test_a_window_shows_what_is_around_its_hole(corpus):
    tokenizer = CoLT5Tokenizer.from_pretrained(VOCABULARY)
    text = "".join(FUNCTION.format(number) for number in range(120))
    row = {"text": text, "package": "p", "path": "m.py"}
    _, chosen = hidden_in(row, 0.9)
    assert len(chosen) > 400
    sentinels = tokenizer.get_sentinel_token_ids()
    for hole in (chosen[0], chosen[200], chosen[-1]):
        ids, count = window_around(text, hole, chosen, tokenizer, 512)
        assert len(ids) <= 512 and ids[-1] == tokenizer.eos_token_id
        shown = [token for token in ids if token in sentinels]
        assert shown == sentinels[: len(shown)] and 1 <= count <= len(shown)
        at = ids.index(sentinels[count - 1])
        # its own function's name is right before it, whatever stands at the window's ends
        assert f"function{hole.function.removeprefix('function')}" in tokenizer.decode(ids[max(0, at - 60) : at])
        # the middle, but at the module's ends
        assert at <= 256 and (at == 256 or hole is chosen[0])


def test_windows_ask_for_each_hole_once(corpus):
    (task, *_) = study.tasks_of(corpus, [1.0])
    baselines = corpus / "tokens/baselines.json"
    question, windowed = (
        question_of(baselines, VOCABULARY, task),
        windowed_question_of(baselines, VOCABULARY, 256, task),
    )
    assert windowed.keys == question.keys and len(windowed.rows) == len(windowed.counts) == len(question.keys)
    assert max(map(len, windowed.rows)) <= 256


def test_phases_and_rates():
    plan = PLANS["routing"]
    assert [phase.name for phase in phases_of(plan, ARMS["learned"])] == ["256", "1024", "2048", "4096", "routed"]
    assert [phase.lengths for phase in phases_of(plan, ARMS["t5-window"])] == [
        (256,), (1024,), (2048,), (2048,), (WINDOW,)
    ]  # fmt: skip
    at = [phase_at(plan, step, 80) for step in range(80)]
    assert [at.count(number) for number in range(5)] == [10, 10, 10, 10, 40] and at == sorted(at)
    assert rate_share(0) < rate_share(299) == rate_share(1000) == 1 and rate_share(4000) == 0.5


def test_equal_time_is_the_fastest_arms():
    paces = {"256": 1.0, "1024": 1.0, "2048": 1.0, "4096": 2.0, "routed": 0.5}
    seconds = seconds_at(PLANS["routing"], paces, 80)
    assert seconds[-1] == 10 + 10 + 10 + 20 + 20 and seconds[9] == 10


def record(module: str, given: str, is_far: bool | None, share: float = 0.3) -> Record:
    return Record("held", module, share, 9, "x", "T", is_far, False, given, 1.0, None, None, None)


def test_right_types_are_counted_by_module():
    records = [record("a", "T", True), record("a", "X", None), record("b", "T", False, 1.0)]
    assert counted(records) == {
        "30%": {"all": {"a": [1, 2]}, "far": {"a": [1, 1]}},
        "100%": {"all": {"b": [1, 1]}},
    }


def line_of(arm: str, seed: int, right: dict[str, int]) -> dict:
    """A run that was asked for four types of each of these modules, so many of which it knew."""
    shares = {"30%": {"all": {module: [known, 4] for module, known in right.items()}}}
    line = {"arm": arm, "seed": seed, "parameters": 1, "steps": 2, "seconds": 3.0, "steps_of_equal_time": 2}
    return line | {"at_steps": shares, "at_time": shares}


def test_runs_on_other_data_are_not_continued(tmp_path: Path) -> None:
    results = tmp_path / "study.jsonl"
    results.write_text(json.dumps(line_of("even", 0, {"a": 1}) | {"plan": "routing", "data": "of yesterday"}) + "\n")
    (tmp_path / "tokens.npz.xz").write_bytes(b"of today")
    arguments = ["--plan", "routing", "--results", str(results), "--tokens", str(tmp_path), "--out", str(tmp_path)]
    with pytest.raises(ValueError, match="were trained on other data .of yesterday. than"):
        study.main([*arguments, "--arms", "even", "--seeds", "0"])


def test_runs_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="there is no module that all runs were asked about"):
        report([line_of("learned", 0, {"a": 1}), line_of("even", 0, {"b": 1})], PLANS["routing"])
    with pytest.raises(ValueError, match="there is no line of learned"):
        report([], PLANS["routing"])
    with pytest.raises(ValueError, match="were trained on different data .new, old."):
        report(
            [line_of("learned", 0, {"a": 1}) | {"data": "old"}, line_of("even", 0, {"a": 1}) | {"data": "new"}],
            PLANS["routing"],
        )


def test_runs_are_compared_on_the_modules_that_all_were_asked_about():
    lines = [line_of("learned", 0, {"a": 4, "b": 2, "c": 4}), line_of("learned", 1, {"b": 2, "a": 2})]
    lines += [line_of("even", 0, {"a": 1, "b": 1, "d": 4}), line_of("even", 1, {"a": 1, "b": 1, "c": 4})]
    tables = report(lines, PLANS["routing"])
    assert tables.count("8 types of 2 modules that all runs were asked about") == 2
    assert "| learned | 62.5 % | 50.0, 75.0 |  |\n| even | 25.0 % | 25.0, 25.0 | +37.5 (+25.0 to +50.0) |" in tables
    tables = report(lines, PLANS["routing"], "even")
    assert "| learned | 62.5 % | 50.0, 75.0 | -37.5 (-50.0 to -25.0) |\n| even | 25.0 % | 25.0, 25.0 |  |" in tables


def test_a_difference_is_of_the_seeds_means():
    ours = [{"a": [3, 4], "b": [0, 4]}, {"a": [1, 4], "b": [0, 4]}]
    theirs = [{"a": [0, 4], "b": [0, 4]}]
    mean, low, high = difference(ours, theirs)
    assert mean == pytest.approx(100 * 2 / 8) and low == 0 and high == pytest.approx(50)
    assert percent(ours) == [37.5, 12.5]


def test_what_has_a_line_is_not_run_again(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(study, "in_lanes", lambda commands, *_: begun.append(list(commands)))
    monkeypatch.setattr(study, "prepare", lambda *_: None)
    results = tmp_path / "results.jsonl"
    (tmp_path / "tokens.npz.xz").write_bytes(b"")
    line = {"plan": "routing", "arm": "learned", "seed": 1, "data": study.data_of(tmp_path)}
    results.write_text(json.dumps(line) + "\n")
    arguments = ["--plan", "routing", "--results", str(results), "--out", str(tmp_path / "out"), "--seeds", "1", "2"]
    arguments += ["--tokens", str(tmp_path)]
    (tmp_path / "out").mkdir()
    for arm in ("learned", "even", "learned-64"):
        (tmp_path / f"out/pace-{arm}.json").write_text("{}")
    study.main([*arguments, "--arms", "learned", "even", "none"])
    # what is known of an arm's steps is not measured again, and an arm of which it is not known is left out
    assert begun[0] == ["pace-none"]
    assert begun[1] == ["even-1", "learned-2", "even-2"]
    with pytest.raises(ValueError, match="plan is 'other'; must be one of routing"):
        study.main(["--plan", "other", "--results", str(results)])


def time_until(monkeypatch: pytest.MonkeyPatch, is_over: Callable[[], bool]) -> float:
    """When `study.in_lanes` has to end: as soon as this holds, however long a machine takes to start Python, and after
    five minutes at the latest."""

    def now() -> float:
        return math.inf if is_over() else time.monotonic()

    # not the module's own clock, by which others wait too
    monkeypatch.setattr(study, "time", SimpleNamespace(monotonic=now, sleep=time.sleep))
    return time.monotonic() + 300


def test_lanes_run_side_by_side_and_end_in_time(tmp_path, monkeypatch, capsys):
    python = sys.executable
    commands = {
        "good": [python, "-c", "print(1)"],
        "bad": [python, "-c", "raise SystemExit('broken')"],
        "slow": [python, "-c", "import time; time.sleep(600)"],
        "late": [python, "-c", "print(2)"],
    }
    # "slow" has the one lane until the end
    order = {name: commands[name] for name in ("good", "bad", "slow", "late")}
    study.in_lanes(order, 1, tmp_path, time_until(monkeypatch, (tmp_path / "slow.log").exists))
    said = capsys.readouterr().out
    assert (
        "bad failed: broken" in said and "slow was not done in time" in said and "late was not begun in time" in said
    )
    assert (tmp_path / "good.log").read_text() == "1\n"


# four processes, one after the other
@pytest.mark.slow
def test_the_command_leaves_a_line_for_each_run(corpus, tmp_path, capsys):
    arguments = ["--plan", "tiny", "--results", str(tmp_path / "results.jsonl"), "--corpus", str(corpus)]
    arguments += ["--tokens", str(corpus / "tokens"), "--out", str(tmp_path), "--steps", "6", "--modules", "2"]
    arguments += [part for field, value in SIZE.items() for part in (f"--{field}", str(value))]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}"}
    command = [sys.executable, "-m", "python_types.study", *arguments]
    printed = run_processes(command, env=environment, cwd=ROOT / "examples")
    assert "failed" not in printed, printed
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert sorted(line["arm"] for line in lines) == ["learned", "t5-window"]
    study.main([*arguments, "--report"])
    assert "| t5-window | " in capsys.readouterr().out


def test_what_has_ended_is_told_though_others_are_cut_off(tmp_path, monkeypatch, capsys):
    quick, broken, slow = "pass", "raise SystemExit('no memory')", "import time; time.sleep(600)"
    commands = {name: [sys.executable, "-c", code] for name, code in {"a": quick, "b": broken, "c": slow}.items()}
    ended: list[str] = []
    told: list[str] = []

    def both_are_told() -> bool:
        told.append(capsys.readouterr().out)
        return bool(ended) and "b failed" in "".join(told)

    study.in_lanes(commands, 3, tmp_path, time_until(monkeypatch, both_are_told), ended.append)
    assert ended == ["a"]
    told.append(capsys.readouterr().out)
    assert "b failed: no memory" in "".join(told) and "c was not done in time" in "".join(told)


def test_other_routers_choose_otherwise_and_weigh_as_they_should():
    config = CoLT5Config(**{**SIZE, "vocab_size": 384, "light_d_ff": 32, "heavy_d_ff": 64, "local_radius": 7})
    ids = torch.randint(3, 384, (1, 160), generator=torch.Generator().manual_seed(0))
    chosen = {}
    for way in (None, "even", "random", "other vectors"):
        torch.manual_seed(0)
        model = CoLT5ForConditionalGeneration(config).eval()
        lengths = [router.weight.norm() for router in learned_routers(model)]
        if way:
            ablation.replace_routers(model, way)
        with torch.no_grad():
            (routing,) = model.encoder(ids, output_routing=True).routing
        tokens = routing.query
        chosen[way] = tokens.indices[tokens.valid].tolist()
        weights = tokens.weights[tokens.valid]
        assert (weights == 1).all() if way in ablation.CONTROLS else (weights < 1).any()
        # fp32: a vector is scaled by a quotient of two rounded norms
        torch.testing.assert_close(
            [router.weight.norm() for router in learned_routers(model)], lengths, rtol=1e-5, atol=0
        )
    gaps = {later - earlier for earlier, later in zip(chosen["even"], chosen["even"][1:], strict=False)}
    assert len(gaps) <= 2 and len({tuple(each) for each in chosen.values()}) == 4
    with pytest.raises(ValueError, match="way is 'none'; it must be one of even"):
        ablation.replace_routers(model, "none")


@pytest.mark.slow
def test_the_ablation_asks_each_model_for_the_same_types(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("python_types.predict.LONGEST_ANSWER", 2)
    monkeypatch.setattr("python_types.predict.MEAN_ANSWER", 2)
    model = ARMS["learned"].model(study.Size(**SIZE), CPU)
    model.save_pretrained(tmp_path / "model")
    CoLT5Tokenizer.from_pretrained(VOCABULARY).save_pretrained(tmp_path / "model")
    files = ["--corpus", str(corpus), "--baselines", str(corpus / "tokens/baselines.json")]
    ablation.main(["--model", str(tmp_path / "model"), *files, "--most_modules", "1", "--budgets", "8"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        "| learned", "| even", "| random", "| other vectors", "| learned, one query among 8",
    ]  # fmt: skip
    task = next(task for task in study.tasks_of(corpus, ablation.SHARES) if task[1] == ablation.SHARE)
    asked = len(question_of(corpus / "tokens/baselines.json", VOCABULARY, task).keys)
    assert all(f"% of {asked} |" in row for row in rows[2:])


@pytest.mark.parametrize(
    ("environment", "count", "named"),
    [({}, 2, ["0", "1"]), ({"CUDA_VISIBLE_DEVICES": "1"}, 1, ["1"]), ({"CUDA_VISIBLE_DEVICES": "3,2"}, 2, ["3", "2"]),
     ({"CUDA_VISIBLE_DEVICES": ""}, 0, []), ({}, 0, [])],
)  # fmt: skip
def test_runs_stay_on_the_gpus_that_the_command_sees(environment, count, named):
    assert study.gpus_of(environment, count) == named
