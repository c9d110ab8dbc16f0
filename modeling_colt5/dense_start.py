"""The dense start of a training run: its schedule, its shorter inputs, and the callback for `Trainer`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)

Inputs = dict[str, Any]


@dataclass(frozen=True)
class DenseStart:
    """How a training run begins: on short inputs, with every token in the heavy branches, until routers can choose.

    Routers that choose from the first step on do not learn. The heavy branches have nothing useful to say then, so
    tokens learn to avoid them, and a token that is not chosen never finds out that it should be (docs/routers.md). So
    a run has three parts. In the first, the weights of all tokens are near 1 and constant, and the heavy branches
    learn. In the second, routers learn while the weights shrink to the configured budgets. The third is the paper's
    routing.

    Attributes:
        closed: the first part's share of all steps.
        opening: the second part's share.
        input_share: the share of an input that the first two parts read, from its beginning; 1 for all of it.

    Raises:
        ValueError: for a share out of its range, or first parts that leave nothing to the third.
    """

    closed: float = 0.5
    opening: float = 0.1
    input_share: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.closed < 1:
            raise ValueError(f"closed is {self.closed}; it must be at least 0 and below 1")
        if not 0 < self.opening < 1:
            raise ValueError(f"opening is {self.opening}; it must be above 0 and below 1")
        if not self.closed + self.opening < 1:
            raise ValueError(f"closed + opening is {self.closed + self.opening}; it must be below 1")
        if not 0 < self.input_share <= 1:
            raise ValueError(f"input_share is {self.input_share}; it must be above 0 and at most 1")

    def progress(self, step: int, steps: int) -> float | None:
        """What `set_dense_start` takes before step `step` of `steps`, counted from 0: None in the third part."""
        # a share of 0.1 + 0.2 is no more than three steps in ten
        opens, ends = (math.ceil(share * steps - 1e-9) for share in (self.closed, self.closed + self.opening))
        if step >= ends:
            return None
        return 0.0 if step <= opens else (step - opens) / (ends - opens)


def shorten(inputs: Inputs, share: float) -> Inputs:
    """The beginning of every row of a batch, for an encoder: what is one value a token is cut, all else stays.

    Args:
        inputs: a model's keywords: `input_ids` [batch, n] or `inputs_embeds` [batch, n, d_model], `attention_mask`
            [batch, n], and `labels`, which are cut where they are [batch, n] and the model has no decoder inputs.
        share: how much of n stays, rounded up; counted from each row's first real token.

    Returns:
        The keywords with [batch, ceil(share · n)] in place of [batch, n].
    """
    tokens = inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        return inputs
    (batch, length), mask = tokens.shape[:2], inputs.get("attention_mask")
    kept = math.ceil(share * length)
    first = torch.zeros(batch, 1, dtype=torch.int64, device=tokens.device)
    if mask is not None:
        # a row that is padded at its left begins later
        first = mask.ne(0).int().argmax(1, keepdim=True).clamp(max=length - kept)
    places = first + torch.arange(kept, device=tokens.device)
    rows = torch.arange(batch, device=tokens.device)[:, None]
    per_token = {"input_ids", "inputs_embeds", "attention_mask", "labels"}
    return {
        name: value[rows, places] if name in per_token and _is_per_token(value, batch, length) else value
        for name, value in inputs.items()
    }


def _is_per_token(value: Any, batch: int, length: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() >= 2 and value.shape[:2] == (batch, length)


def shorten_documents(inputs: Inputs, share: float) -> Inputs:
    """`shorten` for an encoder-decoder: the targets stay whole, also where they are as long as the document."""
    targets = {name: inputs[name] for name in ("labels",) if name in inputs}
    return shorten({name: value for name, value in inputs.items() if name not in targets}, share) | targets


@dataclass(frozen=True)
class ShortenDenoising:
    """`shorten` for span corruption: of the target, only the spans whose sentinels are still in the input stay.

    Attributes:
        sentinels: the ids of the sentinels, from <extra_id_0> on.
    """

    sentinels: tuple[int, ...]

    def __call__(self, inputs: Inputs, share: float) -> Inputs:
        """The batch cut as by `shorten`; `labels` [batch, m] become -100 from the first sentinel on that the cut input
        lacks. A row whose cut input has no sentinel keeps its target."""
        short = shorten_documents(inputs, share)
        ids, labels = short["input_ids"], short["labels"]
        sentinels = torch.tensor(self.sentinels, device=ids.device)
        # [batch, sentinels], [batch, m, sentinels] would be large: ranks instead
        rank = torch.full((int(max(self.sentinels)) + 2,), -1, device=ids.device)
        rank[sentinels] = torch.arange(len(self.sentinels), device=ids.device)
        last = rank[ids.clamp(max=len(rank) - 1)].amax(1, keepdim=True)
        label_rank = rank[labels.clamp(0, len(rank) - 1)]
        beyond = (label_rank > last).cumsum(1) > 0
        return short | {"labels": labels.masked_fill(beyond & (last >= 0), -100)}


class DenseStartCallback(TrainerCallback):
    """Gives a run of `Trainer` a dense start.

        Trainer(model, arguments, train_dataset=..., callbacks=[DenseStartCallback()])

    The model's configuration, what is saved, and every evaluation have the final budgets throughout. When the dense
    start is over, `routers_trained` of the configuration says so, and a later run leaves the routers as they are. What
    a step does depends on its number alone, so that a resumed run goes on where it was.

    Args:
        schedule: the parts of the run.
        shorten: from a batch's keywords and the schedule's `input_share` to a shorter batch; None for `shorten`, or
            `shorten_documents` for an encoder-decoder.
        always: whether a model whose routers have been trained gets a dense start as well.
    """

    def __init__(
        self,
        schedule: DenseStart | None = None,
        shorten: Callable[[Inputs, float], Inputs] | None = None,
        always: bool = False,
    ):
        self.schedule = schedule or DenseStart()
        self.shorten = shorten
        self.always = always
        self.progress: float | None = None
        # the CoLT5 model within what is trained, as long as its dense start lasts
        self._model: Any = None
        self._hook: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Find the model, and say what the run will do."""
        self._model = next((part for part in model.modules() if hasattr(part, "set_dense_start")), None)
        if self._model is None or self._model.config.routing != "learned":
            raise ValueError(
                f"{type(model).__name__} has no learned routers; a dense start needs a CoLT5 model with them"
            )
        if self._model.config.routers_trained and not self.always:
            logger.info("The routers of this model have been trained: no dense start.")
            self._model = None
            return
        if self.shorten is None:
            self.shorten = shorten_documents if self._model.config.is_encoder_decoder else shorten
        self._hook = model.register_forward_pre_hook(self._shorten_inputs, with_kwargs=True)
        steps, schedule = state.max_steps, self.schedule
        ends = next(step for step in range(steps + 1) if schedule.progress(step, steps) is None)
        logger.warning(
            f"Dense start: until step {ends} of {steps} every token takes the heavy branches, on the first "
            f"{schedule.input_share:.0%} of every input; from then on routing is the paper's."
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring the model to where this step is."""
        if self._model is None:
            return
        self.progress = self.schedule.progress(state.global_step, state.max_steps)
        self._model.set_dense_start(self.progress)
        if self.progress is None:
            self._model.config.routers_trained = True
            self._leave()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it is used from then on, also where the run stopped early."""
        if self._model is not None:
            self._model.set_dense_start(None)
            self._leave()

    def _leave(self) -> None:
        self._model = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _shorten_inputs(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Inputs
    ) -> tuple[tuple[Any, ...], Inputs] | None:
        if not model.training or self.progress is None or self.shorten is None or self.schedule.input_share == 1:
            return None
        return args, self.shorten(kwargs, self.schedule.input_share)
