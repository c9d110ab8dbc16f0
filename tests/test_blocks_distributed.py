"""The stand-alone modules in DistributedDataParallel: two processes have the gradients of one, and none is missing."""

import faulthandler
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from example_runs import REPOSITORY, run_processes
from rounding import assert_same_but_for_rounding
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from modeling_colt5 import (
    CoLT5CausalConditionalAttention,
    CoLT5CausalConditionalFeedForward,
    CoLT5ConditionalAttention,
    CoLT5ConditionalBlock,
    CoLT5ConditionalCrossAttention,
    CoLT5ConditionalFeedForward,
    CoLT5ConditionalImageAttention,
    op_norm,
    set_dense_start,
)

D = 16
HEADS: dict[str, Any] = {"d_kv": 4, "num_light_heads": 2, "num_heavy_heads": 2, "local_radius": 3}
FEED_FORWARD: dict[str, Any] = {"light_d_ff": 8, "heavy_d_ff": 24, "routed_feed_forward_fraction": 1 / 4}
ATTENTION: dict[str, Any] = HEADS | {"routed_query_fraction": 1 / 4, "routed_key_value_fraction": 1 / 3}


class Network(nn.Module):
    """Every kind of module once, two attentions with the same biases, and a part that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.second = (CoLT5ConditionalAttention(D, **ATTENTION) for _ in range(2))
        for name in ("light_relative_attention_bias", "heavy_relative_attention_bias"):
            setattr(self.second, name, getattr(self.attention, name))
        self.feed_forward = CoLT5ConditionalFeedForward(D, **FEED_FORWARD)
        self.block = CoLT5ConditionalBlock(D, **ATTENTION | FEED_FORWARD)
        self.image = CoLT5ConditionalImageAttention(D, **ATTENTION)
        self.cross = CoLT5ConditionalCrossAttention(D, 5, d_kv=4, num_heads=2, num_cross_routers=2)
        self.asking = CoLT5ConditionalCrossAttention(D, 5, d_kv=4, num_heads=2, asking_cross_routing=True)
        causal = HEADS | {"causal_window": 4, "causal_routed_keys": 6, "routed_query_fraction": 1 / 4}
        self.causal_attention = CoLT5CausalConditionalAttention(D, **causal)
        self.causal_feed_forward = CoLT5CausalConditionalFeedForward(D, **FEED_FORWARD, causal_window=4)

    def forward(self, states: Tensor, mask: Tensor, leaves_out: bool) -> Tensor:
        """[batch, n, D] and a mask → a loss for each row."""
        states = self.second(self.attention(states, mask), mask)
        states = states if leaves_out else self.feed_forward(states, mask)
        states = self.block(states, mask)
        states = self.image(states.unflatten(1, (-1, 4)), mask.unflatten(1, (-1, 4))).flatten(1, 2)
        memory, queries = states.tanh(), states[:, :3]
        read = self.cross(queries, memory, mask) + self.asking(queries, memory, mask)
        states = self.causal_feed_forward(self.causal_attention(states, mask), mask)
        return states.masked_fill(~mask[..., None], 0).square().mean((1, 2)) + read.square().mean((1, 2))


# length, how far a dense start is, whether a part is left out; four tokens are fewer than a router takes of a memory
STEPS = [(20, None, False), (20, 0.0, False), (20, 0.5, False), (4, None, False), (20, None, True)]


def make_network() -> Network:
    torch.manual_seed(0)
    return Network().double().train()


def step(network: nn.Module, number: int, rows: slice) -> None:
    """The gradients of the mean loss of these rows."""
    length, progress, leaves_out = STEPS[number]
    generator = torch.Generator().manual_seed(number)
    states = torch.randn(4, length, D, dtype=torch.float64, generator=generator)
    mask = torch.arange(length) < torch.tensor([length, length - 1, length - 3, length // 2])[:, None]
    set_dense_start(network, progress)
    network.zero_grad()
    network(states[rows], mask[rows], leaves_out).mean().backward()


def gradients(network: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def with_float64_statistics() -> None:
    """What the fixture of this name does, for a process of its own."""
    op_norm.mean_square = lambda hidden_states: hidden_states.pow(2).mean(-1)


# seconds; beside other work the two processes take forty
LONGEST = 300


def run_process(rank: int, folder: Path) -> None:
    """One of two processes: half of the rows, and what the first one has in the end."""
    # one that hangs says where, and ends; the other one is ended then
    faulthandler.dump_traceback_later(LONGEST, exit=True)
    with_float64_statistics()
    store, longest = f"file://{folder / 'store'}", timedelta(seconds=LONGEST / 2)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=longest)
    results = []
    # PyTorch looks for parameters without a gradient where it is told that there may be some; elsewhere one that has
    # none is an error in the next step
    networks = [DistributedDataParallel(make_network(), find_unused_parameters=finds) for finds in (False, True)]
    for number, (_, _, leaves_out) in enumerate(STEPS):
        network = networks[leaves_out]
        step(network, number, slice(2 * rank, 2 * rank + 2))
        results.append(gradients(network.module))
    if rank == 0:
        torch.save(results, folder / "gradients.pt")
    dist.destroy_process_group()
    # At its end Python frees what PyTorch's threads have, and they may wait for Python's lock then, for ever
    # (https://github.com/pytorch/pytorch/issues/190489).
    os._exit(0)


# two processes start Python and import Transformers anew
@pytest.mark.slow
@pytest.mark.usefixtures("float64_statistics")
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    run_processes([sys.executable, __file__, tmp_path], 1.5 * LONGEST, env=environment)
    network = make_network()
    results = torch.load(tmp_path / "gradients.pt")
    for number, (result, (_, _, leaves_out)) in enumerate(zip(results, STEPS, strict=True)):
        step(network, number, slice(None))
        expected = gradients(network)
        assert result.keys() == expected.keys()
        for name, gradient in expected.items():
            # what is left out has no gradient, and everything else has one
            assert (gradient is None) == (leaves_out and name.startswith("feed_forward.")), name
            assert (result[name] is None) == (gradient is None), name
            if gradient is not None:
                assert_same_but_for_rounding(result[name], gradient, f"{name} of step {number}")


if __name__ == "__main__":
    torch.multiprocessing.spawn(run_process, (Path(sys.argv[1]),), nprocs=2)
