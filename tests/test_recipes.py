"""docs/recipes.md: its blocks run, and give what a search over all spans and plain calls give."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model

from modeling_colt5 import (
    CoLT5EncoderModel,
    CoLT5ForCausalLM,
    CoLT5ForConditionalGeneration,
    CoLT5ForQuestionAnswering,
    CoLT5ForSequenceClassification,
    CoLT5ForTokenClassification,
    CoLT5Tokenizer,
)

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "my-summariser": CoLT5ForConditionalGeneration,
    "my-reader": CoLT5ForQuestionAnswering,
    "my-classifier": CoLT5ForSequenceClassification,
    "my-tagger": CoLT5ForTokenClassification,
    "my-encoder": CoLT5EncoderModel,
    "my-writer": CoLT5ForCausalLM,
}
# a ligature, which the vocabulary's normalisation makes two letters, and runs of white space
REPORT = "import os\n\n\ndef ﬁnd(path,  name):\n    return os.path.join(path, name)  # written by a cat\n"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The namespace in which all of the page's blocks have run, in order."""
    folder = tmp_path_factory.mktemp("recipes")
    torch.manual_seed(0)
    tokenizer = CoLT5Tokenizer.from_pretrained(ROOT / "tokenization/python_stdlib")
    for name, model_class in FOLDERS.items():
        tiny_model(model_class, vocab_size=8192, initializer_factor=2.0).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "report.txt").write_text(REPORT, encoding="utf-8")
    text = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "recipes"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            # blank lines before it, so that an error names the page's line
            lines = "\n" * (text.count("\n", 0, match.start(1)))
            exec(compile(lines + match[1], "docs/recipes.md", "exec"), namespace)
        # a part on disk is read from the folder by its relative name
        yield namespace


def test_a_summary_is_the_same_alone_and_in_a_batch(page):
    alone = [page["summarise"]([text], max_new_tokens=20)[0] for text in (REPORT, "A short note.")]
    assert page["summaries"] == alone
    tokenizer, model = page["tokenizer"], page["summariser"]
    ids = tokenizer(REPORT, return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=20)[0], skip_special_tokens=True)
    assert alone[0] == expected


@pytest.mark.parametrize("longest", [1, 3, 30])
@pytest.mark.parametrize("question", ["Who wrote it?", "def ﬁnd"])
def test_the_answer_is_the_best_of_all_spans(page, question, longest):
    """By trying every pair of tokens, with places taken from each token's own offsets."""
    tokenizer, model = page["tokenizer"], page["reader"]
    encoded = tokenizer(question, REPORT, return_offsets_mapping=True)
    with torch.no_grad():
        output = model(torch.tensor([encoded["input_ids"]]))
    start, end = output.start_logits[0].tolist(), output.end_logits[0].tolist()
    # the document begins behind the end of the question, and its own end mark is no part of it
    begin = encoded["input_ids"].index(tokenizer.eos_token_id) + 1
    places = range(begin, len(encoded["input_ids"]) - 1)
    spans = {(i, j): start[i] + end[j] for i in places for j in places if i <= j < i + longest}
    first, last = max(spans, key=spans.get)
    offsets = encoded["offset_mapping"]
    expected = REPORT[offsets[first][0] : offsets[last][1]]
    found = page["answer"](question, REPORT, longest)
    assert found["answer"] == expected and REPORT[found["start"] : found["end"]] == expected
    probability = torch.tensor(list(spans.values())).softmax(0).max().item()
    # fp32 sums in another order
    assert found["score"] == pytest.approx(probability, rel=1e-4)


