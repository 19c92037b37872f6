"""What each reference network is shown: its samples in three parts, always the same ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxinvert.models.data import digits, stratified_split
from fxinvert.models.road import drives
from fxinvert.models.samples import OUTPUT, Parts, Samples
from fxinvert.models.text import TEXT, windows

HELD_OUT = 270

#: brightness of the clean image from which on a pixel is faint, and bright
FAINT, BRIGHT = 0.1, 0.6
NOISE = 0.1

CONTEXT = 32


def digit_classes() -> Parts:
    """Images (N, 1, 8, 8) of digits, and which digit it is (N,): 1,077, 270 and 450 samples."""
    data = digits()
    kept, held = stratified_split(data.y_train, HELD_OUT)
    train = Samples((data.x_train,), {OUTPUT: data.y_train})
    return Parts(train.select(kept), train.select(held), Samples((data.x_test,), {OUTPUT: data.y_test}))


def digit_pixels() -> Parts:
    """Noisy images (N, 1, 8, 8), and what each pixel (N, 8, 8) was before: 0 background, 1 faint, 2 bright."""

    def noisy(samples: Samples, generator: torch.Generator) -> Samples:
        (clean,) = samples.inputs
        levels = (clean >= FAINT).long() + (clean >= BRIGHT).long()
        noise = NOISE * torch.randn(clean.shape, generator=generator)
        return Samples((clean + noise,), {OUTPUT: levels.squeeze(1)})

    return _each(digit_classes(), noisy)


def digit_queries() -> Parts:
    """Images (N, 1, 8, 8) and queries (N, 4) -> the "digit" (N,) and an "offset" (N, 1).

    A query is a direction (cosine and sine), a scale and a shift. It asks how far the centre of the ink lies along the
    direction, from the image's centre, in pixels: times the scale, plus the shift.
    """

    def asked(samples: Samples, generator: torch.Generator) -> Samples:
        (images,) = samples.inputs
        angle, scale, shift = torch.rand(3, len(samples), generator=generator)
        angle, scale, shift = 2 * torch.pi * angle, 1 + scale, shift - 0.5
        offset = scale * (_centre(images) * torch.stack([angle.cos(), angle.sin()], 1)).sum(1) + shift
        queries = torch.stack([angle.cos(), angle.sin(), scale, shift], 1)
        return Samples((images, queries), {"digit": samples.labels[OUTPUT], "offset": offset[:, None]})

    return _each(digit_classes(), asked)


def characters() -> Parts:
    """Pieces of the text (N, 32) and their next characters (N, 32): the first 80 %, the next 10 %, the last 10 %."""
    first, second = len(TEXT) * 8 // 10, len(TEXT) * 9 // 10

    def part(text: str, every: int) -> Samples:
        tokens, following = windows(text, CONTEXT, every)
        return Samples((tokens,), {OUTPUT: following})

    return Parts(part(TEXT[:first], 3), part(TEXT[first:second], 8), part(TEXT[second:], 8))


def driving() -> Parts:
    """1,200, 300 and 500 rendered scenes; see `fxinvert.models.road`."""
    return Parts(drives(1200, seed=0), drives(300, seed=1), drives(500, seed=2))


def _each(parts: Parts, change: Callable[[Samples, torch.Generator], Samples]) -> Parts:
    changed = [
        change(samples, torch.Generator().manual_seed(seed))
        for seed, samples in enumerate((parts.train, parts.held_out, parts.test))
    ]
    return Parts(*changed)


def _centre(images: Tensor) -> Tensor:
    """The centre of the ink, right and down from the image's: (N, 1, H, W) -> (N, 2)."""
    ink = images.squeeze(1) / images.sum((1, 2, 3))[:, None, None]
    down, right = (torch.arange(size) - (size - 1) / 2 for size in ink.shape[1:])
    return torch.stack([(ink.sum(1) * right).sum(1), (ink.sum(2) * down).sum(1)], 1)
