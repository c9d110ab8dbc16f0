"""What a training run will cost, by formula, before it starts: memory, steps, hours. Estimates, and named so."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.benchmark import Timer
from training_defaults import CHECKPOINTING
from transformers import Trainer
from transformers.utils import logging

from modeling_colt5 import CoLT5Config
from modeling_colt5.dense_start import DenseStart
from modeling_colt5.encoder_costs import encoder_flops, kept_values
from modeling_colt5.kernel_backend import uses_triton

logger = logging.get_logger(__name__)

# What a step reaches of the speed of one large matrix product, forward and backward: base size on an H200 at 16,384
# tokens, 0.25. Smaller models, shorter inputs and slower hosts reach less, cards with less speed more.
REACHED = 0.25
# Seconds that the host takes to launch a layer's kernels, forward and backward, whatever they compute: the mean of a
# dense start and what follows, base and large size, on the host of an H200. Checkpointed layers are launched twice.
HOST_SECONDS = 0.006
# dropout's masks and what is copied for a product come on top of what the formulas count
KEPT_BESIDE = 4 / 3
# the share of a card's memory that an estimate may fill: the rest is for what PyTorch keeps in reserve
HEADROOM = 0.75
# steps of an ordinary fine-tuning: fewer are said
FEW_STEPS = 100


def decoder_flops(config: CoLT5Config, n: int, m: int) -> int:
    """FLOP of the decoder's and the head's matrix products for one row's forward pass; the backward has twice as many.

    Args:
        config: of an encoder-decoder.
        n: tokens of the input.
        m: tokens of the target.
    """
    inner, keys = config.num_heads * config.d_kv, config.num_cross_key_value_heads * config.d_kv
    read = n if config.routed_cross_key_values is None else min(n, config.routed_cross_key_values)
    # where the target's tokens choose for themselves, the whole input is projected, and scored for each of them
    asks = config.asking_cross_routing
    projected = n if asks else read
    layer = (
        4 * m * config.d_model * inner
        + 2 * m * m * inner
        + 2 * m * config.d_model * inner
        + 2 * projected * config.d_model * keys
        + 2 * m * read * inner
        + (m * n * config.d_kv if asks else 0)
        + (3 if config.is_gated_act else 2) * m * config.d_model * config.d_ff
    )
    return 2 * (config.num_decoder_layers * layer + m * config.d_model * config.vocab_size)


def decoder_kept_values(
    config: CoLT5Config, n: int, m: int, fused_attention: bool = True, checkpointed: bool = False
) -> int:
    """How many numbers the decoder and the head keep of one row's forward pass for its backward.

    Args:
        config: of an encoder-decoder.
        n: tokens of the input.
        m: tokens of the target.
        fused_attention: whether PyTorch's attention keeps no attention weights, as on a GPU.
        checkpointed: whether each layer keeps its input, and one at a time the rest.
    """
    inner, keys = config.num_heads * config.d_kv, config.num_cross_key_value_heads * config.d_kv
    read = n if config.routed_cross_key_values is None else min(n, config.routed_cross_key_values)
    hidden = (2 if config.is_gated_act else 1) + 1
    layer = (
        # three sublayers: states and normalised states; then projections, the attention's bias, hidden units
        6 * m * config.d_model + 6 * m * inner + config.num_heads * m * m + 2 * read * keys + hidden * m * config.d_ff
    )
    if config.asking_cross_routing:
        # what each token chose, before its weights and after; scores; keys and values of the whole input
        layer += 4 * m * read * keys + m * n + 2 * n * keys
    if not fused_attention:
        # the scores' softmax; with dropout also its mask and what it leaves
        layer += (3 if config.dropout_rate > 0 else 1) * config.num_heads * m * (m + read)
    # logits in the model's type, in fp32, and their gradient
    head = 5 * m * config.vocab_size
    if checkpointed:
        return head + config.num_decoder_layers * m * config.d_model + layer
    return head + config.num_decoder_layers * layer


@dataclass(frozen=True)
class RowShape:
    """What a row has.

    Attributes:
        inputs: tokens of the input.
        targets: tokens of the target, 0 without a decoder.
    """

    inputs: int
    targets: int = 0


def row_flops(config: CoLT5Config, row: RowShape, dense_share: float | None = None) -> int:
    """FLOP of one row, forward and backward; in a dense start of `dense_share` of its input."""
    is_dense = dense_share is not None
    n = math.ceil((dense_share or 1) * row.inputs)
    return 3 * (
        encoder_flops(config, n, dense=is_dense) + (decoder_flops(config, n, row.targets) if row.targets else 0)
    )


def kept_bytes(
    model: torch.nn.Module,
    row: RowShape,
    rows: int,
    bf16: bool,
    checkpointed: bool,
    dense_share: float | None = None,
) -> int:
    """Bytes that one pass keeps for its backward.

    Args:
        model: a CoLT5 model, or PEFT's around one.
        row: the longest.
        rows: of the pass.
        bf16: whether it computes in bf16.
        checkpointed: whether activations are checkpointed.
        dense_share: in a dense start, the share of the input that is read; None for routed passes.
    """
    config = model.config
    fused = uses_triton(next(model.parameters()), config.kernel_backend) and config._attn_implementation == "sdpa"
    n = math.ceil((dense_share or 1) * row.inputs)
    values = kept_values(config, n, dense=dense_share is not None, fused_attention=fused, checkpointed=checkpointed)
    if row.targets:
        on_gpu = next(model.parameters()).is_cuda
        values += decoder_kept_values(config, n, row.targets, on_gpu, checkpointed)
    return round(KEPT_BESIDE * values * rows * (2 if bf16 else 4))


def weight_bytes(model: torch.nn.Module, bf16: bool) -> int:
    """Bytes of the weights, of the copies that autocast makes of them, and of what training adds to those that are
    trained: gradients, and AdamW's two states."""
    total = 0
    for parameter in model.parameters():
        size = parameter.element_size()
        total += parameter.numel() * (size + 3 * size * parameter.requires_grad + 2 * bf16)
    return total


