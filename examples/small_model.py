"""A small model, its vocabulary, and text that every machine has: what notebook and warm start begin with."""

import sysconfig
from pathlib import Path

from modeling_colt5 import CoLT5Config, CoLT5ForConditionalGeneration, CoLT5Tokenizer

VOCABULARY = Path(__file__).parent.parent / "tokenization" / "python_stdlib"


SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def modules_of(folder: Path) -> list[Path]:
    """The modules of a folder, without tests and installed packages, in a fixed order."""
    return sorted(path for path in folder.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(folder).parts))


def standard_library() -> list[Path]:
    """The modules of the running Python, as `modules_of` gives them."""
    return modules_of(Path(sysconfig.get_paths()["stdlib"]))


def read(path: Path) -> str:
    """A module's text."""
    return path.read_text(encoding="utf-8", errors="replace")


def make_model(tokenizer: CoLT5Tokenizer) -> CoLT5ForConditionalGeneration:
    """A small model in the paper's proportions: a quarter of the heads light, light d_ff ½, heavy d_ff 4."""
    config = CoLT5Config(
        vocab_size=8192,
        d_model=256,
        d_kv=32,
        d_ff=512,
        num_layers=4,
        num_decoder_layers=2,
        num_heads=8,
        num_light_heads=2,
        num_heavy_heads=6,
        light_d_ff=256,
        heavy_d_ff=2048,
        dropout_rate=0.0,
    )
    return CoLT5ForConditionalGeneration(config)
