"""Ask a model for the types of hidden annotations: one pass over a module, an answer for each of its sentinels."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from python_types.holes import types_in
from sources import check_source
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, LogitsProcessor, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from modeling_colt5.tokenization_colt5 import CoLT5Tokenizer

# tokens of the shortest rows on a GPU
LEAST_PADDED = 2048
# tokens of one answer, and of all in the mean, at most: 95 % of the training split's types have 11, their mean is 4
LONGEST_ANSWER, MEAN_ANSWER = 32, 12
# tokens that are encoded together, and decoded together, on a CPU and on a GPU
ENCODED_TOKENS = 2**16, 2**19
DECODED_TOKENS = 2**16, 2**20
MOST_ROWS = 128


def load(folder: str | os.PathLike[str]) -> tuple[PreTrainedModel, CoLT5Tokenizer]:
    """A checkpoint in fp32, in evaluation mode, on the GPU if there is one, and its tokenizer.

    Args:
        folder: the checkpoint's folder, or its name on the Hub.

    Raises:
        ValueError: for a path without a folder.
        OSError: if there is no such checkpoint.
    """
    check_source(str(folder), "model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    return model, CoLT5Tokenizer.from_pretrained(folder)


@dataclass(frozen=True)
class Prediction:
    """A model's answer to a sentinel: the type as it is written, None where it is none, and its probability."""

    type: str | None
    probability: float


