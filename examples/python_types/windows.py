"""What a model that reads short inputs sees of a module: for each hidden annotation the tokens around it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from python_types.evaluate import Question, hidden_in, question_of
from python_types.holes import MOST_SENTINELS, Hole, hide
from python_types.training_rows import EOS

from modeling_colt5.tokenization_colt5 import CoLT5Tokenizer

# characters of a token, at most in the mean: what is cut out before it is tokenised is long enough
MOST_CHARACTERS = 8


def window_around(
    text: str, hole: Hole, chosen: Sequence[Hole], tokenizer: CoLT5Tokenizer, length: int
) -> tuple[list[int], int]:
    """The tokens around a hidden annotation, at most `length` with eos, and its sentinel's number among them, from 1.

    Args:
        text: the module.
        hole: one of `chosen`.
        chosen: all that are hidden; those that the window shows have sentinels too.
        tokenizer: the tokenizer.
        length: tokens.
    """
    reach = MOST_CHARACTERS * length // 2
    place = next(number for number, other in enumerate(chosen) if other.start == hole.start)
    # as many before as after, as the sentinels allow
    first = max(0, place - MOST_SENTINELS // 2)
    near = [other for other in chosen[first : first + MOST_SENTINELS] if abs(other.start - hole.start) < 2 * reach]
    starts = {other.start for other in near}
    hidden = hide(text, near, [other for other in chosen if other.start not in starts])
    number = next(number for number, other in enumerate(near) if other.start == hole.start)
    at = hidden.offsets[number]
    ids = tokenizer(hidden.text[max(0, at - reach) : at + reach], add_special_tokens=False, verbose=False)["input_ids"]
    sentinels = tokenizer.get_sentinel_token_ids()
    begin = max(0, ids.index(sentinels[number]) - length // 2)
    row = ids[begin : begin + length - 1]
    # they are counted anew
    renamed: dict[int, int] = {}
    for token in row:
        if token in sentinels[: len(near)] and token not in renamed:
            renamed[token] = sentinels[len(renamed)]
    count = list(renamed).index(sentinels[number]) + 1
    return [*(renamed.get(token, token) for token in row), EOS], count


def windowed_question_of(
    baselines: Path, vocabulary: Path, length: int, task: tuple[dict[str, Any], float]
) -> Question:
    """As `question_of`, with a row for each hidden annotation; the last answer to a row is the one to it."""
    row, share = task
    tokenizer = CoLT5Tokenizer.from_pretrained(vocabulary)
    _, chosen = hidden_in(row, share)
    windows = [window_around(row["text"], hole, chosen, tokenizer, length) for hole in chosen]
    rows, counts = [each for each, _ in windows], [count for _, count in windows]
    return replace(question_of(baselines, vocabulary, task), rows=rows, counts=counts)
