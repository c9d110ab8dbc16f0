"""The demo: load the checkpoint of this repository, and let it give a long Python module the types that were hidden.

    python examples/demo.py [FILE] [--folder FOLDER] [--steps 30] [--output-dir .demo]

All annotations of the module are hidden, filled in by one pass over the whole module, and counted. Then the demo shows
what the routers of the encoder chose. At the end it trains the model further on the folder's other modules, and prints
the loss on those that it keeps back, before and after. Without a file it takes a module of huggingface_hub, a package
that the checkpoint was not trained on, and that every environment of Transformers has.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from annotate_types import CHECKPOINT, ask, baselines_of, load
from python_types.holes import Hole, fill, hide, holes_of, holes_to_hide
from python_types.predict import Prediction
from python_types.score import copied_by_name
from python_types.source import Source, SourceError, read_source, unified_diff
from python_types.training_rows import Batches, Shape, Tokens, tokenise
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed
from transformers.utils import logging

from modeling_colt5.parameter_groups import size_scaled_groups

MODULE = "repocard.py"
SHOWN_LINES, SHOWN_TOKENS = 30, 300
# tokens of an input and of a target while training
SHAPE = Shape(1, 2048, 512)
LEARNING_RATE = 1e-3
KEPT_ROWS = 16


class Rows(Dataset):
    """So many stretches of modules with hidden annotations."""

    def __init__(self, texts: Sequence[str], tokenizer: Any, count: int):
        modules = [tokenise(text, holes_to_hide(holes_of(text)), tokenizer) for text in texts]
        self.batches = Batches(Tokens.of(modules), [SHAPE], 1.0, tokenizer.get_sentinel_token_ids(), seed=0)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {name: tensor[0] for name, tensor in self.batches[number][1].items()}


def installed(package: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def readable(paths: Sequence[Path]) -> list[str]:
    """The texts of modules that parse and have annotations."""
    texts = []
    for path in paths:
        try:
            text = read_source(path).text
        except (SourceError, OSError):
            continue
        if holes_of(text):
            texts.append(text)
    return texts


def fill_in(source: Source, holes: Sequence[Hole], model: PreTrainedModel, tokenizer: Any) -> list[Prediction]:
    """The model's types for all of a module's annotations, which are hidden; prints how many are right."""
    started = time.perf_counter()
    predictions = ask(source, holes, model, tokenizer)
    seconds = time.perf_counter() - started
    right = sum(one.type == hole.annotation for one, hole in zip(predictions, holes, strict=True))
    print(f"  the model: {right} of {len(holes)} are the author's own ({right / len(holes):.0%}), in {seconds:.1f} s")
    sure = [one.type == hole.annotation for one, hole in zip(predictions, holes, strict=True) if one.probability > 0.9]
    print(f"  where its probability is above 0.9: {sum(sure)} of {len(sure)}")
    return predictions


def show_filled(source: Source, holes: Sequence[Hole], predictions: Sequence[Prediction]) -> None:
    """Print the beginning of the diff from the module without annotations to the module that the model gives."""
    # from the last to the first, so that the places before stay where they are
    bare = source.text
    for hole in sorted(holes, key=lambda hole: -hole.start):
        begin = bare.rindex("->" if hole.is_return else ":", 0, hole.start)
        bare = bare[:begin].rstrip(" ") + bare[hole.end :]
    filled = fill(source.text, holes, [one.type for one in predictions])
    lines = unified_diff(bare, filled, source.path.name).splitlines()
    print("\n".join(f"  {line}" for line in lines[2:][:SHOWN_LINES]))


def show_routing(source: Source, holes: Sequence[Hole], model: PreTrainedModel, tokenizer: Any) -> None:
    """Print what each layer's routers chose: how many of the places that are asked for, and of all tokens."""
    hidden = hide(source.text, holes[: len(tokenizer.get_sentinel_token_ids())])
    batch = tokenizer(hidden.text, return_tensors="pt", verbose=False).to(model.device)
    ids = batch["input_ids"][0]
    asked = torch.isin(ids, torch.tensor(tokenizer.get_sentinel_token_ids(), device=model.device))
    with torch.no_grad():
        routing = model.get_encoder()(**batch, output_routing=True).routing
    print(f"what was routed, of {len(ids):,} tokens, and of the {int(asked.sum())} places that are asked for:")
    print("  layer   queries        keys and values  feed-forward")
    chosen = torch.zeros_like(asked)
    for number, layer in enumerate(routing):
        cells = []
        for tokens in (layer.query, layer.key_value, layer.feed_forward):
            chosen = torch.zeros_like(asked)
            chosen[tokens.indices[0][tokens.valid[0]]] = True
            cells.append(f"{chosen.float().mean():4.0%} / {chosen[asked].float().mean():4.0%}")
        print(f"  {number:5}   {'    '.join(cells)}")
    pieces = tokenizer.convert_ids_to_tokens(ids.tolist())
    shown = zip(pieces[:SHOWN_TOKENS], chosen[:SHOWN_TOKENS].tolist(), strict=True)
    excerpt = "".join(f"[{piece}]" if is_chosen else piece for piece, is_chosen in shown)
    print(
        f"its beginning, [tokens of the last layer's heavy feed-forward] in brackets:\n  {excerpt.replace('▁', ' ')}"
    )


