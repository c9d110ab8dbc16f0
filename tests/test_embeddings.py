"""The embeddings example: its local task, its scores against counts by hand, and a run that learns."""

import json
from pathlib import Path

import data
import pytest
import upload
from example_runs import FAST, NEW_MODEL, TOKENIZER, write_rows
from huggingface_hub import ModelCard
from rounding import assert_trained_alike
from safetensors.torch import load_file
from test_readme import blocks

embeddings = pytest.importorskip("embeddings", reason="sentence-transformers is not installed", exc_type=ImportError)

SOURCE = '''
import os


def area(width, height):
    """Give the area of a rectangle. Both sides are in metres.

    More about it.
    """
    total = 0
    for row in range(height):
        total += width  # a comment
    return total if total > 0 else 0 * total + os.cpu_count() * 0


def short(x):
    """It is too little code."""
    return x


def undocumented(width, height):
    return [width * height for column in range(width) for row in range(height) if column and row and width]


class Shelf:
    """Keep books in the order of their names."""

    def __init__(self, books):
        """Its own docstring stays."""
        self.books = sorted(books, key=lambda book: book.name) if books else []
        self.count = len(self.books)
'''


def test_docstrings_and_the_code_without_them():
    pairs = dict(embeddings.documented_code(SOURCE))
    assert list(pairs) == ["Give the area of a rectangle", "Keep books in the order of their names."]
    for query, code in pairs.items():
        assert query not in code and compile(code, "code", "exec")
    assert "def area(width, height):" in pairs["Give the area of a rectangle"]
    assert "Its own docstring stays" in pairs["Keep books in the order of their names."]
    assert list(embeddings.documented_code("def broken(:\n")) == []


def test_whole_modules_are_held_out_and_nothing_stands_twice(tmp_path):
    for i in range(10):
        folder = tmp_path / f"module{i}"
        folder.mkdir()
        for name in ("one.py", "two.py"):
            (folder / name).write_text(SOURCE.replace("area", f"area_{i}_{name[:3]}").replace("books", f"books{i}"))
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "skipped.py").write_text(SOURCE.replace("area", "area_of_tests"))
    rows = embeddings.local_pairs(tmp_path, "query", "document")
    owners = {
        split: {word for document in part["document"] for word in document.split("(")[0].split() if "area_" in word}
        for split, part in rows.items()
    }
    assert not owners["train"] & owners["validation"]
    everything = [*rows["train"]["query"], *rows["validation"]["query"]]
    assert len(everything) == len(set(everything)) and not any("tests" in query for query in everything)


def test_the_score_by_words():
    documents = ["the red fox runs", "a blue whale swims", "green birds fly"]
    assert embeddings.words_score(["red fox", "blue whale", "green birds"], documents) == 1
    # each query names the next document alone: its own has the mean rank of two that nothing speaks for
    assert embeddings.words_score(["blue whale", "green birds", "red fox"], documents) == pytest.approx(1 / 2.5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], Path]:
    folder = tmp_path_factory.mktemp("embeddings")
    things = ["fox", "whale", "bird", "horse", "snake", "tiger", "mouse", "eagle"]
    rows = [
        {
            "query": f"where is the {thing} number {i}",
            "document": f"def find_{thing}(place{i}):\n    return {thing!r}, {i}",
        }
        for i in range(4)
        for thing in things
    ]
    file = write_rows(folder / "pairs.jsonl", rows)
    arguments = [
        *NEW_MODEL,
        *FAST,
        "--train_file",
        file,
        "--validation_file",
        file,
        "--output_dir",
        str(folder / "out"),
    ]
    arguments += ["--per_device_train_batch_size", "16", "--max_steps", "40", "--max_length", "64"]
    arguments += ["--router_health_steps", "10"]
    return embeddings.main([*arguments, "--eval_strategy", "no", "--save_strategy", "no"]), folder


# a run of forty steps
@pytest.mark.slow
def test_a_run_learns_to_find_documents(trained, monkeypatch):
    metrics, folder = trained
    assert metrics["queries"] == 32
    assert metrics["eval_mrr@10"] > metrics["before_mrr@10"] + 0.2
    model = embeddings.SentenceTransformer(str(folder / "out"), device="cpu")
    assert model.encode(["def f(): pass", "x"]).shape == (2, 32)
    (page,) = (block.text for block in blocks("docs/embeddings.md") if block.language == "python")
    # the page calls the folder so
    (folder / "embeddings").symlink_to(folder / "out")
    monkeypatch.chdir(folder)
    exec(page, namespace := {})
    assert namespace["vectors"].shape == (2, 32)
    assert type(model[0].auto_model).__name__ == "CoLT5EncoderModel" and model[0].auto_model.config.routers_trained


@pytest.mark.slow
def test_a_run_leaves_the_health_of_its_routers(trained):
    """Their vectors have no gradient in the closed part of the dense start, which is half of the steps."""
    _, folder = trained
    log = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    measured = {row["step"]: row for row in log if "routers/0/query/score_std" in row}
    assert list(measured) == [10, 20, 30, 40]
    for router in ("query", "key_value", "feed_forward"):
        norms = [row[f"routers/0/{router}/gradient_norm"] for row in measured.values()]
        assert norms[0] == 0 and norms[-1] > 0
        assert all(row[f"routers/0/{router}/score_std"] > 0 for row in measured.values())


