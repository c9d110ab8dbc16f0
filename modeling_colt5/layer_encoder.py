"""An encoder layer as straight lines of kernel launches and products, beside the modules of model_encoder_layer.py.

The modules say what a layer computes. Called one by one, their Python takes the host several times as long as the
kernels take a GPU. A block that nothing looks into (`PlainBlock` of layer_plain.py) therefore runs here: the same
kernels in the same order, without a module, an operator or a view between them.

The first call with certain shapes, dtypes and numbers launches one kernel after another and notes them. From then on
the list is repeated by one call of C (run_launch_list_triton.py), with other tensors' addresses. Without gradients one
such call repeats it for all layers of a stack but the first (`StraightStack`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .kernel_backend import triton_is_available
from .layer_backward import Backward, Gradients
from .layer_forward import Line, attention, combined, feed_forward, parts_of
from .layer_program import WEIGHTS, Drop, PlainEncoderLayer, Program, StraightPass
from .op_dropout import draw_seeds
from .run_operator import check_backward_of_kernels
from .run_plan import EncoderPlan, EncoderSettings

if triton_is_available():
    from .op_routing_triton import kernels_take
    from .run_launch_list_triton import Recorder, calls_to_compute, repeated_or_recorder

# False lets every block run as modules, for a comparison.
enabled = True


def straight_pass(hidden_states: Tensor, settings: EncoderSettings, plan: EncoderPlan) -> StraightPass | None:
    """What the straight lines of a pass have in common; None where every block has to run as modules.

    Whether a single block may run straight is asked later, of the block: by `PlainBlock.read` and `StraightLayer.of`.

    Args:
        hidden_states: [batch, n, d_model], what goes into the first layer.
        settings: of all layers.
        plan: of the pass.
    """
    mode = plan.mode
    may_run = (
        enabled
        and plan.implementation.fuses_attention
        and settings.routing == "learned"
        and plan.dense_start is None
        and mode.takes_straight_lines(hidden_states)
        and kernels_take(hidden_states.shape[1], settings.soft_topk.solver, hidden_states.device)
        and not (mode.keeps_gradients and hidden_states.dtype == torch.float16)
    )
    return StraightPass(hidden_states, plan) if may_run else None


def encoder_plan(
    settings: EncoderSettings,
    hidden_states: Tensor,
    mask: Tensor | None,
    dense_start: Tensor | None = None,
    records_blocks: bool = False,
    width: int | None = None,
) -> EncoderPlan:
    """The plan of a pass, with straight lines where blocks may run as such.

    Args:
        settings: of all layers.
        hidden_states: [batch, n, d_model].
        mask: bool [batch, n], True for real tokens; None for all.
        dense_start: fp32 [], how far a dense start has come; None for the paper's routing.
        records_blocks: whether somebody reads what the blocks return beside the hidden states.
        width: of the grid whose places the tokens are; None for a text.
    """
    plan = EncoderPlan.make(settings, hidden_states, mask, dense_start, width)
    plan.straight = None if records_blocks else straight_pass(hidden_states, settings, plan)
    return plan


class StraightLayer:
    """A plain layer that is about to run as a straight line.

    Args:
        program: sizes and places of its tensors, and its lists of launches.
        weights: in the order of `WEIGHTS`.
        tables: light and heavy bias tables [heads, 2 * max_distance + 1] in fp32.
        plan: of the pass.
        records: whether autograd records.
    """

    __slots__ = ("common", "plan", "program", "records", "tables", "weights")

    def __init__(
        self,
        program: Program,
        weights: tuple[Tensor, ...],
        tables: tuple[Tensor, Tensor],
        plan: EncoderPlan,
        records: bool,
    ):
        self.program, self.weights, self.tables, self.plan, self.records = program, weights, tables, plan, records
        self.common: StraightPass = plan.straight

    @classmethod
    def of(
        cls, layer: PlainEncoderLayer, weights: tuple[Tensor, ...], tables: tuple[Tensor, Tensor], plan: EncoderPlan
    ) -> "StraightLayer | None":
        """The layer for these weights; None where it has to run as modules.

        Args:
            layer, weights: what `PlainBlock.read` gave.
            tables, plan: as above.
        """
        common: StraightPass = plan.straight
        # Asked for each block, not once a pass: gradient checkpointing runs a block without gradients first.
        records = torch.is_grad_enabled()
        drops = any(layer.drops) and (not records or max(layer.drops) >= 1)
        program = None if drops else Program.of(common, layer, weights, tables)
        read = (*weights, *tables)
        if (
            program is None
            or not common.is_readable
            or not all(map(Tensor.is_contiguous, read))
            or set(map(Tensor.get_device, read)) != {common.device_index}
        ):
            return None
        return cls(program, weights, tables, plan, records)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """From states to states [batch, n, d_model], for a backward pass where autograd records."""
        if not self.records:
            return StraightStack(self, hidden_states).states()
        # `Function.apply` would look through the arguments for what torch.func left behind.
        return _apply(self, hidden_states, *self.tables, *self.weights)


class StraightStack:
    """Layers of one program without gradients, one after another, the first of which is computed when this is made.

    Each layer leaves a sum to the norm of the next: its branches, and what they are to be added to. All write theirs
    into one memory.

    Args:
        first: the first layer, which begins with states, and not with a sum.
        hidden_states: what goes into it, [batch, n, d_model].
    """

    def __init__(self, first: StraightLayer, hidden_states: Tensor):
        self.first, self.program, self.shape = first, first.program, hidden_states.shape
        self.memory = self.program.outgoing.take(self.program.device)
        self._run("states", [first], hidden_states.contiguous())

    def add(self, read: Sequence[tuple[PlainEncoderLayer, tuple[Tensor, ...]]]) -> bool:
        """Compute the layers that follow, of which `PlainStack.read` gave these; False, and nothing is computed, where
        one of them is of another program."""
        layers: list[StraightLayer] = []
        for layer, weights in read:
            line = StraightLayer.of(layer, weights, self.first.tables, self.first.plan)
            if line is None or line.program is not self.program:
                return False
            layers.append(line)
        self._run("sum", layers)
        return True

    def states(self) -> Tensor:
        """What the last layer gives, [batch, n, d_model]."""
        program = self.program
        total = torch.empty(self.shape, dtype=program.hidden_dtype, device=program.device)
        recorder = repeated_or_recorder(program.lists, "total", [[self.memory, total]], self.first.common.repeats)
        if recorder is not None:

            def compute() -> None:
                line = Line(self.first, recorder, program.outgoing, self.memory)
                combined(line, parts_of(line), total, Drop.FEED_FORWARD)

            recorder(compute)
        return total

    def _run(self, kind: str, layers: Sequence[StraightLayer], states: Tensor | None = None) -> None:
        program, common = self.program, self.first.common
        read = common.read if states is None else [*common.read, states]
        calls = [[self.memory, *layer.tables, *layer.weights, *read] for layer in layers]
        for number, recorder in calls_to_compute(program.lists, kind, calls, common.repeats):
            recorder(partial(self._compute, layers[number], recorder, states))

    def _compute(self, layer: StraightLayer, recorder: "Recorder", states: Tensor | None) -> None:
        line = Line(layer, recorder, self.program.outgoing, self.memory)
        feed_forward(line, [*attention(line, states)])


def _compute_with_gradients(
    layer: StraightLayer,
    kind: Any,
    memories: list[Tensor],
    kept: Tensor,
    seeds: Sequence[Tensor],
    compute: Callable[[Line], object],
    later: Callable[[Line], object] | None = None,
) -> None:
    """Compute a call of a layer that autograd records, or its gradient, or repeat its list of launches.

    Args:
        layer: whose call it is.
        kind, memories: as of `repeated_or_recorder`; `memories` is one call's.
        kept: the memory of what the backward pass reads, one of the memories.
        seeds: of what the layer drops; none where it drops nothing.
        compute: launches what computes the call.
        later: launches what comes after the call, for a rehearsal.
    """
    recorder = repeated_or_recorder(layer.program.lists, kind, [memories], layer.common.repeats)
    if recorder is not None:

        def new_line() -> Line:
            # a line is changed by what it computes
            return Line(layer, recorder, layer.program.kept, kept, *seeds)

        recorder(lambda: compute(new_line()), later and (lambda: later(new_line())))


def _tables_like(layer: StraightLayer, needs: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Where the gradients of light and heavy table are written; None for each that is not wanted."""
    light, heavy = (
        torch.empty_like(table) if needed else None for table, needed in zip(layer.tables, needs, strict=True)
    )
    return light, heavy


