"""Directions of which a torus has next to nothing, raised, so that the Gram matrix T there has a good inverse.

At some frequency ω the kernel may annul a direction u nearly, though on the map with its ends nothing is: T⁻¹ is large then,
and what is made of it has lost its digits. T' = T + ν u uᴴ at ω has an inverse that is not, and on the map the two differ by
two vectors for each of these directions, the cosine and the sine of u at ω, which is undone at the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: a singular value of B, relative to their root mean square, that takes too many digits; if there is one, what those that are
#: less are raised to; and how many at most
LOW, LEVEL, MOST = 6e-4, 1e-2, 32


def raise_low(stacked: Tensor, q: Tensor, r: Tensor, half: Tensor, last: int) -> Tensor:
    """Raises T = SᴴS, of which S = q r is the factorization, and `half` = r⁻ᴴ: these three are changed where T is low.

    Args:
        stacked: S at every frequency, `(groups, *frequencies, rows, channels)`.
        q, r, half: of S.
        last: size of the torus along its last axis, of which half the frequencies are there.

    Returns:
        The spectra `(groups, *frequencies, channels, k)` of W, WWᵀ being what has been added to T.
    """
    count, sizes = r.shape[-1], (*r.shape[1:-3], last)
    square = float(r.abs().square().sum((-2, -1)).amax()) / count
    level, inverse = LEVEL**2 * square, half.abs().square().sum((-2, -1))
    if bool((inverse * (LOW**2 * square) <= 1).all()):
        return r.new_zeros(*r.shape[:-1], 0)
    # what is annulled altogether may have no number there
    places = (~(inverse * level <= 1)).nonzero(as_tuple=True)
    values, vectors = torch.linalg.eigh(r[places].mH @ r[places])
    values = torch.where(values < level, values, math.inf)
    ordered = values.flatten().sort().values
    if len(ordered) > MOST:  # both of what a frequency and its negative have in common, or neither
        values = torch.where(values < ordered[MOST] * (1 - 1e-6), values, math.inf)
    low = torch.isfinite(values)
    wide = torch.cat([stacked[places], math.sqrt(level) * (vectors * low[:, None]).mH], -2)
    orthogonal, r[places] = torch.linalg.qr(wide)
    q[places] = orthogonal[:, : q.shape[-2]]
    unit = torch.eye(count, dtype=r.dtype, device=r.device)
    half[places] = torch.linalg.solve_triangular(r[places].mH, unit.expand(r[places].shape), upper=False)
    row, column = low.nonzero(as_tuple=True)
    at = [index[row] for index in places]
    # in half a spectrum a frequency stands for its negative, too, but for those that are their own
    twice = torch.where((at[-1] == 0) | (2 * at[-1] == last), 1.0, 2.0)
    found = vectors[row, :, column] * (level * math.prod(sizes) / twice).sqrt()[:, None]
    spectra, own = r.new_zeros(*r.shape[:-1], 2, len(row)), torch.arange(len(row), device=row.device)
    for i, columns in enumerate((found, 1j * found)):
        spectra[..., i, :].movedim(-2, -1)[(*at, own)] = columns
    return spectra.flatten(-2)
