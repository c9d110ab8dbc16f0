"""Training rows against the tokenizer on changed text, answers in form, runs that go on, the evaluation's tables."""

import json
import lzma
import math
import re
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from example_runs import run_processes
from python_types import checkpoint, evaluate, train
from python_types.evaluate import Question, answered, question_of, row_of, summary, tables, tasks_of
from python_types.holes import hide, holes_of, holes_to_hide
from python_types.predict import AnswersInOrder, Prediction, in_batches, load, predict, predict_all
from python_types.renaming import Renaming
from python_types.retyping import Retyping
from python_types.training_rows import Batches, Shape, Tokens, load_tokens, shapes_of, tokenise
from python_types.weights import load_weights, save_weights
from transformers import AutoModelForSeq2SeqLM, HfArgumentParser

from modeling_colt5 import CoLT5ForConditionalGeneration, CoLT5Tokenizer

ROOT = Path(__file__).parent.parent
VOCABULARY = ROOT / "tokenization/python_stdlib"
SIZES = {
    "d_model": 32,
    "d_kv": 8,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "num_light_heads": 1,
    "light_d_ff": 32,
    "heavy_d_ff": 64,
    "d_ff": 32,
    "batch_tokens": 512,
    "warmup_steps": 4,
}
KINDS = ["int", "float", "str"]
LENGTHS = ["--start_lengths", "256", "512", "--lengths", "256", "512"]
TINY = [*LENGTHS, *(part for name, size in SIZES.items() for part in (f"--{name}", str(size)))]
LINES = [
    "def plain{0}(first: int, second: str | None = None, *rest: 'Tensor{0}', **more: Any) -> Dict[str, int]:",
    "    return {{first: second}}",
    "def tight{0}(a:int=1,b:List[str]=())->None:return a",
    "class C{0}:",
    "    async def several(self, value: Union[",
    "        int,  # <extra_id_3>, é",
    "        str,",
    "    ] = None) -> (int):  # 名: int",
    "\tpass".replace("\t", "        "),
    "    def none(self, x, y=1): return '→', x",
]
MODULE = "import typing\n\n" + "\n".join(LINES) + "\n"


def module(number: int, repeats: int = 1) -> str:
    return "".join(MODULE.format(f"{number}_{repeat}") for repeat in range(repeats))


@pytest.fixture(scope="module")
def tokenizer() -> CoLT5Tokenizer:
    return CoLT5Tokenizer.from_pretrained(VOCABULARY)


@pytest.fixture(scope="module")
def tokens(tokenizer: CoLT5Tokenizer) -> Tokens:
    texts = [module(number, repeats) for number, repeats in enumerate((1, 1, 2, 3, 6))]
    return Tokens.of(tokenise(text, holes_to_hide(holes_of(text)), tokenizer) for text in texts)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_hiding_tokens_is_hiding_text(tokenizer, end):
    text = module(0, 2).replace("\n", end)
    holes = holes_to_hide(holes_of(text))
    whole = tokenise(text, holes, tokenizer)
    # of annotations without a space between them the first alone can be hidden
    apart = [hole for hole in holes if not hole.function.startswith("tight") or hole.key == "a"]
    assert len(whole.first) == len(apart) == len(holes) - 4
    sentinels = tokenizer.get_sentinel_token_ids()
    generator = np.random.default_rng(0)
    for share in (0.1, 0.5, 1.0):
        chosen = np.sort(generator.choice(len(apart), math.ceil(share * len(apart)), replace=False))
        row, position, target = [], 0, []
        for sentinel, hole in zip(sentinels, chosen, strict=False):
            row += [*whole.tokens[position : whole.first[hole]], *whole.before[hole], sentinel, *whole.after[hole]]
            target += [sentinel, *whole.type[hole]]
            position = whole.last[hole]
        hidden = hide(text, [apart[hole] for hole in chosen])
        assert [*row, *whole.tokens[position:], 1] == tokenizer(hidden.text)["input_ids"]
        assert [*target, 1] == tokenizer(hidden.target)["input_ids"]


def test_rows_of_whole_modules_are_their_texts(tokens, tokenizer):
    batches = Batches(tokens, [Shape(2, 4096, 512)], 1.0, tokenizer.get_sentinel_token_ids(), 0, share=1.0)
    for index, repeats in enumerate((1, 1, 2, 3, 6)):
        text = module(index, repeats)
        holes = [hole for hole in holes_to_hide(holes_of(text)) if "tight" not in hole.function or hole.key == "a"]
        row, target = batches.types(index, batches.shapes[0], np.random.default_rng(0))
        hidden = hide(text, holes)
        assert row.tolist() == tokenizer(hidden.text)["input_ids"]
        assert target.tolist() == tokenizer(hidden.target)["input_ids"]


