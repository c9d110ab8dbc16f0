"""Operators of the namespace `colt5`: a reference, the kernel beside it, and how both are called."""

import functools
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from .kernel_backend import is_transformed, kernel_takes, runs_eagerly, uses_triton

# A function that launches kernels, or None where Triton is not installed.
Launch = Callable[..., None] | None

_TORCH_INSTEAD = (
    'use kernel_backend="torch" in the configuration (or COLT5_KERNEL_BACKEND=torch), where all is plain PyTorch'
)


def own_schema(schema: str) -> str:
    """The schema under a name that no other version of the code uses for another schema.

    The package and any number of Hub copies can be loaded in one process; the first one's operators serve all of the
    same schema, and one of another schema has a checksum at the end of its name.
    """
    name, signature = schema.split("(", 1)
    held = getattr(torch.ops.colt5, name, None)
    if held is None or str(held.default._schema) == str(torch._C.parse_schema(f"colt5::{schema}")):
        return schema
    return f"{name}_{zlib.crc32(signature.encode()):08x}({signature}"


def check_backward_of_kernels(name: str, grads: Iterable[Any]) -> None:
    """Refuse what a backward pass that launches Triton kernels cannot give: a graph of it, as a second derivative
    would lack the kernels' part, and gradients in a batch, whose numbers kernels cannot read.

    Args:
        name: of what ran in the forward pass.
        grads: of its results.

    Raises:
        RuntimeError: where such a graph is asked for, or a batch comes.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"colt5::{name} ran as a Triton kernel, whose gradient has no derivative, and create_graph=True asks for "
            f"one: {_TORCH_INSTEAD}"
        )
    if is_transformed() or any(grad is not None and is_legacy_batchedtensor(grad) for grad in grads):
        raise RuntimeError(
            f"colt5::{name} ran as a Triton kernel, whose gradient takes no batch of gradients, as is_grads_batched="
            f"True, vectorize=True and vmap give it: {_TORCH_INSTEAD}"
        )


def refuse_transforms_of_kernels(name: str) -> None:
    """For a call that would launch Triton kernels.

    Raises:
        RuntimeError: inside of grad, vmap and the other transforms of torch.func, whose tensors kernels cannot read.
    """
    if is_transformed():
        raise RuntimeError(
            f"colt5::{name} runs as a Triton kernel, which torch.func (grad, vmap and others) cannot transform: "
            f"{_TORCH_INSTEAD}"
        )


class Operator:
    """An operation with a kernel: `colt5::<name>` for tracers, a plain Python call otherwise.

    Its signature is written once, in the reference, whose annotations give the operator's schema. The dispatcher's
    Python path costs more host time than a Triton launch (docs/operators.md has the numbers), so only tracers
    (torch.compile, torch.export, fake tensors, opcheck) go through it. An eager call runs the kernel, inside a
    `torch.autograd.Function` where gradients are wanted. Where no kernel runs, the reference is called as the PyTorch
    code that it is.

    Args:
        name: of the operator.
        reference: annotated, in plain differentiable PyTorch, on any device. No result may alias an input.
        results: takes the same arguments: empty tensors for the results, for kernels to write and for tracers to see.
        launch: takes the same arguments, then the results, which it writes.
        gradient: how gradients go through it; None where none do.
        operand: which argument's device and dtype decide whether the kernel runs.
        fits: takes the same arguments: whether the kernel runs on sizes like theirs; None for all.
        schema: instead of what the reference's annotations say.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        results: Callable[..., Any],
        launch: Launch = None,
        gradient: "Gradient | ComposedGradient | None" = None,
        operand: int = 0,
        fits: Callable[..., bool] | None = None,
        schema: str = "",
    ):
        schema = own_schema(schema or torch.library.infer_schema(reference, op_name=name, mutates_args=()))
        self.name = name = schema.split("(")[0]
        self.reference, self.results, self.launch = reference, results, launch
        self.operand, self.fits = operand, fits
        self.gradient: Operator | None = None
        self.function: type[torch.autograd.Function] | None = None
        if gradient is not None:
            self.function = self._make_function(*gradient.of(self, schema))
            # `Function.apply` would look through the arguments for what functorch left behind, which takes 4 µs a
            # call.
            self.apply = super(torch.autograd.Function, self.function).apply  # type: ignore[misc]
        if not hasattr(torch.ops.colt5, name):
            self._register(name, schema)
        self.overload = getattr(torch.ops.colt5, name).default

    def kernel(self, *inputs: Any) -> Any:
        """The result by kernels."""
        results = self.results(*inputs)
        assert self.launch is not None
        self.launch(*inputs, *_as_tuple(results))
        return results

    def chosen(self, inputs: Sequence[Any]) -> Callable[..., Any]:
        """The kernel where it takes these inputs, else the reference."""
        if self.launch is None or not kernel_takes(inputs[self.operand]):
            return self.reference
        return self.kernel if self.fits is None or self.fits(*inputs) else self.reference

    def implementation(self, *inputs: Any) -> Any:
        """The result, without a gradient."""
        return self.chosen(inputs)(*inputs)

    def _make_function(self, save: Callable[..., None], backward: Callable[..., Any]) -> type[torch.autograd.Function]:
        # There is no separate `setup_context`: with one, PyTorch binds the arguments by inspection, which takes 30 µs
        # a call.
        def forward(ctx: Any, *inputs: Any) -> Any:
            if runs_eagerly():
                results = self.implementation(*inputs)
            else:
                with torch._C._AutoDispatchBelowAutograd():
                    results = self.overload(*inputs)
            ctx.set_materialize_grads(False)
            save(ctx, inputs, results)
            return results

        def backward_once(ctx: Any, *grads: Any) -> Any:
            check_backward_of_kernels(self.name, grads)
            return backward(ctx, *grads)

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward_once)}
        return type(self.name, (torch.autograd.Function,), members)

    def _register(self, name: str, schema: str) -> None:
        self.library = torch.library.Library("colt5", "FRAGMENT")
        self.library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.library.impl(name, self.implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"colt5::{name}", self.results, lib=self.library)
        if self.function is not None:
            self.library.impl(name, self.function.apply, "Autograd")

    def __call__(self, *inputs: Any, kernel_backend: str | None = None) -> Any:
        """The result; on the backend "torch" that of the reference, with derivatives of any order.

        Args:
            inputs: the reference's arguments.
            kernel_backend: as in `uses_triton` of kernel_backend.py; None in a gradient, where the operation itself
                has said that Triton is used.
        """
        if kernel_backend is not None and not uses_triton(inputs[self.operand], kernel_backend):
            return self.reference(*inputs)
        if not runs_eagerly():
            refuse_transforms_of_kernels(self.name)
            return self.overload(*inputs)
        run = self.chosen(inputs)
        if self.function is not None and run is not self.reference and torch.is_grad_enabled():
            for value in inputs:
                if isinstance(value, Tensor) and value.requires_grad:
                    return self.apply(*inputs)
        return run(*inputs)


