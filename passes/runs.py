"""Runs: a model on an example and on twice its samples, and what differs between the results."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxinvert.errors import TraceError
from fxinvert.passes.leaves import copied

#: how far a sample's output may move with its batch, relative to the largest output: rounding, not arithmetic
ROUNDING = 1e-2


def batch_size(inputs: tuple[Tensor, ...]) -> int:
    """How many samples there are: the length of the first input that has one."""
    return next((len(value) for value in inputs if value.dim()), 0)


def doubled(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs with copies of the first sample behind the others; what is shared by the samples stays."""
    size = batch_size(inputs)
    return tuple(
        torch.cat([value, value[:1].expand_as(value)]) if value.dim() and len(value) == size else value
        for value in inputs
    )


def run(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """What a model returns for inputs that it may change.

    Raises:
        TraceError: it does not run on them.
    """
    return tried(model, inputs)


def tried(function: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    """As `run`, of any function."""
    try:
        return function(*copied(inputs))
    except TraceError:
        raise
    except Exception as error:  # whatever the user's forward raises
        shapes = ", ".join(str(tuple(v.shape)) for v in inputs if isinstance(v, Tensor))
        raise TraceError(f"the model does not run on inputs of shape {shapes}: {said(error)}") from error


def said(error: Exception) -> str:
    """What an error says, without the graph that fx adds; of one that says nothing, as a bare `assert` does, its kind."""
    return str(error).partition("\n\nWhile executing")[0] or type(error).__name__


def difference(expected: Tensor, actual: Tensor) -> str | None:
    """What differs between the model's output and the graph's, in words; None if nothing does."""
    if actual.shape != expected.shape:
        return f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if not torch.allclose(actual, expected, **_tolerances(expected), equal_nan=True):
        return f"values differ by up to {float((real(actual) - real(expected)).abs().max()):.1e}"
    return None


def _tolerances(expected: Tensor) -> dict[str, float]:
    """How far the graph's output may be from the model's; in half precision some roundings of the largest value."""
    if not expected.is_floating_point() or expected.dtype.itemsize > 2:
        return {"rtol": 1e-3, "atol": 1e-5}
    rounding = 8 * torch.finfo(expected.dtype).eps
    return {"rtol": rounding, "atol": rounding * largest_of(expected, infinite=0.0)}


def real(value: Tensor) -> Tensor:
    """Truth values and whole numbers as real ones, which have differences and sizes."""
    return value if value.is_floating_point() or value.is_complex() else value.double()


def same(actual: Tensor, expected: Tensor) -> bool:
    """Whether two tensors differ by no more than rounding, by the size of the largest entry."""
    if torch.equal(actual, expected):
        return True
    if not expected.is_floating_point():
        return False
    # entries that are infinite or no numbers in both are equal, and tell nothing of the size of the others
    moved = largest_of(actual - expected, infinite=torch.finfo(expected.dtype).max)
    return moved <= 2 * ROUNDING * largest_of(expected, infinite=0.0)


def largest_of(value: Tensor, infinite: float) -> float:
    """The largest size of an entry, with this in place of infinite ones; what is no number counts as 0."""
    if not value.numel():
        return 0.0
    largest = float(torch.linalg.vector_norm(value, torch.inf))
    return (
        largest if math.isfinite(largest) else float(value.nan_to_num(0.0, infinite, -infinite).abs().amax())
    )
