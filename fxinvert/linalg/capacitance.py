"""Direct solves with the Gram matrix of a convolution: that of a map without ends, whose ends are cut one axis at a time.

On a torus a convolution is a matrix at every frequency (`circulant.py`), and so is T = BBᵀ + μI, where B is the convolution
or its transpose. Taking out what lies beyond the map, unknowns O and columns Q of B, leaves K + μI = Pᵀ(T − B Q Qᵀ Bᵀ)P and

    (K + μI)⁻¹ b = Pᵀ(u + T⁻¹U y),   u = T⁻¹P b,   (J − UᵀT⁻¹U) y = Uᵀu,   U = [O, B Q],

J being 1 for Q and 0 for O: the capacitance matrix method (Buzbee, Dorr, George & Golub, SIAM J. Numer. Anal. 8, 1971;
Proskurowski & Widlund 1976). What is cut along one axis is still periodic along those that come later, so that its
capacitance matrix falls into small ones, one for each of their frequencies. Only that of the last axis is a dense one, and
has the size of the map's edge, not of the map. Where T is nearly singular, T' = T + WWᵀ takes its place (`raised.py`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxinvert.linalg.circulant import symbol
from fxinvert.linalg.convolution import Convolution
from fxinvert.linalg.cut import Cut, factorized
from fxinvert.linalg.definite import NotDefiniteError
from fxinvert.linalg.embedding import Embedding, embedding
from fxinvert.linalg.raised import raise_low
from fxinvert.linalg.vectors import flat

#: smallest singular value of B that is divided by, relative to the largest
LEAST = 1e-6
#: complex numbers of matrices that are put together at once
BLOCK = 2**19


class Capacitance:
    """(K + μI)⁻¹ for the Gram matrix K of a convolution.

    Args:
        operator: the convolution, or the transpose of one.
        outputs: whether K stands for AAᵀ, or else for AᵀA.
        shift: μ.

    Raises:
        NotDefiniteError: T + μI is not positive definite to working precision, or K + μI is not.
    """

    def __init__(self, operator: Convolution, *, outputs: bool, shift: float) -> None:
        plan = embedding(operator, outputs=outputs)
        self.torus, self.dtype = plan.own, torch.float64
        self._meets = operator.meets(outputs=outputs)
        around = symbol(operator, plan.sizes)
        b = around.mH if outputs != operator.forward else around
        count, unit = b.shape[-2], torch.eye(b.shape[-2], dtype=b.dtype, device=b.device)
        squares = b.abs().square().sum(-1).flatten(1, -2)
        # channels that nothing meets
        filling = torch.where((squares == 0).all(1), squares.amax().clamp(min=1e-300).sqrt(), shift**0.5)
        ridge = (unit * filling[:, None]).reshape(len(b), *[1] * len(plan.sizes), count, count)
        stacked = torch.cat([b.mH, ridge.expand(*b.shape[:-1], count)], -2)
        q, r = torch.linalg.qr(stacked)
        half = torch.linalg.solve_triangular(r.mH, unit.expand(r.shape), upper=False)
        spectra = raise_low(stacked, q, r, half, plan.sizes[-1])
        if not bool((_norms(half) * _norms(r)).amax() * LEAST < 1):
            raise NotDefiniteError
        self._inverse = half.mH @ half
        #: how many of the channels that do not fill the torus are unknowns', and B for the others
        self._own = count - plan.channels.start
        self._around = b[..., : plan.channels.stop - count].resolve_conj().contiguous()
        lifted = torch.cat([half, q[..., : b.shape[-1], :].mH], -1)[..., plan.channels]
        self._cuts = cuts(plan, lifted.mH @ lifted)
        #: `(r, *shape)`, the root of what to add to the inverse
        self._more = self._lowering(operator, outputs, shift, spectra)

    @property
    def nbytes(self) -> int:
        kept = self._inverse, self._around, self._more
        return int(sum(v.nbytes for v in kept) + sum(cut.nbytes for cut in self._cuts))

    def to(self, dtype: torch.dtype) -> None:
        """Solves in another dtype from now on."""
        self.dtype = dtype
        self._inverse, self._around = (v.to(dtype.to_complex()) for v in (self._inverse, self._around))
        self._more = self._more.to(dtype)
        for cut in self._cuts:
            cut.to(dtype)

    def solve(self, value: Tensor) -> Tensor:
        """`(B, *shape)` → the same, in `dtype`."""
        value = value.to(self.dtype) * self._meets
        return self._raised(value) + _spanned(value, self._more)

    def _raised(self, value: Tensor) -> Tensor:
        """K'⁻¹ of what is zero where nothing is met."""
        if not len(value):
            return value
        axes = tuple(range(-len(self.torus.sizes), 0))
        spectrum = torch.fft.rfftn(self.torus.split(value), dim=axes)
        n = len(axes)
        # (B, groups, channels, *frequencies) → (groups, *frequencies, channels, B): a matrix product at every frequency
        found = self._applied(spectrum.permute(1, *range(3, 3 + n), 2, 0).contiguous(), len(self._cuts))
        return self._there(found)

    def _there(self, spectrum: Tensor) -> Tensor:
        """The values on the map, `(B, *shape)`, of a spectrum `(groups, *frequencies, channels, B)`."""
        sizes = self.torus.sizes
        n = len(sizes)
        turned = spectrum.permute(2 + n, 0, 1 + n, *range(1, 1 + n))
        # an unknown that meets nothing stands alone, and is zero
        values = torch.fft.irfftn(turned, s=sizes, dim=tuple(range(-n, 0)))
        joined: Tensor = self.torus.join(values)
        return joined.mul_(self._meets)

    def _lowering(self, a: Convolution, outputs: bool, shift: float, spectra: Tensor) -> Tensor:
        """C⁻¹WᵀK'⁻¹ for CCᵀ = 1 − WᵀK'⁻¹W, the root of K⁻¹ − K'⁻¹ (Woodbury 1950), K'⁻¹W being refined once."""
        if not spectra.shape[-1]:
            return self._meets.new_zeros(0, *self.torus.shape, dtype=self.dtype)
        w = self._there(spectra)
        g = self._raised(w)
        product = a.apply(a.adjoint(g)) if outputs else a.adjoint(a.apply(g))
        g += self._raised(w - product - shift * g - _spanned(g, w))
        inner = torch.eye(len(w), dtype=w.dtype, device=w.device) - flat(w) @ flat(g).mT
        root, failed = torch.linalg.cholesky_ex((inner + inner.mT) / 2)
        if bool(failed):
            raise NotDefiniteError
        more: Tensor = torch.linalg.solve_triangular(root, flat(g), upper=False)
        return more.reshape(w.shape)

    def _applied(self, spectrum: Tensor, count: int) -> Tensor:
        """The inverse with the first cuts made."""
        if not count:
            plain: Tensor = self._inverse @ spectrum
            return plain
        cut, found = self._cuts[count - 1], self._applied(spectrum, count - 1)
        y = cut.solve(cut.taken(self._lowered(found)))
        return found + self._applied(self._lifted(cut.put(y)), count - 1)

    def _lowered(self, found: Tensor) -> Tensor:
        """[1, B]ᴴ of a spectrum, for the channels that do not fill the torus."""
        # conjugates are written out for a product; those of the values are smaller than those of B
        seen = (self._around.mT @ found.conj_physical()).conj()
        return torch.cat([found[..., : self._own, :], seen], -2)

    def _lifted(self, spectrum: Tensor) -> Tensor:
        """[1, B] of a spectrum of these channels."""
        found = self._around @ spectrum[..., self._own :, :]
        if self._own:
            found += spectrum[..., : self._own, :]
        return found


