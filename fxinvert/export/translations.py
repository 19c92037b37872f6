"""Translations to ONNX of ops for which torch's exporter has none, or wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from fxinvert.export import complex_values, order_statistics, special_functions
from fxinvert.export.order_statistics import INT64


def translations() -> dict[Any, Callable[..., Any]]:
    """By op, of the libraries that are loaded: torch's `custom_translation_table`; complex values have `registered`."""
    known: dict[str, Callable[..., Any]] = {
        "aten::_cdist_forward": order_statistics.distances,
        "aten::_is_all_true": _is_all_true,
        "aten::_unsafe_index_put": _index_put,
        "aten::amax": partial(_reduced, "ReduceMax"),
        "aten::amin": partial(_reduced, "ReduceMin"),
        "aten::bucketize.Tensor": order_statistics.buckets,
        "aten::conv3d": _convolution_of_volumes,
        "aten::copysign.Tensor": order_statistics.with_sign,
        "aten::cummax": order_statistics.running_maximum,
        "aten::cummin": order_statistics.running_minimum,
        "aten::cumprod": order_statistics.running_product,
        "aten::digamma": special_functions.digamma,
        "aten::erfinv": special_functions.erfinv,
        "aten::fmax": order_statistics.larger,
        "aten::fmin": order_statistics.smaller,
        "aten::hypot": order_statistics.hypotenuse,
        "aten::index_put": _index_put,
        "aten::kthvalue": order_statistics.kth_value,
        "aten::lgamma": special_functions.lgamma,
        "aten::median": order_statistics.median_of_all,
        "aten::median.dim": order_statistics.median,
        "aten::rrelu_with_noise_functional": _rrelu,
        "aten::rsub.Scalar": _rsub,
        "aten::searchsorted.Tensor": order_statistics.places,
        "aten::sort.stable": order_statistics.sorted_stably,
        "aten::special_ndtri": special_functions.ndtri,
        "aten::squeeze": _squeeze_all,
        "aten::squeeze.dim": _squeeze,
        "aten::topk": _topk,
        "aten::zeros": complex_values.zeros,
        "prims::prod": partial(_reduced, "ReduceProd"),
        "transformers::grouped_mm_fallback": _grouped_mm,
    }
    found = {}
    for name, function in known.items():
        library, op = name.split("::")
        op, _, overload = op.partition(".")
        packet = getattr(getattr(torch.ops, library), op, None)
        if packet is not None:
            found[getattr(packet, overload or "default")] = function
    return found


def _is_all_true(values: Any) -> Any:
    """What `torch._check_tensor_all` asks of truth values; a file does not check, and leaves it out again."""
    from onnxscript import opset18

    op: Any = opset18
    return op.Cast(op.ReduceMin(op.Cast(values, to=6), keepdims=0), to=9)  # 6: int32, 9: bool


def _reduced(name: str, values: Any, dim: Sequence[int] = (), keepdim: bool = False, **_: Any) -> Any:
    """The largest or least values along axes, or products; of all values where no axis is named."""
    from onnxscript import opset18

    op: Any = opset18
    return getattr(op, name)(values, *([list(dim)] if dim else []), keepdims=int(keepdim))


def _convolution_of_volumes(
    values: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Any:
    """A convolution along three axes; torch's exporter gives one without a bias a matrix of zeros for it."""
    from onnxscript import opset18

    op: Any = opset18
    strides, ends, dilations = (list(each) * (3 // len(each)) for each in (stride, padding, dilation))
    own = [] if bias is None else [bias]
    return op.Conv(values, weight, *own, strides=strides, pads=ends * 2, dilations=dilations, group=groups)


def _index_put(values: Any, indices: Sequence[Any], source: Any, accumulate: bool = False) -> Any:
    """Values put at places; torch's exporter hands on places in int32, as of what windows add up to, which ONNX does not take."""
    from onnxscript import INT32, opset18
    from onnxscript.function_libs.torch_lib.ops.core import aten_index_put

    op: Any = opset18
    places = list(indices)
    for axis, place in enumerate(places):
        if place is not None and place.dtype == INT32.dtype:
            places[axis] = op.Cast(place, to=INT64)
            places[axis].shape = place.shape
    return aten_index_put(values, places, source, accumulate)


def _rrelu(values: Any, noise: Any, lower: float = 1 / 8, upper: float = 1 / 3, *_: Any, **__: Any) -> Any:
    """A leaky ReLU with the slope that a random one has in evaluation mode, and its noise."""
    from onnxscript import opset18

    op: Any = opset18
    return op.LeakyRelu(values, alpha=(lower + upper) / 2), op.Identity(noise)


def _rsub(values: Any, number: float, alpha: float = 1) -> Any:
    """A number less `alpha` times a tensor; torch makes a difference of it, which has no form for a float less integers."""
    from onnxscript import opset18

    op: Any = opset18
    if isinstance(number, float) and values.dtype.is_integer():
        values = op.Cast(values, to=1)  # 1: float32

    def as_values(scalar: float) -> Any:
        given = {"value_int": scalar} if isinstance(scalar, int) else {"value_float": scalar}
        return op.CastLike(op.Constant(**given), values)

    return op.Sub(as_values(number), values if alpha == 1 else op.Mul(values, as_values(alpha)))


def _squeeze(values: Any, dim: int) -> Any:
    """Without an axis of length 1; torch leaves an axis of another length, where ONNX knows no such squeezing."""
    from onnxscript import opset18

    op: Any = opset18
    length = values.shape[dim] if len(values.shape) else None
    return op.Identity(values) if isinstance(length, int) and length != 1 else op.Squeeze(values, [dim])


def _squeeze_all(values: Any) -> Any:
    """Without the axes of length 1; ONNX would take away a batch of one sample, too, which what follows does not expect."""
    from onnxscript import opset18

    op: Any = opset18
    axes = [axis for axis, length in enumerate(values.shape) if isinstance(length, int) and length == 1]
    return op.Squeeze(values, axes) if axes else op.Identity(values)


def _topk(values: Any, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """The largest values, in order also where torch leaves that open: ONNX leaves it open in another way (`ties`)."""
    from onnxscript import opset18

    op: Any = opset18
    return op.TopK(values, [k], axis=dim, largest=largest, sorted=True)


def _grouped_mm(rows: Any, weights: Any, ends: Any) -> Any:
    """Rows times their group's matrix, as experts are applied to the tokens that are sorted by them.

    Args:
        rows: `(S, K)`.
        weights: `(G, K, N)`.
        ends: of the groups among the rows, `(G,)`, ascending.
    """
    from onnxscript import opset18

    op: Any = opset18  # its annotations hold for values in scripts, not for calls
    count = op.Squeeze(op.Shape(rows, start=0, end=1), op.Constant(value_ints=[0]))
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    last = op.Constant(value_ints=[1])
    places = op.Unsqueeze(op.Range(zero, count, one), last)
    passed = op.Cast(op.GreaterOrEqual(places, op.Cast(ends, to=INT64)), to=INT64)
    own = op.Gather(weights, op.ReduceSum(passed, last, keepdims=0))
    return op.Squeeze(op.MatMul(op.Unsqueeze(rows, last), own), last)
