"""What is run: a frozen copy of the model, and inputs like the example at any batch size."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fxinvert.errors import DataError

NOISE = 0.01
"""Noise added to float inputs, relative to the root mean square of the example."""


@dataclass(frozen=True)
class Case:
    """One batch: the inputs, and what the model makes of them."""

    batch_size: int
    inputs: tuple[Tensor, ...]
    expected: tuple[Tensor, ...]


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode on the CPU; the model itself is not touched.

    Tensors that live elsewhere are copied straight to the CPU, never twice on their device.

    Args:
        model: Any module, on any device, in any mode.

    Returns:
        The copy.

    Raises:
        DataError: `model` is not a module, or cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise DataError(f"only an nn.Module can be exported, not {type(model).__name__}")
    memo: dict[int, object] = {}
    try:
        for parameter in model.parameters():
            if parameter.device.type != "cpu":
                moved = parameter.detach().cpu()
                memo[id(parameter)] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
        for buffer in model.buffers():
            if buffer.device.type != "cpu":
                memo[id(buffer)] = buffer.detach().cpu()
        return copy.deepcopy(model, memo).eval()
    except Exception as error:
        raise DataError(
            f"{type(model).__name__} cannot be copied for the export ({error}). Keep only parameters, buffers and "
            "detached tensors on the module, and nothing that copy.deepcopy refuses."
        ) from error


def example_tensors(example_inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The example as a tuple of CPU tensors that share their batch dimension.

    Args:
        example_inputs: A tensor, or a sequence of tensors in the order of the model's arguments.

    Returns:
        The tensors, detached, on the CPU.

    Raises:
        DataError: Something is not a tensor, has no batch dimension, is empty, or the batch sizes differ.
    """
    given = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    if not isinstance(given, Sequence) or not given or not all(isinstance(item, Tensor) for item in given):
        raise DataError(
            f"example_inputs must be a tensor or a tuple of tensors, not {_describe(example_inputs)}"
        )
    for position, tensor in enumerate(given):
        if tensor.dim() == 0 or tensor.shape[0] == 0:
            raise DataError(
                f"example input {position} has shape {tuple(tensor.shape)}: dimension 0 must be the batch, "
                "with at least one row"
            )
    rows = [tensor.shape[0] for tensor in given]
    if len(dict.fromkeys(rows)) > 1:
        raise DataError(f"the example inputs must share their batch size (dimension 0); they have {rows}")
    return tuple(tensor.detach().cpu() for tensor in given)


def check_settings(batch_sizes: Sequence[int], atol: float, rtol: float) -> tuple[int, ...]:
    """The batch sizes without repetition, in the order given.

    Raises:
        DataError: No batch size, one that is not a positive integer, or a tolerance that is not a number >= 0.
    """
    sizes = tuple(dict.fromkeys(batch_sizes))
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise DataError(f"batch_sizes must be positive integers, at least one; got {tuple(batch_sizes)}")
    for name, value in (("atol", atol), ("rtol", rtol)):
        if not (math.isfinite(value) and value >= 0):
            raise DataError(f"{name} must be a finite number >= 0, not {value}")
    return sizes


def like(example: Sequence[Tensor], batch_size: int, seed: int) -> tuple[Tensor, ...]:
    """Inputs that look like the example, with `batch_size` rows.

    The rows of the example are repeated. Float inputs get a little noise and stay within the example's range, so that
    a model defined on [0, 1] is not run outside it; other inputs (indices, masks) are repeated as they are.

    Args:
        example: The example, on the CPU.
        batch_size: Number of rows wanted.
        seed: Seed of the noise.

    Returns:
        One tensor per example tensor.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + batch_size)
    made = []
    for tensor in example:
        rows = tensor[torch.arange(batch_size) % tensor.shape[0]]
        if tensor.is_floating_point() and tensor.numel():
            scale = float(tensor.double().square().mean().sqrt())
            noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64) * NOISE * (scale or 1.0)
            low, high = tensor.min(), tensor.max()
            rows = (rows + noise).to(tensor.dtype)
            if low < high:
                rows = rows.clamp(low, high)
        made.append(rows.contiguous())
    return tuple(made)


def make_cases(
    model: nn.Module, example: Sequence[Tensor], batch_sizes: Sequence[int], seed: int
) -> tuple[Case, ...]:
    """Run the frozen model at every batch size.

    Args:
        model: The frozen copy.
        example: The example, on the CPU.
        batch_sizes: The batch sizes to run.
        seed: Seed of the inputs.

    Returns:
        One case per batch size.

    Raises:
        DataError: The model itself fails at a batch size, or returns something that is not tensors.
    """
    cases = []
    for size in batch_sizes:
        inputs = like(example, size, seed)
        try:
            with torch.no_grad():
                outputs = model(*(tensor.clone() for tensor in inputs))
        except Exception as error:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in inputs)
            raise DataError(
                f"the model itself does not run at batch size {size} (inputs {shapes}): {error}. Pass example_inputs "
                "that fit its forward, and batch_sizes that it accepts."
            ) from error
        expected = tuple(tensor.detach() for tensor in flat_outputs(outputs))
        if not expected:
            raise DataError(
                f"the model returned no tensor ({_describe(outputs)}): there is nothing to export"
            )
        cases.append(Case(size, inputs, expected))
    return tuple(cases)


def flat_outputs(outputs: object) -> Iterator[Tensor]:
    """The tensors in a model's output, in the order in which torch.export flattens it.

    Args:
        outputs: A tensor, or tuples, lists and mappings of tensors; `None` is skipped.

    Yields:
        The tensors.

    Raises:
        DataError: Something else is among the outputs.
    """
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from flat_outputs(value)
    elif isinstance(outputs, (tuple, list)):
        for value in outputs:
            yield from flat_outputs(value)
    elif outputs is not None:
        raise DataError(
            f"the model returns {_describe(outputs)}: only tensors, and tuples, lists and dicts of them, can be exported"
        )


@contextmanager
def rng_kept() -> Iterator[None]:
    """Leave the random state of torch (CPU), numpy and Python as it was found."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _describe(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of ({', '.join(type(item).__name__ for item in value)})"
    return type(value).__name__
