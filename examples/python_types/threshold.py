"""Choose how sure the model has to be, so that its type is kept where the module annotates that name elsewhere.

    python -m python_types.threshold --model ../checkpoints/python-types --corpus ../build/python_types \
        --baselines ../build/types/baselines.json --out ../build/types/validation

run from the folder examples/. It asks for a part of the annotations of the validation packages, which were not trained
on and are not those that the tables count, prints exact match at each threshold, and the best one: `COPY_BELOW` of
score.py.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Pool
from pathlib import Path

from python_types.evaluate import VOCABULARY, Record, answered, question_of, read_records, tasks_of, write_records
from python_types.predict import load, predict_all
from python_types.score import Share, is_copied
from transformers import HfArgumentParser

# 0 copies nothing but where the model gives no type, and above 1 everything
THRESHOLDS = [*(step / 20 for step in range(20)), 0.98, 1.01]


def at_thresholds(records: Sequence[Record]) -> dict[float, Share]:
    """For each threshold how many types the tool gets right."""
    return {
        below: Share(
            sum(
                (one.copied if is_copied(one.given, one.probability, one.copied, below) else one.given) == one.hidden
                for one in records
            ),
            len(records),
        )
        for below in THRESHOLDS
    }


def best_of(shares: dict[float, Share]) -> float:
    """The best threshold; of equally good ones the lowest, which copies least."""
    return max(shares, key=lambda below: (shares[below].right, -below))


@dataclass
class Arguments:
    """What to choose it with."""

    model: Path = field(metadata={"help": "the model's folder, with its tokenizer"})
    corpus: Path = field(metadata={"help": "the folder that corpus.py wrote"})
    baselines: Path = field(metadata={"help": "baselines.json of train.py --prepare"})
    out: Path = field(metadata={"help": "folder of records.jsonl"})
    share: float = field(default=0.3, metadata={"help": "of the annotations that are hidden"})
    most_tasks: int | None = field(default=None, metadata={"help": "modules at most; default: all"})
    processes: int = field(default=2, metadata={"help": "processes that hide and tokenise"})


def main(argv: list[str] | None = None) -> None:
    """Ask, count, choose."""
    (arguments,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses(argv)
    common = json.loads(arguments.baselines.read_text())["common"]
    model, tokenizer = load(arguments.model)
    tasks = tasks_of(arguments.corpus, [arguments.share], is_validation=True)[: arguments.most_tasks]
    arguments.out.mkdir(parents=True, exist_ok=True)
    with Pool(arguments.processes) as pool:
        questions = pool.imap(partial(question_of, arguments.baselines, VOCABULARY), tasks)
        write_records(
            arguments.out / "records.jsonl", answered(partial(predict_all, model, tokenizer), questions, common)
        )
    records = read_records([arguments.out / "records.jsonl"])
    shares = at_thresholds(records)
    print(f"{len(records)} types of {len({one.module for one in records})} modules")
    for below, share in shares.items():
        print(f"copied below {below:.2f}: {share.percent:.1f} % right")
    print(f"best: {best_of(shares):.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
