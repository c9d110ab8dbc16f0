"""How many types are right: exact match, two baselines that copy by name, and the interval of a difference.

A type is right if it is the hidden one after `as_type`: spaces and quotes do not count, all else does.
"""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from python_types.holes import Hole, as_type

FAR = 1016
# A less probable type of the model gives way to one that the module has at that name. `python -m
# python_types.threshold` chose it on the validation packages.
COPY_BELOW = 0.6
# no parameter has this name
RETURN = "return"


@dataclass(frozen=True)
class Answer:
    """One hidden type and what was given for it.

    `is_far` says whether the nearest hole of the same name and type that can be seen is more than 1,016 tokens away;
    None if there is none.
    """

    module: str
    key: str
    hidden: str
    given: str | None
    is_far: bool | None

    @property
    def is_right(self) -> bool:
        """Exact match."""
        return self.given == self.hidden


@dataclass(frozen=True)
class Share:
    """So many of so many."""

    right: int
    all: int

    @property
    def percent(self) -> float:
        """In percent; not a number if there were none."""
        return 100 * self.right / self.all if self.all else float("nan")


def far_holes(
    chosen: Sequence[Hole], holes: Sequence[Hole], token_starts: Sequence[int], far: int = FAR
) -> list[bool | None]:
    """Whether each hidden hole's nearest visible one of the same name and type is more than `far` tokens away.

    Args:
        chosen: the hidden holes.
        holes: all of the module.
        token_starts: the character of the module's text at which each token begins, in order.
        far: tokens.

    Returns:
        One for each of `chosen`; None where no visible hole has its name and type.
    """
    visible: dict[tuple[str, str | None], list[int]] = defaultdict(list)
    for hole in _visible(chosen, holes):
        visible[hole.key, hole.annotation].append(bisect_right(token_starts, hole.start))
    distances = (
        min(
            (abs(at - bisect_right(token_starts, hole.start)) for at in visible[hole.key, hole.annotation]),
            default=None,
        )
        for hole in chosen
    )
    return [None if distance is None else distance > far for distance in distances]


def commonest(holes: Iterable[Hole]) -> tuple[dict[str, str], list[str]]:
    """What the training split knows: each name's commonest type, and the 100 commonest types of all.

    The name "return" has that of the returns of all functions, beside each function's own.

    Of equally common ones the first in the alphabet counts, so the order of the modules does not.
    """
    by_name: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for hole in holes:
        if hole.annotation is not None:
            by_name[hole.key][hole.annotation] += 1
            if hole.is_return:
                by_name[RETURN][hole.annotation] += 1
            overall[hole.annotation] += 1
    table = {key: _most(counts) for key, counts in by_name.items()}
    return table, sorted(overall, key=lambda given: (-overall[given], given))[:100]


def _most(counts: Counter[str]) -> str:
    return min(counts, key=lambda given: (-counts[given], given))


def copied_by_name(chosen: Sequence[Hole], holes: Sequence[Hole], table: Mapping[str, str]) -> list[str | None]:
    """The plain baseline: the commonest type of the same name in what is visible of the module, else the table's.

    All returns have one name.

    Args:
        chosen: the hidden holes.
        holes: all of the module.
        table: of `commonest`, made of other packages.
    """
    known = {**table, **commonest(_visible(chosen, holes))[0]}
    return [known.get(RETURN if hole.is_return else hole.key) for hole in chosen]


def copied_from_nearest(chosen: Sequence[Hole], holes: Sequence[Hole], table: Mapping[str, str]) -> list[str | None]:
    """The stronger baseline: the type of the nearest visible hole of the same name, else the table's for that name.

    A return has its function's name; where neither knows it, it gets what most returns of the module have, else what
    most returns of the table have.

    Args:
        chosen: the hidden holes.
        holes: all of the module.
        table: of `commonest`, made of other packages.
    """
    of_module, _ = commonest(_visible(chosen, holes))
    answers = []
    for hole, nearest in zip(chosen, nearest_in_module(chosen, holes), strict=True):
        answer = table.get(hole.key) if nearest is None else nearest
        if answer is None and hole.is_return:
            answer = of_module.get(RETURN, table.get(RETURN))
        answers.append(answer)
    return answers


