"""Means with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import norm, t  # type: ignore[import-untyped]

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean, and how far its confidence interval reaches to both sides; NaN for a single value."""

    mean: float
    half: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Student's t interval of the mean over seeds."""
        count = len(values)
        if count < 2:
            return cls(fmean(values), math.nan, count)
        quantile = float(t.ppf((1 + LEVEL) / 2, count - 1))
        return cls(fmean(values), quantile * stdev(values) / math.sqrt(count), count)

    def percent(self, sign: bool = False) -> str:
        """In percent or percentage points."""
        mean = f"{100 * self.mean:{'+' if sign else ''}.2f}"
        return mean if math.isnan(self.half) else f"{mean} ± {100 * self.half:.2f}"

    @property
    def verdict(self) -> str:
        """Whether a difference differs from 0."""
        if math.isnan(self.half):
            return "one seed"
        if abs(self.mean) <= self.half:
            return "level"
        return "better" if self.mean > 0 else "worse"


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The score interval of a share (Wilson 1927)."""
    z = float(norm.ppf((1 + LEVEL) / 2))
    share, scale = hits / count, 1 + z**2 / count
    middle = (share + z**2 / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)
