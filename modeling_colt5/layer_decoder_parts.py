"""What a T5 decoder layer computes beside its attentions, as straight lines of kernel launches and products.

The modules of model_decoder_layer.py say what a layer computes. Called one by one, their Python takes the host several
times as long as the kernels take a GPU. A block that nothing looks into (`PlainBlock` of layer_plain.py) therefore
runs as two or three parts, and between them its attentions are called as they are, with the cache and with the
implementation that Transformers has for them. With the states x and what an attention gave, a:

    self    q, k, v = W_q y, W_k y, W_v y of y = norm(x)
    cross   x ← x + dropout(W_o a), q = W_q norm(x); not without an encoder
    ff      x ← x + dropout(W_o a), x ← x + dropout(FF(norm(x)))

All layers' keys and values of the memory are one product in training (`project_memory`).

The first call of a part with certain shapes, dtypes and numbers launches one kernel after another and notes them. From
then on the list is repeated by one call of C (run_launch_list_triton.py), with other tensors' addresses.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .kernel_backend import Mode, normed_dtype, triton_is_available
from .layer_decoder import PlainDecoderLayer
from .layer_program import MOST_TOKENS_OF_A_LIST, PassStates, Places, Room
from .op_dropout import draw_seeds
from .run_operator import check_backward_of_kernels

if triton_is_available():
    from .op_dropout_triton import dropout_into
    from .op_gelu_triton import gated_gelu_backward_into, gated_gelu_into
    from .op_norm_triton import gradient_programs, norm_backward_into, norm_into
    from .op_rows_triton import combine_into, join_into
    from .run_launch_list_triton import LaunchList, Recorder, may_repeat, repeated_or_recorder

# False lets every block run as modules, for a comparison.
enabled = True

_DTYPE, _SHAPE = attrgetter("dtype"), attrgetter("shape")


class DecoderDrop:
    """The places where a layer drops, in the order of its seeds: of each attention its weights, whose seed is read
    where kernels attend, and what it adds; the feed-forward's activations, and what it adds."""

    SELF_WEIGHTS, SELF, CROSS_WEIGHTS, CROSS, ACTIVATION, FEED_FORWARD = range(6)


# Modules that drop and the names of their probabilities, by the places of `DecoderDrop`.
_DROPOUTS = (
    ("self", "dropout"), ("self.dropout", "p"), ("cross", "dropout"), ("cross.dropout", "p"),
    ("dense.dropout", "p"), ("ff.dropout", "p"),
)  # fmt: skip


class Part(NamedTuple):
    """A part of a layer: which of the layer's weights it has, and its numbers.

    Args:
        first, end: places of its weights among the layer's: the output projection of the attention before, where there
            is one, the norm, and matrices: projections, or `wi_0`, `wi_1` and `wo`.
        follows: whether it begins with what an attention gave.
        d_kv: features of a head of the projections' results; None in the feed-forward.
        eps: of the norm.
        drops: places of `DecoderDrop`: of what the attention adds, and of the feed-forward's activations and result.
        rates: the probability of each.
    """

    first: int
    end: int
    follows: bool
    d_kv: int | None
    eps: float
    drops: tuple[int, ...]
    rates: tuple[float, ...]


