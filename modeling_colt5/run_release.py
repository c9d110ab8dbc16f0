"""What differs between the releases of Transformers that this code runs under."""

import inspect
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from types import FrameType
from typing import Any

import torch
import transformers
from transformers.cache_utils import Cache
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.utils import logging

# One for the package and all copies of the code that are loaded beside it, so that they say once what each would say.
logger = logging.get_logger("modeling_colt5")

# The tests were run with releases up to this one.
NEWEST_TESTED = (5, 24)
# This is the cache's name in outputs, in calls of layers and of masks: "past_key_values" up to 5.23, "cache" from 5.24
# on.
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


def is_called_by_peft() -> bool:
    """Whether a call comes through PEFT, whose prompts and prefixes know the cache by its older name alone."""
    frame: FrameType | None = sys._getframe() if "peft" in sys.modules else None
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] == "peft":
            return True
        frame = frame.f_back
    return False


def cache_of_forward(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """As `one_cache`, for the arguments of a model's forward; a cache under the older name is warned of where
    Transformers' own models warn of it.

    Transformers' decorator for that would take one of two caches without an error, and would warn of None and of
    what PEFT hands over, which the user cannot change.
    """
    given = one_cache(cache, past_key_values)
    is_deprecated = CACHE == "cache" and past_key_values is not None
    if is_deprecated and not torch.compiler.is_compiling() and not is_called_by_peft():
        message = "`past_key_values` is deprecated, as in Transformers' own models from 5.24 on; use `cache`."
        # The warning is attributed to who calls the forward, as Transformers' own is.
        warnings.warn(message, FutureWarning, stacklevel=3)
    return given


def model_arguments(prepare: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any] | None:
    """The arguments of the model's calls, which `generate` hands to its own method that puts a new cache among them.

    That method is private to Transformers: where it takes other arguments, a warning says so once, and this is None.
    """
    try:
        arguments = inspect.signature(prepare).bind(*args, **kwargs).arguments
    except TypeError:
        arguments = {}
    given = arguments.get("model_kwargs")
    if isinstance(given, dict):
        return given
    logger.warning_once(
        f"transformers {transformers.__version__} prepares caches in another way than the releases that "
        "modeling_colt5 knows; generate uses the plain dynamic cache, which copies all earlier keys and values for "
        "each token."
    )
    return None


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
