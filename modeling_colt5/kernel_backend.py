"""Triton or PyTorch: the one switch between kernels and references; and how PyTorch runs the calls of now."""

import importlib.util
import os
from typing import NamedTuple

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

HALF_DTYPES = (torch.float16, torch.bfloat16)
KERNEL_BACKENDS = ("auto", "triton", "torch")
ENVIRONMENT_VARIABLE = "COLT5_KERNEL_BACKEND"
# This and the next two are read once: a look into the environment takes the host longer than most of a launch.
FORCED_BACKEND = os.environ.get(ENVIRONMENT_VARIABLE)
# A compiler could not trace the search.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
# In interpreter mode kernels take CPU tensors. Triton too reads the variable once, when it decorates a kernel.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_is_available() -> bool:
    """Whether Triton can be imported, on whatever device."""
    return _HAS_TRITON


# Each device is asked once, because the question takes the host as long as a launch.
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


def runs_eagerly() -> bool:
    """Whether PyTorch runs operations as they come, with nobody tracing: no compiler, exporter or dispatch mode, and
    no transform of torch.func."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def is_transformed() -> bool:
    """Whether a transform of torch.func is on that is no compiler's: those transform operators by themselves, or say
    that they cannot."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def records_now() -> bool:
    """Whether autograd records operations that run as they come."""
    return torch.is_grad_enabled() and runs_eagerly()


def is_autocast(states: torch.Tensor) -> bool:
    """Whether autocast is on for products of these states. PyTorch has no answer for tensors without data."""
    return not states.is_meta and torch.is_autocast_enabled(states.device.type)


def product_dtype(states: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast will take a product of fp32 states in; None where it would leave them.

    Who makes such states can round them to it at once, which saves each product a copy of its own, and its gradient
    another.
    """
    if states.dtype == torch.float32 and is_autocast(states):
        return torch.get_autocast_dtype(states.device.type)
    return None


class Mode(NamedTuple):
    """How PyTorch runs a pass, asked once at its beginning.

    Args:
        is_eager: whether operations run as they come, see `runs_eagerly`.
        keeps_gradients: whether autograd records.
        is_captured: whether what is eager becomes a CUDA graph.
        is_watched: whether hooks are on all modules of the process.
        autocast: the dtype that autocast takes products in; None where it is off.
        is_deterministic: whether PyTorch is to compute the same bits again, of what is eager.
    """

    is_eager: bool
    keeps_gradients: bool
    is_captured: bool
    is_watched: bool
    autocast: torch.dtype | None
    is_deterministic: bool

    @classmethod
    def of_now(cls, states: torch.Tensor) -> "Mode":
        """The mode of a pass over these states."""
        is_eager = runs_eagerly()
        is_captured = is_eager and states.is_cuda and torch.cuda.is_current_stream_capturing()
        autocast = torch.get_autocast_dtype(states.device.type) if is_autocast(states) else None
        is_deterministic = is_eager and torch.are_deterministic_algorithms_enabled()
        return cls(is_eager, torch.is_grad_enabled(), is_captured, is_watched(), autocast, is_deterministic)

    def dtype_of_products(self, dtype: torch.dtype) -> torch.dtype | None:
        """The dtype of products of states of a dtype; None where autocast takes other states than those of fp32 to
        another."""
        if self.autocast is None:
            return dtype
        return self.autocast if dtype in (self.autocast, torch.float32) else None

    def takes_straight_lines(self, states: torch.Tensor) -> bool:
        """Whether straight lines of kernels may stand for the modules of a pass over these states, as far as that is
        no matter of the modules: nobody looks at operations or tensors of their own kind, or wants what the lines
        do not give."""
        return (
            self.is_eager
            and not self.is_watched
            and not self.is_deterministic
            and type(states) in (torch.Tensor, torch.nn.Parameter)
            and states.numel() > 0
            and self.dtype_of_products(states.dtype) is not None
            and forward_ad._current_level < 0
        )

    @property
    def is_plain_inference(self) -> bool:
        """Whether a pass computes a result and nothing else, as it comes."""
        return self.is_eager and not (self.keeps_gradients or self.is_captured or self.is_watched or self.autocast)


def can_look(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values can be looked at: they are there, and nobody waits for a device."""
    return tensor.device.type == "cpu" and runs_eagerly()


def is_watched() -> bool:
    """Whether hooks are on all modules of the process, so that each call of a module is to be one."""
    # PyTorch answers with the hooks themselves
    return bool(torch_module._has_any_global_hook())


def is_hooked(module: torch.nn.Module) -> bool:
    """Whether a call of the module is more than its own forward: a hook, or another forward in its place."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return "forward" in module.__dict__ or shows_results(module)


def shows_results(module: torch.nn.Module) -> bool:
    """Whether a hook sees what the module returns."""
    # Transformers leaves its hooks for `output_hidden_states` and the like in place, where they do nothing.
    return any(getattr(hook, "__name__", "") != "output_capturing_hook" for hook in module._forward_hooks.values())


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype statistics and sums are kept in: fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def normed_dtype(hidden_dtype: torch.dtype, weight_dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype of the normalised states: what is wanted, or a half-precision weight's, as in T5, or else the hidden
    states'."""
    return wanted or (weight_dtype if weight_dtype in HALF_DTYPES else hidden_dtype)
