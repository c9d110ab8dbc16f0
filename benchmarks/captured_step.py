"""A training step of the learning benchmarks: on a GPU one CUDA graph, elsewhere the ordinary calls."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
# steps before the graph is made: kernels are compiled and the optimiser's state is there by then
STEPS_BEFORE = 3


class TrainingStep:
    """Loss, gradients clipped at 1, and AdamW, at T5's 1/√step and at will with a fall to zero at the end, or at rates
    of the caller's, in place.

    A model as small as the benchmarks' keeps a GPU waiting for Python; a replayed graph does not, for any model whose
    step neither synchronises nor makes tensors of Python's numbers. Where capturing fails the step stays as it is, and
    `captured` stays False. A step that changes on the way, for example in how many tokens it routes, says so by its
    phase: each phase has a graph of its own.

    Args:
        model: in training mode, on the device of its batches.
        loss_of: from a batch to the loss; batches of a phase have the same names, shapes and dtypes.
        groups: the optimiser's groups of all parameters, each with its highest learning rate.
        warmup_steps: of linearly rising rate; from then on it falls as 1/√step, which knows no last step.
        cooldown: where the rate besides falls linearly to zero, the first of these steps and the last one of all; None
            where it does not.
        rate_share: in the place of both, from a step, counted from 1, to its share of the highest rate.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_of: Callable[[Batch], Tensor],
        groups: list[dict[str, Any]],
        warmup_steps: int = 1,
        cooldown: tuple[int, int] | None = None,
        rate_share: Callable[[int], float] | None = None,
    ):
        self.parameters = list(model.parameters())
        self.loss_of = loss_of
        self.device = self.parameters[0].device
        self.rates = [group["lr"] for group in groups]
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            for group in groups:
                # a number would be recorded as it was
                group["lr"] = torch.tensor(group["lr"], device=self.device)
        self.optimizer = torch.optim.AdamW(
            groups, betas=(0.9, 0.99), weight_decay=0.0, fused=on_gpu, capturable=on_gpu
        )
        self.warmup_steps = warmup_steps
        self.cooldown = cooldown
        self.rate_share = rate_share or self._root_share
        self.steps = 0
        self.captured = False
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch = {}
        self._loss = torch.empty(0)
        self._phase: Hashable = None
        self._phase_began = 0

    def __call__(self, batch: Batch, phase: Hashable = None) -> Tensor:
        """Do a step, and give its loss before it, on the device; the next step may overwrite it.

        Args:
            batch: the step's input.
            phase: what the step does, where that changes; an earlier phase does not come back.
        """
        if phase != self._phase:
            self._phase, self._phase_began, self._graph = phase, self.steps, None
        self.steps += 1
        share = self.rate_share(self.steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * share)
            else:
                group["lr"] = rate * share
        if self._stream is not None and self.steps == self._phase_began + STEPS_BEFORE + 1:
            self._capture(batch)
        if self._graph is not None:
            for name, tensor in self._batch.items():
                tensor.copy_(batch[name])
            self._graph.replay()
            return self._loss
        if self._stream is None:
            return self._step(batch)
        # on a stream of its own, as what is to be captured later must be
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self._step(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """What another object for the same model goes on from: the optimiser's state, its highest rates, and how many
        steps there were."""
        return {"optimizer": self.optimizer.state_dict(), "rates": self.rates, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from it."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.rates, self.steps = state["rates"], state["steps"]

    def _root_share(self, step: int) -> float:
        share = min(step / self.warmup_steps, (self.warmup_steps / step) ** 0.5)
        if self.cooldown is not None:
            first, last = self.cooldown
            share *= min(1.0, (last + 1 - step) / (last + 1 - first))
        return share

    def _step(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss.detach()

    def _capture(self, batch: Batch) -> None:
        self._batch = {name: tensor.clone() for name, tensor in batch.items()}
        graph = torch.cuda.CUDAGraph()
        # what is recorded makes the gradients anew, so that each replay overwrites them
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with torch.cuda.graph(graph):
                self._loss = self._step(self._batch)
        except RuntimeError as error:
            print(f"the step is not captured: {str(error).splitlines()[0]}", flush=True)
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            return
        self._graph, self.captured = graph, True
