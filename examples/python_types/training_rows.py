"""Inputs and targets to train on, put together from tokens that were made once: hidden annotations, or masked spans.

A text with a sentinel is tokenised otherwise than without, but only in the words that touch the annotation. So every
annotation is stored with the tokens that stand for those words once it is hidden. A module with any choice of hidden
annotations is then a few copies, the same to the token as if its text had been changed and tokenised anew.
"""

import json
import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from python_types.holes import MOST_SENTINELS, Hole, holes_of, holes_to_hide
from python_types.renaming import Renaming
from python_types.retyping import TOKENS_OF_NAME, Retyping
from python_types.score import commonest
from torch import Tensor
from torch.utils.data import Dataset

from modeling_colt5.denoising import SpanCorruption
from modeling_colt5.tokenization_colt5 import CoLT5Tokenizer

TASKS = ("types", "spans")
PIECES = ("before", "after", "type")
EOS, IGNORED = 1, -100
LEAST_SHARE = 0.15
# where types were drawn anew, at most this share is hidden: what is to be copied has to be seen
MOST_OF_RETYPED = 0.5


@dataclass(frozen=True)
class TokenisedModule:
    """A module's tokens, uint16 [n] without eos, and its annotations.

    Annotation k may be hidden by putting `before[k]`, a sentinel and `after[k]` in the place of tokens `first[k]` to
    `last[k]`; its answer is `type[k]`.
    """

    tokens: np.ndarray
    first: list[int]
    last: list[int]
    before: list[list[int]]
    after: list[list[int]]
    type: list[list[int]]


@lru_cache(maxsize=2**16)
def ids_of(tokenizer: CoLT5Tokenizer, text: str) -> list[int]:
    """A short text's tokens, without eos."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def tokenise(text: str, holes: Iterable[Hole], tokenizer: CoLT5Tokenizer) -> TokenisedModule:
    """Tokenise a module, and what hides each of its annotations.

    An annotation that shares a word with the one before, as without spaces, is left as it is.

    Args:
        text: the module.
        holes: of `holes_to_hide(holes_of(text))`.
        tokenizer: the tokenizer.
    """
    # as `hide` spells a sentinel that the text itself shows
    text = text.replace("<extra_id_", "<extra-id_")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    begins = np.array([begin for begin, _ in encoded["offset_mapping"]])
    module = TokenisedModule(np.array(encoded["input_ids"], dtype=np.uint16), [], [], [], [], [])
    end = 0
    for hole in holes:
        word, rest = hole.start, hole.end
        while word > 0 and not text[word - 1].isspace():
            word -= 1
        while rest < len(text) and not text[rest].isspace():
            rest += 1
        if word < end:
            continue
        end = rest
        first, last = (int(place) for place in np.searchsorted(begins, (word, rest)))
        module.first.append(first)
        module.last.append(last)
        module.before.append(ids_of(tokenizer, text[word : hole.start]))
        module.after.append(ids_of(tokenizer, text[hole.end : rest]))
        module.type.append(ids_of(tokenizer, hole.annotation))
    return module


@dataclass(frozen=True)
class Tokens:
    """The tokenised modules of a split, joined.

    Attributes:
        tokens: uint16 [all].
        starts: int64 [modules + 1], where each module's tokens begin.
        hole_starts: int64 [modules + 1], where each module's annotations begin among all.
        first, last: int32 [annotations], as of `TokenisedModule`.
        pieces: uint16, `before`, `after` and `type` of each annotation in turn.
        piece_starts: int64 [3 * annotations + 1].
    """

    tokens: np.ndarray
    starts: np.ndarray
    hole_starts: np.ndarray
    first: np.ndarray
    last: np.ndarray
    pieces: np.ndarray
    piece_starts: np.ndarray

    @classmethod
    def of(cls, modules: Iterable[TokenisedModule]) -> "Tokens":
        """Join modules."""
        modules = list(modules)
        pieces = [
            piece
            for module in modules
            for each in zip(module.before, module.after, module.type, strict=True)
            for piece in each
        ]

        def starts(lengths: Iterable[int]) -> np.ndarray:
            return np.fromiter(accumulate(lengths, initial=0), dtype=np.int64)

        return cls(
            tokens=np.concatenate([module.tokens for module in modules]),
            starts=starts(len(module.tokens) for module in modules),
            hole_starts=starts(len(module.first) for module in modules),
            first=np.array([place for module in modules for place in module.first], dtype=np.int32),
            last=np.array([place for module in modules for place in module.last], dtype=np.int32),
            pieces=np.array([token for piece in pieces for token in piece], dtype=np.uint16),
            piece_starts=starts(map(len, pieces)),
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def module(self, index: int) -> np.ndarray:
        """The tokens of a module, uint16 [n]."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    def piece(self, hole: int, name: str) -> np.ndarray:
        """`before`, `after` or `type` of an annotation, by its number among all."""
        number = len(PIECES) * hole + PIECES.index(name)
        return self.pieces[self.piece_starts[number] : self.piece_starts[number + 1]]


