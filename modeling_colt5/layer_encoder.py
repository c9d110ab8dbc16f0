"""An encoder layer as straight lines of kernel launches and products, beside the modules of model_encoder.py.

The modules say what a layer computes. Called one by one, their Python takes the host several times as long as the
kernels take a GPU. So a block that nobody looks into (`PlainBlock` of layer_plain.py) runs here: the same kernels in
the same order, without a module, an operator or a view between them.

The first call of a kind, which is one of its shapes, dtypes and numbers, launches one kernel after another and notes
them. From then on the list is repeated by one call of C (run_launch_list_triton.py), with other tensors' addresses.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .kernel_backend import Mode, triton_is_available
from .layer_backward import Backward, Gradients
from .layer_forward import Line, attention, combined, feed_forward, parts_of, sum_of_all
from .layer_program import WEIGHTS, PlainEncoderLayer, Program, Room, StraightPass
from .op_dropout import draw_seeds
from .run_operator import refuse_derivatives_of_kernels

if triton_is_available():
    from .op_routing_triton import kernels_take
    from .run_launch_list_triton import Recorder

# False lets every block run as modules, for a comparison
enabled = True


def may_run_straight(hidden_states: Tensor, solver: str, mode: Mode) -> bool:
    """Whether the blocks of this pass may run as straight lines, as far as that is not a block's own matter.

    Args:
        hidden_states: [batch, n, d_model], what goes into the first layer.
        solver: of the soft top-k.
        mode: of the pass.
    """
    return (
        enabled
        and mode.is_eager
        and not mode.is_watched
        and type(hidden_states) in (Tensor, torch.nn.Parameter)
        and hidden_states.numel() > 0
        and mode.dtype_of_products(hidden_states.dtype) is not None
        and not mode.is_deterministic
        and forward_ad._current_level < 0
        and kernels_take(hidden_states.shape[1], solver, hidden_states.device)
        and not (mode.keeps_gradients and hidden_states.dtype == torch.float16)
    )


class Sum:
    """States between two layers without gradients: as such, or as a layer's branches and what they are to be added to,
    which the next layer's first norm sums.

    Args:
        states: [batch, n, d_model]; None for a sum.
        line: the layer that left the sum in its memory.
    """

    __slots__ = ("line", "states")

    def __init__(self, states: Tensor | None, line: "StraightLayer | None" = None):
        self.states, self.line = states, line

    def total(self) -> Tensor:
        """The states [batch, n, d_model]."""
        if self.states is not None:
            return self.states
        assert self.line is not None
        return self.line.total()


class StraightLayer:
    """A plain layer that is about to run as a straight line.

    Args:
        program, common: how it runs.
        weights: in the order of `WEIGHTS`.
        tables: light and heavy bias tables [heads, 2 * max_distance + 1] in fp32.
        plan: the pass's `EncoderPlan`.
        records: whether autograd does.
    """

    __slots__ = ("common", "memory", "plan", "program", "records", "tables", "weights")

    def __init__(
        self,
        program: Program,
        common: StraightPass,
        weights: tuple[Tensor, ...],
        tables: tuple[Tensor, Tensor],
        plan: Any,
        records: bool,
    ):
        self.program, self.common, self.weights, self.tables, self.plan = program, common, weights, tables, plan
        self.records = records
        self.memory: Tensor | None = None

    @classmethod
    def of(
        cls, layer: PlainEncoderLayer, weights: tuple[Tensor, ...], tables: tuple[Tensor, Tensor], plan: Any
    ) -> "StraightLayer | None":
        """The layer for these weights; None where it has to run as modules.

        Args:
            layer, weights: what `PlainBlock.read` gave.
            tables, plan: as above.
        """
        common = plan.straight
        # not the pass's answer: gradient checkpointing runs a block without gradients first
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
        return cls(program, common, weights, tables, plan, records)

    def line(self, recorder: "Recorder", layout: Room, memory: Tensor, seeds: Tensor | None = None) -> Line:
        """What computes a call."""
        return Line(self.program, self.common, self.plan, recorder, self.weights, self.tables, layout, memory, seeds)

    def repeated(self, kind: Any, memories: list[Tensor]) -> bool:
        """Repeat the launches of a kind of call for these memories; False where there is nothing to be repeated."""
        launches = self.program.lists.get(kind) if self.common.repeats else None
        return launches is not None and launches(memories, self.common.device, self.common.device_index)

    def recorder(self, kind: Any) -> "Recorder":
        """What runs the first call of a kind, or each call where none is to be repeated."""
        return Recorder(self.common.device, self.common.repeats and kind not in self.program.lists)

    def keep(self, kind: Any, recorder: "Recorder", memories: list[Tensor]) -> None:
        """Keep what was noted, if anything was."""
        if recorder.notes is not None:
            self.program.lists[kind] = recorder.finish(memories)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """From states to states [batch, n, d_model], for a backward pass where autograd records."""
        if not self.records:
            return self.run(Sum(hidden_states)).total()
        # past Function.apply, which looks through the arguments for what torch.func left behind
        return _apply(self, hidden_states, *self.tables, *self.weights)

    def run(self, incoming: Sum) -> Sum:
        """Without gradients, from a sum to a sum, in whose memory it may be written."""
        states, before, program = incoming.states, incoming.line, self.program
        if before is not None and before.program is not program:
            states, before = incoming.total(), None
        if states is not None and not states.is_contiguous():
            states = states.contiguous()
        self.memory = program.outgoing.take(program.device) if before is None else before.memory
        assert self.memory is not None
        memories = [self.memory, *self.tables, *self.weights, *self.common.read]
        memories += [] if states is None else [states]
        kind = "sum" if states is None else "states"
        if not self.repeated(kind, memories):
            recorder = self.recorder(kind)
            line = self.line(recorder, program.outgoing, self.memory)
            for part, place in zip(feed_forward(line, [*attention(line, states)]), parts_of(line), strict=True):
                assert part.data_ptr() == place.data_ptr()
            self.keep(kind, recorder, memories)
        return Sum(None, self)

    def total(self) -> Tensor:
        """The states [batch, n, d_model] that the sum is which the layer left."""
        program = self.program
        assert self.memory is not None
        total = torch.empty((program.batch, program.n, program.d), dtype=program.hidden_dtype, device=program.device)
        memories = [self.memory, total]
        if not self.repeated("total", memories):
            recorder = self.recorder("total")
            line = self.line(recorder, program.outgoing, self.memory)
            combined(line, parts_of(line), total)
            self.keep("total", recorder, memories)
        return total


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
        if not layer.repeated("training", memories):
            recorder = layer.recorder("training")
            line = layer.line(recorder, program.kept, kept, *seeds)
            sum_of_all(line, feed_forward(line, [*attention(line, states)]), result)
            layer.keep("training", recorder, memories)
        ctx.set_materialize_grads(False)
        ctx.layer = (program, layer.common, layer.plan)
        ctx.save_for_backward(states, *inputs, kept, *seeds)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_derivatives_of_kernels("encoder_layer")
        count = 1 + 1 + 2 + len(WEIGHTS)
        if grad is None:
            return (None,) * count
        program, common, plan = ctx.layer
        saved = [part if part.is_contiguous() else part.contiguous() for part in (grad, *ctx.saved_tensors)]
        grad, states, light_table, heavy_table, *weights = saved[: 2 + 2 + len(WEIGHTS)]
        kept, *seeds = saved[2 + 2 + len(WEIGHTS) :]
        needs = ctx.needs_input_grad
        layer = StraightLayer(program, common, tuple(weights), (light_table, heavy_table), plan, True)
        out = torch.empty_like(states)
        gradients = Gradients(program, weights, needs[4:])
        light, heavy = (
            torch.empty_like(table) if needed else None
            for table, needed in zip((light_table, heavy_table), needs[2:4], strict=True)
        )
        memories = [*saved, *common.read, out, *gradients.memories]
        memories += [table for table in (light, heavy) if table is not None]
        kind = needs[2:]
        if not layer.repeated(kind, memories):
            recorder = layer.recorder(kind)
            line = layer.line(recorder, program.kept, kept, *seeds)
            Backward(line, gradients, (light, heavy)).run(grad, states, out)
            layer.keep(kind, recorder, memories)
        return None, out, light, heavy, *gradients.wanted()


_apply = super(torch.autograd.Function, _Straight).apply
