"""Which kernels are compiled, for which lengths and cards: few variants, and each fits the memory of every card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]

# in a process of its own, because the tests' one may interpret kernels, and Triton decides that when it decorates them
COUNT = """
import collections, json, sys
sys.path.insert(0, "benchmarks")
import torch
from kernel_variants import recorded
from modeling_colt5 import op_routing, op_rows

variants = set()
settings = ("exact", 1.0, 50, 1.0, 1.0)
with recorded(variants):
    for n in (1, 16, 100, 1000, 1024, 2047, 2048, 3000, 4096, 5000, 8192, 16000, 16384):
        for rows in (1, 3):
            # one router's scores among several, a mask of a longer batch
            scores, mask = torch.zeros(rows, 2, n)[:, 0], torch.ones(rows, n + 7, dtype=torch.bool)[:, :n]
            capacity = max(1, n // 16)
            budget = torch.full((rows,), capacity)
            inputs = (scores, budget, None, mask, None, capacity, 9 / 8, *settings)
            routed = op_routing._route.kernel(*inputs)
            op_routing._route.gradient.kernel(routed[0], *inputs, *routed, [True, True])
            routing = (*routed[1:3], routed[0])
            op_rows._gather.kernel(torch.zeros(rows, n, 32), *routing, *routing)
print(json.dumps(collections.Counter(variant.kernel for variant in variants)))
"""

# What is launched on a card that Triton is told of, and that is not there: a launch would fail.
TOGETHER = """
import json
import threading
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

loaded = []

class Utils:
    get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232_448})

    @staticmethod
    def load_binary(name, *others):
        loaded.append(threading.current_thread().name != "MainThread")
        return 1, 2, 32, 0, 1024

class Driver:
    utils = Utils()
    launcher_cls = staticmethod(lambda *of_kernel: len)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

driver.set_active(Driver())
torch._C._cuda_getDevice = lambda: -1
torch._C._cuda_setDevice = lambda device: None
from modeling_colt5 import op_gelu_triton, run_launch_triton

counts = []
for turn in range(2):
    with run_launch_triton.only_compiled():
        for dtype in (torch.float32, torch.bfloat16):
            states = torch.ones(4, 64, dtype=dtype)
            op_gelu_triton.gated_gelu_into(states, states, torch.empty_like(states))
    kept = op_gelu_triton.gated_gelu_kernel.device_caches[0][0]
    counts.append([type(kernel).__name__ for kernel in kept.values()])
print(json.dumps([counts, loaded]))
"""


def run_compiled(*command: str) -> str:
    """What a Python process prints that compiles kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


# a process of its own, and 52 launches of five kernels: seven seconds
@pytest.mark.slow
def test_new_lengths_are_no_new_kernels():
    """Whatever lengths, strides and budgets are, a kernel a power of two: from 2,048 tokens up, and 256 slots."""
    counts = json.loads(run_compiled("-c", COUNT))
    assert counts == {"route_kernel": 4, "route_backward_kernel": 3, "gather_kernel": 1}


@pytest.mark.slow
def test_the_most_demanding_variants_fit_every_card():
    """Compiled for seven generations of cards, none of which is needed."""
    table = run_compiled("benchmarks/kernel_variants.py", "--quick")
    assert "route_kernel" in table
    assert "attention_backward_key_kernel" in table


@pytest.mark.slow
def test_kernels_are_compiled_together_without_a_launch():
    """Triton keeps what its threads compiled and loaded, so that a launch finds it."""
    counts, loaded = json.loads(run_compiled("-c", TOGETHER))
    assert counts == [["CompiledKernel"] * 2] * 2
    # each once, by a thread of its own
    assert loaded == [True] * 2
