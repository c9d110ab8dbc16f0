"""Train the model that knows a Python module's types, on one GPU or several of a machine, in a given time.

    cd examples
    python -m python_types.train --prepare ../build/python_types --tokens ../build/types
    torchrun --nproc-per-node 4 -m python_types.train --tokens ../build/types --corpus ../build/python_types \
        --out ../build/types/run --minutes 60

The first command tokenises what corpus.py wrote. The second trains: it writes the weights to `--out` every few
minutes, and all that is needed to go on to `--state`; started again it goes on there. At the end it asks the model for
the types of the held-out modules (evaluate.py), and the tables come to `--out`.

A step is two CUDA graphs, one to the gradients and one for the optimizer, because so small a model keeps a GPU
waiting for Python. What a step does depends on how much of the time is gone: a dense start (docs/routers.md) on inputs
that grow longer, because the decoder finds its sentinel among few tokens first, then the paper's routing on long ones;
the learning rate falls to zero at the end.
"""

import json
import lzma
import os
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import torch
from python_types.evaluate import (
    SHARES,
    answered,
    question_of,
    read_records,
    tasks_of,
    write_records,
    write_summary,
)
from python_types.first_weights import looking_from_the_start
from python_types.predict import predict_all
from python_types.renaming import Renaming
from python_types.retyping import Retyping
from python_types.training_rows import IGNORED, TASKS, Batches, load_tokens, prepare, shapes_of
from python_types.weights import load_weights, save_weights
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from modeling_colt5 import CoLT5Config, CoLT5ForConditionalGeneration, CoLT5Tokenizer
from modeling_colt5.dense_start import DenseStart
from modeling_colt5.parameter_groups import size_scaled_groups

VOCABULARY = Path(__file__).resolve().parents[2] / "tokenization/python_stdlib"
# a multiple of 64 that holds the vocabulary
VOCAB_SIZE = 8128
# steps between looks at the clock, at most, and seconds
BETWEEN_CLOCKS = 20
SECONDS_BETWEEN_CLOCKS = 2.0
# steps of a kind before its graph is made: kernels are compiled and the optimizer's state is there by then
STEPS_BEFORE = 3
# steps before the clock of the schedule starts: the first ones compile
COMPILING_STEPS = 10
# for the last saving, and the held-out loss after it
SAVING_SECONDS = 8.0
# for the evaluation's tables, and a batch that takes longer than those before
SUMMARY_SECONDS = 15.0
SECONDS_BETWEEN_LINES = 10.0
HELD_OUT_BATCHES = 2
ROUTED = "routed"

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """The model: 15 M parameters, which are 31 MB in bf16."""

    d_model: int = field(default=256, metadata={"help": "width"})
    d_kv: int = field(default=32, metadata={"help": "width of a head"})
    num_layers: int = field(default=6, metadata={"help": "encoder layers"})
    num_decoder_layers: int = field(default=2, metadata={"help": "decoder layers"})
    num_heads: int = field(default=8, metadata={"help": "heads of the decoder, and of both branches together"})
    num_light_heads: int = field(default=2, metadata={"help": "heads of the light branch"})
    light_d_ff: int = field(default=384, metadata={"help": "inner width of the light feed-forward"})
    heavy_d_ff: int = field(default=1664, metadata={"help": "inner width of the heavy feed-forward"})
    d_ff: int = field(default=768, metadata={"help": "inner width of the decoder's feed-forward"})
    budget: int = field(default=16, metadata={"help": "one query among so many tokens; keys/values twice as many"})
    routing: str = field(default="learned", metadata={"help": "learned, even, random or none"})
    dropout: float = field(default=0.0, metadata={"help": "dropout"})

    def config(self) -> CoLT5Config:
        """The configuration. The head is tied, and each head of cross-attention has its own keys and values: with a
        single one so small a model learns to copy late."""
        return CoLT5Config(
            vocab_size=VOCAB_SIZE,
            d_model=self.d_model,
            d_kv=self.d_kv,
            d_ff=self.d_ff,
            num_layers=self.num_layers,
            num_decoder_layers=self.num_decoder_layers,
            num_heads=self.num_heads,
            num_light_heads=self.num_light_heads,
            num_heavy_heads=self.num_heads - self.num_light_heads,
            num_cross_key_value_heads=self.num_heads,
            light_d_ff=self.light_d_ff,
            heavy_d_ff=self.heavy_d_ff,
            routed_query_fraction=1 / self.budget,
            routed_key_value_fraction=2 / self.budget,
            routed_feed_forward_fraction=1 / self.budget,
            routing=self.routing,
            dropout_rate=self.dropout,
            tie_word_embeddings=True,
            scale_decoder_outputs=True,
        )


