"""What all layers share in one forward pass: the mask, the routers' budgets, and who computes and how."""

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from .kernel_backend import Mode, uses_triton
from .op_soft_topk import check_positive, check_solver
from .run_budgets import RoutingBudget


@dataclass(frozen=True)
class Implementation:
    """Which code computes.

    Args:
        kernel_backend: of all operations: "auto", "triton" or "torch".
        attention: of dense attention, by the name that Transformers has for it, `attn_implementation`.
    """

    kernel_backend: str = "auto"
    attention: str = "sdpa"

    def for_states(self, states: torch.Tensor) -> "Implementation":
        """The same with "auto" decided by the states' device and dtype."""
        return Implementation("triton" if uses_triton(states, self.kernel_backend) else "torch", self.attention)

    @property
    def bias_holds_mask(self) -> bool:
        """Whether the layers of T5's decoder get their bias with the mask in it, as one tensor (`masked_bias`)."""
        return self.attention == "sdpa"

    @property
    def fuses_attention(self) -> bool:
        """Whether fused kernels stand in for "sdpa"; "eager" is for those who want to see the weights."""
        return self.kernel_backend == "triton" and self.attention == "sdpa"


def check_fractions(**fractions: float | None) -> None:
    """Refuse shares of tokens that are none.

    Raises:
        ValueError: naming the share.
    """
    for name, fraction in fractions.items():
        if fraction is not None and not (isinstance(fraction, int | float) and 0 < fraction <= 1):
            raise ValueError(f"{name} is {fraction!r}; it must be a number above 0 and at most 1")


def check_numbers(**numbers: tuple[int | None, int]) -> None:
    """Refuse what is no integer, or below the least one that stands beside it.

    Raises:
        ValueError: naming the number.
    """
    for name, (number, least) in numbers.items():
        if number is not None and (type(number) is not int or number < least):
            raise ValueError(f"{name} is {number!r}; it must be an integer of at least {least}")


@dataclass(frozen=True)
class SoftTopK:
    """The soft top-k that gives routed tokens their weights; the arguments are those of `soft_topk`.

    Args:
        ratio: its size over the number of routed tokens, at least 1.
        epsilon, solver, num_iterations, epsilon_init, epsilon_decay: see there.

    Raises:
        TypeError, ValueError: for a setting of another type or out of its range.
    """

    ratio: float = 9 / 8
    epsilon: float = 1.0
    solver: str = "exact"
    num_iterations: int = 50
    epsilon_init: float | None = None
    epsilon_decay: float = 1.0

    def __post_init__(self) -> None:
        check_positive("ratio", self.ratio)
        if self.ratio < 1:
            raise ValueError(f"ratio is {self.ratio}; it must be at least 1")
        check_solver(self.solver, self.epsilon, self.num_iterations, self.epsilon_init, self.epsilon_decay)

    def keywords(self, kernel_backend: str) -> dict[str, Any]:
        """The keywords of `route`."""
        return {
            "soft_topk_ratio": self.ratio,
            "epsilon": self.epsilon,
            "solver": self.solver,
            "num_iterations": self.num_iterations,
            "epsilon_init": self.epsilon_init,
            "epsilon_decay": self.epsilon_decay,
            "kernel_backend": kernel_backend,
        }


@dataclass(frozen=True)
class CrossSettings:
    """What routed cross-attention has in common in all layers.

    Args:
        num_tokens: that a router takes of a row of the memory, or all where the row has no more; None for all.
        soft_topk: of all routers.

    Raises:
        ValueError: for a number below 1.
    """

    num_tokens: int | None
    soft_topk: SoftTopK

    def __post_init__(self) -> None:
        check_numbers(num_tokens=(self.num_tokens, 1))


@dataclass(frozen=True)
class EncoderSettings:
    """What all encoder layers have in common, whatever the batch.

    Args:
        routing: how tokens are chosen, see `CoLT5Config`.
        query_fraction, key_value_fraction: shares of the real tokens that are routed; None without attention.
        feed_forward_fraction: likewise; None without a feed-forward.
        min_routed_tokens: least number of tokens to route, as far as a row has so many.
        soft_topk: of all routers.
        implementation: who computes.

    Raises:
        ValueError: for a share that is none, or a number below 1.
    """

    routing: str
    query_fraction: float | None
    key_value_fraction: float | None
    feed_forward_fraction: float | None
    min_routed_tokens: int
    soft_topk: SoftTopK
    implementation: Implementation

    def __post_init__(self) -> None:
        check_fractions(
            query_fraction=self.query_fraction,
            key_value_fraction=self.key_value_fraction,
            feed_forward_fraction=self.feed_forward_fraction,
        )
        check_numbers(min_routed_tokens=(self.min_routed_tokens, 1))