def product_speed(device: torch.device, bf16: bool) -> float:
    """FLOP a second of one large matrix product on the device, measured now."""
    n = 4096 if device.type == "cuda" else 1024
    matrix = torch.ones(n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    return 2 * n**3 / Timer("matrix @ matrix", globals={"matrix": matrix}).blocked_autorange(min_run_time=0.2).median


def run_memory(trainer: Trainer, rows: Sequence[RowShape], dense_start: DenseStart | None) -> tuple[int, int]:
    """Bytes of weights with what training adds to them, and bytes that the largest pass keeps for its backward.

    Args:
        trainer: ready to train.
        rows: of the training data, or such as they have.
        dense_start: its schedule, None where the run has none.
    """
    arguments, model = trainer.args, trainer.model
    longest = RowShape(max(row.inputs for row in rows), max(row.targets for row in rows))
    shares = [None] if dense_start is None else [None, dense_start.input_share]
    kept = max(
        kept_bytes(
            model,
            longest,
            arguments.per_device_train_batch_size,
            arguments.bf16,
            bool(getattr(arguments, CHECKPOINTING)),
            share,
        )
        for share in shares
    )
    return weight_bytes(model, arguments.bf16), kept


def run_steps(trainer: Trainer) -> tuple[int, int]:
    """Steps of the optimiser in a run, and forward and backward passes of each process in all of them."""
    arguments = trainer.args
    if arguments.max_steps > 0:
        return arguments.max_steps, arguments.max_steps * arguments.gradient_accumulation_steps
    per_epoch = len(trainer.get_train_dataloader())
    steps = math.ceil(arguments.num_train_epochs * math.ceil(per_epoch / arguments.gradient_accumulation_steps))
    return steps, math.ceil(arguments.num_train_epochs * per_epoch)


@dataclass(frozen=True)
class RunCosts:
    """The estimate for one process of a run; printed, it says what it is.

    Attributes:
        steps: of the optimiser.
        passes: forward and backward, in all steps.
        weights: bytes of weights, gradients, the optimiser's state, and copies in bf16.
        kept: bytes that the largest pass keeps for its backward.
        flops: of all passes.
        speed: FLOP a second that the run is taken to reach.
        host: seconds that the host takes for all passes, on a GPU.
        device: its kind.
        checkpointed: whether activations are checkpointed.
    """

    steps: int
    passes: int
    weights: int
    kept: int
    flops: float
    speed: float
    host: float
    device: str
    checkpointed: bool

    @classmethod
    def of(cls, trainer: Trainer, rows: Sequence[RowShape], dense_start: DenseStart | None) -> "RunCosts":
        """The estimate of a run; the arguments are those of `run_memory`."""
        arguments, config = trainer.args, trainer.model.config
        steps, passes = run_steps(trainer)
        flops = sum(row_flops(config, row) for row in rows) / len(rows)
        if dense_start is not None:
            part = dense_start.closed + dense_start.opening
            dense = sum(row_flops(config, row, dense_start.input_share) for row in rows) / len(rows)
            flops = part * dense + (1 - part) * flops
        is_checkpointed = bool(getattr(arguments, CHECKPOINTING))
        # a checkpointed layer is computed twice
        flops *= arguments.per_device_train_batch_size * passes * (4 / 3 if is_checkpointed else 1)
        device = arguments.device
        layers = config.num_layers + (config.num_decoder_layers if any(row.targets for row in rows) else 0)
        host = HOST_SECONDS * layers * passes * (1 + is_checkpointed) if device.type == "cuda" else 0.0
        return cls(
            steps,
            passes,
            *run_memory(trainer, rows, dense_start),
            flops,
            REACHED * product_speed(device, arguments.bf16),
            host,
            torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
            is_checkpointed,
        )

    @property
    def memory(self) -> int:
        """Bytes in all."""
        return self.weights + self.kept

    @property
    def seconds(self) -> float:
        """Of the training, without evaluations: of the GPU or of its host, whichever takes longer."""
        return max(self.flops / self.speed, self.host)

    def __str__(self) -> str:
        gib = 2**30
        return (
            "Estimated by formula; nothing was trained or measured but the speed of one matrix product:\n"
            f"  memory  {self.memory / gib:,.1f} GiB on each device: {self.weights / gib:,.1f} for weights, gradients "
            f"and AdamW, {self.kept / gib:,.1f} for the longest pass"
            f"{' with' if self.checkpointed else ' without'} checkpointing\n"
            f"  steps   {self.steps:,}, of {self.passes:,} passes in all\n"
            f"  hours   {self.seconds / 3600:,.2f} on this {self.device}, or {self.seconds / max(1, self.steps):,.1f} "
            "s a step, without evaluations; expect half to twice as much"
        )


def warn_of_few_steps(trainer: Trainer) -> None:
    """Say so where a run that is told its epochs has too few steps to learn from, and what gives it more."""
    arguments = trainer.args
    if arguments.max_steps > 0:
        return
    steps, _ = run_steps(trainer)
    if steps < FEW_STEPS and trainer.is_world_process_zero():
        advice = f"raise --num_train_epochs from {arguments.num_train_epochs:g}"
        if arguments.gradient_accumulation_steps > 1:
            advice += f", or lower --gradient_accumulation_steps from {arguments.gradient_accumulation_steps}"
        logger.warning(f"The run has {steps} steps, which are few: {advice}")


def decide_costs(
    trainer: Trainer, rows: Sequence[RowShape], dense_start: DenseStart | None, start: Callable[[], dict[str, float]]
) -> Callable[[], dict[str, float]]:
    """Turn checkpointing on where neither it nor its absence was asked for and the GPU's memory would not do without;
    gives what starts the run, or for a dry run what prints its costs.

    Args:
        trainer: ready to train, with arguments that have `TrainingDefaults`.
        rows, dense_start: as for `run_memory`; no rows for an evaluation alone.
        start: trains and evaluates.

    Raises:
        ValueError: for a dry run of an evaluation alone.
    """
    arguments = trainer.args
    if arguments.dry_run and not rows:
        raise ValueError("dry_run estimates a training run, and there are no training rows")
    if rows and arguments.has_own_checkpointing and arguments.device.type == "cuda":
        available = torch.cuda.get_device_properties(arguments.device).total_memory
        if sum(run_memory(trainer, rows, dense_start)) > HEADROOM * available:
            setattr(arguments, CHECKPOINTING, True)
    if rows:
        warn_of_few_steps(trainer)
    if not arguments.dry_run:
        return start

    def estimate() -> dict[str, float]:
        costs = RunCosts.of(trainer, rows, dense_start)
        if trainer.is_world_process_zero():
            print(costs)
        return {"memory": costs.memory, "steps": costs.steps, "seconds": costs.seconds}

    return estimate
