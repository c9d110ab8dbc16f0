"""The dense start of a training run: its schedule, its shorter inputs, and the callback for `Trainer`."""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .causal_costs import causal_flops, causal_kept_values
from .configuration_colt5 import CoLT5BaseConfig
from .encoder_costs import encoder_flops, kept_values
from .kernel_backend import uses_triton

logger = logging.get_logger(__name__)

Inputs = dict[str, Any]
_PER_TOKEN = {"input_ids", "inputs_embeds", "attention_mask", "labels"}


def learned_routers(model: nn.Module) -> list[nn.Module]:
    """The model's routers that have a vector to learn."""
    # by name: a model with code of the Hub has classes of its own
    return [part for part in model.modules() if type(part).__name__ == "CoLT5Router" and list(part.parameters())]


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
        input_share: the share of an input that the first two parts read; 1 for all of it. What part that is, is for
            the callback's `shorten` to say: the beginning, or for span corruption a stretch that may lie anywhere.

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
        # so few steps that the second part has none: there is nothing to divide by
        return 0.0 if step <= opens else (step - opens) / (ends - opens)


# what a step of a dense start should keep for its backward at most, over what a later step keeps
MEMORY_LIMIT = 1.5


@dataclass(frozen=True)
class DenseStartCosts:
    """What an encoder, or a causal language model, costs in a step of a dense start over what it costs in a later one.

    All of it is by formula.

    Attributes:
        flops: operations.
        memory: what is kept for the backward, also of what routed cross-attention reads.
        largest_share: the largest `input_share`, in hundredths, with which `memory` is at most `MEMORY_LIMIT`; None
            where even 0.01 is too much.
    """

    flops: float
    memory: float
    largest_share: float | None

    @classmethod
    def of(
        cls,
        config: CoLT5BaseConfig,
        length: int,
        input_share: float,
        fused_attention: bool = True,
        checkpointed: bool = False,
        causal: bool = False,
    ) -> "DenseStartCosts":
        """The costs for inputs of `length` tokens; the arguments are those of `DenseStart` and `kept_values`, and
        `causal` says whether the model is a causal language model."""
        how = {"fused_attention": fused_attention, "checkpointed": checkpointed}
        kept, operations = (causal_kept_values, causal_flops) if causal else (kept_values, encoder_flops)
        later = kept(config, length, **how)

        def memory(share: float) -> float:
            return kept(config, math.ceil(share * length), dense=True, **how) / later

        # a search by halves: memory grows with the share
        shares = [hundredth / 100 for hundredth in range(1, 101)]
        allowed = bisect_right(shares, MEMORY_LIMIT, key=memory)
        flops = operations(config, math.ceil(input_share * length), dense=True) / operations(config, length)
        return cls(flops, memory(input_share), shares[allowed - 1] if allowed else None)