# How many queries times keys, of all rows, kernels attend to; more are PyTorch's. By what a decoder of base size took
# forward and backward on an H200: kernels save most of the host's time, and up to this many pairs with a memory the
# card's time too in half precision. In fp32 they take the card four times as long as PyTorch.
MOST_PAIRS_OF_KERNELS = 512 * 131_072
MOST_PAIRS_IN_FLOAT32 = 256 * 256
# For self-attention PyTorch reads a bias for each pair, and takes twice as long and more. So in half precision a text
# whose memory is at most so many times as long is always one for kernels.
LONGEST_MEMORY_OF_KERNELS = 32
# Tiles of larger heads need more shared memory than many cards have (docs/operators.md).
MOST_FEATURES_OF_KERNELS = 128


def kernels_attend(
    implementation: Implementation, mode: Mode, states: torch.Tensor, memory_tokens: int, head_size: int
) -> bool:
    """Whether kernels attend in a pass of T5's decoder without a cache, as `DecoderPlan` has it.

    Args:
        implementation: who computes, decided for the pass.
        mode: of the pass.
        states: [batch, n, d_model].
        memory_tokens: of a row of the memory; 0 without an encoder.
        head_size: features of a head.
    """
    if not (implementation.fuses_attention and mode.is_eager) or head_size > MOST_FEATURES_OF_KERNELS:
        return False
    batch, tokens, _ = states.shape
    if mode.dtype_of_products(states.dtype) == torch.float32:
        return batch * tokens * max(tokens, memory_tokens) <= MOST_PAIRS_IN_FLOAT32
    is_short = memory_tokens <= LONGEST_MEMORY_OF_KERNELS * tokens
    return is_short or batch * tokens * memory_tokens <= MOST_PAIRS_OF_KERNELS


@dataclass
class DecoderPlan:
    """What all decoder layers share in one forward pass.

    Args:
        implementation: who computes.
        mask: of T5's self-attention, as Transformers makes it; None for all earlier tokens, in routed layers, and
            where the bias holds it. Where kernels attend, bool [batch, n], True for real tokens; None for all.
        windows: of causally routed layers (`CausalPlan` of run_causal_plan.py); None in T5's.
        memory_mask: bool [batch, encoder length or slots], True for real tokens; None for all, and without an encoder.
        asking: for tokens that choose themselves what they read of the memory; None where they do not.
        straight: what straight lines of kernels have in common (`DecoderPass` of layer_decoder_parts.py), where plain
            blocks may run as such; None where all run as modules.
        projected: the memory's keys and values, [batch, encoder length, key/value heads, d_kv] each, of one layer
            after another; None where each layer projects the memory itself.
        kernels_attend: whether both attentions of T5's layers are `full_attention` of op_attention.py, in modules as
            in straight lines. The bias of self-attention is then a table by distance.
    """

    implementation: Implementation
    mask: torch.Tensor | None = None
    windows: Any = None
    memory_mask: torch.Tensor | None = None
    asking: CrossSettings | None = None
    straight: Any = None
    projected: tuple[torch.Tensor, ...] | None = None
    kernels_attend: bool = False

    @property
    def kernel_backend(self) -> str:
        """Of T5's layers: "auto", "triton" or "torch"."""
        return self.implementation.kernel_backend

    def to(self, device: torch.device, non_blocking: bool = False) -> "DecoderPlan":
        """The same on another device; Accelerate calls it where a device map spreads the blocks."""
        parts = {name: getattr(self, name) for name in ("mask", "windows", "memory_mask")}
        moved = {name: part.to(device, non_blocking=non_blocking) for name, part in parts.items() if part is not None}
        return replace(self, **moved)


@dataclass
class RouterPlan:
    """What routers need to know of a pass.

    Args:
        mask: bool [batch, n], True for real tokens; None for all.
        implementation: who computes, decided for the pass.
        settings: of the soft top-k, the keywords of `route`.
        dense_start: fp32 [], how far a dense start has come; None for the paper's routing.
    """

    mask: torch.Tensor | None
    implementation: Implementation
    settings: dict[str, Any]
    dense_start: torch.Tensor | None

    @classmethod
    def of(
        cls,
        soft_topk: SoftTopK,
        implementation: Implementation,
        states: torch.Tensor,
        mask: torch.Tensor | None,
        dense_start: torch.Tensor | None,
    ) -> "RouterPlan":
        """The plan for states [batch, n, d_model], whose device and dtype choose the kernels."""
        implementation = implementation.for_states(states)
        return RouterPlan(mask, implementation, soft_topk.keywords(implementation.kernel_backend), dense_start)

    @property
    def kernel_backend(self) -> str:
        """ "triton" or "torch"."""
        return self.implementation.kernel_backend


