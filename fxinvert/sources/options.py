"""How data is read: batches, columns, normalization, size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxinvert.errors import DataError


@dataclass(frozen=True)
class DataOptions:
    """How data is read.

    Attributes:
        batch_size: samples per batch.
        mean, std: per channel, or one number for all; applied as (x − mean) / std after images are scaled to [0, 1].
        resize: (height, width) that images are brought to; None leaves them as they are.
        input_columns: of a table: the columns that become inputs, those of numbers together one; none: the first
            column of images.
        label_columns: of a table: the columns that become labels; none: all columns of numbers that are no inputs.
        seed: of the order of the samples, which is shuffled once; None leaves it as it is.
    """

    batch_size: int = 256
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: tuple[int, int] | None = None
    input_columns: tuple[str, ...] = ()
    label_columns: tuple[str, ...] = ()
    seed: int | None = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise DataError(f"the batch size is {self.batch_size}; it must be at least 1")
        if not all(map(math.isfinite, (*self.mean, *self.std))) or any(value <= 0 for value in self.std):
            raise DataError(f"mean {self.mean} and std {self.std} must be finite, and std positive")
        if self.resize is not None and min(self.resize) < 1:
            raise DataError(f"images cannot be resized to {self.resize}; height and width must be at least 1")

    def order(self, count: int) -> Tensor:
        """The order of `count` samples, the same every time: indices (count,)."""
        if self.seed is None:
            return torch.arange(count)
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))

    def normalized(self, inputs: Tensor, what: str) -> Tensor:
        """(inputs − mean) / std along dimension 1 of `inputs` (B, C, …).

        Raises:
            DataError: there are not as many numbers as channels.
        """
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not values:
                continue
            if not inputs.is_floating_point():
                raise DataError(
                    f"{what} holds {inputs.dtype} inputs: --{name} is for numbers, not for indices"
                )
            channels = inputs.shape[1] if inputs.dim() > 1 else 1
            if len(values) not in (1, channels):
                raise DataError(f"--{name} has {len(values)} numbers; {what} has {channels} channels")
            numbers = torch.tensor(values, dtype=inputs.dtype).reshape(-1, *[1] * max(inputs.dim() - 2, 0))
            inputs = inputs - numbers if name == "mean" else inputs / numbers
        return inputs
