"""Translations to ONNX of ops on complex values, as of rotary embeddings, for which torch's exporter has none.

Its other translations hold a complex tensor as a real one with a last axis of length 2, real and imaginary part; so do these.
torch takes translations of complex values from onnxscript's register only, which is the process's: what it lacks is in there
while a file is made, and out again for whatever else is exported.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def registered() -> Iterator[None]:
    """The translations are among onnxscript's meanwhile; what it has itself stays."""
    from onnxscript.function_libs.torch_lib.registration import default_registry, torch_op

    known: dict[str, Callable[..., Any]] = {
        "aten::alias": _same,
        "aten::copy": _copy,
        "aten::detach": _same,
        "aten::einsum": _einsum,
        "aten::exp": _exp,
        "aten::expand": _expand,
        "aten::mul.Scalar": _mul,
        "aten::pad": _pad,
        "aten::select.int": _select,
        "aten::select_scatter": _select_scatter,
        "aten::slice_scatter": _slice_scatter,
        "aten::tanh": _tanh,
        "aten::unsqueeze": _unsqueeze,
    }
    lacking = [name for name in known if name not in default_registry or not default_registry[name].complex]
    for name in lacking:
        torch_op(name, complex=True, trace_only=True)(known[name])
    try:
        yield
    finally:
        for name in lacking:
            default_registry[name].complex.clear()


def zeros(
    size: Sequence[int], dtype: int = 1, layout: str = "", device: str = "", pin_memory: bool = False
) -> Any:
    """Zeros of any dtype, complex ones as pairs; torch gives their first a complex value, and the rest none."""
    from onnxscript.function_libs.torch_lib.ops.core import aten_zeros

    real = {14: 1, 15: 11}.get(dtype)  # complex64: float32, complex128: float64
    return aten_zeros(size, dtype) if real is None else aten_zeros([*size, 2], real)


def _same(values: Any) -> Any:
    from onnxscript import opset18

    op: Any = opset18
    return op.Identity(values)


def _copy(values: Any, source: Any, non_blocking: bool = False) -> Any:
    from onnxscript import opset18

    op: Any = opset18
    return op.Expand(source, op.Shape(values))


def _einsum(equation: str, tensors: Sequence[Any], path: int | None = None) -> Any:
    """A product of sums re + i·im is a sum of products, in which the parts that are imaginary make a power of i."""
    from onnxscript import opset18

    op: Any = opset18
    parts = [[op.Gather(x, index, axis=-1) for index in (0, 1)] for x in tensors]
    sums: list[Any] = [None, None]
    for chosen in itertools.product((0, 1), repeat=len(parts)):
        turned, imaginary = divmod(sum(chosen) % 4, 2)
        term = op.Einsum(*[part[i] for part, i in zip(parts, chosen, strict=True)], equation=equation)
        term = op.Neg(term) if turned else term
        sums[imaginary] = term if sums[imaginary] is None else op.Add(sums[imaginary], term)
    return _pair(*sums)


def _exp(values: Any) -> Any:
    from onnxscript import opset18

    op: Any = opset18
    length, angle = op.Exp(op.Gather(values, 0, axis=-1)), op.Gather(values, 1, axis=-1)
    return _pair(op.Mul(length, op.Cos(angle)), op.Mul(length, op.Sin(angle)))


def _expand(values: Any, size: Sequence[int], implicit: bool = False) -> Any:
    from onnxscript import opset18
    from onnxscript.function_libs.torch_lib.ops.common import merge_dims

    op: Any = opset18
    return op.Expand(values, merge_dims([1 if isinstance(n, int) and n == -1 else n for n in size] + [2]))


def _mul(values: Any, other: complex) -> Any:
    from onnxscript import opset18
    from onnxscript.function_libs.torch_lib.ops.core import aten_mul_complex

    op: Any = opset18
    pair = op.CastLike(op.Constant(value_floats=[other.real, other.imag]), values)
    return aten_mul_complex(values, pair)


def _pad(values: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    from onnxscript.function_libs.torch_lib.ops.nn import aten_pad

    if value:
        raise NotImplementedError(f"complex values are padded with {value}; pad them with zeros")
    return aten_pad(values, [0, 0, *pad], mode)


def _select(values: Any, dim: int, index: int) -> Any:
    from onnxscript import opset18

    op: Any = opset18
    return op.Gather(values, index, axis=_axis(dim))


def _select_scatter(values: Any, source: Any, dim: int, index: int) -> Any:
    from onnxscript.function_libs.torch_lib.ops.core import aten_select_scatter

    return aten_select_scatter(values, source, _axis(dim), index)


def _slice_scatter(
    values: Any, source: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    from onnxscript.function_libs.torch_lib.ops.core import aten_slice_scatter

    return aten_slice_scatter(values, source, _axis(dim), start, end, step)


def _tanh(values: Any) -> Any:
    """(t + i·s·c·(1 − t²)) / (c² + t²·s²) with t the real part's tanh, s and c the imaginary part's sine and cosine."""
    from onnxscript import opset18

    op: Any = opset18
    t, angle = op.Tanh(op.Gather(values, 0, axis=-1)), op.Gather(values, 1, axis=-1)
    s, c = op.Sin(angle), op.Cos(angle)
    square, turn = op.Mul(t, t), op.Mul(s, c)
    length = op.Add(op.Mul(c, c), op.Mul(square, op.Mul(s, s)))
    return _pair(op.Div(t, length), op.Div(op.Sub(turn, op.Mul(square, turn)), length))


def _unsqueeze(values: Any, dim: int) -> Any:
    from onnxscript import opset18

    op: Any = opset18
    return op.Unsqueeze(values, [_axis(dim)])


def _pair(real: Any, imaginary: Any) -> Any:
    from onnxscript import opset18

    op: Any = opset18
    return op.Concat(*(op.Unsqueeze(part, [-1]) for part in (real, imaginary)), axis=-1)


def _axis(dim: int) -> int:
    """An axis of a complex tensor as one of the real tensor that holds it."""
    return dim if dim >= 0 else dim - 1
