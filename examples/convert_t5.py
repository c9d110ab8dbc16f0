"""Warm start: make a CoLT5 checkpoint of a T5 1.0, T5 1.1, Flan-T5, UL2 or LongT5 one.

    python examples/convert_t5.py google/long-t5-local-base my-colt5 [--sample text.txt] [--cross-key-value-heads 1]

The result computes what its source computes, where docs/training.md says so.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForSeq2SeqLM

from modeling_colt5 import CoLT5Tokenizer
from modeling_colt5.conversion import convert


def main(argv: list[str] | None = None) -> None:
    """Load, convert, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder or Hub id of T5 or LongT5")
    parser.add_argument("target", type=Path, help="the folder to write; must not exist")
    parser.add_argument("--sample", type=Path, help="text to measure heads and units on; without it, by the weights")
    parser.add_argument("--sample-length", type=int, default=512, help="tokens of one piece of the sample")
    parser.add_argument("--light-heads", type=int, help="default: a quarter of the heads, for LongT5 all")
    parser.add_argument("--heavy-heads", type=int, help="default: the rest, for LongT5 three quarters as many")
    parser.add_argument("--light-d-ff", type=int, help="default: half of the source's")
    parser.add_argument("--heavy-d-ff", type=int, help="default: four times the source's")
    parser.add_argument("--cross-key-value-heads", type=int, help="default: all; fewer are means of neighbours")
    options = parser.parse_args(argv)
    if options.target.exists():
        parser.error(f"{options.target} exists")

    if options.sample is not None and not options.sample.is_file():
        parser.error(f"{options.sample} is not a file")

    tokenizer = CoLT5Tokenizer.from_pretrained(options.source)
    source = AutoModelForSeq2SeqLM.from_pretrained(options.source)
    samples = None
    if options.sample is not None:
        ids = tokenizer(options.sample.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"]
        samples = [{"input_ids": piece} for piece in ids.split(options.sample_length, dim=1)]
    try:
        model = convert(
            source,
            num_light_heads=options.light_heads,
            num_heavy_heads=options.heavy_heads,
            light_d_ff=options.light_d_ff,
            heavy_d_ff=options.heavy_d_ff,
            num_cross_key_value_heads=options.cross_key_value_heads,
            samples=samples,
        )
    except (TypeError, ValueError, StrictDataclassError) as error:
        parser.error(str(error))
    options.target.parent.mkdir(parents=True, exist_ok=True)
    # the folder gets its name when everything is in it
    with TemporaryDirectory(dir=options.target.parent, prefix=f"{options.target.name}-") as folder:
        whole = Path(folder) / options.target.name
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        whole.rename(options.target)
    print(f"{options.target}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
