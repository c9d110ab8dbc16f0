"""Make the checkpoint that is loaded and uploaded out of a finished run: weights in bf16, tokenizer, model card.

    python -m python_types.checkpoint --run ../build/types/run --tokens ../build/types \
        --corpus ../build/python_types --out ../checkpoints/python-types

run from the folder examples/. The card's numbers are those that the run's evaluation left; `python -m
python_types.evaluate` makes them anew.
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from python_types.evaluate import MOST_TOKENS, VOCABULARY, tables
from python_types.score import COPY_BELOW
from python_types.weights import load_weights
from transformers import GenerationConfig, HfArgumentParser

from modeling_colt5 import CoLT5Tokenizer

PACKAGE = Path(__file__).resolve().parents[2] / "modeling_colt5"
MOST_BYTES = 32_000_000
CARD = """---
license: apache-2.0
language: en
library_name: transformers
tags: [colt5, code, python, type-inference]
---

# The types of a Python module

A CoLT5 encoder–decoder of {parameters:.1f} M parameters that reads a whole Python module and gives the annotations of
parameters and returns that it lacks, all of them in one pass. It is small: it helps people who add types to a module
by hand, and is an example of what routed long inputs are good for.

    python examples/annotate_types.py module.py              # prints a diff; --help lists the options

In Python, without this package (with it, `import modeling_colt5` makes `trust_remote_code=True` unnecessary):

    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("checkpoints/python-types", trust_remote_code=True)
    model = AutoModelForSeq2SeqLM.from_pretrained("checkpoints/python-types", trust_remote_code=True)
    code = "def count(path: Path, skip_empty:<extra_id_0> = False) -><extra_id_1> :\\n    return len(read(path))\\n"
    print(tokenizer.decode(model.generate(**tokenizer(code, return_tensors="pt"))[0]))

The input has a sentinel, such as `<extra_id_0>`, for each annotation that is wanted, a hundred at most. The output is
sentinel, type, sentinel, type, ..., in T5's form.

## How good it is

It was tested on modules drawn at random from packages that were not trained on; the tables say how many. A type is
right if it is the author's own to the character, but for spaces and quotes: `Optional[int]` for `int | None` is
wrong. The model is compared with copying: "copied by name" is the commonest type of that parameter's name in the rest
of the module, else in the training data, and "nearest of that name" is the nearest one. "Copied in the module" is the
nearest in the module alone, and wrong where there is none. "Tool" is what `annotate_types.py` writes: the type copied
in the module where the model's probability is below {copy_below:.0%}, else the model's. The threshold was chosen on
other packages. The intervals are of 95 %, by a paired bootstrap over modules. No module is longer than {most:,}
tokens; the model was trained on up to {trained:,}.

{tables}
## What it was trained on

{modules:,} modules of the packages with split "train", {tokens:.1f} M tokens with {annotations:,} annotations, after
near-duplicates were dropped, across splits too. All are under permissive licences, which the table names; their texts
belong to their authors. `examples/python_types/corpus.py` makes the same corpus again.

{summary} In some batches 15 to 100 % of a module's annotations were hidden, at random each time that it was read; the
others were span corruption of the same text. In half of the inputs or more, other words replaced the module's own, so
that the model had to look instead of knowing by heart. Training began with weights that look at neighbours, and the
encoder had a loss of its own at the sentinels. It took {steps:,} steps in {minutes:.1f} minutes of training on
{gpus}, bf16{runs}: a dense start on inputs that grow from {shortest:,} to {start:,} tokens, then learned routing (one
query and one token of the feed-forward among {budget}, keys and values twice as many) on inputs of up to {trained:,}.
{notes}`examples/python_types/train.py` is the recipe.

## What it is not

- It has seen about {rounded:,} annotations. It knows types that only your project has from the
  module that it reads; if that has no annotation, from names and imports alone.