class PlainT5Layer(PlainDecoderLayer):
    """A plain block of T5's decoder.

    Attributes:
        rates: with which probabilities it drops, by the places of `DecoderDrop`.
        sequence: the parts that it runs as.
    """

    __slots__ = ("rates", "sequence")

    def __init__(self, block: Any, modules: dict[str, nn.Module]):
        super().__init__(block, modules)
        self.rates = tuple(
            self.named[name, rate] if self.named.get((name, "training")) else 0.0 for name, rate in _DROPOUTS
        )
        # what each part drops, and features of a head; it begins with a norm, or with the projection before that
        contents: list[tuple[tuple[int, ...], int | None]] = [((), self.d_kv[0])]
        last = DecoderDrop.SELF
        if "cross.q" in self.weighted:
            contents.append(((DecoderDrop.SELF,), self.d_kv[1]))
            last = DecoderDrop.CROSS
        contents.append(((last, DecoderDrop.ACTIVATION, DecoderDrop.FEED_FORWARD), None))
        norms = [place for place, name in enumerate(self.weighted) if name.endswith(".layer_norm")]
        places = [0, *[norm - 1 for norm in norms[1:]], len(self.weighted)]
        self.sequence = tuple(
            Part(first, end, first > 0, d_kv, eps, drops, tuple(self.rates[place] for place in drops))
            for first, end, (drops, d_kv), eps in zip(places, places[1:], contents, self.eps, strict=False)
        )

    def draw_seeds(self, device: torch.device) -> Tensor | None:
        """The seeds of what the layer drops, int64 [6, 2] by the places of `DecoderDrop`; None where it drops
        nothing."""
        return draw_seeds(len(self.rates), device) if any(self.rates) else None


class DecoderPass(PassStates):
    """What the parts of all layers have in common in one pass.

    Args:
        hidden_states: [batch, n, d_model], what goes into the first layer.
        mode: of the pass.
    """

    def __init__(self, hidden_states: Tensor, mode: Mode):
        super().__init__(hidden_states)
        # of products
        self.dtype = mode.dtype_of_products(self.hidden_dtype) or self.hidden_dtype
        precision = torch.backends.cuda.matmul.fp32_precision if self.dtype == torch.float32 else ""
        self.key = (self.batch, self.n, self.d, self.hidden_dtype, self.dtype, self.device, precision)
        tokens = self.batch * self.n
        self.repeats = not mode.is_captured and tokens <= MOST_TOKENS_OF_A_LIST and may_repeat(hidden_states)
        # of matrices: autocast takes all of these
        self.takes_matrices = {self.dtype}
        if self.dtype != self.hidden_dtype:
            self.takes_matrices = {torch.float32, torch.bfloat16, torch.float16}
        # the last program of each part
        self.programs: dict[int, PartProgram] = {}

    @classmethod
    def of(cls, hidden_states: Tensor, mode: Mode) -> "DecoderPass | None":
        """None where all blocks have to run as modules. Whether a single block may run in parts is asked later."""
        takes = (torch.float32, torch.bfloat16)
        may_run = enabled and hidden_states.dtype in takes and mode.takes_straight_lines(hidden_states)
        return cls(hidden_states, mode) if may_run else None


# Programs of parts and layers by all that they depend on; None where one has to run as modules. Each new length adds
# some, so there is a limit.
programs: dict[Any, Any] = {}
MOST_PROGRAMS = 512


def kept_program(key: Any, make: Callable[[], Any]) -> Any:
    """The program of a key, made if there is none yet."""
    # one look, as another thread may clear them after it
    try:
        return programs[key]
    except KeyError:
        program = make()
        if len(programs) >= MOST_PROGRAMS:
            programs.clear()
        programs[key] = program
        return program


