"""Does routing find small things in pictures: scikit-learn's digits in a grid, of which two carry a frame.

python benchmarks/digits.py --tiny --out FOLDER
python benchmarks/digits.py --side 256 --patch 16 --seeds 0 1 2

The label is which digits are framed, two of ten. All other digits are distractors. Arms are learned routing with a
dense start, evenly spaced patches with the same budgets, and Transformers' ViT of the same width and depth; all have
the same steps and pictures, small ones (`--dense_side`) while the dense start lasts. The held-out pictures have digits
that no training picture has. Beside what was found stands how many of the frames' patches the routers took.
"""

import argparse
import itertools
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from measure import make_parser, parse
from results import Table
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from modeling_colt5 import CoLT5ForImageClassification, CoLT5VisionConfig
from modeling_colt5.dense_start import DenseStart

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ARMS = ("learned", "even", "vit")
CLASSES, MARKED = 10, 2
# a digit of 8 × 8 pixels and its frame
STAMP = 10


class Digits:
    """Draws pictures [batch, 1, side, side] and labels [batch, 10] on a device.

    Args:
        held_out: whether to draw of the last fifth of the digits, or of the others.
        seed: of the pictures.
        cell: pixels of a cell's side, in which a digit stands anywhere.
    """

    def __init__(self, held_out: bool, seed: int, cell: int):
        data = load_digits()
        order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
        kept = order[1437:] if held_out else order[:1437]
        images = torch.tensor(data.images, dtype=torch.float32)[kept] / 16
        targets = torch.tensor(data.target)[kept]
        self.images = images.to(DEVICE)
        self.targets = targets.to(DEVICE)
        self.by_class = [(self.targets == digit).nonzero().flatten() for digit in range(CLASSES)]
        self.generator = torch.Generator(DEVICE).manual_seed(seed)
        self.cell = cell

    def integers(self, most: Tensor | int, *shape: int) -> Tensor:
        """Random integers from 0 to below `most`."""
        return (torch.rand(shape, generator=self.generator, device=DEVICE) * most).long()

    def draw(self, batch: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures of a digit in every cell, which digits are framed, and the pixels of their stamps, bool of the
        pictures' shape."""
        across = side // self.cell
        count = across**2
        which = self.integers(len(self.images), batch, count)
        # the framed ones are of different classes, and stand in the first two of the shuffled cells
        classes = torch.rand(batch, CLASSES, generator=self.generator, device=DEVICE).argsort(1)[:, :MARKED]
        sizes = torch.tensor([len(own) for own in self.by_class], device=DEVICE)[classes]
        firsts = torch.tensor([0, *itertools.accumulate(map(len, self.by_class))], device=DEVICE)[classes]
        which[:, :MARKED] = torch.cat(self.by_class)[firsts + self.integers(sizes, batch, MARKED)]
        stamps = torch.zeros(batch, count, STAMP, STAMP, device=DEVICE)
        stamps[:, :MARKED] = 1
        stamps[:, :, 1:-1, 1:-1] = self.images[which]
        cells = torch.rand(batch, count, generator=self.generator, device=DEVICE).argsort(1)
        jitter = self.integers(self.cell - STAMP + 1, batch, count, 2)
        step = torch.arange(STAMP, device=DEVICE)
        rows = (cells // across * self.cell + jitter[..., 0])[..., None, None] + step[:, None]
        columns = (cells % across * self.cell + jitter[..., 1])[..., None, None] + step
        pictures = torch.zeros(batch, 1, side, side, device=DEVICE)
        row = torch.arange(batch, device=DEVICE)[:, None, None, None]
        pictures[row, 0, rows, columns] = stamps
        framed = torch.zeros_like(pictures, dtype=torch.bool)
        framed[row, 0, rows[:, :MARKED], columns[:, :MARKED]] = True
        labels = torch.zeros(batch, CLASSES, device=DEVICE).scatter(1, classes, 1.0)
        # about the mean and the standard deviation of pixels
        return (pictures - 0.25) / 0.35, labels, framed


def make_model(arm: str, options: argparse.Namespace) -> torch.nn.Module:
    """The model of an arm with random weights."""
    common: dict[str, Any] = {
        "patch_size": options.patch,
        "num_channels": 1,
        "num_labels": CLASSES,
        "problem_type": "multi_label_classification",
    }
    width = options.width
    if arm == "vit":
        config = ViTConfig(
            hidden_size=width, num_hidden_layers=options.layers, num_attention_heads=4, intermediate_size=4 * width,
            image_size=options.side, **common,
        )  # fmt: skip
        return ViTForImageClassification(config).to(DEVICE)
    fractions = ("routed_query_fraction", "routed_key_value_fraction", "routed_feed_forward_fraction")
    return CoLT5ForImageClassification(
        CoLT5VisionConfig(
            d_model=width, d_kv=width // 4, num_layers=options.layers, num_light_heads=1, num_heavy_heads=4,
            light_d_ff=options.light, heavy_d_ff=4 * width, local_radius=options.radius,
            relative_attention_num_buckets=8, relative_attention_max_distance=16, dropout_rate=0.0, routing=arm,
            **dict.fromkeys(fractions, options.fraction), **common,
        )
    ).to(DEVICE)  # fmt: skip


@torch.no_grad()
def evaluate(model: torch.nn.Module, options: argparse.Namespace) -> dict[str, float | None]:
    """Of 512 held-out pictures: the share of framed digits found, the share of pictures with both, and the share of
    the frames' patches that a router takes, over all layers."""
    digits = Digits(True, 0, options.cell)
    routes = getattr(model.config, "routing", "none") != "none"
    found, taken = [], []
    model.eval()
    for _ in range(512 // options.batch):
        pictures, labels, framed = digits.draw(options.batch, options.side)
        output = model(pictures, **({"output_routing": True} if routes else {}))
        found.append(labels.gather(1, output.logits.topk(MARKED).indices).sum(1))
        patches = F.max_pool2d(framed.float(), options.patch, ceil_mode=True).flatten(1)
        for layer in output.routing if routes else ():
            for name in ("query", "key_value", "feed_forward"):
                held = patches.gather(1, layer[name].indices) * layer[name].valid
                taken.append(held.sum(1) / patches.sum(1))
    model.train()
    count = torch.cat(found)
    return {
        "framed digits found": count.mean().item() / MARKED,
        "both found": (count == MARKED).float().mean().item(),
        "framed patches routed": torch.cat(taken).mean().item() if taken else None,
    }


def train(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one arm; the row of its results."""
    torch.manual_seed(seed)
    model, steps = make_model(arm, options).train(), options.steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.vit_rate if arm == "vit" else options.rate)
    warmup = max(1, steps // 15)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    digits, schedule, losses = Digits(False, seed + 1, options.cell), DenseStart(), []
    begin = time.perf_counter()
    for step in range(steps):
        progress = schedule.progress(step, steps)
        if arm == "learned":
            model.set_dense_start(progress)
        # all arms read the small pictures: what they teach is no merit of routing
        side = options.side if progress is None else options.dense_side or options.side
        pictures, labels, _ = digits.draw(options.batch, side)
        # a ViT's positions are those of one size
        sized = {"interpolate_pos_encoding": True} if arm == "vit" and side != options.side else {}
        loss = model(pictures, labels=labels, **sized).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.detach())
    last = torch.stack(losses[-max(1, steps // 20) :]).mean().item()
    seconds = time.perf_counter() - begin
    return {
        "arm": arm, "side": options.side, "seed": seed, "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps, "seconds": seconds, "loss": last, **evaluate(model, options),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Train all arms with all seeds, and write the table."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--side", type=int, default=72, help="pixels of a picture's side")
    parser.add_argument("--dense_side", type=int, help="of all arms' pictures while the dense start lasts (the same)")
    parser.add_argument("--patch", type=int, default=12, help="pixels of a patch's side")
    parser.add_argument("--cell", type=int, default=12, help="pixels of a cell's side, at least 10")
    parser.add_argument("--width", type=int, default=64, help="d_model, or hidden_size")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--light", type=int, default=8, help="light_d_ff")
    parser.add_argument("--radius", type=int, default=1, help="local_radius, patches")
    parser.add_argument("--fraction", type=float, default=1 / 9, help="of the patches, what each router takes")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-3, help="AdamW's learning rate")
    parser.add_argument("--vit_rate", type=float, default=1e-3, help="the ViT's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="all arms with each in turn")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    options = parse(parser, argv, needs_gpu=False)
    if options.cell < STAMP:
        parser.error(f"--cell is {options.cell}; it must be at least {STAMP}, the side of a framed digit")
    if options.tiny:
        options.side, options.width, options.layers, options.steps = 36, 16, 1, 4
    table = Table(
        f"digits_{options.side}",
        f"Which two of {(options.side // options.cell) ** 2} digits in pictures of {options.side} × {options.side} "
        f"carry a frame (chance: 0.2 of the framed digits, 1/45 of both), patches of {options.patch}, width "
        f"{options.width}, {options.layers} layers, light feed-forward of {options.light}, local radius "
        f"{options.radius}, routed share "
        f"{options.fraction:.3g}, {options.steps} steps of {options.batch} pictures; held-out pictures",
        options,
    )
    for seed, arm in itertools.product(options.seeds, options.arms):
        table.add(train(arm, seed, options))
    table.finish()


if __name__ == "__main__":
    main()