def shorten(inputs: Inputs, share: float) -> Inputs:
    """The beginning of every row of a batch, for an encoder: what is one value a token is cut, all else stays.

    Where an answer in the input is asked for and lies behind the cut, the second half of what stays is the text around
    it: the first half has the question.

    Args:
        inputs: a model's keywords: `input_ids` [batch, n] or `inputs_embeds` [batch, n, d_model], `attention_mask`
            [batch, n], `labels`, which are cut where they are integers [batch, n] and the model has no decoder inputs,
            and `start_positions` and `end_positions` [batch], which follow their tokens. Those in padding or beyond
            the input, which the loss leaves out, are beyond the shorter input too.
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
    slots = torch.arange(kept, device=tokens.device)
    places = first + slots
    answer = {name: inputs[name] for name in ("start_positions", "end_positions") if inputs.get(name) is not None}
    if len(answer) == 2:
        start, end = (position.view(batch, 1) for position in answer.values())
        start_is_real, end_is_real = (_is_real(position, mask, length) for position in (start, end))
        half = kept // 2
        # from there on the second half is read: a quarter of it may follow the answer, of a long one its end is cut
        second = (end + (kept - half) // 4 - (kept - half) + 1).clamp(max=length - kept + half)
        second = torch.minimum(second, start)
        is_behind = start_is_real & end_is_real & (end >= first + kept)
        # an answer that begins in the first half and ends behind the cut: all of it stays as it is
        second = torch.maximum(second, first + half)
        places = torch.where(is_behind & (slots >= half), second + slots - half, places)
        moved = {}
        for name, position, is_real in zip(answer, (start, end), (start_is_real, end_is_real), strict=True):
            in_second = is_behind & (position >= second)
            place = torch.where(in_second, position - second + half, position - first)
            # an answer that is too long for what stays is cut
            place = torch.where(is_behind, place.clamp(max=kept - 1), place.clamp(max=kept))
            moved[name] = place.masked_fill(~is_real, kept)[:, 0]
        answer = moved
    rows = torch.arange(batch, device=tokens.device)[:, None]
    return {
        name: value[rows, places] if _is_per_token(name, value, batch, length) else value
        for name, value in inputs.items()
    } | answer


def shorten_pictures(inputs: Inputs, share: float) -> Inputs:
    """A cut-out of every picture of a batch, which lies anywhere, as in the usual training of image classifiers; all
    else stays.

    Args:
        inputs: a model's keywords: `pixel_values` [batch, channels, height, width] and `pixel_mask` [batch, height,
            width].
        share: how much of the area stays; each side has the square root of it, rounded up.

    Returns:
        The keywords with smaller pictures. Of a picture that is smaller than the batch, the cut-out begins where as
        much of it as possible is inside.
    """
    pixels = inputs.get("pixel_values")
    if pixels is None:
        return inputs
    mask = inputs.get("pixel_mask")
    places = []
    for dim in (2, 3):
        size = pixels.shape[dim]
        kept = math.ceil(math.sqrt(share) * size)
        first, real = 0, torch.full((len(pixels),), size, device=pixels.device)
        if mask is not None:
            lines = mask.ne(0).any(4 - dim)
            first, real = lines.int().argmax(1), lines.sum(1)
        spare = (real - kept).clamp(min=0)
        start = first + (torch.rand(len(pixels), device=pixels.device) * (spare + 1)).long()
        places.append(start.clamp(max=size - kept)[:, None] + torch.arange(kept, device=pixels.device))
    at = (torch.arange(len(pixels), device=pixels.device)[:, None, None], places[0][:, :, None], places[1][:, None])
    short = {"pixel_values": pixels.movedim(1, -1)[at].movedim(-1, 1)}
    return inputs | short | ({} if mask is None else {"pixel_mask": mask[at]})


def _is_real(position: torch.Tensor, mask: torch.Tensor | None, length: int) -> torch.Tensor:
    """Whether positions [batch, 1] are those of real tokens, bool."""
    is_inside = (position >= 0) & (position < length)
    return is_inside if mask is None else is_inside & mask.gather(1, position.clamp(0, length - 1)).ne(0)


def _is_per_token(name: str, value: Any, batch: int, length: int) -> bool:
    """Whether a keyword is one value a token. Labels of several classes may be as many as tokens, and are floats."""
    if name not in _PER_TOKEN or not isinstance(value, torch.Tensor) or value.dim() < 2:
        return False
    return value.shape[:2] == (batch, length) and not (name == "labels" and value.is_floating_point())


def shorten_documents(inputs: Inputs, share: float) -> Inputs:
    """`shorten` for an encoder-decoder: the targets stay whole, also where they are as long as the document."""
    targets = {name: inputs[name] for name in ("labels",) if name in inputs}
    return shorten({name: value for name, value in inputs.items() if name not in targets}, share) | targets


@dataclass(frozen=True)
class ShortenDenoising:
    """A stretch of every row of span corruption, and of its target the spans whose sentinels stand there.

    Text is all that such a run learns from, and whatever lies behind a row's beginning would never be read: with the
    beginnings alone the loss stays far above that of runs that read everything (docs/learning.md). So the stretch lies
    anywhere. Where, the row's own tokens decide, as they do what the collator masks: neither the number of processes
    nor a resumed run changes it, and in another epoch, whose rows begin elsewhere, it is another one.

    Attributes:
        sentinels: the ids of the sentinels, from <extra_id_0> on.
        openings: the ids of mode tokens; where one opens a row, it opens the stretch as well.
    """

    sentinels: tuple[int, ...]
    openings: tuple[int, ...] = ()

    def __call__(self, inputs: Inputs, share: float) -> Inputs:
        """`stretch` from a place that each row's tokens decide."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask.ne(0).long()
        # a sum of products with the multiples of a prime, by the place among the real tokens (Knuth)
        factors = (mask.cumsum(1) * 2654435761) % 2**31
        mixed = ((ids + 1) * factors % 2**31 * mask).sum(1) * 2246822519 % 2**32 >> 8
        spare = (mask.sum(1) - math.ceil(share * ids.shape[1])).clamp(min=0)
        return self.stretch(inputs, share, mixed % (spare + 1))

    def stretch(self, inputs: Inputs, share: float, starts: torch.Tensor) -> Inputs:
        """The stretch of every row that begins at a given place.

        Args:
            inputs: `input_ids` [batch, n], `labels` [batch, m], and what else the model takes.
            share: how much of n a stretch has, rounded up.
            starts: int64 [batch], real tokens of each row before its stretch; a stretch that would end behind the
                row's last one begins earlier.

        Returns:
            The keywords with [batch, ceil(share · n)] in place of [batch, n]. `labels` [batch, m] begin with the first
            span whose sentinel is in the stretch, and are -100 behind the last such span. A row whose stretch has no
            sentinel keeps `share` of the rest of its target.
        """
        ids, labels, mask = inputs["input_ids"], inputs["labels"], inputs.get("attention_mask")
        (batch, length), device = ids.shape, ids.device
        places = torch.arange(length, device=device)
        rows = torch.arange(batch, device=device)[:, None]
        first = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        real = torch.full_like(starts, length)
        if mask is not None:
            first, real = mask.ne(0).int().argmax(1, keepdim=True), mask.ne(0).sum(1)
        spare = (real - math.ceil(share * length)).clamp(min=0)
        offset = first + torch.minimum(starts, spare)[:, None]
        turned = {
            name: value[rows, (places + offset) % length] if name in ("input_ids", "attention_mask") else value
            for name, value in inputs.items()
        }
        short = shorten_documents(turned, share)
        if self.openings:
            opening = ids.gather(1, first)
            is_mode = torch.isin(opening, torch.tensor(self.openings, device=device))
            own = short["input_ids"]
            short["input_ids"] = torch.where(is_mode & (torch.arange(own.shape[1], device=device) == 0), opening, own)
        # [batch, sentinels], [batch, m, sentinels] would be large: ranks instead
        rank = torch.full((int(max(self.sentinels)) + 2,), -1, device=device)
        rank[torch.tensor(self.sentinels, device=device)] = torch.arange(len(self.sentinels), device=device)

        def rank_of(tokens: torch.Tensor) -> torch.Tensor:
            return rank[tokens.clamp(0, len(rank) - 1)]

        # the spans before the stretch: as many as sentinels before it
        before = ((rank_of(ids) >= 0) & (places < offset)).sum(1, keepdim=True)
        spans = (rank_of(labels) >= 0).cumsum(1)
        begins = torch.where(spans[:, -1:] > before, (spans <= before).sum(1, keepdim=True), 0)
        slots = torch.arange(labels.shape[1], device=device)
        own_labels = labels.gather(1, (slots + begins).clamp(max=labels.shape[1] - 1))
        own_labels = own_labels.masked_fill(slots + begins >= labels.shape[1], -100)
        last = rank_of(short["input_ids"]).amax(1, keepdim=True)
        beyond = (rank_of(own_labels) > last).cumsum(1) > 0
        kept = (own_labels.ne(-100).sum(1, keepdim=True) * share).ceil()
        return short | {"labels": own_labels.masked_fill(torch.where(last >= 0, beyond, slots >= kept), -100)}


