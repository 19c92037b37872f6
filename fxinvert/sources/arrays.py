"""`.npz` files: arrays x and y, held in memory as they are stored and turned into tensors batch by batch."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fxinvert.errors import DataError
from fxinvert.sources.options import DataOptions

PAIRS = (("x", "y"), ("x_train", "y_train"))
TEST_PAIR = ("x_test", "y_test")

Array = np.ndarray[Any, Any]


class ArrayBatches:
    """Batches of two arrays; can be iterated any number of times.

    uint8 arrays (N, H, W) and (N, H, W, C) are images: they become float (N, C, H, W) in [0, 1]. Other numbers
    keep their shape; integer labels are class numbers.

    Args:
        x: inputs (N, …).
        y: labels (N, …).
        options: how they are read.
        name: how messages call the data.
    """

    def __init__(self, x: Array, y: Array, options: DataOptions, name: str) -> None:
        self.x, self.y, self.options, self.name = x, y, options, name
        self._order = options.order(len(x))
        self._inputs(np.arange(1))  # what does not fit is refused at once

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.split(self._order, self.options.batch_size):
            index = rows.numpy()
            yield self._inputs(index), labels_of(self.y[index])

    def _inputs(self, index: Array) -> Tensor:
        inputs = inputs_of(self.x[index])
        size = self.options.resize
        if size is not None and size != tuple(inputs.shape[2:]):
            inputs = F.interpolate(inputs, size, mode="bilinear", antialias=True)
        return self.options.normalized(inputs, self.name)

    def __len__(self) -> int:
        return math.ceil(len(self.x) / self.options.batch_size)


def load_npz(path: Path, options: DataOptions) -> tuple[ArrayBatches, ArrayBatches | None]:
    """The training data of an `.npz` file, and its test data if it holds some.

    Args:
        path: a file with `x` and `y`, or `x_train` and `y_train`, and perhaps `x_test` and `y_test`.
        options: how they are read.

    Raises:
        DataError: the file is damaged, has other arrays, objects instead of numbers, or lengths that differ.
    """
    arrays = _read(path)
    train = next((pair for pair in PAIRS if arrays.keys() >= set(pair)), None)
    if train is None:
        raise DataError(
            f"{path} holds {', '.join(arrays) or 'nothing'}; arrays x and y are needed, or x_train and y_train "
            "(with x_test and y_test for a test set)"
        )
    pairs = [train, TEST_PAIR] if arrays.keys() >= set(TEST_PAIR) else [train]
    parts = [array_batches(arrays[x], arrays[y], (x, y), options, path) for x, y in pairs]
    return parts[0], parts[1] if len(parts) > 1 else None


def inputs_of(x: Array) -> Tensor:
    """Inputs as tensors: uint8 images become float (N, C, H, W) in [0, 1], other floats torch's default dtype."""
    if x.dtype == np.uint8 and x.ndim in (3, 4):
        images = torch.from_numpy(np.ascontiguousarray(x)).to(torch.get_default_dtype()) / 255
        return images[:, None] if x.ndim == 3 else images.movedim(-1, 1).contiguous()
    if x.dtype.kind in "fb" or x.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64)).to(torch.get_default_dtype())
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64))


def labels_of(y: Array) -> Tensor:
    """Labels as tensors: class numbers int64, a column of them flattened; truth values; else torch's default dtype."""
    if y.dtype == bool:
        return torch.from_numpy(np.ascontiguousarray(y))
    if y.dtype.kind in "iu":
        classes = torch.from_numpy(np.ascontiguousarray(y, dtype=np.int64))
        return classes[:, 0] if classes.dim() == 2 and classes.shape[1] == 1 else classes
    return torch.from_numpy(np.ascontiguousarray(y, dtype=np.float64)).to(torch.get_default_dtype())


def _read(path: Path) -> dict[str, Array]:
    wanted = {name for pair in (*PAIRS, TEST_PAIR) for name in pair}
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise DataError(f"{path} holds a single array; save x and y: numpy.savez(path, x=…, y=…)")
            return {name: file[name] if name in wanted else np.empty(0) for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile, KeyError) as error:
        reason = (
            "it holds Python objects, which could run code" if "allow_pickle" in str(error) else str(error)
        )
        raise DataError(f"{path} cannot be read as an .npz file of numbers: {reason}") from error


def array_batches(
    x: Array, y: Array, names: tuple[str, str], options: DataOptions, path: Path
) -> ArrayBatches:
    """Batches of two arrays.

    Args:
        x: inputs (N, …).
        y: labels (N, …).
        names: how messages call the two.
        options: how they are read.
        path: where they are from.

    Raises:
        DataError: they are no finite numbers, empty, or do not fit each other or the options.
    """
    x_name, y_name = names
    for name, array in zip(names, (x, y), strict=True):
        if array.dtype.kind not in "fiub":
            raise DataError(f"{name} in {path} has dtype {array.dtype}; numbers are needed")
        if array.ndim == 0 or not array.size:
            raise DataError(f"{name} in {path} has shape {array.shape}; it is empty")
        if array.dtype.kind == "f":  # later checks see the samples in another order
            missing = ~np.isfinite(array).reshape(len(array), -1).all(1)
            if missing.any():
                raise DataError(
                    f"{name} in {path} has NaN or infinite values in {missing.sum()} of {len(array)} samples, first in "
                    f"sample {missing.argmax()}; leave these out, or fill in what is missing"
                )
    if len(x) != len(y):
        raise DataError(
            f"{x_name} in {path} has shape {x.shape}, {y_name} {y.shape}; they must have the same number of samples"
        )
    if x.dtype == np.uint8 and x.ndim == 4 and x.shape[3] not in (1, 3, 4):
        raise DataError(
            f"{x_name} in {path} has shape {x.shape}; uint8 images are (N, height, width, channels) with 1, 3 or 4 "
            "channels; store others as floats, (N, channels, height, width)"
        )
    if options.resize is not None and not (x.dtype == np.uint8 and x.ndim in (3, 4)):
        raise DataError(f"--resize is for images; {x_name} in {path} is {x.dtype} numbers of shape {x.shape}")
    return ArrayBatches(x, y, options, f"{x_name} in {path}")
