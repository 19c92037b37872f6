"""The Gram matrix of a convolution on a map without ends, which Fourier transforms take apart into small matrices.

On a torus a convolution is, at every frequency ω, a matrix Ŵ(ω) from input to output channels, and AAᵀ or AᵀA is Ŵ Ŵᴴ or
Ŵᴴ Ŵ there (the block circulant of Strang and T. Chan; R. Chan & Ng, SIAM Review 38, 1996). A map has ends, so that this is
not the Gram matrix; but it differs from it there only, and so its inverse is a good preconditioner. A stride cuts the input
into the maps of its phases, which become channels (polyphase decomposition; Vaidyanathan 1993, §4.3).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fxinvert.linalg.convolution import Convolution
from fxinvert.linalg.operators import Shape
from fxinvert.linalg.solvers import RANGE


class Torus(NamedTuple):
    """How a map `(groups · c, *spatial)` is laid out for Fourier transforms.

    Attributes:
        shape: of the map.
        groups: independent systems.
        phases: the maps that every axis is cut into.
        sizes: of these maps.
    """

    shape: Shape
    groups: int
    phases: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def channels(self) -> int:
        """The unknowns at every frequency, of one group."""
        return self.shape[0] // self.groups * math.prod(self.phases)

    @property
    def frequencies(self) -> int:
        """Frequencies of real values."""
        *others, last = self.sizes
        return math.prod(others) * (last // 2 + 1)

    @property
    def entries(self) -> int:
        """Complex numbers in the matrices of all frequencies."""
        return self.groups * self.channels**2 * self.frequencies

    def inside(self) -> list[list[int]]:
        """By axis, how many positions of the torus belong to the map, for every channel of a group."""
        phases = [divmod(i, math.prod(self.phases))[1] for i in range(self.channels)]
        found = []
        for axis, (size, s) in enumerate(zip(self.shape[1:], self.phases, strict=True)):
            later = math.prod(self.phases[axis + 1 :])
            found.append([-(-(size - phase // later % s) // s) for phase in phases])
        return found

    @property
    def full(self) -> bool:
        """Whether the map fills it."""
        return all(set(own) == {size} for own, size in zip(self.inside(), self.sizes, strict=True))

    def split(self, value: Tensor) -> Tensor:
        """`(B, groups · c, *spatial)` → `(B, groups, c · phases, *sizes)`, the map filled up with zeros."""
        n = len(self.sizes)
        missing = [c * s - size for size, c, s in zip(self.shape[1:], self.sizes, self.phases, strict=True)]
        ends = [end for more in reversed(missing) for end in (0, more)]
        filled = torch.nn.functional.pad(value, ends) if any(ends) else value
        tiles = [part for pair in zip(self.sizes, self.phases, strict=True) for part in pair]
        parts = filled.reshape(len(value), self.groups, self.shape[0] // self.groups, *tiles)
        return parts.permute(0, 1, 2, *range(4, 4 + 2 * n, 2), *range(3, 3 + 2 * n, 2)).flatten(2, 2 + n)

    def join(self, value: Tensor) -> Tensor:
        """The inverse of `split`."""
        n = len(self.sizes)
        parts = value.reshape(len(value), self.groups, -1, *self.phases, *self.sizes)
        turned = parts.permute(0, 1, 2, *[axis for i in range(n) for axis in (3 + n + i, 3 + i)])
        spatial = [count * s for count, s in zip(self.sizes, self.phases, strict=True)]
        filled = turned.reshape(len(value), self.shape[0], *spatial)
        return filled[(slice(None), slice(None), *(slice(size) for size in self.shape[1:]))]


def torus(operator: Convolution, *, outputs: bool) -> Torus:
    """The layout for AAᵀ (`outputs`) or AᵀA."""
    shape = operator.out_shape if outputs else operator.in_shape
    # what a convolution calls its inputs is cut into phases; for a transposed one that is its output
    fine = outputs != operator.forward
    phases = tuple(operator.options["stride"]) if fine else (1,) * (len(shape) - 1)
    sizes = tuple(-(-size // s) for size, s in zip(shape[1:], phases, strict=True))
    return Torus(shape, operator.groups, phases, sizes)


#: in so many parts the matrices of all frequencies are worked on, one after another
PARTS = 16


class Circulant:
    """(K + R)⁻¹ for the Gram matrix K of a convolution on a torus, and a ridge R = μ K̄ + νI.

    K̄ is the mean of K's matrices over the frequencies, that is the Gram matrix of the kernel's channels: of what little the
    torus has in some direction, where the map with its ends has more, it keeps no direction from being amplified too much,
    however the kernel mixes channels. The second part is for channels that depend on one another.

    Args:
        operator: the convolution, or the transpose of one.
        outputs: whether K stands for AAᵀ, or else for AᵀA.
        shift: μ.
        floor: ν relative to K (its largest Frobenius norm at a frequency); above 0.
    """

    def __init__(self, operator: Convolution, *, outputs: bool, shift: float, floor: float) -> None:
        self.torus = torus(operator, outputs=outputs)
        gram = _gram(symbol(operator, self.torus.sizes), inputs=outputs != operator.forward)
        scale = float(torch.linalg.matrix_norm(gram).max())
        frequencies = tuple(range(1, gram.dim() - 2))
        #: R, `(groups, channels, channels)`
        self.ridge = shift * gram.mean(frequencies).real
        self.ridge.diagonal(dim1=-2, dim2=-1).add_(floor * scale if scale else 1.0)
        gram += self.ridge.reshape(len(gram), *[1] * len(frequencies), *gram.shape[-2:])
        single = operator.dtype == torch.float32 and 1 / RANGE**2 <= scale <= RANGE**2
        #: transposed, for rows of samples: few of them are multiplied faster than few columns
        self._inverse = torch.empty_like(gram, dtype=torch.complex64 if single else torch.complex128)
        for made, own in zip(_parts(self._inverse), _parts(gram), strict=True):
            made.copy_(torch.linalg.inv(own).mT)

    @property
    def nbytes(self) -> int:
        return int(self._inverse.nbytes)

    def solve(self, value: Tensor) -> Tensor:
        """`(B, *shape)` → the same."""
        sizes = self.torus.sizes
        n, axes = len(sizes), tuple(range(-len(sizes), 0))
        spectrum = torch.fft.rfftn(self.torus.split(value), dim=axes)
        # (B, groups, channels, *frequencies) → (groups, *frequencies, B, channels): a matrix product at every frequency
        found = spectrum.permute(1, *range(3, 3 + n), 0, 2).to(self._inverse.dtype) @ self._inverse
        turned = found.permute(1 + n, 0, 2 + n, *range(1, 1 + n))
        return self.torus.join(torch.fft.irfftn(turned, s=sizes, dim=axes)).to(value.dtype)


def _gram(around: Tensor, *, inputs: bool) -> Tensor:
    """ŴᴴŴ (`inputs`) or ŴŴᴴ at every frequency, `(groups, *frequencies, channels, channels)`."""
    side = around.shape[-1] if inputs else around.shape[-2]
    gram = around.new_empty(*around.shape[:-2], side, side)
    for made, own in zip(_parts(gram), _parts(around), strict=True):
        made.copy_(own.mH @ own if inputs else own @ own.mH)
    return gram


def _parts(matrices: Tensor) -> tuple[Tensor, ...]:
    """Those of all frequencies, some at a time: what is made of them in between takes little memory."""
    return matrices.flatten(0, -3).tensor_split(PARTS)


def symbol(operator: Convolution, sizes: Shape) -> Tensor:
    """Ŵ at every frequency of a torus of these sizes, `(groups, *frequencies, outputs, inputs · phases)`."""
    weight = operator.weight.to(torch.float64)
    made = weight.reshape(operator.groups, -1, *weight.shape[1:]).to(torch.complex128)
    n = len(sizes)
    for axis, size in enumerate(sizes):
        s, d = operator.options["stride"][axis], operator.options["dilation"][axis]
        count = size if axis < n - 1 else size // 2 + 1
        taps = d * torch.arange(weight.shape[2 + axis], device=weight.device) - operator.padding[axis]
        angles = torch.arange(count, dtype=torch.float64, device=weight.device) * (2 * math.pi / size)
        waves = torch.exp(1j * angles * (taps // s)[:, None])
        phases = torch.nn.functional.one_hot(taps % s, s)
        # the kernel's axis becomes one of frequencies and one of phases, behind the others
        made = torch.tensordot(made, waves[:, :, None] * phases[:, None], dims=([3], [0]))
    order = (0, *range(3, 3 + 2 * n, 2), 1, 2, *range(4, 4 + 2 * n, 2))
    return made.permute(order).flatten(n + 2)
