"""Sliding windows in any number of dimensions: what convolution and pooling have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Sliding:
    """How a window slides over a map, one entry per spatial dimension.

    Attributes:
        kernel, stride, dilation: as in torch.
        before, after: padding at either end; they differ for `padding="same"` with an even kernel.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def symmetric(self) -> bool:
        return self.before == self.after

    @property
    def pointwise(self) -> bool:
        """Whether every window is one input, and every input one window."""
        return set(self.kernel) == set(self.stride) == {1} and not any(self.before + self.after)

    @property
    def disjoint(self) -> bool:
        """Whether no input lies in two windows."""
        return all(
            s >= d * (k - 1) + 1 for k, s, d in zip(self.kernel, self.stride, self.dilation, strict=True)
        )

    @property
    def apart(self) -> bool:
        """Whether no input lies in two windows, and no window reaches into padding."""
        return self.disjoint and not any(self.before + self.after)

    @property
    def alone(self) -> tuple[int, ...]:
        """The axes along which every window is one input, and every input one window."""
        axes = zip(self.kernel, self.stride, self.before, self.after, strict=True)
        return tuple(axis for axis, along in enumerate(axes) if along == (1, 1, 0, 0))

    def along(self, axes: Sequence[int]) -> Sliding:
        """The same along some axes only."""
        every = (self.kernel, self.stride, self.dilation, self.before, self.after)
        return Sliding(*(tuple(one[axis] for axis in axes) for one in every))

    @property
    def steps(self) -> tuple[int, ...] | None:
        """After how many positions, along every axis, an entry of the window sees what the next one saw; None if it never does."""
        found = [divmod(d, s) for d, s in zip(self.dilation, self.stride, strict=True)]
        return None if any(rest for _, rest in found) else tuple(step for step, _ in found)

    @property
    def tiles(self) -> bool:
        """Whether the windows lie side by side, without gaps, overlap or padding."""
        return self.kernel == self.stride and set(self.dilation) == {1} and not any(self.before + self.after)

    def unfold(self, value: Tensor, out: Sequence[int] | None = None, fill: float = 0) -> Tensor:
        """The windows of `(B, C, *spatial)` as a view `(B, C, *positions, *kernel)`; padding holds `fill`.

        Args:
            value: the map.
            out: number of positions; more than fit (`ceil_mode`) are padded on the right.
            fill: what padding holds.
        """
        n = len(self.kernel)
        after = list(self.after)
        if out is not None:
            for i, (m, size) in enumerate(zip(out, value.shape[-n:], strict=True)):
                reach = (m - 1) * self.stride[i] + self.dilation[i] * (self.kernel[i] - 1) + 1
                after[i] = max(after[i], reach - size - self.before[i])
        ends = [end for i in reversed(range(n)) for end in (self.before[i], after[i])]
        windows = F.pad(value, ends, value=fill) if any(ends) else value
        for i in range(n):
            span = self.dilation[i] * (self.kernel[i] - 1) + 1
            windows = windows.unfold(2 + i, span, self.stride[i])[..., :: self.dilation[i]]
        return windows


def sliding(kernel: Sequence[int], attributes: Mapping[str, Any]) -> Sliding:
    """The window options of a convolution or pooling op, from its attributes (a stride of `[]` is the kernel)."""
    n = len(kernel)
    stride = each(attributes["stride"] or kernel, n)
    dilation = each(attributes.get("dilation", 1), n)
    padding = attributes["padding"]
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        before = tuple(p // 2 for p in total)
        after = tuple(p - b for p, b in zip(total, before, strict=True))
    else:
        before = after = (0,) * n if padding == "valid" else each(padding, n)
    return Sliding(tuple(kernel), stride, dilation, before, after)


def each(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    """One entry per spatial dimension, from a number or a sequence of one or n."""
    if isinstance(value, int):
        return (value,) * n
    return tuple(value) if len(value) == n else tuple(value) * n
