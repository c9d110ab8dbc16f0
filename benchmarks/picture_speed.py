"""Time and memory of the encoder of pictures beside ViT and Swin of Transformers, of equal width and depth.

python benchmarks/picture_speed.py [--sides 1024 4096]

All have patches of 16, are called eagerly, and have no head. Swin has one stage, so that its width is the others'; its
windows are 8 × 8. Before anything is timed, the table gets a note of how far the encoder with kernels is from the one
without. A row that does not fit says so.
"""

import argparse
import time
from collections.abc import Callable

import torch
from encoder import release
from measure import make_parser, median_ms, parse, peak_mib
from peers import DEVICE, DTYPE
from results import Row, Table
from torch import Tensor
from transformers import SwinConfig, SwinModel, ViTConfig, ViTModel

from modeling_colt5 import CoLT5VisionConfig, CoLT5VisionModel

PATCH = 16


def make_colt5(options: argparse.Namespace, side: int, kernel_backend: str = "auto") -> torch.nn.Module:
    """The paper's shares and light sizes, at this width."""
    width = options.width
    config = CoLT5VisionConfig(
        d_model=width, num_layers=options.layers, num_light_heads=max(1, width // 192), d_kv=options.head,
        num_heavy_heads=max(1, width // 96), light_d_ff=width, heavy_d_ff=4 * width, patch_size=PATCH,
        dropout_rate=0.0, kernel_backend=kernel_backend,
    )  # fmt: skip
    return CoLT5VisionModel(config)


def make_vit(options: argparse.Namespace, side: int) -> torch.nn.Module:
    config = ViTConfig(
        hidden_size=options.width, num_hidden_layers=options.layers, num_attention_heads=options.width // options.head,
        intermediate_size=4 * options.width, image_size=side, patch_size=PATCH,
    )  # fmt: skip
    return ViTModel(config, add_pooling_layer=False)


def make_swin(options: argparse.Namespace, side: int) -> torch.nn.Module:
    config = SwinConfig(
        image_size=side, patch_size=PATCH, embed_dim=options.width, depths=[options.layers],
        num_heads=[options.width // options.head], window_size=8, drop_path_rate=0.0,
    )  # fmt: skip
    return SwinModel(config, add_pooling_layer=False)


MAKERS: dict[str, Callable[..., torch.nn.Module]] = {
    "CoLT5": make_colt5,
    "CoLT5, in PyTorch": lambda options, side: make_colt5(options, side, "torch"),
    "ViT": make_vit,
    "Swin, one stage": make_swin,
}


@torch.no_grad()
def difference(options: argparse.Namespace) -> float:
    """Of outputs with kernels and without, in fp32, relative to their norm."""
    torch.manual_seed(0)
    model = make_colt5(options, 208).to(DEVICE).eval()
    pixels = torch.randn(2, 3, 208, 304, device=DEVICE)
    ours = model(pixels).last_hidden_state
    model.config.kernel_backend = "torch"
    theirs = model(pixels).last_hidden_state
    return ((ours - theirs).norm() / theirs.norm()).item()


def measure(name: str, side: int, options: argparse.Namespace) -> Row:
    """A model's row: milliseconds and MiB, forward without gradients, and forward with backward."""
    row: Row = {"model": name, "side": side, "patches": (side // PATCH) ** 2}
    try:
        model = MAKERS[name](options, side).to(DEVICE, DTYPE).eval()
        row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        pixels = torch.randn(1, 3, side, side, device=DEVICE, dtype=DTYPE)

        def forward() -> Tensor:
            with torch.no_grad():
                return model(pixels).last_hidden_state

        def both() -> None:
            model.zero_grad(set_to_none=True)
            model(pixels).last_hidden_state.float().square().mean().backward()

        for kind, call in (("forward", forward), ("both", both)):
            row[f"{kind} ms"] = median_ms(call, options.tiny)
            row[f"{kind} peak MiB"] = peak_mib(call)
    except torch.OutOfMemoryError:
        row["note"] = "out of memory"
    release()
    return row


def main(argv: list[str] | None = None) -> None:
    """Measure all models at all sizes, and write the table."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--sides", type=int, nargs="+", default=[1024, 4096], help="pixels, multiples of 128")
    parser.add_argument("--width", type=int, default=768, help="d_model, or hidden_size")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--head", type=int, default=64, help="features of a head")
    options = parse(parser, argv)
    if options.tiny:
        options.sides, options.width, options.layers, options.head = [128], 32, 1, 16
    table = Table(
        "picture_speed",
        f"Encoders of pictures with patches of {PATCH}, width {options.width}, {options.layers} layers, batch 1, "
        f"{DTYPE}, called eagerly: median milliseconds and peak memory beyond weights and inputs, forward, and both, "
        "which is forward with backward",
        options,
    )
    table.note(
        f"In fp32 CoLT5's outputs with kernels differ from those in PyTorch by {difference(options):.1e} of their "
        "norm; a patch that another rounding routes otherwise counts."
    )
    for side in options.sides:
        for name in MAKERS:
            if time.perf_counter() > options.deadline:
                table.note(f"No time was left for {name} at {side} × {side}.")
                continue
            table.add(measure(name, side, options))
    table.finish()


if __name__ == "__main__":
    main()