def train_further(texts: Sequence[str], model: PreTrainedModel, tokenizer: Any, steps: int, folder: Path) -> None:
    """Train on modules with hidden annotations, print the loss on every eighth of them, which are kept back, before
    and after, and save the model into a folder."""
    kept = texts[::8]
    training = [text for number, text in enumerate(texts) if number % 8]
    print(f"training on {len(training)} modules, {steps} steps, {len(kept)} others are kept back:")
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        lr_scheduler_type="linear",
        warmup_steps=min(10, steps // 3),
        logging_steps=max(1, steps // 3),
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to=[],
    )
    trainer = Seq2SeqTrainer(
        model,
        arguments,
        train_dataset=Rows(training, tokenizer, steps),
        eval_dataset=Rows(kept, tokenizer, KEPT_ROWS),
        processing_class=tokenizer,
        optimizers=(torch.optim.AdamW(size_scaled_groups(model, LEARNING_RATE), weight_decay=0.0), None),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"loss on what was kept back: {before:.3f} before, {after:.3f} after {steps} steps")
    trainer.save_model(str(folder))
    print(f"saved to {folder}")


def main(argv: list[str] | None = None) -> None:
    """Load, fill in, count, show the routing, train further."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="a Python module with annotations")
    parser.add_argument("--folder", type=Path, help="modules to train further on; default: those beside the file")
    parser.add_argument("--model", default=str(CHECKPOINT), help="a checkpoint's folder, or its name on the Hub")
    parser.add_argument("--steps", type=int, default=30, help="steps of training; 0 for none")
    parser.add_argument("--output-dir", type=Path, default=Path(".demo"), help="where the trained model goes")
    options = parser.parse_args(argv)
    if options.steps < 0:
        parser.error(f"--steps is {options.steps}; it must be at least 0")
    set_seed(0)
    logging.disable_progress_bar()

    file = options.file or installed("huggingface_hub") / MODULE
    folder = options.folder or file.parent
    try:
        source = read_source(file)
        holes = holes_to_hide(holes_of(source.text, str(file)))
        if not holes:
            raise SourceError(f"{file}: has no annotations; the demo needs a module that has some, to count")
        model, tokenizer = load(options.model)
    except (ValueError, OSError) as error:
        first, *_ = str(error).splitlines() or [type(error).__name__]
        sys.exit(f"demo.py: {first}")

    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    length = len(tokenizer(source.text, verbose=False)["input_ids"])
    print(f"{file.name}: {length:,} tokens, read in one piece; all of its {len(holes)} annotations are hidden")
    print(f"a CoLT5 of {parameters:.1f} M parameters fills them in:")
    predictions = fill_in(source, holes, model, tokenizer)
    copied = copied_by_name(holes, holes, baselines_of(options.model))
    right = sum(one == hole.annotation for one, hole in zip(copied, holes, strict=True))
    print(f"  by name, as in its training data: {right} of {len(holes)} ({right / len(holes):.0%})")
    show_filled(source, holes, predictions)
    show_routing(source, holes, model, tokenizer)
    if not options.steps:
        return

    texts = readable([path for path in sorted(folder.rglob("*.py")) if path.resolve() != file.resolve()])
    if len(texts) < 2:
        sys.exit(f"demo.py: {folder} has fewer than two other modules with annotations; --folder names another folder")
    train_further(texts, model, tokenizer, options.steps, options.output_dir / "checkpoint")


if __name__ == "__main__":
    main()
