"""Exact match on packages that were never trained on, beside baselines that copy by name, by one command.

    python -m python_types.evaluate --model ../checkpoints/python-types --corpus ../build/python_types \\
        --baselines ../build/types/baselines.json --out ../build/types/evaluation

run from the folder examples/. It needs the corpus of corpus.py, and the baselines.json of `train.py --prepare`.
"""

import json
import random
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import islice
from multiprocessing import Pool
from pathlib import Path
from typing import Any

from python_types.corpus import TRAIN, VALIDATION
from python_types.holes import Hole, choose, holes_of, passes
from python_types.predict import Prediction, load, predict_all
from python_types.score import (
    Answer,
    copied_by_name,
    copied_from_nearest,
    far_holes,
    is_copied,
    nearest_in_module,
    paired_bootstrap,
)
from python_types.training_rows import modules_in
from transformers import HfArgumentParser

from modeling_colt5.tokenization_colt5 import CoLT5Tokenizer

VOCABULARY = Path(__file__).resolve().parents[2] / "tokenization/python_stdlib"
SHARES = (0.3, 1.0)
# longer modules are left out
MOST_TOKENS = 65_536
LENGTHS = (2048, 4096, 8192, 16_384, 32_768, MOST_TOKENS)
# each way of answering, as the tables call it
WAYS = {
    "given": "model",
    "copied": "copied in the module",
    "tool": "tool",
    "by_name": "copied by name",
    "nearest": "nearest of that name",
}
# modules that are taken together into batches: at first, so that there is a result early, and later
TOGETHER = 16, 256


@dataclass(frozen=True)
class Question:
    """A module with a share of its annotations hidden, in one pass or more, and what is known of each of them."""

    split: str
    module: str
    share: float
    n_tokens: int
    rows: list[list[int]]
    counts: list[int]
    keys: list[str]
    hidden: list[str]
    far: list[bool | None]
    copied: list[str | None]
    by_name: list[str | None]
    nearest: list[str | None]


@dataclass(frozen=True)
class Record:
    """A hidden annotation, what the model and the baselines say, and what it counts for."""

    split: str
    module: str
    share: float
    n_tokens: int
    key: str
    hidden: str
    is_far: bool | None
    is_rare: bool
    given: str | None
    probability: float
    copied: str | None
    by_name: str | None
    nearest: str | None

    @property
    def tool(self) -> str | None:
        """What annotate_types.py writes: the model's, or the copied one."""
        return self.copied if is_copied(self.given, self.probability, self.copied) else self.given

    def answer(self, of: str = "given") -> Answer:
        """As score.py takes it: the model's answer, what is `copied` from the module alone, that of the `tool`, or
        of the baseline `by_name` or `nearest`."""
        return Answer(f"{self.split}/{self.module}", self.key, self.hidden, getattr(self, of), self.is_far)


@lru_cache
def _tokenizer(vocabulary: Path) -> CoLT5Tokenizer:
    return CoLT5Tokenizer.from_pretrained(vocabulary)


