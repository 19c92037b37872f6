"""Fingerprints of data: exact integers, so that they do not depend on where or in how many parts they were made.

Every sample has a hash of its bits; a fingerprint adds hashes up modulo 2⁶⁴. What does not depend on the order tells
whether a later pass saw the same samples, and whether only their labels differ; what does tells whether a piece of the
data is the same piece.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fxinvert.training.batch import Batch, tensors_of

#: one sample in this many is kept aside
HELD_OUT = 5
#: words that are hashed at a time, few enough for the processor's cache
_WORDS = 2**16
_MASK = 2**64 - 1
_ODD = 0x1E3779B97F4A7C15


@dataclass(frozen=True)
class Fingerprint:
    """Sums over samples.

    Attributes:
        samples: how many.
        inputs, labels, pairs: of the samples in any order: of what they are, and of which label belongs to which input.
        ordered: the same of pairs in this order, cut into these batches.
    """

    samples: int = 0
    inputs: int = 0
    labels: int = 0
    pairs: int = 0
    ordered: int = 0

    def __add__(self, other: Fingerprint) -> Fingerprint:
        total = [(a + b) & _MASK for a, b in zip(self._numbers, other._numbers, strict=True)]
        return Fingerprint(*total)

    def __str__(self) -> str:
        return "-".join(f"{value:x}" for value in self._numbers)

    @property
    def _numbers(self) -> tuple[int, ...]:
        return self.samples, self.inputs, self.labels, self.pairs, self.ordered


def fingerprint(batch: Batch, number: int) -> tuple[Fingerprint, Tensor]:
    """The fingerprint of one batch, and which of its samples are kept aside `(B,)`.

    A sample's side depends on the bits of its first input alone: not on its batch, its place or its device.

    Args:
        batch: any device.
        number: of the batch in its piece of the data.
    """
    first, *others = map(bits_hash, tensors_of(batch.inputs))
    inputs, labels = _combined([first, *others]), _combined(map(bits_hash, tensors_of(batch.labels)))
    pairs = mixed(inputs * 3 + mixed(labels))
    places = torch.arange(len(batch), device=pairs.device) + (number + 1) * 2**32
    sums = torch.stack([inputs, labels, pairs, mixed(pairs + places * _ODD)]).sum(1).tolist()
    return Fingerprint(len(batch), *(value & _MASK for value in sums)), _kept_aside(first)


def kept_aside(samples: Tensor) -> Tensor:
    """Which samples are kept aside, by their content: `(B, …)` → `(B,)` bool."""
    return _kept_aside(bits_hash(samples))


def fold_of(samples: Tensor, folds: int) -> Tensor:
    """The number of each sample's fold, by its content, on both sides alike: `(B, …)` → `(B,)`."""
    return _number(bits_hash(samples)) // HELD_OUT % folds


def bits_hash(samples: Tensor) -> Tensor:
    """The sum of each sample's bits, as integers, times odd pseudo-random numbers, modulo 2⁶⁴: `(B, …)` → `(B,)`."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[samples.element_size()]
    if samples.dtype == torch.bool:
        samples = samples.to(torch.uint8)
    bits = samples.contiguous().view(words).reshape(len(samples), -1)
    odd = _odd(bits.shape[1], bits.device)
    rows = max(_WORDS // bits.shape[1], 1) if bits.shape[1] else 1
    return torch.cat([(part.long() * odd).sum(1) for part in torch.split(bits, rows)])


@lru_cache(8)
def _odd(count: int, device: torch.device) -> Tensor:
    """Odd pseudo-random numbers, the same everywhere: `(count,)`."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1).to(device)


def _kept_aside(hashes: Tensor) -> Tensor:
    return _number(hashes) % HELD_OUT == 0


def _number(hashes: Tensor) -> Tensor:
    """What samples are told apart by: the highest bits, which depend on all of the words."""
    return (hashes >> 40) & 0xFFFFFF


def _combined(hashes: Iterable[Tensor]) -> Tensor:
    """One hash of several, which tells their order."""
    first, *others = map(mixed, hashes)
    for other in others:
        first = mixed(first * 5 + other)
    return first


def mixed(values: Tensor) -> Tensor:
    """Scrambles 64-bit integers, one to one, so that sums of them are not sums of what went in."""
    for shift in (29, 31):
        values = (values ^ (values >> shift)) * _ODD
    return values ^ (values >> 32)
