"""Does routing find small things in pictures: scikit-learn's digits in a grid, of which two carry a frame.

python benchmarks/digits.py --tiny --out FOLDER
python benchmarks/digits.py --side 256 --patch 16 --cell 16 --stages 64:0.5:128 256:0.5:32 --seeds 0 1 2

The label is which digits are framed, two of ten. All other digits are distractors. Arms are learned routing with a
dense start, evenly spaced patches with the same budgets, and Transformers' ViT of the same width and depth; all have
the same steps and pictures, which may be small at first (`--stages`). The held-out pictures have digits that no
training picture has. Beside what was found stands how many of the frames' patches the routers took. A run prints and
keeps its curve, with the seconds that its steps took; on a GPU a step is a CUDA graph. `digits_report.py` joins what
several processes ran, and draws the curves.
"""

import argparse
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from captured_step import TrainingStep
from measure import make_parser, parse, synchronize
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
# how many times a run is evaluated on its way, and with how many pictures, then and at its end
POINTS, POINT_PICTURES, PICTURES = 20, 256, 2048
# pixels of the pictures that are drawn by one call: drawing takes as many launches as a step
DRAWN_PIXELS = 2**24


@dataclass(frozen=True)
class Stage:
    """A part of a run: `side` of its pictures, its `share` of the steps, and the pictures of a step."""

    side: int
    share: float
    batch: int


class Digits:
    """Draws pictures [batch, 1, side, side] and labels [batch, 10] on a device.

    Args:
        held_out: whether to draw of the last fifth of the digits, or of the others.
        seed: of the pictures.
        cell: pixels of a cell's side, in which a digit stands anywhere.
        blank: share of the cells without a digit.
    """

    def __init__(self, held_out: bool, seed: int, cell: int, blank: float = 0.0):
        data = load_digits()
        order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
        kept = order[1437:] if held_out else order[:1437]
        images = torch.tensor(data.images, dtype=torch.float32)[kept] / 16
        targets = torch.tensor(data.target)[kept]
        self.images = images.to(DEVICE)
        self.targets = targets.to(DEVICE)
        by_class = [(self.targets == digit).nonzero().flatten() for digit in range(CLASSES)]
        self.by_class = torch.cat(by_class)
        self.sizes = torch.tensor([len(own) for own in by_class], device=DEVICE)
        self.firsts = self.sizes.cumsum(0) - self.sizes
        self.generator = torch.Generator(DEVICE).manual_seed(seed)
        self.cell = cell
        self.blank = blank

    def integers(self, most: Tensor | int, *shape: int) -> Tensor:
        """Random integers from 0 to below `most`."""
        return (torch.rand(shape, generator=self.generator, device=DEVICE) * most).long()

    def draw(self, batch: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures of a digit in every cell that is not blank, which digits are framed, and the pixels of their
        stamps, bool of the pictures' shape."""
        across = side // self.cell
        count = across**2
        which = self.integers(len(self.images), batch, count)
        # the framed ones are of different classes, and stand in the first two of the shuffled cells
        classes = torch.rand(batch, CLASSES, generator=self.generator, device=DEVICE).argsort(1)[:, :MARKED]
        of_class = self.firsts[classes] + self.integers(self.sizes[classes], batch, MARKED)
        which[:, :MARKED] = self.by_class[of_class]
        stamps = torch.zeros(batch, count, STAMP, STAMP, device=DEVICE)
        stamps[:, :MARKED] = 1
        stamps[:, :, 1:-1, 1:-1] = self.images[which]
        stamps[:, max(MARKED, round((1 - self.blank) * count)) :] = 0
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
            classifier_pooling=options.pooling,
            **dict.fromkeys(fractions, options.fraction), **common,
        )
    ).to(DEVICE)  # fmt: skip