def nearest_in_module(chosen: Sequence[Hole], holes: Sequence[Hole]) -> list[str | None]:
    """For each hole the type of the nearest visible one of the same name; None where the module shows none.

    A return has its function's name.

    Args:
        chosen: the hidden holes.
        holes: all of the module.
    """
    visible: dict[str, list[Hole]] = defaultdict(list)
    for hole in _visible(chosen, holes):
        if as_type(hole.annotation) is not None:
            visible[hole.key].append(hole)
    nearest = (
        min(visible[hole.key], key=lambda other: abs(other.start - hole.start), default=None) for hole in chosen
    )
    return [None if hole is None else hole.annotation for hole in nearest]


def is_copied(given: str | None, probability: float, copied: str | None, below: float = COPY_BELOW) -> bool:
    """Whether a hole gets the type that the module has at its name, instead of the model's.

    Args:
        given: the model's type, None if it is none.
        probability: the model's, of that type.
        copied: of `nearest_in_module`.
        below: a type of the model at least so probable is kept.
    """
    return copied is not None and copied != given and (given is None or probability < below)


def _visible(chosen: Sequence[Hole], holes: Sequence[Hole]) -> list[Hole]:
    """The annotations that are left when the chosen ones are hidden."""
    hidden = {hole.start for hole in chosen}
    return [hole for hole in holes if hole.start not in hidden and hole.annotation is not None]


def score(answers: Sequence[Answer], common: Iterable[str]) -> dict[str, Share]:
    """Exact match: of all, of types outside the commonest, and of far and near holes.

    Args:
        answers: of any number of modules.
        common: the commonest types of the training split, of `commonest`.
    """
    common = set(common)
    parts = {
        "all": answers,
        "rare": [answer for answer in answers if answer.hidden not in common],
        "far": [answer for answer in answers if answer.is_far],
        "near": [answer for answer in answers if answer.is_far is False],
    }
    return {name: Share(sum(answer.is_right for answer in part), len(part)) for name, part in parts.items()}


def paired_bootstrap(
    ours: Sequence[Answer], theirs: Sequence[Answer], samples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """How many points of exact match `ours` is above `theirs`, and the 95 % interval of that over modules.

    Modules are drawn with replacement, each with all its holes and both its answers.

    Args:
        ours: answers.
        theirs: other answers to the same holes in the same order.
        samples: drawn sets of modules.
        seed: of the draws.

    Raises:
        ValueError: if there are no answers, or not the same holes.
    """
    if not ours or [(a.module, a.key, a.hidden) for a in ours] != [(a.module, a.key, a.hidden) for a in theirs]:
        raise ValueError("the two must answer the same holes in the same order, at least one")
    modules = {name: row for row, name in enumerate(dict.fromkeys(answer.module for answer in ours))}
    gains, counts = np.zeros(len(modules)), np.zeros(len(modules))
    for mine, other in zip(ours, theirs, strict=True):
        gains[modules[mine.module]] += mine.is_right - other.is_right
        counts[modules[mine.module]] += 1
    return over_modules(gains, counts, samples, seed)


def over_modules(
    gains: np.ndarray, counts: np.ndarray, samples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """The mean gain of a hole in points, and the 95 % interval of that over modules, each drawn with all its holes.

    Args:
        gains: each module's sum of gains, fp64 [modules].
        counts: each module's holes, above 0.
        samples: drawn sets of modules.
        seed: of the draws.
    """
    generator, size = np.random.default_rng(seed), len(gains)
    # how often each module is drawn; a row at a time, for many modules would not fit
    drawn = (generator.multinomial(size, np.full(size, 1 / size)) for _ in range(samples))
    differences = [100 * (times @ gains) / (times @ counts) for times in drawn]
    low, high = np.percentile(differences, [2.5, 97.5])
    return float(100 * gains.sum() / counts.sum()), float(low), float(high)