def modules_in(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file that corpus.py wrote."""
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


@lru_cache
def _tokenizer(vocabulary: Path) -> CoLT5Tokenizer:
    return CoLT5Tokenizer.from_pretrained(vocabulary)


def _prepared(vocabulary: Path, row: dict[str, Any]) -> tuple[TokenisedModule, list[Hole]]:
    holes = holes_to_hide(holes_of(row["text"]))
    return tokenise(row["text"], holes, _tokenizer(vocabulary)), holes


def prepare(corpus: Path, vocabulary: Path, out: Path, processes: int) -> None:
    """Tokenise all splits of a corpus into one file, beside what the baselines know of the training split.

    Args:
        corpus: the folder that corpus.py wrote.
        vocabulary: the tokenizer's folder.
        out: `tokens.npz.xz` and `baselines.json` come into this folder.
        processes: how many work at it.
    """
    out.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    for file in sorted(corpus.glob("*.jsonl.xz")):
        split = file.name.removesuffix(".jsonl.xz")
        with Pool(processes) as pool:
            prepared = pool.imap(partial(_prepared, vocabulary), modules_in(file), chunksize=16)
            modules, holes = zip(*prepared, strict=True)
        tokens = Tokens.of(modules)
        print(f"{split}: {len(tokens)} modules, {len(tokens.tokens)} tokens, {len(tokens.first)} annotations")
        arrays |= {f"{split}.{name}": array for name, array in vars(tokens).items()}
        if split == "train":
            table, common = commonest(hole for each in holes for hole in each)
            (out / "baselines.json").write_text(json.dumps({"table": table, "common": common}) + "\n")
    with lzma.open(out / "tokens.npz.xz", "wb") as compressed:
        np.savez(compressed, **arrays)


def load_tokens(file: Path) -> dict[str, Tokens]:
    """The splits in a file of `prepare`."""
    with lzma.open(file, "rb") as compressed:
        arrays = dict(np.load(compressed))
    splits: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        split, _, part = name.partition(".")
        splits.setdefault(split, {})[part] = array
    return {split: Tokens(**parts) for split, parts in splits.items()}


@dataclass(frozen=True)
class Shape:
    """A batch's shape: `rows` inputs of `length` tokens, targets of `target_length`."""

    rows: int
    length: int
    target_length: int


def shapes_of(lengths: Iterable[int], tokens: int) -> list[Shape]:
    """The shapes of batches of so many tokens each, by length. A short target is enough for a short input."""
    targets = {length: min(length // 2, 512 if length <= 4096 else 768) for length in lengths}
    return [Shape(max(1, tokens // length), length, targets[length]) for length in sorted(lengths)]


class Batches(Dataset):
    """The batches of a run, by number: each depends on its number, the seed and the process, and on nothing else.

    A batch has one task and one shape, the same in all processes. A module goes to the shortest length that holds it,
    and of one that none holds, each time another stretch is read.

    Args:
        tokens: of the training split.
        shapes: of `shapes_of`.
        share_of_types: the share of the batches that ask for types; the others have masked spans.
        sentinels: the ids of <extra_id_0>, <extra_id_1>, ...
        seed: of all that is drawn.
        rank: the process.
        share: of the annotations that are hidden; None for a share that is drawn each time a module is read.
        renaming: gives rows other words.
        renamed: the share of the rows that get other words.
        retyping: gives names other types.
        retyped: the share of the rows of types that get other types; of these alone some are hidden there.
    """

    def __init__(
        self,
        tokens: Tokens,
        shapes: list[Shape],
        share_of_types: float,
        sentinels: list[int],
        seed: int,
        rank: int = 0,
        share: float | None = None,
        renaming: Renaming | None = None,
        renamed: float = 0.0,
        retyping: Retyping | None = None,
        retyped: float = 0.0,
    ):
        self.renaming, self.renamed, self.retyping, self.retyped = renaming, renamed, retyping, retyped
        self.tokens, self.shapes, self.share_of_types = tokens, shapes, share_of_types
        self.sentinels, self.seed, self.rank, self.share = np.array(sentinels[:MOST_SENTINELS]), seed, rank, share
        self.corruption = SpanCorruption()
        lengths, holes = np.diff(tokens.starts), np.diff(tokens.hole_starts)
        # one more for eos
        bucket = np.minimum(np.searchsorted([shape.length for shape in shapes], lengths + 1), len(shapes) - 1)
        self.modules: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}
        weights: dict[str, list[float]] = {}
        for task, weight in zip(TASKS, (holes, lengths), strict=True):
            for number in range(len(shapes)):
                chosen = np.flatnonzero((bucket == number) & (weight > 0))
                self.modules[task, number] = chosen, np.cumsum(weight[chosen])
                weights.setdefault(task, []).append(float(lengths[chosen].sum()))
        self.weights = {task: np.array(each) / max(1.0, sum(each)) for task, each in weights.items()}
        if any(not each.sum() for task, each in self.weights.items() if share_of_types != (0, 1)[task == "spans"]):
            raise ValueError("the modules have no annotations; there must be some to train on")

    def __len__(self) -> int:
        # a loader goes through as many as it is asked for
        return 2**40

    def __getitem__(self, number: int) -> tuple[str, dict[str, Tensor]]:
        """The task, and int64 `input_ids` and `attention_mask` [rows, length] and `labels` [rows, target_length]."""
        shared = np.random.default_rng([self.seed, number])
        task = TASKS[int(shared.random() >= self.share_of_types)]
        index = int(shared.choice(len(self.shapes), p=self.weights[task]))
        shape, (modules, ends) = self.shapes[index], self.modules[task, index]
        generator = np.random.default_rng([self.seed, number, self.rank])
        make = self.types if task == "types" else self.spans
        rows = []
        for point in generator.random(shape.rows):
            module = int(modules[np.searchsorted(ends, point * ends[-1], side="right")])
            row, target = make(module, shape, generator)
            if self.renaming is not None and generator.random() < self.renamed:
                renamed = self.renaming.draw(generator)
                row, target = renamed[row], renamed[target]
            rows.append((row, target))
        return task, collate(rows, shape)

    def types(self, index: int, shape: Shape, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A module with hidden annotations, and its answers: both int64, at most as long as the shape, eos at the end.

        More than the sentinels, or than the target holds, are left as they are.
        """
        tokens, begin = self.tokens.module(index), int(self.tokens.hole_starts[index])
        holes = slice(begin, int(self.tokens.hole_starts[index + 1]))
        first, last = self.tokens.first[holes], self.tokens.last[holes]
        start = 0
        if len(tokens) >= shape.length:
            # a stretch around some annotation
            around, latest = int(generator.choice(first)), len(tokens) - shape.length + 1
            earliest = min(max(0, around - shape.length * 7 // 8), latest)
            start = int(generator.integers(earliest, min(around, latest) + 1))
        end = min(len(tokens), start + shape.length - 1)
        inside = np.flatnonzero((first >= start) & (last <= end))
        others: dict[int, np.ndarray] = {}
        if self.retyping is not None and self.retyped > 0 and len(inside) and generator.random() < self.retyped:
            names = [
                self.retyping.name_before(tokens[max(0, first[hole] - TOKENS_OF_NAME) : first[hole]])
                for hole in inside
            ]
            types = [self.tokens.piece(begin + int(hole), "type") for hole in inside]
            others = {int(inside[place]): kind for place, kind in self.retyping.draw(names, types, generator).items()}
        share = generator.uniform(LEAST_SHARE, MOST_OF_RETYPED if others else 1) if self.share is None else self.share
        may_hide = np.array(sorted(others)) if others else inside
        chosen = np.sort(generator.choice(may_hide, int(np.ceil(share * len(may_hide))), replace=False))
        if len(chosen) > len(self.sentinels):
            skipped = int(generator.integers(len(chosen) - len(self.sentinels) + 1))
            chosen = chosen[skipped : skipped + len(self.sentinels)]
        sentinels = dict(zip(chosen.tolist(), self.sentinels, strict=False))
        parts: list[np.ndarray] = []
        answers: list[np.ndarray] = []
        position, size, answered = start, 0, 0
        for hole in inside.tolist():
            before, after, kind = (self.tokens.piece(begin + hole, name) for name in PIECES)
            between, written = tokens[position : first[hole]], tokens[first[hole] : last[hole]]
            if hole in sentinels:
                shown = sentinels[hole][None]
                kind = others.get(hole, kind)
                # what is hidden has to fit, and so does its answer, each with eos
                answered += 1 + len(kind)
                if size + len(between) + len(before) + 1 >= shape.length or answered >= shape.target_length:
                    break
                answers += shown, kind
            elif hole in others and np.array_equal(written[: len(before) + len(kind)], [*before, *kind]):
                shown, after = others[hole], written[len(before) + len(kind) :]
            else:
                continue
            parts += between, before, shown, after
            size, position = size + sum(map(len, parts[-4:])), int(last[hole])
        parts.append(tokens[position:end])
        eos = np.array([EOS])
        row = np.concatenate(parts)[: shape.length - 1]
        return np.concatenate([row, eos]).astype(np.int64), np.concatenate([*answers, eos]).astype(np.int64)

    def spans(self, index: int, shape: Shape, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """T5's span corruption of a stretch of a module, with fewer spans where they are too many for the sentinels or
        for the target; both as of `types`."""
        tokens = self.tokens.module(index)

        def noise_of(raw: int) -> tuple[int, int]:
            noise = max(1, round(self.corruption.noise_density * raw))
            spans = self.corruption.num_spans(noise, len(self.sentinels))
            return min(noise, shape.target_length - 1 - spans), spans

        raw = min(len(tokens), shape.length - 1)
        noise, spans = noise_of(raw)
        # spans make room
        raw = min(len(tokens), raw + noise - spans)
        start = int(generator.integers(len(tokens) - raw + 1))
        mask = self.corruption.mask(raw, noise, spans, generator)
        stretch = tokens[start : start + raw].astype(np.int64)
        begins = mask & ~np.append(False, mask[:-1])
        row = stretch.copy()
        row[begins] = self.sentinels[:spans]
        row = row[~mask | begins]
        target = np.insert(stretch[mask], np.flatnonzero(begins[mask]), self.sentinels[:spans])
        return np.append(row, EOS), np.append(target, EOS)


def collate(rows: list[tuple[np.ndarray, np.ndarray]], shape: Shape) -> dict[str, Tensor]:
    """Pad inputs and targets to a shape."""
    ids, mask = np.zeros((2, len(rows), shape.length), dtype=np.int64)
    labels = np.full((len(rows), shape.target_length), IGNORED, dtype=np.int64)
    for number, (row, target) in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
        labels[number, : len(target)] = target
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in batch.items()}
