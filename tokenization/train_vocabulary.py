"""Train a T5-form Unigram vocabulary from text files or from this Python's own standard library."""

import argparse
import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path

from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2
from tokenizers import AddedToken

from modeling_colt5.tokenization_colt5 import CoLT5Tokenizer

# newline with the next line's indent, tab, and runs of spaces. the longest is taken first, and one space left over
# behind it is lost: of the standard library's lines, some are indented by 33, hardly any by 41
LAYOUT_TOKENS = ["\n" + " " * width for width in range(41)] + ["\t"] + [" " * width for width in range(2, 33)]

# not part of the library, or tables that a program wrote
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


# these always have a piece of their own: printable ASCII, pad, eos and unk, and what a space becomes
REQUIRED_CHARACTERS = "".join(map(chr, range(33, 127)))
LEAST_PIECES = len(REQUIRED_CHARACTERS) + 4
# sentencepiece takes no other
LEAST_COVERAGE = 0.98


def standard_library() -> list[Path]:
    """The source files of the running Python's standard library, without its tests, in order of path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path for path in root.rglob("*.py") if not EXCLUDED_FOLDERS & set(path.relative_to(root).parts))
    return sorted(files, key=lambda path: path.relative_to(root).parts)


def lines_of(files: Iterable[Path]) -> Iterator[str]:
    """The lines of UTF-8 files, without their ends; what is not UTF-8 becomes U+FFFD."""
    for file in files:
        yield from file.read_text(encoding="utf-8", errors="replace").splitlines()


def check_files(files: Iterable[Path]) -> None:
    """Refuse what cannot be read as text, before anything is trained.

    Raises:
        ValueError: naming all that are no files.
    """
    if missing := [str(file) for file in files if not file.is_file()]:
        raise ValueError(f"--files has {', '.join(missing)}, where no file is")


def check_numbers(vocab_size: int, layout: int, extra_ids: int, character_coverage: float) -> None:
    """Refuse what no text could be trained with; `layout` is the number of layout tokens.

    Raises:
        ValueError: naming the first of them.
    """
    least = LEAST_PIECES + layout
    if vocab_size < least:
        counted = f", {layout} layout tokens among them" if layout else ""
        raise ValueError(f"vocab_size is {vocab_size}; it must be at least {least}, for any text{counted}")
    if extra_ids < 0:
        raise ValueError(f"extra_ids is {extra_ids}; it must be at least 0")
    if not LEAST_COVERAGE <= character_coverage <= 1:
        raise ValueError(f"character_coverage is {character_coverage}; it must be from {LEAST_COVERAGE} to 1")


def train(
    lines: Iterable[str],
    vocab_size: int,
    *,
    keep_whitespace: bool = False,
    mode_tokens: bool = False,
    extra_ids: int = 100,
    character_coverage: float = 0.9995,
) -> CoLT5Tokenizer:
    """Train a vocabulary as T5's was (Raffel et al. 2020, §2.2.1): SentencePiece's Unigram with its NFKC rules.

    The same lines give the same vocabulary on every run of one sentencepiece version.

    Args:
        lines: the text, a line at a time.
        vocab_size: number of pieces with pad (0), eos (1), unk (2) and the layout tokens, without the sentinels and
            the mode tokens, which follow in this order.
        keep_whitespace: whether newlines with their indent, tabs and runs of spaces are tokens. T5 turns all
            whitespace into single spaces.
        mode_tokens: whether to append UL2's mode tokens.
        extra_ids: number of sentinels.
        character_coverage: share of the text's characters that get a piece of their own. Printable ASCII always does.

    Raises:
        ValueError: before training, `vocab_size` is too small for any text, `extra_ids` is below 0, or
            `character_coverage` is not from 0.98 to 1.
        RuntimeError: `vocab_size` is too large or too small for this text (sentencepiece says what would fit, without
            the layout tokens), or there is no text.
    """
    layout = LAYOUT_TOKENS if keep_whitespace else []
    check_numbers(vocab_size, len(layout), extra_ids, character_coverage)
    model = BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size - len(layout),
            normalization_rule_name="nmt_nfkc",
            character_coverage=character_coverage,
            required_chars=REQUIRED_CHARACTERS,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            # sums over threads depend on how many there are
            num_threads=1,
            minloglevel=1,
        )
    except RuntimeError as error:
        if "sentences_.empty()" in str(error):
            raise RuntimeError("there is no text to train on: all lines are empty") from error
        if layout:
            raise RuntimeError(
                f"{error} These sizes are without the {len(layout)} layout tokens, which vocab_size counts"
            ) from error
        raise
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.getvalue())
    # more digits than these are noise of the last bits, and half the file
    pieces = [(piece.piece, round(piece.score, 4)) for piece in proto.pieces]
    pieces += [(token, 0.0) for token in layout]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(extra_ids))]
    tokenizer = CoLT5Tokenizer(
        vocab=pieces,
        mode_tokens=mode_tokens,
        extra_ids=extra_ids,
        _spm_precompiled_charsmap=proto.normalizer_spec.precompiled_charsmap,
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in layout])
    return tokenizer


def save_data(tokenizer: CoLT5Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` (on one line) and `tokenizer_config.json`, without the code of the tokenizer class.

    The folder loads where this package is installed. `save_pretrained` of what it loads adds the code.
    """
    tokenizer.save_pretrained(folder)
    (folder / "tokenization_colt5.py").unlink()
    for name, indent in (("tokenizer.json", None), ("tokenizer_config.json", 2)):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        content.pop("auto_map", None)
        separators = (",", ":") if indent is None else None
        text = json.dumps(content, ensure_ascii=False, indent=indent, separators=separators, sort_keys=indent == 2)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for tokenizer.json and tokenizer_config.json")
    parser.add_argument(
        "--files", type=Path, nargs="+", help="text files (UTF-8); without them, this Python's standard library"
    )
    parser.add_argument("--vocab_size", type=int, default=32_000, help="pieces, without sentinels and mode tokens")
    parser.add_argument("--extra_ids", type=int, default=100, help="number of sentinels")
    parser.add_argument("--mode_tokens", action="store_true", help="append UL2's mode tokens")
    parser.add_argument(
        "--keep_whitespace",
        action="store_true",
        help="make newlines with their indent, tabs and runs of spaces tokens; T5 turns them into single spaces",
    )
    parser.add_argument(
        "--character_coverage", type=float, default=0.9995, help="share of characters with a piece of their own"
    )
    options = parser.parse_args(arguments)
    try:
        check_files(options.files or [])
        tokenizer = train(
            lines_of(options.files or standard_library()),
            options.vocab_size,
            keep_whitespace=options.keep_whitespace,
            mode_tokens=options.mode_tokens,
            extra_ids=options.extra_ids,
            character_coverage=options.character_coverage,
        )
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"train_vocabulary.py: {' '.join(str(error).split())}")
    save_data(tokenizer, options.output)
    print(f"{options.output}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
