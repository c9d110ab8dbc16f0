"""What the tests of saving and loading do, here or in a process of its own: `python hub_steps.py STEP OUT ...`.

A folder and a Hub repository are both a `where`, as in `from_pretrained(where)`.
"""

import ast
import contextlib
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rounding import assert_all_same_but_for_rounding, assert_same_but_for_rounding
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]

AUTO_CLASSES = {
    "AutoModel": "CoLT5Model",
    "AutoModelForSeq2SeqLM": "CoLT5ForConditionalGeneration",
    "AutoModelForCausalLM": "CoLT5ForCausalLM",
    "AutoModelForTextEncoding": "CoLT5EncoderModel",
    "AutoModelForSequenceClassification": "CoLT5ForSequenceClassification",
    "AutoModelForTokenClassification": "CoLT5ForTokenClassification",
    "AutoModelForQuestionAnswering": "CoLT5ForQuestionAnswering",
}
# a decoder without cross-attention has other weights
OF_ONE_CHECKPOINT = [auto_class for auto_class in AUTO_CLASSES if auto_class != "AutoModelForCausalLM"]
GENERATING = {"CoLT5ForConditionalGeneration", "CoLT5ForCausalLM"}
OWN_WEIGHTS = {
    "AutoModelForSequenceClassification": {
        f"classification_head.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")
    },
    "AutoModelForTokenClassification": {"classifier.weight", "classifier.bias"},
    "AutoModelForQuestionAnswering": {"qa_outputs.weight", "qa_outputs.bias"},
}
TEXTS = ["the cat sat on the mat and the rat sat on the cat", "a hat"]
# [pad, eos, unk, pieces...] in T5's order, sentinels last
PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁the", -3.0), ("at", -3.1)]
PIECES += [(letter, -6.0 - 0.1 * i) for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")]
PIECES += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
SIZES = {
    "vocab_size": 136,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 32,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "num_light_heads": 2,
    "num_heavy_heads": 2,
    "light_d_ff": 16,
    "heavy_d_ff": 32,
    "local_radius": 3,
    "routed_feed_forward_fraction": 0.25,
    "routed_query_fraction": 0.25,
    "routed_key_value_fraction": 0.25,
}


class Hidden:
    """Stands in for Python's import finders, without what they know of some packages."""

    def __init__(self, names: Sequence[str]):
        self.names = set(names)
        # Transformers or PyTorch may have imported one of them already
        for name in [name for name in sys.modules if name.partition(".")[0] in self.names]:
            del sys.modules[name]
        self.finders = sys.meta_path[:]
        sys.meta_path[:] = [self]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The module's spec, or None as for what is not installed."""
        if name.partition(".")[0] in self.names:
            return None
        return next((spec for finder in self.finders if (spec := finder.find_spec(name, path, target))), None)

    def find_distributions(self, *context: Any) -> Any:
        """Installed distributions, for importlib.metadata."""
        for finder in self.finders:
            if hasattr(finder, "find_distributions"):
                yield from finder.find_distributions(*context)

    def reveal(self) -> None:
        """Let the packages be found again."""
        sys.meta_path[:] = self.finders


class Operators(TorchDispatchMode):
    """Sends every operation through PyTorch's dispatcher, as tracers do, and notes those of this project."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "colt5":
            self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


def run_model(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's states, logits, or start and end logits, on a batch of the tokenizer's."""
    batch = dict(batch)
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"][:, :5]
    with torch.no_grad():
        output = model.eval()(**batch)
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits])
    return (output.logits if "logits" in output else output.last_hidden_state).clone()


def load(auto_class: str, where: str) -> torch.nn.Module:
    """The model behind one Auto class, after checks of its class and of the weights that are new."""
    torch.manual_seed(0)
    model, report = getattr(transformers, auto_class).from_pretrained(
        where, trust_remote_code=True, output_loading_info=True
    )
    assert type(model).__name__ == AUTO_CLASSES[auto_class]
    assert set(report["missing_keys"]) == OWN_WEIGHTS.get(auto_class, set()), (auto_class, report)
    assert not report["unexpected_keys"] and not report["mismatched_keys"], (auto_class, report)
    return model


