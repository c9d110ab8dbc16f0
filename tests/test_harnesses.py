"""Evaluation harnesses: mteb for embeddings and lm-eval for the causal model, each on a small local task in its own
format, against scores from the model's own numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from example_runs import TOKENIZER
from models import tiny_model

from modeling_colt5 import CoLT5EncoderModel, CoLT5ForCausalLM, CoLT5Tokenizer

# without spaces at their ends, which mteb leaves out
TEXTS = [f"def {n}(x):\n    return x {sign} {i}" for i, (n, sign) in enumerate(zip("abcdef", "+-*/%&", strict=True))]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_retrieval(folder: Path, queries: list[str]) -> None:
    """A retrieval task as mteb reads one: corpus, queries, and which document answers which query."""
    write_lines(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(TEXTS)])
    write_lines(folder / "queries.jsonl", [{"_id": f"q{i}", "text": text} for i, text in enumerate(queries)])
    write_lines(
        folder / "qrels" / "test.jsonl",
        [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in range(len(queries))],
    )
    parts = [
        f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {path}\n"
        for name, split, path in (
            ("default", "test", "qrels/test.jsonl"),
            ("corpus", "corpus", "corpus.jsonl"),
            ("queries", "queries", "queries.jsonl"),
        )
    ]
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(parts)}---\n", encoding="utf-8")


# imports mteb and sentence-transformers, which takes some ten seconds
@pytest.mark.slow
def test_mteb_scores_an_embedding_model(tmp_path):
    """The mean reciprocal rank is that of the vectors' cosines."""
    mteb = pytest.importorskip("mteb", reason="mteb is not installed", exc_type=ImportError)
    from mteb.abstasks import AbsTaskRetrieval
    from sentence_transformers import SentenceTransformer

    tiny_model(CoLT5EncoderModel, vocab_size=8192).save_pretrained(tmp_path / "encoder")
    CoLT5Tokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "encoder")
    model = SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    queries = [text.split("\n")[0] for text in TEXTS]
    write_retrieval(tmp_path / "task", queries)

    class LocalRetrieval(AbsTaskRetrieval):
        metadata = mteb.TaskMetadata(
            name="LocalRetrieval",
            description="Find the function that a line begins.",
            dataset={"path": str(tmp_path / "task"), "revision": "local"},
            type="Retrieval",
            category="t2t",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="mrr_at_10",
            reference=None,
            date=None,
            domains=None,
            task_subtypes=None,
            license=None,
            annotations_creators=None,
            dialect=None,
            sample_creation=None,
            bibtex_citation="",
        )

    result = mteb.evaluate(model, LocalRetrieval(), cache=None, show_progress_bar=False)
    found = result.task_results[0].scores["test"][0]["mrr_at_10"]
    # by hand: no two cosines of random vectors are the same
    asked, answers = (torch.from_numpy(model.encode(texts, normalize_embeddings=True)) for texts in (queries, TEXTS))
    likeness = asked @ answers.T
    ranks = 1 + (likeness > likeness.diagonal()[:, None]).sum(1)
    # mteb rounds to five places
    assert found == pytest.approx((1 / ranks).mean().item(), abs=1e-5)


def log_probability(model: CoLT5ForCausalLM, context: list[int], continuation: list[int]) -> float:
    """Of the continuation after the context, one token at a time and without a cache."""
    total = 0.0
    for i, token in enumerate(continuation):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context + continuation[:i]])).logits[0, -1]
        total += logits.log_softmax(-1)[token].item()
    return total


# imports lm-eval, which takes some ten seconds
@pytest.mark.slow
def test_lm_eval_scores_a_causal_model(tmp_path):
    """A task of choices and one of generated text: the choice is the model's own, and so is what it generates."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed", exc_type=ImportError)
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = CoLT5Tokenizer.from_pretrained(TOKENIZER)
    routed = {"causal_attention": "routed", "causal_feed_forward": "routed", "causal_window": 8, "num_heavy_heads": 4}
    torch.manual_seed(0)
    model = tiny_model(CoLT5ForCausalLM, vocab_size=8192, **routed)
    choices = ["return x", "import os", "pass"]
    rows = [{"text": text, "choices": choices, "answer": i % 3} for i, text in enumerate(TEXTS)]
    write_lines(tmp_path / "rows.jsonl", rows)
    common = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\ntest_split: test\n"
        "num_fewshot: 0\n"
    )
    (tmp_path / "choose.yaml").write_text(
        f"task: local_choice\noutput_type: multiple_choice\n{common}doc_to_text: '{{{{text}}}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\nmetric_list:\n  - metric: acc\n"
    )
    (tmp_path / "generate.yaml").write_text(
        f"task: local_generation\noutput_type: generate_until\n{common}doc_to_text: '{{{{text}}}}'\n"
        "doc_to_target: '{{choices[0]}}'\ngeneration_kwargs:\n  until: ['never']\n  max_gen_toks: 6\n"
        "  do_sample: false\nmetric_list:\n  - metric: exact_match\n"
    )
    # add_bos_token: with special tokens T5's vocabulary ends every context with </s>
    harness = HFLM(model, "causal", tokenizer=tokenizer, add_bos_token=False, device="cpu", batch_size=4)
    results = lm_eval.simple_evaluate(
        model=harness,
        tasks=["local_choice", "local_generation"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    right = 0
    for sample in results["samples"]["local_choice"]:
        context = tokenizer(sample["doc"]["text"], add_special_tokens=False)["input_ids"]
        expected = []
        for choice in choices:
            whole = tokenizer(f"{sample['doc']['text']} {choice}", add_special_tokens=False)["input_ids"]
            expected.append(log_probability(model, context, whole[len(context) :]))
        # fp32 sums in another order over some five tokens
        assert [answer[0] for answer in sample["filtered_resps"]] == pytest.approx(expected, abs=1e-3)
        right += max(range(3), key=expected.__getitem__) == sample["doc"]["answer"]
    assert results["results"]["local_choice"]["acc,none"] == pytest.approx(right / len(rows))
    for sample in results["samples"]["local_generation"]:
        ids = tokenizer(sample["doc"]["text"], add_special_tokens=False, return_tensors="pt")["input_ids"]
        generated = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert sample["resps"][0][0] == tokenizer.decode(generated, skip_special_tokens=True)
