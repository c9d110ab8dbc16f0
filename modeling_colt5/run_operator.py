"""Operators of the namespace `colt5`: a reference, the kernel beside it, and how both are called."""

import zlib
from collections.abc import Callable
from typing import Any

import torch

from .kernel_backend import kernel_takes, runs_eagerly, uses_triton

# A function of an operator's arguments that needs Triton, or None where Triton is not installed.
Kernel = Callable[..., Any] | None


def own_schema(schema: str) -> str:
    """The schema under a name that no copy of the code in another version holds with another one.

    The package and any number of Hub copies can be loaded in one process; the first one's operators serve all of the
    same schema, and one of another schema has a checksum behind its name.
    """
    name, signature = schema.split("(", 1)
    held = getattr(torch.ops.colt5, name, None)
    if held is None or str(held.default._schema) == str(torch._C.parse_schema(f"colt5::{schema}")):
        return schema
    return f"{name}_{zlib.crc32(signature.encode()):08x}({signature}"


def refuse_derivatives_of_kernels(name: str) -> None:
    """For a backward that launches Triton kernels: who asks for a graph of it, for a second derivative, would get one
    without the kernels' part.

    Raises:
        RuntimeError: where such a graph is asked for.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"colt5::{name} ran as a Triton kernel, whose gradient has no derivative, and create_graph=True asks for "
            'one: use kernel_backend="torch" in the configuration (or COLT5_KERNEL_BACKEND=torch), where all is plain '
            "PyTorch"
        )


def refuse_transforms_of_kernels(name: str) -> None:
    """For a call that would launch Triton kernels.

    Raises:
        RuntimeError: inside of grad, vmap and the other transforms of torch.func, whose tensors kernels cannot read.
    """
    # A compiler transforms operators by itself, or says that it cannot.
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"colt5::{name} runs as a Triton kernel, which torch.func (grad, vmap and others) cannot transform: use "
            'kernel_backend="torch" in the configuration (or COLT5_KERNEL_BACKEND=torch), where all is plain PyTorch'
        )


class Operator:
    """An operation with a kernel: `colt5::<name>` for those who trace, a plain Python call for everybody else.

    The dispatcher's Python path costs more host time than a Triton launch (docs/operators.md has the numbers), so
    only tracers (torch.compile, torch.export, fake tensors, opcheck) go through it. An eager call runs the kernel,
    inside a `torch.autograd.Function` where gradients are wanted. Where no kernel runs, the reference is called as
    the PyTorch code that it is.

    Args:
        schema: `"name(Tensor x, ...) -> ..."`, functional; no output may alias an input.
        reference: takes the schema's arguments, on any device, in plain differentiable PyTorch.
        fake: the same on fake tensors, for shapes and dtypes alone.
        kernel: takes the schema's arguments too; None where Triton is not installed.
        save: `(ctx, inputs, outputs)`, keeps what the backward needs; None for an operator without gradient.
        backward: `(ctx, *output gradients)` → a gradient or None for each input. Gradients of unused outputs come as
            None. It calls other operators, never kernels, so that tracers see it.
        operand: which argument's device and dtype decide whether the kernel runs.
        fits: takes the schema's arguments: whether the kernel runs on sizes like theirs; None for all.
    """

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        kernel: Kernel = None,
        save: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        operand: int = 0,
        fits: Kernel = None,
    ):
        schema = own_schema(schema)
        self.name = name = schema.split("(")[0]
        self.reference, self.kernel, self.operand, self.fits = reference, kernel, operand, fits
        self.function: type[torch.autograd.Function] | None = None
        if save is not None and backward is not None:
            self.function = self._make_function(name, save, backward)
            # `Function.apply` would look through the arguments for what functorch left behind, which takes 4 µs a
            # call.
            self.apply = super(torch.autograd.Function, self.function).apply  # type: ignore[misc]
        if not hasattr(torch.ops.colt5, name):
            self._register(name, schema, fake)
        self.overload = getattr(torch.ops.colt5, name).default

    def chosen(self, inputs: tuple[Any, ...]) -> Callable[..., Any]:
        """The kernel where it takes these inputs, else the reference."""
        if self.kernel is None or not kernel_takes(inputs[self.operand]):
            return self.reference
        return self.kernel if self.fits is None or self.fits(*inputs) else self.reference

    def implementation(self, *inputs: Any) -> Any:
        """The result, without a gradient."""
        return self.chosen(inputs)(*inputs)

    def _make_function(
        self, name: str, save: Callable[..., None], backward: Callable[..., Any]
    ) -> type[torch.autograd.Function]:
        # There is no separate `setup_context`: with one, PyTorch binds the arguments by inspection, which takes 30 µs
        # a call.
        def forward(ctx: Any, *inputs: Any) -> Any:
            if runs_eagerly():
                outputs = self.implementation(*inputs)
            else:
                with torch._C._AutoDispatchBelowAutograd():
                    outputs = self.overload(*inputs)
            ctx.set_materialize_grads(False)
            save(ctx, inputs, outputs)
            return outputs

        def backward_once(ctx: Any, *grads: Any) -> Any:
            refuse_derivatives_of_kernels(name)
            return backward(ctx, *grads)

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward_once)}
        return type(name, (torch.autograd.Function,), members)

    def _register(self, name: str, schema: str, fake: Callable[..., Any]) -> None:
        self.library = torch.library.Library("colt5", "FRAGMENT")
        self.library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.library.impl(name, self.implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"colt5::{name}", fake, lib=self.library)
        if self.function is not None:
            self.library.impl(name, self.function.apply, "Autograd")

    def call(self, kernel_backend: str, *inputs: Any) -> Any:
        """The result on the backend that the caller names; on "torch" the reference, with derivatives of any order.

        Args:
            kernel_backend: as in `uses_triton` of kernel_backend.py.
            inputs: the schema's arguments.
        """
        if not uses_triton(inputs[self.operand], kernel_backend):
            return self.reference(*inputs)
        return self(*inputs)

    def __call__(self, *inputs: Any) -> Any:
        if not runs_eagerly():
            refuse_transforms_of_kernels(self.name)
            return self.overload(*inputs)
        run = self.chosen(inputs)
        if self.function is not None and run is not self.reference and torch.is_grad_enabled():
            for value in inputs:
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    return self.apply(*inputs)
        return run(*inputs)