- It does not check anything: a type that it gives can be parsed, but may be wrong. Run a type checker.
- Its probabilities are of the answer as it is spelt, and are not calibrated.
- Code of the packages with split "train", and so of the standard library, torch and transformers, was trained on:
  numbers on these say nothing.
- It writes annotations only: no comments, imports or stubs.
"""


@dataclass
class Arguments:
    """What to make it of."""

    run: Path = field(metadata={"help": "the run's folder: weights, evaluation.json"})
    tokens: Path = field(metadata={"help": "folder of baselines.json"})
    corpus: Path = field(metadata={"help": "corpus.py's folder: summary.md"})
    out: Path = field(metadata={"help": "the checkpoint's folder"})
    earlier: list[Path] = field(
        default_factory=list, metadata={"help": "folders of the runs that this one goes on from, the first one first"}
    )
    gpus: str = field(default="one GPU", metadata={"help": "what it was trained on, as the card says it"})
    notes: str = field(default="", metadata={"help": "what else there is to say of the runs, in full sentences"})


def training_totals(summary: str) -> tuple[int, float, int]:
    """Modules, million tokens and annotations of the training split, by the corpus's table."""
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in summary.splitlines()]
    train = [row for row in rows if row[2:3] == ["train"]]
    return sum(int(row[4]) for row in train), sum(float(row[3]) for row in train), sum(int(row[7]) for row in train)


def card(
    runs: list[dict[str, Any]],
    config: Any,
    parameters: int,
    numbers: dict[str, Any],
    summary: str,
    gpus: str,
    notes: str = "",
) -> str:
    """The model card.

    Args:
        runs: what the weights say of their runs, the first one first.
        config: the model's.
        parameters: the model's.
        numbers: evaluation.json.
        summary: the corpus's table.
        gpus: what it was trained on.
        notes: what else there is to say of the runs.
    """
    modules, tokens, annotations = training_totals(summary)
    and_then = ", then ".join(f"{about['step']:,}" for about in runs)
    return CARD.format(
        parameters=parameters / 1e6,
        tables=tables(numbers),
        summary=summary,
        modules=modules,
        tokens=tokens,
        annotations=annotations,
        rounded=round(annotations, -4),
        notes=notes + "\n" * bool(notes),
        steps=sum(about["step"] for about in runs),
        minutes=sum(about["seconds"] for about in runs) / 60,
        gpus=gpus,
        runs="" if len(runs) == 1 else f" ({and_then})",
        shortest=min(runs[0]["start_lengths"]),
        start=max(runs[0]["start_lengths"]),
        trained=max(runs[-1]["lengths"]),
        most=MOST_TOKENS,
        copy_below=COPY_BELOW,
        budget=round(1 / config.routed_query_fraction),
    )


def main(argv: list[str] | None = None) -> None:
    """Write the folder anew."""
    (arguments,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses(argv)
    numbers = json.loads((arguments.run / "evaluation.json").read_text())
    summary = (arguments.corpus / "summary.md").read_text(encoding="utf-8")
    model, about = load_weights(arguments.run)
    runs = [*(load_weights(folder)[1] for folder in arguments.earlier), about]
    text = card(runs, model.config, model.num_parameters(), numbers, summary, arguments.gpus, arguments.notes)

    if arguments.out.exists():
        shutil.rmtree(arguments.out)
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.generation_config.update(max_new_tokens=1024, do_sample=False)
    # the weights were rounded when they were saved
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    CoLT5Tokenizer.from_pretrained(VOCABULARY).save_pretrained(arguments.out)
    for file in arguments.out.glob("*.py"):
        # links, because a copy in the repository would soon be another version; an upload has the files themselves
        file.unlink()
        file.symlink_to(os.path.relpath(PACKAGE / file.name, arguments.out))
    # what --score compares with
    shutil.copy(arguments.tokens / "baselines.json", arguments.out)
    (arguments.out / "README.md").write_text(text, encoding="utf-8")
    size = (arguments.out / "model.safetensors").stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"model.safetensors has {size:,} bytes; must have at most {MOST_BYTES:,}")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
