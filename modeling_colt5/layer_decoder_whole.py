"""A T5 decoder layer with its attentions as one straight line of kernel launches and products, where kernels attend.

Whether they do is decided once a pass (`DecoderPlan.kernels_attend` of run_plan.py). A block that nothing looks into
then runs as the parts of layer_decoder_parts.py with its attentions between them, in one list of launches forward and
in one backward (run_launch_list_triton.py):

    part 0, self-attention, part 1, cross-attention, part 2

Without an encoder these are part 0, self-attention and the last part. Self-attention reads a bias by distance that is
minus infinity for keys after their query, cross-attention none. The keys and values of the memory come from outside,
and so does what is done with their gradients.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernel_backend import triton_is_available
from .layer_decoder_parts import DecoderDrop, DecoderPass, PartLine, PartProgram, PlainT5Layer, kept_program
from .layer_program import Room
from .run_operator import check_backward_of_kernels

if triton_is_available():
    from .op_attention_gradient_triton import attention_backward_into
    from .op_attention_triton import attention_into, partial_sums, room_of_parts
    from .run_launch_list_triton import LaunchList, Recorder, repeated_or_recorder

# The attentions of a layer, in their order. Each comes after the part of the same number.
SELF, CROSS = range(2)
# How far after its query a key of self-attention may be; later ones have a bias of minus infinity.
KEYS_AHEAD = 0


class AttentionInputs(NamedTuple):
    """What the attentions of a layer read beside its states.

    Args:
        table: of self-attention, fp32 [heads, 2 * max_distance + 1], see `causal_table` of model_layers.py.
        mask: bool [batch, n], contiguous, True for real tokens; None for all.
        key, value: of the memory, [batch, keys, key/value heads, d_kv], with the features of all heads of a token side
            by side; None without an encoder.
        memory_mask: bool [batch, keys], contiguous, True for real tokens; None for all.
    """

    table: Tensor
    mask: Tensor | None
    key: Tensor | None
    value: Tensor | None
    memory_mask: Tensor | None

    @property
    def memory(self) -> list[Tensor]:
        """Keys and values of the memory; nothing without an encoder."""
        return [states for states in (self.key, self.value) if states is not None]

    @property
    def masks(self) -> list[Tensor]:
        """The masks that there are."""
        return [mask for mask in (self.mask, self.memory_mask) if mask is not None]


class Attention(NamedTuple):
    """An attention of a layer.

    Args:
        heads: of the queries.
        size: features of a head.
        drop: the place of `DecoderDrop` of its weights.
        rate: with which probability they are dropped.
    """

    heads: int
    size: int
    drop: int
    rate: float

    @classmethod
    def all_of(cls, layer: PlainT5Layer, parts: Sequence[PartProgram]) -> "list[Attention]":
        """Those of a layer, one after each part but the last; a part's query comes behind its states."""
        drops = (DecoderDrop.SELF_WEIGHTS, DecoderDrop.CROSS_WEIGHTS)
        widths = [part.results[part.norm][1][1] for part in parts[:-1]]
        return [
            cls(width // size, size, drop, layer.rates[drop])
            for width, size, drop in zip(widths, layer.d_kv, drops, strict=False)
        ]

    @property
    def width(self) -> int:
        """Features of all heads."""
        return self.heads * self.size


class AttentionCall(NamedTuple):
    """What `attention_into` takes, and its gradient behind the gradient of the output, in their order."""

    query: Tensor
    key: Tensor
    value: Tensor
    table: Tensor | None
    radius: int
    query_positions: None
    key_positions: None
    mask: Tensor | None
    dropout: float
    seed: Tensor | None
    attended: Tensor
    sums: Tensor


class LayerProgram:
    """Sizes, places and lists of launches of a layer, of one kind of call.

    Attributes:
        parts: the programs of its parts.
        attentions: those between the parts.
        kept: what a backward pass reads besides the inputs and the weights: of each part what it keeps, and of each
            but the last its results and what the attention gives, which are the output and the log-sum-exps.
        lists: for each kind of call its launches; None where they cannot be repeated.
    """

    def __init__(self, parts: Sequence[PartProgram], attentions: Sequence[Attention]):
        first, self.parts, self.attentions = parts[0], parts, attentions
        self.batch, self.n, self.hidden_dtype, self.dtype = first.batch, first.n, first.hidden_dtype, first.dtype
        self.device = first.device
        self.kept = Room()
        self.rooms = [self.kept.add(torch.uint8, part.kept.size) for part in parts]
        self.made = [[self.kept.add(dtype, *shape) for dtype, shape in part.results] for part in parts[:-1]]
        self.attended = [self.kept.add(self.dtype, self.batch, self.n, own.width) for own in attentions]
        self.sums = [self.kept.add(torch.float32, self.batch, own.heads, self.n) for own in attentions]
        self.lists: dict[Any, LaunchList | None] = {}

    @staticmethod
    def of(
        common: DecoderPass, layer: PlainT5Layer, parts: Sequence[PartProgram], inputs: AttentionInputs
    ) -> "LayerProgram | None":
        """The program for these parts and inputs; None where the layer has to run as modules."""

        def make() -> LayerProgram | None:
            attentions = Attention.all_of(layer, parts)
            return LayerProgram(parts, attentions) if _fits(parts, attentions, inputs) else None

        read = (inputs.table, *inputs.memory)
        shapes = [(states.shape, states.dtype) for states in read]
        if not inputs.table.is_contiguous() or {*map(Tensor.get_device, read)} != {common.device_index}:
            return None
        return kept_program((*parts, layer.rates, *shapes, inputs.mask is None, inputs.memory_mask is None), make)


def _fits(parts: Sequence[PartProgram], attentions: Sequence[Attention], inputs: AttentionInputs) -> bool:
    """Whether table, projections and memory have the shapes and dtypes that the line is written for."""
    first = parts[0]
    query, key, value = (shape[1] for _, shape in first.results)
    fit = (
        (inputs.table.dtype, inputs.table.shape[0]) == (torch.float32, attentions[SELF].heads)
        and key == value
        and query % key == 0
        and max(own.rate for own in attentions) < 1
        # the products behind the attentions
        and [own.width for own in attentions] == [part.shapes[0][1] for part in parts[1:]]
        and len(inputs.memory) == 2 * (len(attentions) - 1)
    )
    for states in inputs.memory:
        batch, keys, heads, size = states.shape
        fit = (
            fit
            and inputs.memory[0].shape == states.shape
            and (states.dtype, batch, size) == (first.dtype, first.batch, attentions[CROSS].size)
            and keys > 0
            and attentions[CROSS].heads % heads == 0
        )
    return fit


class StraightDecoderLayer:
    """A plain layer that is about to run as one straight line.

    Args:
        program: sizes and places of its tensors, and its lists of launches.
        common: of the pass.
        weights: of the layer.
        inputs: of its attentions.
        seeds: of what it drops, int64 [6, 2] by the places of `DecoderDrop`; None where it drops nothing.
    """

    def __init__(
        self,
        program: LayerProgram,
        common: DecoderPass,
        weights: Sequence[Tensor],
        inputs: AttentionInputs,
        seeds: Tensor | None,
    ):
        self.program, self.common, self.weights, self.inputs, self.seeds = program, common, weights, inputs, seeds

    @classmethod
    def of(
        cls,
        common: DecoderPass,
        layer: PlainT5Layer,
        weights: tuple[Tensor, ...],
        parts: Sequence[PartProgram],
        inputs: AttentionInputs,
        seeds: Tensor | None,
    ) -> "StraightDecoderLayer | None":
        """The layer; None where it has to run as modules.

        Args:
            common: of the pass.
            layer, weights: what `PlainBlock.read` gave.
            parts: what `PartProgram.of_layer` gave of these.
            inputs, seeds: as above.
        """
        program = LayerProgram.of(common, layer, parts, inputs)
        return None if program is None else cls(program, common, weights, inputs, seeds)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """From states to states [batch, n, d_model], for a backward pass where autograd records."""
        states, inputs = hidden_states.contiguous(), self.inputs
        if not torch.is_grad_enabled():
            result, _ = self.forward(states, None)
            return result
        # `Function.apply` would look through the arguments for what torch.func left behind.
        return _apply(self, states, inputs.table, inputs.key, inputs.value, *self.weights)

    def forward(self, states: Tensor, needs: Sequence[bool] | None) -> tuple[Tensor, Tensor]:
        """The result [batch, n, d_model] of contiguous states, and the memory of what is kept.

        Args:
            states: what goes into the layer.
            needs: of table and weights, whether their gradients are wanted; None where autograd does not record.
        """
        program = self.program
        kept = program.kept.take(program.device)
        result = torch.empty(states.shape, dtype=program.hidden_dtype, device=program.device)
        later = None
        # A layer that drops is being trained: its gradient will be asked for.
        if needs is not None and self.seeds is not None:
            later = lambda line: line.backward(result, states, self.gradients(states, needs))  # noqa: E731
        self.compute("forward", [states, result], kept, lambda line: line.forward(states, result), later)
        return result, kept

    def gradients(self, states: Tensor, needs: Sequence[bool]) -> "LayerGradients":
        """Where gradients are written.

        Args:
            states: what goes into the layer.
            needs: of table and weights, whether theirs are wanted.
        """
        inputs = self.inputs
        return LayerGradients(
            torch.empty_like(states),
            torch.empty_like(inputs.table) if needs[0] else None,
            None if inputs.key is None else torch.empty_like(inputs.key, memory_format=torch.contiguous_format),
            None if inputs.value is None else torch.empty_like(inputs.value, memory_format=torch.contiguous_format),
            [torch.empty_like(weight) if need else None for weight, need in zip(self.weights, needs[1:], strict=True)],
        )

    def compute(
        self,
        kind: Any,
        memories: list[Tensor],
        kept: Tensor,
        launches: "Callable[[LayerLine], None]",
        later: "Callable[[LayerLine], None] | None" = None,
    ) -> None:
        """Compute a call, forward or backward, or repeat its list of launches.

        Args:
            kind: tells apart the calls that launch different kernels.
            memories: all contiguous tensors that a call reads or writes beside what the layer has.
            kept: the memory of what is kept.
            launches: those of the call.
            later: those of what comes after it, for a rehearsal.
        """
        inputs, common = self.inputs, self.common
        # of strided keys and values what each begins with, which no other has
        beginnings = [states[0, 0] for states in inputs.memory]
        seeds = [] if self.seeds is None else [self.seeds]
        everything = [*memories, kept, *self.weights, inputs.table, *inputs.masks, *beginnings, *seeds]
        kind = (kind, *[states.stride() for states in inputs.memory])
        recorder = repeated_or_recorder(self.program.lists, kind, [everything], common.repeats)
        if recorder is not None:

            def new_line() -> LayerLine:
                # a line is changed by what it computes
                return LayerLine(self, recorder, kept)

            recorder(lambda: launches(new_line()), later and (lambda: later(new_line())))


class LayerGradients(NamedTuple):
    """Where gradients are written.

    Args:
        states: [batch, n, d_model].
        table: of self-attention; None where it is not wanted.
        key, value: of the memory, contiguous; None without an encoder.
        weights: of the layer's weights, None for each that is not wanted.
    """

    states: Tensor
    table: Tensor | None
    key: Tensor | None
    value: Tensor | None
    weights: Sequence[Tensor | None]

    @property
    def written(self) -> list[Tensor]:
        """Those that are wanted."""
        *others, weights = self
        return [part for part in (*others, *weights) if part is not None]

    def of_part(self, part: PartProgram) -> Sequence[Tensor | None]:
        """Those of a part's weights."""
        return self.weights[part.part.first : part.part.end]


class LayerLine:
    """The launches of a call.

    Args:
        layer: whose call it is.
        recorder: notes launches, makes temporary tensors and products.
        kept: memory of what `LayerProgram.kept` has.
    """

    def __init__(self, layer: StraightDecoderLayer, recorder: "Recorder", kept: Tensor):
        self.layer, self.program, self.recorder = layer, layer.program, recorder
        self.tensors = self.program.kept.views(kept)
        self.parts = [
            PartLine(part, recorder, layer.weights[part.part.first : part.part.end], self.tensors[room], layer.seeds)
            for part, room in zip(self.program.parts, self.program.rooms, strict=True)
        ]

    def made(self, number: int) -> list[Tensor]:
        """The results of a part that is not the last."""
        return [self.tensors[place] for place in self.program.made[number]]

    def attended(self, attention: int) -> Tensor:
        """What an attention gives, [batch, n, heads * d_kv]."""
        return self.tensors[self.program.attended[attention]]

    def heads(self, states: Tensor, attention: int) -> Tensor:
        """States [batch * n, heads * d_kv] as [batch, n, heads, d_kv]."""
        return states.view(self.program.batch, self.program.n, -1, self.program.attentions[attention].size)

    def call(self, attention: int) -> AttentionCall:
        """An attention, from the results of the part before it."""
        inputs, own, made = self.layer.inputs, self.program.attentions[attention], self.made(attention)
        if attention == SELF:
            query, key, value = (self.heads(states, SELF) for states in made)
            table, mask = inputs.table, inputs.mask
        else:
            query, (key, value) = self.heads(made[1], CROSS), inputs.memory
            table, mask = None, inputs.memory_mask
        seeds = self.layer.seeds
        seed = seeds[own.drop, :1] if seeds is not None and own.rate else None
        # a radius that cuts nothing off
        radius = max(query.shape[1], key.shape[1])
        attended, sums = self.heads(self.attended(attention), attention), self.tensors[self.program.sums[attention]]
        return AttentionCall(query, key, value, table, radius, None, None, mask, own.rate, seed, attended, sums)

    def forward(self, states: Tensor, result: Tensor) -> None:
        """Write the result, [batch, n, d_model], of states of that shape."""
        self.parts[SELF].forward(self.made(SELF), states)
        attention_into(*self.call(SELF), None, KEYS_AHEAD)
        attended = self.attended(SELF)
        if self.layer.inputs.memory:
            made = self.made(CROSS)
            self.parts[CROSS].forward(made, states, attended)
            call = self.call(CROSS)
            attention_into(*call, self.room_for(call, backward=False))
            states, attended = made[0], self.attended(CROSS)
        self.parts[-1].forward([result], states, attended)

    def backward(self, grad: Tensor, states: Tensor, gradients: LayerGradients) -> None:
        """Write all gradients.

        Args:
            grad: of the result, [batch, n, d_model].
            states: what went into the layer.
            gradients: to be written.
        """
        last = len(self.parts) - 1
        hidden = self.parts[last].kept["hidden"]
        residual, attended_grad = self.part_backward(last, grad, (), hidden, gradients)
        if self.layer.inputs.memory:
            hidden, query = self.made(CROSS)
            query_grad = self.temporary_like(query)
            grads = (self.heads(query_grad, CROSS), gradients.key, gradients.value)
            self.attention_backward(CROSS, attended_grad, grads, None)
            residual, attended_grad = self.part_backward(CROSS, residual, (query_grad,), hidden, gradients)
        made = [self.temporary_like(part) for part in self.made(SELF)]
        self.attention_backward(SELF, attended_grad, [self.heads(part, SELF) for part in made], gradients.table)
        weights = gradients.of_part(self.program.parts[SELF])
        self.parts[SELF].backward(residual, made, states, None, gradients.states, None, weights)

    def room_for(self, call: AttentionCall, backward: bool) -> Tensor | None:
        """Room for the parts of cross-attention's sums; None where nothing is split."""
        numbers = room_of_parts(call.query, call.key, backward)
        return self.recorder.temporary(torch.float32, numbers) if numbers else None

    def temporary_like(self, states: Tensor) -> Tensor:
        """Room of the dtype and shape of a contiguous tensor."""
        return self.recorder.temporary(states.dtype, *states.shape)

    def part_backward(
        self, part: int, residual: Tensor, grads: Sequence[Tensor], hidden: Tensor, gradients: LayerGradients
    ) -> tuple[Tensor, Tensor]:
        """The gradients of the states that a part begins with, and of what the attention before it gave; those of its
        weights are written. `residual`, `grads` and `hidden` are as of `PartLine.backward`."""
        attended, weights = self.attended(part - 1), gradients.of_part(self.program.parts[part])
        out, attended_grad = self.temporary_like(hidden), self.temporary_like(attended)
        self.parts[part].backward(residual, grads, hidden, attended, out, attended_grad, weights)
        return out, attended_grad

    def attention_backward(
        self, attention: int, grad: Tensor, grads: Sequence[Tensor | None], table_grad: Tensor | None
    ) -> None:
        """Launch the gradient of an attention.

        Args:
            attention: which.
            grad: of what it gave, [batch, n, heads * d_kv].
            grads: of query, key and value, to be written.
            table_grad: of the table, likewise; None where it is not wanted.
        """
        own, call = self.program.attentions[attention], self.call(attention)
        partials = None
        if table_grad is not None:
            batch, heads, n = call.sums.shape
            rows = partial_sums(n, own.size, self.program.dtype, self.program.device, False)
            partials = self.recorder.temporary(torch.float32, batch, heads, rows, table_grad.shape[1])
            self.recorder.zeros(partials)
        is_self = attention == SELF
        room = None if is_self else self.room_for(call, backward=True)
        delta = self.temporary_like(call.sums)
        rest = (table_grad, delta, partials, room, KEYS_AHEAD if is_self else None)
        attention_backward_into(self.heads(grad, attention), *call, *grads, *rest)


class _Layer(torch.autograd.Function):
    """The layer from states to states, and its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: StraightDecoderLayer,
        states: Tensor,
        table: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:
        _, _, needs_table, _, _, *needs = ctx.needs_input_grad
        result, kept = layer.forward(states, [needs_table, *needs])
        ctx.set_materialize_grads(False)
        ctx.of_pass = (layer.program, layer.common)
        ctx.save_for_backward(*layer.inputs, layer.seeds, states, kept, *weights)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        check_backward_of_kernels("decoder_layer", (grad,))
        # The inputs are the layer, its states, a table, keys, values, and the weights.
        _, _, needs_table, _, _, *needs = ctx.needs_input_grad
        if grad is None:
            return (None,) * (5 + len(needs))
        table, mask, key, value, memory_mask, seeds, *saved = ctx.saved_tensors
        states, kept, *weights = (part.contiguous() for part in saved)
        mask, memory_mask = (None if part is None else part.contiguous() for part in (mask, memory_mask))
        inputs = AttentionInputs(table.contiguous(), mask, key, value, memory_mask)
        program, common = ctx.of_pass
        layer = StraightDecoderLayer(program, common, weights, inputs, seeds)
        gradients = layer.gradients(states, [needs_table, *needs])
        grad = grad.contiguous()
        kind, memories = (needs_table, *needs), [grad, states, *gradients.written]
        layer.compute(kind, memories, kept, lambda line: line.backward(grad, states, gradients))
        *of_inputs, of_weights = gradients
        return None, *of_inputs, *of_weights


_apply = super(torch.autograd.Function, _Layer).apply
