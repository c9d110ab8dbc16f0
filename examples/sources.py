"""Where a model or tokenizer is loaded from, a folder or a repository of the Hub, and what is said of errors."""

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


def one_line(error: Exception) -> str:
    """What an error says, in one line: other libraries wrap their messages."""
    return " ".join(str(error).split())
