"""Triton or PyTorch: the one switch between kernels and references, how operators register once, and how calls run."""

import importlib.util
import os
import zlib
from collections.abc import Callable
from typing import Any

import torch

KERNEL_BACKENDS = ("auto", "triton", "torch")
ENVIRONMENT_VARIABLE = "COLT5_KERNEL_BACKEND"
# read once, like the next two: a look into the environment takes the host longer than most of a launch
FORCED_BACKEND = os.environ.get(ENVIRONMENT_VARIABLE)
# looked up once: a compiler could not trace the search
_HAS_TRITON = importlib.util.find_spec("triton") is not None
# whether kernels run in interpreter mode, which takes CPU tensors; read once, as Triton does when it decorates one
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_is_available() -> bool:
    """Whether Triton can be imported, on whatever device."""
    return _HAS_TRITON


# of each device, asked once: the question takes the host as long as a launch
_bfloat16: dict[int, bool] = {}


@torch.compiler.assume_constant_result
def _has_bfloat16(device: int) -> bool:
    """Whether the GPU's processors compute in bf16: NVIDIA's do from compute capability 8.0 on, AMD's all."""
    if device not in _bfloat16:
        _bfloat16[device] = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return _bfloat16[device]


def _takes_dtype(tensor: torch.Tensor) -> bool:
    """Whether kernels take tensors of the dtype on the device: not float64, and not bf16 where it is only emulated."""
    if tensor.dtype == torch.bfloat16 and tensor.is_cuda:
        return _has_bfloat16(tensor.get_device())
    return tensor.dtype != torch.float64


def kernel_takes(tensor: torch.Tensor) -> bool:
    """Whether a Triton kernel can run on `tensor`: what an operator asks, `uses_triton` having chosen the operator."""
    return (tensor.is_cuda or INTERPRETED) and _HAS_TRITON and _takes_dtype(tensor)


def kernel_or(
    kernels: dict[str, Callable[..., Any]], reference: Callable[..., Any], operand: int = 0
) -> Callable[..., Any]:
    """The kernel of the reference's name where it runs, else the reference; one operand's device and dtype decide."""
    kernel = kernels.get(reference.__name__, reference)

    def implementation(*inputs: Any) -> Any:
        return (kernel if kernel_takes(inputs[operand]) else reference)(*inputs)

    return implementation


def uses_triton(tensor: torch.Tensor, kernel_backend: str = "auto") -> bool:
    """Whether an operation on `tensor` runs as a Triton kernel. In float64 none does, nor in bf16 on cards without it.

    Args:
        tensor: an operand of the operation; its device and dtype decide under "auto".
        kernel_backend: "auto" (Triton on CUDA tensors where it is installed), "triton" or "torch", usually
            `config.kernel_backend`. The environment variable `COLT5_KERNEL_BACKEND`, where it was set when this code
            was imported, has the last word.

    Raises:
        ValueError: for a backend of another name.
        RuntimeError: where Triton is asked for and cannot run: not installed, or a CPU tensor outside of
            interpreter mode.
    """
    backend = FORCED_BACKEND or kernel_backend
    if backend not in KERNEL_BACKENDS:
        raise ValueError(f"kernel_backend is {backend!r}; it must be one of {', '.join(KERNEL_BACKENDS)}")
    if backend == "torch" or not _takes_dtype(tensor):
        return False
    if backend == "auto":
        return tensor.is_cuda and triton_is_available()
    if not triton_is_available():
        raise RuntimeError("kernel_backend is 'triton', but triton is not installed; use 'auto' or 'torch'")
    if not tensor.is_cuda and not INTERPRETED:
        raise RuntimeError(
            f"kernel_backend is 'triton', but the tensor is on {tensor.device}; move it to CUDA, use 'auto', "
            "or set TRITON_INTERPRET=1 before Python starts"
        )
    return True


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


def runs_eagerly() -> bool:
    """Whether PyTorch runs operations as they come, with nobody tracing: no compiler, exporter or dispatch mode, and
    no transform of torch.func."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


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
    # a compiler transforms by itself, or says that it cannot
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"colt5::{name} runs as a Triton kernel, which torch.func (grad, vmap and others) cannot transform: use "
            'kernel_backend="torch" in the configuration (or COLT5_KERNEL_BACKEND=torch), where all is plain PyTorch'
        )


def is_capturing() -> bool:
    """Whether the eager calls of now become a CUDA graph."""
    return runs_eagerly() and torch.cuda.is_current_stream_capturing()


def is_hooked(module: torch.nn.Module) -> bool:
    """Whether a call of the module is more than its own forward: a hook, or another forward in its place."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    if "forward" in module.__dict__:
        return True
    # Transformers leaves its hooks for `output_hidden_states` and the like in place, idle
    return any(getattr(hook, "__name__", "") != "output_capturing_hook" for hook in module._forward_hooks.values())


class Operator:
    """An operator `colt5::<name>`, called past PyTorch's dispatcher while nobody traces.

    The dispatcher's Python path costs more host time than a Triton launch (docs/operators.md has the numbers), so
    only tracers (torch.compile, torch.export, fake tensors, opcheck) go through it; eager calls run the
    implementation, inside a `torch.autograd.Function` where gradients are wanted.

    Args:
        schema: `"name(Tensor x, ...) -> ..."`, functional; no output may alias an input.
        implementation: takes the schema's arguments, on any device; chooses between kernel and reference itself.
        fake: the same on fake tensors, for shapes and dtypes alone.
        save: `(ctx, inputs, outputs)`, keeps what the backward needs; None for an operator without gradient.
        backward: `(ctx, *output gradients)` → a gradient or None for each input. Gradients of unused outputs come as
            None. It calls other operators, never kernels, so that tracers see it.
    """

    def __init__(
        self,
        schema: str,
        implementation: Callable[..., Any],
        fake: Callable[..., Any],
        save: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
    ):
        schema = own_schema(schema)
        self.name = name = schema.split("(")[0]
        self.implementation = implementation
        self.function: type[torch.autograd.Function] | None = None
        if save is not None and backward is not None:
            self.function = self._make_function(name, save, backward)
            # Function.apply itself looks through the arguments for what functorch left behind, 4 µs a call
            self.apply = super(torch.autograd.Function, self.function).apply  # type: ignore[misc]
        if not hasattr(torch.ops.colt5, name):
            self._register(name, schema, fake)
        self.overload = getattr(torch.ops.colt5, name).default

    def _make_function(
        self, name: str, save: Callable[..., None], backward: Callable[..., Any]
    ) -> type[torch.autograd.Function]:
        # no separate setup_context: with one, PyTorch binds the arguments by inspection, 30 µs a call
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

    def __call__(self, *inputs: Any) -> Any:
        if not runs_eagerly():
            refuse_transforms_of_kernels(self.name)
            return self.overload(*inputs)
        if self.function is not None and torch.is_grad_enabled():
            for value in inputs:
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    return self.apply(*inputs)
        return self.implementation(*inputs)
