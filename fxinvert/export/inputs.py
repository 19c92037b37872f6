"""What is run: a frozen copy of the model, and inputs like the example at any size of its named axes."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from fxinvert.copies import copy_of
from fxinvert.errors import DataError
from fxinvert.export.called import BATCH, Call, outputs_by_name

SIZES = (1, 2, 7)
"""Batch sizes at which a file is proven, where none are asked for."""

NOISE = 0.01
"""Noise added to float inputs, relative to the root mean square of the example."""


@dataclass(frozen=True)
class Case:
    """One batch: the inputs, and what the model makes of them.

    Attributes:
        sizes: of the named axes.
        inputs: by name.
        expected: the outputs, by name, in order.
    """

    sizes: Mapping[str, int]
    inputs: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]

    @property
    def batch_size(self) -> int:
        """The number of rows."""
        return self.sizes.get(BATCH, 1)

    def __str__(self) -> str:
        others = [f"{axis} {size}" for axis, size in self.sizes.items() if axis != BATCH]
        return ", ".join([f"batch size {self.batch_size}", *others])


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
    except RuntimeError as error:
        raise DataError(
            f"{type(model).__name__} cannot be copied to the CPU for the export: {error} Load its weights first."
        ) from error
    return copy_of(model, memo).eval().requires_grad_(False)


def check_settings(batch_sizes: Sequence[int] | None, atol: float, rtol: float) -> tuple[int, ...] | None:
    """The batch sizes without repetition, in the order given; None for those that are usual.

    Raises:
        DataError: No batch size, one that is not a positive integer, or a tolerance that is not a number >= 0.
    """
    sizes = None if batch_sizes is None else tuple(dict.fromkeys(batch_sizes))
    if sizes is not None and not (sizes and all(isinstance(size, int) and size > 0 for size in sizes)):
        raise DataError(f"batch_sizes must be positive integers, at least one; got {sizes}")
    for name, value in (("atol", atol), ("rtol", rtol)):
        if not (math.isfinite(value) and value >= 0):
            raise DataError(f"{name} must be a finite number >= 0, not {value}")
    return sizes


def like(call: Call, sizes: Mapping[str, int], seed: int) -> tuple[Tensor, ...]:
    """Inputs that look like the example, with other sizes of its named axes.

    The example's entries are repeated along the axes. Float inputs get a little noise and stay within the example's
    range, so that a model defined on [0, 1] is not run outside it; other inputs (indices, masks) are repeated as they are.

    Args:
        call: How the model is called, with the example.
        sizes: The sizes wanted, by axis; other axes stay as they are.
        seed: Seed of the noise.

    Returns:
        One tensor per example tensor.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sum(sizes.values()))
    made = []
    for tensor, axes in zip(call.example, call.axes, strict=True):
        rows = tensor
        for dimension, axis in axes.items():
            index = torch.arange(sizes.get(axis, tensor.shape[dimension])) % tensor.shape[dimension]
            rows = rows.index_select(dimension, index)
        if tensor.is_floating_point() and tensor.numel():
            scale = float(tensor.double().square().mean().sqrt())
            noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64) * NOISE * (scale or 1.0)
            low, high = tensor.min(), tensor.max()
            rows = (rows + noise).to(tensor.dtype)
            if low < high:
                rows = rows.clamp(low, high)
        made.append(rows.contiguous())
    return tuple(made)


