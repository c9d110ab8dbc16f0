"""How a training script runs: train or resume, save, evaluate, and leave a record of the run for the model card."""

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoConfig, Trainer
from transformers.utils import cached_file

RECORD = "run.json"


@dataclass
class RunRecord:
    """What a model card says about a run, beside its metrics.

    Attributes:
        task: what was trained: "pre-training", "summarization", "question answering", "text classification",
            "text regression", "token classification" or "embeddings".
        data: name of the data: a dataset of the Hub, or files.
        dataset: the Hub's id of it, if it has one.
        base_model: the checkpoint that training began with; None for a new model.
        settings: the arguments of `Trainer` that make a run another run.
        versions: of the packages.
        labels: the numbers of a classifier's labels by name, which an adapter does not hold; None for other tasks.
    """

    task: str
    data: str
    dataset: str | None
    base_model: str | None
    settings: dict[str, Any]
    versions: dict[str, str]
    labels: dict[str, int] | None

    @classmethod
    def load(cls, folder: Path) -> "RunRecord":
        """The record that `run` left in a folder.

        Raises:
            ValueError: for a file of that name with something else in it.
        """
        try:
            return cls(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder / RECORD} is no record of a training script: {error}") from None


SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "fp16",
    "seed",
)


def known_labels(name: str | None) -> dict[str, int] | None:
    """The numbers of a fine-tuned checkpoint's labels, of an adapter's too; None for one without, and for a new model.

    Args:
        name: a folder or Hub id.
    """
    if name is None:
        return None
    record = cached_file(name, RECORD, _raise_exceptions_for_missing_entries=False)
    if record is not None:
        return RunRecord.load(Path(record).parent).labels
    labels = AutoConfig.from_pretrained(name).label2id
    # what Transformers gives where nothing is said
    return None if labels.keys() == {"LABEL_0", "LABEL_1"} else labels


def save_whole(trainer: Trainer) -> None:
    """Save the trained model for `from_pretrained`, also where FSDP writes its checkpoints in parts."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()


def run(trainer: Trainer, task: str, data: str, dataset: str | None, base_model: str | None) -> dict[str, float]:
    """Train where there are training data, evaluate where there are evaluation data, and keep what came out.

    Args:
        trainer: the run's; its `resume_from_checkpoint` is what `checkpoint_to_resume` gives.
        task, data, dataset, base_model: as in `RunRecord`.

    Returns:
        The metrics.
    """
    metrics: dict[str, float] = {}
    if trainer.train_dataset is not None:
        metrics |= trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint).metrics
        save_whole(trainer)
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    labels = trainer.model.config.label2id if task.split()[0] in ("text", "token") else None
    keep_record(trainer, metrics, task, data, dataset, base_model, labels)
    return metrics


def keep_record(
    trainer: Trainer,
    metrics: dict[str, float],
    task: str,
    data: str,
    dataset: str | None,
    base_model: str | None,
    labels: dict[str, int] | None = None,
) -> None:
    """Print the metrics of a finished run, and write them, its state and its record into its folder.

    Args:
        trainer: the run's.
        metrics: what came out.
        task, data, dataset, base_model, labels: as in `RunRecord`.
    """
    trainer.log_metrics("all", metrics)
    trainer.save_metrics("all", metrics)
    trainer.save_state()
    arguments = trainer.args.to_sanitized_dict()
    settings = {name: arguments[name] for name in SETTINGS if arguments[name] not in (False, None)}
    settings |= {"steps": trainer.state.global_step, "processes": trainer.args.world_size}
    versions = {name: version(name) for name in ("torch", "transformers")}
    record = RunRecord(task, data, dataset, base_model, settings, versions, labels)
    if trainer.is_world_process_zero():
        text = json.dumps(asdict(record), indent=1) + "\n"
        Path(trainer.args.output_dir, RECORD).write_text(text, encoding="utf-8")
