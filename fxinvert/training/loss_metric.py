"""The curvature of the task's loss in the output, as directions: H = E[s sᵀ] for every sample.

Cross-entropy: H = diag(p) − p pᵀ with p the softmax of the logits, of which S = diag(√p) − p √pᵀ is a root (SSᵀ = H).
Mean squared error over k numbers: H = 2/k · I. So s = S ε with random signs ε (Hutchinson 1989), or with the unit vectors one after
the other for all of H. Where a sample has several answers, each has its share, and signs of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fxinvert.labels import IGNORED, flat_classes, is_classification, shares
from fxinvert.output_target import regression
from fxinvert.training.fingerprint import mixed

#: a multiple of it tells the entries of one sample apart
_ODD = 0x1E3779B97F4A7C15


@dataclass(frozen=True)
class Answers:
    """What is asked of one output.

    Attributes:
        values: logits `(N, C)` or numbers `(B, k)`, differentiable in the output.
        descent: minus the gradient of the samples' losses in the values.
        root: S times vectors of the shape of the values.
    """

    values: Tensor
    descent: Tensor
    root: Callable[[Tensor], Tensor]


def answers(output: Tensor, labels: Tensor) -> Answers:
    """What is asked of an output `(B, …)`, sample by sample.

    Raises:
        DataError: the labels do not fit the outputs.
    """
    if is_classification(labels):
        logits, classes = flat_classes(output, labels)
        probable = logits.detach().softmax(1)
        share = shares(classes, len(output)).to(probable)[:, None]
        wanted = F.one_hot(classes.masked_fill(classes == IGNORED, 0), logits.shape[1])
        half = probable.sqrt()

        def root(vector: Tensor) -> Tensor:
            return share.sqrt() * (half * vector - probable * (half * vector).sum(1, keepdim=True))

        return Answers(logits, share * (wanted - probable), root)
    numbers, wanted = output.flatten(1), regression(output, labels).flatten(1)
    each = 2 / numbers.shape[1]
    return Answers(numbers, each * (wanted - numbers).detach(), lambda vector: each**0.5 * vector)


def directions(asked: Sequence[Answers], hashes: Tensor, count: int) -> Iterator[list[Tensor]]:
    """`count` directions s, or as many as there are numbers to a sample if these are fewer: then E is a sum, else a mean.

    Args:
        asked: of each output.
        hashes: of the samples' content, `(B,)` int64: a sample has the same signs in any batch, place and process.
        count: at least 1.

    Yields:
        for each output, s of the shape of its values, so weighted that H is the sum of s sᵀ.
    """
    samples = len(hashes)
    widths = [own.values.numel() // samples for own in asked]
    entries = sum(widths)
    for number in range(min(count, entries)):
        places = torch.arange(entries, device=hashes.device)
        if count >= entries:
            signs = (places == number).expand(samples, entries)
            scale = 1.0
        else:
            bits = mixed(mixed(hashes)[:, None] + (places + 1 + number * entries) * _ODD)
            signs, scale = 2 * (bits >> 62 & 1) - 1, count**-0.5
        parts = torch.split(signs, widths, 1)
        yield [
            own.root(scale * part.reshape(own.values.shape).to(own.values))
            for own, part in zip(asked, parts, strict=True)
        ]