class _Straight(torch.autograd.Function):
    """The layer from states to states, and its gradient."""

    @staticmethod
    def forward(ctx: Any, layer: StraightLayer, hidden_states: Tensor, *inputs: Tensor) -> Tensor:
        program = layer.program
        states = hidden_states.contiguous()
        kept = program.kept.take(program.device)
        result = torch.empty(states.shape, dtype=program.hidden_dtype, device=program.device)
        seeds = [draw_seeds(len(program.drops), program.device)] if any(program.drops) else []
        memories = [states, *inputs, *layer.common.read, kept, result, *seeds]

        def compute(line: Line) -> None:
            combined(line, feed_forward(line, [*attention(line, states)]), result, Drop.FEED_FORWARD)

        def gradient(line: Line) -> None:
            needs = ctx.needs_input_grad
            gradients = Gradients(program, layer.weights, needs[4:])
            Backward(line, gradients, _tables_like(layer, needs[2:4])).run(result, states, torch.empty_like(states))

        # A layer that drops is being trained: its gradient will be asked for.
        _compute_with_gradients(layer, "training", memories, kept, seeds, compute, gradient if seeds else None)
        ctx.set_materialize_grads(False)
        ctx.layer = (program, layer.plan)
        ctx.save_for_backward(states, *inputs, kept, *seeds)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        check_backward_of_kernels("encoder_layer", (grad,))
        # The inputs are the layer, its states, two tables, and the weights.
        if grad is None:
            return (None,) * (4 + len(WEIGHTS))
        program, plan = ctx.layer
        saved = [part if part.is_contiguous() else part.contiguous() for part in (grad, *ctx.saved_tensors)]
        grad, states, light_table, heavy_table = saved[:4]
        weights = saved[4 : 4 + len(WEIGHTS)]
        kept, *seeds = saved[4 + len(WEIGHTS) :]
        needs = ctx.needs_input_grad
        layer = StraightLayer(program, tuple(weights), (light_table, heavy_table), plan, True)
        out = torch.empty_like(states)
        gradients = Gradients(program, weights, needs[4:])
        light, heavy = _tables_like(layer, needs[2:4])
        memories = [*saved, *layer.common.read, out, *gradients.memories]
        memories += [table for table in (light, heavy) if table is not None]

        def compute(line: Line) -> None:
            Backward(line, gradients, (light, heavy)).run(grad, states, out)

        _compute_with_gradients(layer, needs[2:], memories, kept, seeds, compute)
        return None, out, light, heavy, *gradients.wanted()


_apply = super(torch.autograd.Function, _Straight).apply
