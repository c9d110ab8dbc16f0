"""The health of routers while they train: numbers for Trainer's logs, and a warning of routers that do not learn."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .configuration_colt5 import CoLT5Config
from .dense_start import learned_routers
from .op_routing import RoutedTokens

logger = logging.get_logger(__name__)


@dataclass
class TokenTypes:
    """Which token types a batch has.

    Attributes:
        numbers: int64 [batch, n], the type of each token, numbered from 0.
        count: how many types there are.
    """

    numbers: torch.Tensor
    count: int

    @classmethod
    def of(cls, ids: torch.Tensor | None) -> "TokenTypes | None":
        """Of tokens int64 [batch, n]; None where they are not known, as with embeddings as inputs."""
        if ids is None:
            return None
        types, numbers = ids.unique(return_inverse=True)
        return cls(numbers, len(types))

    def counts(self, where: torch.Tensor) -> torch.Tensor:
        """int64 [routers, count], how many of the tokens that bool [routers, batch, n] is True of have each type."""
        nothing = torch.zeros(len(where), self.count, dtype=torch.int64, device=where.device)
        return nothing.scatter_add(1, self.numbers.flatten().expand(len(where), -1), where.flatten(1).long())


@dataclass
class Choice:
    """What one router chose on a batch, or several routers with as many slots.

    Attributes:
        scores: [batch, n], of several routers [routers, batch, n]; the same holds for the others.
        real: bool [batch, n], True for real tokens.
        indices: int64 [batch, slots]; of a causal layer's keys/values a token has a slot in each pool that holds it.
        weights: fp32 [batch, slots].
        valid: bool [batch, slots], which slots are used.
        types: of the tokens; None where they are not known.
    """

    scores: torch.Tensor
    real: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor
    valid: torch.Tensor
    types: TokenTypes | None

    def chosen(self) -> torch.Tensor:
        """bool [batch, n], which tokens were routed."""
        # unused slots all name the last token
        counts = torch.zeros_like(self.real, dtype=torch.int32).scatter_add(-1, self.indices, self.valid.int())
        return counts > 0


def together(choices: Mapping[str, Choice]) -> dict[tuple[str, ...], Choice]:
    """The choices of routers that read the same tokens and have as many slots as one each, under their names.

    A model has dozens of routers, and dozens of small operations for each would take a GPU's host longer than the
    model does.
    """
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, choice in choices.items():
        alike.setdefault((id(choice.types), choice.real.shape, choice.indices.shape), []).append(name)
    parts = ("scores", "real", "indices", "weights", "valid")
    return {
        tuple(names): Choice(
            **{part: torch.stack([getattr(choices[name], part) for name in names]) for part in parts},
            types=choices[names[0]].types,
        )
        for names in alike.values()
    }


# a weight of a saturated token is 1 but for rounding
SATURATED = 0.9999


def choice_numbers(choice: Choice) -> dict[str, torch.Tensor]:
    """The numbers of several routers' choice, each fp32 [routers]; `RouterHealthCallback` says what they are. Where
    the tokens are not known there is no entropy."""
    # without a shape that depends on values, for which the host would have to wait for the GPU
    real, valid = choice.real, choice.valid
    number = _sum(real)
    scores = choice.scores.float()
    mean = _sum(torch.where(real, scores, 0)) / number
    deviations = torch.where(real, scores - mean[:, None, None], 0)
    numbers = {
        "saturated": _sum((choice.weights > SATURATED) & valid) / _sum(valid),
        "score_std": (_sum(deviations.square()) / number).sqrt(),
    }
    if choice.types is not None:
        of_choice, of_all = (_entropy_of(choice.types.counts(where)) for where in (choice.chosen(), real))
        numbers["entropy"] = of_choice / of_all.clamp(min=1e-6)
    return numbers


def _sum(values: torch.Tensor) -> torch.Tensor:
    # [routers, batch, n] to [routers]
    return values.sum((1, 2))


def _entropy_of(counts: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(counts / counts.sum(1, keepdim=True).clamp(min=1)).sum(1)


@dataclass
class RouterRecord:
    """What is remembered of a router between measurements.

    Attributes:
        chosen: bool [batch, n], the last choice; None before the first.
        has_choice: whether the last budget left any real token out.
        unrouted_since: int64 [types], for each token type of the watched batch the step when it was last routed, or
            first frequent; -1 for those that were not frequent yet. None before the first measurement.
        still: how many measurements in a row found it without a gradient, or with the same choice as before.
        has_lived: whether any did not.
    """

    chosen: torch.Tensor | None = None
    has_choice: bool = True
    unrouted_since: torch.Tensor | None = None
    still: int = 0
    has_lived: bool = False


def causal_layers(decoder: Any) -> list[tuple[int, Any]]:
    """The routed attentions and feed-forwards of a causally routed decoder, in their order, each with its block's
    number; none of another decoder."""
    # by name, as learned_routers
    return [
        (number, layer)
        for number, block in enumerate(decoder.block)
        for layer in block.layer
        if type(layer).__name__ in ("CoLT5LayerCausalAttention", "CoLT5LayerCausalFF") and learned_routers(layer)
    ]


def causal_choices(
    scores: torch.Tensor, plan: Any, routed: tuple[torch.Tensor | RoutedTokens, ...], types: TokenTypes | None
) -> list[Choice]:
    """The choices of a causal layer's routers, as its norm scored the tokens and as it routed them.

    Args:
        scores: [batch, routers, n], by position.
        plan: the pass's `CausalPlan`.
        routed: of an attention the queries' weights [batch, n] and the pools, of a feed-forward the weights.
        types: of the tokens; None where they are not known.
    """
    batch, routers, length = scores.shape
    places = torch.arange(length, device=scores.device).expand(batch, length)
    real = plan.leave(places < plan.counts[:, None])
    weights = routed[0]
    assert isinstance(weights, torch.Tensor)
    choices = [Choice(scores[:, 0], real, places, weights, weights > 0, types)]
    for pools in routed[1:]:
        assert isinstance(pools, RoutedTokens)
        # a row that ends earlier than others has no windows behind its end
        windows = torch.arange(pools.valid.shape[2], device=scores.device)
        valid = pools.valid & (windows <= plan.completed[:, None])[:, None, :, None]
        for router in range(routers - 1):
            ranks, own_weights, own_valid = (
                part[:, router].flatten(1) for part in (pools.indices, pools.weights, valid)
            )
            # an unused slot may name a rank that no token has
            indices = ranks.clamp(max=length - 1)
            indices = indices if plan.order is None else plan.order.gather(1, indices)
            choices.append(Choice(scores[:, 1 + router], real, indices, own_weights, own_valid, types))
    return choices


class RouterHealthCallback(TrainerCallback):
    """Logs what the routers of encoder, cross-attention and causal layers do, and warns once of those that do not
    learn.

        trainer = Trainer(model, arguments, train_dataset=...)
        trainer.add_callback(RouterHealthCallback(trainer.log))

    Every `interval` steps the model reads the first batch of the run once more, without a gradient and with the
    paper's routing, also in a dense start. That takes about a step's time on a GPU, and a third of it on a CPU; all
    other steps are as they would be without. Each router gets, under `routers/<layer>/<router>/`, where
    that of a decoder layer's cross-attention is `cross`, or `cross_0`, `cross_1`, … of several, and a causally routed
    layer's are `causal_query`, `causal_key_value` (with a number behind it if there are several) and
    `causal_feed_forward`:

    - `saturated`: the share of routed tokens whose weight is 1. Saturated weights have no gradient.
    - `score_std`: the spread of the scores of all tokens, in the units of `routing_epsilon`.
    - `entropy`: how many token types the choice has, as entropy, over the entropy of the whole batch: about 1 where
      types do not matter, near 0 where it is a few types.
    - `overlap`: the share of the tokens chosen at the last measurement that are chosen still.
    - `unrouted_types`: how many of the batch's token types were not routed for `unrouted_steps` steps, of those that
      are so frequent that chance would have routed one of their tokens at every measurement.
    - `gradient_norm`: of the router's vector, as the optimizer gets it; nothing where a library keeps gradients
      to itself.

    Args:
        log: where the numbers go: `Trainer.log`.
        interval: steps between measurements.
        unrouted_steps: see above.
        patience: after how many measurements in a row without a gradient, or with the very same choice, a router is
            taken for dead. Measurements of a dense start do not count, nor do those where the budget holds all tokens.
        rows: how many rows of the batch are read.
    """

    def __init__(
        self,
        log: Callable[[dict[str, float]], None],
        interval: int = 100,
        unrouted_steps: int = 1000,
        patience: int = 5,
        rows: int = 8,
    ):
        for name, value in (
            ("interval", interval),
            ("unrouted_steps", unrouted_steps),
            ("patience", patience),
            ("rows", rows),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.log = log
        self.interval, self.unrouted_steps, self.patience, self.rows = interval, unrouted_steps, patience, rows
        self.records: dict[str, RouterRecord] = {}
        self._gradients: dict[str, torch.Tensor] = {}
        self._batch: dict[str, Any] | None = None
        # each None where the model has none
        self._encoder: Any = None
        self._decoder: Any = None
        self._cross_routing: Any = None
        # undoes what is there for the first batch alone
        self._first_step = ExitStack()
        self._has_warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Find the routers, and wait for the first batch."""
        # not by class: a model with code of the Hub has classes of its own, and FSDP2 makes others with longer names
        parts = [part for part in model.modules() if hasattr(part, "dense_start")]
        stacks = [part for part in parts if hasattr(part, "block")]
        decoders = [part for part in stacks if type(part).__name__.endswith("CoLT5Decoder")]
        encoders = [part for part in stacks if part not in decoders and learned_routers(part)]
        self._encoder = next(iter(encoders), None)
        self._decoder = next((part for part in decoders if causal_layers(part)), None)
        self._cross_routing = next((part for part in parts if hasattr(part, "routers")), None)
        if self._routed_stack is None:
            return
        # before the dense start's own hook, which cuts the batch
        hook = model.register_forward_pre_hook(self._keep_batch, with_kwargs=True, prepend=True)
        self._first_step.callback(hook.remove)
        # a compiled model would go on calling a hook that it was compiled with
        self._first_step.enter_context(torch.compiler.set_stance("force_eager"))

    @property
    def _routed_stack(self) -> Any:
        """The stack whose configuration and dense start are those of all routers; None where nothing is routed."""
        return self._decoder if self._encoder is None else self._encoder

    def _keep_batch(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training or self._batch is not None:
            return
        rows = next((len(value) for value in kwargs.values() if isinstance(value, torch.Tensor) and value.dim()), 0)
        self._batch = {
            name: value[: self.rows].detach().clone()
            for name, value in kwargs.items()
            if isinstance(value, torch.Tensor) and value.dim() and len(value) == rows
        }

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the norms of the routers' gradients, in a step that is measured."""
        self._first_step.close()
        self._gradients = {}
        if self._batch is None or (state.global_step + 1) % self.interval:
            return
        for name, router in self.routers().items():
            gradients = [part.grad for part in router.parameters() if part.requires_grad and part.grad is not None]
            if gradients:
                norm = torch.linalg.vector_norm(gradients[0].float())
                # FSDP2 keeps a part on each device
                self._gradients[name] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Measure, log, and warn."""
        if self._batch is None or state.global_step % self.interval:
            return
        numbers = self.measure(model, state.global_step)
        # to log ends the step's wish to log, which the loss still waits for
        wanted = control.should_log
        self.log(numbers)
        control.should_log = wanted
        if state.is_world_process_zero:
            self.warn_of_the_dead(numbers)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the model and the batch."""
        self._first_step.close()
        self._batch = self._encoder = self._decoder = self._cross_routing = None

    def routers(self) -> dict[str, nn.Module]:
        """The routers by layer and name, as their layers hold them: the encoder's, cross-attention's, causal ones."""
        named: dict[str, nn.Module] = {}
        for number, block in enumerate(self._encoder.block if self._encoder is not None else ()):
            attention, feed_forward = block.layer
            named[f"{number}/query"] = attention.query_router
            named[f"{number}/key_value"] = attention.key_value_router
            named[f"{number}/feed_forward"] = feed_forward.router
        if self._cross_routing is not None:
            each = self._cross_routing.num_routers
            for number, router in enumerate(self._cross_routing.routers):
                own = f"_{number % each}" if each > 1 else ""
                named[f"{number // each}/cross{own}"] = router
        for number, layer in causal_layers(self._decoder) if self._decoder is not None else ():
            if hasattr(layer, "router"):
                named[f"{number}/causal_feed_forward"] = layer.router
                continue
            named[f"{number}/causal_query"] = layer.query_router
            for group, router in enumerate(layer.key_value_routers):
                own = f"_{group}" if len(layer.key_value_routers) > 1 else ""
                named[f"{number}/causal_key_value{own}"] = router
        return named

    @torch.no_grad()
    def measure(self, model: nn.Module, step: int) -> dict[str, float]:
        """The numbers of all routers after a step."""
        assert self._batch is not None
        choices = self._choices(model)
        for name in choices:
            self.records.setdefault(name, RouterRecord())
        measured: dict[str, dict[str, torch.Tensor]] = {name: {} for name in choices}
        leaves_out: dict[str, torch.Tensor] = {}
        for names, choice in together(choices).items():
            chosen = choice.chosen()
            numbers = choice_numbers(choice) | self._since_the_last(names, choice, chosen, step)
            for number, values in numbers.items():
                for name, value in zip(names, values, strict=True):
                    measured[name][number] = value
            leaves_out |= dict(zip(names, (choice.real & ~chosen).any(2).any(1), strict=True))
        if not measured:
            return {}
        tensors = {f"routers/{name}/{number}": value for name in measured for number, value in measured[name].items()}
        tensors |= {
            f"routers/{name}/gradient_norm": norm for name, norm in self._gradients.items() if name in measured
        }
        # the one place where the host waits for the GPU
        floats = torch.stack([value.float() for value in (*tensors.values(), *leaves_out.values())]).tolist()
        for name, is_left_out in zip(leaves_out, floats[len(tensors) :], strict=True):
            self.records[name].has_choice = bool(is_left_out)
        return dict(zip(tensors, floats[: len(tensors)], strict=True))

    def _since_the_last(
        self, names: tuple[str, ...], choice: Choice, chosen: torch.Tensor, step: int
    ) -> dict[str, torch.Tensor]:
        records = [self.records[name] for name in names]
        numbers: dict[str, torch.Tensor] = {}
        last = [record.chosen for record in records if record.chosen is not None]
        if last:
            stayed = torch.stack(last)
            numbers["overlap"] = _sum(chosen & stayed) / _sum(stayed).clamp(min=1)
        if choice.types is not None:
            numbers["unrouted_types"] = self._unrouted_types(records, choice.types, choice.real, chosen, step)
        for record, own in zip(records, chosen, strict=True):
            record.chosen = own
        return numbers

    def _unrouted_types(
        self, records: Sequence[RouterRecord], types: TokenTypes, real: torch.Tensor, chosen: torch.Tensor, step: int
    ) -> torch.Tensor:
        counts = types.counts(real)
        frequent = (counts > 0) & (counts * _sum(chosen)[:, None] >= _sum(real)[:, None])
        last = [record.unrouted_since for record in records if record.unrouted_since is not None]
        since = torch.stack(last) if last else torch.full_like(counts, -1)
        seen = frequent & ((types.counts(chosen) > 0) | (since < 0))
        since = torch.where(seen, step, since)
        for record, own in zip(records, since, strict=True):
            record.unrouted_since = own
        return (frequent & (step - since >= self.unrouted_steps)).sum(1)

    def _choices(self, model: nn.Module) -> dict[str, Choice]:
        """What the routers choose of the kept batch, in the order of `routers`. The encoder's run in order too: a
        layer's queries and keys/values together, then its feed-forward; the cross-attention's of all decoder layers
        run together."""
        batch = self._batch or {}
        rows = len(next(iter(batch.values())))
        # of each part that is called its arguments and its output
        calls: list[tuple[tuple[Any, ...], Any]] = []
        norms: list[tuple[tuple[Any, ...], Any]] = []
        causal: list[tuple[tuple[Any, ...], Any]] = []

        def listen(part: nn.Module, heard: list[tuple[tuple[Any, ...], Any]]) -> Any:
            return part.register_forward_hook(lambda module, args, out: heard.append((args, out)))

        hooks = [
            listen(part, calls)
            for stack in (self._encoder, self._cross_routing)
            if stack is not None
            for part in stack.modules()
            if type(part).__name__ == "CoLT5Routing"
        ]
        for _, layer in causal_layers(self._decoder) if self._decoder is not None else ():
            hooks += [listen(layer.layer_norm, norms), listen(layer, causal)]
        was_training = model.training
        model.eval()
        try:
            # compiled models know nothing of these hooks; to return what was routed keeps graphs from being replayed
            with torch.compiler.set_stance("force_eager"):
                model(**batch, output_routing=True)
        finally:
            model.train(was_training)
            for hook in hooks:
                hook.remove()
        parts: list[Choice] = []
        types = TokenTypes.of(batch.get("input_ids"))
        for (scores, _, _, mask, _), (indices, weights, valid) in calls:
            real = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
            # the rows of several routers, one behind the other
            for first in range(0, len(scores), rows):
                own = slice(first, first + rows)
                chosen = (scores[own], real[own], indices[own], weights[own], valid[own])
                parts.append(Choice(*chosen, types))
        if causal and self._encoder is not None:
            types = TokenTypes.of(_decoder_input_ids(model, batch))
        for (_, (_, scores)), (args, (_, *routed)) in zip(norms, causal, strict=True):
            plan = next(value for value in args if hasattr(value, "counts"))
            parts += causal_choices(scores, plan, tuple(routed), types)
        return dict(zip(self.routers(), parts, strict=True))

    def warn_of_the_dead(self, numbers: dict[str, float]) -> None:
        """Say once which routers are dead, and what to do."""
        if self._routed_stack.dense_start is not None:
            return
        for name, record in self.records.items():
            own = {
                number: numbers.get(f"routers/{name}/{number}") for number in ("saturated", "overlap", "gradient_norm")
            }
            is_still = record.has_choice and (
                own["gradient_norm"] == 0 or own["overlap"] == 1 or (own["saturated"] or 0) > 0.99
            )
            record.still = record.still + 1 if is_still else 0
            record.has_lived |= not is_still
        dead = {name: record for name, record in self.records.items() if record.still >= self.patience}
        if not dead or self._has_warned:
            return
        self._has_warned = True
        never = [name for name, record in dead.items() if not record.has_lived]
        died = [name for name in dead if name not in never]
        said = [
            f"{', '.join(names)} {what}"
            for names, what in ((never, "never learned"), (died, "no longer learn"))
            if names
        ]
        logger.warning(
            f"Routers (layer/router): {'; '.join(said)}. For {self.patience * self.interval} steps they had no "
            f"gradient or chose the very same tokens. {advice(self._routed_stack.config)}"
        )


def _decoder_input_ids(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """The ids that an encoder-decoder's decoder reads of a batch [batch, m]: given, or the labels moved by one."""
    ids, labels = batch.get("decoder_input_ids"), batch.get("labels")
    if ids is not None or labels is None:
        return ids
    name = "prepare_decoder_input_ids_from_labels"
    return next(getattr(part, name)(labels) for part in model.modules() if hasattr(part, name))


def advice(config: CoLT5Config) -> str:
    """What to do about routers that do not learn."""
    said = []
    if config.routing_epsilon < 1:
        said.append(
            f"routing_epsilon is {config.routing_epsilon}, where most weights are 1 and have no gradient; train at 1."
        )
    if not config.routers_trained:
        said.append("Train with a dense start: DenseStartCallback, or --dense_start true of the scripts.")
    else:
        said.append(
            "They have had their dense start; a longer one (closed, opening of DenseStart), or a larger learning "
            "rate, may help. Late in a run, with a small learning rate, a choice that no longer changes is in order."
        )
    return " ".join(said)
