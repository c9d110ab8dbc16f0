"""Draws docs/routed_digits.png: a held-out picture of benchmarks/digits.py, and the patches that the feed-forward
routers of a trained model take, beside evenly spaced ones. Prints what share of framed patches each router takes.

    python benchmarks/digits.py --side 256 --patch 16 --cell 16 --light 1 --radius 0 --fraction 0.0625 --steps 6000 \\
        --stages 64:0.4:128 128:0.3:128 256:0.3:64 --arms learned even --keep models
    python docs/routed_digits_picture.py models/learned_256_0 models/even_256_0
    python docs/routed_digits_picture.py models/learned_1024_0 --side 1024     # only counts
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from modeling_colt5 import CoLT5ForImageClassification, show_routing

matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import digits  # noqa: E402

SIDE, PATCH = 256, 16
# pictures in which routers are counted, and how many of them a model reads at once
COUNTED, TOGETHER = 256, 16
FRAME = (0.85, 0.1, 0.1)


def as_it_is(picture: Tensor, return_tensors: str) -> dict[str, Tensor]:
    """An image processor of pictures that are tensors already."""
    return {"pixel_values": picture}


def routed_patches(folder: str, pictures: Tensor) -> tuple[Tensor, list[int]]:
    """Which patches of a picture each layer's feed-forward routes, bool [layers, rows, columns], and the digits that
    the model answers."""
    model = CoLT5ForImageClassification.from_pretrained(folder)
    view = show_routing(model, as_it_is, pictures)
    with torch.no_grad():
        answer = model.eval()(pictures).logits[0].topk(digits.MARKED).indices
    return view.weights["feed_forward"].view(-1, *view.grid) > 0, sorted(answer.tolist())


def shares_of_frames(folder: str, side: int) -> list[str]:
    """The share of framed patches that each router takes, in pictures that nobody trained with."""
    model = CoLT5ForImageClassification.from_pretrained(folder).eval()
    pictures, _, framed = digits.Digits(True, 7, PATCH).draw(COUNTED, side)
    taken: dict[str, list[Tensor]] = {}
    for own, pixels in zip(pictures.split(TOGETHER), framed.split(TOGETHER), strict=True):
        patches = torch.nn.functional.max_pool2d(pixels.float(), PATCH).flatten(1)
        with torch.no_grad():
            routing = model(own, output_routing=True).routing
        for number, layer in enumerate(routing):
            for name in ("query", "key_value", "feed_forward"):
                held = patches.gather(1, layer[name].indices) * layer[name].valid
                taken.setdefault(f"{name} of layer {number + 1}", []).append(held.sum(1) / patches.sum(1))
    return [f"{router}: {torch.cat(shares).mean().item():.3f}" for router, shares in taken.items()]


def draw(axes: Any, picture: Tensor, patches: Tensor | None, title: str) -> None:
    """The picture, dark where patches are not routed, with a red line around each framed digit's patch."""
    pixels = picture * 0.35 + 0.25
    if patches is not None:
        shown = patches.float().repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
        pixels = pixels * (0.4 + 0.6 * shown) + 0.15 * shown
    axes.imshow(pixels.clamp(0, 1), cmap="gray", vmin=0, vmax=1, extent=(0, SIDE, SIDE, 0))
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("learned", help="folder of the model whose routers learned")
    parser.add_argument("even", nargs="?", help="folder of the model with evenly spaced patches, for the picture")
    parser.add_argument("--side", type=int, default=SIDE, help="of the pictures in which routers are counted")
    parser.add_argument("--seed", type=int, default=0, help="of the held-out picture")
    options = parser.parse_args()
    print("framed patches taken:", *shares_of_frames(options.learned, options.side), sep="\n  ")
    if options.even is None:
        return
    pictures, labels, framed = digits.Digits(True, options.seed, PATCH).draw(1, SIDE)
    learned, answer = routed_patches(options.learned, pictures)
    even, even_answer = routed_patches(options.even, pictures)
    print("framed:", labels[0].nonzero().flatten().tolist(), "learned:", answer, "even:", even_answer)
    panels = [
        (None, "the picture"),
        *((own, f"learned: feed-forward, layer {i + 1}") for i, own in enumerate(learned)),
        (even[0], "evenly spaced"),
    ]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3 * len(panels), 3.25), layout="constrained")
    cells = framed[0, 0].view(SIDE // PATCH, PATCH, SIDE // PATCH, PATCH).any(3).any(1)
    for own, (patches, title) in zip(axes, panels, strict=True):
        draw(own, pictures[0, 0], patches, title)
        for row, column in cells.nonzero().tolist():
            corner = (column * PATCH - 2, row * PATCH - 2)
            own.add_patch(pyplot.Rectangle(corner, PATCH + 4, PATCH + 4, fill=False, edgecolor=FRAME, linewidth=1.6))
    figure.savefig(ROOT / "docs" / "routed_digits.png", dpi=80)


if __name__ == "__main__":
    main()
