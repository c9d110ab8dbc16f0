"""The demo: train a small CoLT5 on your Python's own source, save it, reload it, read a long module, show its routing,
and count how often it guesses what was cut out of modules that it was not trained on.

    python examples/demo.py [--output-dir .demo] [--max-steps 100]

Needs nothing but this repository and its packages: the corpus is the standard library of the Python that runs it.
"""

import argparse
import sysconfig
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed

from modeling_colt5 import CoLT5Config, CoLT5ForConditionalGeneration, CoLT5Tokenizer
from modeling_colt5.denoising import DataCollatorForDenoising, chunk_documents

VOCABULARY = Path(__file__).parent.parent / "tokenization" / "python_stdlib"
INPUT_LENGTH = 2048


def standard_library() -> list[Path]:
    """The modules of the running Python, without tests and installed packages, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    return sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))


def read(path: Path) -> str:
    """A module's text."""
    return path.read_text(encoding="utf-8", errors="replace")


def make_model(tokenizer: CoLT5Tokenizer) -> CoLT5ForConditionalGeneration:
    """A small model in the paper's proportions: a quarter of the heads light, light d_ff ½, heavy d_ff 4."""
    config = CoLT5Config(
        vocab_size=8192,
        d_model=256,
        d_kv=32,
        d_ff=512,
        num_layers=4,
        num_decoder_layers=2,
        num_heads=8,
        num_light_heads=2,
        num_heavy_heads=6,
        light_d_ff=256,
        heavy_d_ff=2048,
        dropout_rate=0.0,
    )
    return CoLT5ForConditionalGeneration(config)


def show_routing(model: CoLT5ForConditionalGeneration, tokenizer: CoLT5Tokenizer, text: str) -> None:
    """Read a whole module, and print which tokens the last layer's routers chose."""
    batch = tokenizer(text, return_tensors="pt")
    length = batch["input_ids"].shape[1]
    with torch.no_grad():
        routing = model.get_encoder()(**batch, output_routing=True).routing[-1]
    pieces = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    print(f"read in one piece: {length:,} tokens; the last layer routed")
    for name, what in (
        ("query", "queries of the heavy attention"),
        ("key_value", "keys and values of the heavy attention"),
        ("feed_forward", "tokens through the heavy feed-forward"),
    ):
        routed = getattr(routing, name)
        chosen = routed.indices[0][routed.valid[0]].tolist()
        common = ", ".join(f"{piece} {count}" for piece, count in Counter(pieces[i] for i in chosen).most_common(8))
        print(f"  {len(chosen):5} {what}; most often: {common}")
    routed = routing.feed_forward
    chosen = set(routed.indices[0][routed.valid[0]].tolist())
    excerpt = "".join(f"[{piece}]" if i in chosen else piece for i, piece in enumerate(pieces[:400]))
    print(f"its beginning, [tokens of the heavy feed-forward] in brackets:\n  {excerpt.replace('▁', ' ')}")


def guess_what_was_cut_out(
    model: CoLT5ForConditionalGeneration,
    collator: DataCollatorForDenoising,
    chunks: Sequence[Mapping[str, np.ndarray]],
    training: Sequence[Mapping[str, np.ndarray]],
) -> None:
    """Cut spans out of chunks, and count how often the model guesses their tokens, each with those before it given.

    A guess that knows nothing of the text is set beside it: always the most frequent tokens of the training chunks.
    """
    tokenizer = collator.tokenizer
    counts = Counter(token for chunk in training for token in chunk["input_ids"].tolist())
    frequent = torch.tensor([token for token, _ in counts.most_common(10)])
    special = torch.tensor(tokenizer.all_special_ids)
    cut, guesses = [], []
    for chunk in chunks:
        batch = collator([chunk])
        with torch.no_grad():
            probabilities = model(**batch).logits[0].softmax(-1)
        labels = batch["labels"][0]
        # sentinels and the end are no text
        text = (labels >= 0) & ~torch.isin(labels, special)
        cut.append(labels[text])
        guesses.append(probabilities[text].topk(10))
    tokens = torch.cat(cut)
    guessed = torch.cat([guess.indices for guess in guesses])
    right = guessed[:, 0] == tokens

    def percent(truths: Tensor) -> str:
        return f"{100 * truths.double().mean().item():.1f} %"

    print(f"{len(tokens):,} tokens cut out of held-out modules and guessed (in brackets: always the most frequent)")
    print(f"  right at the first guess: {percent(right)} ({percent(tokens == frequent[0])})")
    among_ten = percent((guessed == tokens[:, None]).any(-1)), percent(torch.isin(tokens, frequent))
    print(f"  among the first ten:      {among_ten[0]} ({among_ten[1]})")
    names = Counter(tokenizer.convert_ids_to_tokens(tokens[right].tolist()))
    print(f"  right most often:         {', '.join(f'{name!r} {count}' for name, count in names.most_common(8))}")
    sure = torch.cat([guess.values for guess in guesses])[:, 0].topk(min(100, len(tokens))).indices
    print(f"  of the {len(sure)} surest guesses: {int(right[sure].sum())} are right")


def main() -> None:
    """Train, evaluate, save, reload, read, guess."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path(".demo"), help="where checkpoint and logs go")
    parser.add_argument("--max-steps", type=int, default=100, help="training steps")
    parser.add_argument("--input-length", type=int, default=INPUT_LENGTH, help="tokens of one training input")
    options = parser.parse_args()
    set_seed(0)

    tokenizer = CoLT5Tokenizer.from_pretrained(VOCABULARY)
    modules = standard_library()
    held_out, training = modules[::20], [path for i, path in enumerate(modules) if i % 20]
    # the module that will be read: among the held-out ones, the one nearest to 40,000 characters
    long_module = min(held_out, key=lambda path: abs(len(read(path)) - 40_000))
    print(f"{len(training)} modules of Python's standard library to train on, {len(held_out)} held out")

    collator = DataCollatorForDenoising(tokenizer, options.input_length, target_length=512)
    generator = torch.Generator().manual_seed(0)
    order = [training[i] for i in torch.randperm(len(training), generator=generator).tolist()]
    # cut only what the steps will take: the rest of the corpus would be tokenized for nothing
    batch_size = 2
    chunks = chunk_documents((read(path) for path in order), collator)
    train_dataset = [chunk for _, chunk in zip(range(options.max_steps * batch_size), chunks, strict=False)]
    chunks = chunk_documents((read(path) for path in held_out), collator)
    eval_dataset = [chunk for _, chunk in zip(range(12), chunks, strict=False)]

    model = make_model(tokenizer)
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(options.output_dir),
        max_steps=options.max_steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=10,
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to=[],
    )
    trainer = Seq2SeqTrainer(
        model,
        arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"held-out loss: {before:.3f} before, {after:.3f} after {options.max_steps} steps")

    checkpoint = options.output_dir / "checkpoint"
    trainer.save_model(str(checkpoint))
    print(f"saved to {checkpoint}, reloading through AutoModelForSeq2SeqLM and AutoTokenizer")
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = read(long_module)
    print(f"\n{long_module.name}, held out:")
    show_routing(model, tokenizer, text)
    print()
    guess_what_was_cut_out(model, collator, eval_dataset[:6], train_dataset)


if __name__ == "__main__":
    main()