class PartProgram:
    """Sizes, places and lists of launches of a part, of one kind of call.

    Attributes:
        kept: what a backward pass reads besides the inputs, the weights and the results; copies of matrices in another
            dtype are among it.
        results: dtype and shape of the states, where they are one, and of each projection.
        lists: for each kind of call its launches; None where they cannot be repeated.
    """

    def __init__(self, common: DecoderPass, part: Part, weights: Sequence[Tensor]):
        self.part, self.batch, self.n, self.d = part, common.batch, common.n, common.d
        self.hidden_dtype, self.dtype, self.device = common.hidden_dtype, common.dtype, common.device
        self.dtypes, self.shapes = list(map(_DTYPE, weights)), list(map(_SHAPE, weights))
        # whether autocast takes the matrices to another dtype
        self.casts = self.hidden_dtype != self.dtype
        self.norm = int(part.follows)
        # the matrices' places
        self.matrices = [place for place in range(len(weights)) if place != self.norm]
        rows = self.batch * self.n
        places: Places = {"rstd": (torch.float32, (self.batch, self.n)), "normed": (self.dtype, (rows, self.d))}
        if part.d_kv is None:
            width = self.shapes[-1][1]
            places |= {name: (self.dtype, (rows, width)) for name in ("gate", "up")}
            places["hidden"] = (self.hidden_dtype, (self.batch, self.n, self.d))
        if self.casts:
            places |= {f"matrix {place}": (self.dtype, tuple(self.shapes[place])) for place in self.matrices}
        self.kept = Room(places)
        self.results: list[tuple[torch.dtype, tuple[int, ...]]] = []
        if part.follows or part.d_kv is None:
            self.results.append((self.hidden_dtype, (self.batch, self.n, self.d)))
        if part.d_kv is not None:
            self.results += [(self.dtype, (rows, shape[0])) for shape in self.shapes[self.norm + 1 :]]
        self.lists: dict[Any, LaunchList | None] = {}

    @staticmethod
    def of(common: DecoderPass, part: Part, weights: Sequence[Tensor]) -> "PartProgram | None":
        """The program for these weights; None where there is none for such shapes or dtypes."""
        last = common.programs.get(part.first)
        dtypes, shapes = list(map(_DTYPE, weights)), list(map(_SHAPE, weights))
        if last is not None and (last.part, last.dtypes, last.shapes) == (part, dtypes, shapes):
            return last
        key = (common.key, part, tuple(dtypes), tuple(shapes))
        program = kept_program(
            key, lambda: PartProgram(common, part, weights) if _fits(common, part, weights) else None
        )
        if program is not None:
            common.programs[part.first] = program
        return program

    @staticmethod
    def of_layer(common: DecoderPass, layer: PlainT5Layer, weights: tuple[Tensor, ...]) -> "list[PartProgram] | None":
        """The programs of all parts of a layer, of which `PlainBlock.read` gave this; None where it has to run as
        modules."""
        if not all(map(Tensor.is_contiguous, weights)) or set(map(Tensor.get_device, weights)) != {
            common.device_index
        }:
            return None
        parts: list[PartProgram] = []
        for part in layer.sequence:
            program = PartProgram.of(common, part, weights[part.first : part.end])
            if program is None:
                return None
            parts.append(program)
        return parts


def _fits(common: DecoderPass, part: Part, weights: Sequence[Tensor]) -> bool:
    """Whether weights have the shapes and dtypes that a part is written for."""
    shapes, d = [tuple(weight.shape) for weight in weights], common.d
    norm = weights[int(part.follows)]
    if part.d_kv is None:
        width = shapes[-1][-1]
        expected = [(width, d), (width, d), (d, width)]
    else:
        expected = [(shape[0], d) for shape in shapes[1 + part.follows :]]
        if any(width % part.d_kv for width, _ in expected):
            return False
    if part.follows:
        expected.insert(0, (d, shapes[0][-1]))
    matrices = [weight for weight in weights if weight is not norm]
    return (
        tuple(norm.shape) == (d,)
        and [tuple(matrix.shape) for matrix in matrices] == expected
        and normed_dtype(common.hidden_dtype, norm.dtype, None) == common.hidden_dtype
        and {matrix.dtype for matrix in matrices} <= common.takes_matrices
        and max(part.rates, default=0.0) < 1
    )


