"""Which positions of a map the sums of a convolution are made of.

A map has many positions, and neighbours see nearly the same: G and C over all of them cost as much as several forward
passes, and tell little more than those over some. So p positions are drawn for every sample, one at random in each of p
equal stretches of the flattened map (stratified sampling), and each row weighs as much as the rows that it stands for.
Every position is as likely to be drawn as any other, so the sums are unbiased.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxinvert.rules import Op

#: rows of a batch, for every feature, that are abundant
ROWS_PER_FEATURE = 16
#: share of the positions from which on all of them are taken: drawing would gain nothing
MOST = 0.5


def drawn_positions(op: Op, fraction: float | None, seed: int, samples: int) -> Tensor | None:
    """The positions of every sample, counted in the flattened map, `(B, p)`; None: all of them.

    Args:
        op: a convolution, with its output `(…, C, *positions)` of any samples.
        fraction: the share of the positions; None: so many that a batch has `ROWS_PER_FEATURE` rows for every feature.
        seed: of the draw, which is the same on every device.
        samples: B, of a batch.
    """
    channels, *shape = op.output.shape[1:]
    total = math.prod(shape)
    if fraction is None:
        features = op.parameters["weight"].numel() // channels
        count = -(-ROWS_PER_FEATURE * features // max(samples, 1))
        count = count if count <= MOST * total else total
    else:
        count = max(1, round(fraction * total))
    if count >= total:
        return None
    within = torch.rand(samples, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    at = ((torch.arange(count) + within) * (total / count)).long().clamp(max=total - 1)
    return at.to(op.output.device, non_blocking=True)
