"""Other types for a module's parameters, so that a model has to look at how the rest of the module annotates a name.

Which type a name mostly has is known by heart soon, and a model that knows it looks nowhere else. Where each name of a
module has a type that was drawn for it, every place of that name the same one, what is known by heart is wrong.
"""

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from modeling_colt5.tokenization_colt5 import CoLT5Tokenizer

# a name is found among so many tokens before its annotation
TOKENS_OF_NAME = 16
PARAMETER = re.compile(r"(\w+)[▁\s]*:[▁\s]*$")


class Retyping:
    """Types that change names.

    Args:
        tokenizer: of the tokens that are read.
    """

    def __init__(self, tokenizer: CoLT5Tokenizer):
        self.pieces: list[str] = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))

    def name_before(self, tokens: np.ndarray) -> str | None:
        """The parameter whose annotation would stand behind these tokens, uint16 [n]; None if there is none."""
        found = PARAMETER.search("".join(self.pieces[token] for token in tokens[-TOKENS_OF_NAME:].tolist()))
        return found and found[1]

    def draw(
        self, names: Sequence[str | None], types: Sequence[np.ndarray], generator: np.random.Generator
    ) -> dict[int, np.ndarray]:
        """The new types of those annotations whose name several have: that of some annotation, one for each name.

        Args:
            names: of each annotation's parameter, None where there is none.
            types: each annotation's tokens.
            generator: draws.

        Returns:
            The new type, by the annotation's number in `names`.
        """
        places: dict[str, list[int]] = defaultdict(list)
        for number, name in enumerate(names):
            if name is not None:
                places[name].append(number)
        repeated = [numbers for numbers in places.values() if len(numbers) > 1]
        drawn = generator.integers(len(types), size=len(repeated))
        return {number: types[other] for numbers, other in zip(repeated, drawn, strict=True) for number in numbers}