def shortening_of(config: Any) -> Callable[[Inputs, float], Inputs]:
    """What shortens the inputs of a model with this configuration, where a run has nothing better."""
    if config.dimensions == 2:
        return shorten_pictures
    return shorten_documents if config.is_encoder_decoder else shorten


def length_of(inputs: Inputs, config: Any) -> int | None:
    """How many tokens, or patches of pictures, a batch of a model with this configuration has in a row; None where
    there are none."""
    if config.dimensions == 2 and "pixel_values" in inputs:
        height, width = inputs["pixel_values"].shape[-2:]
        # the last patches are filled up
        return math.ceil(height / config.patch_size) * math.ceil(width / config.patch_size)
    tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
    return None if tokens is None else tokens.shape[1]


def _with_fewer_labels(whole: Inputs, short: Inputs, share: float) -> Inputs:
    """`short`, with Trainer's count of labels, which it took before they were cut, lowered by the share that is left
    on average: by the real count of this batch, processes and accumulated batches would not weigh alike."""
    labels, items = whole.get("labels"), whole.get("num_items_in_batch")
    if labels is None or items is None or short["labels"] is labels:
        return short
    return short | {"num_items_in_batch": items * share}


class DenseStartCallback(TrainerCallback):
    """Gives a run of `Trainer` a dense start.

        Trainer(model, arguments, train_dataset=..., callbacks=[DenseStartCallback()])

    The model's configuration, what is saved, and every evaluation have the final budgets throughout. When the dense
    start is over, `routers_trained` of the configuration says so, and a later run leaves the routers as they are. What
    a step does depends on its number and on the random state that `Trainer` saves: a resumed run goes on where
    it was.

    Args:
        schedule: the parts of the run.
        shorten: from a batch's keywords and the schedule's `input_share` to a shorter batch; None for `shorten`, or
            `shorten_documents` for an encoder-decoder, or `shorten_pictures`.
        always: whether a model whose routers have been trained gets a dense start as well.
        input_length: tokens, or patches, of the longest inputs, for the message about costs before the run; with None
            it comes after the first step, for the length of that step's inputs.

    Raises:
        ValueError: at the beginning of a run, for a model without learned routers.
    """

    def __init__(
        self,
        schedule: DenseStart | None = None,
        shorten: Callable[[Inputs, float], Inputs] | None = None,
        always: bool = False,
        input_length: int | None = None,
    ):
        self.schedule = schedule or DenseStart()
        self.shorten = shorten
        self.always = always
        self.input_length = input_length
        self.progress: float | None = None
        # of the run: what shortens its inputs, whether its costs are still to be said, and how long its inputs are
        self._shorten: Callable[[Inputs, float], Inputs] | None = None
        self._is_to_say_costs = False
        self._length = input_length
        # the CoLT5 model within what is trained, as long as its dense start lasts
        self._model: Any = None
        self._hook: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Find the model, and say what the run will do."""
        self._model = next((part for part in model.modules() if hasattr(part, "set_dense_start")), None)
        routers = [] if self._model is None else learned_routers(self._model)
        if not routers:
            raise ValueError(
                f"{type(model).__name__} has no learned routers; a dense start needs a CoLT5 model with them"
            )
        if self._model.config.routers_trained and not self.always:
            logger.info("The routers of this model have been trained: no dense start.")
            self._model = None
            return
        if not any(parameter.requires_grad for router in routers for parameter in router.parameters()):
            logger.warning("The routers of this model are frozen: no dense start.")
            self._model = None
            return
        self._shorten = self.shorten or shortening_of(self._model.config)
        self._hook = model.register_forward_pre_hook(self._shorten_inputs, with_kwargs=True)
        self._length, self._is_to_say_costs = self.input_length, True
        if self._length is not None:
            self._say_what_it_costs(state.max_steps, self._length)

    def _say_what_it_costs(self, steps: int, length: int) -> None:
        self._is_to_say_costs = False
        schedule, config = self.schedule, self._model.config
        share = schedule.input_share
        ends = next(step for step in range(steps + 1) if schedule.progress(step, steps) is None)
        is_cross_routed = config.is_encoder_decoder and config.routed_cross_key_values is not None
        stacks = [part for part in self._model.modules() if hasattr(part, "dense_start") and hasattr(part, "block")]
        # not by class: a model with code of the Hub has classes of its own, and FSDP2 makes others with longer names
        has_encoder = any(not type(part).__name__.endswith("CoLT5Decoder") for part in stacks)
        stack = "encoder" if has_encoder else "decoder"
        keeping = "encoder and routed cross-attention keep" if is_cross_routed else f"the {stack} keeps"
        weight = next(self._model.parameters())
        costs = DenseStartCosts.of(
            config,
            length,
            share,
            # pictures have no kernels for their attention
            fused_attention=config.dimensions == 1
            and uses_triton(weight, config.kernel_backend)
            and config._attn_implementation == "sdpa",
            checkpointed=any(getattr(part, "gradient_checkpointing", False) for part in self._model.modules()),
            causal=not has_encoder,
        )
        logger.warning(
            f"Dense start: until step {ends} of {steps} every token takes the heavy branches, on "
            f"{share:.0%} of every input; from then on routing is the paper's. For inputs of {length:,} tokens a "
            f"step of it has {costs.flops:.2f} times the {stack}'s operations of a later step, and {keeping} "
            f"{costs.memory:.2f} times as much for the backward; the run has "
            f"{1 + ends / max(1, steps) * (costs.flops - 1):.2f} times the {stack}'s operations of one without."
        )
        if costs.memory > MEMORY_LIMIT:
            advice = (
                "checkpoint activations, or use smaller batches"
                if costs.largest_share is None
                else f"input_share={costs.largest_share} keeps it at {MEMORY_LIMIT}"
            )
            logger.warning(
                f"input_share is {share}, with which {keeping} {costs.memory:.2f} times as much for the backward "
                f"as in later steps; {advice}."
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

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say what the run costs, where the first step had to show how long inputs are."""
        if self._model is not None and self._is_to_say_costs and self._length is not None:
            self._say_what_it_costs(state.max_steps, self._length)

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
        # the hook is there as long as the dense start lasts; asked for `progress`, a compiler would compile each step
        if not model.training or self._shorten is None:
            return None
        # a compiler would guard what is looked at
        if not torch.compiler.is_compiling() and self._is_to_say_costs:
            self._length = length_of(kwargs, self._model.config)
        share = self.schedule.input_share
        return None if share == 1 else (args, _with_fewer_labels(kwargs, self._shorten(kwargs, share), share))
