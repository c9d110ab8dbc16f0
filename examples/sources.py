"""Checks of single options, such as where a model or tokenizer is loaded from, and what is said of errors."""

from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def check_source(name: str, option: str) -> None:
    """Refuse what is neither a folder nor the form of a Hub id.

    Args:
        name: of a model or tokenizer.
        option: that gave it.

    Raises:
        ValueError: for a path without a folder.
    """
    if Path(name).is_dir():
        return
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(f"{option} is {name!r}, where no folder is, and which is no Hub id (owner/name)") from None


def check_least(least: int, **options: int | None) -> None:
    """Refuse options that are too small, before anything is read or loaded.

    Args:
        least: what each must be at least.
        options: by name; None for one that is not given.

    Raises:
        ValueError: naming the first of them.
    """
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")


def check_dataset_config(dataset_name: str | None, config_name: str | None) -> None:
    """Refuse the configuration of a dataset where there is no dataset: it would say nothing.

    Args:
        dataset_name, config_name: as given.

    Raises:
        ValueError: for a configuration alone.
    """
    if config_name is not None and dataset_name is None:
        raise ValueError("dataset_config_name is for a dataset: give --dataset_name, or leave it out")


def one_line(error: Exception) -> str:
    """What an error says, in one line: other libraries wrap their messages."""
    return " ".join(str(error).split())