@pytest.mark.parametrize("task", ["types", "spans"])
def test_rows_fit_and_ask_for_what_they_show(tokens, tokenizer, task):
    sentinels = tokenizer.get_sentinel_token_ids()
    batches = Batches(tokens, shapes_of([256, 512], 512), float(task == "types"), sentinels, 0)
    seen = set()
    for number in range(30):
        drawn, batch = batches[number]
        assert drawn == task
        shape = batch["input_ids"].shape
        seen.add(shape)
        assert shape in {(2, 256), (1, 512)}
        assert batch["labels"].shape == (shape[0], shape[1] // 2)
        assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == 0)
        for row, mask, target in zip(*batch.values(), strict=True):
            row, target = row[mask > 0].tolist(), target[target >= 0].tolist()
            asked = [token for token in row if token in sentinels]
            assert asked == sentinels[: len(asked)] == [token for token in target if token in sentinels]
            assert asked and row[-1] == target[-1] == 1
    assert len(seen) == 2


def test_spans_put_back_are_the_module(tokens, tokenizer):
    sentinels = tokenizer.get_sentinel_token_ids()
    batches = Batches(tokens, [Shape(1, 4096, 512)], 0.0, sentinels, 0)
    for index in range(len(tokens)):
        row, target = batches.spans(index, batches.shapes[0], np.random.default_rng(index))
        spans: dict[int, list[int]] = {}
        for token in target[:-1].tolist():
            if token in sentinels:
                key = token
            else:
                spans.setdefault(key, []).append(token)
        whole = [part for token in row[:-1].tolist() for part in spans.get(token, [token])]
        assert whole == tokens.module(index).tolist()
        # T5's density, to a token
        assert abs(sum(map(len, spans.values())) - 0.15 * len(whole)) <= 1


def test_a_batch_depends_on_its_number_seed_and_process(tokens, tokenizer):
    def batches(seed: int, rank: int) -> list[torch.Tensor]:
        made = Batches(tokens, shapes_of([256, 512], 512), 0.5, tokenizer.get_sentinel_token_ids(), seed, rank)
        return [made[number][1]["input_ids"] for number in (5, 3, 4)]

    first, other = batches(0, 0), batches(0, 1)
    assert all(map(torch.equal, first, batches(0, 0)))
    # the processes of a step read other text of the same shape
    assert [batch.shape for batch in first] == [batch.shape for batch in other]
    assert not any(map(torch.equal, first, other))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, batches(1, 0), strict=True))


def test_answers_keep_their_form(tokenizer):
    sentinels, eos = tokenizer.get_sentinel_token_ids(), tokenizer.eos_token_id
    form = AnswersInOrder(torch.tensor(sentinels), torch.tensor([1, 3]), [0, 2], eos)
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(2, 1, dtype=torch.long)
    for _ in range(250):
        scores = torch.randn(2, 8103, generator=generator)
        # the model would end at once, or skip
        scores[:, [eos, sentinels[2], 0]] += 5.0
        ids = torch.cat([ids, form(ids, scores).argmax(-1, keepdim=True)], 1)
    for row, count in zip(ids.tolist(), (1, 3), strict=True):
        answers = row[1 : row.index(eos)]
        places = [place for place, token in enumerate(answers) if token in sentinels]
        assert [answers[place] for place in places] == sentinels[:count] and places[0] == 0
        lengths = np.diff([*places, len(answers)]) - 1
        assert (lengths >= 1).all() and (lengths <= 32).all() and not {0, 2} & set(answers)


