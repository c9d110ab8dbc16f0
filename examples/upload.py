"""Upload a finished run to a repository of the Hub, with a model card written from what the run left.

    python examples/upload.py out someone/my-colt5 [--private] [--license apache-2.0] [--language en]

The card says what the model was trained on, its budgets, its metrics, and how to load it. `--dry-run` only writes it
to README.md in the run's folder, and `--keep-card` uploads the README.md that is there, for example after editing it.
The code of the model goes along, so that it loads without this package. Log in first: `hf auth login`, or HF_TOKEN.

An adapter (LoRA) is loaded on its base model. Where that is a folder of yours, upload it first, as a run of its own,
and say its name with `--base-model someone/base`: it is written into the adapter's configuration.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from run_record import RECORD, RunRecord
from transformers import AutoConfig

import modeling_colt5  # noqa: F401  (registers the Auto classes)
from modeling_colt5.run_budgets import routed_capacity

# the Hub's names of tasks and of metrics
PIPELINES = {
    "summarization": "summarization",
    "question answering": "question-answering",
    "text classification": "text-classification",
    "text regression": "text-classification",
    "token classification": "token-classification",
    "embeddings": "sentence-similarity",
}
METRICS = {
    "rouge1": "rouge",
    "rouge2": "rouge",
    "rougeL": "rouge",
    "rougeLsum": "rouge",
    "exact_match": "exact_match",
    "f1": "f1",
    "f1_micro": "f1",
    "accuracy": "accuracy",
    "mse": "mse",
    "mae": "mae",
    "r2": "r_squared",
    "mrr@10": "mrr",
    "recall@10": "recall",
}
# checkpoints to resume from and what only they need
LEFT_OUT = ["checkpoint-*/*", "runs/*", "training_args.bin", "trainer_state.json", "*.pt", "*.pth"]


def check_run(folder: Path) -> None:
    """Refuse a folder that no training script finished.

    Raises:
        ValueError: naming what is missing or broken.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    wanted = {
        "a model's or an adapter's configuration": ["config.json", "adapter_config.json"],
        "weights": ["model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"],
        "a tokenizer": ["tokenizer_config.json"],
        "metrics": ["all_results.json"],
        "the record of a finished run": [RECORD],
    }
    for what, names in wanted.items():
        if not any((folder / name).is_file() for name in names):
            raise ValueError(f"{folder} has not {what} ({' or '.join(names)}): is the run finished?")
    RunRecord.load(folder)
    if (folder / "config.json").is_file():
        code = {f"{value.split('.')[0]}.py" for value in auto_map(folder).values()}
        missing = sorted(name for name in code if not (folder / name).is_file())
        if missing:
            raise ValueError(f"{folder} lacks the model's code: {', '.join(missing)}; save it with save_pretrained")


