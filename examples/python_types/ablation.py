"""What a trained model's choice of tokens is worth to it: its routers replaced, and its budget of queries changed.

    cd examples
    python -m python_types.ablation --model ../checkpoints/python-types --corpus ../build/python_types \
        --baselines ../build/types/baselines.json --most_modules 39

The model is not trained anew, so this says what it loses without what it has learned to rely on; what a model would
learn with other routing is for study.py to say.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from python_types.evaluate import SHARES, VOCABULARY, Question, Record, answered, question_of, tasks_of
from python_types.predict import load, predict_all
from transformers import HfArgumentParser, PreTrainedModel

from modeling_colt5.dense_start import learned_routers

# longer modules take long on a CPU
MOST_TOKENS = 12_000
SHARE = SHARES[0]
LEARNED = "learned"
CONTROLS = ("even", "random")
VECTORS = "other vectors"
PARTS = {"all": lambda far: True, "near": lambda far: far is False, "far": bool, "neither": lambda far: far is None}


def replace_routers(model: PreTrainedModel, way: str, seed: int = 0) -> None:
    """Let the encoder choose in another way.

    Args:
        model: its routers are changed.
        way: "even" or "random", the controls, whose tokens have a weight of 1; or "other vectors", which keep the
            learned vectors' lengths and have drawn directions, so that the weights stay the soft top-k's.
        seed: of the directions.

    Raises:
        ValueError: for another way.
    """
    if way not in (*CONTROLS, VECTORS):
        raise ValueError(f"way is {way!r}; it must be one of {', '.join((*CONTROLS, VECTORS))}")
    generator = torch.Generator().manual_seed(seed)
    for router in learned_routers(model):
        if way in CONTROLS:
            router.routing = way
            continue
        with torch.no_grad():
            drawn = torch.randn(router.weight.shape, generator=generator).to(router.weight)
            router.weight.copy_(drawn * (router.weight.norm() / drawn.norm()))


def right_in(records: Sequence[Record]) -> dict[str, tuple[int, int]]:
    """Of each part of the hidden types, how many are right, and how many there are."""
    counts = {}
    for part, belongs in PARTS.items():
        own = [record.answer().is_right for record in records if belongs(record.is_far)]
        counts[part] = (sum(own), len(own))
    return counts


@dataclass
class Arguments:
    """What to ask of which model."""

    model: Path = field(metadata={"help": "the model's folder, with its tokenizer"})
    corpus: Path = field(metadata={"help": "the folder that corpus.py wrote"})
    baselines: Path = field(metadata={"help": "baselines.json of train.py --prepare"})
    most_modules: int = field(default=39, metadata={"help": "held-out modules, drawn at random"})
    budgets: list[int] = field(
        default_factory=lambda: [8, 32, 64], metadata={"help": "one query among so many, with the learned routers"}
    )


def main(argv: list[str] | None = None) -> None:
    """Ask in each way, and print the table."""
    (arguments,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses(argv)
    common = json.loads(arguments.baselines.read_text())["common"]
    questions: list[Question] = []
    # the first of those that evaluate.py draws
    for task in tasks_of(arguments.corpus, SHARES):
        if task[1] != SHARE or task[0]["n_tokens"] > MOST_TOKENS:
            continue
        question = question_of(arguments.baselines, VOCABULARY, task)
        # some modules have no annotation to hide
        questions += [question] * bool(question.keys)
        if len(questions) == arguments.most_modules:
            break
    print(f"| choice | {' | '.join(PARTS)} |\n| --- |{' --- |' * len(PARTS)}", flush=True)
    for way in (LEARNED, *CONTROLS, VECTORS, *arguments.budgets):
        model, tokenizer = load(arguments.model)
        if isinstance(way, int):
            model.set_routing_budget(query=1 / way)
        elif way != LEARNED:
            replace_routers(model, way)
        modules = answered(partial(predict_all, model, tokenizer), questions, common)
        counts = right_in([record for module in modules for record in module])
        cells = [f"{100 * right / all_:.1f} % of {all_}" if all_ else "none" for right, all_ in counts.values()]
        name = f"learned, one query among {way}" if isinstance(way, int) else way
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