def test_probabilities_are_the_models(tokenizer, monkeypatch):
    monkeypatch.setattr("python_types.predict.LONGEST_ANSWER", 8)
    torch.manual_seed(0)
    (size, _) = parsed(["--tokens", "x"])
    model = train.CoLT5ForConditionalGeneration(size.config()).eval()
    rows = [tokenizer(f"def f(a: <extra_id_0>, b: <extra_id_1>): {'pass' * n}")["input_ids"] for n in (1, 9)]
    answers = predict(model, tokenizer, rows, [2, 2])
    asked = []
    generate = model.generate

    def kept(**kwargs):
        asked.append(generate(**kwargs))
        return asked[-1]

    model.generate = kept
    assert predict(model, tokenizer, rows, [2, 2]) == answers
    ids = asked[0]
    for number, row in enumerate(rows):
        own = ids[number, : ids[number].tolist().index(1) + 1]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row]), decoder_input_ids=own[None, :-1]).logits[0]
        logs = logits.log_softmax(-1).gather(1, own[1:, None])[:, 0]
        sentinels = tokenizer.get_sentinel_token_ids()
        begins = [place for place, token in enumerate(own[1:].tolist()) if token in sentinels]
        for answer, begin, end in zip(answers[number], begins, [begins[1], len(logs) - 1], strict=True):
            # fp32, padded and with a cache
            assert answer.probability == pytest.approx(logs[begin + 1 : end + 1].sum().exp().item(), rel=1e-3)


@pytest.mark.slow
def test_many_rows_are_answered_as_each_alone(tokenizer, monkeypatch):
    torch.manual_seed(0)
    model = train.CoLT5ForConditionalGeneration(parsed(["--tokens", "x"])[0].config()).eval()
    texts = [
        f"{'x = 1; ' * n}\ndef f({', '.join(f'a{k}: <extra_id_{k}>' for k in range(n % 3 + 1))}): 0" for n in range(7)
    ]
    rows, counts = [tokenizer(text)["input_ids"] for text in texts], [n % 3 + 1 for n in range(7)]
    monkeypatch.setattr("python_types.predict.MOST_ROWS", 3)
    monkeypatch.setattr("python_types.predict.LONGEST_ANSWER", 8)
    together = [batch for batch in predict_all(model, tokenizer, rows, counts)]
    assert [len(batch) for batch in together] == [3, 3, 1]
    assert sorted(number for batch in together for number in batch) == list(range(7))
    for number, answer in (pair for batch in together for pair in batch.items()):
        (alone,) = predict(model, tokenizer, [rows[number]], [counts[number]])
        assert [one.type for one in answer] == [one.type for one in alone]
        # sums over padded rows in another order
        assert [one.probability for one in answer] == pytest.approx([one.probability for one in alone], rel=1e-3)


@pytest.mark.slow
def test_a_new_model_looks_where_its_sentinel_is(tokenizer):
    torch.manual_seed(0)
    size, _ = HfArgumentParser((train.Size, train.Arguments)).parse_args_into_dataclasses(["--tokens", "x"])
    sentinels = tokenizer.get_sentinel_token_ids()[:20]
    ids = torch.randint(100, 7000, (1, 200), generator=torch.Generator().manual_seed(0))
    places = torch.arange(5, 200, 10)
    ids[0, places] = torch.tensor(sentinels)
    looks = {}
    for name, change in (("new", train.looking_from_the_start), ("T5", lambda model: model)):
        model = change(train.CoLT5ForConditionalGeneration(size.config())).eval()
        model.set_attn_implementation("eager")
        with torch.no_grad():
            outputs = model(input_ids=ids, decoder_input_ids=ids[:, places], output_attentions=True)
        # of the first layer, the mean over its heads: [sentinels, tokens]
        weights = outputs.cross_attentions[0][0].mean(0)
        looks[name] = weights[torch.arange(20), places].mean().item()
    # of 200 tokens each has 0.005 in the mean
    assert looks["new"] > 0.1 and looks["T5"] < 0.02


def test_the_encoder_is_asked_for_the_first_token_at_each_sentinel(tokens, tokenizer):
    torch.manual_seed(0)
    size, _ = parsed(["--tokens", "unused"])
    model = train.CoLT5ForConditionalGeneration(size.config())
    batch = Batches(tokens, shapes_of([256], 1024), 0.5, SENTINELS, 0)[0][1]
    states = torch.randn(*batch["input_ids"].shape, model.config.d_model)
    losses = []
    for row, ids in enumerate(batch["input_ids"].tolist()):
        labels = batch["labels"][row].tolist()
        for place, token in enumerate(ids):
            if token in SENTINELS:
                logits = states[row, place] @ model.lm_head.weight.T * model.config.d_model**-0.5
                losses.append(-logits.log_softmax(0)[labels[labels.index(token) + 1]])
    assert len(losses) > 4
    found = train.encoder_loss_at_sentinels(
        model, states, batch["input_ids"], batch["labels"], torch.tensor(SENTINELS)
    )
    torch.testing.assert_close(found, torch.stack(losses).mean())


