"""Warm start: make a CoLT5 checkpoint of a T5 1.0, T5 1.1, Flan-T5, UL2, mT5, umT5 or LongT5 one.

    python examples/convert_t5.py google/long-t5-local-base my-colt5 [--sample text.txt] [--cross-key-value-heads 1]

Says in what the result differs from its source until it is trained further, by how much docs/convert.md has measured.
"""

import argparse
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub.errors import StrictDataclassError
from model_arguments import ModelArguments, Share, load_tokenizer
from sources import check_source, one_line

from modeling_colt5 import CoLT5Config
from modeling_colt5.conversion import convert, differences, load_source

BUDGETS = ("feed_forward_fraction", "query_fraction", "key_value_fraction")


def main(argv: list[str] | None = None) -> None:
    """Load, convert, save."""
    fields = CoLT5Config().to_dict()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder or Hub id of T5, mT5, umT5 or LongT5")
    parser.add_argument("target", type=Path, help="the folder to write; must not exist")
    parser.add_argument("--sample", type=Path, help="text to measure heads and units on; without it, by the weights")
    parser.add_argument("--sample-length", type=int, default=512, help="tokens of one piece of the sample")
    parser.add_argument("--light-heads", type=int, help="default: a quarter of the heads, for LongT5 all")
    parser.add_argument("--heavy-heads", type=int, help="default: the rest, for LongT5 three quarters as many")
    parser.add_argument("--light-d-ff", type=int, help="default: half of the source's")
    parser.add_argument("--heavy-d-ff", type=int, help="default: four times the source's")
    parser.add_argument("--cross-key-value-heads", type=int, help="default: all; fewer are means of neighbours")
    parser.add_argument("--local-radius", type=int, help=f"default: {fields['local_radius']}, for LongT5 its own")
    for name in BUDGETS:
        default = fields[f"routed_{name}"]
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=Share, help=f"budget, such as 1/8; default: {Fraction(default)}"
        )
    parser.add_argument("--routed-cross-key-values", type=int, help="default: cross-attention reads all tokens")
    options = parser.parse_args(argv)
    if options.target.exists():
        parser.error(f"{options.target} exists")

    if options.sample is not None and not options.sample.is_file():
        parser.error(f"{options.sample} is not a file")
    if options.sample_length < 1:
        parser.error(f"--sample-length is {options.sample_length}; it must be at least 1")

    budgets = {f"routed_{name}": getattr(options, name) for name in BUDGETS}
    given = {name: float(value) for name, value in budgets.items() if value is not None}
    more = {name: getattr(options, name) for name in ("local_radius", "routed_cross_key_values")}
    given |= {name: value for name, value in more.items() if value is not None}
    try:
        # budgets that cannot be are found before the source is read
        CoLT5Config(**given)
        check_source(options.source, "source")
        source, unused = load_source(options.source)
        tokenizer = load_tokenizer(ModelArguments(model_name_or_path=options.source))
        samples = None
        if options.sample is not None:
            try:
                text = options.sample.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{options.sample} is not UTF-8: {error}") from error
            if not text.strip():
                raise ValueError(f"{options.sample} has no text to measure on; without --sample the weights are read")
            ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
            samples = [{"input_ids": piece} for piece in ids.split(options.sample_length, dim=1)]
        model = convert(
            source,
            num_light_heads=options.light_heads,
            num_heavy_heads=options.heavy_heads,
            light_d_ff=options.light_d_ff,
            heavy_d_ff=options.heavy_d_ff,
            num_cross_key_value_heads=options.cross_key_value_heads,
            samples=samples,
            **given,
        )
    except (ImportError, OSError, TypeError, ValueError, StrictDataclassError) as error:
        parser.exit(2, f"{parser.prog}: error: {one_line(error)}\n")
    options.target.parent.mkdir(parents=True, exist_ok=True)
    # the folder gets its name when everything is in it
    with TemporaryDirectory(dir=options.target.parent, prefix=f"{options.target.name}-") as folder:
        whole = Path(folder) / options.target.name
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        whole.rename(options.target)
    print(f"{options.target}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")
    changed = differences(source, model)
    if unused:
        changed.append(f"{len(unused)} weights of the checkpoint have no place in it, such as {unused[0]}.")
    if changed:
        print("In this it differs from its source:", *changed, sep="\n- ")
        print(
            "Train it further before you use it. The one curve that was measured, of a small T5 (docs/convert.md): "
            "after 2,400 steps of its own, 320 more at the paper's budgets brought the loss back to where it was."
        )


if __name__ == "__main__":
    main()
