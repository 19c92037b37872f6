"""The data that the reference networks are shown: scikit-learn's digits, split once and for all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxinvert.errors import DataError

Batches = list[tuple[Tensor, Tensor]]

TEST_SAMPLES = 450
SPLIT_SEED = 0


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images, float32 (N, channels, height, width) in [0, 1] and classes, int64 (N,): two disjoint parts."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def digits() -> ImageData:
    """The 1,797 handwritten 8x8 digits that ship with scikit-learn: 1,347 to train on, 450 to test on.

    The split is stratified and always the same. Images are (N, 1, 8, 8); nothing is downloaded.
    """
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(classes, dtype=torch.int64)
    train, test = stratified_split(y, TEST_SAMPLES)
    return ImageData(x[train], y[train], x[test], y[test])


def stratified_split(y: Tensor, held_out: int) -> tuple[Tensor, Tensor]:
    """Indices (N - held_out,) and (held_out,) of two disjoint parts of `y` (N,), alike in classes."""
    from sklearn.model_selection import train_test_split

    kept, held = train_test_split(
        range(len(y)), test_size=held_out, stratify=y.numpy(), random_state=SPLIT_SEED
    )
    return torch.tensor(kept), torch.tensor(held)


def batches(x: Tensor, y: Tensor, batch_size: int = 256) -> Batches:
    """Cut `x` (N, ...) and `y` (N, ...) into a list of batches, in order, the last one as short as needed.

    The batches are views: nothing is copied. A list can be iterated any number of times.
    """
    if len(x) != len(y):
        raise DataError(f"{len(x)} inputs but {len(y)} labels; every input needs exactly one label")
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; it must be at least 1")
    return list(zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True)) if len(x) else []


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of inputs `x` (N, ...) whose largest logit is that of their class `y` (N,)."""
    if not len(x):
        raise DataError("the accuracy over no samples is not defined")
    hits = sum(int((model(inputs).argmax(1) == labels).sum()) for inputs, labels in batches(x, y))
    return hits / len(x)
