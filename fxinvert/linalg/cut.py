"""What lies beyond the end of a map along one axis, and its capacitance matrices (`capacitance.py`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxinvert.linalg.definite import NotDefiniteError
from fxinvert.linalg.embedding import Embedding


class Cut:
    """The ends of a map along one axis, those along the axes before being cut already.

    Entries are what lies beyond the map along this axis, but on it along those before, by position; spectra are
    `(groups, *frequencies, channels, B)`.

    Args:
        plan: the embedding.
        axis: the axis.
        places: `(entries before,)`, where what is on the map along the axes before is found on the torus along them.
        channels: `(entries before,)`, its channels.
    """

    def __init__(self, plan: Embedding, axis: int, places: Tensor, channels: Tensor) -> None:
        self.axis, self.last = axis, axis == len(plan.sizes) - 1
        self.size, self.reach = plan.sizes[axis], plan.reach(axis)
        #: number of entries before
        self.entries = len(channels)
        self._before, self._channels = plan.sizes[:axis], len(plan.counts[axis])
        n, device = len(places), places.device
        position = torch.arange(self.size, device=device).repeat_interleave(n)
        entry = torch.arange(n, device=device).repeat(self.size)
        inside = position < torch.tensor(plan.counts[axis], device=device)[channels[entry]]
        #: what is on the map and what is not, among all entries before at all positions along the axis, by position
        self.on, self.off = inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]
        self.places, self.channels = (places[entry] * self.size + position)[self.on], channels[entry][self.on]
        p, e = position[self.off], entry[self.off]
        start = self.size - self.reach
        self._where = (places[e] * self.reach + p - start) * self._channels + channels[e]
        owned = plan.own.channels - plan.channels.start
        #: J
        self.ones = (channels[e] >= owned).to(torch.float64)
        angles = torch.arange(
            self.size // 2 + 1 if self.last else self.size, dtype=torch.float64, device=device
        )
        turns = angles * torch.arange(start, self.size, device=device)[:, None] * (2 * math.pi / self.size)
        self._waves = torch.exp(1j * turns)
        self.weights = torch.ones_like(angles)
        if self.last:  # a frequency stands for its negative, too
            self.weights[1 : (self.size + 1) // 2] = 2
        #: what solves for y
        self.matrix: Tensor
        self.pivots: Tensor

    @property
    def nbytes(self) -> int:
        return int(self.matrix.nbytes)

    def to(self, dtype: torch.dtype) -> None:
        """Solves in another dtype from now on."""
        self.matrix = self.matrix.to(dtype if self.last else dtype.to_complex())
        self._waves, self.weights = self._waves.to(dtype.to_complex()), self.weights.to(dtype)

    def whole(self, by_lag: Tensor) -> Tensor:
        """The map's part of a matrix over all positions of the torus.

        Args:
            by_lag: what couples two positions, `(…, entries before, size, entries before)`, by how far they are apart.
        """
        # every position with every other: windows of the lags, backwards
        backwards = torch.cat([by_lag[..., 1:, :], by_lag], -2).flip(-2)
        # (…, entry, position, other entry, other position)
        windows = backwards.unfold(-2, self.size, 1).flip(-3)
        matrix = windows.movedim(-3, -4).transpose(-1, -2).flatten(-4, -3).flatten(-2)
        kept: Tensor = matrix.index_select(-2, self.on).index_select(-1, self.on)
        return kept

    def factorize(self, by_lag: Tensor) -> tuple[Tensor, Tensor]:
        """Factorizes the capacitance matrices; returns two factors of what the cut adds to the map's part."""
        n, device = by_lag.shape[-1], by_lag.device
        flat = by_lag.transpose(-2, -3).flatten(-3)
        on, off = self.on[None, :], self.off[:, None]

        def couplings(rows: Tensor, columns: Tensor) -> Tensor:
            lag = (rows // n - columns // n) % self.size
            return flat[..., (lag * n + rows % n) * n + columns % n]

        self.matrix = torch.diag(self.ones.to(device)) - couplings(off, off.T)
        self.pivots = factorized(self.matrix)
        across = couplings(off, on)
        return across.mH, torch.linalg.lu_solve(self.matrix, self.pivots, across)

    def solve(self, entries: Tensor) -> Tensor:
        """y for `(groups, *frequencies of later axes, entries, B)`."""
        solved: Tensor = torch.linalg.lu_solve(self.matrix, self.pivots, entries)
        return solved

    def taken(self, spectrum: Tensor) -> Tensor:
        """A spectrum's values at the entries, `(groups, *frequencies of later axes, entries, B)`."""
        inverse = self._waves * (self.weights / self.size)
        there = torch.tensordot(inverse, spectrum, dims=([1], [1 + self.axis])).movedim(0, -3)
        before = tuple(range(1, 1 + self.axis))
        there = torch.fft.ifftn(there, dim=before) if before else there
        there = (there.real if self.last else there).movedim(before, tuple(range(-3 - self.axis, -3)))
        found: Tensor = there.flatten(-3 - self.axis, -2)
        return found.index_select(-2, self._where)

    def put(self, entries: Tensor) -> Tensor:
        """The spectrum of values at the entries, zero elsewhere."""
        *outer, _, samples = entries.shape
        inner = (*self._before, self.reach, self._channels)
        filled = entries.new_zeros(*outer, math.prod(inner), samples)
        filled.index_copy_(-2, self._where, entries)
        there = filled.reshape(*outer, *inner, samples)
        before = tuple(range(1, 1 + self.axis))
        there = there.movedim(tuple(range(-3 - self.axis, -3)), before)
        there = (torch.fft.fftn(there, dim=before) if before else there).to(self._waves.dtype)
        spectrum: Tensor = torch.tensordot(self._waves.conj(), there, dims=([0], [-3]))
        return spectrum.movedim(0, 1 + self.axis)


def factorized(matrix: Tensor) -> Tensor:
    """The pivots of a factorization that takes the place of matrices, stored by columns."""
    pivots = torch.empty(0, dtype=torch.int32, device=matrix.device)
    failed = torch.empty(0, dtype=torch.int32, device=matrix.device)
    torch.linalg.lu_factor_ex(matrix, out=(matrix, pivots, failed))
    if bool(failed.any()):
        raise NotDefiniteError
    return pivots