def test_sentinels_change_places():
    batch = {"input_ids": torch.tensor([[5, 90, 6, 91, 92, 1], [7, 90, 8, 9, 1, 0]]), "labels": torch.ones(2)}
    moved = train.with_sentinels_moved(batch, torch.tensor([90, 91, 92]))
    assert moved["input_ids"].tolist() == [[5, 92, 6, 90, 91, 1], [7, 90, 8, 9, 1, 0]]
    assert moved["labels"] is batch["labels"]


def test_renamed_modules_are_the_same_modules_in_other_words(tokens, tokenizer):
    renaming = Renaming(tokenizer)
    kept = tokenizer("def self: int | None, Optional[str]\n", add_special_tokens=False)["input_ids"]
    vocabulary = tokenizer.get_vocab()
    pieces = {number: piece for piece, number in vocabulary.items()}
    both = [word for word in ("value", "key", "index", "name", "Error", "Model") if f"▁{word}" in vocabulary]
    changed = 0
    for seed in range(5):
        new = renaming.draw(np.random.default_rng(seed))
        assert sorted(new) == list(range(len(tokenizer))) and new[kept].tolist() == kept
        assert new[SENTINELS].tolist() == SENTINELS
        for word in both:
            spaced, alone = (pieces[new[vocabulary[each]]] for each in (f"▁{word}", word))
            assert spaced == f"▁{alone}" and alone[0].isupper() == word[0].isupper()
            changed += alone != word
    assert len(both) > 2 and changed > 5
    for seed in range(3):
        rows = {}
        for share in (0.0, 1.0):
            # the choice of a module and of what is hidden comes before the words are drawn
            batches = Batches(tokens, shapes_of([512], 512), 1.0, SENTINELS, seed, renaming=renaming, renamed=share)
            batch = batches[0][1]
            rows[share] = [*batch["input_ids"][0].tolist(), *batch["labels"][0].clamp(min=0).tolist()]
        pairs = set(zip(rows[0.0], rows[1.0], strict=True))
        # every word has one other word in the input and in the answers, and no two words share theirs
        assert len(pairs) == len(set(rows[0.0])) == len(set(rows[1.0])) and any(old != new for old, new in pairs)


def test_retyped_modules_are_the_same_modules_with_one_type_for_each_name(tokenizer):
    names = ["entry", "path", "self_key", "value"]
    lines = [f"def f{number}(x, {names[number % 4]}: {KINDS[number % 3]}, *, y=1): pass" for number in range(24)]
    text = "\n".join(["def once(alone: bytes) -> None: pass", *lines]) + "\n"
    tokens = Tokens.of([tokenise(text, holes_to_hide(holes_of(text)), tokenizer)])
    seen = set()
    for seed in range(4):
        batches = Batches(
            tokens, [Shape(1, 2048, 512)], 1.0, SENTINELS, seed, retyping=Retyping(tokenizer), retyped=1.0
        )
        row, target = batches.types(0, batches.shapes[0], np.random.default_rng(seed))
        answers: dict[int, list[int]] = {}
        for token in target[:-1].tolist():
            if token in SENTINELS:
                answers[token] = []
            else:
                answers[[*answers][-1]].append(token)
        assert len(answers) >= 0.15 * 24
        filled = tokenizer.decode([part for token in row[:-1].tolist() for part in answers.get(token, [token])])
        # what is not a type that a name has several times is as it was; a sentinel's neighbours are spaced otherwise
        was, became = (re.split(r"[\s,:()]+", each) for each in (text, filled))
        assert len(was) == len(became) and all(
            old == new for old, new in zip(was, became, strict=True) if old not in KINDS
        )
        types = defaultdict(set)
        for name, new in zip(became, became[1:], strict=False):
            if name in names:
                types[name].add(new)
        assert {*types} == {*names} and all(len(each) == 1 for each in types.values())
        seen.add(tuple(min(types[name]) for name in names))
    assert len(seen) > 1


def test_the_name_before_an_annotation_is_found(tokenizer):
    retyping = Retyping(tokenizer)
    for text, name in {
        "def f(entry:": "entry",
        "def f(self, some_long_key_name:": "some_long_key_name",
        "    *args:": "args",
        "def f(x) ->": None,
        "": None,
    }.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert retyping.name_before(np.array(ids, dtype=np.uint16)) == name