@functools.cache
def graph_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device for what runs beside other kernels in a CUDA graph, the same one for all graphs: memory
    belongs to the stream that took it, so graphs on one stream can share memory.

    PyTorch hands out its streams in turn, 32 of each priority, and whatever is launched on a stream that records is
    recorded too. This one therefore has a priority that few ask for.
    """
    return torch.cuda.Stream(device, priority=-1)


@dataclass
class EncoderPlan(RouterPlan):
    """What all encoder layers share in one forward pass.

    Args:
        mode: how PyTorch runs the pass.
        attention: the budgets of queries and of keys/values; None with `routing="none"` and without attention.
        feed_forward: the budget of the feed-forward; None with `routing="none"` and without one.
        straight: what the straight lines of kernels have in common (`StraightPass` of layer_program.py), where plain
            blocks may run as such; None where all run as modules.
        side: the stream that heavy branches run on next to the light ones, while a CUDA graph is captured; None
            elsewhere, where switching streams would cost the host more than it saves.
        has_parted: whether something runs on `side` that `join` has not waited for.
        width: of the grid whose places the tokens are, counted row by row; None for a text.
    """

    mode: Mode
    attention: RoutingBudget | None = None
    feed_forward: RoutingBudget | None = None
    straight: Any = None
    side: torch.cuda.Stream | None = None
    has_parted: bool = False
    width: int | None = None

    @classmethod
    def make(
        cls,
        settings: EncoderSettings,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None,
        dense_start: torch.Tensor | None = None,
        width: int | None = None,
    ) -> "EncoderPlan":
        """The plan for a batch [batch, n, d_model]: a row's budgets depend on its own number of real tokens.

        `dense_start` is fp32 [], how far a dense start has come; None for the paper's routing. `width` is as above.
        """
        dense_start = dense_start if settings.routing == "learned" else None
        shared = RouterPlan.of(settings.soft_topk, settings.implementation, hidden_states, mask, dense_start)
        plan = cls(**vars(shared), mode=Mode.of_now(hidden_states), width=width)
        if settings.routing == "none":
            return plan
        routers: dict[str, tuple[Any, ...]] = {
            "attention": (settings.query_fraction, settings.key_value_fraction),
            "feed_forward": (settings.feed_forward_fraction,),
        }
        kinds = {name: fractions for name, fractions in routers.items() if None not in fractions}
        if dense_start is None:
            budgets = RoutingBudget.of_fractions(hidden_states, mask, settings.min_routed_tokens, *kinds.values())
        else:
            budgets = [
                RoutingBudget.of_dense_start(hidden_states, mask, fractions, settings.soft_topk.ratio, dense_start)
                for fractions in kinds.values()
            ]
        for name, budget in zip(kinds, budgets, strict=True):
            setattr(plan, name, budget)
        if dense_start is not None:
            return plan
        if plan.mode.is_captured and not plan.mode.keeps_gradients:
            plan.side = graph_stream(hidden_states.device)
        return plan

    def heavy(self) -> AbstractContextManager:
        """Inside, a sublayer's heavy branch: from its routers on, it may run next to what comes after until `join`.

        What it reads must live until then.
        """
        if self.side is None:
            return nullcontext()
        self.side.wait_stream(torch.cuda.current_stream())
        self.has_parted = True
        return torch.cuda.stream(self.side)

    def join(self) -> None:
        """Wait for the heavy branch, where one runs on the other stream.

        To wait for a stream that takes no part in a recording would break that off.
        """
        if self.side is not None and self.has_parted:
            torch.cuda.current_stream().wait_stream(self.side)
            self.has_parted = False

    def to(self, device: torch.device, non_blocking: bool = False) -> "EncoderPlan":
        """The same on another device; Accelerate calls it where a device map spreads the blocks."""

        def moved(part: Any) -> Any:
            return part if part is None else part.to(device, non_blocking=non_blocking)

        parts = {name: moved(getattr(self, name)) for name in ("mask", "attention", "feed_forward", "dense_start")}
        return replace(self, **parts)
