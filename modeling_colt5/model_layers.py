"""What encoder and decoder layers are made of: norm, attention's projections, feed-forward, bias by distance."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from einops import rearrange
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_colt5 import activation_name, is_gated
from .kernel_backend import (
    accumulation_dtype,
    is_autocast,
    is_hooked,
    product_dtype,
    records_now,
    runs_eagerly,
)
from .op_dropout import dropout
from .op_gelu import gated_gelu
from .op_norm import rms_norm_scores
from .run_budgets import is_free

# the class of the activation that the fused kernel has, T5's tanh form of the GELU
GELU = type(ACT2FN["gelu_new"])


def product_by_heads(states: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """[batch, heads, n, x] times [batch, key/value heads, x, y] → [batch, heads, n, y]."""
    heads, groups = states.shape[1], factors.shape[1]
    if heads == groups:
        return torch.matmul(states, factors)
    # Heads that share a key/value head are just more rows for it.
    rows = rearrange(states, "b (g h) n x -> b g (h n) x", g=groups)
    return rearrange(torch.matmul(rows, factors), "b g (h n) y -> b (g h) n y", h=heads // groups)


def attention_weights(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float = 1.0,
    position_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weights of attention written out, [batch, heads, queries, keys]; arguments as of
    `eager_attention_forward`."""
    scores = product_by_heads(query, key.transpose(2, 3)) * scaling
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    return nn.functional.dropout(scores.softmax(-1).to(query.dtype), dropout, module.training)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float = 1.0,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, for `attn_implementation="eager"`; the softmax is taken in fp32.

    Args:
        module: the attention module, whose mode decides about dropout.
        query: [batch, heads, queries, d_kv].
        key, value: [batch, key/value heads, keys, d_kv]; the number of heads is a multiple of theirs.
        attention_mask: bool (True = attend) or additive, broadcastable to [batch, heads, queries, keys].
        dropout: probability of dropping an attention weight.
        scaling: factor on the scores; T5's is 1.
        position_bias: added to the scores, broadcastable to them.

    Returns:
        The output [batch, queries, heads, d_kv] and the weights [batch, heads, queries, keys] that it is made of.
    """
    weights = attention_weights(module, query, key, attention_mask, dropout, scaling, position_bias)
    return product_by_heads(weights, value).transpose(1, 2).contiguous(), weights


def clamp_half(hidden_states: torch.Tensor) -> torch.Tensor:
    """T5's remedy for the narrow range of fp16: infinities become the largest number, less a margin."""
    if hidden_states.dtype != torch.float16:
        return hidden_states
    limit = torch.finfo(torch.float16).max - 1000
    return hidden_states.clamp(-limit, limit)


@contextlib.contextmanager
def recomputed_in_backward(states: torch.Tensor, recompute: Callable[[], torch.Tensor]) -> Iterator[None]:
    """Inside, whatever autograd would keep of `states` for its backward is computed again there instead.

    For results that are cheaper to repeat than to store (a norm, a gated activation) around the projections that
    read them, whatever those are: a LoRA adapter's included. Eager calls only; compilers decide that for themselves.

    Args:
        states: a contiguous tensor.
        recompute: gives the same values again; it runs without gradients, once for each time they were kept.
    """
    if not records_now():
        yield
        return
    address = states.data_ptr()

    def pack(kept: torch.Tensor) -> Any:
        if kept.data_ptr() == address and kept.numel() == states_numel and kept.is_contiguous():
            return kept.shape
        return kept

    def unpack(kept: Any) -> torch.Tensor:
        if isinstance(kept, torch.Size):
            with torch.no_grad():
                return recompute().view(kept)
        return kept

    states_numel = states.numel()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class CoLT5Dropout(nn.Dropout):
    """Dropout that can follow from a seed; without one it is PyTorch's."""

    def forward(self, states: torch.Tensor, seed: torch.Tensor | None = None) -> torch.Tensor:
        """States [..., width] → the same shape; the seed is int64 [1], see `dropout` of op_dropout.py."""
        if seed is None or not self.training or not 0 < self.p < 1:
            return super().forward(states)
        return dropout(states, seed, self.p, "triton")


