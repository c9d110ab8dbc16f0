"""What differs between the releases of Transformers that this code runs under."""

from dataclasses import fields
from typing import Any

import transformers
from transformers.cache_utils import Cache
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.utils import logging

logger = logging.get_logger(__name__)

# the newest release that the tests were run with
NEWEST_TESTED = (5, 24)
# the cache's name in outputs, in calls of layers and of masks: "past_key_values" up to 5.23, "cache" from 5.24 on
CACHE = "cache" if "cache" in {field.name for field in fields(Seq2SeqLMOutput)} else "past_key_values"
CACHE_NAMES = ("cache", "past_key_values")


def warn_of_untested_release() -> None:
    """Say once that this release of Transformers is newer than any that was tested."""
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if release > NEWEST_TESTED:
        newest = ".".join(map(str, NEWEST_TESTED))
        logger.warning_once(
            f"modeling_colt5 was tested with transformers 5.17 to {newest}; this is {transformers.__version__}. Where "
            f'something does not work, try `pip install "transformers<{NEWEST_TESTED[0]}.{NEWEST_TESTED[1] + 1}"`.'
        )


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache that was given under either of its two names.

    Raises:
        TypeError: where it was given under both.
    """
    if cache is not None and past_key_values is not None:
        raise TypeError("cache and past_key_values are both given; they are two names of one argument")
    return past_key_values if cache is None else cache


class NamesOfTheCache:
    """An output whose cache answers to both names under every release; before `ModelOutput` among the bases."""

    if CACHE == "past_key_values":

        @property
        def cache(self) -> Cache | None:
            """The cache, by its name from Transformers 5.24 on."""
            return self.past_key_values  # type: ignore[attr-defined]

        def __getitem__(self, key: Any) -> Any:
            """An entry by its position or name."""
            return super().__getitem__(CACHE if key == "cache" else key)  # type: ignore[misc]


warn_of_untested_release()