class AnswersInOrder(LogitsProcessor):
    """Keeps greedy answers in form: <extra_id_0>, some tokens, <extra_id_1>, some tokens, ..., eos after the last.

    Without it one sentinel that the model skips would take all later answers with it.

    Args:
        sentinels: int64 [most], the ids of <extra_id_0>, <extra_id_1>, ...
        counts: int64 [batch], how many sentinels each row has, at least 1.
        others: ids that no answer has, such as that of pad.
        eos: the id that ends the answers.

    Attributes:
        log_probabilities: for each step the log-probability, fp32 [batch], that the model gave to its token, before
            other tokens were forbidden.
    """

    def __init__(self, sentinels: Tensor, counts: Tensor, others: list[int], eos: int):
        self.sentinels, self.counts, self.eos = sentinels, counts, eos
        self.forbidden = torch.cat([sentinels, torch.tensor([*others, eos], device=sentinels.device)])
        self.log_probabilities: list[Tensor] = []
        # of each row: sentinels so far, and tokens since the last
        self.asked, self.since = torch.zeros_like(counts), torch.zeros_like(counts)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Forbid what breaks the form; `input_ids` [batch, tokens so far], scores [batch, vocabulary]."""
        last = input_ids[:, -1]
        is_sentinel = torch.isin(last, self.sentinels)
        self.asked = self.asked + is_sentinel
        self.since = torch.where(is_sentinel, 0, self.since + 1)
        following = self.sentinels[self.asked.clamp(max=len(self.sentinels) - 1)]
        following = torch.where(self.asked < self.counts, following, self.eos)[:, None]
        must_end = (self.asked == 0) | (self.since >= LONGEST_ANSWER)
        allowed = torch.ones_like(scores, dtype=torch.bool)
        allowed[:, self.forbidden] = False
        allowed &= ~must_end[:, None]
        # an answer has at least one token
        allowed.scatter_(1, following, (~is_sentinel | must_end)[:, None])
        kept = scores.masked_fill(~allowed, -torch.inf)
        chosen = kept.argmax(-1, keepdim=True)
        self.log_probabilities.append(scores.log_softmax(-1).gather(1, chosen)[:, 0])
        return kept


def padded_length(length: int, device: torch.device) -> int:
    """How long the encoder takes a row: on a GPU as a power of two, for kernels are compiled for each length."""
    return max(LEAST_PADDED, 2 ** (length - 1).bit_length()) if device.type == "cuda" else length


def padded(rows: Sequence[Sequence[int]], length: int, device: torch.device) -> dict[str, Tensor]:
    """int64 `input_ids` and `attention_mask` [batch, length]."""
    ids, mask = np.zeros((2, len(rows), length), dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    return {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(mask).to(device)}


def encode(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], most_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """The encoder's output fp32 [batch, n, d_model] and mask [batch, n] of rows, of which it reads a few at a time: so
    many tokens, None for what a CoLT5 has room for."""
    device, lengths = model.device, [len(row) for row in rows]
    # attention's kernels want multiples of 8
    longest = -(-max(lengths) // 8) * 8
    states = torch.zeros(len(rows), longest, model.config.d_model, device=device)
    mask = padded(rows, longest, device)["attention_mask"]
    most_tokens = most_tokens or ENCODED_TOKENS[device.type == "cuda"]
    for batch in in_batches([padded_length(length, device) for length in lengths], most_tokens):
        length = padded_length(max(lengths[number] for number in batch), device)
        output = model.get_encoder()(**padded([rows[number] for number in batch], length, device)).last_hidden_state
        length = min(length, longest)
        states[batch, :length] = output[:, :length].float()
    return states, mask


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    counts: Sequence[int],
    encoded_tokens: int | None = None,
) -> list[list[Prediction]]:
    """The answers to a batch of modules with hidden annotations, greedily.

    Args:
        model: in evaluation mode, with a decoder.
        tokenizer: its tokenizer, with sentinels.
        rows: the tokens of each module, with eos.
        counts: how many sentinels each has.
        encoded_tokens: tokens that the encoder reads at a time; None for what a CoLT5 has room for.

    Returns:
        For each row a prediction for each sentinel, in order.
    """
    if not all(counts):
        raise ValueError("a row has no sentinel; there must be something to answer")
    device = model.device
    sentinels = tokenizer.get_sentinel_token_ids()
    form = AnswersInOrder(
        torch.tensor(sentinels, device=device),
        torch.tensor(counts, device=device),
        [tokenizer.pad_token_id, tokenizer.unk_token_id],
        tokenizer.eos_token_id,
    )
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        states, mask = encode(model, rows, encoded_tokens)
        output = model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask,
            logits_processor=[form],
            max_new_tokens=max(counts) * MEAN_ANSWER + LONGEST_ANSWER,
            do_sample=False,
            num_beams=1,
        )
    log_probabilities = torch.stack(form.log_probabilities, 1).tolist()
    answers = []
    for ids, logs, count in zip(output[:, 1:].tolist(), log_probabilities, counts, strict=True):
        types = types_in(tokenizer.decode(ids), count)
        probabilities = _probabilities(ids, logs, sentinels, tokenizer.eos_token_id, count)
        answers.append([Prediction(*each) for each in zip(types, probabilities, strict=True)])
    return answers


def _probabilities(ids: list[int], logs: list[float], sentinels: list[int], eos: int, count: int) -> list[float]:
    """Of each answer: of its tokens and of where it ends, 0 where it has no end."""
    ends = [place for place, token in enumerate(ids) if token in {*sentinels, eos}][: count + 1]
    known = [torch.tensor(logs[begin + 1 : end + 1]).sum().exp().item() for begin, end in pairwise(ends)]
    return known + [0.0] * (count - len(known))


def in_batches(lengths: Sequence[int], most_tokens: int, most_rows: int = 2**30) -> Iterator[list[int]]:
    """The numbers of rows in batches, in order of length, of so many padded tokens and rows at most, or of one row."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        if batch and ((len(batch) + 1) * lengths[number] > most_tokens or len(batch) == most_rows):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def predict_all(
    model: PreTrainedModel,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    counts: Sequence[int],
    encoded_tokens: int | None = None,
) -> Iterator[dict[int, list[Prediction]]]:
    """`predict` of any number of rows, in batches as large as memory allows: a step of the decoder takes little longer
    for many rows than for one.

    Yields:
        From the numbers of a batch's rows to their predictions.
    """
    for batch in in_batches([len(row) for row in rows], DECODED_TOKENS[model.device.type == "cuda"], MOST_ROWS):
        asked = [rows[each] for each in batch], [counts[each] for each in batch]
        answers = predict(model, tokenizer, *asked, encoded_tokens)
        yield dict(zip(batch, answers, strict=True))