def test_batches_hold_every_row_once():
    lengths = [5, 100, 7, 3, 60, 8]
    batches = list(in_batches(lengths, 24, most_rows=3))
    assert sorted(row for batch in batches for row in batch) == list(range(6))
    assert all(len(batch) == 1 or max(lengths[row] for row in batch) * len(batch) <= 24 for batch in batches)
    assert max(map(len, batches)) == 3


def test_weights_of_a_checkpoint_begin_a_run(tmp_path):
    model = CoLT5ForConditionalGeneration(
        train.Size(**{name: SIZES[name] for name in SIZES if hasattr(train.Size, name)}).config()
    )
    model.save_pretrained(tmp_path)
    loaded, about = load_weights(tmp_path)
    assert about == {} and not loaded.training
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_weights_come_back_in_bf16(tmp_path):
    size, _ = parsed(["--tokens", "x"])
    model = train.CoLT5ForConditionalGeneration(size.config())
    save_weights(model, tmp_path, {"step": 3})
    again, about = load_weights(tmp_path)
    assert about == {"step": 3} and again.config.to_dict() == model.config.to_dict()
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter.bfloat16().float())
    assert again.lm_head.weight is again.shared.weight
    file = tmp_path / "weights-1.safetensors"
    (tmp_path / "weights-2.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="not of one saving"):
        load_weights(tmp_path)
    with pytest.raises(ValueError, match="has no weights"):
        load_weights(tmp_path / "none")


def parsed(arguments: list[str]):
    return HfArgumentParser((train.Size, train.Arguments)).parse_args_into_dataclasses([*TINY, *arguments])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for split, count in (("train", 5), ("held", 3)):
        texts = [module(number, 1 + number) for number in range(count)]
        rows = [
            {"package": split, "path": f"{n}.py", "split": split, "text": text, "n_tokens": len(text) // 3}
            for n, text in enumerate(texts)
        ]
        # a module without annotations
        rows.append({**rows[0], "path": "none.py", "text": "def f(x):\n    return x\n" * 20})
        with lzma.open(folder / f"{split}.jsonl.xz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    train.main(["--prepare", str(folder), "--tokens", str(folder / "tokens"), "--processes", "1"])
    return folder


def test_prepared_tokens_come_back(corpus, tokenizer):
    splits = load_tokens(corpus / "tokens/tokens.npz.xz")
    assert {split: len(tokens) for split, tokens in splits.items()} == {"train": 6, "held": 4}
    text = module(2, 3)
    assert splits["held"].module(2).tolist() == tokenizer(text.replace("<extra_id_", "<extra-id_"))["input_ids"][:-1]
    baselines = json.loads((corpus / "tokens/baselines.json").read_text())
    assert baselines["table"]["first"] == "int" and "int" in baselines["common"]


SENTINELS = CoLT5Tokenizer.from_pretrained(VOCABULARY).get_sentinel_token_ids()
ALONE = train.Processes(0, 1, torch.device("cpu"))


# the run is over, and its checkpoint is there: these two take ten seconds
@pytest.mark.slow
def test_a_resumed_run_goes_on_where_it_was(corpus, tmp_path):
    def training(out: str) -> train.Training:
        arguments = ["--tokens", f"{corpus}/tokens", "--out", str(tmp_path / out), "--closed", "0.5", "--steps", "10"]
        size, parsed_arguments = parsed(arguments)
        parsed_arguments.out.mkdir(exist_ok=True)
        return train.Training(parsed_arguments, size, ALONE, time.time() + 60)

    whole = training("whole")
    for step in range(3):
        whole.one(step / 10)
    whole.save()
    (tmp_path / "again").mkdir()
    (tmp_path / "whole/state.pt").rename(tmp_path / "again/state.pt")
    again = training("again")
    assert again.progress == whole.progress and again.progress.step == 3
    # across the end of the dense start
    for step in range(3, 8):
        for run in (whole, again):
            run.one(step / 10)
    assert again.progress.taken == {"256": 3, "512": 3, "routed": 2}
    assert again.model.config.routers_trained
    for name, parameter in whole.model.named_parameters():
        # where memory lies decides a product's last bit on some processors; what is not gone on with is off by a rate,
        # which is 0.02 of a parameter's size
        torch.testing.assert_close(again.model.get_parameter(name), parameter, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_run_trains_saves_and_evaluates(corpus, tmp_path, monkeypatch):
    # an untrained model's answers are as long as they may be
    monkeypatch.setattr("python_types.predict.LONGEST_ANSWER", 2)
    arguments = ["--tokens", f"{corpus}/tokens", "--corpus", str(corpus), "--out", str(tmp_path), "--steps", "13"]
    train.main([*TINY, *arguments, "--minutes", "60", "--evaluation_minutes", "50", "--processes", "1"])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"saved", "held_out"} <= {name for line in lines for name in line}
    numbers = json.loads((tmp_path / "evaluation.json").read_text())
    asked = len([1 for number in range(3) for hole in holes_to_hide(holes_of(module(number, 1 + number)))])
    assert numbers["100%"]["all"]["types"] == asked and numbers["100%"]["held"]["modules"] == 3
    assert "copied by name" in (tmp_path / "evaluation.md").read_text()
    model, about = load_weights(tmp_path)
    assert about["step"] == 13 and model.config.routers_trained

    # a run that begins with these weights needs no second dense start
    size, own = parsed(["--tokens", f"{corpus}/tokens", "--out", str(tmp_path / "more"), "--initial", str(tmp_path)])
    own.out.mkdir()
    more = train.Training(own, size, ALONE, time.time() + 60)
    assert torch.equal(more.model.shared.weight, model.shared.weight)
    more.one(0.0)
    assert more.progress.taken == {"routed": 1} and more.model.config.routers_trained

    # and its checkpoint is one
    (corpus / "summary.md").write_text("| a | MIT | train | 1.5 | 6 | 0 | 0 | 70 | 1 |\n| b | MIT | held | 1 | 3 |\n")
    folders = ["--run", str(tmp_path), "--tokens", f"{corpus}/tokens", "--corpus", str(corpus)]
    checkpoint.main([*folders, "--out", str(tmp_path / "checkpoint")])
    loaded, tokenizer = load(tmp_path / "checkpoint")
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "checkpoint").dtype == torch.bfloat16
    assert loaded.generation_config.max_new_tokens == 1024 and loaded.generation_config.eos_token_id == 1
    assert tokenizer.get_sentinel_token_ids() == SENTINELS
    card = (tmp_path / "checkpoint/README.md").read_text()
    assert tables(numbers) in card and "6 modules of the packages" in card and "with 70 annotations" in card


@pytest.mark.slow
def test_a_failing_evaluation_keeps_the_weights(corpus, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(train, "predict_all", fails)
    arguments = ["--tokens", f"{corpus}/tokens", "--corpus", str(corpus), "--out", str(tmp_path), "--steps", "1"]
    train.main([*TINY, *arguments, "--minutes", "60", "--processes", "1"])
    assert load_weights(tmp_path)[1]["step"] == 1 and "out of memory" in capsys.readouterr().err


class Heard(train.Processes):
    """Works alone, and keeps what it would have waited for the others with."""

    def mean(self, tensor):
        self.exchanged.append(tensor.shape)
        return tensor

    def of_first(self, number):
        self.exchanged.append("of the first")
        return number


def test_each_process_waits_for_the_others_in_the_same_places(corpus, tmp_path):
    arguments = ["--tokens", f"{corpus}/tokens", "--out", str(tmp_path), "--start_lengths", "256", "--steps", "1"]
    size, own = parsed(arguments)
    runs = []
    for rank in (0, 1):
        processes = Heard(rank, 1, torch.device("cpu"))
        # frozen, as `Processes` is
        object.__setattr__(processes, "exchanged", [])
        runs.append(train.Training(own, size, processes, time.time() + 60))
    # the slower process ends when the first one's state is written already
    for run in runs:
        run.run()
    assert runs[0].processes.exchanged == runs[1].processes.exchanged
    # the held-out loss is the last that all work out together
    assert runs[1].processes.exchanged[-1] == (4,)


@pytest.mark.slow
def test_two_processes_train_as_one_with_both_batches(corpus, tmp_path):
    arguments = ["--tokens", f"{corpus}/tokens", "--out", str(tmp_path), "--dropout", "0", "--steps", "3"]
    # one phase, one constant
    arguments += ["--closed", "0.9", "--opening", "0.05", "--start_lengths", "256"]
    # a port that is free: another run on this machine may have torchrun's own
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", "2", "-m", "python_types.train"]
    run_processes([*command, *TINY, *arguments], cwd=ROOT / "examples")
    trained, _ = load_weights(tmp_path)
    size, own = parsed(arguments)
    torch.manual_seed(own.seed)
    model = train.looking_from_the_start(train.CoLT5ForConditionalGeneration(size.config())).train()
    step = train.TrainingStep(model, own.learning_rate, ALONE, torch.tensor(SENTINELS), own.encoder_loss)
    tokens = load_tokens(corpus / "tokens/tokens.npz.xz")["train"]
    shapes = shapes_of(own.start_lengths[:1], own.batch_tokens)
    renaming = Renaming(train.CoLT5Tokenizer.from_pretrained(VOCABULARY))
    batches = [
        Batches(tokens, shapes, own.start_types, SENTINELS, 0, rank, renaming=renaming, renamed=own.renamed)
        for rank in (0, 1)
    ]
    for number in range(3):
        model.set_dense_start(0.0)
        gradients = []
        for each in batches:
            step._gradients(each[number][1])
            gradients.append(step.gradients.clone())
        step.gradients.copy_(sum(gradients) / 2)
        for group, rate in zip(step.optimizer.param_groups, step.rates, strict=True):
            group["lr"] = rate * train.learning_rate_share(number, number / 3, own.warmup_steps)
        step._update({})
    for name, parameter in model.named_parameters():
        # bf16 has 8 bits; sums in another order
        torch.testing.assert_close(trained.get_parameter(name), parameter.detach(), rtol=2**-7, atol=1e-5)


def test_the_learning_rate_rises_and_falls():
    shares = [train.learning_rate_share(step, step / 1000, 100) for step in range(1001)]
    assert shares[0] == 0.01 and max(shares) == pytest.approx(0.9, abs=0.02) and shares[-1] == 0
    assert shares[500] == pytest.approx(0.5)


def test_the_questions_hide_what_is_asked(corpus):
    tasks = tasks_of(corpus, [0.3, 1.0])
    assert len(tasks) == 8 and {row["split"] for row, _ in tasks} == {"held"}
    for row, share in tasks:
        question = question_of(corpus / "tokens/baselines.json", VOCABULARY, (row, share))
        holes = holes_to_hide(holes_of(row["text"]))
        assert len(question.keys) == sum(question.counts) == math.ceil(share * len(holes))
        assert set(question.hidden) <= {hole.annotation for hole in holes}
        assert share < 1 or question.far == [None] * len(holes)


def question(module: str, hidden: list[str], n_tokens: int = 3000) -> Question:
    size = len(hidden)
    return Question(
        "held", module, 0.3, n_tokens, [[5] * 9], [size], ["x"] * size, hidden, [True, False, None][:size],
        ["T"] * size, ["int"] * size, ["str"] * size,
    )  # fmt: skip


def test_records_tables_and_deadline():
    questions = [question("a", ["int", "str", "T"]), question("b", ["int", "T"], 9000), question("c", [])]

    def ask(rows, counts):
        assert all(row == [5] * 9 for row in rows)
        each = [Prediction("int", 0.5), Prediction("T", 0.25), Prediction("T", 1.0)]
        yield from ({number: each[:count]} for number, count in reversed([*enumerate(counts)]))

    records = [record for each in answered(ask, questions, ["int", "str"]) for record in each]
    assert [record.given for record in records] == ["int", "T", "T", "int", "T"]
    assert [record.is_rare for record in records] == [False, False, True, False, True]
    row = row_of(records)
    # 4 of 5; "int" is right twice, "str" once
    assert (row["given"], row["by_name"], row["nearest"], row["lead"][0]) == (80.0, 40.0, 20.0, 40.0)
    # a copied T is right twice; it stands in the place of "int", which the model gave 50 % and which was right twice
    assert (row["copied"], row["tool"], row["lead_of_tool"][0]) == (40.0, 40.0, 20.0)
    numbers = summary(records)["30%"]
    assert numbers["types outside the 100 commonest"]["given"] == 100.0
    assert numbers["modules of 8,192 to 16,384 tokens"]["types"] == 2
    assert "| all | 2 | 5 | 80.0 % | 40.0 % | 40.0 % | 40.0 % | 20.0 % | +40.0 " in tables({"30%": numbers})
    assert list(answered(ask, questions, [], deadline=time.monotonic() - 1)) == []


def test_evaluation_needs_a_corpus(tmp_path):
    with pytest.raises(ValueError, match="has no held-out split"):
        evaluate.tasks_of(tmp_path, [0.3])
