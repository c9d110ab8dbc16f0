"""Defaults of the training scripts for long documents on one card of 24 GB, and what is left to decide once the model
is loaded: the optimiser, checkpointing, the best model, and how much time is left."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from huggingface_hub.errors import StrictDataclassError
from sources import check_least, one_line
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from modeling_colt5.dense_start import DenseStart
from modeling_colt5.parameter_groups import size_scaled_groups

logger = logging.get_logger(__name__)

# Transformers calls it anew
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
# a run that is told its steps, and not its epochs, is evaluated so often
EVALUATIONS = 20
# T5's own rates: of a new model, and of fine-tuning. They are relative to a parameter's size
NEW_MODEL_RATE, RATE = 1e-2, 1e-3
# of adapters, whose weights begin at zero and have no size: an absolute rate
ADAPTER_RATE = 2e-4


def checkpoint_to_resume(given: str | None, folder: Path) -> str | None:
    """The checkpoint that a run goes on from, None for a run from the beginning.

    Args:
        given: a checkpoint's folder, or "true" for the newest whole one; "false" is as None.
        folder: where the run saves its checkpoints.

    Raises:
        ValueError: where there is no such checkpoint.
    """
    if given is None or given.lower() == "false":
        return None
    if given.lower() != "true":
        if not (Path(given) / TRAINER_STATE_NAME).is_file():
            raise ValueError(
                f"resume_from_checkpoint is {given!r}, which has no {TRAINER_STATE_NAME}; it must be the folder of a "
                f"checkpoint, or true for the newest one in {folder}"
            )
        return given
    steps = [path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    for step in sorted((int(step) for step in steps if step.isdecimal()), reverse=True):
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        # what Trainer writes last
        if (checkpoint / TRAINER_STATE_NAME).is_file():
            return str(checkpoint)
        logger.warning(f"{checkpoint} is not whole: the run ended while it was saved. An earlier one is looked for")
    raise ValueError(
        f"resume_from_checkpoint is true, and {folder} has no whole checkpoint; leave it out to begin anew"
    )


@dataclass
class TrainingDefaults:
    """What differs from the defaults of `TrainingArguments`, which comes behind it in a class's bases.

    An option that is None here is decided by the script, and every option that is given stays as it is.
    """

    dry_run: bool = field(
        default=False,
        metadata={"help": "say how much memory and time the run would take, and end before the first step"},
    )
    evaluations_per_epoch: int = field(
        default=4,
        metadata={"help": f"evaluate and save so often; {EVALUATIONS} times a run where --max_steps is given"},
    )
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": f"by default {RATE}, of a new model {NEW_MODEL_RATE}, times each parameter's size; "
            f"with LoRA {ADAPTER_RATE}"
        },
    )
    size_scaled_learning_rate: bool | None = field(
        default=None,
        metadata={
            "help": "AdamW with --learning_rate relative to each parameter's size, as T5's Adafactor has it; by "
            "default where no --learning_rate is given, parameters are not sharded, and no adapters are trained"
        },
    )
    warmup_steps: float = field(default=0.05, metadata={"help": "steps of the warm-up; below 1 a share of all steps"})
    bf16: bool | None = field(default=None, metadata={"help": "compute in bf16; by default where the GPU has it"})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "rows of a pass on each device"})
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "the same of evaluation"})
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "passes of a step"})
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={"help": f"see {CHECKPOINTING}; by default where the memory of the GPU would not do without"},
    )
    logging_first_step: bool = field(default=True, metadata={"help": "log the first step"})
    logging_steps: float = field(default=0.01, metadata={"help": "log at every so many steps; below 1 a share"})
    eval_strategy: str | None = field(
        default=None, metadata={"help": "no, steps or epoch; by default steps where there are validation rows"}
    )
    save_steps: float | None = field(default=None, metadata={"help": "save at every so many steps; as --eval_steps"})
    save_total_limit: int | None = field(default=2, metadata={"help": "keep so many of the saved checkpoints"})
    load_best_model_at_end: bool | None = field(
        default=None, metadata={"help": "end with the best evaluated model; by default in fine-tuning"}
    )

    def __post_init__(self) -> None:
        names = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        check_least(1, **{name: getattr(self, name) for name in ("evaluations_per_epoch", *names)})
        self.has_own_checkpointing = getattr(self, CHECKPOINTING) is None and self.gradient_checkpointing is None
        if self.gradient_checkpointing is None and CHECKPOINTING == "gradient_checkpointing":
            self.gradient_checkpointing = False
        if self.bf16 is None:
            # computed on the CPU, bf16 is slower
            self.bf16 = (
                not (self.use_cpu or self.fp16) and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            )
        if self.use_cpu or not torch.accelerator.is_available():
            # nothing is copied to a card, and PyTorch would warn in every epoch
            self.dataloader_pin_memory = False
        self.has_own_evaluation = self.eval_strategy is None
        self.eval_strategy = self.eval_strategy or "steps"
        if self.eval_steps is None:
            # a save must have an evaluation for the best to be known
            runs = EVALUATIONS if self.max_steps > 0 else self.evaluations_per_epoch * self.num_train_epochs
            # 1 would be a number of steps
            self.eval_steps = self.save_steps or 1 / max(runs, 1.0001)
        if self.save_steps is None:
            self.save_steps = self.eval_steps
        self.has_own_best = self.load_best_model_at_end is None
        self.load_best_model_at_end = bool(self.load_best_model_at_end)
        super().__post_init__()
        # before anything is loaded, and by every process alike: none of them has saved anything yet
        self.resume_from_checkpoint = checkpoint_to_resume(self.resume_from_checkpoint, Path(self.output_dir))

    def decide_evaluation(self, has_rows: bool, keep_best: bool, metric: str = "loss", greater: bool = False) -> None:
        """What depends on the rows and the task.

        Args:
            has_rows: whether there are rows to evaluate on.
            keep_best: whether a run of this kind ends with its best model.
            metric: by which the best is known, unless `metric_for_best_model` is given.
            greater: whether more of it is better.
        """
        if not has_rows and self.has_own_evaluation:
            self.eval_strategy = type(self.eval_strategy)("no")
        same = self.eval_strategy == self.save_strategy and (
            self.eval_strategy == "epoch" or self.eval_steps == self.save_steps
        )
        if self.has_own_best:
            self.load_best_model_at_end = keep_best and has_rows and same and self.eval_strategy != "no"
        if self.load_best_model_at_end and self.metric_for_best_model in (None, "loss") and self.has_own_best:
            self.metric_for_best_model, self.greater_is_better = metric, greater

    def make_optimizer(self, model: torch.nn.Module, is_new: bool) -> torch.optim.Optimizer | None:
        """AdamW with rates relative to the parameters' sizes, or None where Trainer makes its own; sets the rate.

        Args:
            model: what is trained; of PEFT's only adapters, routers and heads are.
            is_new: whether its weights are random.
        """
        has_adapters = hasattr(model, "peft_config")
        scaled = self.size_scaled_learning_rate
        if scaled is None:
            # Trainer takes no groups of ours where parameters are sharded, and another optimiser has its own ways
            launched = (parse_flag_from_env(f"ACCELERATE_USE_{kind}") for kind in ("FSDP", "DEEPSPEED"))
            scaled = (
                self.learning_rate is None
                and not (has_adapters or self.fsdp or self.deepspeed or any(launched))
                and str(self.optim).removeprefix("OptimizerNames.").lower().startswith("adamw_torch")
            )
        if self.learning_rate is None:
            self.learning_rate = (
                (NEW_MODEL_RATE if is_new else RATE) if scaled else ADAPTER_RATE if has_adapters else 5e-5
            )
        if not scaled:
            return None
        return torch.optim.AdamW(
            size_scaled_groups(model, self.learning_rate),
            betas=(self.adam_beta1, self.adam_beta2),
            eps=self.adam_epsilon,
            weight_decay=self.weight_decay,
            fused=True,
        )


class TimeLeft(TrainerCallback):
    """Adds to what is logged how long the rest of the run will take, by the steps since it began."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note when the run began, and with which step: a resumed one not with the first."""
        self.began, self.first = time.monotonic(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add `time_left` to a line with the loss."""
        done = state.global_step - self.first if hasattr(self, "first") else 0
        if logs is not None and "loss" in logs and done:
            seconds = (time.monotonic() - self.began) / done * (state.max_steps - state.global_step)
            logs["time_left"] = str(timedelta(seconds=round(seconds)))


class BestOfRouted(TrainerCallback):
    """Lets no model of a dense start be the best of a run: its routers could not be used.

    Args:
        schedule: the dense start's.
    """

    def __init__(self, schedule: DenseStart):
        self.schedule = schedule

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the best at the step in which the dense start is over."""
        step, steps = state.global_step, state.max_steps
        is_over = self.schedule.progress(step, steps) is None
        if step and is_over and self.schedule.progress(step - 1, steps) is not None:
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None


def run_script(prepare: Callable[[list[str] | None], Callable[[], Any]]) -> None:
    """Run a script with the command line's arguments. What is wrong with them or with the input is said in one line;
    errors of the run itself have their traceback, and with TRANSFORMERS_VERBOSITY=debug all have. At the end of a run
    its process leaves the others.

    Args:
        prepare: checks, loads, and gives what starts the run.
    """
    try:
        start = prepare(sys.argv[1:])
    except (ValueError, TypeError, OSError, ImportError, StrictDataclassError) as error:
        logger.debug("The error in full:", exc_info=True)
        sys.exit(f"{Path(sys.argv[0]).name}: error: {one_line(error)}")
    start()
    # The group's threads have to end before Python does: what they free needs Python's lock.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
