"""Draws docs/routed_document.png: a part of a Python module whose types are hidden, each token the darker the more
layers of the shipped checkpoint route it as a query.

    python docs/routed_document_picture.py
"""

import sys
from pathlib import Path

import matplotlib
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from modeling_colt5 import show_routing

matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from python_types.holes import hide, holes_of  # noqa: E402

DOCUMENT = ROOT / "modeling_colt5" / "op_soft_topk.py"
FIRST, LINES, COLUMNS = 15, 22, 112
# of a line and a character, in inches
LINE, CHARACTER = 0.2, 0.086


def main() -> None:
    matplotlib.rcParams["font.family"] = "monospace"
    folder = ROOT / "checkpoints" / "python-types"
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = DOCUMENT.read_text(encoding="utf-8")
    hidden = hide(text, holes_of(text)[: len(tokenizer.get_sentinel_token_ids())])
    view = show_routing(model, tokenizer, hidden.text)
    share = (view.weights["query"] > 0).float().mean(0).tolist()
    figure = pyplot.figure(figsize=(COLUMNS * CHARACTER, LINES * LINE))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, COLUMNS), ylim=(FIRST + LINES, FIRST))
    axes.axis("off")
    line = column = 0
    for token, is_special, strength in zip(view.tokens, view.special, share, strict=True):
        # what stands for a hidden type is special, and is shown
        is_end = is_special and "extra_id" not in token
        for character in "" if is_end else token:
            if character == "\n":
                line, column = line + 1, 0
                continue
            if FIRST <= line < FIRST + LINES and column < COLUMNS:
                axes.add_patch(pyplot.Rectangle((column, line), 1, 1, color=(0.9, 0.45, 0), alpha=strength, lw=0))
                axes.text(column + 0.5, line + 0.72, character, ha="center", fontsize=9)
            column += 1
    figure.savefig(ROOT / "docs" / "routed_document.png", dpi=120)


if __name__ == "__main__":
    main()