def load_all(where: str, home: str) -> dict[str, torch.Tensor]:
    """The tokenizer's ids and what every Auto class's model makes of them.

    Args:
        where: folder or repository of an encoder–decoder checkpoint with its tokenizer.
        home: first part of the name of the modules that the models must come from.
    """
    tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=True)
    assert type(tokenizer).__name__ == "CoLT5Tokenizer"
    assert tokenizer.model_max_length > 10_000
    config = AutoConfig.from_pretrained(where, trust_remote_code=True)
    assert type(config).__module__.partition(".")[0] == home
    sizes = {size: type(config).from_size(size).d_model for size in ("base", "large", "xl")}
    assert sizes == {"base": 768, "large": 1024, "xl": 2048}
    batch = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    outputs = {"input_ids": batch["input_ids"]}
    for auto_class in OF_ONE_CHECKPOINT:
        model = load(auto_class, where)
        assert type(model).__module__.partition(".")[0] == home, (auto_class, type(model))
        outputs[auto_class] = run_model(model, batch)
    model = load("AutoModelForSeq2SeqLM", where).eval()
    outputs["generate"] = model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    return outputs


@functools.cache
def siblings(name: str) -> set[str]:
    """The files that a file of the package imports, from the syntax of its imports."""
    tree = ast.parse((ROOT / "modeling_colt5" / name).read_text(encoding="utf-8"))
    return {f"{node.module}.py" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}


def closure(module: str) -> set[str]:
    """The files that a module of the package needs, itself among them."""
    needed: set[str] = set()
    waiting = {f"{module}.py"}
    while waiting:
        name = waiting.pop()
        needed.add(name)
        waiting |= siblings(name) - needed
    return needed


def run_step(step: str, *arguments: object, environment: dict[str, str]) -> dict[str, torch.Tensor]:
    """Run a step in a process of its own, with as many threads as this one; gives the tensors that it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.safetensors")
        result = subprocess.run(
            [sys.executable, __file__, step, str(out), *map(str, arguments)],
            env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return load_file(out)


def assert_equal(outputs: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    """The same tensors under the same names, but for rounding: weights are read from a file or were made here."""
    assert outputs.keys() == reference.keys()
    for name, tensor in outputs.items():
        assert_same_but_for_rounding(tensor, reference[name], name)


def trace(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> set[str]:
    """The operators that a tracer sees in the encoder; checks that they compute what eager execution does."""
    encoder = model.get_encoder().eval()
    runs = []
    operators = Operators()
    for mode in (contextlib.nullcontext(), operators):
        encoder.zero_grad()
        with mode:
            states = encoder(**batch).last_hidden_state
            # the sum of squares of what a norm gives is constant, and its gradients nothing but rounding
            states.backward(torch.linspace(-1, 1, states.numel()).view_as(states))
        # together, by the size of the largest: where a routed query has a single key, the gradient of the projection
        # to queries is zero but for rounding, and has no size of its own
        runs.append([states, torch.cat([parameter.grad.flatten() for parameter in encoder.parameters()])])
    assert_all_same_but_for_rounding(*runs)
    return operators.seen


def store(saved: Any, target: str) -> None:
    """Save a model or tokenizer to a folder (an absolute path), or push it to a repository."""
    if os.path.isabs(target):
        saved.save_pretrained(target)
    else:
        saved.push_to_hub(target)


def fine_tune(where: str, target: str) -> torch.Tensor:
    """One step of training, stored with the tokenizer at `target`; gives the new model's logits."""
    tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=True)
    model = load("AutoModelForSeq2SeqLM", where)
    batch = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    before = run_model(model, batch)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    after = run_model(model, batch)
    assert torch.isfinite(after).all() and not torch.equal(before, after)
    store(model, target)
    store(tokenizer, target)
    return after


