"""The scripts of benchmarks/: each runs at toy size, keeps its history, and judges by rules that are checked here."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_inverse_sqrt_schedule

from modeling_colt5 import kernel_backend
from modeling_colt5.parameter_groups import size_scaled_groups

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import causal_facts  # noqa: E402
import causal_learning  # noqa: E402
import dense  # noqa: E402
import digits  # noqa: E402
import digits_report  # noqa: E402
import measure  # noqa: E402
import multi_gpu  # noqa: E402
import peers  # noqa: E402
import picture  # noqa: E402
import picture_speed  # noqa: E402
import results  # noqa: E402
import run  # noqa: E402
import targets  # noqa: E402
import warm_start  # noqa: E402
from captured_step import TrainingStep  # noqa: E402


# what is timed is PyTorch here: kernels have tests of their own, and interpreted ones would take minutes
@pytest.mark.slow
@pytest.mark.parametrize("name", run.SHARES)
def test_every_benchmark_runs_by_the_one_command(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_backend, "FORCED_BACKEND", "torch")
    run.main([name, "--tiny", "--out", str(tmp_path)])
    assert (tmp_path / "targets.md").exists() and (tmp_path / f"{name}.md").exists()
    (line,) = results.read_runs(name, tmp_path)
    assert line["complete"] and line["rows"]
    # a row says in its note that it failed
    assert [row for row in line["rows"] if "note" in row] == []
    for row in line["rows"]:
        assert all(value > 0 for value in row.values() if isinstance(value, int | float)), row
    assert (tmp_path / "encoder.svg").exists() == (name == "encoder")


# three runs that start Python anew: twenty seconds
@pytest.mark.slow
def test_two_processes_beside_one(tmp_path: Path) -> None:
    multi_gpu.main(["--tiny", "--kinds", "DDP", "--out", str(tmp_path)])
    (line,) = results.read_runs("multi_gpu", tmp_path)
    assert line["complete"] and [row["GPUs"] for row in line["rows"]] == [1, 2, 1]


# two runs that train several models
@pytest.mark.slow
def test_warm_start_goes_on_where_it_was_stopped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Stopped after its first step, and once more with time: the second run trains what is left."""
    arguments = ["--tiny", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    warm_start.main([*arguments, "--seconds", "0"])
    assert "out of time at t5: 1 of 8 steps" in capsys.readouterr().out
    warm_start.main(arguments)
    state = json.loads((tmp_path / "work" / "t5" / "checkpoint-8" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == list(range(1, 9))
    (line,) = results.read_runs("warm_start", tmp_path)
    assert line["complete"]
    (exact,) = (row for row in line["rows"] if "radius over the whole input" in row["model"])
    # it computes the same function
    assert exact["largest logit difference"] < 1e-4
    assert exact["held-out loss"] == pytest.approx(line["rows"][0]["held-out loss"], rel=1e-4)
    (steps,) = results.read_runs("warm_start_steps", tmp_path)
    assert steps["complete"] and [row["steps"] for row in steps["rows"]] == list(range(9))


@pytest.mark.slow
def test_framed_digits_run_at_toy_size(tmp_path: Path) -> None:
    digits.main(["--tiny", "--stages", "24:0.5:8", "36:0.5", "--out", str(tmp_path)])
    (line,) = results.read_runs("digits_36", tmp_path)
    assert line["complete"] and [row["arm"] for row in line["rows"]] == list(digits.ARMS)
    # one of nine patches goes to each router, and a ViT has none
    shares = [row["framed patches routed"] for row in line["rows"]]
    assert shares[0] <= 1 / 2 and shares[1] < 0.2 and shares[2] is None
    assert [curve["arm"] for curve in line["curves"]] == list(digits.ARMS)
    assert all(curve["step"] == [1, 2, 3, 4] and curve["side"] == [24, 24, 36, 36] for curve in line["curves"])


def test_framed_digits_of_several_processes_are_one_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    kept = results.newest_run("digits_256", ROOT / "benchmarks/results")
    folders = []
    for number, (row, curve) in reversed([*enumerate(zip(kept["rows"], kept["curves"], strict=True))]):
        folders.append(tmp_path / str(number))
        results.write_runs("digits_256", folders[-1], [kept | {"notes": [], "rows": [row], "curves": [curve]}])
    out = tmp_path / "out"
    arguments = [*map(str, folders), "--name", "digits_256", "--out", str(out)]
    digits_report.main([*arguments, "--note", kept["notes"][0]])
    assert results.read_runs("digits_256", out) == [kept]
    assert "evenly spaced patches" in (out / "digits_256.svg").read_text()
    results.write_runs("digits_256", folders[0], [kept | {"title": "another"}])
    with pytest.raises(SystemExit):
        digits_report.main(arguments)
    assert "runs differ in title" in capsys.readouterr().err


# four models are made and called
@pytest.mark.slow
def test_encoders_of_pictures_run_at_toy_size(tmp_path: Path) -> None:
    picture_speed.main(["--tiny", "--out", str(tmp_path)])
    (line,) = results.read_runs("picture_speed", tmp_path)
    assert line["complete"] and [row["model"] for row in line["rows"]] == list(picture_speed.MAKERS)
    assert all(row["both ms"] > 0 and "note" not in row for row in line["rows"])


def test_framed_digits_are_what_the_label_says() -> None:
    """With cells as large as a stamp nothing is between them, so each cell is a frame or none; labels name two."""
    pictures, labels, pixels = digits.Digits(False, 0, digits.STAMP).draw(8, 4 * digits.STAMP)
    assert labels.sum(1).eq(digits.MARKED).all()
    stamps = pictures.unfold(2, 10, 10).unfold(3, 10, 10).flatten(2, 3)[:, 0] * 0.35 + 0.25
    framed = torch.cat([stamps[..., 0, :], stamps[..., :, 0]], -1).amin(-1) > 0.99
    assert framed.sum(1).eq(digits.MARKED).all()
    # the pixels of framed stamps are all of theirs and no others
    covered = pixels.unfold(2, 10, 10).unfold(3, 10, 10).flatten(2, 3)[:, 0].flatten(2)
    assert torch.equal(covered.all(-1), framed) and torch.equal(covered.any(-1), framed)
    known = digits.Digits(False, 0, digits.STAMP)
    for row, own in enumerate(framed):
        inner = stamps[row][own][:, 1:-1, 1:-1]
        nearest = torch.cdist(inner.flatten(1), known.images.flatten(1).to(inner)).argmin(1)
        assert set(known.targets[nearest].tolist()) == set(labels[row].nonzero().flatten().tolist())


def test_a_lost_checkpoint_is_found() -> None:
    two = {"losses": {"1": 10.0, "11": 5.0, "12": 4.9}}
    multi_gpu.check("DDP", two, {"losses": {"11": 5.05, "12": 4.85}})
    with pytest.raises(RuntimeError, match="step 12 is 4.9 on two GPUs, 9.5 resumed"):
        multi_gpu.check("DDP", two, {"losses": {"11": 5.0, "12": 9.5}})
    with pytest.raises(RuntimeError, match="fell by 0"):
        multi_gpu.check("DDP", {"losses": {"1": 5.1, "11": 5.0, "12": 5.0}}, two)


def test_a_run_out_of_time_says_what_it_left_out(tmp_path: Path) -> None:
    run.main(["dense", "--tiny", "--out", str(tmp_path), "--seconds", "0"])
    (line,) = results.read_runs("dense", tmp_path)
    assert line["rows"] == [] and "Not measured for lack of time" in line["notes"][0]


def test_toy_numbers_and_unknown_names_are_refused(capsys: pytest.CaptureFixture) -> None:
    for arguments in (["--tiny"], ["encoders"]):
        with pytest.raises(SystemExit):
            run.main(arguments)
    message = capsys.readouterr().err
    assert "--tiny needs a folder of its own" in message and "'encoders' is no benchmark" in message


def options(folder: Path) -> Any:
    arguments = ["--out", str(folder), "--commit", "abc"]
    return measure.parse(measure.make_parser(""), arguments, needs_gpu=False)


def test_history_grows_and_the_newest_finished_run_is_shown(tmp_path: Path) -> None:
    for value in (1.5, 2.5):
        table = results.Table("thing", "Things", options(tmp_path))
        table.add({"a": value, "b": None})
        table.finish()
    first, second = (tmp_path / "thing.jsonl").read_text().splitlines()
    # a run that is killed keeps its rows, in the history alone
    results.Table("thing", "Things", options(tmp_path)).add({"a": 3.5})
    results.render("thing", tmp_path)
    lines = (tmp_path / "thing.jsonl").read_text().splitlines()
    assert lines[:2] == [first, second] and [json.loads(line)["rows"][0]["a"] for line in lines] == [1.5, 2.5, 3.5]
    assert "| 2.5 | – |" in (tmp_path / "thing.md").read_text()
    assert results.newest_run("other", tmp_path) is None


def encoder_run(date: str, **columns: float) -> results.Run:
    rows = [{"model": peers.COLT5, "batch": 1, "n": 16_384, "mode": "eager"} | columns]
    rows += [{"model": peers.LOCAL, "batch": 1, "n": 16_384, "mode": "eager", "forward ms": 40.0}]
    return {"device": "a card", "date": date, "commit": "abc", "rows": rows}


def called_run(date: str, **columns: float) -> results.Run:
    row = {"n": 16_384, "way": "called", "setting": ""}
    rows = [
        {"model": peers.COLT5} | row | columns,
        {"model": peers.LOCAL, "forward ms": 40.0, "fwd+bwd ms": 60.0} | row,
    ]
    # neither is the plain call
    rows += [{"model": peers.COLT5, "forward ms": 1.0} | row | other for other in ({"way": "modules"}, {"n": 512})]
    return {"device": "a card", "date": date, "commit": "abc", "rows": rows}


def test_target_is_judged_by_the_newest_run_that_measured_it() -> None:
    (target,) = (each for each in targets.TARGETS if each.work == "forward, 16,384 tokens")
    assert (target.limit, target.unit) == (6.5, "ms")
    older, newer = called_run("1", **{"forward ms": 5.0}), called_run("2", **{"fwd+bwd ms": 70.0})
    row = targets.judge(target, [older, newer])
    assert row["met"] == "yes" and row["reached"] == "5 ms" and row["where and when"] == "a card, 1, abc"
    assert row["LongT5 in the same run"] == "LongT5 local 40 (8.0 ×)"
    assert targets.judge(target, [older, called_run("3", **{"forward ms": 6.6})])["met"] == "no"
    assert targets.judge(target, [newer])["met"] == "not measured"


def test_peers_that_are_faster_as_called_are_named() -> None:
    run = called_run("1", **{"forward ms": 8.0, "fwd+bwd ms": 90.0})
    assert targets.faster_as_called(run) == ["LongT5 local: fwd+bwd at 16,384 (1.5 times); 2 compared."]
    assert targets.faster_as_called(called_run("1", **{"forward ms": 8.0})) == ["LongT5 local: nowhere; 1 compared."]


def test_best_mode_is_the_least_and_named() -> None:
    line = encoder_run("1", **{"forward ms": 8.0})
    line["rows"] += [{"model": peers.COLT5, "batch": 1, "n": 16_384, "mode": "captured", "forward ms": 5.5}]
    reached = targets.encoder_value(16_384, "forward ms", targets.ALL_MODES)(line)
    assert reached is not None and (reached.value, reached.how) == (5.5, "captured")
    (row,) = targets.growth(line)
    assert (row["n"], row["forward ms"], row["mode"]) == (16_384, 5.5, "captured")


def test_training_is_a_ratio_that_should_be_large() -> None:
    rates = {peers.COLT5: 600.0, peers.GLOBAL: 100.0}
    rows: list[results.Row] = [
        {"model": name, "input": 16_384, "input tokens/s": rate} for name, rate in rates.items()
    ]
    # the row of a try that ran out of memory
    rows.insert(1, {"model": peers.GLOBAL, "input": 16_384, "note": "out of memory"})
    # each is taken in its best mode; without a mode it was eager
    rows.insert(0, {"model": peers.COLT5, "input": 16_384, "input tokens/s": 300.0, "mode": "compiled"})
    rows.append({"model": peers.GLOBAL, "input": 16_384, "input tokens/s": 120.0, "mode": "compiled"})
    line = {"device": "a card", "date": "1", "commit": "abc", "rows": rows}
    row = targets.judge(targets.TARGETS[-1], [line])
    assert row["target"] == "≥ 5 times" and row["reached"] == "5 times" and row["met"] == "yes"
    assert row["how"] == "eager, 600 tokens/s; LongT5 compiled, 120"
    for other in rows:
        other["input"] = 64
    assert targets.judge(targets.TARGETS[-1], [line])["met"] == "not measured"


def test_where_dense_is_faster_is_said() -> None:
    def cell(n: int, ours: float | None, theirs: float | None) -> list[results.Row]:
        values = ((peers.COLT5, ours), (peers.DENSE_T5, theirs))
        return [{"batch": 1, "n": n, "model": name, "forward eager": value} for name, value in values]

    rows = cell(512, 6.0, 3.0) + cell(1024, 6.0, 6.5) + cell(2048, 7.0, None)
    sentence = dense.verdicts(rows)[0]
    assert sentence == "T5, dense, forward, eager: faster than CoLT5 at 1 × 512 (2.0 times); of 2 compared."
    assert dense.verdicts(cell(1024, 6.0, 6.5))[0].startswith("T5, dense, forward, eager: nowhere faster")


def test_picture_shows_lengths_and_crosses(tmp_path: Path) -> None:
    line = encoder_run("1", **{"forward ms": 8.0, "forward peak MiB": 100.0}) | {"complete": True}
    line["rows"] += [
        {"model": peers.GLOBAL, "batch": 1, "n": 65_536, "mode": "eager", "note": "forward: out of memory"}
    ]
    (tmp_path / "encoder.jsonl").write_text(json.dumps(line) + "\n")
    picture.draw(tmp_path)
    drawing = (tmp_path / "encoder.svg").read_text()
    assert all(f">{text}<" in drawing for text in ("16k", "64k", "out of memory", "LongT5 local"))


@pytest.mark.slow
def test_causal_facts_are_learned_once_and_tabled(tmp_path: Path) -> None:
    arguments = ["--steps", "2", "--length", "64", "--seeds", "0", "--out", str(tmp_path)]
    causal_facts.main([*arguments, "--variants", "dense start", "routed"])
    history = (tmp_path / "causal_facts.jsonl").read_text()
    assert (tmp_path / "causal_facts.md").read_text().count("| 0 |") == 2
    causal_facts.main([*arguments, "--variants", "dense start", "routed"])
    assert (tmp_path / "causal_facts.jsonl").read_text() == history


def test_questions_are_answered_by_their_facts() -> None:
    settings = causal_facts.Settings()
    ids, labels = causal_facts.draw(settings, torch.Generator().manual_seed(0))
    for row, own in zip(ids.tolist(), labels.tolist(), strict=True):
        facts = dict(divmod(token - 3, causal_facts.VALUES) for token in row if 3 <= token < causal_facts.FIRST_VALUE)
        places = [place for place, label in enumerate(own) if label != -100]
        assert len(facts) == len(places) == settings.facts
        for place in places:
            name = row[place - 1] - causal_facts.FIRST_QUESTION
            assert own[place] == row[place] == causal_facts.FIRST_VALUE + facts[name]


# four seconds, some in a process of its own
@pytest.mark.slow
def test_causal_learning_is_drawn_from_its_runs(tmp_path: Path) -> None:
    runs, page = tmp_path / "runs", tmp_path / "causal_routing.md"
    arguments = ["--tiny", "--seeds", "0", "--out", str(runs)]
    causal_learning.main([*arguments, "--seconds", "0"])
    assert list(runs.iterdir()) == []
    causal_learning.main(arguments)
    written = {path: path.stat().st_mtime_ns for path in runs.iterdir()}
    assert {path.stem for path in written} == {f"{variant}-0" for variant in causal_learning.VARIANTS}
    # what is complete is not done again
    causal_learning.main(arguments)
    assert {path: path.stat().st_mtime_ns for path in runs.iterdir()} == written
    page.write_text((ROOT / "docs/causal_routing.md").read_text(encoding="utf-8"), encoding="utf-8")
    done = [sys.executable, str(ROOT / "docs/causal_routing_picture.py"), "--results", str(runs), "--page", str(page)]
    subprocess.run(done, check=True)
    loss = json.loads((runs / "routed-0.json").read_text())["curve"][-1]["loss"]
    assert f"{loss:.4f}" in page.read_text() and page.with_suffix(".svg").exists()


def test_a_training_step_is_adamw_at_each_parameters_own_rate() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7, bias=False))
    with torch.no_grad():
        model[1].weight.mul_(0.01)
    peer = copy.deepcopy(model)
    # to two digits
    sizes = [float(f"{parameter.detach().square().mean().sqrt():.1e}") for parameter in model.parameters()]
    rates = [{"params": [p], "lr": 0.1 * size} for p, size in zip(peer.parameters(), sizes, strict=True)]
    optimizer = torch.optim.AdamW(rates, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = get_inverse_sqrt_schedule(optimizer, 2)
    # the schedule begins with a rate of 0, the step with its first rate; without gradients this one does nothing
    optimizer.step()
    schedule.step()

    def loss_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(batch["ids"]), batch["ids"])

    step = TrainingStep(model, lambda batch: loss_of(model, batch), size_scaled_groups(model, 0.1), 2)
    for _ in range(6):
        batch = {"ids": torch.randint(7, (5,))}
        loss = loss_of(peer, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        torch.testing.assert_close(step(batch), loss.detach())
    for parameter, expected in zip(model.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected)


def test_a_cooldown_falls_to_zero_after_the_last_step() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    model = torch.nn.ParameterList([parameter])
    step = TrainingStep(model, lambda _: parameter.sum(), [{"params": [parameter], "lr": 1.0}], 1, (5, 8))
    rates = []
    for _ in range(8):
        step({})
        rates.append(float(step.optimizer.param_groups[0]["lr"]) * (len(rates) + 1) ** 0.5)
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([1, 1, 1, 1, 1, 0.75, 0.5, 0.25]))