@lru_cache
def _baselines(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def name_of(row: dict[str, Any]) -> str:
    """A module's name, by a row of the corpus."""
    return f"{row['package']}/{row['path']}"


def hidden_in(row: dict[str, Any], share: float) -> tuple[list[Hole], list[Hole]]:
    """All holes of a module, and a share of its annotations: the same ones every time."""
    holes = holes_of(row["text"])
    return holes, choose(holes, zlib.crc32(name_of(row).encode()), share)


def question_of(baselines: Path, vocabulary: Path, task: tuple[dict[str, Any], float]) -> Question:
    """Hide a share of a module's annotations; the same ones every time.

    Args:
        baselines: the file of what they know; read once in each process, for it is large.
        vocabulary: the tokenizer's folder.
        task: a row of the corpus, and the share.
    """
    row, share = task
    text, tokenizer, table = row["text"], _tokenizer(vocabulary), _baselines(baselines)["table"]
    holes, chosen = hidden_in(row, share)
    parts = list(passes(text, chosen))
    offsets = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return Question(
        row["split"],
        name_of(row),
        share,
        row["n_tokens"],
        [tokenizer(part.text, verbose=False)["input_ids"] for part in parts],
        [len(part.holes) for part in parts],
        [hole.key for hole in chosen],
        [str(hole.annotation) for hole in chosen],
        # eos has no place in the text
        far_holes(chosen, holes, [begin for begin, _ in offsets[:-1]]),
        nearest_in_module(chosen, holes),
        copied_by_name(chosen, holes, table),
        copied_from_nearest(chosen, holes, table),
    )


def tasks_of(
    corpus: Path, shares: Sequence[float], seed: int = 0, is_validation: bool = False
) -> list[tuple[dict[str, Any], float]]:
    """The held-out modules, or those of validation, with each share, in an order by chance: any number of the first is
    a fair sample."""
    validation, train = corpus / f"{VALIDATION}.jsonl.xz", corpus / f"{TRAIN}.jsonl.xz"
    files = [file for file in sorted(corpus.glob("*.jsonl.xz")) if file not in (validation, train)]
    if is_validation:
        files = [validation] if validation.exists() else []
    if not files:
        what = "no validation split" if is_validation else "no held-out split"
        raise ValueError(f"corpus is {corpus}, which has {what}; examples/python_types/corpus.py makes it")
    rows = [row for file in files for row in modules_in(file) if row["n_tokens"] <= MOST_TOKENS]
    tasks = [(row, share) for row in rows for share in shares]
    random.Random(seed).shuffle(tasks)
    return tasks


Ask = Callable[[Sequence[Sequence[int]], Sequence[int]], Iterator[dict[int, list[Prediction]]]]


def answered(
    ask: Ask, questions: Iterable[Question], common: Iterable[str], deadline: float = float("inf")
) -> Iterator[list[Record]]:
    """Ask a model, and give the records of each module.

    Args:
        ask: of rows of tokens and their numbers of sentinels; `predict_all` of some model.
        questions: the modules.
        common: the commonest types, which are not rare.
        deadline: of `time.monotonic`; no batch begins that would end behind it, if it took as long as the longest. Of
            modules that are taken together none is given then, because the short ones come first.
    """
    common, longest = set(common), 0.0
    # a module may have no annotation
    questions = (question for question in questions if question.keys)
    together = list(islice(questions, TOGETHER[0]))
    while together:
        rows = [(question, number) for question in together for number in range(len(question.rows))]
        answers: dict[int, list[Prediction]] = {}
        started = time.monotonic()
        batches = ask([each.rows[number] for each, number in rows], [each.counts[number] for each, number in rows])
        while len(answers) < len(rows):
            if time.monotonic() + longest > deadline:
                return
            answers |= next(batches)
            longest, started = max(longest, time.monotonic() - started), time.monotonic()
        each_row = iter(answers[number] for number in range(len(rows)))
        for question in together:
            yield _records(question, [one for _ in question.rows for one in next(each_row)], common)
        together = list(islice(questions, TOGETHER[1]))


def _records(question: Question, predictions: list[Prediction], common: set[str]) -> list[Record]:
    return [
        Record(
            split=question.split,
            module=question.module,
            share=question.share,
            n_tokens=question.n_tokens,
            key=key,
            hidden=hidden,
            is_far=is_far,
            is_rare=hidden not in common,
            given=prediction.type,
            probability=round(prediction.probability, 4),
            copied=copied,
            by_name=by_name,
            nearest=nearest,
        )
        for key, hidden, is_far, prediction, copied, by_name, nearest in zip(
            question.keys,
            question.hidden,
            question.far,
            predictions,
            question.copied,
            question.by_name,
            question.nearest,
            strict=True,
        )
    ]


def exact_match(records: Sequence[Record], of: str = "given") -> float:
    """In percent."""
    return 100 * sum(record.answer(of).is_right for record in records) / max(1, len(records))


def lead_of(records: Sequence[Record], one: str, other: str, samples: int = 2000) -> list[float]:
    """How many points one way of answering is above another, and the 95 % interval of that."""
    answers = ([record.answer(of) for record in records] for of in (one, other))
    return [round(number, 1) for number in paired_bootstrap(*answers, samples)]


def row_of(records: Sequence[Record]) -> dict[str, Any]:
    """A row of the tables: exact match of each way of answering, the model's lead over copying by name, and the
    tool's over the nearest of that name, which is the better of the two baselines."""
    return {
        "modules": len({record.answer().module for record in records}),
        "types": len(records),
        **{of: round(exact_match(records, of), 1) for of in WAYS},
        "lead": lead_of(records, "given", "by_name"),
        "lead_of_tool": lead_of(records, "tool", "nearest"),
    }


def parts_of(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of one share by what they count for: each held-out split, all, rare types, far and near, lengths."""
    parts = {split: [one for one in records if one.split == split] for split in sorted({one.split for one in records})}
    parts["all"] = list(records)
    parts["types outside the 100 commonest"] = [one for one in records if one.is_rare]
    parts["far: the same name and type 1,017 tokens away or more"] = [one for one in records if one.is_far]
    parts["near: the same name and type within 1,016 tokens"] = [one for one in records if one.is_far is False]
    parts["neither: no such name and type is left in the module"] = [one for one in records if one.is_far is None]
    for least, most in zip((0, *LENGTHS), LENGTHS, strict=False):
        parts[f"modules of {least:,} to {most:,} tokens"] = [one for one in records if least <= one.n_tokens < most]
    return {name: part for name, part in parts.items() if part}


def summary(records: Sequence[Record]) -> dict[str, dict[str, dict[str, Any]]]:
    """For each share hidden, the rows of its table."""
    shares = sorted({record.share for record in records})
    return {
        f"{share:.0%}": {
            name: row_of(part) for name, part in parts_of([one for one in records if one.share == share]).items()
        }
        for share in shares
    }


def tables(numbers: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The summary in Markdown."""
    lines = []
    for share, rows in numbers.items():
        lines += [f"{share} of the annotations hidden:", ""]
        heads = ["", "modules", "types", *WAYS.values(), "model above copied by name", "tool above nearest"]
        lines += ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]
        for name, row in rows.items():
            cells = [name, f"{row['modules']:,}", f"{row['types']:,}", *(f"{row[of]:.1f} %" for of in WAYS)]
            for lead, low, high in (row["lead"], row["lead_of_tool"]):
                cells.append(f"{lead:+.1f} ({low:+.1f} to {high:+.1f})")
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def write_records(file: Path, modules: Iterable[list[Record]]) -> None:
    """One JSON line for each record, written as they come."""
    with file.open("w", encoding="utf-8") as lines:
        for records in modules:
            lines.writelines(json.dumps(asdict(record)) + "\n" for record in records)
            lines.flush()


def read_records(files: Iterable[Path]) -> list[Record]:
    """The records of complete lines."""
    lines = [line for file in files for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    return [Record(**json.loads(line)) for line in lines]


@dataclass
class Arguments:
    """What to evaluate."""

    model: Path = field(metadata={"help": "the model's folder, with its tokenizer"})
    corpus: Path = field(metadata={"help": "the folder that corpus.py wrote"})
    baselines: Path = field(metadata={"help": "baselines.json of train.py --prepare"})
    out: Path = field(metadata={"help": "folder of evaluation.json, evaluation.md and records.jsonl"})
    shares: list[float] = field(default_factory=lambda: [*SHARES], metadata={"help": "shares that are hidden"})
    most_tasks: int | None = field(default=None, metadata={"help": "modules times shares, at most; default: all"})
    processes: int = field(default=2, metadata={"help": "processes that hide and tokenise"})


def main(argv: list[str] | None = None) -> None:
    """Ask, and write the tables."""
    (arguments,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses(argv)
    baselines = json.loads(arguments.baselines.read_text())
    model, tokenizer = load(arguments.model)
    tasks = tasks_of(arguments.corpus, arguments.shares)[: arguments.most_tasks]
    arguments.out.mkdir(parents=True, exist_ok=True)
    with Pool(arguments.processes) as pool:
        questions = pool.imap(partial(question_of, arguments.baselines, VOCABULARY), tasks)
        modules = answered(partial(predict_all, model, tokenizer), questions, baselines["common"])
        write_records(arguments.out / "records.jsonl", modules)
    write_summary(arguments.out, read_records([arguments.out / "records.jsonl"]))


def write_summary(out: Path, records: Sequence[Record]) -> None:
    """evaluation.json and evaluation.md, which is printed as well."""
    numbers = summary(records)
    (out / "evaluation.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (out / "evaluation.md").write_text(tables(numbers) + "\n")
    print(tables(numbers), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
