"""Kernels: the choice among branches, or what a norm takes, as few passes over memory, by torch's compiler.

What such a rule computes takes little time beside what its dozens of tensor operations read and write. A compiler that
fuses them reads each value once, or as often as there are sums that need one another. The very functions of the rule's
table are traced, without a value to look at, and the graph of their tensor operations is compiled; where two ops lead to
the same graph they share a kernel.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxinvert.errors import SolveError
from fxinvert.rules.op import Op

#: tensors of samples, and others -> what is computed of them
Kernel = Callable[..., tuple[Tensor, ...]]
#: values that a kernel is laid out for: how it spreads over threads, or a device's processors, is for any number of samples
VALUES = 1 << 20
#: the bits of √½
ROOT_HALF = 0x3F3504F3

_kernels: dict[tuple[Any, ...], Kernel] = {}


def kernel(
    op: Op, function: Kernel, rows: tuple[Tensor, ...], held: tuple[Tensor, ...] = (), *, exact: bool
) -> Kernel:
    """A function, compiled for any number of samples.

    Args:
        op: the op, for messages.
        function: of contiguous tensors; it must not look at values.
        rows: tensors of the dtypes, devices and shapes that it will take, samples first.
        held: the tensors that it takes after these, the same for all samples. Their values may be others at every call.
        exact: whether logarithms of what is not positive and finite are wanted.

    Raises:
        SolveError: the function looks at values, or there is no compiler.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    # a number of samples that no other axis has, nor 1: axes of one length would be taken to stay so
    sizes = {size for value in (*rows, *held) for size in value.shape[1:]}
    least = max(2, VALUES // rows[0].shape[1:].numel())
    count = next(size for size in itertools.count(least) if size not in sizes)
    examples = [*(value.new_zeros([count, *value.shape[1:]]) for value in rows), *held]

    def traced(*given: Tensor) -> tuple[Tensor, ...]:
        for value in given:
            _ = [int(size) for size in value.shape[1:]]  # they stay what they are
        return function(*given)

    try:
        function(*examples)  # makes the tables, which could not be made of what has no values
        table = {} if exact else _decomposed()
        graph = make_fx(traced, table, "symbolic", _allow_non_fake_inputs=True)(*examples)
        known = _identity(graph)
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


def _identity(graph: fx.GraphModule) -> tuple[Any, ...]:
    """What kernels have in common that compute the same; the tensors that they refer to are told apart by identity."""
    held = [getattr(graph, str(node.target)) for node in graph.graph.find_nodes(op="get_attr")]
    given = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    return graph.code, *held, *((value.dtype, value.device, str(value.shape)) for value in given)


def _compiled(graph: fx.GraphModule) -> Kernel:
    from torch._inductor import standalone_compile

    # the graph's sizes are symbols already; `torch.compile` would check at every call what cannot change
    sizes = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    # a · b + c rounded once
    options = {"config_patches": {"cpp.enable_floating_point_contract_flag": "fast"}}
    run: Kernel = standalone_compile(graph, sizes, dynamic_shapes="from_graph", options=options)
    return run


def logarithm(x: Tensor) -> Tensor:
    """log x of positive, finite float32 numbers, to 3e-7; some finite number of others.

    That of the processor's library takes longer than all else. x = 2ᵉ m with m within a factor √2 of 1, from the bits of x,
    and log m is a polynomial of m − 1, fitted by least squares.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return NotImplemented  # type: ignore[no-any-return]
    bits = x.view(torch.int32)
    exponent = (bits - ROOT_HALF).bitwise_right_shift(23)
    f = (bits - exponent.bitwise_left_shift(23)).view(torch.float32) - 1
    first, *rest = _series()
    total = f * first
    for coefficient in rest:
        total = (total + coefficient) * f
    return exponent.to(torch.float32) * math.log(2) + total


@functools.cache
def _series() -> list[float]:
    """Coefficients of f⁷, f⁶, …, f in log(1 + f)."""
    ends = math.sqrt(0.5), math.sqrt(2.0)
    angle = torch.linspace(0, math.pi, 200, dtype=torch.float64)
    f = (sum(ends) + angle.cos() * (ends[1] - ends[0])) / 2 - 1
    powers = f[:, None] ** torch.arange(7, 0, -1)
    fitted: list[float] = torch.linalg.lstsq(powers, f.log1p()[:, None]).solution[:, 0].tolist()
    return fitted


def _logarithm_in_place(x: Tensor) -> Tensor:
    found = logarithm(x)
    return found if found is NotImplemented else x.copy_(found)


def _decomposed() -> dict[Any, Callable[..., Tensor]]:
    """Ops that are computed in other ways than torch's."""
    _series()  # could not be found of what has no values
    return {torch.ops.aten.log.default: logarithm, torch.ops.aten.log_.default: _logarithm_in_place}