def adapter_of(folder: Path) -> dict[str, Any] | None:
    """PEFT's configuration of an adapter, None for a folder with a whole model."""
    file = folder / "adapter_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def auto_map(folder: Path) -> dict[str, str]:
    """Which class of the folder's code stands behind which Auto class."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # a tokenizer's entry is a list
    return {name: value for name, value in config.get("auto_map", {}).items() if isinstance(value, str)}


def library(folder: Path) -> str:
    """What loads the model: "peft", "sentence-transformers" or "transformers"."""
    if adapter_of(folder) is not None:
        return "peft"
    return "sentence-transformers" if RunRecord.load(folder).task == "embeddings" else "transformers"


def loading(folder: Path, repository: str) -> tuple[str, list[str]]:
    """The lines of Python that load the model from its repository, and the code files that go along."""
    if library(folder) == "sentence-transformers":
        lines = [
            "from sentence_transformers import SentenceTransformer",
            "",
            f'model = SentenceTransformer("{repository}", trust_remote_code=True)',
            'print(model.encode(["A query.", "A long document."]).shape)',
        ]
        return "\n".join(lines), sorted(path.name for path in folder.glob("*.py"))
    adapter = adapter_of(folder)
    if adapter is not None:
        kind = {"SEQ_2_SEQ_LM": "Seq2SeqLM", "SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification"}
        auto_class, package = f"AutoPeftModelFor{kind[adapter['task_type']]}", "peft"
        code: list[str] = []
    else:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (architecture,) = config["architectures"]
        by_model = {value.split(".")[1]: name for name, value in auto_map(folder).items()}
        auto_class, package = by_model[architecture], "transformers"
        code = sorted(path.name for path in folder.glob("*.py"))
    imports = [f"from {package} import {auto_class}", "from transformers import AutoTokenizer"]
    if package == "transformers":
        imports = [f"from transformers import {auto_class}, AutoTokenizer"]
    if "Seq2SeqLM" in auto_class:
        use = [
            "output = model.generate(**batch, max_new_tokens=128)",
            "print(tokenizer.decode(output[0], skip_special_tokens=True))",
        ]
    else:
        use = ["print(model(**batch).logits.shape)"]
    # an adapter's folder has no configuration of the model to hold the names
    labels = RunRecord.load(folder).labels if package == "peft" else None
    names = "" if labels is None else f", id2label={ {number: name for name, number in labels.items()} }"
    lines = [
        *imports,
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{repository}", trust_remote_code=True)',
        f'model = {auto_class}.from_pretrained("{repository}"{names}, trust_remote_code=True)',
        'batch = tokenizer("A long document.", return_tensors="pt")',
        *use,
    ]
    return "\n".join(lines), code


def base_config(folder: Path) -> Any:
    """The configuration of the model, or of the model that an adapter is for."""
    adapter = adapter_of(folder)
    return AutoConfig.from_pretrained(folder if adapter is None else adapter["base_model_name_or_path"])


def name_base_model(folder: Path, name: str | None) -> None:
    """Make sure that others can load the model that an adapter is for; nothing for a folder without an adapter.

    Args:
        folder: the run's; its adapter_config.json gets the name.
        name: the base model's id on the Hub, where the folder has not got it already.

    Raises:
        ValueError: where the base model is a folder of this machine and there is no name, or a name and no adapter.
    """
    adapter = adapter_of(folder)
    if adapter is None:
        if name is not None:
            raise ValueError(f"--base-model is for adapters; {folder} has a whole model")
        return
    base = adapter["base_model_name_or_path"]
    if name is not None:
        text = json.dumps(adapter | {"base_model_name_or_path": name}, indent=2) + "\n"
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    elif Path(base).exists():
        raise ValueError(
            f"{folder} has an adapter for {base}, a folder that others have not: upload that first, "
            "and give --base-model someone/base"
        )


def held_out(folder: Path) -> dict[str, float]:
    """The metrics on the evaluation data, without times and counts."""
    results = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    return {name: results[f"eval_{name}"] for name in ("loss", *METRICS) if f"eval_{name}" in results}


def card_data(
    folder: Path, repository: str, license_name: str | None, language: str | None, base_model: str | None
) -> ModelCardData:
    """The card's metadata, which the Hub searches by."""
    record = RunRecord.load(folder)
    task = PIPELINES.get(record.task)
    results = [
        EvalResult(
            task_type=task,
            dataset_type=record.dataset or "local",
            dataset_name=record.data,
            dataset_split="validation",
            metric_type=METRICS[metric],
            metric_name=metric,
            metric_value=round(value, 4),
        )
        for metric, value in held_out(folder).items()
        if task and metric in METRICS
    ]
    return ModelCardData(
        model_name=repository.split("/")[-1],
        library_name=library(folder),
        license=license_name,
        language=language,
        pipeline_tag=task,
        tags=["colt5", "long-context", "conditional-computation"],
        datasets=record.dataset,
        base_model=base_model,
        eval_results=results or None,
    )