@dataclass
class Arguments:
    """How to train."""

    tokens: Path = field(metadata={"help": "folder of tokens.npz.xz and baselines.json"})
    prepare: Path | None = field(default=None, metadata={"help": "make them from the corpus in this folder, and stop"})
    processes: int = field(default=2, metadata={"help": "processes that tokenise, beside each that trains"})
    corpus: Path | None = field(
        default=None, metadata={"help": "corpus.py's folder, for the evaluation at the end; default: none"}
    )
    out: Path = field(default=Path("out"), metadata={"help": "folder of weights, log and evaluation"})
    state: Path | None = field(default=None, metadata={"help": "what a run goes on from; default: state.pt in --out"})
    initial: Path | None = field(
        default=None,
        metadata={
            "help": "folder of a checkpoint, or an earlier run's weights, to begin with, where there is no --state"
        },
    )
    minutes: float = field(default=60.0, metadata={"help": "of the whole command, the evaluation included"})
    started: float | None = field(
        default=None, metadata={"help": "when they began, in seconds of `date +%%s`; default: when the program began"}
    )
    evaluation_minutes: float = field(default=2.0, metadata={"help": "of these, for the evaluation"})
    steps: int | None = field(default=None, metadata={"help": "steps in all, instead of the time for training"})
    save_minutes: float = field(default=2.0, metadata={"help": "between two savings"})
    learning_rate: float = field(default=2e-2, metadata={"help": "the highest, relative to each parameter's size"})
    warmup_steps: int = field(default=300, metadata={"help": "steps of rising learning rate"})
    encoder_loss: float = field(default=1.0, metadata={"help": "weight of the encoder's own loss at the sentinels"})
    batch_tokens: int = field(default=16_384, metadata={"help": "tokens of a step in each process"})
    start_lengths: list[int] = field(
        default_factory=lambda: [256, 1024, 4096],
        metadata={"help": "tokens of an input in equal parts of the dense start, one after the other"},
    )
    lengths: list[int] = field(
        default_factory=lambda: [2048, 4096, 8192, 16_384], metadata={"help": "tokens of an input afterwards"}
    )
    closed: float = field(default=0.4, metadata={"help": "the dense start's `closed`"})
    opening: float = field(default=0.1, metadata={"help": "the dense start's `opening`"})
    start_types: float = field(default=0.5, metadata={"help": "share of the batches of types in the dense start"})
    types: float = field(default=0.75, metadata={"help": "share of the batches of types afterwards"})
    renamed: float = field(default=0.5, metadata={"help": "share of the inputs that get other words (renaming.py)"})
    retyped: float = field(
        default=0.0, metadata={"help": "share of the inputs of types afterwards that get other types (retyping.py)"}
    )
    graphs: bool = field(default=True, metadata={"help": "whether steps are CUDA graphs, on a GPU"})
    seed: int = field(default=0, metadata={"help": "of weights, order, what is hidden, dropout"})


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls) -> "Processes":
        """By torchrun's environment, or alone."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        if world > 1:
            on_gpu = device.type == "cuda"
            torch.distributed.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
        return cls(rank, world, device)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the processes, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
            tensor /= self.world
        return tensor

    def of_first(self, number: float) -> float:
        """The first process's number, for all: a decision by the clock has to be one."""
        if self.world == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(tensor, 0)
        return tensor.item()

    def leave(self) -> None:
        """Wait for all, and work alone from then on."""
        if self.world > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def autocast(device: torch.device) -> AbstractContextManager:
    """bf16 on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class TrainingStep:
    """Loss, gradients, their mean over the processes, clipped at 1, and AdamW; on a GPU replayed as CUDA graphs.

    Gradients lie in one tensor, which is what the processes exchange. Every kind of step, by its shape and phase, has
    a graph of its own; the exchange is between two graphs, in none. Where capturing fails the step stays as it is.

    Args:
        model: in training mode, on the device of its batches.
        learning_rate: the highest, relative to each parameter's size.
        processes: with whom to train.
        sentinels: the sentinels' ids, int64 [sentinels].
        encoder_loss: the weight of the encoder's own loss (`encoder_loss_at_sentinels`).
        graphs: whether to make graphs.
    """

    def __init__(
        self,
        model: CoLT5ForConditionalGeneration,
        learning_rate: float,
        processes: Processes,
        sentinels: Tensor,
        encoder_loss: float,
        graphs: bool = True,
    ):
        self.model, self.processes, self.device = model, processes, processes.device
        self.sentinels, self.encoder_loss = sentinels, encoder_loss
        parameters = list(model.parameters())
        self.gradients = torch.zeros(sum(map(torch.numel, parameters)), device=self.device)
        for parameter, gradient in zip(parameters, self.gradients.split([*map(torch.numel, parameters)]), strict=True):
            parameter.grad = gradient.view_as(parameter)
        groups = size_scaled_groups(model, learning_rate)
        self.rates = [group["lr"] for group in groups]
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            for group in groups:
                # a number would be recorded as it was
                group["lr"] = torch.tensor(group["lr"], device=self.device)
        self.optimizer = torch.optim.AdamW(
            groups, betas=(0.9, 0.99), weight_decay=0.0, fused=on_gpu, capturable=on_gpu
        )
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self.batches: dict[Hashable, Batch] = {}
        self.results: dict[Hashable, Tensor] = {}
        self.counts: dict[Hashable, int] = defaultdict(int)
        self.stream = torch.cuda.Stream(self.device) if on_gpu and graphs else None
        self.pool = torch.cuda.graph_pool_handle() if on_gpu else None

    def __call__(self, batch: Batch, phase: Hashable, share: float) -> Tensor:
        """Do a step, and give the losses before it, the decoder's and the encoder's, [2] on the device.

        Args:
            batch: the input, on the device; of a kind of step always with the same shapes.
            phase: what else the step's kind depends on.
            share: of the highest learning rate.
        """
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * share)
            else:
                group["lr"] = rate * share
        loss = self._run((phase, *batch["input_ids"].shape), self._gradients, batch)
        self.processes.mean(self.gradients)
        self._run("update", self._update, {})
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, and the highest rates, which are of the sizes at the run's beginning."""
        return {"optimizer": self.optimizer.state_dict(), "rates": self.rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from it."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            # a graph reads this very tensor
            group["lr"] = rate
        self.rates = state["rates"]

    def _run(self, kind: Hashable, do: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        if self.stream is None:
            return do(batch)
        self.counts[kind] += 1
        if self.counts[kind] == STEPS_BEFORE + 1:
            self._capture(kind, do, batch)
        if kind in self.graphs:
            for name, tensor in self.batches[kind].items():
                tensor.copy_(batch[name], non_blocking=True)
            self.graphs[kind].replay()
            # another graph of the pool may write where this one's result is
            return self.results[kind].clone()
        # on a stream of its own, as what is to be captured later must be
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = do(batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def _capture(self, kind: Hashable, do: Any, batch: Batch) -> None:
        started = time.monotonic()
        self.batches[kind] = {name: tensor.clone() for name, tensor in batch.items()}
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads, such as NCCL's, may go on calling the GPU
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.results[kind] = do(self.batches[kind])
        except RuntimeError as error:
            print(f"{kind} is not captured: {str(error).splitlines()[0]}", flush=True)
            torch.cuda.synchronize()
            return
        self.graphs[kind] = graph
        if self.processes.rank == 0:
            print(f"{kind} captured in {time.monotonic() - started:.1f} s", flush=True)

    def _gradients(self, batch: Batch) -> Tensor:
        self.gradients.zero_()
        with autocast(self.device):
            outputs = self.model(**batch, use_cache=False)
            of_encoder = encoder_loss_at_sentinels(
                self.model, outputs.encoder_last_hidden_state, batch["input_ids"], batch["labels"], self.sentinels
            )
        (outputs.loss + self.encoder_loss * of_encoder).backward()
        return torch.stack([outputs.loss.detach(), of_encoder.detach()])

    def _update(self, batch: Batch) -> Tensor:
        norm = self.gradients.norm()
        self.gradients.mul_((1 / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        return norm


def encoder_loss_at_sentinels(
    model: CoLT5ForConditionalGeneration, states: Tensor, input_ids: Tensor, labels: Tensor, sentinels: Tensor
) -> Tensor:
    """What the encoder alone knows of the first hidden token at each sentinel: the mean cross-entropy, a scalar.

    Without it a new model learns in a circle: the decoder has no use for a sentinel's place before the encoder has
    written there what is missing, and the encoder has no reason to write it before the decoder looks.

    Args:
        model: its head turns the encoder's states into logits, as it does with the decoder's.
        states: the encoder's output, [rows, length, d_model].
        input_ids: int64 [rows, length].
        labels: a sentinel, the tokens that it hides, the next sentinel, ..., int64 [rows, target_length].
        sentinels: their ids, int64 [sentinels].
    """
    most = min(len(sentinels), labels.shape[1] // 2)
    # `torch.isin` waits for the GPU, which a graph cannot
    is_sentinel = (input_ids[:, :, None] == sentinels).any(2)
    # the places of the sentinels come first
    places = is_sentinel.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
    asked = input_ids.gather(1, places)
    answers = asked[:, :, None] == labels[:, None, :-1]
    found = answers.any(2) & is_sentinel.gather(1, places)
    first = labels.gather(1, answers.byte().argmax(2) + 1).masked_fill(~found, IGNORED)
    at_sentinels = states.gather(1, places[:, :, None].expand(-1, -1, states.shape[-1]))
    logits = model.lm_head(at_sentinels * model.config.d_model**-0.5)
    total = nn.functional.cross_entropy(logits.flatten(0, 1).float(), first.flatten(), reduction="sum")
    return total / (first != IGNORED).sum().clamp(min=1)


@dataclass
class Progress:
    """How far a run has come; saved with it.

    Attributes:
        step: steps done.
        seconds: of training, without the first steps, which compile.
        taken: batches that have been read of each phase: a length of the dense start, or "routed".
    """

    step: int = 0
    seconds: float = 0.0
    taken: dict[str, int] = field(default_factory=dict)


def learning_rate_share(step: int, share: float, warmup_steps: int) -> float:
    """Of the highest learning rate: it rises over the first steps, and falls in a line to zero at the end.

    Args:
        step: steps done.
        share: how much of the run is over.
        warmup_steps: steps of rising rate.
    """
    return min(1.0, (step + 1) / warmup_steps) * max(0.0, 1.0 - share)


def rounded(value: Any) -> Any:
    """The same with floats of four digits, for lines that are read."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def with_sentinels_moved(batch: Batch, sentinels: Tensor) -> Batch:
    """The batch with each row's first sentinel in the place of its second, and so on; the last in the first's."""
    ids = batch["input_ids"].clone()
    for row in ids:
        places = torch.isin(row, sentinels).nonzero()[:, 0]
        row[places] = row[places.roll(1)]
    return batch | {"input_ids": ids}


def describe_routing(outputs: Any, batch: Batch, sentinels: Tensor) -> dict[str, list[list[float]]]:
    """What the routers of the encoder choose: for each kind, and each layer in order, the mean weight, the share of
    weights at 1, and the share of the sentinels that are routed."""
    asked = torch.isin(batch["input_ids"], sentinels)
    described: dict[str, list[list[float]]] = {}
    for layer in outputs.encoder_routing or ():
        for kind in ("query", "key_value", "feed_forward"):
            tokens = getattr(layer, kind)
            if tokens is None:
                continue
            weights = tokens.weights[tokens.valid]
            chosen = torch.zeros_like(batch["input_ids"]).scatter_add(1, tokens.indices, tokens.valid.long()) > 0
            numbers = [weights.mean(), (weights >= 1).float().mean(), chosen[asked].float().mean()]
            described.setdefault(kind, []).append([round(float(number), 2) for number in numbers])
    return described


class Training:
    """A run: model, step, batches, clock, and what is written of it.

    Args:
        arguments: the run's.
        size: the model's.
        processes: who trains together.
        ends: when training has to be over, in seconds of `time.time`.
    """

    def __init__(self, arguments: Arguments, size: Size, processes: Processes, ends: float):
        self.arguments, self.processes, self.ends = arguments, processes, ends
        self.state = arguments.state or arguments.out / "state.pt"
        self.progress = Progress()
        torch.manual_seed(arguments.seed)
        with processes.device:
            self.model = looking_from_the_start(CoLT5ForConditionalGeneration(size.config())).train()
        self.tokenizer = CoLT5Tokenizer.from_pretrained(VOCABULARY)
        self.sentinels = torch.tensor(self.tokenizer.get_sentinel_token_ids(), device=processes.device)
        # before other weights come: rates are relative to the sizes that parameters begin with
        self.step = TrainingStep(
            self.model,
            arguments.learning_rate,
            processes,
            self.sentinels,
            arguments.encoder_loss,
            arguments.graphs,
        )
        if arguments.initial is not None:
            earlier, _ = load_weights(arguments.initial)
            self.model.load_state_dict(earlier.state_dict())
            self.model.config.routers_trained = earlier.config.routers_trained
        is_learned = size.routing == "learned" and not self.model.config.routers_trained
        self.schedule = DenseStart(arguments.closed, arguments.opening) if is_learned else None
        self.splits = load_tokens(arguments.tokens / "tokens.npz.xz")
        self.resume()
        # processes begin with the same weights, and drop different ones of their states
        torch.manual_seed(arguments.seed + 1000 * processes.rank + self.progress.step)
        self.phase = ""
        self.batches: Iterator[tuple[str, Batch]] = iter(())
        self.losses: list[tuple[str, Tensor]] = []
        self.read = 0

    def say(self, **numbers: Any) -> None:
        """A line of the log, by the first process."""
        if self.processes.rank == 0:
            line = json.dumps(rounded(numbers))
            print(line, flush=True)
            with (self.arguments.out / "log.jsonl").open("a") as log:
                log.write(line + "\n")

    def loader(self, phase: str) -> Iterator[tuple[str, Batch]]:
        """The phase's batches from where the run is, made ahead by other processes."""
        arguments, taken = self.arguments, self.progress.taken.setdefault(phase, 0)
        is_start = phase != ROUTED
        batches = Batches(
            self.splits["train"],
            shapes_of([int(phase)] if is_start else arguments.lengths, arguments.batch_tokens),
            arguments.start_types if is_start else arguments.types,
            self.sentinels.tolist(),
            # other batches in each phase
            100 * arguments.seed + (arguments.start_lengths.index(int(phase)) if is_start else 99),
            self.processes.rank,
            renaming=Renaming(self.tokenizer),
            renamed=arguments.renamed,
            retyping=Retyping(self.tokenizer),
            retyped=0.0 if is_start else arguments.retyped,
        )
        order, workers = range(taken, len(batches)), min(3, os.cpu_count() or 1)
        return iter(DataLoader(batches, batch_size=None, sampler=order, num_workers=workers, prefetch_factor=8))

    def resume(self) -> None:
        """Go on where the state was saved, if there is one."""
        # as the first process sees it: all go on from there, or all begin, however late one of them looks
        if not self.processes.of_first(self.state.exists()):
            return
        saved = torch.load(self.state, map_location=self.processes.device, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.step.load_state_dict(saved["step"])
        self.progress = Progress(**saved["progress"])
        self.say(resumed=asdict(self.progress))

    def save(self) -> None:
        """Weights, and the state, by the first process; each file whole or not at all."""
        if self.processes.rank:
            return
        started = time.time()
        about = {name: getattr(self.arguments, name) for name in ("seed", "start_lengths", "lengths")}
        save_weights(self.model, self.arguments.out, asdict(self.progress) | about)
        state = {"model": self.model.state_dict(), "step": self.step.state_dict(), "progress": asdict(self.progress)}
        unfinished = self.state.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(self.state)
        self.say(saved=self.progress.step, took=time.time() - started)

    def one(self, share: float) -> None:
        """A step, where so much of the run is over."""
        progress = self.progress
        # a finished run that is given more time has no second dense start
        if self.schedule is None or ROUTED in progress.taken:
            start = None
        else:
            start = self.schedule.progress(int(share * 10**6), 10**6)
        phase = ROUTED
        if self.schedule is not None and start is not None:
            lengths, ends = self.arguments.start_lengths, self.schedule.closed + self.schedule.opening
            phase = str(lengths[min(int(share / ends * len(lengths)), len(lengths) - 1)])
        if phase != self.phase:
            # the processes of the last one end with it
            self.phase, self.batches = phase, self.loader(phase)
        if self.schedule is not None:
            self.model.set_dense_start(start)
            self.model.config.routers_trained = start is None
        task, batch = next(self.batches)
        progress.taken[phase] += 1
        self.read += int(batch["attention_mask"].sum())
        batch = {name: tensor.to(self.processes.device, non_blocking=True) for name, tensor in batch.items()}
        rate = learning_rate_share(progress.step, share, self.arguments.warmup_steps)
        self.losses.append((task, self.step(batch, phase, rate)))
        progress.step += 1

    def mean_losses(self) -> dict[str, float]:
        """The mean of each task's losses since the last call, and the encoder's; waits for the GPU."""
        sums = torch.zeros(len(TASKS), 3, device=self.processes.device)
        for task, losses in self.losses:
            sums[TASKS.index(task)] += torch.cat([losses, torch.ones_like(losses[:1])])
        self.losses.clear()
        means: dict[str, float] = {}
        for task, (total, of_encoder, count) in zip(TASKS, self.processes.mean(sums).tolist(), strict=True):
            if count:
                means |= {f"loss_{task}": total / count, f"encoder_{task}": of_encoder / count}
        return means

    def run(self) -> None:
        """Train until the steps are done, or the time is over."""
        arguments, progress, processes = self.arguments, self.progress, self.processes
        # seconds of training of the whole run, and of a step
        total = processes.of_first(progress.seconds + self.ends - time.time())
        began, pace, chunk, told = 0.0, 0.0, COMPILING_STEPS, time.time()
        # of the state that is saved: seconds for the clock, steps to know whether any came after
        saved, saved_step = progress.seconds, progress.step

        def share(seconds: float) -> float:
            done = progress.step / arguments.steps if arguments.steps else seconds / max(1e-9, total)
            return min(1.0, done)

        while share(progress.seconds) < 1:
            steps = chunk if arguments.steps is None else min(chunk, arguments.steps - progress.step)
            for number in range(steps):
                self.one(share(progress.seconds + number * pace))
            losses, now = self.mean_losses(), time.time()
            if chunk == COMPILING_STEPS:
                # the first steps compile: they are not counted
                chunk, began = 1, now - progress.seconds
                total = processes.of_first(progress.seconds + self.ends - now)
            else:
                seconds = processes.of_first(now - began)
                pace, progress.seconds = (seconds - progress.seconds) / steps, seconds
                chunk = max(1, min(BETWEEN_CLOCKS, int(SECONDS_BETWEEN_CLOCKS / max(1e-9, pace))))
            if processes.of_first(now - told) > SECONDS_BETWEEN_LINES:
                speed, self.read, told = self.read * processes.world / (now - told), 0, now
                done = {"step": progress.step, "seconds": progress.seconds, "share": share(progress.seconds)}
                self.say(**done, tokens_per_second=int(speed), milliseconds=1000 * pace, **losses)
            if progress.seconds - saved > 60 * arguments.save_minutes:
                self.save()
                self.held_out()
                saved, saved_step = progress.seconds, progress.step
        self.say(step=progress.step, seconds=progress.seconds, share=share(progress.seconds))
        # not whether the file exists: the first process may have written it by now, and all have to go the same way
        if progress.step > saved_step:
            self.save()
            self.held_out()

    @torch.no_grad()
    def held_out(self) -> None:
        """A line on packages that are not trained on, 30 % of their annotations hidden: the loss, the share of types'
        tokens that are right after the right ones, the same where the input's sentinels have changed places, and what
        the routers do. As long as the two shares are equal, the decoder does not look where its sentinel is."""
        shapes = shapes_of(self.arguments.lengths[-1:], self.arguments.batch_tokens)
        device, sentinels = self.processes.device, self.sentinels
        self.model.eval()
        numbers: dict[str, Any] = {"held_out": self.progress.step}
        for split in sorted(set(self.splits) - {"train"}):
            batches = Batches(self.splits[split], shapes, 1.0, sentinels.tolist(), 0, self.processes.rank, SHARES[0])
            sums = torch.zeros(4, device=device)
            for number in range(HELD_OUT_BATCHES):
                batch = {name: tensor.to(device) for name, tensor in batches[number][1].items()}
                with autocast(device):
                    outputs = self.model(**batch, use_cache=False, output_routing=True)
                labels = batch["labels"]
                is_type = (labels >= 0) & ~torch.isin(labels, sentinels)
                is_right = outputs.logits.argmax(-1) == labels
                right = is_right[is_type].float().mean()
                with autocast(device):
                    logits = self.model(**with_sentinels_moved(batch, sentinels), use_cache=False).logits
                moved = (logits.argmax(-1) == labels)[is_type].float().mean()
                sums += torch.stack([outputs.loss, right, moved, torch.ones_like(outputs.loss)])
            loss, right, moved, count = self.processes.mean(sums).tolist()
            numbers[split] = {"loss": loss / count, "tokens": right / count, "moved": moved / count}
        numbers["routing"] = describe_routing(outputs, batch, sentinels)
        self.model.train()
        self.say(**numbers)


def evaluate(arguments: Arguments, processes: Processes, pool: Any, deadline: float) -> None:
    """Ask for the types of the held-out modules, each process for its part of them, and write the tables.

    Args:
        arguments: the run's.
        processes: this one's number among all.
        pool: processes that hide and tokenise.
        deadline: of `time.monotonic`; what is not answered by then is left out.
    """
    folder = (arguments.state or arguments.out / "state.pt").parent
    files = [folder / f"records-{rank}.jsonl" for rank in range(processes.world)]
    mine = files[processes.rank]
    ended = [file.with_suffix(".ended") for file in files]
    try:
        model, _ = load_weights(arguments.out)
        tokenizer = CoLT5Tokenizer.from_pretrained(VOCABULARY)
        ask = partial(predict_all, model.to(processes.device), tokenizer)
        baselines = json.loads((arguments.tokens / "baselines.json").read_text())
        tasks = tasks_of(arguments.corpus, SHARES)[processes.rank :: processes.world]
        questions = pool.imap(partial(question_of, arguments.tokens / "baselines.json", VOCABULARY), tasks)
        write_records(mine, answered(ask, questions, baselines["common"], deadline))
    except Exception:
        # the weights are there, and so is what was answered before
        traceback.print_exc()
    ended[processes.rank].touch()
    if processes.rank:
        return
    while not all(file.exists() for file in ended) and time.monotonic() < deadline + SUMMARY_SECONDS / 2:
        time.sleep(0.2)
    records = read_records(file for file in files if file.exists())
    if records:
        write_summary(arguments.out, records)
        with lzma.open(arguments.out / "records.jsonl.xz", "wt", encoding="utf-8") as packed:
            packed.writelines(json.dumps(asdict(record)) + "\n" for record in records)


def main(argv: list[str] | None = None) -> None:
    """Prepare; or train, and evaluate."""
    now = time.time()
    size, arguments = HfArgumentParser((Size, Arguments), description=__doc__).parse_args_into_dataclasses(argv)
    if arguments.prepare is not None:
        prepare(arguments.prepare, VOCABULARY, arguments.tokens, arguments.processes)
        return
    ends = (arguments.started or now) + 60 * arguments.minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    # before the GPU is touched, which a fork would not survive
    pool = Pool(arguments.processes) if arguments.corpus else None
    processes = Processes.join()
    is_evaluated = pool is not None
    for_training = ends - SAVING_SECONDS - (60 * arguments.evaluation_minutes if is_evaluated else 0.0)
    state = arguments.state or arguments.out / "state.pt"
    (state.parent / f"records-{processes.rank}.ended").unlink(missing_ok=True)
    Training(arguments, size, processes, for_training).run()
    processes.leave()
    if pool is not None:
        if processes.device.type == "cuda":
            torch.cuda.empty_cache()
        evaluate(arguments, processes, pool, time.monotonic() + ends - SUMMARY_SECONDS - time.time())
        pool.terminate()


if __name__ == "__main__":
    main(sys.argv[1:])
