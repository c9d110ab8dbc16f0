"""Text metrics of the fine-tuning scripts: ROUGE of summaries, SQuAD's exact match and F1 of answers."""

import re
import string
from collections import Counter
from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum F-measures, in percent, stemmed (package `rouge-score`).

    ROUGE-Lsum compares sentence by sentence. The package takes lines for sentences, which T5's vocabularies turn into
    spaces: a sentence ends here with a full stop, an exclamation or a question mark before a space, or with its line.
    """
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    pairs = zip(map(sentences_on_lines, predictions), map(sentences_on_lines, references), strict=True)
    scores = [scorer.score(reference, guess) for guess, reference in pairs]
    return {kind: 100 * sum(score[kind].fmeasure for score in scores) / len(scores) for kind in kinds}


def sentences_on_lines(text: str) -> str:
    """The text with a line for each sentence."""
    return re.sub(r"(?<=[.!?])\s+", "\n", text)


def normalize_answer(text: str) -> list[str]:
    """SQuAD's normalisation: the lower-case words without punctuation and articles."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match_and_f1(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean exact match and word F1 as SQuAD's evaluation defines them, in percent."""
    matches, f1s = [], []
    for guess, reference in zip(map(normalize_answer, predictions), map(normalize_answer, references), strict=True):
        matches.append(float(guess == reference))
        common = sum((Counter(guess) & Counter(reference)).values())
        # two empty answers agree; one empty and one not do not
        f1s.append(2 * common / (len(guess) + len(reference)) if guess and reference else float(guess == reference))
    return {"exact_match": 100 * sum(matches) / len(matches), "f1": 100 * sum(f1s) / len(f1s)}
