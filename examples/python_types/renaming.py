"""Other names for a module's words, so that a model cannot know by heart which type a name of a training module has.

A training module is read many times, and its names and types soon are known by heart. What a model has to learn is to
look: the type of `entry` here is the one that `entry` has two functions above. Words that change at each reading,
everywhere in the module and in its answers at once, leave it nothing but that.
"""

import builtins
import keyword
import re
import typing
from collections import defaultdict
from collections.abc import Hashable

import numpy as np

from modeling_colt5.tokenization_colt5 import CoLT5Tokenizer

SPACE = "▁"
# What the language and its typing module mean by a word is no matter of the module that is read.
KEPT = {*keyword.kwlist, *keyword.softkwlist, *dir(builtins), *typing.__all__, "self", "cls", "typing"}
WORD = re.compile(f"{SPACE}?[A-Za-z]{{2,}}")


class Renaming:
    """Exchanges of the vocabulary's words: a word with a space before it goes where the word without one goes, and
    capitals come in the place of capitals.

    Args:
        tokenizer: of the tokens that are renamed.
    """

    def __init__(self, tokenizer: CoLT5Tokenizer):
        self.size = len(tokenizer)
        forms: dict[str, dict[bool, int]] = defaultdict(dict)
        for number, piece in enumerate(tokenizer.convert_ids_to_tokens(range(self.size))):
            word = piece.removeprefix(SPACE)
            if WORD.fullmatch(piece) and word not in KEPT:
                forms[word][piece != word] = number
        groups: dict[Hashable, list[list[int]]] = defaultdict(list)
        for word, numbers in forms.items():
            written = sorted(numbers)
            kind = (word[0].isupper(), word.isupper(), *written)
            groups[kind].append([numbers[each] for each in written])
        # each int64 [words, forms]
        self.groups = [np.array(group) for group in groups.values()]

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """The new number of every token, int64 [vocabulary]: a random part of the words change places."""
        renamed = np.arange(self.size)
        share = generator.uniform(0.3, 1)
        for group in self.groups:
            chosen = group[generator.random(len(group)) < share]
            renamed[chosen] = chosen[generator.permutation(len(chosen))]
        return renamed