def case_sizes(
    call: Call, batch_sizes: Sequence[int], axis_sizes: Mapping[str, Sequence[int]] | None
) -> list[dict[str, int]]:
    """The sizes of the named axes in every case: each batch size, then each size of the other axes.

    Args:
        call: How the model is called.
        batch_sizes: The batch sizes to run.
        axis_sizes: Sizes to run of other axes, by name; by default half of the example's.

    Raises:
        DataError: A name is of no axis, or a size is not a positive integer.
    """
    own, given = call.sizes, dict(axis_sizes or {})
    unknown = next((axis for axis in given if axis not in own or axis == BATCH), None)
    if unknown is not None:
        raise DataError(f"axis_sizes names {unknown!r}; the named axes besides the batch: {[*own][1:]}")
    found = [own | ({BATCH: size} if BATCH in own else {}) for size in batch_sizes]
    for axis, size in own.items():
        sizes = given.get(axis, () if axis == BATCH else (-(-size // 2),))
        if not all(isinstance(wanted, int) and wanted > 0 for wanted in sizes):
            raise DataError(f"axis_sizes of {axis!r} must be positive integers; got {tuple(sizes)}")
        found += [found[-1] | {axis: wanted} for wanted in sizes]
    return list({tuple(sizes.items()): sizes for sizes in found}.values())


def cases_at(
    model: nn.Module,
    call: Call,
    batch_sizes: Sequence[int] | None,
    axis_sizes: Mapping[str, Sequence[int]] | None,
    seed: int = 0,
) -> tuple[tuple[Case, ...], str]:
    """The cases of a proof, and why some of the usual batch sizes are not among them.

    Args:
        model: The frozen copy.
        call: How it is called.
        batch_sizes: The batch sizes to run; None for the usual ones at which the model itself runs, the example's and
            twice as many among them where it does not run at all of these.
        axis_sizes: Sizes to run of other axes, as for `case_sizes`.
        seed: Seed of the inputs.

    Raises:
        DataError: The model itself fails at a size that was asked for, or at the example's; a size does not fit.
    """
    wanted = case_sizes(call, batch_sizes or SIZES, axis_sizes)
    try:
        return make_cases(model, call, wanted, seed), ""
    except DataError as error:
        if batch_sizes is not None or BATCH not in call.sizes:
            raise
        refused = error
    failed = {}
    for size in SIZES:
        try:
            make_cases(model, call, [call.sizes | {BATCH: size}], seed)
        except DataError as error:
            failed[size] = str(error.__cause__ or error).splitlines()[0]
    own = call.sizes[BATCH]
    sizes = sorted({*SIZES, own, 2 * own} - {*failed})
    why = "; ".join(f"at batch size {size} ({reason})" for size, reason in failed.items())
    note = f"The model itself does not run {why}: what the file does there is not known."
    try:
        return make_cases(model, call, case_sizes(call, sizes, axis_sizes), seed), note
    except DataError:
        raise refused from refused.__cause__


def make_cases(
    model: nn.Module, call: Call, sizes: Sequence[Mapping[str, int]], seed: int = 0
) -> tuple[Case, ...]:
    """Run the frozen model at every size.

    Args:
        model: The frozen copy.
        call: How it is called.
        sizes: Of the named axes, one mapping per case.
        seed: Seed of the inputs.

    Returns:
        One case per mapping.

    Raises:
        DataError: The model itself fails at a size, or returns something that is not tensors.
    """
    return tuple(
        case_of(model, call, wanted, dict(zip(call.inputs.names, like(call, wanted, seed), strict=True)))
        for wanted in sizes
    )


def case_of(model: nn.Module, call: Call, sizes: Mapping[str, int], inputs: Mapping[str, Tensor]) -> Case:
    """Run the frozen model on some inputs.

    Args:
        model: The frozen copy.
        call: How it is called.
        sizes: Of the named axes.
        inputs: By name.

    Raises:
        DataError: The model itself fails, or returns something that is not tensors.
    """
    args, kwargs = call.inputs.arguments(tuple(tensor.clone() for tensor in inputs.values()))
    case = Case(dict(sizes), inputs, {})
    try:
        with torch.no_grad():
            result = model(*args, **kwargs)
    except Exception as error:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
        raise DataError(
            f"the model itself does not run at {case} (inputs {shapes}): {error}. Pass example_inputs "
            "that fit its forward, and batch_sizes and axis_sizes that it accepts."
        ) from error
    tensors = [tensor.detach() for tensor in outputs_by_name(result).values()]
    return replace(case, expected=dict(zip(call.output_names(result), tensors, strict=True)))


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
