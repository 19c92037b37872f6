"""Two arrays, element by element: how far apart they are, where most, and what is wrong with that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fxinvert.errors import DataError
from fxinvert.export.rounding import FACTOR, HIDDEN, Rounding

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Comparison:
    """What came of comparing what a file computes with what the model computes.

    Attributes:
        max_abs: the largest difference, over finite elements.
        largest: the largest expected magnitude, over finite elements.
        worst: the index of the element that is farthest beyond its tolerance, or nearest to it.
        problem: what is wrong, in words; empty if nothing is.
    """

    max_abs: float
    largest: float
    worst: tuple[int, ...]
    problem: str = ""


def compare(
    actual: Array, expected: Array, *, atol: float, rtol: float, rounding: Rounding | None = None
) -> Comparison:
    """Compare one output element by element.

    Infinities and NaN must stand at the same places; an output without any finite number proves nothing and is a problem.

    Args:
        actual: What the file computes.
        expected: What the model computes.
        atol: Absolute tolerance (floats only; other types must be equal).
        rtol: Relative tolerance (floats only).
        rounding: The model's own rounding, if known; what it explains is equal, too (floats only).
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return Comparison(
            float("inf"),
            0.0,
            (),
            f"is {actual.dtype} {list(actual.shape)}, the model returns {expected.dtype} {list(expected.shape)}. "
            "Make forward compute its shapes from the inputs' shapes, not from constants.",
        )
    if not expected.size:
        return Comparison(0.0, 0.0, ())
    if not np.isfinite(expected).any():
        return Comparison(
            float("inf"),
            0.0,
            (),
            "cannot be proven: the model itself returns no finite number here, so that nothing can be proven. "
            "Check its weights and the example inputs.",
        )
    given, wanted = (np.atleast_1d(value).astype(np.float64) for value in (actual, expected))
    finite = np.isfinite(wanted)
    same = np.atleast_1d(actual == expected) | (np.isnan(given) & np.isnan(wanted))
    with np.errstate(invalid="ignore"):
        distance = np.where(same, 0.0, np.abs(given - wanted))
    distance = np.where(np.isnan(distance), np.inf, distance)
    if np.issubdtype(expected.dtype, np.floating):
        stated = f"(atol {atol:g} + rtol {rtol:g} * |expected|)"
        tolerance = atol + rtol * np.where(finite, np.abs(wanted), 0.0)
        wrong = distance > tolerance
        if rounding is not None:
            # what is expected may come from elsewhere than the model, as of an inverse
            wrong &= ~(rounding.explains(given) & rounding.explains(wanted))
            stated += (
                f", and more than {FACTOR:g} times the model's own rounding, or {HIDDEN:.0%} of the output's size, "
                "from what float64 gives"
            )
    else:
        stated = f"({expected.dtype} must be equal)"
        tolerance = np.zeros(wanted.shape)
        wrong = ~same
    excess = np.where(wrong | ~wrong.any(), distance - tolerance, -np.inf)
    at = np.unravel_index(int(np.argmax(excess)), excess.shape)
    worst = tuple(int(i) for i in at) if expected.shape else ()
    problem = ""
    if wrong.any():
        problem = (
            f"is not what the model computes; worst at index {list(worst)}: the file gives {actual[worst]}, "
            f"the model {expected[worst]}, difference {distance[at]:.3g}, tolerance {tolerance[at]:.3g} {stated}; "
            f"{int(wrong.sum())} of {wrong.size} elements differ."
        )
    return Comparison(float(distance[finite].max()), float(np.abs(wanted[finite]).max()), worst, problem)


def array(tensor: Tensor) -> Array:
    """A tensor as numpy has it.

    Raises:
        DataError: numpy, and so onnxruntime, has no such type.
    """
    try:
        found: Array = tensor.contiguous().numpy()
    except (TypeError, RuntimeError) as error:
        raise DataError(
            f"{tensor.dtype} tensors cannot be compared with onnxruntime on the CPU ({error}). Export a float32 copy "
            "of the model (model.float()) with float32 example inputs."
        ) from error
    return found