def test_a_planted_answer_comes_back_as_written(page, monkeypatch):
    """From text to positions of training, and from the head's logits back to the same text."""
    tokenizer, question = page["tokenizer"], "What does it do?"
    for text in ("ﬁnd", "os.path.join(path, name)", " written by a cat", "import os"):
        begin = REPORT.index(text)
        example = page["with_positions"](question, REPORT, begin, begin + len(text))
        tokens = example["input_ids"][example["start_positions"] : example["end_positions"] + 1]
        assert tokenizer.decode(tokens) == tokenizer.decode(tokenizer(text.strip())["input_ids"][:-1])

        class Certain(torch.nn.Module):
            device = torch.device("cpu")

            def forward(self, input_ids: torch.Tensor, example=example, **_: Any) -> Any:
                hot = torch.nn.functional.one_hot
                length = input_ids.shape[1]
                logits = {
                    f"{kind}_logits": 50.0 * hot(torch.tensor([example[f"{kind}_positions"]]), length)
                    for kind in ("start", "end")
                }
                return type("Output", (), logits)

        monkeypatch.setitem(page, "reader", Certain())
        assert page["answer"](question, REPORT) | {"score": 1.0} == {
            "answer": text.strip(),
            "start": begin + len(text) - len(text.lstrip()),
            "end": begin + len(text),
            "score": 1.0,
        }


def test_an_answer_that_was_cut_off_gives_no_example(page):
    document = "import os\n" * 9000
    assert page["with_positions"]("Which?", document, len(document) - 3, len(document) - 1) is None
    assert page["with_positions"]("Which?", document, 0, 6) is not None


@torch.no_grad()
def test_pipelines_give_what_plain_calls_give(page):
    tokenizer = page["tokenizer"]
    texts = ["def main(): pass", "import os, sys"]
    # pipelines put their models on a GPU where there is one
    device = page["classify"].model.device
    batch = tokenizer(texts, padding=True, return_tensors="pt").to(device)
    logits = page["classify"].model(**batch).logits
    names = page["classify"].model.config.id2label
    results = page["classify"](texts, batch_size=2)
    assert [result["label"] for result in results] == [names[i] for i in logits.argmax(-1).tolist()]

    logits = page["tag"].model(**batch).logits
    for row, groups in enumerate(page["tag"](texts, batch_size=2)):
        offsets = tokenizer(texts[row], return_offsets_mapping=True)["offset_mapping"][:-1]
        kinds = [page["tag"].model.config.id2label[i] for i in logits[row, : len(offsets)].argmax(-1).tolist()]
        by_place = {place: group["entity_group"] for group in groups for place in range(group["start"], group["end"])}
        for (begin, stop), kind in zip(offsets, kinds, strict=True):
            assert {by_place.get(place) for place in range(begin, stop)} == {kind}

    ids = tokenizer("import os", return_tensors="pt")["input_ids"].to(device)
    # pipelines run in inference mode; the same operations
    torch.testing.assert_close(page["states"], page["read"].model(ids).last_hidden_state.cpu())
    padded = page["read"](texts, batch_size=2, return_tensors=True)
    states = page["read"].model(**batch).last_hidden_state.cpu()
    torch.testing.assert_close(padded[1][0][: len(ids[0])], states[1, : len(ids[0])], rtol=1e-4, atol=1e-4)


def test_a_text_is_continued_behind_its_last_token(page):
    """As by `generate` on the prompt's tokens without an end mark, which the pipeline's default would add."""
    tokenizer, model, prompt = page["tokenizer"], page["write"].model, page["prompt"]
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    assert tokenizer.eos_token_id not in ids
    generated = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    text = tokenizer.decode(generated, skip_special_tokens=True)
    assert page["continued"] == text != ""
    by_default = {name: value for name, value in page["how"].items() if name != "add_special_tokens"}
    assert page["write"](prompt, **by_default)[0]["generated_text"] != text


def test_a_spread_model_generates_the_same(page):
    assert "disk" in page["large"].hf_device_map.values()
    ids = page["tokenizer"](REPORT, return_tensors="pt")["input_ids"]
    generated = [page[name].generate(ids, max_new_tokens=5) for name in ("large", "summariser")]
    assert torch.equal(*generated)
