"""Types that are copied from the module where the model is not sure: which, when, and how the threshold is chosen."""

import json
import lzma
from pathlib import Path

import annotate_types
import pytest
from annotate_types import annotate, read_source
from python_types import corpus, threshold
from python_types.evaluate import Record, tasks_of
from python_types.holes import as_type, holes_of
from python_types.predict import Prediction
from python_types.score import COPY_BELOW, is_copied, nearest_in_module

from modeling_colt5 import CoLT5Tokenizer

ROOT = Path(__file__).parent.parent
TEXT = """def first(path: Path, size: int) -> str: ...


def second(path: str, size, other: f(1)) -> None: ...


def third(path, size, other, alone): ...
"""
# places in order: second's size, then third's path, size, other, alone and return
ANSWERS = [("bool", 0.1), ("bytes", 0.95), ("int", 0.1), ("A", 0.2), ("B", 0.2), ("not a type", 0.99)]


@pytest.fixture
def answers(monkeypatch):
    def predict(model, tokenizer, rows, counts):
        each = iter(ANSWERS)
        for number, count in enumerate(counts):
            yield {number: [Prediction(as_type(kind), sure) for kind, sure in [next(each) for _ in range(count)]]}

    tokenizer = CoLT5Tokenizer.from_pretrained(ROOT / "tokenization/python_stdlib")
    monkeypatch.setattr(annotate_types, "predict_all", predict)
    monkeypatch.setattr(annotate_types, "load", lambda folder: (None, tokenizer))
    return tokenizer


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "module.py").write_text(TEXT)
    return tmp_path / "module.py"


def test_the_nearest_of_that_name_is_found():
    holes = holes_of(TEXT)
    chosen = [hole for hole in holes if hole.function == "third" or hole.annotation is None]
    assert [hole.key for hole in chosen] == ["size", "path", "size", "other", "alone", "third()"]
    # a call is no type that is written
    assert nearest_in_module(chosen, holes) == ["int", "str", "int", None, None, None]
    # what is itself to be filled is not copied
    assert nearest_in_module(holes, holes) == [None] * len(holes)


@pytest.mark.parametrize(
    ("given", "probability", "copied", "expected"),
    [
        ("int", 0.79, "str", True),
        ("int", 0.8, "str", False),
        ("int", 0.1, "int", False),
        ("int", 0.1, None, False),
        (None, 0.99, "str", True),
        (None, 0.99, None, False),
    ],
)
def test_when_it_is_copied(given, probability, copied, expected):
    assert is_copied(given, probability, copied, below=0.8) is expected


def test_a_copied_type_is_written_and_said_to_be_copied(answers, file, capsys):
    annotate_types.main([str(file)])
    output = capsys.readouterr()
    added = [line for line in output.out.splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert added == [
        "+def second(path: str, size: int, other: f(1)) -> None: ...",
        "+def third(path: bytes, size: int, other: A, alone: B): ...",
    ]
    assert output.err.splitlines()[:6] == [
        "copied  line 4: second, size: int (the model: bool, 10%)",
        " 95%  line 7: third, path: bytes",
        " 10%  line 7: third, size: int",
        " 20%  line 7: third, other: A",
        " 20%  line 7: third, alone: B",
        " 99%  line 7: third: left, for the answer is no type",
    ]


def test_the_least_probability_is_of_the_models_types_alone(answers, file):
    annotated = annotate(read_source(file), None, answers, least_probability=0.5)
    assert "def second(path: str, size: int, other" in annotated.text
    assert "def third(path: bytes, size, other, alone): ..." in annotated.text


def test_copying_can_be_left_out(answers, file, capsys):
    annotate_types.main([str(file), "--no-copy"])
    output = capsys.readouterr()
    assert "+def second(path: str, size: bool, other" in output.out and "copied" not in output.err


def test_a_score_counts_the_model_alone_too(answers, file, capsys):
    file.write_text("".join(f"def f{number}(a: T): ...\n" for number in range(4)))
    annotate_types.main([str(file), "--score"])
    first, second = capsys.readouterr().out.splitlines()
    # of two hidden ones the model gives "bool", which is not sure, and "bytes", which is; the other two show T
    assert first.startswith("2 annotations hidden (30%): right 50.0 %, the model alone 0.0 %, ")
    # nothing is left to copy
    assert second.startswith("4 annotations hidden (100%): right 0.0 %, the model alone 0.0 %, ")


def record(given: str | None, probability: float, copied: str | None, hidden: str = "T") -> Record:
    return Record("held", "m", 0.3, 9, "x", hidden, None, False, given, probability, copied, None, None)


def test_the_best_threshold_is_the_lowest_of_equals():
    # right to copy below 0.5 alone
    records = [record("A", 0.1, "T"), record("A", 0.48, "T"), record("T", 0.55, "A"), record("T", 0.9, "A")]
    shares = threshold.at_thresholds(records)
    assert shares[0.0].right == 2 and shares[0.5].right == 4 and shares[1.01].right == 2
    assert threshold.best_of(shares) == 0.5
    assert threshold.best_of(threshold.at_thresholds([record("T", 0.5, None)])) == 0.0
    assert COPY_BELOW in shares


def test_validation_is_neither_trained_on_nor_counted(tmp_path):
    with pytest.raises(ValueError, match="has no validation split"):
        tasks_of(tmp_path, [0.3], is_validation=True)
    for split in ("train", "held", corpus.VALIDATION):
        with lzma.open(tmp_path / f"{split}.jsonl.xz", "wt") as lines:
            lines.write(json.dumps({"split": split, "n_tokens": 5}) + "\n")
    assert [row["split"] for row, _ in tasks_of(tmp_path, [0.3])] == ["held"]
    assert [row["split"] for row, _ in tasks_of(tmp_path, [0.3], is_validation=True)] == [corpus.VALIDATION]


def test_validation_changes_no_other_split():
    def module(path: str, split: str) -> corpus.Module:
        return corpus.Module("p", "1", path, "MIT", split, "def f(a: int): ...\n" * 9, 9)

    kept, dropped = corpus.without_duplicates([module("a.py", corpus.VALIDATION), module("b.py", corpus.TRAIN)])
    assert [one.split for one in kept] == [corpus.TRAIN] and [one.split for one, _ in dropped] == [corpus.VALIDATION]