def drop(module: nn.Module, states: torch.Tensor, seed: torch.Tensor | None) -> torch.Tensor:
    """What the module drops of the states, by a seed where there is one and the module takes one: whatever a user put
    in the place of `CoLT5Dropout` is called as PyTorch's dropout is."""
    return module(states) if seed is None or not isinstance(module, CoLT5Dropout) else module(states, seed)


def drop_rate(module: nn.Module | None) -> float:
    """The probability with which a dropout, an attention or a feed-forward drops now."""
    rate = getattr(module, "dropout", None)
    if isinstance(rate, nn.Module):
        return drop_rate(rate)
    if module is None or not module.training:
        return 0.0
    return float(getattr(module, "p", 0.0) if rate is None else rate)


def drops(dropout: nn.Module) -> bool:
    """Whether a dropout is to be called at all: not PyTorch's or ours where it would give back what it gets and no
    hook looks on. A subclass may drop in evaluation too."""
    is_known = type(dropout) in (nn.Dropout, CoLT5Dropout) and not is_hooked(dropout)
    return not is_known or drop_rate(dropout) > 0


class CoLT5LayerNorm(nn.Module):
    """T5's norm: root mean square, no bias; on the way it takes the router scores of the normalised states."""

    def __init__(self, d_model: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_weights: torch.Tensor | None = None,
        kernel_backend: str = "auto",
        for_products: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Normalise [batch, n, d_model]; with router vectors [routers, d_model], or one [d_model], also their scores,
        see `rms_norm_scores`. `for_products` says that the normalised states go into matrix products alone."""
        dtype = product_dtype(hidden_states) if for_products else None
        if router_weights is not None and router_weights.dim() == 1:
            # The caller could not do this: PyTorch's module hooks (FlopCounterMode) take no view that was made without
            # gradients.
            router_weights = router_weights[None]
        return rms_norm_scores(hidden_states, self.weight, router_weights, self.eps, kernel_backend, dtype)


def masked_bias(
    position_bias: torch.Tensor, mask: torch.Tensor | None, past: int | torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Causal self-attention's bias and mask as one tensor, the additive mask that PyTorch's attention takes.

    Transformers' function for "sdpa" would make it in each layer, and each would be kept for the backward pass. T5's
    layers have one bias in common, so that one serves them all.

    Args:
        position_bias: [1, heads, queries, keys].
        mask: bool (True = attend) or additive [batch, 1, queries, keys]; None where each query sees its own position
            and all before.
        past: position of the first query; the keys' are 0, 1, ...
        dtype: of the queries.

    Returns:
        [batch or 1, heads, queries, keys] in that dtype.
    """
    position_bias = position_bias.to(dtype)
    queries, keys = position_bias.shape[-2:]
    if mask is None:
        query, key = (torch.arange(length, device=position_bias.device) for length in (queries, keys))
        mask = key <= query[:, None] + past
    if mask.dtype == torch.bool:
        return torch.where(mask, position_bias, torch.finfo(dtype).min)
    return position_bias + mask.to(dtype)


def attention_interface(implementation: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """The implementation of dense attention that Transformers has under this name."""
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)


def _trains_bias_alone(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, mask: torch.Tensor | None
) -> bool:
    """Whether autograd wants a gradient of the bias, which the mask may hold, and of nothing else in an attention: in
    layers that are frozen below all that is trained, since they share the bias with the others."""
    if not torch.is_grad_enabled() or any(part.requires_grad for part in (query, key, value)):
        return False
    return any(part is not None and part.requires_grad for part in (bias, mask))


class CoLT5Attention(nn.Module):
    """T5's projections for a number of heads; the kinds of attention derive from it."""

    is_causal = False

    def __init__(
        self,
        d_model: int,
        d_kv: int,
        num_heads: int,
        num_key_value_heads: int | None = None,
        dropout_rate: float = 0.0,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.num_key_value_heads = num_key_value_heads or num_heads
        self.d_kv = d_kv
        self.dropout = dropout_rate
        self.q = nn.Linear(d_model, num_heads * d_kv, bias=False)
        self.k = nn.Linear(d_model, self.num_key_value_heads * d_kv, bias=False)
        self.v = nn.Linear(d_model, self.num_key_value_heads * d_kv, bias=False)
        self.o = nn.Linear(num_heads * d_kv, d_model, bias=False)

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """[batch, n, heads * d_kv] → [batch, n, heads, d_kv]."""
        batch, length, width = states.shape
        return states.view(batch, length, width // self.d_kv, self.d_kv)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        mask: torch.Tensor | None,
        implementation: str,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Dense attention by the implementation that Transformers has under this name; shapes as in `Attend`, and
        where there are fewer key/value heads than heads, no bias and a mask that all queries share.

        Written out, whatever that is, in exported programs whose number of queries is free: "sdpa" asks if it is 1;
        and where a gradient is wanted of the bias alone, for which PyTorch's kernels keep nothing.
        """
        dropout = self.dropout if self.training else 0.0
        bias = None if bias is None else bias.to(query.dtype)
        interface = attention_interface(implementation)
        if not self.is_causal and is_free(query.shape[2]):
            interface = eager_attention_forward
        if _trains_bias_alone(query, key, value, bias, mask):
            interface = eager_attention_forward
        if interface is eager_attention_forward:
            return eager_attention_forward(self, query, key, value, mask, dropout, position_bias=bias)
        # A cache that was filled before autocast was on keeps its dtype.
        key, value = key.to(query.dtype), value.to(query.dtype)
        heads, groups = query.shape[1], key.shape[1]
        if heads > groups:
            # Heads that share a key/value head are just more queries for it. All of a token lie side by side, as the
            # projections leave them, so that one such head takes no copy.
            query = rearrange(query, "b (g h) n d -> b g (n h) d", g=groups)
        output, weights = interface(self, query, key, value, mask, dropout=dropout, scaling=1.0, position_bias=bias)
        if heads > groups:
            output = rearrange(output, "b (n h) g d -> b n (g h) d", h=heads // groups)
            if weights is not None:
                weights = rearrange(weights, "b g (n h) k -> b (g h) n k", h=heads // groups)
        return output, weights

    def weigh(
        self, query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The weights of `attend` written out, [N, heads, queries, keys]."""
        dropout = self.dropout if self.training else 0.0
        return attention_weights(self, query, key, mask, dropout, position_bias=bias.to(query.dtype))


class CoLT5DenseActDense(nn.Module):
    """T5's feed-forward of a given hidden size, gated or not; `feed_forward_proj` as in `CoLT5Config`."""

    def __init__(self, d_model: int, d_ff: int, feed_forward_proj: str = "gated-gelu", dropout_rate: float = 0.0):
        super().__init__()
        self.is_gated_act = is_gated(feed_forward_proj)
        if self.is_gated_act:
            self.wi_0 = nn.Linear(d_model, d_ff, bias=False)
            self.wi_1 = nn.Linear(d_model, d_ff, bias=False)
        else:
            self.wi = nn.Linear(d_model, d_ff, bias=False)
        self.wo = nn.Linear(d_ff, d_model, bias=False)
        self.dropout = CoLT5Dropout(dropout_rate)
        self.act = ACT2FN[activation_name(feed_forward_proj)]

    @property
    def has_gated_gelu(self) -> bool:
        """Whether the activation is that of the fused kernel, has not been replaced, and has no hooks."""
        return self.is_gated_act and type(self.act) is GELU and not is_hooked(self.act)

    def forward(
        self, hidden_states: torch.Tensor, kernel_backend: str = "auto", seed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[..., d_model] → the same shape, in the dtype of `wo`; `seed` is that of dropout."""
        if not self.is_gated_act:
            return self.project_out(drop(self.dropout, self.act(self.wi(hidden_states)), seed))
        gate, up = self.wi_0(hidden_states), self.wi_1(hidden_states)
        if not self.has_gated_gelu:
            return self.project_out(drop(self.dropout, self.act(gate) * up, seed))
        activated = gated_gelu(gate, up, kernel_backend)
        if drops(self.dropout):
            return self.project_out(drop(self.dropout, activated, seed))
        # The result is cheap to compute again, and with gate and up the largest of what a layer would keep for its
        # backward.
        with recomputed_in_backward(activated, lambda: gated_gelu(gate, up, kernel_backend)):
            return self.project_out(activated)

    def project_out(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., d_ff] → [..., d_model]."""
        # `wo` stays in fp32 in an fp16 model. A quantised weight may be no float, or no tensor at all.
        weight = self.wo.weight
        is_float = isinstance(weight, torch.Tensor) and weight.is_floating_point()
        if is_float and weight.dtype != hidden_states.dtype and not is_autocast(hidden_states):
            hidden_states = hidden_states.to(weight.dtype)
        return self.wo(hidden_states)


def relative_position_bucket(
    relative_position: torch.Tensor, bidirectional: bool, num_buckets: int, max_distance: int
) -> torch.Tensor:
    """T5's bucket of each relative position: exact up to a quarter or half of the buckets, logarithmic beyond.

    Args:
        relative_position: integers, key position minus query position, any shape.
        bidirectional: half of the buckets for keys after the query; otherwise those keys share bucket 0.
        num_buckets: number of buckets in all.
        max_distance: distances from here on share the last bucket.

    Returns:
        int64 bucket numbers in [0, num_buckets), of the same shape.
    """
    if bidirectional:
        num_buckets //= 2
        bucket = torch.where(relative_position > 0, num_buckets, 0)
        distance = relative_position.abs()
    else:
        bucket = torch.zeros_like(relative_position)
        distance = (-relative_position).clamp(min=0)
    exact = num_buckets // 2
    # Distances below `exact` never read this branch; the clamp keeps the logarithm finite there.
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    logarithmic = (exact + (ratio * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return bucket + torch.where(distance < exact, distance, logarithmic)


class CoLT5RelativePositionBias(nn.Embedding):
    """The learned bias of one attention branch, shared by all layers of a stack: [num_buckets, num_heads].

    In two dimensions each pair of buckets, one by rows and one by columns, has an entry: [num_buckets², num_heads].
    """

    def __init__(self, num_heads: int, num_buckets: int, max_distance: int, bidirectional: bool, dimensions: int = 1):
        super().__init__(num_buckets**dimensions, num_heads)
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        # It is no buffer, because a buffer that checkpoints lack is lost where a model without data is filled.
        distance = torch.arange(-max_distance, max_distance + 1, device="cpu")
        bucket = relative_position_bucket(distance, bidirectional, num_buckets, max_distance)
        self.bucket = bucket if dimensions == 1 else bucket[:, None] * num_buckets + bucket

    def _apply(self, fn: Callable, recurse: bool = True) -> "CoLT5RelativePositionBias":
        super()._apply(fn, recurse)
        self.bucket_beside_weight()
        return self

    def bucket_beside_weight(self) -> torch.Tensor:
        """The bucket of each distance from -max_distance to max_distance, or of each pair of them, int64 on the
        weight's device; where the weight has no data, on any.

        It is kept there, as twenty operations make it, which are always the same."""
        device = self.weight.device
        # A weight that waits in memory or on disk gets its data when the module is called, and `forward` its buckets.
        if self.bucket.device == device or device.type == "meta":
            return self.bucket
        if not runs_eagerly():
            return self.bucket.to(device)
        # A tensor that was made in inference mode could not be kept for a gradient later.
        with torch.inference_mode(False):
            self.bucket = self.bucket.to(device)
        return self.bucket

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The biases of buckets, int64 [...] → [..., num_heads]."""
        return super().forward(input.to(self.weight.device))


def bias_by_distance(bias: nn.Module) -> torch.Tensor:
    """The bias by distance: fp32 (float64 in a float64 model), [num_heads, 2 * max_distance + 1], and in two
    dimensions as many rows of as many columns.

    Entry max_distance + d is the bias of a key d positions after its query. All distances from max_distance on
    share a bucket, so that clamped distances lose nothing.

    Args:
        bias: a `CoLT5RelativePositionBias`, or what holds one and is called as an embedding, such as an adapter.
    """
    own = next(part for part in bias.modules() if isinstance(part, CoLT5RelativePositionBias))
    table = bias(own.bucket_beside_weight()).movedim(-1, 0)
    # one copy, whatever the dtype: the first leaves fp32 as it is, the second what the first has copied
    return table.to(accumulation_dtype(table.dtype), memory_format=torch.contiguous_format).contiguous()


def causal_table(table: torch.Tensor) -> torch.Tensor:
    """A bias by distance, [num_heads, 2 * max_distance + 1], with minus infinity for keys after their query."""
    max_distance = table.shape[-1] // 2
    distance = torch.arange(-max_distance, max_distance + 1, device=table.device)
    return table.masked_fill(distance > 0, float("-inf"))
