"""Kernels: the choice among branches as one pass over memory, by torch's compiler.

What an elementwise rule computes takes little time beside what its dozen of tensor operations read and write. A compiler
that fuses them reads each value once. The very functions of the rule's table are traced, without a value to look at, and
the graph of their tensor operations is compiled; where two ops lead to the same graph they share a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from fxinvert.errors import SolveError
from fxinvert.rules.op import Op

#: tensors of one shape -> what is computed of them, entry by entry, and a sum
Kernel = Callable[..., tuple[Tensor, Tensor]]

_kernels: dict[tuple[Any, ...], Kernel] = {}


def kernel(op: Op, function: Kernel, *like: Tensor) -> Kernel:
    """A function, compiled for tensors of any size.

    Args:
        op: the op, for messages.
        function: of contiguous tensors; it must not look at values.
        *like: tensors of the dtypes, devices and numbers of axes that it will take.

    Raises:
        SolveError: the function looks at values, or there is no compiler.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    # axes of length 1 would be taken to stay so
    examples = [value.new_zeros([max(2, size) for size in value.shape]) for value in like]
    try:
        function(*examples)  # makes the tables, which could not be made of what has no values
        trace = make_fx(lambda *given: function(*given), {}, "symbolic", _allow_non_fake_inputs=True)
        graph = trace(*examples)
        known = _identity(graph, like)
        if known not in _kernels:
            _kernels[known] = _compiled(graph)
    except Exception as error:  # a rule is anyone's code, and a compiler has errors of its own
        told = next(iter(str(error).strip().splitlines()), "no message")
        raise SolveError(
            f"node {op.name!r}, op {op.key!r}: its rule cannot be compiled ({type(error).__name__}: {told}). On a processor "
            "that takes a C++ compiler (g++, or what the environment variable CXX names), on CUDA Triton; leave out "
            "compiled=True to do without"
        ) from error
    return _kernels[known]


def _identity(graph: fx.GraphModule, like: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """What kernels have in common that compute the same; the tensors that they refer to are told apart by identity."""
    held = [getattr(graph, str(node.target)) for node in graph.graph.find_nodes(op="get_attr")]
    return graph.code, *held, *((value.dtype, value.device) for value in like)


def _compiled(graph: fx.GraphModule) -> Kernel:
    from torch._inductor import standalone_compile

    # the graph's sizes are symbols already; `torch.compile` would check at every call what cannot change
    sizes = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    run: Kernel = standalone_compile(graph, sizes, dynamic_shapes="from_graph")
    return run
