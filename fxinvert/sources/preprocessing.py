"""Whether data come as the model expects them: what it says of that itself, and whether it answers better than chance."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fxinvert.sources.options import DataOptions

#: numbers that differ by less are the same, and standard deviations by which an accuracy exceeds chance
CLOSE, SIGMAS = 1e-2, 3.0


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects of its images.

    Attributes:
        mean, std: per channel, of pixels in [0, 1]; none: they are left as they are.
        size: (height, width); None: any.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None

    def differs(self, options: DataOptions) -> str | None:
        """How data are read otherwise, and with which options they would not be; None: as expected."""
        wanted = {"--mean": self.mean, "--std": self.std, "--resize": self.size or ()}
        given = {"--mean": options.mean, "--std": options.std, "--resize": options.resize or self.size or ()}
        wrong = [name for name, values in wanted.items() if not _same(values, given[name])]
        if not wrong:
            return None
        told = " ".join(f"{name} {_text(wanted[name])}" for name in wrong)
        return f"the model was made for other inputs: {told}"


def no_better_than_chance(hits: float, samples: int, classes: int, most_frequent: int) -> str | None:
    """Why an accuracy says nothing; None: it is better than both guessing and always the same answer.

    An accuracy counts as better if nothing is wrong, or it exceeds the larger of 1/`classes` and the share of the most frequent label by three
    standard deviations of a binomial share.

    Args:
        hits: right answers.
        samples: how many were asked for.
        classes: that the model tells apart.
        most_frequent: how many samples have the most frequent label.
    """
    share, chance = hits / samples, max(1 / classes, most_frequent / samples)
    if hits == samples or share > chance + SIGMAS * math.sqrt(chance * (1 - chance) / samples):
        return None
    return (
        f"before training {100 * share:.1f} % of {samples} samples are right, no better than chance "
        f"({100 * chance:.1f} %)"
    )


def _same(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    count = max(len(first), len(second))  # one number is for all channels
    one, other = (values * count if len(values) == 1 else values for values in (first, second))
    return len(one) == len(other) and all(abs(a - b) <= CLOSE for a, b in zip(one, other, strict=True))


def _text(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values) or "none"
