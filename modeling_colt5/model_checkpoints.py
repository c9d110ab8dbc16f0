"""What a saved folder holds: the code of its Auto classes, made independent of the package, and its layers."""

import re
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

logger = logging.get_logger(__name__)

# A folder's map of Auto classes names these files where all classes are this project's.
OWN_FILES = (
    *("configuration_colt5", "modeling_colt5", "tokenization_colt5"),
    *("configuration_colt5_vision", "modeling_colt5_vision"),
)


def code_file(reference: str | list[str | None]) -> str:
    """The file, without ".py", that an entry of a map of Auto classes names: "file.Class", maybe with "repository--"
    before it, or a tokenizer's two of them, where one may be None."""
    if not isinstance(reference, str):
        reference = next(filter(None, reference))
    return reference.rpartition("--")[2].partition(".")[0]


def import_copies(folder: Path, file: str) -> None:
    """Let a user's file in a saved folder, and the files that it imports there, import the copies of this project's
    code beside them instead of the package, which may not be installed where the folder is loaded.

    `from modeling_colt5 import …` becomes `from .modeling_colt5 import …`, or beside a model over pictures
    `from .modeling_colt5_vision import …`; `from modeling_colt5.x import …` becomes `from .x import …`. For another
    form there is a warning: with it the folder loads only where the package is.

    Args:
        folder: the saved folder.
        file: name of the user's file in it, without ".py".
    """
    first = folder / f"{file}.py"
    models = "modeling_colt5_vision" if (folder / "modeling_colt5_vision.py").is_file() else "modeling_colt5"
    for path in {first, *map(Path, get_relative_import_files(first))}:
        text = path.read_text(encoding="utf-8")
        changed = re.sub(r"^(\s*from\s+)modeling_colt5\.(?=\w)", r"\1.", text, flags=re.MULTILINE)
        changed = re.sub(r"^(\s*from\s+)modeling_colt5(?=\s)", rf"\1.{models}", changed, flags=re.MULTILINE)
        if changed != text:
            path.write_text(changed, encoding="utf-8")
        if re.search(r"^\s*import\s+modeling_colt5\b", changed, flags=re.MULTILINE):
            logger.warning(
                f"{path.name} has 'import modeling_colt5', so {folder} loads only where that package is installed; "
                "write 'from modeling_colt5 import ...', which is saved as an import of the code in the folder"
            )


def kinds_of_layers(names: Iterable[str]) -> dict[str, set[str]]:
    """Stack → its kinds of layers, from weights' names: "encoder.block.3.layer.1.…" is "layer.1" of "encoder"."""
    kinds: dict[str, set[str]] = {}
    for name in names:
        found = re.match(r"(.*?)\.?\bblock\.\d+\.(layer\.\d+)\.", name)
        if found:
            kinds.setdefault(found[1], set()).add(found[2])
    return kinds


def check_layers(model: PreTrainedModel, missing: set[str], unexpected: set[str], where: str) -> None:
    """Refuse a checkpoint that lacks a stack, or whose stack has layers of other kinds than the model's.

    New heads, routers and further layers of the same kinds may begin with random weights, as Transformers reports; so
    may whatever is missing from a checkpoint of the model's own class.

    Args:
        model: the loaded model.
        missing: names of its weights that the checkpoint does not hold.
        unexpected: names of the checkpoint's weights that the model does not have.
        where: folder or repository of the checkpoint.

    Raises:
        ValueError: naming the stack and the class that was saved.
    """
    if type(model).__name__ in (model.config.architectures or ()):
        return
    names = {name for name, _ in model.named_parameters()}
    held = kinds_of_layers((names - missing) | unexpected)
    for stack, wanted in kinds_of_layers(names).items():
        if held.get(stack) != wanted:
            what = "other layers in its" if stack in held else "no"
            saved = " and ".join(model.config.architectures or ["another class"])
            raise ValueError(
                f"{where} was saved from {saved} and has {what} {stack}; {type(model).__name__} would begin with "
                f"random layers. Load it with {saved}, or with an Auto class that the model was saved for"
            )
