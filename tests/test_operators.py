"""Every operator: its kernel stands beside its reference and takes the same arguments; what is broken is an error."""

import inspect
import subprocess
import sys

import pytest
import torch

from modeling_colt5 import (
    op_attention,
    op_dropout,
    op_gates,
    op_gelu,
    op_norm,
    op_pools,
    op_routing,
    op_rows,
)
from modeling_colt5.run_operator import Operator

pytest.importorskip("triton")

OPERATORS = {
    operator.name: operator
    for module in (
        op_attention,
        op_dropout,
        op_gates,
        op_gelu,
        op_norm,
        op_pools,
        op_rows,
        op_routing,
    )  # fmt: skip
    for operator in vars(module).values()
    if isinstance(operator, Operator)
}
OPERATORS |= {operator.gradient.name: operator.gradient for operator in OPERATORS.values() if operator.gradient}


def names(function: object) -> list[str]:
    return [parameter.name for parameter in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", OPERATORS)
def test_a_launch_takes_the_operators_arguments_and_then_the_results(name: str) -> None:
    operator = OPERATORS[name]
    given = [argument.name for argument in operator.overload._schema.arguments]
    results = len(operator.overload._schema.returns)
    if name.endswith("_backward"):
        gradients = sum(argument.startswith("grad_") for argument in given)
        # a launch may name gradients as it likes, and which ones are wanted it sees by the tensors that it gets
        given, own = given[gradients:-1], names(operator.launch)[gradients:]
    else:
        assert names(operator.reference) == given
        own = names(operator.launch)
    assert own[: len(given)] == given
    assert len(own) >= len(given) + results or own[len(given) :] == ["results"]


def test_the_list_of_operators_is_not_empty() -> None:
    assert {"route", "attention", "token_norm", "token_gather", "causal_gates", "gated_gelu"} <= set(OPERATORS)


def test_on_the_torch_backend_the_reference_itself_is_called() -> None:
    gate = torch.randn(3, 4, requires_grad=True)
    output = op_gelu.gated_gelu(gate, gate, "torch")
    # plain PyTorch's last step, not a function of ours
    assert type(output.grad_fn).__module__ != "abc" and "gated_gelu" not in type(output.grad_fn).__name__
    (first,) = torch.autograd.grad(output.sum(), gate, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), gate)
    assert second.abs().max() > 0


# a process that imports everything
@pytest.mark.slow
def test_a_kernel_file_that_cannot_be_imported_is_an_error() -> None:
    # a slip of the pen in a kernel file must not turn the GPU path off without a word
    code = """
import sys

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "modeling_colt5.op_rows_triton":
            raise ImportError("a slip of the pen")

sys.meta_path.insert(0, Broken())
import modeling_colt5
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "a slip of the pen" in done.stderr