@dataclass(frozen=True)
class ComposedGradient:
    """A gradient that calls several operators. It calls no kernel itself, so that tracers see it.

    Args:
        save: `(ctx, inputs, results)`, keeps what `backward` needs.
        backward: `(ctx, *results' gradients)` → a gradient or None for each input. Gradients of results that nobody
            used come as None.
    """

    save: Callable[..., None]
    backward: Callable[..., Any]

    def of(self, operator: Operator, schema: str) -> tuple[Callable[..., None], Callable[..., Any]]:
        """The two."""
        return self.save, self.backward


@dataclass(frozen=True)
class Gradient:
    """A gradient that is one operator, `colt5::<name>_backward`; its reference is PyTorch's autograd through the
    operation's own.

    Args:
        inputs: names of the inputs that have a gradient.
        results: names of all results.
        through: names of those that pass a gradient on.
        kept: names of those that kernels read in the backward pass.
        launch: takes the gradients of `through`, None where nobody used the result, then the operation's arguments,
            then its results in `kept`, and then for each of `inputs` the tensor to write, None where the input is.
        unwanted: names of inputs whose gradient `launch` does not make where nobody wants it: None stands for the
            tensor to write then.
        copied: names of small inputs that a cache may write over before the backward pass: it reads copies of them.
    """

    inputs: tuple[str, ...]
    results: tuple[str, ...]
    through: tuple[str, ...]
    kept: tuple[str, ...] = ()
    launch: Launch = None
    unwanted: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()

    def of(self, operator: Operator, schema: str) -> tuple[Callable[..., None], Callable[..., Any]]:
        """What the operator's `torch.autograd.Function` saves, and its backward."""
        arguments = schema[schema.index("(") + 1 : schema.rindex(") ->")]
        names = [argument.split()[-1] for argument in arguments.split(", ")]
        places = [names.index(name) for name in self.inputs]
        through, kept = ([self.results.index(name) for name in some] for some in (self.through, self.kept))
        # among the backward's arguments, those of the operation, and which gradients are wanted
        own = slice(len(through), len(through) + len(names))
        count = own.stop + len(kept)

        def leaves_out(values: Sequence[Any]) -> list[bool]:
            """Of each gradient, whether none is to be made."""
            inputs, needs = values[own], values[count]
            return [
                inputs[place] is None or (name in self.unwanted and not needed)
                for place, name, needed in zip(places, self.inputs, needs, strict=True)
            ]

        def for_each(values: Sequence[Any], gradient_of: Callable[[int], Tensor]) -> Any:
            """The gradients, an empty tensor for each that is left out."""
            made = tuple(
                values[own][operator.operand].new_empty(0) if left_out else gradient_of(place)
                for place, left_out in zip(places, leaves_out(values), strict=True)
            )
            return made if len(made) > 1 else made[0]

        def results(*values: Any) -> Any:
            inputs, layout = values[own], torch.contiguous_format
            return for_each(values, lambda place: torch.empty_like(inputs[place], memory_format=layout))

        def reference(*values: Any) -> Any:
            inputs = list(values[own])
            leaves = [place for place in places if inputs[place] is not None]
            with torch.enable_grad():
                for place in leaves:
                    inputs[place] = inputs[place].detach().requires_grad_()
                given = _as_tuple(operator.reference(*inputs))
            used = [(given[place], grad) for place, grad in zip(through, values, strict=False) if grad is not None]
            ends, grads = zip(*used, strict=True)
            found = torch.autograd.grad(ends, [inputs[place] for place in leaves], grads, materialize_grads=True)
            by_place = dict(zip(leaves, found, strict=True))
            return for_each(values, lambda place: by_place[place].contiguous())

        def launch(*values: Any) -> None:
            assert self.launch is not None
            written = [
                None if left_out else tensor
                for left_out, tensor in zip(leaves_out(values), values[count + 1 :], strict=True)
            ]
            self.launch(*values[:count], *written)

        parts = [f"Tensor? grad_{name}" for name in self.through]
        parts += [arguments, *(f"Tensor {name}" for name in self.kept), "bool[] needs"]
        gradient = Operator(
            f"{operator.name}_backward",
            reference,
            results,
            None if self.launch is None else functools.wraps(self.launch)(launch),
            operand=own.start + operator.operand,
            fits=None if operator.fits is None else lambda *values: operator.fits(*values[own]),  # type: ignore[misc]
            schema=f"{operator.name}_backward({', '.join(parts)}) -> ({', '.join(['Tensor'] * len(places))})",
        )
        operator.gradient = gradient

        def save(ctx: Any, inputs: tuple[Any, ...], results: Any) -> None:
            given = _as_tuple(results)
            ctx.mark_non_differentiable(*(part for place, part in enumerate(given) if place not in through))
            tensors = [value if isinstance(value, Tensor) else None for value in inputs]
            for place, tensor in enumerate(tensors):
                if tensor is not None and names[place] in self.copied:
                    tensors[place] = tensor.detach().clone()
            ctx.save_for_backward(*tensors, *(given[place] for place in kept))
            ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]

        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            found: list[Tensor | None] = [None] * len(names)
            used = [grads[place] for place in through]
            if any(grad is not None for grad in used):
                # They are unpacked once: gradient checkpointing recomputes them the first time and refuses a second.
                saved = ctx.saved_tensors
                inputs = [other if part is None else part for part, other in zip(saved, ctx.others, strict=False)]
                needs = [ctx.needs_input_grad[place] for place in places]
                made = _as_tuple(gradient(*used, *inputs, *saved[len(names) :], needs))
                for place, needed, part in zip(places, needs, made, strict=True):
                    found[place] = part if needed else None
            return tuple(found)

        return save, backward


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