class StraightParts:
    """A plain layer that is about to run in parts.

    Args:
        common: of the pass.
        weights: of the layer.
        parts: the programs of the layer's parts.
        seeds: of what the layer drops, int64 [6, 2] by the places of `DecoderDrop`; None where it drops nothing.
    """

    def __init__(
        self, common: DecoderPass, weights: tuple[Tensor, ...], parts: list[PartProgram], seeds: Tensor | None
    ):
        self.common, self.weights, self.parts, self.seeds = common, weights, parts, seeds

    @classmethod
    def of(cls, common: DecoderPass, layer: PlainT5Layer, weights: tuple[Tensor, ...]) -> "StraightParts | None":
        """The layer; None where it has to run as modules, for which nothing has changed then.

        Args:
            common: of the pass.
            layer, weights: what `PlainBlock.read` gave.
        """
        parts = PartProgram.of_layer(common, layer, weights)
        return None if parts is None else cls(common, weights, parts, layer.draw_seeds(common.device))

    def __call__(self, number: int, hidden_states: Tensor, attended: Tensor | None = None) -> tuple[Tensor, ...]:
        """A part, for a backward pass where autograd records.

        Args:
            number: of the part.
            hidden_states: [batch, n, d_model].
            attended: [batch, n, heads * d_kv], what the attention before gave; None in the first part.

        Returns:
            The projections [batch, heads, n, d_kv]; behind an attention the states before them; and of the last part
            nothing but the states.
        """
        program = self.parts[number]
        call, weights = PartCall(program, self.common, self.seeds), self.weights[program.part.first : program.part.end]
        states = hidden_states.contiguous()
        if attended is not None:
            attended = attended.to(program.dtype).contiguous()
        if not torch.is_grad_enabled():
            return call.forward(states, attended, weights)
        # `Function.apply` would look through the arguments for what torch.func left behind.
        return _apply(call, states, attended, *weights)