def names_no_origin(where: str, folder: str) -> None:
    """Config, model and tokenizer of `where`, saved again, name no repository in their maps of Auto classes."""
    AutoConfig.from_pretrained(where, trust_remote_code=True).save_pretrained(f"{folder}/config")
    load("AutoModelForSequenceClassification", where).save_pretrained(f"{folder}/model")
    AutoTokenizer.from_pretrained(where, trust_remote_code=True).save_pretrained(f"{folder}/tokenizer")
    for file in ("config/config.json", "model/config.json", "tokenizer/tokenizer_config.json"):
        text = Path(folder, file).read_text(encoding="utf-8")
        assert json.loads(text)["auto_map"] and "--" not in text and where not in text, (file, text)


def load_alone(where: str) -> None:
    """A repository of one head, named after its class, or of the tokenizer alone."""
    name = where.rpartition("-")[2]
    if name == "CoLT5Tokenizer":
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=True)
        assert type(tokenizer).__name__ == name
        assert tokenizer.decode(tokenizer(TEXTS[0])["input_ids"], skip_special_tokens=True) == TEXTS[0]
        return
    auto_class = next(auto_class for auto_class, model in AUTO_CLASSES.items() if model == name)
    model, report = getattr(transformers, auto_class).from_pretrained(
        where, trust_remote_code=True, output_loading_info=True
    )
    assert type(model).__name__ == name and not report["missing_keys"] and not report["unexpected_keys"]


def code_only(out: str, where: str, target: str, *others: str) -> None:
    """Without package and triton: every Auto class from the repository's code, one more round, saving again.

    Args:
        out: file for the outputs.
        where: the encoder–decoder and its tokenizer.
        target: where they go after a step of fine-tuning.
        others: repositories that hold one head or the tokenizer alone.
    """
    # where PyTorch has found triton, torchao does not do without it
    Hidden(["modeling_colt5", "triton", "torchao"])
    outputs = load_all(where, "transformers_modules")
    outputs["fine-tuned"] = fine_tune(where, target)
    names_no_origin(where, tempfile.mkdtemp(dir=Path(out).parent))
    for other in others:
        load_alone(other)
    assert not {"modeling_colt5", "triton"} & sys.modules.keys()
    save_file(outputs, out)


def next_round(out: str, first: str, second: str) -> None:
    """In a process of their own: two copies of the code, each with every head, then the package beside them."""
    hidden = Hidden(["modeling_colt5"])
    outputs = {
        f"{where}/{name}": tensor
        for where in (first, second)
        for name, tensor in load_all(where, "transformers_modules").items()
    }
    models = [load("AutoModelForSeq2SeqLM", where) for where in (first, second)]
    hidden.reveal()
    package = importlib.import_module("modeling_colt5")
    # a registered class goes before a repository's code: the same call now gives the package's
    models.append(load("AutoModelForSeq2SeqLM", first))
    assert type(models[-1]) is package.CoLT5ForConditionalGeneration
    assert len({type(model) for model in models}) == 3

    tokenizer = AutoTokenizer.from_pretrained(first, trust_remote_code=True)
    batch = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    operators = [trace(model, batch) for model in models]
    # the torch backend has none: it is plain PyTorch
    assert operators == operators[:1] * 3
    save_file(outputs, out)


def push(out: str, prefix: str) -> None:
    """With the package: push every head and the tokenizer with nothing but `push_to_hub`, load, one more round.

    Args:
        out: file for the outputs.
        prefix: first part of the repositories' names: `-first` gets the encoder–decoder and the tokenizer, `-second`
            the fine-tuned ones; the other heads, and the tokenizer once more alone, get the name of their class.
    """
    package = importlib.import_module("modeling_colt5")
    tokenizer = package.CoLT5Tokenizer(vocab=PIECES)
    store(tokenizer, f"{prefix}-CoLT5Tokenizer")
    store(tokenizer, f"{prefix}-first")
    torch.manual_seed(1)
    config = package.CoLT5Config(**SIZES)
    for name in AUTO_CLASSES.values():
        suffix = "first" if name == "CoLT5ForConditionalGeneration" else name
        store(getattr(package, name)(config), f"{prefix}-{suffix}")
    outputs = load_all(f"{prefix}-first", "modeling_colt5")
    outputs["fine-tuned"] = fine_tune(f"{prefix}-first", f"{prefix}-second")
    save_file(outputs, out)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
