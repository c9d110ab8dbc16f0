"""Denoising examples for pre-training: span corruption, UL2's mixture, and chunks that fill inputs exactly."""

import math
import re
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers.utils import logging

logger = logging.get_logger(__name__)

# a chunk's denoiser is drawn from its first tokens: enough of them to differ from chunk to chunk
_HEAD = 64
# what a tokenizer's rules may turn into another character
_UNUSUAL = re.compile(r"[^\t\n\r -~]")


@dataclass(frozen=True)
class CorruptionPlan:
    """The lengths of one denoising example, in tokens.

    Attributes:
        raw: tokens of running text that go in.
        noise: how many of them move to the target.
        spans: in how many spans.
        input: length of the corrupted input, mode token, sentinels and eos included.
        target: length of the target, sentinels and eos included.
    """

    raw: int
    noise: int
    spans: int
    input: int
    target: int


@dataclass(frozen=True)
class SpanCorruption:
    """T5's span corruption (Raffel et al. 2020, §3.1.4): spans of tokens become sentinels, the target holds them.

    Attributes:
        noise_density: share of the raw tokens that is masked, in (0, 1).
        mean_span_length: mean number of tokens in a span, at least 1. A lower bound: an example has no more spans than
            the tokenizer has sentinels, because a sentinel that came twice would name no single place. Where the
            length asks for more spans, they grow longer at the same density: with 100 sentinels, density 0.15 and
            mean 3, from inputs of 1,809 tokens on (7 tokens at 4k, 29 at 16k). For short spans in long inputs make
            the vocabulary with more sentinels (`extra_ids`).
        mode: the UL2 mode whose token opens the input, "R", "S" or "X"; `None` for none.

    Raises:
        ValueError: a value out of its range, or a density too high for so short spans.
    """

    noise_density: float = 0.15
    mean_span_length: float = 3.0
    mode: str | None = None

    def __post_init__(self) -> None:
        _check_density_and_mode(self)
        if not 1 <= self.mean_span_length < math.inf:
            raise ValueError(f"mean_span_length is {self.mean_span_length}, must be finite and at least 1")
        if self.noise_density / self.mean_span_length > 1 - self.noise_density:
            raise ValueError(
                f"noise_density {self.noise_density} with mean_span_length {self.mean_span_length} leaves fewer "
                "unmasked tokens than spans, which must not touch: lengthen the spans or lower the density"
            )

    def num_spans(self, noise: int, max_spans: int) -> int:
        """Number of spans for `noise` masked tokens, at most `max_spans`."""
        return max(1, min(round(noise / self.mean_span_length), max_spans))

    def mask(self, raw: int, noise: int, spans: int, generator: np.random.Generator) -> np.ndarray:
        """Draw a bool mask [raw] with `noise` True entries in `spans` runs.

        As in T5, masked and unmasked runs alternate, beginning unmasked and ending masked, and the lengths of each
        kind are a uniformly drawn way to write its total as a sum of positive numbers.
        """
        unmasked = _random_parts(raw - noise, spans, generator)
        masked = _random_parts(noise, spans, generator)
        lengths = np.stack([unmasked, masked], axis=1).reshape(-1)
        return np.repeat(np.tile([False, True], spans), lengths)


@dataclass(frozen=True)
class PrefixLM:
    """UL2's sequential denoiser S (Tay et al. 2022, §3.1.2): one span, the last `noise_density` of the text.

    Attributes:
        noise_density: share of the raw tokens that is to be continued, in (0, 1).
        mode: as for `SpanCorruption`.

    Raises:
        ValueError: a value out of its range.
    """

    noise_density: float = 0.25
    mode: str | None = None

    def __post_init__(self) -> None:
        _check_density_and_mode(self)

    def num_spans(self, noise: int, max_spans: int) -> int:
        """One, whatever the length."""
        return 1

    def mask(self, raw: int, noise: int, spans: int, generator: np.random.Generator) -> np.ndarray:
        """A bool mask [raw] whose last `noise` entries are True."""
        return np.arange(raw) >= raw - noise