def make_card(folder: Path, repository: str, license_name: str | None, language: str | None) -> ModelCard:
    """The model card of a finished run."""
    record = RunRecord.load(folder)
    # a folder on the trainer's disk means nothing to others
    adapter = adapter_of(folder)
    source = record.base_model if adapter is None else adapter["base_model_name_or_path"]
    is_public = source is not None and not Path(source).exists()
    base_model = source if is_public else None
    origin = f"`{base_model}`" if base_model else "a checkpoint" if source else "scratch"
    load, code = loading(folder, repository)
    whose = f"this repository ({', '.join(f'`{file}`' for file in code)})" if code else "its base model's repository"
    needed = "`transformers>=5.17`, `torch>=2.11`, `einops`"
    needed += "" if library(folder) == "transformers" else f", `{library(folder)}`"
    config, length = base_config(folder), 16_384
    budgets = {
        "tokens through the heavy feed-forward": config.routed_feed_forward_fraction,
        "queries of the heavy attention": config.routed_query_fraction,
        "keys and values of the heavy attention": config.routed_key_value_fraction,
    }
    metrics = [f"| {name} | {value:.4f} |" for name, value in held_out(folder).items()]
    sections = [
        f"# {repository.split('/')[-1]}",
        "A CoLT5 model ([Ainslie et al. 2023](https://arxiv.org/abs/2303.09752)): T5 for long documents, where every "
        "token goes through a light branch and the few that a learned router chooses through a heavy one as well. "
        f"Trained for {record.task} from {origin} with `modeling_colt5` {modeling_colt5.__version__}. These are not "
        "Google's weights: none were published.",
        "## How to load it",
        f"```python\n{load}\n```",
        f"It needs {needed}; with `triton` on "
        f"an NVIDIA GPU it runs fused kernels. `trust_remote_code=True` runs the code of {whose}; where the package "
        "`modeling_colt5` is installed and imported, its own code runs and the argument is not needed.",
        "## Budgets",
        f"What each encoder layer sends through its heavy branches, of a document of {length:,} tokens:",
        "\n".join(
            ["| | fraction | tokens |", "| --- | --- | --- |"]
            + [
                f"| {what} | {part:g} | {routed_capacity(length, part, config.min_routed_tokens):,} |"
                for what, part in budgets.items()
            ]
        ),
        "They can be changed without training: `model.set_routing_budget(feed_forward=1 / 8)`.",
        "## Data",
        f"`{record.data}`",
        "## Metrics",
        "\n".join(["| on held-out data | |", "| --- | --- |", *metrics]) if metrics else "Not evaluated.",
        "## Training",
        "\n".join(
            ["| | |", "| --- | --- |"]
            + [f"| {name} | {value} |" for name, value in (record.settings | record.versions).items()]
        ),
    ]
    data = card_data(folder, repository, license_name, language, base_model)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Check, write the card, upload in one commit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the output folder of a training script that ran to its end")
    parser.add_argument("repository", help="someone/name; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--license", help="the weights' licence, as the Hub abbreviates it")
    parser.add_argument("--language", help="the text's language, as in 'en'")
    parser.add_argument("--base-model", help="an adapter's base model on the Hub")
    parser.add_argument("--keep-card", action="store_true", help="upload the folder's README.md as it is")
    parser.add_argument("--dry-run", action="store_true", help="write the card, upload nothing")
    options = parser.parse_args(argv)
    try:
        # before anything of the run is changed
        for name in filter(None, (options.base_model, None if options.dry_run else options.repository)):
            validate_repo_id(name)
        check_run(options.folder)
        if options.base_model is not None or not options.dry_run:
            name_base_model(options.folder, options.base_model)
    except ValueError as error:
        parser.error(str(error))
    card = options.folder / "README.md"
    if options.keep_card and not card.is_file():
        parser.error(f"{card} does not exist, leave --keep-card out")
    if not options.keep_card:
        made = make_card(options.folder, options.repository, options.license, options.language)
        card.write_text(str(made), encoding="utf-8")
        print(f"wrote {card}")
    if options.dry_run:
        return
    api = HfApi()
    api.create_repo(options.repository, private=options.private or None, exist_ok=True)
    commit = api.upload_folder(
        repo_id=options.repository,
        folder_path=options.folder,
        ignore_patterns=LEFT_OUT,
        commit_message=f"Upload of {options.folder.name} by modeling_colt5",
    )
    print(f"uploaded to {commit.commit_url}")


if __name__ == "__main__":
    main()