@pytest.mark.slow
def test_a_runs_card_loads_it_with_sentence_transformers(trained, capsys):
    metrics, folder = trained
    # the repository's name here is the folder's, so that the card's own lines load it
    upload.main([str(folder / "out"), str(folder / "out"), "--dry-run"])
    card = ModelCard.load(folder / "out" / "README.md")
    assert card.data.library_name == "sentence-transformers" and card.data.pipeline_tag == "sentence-similarity"
    assert {result.metric_name: result.metric_value for result in card.data.eval_results} == {
        name: round(metrics[f"eval_{name}"], 4) for name in ("mrr@10", "recall@10")
    }
    capsys.readouterr()
    exec(card.text.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out == "(2, 32)\n"


def test_what_is_cut_is_said(tmp_path, monkeypatch):
    """With the numbers of tokens that the tokenizer gives of whole texts."""
    said = []
    monkeypatch.setattr(data.logger, "warning", said.append)
    queries, documents = ["a", "x"], ["def f(x):\n    return x\n" * i for i in (1, 2)]
    rows = embeddings.DatasetDict({"train": embeddings.Dataset.from_dict({"q": queries, "d": documents})})
    tokenizer = embeddings.load_tokenizer(embeddings.ModelArguments(tokenizer_name=str(TOKENIZER)))
    counts = [len(tokenizer(text)["input_ids"]) for text in documents]
    longest = counts[0] + 1
    task = embeddings.TaskArguments(query_column="q", document_column="d", max_length=longest)
    training = embeddings.RunArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    embeddings.say_what_is_cut(rows, task, tokenizer, training)
    lost = counts[1] - longest
    assert lost > 0 and said == [
        f"train: 1 of 2 documents were cut, and {lost} tokens of {sum(counts)} lost; the longest lost {lost}"
    ]


# two runs of two steps
@pytest.mark.slow
@pytest.mark.parametrize("why", ["routing=even", "--dense_start false"])
def test_a_dense_start_can_be_left_out(why, tmp_path):
    """For want of learned routers, which is no error, and by its option."""
    file = write_rows(tmp_path / "pairs.jsonl", [{"query": f"a {i}", "document": f"b {i}"} for i in range(4)])
    arguments = [*NEW_MODEL, *FAST, "--output_dir", str(tmp_path / "out"), "--train_file", file]
    arguments += ["--validation_file", file, "--max_steps", "2", "--max_length", "8"]
    arguments += ["--save_strategy", "no", "--eval_strategy", "no"]
    if why.startswith("--"):
        arguments += why.split()
    else:
        place = arguments.index("--config_overrides") + 1
        arguments[place] += f",{why}"
    assert embeddings.main(arguments)["queries"] == 4
    assert not json.loads((tmp_path / "out" / "config.json").read_text()).get("routers_trained", False)


# two runs
@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_pairs_held_out(tmp_path):
    """And ends with the weights of a run without the break."""
    rows = [{"query": f"where is number {i}", "document": f"def find_{i}(x): return {i}"} for i in range(10)]
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    arguments = [*NEW_MODEL, *FAST, "--train_file", file, "--validation_share", "0.2", "--max_steps", "4"]
    arguments += ["--save_steps", "2", "--save_total_limit", "9", "--learning_rate", "1e-2", "--output_dir"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert embeddings.main([*arguments, str(whole)])["queries"] == 2
    resumed.mkdir()
    (whole / "checkpoint-2").rename(resumed / "checkpoint-2")
    saved = (resumed / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns
    embeddings.main([*arguments, str(resumed), "--resume_from_checkpoint", "true"])
    # a run from the beginning would have saved it anew, and ended with the same weights
    assert (resumed / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns == saved
    weights, expected = (load_file(folder / "checkpoint-4" / "model.safetensors") for folder in (resumed, whole))
    assert_trained_alike(weights, expected, 1e-2)


def test_what_cannot_be_is_refused(tmp_path):
    file = write_rows(tmp_path / "pairs.jsonl", [{"query": "a", "document": "b"}])
    arguments = [*NEW_MODEL, *FAST, "--output_dir", str(tmp_path / "out"), "--train_file", file]
    with pytest.raises(ValueError, match="give --validation_file"):
        embeddings.main(arguments)
    with pytest.raises(ValueError, match="holds out all of the 1 training rows"):
        embeddings.main([*arguments, "--validation_share", "0.5"])
    with pytest.raises(ValueError, match="dry_run has no formula"):
        embeddings.main([*arguments, "--dry_run", "true"])
    with pytest.raises(ValueError, match="dense_start_input_share is 0.5; embeddings read texts whole"):
        embeddings.main([*arguments, "--dense_start_input_share", "0.5"])
    for name, least in (("max_length", 2), ("rows_of_a_pass", 1), ("max_train_samples", 1)):
        with pytest.raises(ValueError, match=f"^{name} is 0; it must be at least {least}$"):
            embeddings.main([*arguments, f"--{name}", "0"])
    with pytest.raises(ValueError, match="train has no column answer"):
        embeddings.main([*arguments, "--validation_file", file, "--document_column", "answer"])