def autocast(options: argparse.Namespace) -> torch.autocast:
    """bf16 on a GPU, unless `--fp32` says otherwise."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda" and not options.fp32)


@torch.no_grad()
def evaluate(model: torch.nn.Module, options: argparse.Namespace, count: int) -> dict[str, float | None]:
    """Of `count` held-out pictures: the share of framed digits found, the share of pictures with both, and the share
    of the frames' patches that a router takes, over all layers."""
    digits = Digits(True, 0, options.cell, options.blank)
    routes = getattr(model.config, "routing", "none") != "none"
    found, taken = [], []
    model.eval()
    batch = max(1, min(count, DRAWN_PIXELS // options.side**2))
    for _ in range(count // batch):
        pictures, labels, framed = digits.draw(batch, options.side)
        with autocast(options):
            output = model(pictures, **({"output_routing": True} if routes else {}))
        found.append(labels.gather(1, output.logits.topk(MARKED).indices).sum(1))
        patches = F.max_pool2d(framed.float(), options.patch, ceil_mode=True).flatten(1)
        for layer in output.routing if routes else ():
            for name in ("query", "key_value", "feed_forward"):
                held = patches.gather(1, layer[name].indices) * layer[name].valid
                taken.append(held.sum(1) / patches.sum(1))
    model.train()
    right = torch.cat(found)
    return {
        "framed digits found": right.mean().item() / MARKED,
        "both found": (right == MARKED).float().mean().item(),
        "framed patches routed": torch.cat(taken).mean().item() if taken else None,
    }


def stages_of(options: argparse.Namespace) -> list[Stage]:
    """The parts of a run, as `--stages` says, or one of all steps."""
    stages = []
    for text in options.stages or [f"{options.side}:1"]:
        side, share, *batch = text.split(":")
        stages.append(Stage(int(side), float(share), int(batch[0]) if batch else options.batch))
    return stages


def drawn(digits: Digits, stages: list[Stage], steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The pictures and labels of each step."""
    done, until = 0, 0.0
    for stage in stages:
        until += stage.share
        own = round(until * steps) - done
        done += own
        together = max(1, DRAWN_PIXELS // (stage.batch * stage.side**2))
        for first in range(0, own, together):
            count = min(together, own - first)
            pictures, labels, _ = digits.draw(count * stage.batch, stage.side)
            yield from zip(pictures.chunk(count), labels.chunk(count), strict=True)


def train(arm: str, seed: int, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train one arm; the row of its results, and its curve: lists of what there was on its way."""
    torch.manual_seed(seed)
    model, steps = make_model(arm, options).train(), options.steps
    warmup = max(1, steps // 15)

    def rate_share(step: int) -> float:
        return min(1, step / warmup) * (1 + math.cos(math.pi * (step - 1) / steps)) / 2

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        # a ViT's positions are those of one size
        sized = arm == "vit" and batch["pixel_values"].shape[-1] != options.side
        with autocast(options):
            return model(**batch, **({"interpolate_pos_encoding": True} if sized else {})).loss

    rate = options.vit_rate if arm == "vit" else options.rate
    step_of = TrainingStep(model, loss_of, [{"params": list(model.parameters()), "lr": rate}], rate_share=rate_share)
    schedule = DenseStart(options.closed, options.opening)
    digits = Digits(False, seed + 1, options.cell, options.blank)
    losses = torch.zeros(steps, device=DEVICE)
    point, seconds = max(1, steps // POINTS), 0.0
    curve: dict[str, Any] = {"arm": arm, "seed": seed}
    begin = time.perf_counter()
    for step, (pictures, labels) in enumerate(drawn(digits, stages_of(options), steps)):
        progress = schedule.progress(step, steps) if arm == "learned" else None
        if arm == "learned":
            model.set_dense_start(progress)
        batch = {"pixel_values": pictures, "labels": labels}
        losses[step] = step_of(batch, phase=(pictures.shape, progress is not None))
        if (step + 1) % point == 0:
            synchronize()
            seconds += time.perf_counter() - begin
            found = evaluate(model, options, options.batch if options.tiny else POINT_PICTURES)
            loss, side = losses[step + 1 - point : step + 1].mean().item(), pictures.shape[-1]
            for name, value in {"step": step + 1, "seconds": seconds, "side": side, "loss": loss, **found}.items():
                curve.setdefault(name, []).append(round(value, 4) if isinstance(value, float) else value)
            taken = found["framed patches routed"]
            print(
                f"{arm} {seed}: step {step + 1}, {seconds:.1f} s, side {side}, loss {loss:.4f}, both "
                f"{found['both found']:.3f}, routed {'–' if taken is None else f'{taken:.3f}'}"
                f"{'' if step_of.captured else ', not captured'}",
                flush=True,
            )
            begin = time.perf_counter()
    if options.keep is not None:
        model.save_pretrained(options.keep / f"{arm}_{options.side}_{seed}")
    last = losses[-max(1, steps // 20) :].mean().item()
    row = {
        "arm": arm, "side": options.side, "seed": seed, "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps, "seconds": seconds, "captured": step_of.captured, "loss": last,
        **evaluate(model, options, options.batch if options.tiny else PICTURES),
    }  # fmt: skip
    return row, curve


def main(argv: list[str] | None = None) -> None:
    """Train all arms with all seeds, and write the table."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--side", type=int, default=72, help="pixels of a picture's side")
    parser.add_argument("--stages", nargs="+", metavar="SIDE:SHARE[:BATCH]", help="of all arms, the last has --side")
    parser.add_argument("--patch", type=int, default=12, help="pixels of a patch's side")
    parser.add_argument("--cell", type=int, default=12, help="pixels of a cell's side, at least 10")
    parser.add_argument("--blank", type=float, default=0.0, help="share of the cells without a digit")
    parser.add_argument("--width", type=int, default=64, help="d_model, or hidden_size")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--light", type=int, default=8, help="light_d_ff")
    parser.add_argument("--radius", type=int, default=1, help="local_radius, patches")
    parser.add_argument("--fraction", type=float, default=1 / 9, help="of the patches, what each router takes")
    parser.add_argument("--pooling", default="attention", help="classifier_pooling")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--closed", type=float, default=0.5, help="the dense start's first part")
    parser.add_argument("--opening", type=float, default=0.1, help="its second part")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-3, help="AdamW's learning rate")
    parser.add_argument("--vit_rate", type=float, default=1e-3, help="the ViT's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="all arms with each in turn")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--fp32", action="store_true", help="on a GPU too, where bf16 is the rule")
    parser.add_argument("--keep", type=Path, help="folder in which trained models are saved")
    options = parse(parser, argv, needs_gpu=False)
    if options.cell < STAMP:
        parser.error(f"--cell is {options.cell}; it must be at least {STAMP}, the side of a framed digit")
    if options.tiny:
        options.side, options.width, options.layers, options.steps = 36, 16, 1, 4
    stages = stages_of(options)
    if stages[-1].side != options.side or abs(sum(stage.share for stage in stages) - 1) > 1e-9:
        parser.error(f"--stages is {options.stages}; the last must have a side of {options.side}, and shares sum to 1")
    read = ", then ".join(f"{stage.batch} of {stage.side} × {stage.side} ({stage.share:g})" for stage in stages)
    table = Table(
        f"digits_{options.side}",
        f"Which two of {(options.side // options.cell) ** 2} digits in pictures of {options.side} × {options.side} "
        f"carry a frame (chance: 0.2 of the framed digits, 1/45 of both), patches of {options.patch}, width "
        f"{options.width}, {options.layers} layers, light feed-forward of {options.light}, local radius "
        f"{options.radius}, routed share {options.fraction:.3g}, pooling by {options.pooling}, learning rates of "
        f"{options.rate:g} and for the ViT {options.vit_rate:g}, {options.steps} steps, pictures of a step (share of "
        f"the steps): {read}; cells of {options.cell}, {options.blank:g} of them blank; held-out pictures",
        options,
    )
    for seed, arm in itertools.product(options.seeds, options.arms):
        row, curve = train(arm, seed, options)
        table.run.setdefault("curves", []).append(curve)
        table.add(row)
    table.finish()


if __name__ == "__main__":
    main()
