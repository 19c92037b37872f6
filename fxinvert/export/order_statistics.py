"""Translations to ONNX of what is found by order: k-th values, running maxima, places in sorted sequences; and of the like.

ONNX sorts by TopK, the first of equal values first, and knows no running products or extremes: every entry is compared with all
before it.
"""

from __future__ import annotations

from typing import Any

INT64, BOOL = 7, 9


def kth_value(values: Any, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    """The k-th smallest values along an axis, and where they are."""
    op = _ops()
    return _at(values, op.Constant(value_ints=[k]), dim, keepdim)


def median(values: Any, dim: int, keepdim: bool = False) -> Any:
    """The lower of the middle values along an axis, and where they are."""
    op = _ops()
    count = op.Add(_length(values, dim), op.Constant(value_ints=[1]))
    return _at(values, op.Div(count, op.Constant(value_ints=[2])), dim, keepdim)


def median_of_all(values: Any) -> Any:
    """The lower of the middle values."""
    op = _ops()
    return median(op.Reshape(values, op.Constant(value_ints=[-1])), 0)[0]


def sorted_stably(values: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """The values along an axis in order, the first of equal ones first, and where they are."""
    return _ops().TopK(values, _length(values, dim), axis=dim, largest=int(descending), sorted=1)


def running_maximum(values: Any, dim: int) -> Any:
    """The largest values along an axis up to each place, and where they are: the last of equal ones."""
    return _running(values, dim, "ReduceMax", "ReduceMin")


def running_minimum(values: Any, dim: int) -> Any:
    """The least values along an axis up to each place, and where they are: the last of equal ones."""
    return _running(values, dim, "ReduceMin", "ReduceMax")


def running_product(values: Any, dim: int, **_: Any) -> Any:
    """The products of the values along an axis up to each place."""
    op = _ops()
    rows, before = _rows(values, dim)
    one = op.CastLike(op.Constant(value_float=1.0), values)
    found = op.ReduceProd(op.Where(before, rows, one), op.Constant(value_ints=[-1]), keepdims=0)
    return _turned(found, values, dim)


def places(
    ordered: Any,
    values: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Any = None,
) -> Any:
    """How many entries of ascending sequences `(…, n)`, or of one `(n,)`, come before each value `(…, m)`."""
    op = _ops()
    if sorter is not None:
        ordered = op.GatherElements(ordered, sorter, axis=-1)
    if len(ordered.shape) > 1:
        ordered = op.Unsqueeze(ordered, op.Constant(value_ints=[-2]))
    each = op.Unsqueeze(values, op.Constant(value_ints=[-1]))
    # what is no number comes after all
    behind = op.Greater(ordered, each) if right or side == "right" else op.GreaterOrEqual(ordered, each)
    count = op.ReduceSum(op.Cast(op.Not(behind), to=INT64), op.Constant(value_ints=[-1]), keepdims=0)
    return op.Cast(count, to=6) if out_int32 else count  # 6: int32


def buckets(values: Any, bounds: Any, *, out_int32: bool = False, right: bool = False) -> Any:
    """Between which of ascending bounds `(n,)` each value lies."""
    return places(bounds, values, out_int32=out_int32, right=right)


def distances(first: Any, second: Any, p: float, compute_mode: int | None = None) -> Any:
    """How far each row of `(…, m, d)` is from each of `(…, n, d)`, as the p-norm of the difference."""
    op = _ops()
    difference = op.Sub(
        op.Unsqueeze(first, op.Constant(value_ints=[-2])), op.Unsqueeze(second, op.Constant(value_ints=[-3]))
    )
    last = op.Constant(value_ints=[-1])
    if p in (1, 2):
        return getattr(op, f"ReduceL{p:.0f}")(difference, last, keepdims=0)
    size = op.Abs(difference)
    if p == float("inf"):
        return op.ReduceMax(size, last, keepdims=0)
    if p == 0:
        return op.ReduceSum(op.Sign(size), last, keepdims=0)
    power, root = (op.CastLike(op.Constant(value_float=own), first) for own in (p, 1 / p))
    return op.Pow(op.ReduceSum(op.Pow(size, power), last, keepdims=0), root)


def hypotenuse(first: Any, second: Any) -> Any:
    """√(a² + b²), the larger taken out, so that squares do not overflow."""
    op = _ops()
    sizes = op.Abs(first), op.Abs(second)
    large, small = op.Max(*sizes), op.Min(*sizes)
    zero, one = (op.CastLike(op.Constant(value_float=own), first) for own in (0.0, 1.0))
    share = op.Div(small, op.Where(op.Equal(large, zero), one, large))
    return op.Mul(large, op.Sqrt(op.Add(one, op.Mul(share, share))))


def with_sign(sizes: Any, signs: Any) -> Any:
    """|a| with the sign of b, which a zero has, too."""
    op = _ops()
    zero, one = (op.CastLike(op.Constant(value_float=own), signs) for own in (0.0, 1.0))
    below = op.Less(op.Where(op.Equal(signs, zero), op.Div(one, signs), signs), zero)
    return op.Where(below, op.Neg(op.Abs(sizes)), op.Abs(sizes))


def larger(first: Any, second: Any) -> Any:
    """The larger of two, or the one that is a number."""
    return _of_two("Max", first, second)


def smaller(first: Any, second: Any) -> Any:
    """The smaller of two, or the one that is a number."""
    return _of_two("Min", first, second)


def _of_two(name: str, first: Any, second: Any) -> Any:
    op = _ops()
    found = getattr(op, name)(first, second)
    return op.Where(op.IsNaN(first), second, op.Where(op.IsNaN(second), first, found))


def _at(values: Any, k: Any, dim: int, keepdim: bool) -> Any:
    """The k-th smallest values along an axis, k `(1,)`, and where they are."""
    op = _ops()
    axis = op.Constant(value_ints=[dim % len(values.shape)])
    before = op.Sub(k, op.Constant(value_ints=[1]))
    found = [op.Slice(own, before, k, axis) for own in op.TopK(values, k, axis=dim, largest=0, sorted=1)]
    return tuple(found if keepdim else [op.Squeeze(own, axis) for own in found])


def _running(values: Any, dim: int, chosen: str, other: str) -> Any:
    op = _ops()
    rows, before = _rows(values, dim)
    last = op.Constant(value_ints=[-1])
    spare = getattr(op, other)(rows, last, keepdims=1)
    found = getattr(op, chosen)(op.Where(before, rows, spare), last, keepdims=1)
    hits = op.Cast(op.And(op.Equal(rows, found), before), to=6)
    where = op.ArgMax(hits, axis=-1, keepdims=0, select_last_index=1)
    return _turned(op.Squeeze(found, last), values, dim), _turned(where, values, dim)


def _rows(values: Any, dim: int) -> tuple[Any, Any]:
    """The values, the axis last, as `(…, 1, n)`, and which are not after each of the n places, `(n, n)`."""
    op = _ops()
    turned = _turned(values, values, dim)
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    count = op.Squeeze(_length(values, dim), op.Constant(value_ints=[0]))
    numbers = op.Range(zero, count, one)
    before = op.LessOrEqual(numbers, op.Unsqueeze(numbers, op.Constant(value_ints=[1])))
    return op.Unsqueeze(turned, op.Constant(value_ints=[-2])), before


def _turned(value: Any, values: Any, dim: int) -> Any:
    """A value with an axis and the last one exchanged."""
    axes = list(range(len(values.shape)))
    axes[dim], axes[-1] = axes[-1], axes[dim]
    return _ops().Transpose(value, perm=axes)


def _length(values: Any, dim: int) -> Any:
    """How many values there are along an axis, `(1,)`."""
    axis = dim % len(values.shape)
    return _ops().Shape(values, start=axis, end=axis + 1)


def _ops() -> Any:
    from onnxscript import opset18

    return opset18  # its annotations hold for values in scripts, not for calls
