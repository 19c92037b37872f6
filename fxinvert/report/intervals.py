"""How sure a figure is: Wilson's interval for shares of independent answers, the bootstrap for anything else."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

#: of a standard normal variable, 95 % lie within so many standard deviations
Z = 1.959964
RESAMPLES, SEED = 2000, 0
WILSON, BOOTSTRAP = "Wilson, 95 %", "bootstrap over samples, 95 %"


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval, and how that was found."""

    value: float
    low: float
    high: float
    how: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def share(hits: Tensor) -> Estimate:
    """The mean of 0s and 1s `(N,)`, with the interval of Wilson 1927; a bootstrap where there are values between."""
    count, value = len(hits), float(hits.double().mean())
    if bool(((hits > 0) & (hits < 1)).any()):
        return mean(hits)
    centre = (value + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(value * (1 - value) / count + Z**2 / (4 * count**2))
    # rounding must not put the share outside
    low, high = min(max(centre - half, 0.0), value), max(min(centre + half, 1.0), value)
    return Estimate(value, low, high, WILSON)


def mean(values: Tensor) -> Estimate:
    """The mean of `(N,)` numbers, one per sample, with the percentile interval of the bootstrap (Efron 1979).

    Given the differences of paired numbers, it is that of the change. The resamples are always the same ones.
    """
    known = values.double().cpu()
    generator = torch.Generator().manual_seed(SEED)
    means = torch.stack(
        [
            known[torch.randint(len(known), (len(known),), generator=generator)].mean()
            for _ in range(RESAMPLES)
        ]
    )
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return Estimate(float(known.mean()), low, high, BOOTSTRAP)