class PartCall:
    """A call of a part.

    Args:
        program: of the part.
        common: of the pass.
        seeds: of what the layer drops.
    """

    def __init__(self, program: PartProgram, common: DecoderPass, seeds: Tensor | None):
        self.program, self.common = program, common
        self.seeds = seeds if any(program.part.rates) else None
        self.kept: Tensor | None = None
        # what was normalised, where it is a result
        self.hidden: Tensor | None = None

    def forward(self, hidden_states: Tensor, attended: Tensor | None, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The results; arguments, which are contiguous, and results as of `StraightParts`."""
        program, part = self.program, self.program.part
        batch, n = program.batch, program.n
        kept = self.kept = program.kept.take(program.device)
        made = [torch.empty(shape, dtype=dtype, device=program.device) for dtype, shape in program.results]
        if part.d_kv is not None and part.follows:
            self.hidden = made[0]
        inputs = [hidden_states] if attended is None else [hidden_states, attended]
        seeds = [] if self.seeds is None else [self.seeds]
        memories = [*inputs, *weights, kept, *made, *seeds]
        recorder = repeated_or_recorder(program.lists, "forward", [memories], self.common.repeats)
        if recorder is not None:
            recorder(lambda: PartLine(program, recorder, weights, kept, self.seeds).forward(made, *inputs))
        if part.d_kv is None:
            return tuple(made)
        first = int(part.follows)
        heads = (each.view(batch, n, -1, part.d_kv).transpose(1, 2) for each in made[first:])
        return (*made[:first], *heads)


class PartLine:
    """The launches of a call.

    Args:
        program: of the part.
        recorder: notes launches, makes temporary tensors and products.
        weights: of the part.
        kept: memory of what `PartProgram.kept` has.
        seeds: of what the layer drops.
    """

    def __init__(
        self, program: PartProgram, recorder: "Recorder", weights: Sequence[Tensor], kept: Tensor, seeds: Tensor | None
    ):
        self.program, self.recorder, self.weights, self.seeds = program, recorder, list(weights), seeds
        self.kept = {name: program.kept.view(kept, name) for name in program.kept.numbers}

    def states(self, width: int | None = None) -> Tensor:
        """Room for states [batch * n, width], d_model wide if nothing else is said."""
        return self.recorder.temporary(
            self.program.dtype, self.program.batch * self.program.n, width or self.program.d
        )

    def rows(self, states: Tensor) -> Tensor:
        """States [batch * n, width] as kernels see them, [batch, n, width]."""
        return states.unflatten(0, (self.program.batch, -1))

    def dropout(self, number: int) -> tuple[Tensor | None, float]:
        """The seed of what the part drops at a place of its own, None where it drops nothing, and the probability."""
        part = self.program.part
        rate = part.rates[number]
        return (self.seeds[part.drops[number], :1] if self.seeds is not None and rate else None), rate

    def dropped(self, states: Tensor, number: int) -> Tensor:
        """States [batch, n, d_model], dropped as at a place, rounded to the products' dtype, [batch * n, d_model]."""
        seed, rate = self.dropout(number)
        if seed is None and states.dtype == self.program.dtype:
            return states.view(-1, self.program.d)
        result = self.states()
        if seed is None:
            join_into((result, states))
        else:
            dropout_into(states, seed, rate, result)
        return result

    def cast_matrices(self, copies: bool) -> None:
        """Let copies in the products' dtype stand for the matrices, where they have another; they are made only if
        `copies`."""
        if not self.program.casts:
            return
        matrices = [(self.kept[f"matrix {place}"], self.weights[place]) for place in self.program.matrices]
        if copies:
            join_into(*matrices)
        for place, (copy, _) in zip(self.program.matrices, matrices, strict=True):
            self.weights[place] = copy

    def forward(self, made: list[Tensor], states: Tensor, attended: Tensor | None = None) -> None:
        """Write the results.

        Args:
            made: [batch, n, d_model] where states are a result, and [batch * n, width] of each projection.
            states: [batch, n, d_model].
            attended: [batch, n, heads * d_kv]; None in the first part.
        """
        program, part, kept, product = self.program, self.program.part, self.kept, self.recorder.product
        self.cast_matrices(copies=True)
        norm, matrices = self.weights[program.norm], self.weights[program.norm + 1 :]
        of_norm = (norm, None, part.eps, None, self.rows(kept["normed"]), kept["rstd"], kept["rstd"])
        if attended is None:
            norm_into(states, *of_norm)
        else:
            hidden = kept["hidden"] if part.d_kv is None else made[0]
            branch = self.states()
            product(attended.flatten(0, 1), self.weights[0].t(), branch)
            norm_into(states, *of_norm, self.rows(branch), None, None, None, None, hidden, *self.dropout(0))
        if part.d_kv is not None:
            for matrix, out in zip(matrices, made[int(part.follows) :], strict=True):
                product(kept["normed"], matrix.t(), out)
            return
        gate, up, activated = kept["gate"], kept["up"], self.states(kept["gate"].shape[1])
        product(kept["normed"], matrices[0].t(), gate)
        product(kept["normed"], matrices[1].t(), up)
        gated_gelu_into(self.rows(gate), self.rows(up), self.rows(activated), *self.dropout(1))
        branch = self.states()
        product(activated, matrices[2].t(), branch)
        nothing = (None,) * 8
        combine_into(kept["hidden"], self.rows(branch), *nothing, program.n, made[0], *self.dropout(2))

    def weight_gradient(self, grad: Tensor, states: Tensor, out: Tensor | None) -> None:
        """Write the gradient of a weight, from that of its products [batch * n, rows] with states [batch * n,
        columns]; nothing where it is not wanted."""
        if out is None:
            return
        if out.dtype == grad.dtype:
            self.recorder.product(grad.t(), states, out)
            return
        rounded = self.recorder.temporary(grad.dtype, *out.shape)
        self.recorder.product(grad.t(), states, rounded)
        join_into((out, rounded))

    def backward(
        self,
        residual: Tensor | None,
        grads: Sequence[Tensor | None],
        hidden: Tensor,
        attended: Tensor | None,
        out: Tensor,
        attended_grad: Tensor | None,
        weight_grads: Sequence[Tensor | None],
    ) -> None:
        """Write all gradients.

        Args:
            residual: the gradient of the states where they go on: of the result of that name, and of the first part,
                from what follows the attention; None where there is none.
            grads: of the projections, as `forward` has them, None of what nobody uses; none in the feed-forward.
            hidden: [batch, n, d_model], what was normalised.
            attended: [batch, n, heads * d_kv]; None in the first part.
            out, attended_grad: room for the gradients of the states and of `attended`.
            weight_grads: room for the weights' gradients; None where one is not wanted.
        """
        program, part, kept, recorder = self.program, self.program.part, self.kept, self.recorder
        self.cast_matrices(copies=False)
        matrices, matrix_grads = self.weights[program.norm + 1 :], weight_grads[program.norm + 1 :]
        if part.d_kv is None:
            assert residual is not None
            grads = self.dense(residual, matrices, matrix_grads)
        normed_grad = None
        for grad, matrix, matrix_grad in zip(grads, matrices, matrix_grads, strict=False):
            if grad is None:
                continue
            if normed_grad is None:
                normed_grad = self.states()
                recorder.product(grad, matrix, normed_grad)
            else:
                recorder.add_product(grad, matrix, normed_grad)
            self.weight_gradient(grad, kept["normed"], matrix_grad)
        norm, norm_grad = self.weights[program.norm], weight_grads[program.norm]
        if norm_grad is None:
            norm_grad = recorder.temporary(norm.dtype, program.d)
        shares = recorder.temporary(
            torch.float32, gradient_programs(program.batch, program.n, program.d), 1, program.d
        )
        norm_backward_into(
            None if normed_grad is None else self.rows(normed_grad), None, hidden, norm, None, part.eps, None,
            kept["rstd"], out, norm_grad, None, residual, shares,
        )  # fmt: skip
        if attended is not None and attended_grad is not None:
            branch_grad = self.dropped(out, 0)
            recorder.product(branch_grad, self.weights[0], attended_grad.flatten(0, 1))
            self.weight_gradient(branch_grad, attended.flatten(0, 1), weight_grads[0])

    def dense(
        self, grad: Tensor, matrices: Sequence[Tensor], matrix_grads: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """From the gradient of what the feed-forward gave, [batch, n, d_model], to those of the products with `wi_0`
        and `wi_1`; that of `wo` is written."""
        gate, up = self.kept["gate"], self.kept["up"]
        branch_grad, width = self.dropped(grad, 2), gate.shape[1]
        activated_grad, gate_grad, up_grad = (self.states(width) for _ in range(3))
        self.recorder.product(branch_grad, matrices[2], activated_grad)
        # the activation is cheaper to compute again than to keep, and takes the place of its gradient
        activated = None if matrix_grads[2] is None else activated_grad
        gated_gelu_backward_into(
            self.rows(activated_grad), self.rows(gate), self.rows(up), self.rows(gate_grad), self.rows(up_grad),
            *self.dropout(1), None if activated is None else self.rows(activated),
        )  # fmt: skip
        if activated is not None:
            self.weight_gradient(branch_grad, activated, matrix_grads[2])
        return [gate_grad, up_grad]


class _Part(torch.autograd.Function):
    """A part, and its gradient."""

    @staticmethod
    def forward(
        ctx: Any, call: PartCall, hidden_states: Tensor, attended: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        results = call.forward(hidden_states, attended, weights)
        ctx.set_materialize_grads(False)
        ctx.of_pass, ctx.follows = (call.program, call.common), attended is not None
        # of the feed-forward they are among what is kept
        hidden = call.hidden if call.hidden is not None else hidden_states
        saved = [hidden, *weights, call.kept] + ([] if attended is None else [attended])
        ctx.save_for_backward(*saved, *([] if call.seeds is None else [call.seeds]))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        check_backward_of_kernels("decoder_layer", grads)
        program, common = ctx.of_pass
        part, count = program.part, len(program.dtypes)
        # The inputs are the call, the states, what an attention gave, and the weights.
        if all(grad is None for grad in grads):
            return (None,) * (3 + count)
        saved = [tensor.contiguous() for tensor in ctx.saved_tensors]
        hidden, weights, kept, others = saved[0], saved[1 : 1 + count], saved[1 + count], saved[2 + count :]
        attended = others.pop(0) if ctx.follows else None
        seeds = others[0] if others else None
        own = [None if grad is None else _in_rows(grad, program) for grad in grads]
        _, needs_states, needs_attended, *needs = ctx.needs_input_grad
        out = torch.empty((program.batch, program.n, program.d), dtype=program.hidden_dtype, device=program.device)
        attended_grad = None
        if attended is not None:
            attended_grad = torch.empty(attended.shape, dtype=program.dtype, device=program.device)
        weight_grads = [
            torch.empty_like(weight) if need else None for weight, need in zip(weights, needs, strict=True)
        ]
        written = [each for each in (*own, out, attended_grad, *weight_grads) if each is not None]
        kind = (*needs, *[grad is None for grad in grads])
        recorder = repeated_or_recorder(program.lists, kind, [[*saved, *written]], common.repeats)
        if recorder is not None:
            residual, *others = own if attended is not None else (None, *own)

            def compute() -> None:
                line = PartLine(program, recorder, weights, kept, seeds)
                normalised = line.kept["hidden"] if part.d_kv is None else hidden
                line.backward(residual, others, normalised, attended, out, attended_grad, weight_grads)

            recorder(compute)
        return None, out if needs_states else None, attended_grad if needs_attended else None, *weight_grads


def _in_rows(grad: Tensor, program: PartProgram) -> Tensor:
    """The gradient of a result: of states as they are, of a projection's heads as [batch * n, width]."""
    if grad.dim() == 3:
        return grad.contiguous()
    return grad.transpose(1, 2).reshape(program.batch * program.n, -1).contiguous()


def project_memory(
    common: DecoderPass, memory: Tensor, weights: Sequence[Tensor], head_size: int
) -> tuple[Tensor, ...]:
    """Keys and values of a memory for all layers, as one product; its gradient, too, is rounded once and not after
    each layer.

    Args:
        common: of the pass.
        memory: [batch, encoder length, d_model].
        weights: of the projections, each [heads * head_size, d_model].
        head_size: features of a head.

    Returns:
        Each projection's [batch, encoder length, heads, head_size], in the products' dtype. A projection whose result
        nobody uses gets no gradient, as if it were a module.
    """
    return _apply_memory(head_size, memory.to(common.dtype), *weights)


class _Memory(torch.autograd.Function):
    """The projections of a memory, and their gradient."""

    @staticmethod
    def forward(ctx: Any, head_size: int, memory: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        joined = torch.cat(weights).to(memory.dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(memory, joined)
        ctx.widths, ctx.weight_dtypes = [len(weight) for weight in weights], list(map(_DTYPE, weights))
        heads = [width // head_size for width in ctx.widths]
        return (memory @ joined.t()).unflatten(-1, (-1, head_size)).split_with_sizes(heads, -2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        check_backward_of_kernels("decoder_layer", grads)
        memory, joined = ctx.saved_tensors
        _, needs_memory, *needs = ctx.needs_input_grad
        used = [place for place, grad in enumerate(grads) if grad is not None]
        wanted = [place for place in used if needs[place]]
        memory_grad, weight_grads = None, [None] * len(needs)
        if needs_memory and used:
            matrices = joined.split(ctx.widths)
            matrix = joined if len(used) == len(grads) else torch.cat([matrices[place] for place in used])
            memory_grad = (_joined_rows(grads, used) @ matrix).view_as(memory)
        if wanted:
            products = _joined_rows(grads, wanted).t() @ memory.flatten(0, 1)
            for place, grad in zip(wanted, products.split([ctx.widths[place] for place in wanted]), strict=True):
                weight_grads[place] = grad.to(ctx.weight_dtypes[place])
        return None, memory_grad, *weight_grads


def _joined_rows(grads: Sequence[Tensor | None], places: Sequence[int]) -> Tensor:
    """Gradients [batch, n, heads, head_size] at some places, beside each other: [batch * n, all their features]."""
    rows = [grad for grad in (grads[place] for place in places) if grad is not None]
    return torch.cat([grad.flatten(-2) for grad in rows], -1).flatten(0, 1)


_apply = super(torch.autograd.Function, _Part).apply
_apply_memory = super(torch.autograd.Function, _Memory).apply