def cuts(plan: Embedding, kernel: Tensor) -> list[Cut]:
    """The cuts along those axes along which something lies beyond the map.

    Args:
        plan: the embedding.
        kernel: UᵀT⁻¹U at every frequency, `(groups, *frequencies, channels, channels)`.

    Raises:
        NotDefiniteError: a capacitance matrix is singular.
    """
    channels = torch.arange(kernel.shape[-1], device=kernel.device)
    if not len(channels):
        return []
    made, places = list[Cut](), torch.zeros_like(channels)
    for axis in range(len(plan.sizes)):
        made.append(Cut(plan, axis, places, channels))
        places, channels = made[-1].places, made[-1].channels
    *earlier, last = made
    edge = _Edge(last, earlier[-1] if earlier else None, kernel)
    factors: list[list[tuple[Tensor, Tensor]]] = [[] for _ in earlier]
    step = max(1, BLOCK // (len(kernel) * plan.edge * max([1, *(len(cut.off) for cut in earlier)])))
    for first in range(0, kernel.shape[-3], step):
        part = kernel[..., first : first + step, :, :]
        for cut, kept in zip(earlier, factors, strict=True):
            by_lag = torch.fft.ifft(part, dim=1).movedim(1, -2)
            left, right = cut.factorize(by_lag)
            kept.append((cut.matrix, cut.pivots))
            if cut is earlier[-1]:
                edge.add(by_lag, left, right, first)
            else:
                part = cut.whole(by_lag).add_(left @ right)
        if not earlier:
            edge.add(part[..., None, :], part[..., :0], part[..., :0, :], first)
    for cut, kept in zip(earlier, factors, strict=True):
        matrices, pivots = zip(*kept, strict=True)
        # by columns, as they are solved with
        cut.matrix = torch.cat([matrix.mT for matrix in matrices], -3).mT
        cut.pivots = torch.cat(pivots, -2)
    last.matrix, last.pivots = edge.factorized()
    return [cut for cut in made if cut.reach]


class _Edge:
    """What couples the positions along the last axis, all else being cut, by how far they are apart."""

    def __init__(self, last: Cut, before: Cut | None, kernel: Tensor) -> None:
        self.last, self.before, n = last, before, last.entries
        self.lags = kernel.new_zeros(last.reach, len(kernel), n, n, dtype=torch.float64)
        self._base: list[Tensor | float] = [0.0] * last.reach

    def add(self, base: Tensor, left: Tensor, right: Tensor, first: int) -> None:
        """Adds some frequencies: of the map without ends, and `left @ right` for its ends along the axes before."""
        last, count = self.last, right.shape[1]
        frequency = torch.arange(first, first + count, dtype=torch.float64, device=right.device)
        weights = last.weights[first : first + count] / last.size
        columns = torch.cat([right.real, right.imag], 1).flatten(1, 2)
        for lag in range(last.reach):
            turns = weights * torch.exp(2j * math.pi / last.size * lag * frequency)
            summed = torch.tensordot(turns, base.movedim(1, 0), dims=([0], [0])).real
            self._base[lag] = self._base[lag] + summed
            turned = left * turns[:, None, None]
            rows = torch.cat([turned.real, -turned.imag], 1).transpose(1, 2).flatten(2)
            self.lags[lag].baddbmm_(rows, columns)

    def factorized(self) -> tuple[Tensor, Tensor]:
        """The factorized capacitance matrix of the last axis, and its pivots."""
        for lag, base in enumerate(self._base):
            assert isinstance(base, Tensor)
            self.lags[lag] += base[..., 0, :] if self.before is None else self.before.whole(base)
        matrix = _dense(self.last, self.lags).mT  # which is symmetric
        del self.lags
        return matrix, factorized(matrix)


def _dense(cut: Cut, lags: Tensor) -> Tensor:
    """J − UᵀRU `(groups, entries, entries)` for the inverse R that is left, from what couples positions some lags apart."""
    n, side = lags.shape[-1], len(cut.off)
    position, entry = cut.off // n, cut.off % n
    made = lags.new_empty(lags.shape[1], side, side)
    bounds = [int((position < p).sum()) for p in range(cut.size - cut.reach, cut.size + 1)]
    for i in range(cut.reach):
        rows = slice(bounds[i], bounds[i + 1])
        for j in range(i + 1):
            columns = slice(bounds[j], bounds[j + 1])
            block = lags[i - j][:, entry[rows]][:, :, entry[columns]]
            made[:, rows, columns] = -block
            made[:, columns, rows] = -block.mT
    made.diagonal(dim1=1, dim2=2).add_(cut.ones)
    return made


def _spanned(value: Tensor, directions: Tensor) -> Tensor:
    """Every row v as Σ ⟨v, d⟩ d over directions, `(k, *shape)`."""
    return (flat(value) @ flat(directions).mT @ flat(directions)).reshape(value.shape)


def _norms(matrices: Tensor) -> Tensor:
    """Frobenius norms `(…)` of `(…, m, n)`."""
    found: Tensor = torch.linalg.matrix_norm(matrices)
    return found
