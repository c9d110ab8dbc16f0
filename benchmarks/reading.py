"""How much code a reader meets: the package's files and lines behind one call, its frames, and questions of mode.

    python benchmarks/reading.py

Runs on the CPU, with kernels in Triton's interpreter. Files and lines are those of the package whose functions a call
enters, frames are the package's own from the call to the launch of a kernel, and questions of mode are places in the
package that ask how PyTorch runs a call (`QUESTIONS`). The aims stand beside the numbers.
"""

import ast
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Triton reads it when it decorates a kernel
os.environ["TRITON_INTERPRET"] = "1"

import torch

import modeling_colt5
from modeling_colt5 import CoLT5Config, CoLT5EncoderModel, CoLT5ForCausalLM

PACKAGE = Path(modeling_colt5.__file__).parent
SIZES = {
    "vocab_size": 64, "d_model": 16, "d_kv": 4, "num_heads": 4, "num_light_heads": 1, "num_heavy_heads": 3, "d_ff": 32,
    "light_d_ff": 8, "heavy_d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "dropout_rate": 0.0,
    "local_radius": 7, "kernel_backend": "triton",
}  # fmt: skip
CAUSAL = {
    "causal_attention": "routed", "causal_feed_forward": "routed", "causal_window": 8, "causal_routed_keys": 4,
}  # fmt: skip
# who calls one of these asks for a mode; `kernel_backend.py`, which answers, is left out
QUESTIONS = {
    "runs_eagerly", "records_now", "is_transformed", "uses_triton", "kernel_takes", "can_look",
    "is_autocast", "product_dtype", "of_now",
    "is_grad_enabled", "is_autocast_enabled", "is_compiling", "is_exporting", "is_current_stream_capturing",
    "is_hooked", "shows_results", "is_inference_mode_enabled", "_has_any_global_hook",
    "_are_functorch_transforms_active", "are_deterministic_algorithms_enabled",
}  # fmt: skip


def lines_of(path: Path) -> int:
    """How long a file is."""
    return len(path.read_text(encoding="utf-8").splitlines())


def entered(call: Callable[[], Any]) -> tuple[set[Path], int]:
    """The package's files whose functions a call enters, and the most of its frames that a launch stands below."""
    files: set[Path] = set()
    deepest = 0

    def look(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal deepest
        if event != "call" or not frame.f_code.co_filename.startswith(str(PACKAGE)):
            return
        files.add(Path(frame.f_code.co_filename))
        if frame.f_code.co_name != "launch":
            return
        depth, caller = 0, frame
        while caller is not None:
            depth += caller.f_code.co_filename.startswith(str(PACKAGE))
            caller = caller.f_back  # type: ignore[assignment]
        deepest = max(deepest, depth)

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return files, deepest


def questions() -> dict[str, int]:
    """How many places of each file ask for a mode."""
    counts = {}
    for path in sorted(PACKAGE.glob("*.py")):
        if path.name == "kernel_backend.py":
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        names = [getattr(node.func, "attr", getattr(node.func, "id", "")) for node in calls]
        counts[path.name] = sum(name in QUESTIONS for name in names)
    return {name: count for name, count in counts.items() if count}


def main() -> None:
    ids = torch.arange(2, 34)[None]
    encoder = CoLT5EncoderModel(CoLT5Config(**SIZES)).eval()
    decoder = CoLT5ForCausalLM(CoLT5Config(**SIZES, **CAUSAL)).eval()
    with torch.no_grad():
        files, deepest = entered(lambda: encoder(ids))
        causal, _ = entered(lambda: decoder.generate(ids, max_new_tokens=2, do_sample=False))
    with torch.enable_grad():
        training, _ = entered(lambda: encoder(ids).last_hidden_state.sum().backward())
    asked = questions()
    rows = [
        ("files of a one-layer encoder's forward pass", len(files), "12"),
        ("lines of these files", sum(map(lines_of, files)), "3,500"),
        ("frames down to a launch", deepest, "8"),
        ("files of its forward and backward pass", len(training), "-"),
        ("files of causal generation", len(causal), "16"),
        ("lines of these files", sum(map(lines_of, causal)), "-"),
        ("places that ask for a mode", sum(asked.values()), "15"),
        ("lines of the package", sum(map(lines_of, PACKAGE.glob("*.py"))), "-"),
    ]
    print("| what | number | aim |\n| --- | ---: | ---: |")
    for what, number, aim in rows:
        print(f"| {what} | {number:,} | {aim} |")
    print("\nencoder:", ", ".join(sorted(path.stem for path in files)))
    print("causal generation:", ", ".join(sorted(path.stem for path in causal)))
    print("modes:", ", ".join(f"{name} {count}" for name, count in asked.items()))


if __name__ == "__main__":
    main()