def _check_density_and_mode(denoiser: SpanCorruption | PrefixLM) -> None:
    if not 0 < denoiser.noise_density < 1:
        raise ValueError(f"noise_density is {denoiser.noise_density}, must be in (0, 1)")
    if denoiser.mode not in (None, "R", "S", "X"):
        raise ValueError(f"mode is {denoiser.mode!r}, must be 'R', 'S', 'X' or None")


def _check_integers(**numbers: Any) -> None:
    """Refuse arguments, given by name, that are no integers; NumPy's are."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Integral):
            raise TypeError(f"{name} is {number!r}; it must be an integer")


def _random_parts(total: int, parts: int, generator: np.random.Generator) -> np.ndarray:
    """Draw one of the ways to write `total` as an ordered sum of `parts` positive integers, all equally likely."""
    if total < parts:
        # only a text of one token: it is all noise
        return np.array([total])
    cuts = np.sort(generator.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


# UL2's seven denoisers (Tay et al. 2022, table 1)
_UL2_DENOISERS = (
    SpanCorruption(0.15, 3, "R"),
    SpanCorruption(0.15, 8, "R"),
    PrefixLM(0.25, "S"),
    SpanCorruption(0.5, 3, "X"),
    SpanCorruption(0.5, 8, "X"),
    SpanCorruption(0.15, 64, "X"),
    SpanCorruption(0.5, 64, "X"),
)


@dataclass(frozen=True)
class MixtureOfDenoisers:
    """Denoisers of which every example draws one; by default UL2's seven, equally likely.

    Attributes:
        denoisers: `SpanCorruption` and `PrefixLM` objects.
        weights: how often each is drawn, relative to the others; `None`: equally often.

    Raises:
        TypeError: denoisers that are no sequence of `SpanCorruption` and `PrefixLM`.
        ValueError: no denoisers, or weights that are not one positive number for each.
    """

    denoisers: Sequence[SpanCorruption | PrefixLM] = _UL2_DENOISERS
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.denoisers, Sequence) or not all(
            isinstance(denoiser, SpanCorruption | PrefixLM) for denoiser in self.denoisers
        ):
            raise TypeError(
                f"denoisers is {self.denoisers!r}; it must be a sequence of SpanCorruption and PrefixLM objects"
            )
        if not self.denoisers:
            raise ValueError("denoisers is empty, must hold at least one")
        if self.weights is not None:
            if len(self.weights) != len(self.denoisers):
                raise ValueError(f"{len(self.weights)} weights for {len(self.denoisers)} denoisers")
            if not all(0 < weight < math.inf for weight in self.weights):
                raise ValueError(f"weights are {list(self.weights)}, must be positive and finite")


class DataCollatorForDenoising:
    """Turn chunks of running text into inputs and targets of a sequence-to-sequence model.

    `chunk_documents` cuts documents into chunks of the length that, once corrupted, fills the input to its last token;
    no token is lost or doubled, and nothing but the end of the corpus is padded.

    All randomness of an example is drawn from `seed` and the example's own tokens. So it does not depend on the batch,
    on the number of `DataLoader` workers or processes, or on a restart; a chunk that comes twice is corrupted twice in
    the same way, which is why `repeat=True` in `chunk_documents` lets the chunks shift from epoch to epoch.

    Args:
        tokenizer: a tokenizer with T5's sentinels `<extra_id_0>`, ..., pad and eos; `CoLT5Tokenizer` with
            `mode_tokens=True` for denoisers with a mode.
        input_length: length of every input, in tokens: mode token, sentinels and eos included.
        target_length: length of every row of labels, sentinels and eos included. `None`: what the longest target
            needs. Where a denoiser would need more, it masks no more tokens than fit (a lower density, which is
            logged): inputs stay full, and no target is cut.
        denoiser: one denoiser, or a `MixtureOfDenoisers`.
        seed: any non-negative integer.

    Attributes:
        plans: the `CorruptionPlan` of a full example, one for each denoiser.
        target_length: as above, a number.

    Raises:
        TypeError: a length or a seed that is no integer, or another kind of denoiser.
        ValueError: a length too short for anything, a seed below 0, no sentinels, or a mode the tokenizer has no token
            for.
    """

    def __init__(
        self,
        tokenizer: Any,
        input_length: int,
        target_length: int | None = None,
        denoiser: SpanCorruption | PrefixLM | MixtureOfDenoisers | None = None,
        seed: int = 0,
    ):
        if not isinstance(denoiser, MixtureOfDenoisers | SpanCorruption | PrefixLM | None):
            raise TypeError(
                f"denoiser is a {type(denoiser).__name__}; it must be a SpanCorruption, a PrefixLM, or, for "
                "several, a MixtureOfDenoisers"
            )
        if not isinstance(denoiser, MixtureOfDenoisers):
            denoiser = MixtureOfDenoisers((denoiser or SpanCorruption(),))
        _check_integers(input_length=input_length, seed=seed)
        if target_length is not None:
            _check_integers(target_length=target_length)
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be at least 0")
        if input_length < 8 or (target_length is not None and target_length < 4):
            raise ValueError(
                f"input_length is {input_length} and target_length {target_length}, must be at least 8 and 4"
            )
        self.tokenizer = tokenizer
        self.input_length = input_length
        self.denoisers = tuple(denoiser.denoisers)
        weights = [1.0] * len(self.denoisers) if denoiser.weights is None else denoiser.weights
        cumulative = np.cumsum(weights)
        self._cumulative_weights = cumulative / cumulative[-1]
        self.seed = seed

        vocabulary = tokenizer.get_vocab()
        sentinels: list[int] = []
        while (sentinel := f"<extra_id_{len(sentinels)}>") in vocabulary:
            sentinels.append(vocabulary[sentinel])
        if not sentinels:
            raise ValueError("the tokenizer has no sentinels: <extra_id_0> is not in its vocabulary")
        self.sentinels = tuple(sentinels)
        self._sentinels = np.array(sentinels, dtype=np.int64)
        self._eos, self._pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        self._mode_ids = {}
        if any(part.mode is not None for part in self.denoisers):
            self._mode_ids = tokenizer.get_mode_token_ids()
        self.mode_ids = tuple(self._mode_ids.values())

        self.plans = [self._longest_plan(part, target_length) for part in self.denoisers]
        for part, plan in zip(self.denoisers, self.plans, strict=True):
            wanted = round(plan.raw * part.noise_density)
            if plan.noise < wanted:
                logger.warning(
                    f"target_length {target_length} holds {plan.noise} of the {wanted} tokens that {part} masks in a "
                    f"text of {plan.raw}: the density is lowered to fit"
                )
        self.target_length = target_length or max(plan.target for plan in self.plans)
        self._head = min(_HEAD, *(plan.raw for plan in self.plans))

    def _plan(self, denoiser: SpanCorruption | PrefixLM, raw: int, target_length: int | None) -> CorruptionPlan:
        """The lengths of `denoiser` on `raw` tokens."""

        def spans_of(noise: int) -> int:
            return max(1, min(denoiser.num_spans(noise, len(self._sentinels)), raw - noise))

        noise = min(max(round(raw * denoiser.noise_density), 1), max(raw - 1, 1))
        if target_length is not None and noise + spans_of(noise) + 1 > target_length:
            noise = bisect_right(range(1, noise + 1), target_length - 1, key=lambda n: n + spans_of(n))
        spans = spans_of(noise)
        opening = 1 if denoiser.mode is not None else 0
        return CorruptionPlan(raw, noise, spans, opening + raw - noise + spans + 1, noise + spans + 1)

    def _longest_plan(self, denoiser: SpanCorruption | PrefixLM, target_length: int | None) -> CorruptionPlan:
        """The plan with the most raw tokens whose input fits `input_length`; one more raw token adds 0 or 1 to it."""
        most = math.ceil(self.input_length / (1 - denoiser.noise_density)) + 1
        fitting = bisect_right(
            range(1, most + 1), self.input_length, key=lambda raw: self._plan(denoiser, raw, target_length).input
        )
        return self._plan(denoiser, fitting, target_length)

    def _generator(self, tokens: np.ndarray) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(tokens.astype("<i8").tobytes())])

    def _draw_denoiser(self, tokens: np.ndarray) -> int:
        point = self._generator(tokens[: self._head]).random()
        return int(np.searchsorted(self._cumulative_weights, point, side="right"))

    def chunk_length(self, tokens: np.ndarray) -> int:
        """How many of `tokens` [at least 64, or all there are] the next example takes: its denoiser's raw length."""
        return self.plans[self._draw_denoiser(tokens)].raw

    def corrupt(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corrupt one chunk.

        Args:
            tokens: int [raw] token ids without sentinels.

        Returns:
            int64 input [at most `input_length`] and target [at most `target_length`], unpadded: the input is the chunk
            with its n-th masked span replaced by the n-th sentinel, the target is each sentinel followed by its span;
            both end with eos, and the input begins with the mode token if the denoiser has one.

        Raises:
            ValueError: the chunk is empty, too long, or holds a sentinel.
        """
        tokens = np.asarray(tokens, dtype=np.int64)
        if tokens.ndim != 1 or not len(tokens):
            raise ValueError(f"a chunk has shape {list(tokens.shape)}, must be one row of tokens")
        if np.isin(tokens, self._sentinels).any():
            raise ValueError("a chunk holds sentinels, which only corruption may put there")
        index = self._draw_denoiser(tokens)
        denoiser, full = self.denoisers[index], self.plans[index]
        if len(tokens) > full.raw:
            raise ValueError(
                f"a chunk has {len(tokens)} tokens, but an input of {self.input_length} holds {full.raw} "
                f"with {denoiser}: cut documents with chunk_documents"
            )
        plan = full if len(tokens) == full.raw else self._plan(denoiser, len(tokens), self.target_length)
        mask = denoiser.mask(plan.raw, plan.noise, plan.spans, self._generator(tokens))
        starts = mask & ~np.concatenate([[False], mask[:-1]])
        sentinels = self._sentinels[: plan.spans]

        opening = [self._mode_ids[denoiser.mode]] if denoiser.mode is not None else []
        corrupted = tokens.copy()
        corrupted[starts] = sentinels
        inputs = np.concatenate([opening, corrupted[~mask | starts], [self._eos]]).astype(np.int64)
        target = np.insert(tokens[mask], np.flatnonzero(starts[mask]), sentinels)
        return inputs, np.append(target, self._eos)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Corrupt chunks and stack them.

        Args:
            examples: mappings whose `input_ids` is one chunk (list, array or tensor); other columns are ignored.

        Returns:
            `input_ids` and `attention_mask` int64 [batch, input_length], `labels` int64 [batch, target_length] with
            -100 after the target's end.
        """
        shape = (len(examples), self.input_length)
        input_ids = np.full(shape, self._pad, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        labels = np.full((len(examples), self.target_length), -100, dtype=np.int64)
        for row, example in enumerate(examples):
            inputs, target = self.corrupt(example["input_ids"])
            input_ids[row, : len(inputs)] = inputs
            attention_mask[row, : len(inputs)] = 1
            labels[row, : len(target)] = target
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def chunk_documents(
    documents: Iterable[str | Mapping[str, Any]],
    collator: DataCollatorForDenoising,
    *,
    text_column: str = "text",
    repeat: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """Join documents, each closed by eos, and cut the stream into the chunks that the collator's inputs hold.

    Every token of every document is in exactly one chunk, in order; only the last chunk may be shorter than its
    denoiser's raw length. Text that spells a special token (`<extra_id_0>`, `</s>`, `[NLU]`) is read as ordinary text:
    a space breaks its spelling. One document at a time is held in memory.

    Args:
        documents: texts, or mappings with `text_column` or with ready `input_ids` (an eos is added where it is
            missing): a list, a generator, or a `datasets` dataset, streaming or not. Empty texts are skipped. Ready
            `input_ids` are taken as they are, and hold no sentinels.
        collator: the collator that will get the chunks.
        text_column: where a mapping has its text.
        repeat: begin again at the end, for ever. The stream goes on without a break, so chunks begin elsewhere in
            every epoch.

    Yields:
        `{"input_ids": int64 [raw]}`.

    Raises:
        TypeError: `documents` is a single text or mapping, a document is no text, its `input_ids` are no integers, or
            `repeat` with an iterator, which ends after one pass.
        ValueError: `input_ids` that are not one row, or hold a sentinel or a number below 0, or `repeat` without any
            text.
    """
    _check_documents(documents, repeat)
    # chunk_length wants this many tokens, or all that are left
    rest = np.empty(0, dtype=np.int64)
    for tokens in _tokenized(documents, collator, text_column, repeat):
        rest = np.concatenate([rest, tokens])
        start = 0
        while len(rest) - start >= _HEAD and len(rest) - start >= (length := collator.chunk_length(rest[start:])):
            yield {"input_ids": rest[start : start + length].copy()}
            start += length
        rest = rest[start:]
    while len(rest):
        length = collator.chunk_length(rest)
        yield {"input_ids": rest[:length].copy()}
        rest = rest[length:]


def _check_documents(documents: Any, repeat: bool) -> None:
    """Refuse a single document, which would be read by characters or keys, and an iterator that is to repeat.

    Raises:
        TypeError: for those.
    """
    if isinstance(documents, str | bytes | Mapping):
        raise TypeError(
            f"documents is a {type(documents).__name__}; it must be texts or mappings in a list, a generator or a "
            "dataset: put a single one into a list, and of a DatasetDict give one split"
        )
    if repeat and iter(documents) is documents:
        raise TypeError("repeat=True needs documents that can be read again: a list or a dataset, not an iterator")


def _breaker_of(tokenizer: Any) -> Callable[[str], str]:
    """What puts a space into all that the tokenizer would take for a special token, whose letters stay."""
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    # of sentinels the beginning is enough. The longest first: one may be a part of another
    rest = [token for token in special if not token.startswith("<extra_id_")]
    tokens = sorted(rest, key=lambda token: (-len(token), token))
    parts = [("<extra_id_", "<extra_id _")]
    parts += [(token, f"{token[:-1]} {token[-1]}") for token in tokens if len(token) > 1 and not token.isspace()]
    normalizer: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)

    def broken(text: str) -> str:
        for whole, apart in parts:
            text = text.replace(whole, apart)
        return text

    def broken_word(match: re.Match[str]) -> str:
        word = match[0]
        if _UNUSUAL.search(word) is None:
            return word
        # NFKC makes < of a wide ＜, and the pieces hold the special tokens
        normal = normalizer.normalize_str(word)
        return word if (apart := broken(normal)) == normal else apart

    def break_all(text: str) -> str:
        text = broken(text)
        if normalizer is None or _UNUSUAL.search(text) is None:
            return text
        return re.sub(r"[^ \t\n\r]+", broken_word, text)

    return break_all


def _ready_tokens(number: int, input_ids: Any, collator: DataCollatorForDenoising) -> np.ndarray:
    """The `input_ids` of a document, int64 [length], checked; `number` is the document's.

    Raises:
        TypeError, ValueError: as of `chunk_documents`.
    """
    of = f"input_ids of document {number}"
    try:
        tokens = np.asarray(input_ids)
    except ValueError:
        raise ValueError(f"{of} have rows of several lengths; they must be one row") from None
    if tokens.ndim != 1:
        raise ValueError(f"{of} have shape {tokens.shape}; they must be one row")
    if len(tokens) and tokens.dtype.kind not in "iu":
        raise TypeError(f"{of} are {tokens.dtype}; they must be integers")
    tokens = tokens.astype(np.int64)
    if len(tokens) and tokens.min() < 0:
        raise ValueError(f"{of} hold {tokens.min()}; they must be at least 0")
    held = tokens[np.isin(tokens, collator.sentinels)]
    if len(held):
        sentinel = collator.tokenizer.convert_ids_to_tokens(int(held[0]))
        raise ValueError(
            f"{of} hold the sentinel {sentinel}, which only the collator may put there; they must be of text that is "
            "not corrupted yet and spells no sentinel. Or give the document's text, in which sentinels are read as "
            "ordinary text"
        )
    return tokens


def _tokenized(
    documents: Iterable[Any], collator: DataCollatorForDenoising, text_column: str, repeat: bool
) -> Iterator[np.ndarray]:
    """The documents' token ids, int64 [length], each with eos at its end."""
    tokenizer = collator.tokenizer
    break_all = _breaker_of(tokenizer)
    while True:
        found = False
        for number, document in enumerate(_all_documents(documents)):
            is_row = isinstance(document, Mapping)
            if is_row and "input_ids" in document:
                tokens = _ready_tokens(number, document["input_ids"], collator)
                if len(tokens) and tokens[-1] != tokenizer.eos_token_id:
                    tokens = np.append(tokens, tokenizer.eos_token_id)
            else:
                text = document.get(text_column) if is_row else document
                if not isinstance(text, str):
                    where = f"column {text_column!r} of document {number}" if is_row else f"document {number}"
                    raise TypeError(f"{where} is {type(text).__name__}, must be text")
                ids = tokenizer(break_all(text), verbose=False)["input_ids"] if text.strip() else []
                tokens = np.array(ids, dtype=np.int64)
            if len(tokens):
                found = True
                yield tokens
        if not repeat:
            return
        if not found:
            raise ValueError("repeat=True, but the documents hold no text")


def _all_documents(documents: Iterable[Any]) -> Iterator[Any]:
    """Every document, also in a `DataLoader` worker, where a plain loop over a streaming dataset gives only a part."""
    if not hasattr(documents, "iter"):
        yield from documents
        return
    for batch in documents.iter(batch_size=16):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


class ChunkedDocuments(IterableDataset):
    """The chunks of `chunk_documents` as a dataset, the same for any number of `DataLoader` workers.

    Every worker reads and cuts all documents, and yields its share of the chunks: workers spread the corruption and
    the collation, not the tokenization. Where tokenization is what takes time, tokenize beforehand (`input_ids`).

    Args:
        documents, collator, text_column, repeat: as for `chunk_documents`.
        batch_size: chunks that a worker yields in turn. With the `DataLoader`'s batch size, batches and their order do
            not depend on the number of workers either. Under `Trainer` that is `per_device_train_batch_size`: its
            first process loads the batches of all.

    Raises:
        TypeError: a single text or mapping as `documents`, `repeat` with an iterator, or a `batch_size` that is no
            integer.
        ValueError: a `batch_size` below 1.
    """

    def __init__(
        self,
        documents: Iterable[str | Mapping[str, Any]],
        collator: DataCollatorForDenoising,
        *,
        text_column: str = "text",
        repeat: bool = False,
        batch_size: int = 1,
    ):
        _check_documents(documents, repeat)
        _check_integers(batch_size=batch_size)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, must be at least 1")
        self.documents = documents
        self.collator = collator
        self.text_column = text_column
        self.repeat = repeat
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        worker = get_worker_info()
        chunks = chunk_documents(self.documents, self.collator, text_column=self.text_column, repeat=self.repeat)
        for number, chunk in enumerate(chunks):
            if worker is None or number // self.batch_size % worker.num_workers == worker.id:
                yield chunk
